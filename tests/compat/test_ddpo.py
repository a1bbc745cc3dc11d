# SPDX-License-Identifier: Apache-2.0

"""A DDPO user's script, and what each fault that it met in TRL 0.23.1 does here."""

import ast
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ddpo_defaults import DDPO_DEFAULTS
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from tiny_pipelines import ATTENTION, add_random_adapter, tiny_sd

from trl_pgraft import (
    DefaultDDPOStableDiffusionPipeline,
    GraftConfig as DDPOConfig,
    PGraftTrainer as DDPOTrainer,
    load_pgraft_adapter,
)
from trl_pgraft.adapters.lora import adapter_parameters, tuner_layers
from trl_pgraft.config import PPO_ONLY_FIELDS
from trl_pgraft.rewards import RewardError


def prompt_fn():
    return random.choice(["a cat", "a dog"]), {"kind": "animal"}


def brightness(images, prompts, metadata):
    assert images.dtype == torch.float32 and len(prompts) == len(metadata) == len(images)
    return images.mean((1, 2, 3)), {"n": len(images)}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder that holds a tiny Stable Diffusion."""
    folder = tmp_path_factory.mktemp("model")
    tiny_sd().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config(tmp_path):
    """Makes DDPO's configuration with all its small defaults but the number of steps and iterations."""

    def make(**options):
        return DDPOConfig(**{"num_epochs": 1, "sample_num_steps": 4, "output_dir": str(tmp_path / "out"), **options})

    return make


def train(config, model, reward=brightness, hook=None):
    pipeline = DefaultDDPOStableDiffusionPipeline(model)
    trainer = DDPOTrainer(config, reward, prompt_fn, pipeline, image_samples_hook=hook)
    trainer.train()
    return trainer


def weights(trainer):
    return [p.detach().clone() for p in adapter_parameters(trainer.denoiser, "pgraft")]


