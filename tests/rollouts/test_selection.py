# SPDX-License-Identifier: Apache-2.0

import math
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from trl_pgraft.core.acceptance import accept_all, accept_best_of_n, accept_exponential, accept_threshold, accept_top_k
from trl_pgraft.core.divergence import implied_kl
from trl_pgraft.rollouts.prompts import PromptGroup, samples_of
from trl_pgraft.rollouts.rollout import Rollout
from trl_pgraft.rollouts.selection import accept, duplicate_keys, total_rewards
from trl_pgraft.training.rows import SelectedRows


NAN = math.nan


def groups_of(*sizes, prompts=None):
    prompts = prompts or [f"prompt {i}" for i in range(len(sizes))]
    return [PromptGroup(i, prompt, size, {}) for i, (size, prompt) in enumerate(zip(sizes, prompts, strict=True))]


def rewards_of(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_rewards(count, seed=0):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def select(rewards, groups, *rule):
    """A rollout with these rewards, selected by a rule with its arguments, seed and keys."""
    samples, selection = samples_of(groups, 0), accept(rewards, groups, *rule)
    return Rollout(groups, samples, torch.zeros(len(samples), 1), rewards[:, None], rewards, *selection)


def accepted_rows(rollout):
    return rollout.accepted.nonzero().flatten().tolist()


def test_each_group_is_decided_by_itself():
    rewards = rewards_of(0.1, 0.9, 0.5, 0.3, 5.1, 5.2, 9.3, 9.1, 9.2)
    rollout = select(rewards, groups_of(4, 2, 3), accept_best_of_n, {}, (0,))
    assert accepted_rows(rollout) == [1, 5, 6]
    assert rollout.implied_kl == pytest.approx(sum(implied_kl(size, 1) for size in (4, 2, 3)) / 3)
    assert (rollout.groups_skipped, rollout.metrics(["red"])["frac_reward_zero_std"]) == (0, 0)


def test_k_is_scaled_down_in_a_smaller_last_group():
    rollout = select(random_rewards(8 + 4), groups_of(8, 4), accept_top_k, {"k": 2}, (0,))
    assert rollout.accepted.split([8, 4])[0].sum() == 2
    assert rollout.accepted.split([8, 4])[1].sum() == 1
    assert rollout.implied_kl == pytest.approx((implied_kl(8, 2) + implied_kl(4, 1)) / 2)


def test_a_scaled_k_stays_below_the_group():
    rollout = select(random_rewards(8 + 2), groups_of(8, 2), accept_top_k, {"k": 7}, (0,))
    assert rollout.accepted.split([8, 2])[1].sum() == 1


def test_a_group_of_one_is_skipped_and_counted():
    rollout = select(rewards_of(0.1, 0.2, 0.3, 9.0), groups_of(3, 1), accept_best_of_n, {}, (0,))
    assert accepted_rows(rollout) == [2]
    assert rollout.groups_skipped == 1
    assert rollout.implied_kl == pytest.approx(implied_kl(3, 1))


def test_samples_without_a_reward_are_left_out_of_their_group():
    rewards = rewards_of(NAN, 0.2, 0.9, 0.1, NAN, NAN, NAN, 0.5)
    rollout = select(rewards, groups_of(4, 4), accept_top_k, {"k": 2}, (0,))
    assert accepted_rows(rollout) == [2, 1] or accepted_rows(rollout) == [1, 2], "2 of 3, as 2 of 4 rounds to"
    assert rollout.groups_skipped == 1, "one scored sample is no comparison"


def test_ties_go_to_the_lower_index_and_a_group_without_signal_accepts_nothing():
    rewards = rewards_of(1, 1, 0, 1, 0.5, 0.5, 0.5, 0.5)
    rollout = select(rewards, groups_of(4, 4), accept_top_k, {"k": 1}, (0,))
    assert accepted_rows(rollout) == [0]
    assert rollout.metrics(["red"])["frac_reward_zero_std"] == 0.5
    assert rollout.implied_kl == pytest.approx(implied_kl(4, 1, atoms=[1 / 4, 3 / 4]) / 2)


def test_decisions_between_0_and_1_depend_on_the_seed():
    rule = partial(accept_exponential, beta=1.0, reward_max=0.0)
    rewards = torch.full((4000,), math.log(0.3), dtype=torch.float64)
    groups = groups_of(*[8] * 500)
    one, same, other = (select(rewards, groups, rule, {}, (seed,)) for seed in (1, 1, 2))
    assert torch.equal(one.accepted, same.accepted)
    assert not torch.equal(one.accepted, other.accepted)
    assert one.accepted.float().mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 4000))


