# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from cases import CASES, make_trainer
from peft import LNTuningConfig, LoraConfig
from tiny_pipelines import ATTENTION

from trl_pgraft import GraftConfig, estimate_memory
from trl_pgraft.adapters.lora import adapter_parameters, add_adapter, full_copy_config
from trl_pgraft.pipelines.conditioning import record_conditioning
from trl_pgraft.pipelines.denoiser_call import replay
from trl_pgraft.pipelines.introspection import introspect


GUIDED = {"num_inference_steps": 3, "guidance_scale": 3.0}


def estimate(pipeline, peft_config=None, **options):
    return estimate_memory(pipeline, GraftConfig(sample_num_steps=3, **options), peft_config)


def test_weights_are_counted_exactly(sd):
    found = estimate(sd, LoraConfig(r=3, target_modules=ATTENTION))
    modules = (sd.unet, sd.vae, sd.text_encoder)
    assert found.pipeline == 4 * sum(p.numel() for module in modules for p in module.parameters())
    add_adapter(sd.unet, LoraConfig(r=3, target_modules=ATTENTION), "own")
    trained = sum(p.numel() for p in adapter_parameters(sd.unet, "own"))
    assert (found.adapter, found.gradients, found.optimizer) == (4 * trained, 4 * trained, 8 * trained)
    assert found.total == found.pipeline + 16 * trained + found.activations


def test_precision_and_8_bit_adam_count(sd):
    full, half = estimate(sd), estimate(sd.to(dtype=torch.bfloat16), train_use_8bit_adam=True)
    assert half.pipeline * 2 == full.pipeline and half.activations * 2 == full.activations
    assert half.adapter == full.adapter, "the adapter stays in float32"
    assert half.optimizer * 4 == full.optimizer


def test_activations_grow_with_the_batch_and_the_branches(sd):
    one = estimate(sd).activations
    assert one > 0 and estimate(sd, train_batch_size=3).activations == 3 * one
    assert estimate(sd, sample_guidance_scale=1.0).activations == one
    assert estimate(sd, guidance_loss="combined").activations == 2 * one
    assert estimate(sd, gradient_checkpointing=True).activations == 0


def test_activations_are_a_lower_bound(sd):
    """Of what autograd really keeps for one prediction, weights not counted."""
    config = LoraConfig(r=4, target_modules=ATTENTION)
    found = estimate(sd, config, train_batch_size=2).activations
    sd.unet.requires_grad_(False)
    add_adapter(sd.unet, config, "pgraft")
    call = introspect(sd, GUIDED).call
    conditioning = record_conditioning(sd, call, ["a", "b"], GUIDED).rows([0, 1], "cpu")
    weights = {p.untyped_storage().data_ptr() for p in sd.unet.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        replay(sd.unet, call, torch.randn(2, 4, 8, 8), torch.tensor([900.0, 500.0]), conditioning)
    actual = sum(size for size, _ in kept.values())
    assert 0.05 * actual < found <= actual


def test_an_estimate_is_readable_and_says_what_it_leaves_out(sd):
    text = str(estimate(sd))
    assert text.startswith("Memory of a process, at least ") and "KiB" in text and "Not counted" in text
    assert all(part in text for part in ("pipeline", "adapter", "gradients", "optimizer", "activations"))


def test_full_fine_tuning_is_a_second_set_of_weights(sd):
    found = estimate(sd, full_copy_config(sd.unet))
    assert found.adapter == 4 * sum(p.numel() for p in sd.unet.parameters())
    assert found.is_full_copy and "copy of all weights of the denoiser, a whole second set" in str(found)
    norms = LNTuningConfig(target_modules=["norm1", "norm2", "norm3"])
    for lesser in (estimate(sd), estimate(sd, norms)):
        assert not lesser.is_full_copy and "second set" not in str(lesser)


def test_of_an_offloaded_pipeline_the_denoiser_alone_counts(sd):
    plain = estimate(sd)
    sd.enable_model_cpu_offload(device="cpu")
    found = estimate(sd)
    assert found.pipeline == 4 * sum(p.numel() for p in sd.unet.parameters()) < plain.pipeline
    assert (found.adapter, found.activations) == (plain.adapter, plain.activations)


def test_estimating_leaves_the_pipeline_alone(sd):
    estimate(sd)
    assert not hasattr(sd.unet, "peft_config")
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in sd.unet.modules())


@pytest.mark.parametrize("size", [16, 32])
def test_the_size_of_images_counts(sd, size):
    found = estimate_memory(sd, GraftConfig(), pipeline_kwargs={"height": size, "width": size})
    assert (found.activations > estimate(sd).activations) == (size == 32)


def test_activations_of_a_denoiser_that_reads_values_are_unknown(tmp_path):
    """Lumina 2 reads the lengths of prompts from their masks, which have no values without its weights."""
    trainer = make_trainer(CASES["Lumina 2"], tmp_path)
    found = trainer.finetuner.memory
    assert found.activations is None and "activations unknown" in str(found)
    assert found.total == found.pipeline + found.adapter + found.gradients + found.optimizer
