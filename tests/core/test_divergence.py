# SPDX-License-Identifier: Apache-2.0

import math

import pytest

from trl_pgraft.core.divergence import accumulated_kl, implied_kl


KL = implied_kl(8, 2)


def test_equal_top_k_selections_compose():
    assert accumulated_kl(KL, KL, 1, 8, 2, composes=True) == (KL, True)
    total, composes = accumulated_kl(KL, 3 * KL, 3, 8, 2, composes=True)
    assert composes and total == implied_kl(8, 2, rounds=3) and total != pytest.approx(3 * KL)


@pytest.mark.parametrize(
    "kl, k, composes",
    [(KL, 2, False), (KL, None, True), (KL, 8, True), (KL - 1e-3, 2, True), (math.nan, 2, True)],
    ids=["an iteration before did not", "another rule", "everything accepted", "ties", "a stored rollout"],
)
def test_other_selections_are_summed(kl, k, composes):
    assert accumulated_kl(kl, 1.5, 3, 8, k, composes) == (1.5, False)
