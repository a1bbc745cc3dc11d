# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch

from trl_pgraft.core.acceptance import (
    ACCEPTANCE_RULES,
    accept_all,
    accept_best_of_n,
    accept_exponential,
    accept_preference,
    accept_threshold,
    accept_top_k,
    deduplicate,
    get_acceptance,
    has_signal,
)
from trl_pgraft.core.divergence import estimated_kl, implied_kl


RULES = {
    "top_k": accept_top_k,
    "top_3": lambda r: accept_top_k(r, k=3),
    "best_of_n": accept_best_of_n,
    "exponential": lambda r: accept_exponential(r, beta=0.7, reward_max=6.0),
    "threshold": lambda r: accept_threshold(r, threshold=0.3),
    "quantile": lambda r: accept_threshold(r, quantile=0.6),
    "all": accept_all,
}
RANK_RULES = ["top_k", "top_3", "best_of_n", "quantile"]

parametrize_rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def groups(count=50, group_size=8):
    return torch.randn(count, group_size, generator=seeded())


@parametrize_rules
def test_probabilities_are_probabilities(rule):
    for rewards in groups():
        accepted = rule(rewards)
        assert accepted.shape == rewards.shape and accepted.dtype == rewards.dtype
        assert (accepted >= 0).all() and (accepted <= 1).all()


@parametrize_rules
def test_higher_rewards_are_accepted_at_least_as_often(rule):
    for rewards in groups():
        assert (rule(rewards)[rewards.argsort()].diff() >= 0).all()


@parametrize_rules
def test_raising_one_reward_never_lowers_its_probability(rule):
    """What makes the reshaped reward non-decreasing in the reward, also across ties and groups without signal."""
    values = torch.tensor([-1.0, 0.0, 0.0, 0.5, 0.5, 2.0])
    for others in torch.randint(6, (40, 7), generator=seeded(1)):
        accepted = [rule(torch.cat([r[None], values[others]]))[0] for r in values]
        equal = [rule(torch.cat([r[None], values[others[:1]].expand(7)]))[0] for r in values]
        assert sorted(accepted) == accepted and sorted(equal) == equal


@parametrize_rules
def test_the_order_of_samples_does_not_matter(rule):
    for rewards in groups():
        order = torch.randperm(len(rewards), generator=seeded(1))
        assert torch.equal(rule(rewards)[order], rule(rewards[order]))


@parametrize_rules
@pytest.mark.parametrize(
    "rewards",
    [
        torch.tensor([0.0, math.nan, 1.0, 2.0]),
        torch.tensor([0.0, math.inf, 1.0, 2.0]),
        torch.zeros(2, 4),
        torch.arange(4),
        [0.0, 1.0, 2.0, 3.0],
    ],
    ids=["nan", "inf", "2d", "integers", "list"],
)
def test_bad_rewards_are_refused(rule, rewards):
    with pytest.raises(ValueError, match="Rewards must be finite|1-D float tensor"):
        rule(rewards)


@pytest.mark.parametrize("name", RULES)
def test_groups_without_signal(name):
    accepted = RULES[name](torch.full((8,), 0.5))
    assert not accepted.any() if name in RANK_RULES else (accepted == accepted[0]).all() and accepted[0] > 0


def test_has_signal():
    assert has_signal(torch.tensor([0.0, 0.0, 1.0]))
    assert not has_signal(torch.tensor([2.0, 2.0]))
    assert not has_signal(torch.tensor([2.0]))


@pytest.mark.parametrize(("group_size", "k"), [(2, 1), (3, 1), (4, 1), (6, 2), (8, 2), (16, 4), (64, 16)])
def test_top_k_accepts_a_quarter(group_size, k):
    rewards = groups(1, group_size)[0]
    accepted = accept_top_k(rewards)
    assert accepted.sum() == k
    assert rewards[accepted == 1].min() > rewards[accepted == 0].max()


def test_top_k_gives_ties_to_the_lower_index():
    assert accept_top_k(torch.tensor([0.0, 1.0, 1.0, 1.0]), k=2).tolist() == [0, 1, 1, 0]
    assert accept_top_k(torch.tensor([1.0, 0.0, 0.0, 0.0]), k=2).tolist() == [1, 1, 0, 0]
    assert accept_best_of_n(torch.tensor([0.0, 2.0, 2.0])).tolist() == [0, 1, 0]
    # Large enough for an unstable sort to show.
    rewards = (torch.rand(5000, generator=seeded()) > 0.5).float()
    assert torch.equal(accept_top_k(rewards, k=100).nonzero().flatten(), rewards.nonzero().flatten()[:100])


