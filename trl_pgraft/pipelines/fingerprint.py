# SPDX-License-Identifier: Apache-2.0

"""Short hashes that identify the model, the scheduler and the arguments that samples come from."""

import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from ..core.identity import stable
from .denoiser_call import denoiser_of
from .denoiser_format import uncompiled


KIND = "2-"  # Begins fingerprints of whole pipelines; those that earlier versions stored begin otherwise.
BLOCK = 2**18  # Numbers that are summed at a time.
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
NO_SAMPLES = ("safety_checker", "feature_extractor")  # Components that do not change what is sampled.


def sampling_fingerprint(
    pipeline: DiffusionPipeline,
    arguments: dict[str, Any],
    step_index: int,
    weights: Mapping[str, str] | None = None,
    adapters: Sequence[Any] = (),
) -> str:
    """
    Short hash of what the law of recorded states depends on: model, scheduler, sampling arguments and step index.

    Args:
        pipeline (`DiffusionPipeline`):
            The pipeline. Its scheduler enters by its configuration, its other components by their weights.
        arguments (`dict`):
            Arguments of the sampling call.
        step_index (`int`):
            Number of denoiser calls before the recorded state.
        weights (`dict[str, str]`, *optional*):
            What [`weights_of`] returns for the pipeline, where it is known.
        adapters (`Sequence`, *optional*):
            Which of the pipeline's adapters take part, and with what scales.
    """
    weights = weights_of(pipeline) if weights is None else weights
    parts = [*_settings(pipeline, arguments), dict(sorted(weights.items())), step_index, list(adapters)]
    return KIND + hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def weights_of(pipeline: DiffusionPipeline, own: str = "pgraft") -> dict[str, str]:
    """
    Precision and a short hash of the weights of each component, by name: the same wherever they are.

    Args:
        pipeline (`DiffusionPipeline`):
            The pipeline. A safety checker is left out.
        own (`str`, *optional*, defaults to `"pgraft"`):
            Adapters whose names begin so are this package's, and do not count. Others are the model's.
    """
    modules = {n: c for n, c in pipeline.components.items() if isinstance(c, torch.nn.Module) and n not in NO_SAMPLES}
    return {name: _hash_of_module(uncompiled(module), own) for name, module in modules.items()}


def _hash_of_module(module: torch.nn.Module, own: str) -> str:
    # PEFT renames the layers that it wraps.
    named = {name.replace(".base_layer", ""): t for name, t in module.state_dict().items() if f".{own}" not in name}
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(named.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {_sums_of_bits(tensor)}".encode())
    dtypes = {str(t.dtype).removeprefix("torch.") for t in named.values() if t.is_floating_point()}
    return f"{'+'.join(sorted(dtypes))} {digest.hexdigest()}"


def _sums_of_bits(tensor: torch.Tensor) -> list[int]:
    """Sums of a tensor's bits as integers, each times a number of its place, modulo 2^64, on the tensor's device."""
    bits = tensor.detach().contiguous().flatten()
    bits = bits.view(INTEGERS[bits.element_size()])
    factors = _factors(bits.device)
    sums = [(block.long() * factors[: len(block)]).sum() for block in bits.split(BLOCK)]
    return torch.stack(sums).tolist() if bits.numel() else []


@functools.cache
def _factors(device: torch.device) -> torch.Tensor:
    """An odd number of 64 bits for each place in a block, by the splitmix generator."""
    x = np.arange(1, BLOCK + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return torch.from_numpy((x | np.uint64(1)).view(np.int64)).to(device)


def is_same_fingerprint(stored: str, fingerprint: str, former: Callable[[], str]) -> bool:
    """
    Whether a stored fingerprint is this one, or of the kind that earlier versions stored, with a warning.

    Args:
        stored (`str`):
            The stored fingerprint.
        fingerprint (`str`):
            What [`sampling_fingerprint`] returns now.
        former (`Callable[[], str]`):
            Returns what [`former_fingerprint`] does now; called where the stored one may be of that kind.
    """
    if stored == fingerprint or stored.startswith(KIND) or stored != former():
        return stored == fingerprint
    warnings.warn(
        "The stored fingerprint is of an earlier version, and agrees with this pipeline: type, scheduler, arguments, "
        "and the sum of the denoiser's weights to four digits. Not checked: text encoders, VAE, ControlNets, which "
        "other adapters are on, precision, and changes of the denoiser that this sum does not show.",
        stacklevel=3,
    )
    return True


def former_fingerprint(
    pipeline: DiffusionPipeline, arguments: dict[str, Any], step_index: int, own: str = "pgraft"
) -> str:
    """The fingerprint of earlier versions; of the weights it has the sum over the denoiser, to four digits."""
    denoiser = denoiser_of(pipeline)
    base = [p for name, p in denoiser.named_parameters() if f".{own}" not in name]
    weights = sum(float(p.detach().float().abs().sum()) for p in base)
    parts = [*_settings(pipeline, arguments), f"{weights:.3e}", step_index]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def _settings(pipeline: DiffusionPipeline, arguments: dict[str, Any]) -> list[Any]:
    return [
        type(pipeline).__name__,
        {k: str(v) for k, v in sorted(pipeline.scheduler.config.items()) if not k.startswith("_")},
        {k: stable(v) for k, v in sorted(arguments.items())},
    ]


def fingerprint_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """Short hash of tensors, bit for bit, and of their names."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
