# SPDX-License-Identifier: Apache-2.0

"""What a model card says about an adapter, gathered from the run that trained it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from diffusers import DiffusionPipeline
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import LNTuningConfig, LoraConfig, PeftConfig

from ..core.identity import stable
from ..core.switch_level import SwitchLevel
from ..pipelines.inputs import takes_prompts
from ..rewards.registry import Reward
from ..rollouts.dataset import prompts_of_samples
from ..rollouts.prompts import Prompt
from ..training.finetuner import Finetuner


SHOWN_PROMPTS = 8
SETTINGS = (
    "num_epochs",
    "samples_per_prompt",
    "acceptance",
    "acceptance_kwargs",
    "deduplicate_by",
    "tuned_fraction",
    "sample_from",
    "sample_num_steps",
    "sample_guidance_scale",
    "guidance_loss",
    "control_adapter",
    "control_scale",
    "train_learning_rate",
    "train_num_inner_epochs",
    "seed",
)
SNIPPET_ARGUMENTS = ("num_inference_steps", "guidance_scale", "height", "width")
LORA, FULL = "LoRA", "full copy"
ROUND_FILES = "round_*/*.parquet"


@dataclass(frozen=True)
class AdapterFacts:
    """
    What a model card says about an adapter.

    Args:
        switch ([`SwitchLevel`]):
            Noise level at which the adapter hands over to the base model.
        base_model (`str`, *optional*):
            The base model's repository on the Hub; the card says "a local model" without it.
        prompts (`Sequence[str]`, *optional*, defaults to `()`):
            Some of the prompts of the run.
        inputs (`Sequence[str]`, *optional*, defaults to `()`):
            Names of the pipeline's arguments for each image beside the prompt; the snippet has `...` as their values.
        takes_prompts (`bool`, *optional*, defaults to `True`):
            Whether the pipeline's call takes a prompt.
        rewards (`dict[str, float]`, *optional*):
            Weight of each reward function, by name.
        metrics (`dict[str, tuple[float or None, float]]`, *optional*):
            Mean rewards of base model and tuned model, by name; `None` where the base model was not scored.
        metrics_source (`str`, *optional*, defaults to `"held-out prompts"`):
            What these means are taken over, in words.
        settings (`dict[str, Any]`, *optional*):
            Fields of the configuration to list.
        arguments (`dict[str, Any]`, *optional*):
            Arguments of the pipeline call in the snippet.
        tags (`Sequence[str]`, *optional*, defaults to `()`):
            Tags beside the usual ones.
        dataset (`str`, *optional*):
            Repository of the samples or of the prompts.
        kind (`str`, *optional*, defaults to `"LoRA"`):
            Kind of adapter: `"LoRA"`, `"full copy"` of the denoiser's weights, or PEFT's name of another one.
        start (`str`, *optional*):
            In Markdown, the adapter that training started from; the rewards before are then its own.
    """

    switch: SwitchLevel
    base_model: str | None = None
    prompts: Sequence[str] = ()
    inputs: Sequence[str] = ()
    takes_prompts: bool = True
    rewards: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, tuple[float | None, float]] = field(default_factory=dict)
    metrics_source: str = "held-out prompts"
    settings: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tags: Sequence[str] = ()
    dataset: str | None = None
    kind: str = LORA
    start: str | None = None


def gather_facts(
    finetuner: Finetuner,
    rewards: Sequence[Reward],
    history: Sequence[Mapping[str, float]],
    shown: Sequence[Prompt],
    dataset: str | None = None,
    tags: str | Sequence[str] | None = None,
) -> AdapterFacts:
    """
    The facts of a run's adapter.

    Args:
        finetuner ([`Finetuner`]):
            Trains the adapter; has the policy and the configuration.
        rewards (`Sequence[Reward]`):
            The run's reward functions with their weights.
        history (`Sequence[Mapping[str, float]]`):
            Metrics of the run, oldest first.
        shown (`Sequence[Prompt]`):
            Prompts to show, see [`some_prompts`].
        dataset (`str`, *optional*):
            Dataset repository to name; none without it.
        tags (`str` or `Sequence[str]`, *optional*):
            Tags beside the usual ones.
    """
    policy, config, weights = finetuner.policy, finetuner.config, {reward.name: reward.weight for reward in rewards}
    source, metrics = metrics_of(history, list(weights))
    control = {
        "control_adapter": finetuner.has_control,
        "control_scale": config.control_scale if finetuner.has_control else None,
    }
    settings, repository = {**config.to_dict(), **control}, policy.start.repository if policy.start else None
    start = f"[{repository}](https://huggingface.co/{repository})" if repository else "an adapter on disk"
    return AdapterFacts(
        switch=policy.switch,
        base_model=repository_of(policy.pipeline),
        prompts=[prompt for prompt in dict.fromkeys(prompt for prompt, _ in shown) if prompt],
        inputs=list(dict.fromkeys(name for _, columns in shown for name in policy.inputs_of(columns))),
        takes_prompts=takes_prompts(policy.pipeline),
        rewards=weights,
        metrics=metrics,
        metrics_source=source,
        settings={name: settings[name] for name in SETTINGS if settings[name] not in (None, {})},
        arguments={n: v for n, v in policy.arguments.items() if n in SNIPPET_ARGUMENTS and v is not None},
        tags=[tags] if isinstance(tags, str) else tags or [],
        dataset=dataset,
        kind=kind_of(policy.peft_config),
        start=start if policy.start else None,
    )


def kind_of(peft_config: PeftConfig) -> str:
    """The kind of adapter that `peft_config` makes, see [`AdapterFacts`]."""
    if isinstance(peft_config, LNTuningConfig):  # which holds a copy of all weights, see `full_copy_config`
        return FULL
    return LORA if isinstance(peft_config, LoraConfig) else peft_config.peft_type.value


def some_prompts(
    held_out: Sequence[Prompt], samples: datasets.Dataset | None, folder: Path, count: int = SHOWN_PROMPTS
) -> list[Prompt]:
    """
    Different prompts to show on a card.

    Args:
        held_out (`Sequence[Prompt]`):
            Held-out prompts; these are taken if there are any.
        samples (`datasets.Dataset` or `None`):
            Samples that the run trains on; the next choice.
        folder (`Path`):
            The run's `samples` folder, of which the newest iteration is the last choice.
        count (`int`, *optional*, defaults to `8`):
            Largest number of prompts.
    """
    files = sorted(folder.glob(ROUND_FILES))
    if not held_out and samples is None and files:
        samples = datasets.Dataset(pq.read_table(files[-1]))
    prompts = held_out or ([] if samples is None else prompts_of_samples(samples))
    different = {(prompt, *(f"{n} {stable(v)}" for n, v in row.items())): (prompt, row) for prompt, row in prompts}
    return list(different.values())[:count]


def label_of(prompt: Prompt) -> str:
    """The text under a picture of `prompt`: the prompt itself, or numbers and words such as its class without one."""
    text, columns = prompt
    shown = {name: value for name, value in columns.items() if isinstance(value, int | str) and "image" not in name}
    return text or ", ".join(f"{name} {value}" for name, value in shown.items())


def repository_of(pipeline: DiffusionPipeline) -> str | None:
    """The Hub repository that `pipeline` was loaded from; `None` for a local one, whose path stays private."""
    name = getattr(pipeline, "name_or_path", None)
    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def metrics_of(
    history: Sequence[Mapping[str, float]], rewards: Sequence[str]
) -> tuple[str, dict[str, tuple[float | None, float]]]:
    """
    Mean rewards before and after a run.

    Args:
        history (`Sequence[Mapping[str, float]]`):
            Metrics of the run, oldest first.
        rewards (`Sequence[str]`):
            Names of the reward functions.

    Returns:
        `tuple[str, dict[str, tuple[float or None, float]]]`: what the means are taken over, in words; and both means
            by name, `reward` first, without those that are not finite.
    """
    evaluations = [record for record in history if "eval/reward" in record]
    prefix, source = ("eval/", "held-out prompts") if evaluations else ("", "the samples of the first and last round")
    records = evaluations or [record for record in history if "reward" in record]
    if not records:
        return source, {}
    names = {"reward": f"{prefix}reward", **{name: f"{prefix}rewards/{name}/mean" for name in rewards}}
    first, last = records[0] if len(records) > 1 else {}, records[-1]
    pairs = {name: (_finite(first.get(key)), _finite(last.get(key))) for name, key in names.items()}
    return source, {name: (before, after) for name, (before, after) in pairs.items() if after is not None}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
