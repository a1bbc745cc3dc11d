# SPDX-License-Identifier: Apache-2.0

"""Random samples with rewards, and the data set that they are stored as."""

import math

import torch

from trl_pgraft.rollouts.dataset import to_dataset
from trl_pgraft.rollouts.prompts import form_groups, samples_of
from trl_pgraft.rollouts.rollout import RolloutBatch


def random_round(shape=(4, 8, 8), prompts=("a cat", "a dog"), group_size=4, seed=0):
    """A scored batch of random samples, of which one has no reward."""
    generator = torch.Generator().manual_seed(seed)
    source = iter([(prompt, {}) for prompt in prompts])
    samples = samples_of(form_groups(source, group_size * len(prompts), group_size), seed)
    count = len(samples)
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    states = torch.randn(count, *shape, generator=generator)
    rewards = torch.rand(count, 1, generator=generator, dtype=torch.float64)
    rewards[1] = math.nan
    return RolloutBatch(samples, images, states, 64, rewards)


def as_dataset(batch, state_timestep=301.0, epoch=0):
    accepted = torch.arange(len(batch.samples)) % 4 == 0
    return to_dataset(batch, ["red"], 2 * batch.rewards[:, 0], accepted, epoch, state_timestep, "f00d")
