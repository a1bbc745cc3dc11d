# SPDX-License-Identifier: Apache-2.0

"""
Measure the verifier, or the second judge, on rendered scenes and on hard negatives (scenes that differ from the prompt
in one thing).

    python -m examples.emoji.check_verifier --scenes 600
    python -m examples.emoji.check_verifier --judge --scenes 600 --styles noto twemoji fluent emojione
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from examples.emoji.judge import Judge
from examples.emoji.scenes import (
    ALL_STYLES,
    BACKGROUNDS,
    CATEGORIES,
    NOUNS,
    RELATIONS,
    STYLES,
    Renderer,
    Spec,
    layout,
    random_spec,
)
from examples.emoji.verifier import Verifier


def _other(values, current, rng: np.random.Generator):
    return rng.choice([value for value in values if value != current]).item()


def hard_negatives(spec: Spec, rng: np.random.Generator) -> dict[str, Spec]:
    """Specs that differ from `spec` in one thing, by the name of that thing."""
    (noun, count), *rest = spec.objects
    strangers = [name for name in NOUNS if name not in spec.nouns]
    wrong = {
        "one noun swapped": replace(spec, objects=((rng.choice(strangers).item(), count), *rest)),
        "one object more": replace(spec, objects=(*spec.objects, (rng.choice(strangers).item(), 1))),
        "count one higher": replace(spec, objects=((noun, count + 1), *rest)),
    }
    if count > 1:
        wrong["count one lower"] = replace(spec, objects=((noun, count - 1), *rest))
    if len(spec.objects) > 1:
        wrong["second object missing"] = replace(spec, objects=spec.objects[:1], relation=None)
    if spec.relation:
        wrong["wrong relation"] = replace(spec, relation=_other(RELATIONS, spec.relation, rng))
    if spec.background:
        wrong["wrong background"] = replace(spec, background=_other(BACKGROUNDS, spec.background, rng))
    return wrong


def measure(
    judge: Verifier | Judge,
    specs: list[Spec],
    shown: list[Spec],
    rng: np.random.Generator,
    styles: Sequence[str] = STYLES,
) -> float:
    """Share of scenes rendered from `shown`, in `styles`, that pass as `specs`."""
    # A relation other than the shown one cannot hold where more than two objects stand, so it is not asked of them.
    shown = [spec if len(spec.nouns) == 2 else replace(spec, relation=None) for spec in shown]
    images = Renderer()(layout(shown, rng, styles=styles), torch.Generator().manual_seed(0))
    batches = zip(images.split(64), [specs[i : i + 64] for i in range(0, len(specs), 64)], strict=True)
    return float(np.mean([score for batch, asked in batches for score in judge.score(batch, asked)]))


def check(judge: Verifier | Judge, scenes: int, seed: int, styles: Sequence[str] = STYLES) -> None:
    """Print one line per category of `scenes` right scenes, and one per kind of hard negative."""
    rng = np.random.default_rng(seed)
    kinds: dict[str, list[tuple[Spec, Spec]]] = {}
    for category in CATEGORIES:
        specs = [random_spec(rng, category, styles) for _ in range(scenes)]
        print(f"right scenes, {category:<17} pass {measure(judge, specs, specs, rng, styles):.3f}")
        for spec in specs:
            for kind, wrong in hard_negatives(spec, rng).items():
                kinds.setdefault(kind, []).append((spec, wrong))
    for kind, pairs in kinds.items():
        rate = measure(judge, *map(list, zip(*pairs, strict=True)), rng, styles)
        print(f"hard negatives, {kind:<22} pass {rate:.4f} of {len(pairs)}")


def milliseconds(judge: Verifier | Judge, batch: int = 32) -> float:
    """Time an image takes, on the CPU."""
    images, specs = torch.rand(batch, 3, 64, 64), [Spec(((NOUNS[0], 1),))] * batch
    judge.score(images, specs)
    start = time.perf_counter()
    judge.score(images, specs)
    return (time.perf_counter() - start) / batch * 1000


def main(judge: bool, folder: Path | None, styles: list[str], scenes: int, seed: int) -> None:
    """Check the verifier or the second judge, and its speed."""
    kind = Judge if judge else Verifier
    checked = kind.load(folder) if folder else kind.load()
    check(checked, scenes, seed, styles)
    print(f"{milliseconds(checked):.2f} ms an image at batch 32, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", action="store_true", help="the second judge, not the verifier")
    parser.add_argument("--folder", type=Path, help="where the weights are, if not in the example's folder")
    parser.add_argument("--styles", nargs="+", choices=ALL_STYLES, default=STYLES, help="what to render the scenes in")
    parser.add_argument("--scenes", type=int, default=600, help="scenes per category")
    parser.add_argument("--seed", type=int, default=1)
    main(**vars(parser.parse_args()))
