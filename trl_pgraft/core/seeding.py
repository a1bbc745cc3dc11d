# SPDX-License-Identifier: Apache-2.0

"""
Seeds of everything random.

No two samples or training draws of a run share their noise. Torch's generator on the CPU, which pipelines are handed,
keeps 32 bits of its seed: its seeds are numbered and permuted, so that all of a run are distinct. Noise that the
library draws itself has a key of 128 bits.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


# What pipelines are handed generators for.
PURPOSES = ("rollout", "evaluation", "completion")
BITS = 32


def seed_of(*parts: Any) -> int:
    r"""
    A 63-bit seed that depends on `parts` alone, and not on batches, processes or order.

    Args:
        parts:
            What the random numbers are for, as values that JSON has: the run's seed, an iteration, a prompt's index.
    """
    return _hash_of(parts, 8) >> 1


def _hash_of(parts: Sequence[Any], size: int) -> int:
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=size).digest(), "big")


def sample_seed(run: int, purpose: str, number: int) -> int:
    r"""
    Seed of a generator that a pipeline is handed: 32 bits, distinct for all purposes and numbers of a run.

    Args:
        run (`int`):
            The run's seed.
        purpose (`str`):
            One of `PURPOSES`.
        number (`int`):
            Number of the sample among those of its purpose, from 0.

    Raises:
        `ValueError`: there are no more distinct seeds.
    """
    counter, half = number * len(PURPOSES) + PURPOSES.index(purpose), BITS // 2
    if not 0 <= counter < 1 << BITS:
        raise ValueError(
            f"{purpose} sample number {number}: a run has {2**BITS // len(PURPOSES)} distinct seeds of a kind, and no "
            "more. Start another run, with another `seed`."
        )
    # A Feistel network, which is a permutation whatever its function is.
    left, right = divmod(counter, 1 << half)
    for turn in range(4):
        left, right = right, left ^ seed_of(run, turn, right) % (1 << half)
    return left << half | right


def generator_of(*parts: Any) -> torch.Generator:
    """A generator on the CPU for orders and choices, seeded by [`seed_of`] with these `parts`."""
    return torch.Generator().manual_seed(seed_of(*parts))


def noise_of(shape: Sequence[int], *parts: Any) -> torch.Tensor:
    r"""
    Standard normal noise on the CPU, float32, of a generator whose key is a hash of 128 bits.

    Args:
        shape (`Sequence[int]`):
            Shape of the noise.
        parts:
            What the noise is for, as of [`seed_of`].
    """
    generator = np.random.Generator(np.random.Philox(key=_hash_of(parts, 16)))
    return torch.from_numpy(generator.standard_normal(math.prod(shape), dtype=np.float32)).reshape(tuple(shape))
