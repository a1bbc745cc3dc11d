# SPDX-License-Identifier: Apache-2.0

"""The policy: a pipeline with the adapter that is trained, and how it samples."""

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from peft import LNTuningConfig, PeftConfig

from ..config import GraftConfig
from ..core.seeding import seed_of
from ..core.switch_level import SwitchLevel
from ..pipelines.checks import check_call, check_peft_config, check_steps, warn_if_distilled
from ..pipelines.denoiser_call import denoiser_of
from ..pipelines.denoiser_format import DenoiserFormat, uncompiled, usual_timestep_names
from ..pipelines.fingerprint import (
    NO_SAMPLES,
    fingerprint_of,
    former_fingerprint,
    is_same_fingerprint,
    sampling_fingerprint,
    weights_of,
)
from ..pipelines.inputs import as_batch, config_in_force, inputs_of, sampling_arguments
from ..pipelines.introspection import introspect
from ..pipelines.placement import check_adaptable, evaluation_mode, place_pipeline, weights_dtype
from ..pipelines.schedulers import check_sampler, prediction_type_of
from ..pipelines.timesteps import tuned_levels
from .files import load_adapter_weights, put_adapter
from .gate import TimestepGate, gate_on
from .guidance import TunedGuidance
from .layers import active_scales, check_trainable
from .lora import (
    ADAPTER_NAME,
    AdapterSwitch,
    add_adapter,
    default_lora_config,
    full_copy_config,
    is_plain_lora,
    lora_extras,
    make_trainable,
    remove_adapter,
    switch_on,
    without_adapters,
)
from .warm_start import StartingAdapter, read_starting_adapter


class PipelineWrapper(Protocol):
    """A hand-made pipeline around a diffusers pipeline, such as DDPO's; `use_lora=False` on it trains all weights."""

    sd_pipeline: DiffusionPipeline


