# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from trl_pgraft.core import seeding
from trl_pgraft.core.seeding import PURPOSES, noise_of, sample_seed, seed_of


def test_seeds_depend_on_every_part_and_on_nothing_else():
    assert seed_of(0, 1, "a") == seed_of(0, 1, "a")
    seeds = {seed_of(*parts) for parts in [(0, 1, 2), (0, 2, 1), (0, 12), (1, 1, 2), ("0", 1, 2), (0, 1, 2, 0)]}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("run", [0, 1, 2**40])
def test_seeds_of_samples_are_a_permutation(monkeypatch, run):
    """All that there are, with fewer bits."""
    monkeypatch.setattr(seeding, "BITS", 14)
    numbers = range(2**14 // len(PURPOSES))
    seeds = [sample_seed(run, purpose, number) for purpose in PURPOSES for number in numbers]
    assert len(set(seeds)) == len(seeds) and 0 <= min(seeds) and max(seeds) < 2**14
    with pytest.raises(ValueError, match="no more"):
        sample_seed(run, PURPOSES[0], len(numbers) + 1)


def test_seeds_of_samples_have_the_bits_that_torch_keeps():
    """The same numbers of two runs are far apart; torch ignores what is above 32 bits, and nothing below."""
    seeds = torch.tensor([[sample_seed(run, "rollout", number) for number in range(2000)] for run in (0, 1)])
    assert seeds.unique().numel() == seeds.numel() and seeds.max() < 2**32
    assert torch.corrcoef(seeds.double())[0, 1].abs() < 0.1
    noise = [torch.randn(4, generator=torch.Generator().manual_seed(s)) for s in [0, *(1 << bit for bit in range(33))]]
    assert len(torch.stack(noise[:-1]).unique(dim=0)) == 33 and torch.equal(noise[-1], noise[0])


def test_noise_is_standard_normal_and_that_of_its_parts():
    noise = noise_of((8, 50, 50), 3, "a")
    assert noise.dtype == torch.float32 and torch.equal(noise, noise_of((8, 50, 50), 3, "a"))
    assert abs(noise.mean()) < 4 / noise.numel() ** 0.5 and abs(noise.var() - 1) < 4 * (2 / noise.numel()) ** 0.5
    others = torch.stack([noise, noise_of((8, 50, 50), 3, "b"), noise_of((8, 50, 50), 4, "a")]).flatten(1)
    assert (torch.corrcoef(others) - torch.eye(3)).abs().max() < 4 / noise.numel() ** 0.5


def test_seeds_and_noise_stay_what_they_are():
    """A run's images are made of them; stored seeds, with which a sample is redrawn, come from them."""
    numbers = ((0, "rollout", 0), (0, "rollout", 1), (0, "evaluation", 0), (7, "completion", 5))
    assert [sample_seed(*parts) for parts in numbers] == [3323778410, 3625835664, 3585752891, 661053889]
    assert noise_of((3,), 0, "a").tolist() == pytest.approx([-1.5369020, 0.24210729, 1.5006050], rel=1e-6)
    assert seed_of(0, 1, "a") == 7393572371247962983


@pytest.mark.slow
def test_a_million_samples_and_training_draws_share_no_noise():
    count = 10**6
    assert len({sample_seed(0, "rollout", number) for number in range(count)}) == count
    noise = torch.stack([noise_of((4,), seed_of(0, 0, 0, row), 0) for row in range(count)])
    assert len(noise.unique(dim=0)) == count
