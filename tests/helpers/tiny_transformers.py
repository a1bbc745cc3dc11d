# SPDX-License-Identifier: Apache-2.0

"""Randomly initialised transformer pipelines of a few thousand parameters, built offline."""

import string

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tiny_pipelines import character_tokenizer, tiny_text_encoder, tiny_vae
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)


def fast_tokenizer(max_length: int = 32) -> PreTrainedTokenizerFast:
    """A tokenizer of printable characters that stands for those of T5, Gemma, Qwen and BERT."""
    tokens = ["<pad>", "<unk>", "<eos>", *string.printable]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        model_max_length=max_length,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )


def tiny_t5(width: int = 16, vocab_size: int = 128, multilingual: bool = False) -> T5EncoderModel:
    sizes = {"vocab_size": vocab_size, "d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return (UMT5EncoderModel(UMT5Config(**sizes)) if multilingual else T5EncoderModel(T5Config(**sizes))).eval()


def tiny_language_model(kind: str) -> torch.nn.Module:
    """A decoder of two layers and width 16, for the pipelines that take hidden states of a language model."""
    config, model = {"gemma": (Gemma2Config, Gemma2Model), "qwen": (Qwen2Config, Qwen2Model)}[kind]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return model(config(vocab_size=128, head_dim=8, num_key_value_heads=1, pad_token_id=0, **sizes)).eval()


def finished(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_sd3(seed: int = 0) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3 on 16 x 16 images: three text encoders, one guided call a step."""
    torch.manual_seed(seed)
    tokenizer = character_tokenizer()
    clip = [tiny_text_encoder(tokenizer, kind=CLIPTextModelWithProjection) for _ in range(2)]
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, out_channels=4,
        pos_embed_max_size=16,
    )  # fmt: skip
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(shift_factor=0.1),
        text_encoder=clip[0],
        tokenizer=tokenizer,
        text_encoder_2=clip[1],
        tokenizer_2=tokenizer,
        text_encoder_3=tiny_t5(32),
        tokenizer_3=fast_tokenizer(),
    )
    return finished(pipeline)


def tiny_qwen_image(seed: int = 0) -> QwenImagePipeline:
    """Qwen-Image on 16 x 16 images: a list in the conditioning, a mask only where it is needed, `true_cfg_scale`."""
    torch.manual_seed(seed)
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )  # fmt: skip
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae.eval(),
        text_encoder=tiny_language_model("qwen"),
        tokenizer=fast_tokenizer(),
        transformer=transformer.eval(),
    )
    # The real template is over 200 characters, which are tokens here.
    pipeline.prompt_template_encode, pipeline.prompt_template_encode_start_idx = "{}", 0
    pipeline.default_sample_size = 8
    return finished(pipeline)


def tiny_sana(seed: int = 0) -> SanaPipeline:
    """Sana on 16 x 16 images: flow matching under DPM-Solver++, an attention mask."""
    torch.manual_seed(seed)
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=8,
    )  # fmt: skip
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types="ResBlock", decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
    )  # fmt: skip
    pipeline = SanaPipeline(
        tokenizer=fast_tokenizer(),
        text_encoder=tiny_language_model("gemma"),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=2
        ),
    )
    return finished(pipeline)


def tiny_lumina2(seed: int = 0) -> Lumina2Pipeline:
    """Lumina 2 on 16 x 16 images: a clock that runs backwards, a sign, normalised guidance in two calls."""
    torch.manual_seed(seed)
    transformer = Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(64, 16, 16),
        cap_feat_dim=16,
    )  # fmt: skip
    pipeline = Lumina2Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_vae(shift_factor=0.1),
        text_encoder=tiny_language_model("gemma"),
        tokenizer=fast_tokenizer(),
    )
    return finished(pipeline)


def tiny_pixart(seed: int = 0) -> PixArtSigmaPipeline:
    """PixArt-Sigma on 16 x 16 images: learned variance, epsilon prediction under DPM-Solver++."""
    torch.manual_seed(seed)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        cross_attention_dim=16, caption_channels=16, use_additional_conditions=False,
    )  # fmt: skip
    pipeline = PixArtSigmaPipeline(
        tokenizer=fast_tokenizer(),
        text_encoder=tiny_t5(),
        vae=tiny_vae(),
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear"),
    )
    return finished(pipeline)


def tiny_z_image(seed: int = 0) -> ZImagePipeline:
    """Z-Image on 16 x 16 images: its transformer takes and returns lists."""
    torch.manual_seed(seed)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=24, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 4, 4], axes_lens=[128, 16, 16],
    )  # fmt: skip
    # Its pad tokens are allocated and left to the checkpoint to fill.
    torch.nn.init.normal_(transformer.x_pad_token)
    torch.nn.init.normal_(transformer.cap_pad_token)
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(shift_factor=0.1),
        text_encoder=tiny_language_model("qwen"),
        tokenizer=fast_tokenizer(),
        transformer=transformer.eval(),
    )
    return finished(pipeline)


def tiny_hunyuan_dit(seed: int = 0) -> HunyuanDiTPipeline:
    """HunyuanDiT on 16 x 16 images: v-prediction with learned variance, a tuple of rotary embeddings."""
    torch.manual_seed(seed)
    transformer = HunyuanDiT2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        hidden_size=16, cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=16, text_len=77,
        text_len_t5=256,
    )  # fmt: skip
    bert = BertConfig(
        vocab_size=128, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=77,
    )  # fmt: skip
    pipeline = HunyuanDiTPipeline(
        vae=tiny_vae(),
        text_encoder=BertModel(bert).eval(),
        tokenizer=fast_tokenizer(77),
        transformer=transformer.eval(),
        scheduler=DDIMScheduler(
            prediction_type="v_prediction", beta_schedule="scaled_linear", steps_offset=1, clip_sample=False
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=tiny_t5(),
        tokenizer_2=fast_tokenizer(256),
    )
    return finished(pipeline)


def tiny_wan(seed: int = 0, boundary_ratio: float | None = None) -> WanPipeline:
    """
    Wan on videos of five 16 x 16 frames: latents with a time axis, two guided calls a step.

    With a boundary, as Wan 2.2, a second transformer makes the steps below it.
    """
    torch.manual_seed(seed)

    def transformer() -> WanTransformer3DModel:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=16, freq_dim=16, ffn_dim=16, num_layers=1, cross_attn_norm=True, rope_max_seq_len=32,
        ).eval()  # fmt: skip

    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    pipeline = WanPipeline(
        tokenizer=fast_tokenizer(),
        text_encoder=tiny_t5(multilingual=True),
        vae=vae.eval(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformer(),
        transformer_2=transformer() if boundary_ratio else None,
        boundary_ratio=boundary_ratio,
    )
    return finished(pipeline)


def tiny_auraflow(seed: int = 0) -> AuraFlowPipeline:
    """AuraFlow on 16 x 16 images."""
    torch.manual_seed(seed)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, out_channels=4,
        pos_embed_max_size=64,
    )  # fmt: skip
    pipeline = AuraFlowPipeline(
        tokenizer=fast_tokenizer(),
        text_encoder=tiny_t5(multilingual=True),
        vae=tiny_vae(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
    return finished(pipeline)


def tiny_chroma(seed: int = 0) -> ChromaPipeline:
    """Chroma on 16 x 16 images: Flux without guidance embedding, two guided calls a step."""
    torch.manual_seed(seed)
    transformer = ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 8), approximator_num_channels=8,
        approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    pipeline = ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(shift_factor=0.1),
        text_encoder=tiny_t5(),
        tokenizer=fast_tokenizer(),
        transformer=transformer.eval(),
    )
    pipeline.default_sample_size = 8
    return finished(pipeline)


def tiny_dit(seed: int = 0) -> DiTPipeline:
    """DiT on 16 x 16 images: class labels in place of prompts, learned variance, both halves through the scheduler."""
    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
    )  # fmt: skip
    pipeline = DiTPipeline(transformer=transformer.eval(), vae=tiny_vae(), scheduler=DDIMScheduler(clip_sample=False))
    return finished(pipeline)