def test_a_missing_reward_does_not_change_other_groups():
    rule, rewards = partial(accept_exponential, beta=0.5, reward_max=1.0), random_rewards(16)
    whole = select(rewards, groups_of(8, 8), rule, {}, (0,))
    rewards[3] = NAN
    assert torch.equal(select(rewards, groups_of(8, 8), rule, {}, (0,)).accepted[8:], whole.accepted[8:])


def test_of_equal_samples_one_is_accepted():
    keys = ["x", "x", "y", "y", "x", "x", "y", "z"]
    rewards, rule = rewards_of(1, 1, 1, 0, 1, 1, 1, 1), partial(accept_threshold, threshold=0.5)
    rollout = select(rewards, groups_of(4, 4), rule, {}, (0,), keys)
    assert accepted_rows(rollout) == [0, 2, 4, 6, 7], "keys count within a group"


def test_keys_belong_to_samples_where_some_are_left_out():
    keys = ["x", "y", "y", "z"]
    rollout = select(rewards_of(1, NAN, 1, 1), groups_of(4), accept_all, {}, (0,), keys)
    assert accepted_rows(rollout) == [0, 2, 3]


def test_total_rewards_are_the_weighted_sum():
    values = torch.tensor([[1.0, 10.0], [2.0, 20.0]], dtype=torch.float64)
    assert total_rewards(values, [1.0, 0.1], groups_of(2)).tolist() == [2.0, 4.0]


def test_a_function_that_is_silent_on_a_group_is_passed_over_there():
    values = torch.tensor([[1.0, NAN], [2.0, NAN], [3.0, 5.0], [4.0, 6.0]], dtype=torch.float64)
    assert total_rewards(values, [1.0, 1.0], groups_of(2, 2)).tolist() == [1.0, 2.0, 8.0, 10.0]


def test_a_sample_that_one_function_leaves_out_is_left_out():
    values = torch.tensor([[1.0, 5.0], [2.0, NAN], [3.0, 6.0]], dtype=torch.float64)
    total = total_rewards(values, [1.0, 1.0], groups_of(3))
    assert total[[0, 2]].tolist() == [6.0, 9.0] and total[1].isnan()


def test_a_group_without_any_reward_is_left_out():
    values = torch.full((2, 2), NAN, dtype=torch.float64)
    assert total_rewards(values, [1.0, 1.0], groups_of(2)).isnan().all()


@pytest.fixture
def two_groups():
    """Groups of 8 and of 4 samples, of which 2 and 1 are accepted; one sample has no reward."""
    rewards = random_rewards(12)
    rewards[3] = NAN
    groups = groups_of(8, 4, prompts=["a", "b"])
    return select(rewards, groups, accept_top_k, {"k": 2}, (0,))


def test_selected_rows_are_the_accepted_samples_with_their_prompts(two_groups):
    selected = SelectedRows(two_groups, 3, (0, 5))
    passes = list(selected.passes())
    accepted = two_groups.accepted.nonzero().flatten()
    assert len(passes) == 3 and len(selected) == len(accepted) == 3
    for rows in passes:
        assert sorted(rows.states.tolist()) == accepted.tolist()
        for state, prompt in zip(rows.states.tolist(), rows.prompts.tolist(), strict=True):
            assert two_groups.samples[state].group.prompt == selected.prompts[prompt]
    assert len({seed for rows in passes for seed in rows.seeds}) == 9


