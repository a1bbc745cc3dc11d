# SPDX-License-Identifier: Apache-2.0

"""
Compare a flow model with and without noise correction: Frechet distance over FLOPs per image.

    python -m examples.noise_correction.compare --flow outputs/fm/flow --classifier outputs/fm/classifier \
        --output outputs/fm/compare

For each number of sampling steps: the model from N(0, I); with correctors fitted to inverted training images; and from
that inverted noise itself, which makes the training images again. Every result is appended to `results.jsonl`
in the output folder, and what is there already is not computed again. `report.py` makes the table and the figure.
Several processes may share an output folder if they correct different numbers of steps.
"""

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Array3D, Dataset, Features
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from examples.noise_correction.data import DOMAINS, centred, dequantise, load_images, to_bytes
from examples.noise_correction.flow_pipeline import FlowPipeline, load_flow
from examples.noise_correction.frechet import CODE, FEATURES, feature_extractor, features_of, frechet_distance
from examples.noise_correction.report import write_report
from trl_pgraft import NoiseCorrectedPipeline, NoiseCorrectionConfig, NoiseCorrectionTrainer


ARMS = ("gaussian", "network", "lora")
# Of the configuration, by arm. The published Gaussian is the one of full covariance.
CORRECTORS = {"gaussian": "gaussian_full", "gaussian_chosen": "gaussian", "network": "network", "lora": "lora"}
TRAINED = ("network", "lora")
LORA_TARGETS = ("conv1", "conv2", "to_q", "to_k", "to_v", "to_out.0")
UNCORRECTED = (2, 3, 4, 5, 6, 8, 10, 14, 20, 25, 30, 50, 100)
SETTINGS = (
    *("domain", "images", "real_split", "real_images", "inverted_images", "tolerance", "lowest_sigma"),
    *("network_channels", "lora_rank", "training_steps", "training_batch", "learning_rate"),
)
Sampler = Callable[[torch.Tensor], torch.Tensor]


