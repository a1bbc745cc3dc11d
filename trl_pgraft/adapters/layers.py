# SPDX-License-Identifier: Apache-2.0

"""PEFT's layers in a denoiser: which there are, which adapters take part, and what keeps these from acting."""

from collections.abc import Sequence

import torch
from diffusers.hooks import HookRegistry, ModelHook
from peft.tuners.tuners_utils import BaseTunerLayer

from ..pipelines.denoiser_format import uncompiled


LAYERWISE_CASTING = "layerwise_casting"  # diffusers' name of that hook


def tuner_layers(denoiser: torch.nn.Module, name: str | None = None) -> list[BaseTunerLayer]:
    """PEFT layers of the denoiser: all of them, or those that hold adapter `name` where it is given."""
    layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
    if name is None:
        return layers
    return [layer for layer in layers if any(name in getattr(layer, part) for part in layer.adapter_layer_names)]


def active_adapters(denoiser: torch.nn.Module) -> list[str]:
    """Names of the adapters that take part in the forward pass."""
    layers = [layer for layer in tuner_layers(denoiser) if not layer.disable_adapters]
    return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))


def active_scales(denoiser: torch.nn.Module) -> list[tuple[str, float | None]]:
    """Which adapters take part and with what scales, which their weights do not show."""
    found = {
        (name, getattr(layer, "scaling", {}).get(name))
        for layer in tuner_layers(denoiser)
        if not layer.disable_adapters
        for name in layer.active_adapters
    }
    return sorted(found, key=str)


def check_enabled(layers: Sequence[BaseTunerLayer]) -> None:
    """Raise a `ValueError` where `disable_lora()` has switched off all adapters of these layers."""
    if any(layer.disable_adapters for layer in layers):
        raise ValueError(
            "disable_lora() has switched off all adapters of the denoiser. Call `pipeline.enable_lora()`, and choose "
            "with `pipeline.set_adapters` which of them are to take part."
        )


def check_layers(denoiser: torch.nn.Module, can_cache: bool = True) -> None:
    r"""
    Check that adapters of a denoiser act, whether they are there already or added next.

    Args:
        denoiser (`torch.nn.Module`):
            Module that the pipeline calls; perhaps compiled.
        can_cache (`bool`, *optional*, defaults to `True`):
            Whether features of one call may be used again in later ones.

    Raises:
        `ValueError`: adapters or projections were fused, or features are cached; the message says what to call.
    """
    denoiser = uncompiled(denoiser)
    kind = type(denoiser).__name__
    merged = {name for layer in tuner_layers(denoiser) for name in layer.merged_adapters}
    if merged:
        raise ValueError(
            f"{kind}: fuse_lora() has fused {', '.join(sorted(merged))} into its weights, and PEFT computes no "
            "adapter beside a fused one. Call `pipeline.unfuse_lora()`. An adapter that works at some noise levels "
            "cannot be fused; to fuse another one, call `fuse_lora` and `unload_lora_weights` before this one is "
            "loaded or trained."
        )
    fused = [path for path, module in denoiser.named_modules() if _has_fused_projections(module)]
    if fused:
        raise ValueError(
            f"{kind}: fuse_qkv_projections() has fused the projections of {len(fused)} attention layers ({fused[0]}), "
            "and adapters of single projections are not computed there. Call `unfuse_qkv_projections()` of the "
            "pipeline, or of the denoiser where the pipeline has none."
        )
    hooks = {} if can_cache else _hooks_of(denoiser)
    # Of diffusers' hooks those have a state that keep something from one call to the next.
    caches = sorted(name for name, hook in hooks.items() if type(hook).reset_state is not ModelHook.reset_state)
    if caches:
        raise ValueError(
            f"{kind}: a cache is on ({', '.join(caches)}). It uses features of one step again in later ones, "
            "computed with the adapter where that is off, or the other way round. Call `disable_cache()` of the "
            "denoiser, or load the pipeline anew if the cache was not switched on by `enable_cache`."
        )


def check_trainable(denoiser: torch.nn.Module) -> None:
    """
    Check that adapters of a denoiser act, and that gradients reach them.

    Raises:
        `ValueError`: they do not; the message says what to call.
    """
    check_layers(denoiser, can_cache=False)
    if LAYERWISE_CASTING in _hooks_of(denoiser):
        raise ValueError(
            f"{type(denoiser).__name__}: enable_layerwise_casting() casts its weights back after each layer, and the "
            "backward pass needs them as they were. Train without it, and switch it on for sampling alone."
        )


def _has_fused_projections(module: torch.nn.Module) -> bool:
    """Whether an attention layer computes q, k and v by a copy of their weights."""
    # diffusers' older attention layer keeps the flag when its processor has been put back.
    fused = getattr(module, "fused_projections", False)
    return fused and (hasattr(module, "unfuse_projections") or "Fused" in type(module.processor).__name__)


def _hooks_of(denoiser: torch.nn.Module) -> dict[str, ModelHook]:
    """diffusers' hooks on the denoiser's modules, one of each name."""
    registries = [v for module in denoiser.modules() for v in vars(module).values() if isinstance(v, HookRegistry)]
    return {name: hook for registry in registries for name, hook in registry.hooks.items()}