def test_control_rows_match_the_accepted_ones_in_number_group_prompt_and_seed(two_groups):
    selected = SelectedRows(two_groups, 4, (0, 5))
    index = [sample.group.index for sample in two_groups.samples]
    for accepted, control in zip(selected.passes(), selected.passes(control=True), strict=True):
        assert len(control) == len(accepted)
        assert [index[i] for i in control.states.tolist()] == [index[i] for i in accepted.states.tolist()]
        assert torch.equal(control.prompts, accepted.prompts) and control.seeds == accepted.seeds


def test_control_rows_cover_the_scored_samples_of_a_group_evenly(two_groups):
    """Four passes of 2 of 7 scored samples: each is used once before one is used again."""
    passes = list(SelectedRows(two_groups, 4, (0, 5)).passes(control=True))
    used = [i for rows in passes for i in rows.states.tolist() if i < 8]
    counts = [used.count(i) for i in range(8)]
    assert counts[3] == 0, "a sample without a reward cannot have been accepted"
    assert sorted(counts[:3] + counts[4:]) == [1] * 6 + [2]


def test_where_all_are_accepted_the_control_has_the_same_rows():
    groups, rewards = groups_of(4, 4), random_rewards(8)
    selected = SelectedRows(select(rewards, groups, accept_all, {}, (0,)), 2, (0, 0))
    for accepted, control in zip(selected.passes(), selected.passes(control=True), strict=True):
        assert sorted(accepted.states.tolist()) == sorted(control.states.tolist()) == list(range(8))


def test_the_order_is_shuffled_anew_in_each_pass():
    groups, rewards = groups_of(*[4] * 8), random_rewards(32)
    selected = SelectedRows(select(rewards, groups, accept_all, {}, (0,)), 2, (0, 0))
    first, second = (rows.states.tolist() for rows in selected.passes())
    assert first != second and sorted(first) == sorted(second)


def test_metrics_of_a_rollout():
    groups, reward = groups_of(2, 2, 2), rewards_of(0, 1, 1, 1, 4, NAN)
    selection = torch.tensor([False, True, False, False, False, False]), 0.2, 1
    rollout = Rollout(groups, samples_of(groups, 0), torch.zeros(6, 1), reward[:, None], reward, *selection)
    found = rollout.metrics(["red"])
    assert found["reward"] == found["rewards/red/mean"] == pytest.approx(7 / 5)
    assert found["reward_std"] == found["rewards/red/std"] == pytest.approx(rewards_of(0, 1, 1, 1, 4).std().item())
    assert found["reward_accepted"] == 1 and found["accepted"] == 1
    assert found["acceptance_rate"] == pytest.approx(1 / 6)
    assert found["frac_reward_zero_std"] == 0.5, "of the two groups that can be compared"
    assert found["groups_skipped"] == 1 and found["implied_kl"] == 0.2


@pytest.mark.parametrize(
    "key",
    [
        lambda image, prompt: image,
        lambda image, prompt: np.asarray(image),
        lambda image, prompt: torch.tensor(image.getpixel((0, 0))),
        lambda image, prompt: list(image.getpixel((0, 0))),
        lambda image, prompt: (prompt, [torch.tensor(image.getpixel((0, 0)))]),
        lambda image, prompt: {"colour": image.getpixel((0, 0))},
        lambda image, prompt: image.tobytes(),
    ],
)
def test_duplicates_are_found_whatever_the_key_function_returns(key):
    samples = [(Image.new("RGB", (4, 4), colour), "a cat") for colour in ("red", "blue", "red")]
    keys = duplicate_keys(key, samples)
    accepted, _, _ = accept(rewards_of(1.0, 2.0, 3.0), groups_of(3), accept_all, {}, ("seed",), keys)
    assert accepted.tolist() == [True, True, False]
