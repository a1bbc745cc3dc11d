# SPDX-License-Identifier: Apache-2.0

"""A tiny flow of images without prompts, data whose noise is known, and configurations of its correction."""

import torch
from datasets import Dataset
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
from noise_correction.flow_pipeline import FlowPipeline

from trl_pgraft import NoiseCorrectionConfig


MEAN, STD, STEPS = 0.3, 0.8, 4


def tiny_flow(seed=0):
    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    pipeline = FlowPipeline(unet.eval(), FlowMatchEulerDiscreteScheduler(shift=2.0))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise_of(count, shape=(1, 8, 8), seed=1):
    return MEAN + STD * torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def flow_data(count=48):
    """What the flow makes of noise that is not standard normal: real data for which the right noise is known."""
    latents = tiny_flow()(latents=noise_of(count), num_inference_steps=STEPS, output_type="latent").images
    return Dataset.from_dict({"latents": latents.numpy()})


def make_config(tmp_path, **changes):
    values = {
        "output_dir": str(tmp_path / "out"), "corrector": "network", "network_channels": 8,
        "num_inference_steps": STEPS, "lowest_sigma": 0.0, "tolerance": 4e-5, "max_steps": 6, "train_batch_size": 16,
        "warmup_steps": 0,
        "inversion_batch_size": 20, "save_steps": 3, "logging_steps": 2, "learning_rate": 1e-3, **changes,
    }  # fmt: skip
    return NoiseCorrectionConfig(**values)
