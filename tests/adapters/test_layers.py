# SPDX-License-Identifier: Apache-2.0

"""A gated adapter, and training, beside what PEFT and diffusers offer: right images, or an error in words."""

import warnings

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_first_block_cache
from peft import get_peft_model_state_dict
from runs import SWITCH, make_trainer, sample
from tiny_pipelines import adapter_use, add_random_adapter, tiny_flux, tiny_sd

from trl_pgraft import GraftConfig, SwitchLevel, TimestepGate, load_pgraft_adapter, save_pgraft_adapter
from trl_pgraft.adapters.layers import active_adapters


class Models:
    """Folder of a tuned adapter and of another LoRA, and what is sampled with and without them."""

    def __init__(self, folder):
        self.tuned, self.style = folder / "tuned", folder / "style"
        donor = tiny_sd()
        add_random_adapter(donor.unet)
        save_pgraft_adapter(donor, self.tuned, SWITCH)
        donor = tiny_sd()
        add_random_adapter(donor.unet, "style", seed=2)
        style = get_peft_model_state_dict(donor.unet, adapter_name="style")
        config = donor.unet.peft_config["style"].to_dict()
        donor.save_lora_weights(self.style, unet_lora_layers=style, unet_lora_adapter_metadata=config)
        self.base, self.gated = sample(tiny_sd()), sample(self.load()[0])
        self.styled, self.both = (sample(self.with_style(gated)[0]) for gated in (False, True))

    def load(self):
        pipeline = tiny_sd()
        return pipeline, load_pgraft_adapter(pipeline, self.tuned)

    def with_style(self, gated=True):
        pipeline = tiny_sd()
        pipeline.load_lora_weights(self.style, adapter_name="style")
        return pipeline, load_pgraft_adapter(pipeline, self.tuned) if gated else None


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    found = Models(tmp_path_factory.mktemp("models"))
    images = (found.base, found.gated, found.styled, found.both)
    assert all(not torch.allclose(a, b, atol=0.02) for a in images for b in images if a is not b)
    return found


def equal(images, expected):
    return torch.allclose(images, expected, atol=1e-5)


def test_between_calls_the_adapters_are_as_the_user_has_them(models):
    pipeline, gate = models.with_style()
    assert equal(sample(pipeline), models.both)
    assert sorted(active_adapters(pipeline.unet)) == ["pgraft", "style"], "though the last step was below the switch"
    for names, expected in (["style"], "styled"), (["pgraft"], "gated"), (["style", "pgraft"], "both"):
        pipeline.set_adapters(names)
        assert equal(sample(pipeline), getattr(models, expected)), names
    pipeline.disable_lora()
    assert equal(sample(pipeline), models.base)
    pipeline.enable_lora()
    assert equal(sample(pipeline), models.both)
    pipeline.unet.disable_adapters()
    gate.remove()
    assert equal(sample(pipeline), models.base)


def test_the_gate_has_a_switch_of_its_own(models):
    pipeline, gate = models.with_style()
    gate.disable()
    assert equal(sample(pipeline), models.styled)
    gate.enable()
    assert equal(sample(pipeline), models.both)
    pipeline.set_adapters(["style"])
    gate.enable()
    assert equal(sample(pipeline), models.both)


def test_a_lora_that_disable_lora_switched_off_stays_off_and_is_named(models):
    pipeline, _ = models.with_style(gated=False)
    pipeline.disable_lora()
    with pytest.warns(UserWarning, match="switched off style.*set_adapters"):
        load_pgraft_adapter(pipeline, models.tuned)
    assert equal(sample(pipeline), models.gated)
    pipeline.set_adapters(["pgraft", "style"])
    assert equal(sample(pipeline), models.both)


def test_a_lora_loaded_after_sampling_joins(models):
    pipeline, _ = models.load()
    sample(pipeline)
    pipeline.load_lora_weights(models.style, adapter_name="style")
    with pytest.warns(UserWarning, match="style became the only active adapter"):
        assert equal(sample(pipeline), models.both)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert equal(sample(pipeline), models.both)
    pipeline.delete_adapters("style")
    assert equal(sample(pipeline), models.gated)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("names", [None, ["style"]])
def test_fused_adapters_are_refused_until_they_are_unfused(models, sampled, names):
    pipeline, _ = models.with_style()
    if sampled:
        sample(pipeline)
    pipeline.fuse_lora(adapter_names=names)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"fuse_lora.*fused .*style.*unfuse_lora"):
            sample(pipeline)
    pipeline.unfuse_lora()
    assert equal(sample(pipeline), models.both)