class Policy:
    """
    A pipeline with the adapter that is trained.

    Args:
        sd_pipeline (`DiffusionPipeline` or [`PipelineWrapper`]):
            The pipeline to fine-tune. With `use_lora=False` on it a copy of all weights of its denoiser is trained.
        config ([`GraftConfig`]):
            Sampling, guidance and rank.
        accelerator (`Accelerator`):
            The device of this process, and the precision of frozen weights.
        peft_config (`PeftConfig`, `str` or `Path`, *optional*):
            The adapter, or the folder or repository of one to go on from; a LoRA on the attention projections where
            it is not given.
        pipeline_kwargs (`dict`, *optional*):
            Further arguments of the pipeline call.
        denoiser_format (`type`, *optional*):
            Subclass of [`DenoiserFormat`], for a denoiser that the default does not serve.
        example (`dict`, *optional*):
            Further columns of one prompt, which the pipeline may need to be called at all.

    Raises:
        `ValueError`: the pipeline and the adapter do not fit together.
    """

    def __init__(
        self,
        sd_pipeline: DiffusionPipeline | PipelineWrapper | None,
        config: GraftConfig,
        accelerator: Accelerator,
        peft_config: PeftConfig | str | Path | None = None,
        pipeline_kwargs: dict[str, Any] | None = None,
        denoiser_format: type[DenoiserFormat] | None = None,
        example: dict[str, Any] | None = None,
    ):
        self.accelerator = accelerator
        if sd_pipeline is None:
            raise ValueError("sd_pipeline is required: the diffusers pipeline to fine-tune.")
        self.pipeline: DiffusionPipeline = getattr(sd_pipeline, "sd_pipeline", sd_pipeline)
        check_adaptable(denoiser_of(self.pipeline))
        check_trainable(denoiser_of(self.pipeline))
        _check_no_gate(denoiser_of(self.pipeline))
        self.denoiser = uncompiled(denoiser_of(self.pipeline))
        self.config = config = config_in_force(config, self.pipeline, pipeline_kwargs)
        self.is_full = getattr(sd_pipeline, "use_lora", True) is False
        self.start: StartingAdapter | None = None
        self.peft_config = self._choose_adapter(peft_config)
        place_pipeline(self.pipeline, accelerator.device, weights_dtype(accelerator))
        self.arguments = sampling_arguments(config, self.pipeline, pipeline_kwargs)
        self.example_arguments = {
            **{name: as_batch([value]) for name, value in self.inputs_of(example or {}).items()},
            **self.arguments,
        }
        self.introspection = introspect(self.pipeline, self.example_arguments, denoiser_format)
        self.call = self.introspection.call
        check_call(self.call, config, self.pipeline)
        warn_if_distilled(self.pipeline, self.call, self.arguments)
        self.prediction_type = prediction_type_of(self.pipeline.scheduler)
        self.levels, self.switch = tuned_levels(config, self.introspection.sampler, self.call.clock)
        self.switch = _with_format(self.switch, self.call.format, self.denoiser)
        check_sampler(self.introspection.sampler, self.levels.step_index, config.sample_eta)
        check_steps(self.introspection, self.levels.step_index, self.pipeline)
        self._holder: Any = sd_pipeline  # of the adapter's switch level
        _hand_over(self.switch, self._holder, self.has_adapter)
        if self.start is not None:
            self.start.check_level(self.switch, config, self.introspection.sampler)
        self.weights, self._parts, self._had_adapter = weights_of(self.pipeline), self._current_parts(), False
        self.fingerprint = sampling_fingerprint(
            self.pipeline, self.arguments, self.levels.step_index, self.weights, self._parts["active adapters"]
        )

    def _current_parts(self) -> dict[str, Any]:
        """What sampling depends on and a user may replace: components, and the scheduler's settings."""
        scheduler, components = self.pipeline.scheduler, self.pipeline.components.items()
        return {
            **{n: _parts_of(c, self.denoiser) for n, c in components if n not in NO_SAMPLES},
            # By what it is, because some pipelines make theirs anew in each call.
            "scheduler": (
                type(scheduler),
                {name: str(value) for name, value in scheduler.config.items() if not name.startswith("_")},
                getattr(scheduler, "shift", None),
            ),
            "switch level (by another trainer)": self._holder.switch,
            "active adapters": [a for a in active_scales(self.denoiser) if not a[0].startswith(ADAPTER_NAME)],
        }

    def check_unchanged(self) -> None:
        """
        Check that the pipeline is made of what it was made of when it was introspected.

        Raises:
            `ValueError`: components were replaced, the scheduler's settings changed or adapters were switched, fused
                or removed; the message names them.
        """
        check_trainable(denoiser_of(self.pipeline))
        self._had_adapter = self._had_adapter or self.has_adapter
        if self._had_adapter and not (self.has_adapter and AdapterSwitch(self.denoiser, ADAPTER_NAME).is_on):
            raise ValueError(
                f"sd_pipeline: the adapter {ADAPTER_NAME!r}, which is trained, was switched off or removed by "
                "disable_lora, set_adapters, unload_lora_weights or delete_adapters. Call `pipeline.enable_lora()` "
                f"and `pipeline.set_adapters` with {ADAPTER_NAME!r} among the names, or make a new trainer."
            )
        now = self._current_parts()
        changed = [name for name in now if now[name] is not self._parts[name] and now[name] != self._parts[name]]
        if changed:
            raise ValueError(
                f"sd_pipeline: its {', '.join(changed)} changed after the trainer was made, whose noise levels and "
                "conditioning are those of the pipeline as it was. Make a new trainer with the pipeline as it is now, "
                "or put back what it had."
            )

    def inputs_of(self, columns: dict[str, Any]) -> dict[str, Any]:
        """What the pipeline is handed of a prompt's further columns."""
        return inputs_of(self.pipeline, columns, self.arguments)

    @property
    def modules(self) -> list[torch.nn.Module]:
        """What fine-tuning calls: the denoiser, and modules whose outputs it is given, such as a ControlNet."""
        return [self.denoiser, *self.call.control_modules]

    @property
    def has_adapter(self) -> bool:
        """Whether there is a policy apart from the reference: with a control adapter, after the first iteration."""
        return ADAPTER_NAME in getattr(self.denoiser, "peft_config", {})

    def _choose_adapter(self, peft_config: PeftConfig | str | Path | None) -> PeftConfig:
        """What is trained: the adapter that is given, the one that the pipeline has, all weights, or a LoRA."""
        if peft_config is not None and self.is_full:
            raise ValueError("peft_config: the pipeline says use_lora=False, which trains all weights. Choose one.")
        if peft_config is not None and self.has_adapter:
            raise ValueError(f"peft_config: the pipeline has an adapter {ADAPTER_NAME!r} already, which is trained.")
        if isinstance(peft_config, str | Path):
            self.start = read_starting_adapter(self.pipeline, peft_config, self.config.hub_token)
            peft_config = self.start.peft_config
        if self.has_adapter:
            peft_config = self.denoiser.peft_config[ADAPTER_NAME]
        elif peft_config is None and self.is_full:
            peft_config = full_copy_config(self.denoiser)
        peft_config = peft_config or default_lora_config(self.denoiser, self.config.lora_rank)
        if self.config.control_adapter and not is_plain_lora(peft_config):
            raise ValueError(
                "peft_config: control_adapter=True subtracts one LoRA from another; this is a "
                f"{' with '.join([type(peft_config).__name__, *lora_extras(peft_config)])}. Give a plain LoraConfig, "
                "or set control_adapter=False."
            )
        check_peft_config(self.pipeline, peft_config)
        self.is_full = self.is_full or isinstance(peft_config, LNTuningConfig)  # see `full_copy_config`
        return peft_config

    def make_adapter(self) -> None:
        """Add the adapter, or go on with the one that is given or that the pipeline has."""
        peft_config = copy.deepcopy(self.peft_config)
        if self.start is not None:
            put_adapter(self.denoiser, peft_config, self.start.state, ADAPTER_NAME, self.start.source)
            self.accelerator.print(f"Training {self.start}.")
            self.start = replace(self.start, state={})  # the denoiser has it now
        elif not self.has_adapter:
            add_adapter(self.denoiser, peft_config, ADAPTER_NAME, seed_of(self.config.seed, "adapter"))
        if not AdapterSwitch(self.denoiser, ADAPTER_NAME).is_on:
            switch_on(self.denoiser, ADAPTER_NAME)
        make_trainable(self.denoiser, ADAPTER_NAME)
        self._had_adapter = True

    def load_adapter(self, folder: str | Path) -> None:
        """Put the adapter of a folder in the place of the one that is there, for further training."""
        if self.has_adapter:
            remove_adapter(self.denoiser, ADAPTER_NAME)
        load_adapter_weights(self.denoiser, folder, ADAPTER_NAME)

    def has_fingerprint(self, stored: str) -> bool:
        """Whether a stored fingerprint is this policy's; one of an earlier version is taken, with a warning."""
        return is_same_fingerprint(
            stored,
            self.fingerprint,
            lambda: former_fingerprint(self.pipeline, self.arguments, self.levels.step_index),
        )

    def sampled_by(self) -> str:
        """Identifies what samples: model, scheduler and arguments, and the adapter bit for bit."""
        counts = self.has_adapter and self.config.sample_from == "policy"
        weights = {n: p for n, p in self.denoiser.named_parameters() if counts and f".{ADAPTER_NAME}." in n}
        return f"{self.fingerprint} {fingerprint_of(weights)}"

    # Sampling.

    @property
    def tuned_guidance_scale(self) -> float:
        """Guidance scale of the tuned steps; 1.0 where the pipeline does not combine two branches."""
        if not self.call.is_guided:
            return 1.0
        scale = self.config.tuned_guidance_scale
        return (self.call.guidance_scale or math.nan) if scale is None else scale

    @contextmanager
    def sampler(self, reference: bool = False) -> Iterator[DiffusionPipeline]:
        """The pipeline as the policy samples with it, gate and guidance included, or as the reference does."""
        called, switch_timestep = denoiser_of(self.pipeline), self.switch.switch_timestep
        with ExitStack() as stack:
            stack.enter_context(evaluation_mode(self.denoiser))
            if self.is_full:
                # The trained copy is in float32 also where the frozen weights are not.
                stack.enter_context(self.accelerator.autocast())
            if self.has_adapter:
                stack.enter_context(
                    without_adapters(self.denoiser, [ADAPTER_NAME])
                    if reference
                    else TimestepGate(
                        called, ADAPTER_NAME, switch_timestep, self.call.clock, self.pipeline, self.call.format
                    )
                )
            if self.config.tuned_guidance_scale is not None and not reference:
                own = self.call.guidance_scale or math.nan
                stack.enter_context(
                    TunedGuidance(self.pipeline, self.call, own, self.tuned_guidance_scale, switch_timestep)
                )
            yield self.pipeline


