# SPDX-License-Identifier: Apache-2.0

"""Seeds of everything random."""

import hashlib
import json
from typing import Any


def seed_of(*parts: Any) -> int:
    r"""
    A 63-bit seed that depends on `parts` alone, and not on batches, processes or order.

    Args:
        parts:
            What the random numbers are for, as values that JSON has: the run's seed, an iteration, a prompt's index.
    """
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