class Comparison:
    """
    Models and real images that all results share.

    Args:
        args (`argparse.Namespace`): the command line.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.path = args.output / "results.jsonl"
        args.output.mkdir(parents=True, exist_ok=True)
        check_settings(args)
        torch.set_float32_matmul_precision("high")  # as convolutions are computed anyway
        self.pipeline = load_flow(args.flow)
        self.device = self.pipeline.device
        weights = {"domain": args.classifier, "inception": args.inception_weights}
        self.extractors = {
            name: feature_extractor(name, weights.get(name), self.device, args.efficientnet_size)
            for name in args.features
        }
        real = real_images(args)
        self.real = {name: self._features(name, real) for name in self.extractors}
        size = self.pipeline.unet.config.sample_size
        self.shape = (self.pipeline.unet.config.in_channels, size, size)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.done = {_key(json.loads(line)) for line in lines}

    def _features(self, name: str, pixels: torch.Tensor) -> torch.Tensor:
        return features_of(centred(pixels), self.extractors[name], self.device)

    def noise(self, seed: int) -> torch.Tensor:
        """The same standard normal noise for all samplers of a seed."""
        generator = torch.Generator().manual_seed(1_000_000 + seed)
        return torch.randn(self.args.images, *self.shape, generator=generator)

    def is_done(self, **key: Any) -> bool:
        """Whether this result is on disk."""
        return _key(key) in self.done

    def measure(self, sampler: Sampler, noise: torch.Tensor, facts: dict[str, Any], **key: Any) -> None:
        """Draw an image from each row of noise, and append FLOPs, distances and `facts` to the results."""
        if self.is_done(**key):
            return
        started = time.perf_counter()
        flops = flops_per_image(sampler, noise[:1].to(self.device))
        parts = noise.split(self.args.batch)
        pixels = torch.cat([to_bytes(self.pipeline.decode(sampler(x.to(self.device))).cpu()) for x in parts])
        distances = {name: frechet_distance(self._features(name, pixels), self.real[name]) for name in self.real}
        seconds = round(time.perf_counter() - started, 1)
        counts = {"images": len(pixels), "real_images": len(next(iter(self.real.values())))}
        facts = {**counts, **facts, "seconds": seconds}
        line = json.dumps({**key, "flops": flops, "frechet": distances, **facts, "frechet_code": CODE})
        with open(self.path, "a") as file:
            file.write(line + "\n")
        self.done.add(_key(key))
        print(line, flush=True)


def real_images(args: argparse.Namespace) -> torch.Tensor:
    """What samples are compared with: the first test images or, to choose settings by, the last training images."""
    if args.real_split == "test":
        return load_images(args.domain, "test", args.data, args.real_images).pixels
    pixels, count = load_images(args.domain, "train", args.data).pixels, args.real_images or 10_000
    if args.inverted_images + count > len(pixels):
        raise SystemExit(
            f"--real-split train: the last {count} of {len(pixels)} training images overlap with the first "
            f"{args.inverted_images}, which are inverted. Lower --inverted-images or --real-images."
        )
    return pixels[-count:]


def check_settings(args: argparse.Namespace) -> None:
    """An output folder is of one choice of `SETTINGS`; another would be taken for it."""
    path, settings = args.output / "settings.json", {name: getattr(args, name) for name in SETTINGS}
    there = json.loads(path.read_text()) if path.exists() else settings
    other = [f"{name}={there[name]}, not {settings[name]}" for name in SETTINGS if there[name] != settings[name]]
    if other:
        raise SystemExit(f"{args.output} was measured with {'; '.join(other)}. Give another --output.")
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(settings, indent=1))
    aside.rename(path)  # whole, as processes may share the folder


def _key(record: dict[str, Any]) -> tuple:
    return tuple(record[name] for name in ("arm", "steps", "corrector_steps", "seed"))


def flops_per_image(sampler: Sampler, noise: torch.Tensor) -> int:
    """Floating-point operations of drawing one image, all networks that take part included."""
    sampler(noise)  # what a pipeline finds out in its first call is not counted
    with FlopCounterMode(display=False) as counter:
        sampler(noise)
    return counter.get_total_flops()


def sampler_of(pipeline: Any, steps: int, **options: Any) -> Sampler:
    """Noise to final states in `steps` steps of a pipeline."""
    return lambda x: pipeline(latents=x, num_inference_steps=steps, output_type="latent", **options).images


def training_latents(pipeline: FlowPipeline, domain: str, data: Path | None, count: int) -> Dataset:
    """The first dequantised training images in the layout of the pipeline's latents."""
    pixels = load_images(domain, "train", data, count).pixels
    latents = pipeline.encode(dequantise(pixels, torch.Generator().manual_seed(0)))
    features = Features({"latents": Array3D(latents.shape[1:], "float32")})
    return Dataset.from_dict({"latents": list(latents.numpy())}, features).with_format("numpy")


def new_trainer(comparison: Comparison, dataset: Dataset, arm: str, steps: int, seed: int) -> NoiseCorrectionTrainer:
    """A trainer of one corrector; those of one number of steps and seed share the inverted noise."""
    args = comparison.args
    config = NoiseCorrectionConfig(
        output_dir=str(args.output / f"steps_{steps}" / f"seed_{seed}"),
        seed=seed,
        corrector=CORRECTORS[arm],
        num_inference_steps=steps,
        network_channels=args.network_channels,
        lora_rank=args.lora_rank,
        tolerance=args.tolerance,
        lowest_sigma=args.lowest_sigma,
        max_unconverged=args.max_unconverged,
        inversion_batch_size=args.batch,
        max_steps=args.training_steps,
        train_batch_size=args.training_batch,
        learning_rate=args.learning_rate,
    )
    rank = args.lora_rank
    lora = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(LORA_TARGETS))
    peft_config = lora if arm == "lora" else None
    return NoiseCorrectionTrainer(config, load_flow(comparison.args.flow), dataset, peft_config=peft_config)


def corrected_pipeline(
    comparison: Comparison, dataset: Dataset, arm: str, steps: int, seed: int
) -> NoiseCorrectedPipeline:
    """Train a corrector, or load it where it was trained already."""
    folder = comparison.args.output / f"steps_{steps}" / f"seed_{seed}" / arm
    if not folder.exists():
        trainer, aside = new_trainer(comparison, dataset, arm, steps, seed), folder.with_name(f"{arm}.tmp")
        trainer.train()
        trainer.save_model(aside)
        aside.rename(folder)  # a run that is killed leaves no half of a corrector
    return NoiseCorrectedPipeline.from_pretrained(folder, load_flow(comparison.args.flow))


