# SPDX-License-Identifier: Apache-2.0

"""Model and dataset cards, made from the templates in `templates`."""

import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData, RepoCard

from ..adapters.files import CORRECTOR_FILE
from .facts import FULL, LORA, ROUND_FILES, AdapterFacts


TEMPLATES = Path(__file__).with_name("templates")
CARD_FILE = "README.md"
GRID_FILE = "before_after.png"
TAGS = ("trl", "pgraft", "diffusers", "text-to-image")
ADAPTER_KINDS = {LORA: "A LoRA of", FULL: "A copy of all weights of the denoiser of"}
CORRECTOR_KINDS = {
    "lora": "a LoRA of the model itself",
    "network": "a small network",
    "gaussian": "the Gaussian of its mean and covariance",
    "none": "none, as no Gaussian describes it better than N(0, I), so that the model samples as it is,",
}


def write_adapter_card(folder: str | Path, repo_id: str, facts: AdapterFacts, title: str | None = None) -> None:
    """
    Write the model card of an adapter folder; it shows the grid of images if the folder has one.

    Args:
        folder (`str` or `Path`):
            Folder of the adapter.
        repo_id (`str`):
            Repository that the card's code loads.
        facts ([`AdapterFacts`]):
            What the card says.
        title (`str`, *optional*):
            Heading; the repository's name where not given.
    """
    title = plain(title or repo_id.split("/")[-1])
    _write_card(
        folder,
        ModelCard,
        "adapter_card.md",
        _adapter_metadata(title, facts),
        title=title,
        repo_id=repo_id,
        what=ADAPTER_KINDS.get(facts.kind, f"A {facts.kind} adapter of"),
        is_lora=facts.kind == LORA,
        base=facts.base_model,
        method="GRAFT" if facts.switch.switch_timestep is None else "P-GRAFT",
        grid=GRID_FILE if (Path(folder) / GRID_FILE).is_file() else None,
        arguments=_arguments(facts),
        switch=facts.switch,
        start=facts.start,
        metrics=[(as_code(name), *values) for name, values in facts.metrics.items()],
        metrics_source=facts.metrics_source,
        rewards=[f"{as_code(name)}, weight {weight:g}" for name, weight in facts.rewards.items()],
        settings=[f"`{name}`: {as_code(str(value))}" for name, value in facts.settings.items()],
        prompts=[as_code(prompt) for prompt in facts.prompts],
    )


def write_corrector_card(folder: str | Path, repo_id: str) -> None:
    """
    Write the model card of a noise corrector.

    Args:
        folder (`str` or `Path`):
            Folder of the corrector, whose `noise_correction.json` is read.
        repo_id (`str`):
            Repository that the card's code loads.
    """
    corrector, title = json.loads((Path(folder) / CORRECTOR_FILE).read_text()), plain(repo_id.split("/")[-1])
    facts = corrector["trained_for"]
    base = facts.pop("base_model", None)
    data = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name="diffusers",
        tags=["trl", "pgraft", "diffusers", "noise-correction", "flow-matching"],
        model_name=title,
    )
    _write_card(
        folder,
        ModelCard,
        "corrector_card.md",
        data,
        title=title,
        repo_id=repo_id,
        base=base,
        what=CORRECTOR_KINDS[corrector["corrector"]],
        steps=facts.get("num_inference_steps", 20),
        facts=[f"`{name}`: {as_code(str(value))}" for name, value in facts.items()],
    )


def write_samples_card(folder: str | Path, repo_id: str) -> None:
    """
    Write the dataset card of a run's samples, with the configuration that the Hub's viewer reads.

    Args:
        folder (`str` or `Path`):
            The run's `samples` folder.
        repo_id (`str`):
            Repository that the card's code loads.
    """
    data = DatasetCardData(
        pretty_name=f"Samples of {repo_id.split('/')[-1]}",
        tags=["trl", "pgraft"],
        task_categories=["text-to-image"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": ROUND_FILES}]}],
    )
    _write_card(folder, DatasetCard, "samples_card.md", data, title=data.pretty_name, repo_id=repo_id)


def _write_card(folder: str | Path, kind: type[RepoCard], template: str, data: CardData, **values: Any) -> None:
    """Write the card that a template makes of its metadata and values."""
    citation = (TEMPLATES / "citation.bib").read_text().rstrip()
    card = kind.from_template(data, template_path=str(TEMPLATES / template), citation=citation, **values)
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


def _arguments(facts: AdapterFacts) -> str:
    """The arguments of the pipeline call in the snippet, as Python code."""
    prompt = plain(facts.prompts[0] if facts.prompts else "a photo of a cat")
    # ascii() quotes for Python; a run of backticks would end the block of code.
    arguments = [ascii(prompt).replace("`", "\\x60")] if facts.takes_prompts else []
    arguments += [f"{name}=..." for name in facts.inputs]
    return ", ".join(arguments + [f"{name}={value}" for name, value in facts.arguments.items()])
