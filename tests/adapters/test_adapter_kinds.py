# SPDX-License-Identifier: Apache-2.0

"""Adapters of every kind that PEFT puts into a denoiser: trained, saved, loaded with their gate, resumed."""

import peft
import pytest
import torch
from runs import adapter_of, brightness
from tiny_pipelines import ATTENTION, tiny_flux, tiny_sd
from tiny_transformers import tiny_qwen_image

from trl_pgraft import PGraftTrainer, load_pgraft_adapter


KINDS = {
    "LoRA": peft.LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights="gaussian"),
    "DoRA": peft.LoraConfig(r=2, target_modules=ATTENTION, use_dora=True),
    "rsLoRA": peft.LoraConfig(r=2, lora_alpha=4, target_modules=ATTENTION, use_rslora=True),
    "LoHa": peft.LoHaConfig(r=2, alpha=4, target_modules=ATTENTION),
    "LoKr": peft.LoKrConfig(r=2, alpha=4, target_modules=ATTENTION),
    "OFT": peft.OFTConfig(r=0, oft_block_size=4, target_modules=ATTENTION),
    "IA3": peft.IA3Config(target_modules=["to_k", "to_v"], feedforward_modules=[]),
    "BOFT": peft.BOFTConfig(boft_block_size=4, target_modules=ATTENTION),
    "HRA": peft.HRAConfig(r=2, target_modules=ATTENTION),
}


@pytest.fixture
def make_trainer(config):
    """Makes a trainer of a small configuration in a folder, on a pipeline with an adapter of some kind."""

    def make(folder, pipeline, peft_config, **options):
        settings = config(output_dir=str(folder), **options)
        return PGraftTrainer(settings, brightness, lambda: ("a cat", {}), pipeline, peft_config=peft_config)

    return make


def sample(pipeline):
    generator = torch.Generator().manual_seed(0)
    return pipeline("a dog", num_inference_steps=4, generator=generator, output_type="pt").images


@pytest.mark.parametrize("make", [tiny_sd, tiny_flux])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_every_kind_are_trained_saved_and_loaded(tmp_path, make_trainer, kind, make):
    trainer = make_trainer(tmp_path, make(), KINDS[kind])
    before = adapter_of(trainer)
    trainer.train()
    moved = [not torch.equal(new, old) for new, old in zip(adapter_of(trainer), before, strict=True)]
    assert all(moved) and len(moved) > 0
    with trainer.sampler() as pipeline:
        expected = sample(pipeline)
    untouched = sample(make())
    assert not torch.equal(expected, untouched)
    with trainer.sampler(reference=True) as pipeline:
        assert torch.equal(sample(pipeline), untouched)
    loaded = make()
    load_pgraft_adapter(loaded, tmp_path / "adapter")
    torch.testing.assert_close(sample(loaded), expected, rtol=0, atol=1e-6)
    continued = make_trainer(tmp_path / "continued", make(), tmp_path / "adapter")
    with continued.sampler() as pipeline:
        assert torch.equal(sample(pipeline), expected)
    in_diffusers_format = (tmp_path / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    assert in_diffusers_format == (type(KINDS[kind]) is peft.LoraConfig)


@pytest.mark.parametrize("kind", ["DoRA", "LoHa", "OFT", "BOFT"])
def test_runs_with_other_adapters_resume(tmp_path, make_trainer, kind):
    whole = make_trainer(tmp_path / "whole", tiny_sd(), KINDS[kind], num_epochs=2)
    whole.train()
    make_trainer(tmp_path / "parts", tiny_sd(), KINDS[kind]).train()
    resumed = make_trainer(tmp_path / "parts", tiny_sd(), KINDS[kind], num_epochs=2, resume_from_checkpoint=True)
    assert resumed.state.epoch == 1
    resumed.train()
    for found, expected in zip(adapter_of(resumed), adapter_of(whole), strict=True):
        assert torch.equal(found, expected)


def test_a_kind_that_peft_cannot_put_into_a_denoiser_is_refused(tmp_path, make_trainer):
    vera = peft.VeraConfig(r=2, target_modules=["to_q", "to_out.0"])
    with pytest.raises(ValueError, match="peft_config: PEFT cannot put a VeraConfig into .*UNet2DConditionModel"):
        make_trainer(tmp_path, tiny_sd(), vera)


def test_a_control_takes_plain_loras_alone(tmp_path, make_trainer):
    with_bias = peft.LoraConfig(r=2, target_modules=["to_out.0"], lora_bias=True)
    for peft_config, named in ((KINDS["DoRA"], "use_dora"), (with_bias, "lora_bias")):
        with pytest.raises(ValueError, match=f"LoraConfig with {named}. Give a plain LoraConfig"):
            make_trainer(tmp_path, tiny_sd(), peft_config, control_adapter=True)
    with pytest.raises(ValueError, match="this is a LoHaConfig. Give a plain LoraConfig"):
        make_trainer(tmp_path, tiny_sd(), KINDS["LoHa"], control_adapter=True)


def test_by_default_there_is_a_control_wherever_one_can_be_subtracted(tmp_path, make_trainer):
    kinds = {kind: make_trainer(tmp_path, tiny_sd(), KINDS[kind], control_adapter=None) for kind in ("LoHa", "DoRA")}
    plain = make_trainer(tmp_path, tiny_sd(), peft.LoraConfig(r=2, target_modules=ATTENTION), control_adapter=None)
    unguided = make_trainer(tmp_path, tiny_flux(), None, control_adapter=None)
    rescaled = make_trainer(tmp_path, tiny_qwen_image(), None, control_adapter=None)
    assert plain.finetuner.has_control and unguided.finetuner.has_control
    assert not any(trainer.finetuner.has_control for trainer in (*kinds.values(), rescaled))
