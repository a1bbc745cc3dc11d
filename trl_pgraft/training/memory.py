# SPDX-License-Identifier: Apache-2.0

"""How much memory a run needs at the least, from the loaded pipeline and the configuration, before it starts."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import convert_to_fp32
from diffusers import DiffusionPipeline
from peft import PeftConfig

from ..adapters.lora import ADAPTER_NAME, adapter_parameters, add_adapter, default_lora_config, tuner_layers
from ..config import GraftConfig
from ..pipelines.denoiser_call import denoiser_of
from ..pipelines.denoiser_format import uncompiled
from ..pipelines.inputs import sampling_arguments
from ..pipelines.introspection import Introspection, introspect
from ..pipelines.placement import offload_device


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Bytes that fine-tuning keeps on each process, a lower bound.

    Args:
        pipeline (`int`):
            Weights of all components, in the precision they are in; with `enable_model_cpu_offload` of the denoiser
            and a ControlNet alone, which are what fine-tuning has on the device.
        adapter (`int`):
            Weights of the adapter, which are in float32.
        gradients (`int`):
            Gradients of the adapter's weights, in float32.
        optimizer (`int`):
            AdamW's two moments, of one byte a value with `train_use_8bit_adam`.
        activations (`int` or `None`):
            What the adapted layers keep of one microbatch for the backward pass; 0 with gradient checkpointing, which
            computes it again; `None` where the denoiser cannot be followed without its values.
        is_full_copy (`bool`, *optional*, defaults to `False`):
            Whether the adapter is a copy of all weights of the denoiser.
    """

    pipeline: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int | None
    is_full_copy: bool = False

    @property
    def total(self) -> int:
        """Their sum; unknown activations count as none."""
        return self.pipeline + self.adapter + self.gradients + self.optimizer + (self.activations or 0)

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {_readable(getattr(self, name))}"
            for name in ("pipeline", "adapter", "gradients", "optimizer", "activations")
        )
        copied = (
            "The adapter is a copy of all weights of the denoiser, a whole second set beside the frozen one. "
            if self.is_full_copy
            else ""
        )
        return (
            f"Memory of a process, at least {_readable(self.total)}: {parts}. {copied}Not counted: activations of "
            "frozen layers and of attention, workspaces, images and the VAE's decoding, the allocator's reserve."
        )


def estimate_memory(
    pipeline: DiffusionPipeline,
    config: GraftConfig,
    peft_config: PeftConfig | None = None,
    pipeline_kwargs: dict[str, Any] | None = None,
    introspection: Introspection | None = None,
) -> MemoryEstimate:
    """
    Estimate the memory of fine-tuning `pipeline`, without making the adapter or an image.

    Args:
        pipeline (`DiffusionPipeline`):
            Loaded in the precision it will train in.
        config ([`GraftConfig`]):
            Batch size, rank, 8-bit AdamW, gradient checkpointing and the size of images count.
        peft_config (`PeftConfig`, *optional*):
            The adapter; the trainer's default where not given.
        pipeline_kwargs (`dict`, *optional*):
            Further arguments of the pipeline call, such as `height`.
        introspection ([`Introspection`], *optional*):
            What was determined of this pipeline call; it is recorded where not given.
    """
    denoiser = uncompiled(denoiser_of(pipeline))
    peft_config = peft_config or default_lora_config(denoiser, config.lora_rank)
    introspection = introspection or introspect(pipeline, sampling_arguments(config, pipeline, pipeline_kwargs))
    # Models without weights show how many an adapter of any kind has and where, and what its layers are given.
    with torch.device("meta"):
        shell, plain = (type(denoiser).from_config(denoiser.config) for _ in range(2))
    # Not on the meta device, where some adapters (BOFT) cannot be made: PEFT puts them beside their layers by itself.
    add_adapter(shell, copy.deepcopy(peft_config), ADAPTER_NAME, seed=0)
    trained = sum(parameter.numel() for parameter in adapter_parameters(shell, ADAPTER_NAME))
    layers = {id(layer) for layer in tuner_layers(shell, ADAPTER_NAME)}
    adapted = [plain.get_submodule(path) for path, module in shell.named_modules() if id(module) in layers]
    activations: int | None = 0
    if not config.gradient_checkpointing:
        kept, call = _input_sizes(plain, adapted, introspection.first_step), introspection.call
        images = config.train_batch_size * (2 if call.is_guided and config.guidance_loss == "combined" else 1)
        activations = kept and kept * denoiser.dtype.itemsize // call.branches * images
    called = [denoiser, *introspection.call.control_modules]
    resident = called if offload_device(pipeline) else pipeline.components.values()
    weights = {
        id(p): p.numel() * p.element_size()
        for component in resident
        if isinstance(component, torch.nn.Module)
        for p in component.parameters()
    }
    return MemoryEstimate(
        pipeline=sum(weights.values()),
        adapter=4 * trained,
        gradients=4 * trained,
        optimizer=(2 if config.train_use_8bit_adam else 8) * trained,
        activations=activations,
        is_full_copy=trained == sum(parameter.numel() for parameter in denoiser.parameters()),
    )


def _input_sizes(denoiser: torch.nn.Module, modules: list[torch.nn.Module], calls: list[dict[str, Any]]) -> int | None:
    """
    Numbers that `modules` of a float32 denoiser on the meta device are given in these calls; what several are given in
    turn counts once. `None` where the denoiser reads values of its arguments, which have none there.
    """
    inputs: list[torch.Tensor] = []

    def before_call(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = args[0] if args else next(iter(kwargs.values()))
        if not inputs or given is not inputs[-1]:
            inputs.append(given)

    for module in modules:
        module.register_forward_pre_hook(before_call, with_kwargs=True)
    try:
        with torch.no_grad():
            for call in calls:
                denoiser(**convert_to_fp32(call))
    except Exception:  # whatever a model raises that has no values, or lacks what was put into the real one
        return None
    return sum(given.numel() for given in inputs)


def _readable(count: int | None) -> str:
    if count is None:
        return "unknown"
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
