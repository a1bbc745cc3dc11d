# SPDX-License-Identifier: Apache-2.0

"""The two journeys of docs/architecture.md are those that a run makes."""

import re
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from journey import followed
from tiny_pipelines import tiny_sd

from trl_pgraft import GraftConfig, PGraftTrainer, register_reward
from trl_pgraft.pipelines.conditioning import Conditioning
from trl_pgraft.rewards import Reward
from trl_pgraft.rollouts.prompts import PromptGroup, Sample
from trl_pgraft.rollouts.rollout import Rollout, RolloutBatch
from trl_pgraft.training.finetuner import TrainingSet
from trl_pgraft.training.graft_loss import GraftLoss
from trl_pgraft.training.rows import Microbatch, Rows, SelectedRows


PAGE = Path(__file__).parents[2] / "docs" / "architecture.md"
PROMPT, REWARD, REWARDS = "a prompt to follow", "a reward to follow", [0.8125, 0.8115, 0.8105, 0.8095]
SAMPLED = (PromptGroup, Sample, RolloutBatch, Rollout)
MADE_OF_A_PROMPT = (*SAMPLED, TrainingSet, SelectedRows, Rows, Microbatch, Conditioning, GraftLoss)


def holds(value: Any, is_it: Any, depth: int = 3) -> bool:
    """Whether `is_it` holds for a value or for something in the first few entries of what it is nested in."""
    if is_it(value):
        return True
    parts = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return depth > 0 and any(holds(part, is_it, depth - 1) for part in parts[:8])


def is_of_prompt(value: Any) -> bool:
    if isinstance(value, type):
        return value in MADE_OF_A_PROMPT
    return isinstance(value, MADE_OF_A_PROMPT) or (isinstance(value, str) and value == PROMPT)


def is_of_reward(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dtype == torch.float64 and any(number in REWARDS for number in value.flatten()[:8].tolist())
    if isinstance(value, float | str):
        return value == REWARD or value in REWARDS
    return value is constant or isinstance(value, Reward)


@register_reward(REWARD)
def constant(*, prompts: list[str], **_: Any) -> list[float]:
    return REWARDS[: len(prompts)]


def configuration(folder: Path) -> GraftConfig:
    size = {"sample_num_steps": 4, "sample_batch_size": 4, "sample_num_batches_per_epoch": 1, "samples_per_prompt": 4}
    options = {"num_epochs": 1, "acceptance_kwargs": {"k": 1}, "control_adapter": False, "lora_rank": 2}
    return GraftConfig(**size, **options, output_dir=str(folder))


def trainer_of(config: GraftConfig) -> PGraftTrainer:
    prompts = Dataset.from_dict({"prompt": [PROMPT]})
    return PGraftTrainer(config, reward_funcs=REWARD, sd_pipeline=tiny_sd(), train_dataset=prompts)


def page(heading: str) -> list[str]:
    """Files of a section's numbered list."""
    section = PAGE.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\d+\. \[`([\w/.]+)`\]", section, re.MULTILINE)


def check(journey: Any, heading: str) -> None:
    assert journey.files == page(heading)
    assert len(journey.files) <= 12
    # None is left and entered again: each is called from one other file alone.
    assert {file: len(doors) for file, doors in journey.entered_from.items() if len(doors) != 1} == {"trainer.py": 0}


def test_a_prompt_travels_as_the_page_says(tmp_path):
    trainer = trainer_of(configuration(tmp_path))
    with followed(lambda value: holds(value, is_of_prompt), "adapters/files.py:save_pgraft_adapter") as journey:
        trainer.train()
    check(journey, "The journey of a prompt")


def test_a_reward_travels_as_the_page_says(tmp_path):
    config = configuration(tmp_path)
    with followed(lambda value: holds(value, is_of_reward), "core/acceptance.py:accept_top_k") as journey:
        trainer_of(config).step(0, 0)
    check(journey, "The journey of a reward")
