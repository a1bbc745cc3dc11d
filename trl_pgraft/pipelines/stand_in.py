# SPDX-License-Identifier: Apache-2.0

"""A stand-in for a denoiser: it returns noise in the denoiser's layout, so that recording a call costs no model."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .denoiser_call import denoiser_of
from .denoiser_format import named_arguments, uncompiled


# From the latents argument of a call to what the denoiser would return, or at least to something of its shape.
Answer = Callable[[Any], Any]


def answer_like(given: Any, returned: Any) -> Answer | None:
    r"""
    A function that returns noise for denoiser calls of any size, in the layout of one call that the denoiser computed.

    Args:
        given (`Any`):
            The latents argument of that call: a tensor, or a list of one tensor an image.
        returned (`Any`):
            What the denoiser returned: tensors in tuples, lists or diffusers' output classes.

    Returns:
        `Callable` or `None`: a function of another call's latents argument. An axis on which the tensors of `given`
            and `returned` agree follows the latents; on another, such as the channels of a learned variance, the
            returned size stays. `None` where the two have different numbers of axes, so that they do not correspond.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(like: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        sizes = zip(like.shape, _first(given).shape, latents.shape, strict=True)
        shape = [new if own == old else own for own, old, new in sizes]
        return torch.randn(shape, generator=generator).to(latents.device, like.dtype)

    def fill(part: Any, latents: Any) -> Any:
        if isinstance(part, list) and isinstance(given, list) and len(part) == len(given):
            return [noise(part[0], own) for own in latents]
        if isinstance(part, torch.Tensor):
            return noise(part, _first(latents))
        if isinstance(part, dict):
            return type(part)(**{name: fill(value, latents) for name, value in part.items()})
        return type(part)(fill(own, latents) for own in part) if isinstance(part, list | tuple) else part

    try:
        fill(returned, given)
    except ValueError:
        return None
    return functools.partial(fill, returned)


def _first(latents: Any) -> torch.Tensor:
    return latents[0] if isinstance(latents, list | tuple) else latents


@contextmanager
def answered_by(pipeline: DiffusionPipeline, answer: Answer | None, latents_name: str) -> Iterator[None]:
    """
    Let `answer` stand in for a pipeline's denoiser inside the block; with `None` the denoiser computes itself.

    A second denoiser of the same class, which takes over at low noise (Wan 2.2), is replaced as well. Hooks on the
    denoisers run as before.
    """
    with ExitStack() as stack:
        for denoiser in _denoisers(pipeline) if answer is not None else ():
            stack.enter_context(_replaced_forward(denoiser, answer, latents_name))
        yield


def _denoisers(pipeline: DiffusionPipeline) -> Sequence[torch.nn.Module]:
    called, kind = denoiser_of(pipeline), type(uncompiled(denoiser_of(pipeline)))
    modules = [m for m in getattr(pipeline, "components", {}).values() if isinstance(m, torch.nn.Module)]
    return [called, *(m for m in modules if m is not called and isinstance(uncompiled(m), kind))]


@contextmanager
def _replaced_forward(denoiser: torch.nn.Module, answer: Answer, latents_name: str) -> Iterator[None]:
    named, shadowed = named_arguments(denoiser), vars(denoiser).get("forward")

    # With the signature of the original, because pipelines look there for the arguments that a model takes.
    @functools.wraps(denoiser.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return answer(named(*args, **kwargs)[latents_name])

    denoiser.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del denoiser.forward
        if shadowed is not None:
            denoiser.forward = shadowed
