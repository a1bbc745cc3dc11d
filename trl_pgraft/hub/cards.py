# SPDX-License-Identifier: Apache-2.0

"""Model and dataset cards: what was trained on what, how to use it, and what it scored."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import LNTuningConfig, LoraConfig, PeftConfig

from ..core.switch_level import SwitchLevel
from ..pipelines.fingerprint import stable
from ..pipelines.inputs import takes_prompts
from ..rollouts.dataset import prompts_of_samples
from ..rollouts.prompts import Prompt
from .card_templates import ADAPTER_TEMPLATE, CITATION, CORRECTOR_TEMPLATE, SAMPLES_TEMPLATE


CARD_FILE = "README.md"
GRID_FILE = "before_after.png"
SHOWN_PROMPTS = 8
SETTINGS = (
    "num_epochs",
    "samples_per_prompt",
    "acceptance",
    "acceptance_kwargs",
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
TAGS = ("trl", "pgraft", "diffusers", "text-to-image")
LORA, FULL = "LoRA", "full copy"
ROUND_FILES = "round_*/*.parquet"
CORRECTOR_KINDS = {
    "lora": "a LoRA of the model itself",
    "network": "a small network",
    "gaussian": "the Gaussian of its mean and covariance",
}
CORRECTOR_SNIPPET = """\
from diffusers import DiffusionPipeline
from trl_pgraft import NoiseCorrectedPipeline

pipeline = DiffusionPipeline.from_pretrained("{}")
corrected = NoiseCorrectedPipeline.from_pretrained("{}", pipeline)
images = corrected(num_inference_steps={}).images  # beside what the pipeline's own call takes"""


@dataclass(frozen=True)
class AdapterFacts:
    """
    What a model card tells of an adapter.

    Args:
        switch ([`SwitchLevel`]):
            Where the adapter hands over.
        base_model (`str`, *optional*):
            The base model's repository, where it has one.
        prompts (`Sequence[str]`, *optional*):
            Some of the prompts.
        inputs (`Sequence[str]`, *optional*):
            What the pipeline is handed for each image beside the prompt, in the snippet left open.
        takes_prompts (`bool`, *optional*, defaults to `True`):
            Whether the pipeline is handed a prompt.
        rewards (`dict[str, float]`, *optional*):
            Reward functions and their weights.
        metrics (`dict[str, tuple[float or None, float]]`, *optional*):
            Mean rewards of base model and tuned model.
        metrics_source (`str`, *optional*, defaults to `"held-out prompts"`):
            What they are means over.
        settings (`dict`, *optional*):
            Fields of the configuration.
        arguments (`dict`, *optional*):
            Arguments of the pipeline call in the snippet.
        tags (`Sequence[str]`, *optional*):
            Tags beside the usual ones.
        dataset (`str`, *optional*):
            Repository of the samples or of the prompts.
        kind (`str`, *optional*, defaults to `"LoRA"`):
            What was trained: `"LoRA"`, `"full copy"` of the denoiser's weights, or PEFT's name of another adapter.
        start (`str`, *optional*):
            The adapter that training went on from, in Markdown; the rewards before are then its own.
    """

    switch: SwitchLevel
    base_model: str | None = None
    prompts: Sequence[str] = ()
    inputs: Sequence[str] = ()
    takes_prompts: bool = True
    rewards: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, tuple[float | None, float]] = field(default_factory=dict)
    metrics_source: str = "held-out prompts"
    settings: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    tags: Sequence[str] = ()
    dataset: str | None = None
    kind: str = LORA
    start: str | None = None


def write_adapter_card(folder: str | Path, repo_id: str, facts: AdapterFacts, title: str | None = None) -> None:
    """
    Write the model card of an adapter folder; the grid of images is shown where the folder has one.

    Args:
        folder (`str` or `Path`):
            Folder of the adapter.
        repo_id (`str`):
            Repository that the card's code loads.
        facts ([`AdapterFacts`]):
            What the card tells.
        title (`str`, *optional*):
            Heading; the repository's name where not given.
    """
    title, base = plain(title or repo_id.split("/")[-1]), facts.base_model
    card = ModelCard.from_template(
        _adapter_metadata(title, facts),
        template_str=ADAPTER_TEMPLATE,
        title=title,
        repo_id=repo_id,
        what={LORA: "A LoRA of", FULL: "A copy of all weights of the denoiser of"}.get(
            facts.kind, f"A {facts.kind} adapter of"
        ),
        is_lora=facts.kind == LORA,
        base=f"[{base}](https://huggingface.co/{base})" if base else "a local model",
        method="GRAFT" if facts.switch.switch_timestep is None else "P-GRAFT",
        grid=GRID_FILE if (Path(folder) / GRID_FILE).is_file() else None,
        snippet=_snippet(repo_id, facts),
        switch=_switch_sentence(facts.switch),
        start=facts.start,
        metrics=[f"{as_code(name)}: {_change(*values)}" for name, values in facts.metrics.items()],
        metrics_source=facts.metrics_source,
        rewards=[f"{as_code(name)}, weight {weight:g}" for name, weight in facts.rewards.items()],
        settings=[f"`{name}`: {as_code(str(value))}" for name, value in facts.settings.items()],
        prompts=[as_code(prompt) for prompt in facts.prompts],
        citation=CITATION,
    )
    card.save(Path(folder) / CARD_FILE)


