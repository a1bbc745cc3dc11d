# SPDX-License-Identifier: Apache-2.0

"""Short hashes that identify the model, the scheduler and the arguments that samples come from."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..core.identity import stable
from .denoiser_call import denoiser_of


def sampling_fingerprint(
    pipeline: DiffusionPipeline, arguments: dict[str, Any], step_index: int, own: str = "pgraft"
) -> str:
    """
    Short hash of what the law of recorded states depends on: model, scheduler, sampling arguments and step index.

    Args:
        pipeline (`DiffusionPipeline`):
            The pipeline. Its scheduler enters by its configuration and its denoiser by a sum over the base weights,
            so that a fine-tuned copy has another hash.
        arguments (`dict`):
            Arguments of the sampling call.
        step_index (`int`):
            Number of denoiser calls before the recorded state.
        own (`str`, *optional*, defaults to `"pgraft"`):
            Adapters whose names begin so are this package's, and do not count.
    """
    denoiser = denoiser_of(pipeline)
    # Whatever adapters the pipeline came with are the model's; those of this package are not.
    base = [p for name, p in denoiser.named_parameters() if f".{own}" not in name]
    weights = sum(float(p.detach().float().abs().sum()) for p in base)
    parts = [
        type(pipeline).__name__,
        {k: str(v) for k, v in sorted(pipeline.scheduler.config.items()) if not k.startswith("_")},
        {k: stable(v) for k, v in sorted(arguments.items())},
        f"{weights:.3e}",
        step_index,
    ]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def fingerprint_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Short hash of tensors, bit for bit, and of their names."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
