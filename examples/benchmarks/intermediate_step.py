# SPDX-License-Identifier: Apache-2.0

"""
Which part of the trajectory to tune on the embedded emoji model: the curves over t_I and the proposal.

    python -m examples.benchmarks.intermediate_step --prompts 64 --output outputs/intermediate_step

Writes `curves.json` (settings, seconds, proposal, curves) and `curves.png`.
"""

import argparse
import json
import platform
import random
import tempfile
import time
from pathlib import Path

import datasets
import torch

from examples.emoji.scenes import CATEGORIES as ALL_CATEGORIES
from examples.quickstart import CATEGORIES, RECIPE, load_prompts, make_trainer
from trl_pgraft import GraftConfig, choose_intermediate_step
from trl_pgraft.report.plots import draw_choice


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64, help="groups of the pilot")
    parser.add_argument("--categories", nargs="+", default=list(CATEGORIES), choices=[*ALL_CATEGORIES, "all"])
    parser.add_argument("--fractions", nargs="+", type=float, help="default: every step, at most ten of them")
    parser.add_argument("--completions", type=int, default=4, help="images that share x_I, where eta > 0")
    parser.add_argument("--guidance", type=float, default=RECIPE["sample_guidance_scale"])
    parser.add_argument("--eta", type=float, default=0.0)
    parser.add_argument("--batch-size", type=int, default=RECIPE["sample_batch_size"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/intermediate_step"))
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    started = time.perf_counter()
    categories = tuple(ALL_CATEGORIES) if "all" in arguments.categories else tuple(arguments.categories)
    prompts = load_prompts("train", categories)
    chosen = random.Random(arguments.seed).sample(prompts, arguments.prompts)
    fields = {**RECIPE, "sample_guidance_scale": arguments.guidance, "sample_eta": arguments.eta}
    fields |= {"sample_batch_size": arguments.batch_size, "seed": arguments.seed}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(GraftConfig(output_dir=folder, **fields), prompts)
        result = choose_intermediate_step(trainer, chosen, arguments.fractions, arguments.completions)
    arguments.output.mkdir(parents=True, exist_ok=True)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    settings = {**vars(arguments), "categories": categories, "output": str(arguments.output), "machine": machine}
    found = {"fraction": result.fraction, "stochastic": result.stochastic, "curves": result.curves}
    record = {"settings": settings, "seconds": time.perf_counter() - started, **found}
    (arguments.output / "curves.json").write_text(json.dumps(record, indent=2) + "\n")
    draw_choice(result, arguments.output / "curves.png")
    report(record)


def report(record: dict) -> None:
    """Print the curves and the proposal."""
    names = ["fraction", "readable", "reward_variance", "information", "difficulty", "difficulty_all"]
    names += ["refit", "refit_error", "selection", "selection_error", "score"]
    print(f"| {' | '.join(names)} |\n|{' --: |' * len(names)}")
    for row in record["curves"]:
        print("| " + " | ".join(f"{row[name]:.3g}" for name in names) + " |")
    machine = record["settings"]["machine"]
    print(f"Proposed tuned_fraction: {record['fraction']:g} ({record['seconds']:.0f} s, {machine})")


if __name__ == "__main__":
    main()
