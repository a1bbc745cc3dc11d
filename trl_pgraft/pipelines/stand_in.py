# SPDX-License-Identifier: Apache-2.0

"""A stand-in for a denoiser: it returns noise in the denoiser's layout, so that recording a call costs no model."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from .denoiser_call import denoiser_of
from .denoiser_format import DenoiserFormat, named_arguments, uncompiled
from .inputs import parameters_of
from .recording import PROBE_PROMPTS, record_call


# From the latents argument of a call to what the denoiser would return, or at least to something of its shape.
Answer = Callable[[Any], Any]
SMALL_EDGES = (16, 32, 64, 128, 256)  # pixels


def smallest_answer(pipeline: DiffusionPipeline, kwargs: dict[str, Any], format: DenoiserFormat) -> Answer | None:
    """The stand-in's output, in the layout of one call that the denoiser computes at the smallest size it takes."""
    *smaller, own = _smaller_arguments(pipeline, kwargs)
    for arguments in smaller:
        try:
            step = record_call(pipeline, PROBE_PROMPTS[:1], arguments, steps=0).first
            break
        except Exception:  # whatever a pipeline raises at a size that it does not take
            continue
    else:
        step = record_call(pipeline, PROBE_PROMPTS[:1], own, steps=0).first
    given, output = step.calls[0], step.outputs[0]
    _check_latents(given, output, format, pipeline)
    return answer_like(given[format.latents_name], output)


def _smaller_arguments(pipeline: DiffusionPipeline, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Arguments of ever larger images, those of the call itself last."""
    parameters, own_edge = parameters_of(pipeline), kwargs.get("height") or math.inf
    for edge in SMALL_EDGES if {"height", "image"} & parameters.keys() else ():
        if edge < own_edge:
            # Binned to a resolution of training, a small size would not stay small.
            small = {"height": edge, "width": edge, "num_frames": 1, "use_resolution_binning": False}
            resized = {name: _resized(value, edge) for name, value in kwargs.items()}
            yield {**resized, **{name: value for name, value in small.items() if name in parameters}}
    yield kwargs


def _resized(value: Any, edge: int) -> Any:
    """Images in a smaller size; other arguments as they are."""
    if isinstance(value, list):
        return [_resized(part, edge) for part in value]
    return value.resize((edge, edge)) if isinstance(value, Image.Image) else value


def _check_latents(given: dict[str, Any], returned: Any, format: DenoiserFormat, pipeline: DiffusionPipeline) -> None:
    """The rule on latents: a tensor, of which the prediction has the shape, or more channels (learned variance)."""
    override = "Override DenoiserFormat and pass it as denoiser_format (docs/models.md has examples)."
    latents, output = format.latents(given), format.prediction(returned)
    denoiser = type(denoiser_of(pipeline)).__name__
    for found, what in ((latents, f"argument `{format.latents_name}`"), (output, "output")):
        if not isinstance(found, torch.Tensor):
            raise ValueError(
                f"{denoiser}: its {what} is a {type(found).__name__}, where noisy latents and prediction must be "
                f"tensors. {override}"
            )
    shape, expected = output.shape, latents.shape
    if shape[0] != expected[0] or shape[2:] != expected[2:] or shape[1] < expected[1]:
        raise ValueError(
            f"{denoiser}: its argument `{format.latents_name}` has shape {tuple(expected)} and its output "
            f"{tuple(shape)}; the noisy latents must have the prediction's shape. An inpainting model takes further "
            f"channels there. {override}"
        )


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
    return functools.partial(fill, returned) if laid_out_alike else None


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
        if answer is not None:
            for denoiser in _denoisers(pipeline):
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

    denoiser.forward = forward
    try:
        yield
    finally:
        if vars(denoiser).get("forward") is forward:  # else what is offloaded was freed, and is as it should be
            del denoiser.forward
            if shadowed is not None:
                denoiser.forward = shadowed
