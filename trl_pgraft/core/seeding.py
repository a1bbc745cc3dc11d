# SPDX-License-Identifier: Apache-2.0

"""Seeds of everything random."""

import hashlib
import json
from typing import Any

import torch


def seed_of(*parts: Any) -> int:
    r"""
    A 63-bit seed that depends on `parts` alone, and not on batches, processes or order.

    Args:
        parts:
            What the random numbers are for, as values that JSON has: the run's seed, an iteration, a prompt's index.
    """
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest(), "big") >> 1


def generator_of(*parts: Any) -> torch.Generator:
    """A generator on the CPU, seeded by [`seed_of`] with these `parts`."""
    return torch.Generator().manual_seed(seed_of(*parts))
