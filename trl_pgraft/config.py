# SPDX-License-Identifier: Apache-2.0

"""The configuration of [`PGraftTrainer`], and what all configurations share: fields with help and their checks."""

import dataclasses
import json
import math
import os
import random
import reprlib
import sys
import typing
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from typing_extensions import deprecated

from .core.acceptance import ACCEPTANCE_RULES, get_acceptance, probabilities_of
from .core.identity import code_of, name_of


if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Kwargs = dict[str, Any]
else:
    Kwargs = dict | str | None  # from a command line it comes as JSON; a configuration that was made has a dict


GUIDANCE_LOSSES = ("conditional", "corrected", "combined")
# Those of diffusers' schedules that need no arguments beside the numbers of steps.
LR_SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
PPO_ONLY_FIELDS = (
    "train_adv_clip_max",
    "train_clip_range",
    "per_prompt_stat_tracking",
    "per_prompt_stat_tracking_buffer_size",
    "per_prompt_stat_tracking_min_count",
)
# Fields that may differ when a run is resumed: they do not change the result, or only what comes after it.
MAY_CHANGE = (
    *PPO_ONLY_FIELDS,
    *("exp_name", "run_name", "log_with", "tracker_kwargs", "tracker_project_name", "logdir"),
    *("accelerator_kwargs", "project_kwargs", "mixed_precision", "allow_tf32", "gradient_checkpointing"),
    *("num_epochs", "save_freq", "num_checkpoint_limit", "output_dir", "resume_from", "resume_from_checkpoint"),
    *("async_reward_computation", "max_workers", "reward_retries", "reward_retry_wait", "reward_timeout"),
    *("eval_prompts", "eval_freq"),
    *("push_to_hub", "hub_model_id", "hub_dataset_id", "hub_private_repo", "hub_token"),
    # Only the product of these counts, over all processes; `resume_signature` adds it.
    *("sample_batch_size", "sample_num_batches_per_epoch"),
    *("train_batch_size", "train_gradient_accumulation_steps"),
)
# A field's range by the words of its error; what follows a semicolon is advice. What is far beyond any use is refused
# where memory depends on it: a mistyped number is an error in words then, and the process is not killed.
_RANGES = {
    "is outside (0, 1]": ("tuned_fraction", "train_timestep_fraction"),
    "is outside [0, 1)": ("caption_dropout", "train_adam_beta1", "train_adam_beta2"),
    "is outside (0, 1)": ("ema_decay",),
    "is outside [0, 1]": ("sample_eta",),
    "must be at least 0": ("reward_retries", "reward_retry_wait", "warmup_steps", "train_adam_weight_decay"),
    "must be at least 1": (
        *("num_epochs", "save_freq", "num_checkpoint_limit", "max_workers", "eval_freq"),
        *("train_gradient_accumulation_steps", "train_num_inner_epochs", "max_merged_rank"),
    ),
    "must be at least 1 and at most 10,000": ("sample_num_steps", "lora_rank"),
    "must be at least 1 and at most 1,000,000": (
        *("sample_batch_size", "sample_num_batches_per_epoch", "train_batch_size"),
    ),
    "must be positive": ("train_learning_rate", "control_scale", "train_adam_epsilon", "train_max_grad_norm"),
    "must be positive; 1.0 is none": ("sample_guidance_scale", "tuned_guidance_scale"),
    "must be positive; None waits without end": ("reward_timeout",),
}
_IN_RANGE: dict[str, Callable[[float], bool]] = {
    "is outside (0, 1]": lambda value: 0 < value <= 1,
    "is outside [0, 1)": lambda value: 0 <= value < 1,
    "is outside (0, 1)": lambda value: 0 < value < 1,
    "is outside [0, 1]": lambda value: 0 <= value <= 1,
    "must be at least 0": lambda value: value >= 0,
    "must be at least 1": lambda value: value >= 1,
    "must be at least 1 and at most 10,000": lambda value: 1 <= value <= 10_000,
    "must be at least 1 and at most 1,000,000": lambda value: 1 <= value <= 1_000_000,
    "must be positive": lambda value: value > 0,
}
# Images of an iteration and process: each has its prompt, seed and state in memory.
MOST_IMAGES = 10_000_000
MADE_UP = 1024  # rewards at most, on which an acceptance rule is tried


