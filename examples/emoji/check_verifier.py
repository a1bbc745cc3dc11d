# Copyright 2026 The trl_pgraft authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Measure the verifier on rendered scenes and on hard negatives (scenes that differ from the prompt in one thing).

    python -m examples.emoji.check_verifier --scenes 600
"""

import argparse
import time
from dataclasses import replace

import numpy as np
import torch

from examples.emoji.scenes import BACKGROUNDS, CATEGORIES, NOUNS, RELATIONS, Renderer, Spec, layout, random_spec
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


def measure(verifier: Verifier, specs: list[Spec], shown: list[Spec], rng: np.random.Generator) -> float:
    """Share of scenes rendered from `shown` that pass as `specs`."""
    # A relation other than the shown one cannot hold where more than two objects stand, so it is not asked of them.
    shown = [spec if len(spec.nouns) == 2 else replace(spec, relation=None) for spec in shown]
    images = Renderer()(layout(shown, rng), torch.Generator().manual_seed(0))
    batches = zip(images.split(64), [specs[i : i + 64] for i in range(0, len(specs), 64)], strict=True)
    return float(np.mean([score for batch, asked in batches for score in verifier.score(batch, asked)]))


def main(scenes: int, seed: int) -> None:
    """Print one line per category, one per kind of hard negative, and the speed."""
    verifier, rng = Verifier.load(), np.random.default_rng(seed)
    kinds: dict[str, list[tuple[Spec, Spec]]] = {}
    for category in CATEGORIES:
        specs = [random_spec(rng, category) for _ in range(scenes)]
        print(f"right scenes, {category:<17} pass {measure(verifier, specs, specs, rng):.3f}")
        for spec in specs:
            for kind, wrong in hard_negatives(spec, rng).items():
                kinds.setdefault(kind, []).append((spec, wrong))
    for kind, pairs in kinds.items():
        rate = measure(verifier, *map(list, zip(*pairs, strict=True)), rng)
        print(f"hard negatives, {kind:<22} pass {rate:.4f} of {len(pairs)}")
    images = torch.rand(32, 3, 64, 64)
    verifier.detect(images)
    start = time.perf_counter()
    verifier.detect(images)
    milliseconds = (time.perf_counter() - start) / 32 * 1000
    print(f"{milliseconds:.2f} ms an image at batch 32, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=600, help="scenes per category")
    parser.add_argument("--seed", type=int, default=1)
    main(**vars(parser.parse_args()))
