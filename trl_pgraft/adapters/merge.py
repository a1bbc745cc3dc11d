# SPDX-License-Identifier: Apache-2.0

"""The difference of two LoRAs, as one LoRA."""

from collections.abc import Sequence

import torch
from diffusers import ModelMixin
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from .lora import add_adapter, remove_adapter


def merge_difference(
    denoiser: ModelMixin, policy: str, accepted: str, control: str, scale: float = 1.0, max_rank: int = 256
) -> None:
    r"""
    Replace LoRA `policy` by `policy + scale (accepted - control)`, and remove the other two.

    The difference of two LoRAs is one LoRA of twice the rank, `[B_acc, -B_con] [A_acc; A_con]`, so nothing is lost; a
    result of more than `max_rank` is cut to its `max_rank` largest singular values.

    Args:
        denoiser (`diffusers.ModelMixin`):
            Module that holds the adapters; not compiled.
        policy, accepted, control (`str`):
            Names of LoRAs in the denoiser; `policy` need not be there yet.
        scale (`float`, *optional*, defaults to `1.0`):
            Factor of the difference.
        max_rank (`int`, *optional*, defaults to `256`):
            Largest rank of the result.

    Raises:
        `ValueError`: `accepted` is no LoRA of linear or convolution layers.
    """
    terms = [(policy, 1.0), (accepted, scale), (control, -scale)]
    merged = {
        path: _truncate(*_sum_of_terms(layer, terms), max_rank)
        for path, layer in denoiser.named_modules()
        if isinstance(layer, LoraLayer) and accepted in layer.lora_A
    }
    if not merged:
        raise ValueError(f"{accepted!r} is no LoRA of linear or convolution layers; no other adapters can be merged.")
    rank, targets = max(len(a) for a, _ in merged.values()), denoiser.peft_config[accepted].target_modules
    for name, _ in terms:
        if name in denoiser.peft_config:
            remove_adapter(denoiser, name)
    add_adapter(denoiser, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), policy)
    for path, (a, b) in merged.items():
        layer = denoiser.get_submodule(path)
        # A layer of smaller rank, narrow or with a rank of its own, is filled up with zeros.
        layer.lora_A[policy].weight.data.zero_()[: len(a)] = a
        layer.lora_B[policy].weight.data.zero_()[:, : len(a)] = b


def _sum_of_terms(layer: LoraLayer, terms: Sequence[tuple[str, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors `(A, B)` of the sum of a layer's LoRAs, each times its factor; the weight changes by `B A`."""
    terms = [(name, factor) for name, factor in terms if name in layer.lora_A]
    a = [layer.lora_A[name].weight.detach().float() for name, _ in terms]
    b = [layer.lora_B[name].weight.detach().float() * layer.scaling[name] * factor for name, factor in terms]
    return torch.cat(a), torch.cat(b, dim=1)


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
