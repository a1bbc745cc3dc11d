# SPDX-License-Identifier: Apache-2.0

"""Tiny pipelines with ControlNets, of random weights."""

from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxMultiControlNetModel,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetUnionPipeline,
)
from diffusers.models import SD3MultiControlNetModel
from tiny_pipelines import tiny_flux, tiny_sd, tiny_sdxl
from tiny_transformers import tiny_sd3
from torch import nn


UNET = {
    "in_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "norm_num_groups": 4,
}  # fmt: skip
XL = {
    "cross_attention_dim": 32, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}  # fmt: skip
SMALL_IMAGES = {"conditioning_embedding_out_channels": (4, 8)}


def as_trained(net: nn.Module) -> Any:
    """In a trained ControlNet the zero convolutions are not zero."""
    for parameter in net.parameters():
        if not parameter.any():
            parameter.data.normal_(0, 0.3)
    return net.eval().requires_grad_(False)


def tiny_controlnet(seed: int = 5, **options: Any) -> ControlNetModel:
    torch.manual_seed(seed)
    return as_trained(ControlNetModel(**{**UNET, "cross_attention_dim": 16, **SMALL_IMAGES, **options}))


def tiny_union(seed: int = 5) -> ControlNetUnionModel:
    torch.manual_seed(seed)
    trans = {"num_trans_channel": 8, "num_trans_head": 2, "num_proj_channel": 8}
    return as_trained(ControlNetUnionModel(**UNET, **XL, **SMALL_IMAGES, **trans))


def tiny_sd3_controlnet(seed: int = 5) -> SD3ControlNetModel:
    torch.manual_seed(seed)
    config = tiny_sd3().transformer.config
    names = (
        "sample_size", "patch_size", "in_channels", "attention_head_dim", "num_attention_heads", "joint_attention_dim",
        "caption_projection_dim", "pooled_projection_dim", "out_channels", "pos_embed_max_size",
    )  # fmt: skip
    return as_trained(SD3ControlNetModel(**{name: config[name] for name in names}, num_layers=1))


def tiny_flux_controlnet(seed: int = 5, **options: Any) -> FluxControlNetModel:
    torch.manual_seed(seed)
    config = tiny_flux().transformer.config
    names = (
        "patch_size", "in_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads",
        "joint_attention_dim", "pooled_projection_dim", "axes_dims_rope",
    )  # fmt: skip
    return as_trained(FluxControlNetModel(**{**{name: config[name] for name in names}, **options}))


def steadied(parts: dict[str, Any]) -> dict[str, Any]:
    """A trained VAE's encodings hardly vary; those of random weights would, with each call."""
    convolution = parts["vae"].quant_conv
    half = convolution.out_channels // 2
    convolution.weight.data[half:], convolution.bias.data[half:] = 0, -30
    return parts


def with_controlnet(kind: type, parts: dict[str, Any], controlnet: Any, **options: Any) -> Any:
    pipeline = kind(**steadied(parts), controlnet=controlnet, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_sd_controlnet(count: int = 1, kind: type = StableDiffusionControlNetPipeline) -> Any:
    nets = [tiny_controlnet(seed) for seed in range(count)]
    return with_controlnet(kind, tiny_sd().components, nets if count > 1 else nets[0], requires_safety_checker=False)


def tiny_sd_controlnet_img2img() -> StableDiffusionControlNetImg2ImgPipeline:
    return tiny_sd_controlnet(kind=StableDiffusionControlNetImg2ImgPipeline)


def tiny_sd_controlnet_inpaint() -> StableDiffusionControlNetInpaintPipeline:
    return tiny_sd_controlnet(kind=StableDiffusionControlNetInpaintPipeline)


def tiny_sdxl_controlnet(count: int = 1) -> StableDiffusionXLControlNetPipeline:
    nets = [tiny_controlnet(seed, **XL) for seed in range(count)]
    parts = {name: part for name, part in tiny_sdxl().components.items() if name != "image_encoder"}
    kind = StableDiffusionXLControlNetPipeline
    return with_controlnet(kind, parts, nets if count > 1 else nets[0], add_watermarker=False)


def tiny_sdxl_union() -> StableDiffusionXLControlNetUnionPipeline:
    parts = tiny_sdxl().components
    return with_controlnet(StableDiffusionXLControlNetUnionPipeline, parts, tiny_union(), add_watermarker=False)


def tiny_sd3_with_controlnet(count: int = 1) -> StableDiffusion3ControlNetPipeline:
    nets = [tiny_sd3_controlnet(seed) for seed in range(count)]
    net = SD3MultiControlNetModel(nets) if count > 1 else nets[0]
    return with_controlnet(StableDiffusion3ControlNetPipeline, tiny_sd3().components, net)


def tiny_flux_with_controlnet(count: int = 1, **options: Any) -> FluxControlNetPipeline:
    nets = [tiny_flux_controlnet(seed, **options) for seed in range(count)]
    net = FluxMultiControlNetModel(nets) if count > 1 else nets[0]
    pipeline = with_controlnet(FluxControlNetPipeline, tiny_flux().components, net)
    pipeline.default_sample_size = 8
    return pipeline
