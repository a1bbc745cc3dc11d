# SPDX-License-Identifier: Apache-2.0

"""Images that a pipeline's safety checker flags are left out and counted."""

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from safety_checkers import tiny_checked_sd

from trl_pgraft import GraftConfig, PGraftTrainer
from trl_pgraft.rewards import RewardError
from trl_pgraft.rollouts.cache import RolloutCache


def make_trainer(folder, reward, form=list, **options):
    size = {"sample_num_steps": 4, "sample_batch_size": 4, "sample_num_batches_per_epoch": 2, "samples_per_prompt": 4}
    config = {"num_epochs": 1, "acceptance_kwargs": {"k": 3}, "control_adapter": False, "reward_retries": 0}
    return PGraftTrainer(
        GraftConfig(**{**size, **config, "eval_prompts": ["a", "b"], "output_dir": str(folder), **options}),
        reward_funcs=reward,
        sd_pipeline=tiny_checked_sd(form),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["a cat", "a dog"]}),
    )


def whiteness(*, images, **_):
    """Highest for what must not be scored."""
    assert all(image.getextrema() != ((0, 0),) * 3 for image in images)
    return [-float(i) for i, _ in enumerate(images)]


@pytest.mark.parametrize(
    "form", [list, torch.tensor, lambda flags: [f or None for f in flags], lambda f: [[x, False] for x in f]]
)
def test_flagged_images_are_neither_scored_nor_accepted_and_are_counted(tmp_path, form):
    trainer = make_trainer(tmp_path, whiteness, form)
    before, metrics, after = trainer.train()
    assert metrics["flagged"] == 2 and metrics["accepted"] == 4, "k is scaled down to the three others"
    assert before["eval/flagged"] == after["eval/flagged"] == 1 and before["eval/reward"] == 0
    files = [str(path) for path in (tmp_path / "samples").rglob("*.parquet")]
    for row in datasets.Dataset.from_parquet(files):
        is_black = row["image"].getextrema() == ((0, 0),) * 3
        assert (row["reward"] is None or row["reward"] != row["reward"]) == is_black and not (
            row["accepted"] and is_black
        )


def test_a_batch_in_which_all_are_flagged_is_not_scored(tmp_path):
    def never(**_):
        raise AssertionError

    trainer = make_trainer(tmp_path, never, sample_batch_size=1, sample_num_batches_per_epoch=4)
    _, metrics, _ = trainer.train()
    assert metrics["flagged"] == 4 and metrics["accepted"] == 0 and metrics["groups_skipped"] == 1


def test_no_flags_are_counted_where_the_pipeline_reports_none(tmp_path):
    history = make_trainer(tmp_path, whiteness, form=None).train()
    assert not any("flagged" in name for metrics in history for name in metrics)


@pytest.mark.parametrize("with_flags", [True, False])
def test_flags_are_kept_over_an_interruption(tmp_path, with_flags):
    """Files of images without them, as earlier versions wrote them, count as not flagged."""
    seen = []

    def failing(*, images, **_):
        raise RuntimeError

    def counting(*, images, **_):
        seen.append(len(images))
        return [float(i) for i, _ in enumerate(images)]

    failing.__name__ = "counting"
    trainer = make_trainer(tmp_path, failing)
    with pytest.raises(RewardError):
        trainer.collector.sample_rollout(0)
    (path,) = trainer.collector.cache_dir.rglob("images-*")
    if not with_flags:
        tags = RolloutCache(tmp_path, trainer.policy.sampled_by(), [])._image_tags
        save_file({n: t for n, t in load_file(path).items() if n != "flagged"}, path, metadata=tags)
    rollout, _ = make_trainer(tmp_path, counting).collector.sample_rollout(0)
    assert seen == [3 if with_flags else 4, 3]
    assert rollout.metrics(["counting"])["flagged"] == (2 if with_flags else 1)
