# SPDX-License-Identifier: Apache-2.0

"""Adapters inside a denoiser: make them, remove them, switch them on and off."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from diffusers import ModelMixin
from peft import LNTuningConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer


ADAPTER_NAME = "pgraft"
ATTENTION_PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def add_adapter(denoiser: ModelMixin, peft_config: PeftConfig, name: str, seed: int | None = None) -> None:
    r"""
    Add a trainable adapter to the denoiser in float32 or better, next to those it has, and make it active.

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
        `ValueError`: PEFT cannot make such an adapter in this denoiser.
    """
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
    for layer in tuner_layers(denoiser):
        layer.set_adapter([*active, name])
    make_trainable(denoiser, name)


def make_trainable(denoiser: torch.nn.Module, name: str) -> None:
    """Let adapter `name` be trained, in float32 or better, and nothing else of the denoiser."""
    denoiser.requires_grad_(False)
    for parameter in adapter_parameters(denoiser, name):
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(True)


def remove_adapter(denoiser: ModelMixin, name: str) -> None:
    """Delete adapter `name` from the denoiser."""
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


def tuner_layers(denoiser: torch.nn.Module, name: str | None = None) -> list[BaseTunerLayer]:
    """PEFT layers of the denoiser: all of them, or those that hold adapter `name` where it is given."""
    layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
    if name is None:
        return layers
    return [layer for layer in layers if any(name in getattr(layer, part) for part in layer.adapter_layer_names)]


def active_adapters(denoiser: torch.nn.Module) -> list[str]:
    """Names of the adapters that take part in the forward pass."""
    return list(dict.fromkeys(name for layer in tuner_layers(denoiser) for name in layer.active_adapters))


def adapter_parameters(denoiser: torch.nn.Module, name: str) -> list[torch.nn.Parameter]:
    """Parameters of adapter `name`, in an order that is the same after it was loaded."""
    # PEFT lists DoRA's parts in another order in a layer that is loaded, and optimizers go by the order.
    parts = (
        getattr(layer, part)
        for layer in tuner_layers(denoiser, name)
        for part in sorted(set(layer.adapter_layer_names))
    )
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
        return self.name in self._layers[0].active_adapters

    def turn(self, on: bool) -> None:
        """Switch the adapter, where that is a change; no `requires_grad` flag changes."""
        if on == self.is_on:
            return
        for layer in self._layers:
            others = [name for name in layer.active_adapters if name != self.name]
            # PEFT's own switch also changes what is trainable, in adapters that were added after this one as well.
            flags = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
            layer.set_adapter([*others, self.name] if on else others)
            for parameter, requires_grad in flags:
                parameter.requires_grad_(requires_grad)

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
