# SPDX-License-Identifier: Apache-2.0

"""Adapters inside a denoiser: make them, switch them on and off, subtract one from another."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from peft import LNTuningConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer


ADAPTER_NAME = "pgraft"
ATTENTION_PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


def add_adapter(denoiser: torch.nn.Module, peft_config: PeftConfig, name: str, seed: int | None = None) -> None:
    """
    Add a trainable adapter to the denoiser in float32 or better, next to those it has, and make it active.

    Args:
        denoiser (`torch.nn.Module`):
            A diffusers model.
        peft_config (`PeftConfig`):
            What `denoiser.add_adapter` takes.
        name (`str`):
            Its name.
        seed (`int`, *optional*):
            Seed of its initial values; equal seeds give equal adapters.
    """
    active = active_adapters(denoiser)
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        with warnings.catch_warnings():
            # PEFT warns of a second adapter in one model, which is meant here.
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            # And of layers whose numbers of features it cannot tell, which a copy of the layer does not need.
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            _inject(denoiser, peft_config, name)
    for layer in tuner_layers(denoiser):
        layer.set_adapter([*active, name])
    make_trainable(denoiser, name)


def make_trainable(denoiser: torch.nn.Module, name: str) -> None:
    """Let adapter `name` be trained, in float32 or better, and nothing else of the denoiser."""
    for parameter in denoiser.parameters():
        parameter.requires_grad_(False)
    for parameter in adapter_parameters(denoiser, name):
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(True)


def _inject(denoiser: torch.nn.Module, peft_config: PeftConfig, name: str) -> None:
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


def remove_adapter(denoiser: torch.nn.Module, name: str) -> None:
    """Delete adapter `name` from the denoiser."""
    if hasattr(denoiser, "delete_adapters"):
        denoiser.delete_adapters(name)
        return
    for layer in tuner_layers(denoiser, name):
        layer.delete_adapter(name)
    denoiser.peft_config.pop(name)


def default_lora_config(denoiser: torch.nn.Module, rank: int) -> LoraConfig:
    """LoRA of `rank` (and alpha) on the attention projections that `denoiser` has."""
    names = {name for name, _ in denoiser.named_modules()}
    targets = [t for t in ATTENTION_PROJECTIONS if any(name.endswith(f".{t}") for name in names)]
    if not targets:
        raise ValueError(
            f"{type(denoiser).__name__} has no attention projections named {', '.join(ATTENTION_PROJECTIONS)}. Pass a "
            "`peft_config` with its own `target_modules`."
        )
    return LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)


def full_copy_config(denoiser: torch.nn.Module) -> LNTuningConfig:
    """
    Full fine-tuning as an adapter: a trained copy of every layer beside the frozen one, switched like any other.

    PEFT made this adapter for normalisation layers; what it does, copying the layers it is told, suits all.
    """
    layers = [name for name, module in denoiser.named_modules() if not list(module.children())]
    layers = [name for name in layers if list(denoiser.get_submodule(name).parameters())]
    amiss = [name for name, _ in denoiser.named_parameters() if name.rpartition(".")[0] not in set(layers)]
    if amiss or tuner_layers(denoiser):
        reason = f"{amiss[0]} is in no layer of its own" if amiss else "it has adapters, which must be fused first"
        raise ValueError(f"use_lora=False: {type(denoiser).__name__} cannot be trained as a whole: {reason}.")
    return LNTuningConfig(target_modules=layers)


def tuner_layers(denoiser: torch.nn.Module, name: str | None = None) -> list[BaseTunerLayer]:
    """PEFT layers of the denoiser, those that hold adapter `name` where it is given."""
    layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
    if name is None:
        return layers
    return [layer for layer in layers if any(name in getattr(layer, part) for part in layer.adapter_layer_names)]


def active_adapters(denoiser: torch.nn.Module) -> list[str]:
    """Names of the adapters that take part in the forward pass."""
    return list(dict.fromkeys(name for layer in tuner_layers(denoiser) for name in layer.active_adapters))


def adapter_parameters(denoiser: torch.nn.Module, name: str) -> list[torch.nn.Parameter]:
    """Parameters of adapter `name`, in an order that is the same after it was loaded."""
    layers = tuner_layers(denoiser, name)
    # PEFT lists DoRA's parts in another order in a layer that is loaded, and optimizers go by the order.
    parts = (getattr(layer, part) for layer in layers for part in sorted(set(layer.adapter_layer_names)))
    found: list[torch.nn.Parameter] = []
    for part in parts:
        if name in part:
            value = part[name]
            found += [value] if isinstance(value, torch.nn.Parameter) else list(value.parameters())
    return found


class AdapterSwitch:
    """
    Turn one adapter of a denoiser on and off without touching the others, and put everything back.

    Args:
        denoiser (`torch.nn.Module`):
            Module with PEFT layers inside.
        name (`str`):
            The adapter to switch.

    Raises:
        `ValueError`: there is no adapter of that name.
    """

    def __init__(self, denoiser: torch.nn.Module, name: str):
        self.name = name
        self._layers = tuner_layers(denoiser, name)
        if not self._layers:
            raise ValueError(f"{type(denoiser).__name__} has no adapter named {name!r}.")
        self._was_on = self.is_on

    @property
    def is_on(self) -> bool:
        """Whether the adapter takes part in the forward pass, asked of the layers: others may switch it too."""
        return self.name in self._layers[0].active_adapters

    def turn(self, on: bool) -> None:
        """Switch the adapter, where that is a change; no `requires_grad` flag changes."""
        if on == self.is_on:
            return
        for layer in self._layers:
            others = [name for name in layer.active_adapters if name != self.name]
            # PEFT's own switch also decides what is trainable, of adapters too that came after this one.
            flags = [(parameter, parameter.requires_grad) for parameter in layer.parameters()]
            layer.set_adapter([*others, self.name] if on else others)
            for parameter, requires_grad in flags:
                parameter.requires_grad_(requires_grad)

    def restore(self) -> None:
        """The adapter as active as when the switch was made."""
        self.turn(self._was_on)


@contextmanager
def without_adapters(denoiser: torch.nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Run the denoiser without some of its adapters inside the block: the reference model."""
    switches = [AdapterSwitch(denoiser, name) for name in names]
    for switch in switches:
        switch.turn(False)
    try:
        yield
    finally:
        for switch in reversed(switches):
            switch.restore()


