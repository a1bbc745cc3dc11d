# SPDX-License-Identifier: Apache-2.0

import math

import datasets
import pytest
import torch
from diffusers import EulerDiscreteScheduler
from random_rounds import as_dataset, random_round
from tiny_pipelines import add_random_adapter

from trl_pgraft.pipelines.fingerprint import sampling_fingerprint
from trl_pgraft.rollouts.dataset import check_samples, rollout_from_dataset
from trl_pgraft.training.rows import SelectedRows


ARGUMENTS = {"num_inference_steps": 4, "guidance_scale": 3.0}


def test_a_rollout_has_its_columns():
    batch = random_round()
    dataset = as_dataset(batch)
    assert dataset.column_names == [
        "prompt", "image", "reward", "reward_red", "accepted", "round", "group", "seed", "x_I", "t_I", "fingerprint",
    ]  # fmt: skip
    row = dataset[5]
    assert (row["prompt"], row["group"], row["seed"], row["t_I"]) == ("a dog", 1, batch.samples[5].seed, 301.0)
    assert row["reward"] == 2 * row["reward_red"] == 2 * batch.rewards[5, 0].item()
    assert math.isnan(dataset[1]["reward"])
    assert row["image"].size == (16, 16)
    assert [row["accepted"] for row in dataset] == [True, False, False, False] * 2


@pytest.mark.parametrize("shape", [(4, 8, 8), (16, 16), (4, 2, 8, 8)])
def test_states_and_images_survive_parquet_bit_by_bit(shape, tmp_path):
    batch = random_round(shape)
    as_dataset(batch).to_parquet(tmp_path / "kept.parquet")
    loaded = datasets.load_dataset("parquet", data_files=str(tmp_path / "kept.parquet"), cache_dir=tmp_path)["train"]
    assert torch.equal(torch.tensor(loaded.with_format("numpy")["x_I"][:]), batch.x_i)
    images = torch.tensor(loaded.select_columns("image").with_format("numpy")["image"][:])
    assert torch.equal(images.permute(0, 3, 1, 2), batch.images)
    rollout = rollout_from_dataset(loaded, ["red"])
    assert torch.equal(rollout.states, batch.x_i)
    assert [s.seed for s in rollout.samples] == [s.seed for s in batch.samples]
    assert [s.group.prompt for s in rollout.samples] == [s.group.prompt for s in batch.samples]
    torch.testing.assert_close(rollout.total_reward, 2 * batch.rewards[:, 0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(rollout.rewards, batch.rewards, rtol=0, atol=0, equal_nan=True)
    assert rollout.accepted.nonzero().flatten().tolist() == [0, 4]


def test_final_latents_have_no_timestep():
    dataset = as_dataset(random_round(), state_timestep=None)
    assert set(dataset["t_I"]) == {None}
    assert len(rollout_from_dataset(dataset, []).samples) == 8


def test_a_shuffled_dataset_keeps_states_with_their_prompts():
    batch = random_round()
    shuffled = rollout_from_dataset(as_dataset(batch).shuffle(seed=0), ["red"])
    where = {s.seed: i for i, s in enumerate(batch.samples)}
    for sample, state, reward in zip(shuffled.samples, shuffled.states, shuffled.total_reward, strict=True):
        i = where[sample.seed]
        assert sample.group.prompt == batch.samples[i].group.prompt
        assert torch.equal(state, batch.x_i[i])
        assert reward == 2 * batch.rewards[i, 0] or reward.isnan()
    assert [s.group.index for s in shuffled.samples] == [0] * 4 + [1] * 4


def test_rollouts_put_together_keep_their_groups_apart():
    """Group numbers start anew in each iteration; unselected rows must not come from another group."""
    pairs = enumerate([("a", "b"), ("a", "c")])
    stored = [as_dataset(random_round(prompts=p, seed=i), epoch=i) for i, p in pairs]
    together = rollout_from_dataset(datasets.concatenate_datasets(stored), ["red"])
    assert [(g.index, g.prompt, g.size) for g in together.groups] == [(i, p, 4) for i, p in enumerate("abac")]
    rows = next(SelectedRows(together, 1, (0,)).passes(control=True))
    prompts = SelectedRows(together, 1, (0,)).prompts
    for state, prompt in zip(rows.states.tolist(), rows.prompts.tolist(), strict=True):
        assert together.samples[state].group.prompt == prompts[prompt]


def test_the_fingerprint_depends_on_model_scheduler_arguments_and_step_index(sd):
    found = {"as it is": sampling_fingerprint(sd, ARGUMENTS, 2)}
    found["step_index"] = sampling_fingerprint(sd, ARGUMENTS, 3)
    found["guidance"] = sampling_fingerprint(sd, {**ARGUMENTS, "guidance_scale": 4.0}, 2)
    scheduler = sd.scheduler
    sd.scheduler = EulerDiscreteScheduler()
    found["scheduler"] = sampling_fingerprint(sd, ARGUMENTS, 2)
    sd.scheduler = scheduler
    sd.unet.conv_in.weight.data.mul_(1.5)
    found["weights"] = sampling_fingerprint(sd, ARGUMENTS, 2)
    assert len(set(found.values())) == len(found)


def test_the_fingerprint_does_not_depend_on_the_adapter_or_the_order_of_arguments(sd):
    expected = sampling_fingerprint(sd, ARGUMENTS, 2)
    add_random_adapter(sd.unet)
    assert sampling_fingerprint(sd, dict(reversed(ARGUMENTS.items())), 2) == expected


def test_samples_to_train_on_are_taken_with_or_without_their_split():
    dataset = as_dataset(random_round())
    assert check_samples(dataset, "f00d".__eq__, ["red"]) is dataset
    assert check_samples(datasets.DatasetDict(train=dataset), "f00d".__eq__, []) is dataset


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.remove_columns("fingerprint"), "no column fingerprint; it has prompt, image"),
        (lambda d: d.remove_columns(["x_I", "reward_red"]), "no column x_I, reward_red"),
        (lambda d: d.select([]), "samples_dataset is empty"),
        (lambda d: d.to_iterable_dataset(), "is a IterableDataset; load it without streaming"),
        (lambda d: datasets.DatasetDict(train=d, test=d), "has the splits train, test; give one"),
        (lambda d: d.map(lambda row: {"fingerprint": "beef"}), "another model.*fingerprint beef, which is not"),
        (lambda d: d.map(lambda row: {"fingerprint": None}), "fingerprint None, which is not"),
    ],
)
def test_samples_that_cannot_be_trained_on_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        check_samples(change(as_dataset(random_round())), "f00d".__eq__, ["red"])