@pytest.mark.parametrize("unload", ["unload_lora_weights", "delete_adapters"])
def test_an_adapter_that_was_fused_and_unloaded_is_refused(models, unload):
    pipeline, gate = models.load()
    sample(pipeline)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights() if unload == "unload_lora_weights" else pipeline.delete_adapters("pgraft")
    for _ in range(2):
        with pytest.raises(ValueError, match="fused 'pgraft'|fused pgraft"):
            sample(pipeline)
    gate.remove()
    assert not equal(sample(pipeline), models.base), "that is what was fused"


def test_another_lora_is_fused_before_loading(models):
    pipeline, _ = models.with_style(gated=False)
    pipeline.fuse_lora()
    with pytest.raises(ValueError, match="fuse_lora.*unload_lora_weights"):
        load_pgraft_adapter(pipeline, models.tuned)
    pipeline.unload_lora_weights()
    load_pgraft_adapter(pipeline, models.tuned)
    torch.testing.assert_close(sample(pipeline), models.both, rtol=0, atol=1e-4)


@pytest.mark.parametrize("others", [False, True])
def test_a_deleted_adapter_takes_its_gate_along(models, others):
    pipeline, _ = models.with_style() if others else models.load()
    pipeline.delete_adapters("pgraft") if others else pipeline.unload_lora_weights()
    assert equal(sample(pipeline), models.styled if others else models.base)
    for _ in range(2):
        load_pgraft_adapter(pipeline, models.tuned)
        assert equal(sample(pipeline), models.both if others else models.gated)
        pipeline.delete_adapters("pgraft")


def test_a_name_that_is_taken_is_said_to_be(models):
    pipeline, gate = models.load()
    with pytest.raises(ValueError, match="name 'pgraft' is taken.*another name.*delete_adapters"):
        load_pgraft_adapter(pipeline, models.tuned)
    with pytest.raises(ValueError, match="has a gate.*remove"):
        TimestepGate(pipeline.unet, "pgraft", 300.0)
    assert equal(sample(pipeline), models.gated)
    gate.remove()
    pipeline.delete_adapters("pgraft")
    load_pgraft_adapter(pipeline, models.tuned)
    assert equal(sample(pipeline), models.gated)


def test_fused_projections_are_refused_until_they_are_unfused(models):
    pipeline, _ = models.load()
    pipeline.fuse_qkv_projections()
    with pytest.raises(ValueError, match="fuse_qkv_projections.*unfuse_qkv_projections"):
        sample(pipeline)
    pipeline.unfuse_qkv_projections()
    assert equal(sample(pipeline), models.gated)
    pipeline = tiny_sd()
    pipeline.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        load_pgraft_adapter(pipeline, models.tuned)


@pytest.mark.parametrize("storage, before", [(torch.bfloat16, False), (torch.float8_e4m3fn, True)])
def test_layerwise_casting_rounds_the_base_alone(models, storage, before):
    """As the same casting does without an adapter below the switch, and as rounded weights do above it."""
    pipeline, base = tiny_sd(), tiny_sd()
    base.unet.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    if before:
        pipeline.unet.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    gate = load_pgraft_adapter(pipeline, models.tuned)
    if not before:
        pipeline.unet.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    rounded = tiny_sd()
    for (name, p), other in zip(rounded.unet.named_parameters(), base.unet.parameters(), strict=True):
        p.data = other.data.float()
        assert ".lora" not in name
    load_pgraft_adapter(rounded, models.tuned)
    assert equal(sample(pipeline), sample(rounded))
    gate.disable()
    assert equal(sample(pipeline), sample(base))


# Caches. Flux is the pipeline whose denoiser takes them.

STEPS = 8


def sample_flux(pipeline):
    return pipeline(
        prompt="a cat",
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images


def caches(pipeline):
    return {
        "first block": FirstBlockCacheConfig(threshold=100.0),
        "pyramid": PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1001),
            spatial_attention_block_identifiers=("transformer_blocks",),
            current_timestep_callback=lambda: 500,
        ),
        "faster": FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1001),
            spatial_attention_block_identifiers=("transformer_blocks",),
            current_timestep_callback=lambda: 500,
            is_guidance_distilled=True,
        ),
        "mag": MagCacheConfig(num_inference_steps=STEPS, mag_ratios=torch.ones(STEPS)),
        "taylor": TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    }


@pytest.mark.parametrize("name", ["first block", "pyramid", "faster", "mag", "taylor"])
def test_caches_are_refused_while_the_adapter_switches(tmp_path, name):
    flux_switch = SwitchLevel(500.0, 0.0, 450.0, (0.001, 0.0))
    pipeline = tiny_flux()
    add_random_adapter(pipeline.transformer)
    save_pgraft_adapter(pipeline, tmp_path, flux_switch)
    pipeline, cached = tiny_flux(), tiny_flux()
    load_pgraft_adapter(pipeline, tmp_path)
    expected = sample_flux(pipeline)
    pipeline.transformer.enable_cache(caches(pipeline)[name])
    with pytest.raises(ValueError, match=r"a cache is on.*disable_cache\(\)"):
        sample_flux(pipeline)
    pipeline.transformer.disable_cache()
    assert torch.equal(sample_flux(pipeline), expected)
    cached.transformer.enable_cache(caches(cached)[name])
    with pytest.raises(ValueError, match="a cache is on"):
        load_pgraft_adapter(cached, tmp_path)


