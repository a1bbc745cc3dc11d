# SPDX-License-Identifier: Apache-2.0

"""The difference of two LoRAs as one LoRA: exact, or the best one of a smaller rank."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from runs import sample
from tiny_pipelines import ATTENTION, add_random_adapter

from trl_pgraft.adapters.lora import active_adapters, adapter_parameters, add_adapter
from trl_pgraft.adapters.merge import merge_difference


def weight_changes(denoiser, name):
    """What adapter `name` adds to the weight of each layer, by PEFT's own reckoning."""
    layers = {path: layer for path, layer in denoiser.named_modules() if isinstance(layer, LoraLayer)}
    return {path: layer.get_delta_weight(name).detach() for path, layer in layers.items() if name in layer.lora_A}


def add_wide_adapter(denoiser, name, seed, targets=ATTENTION):
    add_adapter(denoiser, LoraConfig(r=4, lora_alpha=12, target_modules=targets), name)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(denoiser, name):
        parameter.data.normal_(0, 0.3, generator=generator)


@pytest.mark.parametrize("has_policy", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1 / 3])
def test_the_merged_adapter_is_the_difference_in_every_layer(sd, scale, has_policy):
    add_random_adapter(sd.unet, "style", seed=9)
    if has_policy:
        add_random_adapter(sd.unet, "pgraft", seed=1)
    for name, seed in (("accepted", 2), ("control", 3)):
        add_wide_adapter(sd.unet, name, seed)
    changes = {name: weight_changes(sd.unet, name) for name in sd.unet.peft_config}
    merge_difference(sd.unet, "pgraft", "accepted", "control", scale)
    merged = weight_changes(sd.unet, "pgraft")
    assert merged.keys() == changes["accepted"].keys()
    for path, change in merged.items():
        expected = scale * (changes["accepted"][path] - changes["control"][path])
        expected = expected + changes["pgraft"][path] if has_policy else expected
        torch.testing.assert_close(change, expected, rtol=0, atol=1e-5)
    assert set(sd.unet.peft_config) == {"style", "pgraft"} == set(active_adapters(sd.unet))
    torch.testing.assert_close(weight_changes(sd.unet, "style"), changes["style"], rtol=0, atol=0)
    assert {id(p) for p in sd.unet.parameters() if p.requires_grad} == {
        id(p) for p in adapter_parameters(sd.unet, "pgraft")
    }


def test_the_difference_of_equal_adapters_is_nothing(sd):
    base = sample(sd)
    for name in ("accepted", "control"):
        add_wide_adapter(sd.unet, name, seed=2)
    merge_difference(sd.unet, "pgraft", "accepted", "control")
    torch.testing.assert_close(sample(sd), base)


@pytest.mark.parametrize("max_rank", [3, 6, 14])
def test_a_cut_adapter_is_the_best_approximation(sd, max_rank):
    """Attention layers have rank 8 + 4 + 4, convolutions, which the policy leaves out, 4 + 4."""
    add_random_adapter(sd.unet, "pgraft", seed=1, rank=8)
    for name, seed in (("accepted", 2), ("control", 3)):
        add_wide_adapter(sd.unet, name, seed, targets=[*ATTENTION, "conv1"])
    policy, accepted, control = (weight_changes(sd.unet, name) for name in ("pgraft", "accepted", "control"))
    merge_difference(sd.unet, "pgraft", "accepted", "control", max_rank=max_rank)
    assert sd.unet.peft_config["pgraft"].r == max_rank
    for path, change in weight_changes(sd.unet, "pgraft").items():
        exact = accepted[path] - control[path] + policy.get(path, 0)
        tail = torch.linalg.svdvals(exact.flatten(1))[max_rank:]
        error = (change - exact).flatten(1).norm()
        torch.testing.assert_close(error, tail.norm(), rtol=1e-3, atol=1e-5)


def test_layers_narrower_than_the_largest_rank_can_be_cut(sd):
    for name, seed in (("accepted", 2), ("control", 3)):
        add_random_adapter(sd.unet, name, seed, rank=20)
    accepted, control = weight_changes(sd.unet, "accepted"), weight_changes(sd.unet, "control")
    merge_difference(sd.unet, "pgraft", "accepted", "control", max_rank=24)
    for path, change in weight_changes(sd.unet, "pgraft").items():
        torch.testing.assert_close(change, accepted[path] - control[path], rtol=0, atol=1e-4)
