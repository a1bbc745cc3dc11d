# SPDX-License-Identifier: Apache-2.0

"""Stored samples are decided anew by the acceptance, weights and de-duplication of the run that trains on them."""

import datasets
import pytest
from runs import make_trainer
from tiny_pipelines import tiny_sd

from trl_pgraft import GraftConfig, PGraftTrainer


def redness(*, images, **columns):
    return [image.resize((1, 1)).getpixel((0, 0))[0] / 255 for image in images]


def greenness(*, images, **columns):
    return [image.resize((1, 1)).getpixel((0, 0))[1] / 255 for image in images]


def options(folder, **others):
    size = {"sample_num_steps": 4, "sample_batch_size": 4, "sample_num_batches_per_epoch": 4, "samples_per_prompt": 8}
    return {"num_epochs": 2, "control_adapter": False, **size, "output_dir": str(folder), "save_freq": 9, **others}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Two iterations of two prompts, of which the red ones were accepted with a probability."""
    folder = tmp_path_factory.mktemp("stored")
    rule = {"acceptance": "exponential", "acceptance_kwargs": {"beta": 1.0, "reward_max": 1.5}}
    trainer = PGraftTrainer(
        GraftConfig(**options(folder, **rule)),
        reward_funcs=[redness, greenness],
        reward_weights=[1.0, 0.5],
        sd_pipeline=tiny_sd(),
        train_dataset=["a cat", "a house"],
    )
    for epoch in range(2):
        trainer.collector.sample_rollout(epoch)
    files = sorted(map(str, folder.rglob("*.parquet")))
    return datasets.Dataset.from_parquet(files, cache_dir=str(folder / "cache"))


def decided(folder, stored, **others):
    rewards = {name: others.pop(name) for name in ("reward_funcs", "reward_weights") if name in others}
    return make_trainer(
        GraftConfig(**options(folder, **others)), reward=None, prompts=None, samples_dataset=stored, **rewards
    )


def accepted(trainer):
    return {s.seed for s, taken in zip(trainer.stored.samples, trainer.stored.accepted, strict=True) if taken}


def best(rows, score, k):
    """Seeds of the k best of each group."""
    groups = {}
    for row in rows:
        groups.setdefault((row["round"], row["group"]), []).append(row)
    return {row["seed"] for group in groups.values() for row in sorted(group, key=score, reverse=True)[:k]}


def test_the_same_configuration_decides_alike_whatever_the_order(tmp_path, stored):
    rule = {"acceptance": "exponential", "acceptance_kwargs": {"beta": 1.0, "reward_max": 1.5}}
    then = {row["seed"] for row in stored if row["accepted"]}
    assert 0 < len(then) < len(stored) == 32
    assert accepted(decided(tmp_path, stored, **rule)) == then
    backwards = stored.select([*range(16, 32), *range(16)])
    assert (
        accepted(decided(tmp_path, backwards, reward_funcs=[redness, greenness], reward_weights=[1, 0.5], **rule))
        == then
    )


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("weights", [[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]])
def test_rule_and_weights_are_those_of_the_run_that_trains(tmp_path, stored, k, weights, capsys):
    trainer = decided(
        tmp_path, stored, acceptance_kwargs={"k": k}, reward_funcs=[redness, greenness], reward_weights=weights
    )
    rows = list(stored.remove_columns(["image", "x_I"]))
    expected = best(rows, lambda row: weights[0] * row["reward_redness"] + weights[1] * row["reward_greenness"], k)
    assert accepted(trainer) == expected and len(expected) == 4 * k
    (metrics,) = trainer.train()
    assert metrics["accepted"] == 4 * k and metrics["implied_kl"] > 0 and metrics["groups_skipped"] == 0
    said = capsys.readouterr().out
    assert f"acceptance top_k {{'k': {k}}} of {weights[0]:g} * redness + {weights[1]:g} * greenness" in said
    assert f"{4 * k} of 32 are accepted; {sum(stored['accepted'])} were when they were stored" in said
    trainer.create_model_card()
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"`acceptance_kwargs`: `{{'k': {k}}}`" in card and f"`greenness`, weight {weights[1]:g}" in card


def test_the_stored_sum_decides_without_reward_functions(tmp_path, stored):
    rows = list(stored.remove_columns(["image", "x_I"]))
    assert accepted(decided(tmp_path, stored)) == best(rows, lambda row: row["reward"], 2)


def test_rules_of_ones_own_and_duplicates_are_decided_anew(tmp_path, stored):
    def all_of_them(rewards):
        return [True] * len(rewards)

    def by_prompt(image, prompt):
        assert image.mode == "RGB" and image.size == (16, 16)
        return prompt

    assert len(accepted(decided(tmp_path, stored, acceptance=all_of_them))) == 32
    trainer = decided(tmp_path, stored, acceptance=all_of_them, deduplicate_by=by_prompt)
    assert len(accepted(trainer)) == 4, "one of each group"
    assert trainer.config.to_dict()["deduplicate_by"] == "by_prompt"


@pytest.mark.parametrize(
    "others, message",
    [
        ({"acceptance": "preference", "samples_per_prompt": None}, "samples_dataset: .*'preference'.*two samples"),
        ({"samples_per_prompt": 16, "acceptance_kwargs": {"k": 8}}, "samples_dataset: .*'top_k'.*k=8 of M=8"),
        ({"reward_funcs": [lambda **_: []]}, "samples_dataset has no column reward_<lambda>; it has .*reward_redness"),
    ],
)
def test_a_rule_that_does_not_fit_the_stored_groups_is_refused_before_training(tmp_path, stored, others, message):
    with pytest.raises(ValueError, match=message):
        decided(tmp_path, stored, **others)


def test_arguments_of_the_call_that_override_fields_are_what_is_shown(tmp_path):
    config = GraftConfig(**options(tmp_path, sample_num_steps=50, negative_prompts="dull"))
    given = {"num_inference_steps": 4, "guidance_scale": 2, "eta": 0.5, "negative_prompt": ["grey"]}
    trainer = make_trainer(config, pipeline_kwargs=given)
    now = trainer.config.to_dict()
    assert (now["sample_num_steps"], now["sample_guidance_scale"], now["sample_eta"]) == (4, 2, 0.5)
    assert now["negative_prompts"] == "grey" and trainer.config.num_train_timesteps == 4
    assert trainer.policy.arguments["negative_prompt"] == ["grey"]
    assert (
        trainer.finetuner.config is trainer.collector.config is trainer.run_folder.finetuner.config is trainer.config
    )
    assert config.sample_num_steps == 50, "the user's own is left alone"
    trainer.policy.make_adapter()
    trainer.create_model_card()
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "`sample_num_steps`: `4`" in card and "`sample_guidance_scale`: `2`" in card
    with pytest.raises(ValueError, match="pipeline_kwargs: guidance_scale='much' .* is not a number"):
        make_trainer(config, pipeline_kwargs={"guidance_scale": "much"})
