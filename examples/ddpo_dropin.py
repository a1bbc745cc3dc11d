# SPDX-License-Identifier: Apache-2.0

"""
A DDPO script whose import line changed, on the embedded emoji model. Before, it began with

    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

It makes images redder, on a CPU in about a minute:

    python examples/ddpo_dropin.py --num_epochs 4 --sample_num_steps 10 --sample_batch_size 8 \
        --sample_num_batches_per_epoch 4 --train_batch_size 4 --train_num_inner_epochs 2 --log_with tensorboard
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from trl_pgraft import DefaultDDPOStableDiffusionPipeline, GraftConfig as DDPOConfig, PGraftTrainer as DDPOTrainer


NOUNS = ["cat", "dog", "penguin", "octopus", "car", "house", "tree", "cake"]


@dataclass
class ScriptArguments:
    """What the script itself is told; the rest is the trainer's configuration."""

    pretrained_model: str = field(
        default=str(Path(__file__).parent / "emoji" / "model"), metadata={"help": "Stable Diffusion to fine-tune."}
    )
    pretrained_revision: str = field(default="main", metadata={"help": "Revision of the model."})
    use_lora: bool = field(default=True, metadata={"help": "Train a LoRA rather than the whole denoiser."})
    save_dir: str = field(default="outputs/ddpo_dropin", metadata={"help": "Where everything is written."})


def prompt_fn() -> tuple[str, dict]:
    """A prompt and its metadata."""
    noun = random.choice(NOUNS)
    return f"a {noun}", {"noun": noun}


def redness(images: torch.Tensor, prompts: tuple[str], metadata: tuple[dict]) -> tuple[torch.Tensor, dict]:
    """How much more red than green and blue an image is, between -1 and 1."""
    red, others = images[:, 0], images[:, 1:].mean(1)
    return (red - others).mean((1, 2)), {}


def image_outputs_logger(image_data: list, global_step: int, tracker) -> None:
    """Send the last batch's images to the tracker, each under its prompt and reward."""
    images, prompts, _, rewards, _ = image_data[-1]
    result = {}
    for image, prompt, reward in zip(images, prompts, rewards, strict=True):
        result[f"{prompt:.25} | {reward.item():.2f}"] = image.unsqueeze(0).float()
    tracker.log_images(result, step=global_step)


def main(arguments: list[str] | None = None) -> DDPOTrainer:
    """Train as the command line says."""
    script_args, training_args = HfArgumentParser((ScriptArguments, DDPOConfig)).parse_args_into_dataclasses(arguments)
    training_args.project_kwargs = {
        "logging_dir": f"{script_args.save_dir}/logs",
        "automatic_checkpoint_naming": True,
        "total_limit": 5,
        "project_dir": script_args.save_dir,
    }
    pipeline = DefaultDDPOStableDiffusionPipeline(
        script_args.pretrained_model,
        pretrained_model_revision=script_args.pretrained_revision,
        use_lora=script_args.use_lora,
    )
    trainer = DDPOTrainer(training_args, redness, prompt_fn, pipeline, image_samples_hook=image_outputs_logger)
    trainer.train()
    trainer.save_model(f"{script_args.save_dir}/model")
    return trainer


if __name__ == "__main__":
    main()
