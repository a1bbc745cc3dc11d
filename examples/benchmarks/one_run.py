# SPDX-License-Identifier: Apache-2.0

"""
One run of a comparison: train by one method with one seed, measure along the way, and write one Parquet file.

Started by `compare.py`, each run in a process of its own: TRL's DDPO needs an older release of trl than the rest.
"""

import argparse
import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from examples.benchmarks.evaluation import Evaluation, Measured, frechet_distance
from examples.emoji.scenes import CATEGORIES
from examples.emoji.verifier import Verifier
from examples.quickstart import EMOJI, LORA_TARGETS, load_prompts


PICTURED = (48, 4)  # prompts and images of each that are kept, to be looked at


def make_reward() -> Callable[..., tuple[list[float], dict]]:
    """The verifier's soft score in DDPO's convention, on the GPU where there is one."""
    verifier = Verifier.load().to("cuda" if torch.cuda.is_available() else "cpu")
    return lambda images, prompts, metadata: (verifier.soft_score(images, list(prompts)), {})


def lora_config(rank: int, targets: list[str]) -> LoraConfig:
    """The adapter that every method may use."""
    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)


class Recorder:
    """
    Measures a run and keeps count of what it cost. Evaluations do not count.

    Args:
        run (`dict`): `method`, `seed`, `fields` (what the method is given) and the plan's `evaluation`.
        folder (`Path`): where the run's files go.
        base (`Path`, *optional*): file of the untuned model's features, for the distance to its samples.
    """

    def __init__(self, run: dict[str, Any], folder: Path, base: Path | None):
        plan = run["evaluation"]
        self.run, self.folder, self.tables = run, folder, []
        common = {"split": plan["split"], "steps": plan["steps"], "batch": plan["batch"], "limit": plan.get("limit")}
        common |= {"judge": plan.get("judge"), "categories": plan.get("categories")}
        self.prompts = load_prompts("train", plan.get("categories") or CATEGORIES)
        self.curve = Evaluation(images_per_prompt=plan["curve_images"], **common)
        self.final = Evaluation(images_per_prompt=plan["final_images"], **common)
        self.options = {"guidance": plan["guidance"], **run["fields"].pop("evaluation_options", {})}
        self.base = load_file(base)["features"] if base else None
        self.seconds, self.images, self.memory, self.due = 0.0, 0, 0, plan["every"]
        self.every = plan["every"]

    @contextmanager
    def counted(self, images: int) -> Iterator[None]:
        """Count the seconds, the images and the peak memory of what is done inside."""
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize()
            self.memory = max(self.memory, torch.cuda.max_memory_allocated())
        self.seconds += time.perf_counter() - started
        self.images += images

    def is_due(self) -> bool:
        """Whether another point of the curve should be measured."""
        due = self.images >= self.due
        while self.images >= self.due:
            self.due += self.every
        return due

    def measure(self, pipeline: Any, final: bool = False, implied_kl: float = float("nan")) -> None:
        """Evaluate a pipeline as it is now: a point of the curve, and at the end with more images as well."""
        self._measure(pipeline, False, implied_kl)
        if final:
            self._write(self._measure(pipeline, True, implied_kl))

    def _measure(self, pipeline: Any, final: bool, implied_kl: float) -> Measured:
        measured = (self.final if final else self.curve)(pipeline, **self.options)
        table = measured.prompts.assign(
            method=self.run["method"],
            seed=self.run["seed"],
            images=self.images,
            seconds=self.seconds,
            final=final,
            implied_kl=implied_kl,
            memory=self.memory / 2**20,
            frechet_real=measured.frechet_real,
            frechet_base=frechet_distance(measured.features, self.base) if final and self.base is not None else None,
        )
        self.tables.append(table)
        # Whole or not at all: another process may be reading.
        pd.concat(self.tables).to_parquet(self.folder / "evaluations.tmp")
        (self.folder / "evaluations.tmp").rename(self.folder / "evaluations.unfinished")
        means = table.groupby("category").score.mean()
        by_category = " ".join(f"{name} {means[name]:.2f}" for name in CATEGORIES if name in means)
        print(
            f"{self.run['method']} seed {self.run['seed']}: {self.images} images, {self.seconds:.0f} s, score "
            f"{table.score.mean():.3f} judge {table.judge.mean():.3f} frechet {measured.frechet_real:.2f} "
            f"({by_category})",
            flush=True,
        )
        return measured

    def _write(self, measured: Measured) -> None:
        rows, columns = PICTURED
        shown = measured.images[:: max(1, len(measured.images) // rows)][:rows, :columns]
        save_file({"images": (shown * 255).round().byte().contiguous()}, self.folder / "pictures.safetensors")
        if self.base is None:
            save_file({"features": measured.features.contiguous()}, self.folder / "features.safetensors")
        # Last, because the table tells that the run is done.
        (self.folder / "evaluations.unfinished").rename(self.folder / "evaluations.parquet")


def quiet_pipeline() -> StableDiffusionPipeline:
    """The embedded model."""
    return made_quick(StableDiffusionPipeline.from_pretrained(EMOJI / "model"))


def made_quick(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """Without progress bars, and in the memory layout that halves the decoder's time on a CPU; for all methods."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    return pipeline


def leave_untuned(fields: dict[str, Any], recorder: Recorder) -> None:
    """The model as it is."""
    recorder.measure(quiet_pipeline().to("cuda" if torch.cuda.is_available() else "cpu"), final=True)


def train_pgraft(fields: dict[str, Any], recorder: Recorder) -> None:
    """GRAFT, P-GRAFT and their controls: `fields` are those of `GraftConfig`, and `lora_targets`."""
    from trl_pgraft import GraftConfig, PGraftTrainer

    targets = fields.pop("lora_targets", LORA_TARGETS)
    config = GraftConfig(output_dir=str(recorder.folder), **{"save_freq": 10_000, **fields})
    trainer = PGraftTrainer(
        config,
        make_reward(),
        sd_pipeline=quiet_pipeline(),
        train_dataset=datasets.Dataset.from_dict({"prompt": recorder.prompts}),
        peft_config=lora_config(config.lora_rank, targets),
    )
    kl = 0.0
    for epoch in range(config.num_epochs):
        with recorder.counted(trainer.images_per_round):
            trainer.step(epoch, trainer.state.global_step)
        kl = trainer.history[-1]["implied_kl_sum"]
        if recorder.is_due() or epoch + 1 == config.num_epochs:
            with trainer.sampler() as pipeline:
                recorder.measure(pipeline, final=epoch + 1 == config.num_epochs, implied_kl=kl)
    trainer.save_model()


def train_ddpo(fields: dict[str, Any], recorder: Recorder) -> None:
    """
    TRL's own DDPOTrainer (trl 0.23.1): `fields` are those of `DDPOConfig`, and `adapter` (`"ddpo"` for the LoRA of
    its pipeline, `"ours"` for the one that the other methods have, `"none"` for full fine-tuning), `lora_rank`, and
    `prompt_repeats` (how many samples in a row have one prompt).
    """
    from accelerate import PartialState
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    PartialState()  # its pipeline logs through accelerate before it makes an Accelerator
    adapter, rank = fields.pop("adapter"), fields.pop("lora_rank", 16)
    repeats = fields.pop("prompt_repeats", 1)
    prompts, source = recorder.prompts, random.Random(fields["seed"])
    order = itertools.chain.from_iterable([source.choice(prompts)] * repeats for _ in itertools.count())

    class WithAdapter(DefaultDDPOStableDiffusionPipeline):
        def get_trainable_layers(self):
            if adapter != "ours":
                return super().get_trainable_layers()
            self.unet.add_adapter(lora_config(rank, LORA_TARGETS))
            return self.unet

    config = DDPOConfig(project_kwargs={"project_dir": str(recorder.folder)}, save_freq=10_000, **fields)
    pipeline = WithAdapter(str(EMOJI / "model"), use_lora=adapter != "none")
    made_quick(pipeline.sd_pipeline)
    trainer = DDPOTrainer(config, make_reward(), lambda: (next(order), {}), pipeline)
    pipeline.set_progress_bar_config(disable=True)
    images, step = config.sample_batch_size * config.sample_num_batches_per_epoch, 0
    for epoch in range(config.num_epochs):
        with recorder.counted(images):
            step = trainer.step(epoch, step)
        if recorder.is_due() or epoch + 1 == config.num_epochs:
            with torch.no_grad():
                recorder.measure(pipeline.sd_pipeline, final=epoch + 1 == config.num_epochs)


TRAIN = {"base": leave_untuned, "pgraft": train_pgraft, "ddpo": train_ddpo}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds run.json; the results go there too")
    parser.add_argument("--base", type=Path, help="features of the untuned model")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    torch.set_float32_matmul_precision("high")
    run = json.loads((arguments.folder / "run.json").read_text())
    recorder = Recorder(run, arguments.folder, arguments.base)
    fields = run["fields"] if run["trainer"] == "base" else {**run["fields"], "seed": run["seed"]}
    TRAIN[run["trainer"]](fields, recorder)


if __name__ == "__main__":
    main()