def equal(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def sample(pipeline, **options):
    generator = torch.Generator().manual_seed(3)
    return pipeline("a cat", num_inference_steps=4, generator=generator, output_type="pt", **options).images


def run_python(*arguments):
    """Run a script on the CPU in a fresh process."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, *map(str, arguments)]
    subprocess.run(command, check=True, env={**os.environ, **environment}, timeout=300)


# The pipeline.


def test_the_pipeline_has_what_ddpos_has(model):
    pipeline = DefaultDDPOStableDiffusionPipeline(model, pretrained_model_revision="main", use_lora=True)
    inner = pipeline.sd_pipeline
    for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        assert getattr(pipeline, name) is getattr(inner, name)
    assert isinstance(pipeline.scheduler, DDIMScheduler) and inner.safety_checker is None
    pipeline.set_progress_bar_config(disable=True)
    with pipeline.autocast():
        assert sample(pipeline).shape == (1, 3, 16, 16)
    assert not any(p.requires_grad for p in inner.unet.parameters())


def test_without_lora_the_denoiser_is_what_is_trained(model):
    pipeline = DefaultDDPOStableDiffusionPipeline(model, use_lora=False)
    assert not pipeline.use_lora and pipeline.autocast is None
    assert pipeline.get_trainable_layers() is pipeline.unet
    assert all(p.requires_grad for p in pipeline.unet.parameters())
    assert not any(p.requires_grad for part in (pipeline.vae, pipeline.text_encoder) for p in part.parameters())
    assert not tuner_layers(pipeline.unet)


@pytest.mark.parametrize("options", [{}, {"guidance_loss": "corrected"}, {"gradient_checkpointing": True}], ids=str)
def test_without_lora_all_weights_are_trained_and_the_reference_is_kept(model, config, options):
    pipeline = DefaultDDPOStableDiffusionPipeline(model, use_lora=False)
    before = {name: p.clone() for name, p in pipeline.unet.named_parameters()}
    trainer = DDPOTrainer(config(**options), brightness, prompt_fn, pipeline)
    with trainer.sampler(reference=True) as reference:
        base = sample(reference)
    trainer.train()
    tuned = adapter_parameters(pipeline.unet, "pgraft")
    assert sum(p.numel() for p in tuned) == sum(p.numel() for p in before.values()), "every weight"
    assert not any(torch.equal(old, new) for old, new in zip(before.values(), tuned, strict=True))
    kept = {name.replace("base_layer.", ""): p for name, p in pipeline.unet.named_parameters() if "base_layer" in name}
    assert kept.keys() == before.keys() and all(torch.equal(kept[name], before[name]) for name in kept)
    with trainer.sampler(reference=True) as reference:
        assert torch.equal(sample(reference), base)
    assert not torch.allclose(sample(pipeline), base, atol=1e-3)


def test_without_lora_too_the_reference_takes_over_at_the_switch(model, config):
    trainer = DDPOTrainer(config(), brightness, prompt_fn, DefaultDDPOStableDiffusionPipeline(model, use_lora=False))
    computed = []
    layer = tuner_layers(trainer.denoiser, "pgraft")[0]
    layer.base_layer.register_forward_hook(lambda *_: computed.append("reference"))
    layer.ln_tuning_layers["pgraft"].register_forward_hook(lambda *_: computed.append("tuned"))
    sample(trainer.sd_pipeline)
    assert computed == ["tuned"] * 2 + ["reference"] * 2


def test_without_lora_a_run_resumes_and_is_saved(model, config, tmp_path):
    def trained(epochs, name, **options):
        pipeline = DefaultDDPOStableDiffusionPipeline(model, use_lora=False)
        settings = config(num_epochs=epochs, train_learning_rate=1e-2, output_dir=str(tmp_path / name), **options)
        trainer = DDPOTrainer(settings, brightness, prompt_fn, pipeline)
        trainer.train()
        return trainer

    whole = trained(2, "whole", lr_scheduler_type="constant")
    trained(1, "parts")
    resumed = trained(2, "parts", resume_from_checkpoint=True)
    assert equal(weights(whole), weights(resumed))
    whole.sd_pipeline.save_pretrained(tmp_path / "saved")
    again = DefaultDDPOStableDiffusionPipeline(str(tmp_path / "saved"))
    assert again.use_lora is False and again.switch == whole.policy.switch
    torch.testing.assert_close(sample(again), sample(whole.sd_pipeline), rtol=0, atol=1e-5)
    plain = StableDiffusionPipeline.from_pretrained(model)
    with load_pgraft_adapter(plain, tmp_path / "whole" / "adapter"):
        torch.testing.assert_close(sample(plain), sample(whole.sd_pipeline), rtol=0, atol=1e-5)


IN_HALF_PRECISION = """
import sys, torch
from test_ddpo import *

pipeline = DefaultDDPOStableDiffusionPipeline(sys.argv[2], use_lora=False)
options = {"sample_num_steps": 4, "num_epochs": 2, "mixed_precision": "bf16", "output_dir": sys.argv[1]}
trainer = DDPOTrainer(DDPOConfig(**options, guidance_loss="corrected"), brightness, prompt_fn, pipeline)
before, autocast = weights(trainer), []
layer = tuner_layers(trainer.denoiser)[0]
layer.register_forward_hook(lambda *_: autocast.append(torch.is_autocast_enabled("cpu")) if layer.training else None)
trainer.train()
assert [metrics["accepted"] for metrics in trainer.history] == [1, 1]
assert all(autocast) and len(autocast) >= trainer.state.global_step == 8, "in the second iteration too"
assert {p.dtype for p in before} == {torch.float32}
assert {p.dtype for name, p in pipeline.unet.named_parameters() if "base_layer" in name} == {torch.bfloat16}
assert all(p.isfinite().all() for p in weights(trainer)) and not equal(before, weights(trainer))
assert sample(pipeline).isfinite().all()
"""


@pytest.mark.slow
def test_without_lora_half_precision_trains_float32_weights(model, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(IN_HALF_PRECISION)
    run_python(script, tmp_path / "out", model)


def test_without_lora_nothing_but_all_weights_is_trained(model, config):
    pipeline = DefaultDDPOStableDiffusionPipeline(model, use_lora=False)
    lora = LoraConfig(r=2, target_modules=ATTENTION)
    with pytest.raises(ValueError, match="peft_config: the pipeline says use_lora=False"):
        DDPOTrainer(config(), brightness, prompt_fn, pipeline, peft_config=lora)
    add_random_adapter(pipeline.unet, "style")
    with pytest.raises(ValueError, match="use_lora=False: UNet2DConditionModel.*adapters, which must be fused"):
        DDPOTrainer(config(), brightness, prompt_fn, pipeline)


def test_trainable_layers_are_a_lora_of_rank_4_and_the_trainer_trains_it(model, config):
    pipeline = DefaultDDPOStableDiffusionPipeline(model)
    assert pipeline.get_trainable_layers() is pipeline.get_trainable_layers() is pipeline.unet
    parameters = adapter_parameters(pipeline.unet, "pgraft")
    assert {p.shape[0] if p.shape[0] < p.shape[1] else p.shape[1] for p in parameters} == {4}
    trainer = DDPOTrainer(config(control_adapter=False), brightness, prompt_fn, pipeline)
    before = weights(trainer)
    trainer.train()
    assert all(p is q for p, q in zip(parameters, adapter_parameters(trainer.denoiser, "pgraft"), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))
    with pytest.raises(ValueError, match="peft_config: the pipeline has an adapter 'pgraft' already"):
        lora = LoraConfig(r=2, target_modules=ATTENTION)
        DDPOTrainer(config(), brightness, prompt_fn, pipeline, peft_config=lora)


def test_by_default_what_a_control_leaves_is_added_to_the_pipelines_lora(model, config):
    pipeline = DefaultDDPOStableDiffusionPipeline(model)
    pipeline.get_trainable_layers()
    trainer = DDPOTrainer(config(num_epochs=2), brightness, prompt_fn, pipeline)
    trainer.train()
    assert trainer.finetuner.has_control and list(trainer.denoiser.peft_config) == ["pgraft"]
    assert trainer.denoiser.peft_config["pgraft"].r == 4 * (1 + 2 * 2), "its own rank, and twice that per iteration"


def test_a_call_of_the_pipeline_samples_from_the_tuned_model(model, config):
    trainer = train(config(train_learning_rate=0.1, control_adapter=False), model)
    tuned = sample(trainer.sd_pipeline, guidance_scale=5.0)
    with trainer.sampler() as pipeline:
        assert torch.equal(tuned, sample(pipeline, guidance_scale=5.0))
    assert not torch.allclose(tuned, sample(DefaultDDPOStableDiffusionPipeline(model), guidance_scale=5.0), atol=1e-3)


def test_a_lora_beside_the_model_is_loaded_and_becomes_part_of_the_reference(tmp_path):
    tuned = tiny_sd()
    add_random_adapter(tuned.unet, "default", alpha=4)
    expected = sample(tuned)
    lora = {k: v for k, v in tuned.unet.state_dict().items() if "lora" in k}
    base = tiny_sd()
    base.save_pretrained(tmp_path)
    assert not torch.allclose(sample(base), expected, atol=1e-2)
    base.save_lora_weights(tmp_path, unet_lora_layers={k.replace(".default", ""): v for k, v in lora.items()})
    pipeline = DefaultDDPOStableDiffusionPipeline(str(tmp_path), use_lora=False)
    assert pipeline.use_lora, "as in DDPO, what lies there decides"
    torch.testing.assert_close(sample(pipeline), expected, rtol=0, atol=1e-4)
    pipeline.save_pretrained(tmp_path / "again")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(sample(again), expected, rtol=0, atol=1e-4)


# The script.


def test_a_script_with_ddpos_defaults_trains(model, config):
    seen = []
    trainer = train(config(), model, hook=lambda *arguments: seen.append(arguments))
    ((image_data, global_step, tracker),) = seen
    assert len(image_data) == 2 and global_step == 0
    for images, prompts, metadata, rewards, reward_metadata in image_data:
        assert images.shape == (1, 3, 16, 16) and prompts[0] in ("a cat", "a dog")
        assert metadata == ({"kind": "animal"},) and reward_metadata == {"n": 1}
        assert rewards[0].item() == pytest.approx(images.mean().item(), abs=1e-6)
    (metrics,) = trainer.history
    assert metrics["accepted"] == 1 and trainer.state.global_step == 4, "of a group of two; one step a timestep"


# The faults of TRL 0.23.1's DDPOTrainer, in the order of docs/migrating_from_ddpo.md.

WITHOUT_ACCELERATOR = """
import sys
from test_ddpo import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline, brightness, prompt_fn

config = DDPOConfig(num_epochs=1, sample_num_steps=2, output_dir=sys.argv[1])
DDPOTrainer(config, brightness, prompt_fn, DefaultDDPOStableDiffusionPipeline(sys.argv[2]))
"""


def test_fault_1_no_accelerator_is_needed_before_the_pipeline_and_no_hook(model, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(WITHOUT_ACCELERATOR)
    run_python(script, tmp_path / "out", model)


def test_fault_2_the_trainer_saves(model, config, tmp_path):
    trainer = train(config(), model)
    trainer.save_pretrained(tmp_path / "saved")
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    load_pgraft_adapter(pipeline, tmp_path / "saved")
    saved = [p.detach() for p in adapter_parameters(pipeline.unet, "pgraft")]
    assert equal(saved, weights(trainer))


def test_fault_3_fields_that_were_never_read_are_read(model, config):
    pytest.importorskip("tensorboard")
    options = {"logdir": "here", "run_name": "mine", "num_checkpoint_limit": 1, "num_epochs": 2}
    trainer = train(config(**options, log_with="tensorboard"), model)
    assert list((trainer.output_dir / "here" / "mine").rglob("events.*"))
    assert [path.name for path in (trainer.output_dir / "checkpoints").iterdir()] == ["checkpoint_1"]
    trainer.save_model(trainer.output_dir / "model")
    assert (trainer.output_dir / "model" / "pytorch_lora_weights.safetensors").is_file()


def test_fault_4_rewards_are_computed_asynchronously(model, config, tmp_path):
    options = {"sample_num_batches_per_epoch": 4, "samples_per_prompt": 4}
    one = train(config(**options, async_reward_computation=True), model)
    other = train(config(**options, output_dir=str(tmp_path / "other")), model)
    assert one.history[0]["reward"] == other.history[0]["reward"]
    assert equal(weights(one), weights(other))


def test_fault_5_a_hook_works_without_a_tracker(model, config):
    def hook(image_data, global_step, tracker):
        images, prompts, _, rewards, _ = image_data[-1]
        tracker.log_images({f"{prompts[0]} {rewards[0].item():.2f}": images}, step=global_step)
        tracker.log({"reward": rewards[0].item()}, step=global_step)

    assert len(train(config(), model, hook=hook).history) == 1


def test_fault_6_a_resumed_lora_is_the_one_that_is_trained(model, config):
    first = train(config(num_epochs=2), model)
    pipeline = DefaultDDPOStableDiffusionPipeline(model)
    resumed_from = str(first.output_dir / "checkpoints")
    trainer = DDPOTrainer(config(num_epochs=3, resume_from=resumed_from), brightness, prompt_fn, pipeline)
    assert equal(weights(first), weights(trainer))
    assert list(pipeline.unet.peft_config) == ["pgraft"], "there is no second adapter"
    trainer.train()
    assert not any(torch.equal(a, b) for a, b in zip(weights(first), weights(trainer), strict=True))
    assert [metrics["epoch"] for metrics in trainer.history] == [0, 1, 2]


def test_fault_7_saving_needs_no_project_kwargs(model, config):
    settings = config()
    assert settings.project_kwargs == {}
    assert (train(settings, model).output_dir / "checkpoints" / "checkpoint_0").is_dir()


def test_the_project_kwargs_of_ddpos_example_are_heeded(model, config, tmp_path):
    project = {"logging_dir": str(tmp_path / "logs"), "automatic_checkpoint_naming": True, "total_limit": 1}
    trainer = train(config(num_epochs=2, project_kwargs={**project, "project_dir": str(tmp_path / "save")}), model)
    assert trainer.output_dir == tmp_path / "save"
    assert [path.name for path in (tmp_path / "save" / "checkpoints").iterdir()] == ["checkpoint_1"]


def test_fault_8_a_saved_lora_pipeline_comes_back(model, config, tmp_path):
    trainer = train(config(train_learning_rate=0.1), model)
    trainer.sd_pipeline.save_pretrained(tmp_path)
    again = DefaultDDPOStableDiffusionPipeline(str(tmp_path))
    assert not any(p.is_meta for p in again.unet.parameters())
    assert again.use_lora and again.switch == trainer.policy.switch
    with pytest.raises(ValueError, match="sd_pipeline: its adapter switches at timestep .*tuned_fraction"):
        DDPOTrainer(config(tuned_fraction=0.75), brightness, prompt_fn, again)
    torch.testing.assert_close(sample(again), sample(trainer.sd_pipeline), rtol=0, atol=1e-5)
    plain = StableDiffusionPipeline.from_pretrained(tmp_path)
    base = StableDiffusionPipeline.from_pretrained(model).unet.state_dict()
    assert all(torch.equal(value, base[name]) for name, value in plain.unet.state_dict().items())
    plain.load_lora_weights(tmp_path)
    assert tuner_layers(plain.unet)


ON_TWO_PROCESSES = """
import sys, torch
from test_ddpo import DDPOConfig, train, weights

config = DDPOConfig(num_epochs=2, sample_num_steps=4, save_freq=2, output_dir=sys.argv[1])
trainer = train(config, sys.argv[2])
assert trainer.accelerator.num_processes == 2
torch.save(weights(trainer), f"{sys.argv[1]}/rank{trainer.accelerator.process_index}")
"""


@pytest.fixture(scope="module")
def two_processes(model, tmp_path_factory):
    """Output folder of a run on two processes, which checkpoints on the way."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "script.py"
    script.write_text(ON_TWO_PROCESSES)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    run_python(*launch, script, folder, model)
    return folder


@pytest.mark.slow
def test_fault_9_two_processes_agree_on_the_weights(two_processes):
    one, other = (torch.load(two_processes / f"rank{rank}") for rank in (0, 1))
    assert equal(one, other) and any(p.abs().max() > 0 for p in one)


@pytest.mark.parametrize("options", [{"sample_guidance_scale": 1.0}, {"negative_prompts": ["dark", "blurred"]}])
def test_fault_10_sampling_without_guidance_and_with_negative_prompts(model, config, options):
    trainer = train(config(**options), model)
    assert trainer.policy.arguments.get("negative_prompt") in (None, "dark, blurred")
    assert all(p.isfinite().all() for p in weights(trainer))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_fault_11_a_deterministic_sampler_trains(model, config, eta):
    trainer = train(config(sample_eta=eta, train_cfg=True), model)
    assert all(p.isfinite().all() for p in weights(trainer))
    assert trainer.history[0]["skipped_steps"] == 0 and trainer.history[0]["loss"] > 0


def test_fault_12_a_reward_of_the_wrong_shape_is_explained(model, config):
    settings = config(sample_batch_size=2, sample_num_batches_per_epoch=1)
    with pytest.raises(RewardError, match="1 value.* 2 "):
        train(settings, model, reward=lambda images, prompts, metadata: (torch.ones(1), {}))


@pytest.mark.slow
def test_fault_13_several_processes_save_and_so_is_the_last_iteration(two_processes):
    assert [path.name for path in (two_processes / "checkpoints").iterdir()] == ["checkpoint_1"]
    assert (two_processes / "adapter" / "adapter_model.safetensors").is_file()


def test_fault_13_the_last_iteration_is_saved(model, config):
    trainer = train(config(num_epochs=3, save_freq=2), model)
    names = sorted(Path(path).name for path in (trainer.output_dir / "checkpoints").iterdir())
    assert names == ["checkpoint_1", "checkpoint_2"]


# The migration page.


def test_the_migration_page_has_every_field_with_its_default_and_every_fault():
    page = (Path(__file__).parents[2] / "docs" / "migrating_from_ddpo.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    fields = {name.strip("`"): (default, here) for name, default, here in (row for row in rows if len(row) == 3)}
    for name, default in DDPO_DEFAULTS.items():
        assert ast.literal_eval(fields[name][0].strip("`")) == default
    ppo_only = {name for name, (_, here) in fields.items() if here.startswith("PPO only")}
    assert "exp_name" in fields and ppo_only == set(PPO_ONLY_FIELDS)
    numbers = [int(row[0]) for row in rows if row[0].isdigit()]
    tests = {int(name.split("_")[2]) for name in globals() if name.startswith("test_fault_")}
    assert numbers == sorted(tests) == list(range(1, 14))
