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


"""What the loop runs on: accelerator, placement and precision of the pipeline, optimizer."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from .config import GraftConfig
from .placement import offload_device


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


def weights_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """Precision of frozen weights in the accelerator's mixed precision; `None` leaves them in their own."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision)


def place_pipeline(pipeline: Any, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """
    Move the pipeline to the device, or leave it offloaded; its weights frozen, in `dtype` where that is given, and
    without its own progress bars.
    """
    if offload_device(pipeline) is None:
        pipeline.to(device, dtype=dtype)
    else:
        if dtype is not None:
            pipeline.to(dtype=dtype)
        # To the device of this process, where the pipeline may have named the first of all.
        pipeline.enable_model_cpu_offload(device=device)
        # diffusers takes an index of 0 for none, and stays with the one that the pipeline named before.
        if (offload_device(pipeline).index or 0) != (device.index or 0):
            raise ValueError(
                f"sd_pipeline: enable_model_cpu_offload() named {offload_device(pipeline)}, and this process trains "
                f"on {device}. Load the pipeline anew and call it with device={str(device)!r}."
            )
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)


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
