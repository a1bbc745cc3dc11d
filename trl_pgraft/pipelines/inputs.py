# SPDX-License-Identifier: Apache-2.0

"""What one pipeline call is handed for each of its prompts: the prompt, and inputs such as images or class labels."""

import copy
import difflib
import inspect
import re
from collections.abc import Sequence
from contextlib import suppress
from types import SimpleNamespace, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from diffusers import DiffusionPipeline

from ..config import GraftConfig, as_annotated
from .pixels import as_image
from .placement import device_of


# Arguments of a pipeline call that the library sets, and what is set in their place.
SET_ELSEWHERE = {
    "prompt": "Give prompts as train_dataset or prompt_function.",
    "generator": "Each sample has a generator of its own; set the configuration's `seed`.",
    "latents": "Each sample starts from noise of its own; set the configuration's `seed`.",
    "output_type": "Rewards are given PIL images, or tensors in DDPO's convention, whatever it is; leave it out.",
    "return_dict": "The output is read by name; leave it out.",
    "batch_size": "Set the configuration's `sample_batch_size`.",
    **dict.fromkeys(
        ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt"),
        "Set the configuration's `samples_per_prompt`, and `sample_batch_size` for the images of one call.",
    ),
}
# In names of what a pipeline is given once for all prompts: adapters, concepts to edit, and what prompts are put into.
ONE_FOR_ALL = re.compile("^prompt$|ip_adapter|gligen|editing|system_prompt|template|instruction|kwargs")


def parameters_of(pipeline: DiffusionPipeline) -> dict[str, inspect.Parameter]:
    """Parameters of the pipeline's call by name."""
    return dict(inspect.signature(pipeline.__call__).parameters)


def takes_prompts(pipeline: DiffusionPipeline) -> bool:
    """Whether the pipeline's call has a prompt; unconditional and class-conditional ones have none."""
    return any(name == "prompt" or p.kind is p.VAR_KEYWORD for name, p in parameters_of(pipeline).items())


def input_names(pipeline: DiffusionPipeline) -> set[str]:
    """
    Parameters of the pipeline's call that may differ from prompt to prompt, by their names and types.

    These are prompts and their embeddings (`prompt_2`, `negative_prompt`, `prompt_embeds`, `prompt_attention_mask`,
    ...), images (`image`, `mask_image`, `control_image`, ...) and `class_labels`. Flags, numbers and templates are
    none, whatever their names.
    """

    return {
        name
        for name, parameter in parameters_of(pipeline).items()
        if name == "class_labels"
        or (
            ("prompt" in name or "image" in name)
            and not ONE_FOR_ALL.search(name)
            and _may_be_batch(pipeline, parameter)
        )
    }


def _may_be_batch(pipeline: DiffusionPipeline, parameter: inspect.Parameter) -> bool:
    """Whether a parameter takes images, tensors, or a text as well as a list of texts."""
    scope, hints = getattr(inspect.unwrap(pipeline.__call__), "__globals__", {}), {"own": Any}
    # A type that cannot be found, such as one that is imported for type checkers alone, counts as none.
    with suppress(Exception):
        hints = get_type_hints(SimpleNamespace(__annotations__={"own": parameter.annotation}), scope)
    types = _types_in(hints["own"])
    if Any in types or inspect.Parameter.empty in types:
        return not _is_setting(parameter.default)
    # Texts are in the list and beside it. Some pipelines with a plain `str` for this one take lists nevertheless.
    texts = types.count(str) + (parameter.name == "negative_prompt")
    return texts > 1 or any(getattr(t, "__name__", "").endswith(("Tensor", "Image", "ndarray")) for t in types)


def _types_in(hint: Any) -> list[Any]:
    """Types that an annotation allows, those inside unions and lists included."""
    is_nested = get_origin(hint) in (Union, UnionType, list, tuple, Sequence)
    return [found for part in get_args(hint) for found in _types_in(part)] if is_nested else [hint]


