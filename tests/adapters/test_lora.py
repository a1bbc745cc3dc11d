# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from peft import LoraConfig
from tiny_pipelines import ATTENTION, add_random_adapter
from torch import nn

from trl_pgraft.adapters.lora import (
    AdapterSwitch,
    active_adapters,
    adapter_parameters,
    add_adapter,
    default_lora_config,
    without_adapters,
)


def predict(unet):
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 24, 16, generator=generator)
    with torch.no_grad():
        return unet(x_t, 500, encoder_hidden_states=text).sample


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
