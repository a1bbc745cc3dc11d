# SPDX-License-Identifier: Apache-2.0

"""How much memory a run needs at the least, from the loaded pipeline and the configuration, before it starts."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig

from ..adapters.lora import ADAPTER_NAME, adapter_parameters, add_adapter, default_lora_config, tuner_layers
from ..config import GraftConfig
from ..pipelines.denoiser_call import DenoiserCall, denoiser_of
from ..pipelines.denoiser_format import uncompiled
from ..pipelines.inputs import sampling_arguments
from ..pipelines.introspection import introspect_denoiser_call
from ..pipelines.placement import offload_device
from ..pipelines.schedulers import sampler_of


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Bytes that fine-tuning keeps on each process, a lower bound.

    Args:
        pipeline (`int`):
            Weights of all components, in the precision they are in; with `enable_model_cpu_offload` of the denoiser
            alone, which is what a fit has on the device.
        adapter (`int`):
            Trainable weights, float32.
        gradients (`int`):
            Their gradients.
        optimizer (`int`):
            AdamW's two moments, of one byte a value with `train_use_8bit_adam`.
        activations (`int`):
            What the adapted layers keep of one microbatch for the backward pass; 0 with gradient checkpointing, which
            computes it again.
        is_full_copy (`bool`, *optional*, defaults to `False`):
            Whether the adapter is a copy of all weights of the denoiser.
    """

    pipeline: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    is_full_copy: bool = False

    @property
    def total(self) -> int:
        return self.pipeline + self.adapter + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        names = ("pipeline", "adapter", "gradients", "optimizer", "activations")
        parts = ", ".join(f"{name} {_readable(getattr(self, name))}" for name in names)
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
    pipeline: Any,
    config: GraftConfig,
    peft_config: PeftConfig | None = None,
    pipeline_kwargs: dict[str, Any] | None = None,
    call: DenoiserCall | None = None,
) -> MemoryEstimate:
    """
    Estimate the memory of fine-tuning `pipeline`, with one sampling step and without making the adapter.

    Args:
        pipeline (`DiffusionPipeline`):
            Loaded in the precision it will train in.
        config ([`GraftConfig`]):
            Batch size, rank, 8-bit AdamW, gradient checkpointing and the size of images count.
        peft_config (`PeftConfig`, *optional*):
            The adapter; the trainer's default where not given.
        pipeline_kwargs (`dict`, *optional*):
            Further arguments of the pipeline call, such as `height`.
        call ([`DenoiserCall`], *optional*):
            How the pipeline calls its denoiser, where that is known.
    """
    denoiser, arguments = uncompiled(denoiser_of(pipeline)), sampling_arguments(config, pipeline, pipeline_kwargs)
    peft_config = peft_config or default_lora_config(denoiser, config.lora_rank)
    call = call or introspect_denoiser_call(pipeline, arguments)
    # The model without weights says how many an adapter of any kind has, and where.
    with torch.device("meta"):
        shell = type(denoiser).from_config(denoiser.config)
    # Not on the meta device, where some adapters (BOFT) cannot be made: PEFT puts them beside their layers by itself.
    add_adapter(shell, copy.deepcopy(peft_config), ADAPTER_NAME, seed=0)
    trained = sum(parameter.numel() for parameter in adapter_parameters(shell, ADAPTER_NAME))
    layers = {id(layer) for layer in tuner_layers(shell, ADAPTER_NAME)}
    adapted = [denoiser.get_submodule(path) for path, module in shell.named_modules() if id(module) in layers]
    with _input_bytes(adapted) as kept:
        sampler_of(pipeline, arguments)  # makes one step
    passes = 2 if call.is_guided and config.guidance_loss == "combined" else 1
    activations = 0 if config.gradient_checkpointing else sum(kept) // call.branches * config.train_batch_size * passes
    modules = [m for m in pipeline.components.values() if isinstance(m, torch.nn.Module)]
    modules = modules if offload_device(pipeline) is None else [denoiser]
    weights = {id(p): p.numel() * p.element_size() for module in modules for p in module.parameters()}
    return MemoryEstimate(
        pipeline=sum(weights.values()),
        adapter=4 * trained,
        gradients=4 * trained,
        optimizer=(2 if config.train_use_8bit_adam else 8) * trained,
        activations=activations,
        is_full_copy=trained == sum(parameter.numel() for parameter in denoiser.parameters()),
    )


@contextmanager
def _input_bytes(modules: list[torch.nn.Module]) -> Iterator[list[int]]:
    """Sizes of what these modules are given inside the block; what several are given in turn is kept once."""
    sizes: list[int] = []
    last = None

    def before_call(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal last
        given = args[0] if args else next(iter(kwargs.values()))
        if given is not last:
            sizes.append(given.numel() * given.element_size())
        last = given

    handles = [module.register_forward_pre_hook(before_call, with_kwargs=True) for module in modules]
    try:
        yield sizes
    finally:
        for handle in handles:
            handle.remove()


def _readable(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
