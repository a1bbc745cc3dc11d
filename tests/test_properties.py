# SPDX-License-Identifier: Apache-2.0

"""Whatever is configured and whatever a reward answers: a result that makes sense, or an error that says why."""

import dataclasses
import math
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from trl_pgraft import GraftConfig
from trl_pgraft.config import GUIDANCE_LOSSES
from trl_pgraft.core.acceptance import ACCEPTANCE_RULES, get_acceptance
from trl_pgraft.rewards import Patience, Reward, RewardError, score
from trl_pgraft.rollouts.prompts import form_groups, samples_of
from trl_pgraft.rollouts.rollout import Rollout
from trl_pgraft.rollouts.selection import accept, total_rewards
from trl_pgraft.training.rows import SelectedRows


pytestmark = pytest.mark.slow

MANY = settings(max_examples=5000, deadline=None, suppress_health_check=[HealthCheck.too_slow])


# Configurations.

NUMBERS = st.one_of(st.integers(-2, 40), st.floats(-2, 2), st.sampled_from([0, 1, 0.5, 1e-12, 1e12]))
ODD_NUMBERS = st.one_of(NUMBERS, st.sampled_from([math.nan, math.inf, -math.inf]))
KWARGS = st.dictionaries(
    st.sampled_from(["k", "beta", "reward_max", "threshold", "quantile", "x"]), NUMBERS, max_size=3
)
VALUES = {
    "acceptance": st.sampled_from([*ACCEPTANCE_RULES, "best", ""]),
    "acceptance_kwargs": KWARGS,
    "guidance_loss": st.sampled_from([*GUIDANCE_LOSSES, "none"]),
    "samples_per_prompt": st.one_of(st.none(), st.integers(-1, 16)),
    "timestep_sampling": st.sampled_from(["continuous", "sampler", "uniform"]),
    "sample_from": st.sampled_from(["policy", "reference", "nobody"]),
}
FIELDS = {field.name: field for field in dataclasses.fields(GraftConfig)}
NUMERIC = [name for name, field in FIELDS.items() if field.type in (int, float, int | None, float | None)]


def config_fields() -> st.SearchStrategy:
    numeric = {name: ODD_NUMBERS if FIELDS[name].type in (float, float | None) else NUMBERS for name in NUMERIC}
    optional = {**numeric, **VALUES}
    return st.lists(st.sampled_from(sorted(optional)), max_size=4, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: optional[name] for name in names})
    )