def _parts_of(component: Any, denoiser: torch.nn.Module) -> Any:
    """What a component is compared by: a module with those in it, of which the denoiser's change with adapters."""
    if not isinstance(component, torch.nn.Module):
        return component
    inner = uncompiled(component)
    return inner if inner is denoiser else list(inner.modules())


def _with_format(switch: SwitchLevel, format: DenoiserFormat, denoiser: torch.nn.Module) -> SwitchLevel:
    """The switch level with what a loaded adapter's gate needs to read the timestep of an unusual denoiser."""
    if type(format).timestep is not DenoiserFormat.timestep:
        return replace(switch, denoiser_format=type(format).__name__)
    is_usual = format.timestep_name in usual_timestep_names(denoiser)[:1]
    return switch if is_usual else replace(switch, timestep_name=format.timestep_name)


def _check_no_gate(denoiser: torch.nn.Module) -> None:
    """Another gate would switch its adapter in the reference too, and refuses batches of training."""
    gate = gate_on(denoiser)
    if gate is not None:
        raise ValueError(
            f"sd_pipeline: a gate is on its denoiser and switches the adapter {gate.adapter_name!r}, as "
            "load_pgraft_adapter leaves it. Training puts a gate of its own there: to go on from an adapter, hand in "
            "the pipeline without it and give its folder as peft_config; otherwise call the gate's `remove()` first."
        )


def _hand_over(switch: SwitchLevel, holder: Any, has_adapter: bool) -> None:
    """Set the switch of the pipeline, with which a wrapper samples, unless its adapter is one of another level."""
    own = getattr(holder, "switch", None) if has_adapter else None
    if own is not None and own.switch_timestep != switch.switch_timestep:
        raise ValueError(
            f"sd_pipeline: its adapter switches at timestep {own.switch_timestep}, this configuration at "
            f"{switch.switch_timestep}. Keep the tuned_fraction and sample_num_steps that it was trained with, or "
            "load the pipeline anew."
        )
    holder.switch = switch
