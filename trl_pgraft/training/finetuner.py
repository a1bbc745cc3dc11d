# SPDX-License-Identifier: Apache-2.0

"""Supervised fine-tuning of an adapter on accepted states: rows, training timesteps, the loss, the optimizer loop."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from ..adapters.lora import (
    ADAPTER_NAME,
    AdapterSwitch,
    adapter_parameters,
    add_adapter,
    is_plain_lora,
)
from ..adapters.merge import merge_difference
from ..adapters.policy import Policy
from ..config import GraftConfig
from ..core.seeding import seed_of
from ..pipelines.checks import guides_plainly
from ..pipelines.conditioning import Conditioning, record_conditioning
from ..pipelines.placement import on_device
from ..rollouts.rollout import Rollout
from .graft_loss import GraftLoss, graft_loss
from .memory import estimate_memory
from .optimizer import make_optimizer, prepared, stop_if_skipped, take_step
from .rows import Rows, SelectedRows


@dataclass
class FineTuningReport:
    """
    What one fit did.

    Args:
        steps (`int`):
            Optimizer steps.
        skipped (`int`):
            Steps among them whose gradient was not finite.
        losses, bins (`list[torch.Tensor]`):
            Loss of each row of each microbatch, and the quarter of the tuned range that its timestep lies in.
    """

    steps: int = 0
    skipped: int = 0
    losses: list[torch.Tensor] = field(default_factory=list)
    bins: list[torch.Tensor] = field(default_factory=list)

    def to_metrics(self) -> dict[str, float]:
        """Metrics by name; level 0 is the cleanest quarter of the tuned range."""
        losses, bins = torch.cat(self.losses).cpu(), torch.cat(self.bins)
        levels = {f"loss/level_{i}": losses[bins == i].mean().item() for i in bins.unique().tolist()}
        return {"loss": losses.mean().item(), **levels, "skipped_steps": self.skipped}


def fit(
    accelerator: Accelerator,
    loss: GraftLoss,
    states: torch.Tensor,
    passes: Iterator[Rows],
    optimizer: torch.optim.Optimizer,
    config: Any,
    lr_schedule: Callable[[int], float],
    on_event: Callable[[str], Any] = lambda event: None,
) -> FineTuningReport:
    """
    Fit the trainable adapter of `loss.denoiser` to accepted states.

    Args:
        accelerator (`Accelerator`):
            Engine; it wraps the denoiser for the time of the fit.
        loss ([`GraftLoss`]):
            What is minimised.
        states (`torch.Tensor` of shape `(N, ...)`):
            States x_I of the round.
        passes (`Iterator[Rows]`):
            Rows of each pass, equal on all processes, in the order of training.
        optimizer (`torch.optim.Optimizer`):
            Over the adapter's parameters.
        config ([`GraftConfig`]):
            Batch size, accumulation, timesteps per pass, gradient norm.
        lr_schedule (`Callable[[int], float]`):
            Learning rate of the fit's n-th optimizer step.
        on_event (`Callable[[str], Any]`, *optional*):
            Called with the name of the event of transformers' callbacks: `on_step_begin`, `on_substep_end` or
            `on_step_end` after each microbatch, `on_pre_optimizer_step` and `on_optimizer_step`.

    Raises:
        `RuntimeError`: ten optimizer steps in a row had a non-finite loss or gradient.
    """
    with prepared(accelerator, loss.denoiser, optimizer) as (model, stepper):
        return _fit(accelerator, loss, model, states, passes, stepper, config, lr_schedule, on_event)


def _fit(
    accelerator: Accelerator,
    loss: GraftLoss,
    model: Any,
    states: torch.Tensor,
    passes: Iterator[Rows],
    optimizer: Any,
    config: Any,
    lr_schedule: Callable[[int], float],
    on_event: Callable[[str], Any],
) -> FineTuningReport:
    report = FineTuningReport()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    microbatches = list(_microbatches(passes, config, accelerator))
    skipped_in_a_row, is_boundary = 0, True
    for number, (rows, k) in enumerate(microbatches, start=1):
        if is_boundary:
            on_event("on_step_begin")
        is_boundary = number % config.train_gradient_accumulation_steps == 0 or number == len(microbatches)
        with nullcontext() if is_boundary else accelerator.no_sync(model):
            # accelerate wraps a model in its autocast when it is first prepared, and not in the fits after that.
            with accelerator.autocast():
                losses, bins = _losses(loss, model, states, rows, k, config, accelerator.device)
            accelerator.backward(losses.mean() / config.train_gradient_accumulation_steps)
        report.losses.append(losses.detach())
        report.bins.append(bins)
        if is_boundary:
            for group in optimizer.param_groups:
                group["lr"] = lr_schedule(report.steps)
            finite = take_step(accelerator, optimizer, parameters, config.train_max_grad_norm, on_event)
            report.steps, report.skipped = report.steps + 1, report.skipped + (not finite)
            skipped_in_a_row = 0 if finite else skipped_in_a_row + 1
            stop_if_skipped(skipped_in_a_row, "train_learning_rate")
        on_event("on_step_end" if is_boundary else "on_substep_end")
    return report


def count_microbatches(rows: int, config: Any, processes: int) -> int:
    """Microbatches that a process computes in one fit on `rows` rows."""
    batches = math.ceil(rows / (config.train_batch_size * processes))
    return batches * config.num_train_timesteps * config.train_num_inner_epochs


def _microbatches(passes: Iterator[Rows], config: Any, accelerator: Accelerator) -> Iterator[tuple[Rows, int]]:
    """This process's part of each global batch, once for each training timestep."""
    size, count = config.train_batch_size, accelerator.num_processes
    for rows in passes:
        for start in range(0, len(rows), size * count):
            # The last batch is filled up from the first rows of the (shuffled) pass: every process has work.
            own = torch.arange(start, start + size) + accelerator.process_index * size
            for k in range(config.num_train_timesteps):
                yield rows.take(own % len(rows)), k


