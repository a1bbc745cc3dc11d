# SPDX-License-Identifier: Apache-2.0

"""The smallest call of a pipeline's denoiser, which shows the layout of its output, and the stand-in made of it."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from .denoiser_call import denoiser_of
from .denoiser_format import DenoiserFormat, uncompiled
from .inputs import parameters_of
from .recording import PROBE_PROMPTS, record_call
from .stand_in import Answer, answer_like, replaced_forward


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


@contextmanager
def answered_by(pipeline: DiffusionPipeline, answer: Answer | None, latents_name: str) -> Iterator[None]:
    """
    Let `answer` stand in for a pipeline's denoiser inside the block; with `None` the denoiser computes itself.

    A second denoiser of the same class, which takes over at low noise (Wan 2.2), is replaced as well. Hooks on the
    denoisers run as before.
    """
    with ExitStack() as stack:
        if answer is not None:
            for denoiser in denoisers_of(pipeline):
                stack.enter_context(replaced_forward(denoiser, answer, latents_name))
        yield


def denoisers_of(pipeline: DiffusionPipeline) -> Sequence[torch.nn.Module]:
    """The denoiser, and others of its class among the components."""
    called, kind = denoiser_of(pipeline), type(uncompiled(denoiser_of(pipeline)))
    modules = [m for m in getattr(pipeline, "components", {}).values() if isinstance(m, torch.nn.Module)]
    return [called, *(m for m in modules if m is not called and isinstance(uncompiled(m), kind))]