@pytest.mark.parametrize(("group_size", "k"), [(4, 4), (4, 5), (4, 0), (4, -1), (1, None)])
def test_top_k_names_what_is_wrong(group_size, k):
    with pytest.raises(ValueError, match=rf"M={group_size}.*1 <= k < M"):
        accept_top_k(torch.arange(group_size, dtype=torch.float32), k=k)


def test_threshold_wants_exactly_one():
    rewards = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert accept_threshold(rewards, threshold=1.0).tolist() == [0, 1, 1, 1]
    assert accept_threshold(rewards, quantile=0.5).tolist() == [0, 0, 1, 1]
    for options in ({}, {"threshold": 1.0, "quantile": 0.5}):
        with pytest.raises(ValueError, match="exactly one"):
            accept_threshold(rewards, **options)
    for quantile in (0.0, 1.0, 75):
        with pytest.raises(ValueError, match=r"\(0, 1\)"):
            accept_threshold(rewards, quantile=quantile)


def test_preference_is_the_winner_of_a_pair():
    assert accept_preference(torch.tensor([0.2, 0.1])).tolist() == [1, 0]
    assert accept_preference(torch.tensor([0.1, 0.2])).tolist() == [0, 1]
    assert accept_preference(torch.tensor([0.1, 0.1])).tolist() == [0, 0]
    with pytest.raises(ValueError, match="M=3"):
        accept_preference(torch.tensor([0.1, 0.2, 0.3]))


def test_exponential_refuses_a_bound_that_is_none():
    with pytest.raises(ValueError, match=r"reward_max=1\.0"):
        accept_exponential(torch.tensor([0.0, 1.5]), beta=1.0, reward_max=1.0)
    with pytest.raises(ValueError, match="positive"):
        accept_exponential(torch.tensor([0.0, 0.5]), beta=0.0, reward_max=1.0)


def test_exponential_tilts_the_law_by_the_reward():
    """With -reward ~ Exp(1), `p exp(r / beta)` is Exp(1 + 1 / beta). A group's maximum as the bound would bias it."""
    beta, rewards = 0.5, -torch.empty(40_000, 4).exponential_(generator=seeded())
    coin = torch.rand(rewards.shape, generator=seeded(1))
    tilted = -1 / (1 + 1 / beta)

    fixed = torch.stack([accept_exponential(r, beta, reward_max=0.0) for r in rewards])
    accepted = rewards[coin < fixed]
    assert abs(accepted.mean().item() - tilted) < 4 * accepted.std().item() / math.sqrt(len(accepted))

    own = torch.stack([accept_exponential(r, beta, reward_max=r.max().item()) for r in rewards[:4000]])
    accepted = rewards[:4000][coin[:4000] < own]
    assert abs(accepted.mean().item() - tilted) > 6 * accepted.std().item() / math.sqrt(len(accepted))


def test_rules_have_names():
    assert get_acceptance("top_k") is accept_top_k
    assert get_acceptance(accept_all) is accept_all
    assert set(ACCEPTANCE_RULES) == {"top_k", "best_of_n", "exponential", "threshold", "preference", "all"}
    with pytest.raises(ValueError, match="'top'.*top_k, best_of_n"):
        get_acceptance("top")


def test_deduplicate_keeps_the_first_that_has_a_chance():
    probabilities = torch.tensor([0.0, 0.5, 1.0, 1.0, 0.25])
    assert deduplicate(probabilities, ["a", "a", "a", "b", "b"]).tolist() == [0.0, 0.5, 0.0, 1.0, 0.0]
    assert deduplicate(probabilities, range(5)).tolist() == probabilities.tolist()
    assert probabilities.tolist() == [0.0, 0.5, 1.0, 1.0, 0.25]
    with pytest.raises(ValueError, match="one key for each of 5"):
        deduplicate(probabilities, ["a"])


