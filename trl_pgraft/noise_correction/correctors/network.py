# SPDX-License-Identifier: Apache-2.0

"""A small network as a corrector: it does not depend on prompts and costs one evaluation of its own a step."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import AutoModel, DiffusionPipeline, ModelMixin, UNet2DModel

from ...adapters.files import NETWORK_FOLDER
from ...pipelines.denoiser_call import DenoiserCall
from ...pipelines.placement import device_of
from .transport import TIMESTEPS, transport


@dataclass(frozen=True)
class NetworkCorrector:
    """
    A network of its own that predicts `E[u | x_c]`.

    Args:
        module (`diffusers.ModelMixin`):
            Called as `module(x, timestep).sample` with timesteps from 1000 (pure noise) to 0, of shape `(B,)`.
    """

    kind: ClassVar[str] = "network"
    default_settings: ClassVar[dict[str, Any]] = {}
    module: ModelMixin
    correct = transport  # a method: corrector.correct(noise, call, conditioning, steps)
    active = nullcontext

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.module.parameters())

    @property
    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in self.module.config.items() if not name.startswith("_")}

    def __call__(
        self,
        x: torch.Tensor,
        signal: torch.Tensor,
        call: DenoiserCall,
        conditioning: dict[str, Any],
        model: Callable[..., Any] | None = None,
    ) -> torch.Tensor:
        """
        Predict u.

        Args:
            x (`torch.Tensor` of shape `(B, ...)`):
                States x_c, in the layout of the denoiser's latents.
            signal (`torch.Tensor` of shape `(B,)`):
                Signal levels c in [0, 1): 0 is standard normal noise.
            call ([`DenoiserCall`]):
                How the pipeline calls its denoiser; a network does not use it.
            conditioning (`dict`):
                Arguments of that call for the samples' prompts, `B` rows; a network does not use it.
            model (`Callable`, *optional*):
                The module as accelerate prepared it for training; the module itself where not given.

        Returns:
            `torch.Tensor` of the shape of `x`, float32.
        """
        # Moving the pipeline does not move the network.
        model = self.module.to(x.device) if model is None else model
        dtype = next(self.module.parameters()).dtype
        return model(x.to(dtype), (TIMESTEPS * (1 - signal)).to(x.device, dtype)).sample.float()

    def save(self, folder: Path) -> None:
        self.module.save_pretrained(folder / NETWORK_FOLDER)

    @classmethod
    def load(cls, folder: Path, pipeline: DiffusionPipeline) -> "NetworkCorrector":
        return cls(
            AutoModel.from_pretrained(str(folder / NETWORK_FOLDER)).to(device_of(pipeline)).requires_grad_(False)
        )


def make_network(shape: tuple[int, ...], channels: int) -> UNet2DModel:
    """
    A small UNet whose output is zero, so that it corrects nothing before it is trained.

    Args:
        shape (`tuple[int, ...]`):
            Shape `(C, H, W)` of one sample's latents. There are as many levels, up to 3, as H and W can be halved.
        channels (`int`):
            Channels of the first level; the others have twice as many.

    Raises:
        `ValueError`: the latents are no images.
    """
    if len(shape) != 3:
        raise ValueError(
            f"corrector='network': latents of shape {shape} are no images (C, H, W). Pass a `network`, called as "
            "network(x, timestep).sample, or use corrector='lora'."
        )
    levels = 1 + sum(all(size % 2**k == 0 for size in shape[1:]) for k in (1, 2))
    network = UNet2DModel(
        in_channels=shape[0],
        out_channels=shape[0],
        block_out_channels=tuple(channels * min(2**level, 2) for level in range(levels)),
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
        norm_num_groups=math.gcd(channels, 8),
        layers_per_block=1,
        add_attention=False,
    )
    torch.nn.init.zeros_(network.conv_out.weight)
    torch.nn.init.zeros_(network.conv_out.bias)
    return network