def _is_setting(value: Any) -> bool:
    """Whether a value is a flag, a number or the like, or a list of such, which no prompt has for itself."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, int | float | dict) or inspect.isroutine(first)


def inputs_of(pipeline: DiffusionPipeline, columns: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """
    Those of a prompt's further columns that the pipeline is handed, with images as [`as_image`] makes them.

    Args:
        pipeline (`DiffusionPipeline`):
            Its call's parameters count.
        columns (`dict`):
            Further columns of the prompt's row.
        arguments (`dict`):
            Arguments of the sampling call; what they set, no column sets.

    Raises:
        `ValueError`: an image cannot be read or converted; the message names its column.
    """
    names = input_names(pipeline) - (arguments.keys() - {"negative_prompt"})
    own = {name: v for name, v in columns.items() if name in names and v is not None and not isinstance(v, bool)}
    return _with_images(pipeline, own)


def _with_images(pipeline: DiffusionPipeline, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a call, with images in the mode that the pipeline encodes."""
    config = getattr(getattr(pipeline, "vae", None), "config", {})
    channels = config.get("in_channels", config.get("input_channels", 3))
    mode = {1: "L", 4: "RGBA"}.get(channels, "RGB")
    is_image = {name: "image" in name and "prompt" not in name for name in inputs}
    return {name: as_image(value, name, mode) if is_image[name] else value for name, value in inputs.items()}


