# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from tiny_pipelines import ATTENTION, add_random_adapter
from torch import nn

from trl_pgraft.adapters.lora import (
    AdapterSwitch,
    active_adapters,
    adapter_parameters,
    add_adapter,
    default_lora_config,
    merge_difference,
    without_adapters,
)


def predict(unet):
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 24, 16, generator=generator)
    with torch.no_grad():
        return unet(x_t, 500, encoder_hidden_states=text).sample


def weight_changes(denoiser, name):
    """What adapter `name` adds to the weight of each layer, by PEFT's own reckoning."""
    layers = {path: layer for path, layer in denoiser.named_modules() if isinstance(layer, LoraLayer)}
    return {path: layer.get_delta_weight(name).detach() for path, layer in layers.items() if name in layer.lora_A}


def add_wide_adapter(denoiser, name, seed, targets=ATTENTION):
    add_adapter(denoiser, LoraConfig(r=4, lora_alpha=12, target_modules=targets), name)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(denoiser, name):
        parameter.data.normal_(0, 0.3, generator=generator)


def test_a_new_adapter_alone_is_trainable_and_in_float32(sd):
    unet = sd.unet.to(torch.bfloat16)
    add_random_adapter(unet, "style")
    add_adapter(unet, LoraConfig(r=2, target_modules=ATTENTION), "pgraft")
    own = adapter_parameters(unet, "pgraft")
    assert {id(p) for p in unet.parameters() if p.requires_grad} == {id(p) for p in own}
    assert {p.dtype for p in own} == {torch.float32}
    assert unet.conv_in.weight.dtype == torch.bfloat16
    assert active_adapters(unet) == ["style", "pgraft"]


def test_equal_seeds_make_equal_adapters_and_leave_the_random_state_alone(sd):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        add_adapter(sd.unet, default_lora_config(sd.unet, 2), name, seed)
    assert torch.equal(torch.rand(3), expected)
    one, same, other = (adapter_parameters(sd.unet, name) for name in ("one", "same", "other"))
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_default_lora_starts_as_the_base(sd):
    base = predict(sd.unet)
    add_adapter(sd.unet, default_lora_config(sd.unet, 4), "pgraft")
    assert torch.equal(predict(sd.unet), base)


def test_default_lora_takes_the_attention_projections_that_there_are(sd, flux):
    assert set(default_lora_config(sd.unet, 4).target_modules) == set(ATTENTION)
    assert "add_q_proj" in default_lora_config(flux.transformer, 4).target_modules
    with pytest.raises(ValueError, match="peft_config.*target_modules"):
        default_lora_config(nn.Sequential(nn.Linear(2, 2)), 4)


def test_adapters_are_taken_out_inside_the_block_and_come_back_after_an_exception(sd):
    base = predict(sd.unet)
    add_random_adapter(sd.unet, "style", seed=2)
    styled = predict(sd.unet)
    add_random_adapter(sd.unet, "pgraft")
    both = predict(sd.unet)
    trainable = [p.requires_grad for p in sd.unet.parameters()]
    with pytest.raises(KeyboardInterrupt), without_adapters(sd.unet, ["pgraft"]):
        assert torch.equal(predict(sd.unet), styled)
        with without_adapters(sd.unet, ["style"]):
            assert torch.equal(predict(sd.unet), base)
        raise KeyboardInterrupt
    torch.testing.assert_close(predict(sd.unet), both)
    assert [p.requires_grad for p in sd.unet.parameters()] == trainable


def test_an_adapter_that_was_off_is_off_again(sd):
    add_random_adapter(sd.unet)
    base_switch = AdapterSwitch(sd.unet, "pgraft")
    base_switch.turn(False)
    switch = AdapterSwitch(sd.unet, "pgraft")
    switch.turn(True)
    assert switch.is_on
    switch.restore()
    assert not switch.is_on and active_adapters(sd.unet) == []


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
    base = predict(sd.unet)
    for name in ("accepted", "control"):
        add_wide_adapter(sd.unet, name, seed=2)
    merge_difference(sd.unet, "pgraft", "accepted", "control")
    torch.testing.assert_close(predict(sd.unet), base)


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