def low_rank_factors(layer: LoraLayer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`(A, B)` of a LoRA layer with its scaling folded into B: the weight changes by `B A`."""
    return layer.lora_A[name].weight.detach().float(), layer.lora_B[name].weight.detach().float() * layer.scaling[name]


def merge_difference(
    denoiser: torch.nn.Module, policy: str, accepted: str, control: str, scale: float = 1.0, max_rank: int = 256
) -> None:
    """
    Replace LoRA `policy` by `policy + scale (accepted - control)`, and remove the other two.

    The difference of two LoRAs is one LoRA of twice the rank, `[B_acc, -B_con] [A_acc; A_con]`, so nothing is lost; a
    result of more than `max_rank` is cut to its `max_rank` largest singular values.

    Args:
        denoiser (`torch.nn.Module`):
            Module that holds the adapters.
        policy, accepted, control (`str`):
            Names of LoRA adapters; `policy` need not exist yet.
        scale (`float`, *optional*, defaults to `1.0`):
            Factor of the difference.
        max_rank (`int`, *optional*, defaults to `256`):
            Largest rank of the result.
    """
    merged = {}
    for path, layer in denoiser.named_modules():
        if isinstance(layer, LoraLayer) and accepted in layer.lora_A:
            terms = [(accepted, scale), (control, -scale)]
            terms = [(policy, 1.0), *terms] if policy in layer.lora_A else terms
            factors = [(low_rank_factors(layer, name), factor) for name, factor in terms]
            a = torch.cat([a for (a, _), _ in factors])
            b = torch.cat([b * factor for (_, b), factor in factors], dim=1)
            merged[path] = _truncate(a, b, max_rank)
    if not merged:
        raise ValueError(f"{accepted!r} is no LoRA of linear or convolution layers; no other adapters can be merged.")
    config = denoiser.peft_config[accepted]
    rank = max(a.shape[0] for a, _ in merged.values())
    for name in (policy, accepted, control):
        if name in denoiser.peft_config:
            AdapterSwitch(denoiser, name).turn(False)
            remove_adapter(denoiser, name)
    new_config = LoraConfig(r=rank, lora_alpha=rank, target_modules=config.target_modules)
    add_adapter(denoiser, new_config, policy)
    for path, (a, b) in merged.items():
        layer = denoiser.get_submodule(path)
        # A layer of smaller rank, narrow or with a rank of its own, is filled up with zeros.
        layer.lora_A[policy].weight.data.zero_()[: len(a)] = a
        layer.lora_B[policy].weight.data.zero_()[:, : len(a)] = b


def _truncate(a: torch.Tensor, b: torch.Tensor, max_rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Best factors of rank at most `max_rank` of the product `b a`, by QR of both and an SVD of the small middle."""
    if a.shape[0] <= max_rank:
        return a, b
    q_b, r_b = torch.linalg.qr(b.flatten(1))
    q_a, r_a = torch.linalg.qr(a.flatten(1).T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s[:max_rank].sqrt()
    new_b, new_a = (q_b @ u[:, :max_rank]) * root, root[:, None] * (v[:max_rank] @ q_a.T)
    return new_a.reshape(len(root), *a.shape[1:]), new_b.reshape(b.shape[0], len(root), *b.shape[2:])


def lora_extras(peft_config: PeftConfig) -> list[str]:
    """What a LoRA's configuration asks for beyond two factors a layer, whose difference would be no LoRA."""
    return [name for name in ("use_dora", "lora_bias") if getattr(peft_config, name, False)]


def is_plain_lora(peft_config: PeftConfig) -> bool:
    """Whether two adapters of this configuration can be subtracted from one another."""
    return isinstance(peft_config, LoraConfig) and not lora_extras(peft_config)
