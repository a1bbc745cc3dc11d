# SPDX-License-Identifier: Apache-2.0

"""What DDPO's scripts use: their pipeline, Stable Diffusion with DDIM, and how they are handed samples."""

import copy
import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig

from ..adapters.files import LORA_FILE, SWITCH_FILE, load_adapter_weights, read_switch, save_pgraft_adapter
from ..adapters.gate import TimestepGate
from ..adapters.lora import ADAPTER_NAME, add_adapter, default_lora_config
from ..core.switch_level import ALWAYS_ON, SwitchLevel
from ..pipelines.pixels import to_unit_range
from ..rewards.conventions import Reward
from ..rollouts.rollout import RolloutBatch


logger = logging.getLogger(__name__)


class DefaultDDPOStableDiffusionPipeline:
    """
    Stable Diffusion as DDPO's scripts make it: with DDIM, without a safety checker, with a LoRA if there is one.

    A call samples from the model as it is trained: with the adapter above its switch level and without it below. The
    guidance scale is the caller's throughout.

    Args:
        pretrained_model_name (`str`):
            Folder or repository of a Stable Diffusion pipeline. A folder written by
            [`~DefaultDDPOStableDiffusionPipeline.save_pretrained`] gives the adapter and its switch level back; any
            other `pytorch_lora_weights.safetensors` in it becomes part of the reference model.
        pretrained_model_revision (`str`, *optional*, defaults to `"main"`):
            Revision of the repository.
        use_lora (`bool`, *optional*, defaults to `True`):
            Train an adapter; `False`: all weights of the denoiser.
    """

    def __init__(self, pretrained_model_name: str, *, pretrained_model_revision: str = "main", use_lora: bool = True):
        self.pretrained_model = pretrained_model_name
        self.pretrained_revision = pretrained_model_revision
        self.sd_pipeline = StableDiffusionPipeline.from_pretrained(
            pretrained_model_name, revision=pretrained_model_revision
        )
        self.sd_pipeline.scheduler = DDIMScheduler.from_config(self.sd_pipeline.scheduler.config)
        self.sd_pipeline.safety_checker = None
        self.switch: SwitchLevel | None = None
        self.use_lora = self._load_adapter(use_lora)
        for part in (self.vae, self.text_encoder):
            part.requires_grad_(False)
        self.unet.requires_grad_(not self.use_lora)

    def _load_adapter(self, use_lora: bool) -> bool:
        """Load the adapter that lies beside the model, if one does; it decides whether a LoRA is trained."""
        folder = Path(self.pretrained_model)
        if (folder / SWITCH_FILE).is_file():
            self.switch = read_switch(folder)
            load_adapter_weights(self.unet, folder, ADAPTER_NAME)
            return isinstance(self.unet.peft_config[ADAPTER_NAME], LoraConfig)
        try:
            self.sd_pipeline.load_lora_weights(
                self.pretrained_model, weight_name=LORA_FILE, revision=self.pretrained_revision
            )
        except OSError:
            logger.info("%s has no %s; training starts from the model alone.", self.pretrained_model, LORA_FILE)
            return use_lora
        return True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The diffusers pipeline's own call and result, with the adapter switched at its level."""
        dtype = self.vae.dtype
        with ExitStack() as stack:
            if not self.use_lora and dtype != torch.float32:
                # All weights are trained in float32, whatever the frozen ones are in.
                stack.enter_context(torch.autocast(self.sd_pipeline.device.type, dtype))
            if ADAPTER_NAME in getattr(self.unet, "peft_config", {}):
                switch = self.switch or ALWAYS_ON
                where = (ADAPTER_NAME, switch.switch_timestep, switch.clock, self.sd_pipeline)
                stack.enter_context(TimestepGate(self.unet, *where))
            return self.sd_pipeline(*args, **kwargs)

    @property
    def unet(self) -> Any:
        """The denoiser."""
        return self.sd_pipeline.unet

    @property
    def vae(self) -> Any:
        """The autoencoder."""
        return self.sd_pipeline.vae

    @property
    def text_encoder(self) -> Any:
        """The text encoder."""
        return self.sd_pipeline.text_encoder

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return self.sd_pipeline.tokenizer

    @property
    def scheduler(self) -> DDIMScheduler:
        """The sampler."""
        return self.sd_pipeline.scheduler

    @property
    def autocast(self) -> Callable[..., Any] | None:
        """A context without autocast where a LoRA is trained; `None`: the accelerator's."""
        return nullcontext if self.use_lora else None

    def set_progress_bar_config(self, *args: Any, **kwargs: Any) -> None:
        """As the diffusers pipeline's method."""
        self.sd_pipeline.set_progress_bar_config(*args, **kwargs)

    def get_trainable_layers(self) -> torch.nn.Module:
        """The denoiser; where a LoRA is trained, with one of rank 4 on the attention, unless it has its adapter."""
        if self.use_lora and ADAPTER_NAME not in getattr(self.unet, "peft_config", {}):
            add_adapter(self.unet, default_lora_config(self.unet, rank=4), ADAPTER_NAME)
        return self.unet

    def save_pretrained(self, output_dir: str | Path) -> None:
        """
        Save the reference model as a pipeline, and the adapter with its switch level beside it.

        diffusers loads the folder with `from_pretrained`, and the adapter with `load_lora_weights` of the same folder.

        Args:
            output_dir (`str` or `Path`):
                Where to write.
        """
        unet = self.unet
        self.sd_pipeline.unet = _without_adapter(unet)
        try:
            self.sd_pipeline.save_pretrained(output_dir)
        finally:
            self.sd_pipeline.unet = unet
        if ADAPTER_NAME in getattr(unet, "peft_config", {}):
            save_pgraft_adapter(self.sd_pipeline, output_dir, self.switch or ALWAYS_ON)


def _without_adapter(unet: Any) -> Any:
    """A copy of plain weights: without the trained adapter, with every other one fused in."""
    names = [name for name in getattr(unet, "peft_config", {}) if name != ADAPTER_NAME]
    plain = copy.deepcopy(unet)
    if names:
        plain.fuse_lora(adapter_names=names)
    if getattr(unet, "peft_config", None):
        plain.unload_lora()
    return plain


def as_ddpo(values: torch.Tensor, infos: list[Any], rewards: Sequence[Reward]) -> tuple[torch.Tensor, Any]:
    """A batch's values `(B, F)` and infos as DDPO has them: one reward a sample, and the info of the only function."""
    weights = torch.tensor([reward.weight for reward in rewards], dtype=torch.float64)
    return values @ weights, infos[0] if len(infos) == 1 else infos


def hook_data(batch: RolloutBatch, rewards: Sequence[Reward]) -> list[Any]:
    """A batch as `image_samples_hook` takes it: images in [0, 1], prompts, metadata, rewards and their info."""
    metadata = batch.columns.get("metadata", [sample.group.columns for sample in batch.samples])
    images = to_unit_range(batch.images)
    return [images, tuple(batch.prompts), tuple(metadata), *as_ddpo(batch.rewards, batch.infos, rewards)]
