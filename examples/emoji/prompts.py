# SPDX-License-Identifier: Apache-2.0

"""
Make the prompt files: `prompts/train.jsonl`, `held_out.jsonl` and `test.jsonl`.

    python -m examples.emoji.prompts

The splits share no specification: a prompt held out differs from every training prompt in what it asks for, not only
in its wording ("a cat left of a dog" and "a dog right of a cat" count as the same).
"""

import itertools
import json
import random
from pathlib import Path

from examples.emoji.scenes import (
    BACKGROUNDS,
    CATEGORIES,
    FOLDER,
    NOUNS,
    NUMBERS,
    OPENINGS,
    STYLES,
    Spec,
    caption,
)


SEED = 0
_SMALL = {"single": 32, "count": 128, "two_objects": 64, "relation": 128, "background": 48, "background_count": 64}
_LARGE = {"single": 64, "count": 288, "two_objects": 160, "relation": 320, "background": 96, "background_count": 160}
SPLITS = {"train": _LARGE, "held_out": _SMALL, "test": _SMALL}


def all_specs(category: str) -> list[Spec]:
    """Every spec of a category, without equal ones in other words (right of is left of, said the other way)."""
    numbers = NUMBERS.values() if "count" in category else [1]
    backgrounds = list(BACKGROUNDS) if "background" in category else [None]
    if category == "two_objects":
        scenes = [(((a, 1), (b, 1)), None) for a, b in itertools.combinations(NOUNS, 2)]
    elif category == "relation":
        pairs = itertools.permutations(NOUNS, 2)
        scenes = [(((a, 1), (b, 1)), relation) for a, b in pairs for relation in ("left of", "above")]
    else:
        scenes = [(((noun, number),), None) for noun in NOUNS for number in numbers]
    return [Spec(*scene, *rest) for scene in scenes for rest in itertools.product(backgrounds, (None, *STYLES))]


def turned(spec: Spec) -> Spec:
    """The same scene said from the second object."""
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", None: None}
    return Spec(spec.objects[::-1], opposite[spec.relation], spec.background, spec.style)


def draw(category: str, rng: random.Random) -> dict[str, list[Spec]]:
    """Deal a category's specs out to the splits in the proportions of `SPLITS`."""
    specs = all_specs(category)
    rng.shuffle(specs)
    total = sum(sizes[category] for sizes in SPLITS.values())
    dealt, start = {}, 0
    for split, sizes in SPLITS.items():
        stop = start + len(specs) * sizes[category] // total
        dealt[split], start = specs[start:stop], stop
    return dealt


def records(specs: list[Spec], size: int, rng: random.Random) -> list[dict]:
    """`size` different prompts on the specs: each spec once before any spec is repeated in another wording."""
    openings = {spec: rng.sample(OPENINGS, len(OPENINGS)) for spec in specs}
    rows = []
    for turn in range(len(OPENINGS)):
        for spec in specs[: size - len(rows)]:
            said = turned(spec) if len(spec.objects) > 1 and rng.random() < 0.5 else spec
            row = {"prompt": caption(said, openings[spec][turn]), "category": said.category}
            rows.append(row | {"objects": said.objects, "relation": said.relation, "background": said.background})
    if len(rows) < size:
        raise ValueError(f"only {len(rows)} different prompts for {size}: lower the numbers in SPLITS")
    return rows


def main(folder: Path = FOLDER / "prompts") -> None:
    """Write the three files."""
    rng = random.Random(SEED)
    dealt = {category: draw(category, rng) for category in CATEGORIES}
    folder.mkdir(exist_ok=True)
    for split, sizes in SPLITS.items():
        rows = [row for category in CATEGORIES for row in records(dealt[category][split], sizes[category], rng)]
        rng.shuffle(rows)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
