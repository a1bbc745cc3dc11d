# SPDX-License-Identifier: Apache-2.0

"""Accelerator, optimizer, learning rate, and the optimizer steps that every fine-tuning takes."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import ProjectConfiguration, parse_flag_from_env
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from ..adapters.lora import tuner_layers
from ..config import GraftConfig
from ..pipelines.denoiser_format import uncompiled


MOST_SKIPPED_IN_A_ROW = 10
# Ways of accelerate to split a model, which sampling between the fits does not survive.
SHARDING = ("DEEPSPEED", "FSDP", "MEGATRON_LM")


@contextmanager
def prepared(
    accelerator: Accelerator, denoiser: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[torch.nn.Module, AcceleratedOptimizer]]:
    r"""
    Have accelerate wrap a denoiser and its optimizer inside the block; afterwards, also after an error, the denoiser
    is as it was.

    Args:
        accelerator (`Accelerator`):
            The processes, their device and their precision.
        denoiser (`torch.nn.Module`):
            Module that is fine-tuned; it is called in evaluation mode, its adapters in training mode.
        optimizer (`torch.optim.Optimizer`):
            Optimizer of its trainable parameters.

    Yields:
        `tuple[torch.nn.Module, AcceleratedOptimizer]`: the denoiser and the optimizer to train with.
    """
    was_training = denoiser.training
    denoiser.eval()
    # Only the adapters' own dropout is wanted: a denoiser in training mode may drop its class labels, unseeded.
    for layer in tuner_layers(denoiser):
        layer.train()
    forwards = [(module, vars(module).get("forward")) for module in (denoiser, uncompiled(denoiser))]
    model, wrapped = accelerator.prepare(denoiser, optimizer)
    try:
        yield model, wrapped
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


@dataclass
class OptimizerSteps:
    r"""
    The optimizer steps of one fine-tuning: gradients are clipped, a step whose gradient is not finite is skipped and
    counted, and a moving average of the parameters is kept.

    Args:
        accelerator (`Accelerator`):
            The accelerator that wrapped the optimizer.
        optimizer (`AcceleratedOptimizer`):
            The optimizer, as [`prepared`] yields it.
        max_grad_norm (`float`):
            Norm of the gradient above which it is scaled down.
        learning_rate_field (`str`):
            Configuration field of the learning rate, which the error's message names.
        average (`EMAModel`, *optional*):
            Moving average of the optimizer's parameters, updated after each step; none is kept where not given.
        on_event (`Callable[[str], Any]`, *optional*):
            Called with `on_pre_optimizer_step` and `on_optimizer_step` in each step, after clipping and before the
            gradients are cleared.
        taken (`int`, *optional*, defaults to `0`):
            Steps taken so far, skipped ones included.
        skipped (`int`, *optional*, defaults to `0`):
            Skipped steps among them.
    """

    accelerator: Accelerator
    optimizer: AcceleratedOptimizer
    max_grad_norm: float
    learning_rate_field: str
    average: EMAModel | None = None
    on_event: Callable[[str], Any] = lambda event: None
    taken: int = 0
    skipped: int = 0
    _skipped_in_a_row: int = field(default=0, init=False)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a `loss` that has its share of the step's mean already, which accelerate divides."""
        self.accelerator.backward(loss * self.accelerator.gradient_accumulation_steps)

    def take(self, learning_rate: float) -> None:
        r"""
        Take one step along the gradients that are there, and clear them.

        Args:
            learning_rate (`float`):
                Learning rate of this step.

        Raises:
            `RuntimeError`: this was the tenth step in a row whose gradient was not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        parameters = parameters_of(self.optimizer)
        is_finite = bool(torch.isfinite(self.accelerator.clip_grad_norm_(parameters, self.max_grad_norm)))
        self.on_event("on_pre_optimizer_step")
        # A gradient scaler skips such a step by itself, and lowers its scale.
        if is_finite or self.accelerator.scaler is not None:
            self.optimizer.step()
        self.on_event("on_optimizer_step")
        self.optimizer.zero_grad()
        self.taken, self.skipped = self.taken + 1, self.skipped + (not is_finite)
        self._skipped_in_a_row = 0 if is_finite else self._skipped_in_a_row + 1
        if self._skipped_in_a_row == MOST_SKIPPED_IN_A_ROW:
            raise RuntimeError(
                f"The last {MOST_SKIPPED_IN_A_ROW} optimizer steps had non-finite gradients and were skipped. Lower "
                f"{self.learning_rate_field} or train in a higher mixed_precision."
            )
        if self.average is not None:
            self.average.step(parameters)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    """All parameters of an optimizer, in its own order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def learning_rates(kind: str, peak: float, warmup_steps: int, length: int) -> Callable[[int], float]:
    r"""
    Learning rate by step, on one of diffusers' schedules over `length` optimizer steps.

    Args:
        kind (`str`):
            Name of the schedule, as `diffusers.optimization.get_scheduler` takes it.
        peak (`float`):
            Learning rate that the schedule scales.
        warmup_steps (`int`):
            Steps of warm-up.
        length (`int`):
            Steps in all; later steps have the rate of the last one, where a cosine would rise again.

    Returns:
        `Callable[[int], float]`: maps the number of a step, from 0, to its learning rate.
    """
    unit = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    factor = get_scheduler(kind, unit, num_warmup_steps=warmup_steps, num_training_steps=length).lr_lambdas[0]
    return lambda step: peak * factor(min(step, length))


