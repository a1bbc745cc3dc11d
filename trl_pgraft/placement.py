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


"""Where a pipeline's modules are: offloaded between its calls, on the device for a fit, on meta and so refused."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.hooks import CpuOffload
from accelerate.utils import has_compiled_regions, is_compiled_module

from .denoiser_format import uncompiled


def offload_device(pipeline: Any) -> torch.device | None:
    """The device that `enable_model_cpu_offload` moves modules to for their calls; `None` where it is off."""
    # accelerate keeps the hook of a module under this name, and diffusers looks there too; the pipeline's own list of
    # its hooks is private.
    hooks = (getattr(module, "_hf_hook", None) for module in pipeline.components.values())
    return next((torch.device(hook.execution_device) for hook in hooks if isinstance(hook, CpuOffload)), None)


def device_of(pipeline: Any) -> torch.device:
    """Where the pipeline computes, also where its modules are offloaded."""
    return offload_device(pipeline) or pipeline.device


@contextmanager
def on_device(
    pipeline: Any, denoiser: torch.nn.Module, accelerator: Accelerator, optimizer: torch.optim.Optimizer | None = None
) -> Iterator[None]:
    """
    Keep an offloaded denoiser on the device inside the block, for training; do nothing where it is not offloaded.

    Its offload hook is off meanwhile: it would move the parameters at the first call, after the optimizer's state was
    placed, and stand in the way of accelerate's own wrapping. Afterwards the state goes where the parameters are.

    Args:
        pipeline (`DiffusionPipeline`):
            Pipeline, perhaps with `enable_model_cpu_offload`.
        denoiser (`torch.nn.Module`):
            Its denoiser.
        accelerator (`Accelerator`):
            Whose device.
        optimizer (`torch.optim.Optimizer`, *optional*):
            Over parameters of the denoiser.
    """
    if offload_device(pipeline) is None:
        yield
        return
    pipeline.remove_all_hooks()
    denoiser.to(accelerator.device)
    try:
        yield
    finally:
        pipeline.enable_model_cpu_offload(device=accelerator.device)
        if optimizer is not None:
            optimizer.load_state_dict(optimizer.state_dict())


def check_adaptable(denoiser: torch.nn.Module) -> None:
    """
    Check that adapters can be put into a denoiser as it is offloaded and compiled.

    Args:
        denoiser (`torch.nn.Module`):
            What the pipeline calls.

    Raises:
        `ValueError`: its weights are on the meta device, or parts of it were replaced by compiled ones.
    """
    inner = uncompiled(denoiser)
    name = type(inner).__name__
    on_meta = [path for path, parameter in inner.named_parameters() if parameter.is_meta]
    if on_meta:
        raise ValueError(
            f"{name}: {len(on_meta)} weights are on the meta device ({on_meta[0]}), as enable_sequential_cpu_offload "
            "leaves them. An adapter would be made there as well, without values, and its gradients would be zero. "
            "Call pipeline.enable_model_cpu_offload() instead, which moves whole modules."
        )
    if has_compiled_regions(inner) or (has_compiled_regions(denoiser) and not is_compiled_module(denoiser)):
        raise ValueError(
            f"{name}: some of its modules were replaced by compiled ones, as by accelerate's compile_regions(), and "
            "adapters would go by other names, or into modules that are not called. For regional compilation call "
            "denoiser.compile_repeated_blocks(), for the whole pipeline.unet = torch.compile(pipeline.unet)."
        )
