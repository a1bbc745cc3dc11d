# SPDX-License-Identifier: Apache-2.0

"""Training that starts from an adapter: read, checked, continued, resumed; its reference is the pipeline without."""

import json
import shutil
from types import SimpleNamespace

import peft
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import get_peft_model
from runs import adapter_of, brightness
from safetensors.torch import load_file, save_file
from tiny_pipelines import ATTENTION, add_random_adapter, tiny_ddpm, tiny_flux, tiny_sd

from trl_pgraft import PGraftTrainer, SwitchLevel, load_pgraft_adapter, save_pgraft_adapter
from trl_pgraft.adapters.files import read_adapter, read_switch, read_switch_of_weights
from trl_pgraft.adapters.lora import AdapterSwitch, active_adapters, adapter_parameters
from trl_pgraft.adapters.warm_start import read_starting_adapter


SETTINGS = {"sample_num_steps": 4, "tuned_fraction": 0.5}


def make_trainer(config, start=None, pipeline=None, **options):
    pipeline = pipeline or tiny_sd()
    return PGraftTrainer(config, brightness, lambda: ("a cat", {}), pipeline, peft_config=start, **options)


def sample(pipeline):
    generator = torch.Generator().manual_seed(0)
    return pipeline(["a dog"], num_inference_steps=4, generator=generator, output_type="pt").images


def sampled(trainer, reference=False):
    with trainer.sampler(reference) as pipeline:
        return sample(pipeline)


@pytest.fixture
def pgraft(config, tmp_path):
    """The folder of an adapter with a large effect, of this library, trained for the upper half of four steps."""
    trainer = make_trainer(config(**SETTINGS, output_dir=str(tmp_path / "first")))
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(trainer.denoiser, "pgraft"):
        parameter.data.normal_(0, 0.3, generator=generator)
    trainer.save_model(tmp_path / "pgraft")
    return tmp_path / "pgraft"


@pytest.fixture
def plain(tmp_path):
    """The folder of a LoRA that PEFT saved, of alpha != r."""
    torch.manual_seed(1)
    options = {"r": 2, "lora_alpha": 6, "target_modules": ATTENTION, "init_lora_weights": False}
    get_peft_model(tiny_sd().unet, peft.LoraConfig(**options)).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def in_diffusers_format(folder, target):
    """The folder's adapter as diffusers' own loaders and savers know it, and nothing else."""
    pipeline = tiny_sd()
    peft_config, state = read_adapter(folder)
    metadata = {"unet_lora_adapter_metadata": peft_config.to_dict()}
    pipeline.save_lora_weights(target, unet_lora_layers=state, **metadata)
    return target


# What training starts as.


def test_it_starts_as_the_adapter_and_its_reference_is_the_pipeline_without(config, pgraft):
    trainer = make_trainer(config(**SETTINGS), str(pgraft))
    loaded = tiny_sd()
    load_pgraft_adapter(loaded, pgraft)
    base = sample(tiny_sd())
    assert torch.equal(sampled(trainer), sample(loaded)) and not torch.allclose(sample(loaded), base, atol=1e-2)
    assert torch.equal(sampled(trainer, reference=True), base)
    new = make_trainer(config(**SETTINGS))
    assert trainer.policy.fingerprint == new.policy.fingerprint
    before, optimized = adapter_of(trainer), trainer.finetuner.optimizer.param_groups[0]["params"]
    assert [id(p) for p in optimized] == [id(p) for p in adapter_parameters(trainer.denoiser, "pgraft")]
    trainer.train()
    assert not any(torch.equal(old, new) for old, new in zip(before, adapter_of(trainer), strict=True))
    assert torch.equal(sampled(trainer, reference=True), base)


