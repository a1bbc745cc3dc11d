# SPDX-License-Identifier: Apache-2.0

"""Tiny runs of the trainer, and what pipelines sample before and after them."""

import random

import torch
from tiny_pipelines import tiny_sd

from trl_pgraft import PGraftTrainer, SwitchLevel
from trl_pgraft.adapters.lora import adapter_parameters


SWITCH = SwitchLevel(500.0, -0.5, 450.0, (1.0, 0.0))
ANIMALS = ["a cat", "a dog", "an ant"]


def brightness(images, prompts, metadata):
    """A reward in DDPO's convention."""
    return images.mean((1, 2, 3)), {}


def any_animal():
    return random.choice(ANIMALS), {"kind": "animal"}


def make_trainer(config, pipeline=None, reward=brightness, prompts=any_animal, **options):
    return PGraftTrainer(config, reward, prompts, pipeline or tiny_sd(), **options)


def sample_iteration(trainer, epoch=0):
    """The samples of an iteration, scored and selected."""
    return trainer.collector.sample_rollout(epoch)[0]


def adapter_of(trainer):
    return [p.detach().clone() for p in adapter_parameters(trainer.denoiser, "pgraft")]


def sample(pipeline):
    return pipeline(
        prompt=["a cat", "a dog"],
        num_inference_steps=6,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
