# SPDX-License-Identifier: Apache-2.0

"""An unconditional flow model as a pipeline, which diffusers does not have: a UNet and an Euler scheduler."""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor


class FlowPipeline(DiffusionPipeline):
    """
    Sample images from noise.

    Args:
        unet (`UNet2DModel`):
            Predicts the velocity `noise - data` at timesteps in (0, 1000].
        scheduler (`FlowMatchEulerDiscreteScheduler`):
            The sampler.
        patch_size (`int`, *optional*, defaults to `1`):
            The UNet sees images of `(C, H, W)` as `(C p^2, H / p, W / p)`, which is cheaper.
    """

    def __init__(self, unet: UNet2DModel, scheduler: FlowMatchEulerDiscreteScheduler, patch_size: int = 1):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(patch_size=patch_size)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images of shape (B, C, H, W) in [-1, 1] as the UNet sees them."""
        return F.pixel_unshuffle(images, self.config.patch_size)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The inverse of `encode`."""
        return F.pixel_shuffle(latents, self.config.patch_size)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 20,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Images, or with `output_type="latent"` the final states, which `decode` makes images."""
        if latents is None:
            size = self.unet.config.sample_size
            shape = (batch_size, self.unet.config.in_channels, size, size)
            latents = randn_tensor(shape, generator=generator, device=self.device, dtype=self.unet.dtype)
        x = latents.to(self.device, self.unet.dtype)
        sigmas = torch.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist()
        self.scheduler.set_timesteps(sigmas=sigmas, device=self.device)
        for t in self.progress_bar(self.scheduler.timesteps):
            velocity = self.unet(x, t.expand(len(x))).sample
            x = self.scheduler.step(velocity, t, x, return_dict=False)[0]
        images = x if output_type == "latent" else self._to_images(x, output_type)
        return ImagePipelineOutput(images) if return_dict else (images,)

    def _to_images(self, x: torch.Tensor, output_type: str):
        arrays = (self.decode(x) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
        return self.numpy_to_pil(arrays) if output_type == "pil" else arrays


def load_flow(folder: Path) -> FlowPipeline:
    """The flow model of a folder, without progress bars, on the GPU where there is one."""
    pipeline = FlowPipeline.from_pretrained(folder).to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
