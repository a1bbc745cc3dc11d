# SPDX-License-Identifier: Apache-2.0

"""Supervised fine-tuning of an adapter on accepted states: rows in, adapter out."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from ..adapters.lora import ADAPTER_NAME, AdapterSwitch, adapter_parameters, add_adapter, is_plain_lora
from ..adapters.policy import Policy
from ..config import GraftConfig
from ..core.seeding import generator_of, noise_of, seed_of
from ..pipelines.checks import guides_plainly
from ..pipelines.conditioning import Conditioning, record_conditioning
from ..pipelines.placement import on_device
from ..rollouts.rollout import Rollout
from .difference import Fields, Probe, merge_fits
from .graft_loss import GraftLoss, graft_loss
from .memory import estimate_memory
from .metrics import FineTuningReport
from .optimizer import OptimizerSteps, make_optimizer, parameters_of, prepared
from .rows import Rows, SelectedRows, count_microbatches, microbatches_of


@dataclass(frozen=True)
class TrainingSet:
    r"""
    What the adapter is fine-tuned on in one iteration.

    Args:
        rows ([`SelectedRows`]):
            Training rows, at least one.
        states (`torch.Tensor` of shape `(N, ...)`):
            States x_I of the rollout, to which the rows point.
        conditioning ([`Conditioning`]):
            Recorded conditioning of the rows' prompts.
    """

    rows: SelectedRows
    states: torch.Tensor
    conditioning: Conditioning


class Finetuner:
    r"""
    Fine-tunes a policy's adapter on rollouts.

    Args:
        policy ([`Policy`]):
            Pipeline and adapter. The adapter is made here, unless the first iteration makes it of two.
        config ([`GraftConfig`]):
            Batch sizes, passes, loss and optimizer.
        accelerator (`Accelerator`):
            The processes, their device and their precision.

    Attributes:
        optimizer (`torch.optim.Optimizer` or `None`):
            Optimizer whose state is kept from one iteration to the next; `None` with a reference fit, where each
            iteration trains new adapters.
        memory ([`MemoryEstimate`]):
            Memory that fine-tuning needs at least.
    """

    def __init__(self, policy: Policy, config: GraftConfig, accelerator: Accelerator):
        self.policy, self.config, self.accelerator = policy, config, accelerator
        self.memory = estimate_memory(
            policy.pipeline, config, policy.peft_config, policy.example_arguments, policy.introspection
        )
        accelerator.print(self.memory)
        can_subtract = guides_plainly(policy.call) and is_plain_lora(policy.peft_config)
        self.has_control = can_subtract if config.control_adapter is None else config.control_adapter
        if policy.start is not None or not self.has_control:
            policy.make_adapter()
        self.optimizer = None if self.has_control else self._new_optimizer(ADAPTER_NAME)
        if config.gradient_checkpointing:
            policy.denoiser.enable_gradient_checkpointing()

    def _new_optimizer(self, name: str) -> torch.optim.Optimizer:
        return make_optimizer(adapter_parameters(self.policy.denoiser, name), self.config)

    def load_adapter(self, folder: Path) -> None:
        """Replace the adapter by the one stored in `folder`, for further training."""
        self.policy.load_adapter(folder)
        if self.optimizer is not None:
            # The optimizer must hold the parameters that were loaded, not those they replaced.
            self.optimizer = self._new_optimizer(ADAPTER_NAME)

    def training_set(self, rollout: Rollout, epoch: int) -> TrainingSet | None:
        r"""
        Select the rows of a rollout, and record the conditioning of their prompts.

        Args:
            rollout ([`Rollout`]):
                The iteration's samples, scored and decided.
            epoch (`int`):
                Number of the iteration.

        Returns:
            [`TrainingSet`] or `None`: `None` where nothing was accepted.
        """
        config, policy = self.config, self.policy
        rows = SelectedRows(rollout, config.train_num_inner_epochs, (config.seed, epoch), policy.inputs_of)
        if not rows:
            return None
        return TrainingSet(
            rows,
            rollout.states,
            record_conditioning(policy.pipeline, policy.call, rows.prompts, policy.arguments, rows.inputs),
        )

    def steps_for(self, rows: int) -> int:
        """Optimizer steps of a fine-tuning on `rows` accepted samples."""
        microbatches = count_microbatches(rows, self.config, self.accelerator.num_processes)
        return math.ceil(microbatches / self.config.train_gradient_accumulation_steps)

    def fine_tune(
        self,
        data: TrainingSet,
        epoch: int,
        learning_rate: Callable[[int], float],
        on_event: Callable[[str], Any] = lambda event: None,
    ) -> FineTuningReport:
        r"""
        Fine-tune the adapter on accepted states. With `control_adapter`, two new adapters are trained, one on the
        accepted states and one, the reference fit, on all samples; their difference is added to the adapter.

        Args:
            data ([`TrainingSet`]):
                Rows, states and conditioning, from [`~Finetuner.training_set`].
            epoch (`int`):
                Number of the iteration.
            learning_rate (`Callable[[int], float]`):
                Maps the number of an optimizer step in this iteration, from 0, to its learning rate.
            on_event (`Callable[[str], Any]`, *optional*):
                Called with the events of [`fine_tune_adapter`], those of the reference fit left out.

        Returns:
            [`FineTuningReport`]: the report on the accepted states.

        Raises:
            `RuntimeError`: ten optimizer steps in a row had a non-finite loss or gradient.
        """
        count = self.config.num_train_timesteps
        if self.optimizer is not None:
            return self._fine_tune(
                ADAPTER_NAME, self.optimizer, data, data.rows.passes(count), learning_rate, on_event
            )
        names, passes = ("pgraft_accepted", "pgraft_control"), data.rows.passes
        report, accepted = self._fine_tune_new(names[0], epoch, data, passes(count), learning_rate, on_event)
        _, control = self._fine_tune_new(names[1], epoch, data, passes(count, control=True), learning_rate)
        report.control = merge_fits(self._probe(names[0], epoch, data), names, (accepted, control))
        return report

    def _fine_tune_new(
        self, name: str, epoch: int, data: TrainingSet, *arguments: Any
    ) -> tuple[FineTuningReport, Fields]:
        """Fine-tune a new adapter on top of the policy, have it predict, and take it out of the forward pass again."""
        peft_config, seed = copy.deepcopy(self.policy.peft_config), seed_of(self.config.seed, "adapter", epoch)
        add_adapter(self.policy.denoiser, peft_config, name, seed)
        report = self._fine_tune(name, self._new_optimizer(name), data, *arguments)
        fields = self._probe(name, epoch, data).predict()
        AdapterSwitch(self.policy.denoiser, name).turn(False)
        return report, fields

    def _probe(self, name: str, epoch: int, data: TrainingSet) -> Probe:
        loss = graft_loss(self.policy, name, data.conditioning)
        return Probe.of(self.policy, loss, data.states[data.rows.accepted], data.rows.prompt_rows, epoch)

    def _fine_tune(
        self,
        name: str,
        optimizer: torch.optim.Optimizer,
        data: TrainingSet,
        passes: Iterator[Rows],
        learning_rate: Callable[[int], float],
        on_event: Callable[[str], Any] = lambda event: None,
    ) -> FineTuningReport:
        """Fine-tune adapter `name` on the rows of `passes`."""
        policy, config, accelerator = self.policy, self.config, self.accelerator
        with on_device(policy.pipeline, policy.modules, accelerator, optimizer):
            return fine_tune_adapter(
                accelerator,
                graft_loss(policy, name, data.conditioning),
                data.states,
                passes,
                optimizer,
                config,
                learning_rate,
                on_event=on_event,
                title=f"training {name}",
            )


def fine_tune_adapter(
    accelerator: Accelerator,
    loss: GraftLoss,
    states: torch.Tensor,
    passes: Iterator[Rows],
    optimizer: torch.optim.Optimizer,
    config: GraftConfig,
    learning_rate: Callable[[int], float],
    on_event: Callable[[str], Any] = lambda event: None,
    title: str = "training",
) -> FineTuningReport:
    r"""
    Fine-tune the trainable adapter of `loss.denoiser` on accepted states.

    Args:
        accelerator (`Accelerator`):
            The processes, their device and their precision; it wraps the denoiser for the time of the training.
        loss ([`GraftLoss`]):
            The loss that is minimised.
        states (`torch.Tensor` of shape `(N, ...)`):
            States x_I of the rollout, to which the rows point.
        passes (`Iterator[Rows]`):
            Rows of each pass, equal on all processes, in the order of training.
        optimizer (`torch.optim.Optimizer`):
            Optimizer of the adapter's parameters.
        config ([`GraftConfig`]):
            Batch size, accumulation, timesteps per pass, gradient norm, and decay of the moving average, which becomes
            the adapter.
        learning_rate (`Callable[[int], float]`):
            Maps the number of an optimizer step of this training, from 0, to its learning rate.
        on_event (`Callable[[str], Any]`, *optional*):
            Called with the name of each event of transformers' callbacks: `on_step_begin`, `on_substep_end` or
            `on_step_end` after each microbatch, `on_pre_optimizer_step` and `on_optimizer_step`.
        title (`str`, *optional*, defaults to `"training"`):
            Title of the progress bar.

    Raises:
        `RuntimeError`: ten optimizer steps in a row had a non-finite loss or gradient.
    """
    report, starts_step = FineTuningReport(), True
    average = EMAModel(parameters_of(optimizer), decay=config.ema_decay) if config.ema_decay else None
    microbatches = list(microbatches_of(passes, config, accelerator))
    bar = tqdm(total=len(microbatches), desc=title, leave=False, disable=not accelerator.is_local_main_process)
    with bar, prepared(accelerator, loss.denoiser, optimizer) as (model, wrapped):
        steps = OptimizerSteps(
            accelerator, wrapped, config.train_max_grad_norm, "train_learning_rate", average, on_event
        )
        for batch in microbatches:
            if starts_step:
                on_event("on_step_begin")
            with nullcontext() if batch.ends_step else accelerator.no_sync(model):
                # accelerate wraps a model in its autocast when it is first prepared, and not after that.
                with accelerator.autocast():
                    losses, bins = _losses_of(
                        loss, model, states, batch.rows, config.num_train_timesteps, accelerator.device
                    )
                steps.backward(losses.sum() * batch.weight)
            if batch.weight:
                report.losses.append(losses.detach())
                report.bins.append(bins)
            if batch.ends_step:
                steps.take(learning_rate(steps.taken))
            bar.update()
            starts_step = batch.ends_step
            on_event("on_step_end" if batch.ends_step else "on_substep_end")
    if average is not None:
        average.copy_to(parameters_of(optimizer))
    report.steps, report.skipped = steps.taken, steps.skipped
    return report


def _losses_of(
    loss: GraftLoss,
    model: torch.nn.Module,
    states: torch.Tensor,
    rows: Rows,
    count: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each row at its timestep of `count`, and the quarter of the tuned range where that lies."""
    x_i, uses = states[rows.states].to(device), zip(rows.seeds, rows.uses.tolist(), strict=True)
    sampled = [_sample_row(loss, seed, k, count, x_i.shape[1:]) for seed, k in uses]
    timesteps, noise, dropped = (torch.stack(values) for values in zip(*sampled, strict=True))
    return loss(model, x_i, noise.to(device), timesteps, rows.prompts, dropped), loss.levels.bin_of(timesteps, 4)


def _sample_row(
    loss: GraftLoss, seed: int, k: int, count: int, shape: torch.Size
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Timestep, noise and caption dropout of a row's k-th use in a pass: functions of its seed alone."""
    timestep = loss.levels.sample(count, generator_of(seed))[k]
    dropped = torch.rand((), generator=generator_of(seed, k)) < loss.caption_dropout
    return timestep, noise_of(shape, seed, k), dropped
