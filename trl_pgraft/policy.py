# Copyright 2026 The trl_pgraft authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.


"""The policy: the denoiser with the adapter that is trained, how it samples, and how it is fitted to a round."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from peft import LNTuningConfig, LoraConfig, PeftConfig
from tqdm.auto import tqdm

from .adapters import (
    ADAPTER_NAME,
    AdapterSwitch,
    adapter_parameters,
    add_adapter,
    default_lora_config,
    full_copy_config,
    make_trainable,
    merge_difference,
    remove_adapter,
    without_adapters,
)
from .config import GraftConfig
from .denoiser_call import Conditioning, denoiser_of, record_conditioning
from .denoiser_format import DenoiserFormat, uncompiled
from .engine import make_optimizer, place_pipeline, weights_dtype
from .fine_tuning import FitReport, GraftLoss, count_microbatches, fit
from .hub import load_adapter_weights, put_adapter
from .levels import tuned_levels
from .memory import estimate_memory
from .parameterizations import prediction_type_of
from .pipeline_checks import check_call, check_peft_config, few_step_warning, guides_plainly
from .pipeline_inputs import as_batch, inputs_of
from .placement import check_adaptable, on_device
from .probe import learn_denoiser_call
from .rollout import sampling_arguments, seed_of
from .samplers import sampler_of
from .samples import fingerprint_of, sampling_fingerprint
from .selection import Round, SelectedRows
from .starting_adapter import StartingAdapter, read_starting_adapter
from .timestep_gate import SwitchLevel, TimestepGate, TunedGuidance, gate_on


@dataclass(frozen=True)
class TrainingSet:
    """What one round is fitted on: its rows, the states they point to, and the conditioning of their prompts."""

    rows: SelectedRows
    states: torch.Tensor
    conditioning: Conditioning | None


class Policy:
    """
    A pipeline with the adapter that is trained.

    Args:
        sd_pipeline (`DiffusionPipeline`, or a wrapper with one as its `sd_pipeline`):
            What to tune. Its `use_lora=False` asks for a trained copy of all weights of the denoiser.
        config ([`GraftConfig`]):
            How to sample and fit.
        accelerator (`Accelerator`):
            Where to.
        peft_config (`PeftConfig`, `str` or `Path`, *optional*):
            The adapter, or the folder or repository of one to go on from; a LoRA on the attention projections where
            it is not given.
        pipeline_kwargs (`dict`, *optional*):
            Further arguments of the pipeline call.
        denoiser_format (`type`, *optional*):
            Subclass of [`DenoiserFormat`], for a denoiser that the default does not serve.
        example (`dict`, *optional*):
            Further columns of one prompt, with which the pipeline is asked how it calls its denoiser.

    Raises:
        `ValueError`: the pipeline and the adapter do not fit together.
    """

    def __init__(
        self,
        sd_pipeline: Any,
        config: GraftConfig,
        accelerator: Accelerator,
        peft_config: PeftConfig | str | Path | None = None,
        pipeline_kwargs: dict[str, Any] | None = None,
        denoiser_format: type[DenoiserFormat] | None = None,
        example: dict[str, Any] | None = None,
    ):
        self.config, self.accelerator = config, accelerator
        self.pipeline = _checked_pipeline(sd_pipeline)
        check_adaptable(denoiser_of(self.pipeline))
        _check_no_gate(denoiser_of(self.pipeline))
        self.denoiser = uncompiled(denoiser_of(self.pipeline))
        self.is_full = getattr(sd_pipeline, "use_lora", True) is False
        self.start: StartingAdapter | None = None
        self.peft_config = self._choose_adapter(peft_config)
        place_pipeline(self.pipeline, accelerator.device, weights_dtype(accelerator))
        self.arguments = sampling_arguments(config, self.pipeline, pipeline_kwargs)
        own = {name: as_batch([value]) for name, value in self.inputs_of(example or {}).items()}
        asked_with = {**own, **self.arguments}
        self.call = learn_denoiser_call(self.pipeline, asked_with, denoiser_format)
        check_call(self.call, config, self.pipeline)
        few_step_warning(self.pipeline, self.call, self.arguments)
        self.prediction_type = prediction_type_of(self.pipeline.scheduler)
        self.levels, self.switch = tuned_levels(config, self.pipeline, self.call, asked_with)
        _hand_over(self.switch, sd_pipeline)
        if self.start is not None:
            self.start.check_level(self.switch, config, lambda: sampler_of(self.pipeline, asked_with))
        self.fingerprint = sampling_fingerprint(self.pipeline, self.arguments, self.levels.position)
        self.memory = estimate_memory(self.pipeline, config, self.peft_config, asked_with, self.call)
        accelerator.print(self.memory)
        self.optimizer: torch.optim.Optimizer | None = None
        self.has_control = config.control_adapter
        if self.has_control is None:
            self.has_control = guides_plainly(self.call) and is_plain_lora(self.peft_config)
        if self.start is not None or not self.has_control:
            self._make_adapter()
        if not self.has_control:
            self.optimizer = make_optimizer(adapter_parameters(self.denoiser, ADAPTER_NAME), config)
        if config.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()

    def inputs_of(self, columns: dict[str, Any]) -> dict[str, Any]:
        """What the pipeline is handed of a prompt's further columns."""
        return inputs_of(self.pipeline, columns, self.arguments)

    @property
    def has_adapter(self) -> bool:
        """Whether there is a policy apart from the reference: with a control adapter, after the first round."""
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

    def _make_adapter(self) -> None:
        """Add the adapter, or go on with the one that is given or that the pipeline has."""
        if self.start is not None:
            peft_config = copy.deepcopy(self.peft_config)
            put_adapter(self.denoiser, peft_config, self.start.state, ADAPTER_NAME, self.start.source)
            self.accelerator.print(f"Training {self.start}.")
            self.start = replace(self.start, state={})  # the denoiser has it now
        elif not self.has_adapter:
            seed = seed_of(self.config.seed, "adapter")
            add_adapter(self.denoiser, copy.deepcopy(self.peft_config), ADAPTER_NAME, seed)
        make_trainable(self.denoiser, ADAPTER_NAME)

    def load_adapter(self, folder: Any) -> None:
        """Put the adapter of a folder in the place of the one that is there, for further training."""
        if self.has_adapter:
            remove_adapter(self.denoiser, ADAPTER_NAME)
        load_adapter_weights(self.denoiser, folder, ADAPTER_NAME)
        if self.optimizer is not None:
            # The optimizer must hold the parameters that were loaded, not those they replaced.
            self.optimizer = make_optimizer(adapter_parameters(self.denoiser, ADAPTER_NAME), self.config)

    def drawn_by(self) -> str:
        """Tells what samples are drawn by: model, scheduler and arguments, and the adapter bit for bit."""
        weights = {}
        if self.has_adapter and self.config.sample_from == "policy":
            weights = {name: p for name, p in self.denoiser.named_parameters() if f".{ADAPTER_NAME}." in name}
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
    def sampler(self, reference: bool = False) -> Iterator[Any]:
        """The pipeline as the policy samples with it, gate and guidance included, or as the reference does."""
        called = denoiser_of(self.pipeline)
        with ExitStack() as stack:
            if self.is_full:
                # The trained copy is in float32 also where the frozen weights are not.
                stack.enter_context(self.accelerator.autocast())
            if self.has_adapter:
                where = (ADAPTER_NAME, self.switch.switch_timestep, self.call.clock, self.pipeline)
                off = without_adapters(self.denoiser, [ADAPTER_NAME])
                stack.enter_context(off if reference else TimestepGate(called, *where))
            if self.config.tuned_guidance_scale is not None and not reference:
                scales = (self.call.guidance_scale, self.tuned_guidance_scale)
                stack.enter_context(TunedGuidance(called, self.call, *scales, self.switch.switch_timestep))
            yield self.pipeline

    # Fitting.

    def training_set(self, round_: Round, epoch: int) -> TrainingSet:
        """What a round is fitted on; without rows where nothing was accepted."""
        rows = SelectedRows(round_, self.config.train_num_inner_epochs, (self.config.seed, epoch), self.inputs_of)
        if not rows:
            return TrainingSet(rows, round_.states, None)
        conditioning = record_conditioning(self.pipeline, self.call, rows.prompts, self.arguments, rows.inputs)
        return TrainingSet(rows, round_.states, conditioning)

    def steps_for(self, rows: int) -> int:
        """Optimizer steps of a fit to `rows` accepted samples."""
        microbatches = count_microbatches(rows, self.config, self.accelerator.num_processes)
        return -(-microbatches // self.config.train_gradient_accumulation_steps)

    def fine_tune(
        self,
        data: TrainingSet,
        epoch: int,
        learning_rate: Callable[[int], float],
        on_event: Callable[[str], None] = lambda event: None,
    ) -> FitReport:
        """
        Fit the adapter to the accepted states of a round; with a control, keep what the selection alone taught.

        Args:
            data ([`TrainingSet`]):
                From [`~Policy.training_set`], with rows.
            epoch (`int`):
                Number of the round.
            learning_rate (`Callable[[int], float]`):
                Learning rate of the fit's n-th optimizer step.
            on_event (`Callable[[str], None]`, *optional*):
                Called with the names of transformers' callback events, of the fit to accepted states alone.
        """
        if not self.has_control:
            return self._fit(ADAPTER_NAME, self.optimizer, data, data.rows.passes(), learning_rate, on_event)
        accepted, control = "pgraft_accepted", "pgraft_control"
        report = self._fit_new(accepted, epoch, data, data.rows.passes(), learning_rate, on_event)
        self._fit_new(control, epoch, data, data.rows.passes(control=True), learning_rate, lambda event: None)
        scale = self.config.control_scale
        if self.config.guidance_loss == "conditional":
            scale /= self.tuned_guidance_scale
        merge_difference(self.denoiser, ADAPTER_NAME, accepted, control, scale, self.config.max_merged_rank)
        return report

    def _fit_new(self, name: str, epoch: int, *arguments: Any) -> FitReport:
        """Fit a fresh adapter on top of the policy, and take it out of the forward pass again."""
        add_adapter(self.denoiser, copy.deepcopy(self.peft_config), name, seed_of(self.config.seed, "adapter", epoch))
        optimizer = make_optimizer(adapter_parameters(self.denoiser, name), self.config)
        report = self._fit(name, optimizer, *arguments)
        AdapterSwitch(self.denoiser, name).turn(False)
        return report

    def _fit(
        self,
        name: str,
        optimizer: torch.optim.Optimizer,
        data: TrainingSet,
        passes: Iterator,
        learning_rate: Callable[[int], float],
        on_event: Callable[[str], None],
    ) -> FitReport:
        """Fit adapter `name` to the rows of `passes`."""
        config, parameters = self.config, adapter_parameters(self.denoiser, name)
        total = count_microbatches(len(data.rows), config, self.accelerator.num_processes)
        hidden = not self.accelerator.is_local_main_process

        def notice(event: str) -> None:
            if average is not None and event == "on_optimizer_step":
                average.step(parameters)
            if event in ("on_substep_end", "on_step_end"):
                bar.update()
            on_event(event)

        bar = tqdm(total=total, desc=f"training {name}", leave=False, disable=hidden)
        with bar, on_device(self.pipeline, self.denoiser, self.accelerator, optimizer):
            average = EMAModel(parameters, decay=config.ema_decay) if config.ema_decay else None
            loss = self.loss(name, data.conditioning)
            parts = (self.accelerator, loss, data.states, passes, optimizer, config, learning_rate)
            report = fit(*parts, on_event=notice)
            if average is not None:
                average.copy_to(parameters)
        return report

    def loss(self, name: str, conditioning: Conditioning) -> GraftLoss:
        """The loss by which adapter `name` is fitted."""
        adapters = [n for n in dict.fromkeys([ADAPTER_NAME, name]) if n in self.denoiser.peft_config]
        return GraftLoss(
            denoiser_of(self.pipeline),
            self.call,
            conditioning,
            self.levels,
            self.prediction_type,
            self.config.guidance_loss,
            self.tuned_guidance_scale,
            self.config.caption_dropout,
            adapters,
        )


def _checked_pipeline(sd_pipeline: Any) -> Any:
    if sd_pipeline is None:
        raise ValueError("sd_pipeline is required: the diffusers pipeline to fine-tune.")
    return getattr(sd_pipeline, "sd_pipeline", sd_pipeline)


def lora_extras(peft_config: PeftConfig) -> list[str]:
    """What a LoRA's configuration asks for beyond two factors a layer, whose difference would be no LoRA."""
    return [name for name in ("use_dora", "lora_bias") if getattr(peft_config, name, False)]


def is_plain_lora(peft_config: PeftConfig) -> bool:
    """Whether two adapters of this configuration can be subtracted from one another."""
    return isinstance(peft_config, LoraConfig) and not lora_extras(peft_config)


def _check_no_gate(denoiser: torch.nn.Module) -> None:
    """Another gate would switch its adapter also where the reference is asked, and refuses batches of training."""
    gate = gate_on(denoiser)
    if gate is not None:
        raise ValueError(
            f"sd_pipeline: a gate is on its denoiser and switches the adapter {gate.adapter_name!r}, as "
            "load_pgraft_adapter leaves it. Training puts a gate of its own there: to go on from an adapter, hand in "
            "the pipeline without it and give its folder as peft_config; otherwise call the gate's `remove()` first."
        )


def _hand_over(switch: SwitchLevel, sd_pipeline: Any) -> None:
    """Tell a pipeline that samples with its adapter where that switches, unless it was trained for another level."""
    known = getattr(sd_pipeline, "switch", None)
    if known is not None and known.switch_timestep != switch.switch_timestep:
        raise ValueError(
            f"sd_pipeline: its adapter switches at timestep {known.switch_timestep}, this configuration at "
            f"{switch.switch_timestep}. Keep the tuned_fraction and sample_num_steps that it was trained with."
        )
    if hasattr(sd_pipeline, "switch"):
        sd_pipeline.switch = switch
