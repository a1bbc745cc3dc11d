# SPDX-License-Identifier: Apache-2.0

"""Seeds that depend on what is sampled, and not on batches, processes or order."""

import hashlib
import json
from typing import Any


def seed_of(*parts: Any) -> int:
    """A 63-bit seed that is a function of `parts` alone: independent of batching, processes and order."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
