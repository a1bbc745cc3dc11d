# SPDX-License-Identifier: Apache-2.0

"""Training of a corrector on inverted noise: batches, the loss, the moving average, checkpoints."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from tqdm.auto import tqdm

from ..config import default_values
from ..core.seeding import generator_of, noise_of
from ..core.tensor_files import save_tensors
from ..pipelines.conditioning import Conditioning
from ..pipelines.denoiser_call import DenoiserCall
from ..training.checkpoints import load_optimizer_tensors, optimizer_tensors, refuse_changes
from ..training.optimizer import OptimizerSteps, learning_rates, prepared
from ..training.run_log import METRICS_FILE
from .config import NoiseCorrectionConfig
from .correctors import FlowCorrector
from .correctors.transport import perturb
from .dataset import InvertedData


CHECKPOINT_FILE = "checkpoint.safetensors"
HELD_OUT_PASSES = 4


@dataclass(frozen=True)
class CorrectorData:
    r"""
    What a corrector is trained on.

    Args:
        inverted ([`InvertedData`]):
            Inverted noise of `N` samples; a resumed run must have the same.
        prompts (`torch.Tensor` of shape `(N,)`, int64):
            Row of the conditioning that each sample belongs to.
        call ([`DenoiserCall`]):
            How the pipeline calls its denoiser.
        conditioning ([`Conditioning`]):
            Recorded conditioning of the prompts.
    """

    inverted: InvertedData
    prompts: torch.Tensor
    call: DenoiserCall
    conditioning: Conditioning


class CorrectorFinetuner:
    r"""
    Trains one corrector. Batches, levels and noise depend on seed and step alone, and not on the processes.

    Args:
        accelerator (`Accelerator`):
            The processes, their device and their precision.
        corrector ([`FlowCorrector`]):
            The corrector, which is trained in place.
        data ([`CorrectorData`]):
            Inverted noise, its prompts and their conditioning.
        config ([`NoiseCorrectionConfig`]):
            Batch size, optimizer, moving average, held-out share, and steps between logs and checkpoints.
        folder (`Path`):
            Output folder, in which the checkpoint is kept.
        log (`Callable[[dict[str, float]], None]`):
            Takes metrics by name, in every process.
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
        self.path, self.step = folder / CHECKPOINT_FILE, 0
        self._losses: list[torch.Tensor] = []  # since the last line of the log
        self.parameters = corrector.parameters
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.average = EMAModel(self.parameters, decay=config.ema_decay, foreach=True) if config.ema_decay else None
        self.held_out, self.rows = split(len(data.inverted.noise), config)

    def run(self) -> None:
        r"""
        Train to `max_steps`, from the checkpoint where that is resumed; the corrector ends with the averaged weights.

        Raises:
            `ChangedRunError`: the checkpoint is of another configuration, corrector or data.
            `RuntimeError`: ten optimizer steps in a row had a non-finite loss or gradient.
        """
        config, accelerator = self.config, self.accelerator
        if config.resume_from_checkpoint:
            if self.path.is_file():
                self._load()
            self._cut_log()
        rate = learning_rates(config.lr_scheduler_type, config.learning_rate, config.warmup_steps, config.max_steps)
        bar = tqdm(
            range(self.step, config.max_steps),
            desc="training the corrector",
            total=config.max_steps,
            initial=self.step,
            disable=not accelerator.is_local_main_process,
        )
        with (
            prepared(accelerator, self.corrector.module, self.optimizer) as (model, wrapped),
            self.corrector.active(),
            bar,
        ):
            steps = OptimizerSteps(accelerator, wrapped, config.max_grad_norm, "learning_rate", self.average)
            for step in bar:
                self._train_step(model, steps, rate(step))
                self.step = step + 1
                self._report(rate(self.step))
        if self.average is not None:
            self.average.copy_to(self.parameters)

    def _train_step(self, model: torch.nn.Module, steps: OptimizerSteps, learning_rate: float) -> None:
        count, parts = self.config.train_batch_size, (self.config.seed, "step", self.step)
        rows = self.rows[torch.randint(len(self.rows), (count,), generator=generator_of(*parts, "rows"))]
        # Each process has samples of all levels, which are sampled in ascending order.
        own = torch.arange(self.accelerator.process_index, count, self.accelerator.num_processes)
        with self.accelerator.autocast():
            loss = self._losses_of(rows, parts, own, model)[0].mean()
        steps.backward(loss)
        steps.take(learning_rate)
        self._losses.append(self.accelerator.reduce(loss.detach(), "mean"))

    def _losses_of(
        self, rows: torch.Tensor, parts: tuple[Any, ...], own: torch.Tensor, model: torch.nn.Module
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared error of each sample `own` of a batch of `rows`, and that of correcting nothing."""
        signal = (torch.arange(len(rows)) + torch.rand(len(rows), generator=generator_of(*parts))) / len(rows)
        noise = noise_of((len(rows), *self.data.inverted.noise.shape[1:]), *parts)
        device, rows = self.accelerator.device, rows[own]
        y, noise, signal = self.data.inverted.noise[rows].to(device), noise[own].to(device), signal[own].double()
        x, target = perturb(y, noise, signal)
        conditioning = self.data.conditioning.rows(self.data.prompts[rows].tolist(), device)
        prediction = self.corrector(x, signal, self.data.call, conditioning, model)
        return (prediction - target).square().flatten(1).mean(1), target.square().flatten(1).mean(1)

    def evaluate(self) -> dict[str, float]:
        r"""
        Evaluate the corrector on the held-out samples, with the averaged weights where an average is kept.

        Returns:
            `dict[str, float]`: the loss as `held_out/loss`, and that of correcting nothing as
                `held_out/loss_uncorrected`; nothing where no samples are held out.
        """
        if not len(self.held_out):
            return {}
        if self.average is not None:
            self.average.store(self.parameters)
            self.average.copy_to(self.parameters)
        rows, size, totals = self.held_out.repeat(HELD_OUT_PASSES), self.config.train_batch_size, [0.0, 0.0]
        with torch.no_grad(), self.corrector.active():
            for number, batch in enumerate(rows.split(size)):
                # As many at a time as a process trains on.
                for own in torch.arange(len(batch)).split(size // self.accelerator.num_processes):
                    parts = (self.config.seed, "evaluation", number)
                    losses = self._losses_of(batch, parts, own, self.corrector.module)
                    totals = [
                        total + loss.sum().item() / len(rows) for total, loss in zip(totals, losses, strict=True)
                    ]
        if self.average is not None:
            self.average.restore(self.parameters)
        return {"held_out/loss": totals[0], "held_out/loss_uncorrected": totals[1]}

    def _report(self, learning_rate: float) -> None:
        """Metrics and a checkpoint, where they are due."""
        is_last = self.step == self.config.max_steps
        saves = self.step % self.config.save_steps == 0 or is_last
        if self.step % self.config.logging_steps == 0 or is_last:
            loss, held_out = torch.stack(self._losses).mean().item(), self.evaluate() if saves else {}
            self.log({"step": self.step, "loss": loss, "learning_rate": learning_rate, **held_out})
            self._losses.clear()
        # After the log, so that a checkpoint has no line left to write.
        if saves and self.accelerator.is_main_process:
            self._save()

    def _weights(self) -> dict[str, torch.Tensor]:
        """The trained parameters, and their moving average where one is kept, by their names in the checkpoint."""
        weights = {"parameter": self.parameters, "average": self.average.shadow_params if self.average else []}
        return {f"{kind}.{i}": tensor for kind, tensors in weights.items() for i, tensor in enumerate(tensors)}

    def _save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        optimizer = {f"optimizer.{name}": value for name, value in optimizer_tensors(self.optimizer).items()}
        losses = torch.stack(self._losses) if self._losses else torch.empty(0)
        save_tensors(
            self.path,
            {**self._weights(), **optimizer, "losses": losses},
            {"step": str(self.step), "run": json.dumps(self._resume_signature())},
        )

    def _resume_signature(self) -> dict[str, Any]:
        """What the result depends on, and so must not change when the training is resumed."""
        return {
            **self.config.resume_signature(),
            **{f"corrector's {name}": value for name, value in self.corrector.settings.items()},
            "inverted noise": self.data.inverted.fingerprint,
        }

    def _load(self) -> None:
        with safe_open(self.path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        defaults = {
            **default_values(self.config),
            **{f"corrector's {name}": value for name, value in self.corrector.default_settings.items()},
        }
        refuse_changes(self.path, json.loads(metadata["run"]), self._resume_signature(), defaults)
        self.step = int(metadata["step"])
        for name, tensor in self._weights().items():
            tensor.data.copy_(tensors.pop(name))
        # Checkpoints of earlier versions have no losses.
        self._losses = [*tensors.pop("losses", torch.empty(0)).to(self.accelerator.device)]
        load_optimizer_tensors({n.removeprefix("optimizer."): value for n, value in tensors.items()}, self.optimizer)
        if self.average is not None:
            self.average.optimization_step = self.step

    def _cut_log(self) -> None:
        """Take out of `metrics.jsonl` what follows the checkpoint, because these steps are taken again."""
        path = self.path.parent / METRICS_FILE
        if self.accelerator.is_main_process and path.is_file():
            whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            path.write_text("".join(line for line in whole if json.loads(line).get("step", 0) <= self.step))


def split(count: int, config: NoiseCorrectionConfig) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Split samples into held-out and training ones, at random.

    Args:
        count (`int`):
            Number of samples.
        config ([`NoiseCorrectionConfig`]):
            Held-out share and seed.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: indices of the held-out samples, and of those to train on.
    """
    order = torch.randperm(count, generator=generator_of(config.seed, "held out"))
    held_out, rest = order.tensor_split([int(count * config.held_out_fraction)])
    return held_out, rest
