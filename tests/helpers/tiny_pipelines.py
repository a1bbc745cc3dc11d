# SPDX-License-Identifier: Apache-2.0

"""Randomly initialised pipelines of a few thousand parameters, built offline."""

import string
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from peft import LoraConfig
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from trl_pgraft.adapters.lora import adapter_parameters, add_adapter, tuner_layers


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def character_tokenizer(max_length: int = 24) -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary is the printable characters: no merges, so it needs no training."""
    characters = sorted(set(string.ascii_letters + string.digits + string.punctuation))
    tokens = characters + [f"{c}</w>" for c in characters] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=max_length)


def tiny_text_encoder(tokenizer: CLIPTokenizer, width: int = 16, kind: type = CLIPTextModel) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=width,
    )
    return kind(config).eval()


def tiny_vae(latent_channels: int = 4, shift_factor: float | None = None) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        shift_factor=shift_factor,
    ).eval()


def tiny_unet(cross_attention_dim: int = 16, in_channels: int = 4, **options) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=4,
        **options,
    ).eval()


def tiny_sd(scheduler=None, seed: int = 0) -> StableDiffusionPipeline:
    """Stable Diffusion on 16 x 16 images, latents of shape (4, 8, 8)."""
    torch.manual_seed(seed)
    tokenizer = character_tokenizer()
    scheduler = scheduler or DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1,
        set_alpha_to_one=False, timestep_spacing="leading",
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=tiny_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_sd2(seed: int = 0, zero_snr: bool = False) -> StableDiffusionPipeline:
    """Stable Diffusion 2 as its 768 model: v-prediction; with `zero_snr` the last timestep is pure noise."""
    return tiny_sd(
        DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1,
            set_alpha_to_one=False, prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr,
            timestep_spacing="trailing" if zero_snr else "leading",
        ),
        seed,
    )  # fmt: skip


def tiny_image_to_image(seed: int = 0) -> StableDiffusionImg2ImgPipeline:
    """Stable Diffusion that starts from an image."""
    parts = tiny_sd(seed=seed).components
    pipeline = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_inpainting(seed: int = 0, in_channels: int = 9) -> StableDiffusionInpaintPipeline:
    """Stable Diffusion that fills a mask: its UNet takes mask and masked image as further channels."""
    torch.manual_seed(seed)
    parts = {**tiny_sd(seed=seed).components, "unet": tiny_unet(in_channels=in_channels)}
    # A trained VAE's encodings hardly vary; those of random weights would, with the generator of each call.
    parts["vae"].quant_conv.weight.data[4:] = 0
    parts["vae"].quant_conv.bias.data[4:] = -30
    pipeline = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_ddpm(seed: int = 0, learned_variance: bool = False) -> DDPMPipeline:
    """DDPM on 8 x 8 images, in pixels and without conditioning; a learned variance goes to the scheduler as well."""
    torch.manual_seed(seed)
    variance = {"out_channels": 6, "variance_type": "learned_range"} if learned_variance else {"out_channels": 3}
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1, attention_head_dim=4, norm_num_groups=4,
        out_channels=variance.pop("out_channels"),
    )  # fmt: skip
    pipeline = DDPMPipeline(unet=unet.eval(), scheduler=DDPMScheduler(clip_sample=False, **variance))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL on 16 x 16 images: two text encoders, a nested dict of further conditioning."""
    torch.manual_seed(seed)
    tokenizer = character_tokenizer()
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    pipeline = StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(tokenizer),
        text_encoder_2=tiny_text_encoder(tokenizer, kind=CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=tiny_unet(32, **added, projection_class_embeddings_input_dim=6 * 8 + 16),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_flux(seed: int = 0, shift: float = 3.0, guidance_embeds: bool = False) -> FluxPipeline:
    """Flux on 16 x 16 images: packed latents, a flow schedule with a shift, a clock of t / 1000."""
    torch.manual_seed(seed)
    tokenizer = character_tokenizer()
    t5 = T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=tiny_vae(shift_factor=0.1),
        text_encoder=tiny_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=character_tokenizer(),
        transformer=transformer.eval(),
    )
    pipeline.default_sample_size = 8
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class ToyDenoiser(nn.Module):
    """A convolution that depends on the timestep and on one number per prompt."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, x, t, condition):
        shift = (t + condition).reshape(-1, 1, 1, 1)
        return (self.conv(x) + shift,)


class ToyPipeline:
    """What the rules about pipelines allow beyond Stable Diffusion: order of branches, calls, clock and sign."""

    def __init__(self, conditional_first=True, calls=1, clock=lambda t: 1 - t / 1000, sign=-1):
        torch.manual_seed(0)
        self.transformer = ToyDenoiser()
        self.scheduler = DDIMScheduler(clip_sample=False)
        self.conditional_first, self.calls, self.clock, self.sign = conditional_first, calls, clock, sign

    def maybe_free_model_hooks(self):
        pass

    def __call__(self, prompt, num_inference_steps=2, guidance_scale=1.0, generator=None, output_type="latent"):
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.randn(len(prompt), 2, 4, 4, generator=generator)
        condition = torch.tensor([float(len(text)) for text in prompt])
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.sign * self._guided(x, self.clock(t), condition, guidance_scale), t, x)[0]
        return x

    def _guided(self, x, t, condition, guidance_scale):
        t = torch.as_tensor(t).expand(len(x))
        if guidance_scale == 1.0:
            return self.transformer(x, t, condition=condition)[0]
        branches = [condition, torch.zeros_like(condition)]
        branches = branches if self.conditional_first else branches[::-1]
        if self.calls == 2:
            parts = [self.transformer(x, t, condition=branch)[0] for branch in branches]
        else:
            parts = self.transformer(torch.cat([x, x]), torch.cat([t, t]), torch.cat(branches))[0].chunk(2)
        c, u = parts if self.conditional_first else parts[::-1]
        return u + guidance_scale * (c - u)


def add_random_adapter(
    denoiser: nn.Module, name: str = "pgraft", seed: int = 1, rank: int = 4, alpha: int = 8, std: float = 0.3
) -> None:
    """Add a LoRA with alpha != r, large random weights, and so a large effect."""
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=ATTENTION)
    add_adapter(denoiser, config, name)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(denoiser, name):
        parameter.data.normal_(0, std, generator=generator)


@contextmanager
def adapter_use(denoiser: nn.Module, name: str = "pgraft") -> Iterator[dict[float, bool]]:
    """Timestep of each denoiser call made inside the block (on its own clock) -> was the adapter computed?"""
    use: dict[float, bool] = {}
    computed: list[bool] = []

    def after_call(module, args, kwargs, output):
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        use[float(timestep.flatten()[0])] = bool(computed)
        computed.clear()

    layer = tuner_layers(denoiser, name)[0]
    handles = [
        layer.lora_A[name].register_forward_hook(lambda *_: computed.append(True)),
        denoiser.register_forward_hook(after_call, with_kwargs=True),
    ]
    try:
        yield use
    finally:
        for handle in handles:
            handle.remove()
