# SPDX-License-Identifier: Apache-2.0

"""Fitting a corrector to inverted noise: batches, the loss, the moving average, checkpoints."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..config import default_values
from ..core.seeding import seed_of
from ..pipelines.conditioning import Conditioning
from ..pipelines.denoiser_call import DenoiserCall
from ..training.checkpoints import load_optimizer_tensors, optimizer_tensors, refuse_changes
from ..training.optimizer import learning_rates, prepared, stop_if_skipped, take_step
from .config import NoiseCorrectionConfig
from .correctors import FlowCorrector
from .correctors.transport import perturb
from .dataset import InvertedData


CHECKPOINT_FILE = "checkpoint.safetensors"
HELD_OUT_PASSES = 4


@dataclass(frozen=True)
class CorrectorData:
    """
    What a corrector is fitted to.

    Args:
        inverted ([`InvertedData`]):
            Inverted noise, of `N` samples; a resumed fit must have the same.
        prompts (`torch.Tensor` of shape `(N,)`, int64):
            Row of the conditioning that each belongs to.
        call ([`DenoiserCall`]):
            How the pipeline calls its denoiser.
        conditioning ([`Conditioning`]):
            Recorded conditioning of the prompts.
    """

    inverted: InvertedData
    prompts: torch.Tensor
    call: DenoiserCall
    conditioning: Conditioning


class CorrectorFit:
    """
    The fit of one corrector. Batches, levels and noise are functions of seed and step, whatever the processes.

    Args:
        accelerator (`Accelerator`):
            Engine.
        corrector ([`FlowCorrector`]):
            What is fitted.
        data ([`CorrectorData`]):
            What to.
        config ([`NoiseCorrectionConfig`]):
            How.
        folder (`Path`):
            Where the checkpoint is kept.
        log (`Callable[[dict], None]`):
            Takes metrics.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        corrector: FlowCorrector,
        data: CorrectorData,
        config: NoiseCorrectionConfig,
        folder: Path,
        log: Callable[[dict[str, float]], None],
    ):
        self.accelerator, self.corrector, self.data, self.config, self.log = accelerator, corrector, data, config, log
        self.path, self.step, self._losses, self._skipped_in_a_row = folder / CHECKPOINT_FILE, 0, [], 0
        self.parameters = corrector.parameters
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.average = EMAModel(self.parameters, decay=config.ema_decay, foreach=True) if config.ema_decay else None
        self.held_out, self.rows = split(len(data.inverted.noise), config)

    def run(self) -> None:
        """
        Train to `max_steps`, or on from the checkpoint; the corrector ends with the averaged weights.

        Raises:
            `RuntimeError`: ten optimizer steps in a row had a non-finite loss or gradient.
        """
        if self.config.resume_from_checkpoint and self.path.is_file():
            self._load()
        rate = learning_rates(
            self.config.lr_scheduler_type, self.config.learning_rate, self.config.warmup_steps, self.config.max_steps
        )
        module, hidden = self.corrector.module, not self.accelerator.is_local_main_process
        bar = tqdm(total=self.config.max_steps, initial=self.step, desc="training the corrector", disable=hidden)
        with prepared(self.accelerator, module, self.optimizer) as (model, stepper), self.corrector.active(), bar:
            while self.step < self.config.max_steps:
                self._train_step(model, stepper, rate(self.step))
                self.step += 1
                bar.update()
                self._report(rate(self.step))
        if self.average is not None:
            self.average.copy_to(self.parameters)

    def _train_step(self, model: Any, optimizer: Any, learning_rate: float) -> None:
        count, processes = self.config.train_batch_size, self.accelerator.num_processes
        generator = _generator(self.config.seed, "step", self.step)
        rows = self.rows[torch.randint(len(self.rows), (count,), generator=generator)]
        # Each process has samples of all levels, which are drawn in ascending order.
        own = torch.arange(self.accelerator.process_index, count, processes)
        with self.accelerator.autocast():
            loss = self._losses_of(rows, generator, own, model).mean()
        self.accelerator.backward(loss)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        finite = take_step(self.accelerator, optimizer, self.parameters, self.config.max_grad_norm)
        self._skipped_in_a_row = 0 if finite else self._skipped_in_a_row + 1
        stop_if_skipped(self._skipped_in_a_row, "learning_rate")
        if self.average is not None:
            self.average.step(self.parameters)
        self._losses.append(self.accelerator.reduce(loss.detach(), "mean"))

    def _losses_of(
        self, rows: torch.Tensor, generator: torch.Generator, own: torch.Tensor, model: Callable | None
    ) -> torch.Tensor:
        """Squared error of the samples `own` of a batch of `rows`; without a model, that of correcting nothing."""
        signal = (torch.arange(len(rows)) + torch.rand(len(rows), generator=generator)) / len(rows)
        noise = torch.randn(len(rows), *self.data.inverted.noise.shape[1:], generator=generator)
        device, rows = self.accelerator.device, rows[own]
        y, noise, signal = self.data.inverted.noise[rows].to(device), noise[own].to(device), signal[own].double()
        x, target = perturb(y, noise, signal)
        if model is None:
            return target.square().flatten(1).mean(1)
        conditioning = self.data.conditioning.rows(self.data.prompts[rows], device)
        prediction = self.corrector(x, signal, self.data.call, conditioning, model)
        return (prediction - target).square().flatten(1).mean(1)

    def evaluate(self) -> dict[str, float]:
        """
        Loss on the held-out samples with the weights that would be kept, and that of correcting nothing.

        Their difference is what the corrector knows of the inverted noise.
        """
        if not len(self.held_out):
            return {}
        if self.average is not None:
            self.average.store(self.parameters)
            self.average.copy_to(self.parameters)
        totals = {"held_out/loss": 0.0, "held_out/loss_uncorrected": 0.0}
        rows, size = self.held_out.repeat(HELD_OUT_PASSES), self.config.train_batch_size
        at_a_time = size // self.accelerator.num_processes  # what fits in training
        with torch.no_grad(), self.corrector.active():
            parts = [(n, part, own) for n, part in enumerate(rows.split(size)) for own in _split(part, at_a_time)]
            for number, part, own in parts:
                for name, model in zip(totals, (self.corrector.module, None), strict=True):
                    generator = _generator(self.config.seed, "evaluation", number)
                    losses = self._losses_of(part, generator, own, model)
                    totals[name] += losses.sum().item() / len(rows)
        if self.average is not None:
            self.average.restore(self.parameters)
        return totals

    def _report(self, learning_rate: float) -> None:
        """Metrics and a checkpoint, where they are due."""
        is_last = self.step == self.config.max_steps
        if self.step % self.config.save_steps == 0 or is_last:
            self._save()
        if self.step % self.config.logging_steps == 0 or is_last:
            loss = torch.stack(self._losses).mean().item()
            self._losses.clear()
            evaluated = self.evaluate() if self.step % self.config.save_steps == 0 or is_last else {}
            self.log({"step": self.step, "loss": loss, "learning_rate": learning_rate, **evaluated})

    def _save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        if not self.accelerator.is_main_process:
            return
        tensors = {f"parameter.{i}": p.detach() for i, p in enumerate(self.parameters)}
        tensors |= {f"optimizer.{name}": value for name, value in optimizer_tensors(self.optimizer).items()}
        if self.average is not None:
            state = self.average.state_dict()
            tensors |= {f"average.{i}": p for i, p in enumerate(state["shadow_params"])}
        aside = self.path.with_suffix(".tmp")
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        save_file(tensors, aside, metadata={"step": str(self.step), "run": json.dumps(self._run())})
        os.replace(aside, self.path)

    def _run(self) -> dict[str, Any]:
        """What the result depends on, and so must not change when the fit is resumed."""
        made_with = {f"corrector's {name}": value for name, value in self.corrector.settings.items()}
        return {**self.config.shaping(), **made_with, "inverted noise": self.data.inverted.fingerprint}

    def _load(self) -> None:
        with safe_open(self.path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        refuse_changes(self.path, json.loads(metadata["run"]), self._run(), default_values(self.config))
        self.step = int(metadata["step"])
        for i, parameter in enumerate(self.parameters):
            parameter.data.copy_(tensors[f"parameter.{i}"])
        prefix = "optimizer."
        state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        load_optimizer_tensors(state, self.optimizer)
        if self.average is not None:
            shadow = [tensors[f"average.{i}"].to(p.device) for i, p in enumerate(self.parameters)]
            state = {**self.average.state_dict(), "shadow_params": shadow, "optimization_step": self.step}
            self.average.load_state_dict(state)


def split(count: int, config: NoiseCorrectionConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of `count` samples are held out, and which are trained on."""
    order = torch.randperm(count, generator=_generator(config.seed, "held out"))
    return order.tensor_split([int(count * config.held_out_fraction)])


def _split(part: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    return torch.arange(len(part)).split(size)


def _generator(*key: Any) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*key))
