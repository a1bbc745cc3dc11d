# SPDX-License-Identifier: Apache-2.0

"""An adapter from which training continues: of a folder or a repository, in PEFT's or in diffusers' format."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from peft import PeftConfig, get_peft_model_state_dict
from safetensors import safe_open

from ..config import GraftConfig
from ..core.switch_level import ALWAYS_ON, SwitchLevel, level_in_words, same_level
from ..pipelines.denoiser_call import denoiser_of
from ..pipelines.denoiser_format import uncompiled
from ..pipelines.fingerprint import fingerprint_of
from ..pipelines.schedulers import Sampler
from ..pipelines.timesteps import tuned_levels
from .files import (
    CORRECTOR_FILE,
    LORA_FILE,
    PEFT_FILES,
    SWITCH_FILE,
    clean,
    read_adapter,
    read_switch,
    read_switch_of_weights,
    redacted,
)
from .layers import tuner_layers
from .lora import ADAPTER_NAME, remove_adapter


TEXT_ENCODER_KEYS = ("text_encoder", "lora_te")


@dataclass(frozen=True)
class StartingAdapter:
    r"""
    An adapter from which training continues.

    Args:
        source (`str`):
            Folder or repository that it was read from.
        peft_config (`PeftConfig`):
            Its configuration.
        state (`dict[str, torch.Tensor]`):
            Its weights by PEFT's names.
        switch ([`SwitchLevel`] or `None`):
            Noise level at which it hands over; `None` for an adapter of another library, which runs at all levels.
        repository (`str` or `None`):
            Its repository on the Hub, which model cards name; `None` where it was read from a folder.
        fingerprint (`str`):
            Short hash of its weights, wherever they were read from.
    """

    source: str
    peft_config: PeftConfig
    state: dict[str, torch.Tensor]
    switch: SwitchLevel | None
    repository: str | None
    fingerprint: str

    def __str__(self) -> str:
        return f"continues {self.source}; its reference is the pipeline without it"

    def check_level(self, switch: SwitchLevel, config: GraftConfig, sampler: Sampler) -> None:
        r"""
        Check that it was trained for the noise levels at which it will be sampled with and trained.

        Args:
            switch ([`SwitchLevel`]):
                Noise level at which the run's adapter hands over.
            config ([`GraftConfig`]):
                Configuration of the run, whose `tuned_fraction` sets that level.
            sampler ([`Sampler`]):
                The pipeline's sampler, whose steps the error's message goes by.

        Raises:
            `ValueError`: it was trained for other levels; the message names them, and the value to set.
        """
        own = self.switch or ALWAYS_ON
        if not same_level(own, switch):
            origin = (
                f"has no {SWITCH_FILE}, so it is an ordinary adapter, made to run at all noise levels"
                if self.switch is None
                else f"was trained by a run that {level_in_words(self.switch)}"
            )
            raise ValueError(
                f"peft_config: {self.source} {origin}, and tuned_fraction={config.tuned_fraction:g} "
                f"{level_in_words(switch)}. {_remedy(own, config, sampler)}"
            )
        if own.switch_timestep is not None and own.tuned_guidance_scale != switch.tuned_guidance_scale:
            raise ValueError(
                f"peft_config: {self.source} was trained with tuned_guidance_scale={own.tuned_guidance_scale}, and it "
                f"is {switch.tuned_guidance_scale} now. Set it to that."
            )


def read_starting_adapter(
    pipeline: DiffusionPipeline, source: str | Path, token: str | None = None
) -> StartingAdapter:
    r"""
    Read an adapter from which training continues; the pipeline is left as it was.

    Args:
        pipeline (`DiffusionPipeline`):
            The pipeline to fine-tune. It reads an adapter in diffusers' own format.
        source (`str` or `Path`):
            Folder or repository with an adapter of PEFT (`adapter_config.json`, `adapter_model.safetensors`) or of
            diffusers (`pytorch_lora_weights.safetensors`).
        token (`str`, *optional*):
            Token for a private repository; the one of `HF_TOKEN` or `hf auth login` where not given.

    Raises:
        `ValueError`: there is no adapter at `source`, or not one of this denoiser alone.
    """
    local = Path(source).expanduser()
    folder = local if local.is_dir() else _downloaded(str(source), token)
    if (folder / CORRECTOR_FILE).is_file():
        raise ValueError(f"peft_config: {source} holds a noise corrector, which is no adapter to sample with.")
    if all((folder / name).is_file() for name in PEFT_FILES):
        weights, (peft_config, state) = PEFT_FILES[0], read_adapter(folder)
    elif (folder / LORA_FILE).is_file():
        weights, (peft_config, state) = LORA_FILE, _read_with_diffusers(pipeline, folder, source)
    else:
        raise ValueError(
            f"peft_config: {source} has no adapter: neither {' and '.join(PEFT_FILES)} (PEFT) nor {LORA_FILE} "
            f"(diffusers). Of a LoRA under another name, load it with `pipeline.load_lora_weights(..., "
            f"adapter_name={ADAPTER_NAME!r})` and hand in that pipeline without peft_config."
        )
    # The weights carry the switch level as well, for a folder that has lost its file.
    switch = read_switch(folder) if (folder / SWITCH_FILE).is_file() else read_switch_of_weights(folder / weights)
    return StartingAdapter(
        source=str(source),
        peft_config=peft_config,
        state=state,
        switch=switch,
        repository=None if local.is_dir() else str(source),
        fingerprint=fingerprint_of(state),
    )


def _downloaded(source: str, token: str | None) -> Path:
    try:
        files = [SWITCH_FILE, CORRECTOR_FILE, *PEFT_FILES]
        folder = Path(snapshot_download(source, allow_patterns=files, token=clean(token)))
        if not all((folder / name).is_file() for name in PEFT_FILES):
            snapshot_download(source, allow_patterns=[SWITCH_FILE, LORA_FILE], token=clean(token))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"peft_config: {source!r} is no folder, and cannot be loaded from the Hub: {redacted(error, token)}"
        ) from error
    return folder


def _read_with_diffusers(
    pipeline: DiffusionPipeline, folder: Path, source: str | Path
) -> tuple[PeftConfig, dict[str, torch.Tensor]]:
    """Configuration and weights of a LoRA in diffusers' format: its loader puts it into the pipeline for a moment."""
    with safe_open(folder / LORA_FILE, "pt") as file:
        of_encoders = [key for key in file.keys() if key.startswith(TEXT_ENCODER_KEYS)]
    if of_encoders:
        raise ValueError(
            f"peft_config: {source} has weights for a text encoder, e.g. {min(of_encoders)}, which cannot be switched "
            "at a noise level. Fuse it into the pipeline (`load_lora_weights`, `fuse_lora`, `unload_lora_weights`), "
            "which makes it part of the reference, or give an adapter of the denoiser alone."
        )
    denoiser = uncompiled(denoiser_of(pipeline))
    if not hasattr(pipeline, "load_lora_weights"):
        raise ValueError(f"peft_config: {type(pipeline).__name__} reads no {LORA_FILE}; give the adapter as PEFT's.")
    before = [(layer, list(layer.active_adapters)) for layer in tuner_layers(denoiser)]
    try:
        pipeline.load_lora_weights(folder, weight_name=LORA_FILE, adapter_name=ADAPTER_NAME)
        if ADAPTER_NAME not in getattr(denoiser, "peft_config", {}):
            raise ValueError(
                f"peft_config: {source} has no weights that diffusers reads for {type(denoiser).__name__}. Was the "
                "adapter trained for another model?"
            )
        state = get_peft_model_state_dict(denoiser, adapter_name=ADAPTER_NAME)
        return copy.deepcopy(denoiser.peft_config[ADAPTER_NAME]), {k: v.detach().clone() for k, v in state.items()}
    finally:
        if tuner_layers(denoiser, ADAPTER_NAME):
            remove_adapter(denoiser, ADAPTER_NAME)
        for layer, active in before:
            layer.set_adapter(active)


def _remedy(switch: SwitchLevel, config: GraftConfig, sampler: Sampler) -> str:
    """The `tuned_fraction` to set for this switch level, as a sentence."""
    if switch.switch_timestep is None:
        return "Set tuned_fraction=1.0."
    tried, steps = copy.copy(config), len(sampler.step_starts())
    for tuned in range(1, steps):
        tried.tuned_fraction = tuned / steps
        if same_level(tuned_levels(tried, sampler)[1], switch):
            return f"Set tuned_fraction={tried.tuned_fraction:.4g}."
    return (
        f"None of this sampler's {steps} steps has that level: keep the scheduler, the sample_num_steps and the "
        "tuned_fraction that it was trained with."
    )
