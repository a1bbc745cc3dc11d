# SPDX-License-Identifier: Apache-2.0

"""A stand-in for a denoiser: it returns noise in the denoiser's layout, so that recording a call costs no model."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch

from .denoiser_format import named_arguments


# From the latents argument of a call to what the denoiser would return, or at least to something of its shape.
Answer = Callable[[Any], Any]


def answer_like(given: Any, returned: Any, of_any_axes: bool = False) -> Answer | None:
    r"""
    A function that returns noise for denoiser calls of any size, in the layout of one call that the denoiser computed.

    Args:
        given (`Any`):
            The latents argument of that call: a tensor, or a list of one tensor an image.
        returned (`Any`):
            What the denoiser returned: tensors in tuples, lists or diffusers' output classes.
        of_any_axes (`bool`, *optional*, defaults to `False`):
            Whether what is returned need not have the latents' axes.

    Returns:
        `Callable` or `None`: a function of another call's latents argument. An axis on which the tensors of `given`
            and `returned` agree follows the latents; on another, such as the channels of a learned variance, the
            returned size stays. Of what has another number of axes the rows follow alone. `None` where nothing that
            is returned has the latents' axes.
    """
    generator, small = torch.Generator().manual_seed(0), _first(given)
    laid_out_alike = False

    def noise(like: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        nonlocal laid_out_alike
        laid_out_alike |= like.ndim == small.ndim
        axes = range(like.ndim if like.ndim == small.ndim else min(1, like.ndim))
        shape = [latents.shape[i] if i in axes and n == small.shape[i] else n for i, n in enumerate(like.shape)]
        return torch.randn(shape, generator=generator).to(latents.device, like.dtype)

    def fill(part: Any, latents: Any) -> Any:
        if isinstance(part, list) and isinstance(given, list) and len(part) == len(given):
            return [noise(part[0], own) for own in latents]
        if isinstance(part, torch.Tensor):
            return noise(part, _first(latents))
        if dataclasses.is_dataclass(part) and not isinstance(part, type):  # diffusers' outputs too
            return dataclasses.replace(part, **{f.name: fill(getattr(part, f.name), latents) for f in fields(part)})
        if isinstance(part, tuple) and hasattr(part, "_fields"):
            return type(part)(*(fill(own, latents) for own in part))
        return type(part)(fill(own, latents) for own in part) if isinstance(part, list | tuple) else part

    fill(returned, given)
    return functools.partial(fill, returned) if laid_out_alike or of_any_axes else None


def _first(latents: Any) -> torch.Tensor:
    return latents[0] if isinstance(latents, list | tuple) else latents


@contextmanager
def replaced_forward(denoiser: torch.nn.Module, answer: Answer, latents_name: str) -> Iterator[None]:
    """Let `answer` stand in for a module's forward inside the block; hooks on the module run as before."""
    named, shadowed = named_arguments(denoiser), vars(denoiser).get("forward")

    # With the signature of the original, because pipelines look there for the arguments that a model takes.
    @functools.wraps(denoiser.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return answer(named(*args, **kwargs)[latents_name])

    denoiser.forward = forward
    try:
        yield
    finally:
        if vars(denoiser).get("forward") is forward:  # else what is offloaded was freed, and is as it should be
            del denoiser.forward
            if shadowed is not None:
                denoiser.forward = shadowed
