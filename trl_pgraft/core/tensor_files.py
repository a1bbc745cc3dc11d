# SPDX-License-Identifier: Apache-2.0

"""Tensors on disk in safetensors files, tagged with what they were made from."""

import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .atomic import atomic_save


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], tags: dict[str, str]) -> None:
    r"""
    Write tensors to a file, which is there whole or not at all.

    Args:
        path (`Path`):
            The file; its folder is made if missing.
        tensors (`dict[str, torch.Tensor]`):
            Tensors by name, on any device.
        tags (`dict[str, str]`):
            What distinguishes this file from one of other data or settings; stored in its metadata.
    """
    with atomic_save(path) as aside:
        own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        save_file(own, aside, metadata=tags)


def load_tensors(path: Path, tags: dict[str, str]) -> dict[str, torch.Tensor] | None:
    r"""
    Tensors of a file, if it has these tags.

    Args:
        path (`Path`):
            The file.
        tags (`dict[str, str]`):
            As given to [`save_tensors`].

    Returns:
        `dict[str, torch.Tensor]` or `None`: `None` where there is no file, it has other tags, or it is damaged; a
            warning names a damaged file.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return {n: file.get_tensor(n) for n in file.keys()} if file.metadata() == tags else None  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        warnings.warn(f"{path} cannot be read ({error}); what it held is computed again.", stacklevel=3)
        return None
