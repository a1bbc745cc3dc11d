# SPDX-License-Identifier: Apache-2.0

"""Fixtures that many tests share: tiny pipelines, small configurations, and a Hub on loopback for the real one."""

import gc

import pytest
import torch
from loopback_hub import HUB, forget_downloads
from tiny_pipelines import tiny_flux, tiny_sd

from trl_pgraft import GraftConfig


torch.set_num_threads(1)
# accelerate collects garbage after each fit; what the imports have made need not be looked through every time.
gc.freeze()


@pytest.fixture
def sd():
    """A fresh tiny Stable Diffusion with DDIM."""
    return tiny_sd()


@pytest.fixture
def hub():
    """The Hub: empty, with a token to write, one to read, and one of another user; nothing is cached."""
    HUB.reset()
    forget_downloads()
    HUB.tokens |= {"hf_write": ("ann", "write"), "hf_read": ("ann", "read"), "hf_other": ("bob", "write")}
    yield HUB
    HUB.reset()


@pytest.fixture
def flux():
    """A fresh tiny Flux."""
    return tiny_flux()


@pytest.fixture
def config(tmp_path):
    """Makes small configurations: rounds of one group of four images and two optimizer steps."""

    def make(**options):
        defaults = {
            "num_epochs": 1,
            "sample_num_steps": 4,
            "sample_guidance_scale": 3.0,
            "sample_batch_size": 4,
            "sample_num_batches_per_epoch": 1,
            "samples_per_prompt": 4,
            "acceptance_kwargs": {} if "acceptance" in options else {"k": 1},
            "train_batch_size": 2,
            "train_timestep_fraction": 0.25,
            "train_num_inner_epochs": 2,
            "train_learning_rate": 1e-2,
            "lora_rank": 2,
            "control_adapter": False,
            "output_dir": str(tmp_path / "out"),
        }
        return GraftConfig(**{**defaults, **options})

    return make
