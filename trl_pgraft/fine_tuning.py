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


"""Supervised fine-tuning of an adapter on accepted states: rows, training timesteps, the loss, the optimizer loop."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler

from .adapters import tuner_layers, without_adapters
from .batch_axes import choose_rows, same_shapes
from .denoiser_call import Conditioning, DenoiserCall, replay
from .denoiser_format import uncompiled
from .levels import TunedLevels
from .losses import corrected_target, guided, weighted_mse
from .parameterizations import renoise


MOST_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True)
class Rows:
    """
    Training rows of one pass.

    Args:
        states (`torch.Tensor` of shape `(R,)`):
            Index of each row's state x_I.
        prompts (`torch.Tensor` of shape `(R,)`):
            Index of each row's conditioning.
        seeds (`list[int]`):
            Seed of each row's timesteps and noise.
    """

    states: torch.Tensor
    prompts: torch.Tensor
    seeds: list[int]

    def __len__(self) -> int:
        return len(self.seeds)

    def take(self, index: torch.Tensor) -> "Rows":
        """The rows at `index`."""
        return Rows(self.states[index], self.prompts[index], [self.seeds[i] for i in index.tolist()])


@dataclass(frozen=True)
class GraftLoss:
    """
    The weighted denoising loss on re-noised states, with guidance as configured.

    Args:
        denoiser (`torch.nn.Module`):
            The bare module, for the reference's prediction.
        call ([`DenoiserCall`]):
            How it is called.
        conditioning ([`Conditioning`]):
            Recorded conditioning of the prompts.
        levels ([`TunedLevels`]):
            Noise levels.
        prediction_type (`str`):
            What the denoiser predicts.
        guidance_loss (`str`):
            `"conditional"`, `"corrected"` or `"combined"`.
        guidance_scale (`float`):
            Guidance of the tuned steps when the states were drawn.
        caption_dropout (`float`):
            Share of rows that get the unconditional input (conditional loss).
        adapters (`list[str]`):
            Adapters that make the difference between policy and reference.
    """

    denoiser: torch.nn.Module
    call: DenoiserCall
    conditioning: Conditioning
    levels: TunedLevels
    prediction_type: str
    guidance_loss: str
    guidance_scale: float
    caption_dropout: float
    adapters: list[str]

    def __call__(
        self,
        model: Callable[..., Any],
        x_i: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        prompts: torch.Tensor,
        dropped: torch.Tensor,
    ) -> torch.Tensor:
        """
        Loss of each row.

        Args:
            model (`Callable`):
                The denoiser as accelerate prepared it.
            x_i, noise (`torch.Tensor` of shape `(B, ...)`):
                States and standard normal noise.
            timesteps (`torch.Tensor` of shape `(B,)`):
                Training timesteps.
            prompts (`torch.Tensor` of shape `(B,)`):
                Rows of the conditioning.
            dropped (`torch.Tensor` of shape `(B,)`, bool):
                Rows that get the unconditional input, where there is one.

        Returns:
            `torch.Tensor` of shape `(B,)`.
        """
        return weighted_mse(*self.regression(model, x_i, noise, timesteps, prompts, dropped))

    def regression(
        self,
        model: Callable[..., Any],
        x_i: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        prompts: torch.Tensor,
        dropped: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Prediction and target, both of shape `(B, ...)`, and weight of each row; arguments as those of a call."""
        x_t, target, weight = renoise(
            x_i, noise, self.levels.level_i, self.levels.schedule(timesteps), self.prediction_type
        )
        x_t = x_t.to(self.denoiser.dtype)
        conditional = self.conditioning.rows(prompts, x_i.device)
        if not self.call.is_guided or self.guidance_scale == 1.0:
            return replay(model, self.call, x_t, timesteps, conditional), target, weight
        unconditional = self.conditioning.rows(prompts, x_i.device, unconditional=True)
        if self.guidance_loss == "combined":
            u, c = (replay(model, self.call, x_t, timesteps, branch) for branch in (unconditional, conditional))
            return guided(u, c, self.guidance_scale), target, weight
        if self.guidance_loss == "corrected":
            with torch.no_grad(), without_adapters(self.denoiser, self.adapters):
                u = replay(self.denoiser, self.call, x_t, timesteps, unconditional)
            target = corrected_target(target, u.to(target.dtype), self.guidance_scale)
        elif dropped.any():
            return self._caption_dropped(model, x_t, timesteps, prompts, dropped), target, weight
        return replay(model, self.call, x_t, timesteps, conditional), target, weight

    def _caption_dropped(
        self,
        model: Callable[..., Any],
        x_t: torch.Tensor,
        timesteps: torch.Tensor,
        prompts: torch.Tensor,
        dropped: torch.Tensor,
    ) -> torch.Tensor:
        """Prediction with the unconditional input in the dropped rows."""
        branches = [self.conditioning.rows(prompts, x_t.device, unconditional) for unconditional in (False, True)]
        if same_shapes(*branches):
            mixed = choose_rows(dropped, branches[1], branches[0], self.conditioning.batch_axes)
            return replay(model, self.call, x_t, timesteps, mixed)
        # Prompts and negative prompts of different lengths make no common batch.
        parts = [(mask.nonzero().flatten(), is_dropped) for mask, is_dropped in ((~dropped, False), (dropped, True))]
        predictions = []
        for rows, is_dropped in parts:
            if len(rows):
                own = self.conditioning.rows(prompts[rows], x_t.device, is_dropped)
                predictions.append(replay(model, self.call, x_t[rows.to(x_t.device)], timesteps[rows], own))
        order = torch.cat([rows for rows, _ in parts]).argsort()
        return torch.cat(predictions)[order.to(x_t.device)]