def test_it_learns_on_from_where_it_was(config, pgraft):
    """With a learning rate of next to nothing the adapter that comes out is the one that went in."""
    trainer = make_trainer(config(**SETTINGS, train_learning_rate=1e-12), pgraft)
    trainer.train()
    start, found = (load_file(folder / "adapter_model.safetensors") for folder in (pgraft, trainer.adapter_dir))
    assert start.keys() == found.keys()
    for name in start:
        torch.testing.assert_close(found[name], start[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", ["PEFT", "diffusers"])
def test_an_ordinary_lora_goes_on_at_all_noise_levels(config, plain, tmp_path, form):
    folder = plain if form == "PEFT" else in_diffusers_format(plain, tmp_path / "diffusers")
    pipeline = tiny_sd()
    add_random_adapter(pipeline.unet, "style", seed=5)
    styled = sample(pipeline)
    trainer = make_trainer(config(tuned_fraction=1.0), folder, pipeline)
    assert trainer.policy.peft_config.lora_alpha == 6
    expected = tiny_sd()
    expected.load_lora_weights(in_diffusers_format(plain, tmp_path / "again"), adapter_name="plain")
    with_both = tiny_sd()
    add_random_adapter(with_both.unet, "style", seed=5)
    with_both.load_lora_weights(tmp_path / "again", adapter_name="plain")
    with_both.set_adapters(["style", "plain"])
    torch.testing.assert_close(sampled(trainer), sample(with_both), rtol=0, atol=1e-5)
    assert torch.equal(sampled(trainer, reference=True), styled)
    trainer.train()
    assert torch.equal(sampled(trainer, reference=True), styled)


def test_a_copy_of_all_weights_is_continued(config, tmp_path):
    whole = SimpleNamespace(sd_pipeline=tiny_sd(), use_lora=False)
    first = make_trainer(config(**SETTINGS, output_dir=str(tmp_path / "first")), None, whole)
    first.train()
    second = make_trainer(config(**SETTINGS), first.adapter_dir)
    assert torch.equal(sampled(second), sampled(first)) and second.policy.is_full
    assert torch.equal(sampled(second, reference=True), sample(tiny_sd()))
    before = adapter_of(second)
    second.train()
    assert not any(torch.equal(old, new) for old, new in zip(before, adapter_of(second), strict=True))


@pytest.mark.parametrize("fraction, start", [(0.5, "pgraft"), (1.0, "plain")])
def test_a_control_is_subtracted_on_top_of_it(config, request, fraction, start):
    """Fits that learn next to nothing leave the starting adapter; what others learn is added to it."""
    folder = request.getfixturevalue(start)
    options = {"control_adapter": True, "tuned_fraction": fraction, "num_epochs": 2}
    still = make_trainer(config(**options, train_learning_rate=1e-12), folder)
    expected = sampled(still)
    still.train()
    torch.testing.assert_close(sampled(still), expected, rtol=0, atol=1e-5)
    moved = make_trainer(config(**options), folder)
    assert active_adapters(moved.denoiser) == ["pgraft"]
    moved.train()
    assert (sampled(moved) - expected).abs().max() > 1e-3
    assert torch.equal(sampled(moved, reference=True), sample(tiny_sd()))


def test_it_is_said_what_is_continued(config, pgraft, capsys):
    trainer = make_trainer(config(**SETTINGS, eval_prompts=["a dog"]), pgraft)
    words = f"Training continues {pgraft}; its reference is the pipeline without it."
    assert words in capsys.readouterr().out
    trainer.train()
    trainer.create_model_card()
    text = ModelCard.load(trainer.adapter_dir / "README.md").text
    assert "Training continued an adapter on disk; its\nreference is the base model without it." in text
    assert "adapter that was continued -> tuned model" in text and str(pgraft) not in text


# From the Hub.


def test_a_repository_is_a_start(hub, config, pgraft):
    api = HfApi(token="hf_write")
    api.create_repo("ann/lora", private=True)
    api.upload_folder(repo_id="ann/lora", folder_path=pgraft)
    trainer = make_trainer(config(**SETTINGS, hub_token="hf_read"), "ann/lora")
    assert trainer.policy.start.fingerprint == make_trainer(config(**SETTINGS), pgraft).policy.start.fingerprint
    assert not any("pytorch_lora_weights" in request for request in hub.requests if "resolve" in request)
    trainer.train()
    trainer.create_model_card()
    text = ModelCard.load(trainer.adapter_dir / "README.md").text
    assert "continued [ann/lora](https://huggingface.co/ann/lora)" in text


def test_a_repository_in_diffusers_format_is_a_start(hub, config, plain, tmp_path):
    api = HfApi(token="hf_write")
    api.create_repo("ann/lora")
    api.upload_folder(repo_id="ann/lora", folder_path=in_diffusers_format(plain, tmp_path / "diffusers"))
    trainer = make_trainer(config(tuned_fraction=1.0), "ann/lora")
    own = make_trainer(config(tuned_fraction=1.0), plain)
    torch.testing.assert_close(sampled(trainer), sampled(own), rtol=0, atol=1e-5)


@pytest.mark.parametrize("source", ["ann/nonesuch", "no/such/folder", "hf_secret"])
def test_what_is_neither_folder_nor_repository_is_refused(hub, config, source):
    with pytest.raises(ValueError, match=f"'{source}' is no folder, and cannot be loaded from the Hub") as error:
        make_trainer(config(hub_token="hf_secret_token"), source)
    assert "hf_secret_token" not in str(error.value)


# Refused before anything is sampled.


def test_another_switch_level_is_refused_with_the_one_to_set(config, pgraft):
    level = read_switch(pgraft).switch_timestep
    with pytest.raises(ValueError, match=rf"switches at timestep {level:g} .*Set tuned_fraction=0.5\.$"):
        make_trainer(config(sample_num_steps=4, tuned_fraction=0.75), pgraft)
    with pytest.raises(ValueError, match=r"tuned_fraction=1 tunes all noise levels\. Set tuned_fraction=0.5\.$"):
        make_trainer(config(sample_num_steps=4, tuned_fraction=1.0), pgraft)
    with pytest.raises(ValueError, match="None of this sampler's 5 steps has that level: keep the scheduler"):
        make_trainer(config(sample_num_steps=5), pgraft)
    pipeline = tiny_sd()
    with pytest.raises(ValueError, match="was trained by a run that switches"):
        make_trainer(config(sample_num_steps=6), pgraft, pipeline)
    assert make_trainer(config(**SETTINGS), pgraft, pipeline).policy.has_adapter, "a second attempt finds it as it was"


def test_an_ordinary_adapter_is_refused_below_a_level(config, plain, tmp_path):
    for folder in (plain, in_diffusers_format(plain, tmp_path / "diffusers")):
        with pytest.raises(ValueError, match=r"has no pgraft.json, .*all noise levels.*Set tuned_fraction=1.0\.$"):
            make_trainer(config(tuned_fraction=0.5), folder)


def test_the_level_is_also_known_from_the_weights_alone(config, pgraft):
    (pgraft / "pgraft.json").unlink()
    with pytest.raises(ValueError, match="was trained by a run that switches"):
        make_trainer(config(tuned_fraction=1.0), pgraft)
    (pgraft / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="was trained by a run that switches"):
        make_trainer(config(tuned_fraction=1.0), pgraft)


def test_a_switch_level_is_the_same_from_its_file_and_from_the_weights(tmp_path):
    pipeline, switch = tiny_flux(), SwitchLevel(500.0, 0.0, 450.0, (0.001, 0.5), 1.5)
    add_random_adapter(pipeline.transformer)
    save_pgraft_adapter(pipeline, tmp_path, switch)
    weights = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
    found = [read_switch(tmp_path), *(read_switch_of_weights(tmp_path / name) for name in weights)]
    assert found == [switch] * 3 and all(isinstance(level.clock, tuple) for level in found)
    (tmp_path / "pgraft.json").unlink()
    assert read_starting_adapter(pipeline, tmp_path).switch == switch


def test_another_guidance_above_the_level_is_refused(config, pgraft):
    with pytest.raises(ValueError, match="trained with tuned_guidance_scale=None, and it is 1.0 now"):
        make_trainer(config(**SETTINGS, tuned_guidance_scale=1.0), pgraft)


def test_a_folder_without_an_adapter_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match="has no adapter: neither adapter_model.safetensors and adapter_config.json"):
        make_trainer(config(), tmp_path)


def test_a_noise_corrector_is_refused(config, plain):
    (plain / "noise_correction.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a noise corrector"):
        make_trainer(config(tuned_fraction=1.0), plain)


def test_an_adapter_of_another_model_is_refused(config, pgraft, plain, tmp_path):
    with pytest.raises(ValueError, match="do not fit FluxTransformer2DModel.*another model"):
        make_trainer(config(tuned_fraction=1.0), plain, tiny_flux())
    diffusers = in_diffusers_format(plain, tmp_path / "diffusers")
    with pytest.raises(ValueError, match="no weights that diffusers reads for FluxTransformer2DModel"):
        make_trainer(config(tuned_fraction=1.0), diffusers, tiny_flux())
    with pytest.raises(ValueError, match="DDPMPipeline reads no pytorch_lora_weights.safetensors"):
        make_trainer(config(tuned_fraction=1.0), diffusers, tiny_ddpm())


def test_weights_for_a_text_encoder_are_refused(config, plain, tmp_path):
    folder = in_diffusers_format(plain, tmp_path / "diffusers")
    path = folder / "pytorch_lora_weights.safetensors"
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({**load_file(path), name: torch.zeros(2, 16)}, path)
    with pytest.raises(ValueError, match="weights for a text encoder, e.g. text_encoder.*fuse_lora"):
        make_trainer(config(tuned_fraction=1.0), folder)


def test_what_was_trained_for_other_frozen_weights_is_refused(config, plain):
    path = plain / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": "pissa"}))
    with pytest.raises(ValueError, match="init_lora_weights='pissa' changes the frozen weights"):
        make_trainer(config(tuned_fraction=1.0), plain)


def test_reading_leaves_the_pipeline_as_it_was(plain, tmp_path):
    folder = in_diffusers_format(plain, tmp_path / "diffusers")
    pipeline = tiny_sd()
    add_random_adapter(pipeline.unet, "on", seed=5)
    add_random_adapter(pipeline.unet, "off", seed=6)
    AdapterSwitch(pipeline.unet, "off").turn(False)
    before = sample(pipeline)
    start = read_starting_adapter(pipeline, folder)
    assert torch.equal(sample(pipeline), before) and active_adapters(pipeline.unet) == ["on"]
    assert set(pipeline.unet.peft_config) == {"on", "off"} and len(start.state) == 64


# Resuming.


@pytest.mark.parametrize("control", [False, True])
def test_a_resumed_run_goes_on_from_its_checkpoint(config, pgraft, tmp_path, control):
    def make(folder, **options):
        settings = {**SETTINGS, "num_epochs": 2, "control_adapter": control, "output_dir": str(tmp_path / folder)}
        return make_trainer(config(**settings, **options), pgraft)

    whole = make("whole")
    whole.train()
    make("parts").train(epochs=1)
    moved = shutil.move(pgraft, tmp_path / "elsewhere")
    resumed = make_trainer(
        config(**SETTINGS, num_epochs=2, control_adapter=control, output_dir=str(tmp_path / "parts"),
               resume_from_checkpoint=True),
        moved,
    )  # fmt: skip
    assert resumed.state.epoch == 1
    resumed.train()
    for found, expected in zip(adapter_of(resumed), adapter_of(whole), strict=True):
        assert torch.equal(found, expected)


def test_another_start_is_another_run(config, pgraft, tmp_path):
    def make(start, **options):
        return make_trainer(config(**SETTINGS, num_epochs=2, **options), start)

    make(pgraft).train(epochs=1)
    with pytest.raises(ValueError, match="weights of the starting adapter was '.{16}' and is None"):
        make(None, resume_from_checkpoint=True)
    path = pgraft / "adapter_model.safetensors"
    save_file({name: 2 * value for name, value in load_file(path).items()}, path)
    with pytest.raises(ValueError, match="weights of the starting adapter was '.{16}' and is '.{16}'"):
        make(pgraft, resume_from_checkpoint=True)


# An adapter that the pipeline has already.


def test_a_pipeline_with_a_gate_is_refused_in_words(config, pgraft):
    for name in ("pgraft", "style"):
        pipeline = tiny_sd()
        load_pgraft_adapter(pipeline, pgraft, name=name)
        with pytest.raises(ValueError, match=f"a gate is on its denoiser and switches the adapter '{name}'.*remove"):
            make_trainer(config(**SETTINGS), None, pipeline)


@pytest.mark.parametrize("control", [False, True])
def test_a_pipelines_own_adapter_is_continued_when_its_gate_is_gone(config, pgraft, tmp_path, control):
    gates = []

    def make(**options):
        pipeline = tiny_sd()
        gates.append(load_pgraft_adapter(pipeline, pgraft))
        gates[-1].remove()
        return make_trainer(config(**SETTINGS, num_epochs=2, control_adapter=control, **options), None, pipeline)

    trainer = make()
    start = make_trainer(config(**SETTINGS), pgraft)
    assert torch.equal(sampled(trainer), sampled(start))
    assert torch.equal(sampled(trainer, reference=True), sample(tiny_sd()))
    trainer.train(epochs=1)
    assert not torch.equal(sampled(trainer), sampled(start))
    assert torch.equal(sampled(trainer, reference=True), sample(tiny_sd()))
    resumed = make(resume_from_checkpoint=True)
    assert torch.equal(sampled(resumed), sampled(trainer))


def test_a_lora_that_diffusers_loaded_is_continued(config, plain, tmp_path):
    pipeline = tiny_sd()
    pipeline.load_lora_weights(in_diffusers_format(plain, tmp_path / "diffusers"), adapter_name="pgraft")
    trainer = make_trainer(config(tuned_fraction=1.0), None, pipeline)
    start = make_trainer(config(tuned_fraction=1.0), plain)
    torch.testing.assert_close(sampled(trainer), sampled(start), rtol=0, atol=1e-5)
    assert torch.equal(sampled(trainer, reference=True), sample(tiny_sd()))
    assert {id(p) for p in pipeline.unet.parameters() if p.requires_grad} == {
        id(p) for p in adapter_parameters(pipeline.unet, "pgraft")
    }


def test_two_adapters_of_one_name_are_refused(config, pgraft):
    pipeline = tiny_sd()
    load_pgraft_adapter(pipeline, pgraft).remove()
    with pytest.raises(ValueError, match="the pipeline has an adapter 'pgraft' already"):
        make_trainer(config(**SETTINGS), pgraft, pipeline)
