# SPDX-License-Identifier: Apache-2.0

"""Where a pipeline's modules are: offloaded between its calls, on the device for training, or refused on meta."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.hooks import CpuOffload
from accelerate.utils import has_compiled_regions, is_compiled_module
from diffusers import DiffusionPipeline

from .denoiser_format import uncompiled


def offload_device(pipeline: DiffusionPipeline) -> torch.device | None:
    """The device that `enable_model_cpu_offload` moves modules to for their calls; `None` where it is off."""
    # accelerate keeps the hook of a module under this name, and diffusers looks there too; the pipeline's own list of
    # its hooks is private.
    hooks = (getattr(module, "_hf_hook", None) for module in pipeline.components.values())
    return next((torch.device(hook.execution_device) for hook in hooks if isinstance(hook, CpuOffload)), None)


def device_of(pipeline: DiffusionPipeline) -> torch.device:
    """Where the pipeline computes, also where its modules are offloaded."""
    return offload_device(pipeline) or pipeline.device


@contextmanager
def evaluation_mode(module: torch.nn.Module) -> Iterator[None]:
    """A module without dropout inside the block; afterwards each of its parts is in the mode that it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        module.train(modes[module])  # also what was added inside
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def on_device(
    pipeline: DiffusionPipeline,
    modules: Sequence[torch.nn.Module],
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer | None = None,
) -> Iterator[None]:
    """
    Keep offloaded modules on the device inside the block, for training; do nothing where nothing is offloaded.

    Their offload hooks are off meanwhile: they would move parameters at the first call, after the optimizer's state
    was placed, and stand in the way of accelerate's own wrapping. Afterwards the state goes where the parameters are.

    Args:
        pipeline (`DiffusionPipeline`):
            Pipeline, perhaps with `enable_model_cpu_offload`.
        modules (`Sequence[torch.nn.Module]`):
            What training calls: its denoiser, and controls.
        accelerator (`Accelerator`):
            Whose device.
        optimizer (`torch.optim.Optimizer`, *optional*):
            Over parameters of the modules.
    """
    if offload_device(pipeline) is None:
        yield
        return
    pipeline.remove_all_hooks()
    for module in modules:
        module.to(accelerator.device)
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


def weights_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """Precision of frozen weights in the accelerator's mixed precision; `None` leaves them in their own."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision)


def place_pipeline(pipeline: DiffusionPipeline, device: torch.device, dtype: torch.dtype | None = None) -> None:
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
        if (device_of(pipeline).index or 0) != (device.index or 0):
            raise ValueError(
                f"sd_pipeline: enable_model_cpu_offload() named {device_of(pipeline)}, and this process trains "
                f"on {device}. Load the pipeline anew and call it with device={str(device)!r}."
            )
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