def write_corrector_card(folder: str | Path, repo_id: str, corrector: dict[str, Any]) -> None:
    """
    Write the model card of a noise corrector.

    Args:
        folder (`str` or `Path`):
            Folder of the corrector.
        repo_id (`str`):
            Repository that the card's code loads.
        corrector (`dict`):
            What the folder says of it: `corrector`, `corrector_steps`, `trained_for`.
    """
    facts, title = dict(corrector["trained_for"]), plain(repo_id.split("/")[-1])
    base, steps = facts.pop("base_model", None), facts.get("num_inference_steps", 20)
    card = ModelCard.from_template(
        ModelCardData(
            base_model=base,
            base_model_relation="adapter" if base else None,
            library_name="diffusers",
            tags=["trl", "pgraft", "diffusers", "noise-correction", "flow-matching"],
            model_name=title,
        ),
        template_str=CORRECTOR_TEMPLATE,
        title=title,
        base=f"[{base}](https://huggingface.co/{base})" if base else "a local model",
        what=CORRECTOR_KINDS[corrector["corrector"]],
        snippet=CORRECTOR_SNIPPET.format(base or "path/to/the/base/model", repo_id, steps),
        facts=[f"`{name}`: {as_code(str(value))}" for name, value in facts.items()],
        citation=CITATION,
    )
    card.save(Path(folder) / CARD_FILE)


