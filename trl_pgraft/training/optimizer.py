# SPDX-License-Identifier: Apache-2.0

"""Accelerator, optimizer, learning rate, and one optimizer step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers.optimization import get_scheduler

from ..adapters.lora import tuner_layers
from ..config import GraftConfig
from ..pipelines.denoiser_format import uncompiled


MOST_SKIPPED_IN_A_ROW = 10


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


def make_accelerator(config: GraftConfig, output_dir: Path) -> Accelerator:
    """Accelerator of a run: precision by device where the configuration leaves it open, logs under `output_dir`."""
    logs = output_dir / config.logdir / (config.run_name if config.log_with == "tensorboard" else "")
    project = {"project_dir": str(output_dir), "logging_dir": str(logs), **config.project_kwargs}
    output_dir.mkdir(parents=True, exist_ok=True)
    if config.allow_tf32 and torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
    return Accelerator(
        log_with=config.log_with,
        mixed_precision=config.mixed_precision or _best_precision(),
        project_config=ProjectConfiguration(**project),
        **config.accelerator_kwargs,
    )


def _best_precision() -> str:
    if not torch.cuda.is_available():
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def make_optimizer(parameters: list[torch.nn.Parameter], config: GraftConfig) -> torch.optim.Optimizer:
    """AdamW with the configuration's values; 8-bit where asked."""
    kind = torch.optim.AdamW
    if config.train_use_8bit_adam:
        try:
            from bitsandbytes.optim import AdamW8bit as kind
        except ImportError as error:
            raise ImportError("train_use_8bit_adam=True needs bitsandbytes: pip install bitsandbytes.") from error
    return kind(
        parameters,
        lr=config.train_learning_rate,
        betas=(config.train_adam_beta1, config.train_adam_beta2),
        weight_decay=config.train_adam_weight_decay,
        eps=config.train_adam_epsilon,
    )