def config_field(default: Any, help: str, choices: Collection[str] = (), repr: bool = True) -> Any:
    r"""
    A field of a configuration.

    Args:
        default (`Any`):
            The default value; the type `dict` makes a new empty dict for each configuration.
        help (`str`):
            What the field does, its unit, and what its default means. Command lines show it.
        choices (`Collection[str]`, *optional*, defaults to `()`):
            The only values that the field may have; empty where there are others.
        repr (`bool`, *optional*, defaults to `True`):
            Whether the configuration's `repr` shows the field.
    """
    # `transformers.HfArgumentParser` passes all metadata to argparse, so ranges cannot be stored there.
    metadata = {"help": help, **({"choices": list(choices)} if choices else {})}
    if default is dict:
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata, repr=repr)


def as_annotated(name: str, value: Any, annotation: Any, is_shown: bool = True) -> Any:
    r"""
    A value as its annotation has it. Taken as well are numbers of numpy, numbers in strings (YAML reads `1e-4` as a
    string), an int for a float, a path for a string, and for a list of strings a tuple or one string.

    Args:
        name (`str`):
            Name of the field, for the error's message.
        value (`Any`):
            The value.
        annotation (`Any`):
            `bool`, `int`, `float`, `str`, `list[str]`, `dict` or `Callable`, or a union of these and `None`;
            `Annotated[..., more]` allows `more` too, which no command line can give.
        is_shown (`bool`, *optional*, defaults to `True`):
            Whether the error's message shows the value.

    Raises:
        `ValueError`: it has another type, is no finite number, or a whole one beyond 64 bits.
    """
    kinds: list[Any] = [annotation]
    while nested := next((k for k in kinds if typing.get_origin(k) in (Annotated, typing.Union, UnionType)), None):
        kinds.remove(nested)
        kinds += typing.get_args(nested)
    shown = f"{name}={reprlib.repr(value)}" if is_shown else name
    for kind in kinds:
        try:
            found = _as_kind(value, typing.get_origin(kind) or kind)
        except (TypeError, ValueError, OverflowError):
            continue
        if isinstance(found, int | float) and not abs(found) < (2**63 if isinstance(found, int) else math.inf):
            raise ValueError(f"{shown} is not a finite number, or a whole one beyond 64 bits.")
        return found
    expected = " or ".join(dict.fromkeys(_EXPECTED[typing.get_origin(kind) or kind] for kind in kinds))
    raise ValueError(f"{shown} ({type(value).__name__}) is not {expected}.")


_EXPECTED: dict[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list: "a list of strings",
    dict: "a dict",
    Callable: "a callable",
    NoneType: "None",
}


def _as_kind(value: Any, kind: Any) -> Any:
    """The value as an instance of `kind`; a `TypeError` or `ValueError` where it is none."""
    if kind in (int, float):
        if isinstance(value, Integral | str if kind is int else Real | str) and not isinstance(value, bool):
            return value if type(value) is int and math.isfinite(value) else kind(value)
    elif kind is bool and isinstance(value, np.bool_):
        return bool(value)
    elif kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    elif kind is list and isinstance(value, str | list | tuple):
        return [_as_kind(item, str) for item in ([value] if isinstance(value, str) else value)]
    elif callable(value) if kind is Callable else isinstance(value, kind):
        return value
    raise TypeError


def check_fields(config: "DataclassInstance", ranges: Mapping[str, Collection[str]]) -> None:
    r"""
    Check that a configuration's fields have the types of their annotations, in which they are put, that numbers are
    finite and in range, and choices known.

    Args:
        config (`DataclassInstance`):
            The configuration; its fields are made by [`config_field`].
        ranges (`Mapping[str, Collection[str]]`):
            Names of fields by the words of their error: a key of `_IN_RANGE`, and advice after a semicolon if any.

    Raises:
        `ValueError`: a field has another type, is out of range or has an unknown choice; the message names it.
    """
    hints = typing.get_type_hints(type(config), include_extras=True)
    for f in dataclasses.fields(config):
        value, choices = getattr(config, f.name), f.metadata.get("choices")
        may_be_none = type(None) in typing.get_args(hints[f.name])
        if choices and not (value is None and may_be_none) and not (isinstance(value, str) and value in choices):
            raise ValueError(f"{f.name}={reprlib.repr(value)} is not one of {', '.join(map(repr, choices))}.")
        setattr(config, f.name, as_annotated(f.name, value, hints[f.name], f.repr))
    for words, names in ranges.items():
        for name in names:
            if (value := getattr(config, name)) is not None and not _IN_RANGE[words.partition(";")[0]](value):
                raise ValueError(f"{name}={value} {words}.")


