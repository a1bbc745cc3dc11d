# SPDX-License-Identifier: Apache-2.0

"""
Score a pipeline on a split of the emoji prompts, per category, and draw a grid.

    python -m examples.emoji.evaluate --split held_out --steps 10 --samples 8 --grid grid.png
"""

import argparse
import json
import textwrap
import time
from collections import defaultdict

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw

from examples.emoji.scenes import CATEGORIES, FOLDER
from examples.emoji.verifier import Verifier


def read_prompts(split: str) -> list[dict]:
    """The rows of one prompt file: `"train"`, `"held_out"` or `"test"`."""
    return [json.loads(line) for line in (FOLDER / "prompts" / f"{split}.jsonl").read_text().splitlines()]


def sample(pipeline, prompts: list[str], steps: int, guidance: float, seeds: list[int], batch: int,
           **options) -> torch.Tensor:  # fmt: skip
    """Images (len(prompts), 3, 64, 64) in [0, 1], each from the noise of its own seed."""
    options |= {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
    images = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        generator = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        images.append(pipeline(prompts[part], generator=generator, **options).images.float().cpu())
    return torch.cat(images)


def evaluate(pipeline, verifier: Verifier, rows: list[dict], steps: int, guidance: float, samples: int, batch: int,
             seed: int = 0) -> tuple[dict[str, dict[str, float]], torch.Tensor]:  # fmt: skip
    """
    Mean score and soft score, and the share of prompts with a right image among `samples`, per category and overall.

    Returns:
        `dict[str, dict[str, float]]`: category (or `"all"`) -> `score`, `soft_score`, `best_of_n`, `prompts`.
        `torch.Tensor`: the images, (rows, samples, 3, 64, 64).
    """
    prompts = [row["prompt"] for row in rows for _ in range(samples)]
    seeds = [seed * 1_000_000 + index for index in range(len(prompts))]
    images = sample(pipeline, prompts, steps, guidance, seeds, batch)
    hard, soft = [], []
    for start in range(0, len(prompts), 256):
        part = slice(start, start + 256)
        hard += verifier.score(images[part], prompts[part])
        soft += verifier.soft_score(images[part], prompts[part])
    hard, soft = np.reshape(hard, (-1, samples)), np.reshape(soft, (-1, samples))
    members = defaultdict(list)
    for index, row in enumerate(rows):
        members[row["category"]].append(index)
        members["all"].append(index)
    table = {
        name: {
            "score": float(hard[members[name]].mean()),
            "soft_score": float(soft[members[name]].mean()),
            "best_of_n": float(hard[members[name]].max(1).mean()),
            "prompts": len(members[name]),
        }
        for name in (*CATEGORIES, "all")
        if name in members
    }
    return table, images.unflatten(0, (-1, samples))


def draw_grid(images: torch.Tensor, rows: list[dict], path: str, per_category: int = 3) -> None:
    """Write a PNG: a few prompts of each category, one a line, with all their samples (at most eight)."""
    chosen = [[i for i, row in enumerate(rows) if row["category"] == name][:per_category] for name in CATEGORIES]
    chosen = sum(chosen, [])
    sheet = Image.new("RGB", (180 + 100 * min(images.shape[1], 8), 100 * len(chosen)), "white")
    pen = ImageDraw.Draw(sheet)
    for line, index in enumerate(chosen):
        pen.text((6, 100 * line + 20), "\n".join(textwrap.wrap(rows[index]["prompt"], 27)), fill="black")
        for column, image in enumerate(images[index, :8]):
            pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            tile = Image.fromarray(pixels).resize((96, 96), Image.Resampling.BICUBIC)
            sheet.paste(tile, (180 + 100 * column, 100 * line))
    sheet.save(path)


def print_table(table: dict[str, dict[str, float]], title: str) -> None:
    """Print the result of [`evaluate`]."""
    print(f"{title}\n{'category':<18}{'prompts':>8}{'score':>8}{'soft':>8}{'best of n':>11}")
    for name, row in table.items():
        numbers = f"{row['score']:>8.3f}{row['soft_score']:>8.3f}{row['best_of_n']:>11.3f}"
        print(f"{name:<18}{row['prompts']:>8}{numbers}", flush=True)


def main(model: str, split: str, limit: int | None, steps: int, guidance: float, samples: int, batch: int, seed: int,
         grid: str | None, json_file: str | None) -> None:  # fmt: skip
    """Evaluate a saved pipeline."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = StableDiffusionPipeline.from_pretrained(model).to(device)
    pipeline.set_progress_bar_config(disable=True)
    rows, start = read_prompts(split)[:limit], time.perf_counter()
    table, images = evaluate(pipeline, Verifier.load(), rows, steps, guidance, samples, batch, seed)
    seconds = time.perf_counter() - start
    print_table(table, f"{split}, {steps} steps, guidance {guidance}, {samples} samples, {device}, {seconds:.0f} s")
    if grid:
        draw_grid(images, rows, grid)
    if json_file:
        with open(json_file, "w") as file:
            json.dump(table, file, indent=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(FOLDER / "model"))
    parser.add_argument("--split", default="held_out", choices=["train", "held_out", "test"])
    parser.add_argument("--limit", type=int, help="only the first prompts of the split")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--samples", type=int, default=1, help="images per prompt")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--grid", help="write this PNG")
    parser.add_argument("--json", dest="json_file", help="write the table here")
    main(**vars(parser.parse_args()))
