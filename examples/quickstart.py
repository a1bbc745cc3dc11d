# SPDX-License-Identifier: Apache-2.0

"""
P-GRAFT on the embedded emoji model, on a CPU in minutes.

Draws groups of images for training prompts, scores them with the verifier, accepts the best of each group, fine-tunes
a LoRA on their intermediate states, and compares base and tuned model on held-out prompts, paired by seed:

    python -m examples.quickstart --seed 0 --output-dir outputs/quickstart
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig

from examples.emoji.verifier import emoji_score, emoji_soft_score
from trl_pgraft import GraftConfig, PGraftTrainer
from trl_pgraft.report.grids import before_after_grid
from trl_pgraft.rollouts.rollout import Evaluation


EMOJI = Path(__file__).parent / "emoji"
CATEGORIES = ("count", "background_count")
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]
LORA_TARGETS = [*ATTENTION, "conv1", "conv2"]

# Chosen on held-out prompts and other seeds; docs/quickstart.md has the search.
RECIPE = {
    "num_epochs": 2,
    "sample_num_steps": 10,
    "sample_guidance_scale": 3.0,
    "sample_batch_size": 32,
    "sample_num_batches_per_epoch": 16,
    "samples_per_prompt": 8,
    "acceptance_kwargs": {"k": 2},
    "tuned_fraction": 0.6,
    "guidance_loss": "conditional",
    "control_adapter": False,  # better for two rounds of this size; not for four
    "caption_dropout": 0.0,
    "timestep_sampling": "sampler",
    "train_timestep_fraction": 0.1,
    "train_batch_size": 64,
    "train_num_inner_epochs": 39,
    "train_learning_rate": 3e-4,
    "lora_rank": 16,
}


def load_prompts(split: str, categories: tuple[str, ...] = CATEGORIES) -> list[str]:
    """Prompts of a split (train, held_out or test) in some categories."""
    rows = map(json.loads, (EMOJI / "prompts" / f"{split}.jsonl").read_text().splitlines())
    return [row["prompt"] for row in rows if row["category"] in categories]


def make_trainer(config: GraftConfig, prompts: list[str], lora_targets: Sequence[str] = LORA_TARGETS) -> PGraftTrainer:
    """Trainer on the embedded model: rewarded by the verifier's soft score; its yes or no is logged beside it."""
    pipeline = StableDiffusionPipeline.from_pretrained(EMOJI / "model")
    # Halves the decoder's time on a CPU.
    pipeline.vae.to(memory_format=torch.channels_last)
    return PGraftTrainer(
        config,
        sd_pipeline=pipeline,
        reward_funcs=[emoji_soft_score, emoji_score],
        reward_weights=[1.0, 0.0],
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        peft_config=LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_rank,
            init_lora_weights="gaussian",
            target_modules=list(lora_targets),
        ),
    )


def paired_gain(prompts: list[str], base: torch.Tensor, tuned: torch.Tensor) -> tuple[float, float]:
    """Mean difference of paired scores, and half its 95% interval over prompts (images of one prompt are averaged)."""
    groups: dict[str, list[float]] = {}
    for prompt, difference in zip(prompts, (tuned - base).tolist(), strict=True):
        groups.setdefault(prompt, []).append(difference)
    means = torch.tensor([sum(values) / len(values) for values in groups.values()])
    return means.mean().item(), 1.96 * means.std().item() / len(means) ** 0.5


def summarize(prompts: list[str], base: Evaluation, tuned: Evaluation) -> dict[str, float | bool]:
    """Scores of base and tuned model, the gain with its 95% interval, and whether the interval excludes zero."""
    gain, half = paired_gain(prompts, base.values[:, 1], tuned.values[:, 1])
    before, after = base.values[:, 1].mean().item(), tuned.values[:, 1].mean().item()
    interval = [gain - half, gain + half]
    return {
        "prompts": len(set(prompts)),
        "images": len(prompts),
        "base_score": before,
        "tuned_score": after,
        "gain": gain,
        "gain_95_interval": interval,
        "significant": interval[0] > 0,
        "base_soft_score": base.values[:, 0].mean().item(),
        "tuned_soft_score": tuned.values[:, 0].mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/quickstart"))
    arguments = parser.parse_args()
    started = time.perf_counter()
    datasets.disable_progress_bars()
    # Two images a prompt: the prompts are what the interval is about, the noise is averaged a little.
    held_out = load_prompts("held_out") * 2
    config = GraftConfig(seed=arguments.seed, output_dir=str(arguments.output_dir), **RECIPE)
    trainer = make_trainer(config, load_prompts("train"))
    print(f"Base model: {len(held_out)} images of held-out prompts")
    base = trainer.evaluate(held_out, reference=True)
    print(f"Fine-tuning: {config.num_epochs} rounds of {trainer.images_per_round} images")
    history = trainer.train()
    print("Tuned model: the same prompts and seeds")
    tuned = trainer.evaluate(held_out)
    summary = {**summarize(held_out, base, tuned), "seed": arguments.seed, "seconds": time.perf_counter() - started}
    summary |= {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "rounds": history}
    (arguments.output_dir / "metrics.json").write_text(json.dumps(summary, indent=2) + "\n")
    shown = torch.linspace(0, len(held_out) // 2 - 1, 16).long()
    grid = before_after_grid(base.images[shown], tuned.images[shown], [held_out[i] for i in shown.tolist()])
    grid.save(arguments.output_dir / "before_after.png")
    report(summary, arguments.output_dir)


def report(summary: dict, folder: Path) -> None:
    """Print what was measured, plainly."""
    low, high = summary["gain_95_interval"]
    print(
        f"Verifier's score on {summary['prompts']} held-out prompts, {summary['images']} images paired by seed: "
        f"{summary['base_score']:.3f} -> {summary['tuned_score']:.3f}, "
        f"gain {summary['gain']:+.3f}, 95% interval [{low:+.3f}, {high:+.3f}]"
    )
    if not summary["significant"]:
        print("The interval includes zero: this run shows no improvement.")
    print(f"{summary['seconds']:.0f} s. Wrote {folder}: adapter/, samples/, before_after.png, metrics.json")


if __name__ == "__main__":
    main()
