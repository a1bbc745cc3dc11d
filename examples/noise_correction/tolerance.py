# SPDX-License-Identifier: Apache-2.0

"""
What the tolerance of the inversion does to the inverted noise.

    python -m examples.noise_correction.tolerance --flow outputs/fm/flow

The data are noised to the level of `lowest_sigma`, as in `compare.py`, with the same noise for all; "off" is the root
mean square of the difference to the noise of the smallest tolerance.
"""

import argparse
import json
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import torch
from datasets import Dataset

from examples.noise_correction.compare import training_latents
from examples.noise_correction.data import DOMAINS
from examples.noise_correction.flow_pipeline import FlowPipeline, load_flow
from trl_pgraft import NoiseCorrectionConfig, NoiseCorrectionTrainer


HEAD = ("| steps | tolerance | deviation of the noise | off | evaluations a step |", "| --: | --: | --: | --: | --: |")


def inverted(pipeline: FlowPipeline, dataset: Dataset, steps: int, tolerance: float) -> tuple[torch.Tensor, float]:
    """Noise of the data, and denoiser evaluations for each inverted step."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):  # the trainer's own report
        config = NoiseCorrectionConfig(output_dir=folder, num_inference_steps=steps, tolerance=tolerance)
        noise = NoiseCorrectionTrainer(config, pipeline, dataset).invert().noise
        report = json.loads((Path(folder) / "inversion.json").read_text())
    return noise, report["evaluations_per_step"]


def table(pipeline: FlowPipeline, dataset: Dataset, all_steps: list[int], tolerances: list[float]) -> str:
    """One row a number of steps and tolerance, in Markdown."""
    lines = list(HEAD)
    for steps in all_steps:
        exact = None
        for tolerance in sorted(tolerances):
            noise, evaluations = inverted(pipeline, dataset, steps, tolerance)
            exact = noise if exact is None else exact
            off = (noise - exact).square().mean().sqrt()
            lines.append(f"| {steps} | {tolerance:g} | {noise.std():.4f} | {off:.4f} | {evaluations:.1f} |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    torch.set_float32_matmul_precision("high")  # as in compare.py
    pipeline = load_flow(args.flow)
    dataset = training_latents(pipeline, args.domain, args.data, args.images)
    print(table(pipeline, dataset, args.steps, args.tolerances))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=DOMAINS, default="fashion_mnist")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's files")
    parser.add_argument("--flow", type=Path, required=True, help="folder of train_flow.py")
    parser.add_argument("--images", type=int, default=64, help="training images that are inverted")
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 3, 5, 10, 20, 30])
    parser.add_argument("--tolerances", type=float, nargs="+", default=[1e-3, 1e-2, 1e-1])
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
