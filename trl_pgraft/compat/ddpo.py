# SPDX-License-Identifier: Apache-2.0

"""The parts of DDPO's interface beside its trainer: the pipeline class, its hook's data and its rewards' form."""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adapters.files import LORA_FILE, SWITCH_FILE, load_adapter_weights, read_switch, save_pgraft_adapter
from ..adapters.gate import TimestepGate
from ..adapters.lora import ADAPTER_NAME, add_adapter, default_lora_config
from ..core.switch_level import ALWAYS_ON, SwitchLevel
from ..pipelines.pixels import to_uint8, to_unit_range
from ..report.grids import image_grid
from ..rollouts.collect import RolloutCollector
from ..rollouts.rollout import Rollout, RolloutBatch
from ..rollouts.sampling import map_in_threads
from ..training.run_log import NoTracker, log_image


logger = logging.getLogger(__name__)


class DefaultDDPOStableDiffusionPipeline:
    """
    Stable Diffusion as DDPO's scripts make it: with DDIM, without a safety checker, with a LoRA if there is one.

    A call samples from the model as it is trained: with the adapter above its switch level and without it below. The
    guidance scale of the call holds at all steps.

    Args:
        pretrained_model_name (`str`):
            Folder or repository of a Stable Diffusion pipeline. A folder written by
            [`~DefaultDDPOStableDiffusionPipeline.save_pretrained`] gives the adapter and its switch level back; any
            other `pytorch_lora_weights.safetensors` in it becomes part of the reference model.
        pretrained_model_revision (`str`, *optional*, defaults to `"main"`):
            Branch, tag or commit of the repository.
        use_lora (`bool`, *optional*, defaults to `True`):
            Whether to train an adapter; `False` trains all weights of the denoiser.
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
        """Load the adapter in the model's folder, if there is one, and return whether a LoRA is to be trained."""
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
        """
        Sample; the adapter is on above its switch level and off below it.

        Args:
            args (`Any`):
                Positional arguments of the diffusers pipeline's call.
            kwargs (`Any`):
                Keyword arguments of the diffusers pipeline's call, such as `prompt`.

        Returns:
            What the diffusers pipeline's call returns.
        """
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
    def unet(self) -> UNet2DConditionModel:
        """The denoiser."""
        return self.sd_pipeline.unet

    @property
    def vae(self) -> AutoencoderKL:
        """The autoencoder."""
        return self.sd_pipeline.vae

    @property
    def text_encoder(self) -> PreTrainedModel:
        """The text encoder."""
        return self.sd_pipeline.text_encoder

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return self.sd_pipeline.tokenizer

    @property
    def scheduler(self) -> DDIMScheduler:
        """The scheduler."""
        return self.sd_pipeline.scheduler

    @property
    def autocast(self) -> Callable[..., Any] | None:
        """`nullcontext` where a LoRA is trained; otherwise `None`, for the accelerator's autocast."""
        return nullcontext if self.use_lora else None

    def set_progress_bar_config(self, *args: Any, **kwargs: Any) -> None:
        """Configure the progress bar; `args` and `kwargs` are those of the diffusers pipeline's own method."""
        self.sd_pipeline.set_progress_bar_config(*args, **kwargs)

    def get_trainable_layers(self) -> torch.nn.Module:
        """The denoiser; if a LoRA is trained and there is none yet, one of rank 4 is added to the attention."""
        if self.use_lora and ADAPTER_NAME not in getattr(self.unet, "peft_config", {}):
            add_adapter(self.unet, default_lora_config(self.unet, rank=4), ADAPTER_NAME)
        return self.unet

    def save_pretrained(self, output_dir: str | Path) -> None:
        """
        Save the reference model as a pipeline, and the adapter with its switch level beside it.

        diffusers loads the folder with `from_pretrained`, and the adapter with `load_lora_weights` of the same folder.

        Args:
            output_dir (`str` or `Path`):
                Folder to write to; made if missing.
        """
        unet = self.unet
        self.sd_pipeline.unet = _without_adapter(unet)
        try:
            self.sd_pipeline.save_pretrained(output_dir)
        finally:
            self.sd_pipeline.unet = unet
        if ADAPTER_NAME in getattr(unet, "peft_config", {}):
            save_pgraft_adapter(self.sd_pipeline, output_dir, self.switch or ALWAYS_ON)