@dataclass
class FitReport:
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
) -> FitReport:
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


@contextmanager
def prepared(
    accelerator: Accelerator, denoiser: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[Any, Any]]:
    """Denoiser and optimizer as accelerate wraps them; afterwards, also after an error, they are as they were."""
    was_training = denoiser.training
    denoiser.eval()
    # Only the adapters' own dropout is wanted: a denoiser in training mode may drop its class labels, unseeded.
    for layer in tuner_layers(denoiser):
        layer.train()
    forwards = [(module, vars(module).get("forward")) for module in (denoiser, uncompiled(denoiser))]
    model, stepper = accelerator.prepare(denoiser, optimizer)
    try:
        yield model, stepper
    finally:
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        accelerator.free_memory()
        # In mixed precision accelerate leaves a compiled module its autocast, and others a `forward` without the
        # decorators of their class's.
        for module, forward in forwards:
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward
        denoiser.train(was_training)


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
) -> FitReport:
    report = FitReport()
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
    timestep = loss.levels.draw(count, generator)[k]
    generator.manual_seed(seed + k + 1)
    dropped = bool(torch.rand((), generator=generator) < loss.caption_dropout)
    return timestep, torch.randn(shape, generator=generator), dropped


def take_step(
    accelerator: Accelerator,
    optimizer: Any,
    parameters: Sequence[torch.Tensor],
    max_norm: float,
    on_event: Callable[[str], Any] = lambda event: None,
) -> bool:
    """One optimizer step; skipped where the gradient is not finite."""
    norm = accelerator.clip_grad_norm_(parameters, max_norm)
    finite = bool(torch.isfinite(norm))
    on_event("on_pre_optimizer_step")
    if finite or accelerator.scaler is not None:
        optimizer.step()
    on_event("on_optimizer_step")
    optimizer.zero_grad()
    return finite


def stop_if_skipped(skipped_in_a_row: int, learning_rate_field: str) -> None:
    """Raise where too many optimizer steps in a row had gradients that are not finite."""
    if skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
        raise RuntimeError(
            f"The last {skipped_in_a_row} optimizer steps had non-finite gradients and were skipped. Lower "
            f"{learning_rate_field} or train in a higher mixed_precision."
        )


def learning_rates(kind: str, peak: float, warmup_steps: int, length: int) -> Callable[[int], float]:
    """
    Learning rate by step, on one of diffusers' schedules over `length` optimizer steps.

    Args:
        kind (`str`):
            Name for `diffusers.optimization.get_scheduler`.
        peak (`float`):
            Learning rate that the schedule scales.
        warmup_steps (`int`):
            Steps of warm-up.
        length (`int`):
            Steps in all; steps after that stay at its end, where a cosine would rise again.
    """
    unit = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(kind, unit, num_warmup_steps=warmup_steps, num_training_steps=length)
    factor = scheduler.lr_lambdas[0]
    return lambda step: peak * factor(min(step, length))
