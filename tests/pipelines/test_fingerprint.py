# SPDX-License-Identifier: Apache-2.0

"""Fingerprints tell pipelines apart whose samples differ, and are the same wherever the weights are."""

import warnings

import pytest
import torch
from diffusers import DiffusionPipeline
from runs import make_trainer
from tiny_pipelines import add_random_adapter, tiny_sd

from trl_pgraft import GraftConfig
from trl_pgraft.pipelines.fingerprint import (
    BLOCK,
    former_fingerprint,
    is_same_fingerprint,
    sampling_fingerprint,
    weights_of,
)


ARGUMENTS = {"num_inference_steps": 4, "guidance_scale": 3.0}


def fuse_light_lora(pipeline):
    """A LoRA of half a percent of each weight's norm, fused in."""
    for parameter in pipeline.unet.parameters():
        if parameter.ndim == 2:
            change = torch.randn(len(parameter), 1) @ torch.randn(1, parameter.shape[1])
            parameter.data += change * (0.005 * parameter.norm() / change.norm())


def flip_lowest_bit(pipeline):
    weight = pipeline.vae.decoder.conv_out.weight.data
    weight.view(torch.int32).flatten()[3] ^= 1


def swap_rows(pipeline):
    weight = pipeline.unet.conv_in.weight.data
    weight[[0, 1]] = weight[[1, 0]]


def swap_layers(pipeline):
    attention = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.to_q, attention.to_k = attention.to_k, attention.to_q


def swap_weights_of_layers(pipeline):
    attention = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.to_q.weight.data, attention.to_k.weight.data = attention.to_k.weight.data, attention.to_q.weight.data


def other_text_encoder(pipeline):
    pipeline.text_encoder.get_input_embeddings().weight.data.normal_(0, 3)


def negate_two(pipeline):
    weight = pipeline.unet.conv_in.weight.data.flatten()
    weight[:2] *= -1
    pipeline.unet.conv_in.weight.data = weight.view_as(pipeline.unet.conv_in.weight)


CHANGES = {
    fuse_light_lora: "unet",
    flip_lowest_bit: "vae",
    swap_rows: "unet",
    swap_layers: "unet",
    swap_weights_of_layers: "unet",
    other_text_encoder: "text_encoder",
    negate_two: "unet",
    lambda pipeline: add_random_adapter(pipeline.unet, "style"): "unet",
    lambda pipeline: pipeline.text_encoder.to(torch.bfloat16): "text_encoder",
}


@pytest.mark.parametrize("change, component", CHANGES.items(), ids=[c.__name__ for c in CHANGES])
def test_each_change_of_weights_is_seen_and_its_component_named(change, component):
    plain, changed = tiny_sd(), tiny_sd()
    change(changed)
    was, now = weights_of(plain), weights_of(changed)
    assert [name for name in was if was[name] != now[name]] == [component]
    assert sampling_fingerprint(plain, ARGUMENTS, 2) != sampling_fingerprint(changed, ARGUMENTS, 2)


def test_precision_is_part_of_it_and_can_be_read(sd):
    assert weights_of(sd)["unet"].startswith("float32 ")
    assert weights_of(sd.to(dtype=torch.bfloat16))["unet"].startswith("bfloat16 ")


def test_the_same_weights_have_the_same_one(sd, tmp_path):
    expected = sampling_fingerprint(sd, ARGUMENTS, 2)
    sd.save_pretrained(tmp_path)
    assert sampling_fingerprint(DiffusionPipeline.from_pretrained(tmp_path), ARGUMENTS, 2) == expected
    sd.unet.to(memory_format=torch.channels_last)
    add_random_adapter(sd.unet)
    assert sampling_fingerprint(sd, ARGUMENTS, 2) == expected
    sd.unet = torch.compile(sd.unet, backend="eager")
    assert sampling_fingerprint(sd, ARGUMENTS, 2) == expected


def test_it_is_the_same_on_every_machine_and_in_later_versions():
    """Which are to load what this one stored."""
    module = torch.nn.Linear(3, 2, bias=False)
    module.weight.data = torch.tensor([[0.0, 1.0, -2.5], [1e-3, 3.0, 7.0]])
    one = type("One", (), {"components": {"unet": module, "tokenizer": object()}})()
    assert weights_of(one) == {"unet": "float32 9d89c0f7194b9886"}


def test_adapters_that_take_part_count(sd):
    found = {sampling_fingerprint(sd, ARGUMENTS, 2, adapters=a) for a in ((), [("style", 1.0)], [("style", 0.5)])}
    assert len(found) == 3


def test_places_count_beyond_a_block():
    """Two numbers at the same place of two blocks are swapped."""
    module = torch.nn.Linear(BLOCK, 3, bias=False)
    one = type("One", (), {"components": {"unet": module}})()
    before = weights_of(one)
    weight = module.weight.data.flatten()
    weight[[5, BLOCK + 5]] = weight[[BLOCK + 5, 5]]
    module.weight.data = weight.view(3, BLOCK)
    assert weights_of(one) != before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_it_is_the_same_on_a_gpu(sd):
    expected = weights_of(sd)
    assert weights_of(sd.to("cuda")) == expected


def test_one_of_an_earlier_version_is_compared_by_what_it_knew(sd):
    now, stored = sampling_fingerprint(sd, ARGUMENTS, 2), former_fingerprint(sd, ARGUMENTS, 2)
    with pytest.warns(UserWarning, match="Not checked: text encoders, VAE") as warned:
        assert is_same_fingerprint(stored, now, lambda: stored)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not is_same_fingerprint("58dcfe5aa6dbe9ad", now, lambda: stored)
        assert is_same_fingerprint(now, now, lambda: pytest.fail("not needed"))
        assert not is_same_fingerprint("2-0", now, lambda: pytest.fail("not needed"))


def test_a_run_is_resumed_with_the_pipeline_that_it_had(tmp_path):
    size = {"sample_num_steps": 4, "sample_batch_size": 4, "sample_num_batches_per_epoch": 1, "samples_per_prompt": 4}
    config = GraftConfig(**size, num_epochs=1, lora_rank=2, control_adapter=False, output_dir=str(tmp_path))
    make_trainer(config).train()
    config.resume_from_checkpoint = True
    assert make_trainer(config).state.epoch == 1
    changed = tiny_sd()
    other_text_encoder(changed)
    with pytest.raises(ValueError, match="weights of the pipeline's text_encoder was 'float32 .* and is 'float32"):
        make_trainer(config, changed)
    with pytest.raises(ValueError, match="pipeline's unet was 'float32 .* and is 'bfloat16"):
        make_trainer(config, tiny_sd().to(dtype=torch.bfloat16))