def launched_accelerator(
    mixed_precision: str | None, by_device: str = "no", accumulation: tuple[str, int] = ("", 1), **options: Any
) -> Accelerator:
    r"""
    An accelerator whose launcher does not contradict the configuration.

    `accelerate launch` always names a precision and an accumulation. "no" and 1 are its defaults and do not count.

    Args:
        mixed_precision (`str` or `None`):
            The configuration's; `None` takes the launcher's.
        by_device (`str`, *optional*, defaults to `"no"`):
            Precision where neither names one.
        accumulation (`tuple[str, int]`, *optional*, defaults to `("", 1)`):
            The configuration's field of accumulation steps, and its value; without a field nothing is accumulated.
        options:
            Further arguments of the accelerator.

    Raises:
        `ValueError`: the launcher contradicts the configuration, or is to split the model.
    """
    for name in SHARDING:
        if parse_flag_from_env(f"ACCELERATE_USE_{name}") or options.get(f"{name.lower()}_plugin"):
            raise ValueError(
                f"accelerate is set to {name}, which splits the model: that is not supported, because the model also "
                "samples. Run `accelerate launch` with plain data parallelism (--multi_gpu) or in one process."
            )
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched not in ("no", mixed_precision or launched) or launched == "fp8":
        raise ValueError(
            f"accelerate's launcher has mixed_precision={launched!r}, and the configuration has {mixed_precision!r}. "
            "Give both the same of 'no', 'fp16' and 'bf16', or leave it to one of them."
        )
    chosen = mixed_precision or (by_device if launched == "no" else launched)
    accelerator, (field, steps) = Accelerator(mixed_precision=chosen, **options), accumulation
    # The launcher's wins over an argument.
    wanted = {accelerator.gradient_accumulation_steps, options.get("gradient_accumulation_steps", 1)} - {1, steps}
    if wanted:
        advice = f"Set {field} to what is wanted, and leave" if field else "Nothing is accumulated here: leave"
        raise ValueError(
            f"accelerate is set to gradient_accumulation_steps={max(wanted)}, and "
            f"{field or 'that of noise correction'} is {steps}. {advice} it out of `accelerate launch`, of its file "
            "and of accelerator_kwargs."
        )
    return accelerator


def make_accelerator(config: GraftConfig, output_dir: Path) -> Accelerator:
    r"""
    Accelerator of a run.

    Args:
        config ([`GraftConfig`]):
            Configuration of the run; without its `mixed_precision`, the launcher or the device determines it.
        output_dir (`Path`):
            Output folder of the run, made if missing; logs are written to `config.logdir` inside.
    """
    logs = output_dir / config.logdir / (config.run_name if config.log_with == "tensorboard" else "")
    output_dir.mkdir(parents=True, exist_ok=True)
    best_precision = "no"
    if torch.cuda.is_available():
        best_precision = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        if config.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
    accumulation = "train_gradient_accumulation_steps", config.train_gradient_accumulation_steps
    return launched_accelerator(
        config.mixed_precision,
        best_precision,
        accumulation,
        log_with=config.log_with,
        project_config=ProjectConfiguration(
            **{"project_dir": str(output_dir), "logging_dir": str(logs), **config.project_kwargs}
        ),
        **config.accelerator_kwargs,
    )


def make_optimizer(parameters: list[torch.nn.Parameter], config: GraftConfig) -> torch.optim.Optimizer:
    r"""
    AdamW with the values of a configuration.

    Args:
        parameters (`list[torch.nn.Parameter]`):
            Parameters to train.
        config ([`GraftConfig`]):
            Learning rate, betas, weight decay, epsilon, and whether the moments are kept in 8 bits.

    Raises:
        `ImportError`: `config.train_use_8bit_adam` is set, and bitsandbytes is not installed.
    """
    kind: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    if config.train_use_8bit_adam:
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ImportError("train_use_8bit_adam=True needs bitsandbytes: pip install bitsandbytes.") from error
        kind = AdamW8bit
    return kind(
        parameters,
        lr=config.train_learning_rate,
        betas=(config.train_adam_beta1, config.train_adam_beta2),
        weight_decay=config.train_adam_weight_decay,
        eps=config.train_adam_epsilon,
    )