def test_a_cache_is_seen_however_it_was_switched_on_and_serves_an_adapter_of_all_levels():
    pipeline = tiny_flux()
    add_random_adapter(pipeline.transformer)
    apply_first_block_cache(pipeline.transformer, FirstBlockCacheConfig(threshold=0.01))
    tuned = sample_flux(pipeline)
    with TimestepGate(pipeline.transformer, "pgraft", None, (0.001, 0.0)):
        assert torch.equal(sample_flux(pipeline), tuned)
    with TimestepGate(pipeline.transformer, "pgraft", 500.0, (0.001, 0.0)), pytest.raises(ValueError, match="a cache"):
        sample_flux(pipeline)


def test_group_offloading_is_left_alone(models):
    for before in (True, False):
        pipeline = tiny_sd()
        steps = [lambda p: load_pgraft_adapter(p, models.tuned), offload]
        for step in reversed(steps) if before else steps:
            step(pipeline)
        assert equal(sample(pipeline), models.gated)


def offload(pipeline):
    cpu = torch.device("cpu")
    pipeline.unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


# Training.


def configuration(folder, **options):
    size = {"sample_num_steps": 4, "sample_batch_size": 4, "sample_num_batches_per_epoch": 1, "samples_per_prompt": 4}
    rest = {"num_epochs": 1, "acceptance_kwargs": {"k": 1}, "lora_rank": 2, "train_learning_rate": 0.01}
    return GraftConfig(**{**size, **rest, "output_dir": str(folder), **options})


CHANGES = {
    "fused projections": (lambda p: p.fuse_qkv_projections(), "unfuse_qkv_projections"),
    "fused adapters": (lambda p: p.fuse_lora(), "unfuse_lora"),
    "casting": (lambda p: p.unet.enable_layerwise_casting(torch.bfloat16, torch.float32), "layerwise_casting"),
}
LATER = {
    "disable_lora": (lambda p: p.disable_lora(), "switched off"),
    "set_adapters": (lambda p: p.set_adapters(["style"]), "switched off"),
    "unload": (lambda p: p.unload_lora_weights(), "removed"),
    "scale": (lambda p: p.set_adapters(["pgraft", "style"], [1.0, 0.5]), "active adapters"),
}


def no_reward(images, prompts, metadata):
    raise AssertionError("an image was sampled")


@pytest.mark.parametrize("change, words", CHANGES.values(), ids=CHANGES)
def test_training_starts_with_what_can_be_trained(tmp_path, change, words):
    pipeline = tiny_sd()
    add_random_adapter(pipeline.unet, "style")
    change(pipeline)
    with pytest.raises(ValueError, match=words):
        make_trainer(configuration(tmp_path), pipeline, no_reward)


@pytest.mark.parametrize("change, words", [*CHANGES.values(), *LATER.values()], ids=[*CHANGES, *LATER])
def test_each_iteration_sees_what_was_changed(tmp_path, change, words):
    pipeline = tiny_sd()
    add_random_adapter(pipeline.unet, "style")
    trainer = make_trainer(configuration(tmp_path, control_adapter=False), pipeline, no_reward)
    change(pipeline)
    with pytest.raises(ValueError, match=words):
        trainer.train()


@pytest.mark.parametrize("control", [True, False])
def test_training_beside_a_disabled_lora_leaves_it_off(tmp_path, control):
    pipeline, base = tiny_sd(), sample(tiny_sd())
    add_random_adapter(pipeline.unet, "style")
    pipeline.disable_lora()
    with pytest.warns(UserWarning, match="style"):
        options = {"control_adapter": control, "train_num_inner_epochs": 4, "train_learning_rate": 0.05}
        trainer = make_trainer(configuration(tmp_path, **options), pipeline)
        trainer.train()
    with trainer.sampler(reference=True):
        assert equal(sample(pipeline), base)
    with trainer.sampler(), adapter_use(pipeline.unet, "style") as use:
        assert not equal(sample(pipeline), base)
    assert not any(use.values())


def test_a_loaded_adapter_replaces_the_trained_one_and_no_inactive_one_joins(tmp_path):
    pipeline = tiny_sd()
    add_random_adapter(pipeline.unet, "style")
    pipeline.unet.set_adapters([])
    trainer = make_trainer(configuration(tmp_path, control_adapter=False), pipeline)
    trainer.train()
    trainer.policy.load_adapter(tmp_path / "adapter")
    assert active_adapters(pipeline.unet) == ["pgraft"]