def prompt_arguments(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    arguments: dict[str, Any],
    inputs: Sequence[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """
    Arguments of a pipeline call for `prompts`.

    Args:
        pipeline (`DiffusionPipeline`):
            A pipeline without prompts gets a number of images.
        prompts (`Sequence[str]`):
            `P` prompts.
        arguments (`dict`):
            Arguments of the sampling call. Inputs among them, such as a negative prompt, are repeated for each prompt.
        inputs (`Sequence[dict]`, *optional*):
            `P` dicts of each prompt's own inputs, see [`inputs_of`].

    Raises:
        `ValueError`: some prompts have an input that others lack, or one that the pipeline needs is missing.
    """
    own = _collated(inputs or [{}] * len(prompts))
    repeatable = {n for n in input_names(pipeline) if n == "class_labels" or not _is_setting(arguments.get(n))}
    shared = {n: _repeated(v, len(prompts)) if n in repeatable else v for n, v in arguments.items()}
    call = {n: _placed(v, pipeline) if n in repeatable else v for n, v in {**shared, **own}.items()}
    if takes_prompts(pipeline) and call.get("prompt_embeds") is None:
        call["prompt"] = list(prompts)
    elif "batch_size" in parameters_of(pipeline):
        call["batch_size"] = len(prompts)
    _check_required(pipeline, call)
    return call


def _check_required(pipeline: DiffusionPipeline, call: dict[str, Any]) -> None:
    missing = sorted(
        name
        for name, parameter in parameters_of(pipeline).items()
        if parameter.default is parameter.empty and name in input_names(pipeline) - call.keys()
    )
    if missing:
        raise ValueError(
            f"{type(pipeline).__name__} needs {', '.join(missing)} for each image: give it as a column of "
            "train_dataset (in `evaluate`, of `columns`), or one for all in pipeline_kwargs."
        )


def _collated(inputs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = dict.fromkeys(name for row in inputs for name in row)
    lacking = [name for name in names if any(name not in row for row in inputs)]
    if lacking:
        raise ValueError(f"Some prompts of a batch have no {', '.join(lacking)}, which others have; give it to each.")
    return {name: as_batch([row[name] for row in inputs]) for name in names}


def as_batch(values: list[Any]) -> Any:
    """A list of strings, numbers or images as it is; rows of embeddings, also as nested lists, as one tensor."""
    if isinstance(values[0], list) and values[0] and isinstance(values[0][0], int | float | list):
        values = [torch.tensor(value) for value in values]
    return torch.stack(values) if isinstance(values[0], torch.Tensor) else values


def _placed(value: Any, pipeline: DiffusionPipeline) -> Any:
    """Tensors where the pipeline computes and in its precision, which not every pipeline sees to."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device_of(pipeline), pipeline.dtype if value.is_floating_point() else None)


def _repeated(value: Any, count: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value.expand(count, *value.shape[1:]) if len(value) == 1 else value
    rows = value if isinstance(value, list) or value is None else [value]
    return rows * count if rows and len(rows) == 1 else rows


def sampling_arguments(
    config: GraftConfig, pipeline: DiffusionPipeline, pipeline_kwargs: dict[str, Any] | None
) -> dict[str, Any]:
    """
    Keyword arguments of the pipeline call as `config` sets them, those that the pipeline takes.

    Args:
        config ([`GraftConfig`]):
            Steps, guidance, eta and negative prompt.
        pipeline (`DiffusionPipeline`):
            The pipeline that is called.
        pipeline_kwargs (`dict` or `None`):
            Further arguments, which win over the configuration.

    Raises:
        `ValueError`: see [`checked_arguments`].
    """
    given, taken = checked_arguments(pipeline, pipeline_kwargs), parameters_of(pipeline)
    wanted = {name: getattr(config, field) for name, field in _sampling_fields(taken).items()}
    arguments = {name: value for name, value in wanted.items() if value != ""} | given
    if arguments.get("true_cfg_scale", 1.0) > 1.0 and not {"negative_prompt", "negative_prompt_embeds"} & {*arguments}:
        # With this scale pipelines guide only where they are handed a negative prompt.
        arguments["negative_prompt"] = ""
    return arguments


def checked_arguments(pipeline: DiffusionPipeline, pipeline_kwargs: dict[str, Any] | None) -> dict[str, Any]:
    """
    A copy of a user's arguments of the pipeline call, with images as [`as_image`] makes them.

    Args:
        pipeline (`DiffusionPipeline`):
            The pipeline that is called.
        pipeline_kwargs (`dict` or `None`):
            The arguments.

    Raises:
        `ValueError`: one is no argument of the call, differs from sample to sample, or is needed as it is.
    """
    if not isinstance(pipeline_kwargs or {}, dict):
        raise ValueError(f"pipeline_kwargs is a {type(pipeline_kwargs).__name__}; give a dict of arguments by name.")
    given, taken = dict(pipeline_kwargs or {}), parameters_of(pipeline)
    for name in given:
        if name in SET_ELSEWHERE:
            raise ValueError(f"pipeline_kwargs: `{name}` cannot be given here. {SET_ELSEWHERE[name]}")
        if name not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            close = difflib.get_close_matches(str(name), taken, 1)
            raise ValueError(
                f"pipeline_kwargs: {type(pipeline).__name__} takes no argument {name!r}"
                f"{'; did you mean ' + repr(close[0]) if close else ''}."
            )
    return given | _with_images(pipeline, {name: given[name] for name in given.keys() & input_names(pipeline)})


def config_in_force(
    config: GraftConfig, pipeline: DiffusionPipeline, pipeline_kwargs: dict[str, Any] | None
) -> GraftConfig:
    """
    The configuration with the values that arguments of the pipeline call put in the place of its fields.

    Args:
        config ([`GraftConfig`]):
            The configuration; it is returned as it is where no field is overridden, and left alone otherwise.
        pipeline (`DiffusionPipeline`):
            The pipeline that is called, which determines the argument of guidance.
        pipeline_kwargs (`dict` or `None`):
            Further arguments of the call, such as `num_inference_steps`, which wins over `sample_num_steps`.

    Raises:
        `ValueError`: a value has another type than the field; the message names the argument.
    """
    fields, hints = _sampling_fields(parameters_of(pipeline)), get_type_hints(GraftConfig)
    given = {name: value for name, value in (pipeline_kwargs or {}).items() if name in fields}
    if not given:
        return config
    config = copy.copy(config)
    for name, value in given.items():
        if name == "negative_prompt" and not isinstance(value, str):
            value = ", ".join(as_annotated(f"pipeline_kwargs: {name}", value, list[str] | None) or [])
        setattr(config, fields[name], as_annotated(f"pipeline_kwargs: {name}", value, hints[fields[name]]))
    return config


def _sampling_fields(taken: dict[str, inspect.Parameter]) -> dict[str, str]:
    """Fields of the configuration that set arguments of the pipeline call, by the names of these."""
    names = {
        "num_inference_steps": "sample_num_steps",
        _guidance_argument(taken): "sample_guidance_scale",
        "eta": "sample_eta",
        "negative_prompt": "negative_prompts",
    }
    return {name: field for name, field in names.items() if name in taken}


def _guidance_argument(parameters: dict[str, inspect.Parameter]) -> str:
    """The scale of classifier-free guidance: `true_cfg_scale` where `guidance_scale` is off by default."""
    distilled = parameters.get("guidance_scale")
    is_off = "true_cfg_scale" in parameters and (distilled is None or distilled.default is None)
    return "true_cfg_scale" if is_off else "guidance_scale"


def call_pipeline(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    arguments: dict[str, Any],
    inputs: Sequence[dict[str, Any]] | None = None,
) -> Any:
    """Call the pipeline with one generator a sample, so that a sample does not depend on its batch."""
    return pipeline(
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        **prompt_arguments(pipeline, prompts, arguments, inputs),
    )
