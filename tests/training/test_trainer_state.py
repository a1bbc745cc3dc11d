# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from trl_pgraft import GraftConfig, accept_best_of_n, accept_top_k
from trl_pgraft.core.divergence import implied_kl
from trl_pgraft.rollouts.prompts import PromptGroup, samples_of
from trl_pgraft.rollouts.rollout import Rollout
from trl_pgraft.training.state import TrainerState


def rollout(kl=None, size=8):
    groups = [PromptGroup(0, "a cat", size, {})]
    nothing = torch.zeros(size, 1), torch.zeros(size, 1), torch.zeros(size), torch.zeros(size, dtype=torch.bool)
    return Rollout(groups, samples_of(groups, 0), *nothing, implied_kl(8, 2) if kl is None else kl)


@pytest.mark.parametrize("kwargs", [{"k": 2}, {}])
def test_the_kl_of_equal_selections_composes_until_one_differs(kwargs):
    state, config = TrainerState(), GraftConfig(acceptance="top_k", acceptance_kwargs=kwargs)
    assert [state.add_kl(rollout(), config) for _ in range(2)] == [implied_kl(8, 2), implied_kl(8, 2, rounds=2)]
    assert state.add_kl(rollout(0.1), config) == pytest.approx(2 * implied_kl(8, 2) + 0.1)
    assert state.add_kl(rollout(), config) == pytest.approx(3 * implied_kl(8, 2) + 0.1)
    assert (state.kl_rounds, state.kl_composes) == (4, False)


@pytest.mark.parametrize(
    ("rule", "size"),
    [("best_of_n", 8), (accept_best_of_n, 8), ("preference", 2), (accept_top_k, 8)],
    ids=["best_of_n", "its function", "preference", "top_k's function"],
)
def test_the_kl_of_other_rules_by_rank_composes(rule, size):
    k = 2 if rule is accept_top_k else 1
    state, config = TrainerState(), GraftConfig(acceptance=rule, acceptance_kwargs={"k": 2} if k == 2 else {})
    found = [state.add_kl(rollout(implied_kl(size, k), size), config) for _ in range(3)]
    assert found == [implied_kl(size, k, rounds=rounds) for rounds in (1, 2, 3)]
    assert found[2] != pytest.approx(3 * found[0], rel=0.1)


def test_the_kl_of_another_rule_is_summed():
    state, config = TrainerState(), GraftConfig(acceptance="all", acceptance_kwargs={})
    assert [state.add_kl(rollout(0.5), config) for _ in range(2)] == [0.5, 1.0]


def test_the_kl_of_samples_from_the_reference_does_not_accumulate():
    state, config = TrainerState(), GraftConfig(sample_from="reference")
    assert [state.add_kl(rollout(), config) for _ in range(2)] == [implied_kl(8, 2)] * 2
    assert state == TrainerState()