def write_samples_card(folder: str | Path, repo_id: str) -> None:
    """Write the dataset card of a folder of rounds, with the configuration that the Hub's viewer reads."""
    data = DatasetCardData(
        pretty_name=f"Samples of {repo_id.split('/')[-1]}",
        tags=["trl", "pgraft"],
        task_categories=["text-to-image"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": ROUND_FILES}]}],
    )
    card = DatasetCard.from_template(
        data, template_str=SAMPLES_TEMPLATE, title=data.pretty_name, repo_id=repo_id, citation=CITATION
    )
    card.save(Path(folder) / CARD_FILE)


def plain(text: str, limit: int = 200) -> str:
    """`text` on one line: what cannot be printed becomes a space, and what is beyond `limit` characters is cut."""
    printable = "".join(c if c.isprintable() else " " for c in text[: 8 * limit])
    line = " ".join(printable.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def as_code(text: str) -> str:
    """`text` as a span of Markdown in which nothing is markup, whatever it holds."""
    line = plain(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if not line or line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def facts_of(trainer: Any, shown: Sequence[Prompt], dataset: str | None, tags: Sequence[str]) -> AdapterFacts:
    """What a [`PGraftTrainer`] knows about the adapter that it trains, and the prompts that are shown."""
    config, rewards = trainer.config, {reward.name: reward.weight for reward in trainer.rewards}
    source, metrics = metrics_of(trainer.history, list(rewards))
    has_control = trainer.finetuner.has_control
    control = {"control_adapter": has_control, "control_scale": config.control_scale if has_control else None}
    settings = {**config.to_dict(), **control}
    told = ("num_inference_steps", "guidance_scale", "height", "width")
    return AdapterFacts(
        switch=trainer.policy.switch,
        base_model=repository_of(trainer.pipeline),
        prompts=[prompt for prompt in dict.fromkeys(prompt for prompt, _ in shown) if prompt],
        inputs=list(dict.fromkeys(name for _, columns in shown for name in trainer.policy.inputs_of(columns))),
        takes_prompts=takes_prompts(trainer.pipeline),
        rewards=rewards,
        metrics=metrics,
        metrics_source=source,
        settings={name: settings[name] for name in SETTINGS if settings[name] not in (None, {})},
        arguments={n: value for n, value in trainer.policy.arguments.items() if n in told and value is not None},
        tags=tags,
        dataset=dataset,
        kind=kind_of(trainer.policy.peft_config),
        start=_start_of(trainer.policy.start),
    )


def _start_of(start: Any) -> str | None:
    if start is None:
        return None
    repository = start.repository
    return f"[{repository}](https://huggingface.co/{repository})" if repository else "an adapter on disk"


def kind_of(peft_config: PeftConfig) -> str:
    """What an adapter is, in the words of [`AdapterFacts`]."""
    if isinstance(peft_config, LNTuningConfig):  # by which a copy of all weights is kept, see `full_copy_config`
        return FULL
    return LORA if isinstance(peft_config, LoraConfig) else peft_config.peft_type.value


def some_prompts(
    held_out: Sequence[Prompt], samples: datasets.Dataset | None, folder: Path, count: int = SHOWN_PROMPTS
) -> list[Prompt]:
    """Different prompts to show: held-out ones, or those of the samples trained on, or of the newest round kept."""
    files = sorted(folder.glob(ROUND_FILES))
    if not held_out and samples is None and files:
        samples = datasets.Dataset(pq.read_table(files[-1]))
    prompts = held_out or ([] if samples is None else prompts_of_samples(samples))
    different = {(prompt, *(f"{n} {stable(v)}" for n, v in row.items())): (prompt, row) for prompt, row in prompts}
    return list(different.values())[:count]


def label_of(prompt: Prompt) -> str:
    """What is written under a picture: the prompt, or the numbers and words that stand for one, such as a class."""
    text, columns = prompt
    return text or ", ".join(f"{name} {value}" for name, value in columns.items() if isinstance(value, int | str))


def repository_of(pipeline: Any) -> str | None:
    """The Hub repository that a pipeline was loaded from; `None` for a local one, whose path is nobody's business."""
    name = getattr(pipeline, "name_or_path", None)
    if not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def metrics_of(history: Sequence[dict[str, float]], rewards: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Mean rewards before and after, by name, from a run's metrics, and what they are means over."""
    evaluations = [record for record in history if "eval/reward" in record]
    prefix, source = ("eval/", "held-out prompts") if evaluations else ("", "the samples of the first and last round")
    records = evaluations or [record for record in history if "reward" in record]
    if not records:
        return source, {}
    names = {"reward": f"{prefix}reward", **{name: f"{prefix}rewards/{name}/mean" for name in rewards}}
    first, last = records[0] if len(records) > 1 else {}, records[-1]
    values = {name: (_finite(first.get(key)), _finite(last.get(key))) for name, key in names.items()}
    return source, {name: pair for name, pair in values.items() if pair[1] is not None}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _adapter_metadata(title: str, facts: AdapterFacts) -> ModelCardData:
    results = [
        EvalResult("text-to-image", "prompts", facts.metrics_source, "reward", value, metric_name=plain(name))
        for name, (_, value) in facts.metrics.items()
    ]
    return ModelCardData(
        base_model=facts.base_model,
        base_model_relation="adapter" if facts.base_model else None,
        datasets=facts.dataset,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=list(dict.fromkeys([*TAGS, *(["lora"] if facts.kind == LORA else []), *facts.tags])),
        model_name=title,
        eval_results=results or None,
    )


def _snippet(repo_id: str, facts: AdapterFacts) -> str:
    prompt = plain(facts.prompts[0] if facts.prompts else "a photo of a cat")
    # ascii() quotes for Python; a run of backticks would end the block of code.
    arguments = [ascii(prompt).replace("`", "\\x60")] if facts.takes_prompts else []
    arguments += [f"{name}=..." for name in facts.inputs]
    arguments += [f"{name}={value}" for name, value in facts.arguments.items()]
    base = facts.base_model or "path/to/the/base/model"
    return f"""\
from diffusers import DiffusionPipeline
from trl_pgraft import load_pgraft_adapter

pipeline = DiffusionPipeline.from_pretrained("{base}")
gate = load_pgraft_adapter(pipeline, "{repo_id}")  # at work until gate.remove()
image = pipeline({", ".join(arguments)}).images[0]
image.save("image.png")"""


def _switch_sentence(switch: SwitchLevel) -> str:
    if switch.switch_timestep is None:
        return "The adapter runs at all noise levels."
    guidance = switch.tuned_guidance_scale
    return (
        f"The adapter runs above training timestep {switch.switch_timestep:g} (log-SNR {switch.switch_log_snr:.2f}) "
        "and the base model below; `load_pgraft_adapter` switches it there, whatever the number of steps."
        + (f" It was trained for guidance {guidance:g} there: sample inside `TunedGuidance`." if guidance else "")
    )


def _change(before: float | None, after: float) -> str:
    return f"{after:.4g}" if before is None else f"{before:.4g} -> {after:.4g}"