def _losses(
    loss: GraftLoss, model: Any, states: torch.Tensor, rows: Rows, k: int, config: Any, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    x_i = states[rows.states].to(device)
    draws = [_draw_row(loss, seed, k, config.num_train_timesteps, x_i.shape[1:]) for seed in rows.seeds]
    timesteps = torch.stack([t for t, _, _ in draws])
    noise = torch.stack([noise for _, noise, _ in draws]).to(device)
    dropped = torch.tensor([dropped for _, _, dropped in draws])
    losses = loss(model, x_i, noise, timesteps, rows.prompts, dropped)
    return losses, loss.levels.bin_of(timesteps, 4)


def _draw_row(loss: GraftLoss, seed: int, k: int, count: int, shape: torch.Size) -> tuple[torch.Tensor, Any, bool]:
    """Timestep, noise and caption dropout of a row's k-th use in a pass: functions of its seed alone."""
    generator = torch.Generator().manual_seed(seed)
    timestep = loss.levels.sample(count, generator)[k]
    generator.manual_seed(seed + k + 1)
    dropped = bool(torch.rand((), generator=generator) < loss.caption_dropout)
    return timestep, torch.randn(shape, generator=generator), dropped


@dataclass(frozen=True)
class TrainingSet:
    """What one round is fitted on: its rows, the states they point to, and the conditioning of their prompts."""

    rows: SelectedRows
    states: torch.Tensor
    conditioning: Conditioning | None


class Finetuner:
    """
    Fine-tunes a policy's adapter on rollouts.

    Args:
        policy ([`Policy`]):
            Pipeline and adapter.
        config ([`GraftConfig`]):
            Batch sizes, passes, loss, optimizer.
        accelerator (`Accelerator`):
            The processes and their device.
    """

    def __init__(self, policy: Policy, config: GraftConfig, accelerator: Accelerator):
        self.policy, self.config, self.accelerator = policy, config, accelerator
        self.memory = estimate_memory(
            policy.pipeline, config, policy.peft_config, policy.example_arguments, policy.introspection
        )
        accelerator.print(self.memory)
        self.has_control = config.control_adapter
        if self.has_control is None:
            self.has_control = guides_plainly(policy.call) and is_plain_lora(policy.peft_config)
        if policy.start is not None or not self.has_control:
            policy.make_adapter()
        self.optimizer = None if self.has_control else self._new_optimizer(ADAPTER_NAME)
        if config.gradient_checkpointing:
            policy.denoiser.enable_gradient_checkpointing()

    def _new_optimizer(self, name: str) -> torch.optim.Optimizer:
        return make_optimizer(adapter_parameters(self.policy.denoiser, name), self.config)

    def load_adapter(self, folder: Path) -> None:
        """Put the adapter of a folder in the place of the one that is there, for further training."""
        self.policy.load_adapter(folder)
        if self.optimizer is not None:
            # The optimizer must hold the parameters that were loaded, not those they replaced.
            self.optimizer = self._new_optimizer(ADAPTER_NAME)

    def training_set(self, round_: Rollout, epoch: int) -> TrainingSet:
        """What a round is fitted on; without rows where nothing was accepted."""
        rows = SelectedRows(
            round_, self.config.train_num_inner_epochs, (self.config.seed, epoch), self.policy.inputs_of
        )
        if not rows:
            return TrainingSet(rows, round_.states, None)
        conditioning = record_conditioning(
            self.policy.pipeline, self.policy.call, rows.prompts, self.policy.arguments, rows.inputs
        )
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
    ) -> FineTuningReport:
        """
        Fit the adapter to the accepted states of a round; with a control, keep what the selection alone taught.

        Args:
            data ([`TrainingSet`]):
                From [`~Finetuner.training_set`], with rows.
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
            scale /= self.policy.tuned_guidance_scale
        merge_difference(self.policy.denoiser, ADAPTER_NAME, accepted, control, scale, self.config.max_merged_rank)
        return report

    def _fit_new(self, name: str, epoch: int, *arguments: Any) -> FineTuningReport:
        """Fit a fresh adapter on top of the policy, and take it out of the forward pass again."""
        add_adapter(
            self.policy.denoiser,
            copy.deepcopy(self.policy.peft_config),
            name,
            seed_of(self.config.seed, "adapter", epoch),
        )
        optimizer = self._new_optimizer(name)
        report = self._fit(name, optimizer, *arguments)
        AdapterSwitch(self.policy.denoiser, name).turn(False)
        return report

    def _fit(
        self,
        name: str,
        optimizer: torch.optim.Optimizer,
        data: TrainingSet,
        passes: Iterator,
        learning_rate: Callable[[int], float],
        on_event: Callable[[str], None],
    ) -> FineTuningReport:
        """Fit adapter `name` to the rows of `passes`."""
        config, parameters = self.config, adapter_parameters(self.policy.denoiser, name)
        total = count_microbatches(len(data.rows), config, self.accelerator.num_processes)
        hidden = not self.accelerator.is_local_main_process

        def notice(event: str) -> None:
            if average is not None and event == "on_optimizer_step":
                average.step(parameters)
            if event in ("on_substep_end", "on_step_end"):
                bar.update()
            on_event(event)

        bar = tqdm(total=total, desc=f"training {name}", leave=False, disable=hidden)
        with bar, on_device(self.policy.pipeline, self.policy.denoiser, self.accelerator, optimizer):
            average = EMAModel(parameters, decay=config.ema_decay) if config.ema_decay else None
            loss = graft_loss(self.policy, name, data.conditioning)
            parts = (self.accelerator, loss, data.states, passes, optimizer, config, learning_rate)
            report = fit(*parts, on_event=notice)
            if average is not None:
                average.copy_to(parameters)
        return report