def plain_fields(config: "DataclassInstance", without: Collection[str] = ()) -> dict[str, Any]:
    r"""
    The fields of a configuration as plain values; a callable is given by its name.

    Args:
        config (`DataclassInstance`):
            The configuration.
        without (`Collection[str]`, *optional*, defaults to `()`):
            Names of fields to leave out.
    """
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in without}
    return {name: name_of(v) if callable(v) else v for name, v in values.items()}


def default_values(config: "DataclassInstance") -> dict[str, Any]:
    r"""
    Defaults of a configuration's fields, by name.

    Args:
        config (`DataclassInstance`):
            The configuration, whose values do not matter.
    """
    return {
        f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(config)
    }


@dataclass
class GraftConfig:
    r"""
    Configuration class for the [`PGraftTrainer`].

    The first block has every field of TRL 0.23.1's `DDPOConfig` with its name and meaning. Fields that only PPO uses
    are accepted, and one warning names those that were set. Each field's description is in its metadata:
    `{f.name: f.metadata["help"] for f in dataclasses.fields(GraftConfig)}` lists them, as does `--help` of a script
    that parses this class with TRL's `TrlParser`.

    In each iteration ("epoch" in DDPO's field names) every process samples `sample_batch_size *
    sample_num_batches_per_epoch` images, in groups of `samples_per_prompt`. Samples are accepted by reward within
    their group, and the model is fine-tuned on the accepted ones for `train_num_inner_epochs` passes.

    Raises:
        `ValueError`: a field is out of range; the message names the field and the fix.
    """

    exp_name: str = config_field(os.path.basename(sys.argv[0]).removesuffix(".py"), "Name of this experiment.")
    run_name: str = config_field("", "Name of this run, used by the trackers.")
    seed: int = config_field(
        0, "Random seed. Every sample, timestep and noise depends on it, and none on batch size or processes."
    )
    log_with: str | None = config_field(
        None, "Tracker that accelerate logs to. None: none.", choices=["wandb", "tensorboard", "trackio"]
    )
    tracker_kwargs: Kwargs = config_field(dict, 'Keyword arguments by tracker, e.g. {"wandb": {"entity": "me"}}.')
    accelerator_kwargs: Kwargs = config_field(dict, "Keyword arguments for the accelerator.")
    project_kwargs: Kwargs = config_field(
        dict, "Keyword arguments for accelerate's project configuration (e.g. project_dir)."
    )
    tracker_project_name: str = config_field("trl", "Name of the project in the tracker.")
    logdir: str = config_field("logs", "Folder of the trackers' logs, inside the output folder.")
    num_epochs: int = config_field(100, "Number of iterations: sample, score, accept, fine-tune.")
    save_freq: int = config_field(1, "Iterations between checkpoints; the last iteration is always saved.")
    num_checkpoint_limit: int = config_field(5, "Number of checkpoints to keep; the oldest are removed first.")
    mixed_precision: str | None = config_field(
        None,
        "Precision of the frozen weights and of the forward pass; LoRA weights stay in float32. None (DDPO: fp16): "
        "that of `accelerate launch` if it is not no, its default; else bf16 on an accelerator that has it, fp16 on "
        "other CUDA devices, no on a CPU.",
        choices=["no", "fp16", "bf16"],
    )
    allow_tf32: bool = config_field(True, "Allow TF32 matrix products on GPUs that have them.")
    resume_from: str = config_field("", "Checkpoint folder, or a folder of checkpoints of which the newest is taken.")
    sample_num_steps: int = config_field(50, "Number of steps of the sampler.")
    sample_eta: float = config_field(
        0.0,
        "Stochasticity of the DDIM sampler, from 0 (deterministic) to 1. 0 (DDPO: 1), so that the final image is a "
        "function of the intermediate state.",
    )
    sample_guidance_scale: float = config_field(
        5.0, "Classifier-free guidance scale while sampling; 1.0 is no guidance."
    )
    sample_batch_size: int = config_field(1, "Images of one pipeline call, per process.")
    sample_num_batches_per_epoch: int = config_field(2, "Pipeline calls per iteration and process.")
    train_batch_size: int = config_field(
        1, "Accepted samples of one training step, per process. See docs/comparison.md for larger batches."
    )
    train_use_8bit_adam: bool = config_field(False, "Use 8-bit AdamW of bitsandbytes.")
    train_learning_rate: float = config_field(3e-4, "Learning rate of AdamW.")
    train_adam_beta1: float = config_field(0.9, "AdamW's beta1: decay of the mean of gradients.")
    train_adam_beta2: float = config_field(0.999, "AdamW's beta2: decay of the mean of squared gradients.")
    train_adam_weight_decay: float = config_field(1e-4, "AdamW's weight decay.")
    train_adam_epsilon: float = config_field(1e-8, "AdamW's epsilon.")
    train_gradient_accumulation_steps: int = config_field(1, "Microbatches of one optimizer step.")
    train_max_grad_norm: float = config_field(1.0, "Gradient norm above which gradients are scaled down.")
    train_num_inner_epochs: int = config_field(1, "Passes over the accepted samples of an iteration.")
    train_cfg: bool = config_field(
        False,
        "DDPO's name for `guidance_loss='combined'`. False (DDPO: True): the guided prediction costs a second forward "
        "and backward pass.",
    )
    train_adv_clip_max: float = config_field(5.0, "PPO only; ignored.")
    train_clip_range: float = config_field(1e-4, "PPO only; ignored.")
    train_timestep_fraction: float = config_field(
        1.0,
        "Timesteps each accepted sample is trained at in one pass, as a share of `sample_num_steps` (at least one).",
    )
    per_prompt_stat_tracking: bool = config_field(False, "PPO only; ignored. Acceptance is per prompt in any case.")
    per_prompt_stat_tracking_buffer_size: int = config_field(16, "PPO only; ignored.")
    per_prompt_stat_tracking_min_count: int = config_field(16, "PPO only; ignored.")
    async_reward_computation: bool = config_field(False, "Score a batch in a thread while the next one is sampled.")
    max_workers: int = config_field(2, "Number of threads of `async_reward_computation`.")
    negative_prompts: str = config_field("", "Negative prompt of the guided call; a list is joined by commas.")
    push_to_hub: bool = config_field(False, "Push the adapter to the Hub, with a model card, at the end of training.")

    tuned_fraction: float = config_field(
        0.6,
        "Share of the sampler's steps, from pure noise, that is fine-tuned and run by the tuned model; the reference "
        "model runs the rest. 1.0 is GRAFT, less is P-GRAFT (docs/intermediate_step.md, docs/comparison.md).",
    )
    samples_per_prompt: int | None = config_field(
        None, "Group size M. None: 8, or all images of the iteration where they are fewer."
    )
    acceptance: Annotated[str, Callable] = config_field(
        "top_k",
        f'Acceptance rule: {", ".join(ACCEPTANCE_RULES)}, "package.module:function" or a callable. The last two get a '
        "group's rewards (M,) and return M probabilities; they are tried once on made-up rewards from 0 to 1.",
    )
    acceptance_kwargs: Kwargs = config_field(
        dict, "Arguments of the acceptance rule, e.g. k of top_k (default: M / 4)."
    )
    deduplicate_by: Callable | None = config_field(
        None,
        "Function of (PIL image, prompt); of a prompt's samples with equal values only one is accepted. None: off.",
    )
    sample_from: str = config_field(
        "policy",
        "Model that is sampled: the policy (KL accumulates over iterations) or the untouched reference.",
        choices=["policy", "reference"],
    )
    guidance_loss: str = config_field(
        "conditional",
        "What is trained under guidance w. 'conditional': the conditional prediction, to the target f*; 'corrected': "
        "the same, to f_u + (f* - f_u) / w; 'combined': the guided prediction, to f* (docs/recipe_search.md).",
        choices=GUIDANCE_LOSSES,
    )
    control_adapter: bool | None = config_field(
        None,
        "Train a second adapter for as long, the reference fit on all samples, and subtract it: what does not come "
        "from the reward cancels. None: on for plain LoRAs if guidance is u + w (c - u) or off (docs/comparison.md).",
    )
    control_scale: float = config_field(
        1.0,
        "Factor of the difference that `control_adapter` keeps. By how much the guided prediction moves is measured, "
        "and divided out, so 1 is what was fitted; more amplifies it, and its noise (docs/comparison.md).",
    )
    tuned_guidance_scale: float | None = config_field(
        None, "Guidance scale of the tuned steps while sampling; 1.0 is none there. None: `sample_guidance_scale`."
    )
    caption_dropout: float = config_field(
        0.1, "Share of training rows that get the unconditional input (conditional loss of a guided pipeline)."
    )
    timestep_sampling: str = config_field(
        "continuous",
        "Training timesteps: 'continuous' over the tuned noise levels, or the tuned steps of the 'sampler', which "
        "learns faster, but only for this number of steps.",
        choices=["continuous", "sampler"],
    )
    lora_rank: int = config_field(16, "Rank of the LoRA that is made where no `peft_config` is given.")
    max_merged_rank: int = config_field(
        128,
        "Largest rank of the adapter that `control_adapter` merges; each iteration adds twice the rank, up to this.",
    )
    ema_decay: float | None = config_field(
        None, "Decay of a moving average over an iteration's optimizer steps, which becomes the adapter. None: off."
    )
    lr_scheduler_type: str = config_field(
        "constant", "Learning-rate schedule of `diffusers.optimization.get_scheduler`.", choices=LR_SCHEDULES
    )
    warmup_steps: int = config_field(0, "Optimizer steps of learning-rate warm-up.")
    gradient_checkpointing: bool = config_field(
        False, "Recompute activations in the backward pass, which saves memory and costs time."
    )
    reward_retries: int = config_field(
        2,
        "How often a reward function is called again after an error of the network (a ConnectionError, an HTTP error "
        "of requests, httpx or urllib) or a time-out, before the run stops. Other errors stop it at once.",
    )
    reward_retry_wait: float = config_field(
        1.0, "Seconds before the first of these calls; doubled before each next one."
    )
    reward_timeout: float | None = config_field(
        None, "Seconds that one call of a reward function may take. None: no limit."
    )
    eval_prompts: list[str] | None = config_field(
        None,
        "Held-out prompts, sampled with the same seeds at every evaluation; with further columns, give the trainer an "
        "`eval_dataset` instead. None: no such prompts.",
    )
    eval_freq: int = config_field(
        1, "Iterations between evaluations on held-out prompts; the model is also evaluated before training."
    )
    output_dir: str = config_field("pgraft_output", "Folder for checkpoints, samples and metrics.")
    resume_from_checkpoint: Annotated[str | None, bool] = config_field(
        None,
        "TRL's name for `resume_from`; True ('true' or 'latest' on a command line) takes the newest checkpoint of "
        "`output_dir`, if there is one.",
    )
    hub_model_id: str | None = config_field(
        None, "Repository of the adapter on the Hub. None: the name of the output folder."
    )
    hub_dataset_id: str | None = config_field(
        None, "Dataset repository on the Hub, to which each iteration's samples are pushed. None: no push."
    )
    hub_private_repo: bool = config_field(False, "Make these repositories private; an existing public one is refused.")
    hub_token: str | None = config_field(
        None, "Token for the Hub; never stored. None: the token of the Hub's login.", repr=False
    )

    def __post_init__(self) -> None:
        for name in (f.name for f in dataclasses.fields(self) if f.default_factory is dict):
            setattr(self, name, _as_dict(name, getattr(self, name)))
        if not isinstance(self.negative_prompts, str):
            self.negative_prompts = ", ".join(
                as_annotated("negative_prompts", self.negative_prompts, list[str] | None) or []
            )
        check_fields(self, _RANGES)
        if self.train_cfg:
            self.guidance_loss = "combined"
        if (images := self.sample_batch_size * self.sample_num_batches_per_epoch) > MOST_IMAGES:
            raise ValueError(
                f"sample_batch_size * sample_num_batches_per_epoch = {images} images of an iteration and process are "
                f"more than {MOST_IMAGES}."
            )
        self._check_acceptance()
        given = [name for name in PPO_ONLY_FIELDS if getattr(self, name) != getattr(type(self), name)]
        if given:
            warnings.warn(f"GraftConfig ignores fields that only PPO has a use for: {', '.join(given)}.", stacklevel=3)

    @property
    def num_train_timesteps(self) -> int:
        """Timesteps at which each accepted sample is trained in one pass."""
        return max(1, int(self.sample_num_steps * self.train_timestep_fraction))

    def group_size(self, images: int) -> int:
        r"""
        Samples per prompt.

        Args:
            images (`int`):
                Images of an iteration, over all processes.
        """
        return min(self.samples_per_prompt or 8, images)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, without the token; a callable is given by its name."""
        return plain_fields(self, without=("hub_token",))

    def resume_signature(self, processes: int) -> dict[str, Any]:
        r"""
        What the result depends on, and so must not change when a run is resumed.

        Args:
            processes (`int`):
                Number of processes of the run.
        """
        images = self.sample_batch_size * self.sample_num_batches_per_epoch * processes
        rows = self.train_batch_size * self.train_gradient_accumulation_steps * processes
        fields = plain_fields(self, without=MAY_CHANGE)
        functions = {name: code_of(getattr(self, name)) for name in fields if callable(getattr(self, name))}
        return {**fields, "images a round": images, "rows of an optimizer step": rows, "functions": functions}

    @deprecated("GraftConfig.shaping is now GraftConfig.resume_signature.")
    def shaping(self, processes: int) -> dict[str, Any]:
        """The former name of `resume_signature`, with the number of `processes`."""
        return self.resume_signature(processes)

    def _check_acceptance(self) -> None:
        """Check the acceptance rule, its arguments and the group size; a preference sets the group size to 2."""
        rule, size = get_acceptance(self.acceptance), self.samples_per_prompt
        self.acceptance_kwargs = kwargs = {name: v for name, v in self.acceptance_kwargs.items() if v is not None}
        is_own = rule not in ACCEPTANCE_RULES.values()
        hints = {"k": int | None, **({} if is_own else typing.get_type_hints(rule))}
        for name in (kwargs.keys() & hints.keys()) - {"rewards", "return"}:
            kwargs[name] = as_annotated(f"acceptance_kwargs: {name}", kwargs[name], hints[name])
        k = kwargs.get("k")
        if size is not None and size < 2:
            raise ValueError(f"samples_per_prompt={size}: selection needs a group of at least 2 samples.")
        if self.acceptance == "preference":
            if size not in (None, 2):
                raise ValueError(f"samples_per_prompt={size}: acceptance='preference' compares 2 samples per prompt.")
            size = self.samples_per_prompt = 2
        if k is not None and not 1 <= k < (size or 8):
            raise ValueError(
                f"acceptance_kwargs: k={k} of samples_per_prompt={size or 8} must be at least 1 and less than that."
            )
        count = min(size or 8, MADE_UP)
        # Rewards below any bound of the package's rules; others get some that differ.
        rewards = torch.linspace(0, 1, count) if is_own else torch.full((count,), -1e30)
        try:
            with _random_state_kept():
                probabilities_of(rule, rewards.double(), {**kwargs, **({} if k is None else {"k": min(k, count - 1)})})
        except Exception as error:
            raise ValueError(f"acceptance_kwargs do not fit acceptance={self.acceptance!r}: {error}") from error


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Leave the random states of Python, numpy and torch as they were before the block."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _as_dict(name: str, value: dict[str, Any] | str | None) -> dict[str, Any]:
    """The field's dict, from JSON where a command line gave it."""
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}={value!r} is not JSON: {error}.") from error
    if parsed is not None and not (isinstance(parsed, dict) and all(isinstance(key, str) for key in parsed)):
        raise ValueError(
            f"{name}={reprlib.repr(parsed)} must be a dict of names, or a JSON object on the command line."
        )
    return dict(parsed or {})
