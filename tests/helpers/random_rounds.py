# SPDX-License-Identifier: Apache-2.0

"""Random samples with rewards, and the data set that they are stored as."""

import math

import torch

from trl_pgraft.rollouts.batch import Drawn
from trl_pgraft.rollouts.dataset import to_dataset
from trl_pgraft.rollouts.prompts import form_groups, samples_of


def random_round(shape=(4, 8, 8), prompts=("a cat", "a dog"), group_size=4, seed=0):
    """Samples, what was drawn for them, and their rewards, of which one is missing."""
    generator = torch.Generator().manual_seed(seed)
    source = iter([(prompt, {}) for prompt in prompts])
    samples = samples_of(form_groups(source, group_size * len(prompts), group_size), seed)
    count = len(samples)
    images = torch.randint(0, 256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    drawn = Drawn(images, torch.randn(count, *shape, generator=generator), 64)
    rewards = torch.rand(count, generator=generator, dtype=torch.float64)
    rewards[1] = math.nan
    return samples, drawn, rewards


def as_dataset(samples, drawn, rewards, state_timestep=301.0, epoch=0):
    accepted = [i % 4 == 0 for i in range(len(samples))]
    columns = {"reward": 2 * rewards, "reward_red": rewards}
    return to_dataset(samples, drawn, columns, accepted, epoch, state_timestep, "f00d")