def inversion_facts(args: argparse.Namespace, dataset: Dataset) -> dict[str, Any]:
    """What a result tells of the inverted noise that it rests on."""
    return {"inverted_images": len(dataset), "tolerance": args.tolerance, "lowest_sigma": args.lowest_sigma}


def from_inverted_noise(comparison: Comparison, dataset: Dataset, steps: int) -> None:
    """The model from the inverted noise itself, at one number of steps."""
    args = comparison.args
    key = _with("inverted", steps, 0, args.seeds[0])
    if not comparison.is_done(**key):
        inverted = new_trainer(comparison, dataset, "gaussian", steps, args.seeds[0]).invert().noise
        facts = inversion_facts(args, dataset)
        comparison.measure(sampler_of(comparison.pipeline, steps), inverted[: args.images], facts, **key)


def corrected(comparison: Comparison, dataset: Dataset, steps: int) -> None:
    """Correctors at one number of steps."""
    args = comparison.args
    for arm, seed in itertools.product(args.correctors, args.seeds):
        # A linear map is the same in one step or several.
        counts = args.corrector_steps if arm in TRAINED else args.corrector_steps[:1]
        missing = [n for n in counts if not comparison.is_done(**_with(arm, steps, n, seed))]
        if missing:
            pipeline = corrected_pipeline(comparison, dataset, arm, steps, seed)
        training_steps = args.training_steps if arm in TRAINED else 0
        facts = {**inversion_facts(args, dataset), "training_steps": training_steps}
        for n in missing:
            sampler = sampler_of(pipeline, steps, corrector_steps=n)
            comparison.measure(sampler, comparison.noise(seed), facts, **_with(arm, steps, n, seed))


def _with(arm: str, steps: int, corrector_steps: int, seed: int) -> dict[str, Any]:
    return {"arm": arm, "steps": steps, "corrector_steps": corrector_steps, "seed": seed}


def uncorrected(comparison: Comparison) -> None:
    """The model from N(0, I), for every number of steps and seed."""
    for seed, steps in itertools.product(comparison.args.seeds, comparison.args.steps):
        sampler = sampler_of(comparison.pipeline, steps)
        comparison.measure(sampler, comparison.noise(seed), {}, **_with("uncorrected", steps, 0, seed))


def main(args: argparse.Namespace) -> None:
    """Run what is not there yet, then write the report."""
    comparison = Comparison(args)
    uncorrected(comparison)
    data = (args.domain, args.data, args.inverted_images)
    dataset = training_latents(comparison.pipeline, *data) if args.corrected else None
    for steps in args.corrected:
        from_inverted_noise(comparison, dataset, steps)
        corrected(comparison, dataset, steps)
    write_report(args.output)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=DOMAINS, default="fashion_mnist")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's files")
    parser.add_argument("--flow", type=Path, required=True, help="folder of train_flow.py")
    parser.add_argument("--classifier", type=Path, help="folder of train_classifier.py")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, nargs="*", default=UNCORRECTED, help="uncorrected")
    parser.add_argument("--corrected", type=int, nargs="*", default=(2, 3, 5, 10, 25, 50), help="that are corrected")
    parser.add_argument("--correctors", nargs="*", choices=CORRECTORS, default=ARMS)
    parser.add_argument("--corrector-steps", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--images", type=int, default=10_000, help="drawn for each distance")
    parser.add_argument("--real-split", choices=("test", "train"), default="test", help="train: to choose settings by")
    parser.add_argument("--real-images", type=int, help="of that split: all; of training images the last 10,000")
    parser.add_argument("--inverted-images", type=int, default=30_000, help="training images that are inverted")
    parser.add_argument("--tolerance", type=float, default=1e-2, help="of an inversion, all its steps together")
    parser.add_argument("--lowest-sigma", type=float, default=0.2, help="noise level that is inverted from")
    parser.add_argument("--max-unconverged", type=float, default=0.01)
    parser.add_argument("--network-channels", type=int, default=24)
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--training-steps", type=int, default=2500, help="of each corrector")
    parser.add_argument("--training-batch", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=2000, help="images drawn or inverted at a time")
    parser.add_argument("--features", nargs="+", choices=FEATURES, default=("domain",))
    parser.add_argument("--efficientnet-size", type=int, default=224)
    parser.add_argument("--inception-weights", type=Path)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
