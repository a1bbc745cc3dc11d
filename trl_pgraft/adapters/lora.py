# SPDX-License-Identifier: Apache-2.0

"""Adapters inside a denoiser: make them, remove them, switch them on and off."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from diffusers import ModelMixin
from peft import LNTuningConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

from .layers import active_adapters, check_enabled, check_layers, tuner_layers


ADAPTER_NAME = "pgraft"
ATTENTION_PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def add_adapter(denoiser: ModelMixin, peft_config: PeftConfig, name: str, seed: int | None = None) -> None:
    r"""
    Add a trainable adapter to the denoiser in float32 or better, next to those it has, and switch it on.

    Args:
        denoiser (`diffusers.ModelMixin`):
            Model that gets the adapter; not compiled.
        peft_config (`PeftConfig`):
            Configuration of the adapter.
        name (`str`):
            Name that the adapter gets in the denoiser.
        seed (`int`, *optional*):
            Seed of its initial values; equal seeds give equal adapters. They come from the global random state, which
            then moves on, where it is not given.

    Raises:
        `ValueError`: PEFT cannot make such an adapter in this denoiser, it has one of that name, or the adapter would
            be left out of account there, see [`check_layers`].
    """
    check_layers(denoiser)
    if tuner_layers(denoiser, name):
        raise ValueError(
            f"The name {name!r} is taken: {type(denoiser).__name__} has an adapter of that name. Give another name, "
            f"or delete that adapter first with `pipeline.delete_adapters({name!r})`, after its gate's `remove()`."
        )
    _switch_off_by_name(denoiser, name)
    active = active_adapters(denoiser)
    with torch.random.fork_rng(enabled=seed is not None), warnings.catch_warnings():
        if seed is not None:
            torch.manual_seed(seed)
        # PEFT warns of a second adapter in one model, which is meant here.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        # And of layers whose numbers of features it cannot read, which a copy of the layer does not need.
        warnings.filterwarnings("ignore", message="Unsupported layer type")
        try:
            # Some diffusers models (UNet2DModel, DiT, PixArt, HunyuanDiT) have no `add_adapter`.
            if hasattr(denoiser, "add_adapter"):
                denoiser.add_adapter(peft_config, adapter_name=name)
            else:
                inject_adapter_in_model(peft_config, denoiser, name)
        except Exception as error:
            raise ValueError(
                f"peft_config: PEFT cannot put a {type(peft_config).__name__} into this {type(denoiser).__name__} "
                f"({type(error).__name__}: {error}). LoRA, DoRA, LoHa, LoKr, OFT, BOFT, IA3 and HRA were tried."
            ) from error
    _set_all_active(denoiser, [*active, name])
    make_trainable(denoiser, name)


def switch_on(denoiser: torch.nn.Module, name: str) -> None:
    """Let adapter `name` take part in the forward pass, beside those that do."""
    _switch_off_by_name(denoiser, name)
    _set_all_active(denoiser, [*(other for other in active_adapters(denoiser) if other != name), name])


def _switch_off_by_name(denoiser: torch.nn.Module, name: str) -> None:
    """What `disable_lora()` switched off becomes inactive instead, so that `name` can take part without it."""
    layers = [layer for layer in tuner_layers(denoiser) if layer.disable_adapters]
    off = {other for layer in layers for other in layer.active_adapters} - {name}
    for layer in layers:
        _set_active(layer, [])
    if off:
        warnings.warn(
            f"disable_lora() switched off {', '.join(sorted(off))}, which stay off beside {name!r}. To switch them on "
            "call `pipeline.set_adapters` with the names of all adapters that are to take part; enable_lora() will "
            "not do it.",
            stacklevel=3,
        )


def _set_all_active(denoiser: torch.nn.Module, names: list[str]) -> None:
    for layer in tuner_layers(denoiser):
        _set_active(layer, names)


def _set_active(layer: BaseTunerLayer, names: list[str]) -> None:
    # PEFT's own switch also changes what is trainable, in all adapters of the layer.
    flags = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
    layer.set_adapter(names)
    if layer.disable_adapters:
        layer.enable_adapters(True)
    for parameter, requires_grad in flags:
        parameter.requires_grad_(requires_grad)


def make_trainable(denoiser: torch.nn.Module, name: str) -> None:
    """Let adapter `name` be trained, in float32 or better, and nothing else of the denoiser."""
    denoiser.requires_grad_(False)
    for parameter in adapter_parameters(denoiser, name):
        # Layerwise casting keeps weights in 8 bits, which torch does not promote.
        parameter.data = parameter.data.to(parameter.dtype if parameter.dtype.itemsize >= 4 else torch.float32)
        parameter.requires_grad_(True)


def remove_adapter(denoiser: ModelMixin, name: str) -> None:
    """Delete adapter `name` from the denoiser."""
    # Deleting an adapter that is on would turn another one on in its place.
    AdapterSwitch(denoiser, name).turn(False)
    if hasattr(denoiser, "delete_adapters"):
        denoiser.delete_adapters(name)
        return
    for layer in tuner_layers(denoiser, name):
        layer.delete_adapter(name)
    denoiser.peft_config.pop(name)


def default_lora_config(denoiser: torch.nn.Module, rank: int) -> LoraConfig:
    """LoRA of rank and alpha `rank` on the attention projections of `denoiser`; a `ValueError` where it has none."""
    names = {name for name, _ in denoiser.named_modules()}
    targets = [t for t in ATTENTION_PROJECTIONS if any(name.endswith(f".{t}") for name in names)]
    if not targets:
        raise ValueError(
            f"{type(denoiser).__name__} has no attention projections named {', '.join(ATTENTION_PROJECTIONS)}. Pass a "
            "`peft_config` with its own `target_modules`."
        )
    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)


def full_copy_config(denoiser: torch.nn.Module) -> LNTuningConfig:
    r"""
    Full fine-tuning as an adapter: a trained copy of every layer beside the frozen one, switched like any other.

    PEFT made this adapter for normalisation layers, and it copies layers of any kind.

    Args:
        denoiser (`torch.nn.Module`):
            A diffusers model without adapters.

    Raises:
        `ValueError`: the denoiser has adapters, or a parameter outside its innermost modules.
    """
    layers = [
        name for name, module in denoiser.named_modules() if not list(module.children()) and list(module.parameters())
    ]
    amiss = [name for name, _ in denoiser.named_parameters() if name.rpartition(".")[0] not in set(layers)]
    if amiss or tuner_layers(denoiser):
        reason = f"{amiss[0]} is in no layer of its own" if amiss else "it has adapters, which must be fused first"
        raise ValueError(f"use_lora=False: {type(denoiser).__name__} cannot be trained as a whole: {reason}.")
    return LNTuningConfig(target_modules=layers)


def adapter_parameters(denoiser: torch.nn.Module, name: str) -> list[torch.nn.Parameter]:
    """Parameters of adapter `name`, in an order that is the same after it was loaded."""
    layers = tuner_layers(denoiser, name)
    # PEFT lists DoRA's parts in another order in a layer that is loaded, and optimizers go by the order.
    parts = (getattr(layer, part) for layer in layers for part in sorted(set(layer.adapter_layer_names)))
    values = [part[name] for part in parts if name in part]
    return [p for v in values for p in ([v] if isinstance(v, torch.nn.Parameter) else v.parameters())]


class AdapterSwitch:
    r"""
    Turn one adapter of a denoiser on and off without touching the others, and put everything back.

    Args:
        denoiser (`torch.nn.Module`):
            Module with PEFT layers inside; perhaps compiled.
        name (`str`):
            Name of the adapter to switch.

    Raises:
        `ValueError`: the denoiser has no adapter of that name.
    """

    def __init__(self, denoiser: torch.nn.Module, name: str):
        self.name = name
        self._layers = tuner_layers(denoiser, name)
        if not self._layers:
            raise ValueError(f"{type(denoiser).__name__} has no adapter named {name!r}.")
        self._was_on = self.is_on

    @property
    def is_on(self) -> bool:
        """Whether the adapter takes part in the forward pass, as its layers have it: others may switch it too."""
        return self.name in self._layers[0].active_adapters and not self._layers[0].disable_adapters

    @property
    def is_merged(self) -> bool:
        """Whether it was fused into the weights of its layers."""
        return any(self.name in layer.merged_adapters for layer in self._layers)

    def turn(self, on: bool) -> None:
        """
        Switch the adapter, where that is a change; no `requires_grad` flag changes.

        Raises:
            `ValueError`: it is to be on, and `disable_lora()` has switched off all.
        """
        if on == self.is_on:
            return
        check_enabled(self._layers)
        for layer in self._layers:
            others = [name for name in layer.active_adapters if name != self.name]
            _set_active(layer, [*others, self.name] if on else others)

    def restore(self) -> None:
        """Turn the adapter on or off, as it was when the switch was made."""
        self.turn(self._was_on)


@contextmanager
def without_adapters(denoiser: torch.nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Run the denoiser without its adapters `names` inside the block, as the reference model."""
    with ExitStack() as stack:
        for name in names:
            switch = AdapterSwitch(denoiser, name)
            stack.callback(switch.restore)
            switch.turn(False)
        yield


def lora_extras(peft_config: PeftConfig) -> list[str]:
    """Settings of a LoRA that add to a layer more than two factors, so that a difference of two is no LoRA."""
    return [name for name in ("use_dora", "lora_bias") if getattr(peft_config, name, False)]


def is_plain_lora(peft_config: PeftConfig) -> bool:
    """Whether two adapters of this configuration can be subtracted from one another."""
    return isinstance(peft_config, LoraConfig) and not lora_extras(peft_config)