@given(config_fields())
@MANY
def test_a_configuration_is_taken_or_refused_by_the_name_of_a_field(fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fields that only PPO has a use for
        try:
            config = GraftConfig(**fields)
        except ValueError as error:
            assert any(name in str(error) for name in FIELDS), f"{fields}: {error}"
            return
        assert GraftConfig(**config.to_dict()) == config
    assert all(math.isfinite(v) for v in vars(config).values() if isinstance(v, float))
    assert config.num_train_timesteps >= 1
    assert config.group_size(1) == 1 and 2 <= config.group_size(1000)


# Rewards.

REWARD = st.one_of(
    st.none(),
    st.sampled_from([0.0, 1.0, -1.0, 0.5, 1e30, -1e30, 1e-30]),
    st.floats(-10, 10, allow_nan=False),
)
RULES = st.one_of(
    st.tuples(st.just("top_k"), st.fixed_dictionaries({}, optional={"k": st.integers(1, 7)})),
    st.tuples(st.sampled_from(["best_of_n", "all"]), st.just({})),
    st.tuples(st.just("exponential"), st.fixed_dictionaries({"beta": st.floats(0.1, 9), "reward_max": st.just(1e31)})),
    st.tuples(st.just("threshold"), st.fixed_dictionaries({"threshold": st.floats(-5, 5)})),
    st.tuples(st.just("threshold"), st.fixed_dictionaries({"quantile": st.floats(0.01, 0.99)})),
)  # fmt: skip


@st.composite
def rounds(draw):
    """Groups of eight (the last may be smaller) with one or two rewards, some left out."""
    images, functions = draw(st.integers(2, 20)), draw(st.integers(1, 2))
    rows = st.lists(REWARD, min_size=functions, max_size=functions)
    values = [[math.nan if v is None else v for v in draw(rows)] for _ in range(images)]
    weights = draw(st.lists(st.floats(-2, 2), min_size=functions, max_size=functions))
    return images, torch.tensor(values, dtype=torch.float64), weights, draw(RULES)


@given(rounds(), st.booleans())
@MANY
def test_a_round_of_any_rewards_is_decided_and_can_be_trained_on(case, deduplicated):
    images, values, weights, (name, kwargs) = case
    groups = form_groups(((f"prompt {i}", {}) for i in range(images)), images, 8)
    samples = samples_of(groups, 0)
    reward = total_rewards(values, weights, groups)
    keys = [i % 3 for i in range(images)] if deduplicated else None
    try:
        accepted, implied_kl, skipped = accept(reward, groups, get_acceptance(name), kwargs, (0, "accept"), keys)
    except ValueError as error:
        assert "Need 1 <= k < M" in str(error) and kwargs["k"] >= groups[0].size
        return
    assert not accepted[reward.isnan()].any(), "what was left out is not accepted"
    assert math.isfinite(implied_kl) and implied_kl > -1e-9
    assert 0 <= skipped <= len(groups)
    sizes = [group.size for group in groups]
    for rows, own in zip(accepted.split(sizes), reward.split(sizes), strict=True):
        scored = own[~own.isnan()]
        if name in ("top_k", "best_of_n") and len(scored) > 1:
            k = kwargs.get("k", 2) if name == "top_k" else 1
            assert rows.sum() <= k and not (rows.any() and (scored == scored[0]).all())
            left = own[~rows & ~own.isnan()]
            if not deduplicated and rows.any():
                assert len(left) and own[rows].min() >= left.max(), "the best are accepted, and not all"
    round_ = Rollout(groups, samples, torch.zeros(images, 1), values, reward, accepted, implied_kl, skipped)
    metrics = round_.metrics([f"r{i}" for i in range(len(weights))])
    assert all(isinstance(value, int | float) for value in metrics.values())
    assert 0 <= metrics["frac_reward_zero_std"] <= 1 or skipped == len(groups)
    check_rows(round_)


def check_rows(round_: Rollout) -> None:
    selected = SelectedRows(round_, 2, (0, 0))
    if len(selected) == 0:
        return
    of = torch.tensor([sample.group.index for sample in round_.samples])
    for chosen, control in zip(selected.passes(), selected.passes(control=True), strict=True):
        assert sorted(chosen.states.tolist()) == round_.accepted.nonzero().flatten().tolist()
        assert torch.equal(of[chosen.states], of[control.states]) and chosen.seeds == control.seeds
        assert not round_.total_reward[control.states].isnan().any(), "a sample without a score is no control"


ANSWER = st.one_of(
    st.lists(st.one_of(REWARD, st.sampled_from([math.nan, math.inf, "1", "x", [1], True])), max_size=5),
    st.sampled_from([None, 3.0, "abc", {"a": 1}]),
)


@given(ANSWER)
@MANY
def test_any_answer_of_a_reward_is_a_list_of_numbers_or_an_error_that_names_it(answer):
    reward = Reward("strange", lambda *, prompts, images: answer)
    images, prompts = torch.zeros(3, 3, 2, 2, dtype=torch.uint8), ["a cat", "a dog", "an ant"]
    try:
        values, _ = score(reward, images, prompts, {}, Patience(retries=0))
    except RewardError as error:
        assert "'strange'" in str(error) and "a cat" in str(error)
        return
    assert len(values) == 3 and all(value is None or math.isfinite(value) for value in values)
