# SPDX-License-Identifier: Apache-2.0

"""
What the library costs on top of what it is built from, as ratios within one process.

    python -m examples.benchmarks.overhead --repeats 15

Rollout: `sample_batches` (record states, seed each sample) over the bare pipeline call for the same images. Training:
`fine_tune_adapter` over a minimal hand-written LoRA loop with the same batches. Runs of the two sides alternate;
medians are compared.
"""

import argparse
import copy
import platform
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from tqdm.auto import tqdm

from examples.quickstart import RECIPE, load_prompts, make_trainer
from trl_pgraft import GraftConfig
from trl_pgraft.adapters.lora import ADAPTER_NAME, adapter_parameters
from trl_pgraft.pipelines.conditioning import record_conditioning
from trl_pgraft.pipelines.inputs import call_pipeline
from trl_pgraft.rollouts.prompts import PromptGroup, samples_of
from trl_pgraft.rollouts.sampling import sample_batches
from trl_pgraft.training.finetuner import fine_tune_adapter
from trl_pgraft.training.graft_loss import graft_loss
from trl_pgraft.training.rows import Rows


BATCH = 32
STEPS = 24


def alternate(ours: Callable[[], None], bare: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Median seconds of each side, run in turns after one warm-up of both."""
    ours(), bare()
    times: dict[Callable, list[float]] = {ours: [], bare: []}
    for _ in tqdm(range(repeats)):
        for side in (ours, bare):
            started = time.perf_counter()
            side()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times[side].append(time.perf_counter() - started)
    return statistics.median(times[ours]), statistics.median(times[bare])


def rollout(trainer, repeats: int) -> tuple[float, float]:
    """`sample_batches` against the pipeline call."""
    prompts = load_prompts("train")[:BATCH]
    samples = samples_of([PromptGroup(i, prompt, 1, {}) for i, prompt in enumerate(prompts)], 0)
    seeds = [sample.seed for sample in samples]
    arguments = {**trainer.policy.arguments, "output_type": "pt"}

    def ours() -> None:
        policy = trainer.policy
        index, arguments = policy.levels.step_index, policy.arguments
        # Sampled as it is iterated over.
        list(sample_batches(policy.pipeline, policy.call, samples, index, BATCH, arguments))

    return alternate(ours, lambda: call_pipeline(trainer.pipeline, prompts, seeds, arguments), repeats)


def training(trainer, repeats: int) -> tuple[float, float]:
    """`fine_tune_adapter` against a loop that does only what LoRA training must."""
    prompts = load_prompts("train")[:BATCH]
    states = torch.randn(BATCH, *_latent_shape(trainer))
    conditioning = record_conditioning(trainer.pipeline, trainer.policy.call, prompts, trainer.policy.arguments)
    rows = Rows(torch.arange(BATCH), torch.arange(BATCH), list(range(BATCH)), torch.zeros(BATCH, dtype=torch.long))
    loss = graft_loss(trainer.policy, ADAPTER_NAME, conditioning)

    def ours() -> None:
        passes, optimizer = iter([rows] * STEPS), trainer.finetuner.optimizer
        fine_tune_adapter(trainer.accelerator, loss, states, passes, optimizer, trainer.config, lambda _: 1e-4)

    return alternate(ours, _hand_written(trainer, states, conditioning), repeats)


def _hand_written(trainer, states: torch.Tensor, conditioning) -> Callable[[], None]:
    device, unet = trainer.accelerator.device, copy.deepcopy(trainer.denoiser)
    embeddings = conditioning.conditional["encoder_hidden_states"].to(device)
    parameters = adapter_parameters(unet, ADAPTER_NAME)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    scheduler, x_0 = trainer.pipeline.scheduler, states.to(device)

    def loop() -> None:
        for _ in range(STEPS):
            noise, timesteps = torch.randn_like(x_0), torch.randint(0, 1000, (BATCH,), device=device)
            prediction = unet(scheduler.add_noise(x_0, noise, timesteps), timesteps, embeddings, return_dict=False)[0]
            torch.nn.functional.mse_loss(prediction, noise).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return loop


def _latent_shape(trainer) -> tuple[int, int, int]:
    size = trainer.denoiser.config.sample_size
    return trainer.denoiser.config.in_channels, size, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    fields = {**RECIPE, "control_adapter": False, "guidance_loss": "conditional", "train_batch_size": BATCH}
    fields |= {"tuned_fraction": 1.0, "caption_dropout": 0.0, "mixed_precision": "no"}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(GraftConfig(output_dir=folder, **fields), load_prompts("train"))
        rows = [("rollout / pipeline call", *rollout(trainer, repeats))]
        rows += [("fine-tuning / hand-written LoRA loop", *training(trainer, repeats))]
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, median of {repeats}, batch {BATCH}")
    print("| what | ours, s | bare, s | ratio |\n| --- | --: | --: | --: |")
    for what, ours, bare in rows:
        print(f"| {what} | {ours:.3f} | {bare:.3f} | {ours / bare:.3f} |")


if __name__ == "__main__":
    main()