def _without_adapter(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy of plain weights: without the trained adapter, with every other one fused in."""
    names = [name for name in getattr(unet, "peft_config", {}) if name != ADAPTER_NAME]
    plain = copy.deepcopy(unet)
    if names:
        plain.fuse_lora(adapter_names=names)
    if getattr(unet, "peft_config", None):
        plain.unload_lora()
    return plain


def score_batches(
    collector: RolloutCollector, batches: Sequence[Sequence[Any]], in_threads: bool = False
) -> Iterator[tuple]:
    """
    Score batches of images as DDPO's `compute_rewards` does.

    Args:
        collector ([`RolloutCollector`]):
            Has the reward functions.
        batches (`Sequence`):
            Of each batch `(images, prompts, metadata)`: images of shape `(B, 3, H, W)`, uint8 or float in [0, 1].
        in_threads (`bool`, *optional*, defaults to `False`):
            Whether to score several batches at the same time.

    Returns:
        `Iterator[tuple]`: the rewards of each batch, of shape `(B,)` with NaN where left out; then each one's infos.
    """

    def score(batch: Sequence[Any]) -> tuple[torch.Tensor, Any]:
        images, prompts, metadata = batch
        images = images if images.dtype == torch.uint8 else to_uint8(images)
        return _as_ddpo(*collector.score(images, list(prompts), {"metadata": list(metadata)}), collector.weights)

    return zip(*map_in_threads(score, batches, collector.config.max_workers if in_threads else 0), strict=True)


def show_samples(
    hook: Callable[..., Any] | None,
    rollout: Rollout,
    batches: Sequence[RolloutBatch],
    collector: RolloutCollector,
    step: int,
) -> None:
    """
    Send a grid of an iteration's samples to the trackers, and call DDPO's `image_samples_hook` with them.

    Args:
        hook (`Callable` or `None`):
            `hook(image_data, global_step, tracker)`. `image_data` has `[images, prompts, metadata, rewards,
            reward_metadata]` of each batch, images of shape `(B, 3, H, W)` in [0, 1]; `tracker` is the first tracker,
            or one that does nothing.
        rollout ([`Rollout`]):
            Samples of all processes.
        batches (`Sequence[RolloutBatch]`):
            This process's samples, as they were scored.
        collector ([`RolloutCollector`]):
            Has the reward functions and the trackers.
        step (`int`):
            Optimizer steps so far.
    """
    trackers, data = collector.accelerator.trackers, []
    if trackers and collector.accelerator.is_main_process:
        images = torch.cat([batch.images for batch in batches])
        grid = image_grid(images, rollout.captions()[: len(images)], rollout.groups[0].size)
        log_image(trackers, "samples", grid, step)
    if hook is None:
        return
    for batch in batches:
        metadata = batch.columns.get("metadata", [sample.group.columns for sample in batch.samples])
        images, values = to_unit_range(batch.images), _as_ddpo(batch.rewards, batch.infos, collector.weights)
        data.append([images, tuple(batch.prompts), tuple(metadata), *values])
    hook(data, step, trackers[0] if trackers else NoTracker())


def _as_ddpo(values: torch.Tensor, infos: list[Any], weights: Sequence[float]) -> tuple[torch.Tensor, Any]:
    """A batch's values `(B, F)` and infos as DDPO has them: one reward a sample, and the info of the only function."""
    return values @ torch.tensor(weights, dtype=torch.float64), infos[0] if len(infos) == 1 else infos