def test_deduplication_reshapes_a_binary_reward():
    """Of M samples a correct sample of probability p is then accepted `1 - (1 - p)^M` times, not `M p`."""
    p, group_size, count = torch.tensor([0.5, 0.2, 0.1, 0.2]), 4, 8000
    rewards = torch.tensor([1.0, 1.0, 1.0, 0.0])
    sampled = torch.multinomial(p.expand(count, -1), group_size, replacement=True, generator=seeded())
    accepted = torch.stack(
        [deduplicate(accept_threshold(rewards[x], threshold=0.5), x.tolist()) for x in sampled]
    ).bool()
    frequency = torch.bincount(sampled[accepted], minlength=4) / count
    expected = rewards * (1 - (1 - p) ** group_size)
    assert ((frequency - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all()


def density(u, group_size, k):
    """The accepted density of top-k of M relative to the sampling law, in the reward's CDF u."""
    terms = (math.comb(group_size - 1, j) * (1 - u) ** j * u ** (group_size - 1 - j) for j in range(k))
    return group_size / k * sum(terms)


def kolmogorov_smirnov(samples, group_size, k):
    """sqrt(n) times the largest distance to the closed form's CDF; above 1.95 once in a thousand."""
    u = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    cdf = torch.cat([torch.zeros(1), torch.cumulative_trapezoid(density(u, group_size, k), u)])
    empirical = torch.searchsorted(samples.double().sort().values, u, right=True) / len(samples)
    return math.sqrt(len(samples)) * (empirical - cdf).abs().max().item()


@pytest.mark.parametrize(("group_size", "k"), [(2, 1), (8, 1), (8, 2), (8, 5), (5, 4)])
def test_the_accepted_law_of_top_k_is_its_closed_form(group_size, k):
    u = torch.rand(10_000, group_size, generator=seeded())
    accepted = torch.stack([accept_top_k(r, k) for r in u])
    one = torch.multinomial(accepted, 1, generator=seeded(1))  # of a group's k, which are not independent
    assert kolmogorov_smirnov(u.gather(1, one).flatten(), group_size, k) < 1.95
    assert kolmogorov_smirnov(u.gather(1, one).flatten(), group_size + 1, k) > 3


@pytest.mark.parametrize("group_size", [2, 3, 8, 64, 1000])
def test_implied_kl_of_best_of_n(group_size):
    closed_form = math.log(group_size) - (group_size - 1) / group_size
    assert implied_kl(group_size) == pytest.approx(closed_form, abs=1e-12)


@pytest.mark.parametrize(("group_size", "k"), [(8, 2), (8, 7), (16, 4), (5, 3), (60, 7)])
def test_implied_kl_is_the_integral_of_the_closed_form(group_size, k):
    u = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    g = density(u, group_size, k)
    assert implied_kl(group_size, k) == pytest.approx(torch.trapezoid(torch.xlogy(g, g), u).item(), abs=1e-6)


def test_implied_kl_composes_over_rounds():
    assert [round(implied_kl(8, 2, rounds), 2) for rounds in (1, 2, 3)] == [0.83, 2.17, 3.55]
    # Best of M, and then best of M of those, is best of M^2.
    assert implied_kl(4, rounds=2) == pytest.approx(implied_kl(16), abs=1e-12)
    assert implied_kl(8, rounds=3) == pytest.approx(implied_kl(512), abs=1e-12)
    # In the end every iteration keeps k of M of a top that is already uniform.
    assert implied_kl(1024, 10, 9) - implied_kl(1024, 10, 8) == pytest.approx(math.log(102.4), abs=1e-6)


def spacing_kl(u, width=60):
    """KL of samples in [0, 1] to the uniform law, by the spacings of order statistics (Vasicek)."""
    u = torch.cat([torch.zeros(width), u.double().sort().values, torch.ones(width)])
    gaps = u[2 * width :] - u[: -2 * width]
    return -(gaps * len(gaps) / (2 * width)).log().mean().item()


@pytest.mark.parametrize(("group_size", "k"), [(8, 2), (4, 1), (6, 3)])
@pytest.mark.parametrize("rounds", [1, 3])
def test_implied_kl_against_monte_carlo(group_size, k, rounds):
    samples = 24_000
    u = torch.rand(samples * (group_size // k) ** rounds, generator=seeded())
    for _ in range(rounds):
        u = u[torch.randperm(len(u), generator=seeded(1))].reshape(-1, group_size).topk(k).values.flatten()
    assert spacing_kl(u) == pytest.approx(implied_kl(group_size, k, rounds), abs=0.02)


ATOMS = {"binary": [0.7, 0.3], "rare": [0.97, 0.03], "easy": [0.05, 0.95], "five": [0.1, 0.0, 0.4, 0.3, 0.2]}


@pytest.mark.parametrize("atoms", ATOMS.values(), ids=ATOMS)
@pytest.mark.parametrize("rounds", [1, 3])
def test_implied_kl_with_ties_against_the_rule(atoms, rounds):
    reference = p = torch.tensor(atoms, dtype=torch.float64)
    for i in range(rounds):
        rewards = torch.multinomial(p.expand(12_000, -1), 8, replacement=True, generator=seeded(i)).float()
        accepted = torch.stack([accept_top_k(r, 2) for r in rewards]).bool()
        if not accepted.any():  # every reward is the same by now
            break
        p = torch.bincount(rewards[accepted].long(), minlength=len(p)).double()
        p = p / p.sum()
    simulated = (torch.xlogy(p, p) - torch.xlogy(p, reference)).sum().item()
    assert simulated == pytest.approx(implied_kl(8, 2, rounds, atoms), abs=0.02)


def test_implied_kl_with_ties_by_hand():
    # Pairs of a binary reward: only mixed pairs are accepted, and then the better one.
    assert implied_kl(2, atoms=[0.7, 0.3]) == pytest.approx(-math.log(0.3))
    # Best of 3: of the mixed groups the best is always correct.
    assert implied_kl(3, atoms=[0.5, 0.5]) == pytest.approx(math.log(2))
    # 2 of 3: groups with one correct sample (3 p q^2) also accept one that is not.
    p, q = 0.4, 0.6
    correct = (3 * p * q**2 + 2 * 3 * p**2 * q) / (2 * (3 * p * q**2 + 3 * p**2 * q))
    kl = correct * math.log(correct / p) + (1 - correct) * math.log((1 - correct) / q)
    assert implied_kl(3, 2, atoms=[q, p]) == pytest.approx(kl)


def test_implied_kl_with_fine_ties_is_the_continuous_one():
    for rounds in (1, 3):
        assert implied_kl(8, 2, rounds, [1e-4] * 10_000) == pytest.approx(implied_kl(8, 2, rounds), abs=1e-4)


def test_implied_kl_without_signal_is_zero():
    assert implied_kl(8, 2, 3, atoms=[1.0]) == implied_kl(8, 2, 3, atoms=[0.0, 1.0]) == 0
    # Once everything is correct, further iterations change nothing.
    assert implied_kl(8, 2, 50, atoms=[0.75, 0.25]) == pytest.approx(math.log(4), abs=1e-6)


@pytest.mark.parametrize(
    "options", [{"k": 8}, {"k": 0}, {"rounds": 0}, {"atoms": [0.5, 0.6]}, {"atoms": [-0.5, 1.5]}], ids=str
)
def test_implied_kl_refuses(options):
    with pytest.raises(ValueError):
        implied_kl(8, **options)


def test_estimated_kl_of_exponential_rejection():
    beta = 0.5
    exact = math.log(1 + 1 / beta) - 1 / (1 + beta)  # from Exp(1 + 1 / beta) to Exp(1), the law of -reward
    rewards = -torch.empty(200_000, dtype=torch.float64).exponential_(generator=seeded())
    probabilities = accept_exponential(rewards, beta, reward_max=0.0)
    assert estimated_kl(probabilities) == pytest.approx(exact, abs=0.01)


def mean_estimated_kl(share, group_size):
    """Of a threshold that accepts a share of all samples; exact would be -log(share)."""
    accepted = torch.rand(4000, group_size, generator=seeded()) < share
    return sum(map(estimated_kl, accepted.float())) / len(accepted)


def test_estimated_kl_has_the_documented_bias():
    few, many = math.log(100), math.log(2)
    assert mean_estimated_kl(0.01, 8) < math.log(8) < few
    assert many + 0.2 > mean_estimated_kl(0.5, 8) > mean_estimated_kl(0.5, 64) > many
    assert mean_estimated_kl(0.5, 64) == pytest.approx(many, abs=0.02)


def test_estimated_kl_of_simple_rules():
    rewards = groups()[0]
    assert estimated_kl(accept_all(rewards)) == pytest.approx(0, abs=1e-12)
    assert estimated_kl(torch.tensor([1.0, 1.0, 0.0, 0.0])) == pytest.approx(math.log(2))
    assert estimated_kl(torch.zeros(4)) == 0
