# SPDX-License-Identifier: Apache-2.0

"""Noise correction from data to corrector: what is learned, kept, resumed and refused."""

import json
import math
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload_with_hook
from datasets import Dataset
from hub_cases import TOKEN
from peft import LoraConfig
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_flow import MEAN, STD, STEPS, flow_data, make_config, noise_of, tiny_flow
from tiny_pipelines import tiny_flux, tiny_sd
from tiny_transformers import tiny_sd3

from trl_pgraft import InversionError, NoiseCorrectedPipeline, NoiseCorrectionTrainer
from trl_pgraft.adapters.gate import TimestepGate
from trl_pgraft.adapters.lora import adapter_parameters, add_adapter, default_lora_config
from trl_pgraft.noise_correction.correctors.network import make_network
from trl_pgraft.noise_correction.dataset import encode_images
from trl_pgraft.noise_correction.gaussianity import random_part


def trainer_of(tmp_path, dataset=None, **changes):
    return NoiseCorrectionTrainer(make_config(tmp_path, **changes), tiny_flow(), dataset or flow_data())


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.corrector.parameters])


def test_the_noise_of_the_data_is_found_and_reported(tmp_path):
    trainer = trainer_of(tmp_path)
    found = trainer.invert()
    torch.testing.assert_close(found.noise, noise_of(48), rtol=0, atol=2e-4)
    assert found.rows.tolist() == list(range(48))
    assert found.residuals.max() <= 4e-5
    report = json.loads((tmp_path / "out/inversion.json").read_text())
    assert (report["samples"], report["left_out"]) == (48, 0)
    assert report["evaluations_per_step"] > 1
    assert report["gaussianity"]["std"] == pytest.approx(STD, abs=0.05)
    assert report["gaussianity"]["normal_std"] == pytest.approx(1, abs=0.05)


def test_the_corrector_learns_the_law_of_the_noise(tmp_path):
    """Samples of the corrected pipeline are closer to the data, whose noise has mean 0.3 and deviation 0.8."""
    data = flow_data(400)
    trainer = trainer_of(
        tmp_path, data, max_steps=150, train_batch_size=64, learning_rate=5e-3, inversion_batch_size=200,
        save_steps=150, ema_decay=0.9,
    )  # fmt: skip
    corrected = trainer.train()
    noise = torch.randn(2000, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    found = trainer.corrector.correct(noise, None, {}, 2)
    assert found.mean().item() == pytest.approx(MEAN, abs=0.05)
    assert found.std().item() == pytest.approx(STD, abs=0.05)
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 150
    # E|u|^2 is c^2 + s^2 (mean^2 + std^2) without a corrector; the best one cannot be below the noise in u given x.
    uniform = 1 / 3 + 2 / 3 * (MEAN**2 + STD**2)
    assert lines[-1]["held_out/loss_uncorrected"] == pytest.approx(uniform, abs=0.06)
    assert lines[-1]["held_out/loss"] < lines[-1]["held_out/loss_uncorrected"] - 0.05
    wanted = torch.tensor(data["latents"])
    call = {"latents": noise, "num_inference_steps": STEPS, "output_type": "latent"}
    samples = [corrected(**call, corrector_steps=steps).images for steps in (0, 2)]
    plain, ours = ((s.mean() - wanted.mean()).abs() + (s.std() - wanted.std()).abs() for s in samples)
    assert ours < plain / 4


def test_what_is_inverted_is_not_inverted_again(tmp_path):
    trainer = trainer_of(tmp_path)
    first = trainer.invert()
    files = sorted((tmp_path / "out/inverted").iterdir())
    assert len(files) == 3
    made = {path: path.stat().st_mtime_ns for path in files}
    files[1].write_bytes(files[1].read_bytes()[:100])  # damaged
    with pytest.warns(UserWarning, match="noise-00000020.safetensors cannot be read .* is computed again"):
        again = trainer_of(tmp_path).invert()
    assert torch.equal(again.noise, first.noise)
    assert [path for path in files if path.stat().st_mtime_ns != made[path]] == [files[1]]


@pytest.mark.parametrize("change", [{"tolerance": 1e-4}, {"lowest_sigma": 0.2}, {"data": True}, {"model": True}])
def test_noise_of_something_else_is_not_taken(tmp_path, change):
    first = trainer_of(tmp_path).invert()
    pipeline, data = tiny_flow(seed=1 if "model" in change else 0), flow_data()
    if "data" in change:
        data = Dataset.from_dict({"latents": 0.9 * torch.tensor(data["latents"]).numpy()})
    config = make_config(tmp_path, **{n: v for n, v in change.items() if n not in ("data", "model")})
    again = NoiseCorrectionTrainer(config, pipeline, data).invert()
    assert not torch.equal(again.noise, first.noise)


def scaled_adapter(pipeline):
    pipeline.transformer.set_adapters(["style"], [0.5])


def gated(pipeline):
    TimestepGate(pipeline.transformer, "style", 500.0)


def other_text_encoder(pipeline):
    pipeline.text_encoder.text_model.final_layer_norm.weight.data.mul_(2)


@pytest.mark.parametrize("change", [scaled_adapter, gated, other_text_encoder])
def test_noise_of_the_same_weights_otherwise_used_is_not_taken(tmp_path, change):
    data = Dataset.from_dict({"latents": noise_of(2, (4, 8, 8)).numpy(), "prompt": ["a cat", "two"]})
    found = []
    for changed in (False, False, True):
        pipeline = tiny_sd3()
        add_adapter(pipeline.transformer, default_lora_config(pipeline.transformer, 4), "style", seed=0)
        for parameter in adapter_parameters(pipeline.transformer, "style"):
            parameter.data.add_(0.2)
        if changed:
            change(pipeline)
        size = {"height": 16, "width": 16, "guidance_scale": 1.0}
        trainer = NoiseCorrectionTrainer(make_config(tmp_path, tolerance=1e-4), pipeline, data, pipeline_kwargs=size)
        noise, (file,) = trainer.invert().noise, (tmp_path / "out/inverted").iterdir()
        found.append((noise, file.stat().st_mtime_ns))
    (first, made), (_, kept), (other, _) = found
    assert kept == made
    assert not torch.equal(other, first)


def test_noise_of_otherwise_encoded_images_is_not_taken(tmp_path):
    data = Dataset.from_dict({"image": [Image.new("L", (8, 8), level) for level in (10, 200)]})
    found = []
    for scale in (0.5, 0.5, 1.0):
        encode = partial(lambda scale, images: scale * noise_of(len(images)), scale)
        trainer = NoiseCorrectionTrainer(make_config(tmp_path, tolerance=1e-3), tiny_flow(), data, encode=encode)
        found.append(trainer.invert().noise)
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=0.1)


def test_skipped_steps_start_from_noised_data(tmp_path):
    """All but the first step skipped: what is inverted is one step from noised data, however they are batched."""
    trainer = trainer_of(tmp_path, lowest_sigma=0.8)
    found = trainer.invert()
    pipeline, sampler = trainer.pipeline, trainer.sampler
    sigma = 1 + sampler.steps[0]
    t = torch.full((48,), sampler.sampler.timesteps[0])
    with torch.no_grad():
        reached = found.noise + sampler.steps[0] * pipeline.unet(found.noise, t).sample
    eps = (reached - (1 - sigma) * torch.tensor(flow_data()["latents"])) / sigma
    assert (eps.mean().item(), eps.std().item()) == (pytest.approx(0, abs=0.05), pytest.approx(1, abs=0.05))
    other = trainer_of(tmp_path / "other", lowest_sigma=0.8, inversion_batch_size=7).invert()
    torch.testing.assert_close(other.noise, found.noise, rtol=0, atol=1e-4)


def steep_flow():
    """A flow whose step cannot be inverted for data above a level: its output folds."""
    pipeline = tiny_flow()
    forward = pipeline.unet.forward

    def folded(sample, timestep, *args, **kwargs):
        output = forward(sample, timestep, *args, **kwargs)
        output.sample = output.sample + 40 * (sample.clamp(min=7).square() - 49)
        return output

    pipeline.unet.forward = folded
    return pipeline


def test_samples_that_do_not_converge_stop_the_run_or_are_left_out(tmp_path):
    latents = torch.tensor(flow_data()["latents"])
    latents[[5, 30]] += 10
    data = Dataset.from_dict({"latents": latents.numpy()})
    strict = NoiseCorrectionTrainer(make_config(tmp_path), steep_flow(), data)
    with pytest.raises(InversionError, match="1 of 20 samples did not converge at step 3") as error:
        strict.invert()
    assert "rows [5] of train_dataset" in error.value.__notes__[0]
    lenient = NoiseCorrectionTrainer(make_config(tmp_path, max_unconverged=0.05), steep_flow(), data)
    found = lenient.invert()
    assert found.rows.tolist() == [row for row in range(48) if row not in (5, 30)]
    assert json.loads((tmp_path / "out/inversion.json").read_text())["left_out"] == 2
    alone = NoiseCorrectionTrainer(
        make_config(tmp_path / "alone", max_unconverged=0.5, inversion_batch_size=1), steep_flow(), data.select([4, 5])
    )
    assert alone.invert().rows.tolist() == [0]
    between = NoiseCorrectionTrainer(make_config(tmp_path / "b", max_unconverged=0.03), steep_flow(), data)
    with pytest.raises(InversionError) as error:
        between.invert()
    assert "rows [30] of train_dataset" in error.value.__notes__[0]
    assert len(list((tmp_path / "b/out/inverted").iterdir())) == 1


def test_samples_that_an_earlier_run_left_out_are_not_passed_over(tmp_path):
    latents = torch.tensor(flow_data()["latents"])
    latents[[5, 30]] += 10
    data = Dataset.from_dict({"latents": latents.numpy()})
    NoiseCorrectionTrainer(make_config(tmp_path, max_unconverged=0.05), steep_flow(), data).invert()
    strict = NoiseCorrectionTrainer(make_config(tmp_path, max_unconverged=0.03), steep_flow(), data)
    with pytest.raises(RuntimeError, match=r"2 of 48 samples .* rows \[5, 30\] .* max_unconverged=0.03"):
        strict.invert()


def test_data_that_change_from_reading_to_reading_are_refused(tmp_path):
    levels = iter(range(100))

    def change(batch):
        return {"latents": [torch.full((1, 8, 8), 0.01 * next(levels)) for _ in batch["latents"]]}

    with pytest.raises(RuntimeError, match="noise-00000000.safetensors .* without random transforms"):
        trainer_of(tmp_path, flow_data(3).with_transform(change), tolerance=0.1).invert()


# A checkpoint is of step 3, lines are of steps 2 (before it), 4 (with its pending loss) and 6 (evaluated, then saved).
@pytest.mark.parametrize("lines", [1, 2, 3])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_resumed_training_ends_as_an_uninterrupted_one(tmp_path, ema_decay, lines):
    straight = trainer_of(tmp_path / "a", ema_decay=ema_decay)
    straight.train()
    broken = trainer_of(tmp_path / "b", ema_decay=ema_decay)
    original, count = broken.log, [0]

    def stop_late(metrics):
        original(metrics)
        count[0] += 1
        if count[0] == lines:
            raise KeyboardInterrupt

    broken.log = stop_late
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = trainer_of(tmp_path / "b", ema_decay=ema_decay, resume_from_checkpoint=True)
    resumed.train()
    assert torch.equal(weights(resumed), weights(straight))
    logs = [(tmp_path / run / "out/metrics.jsonl").read_text() for run in "ab"]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 3


def test_a_second_run_in_the_same_folder_leaves_the_first_ones_results_aside(tmp_path):
    trainer_of(tmp_path).train()
    folder = tmp_path / "out"
    first = (folder / "metrics.jsonl").read_text()
    with pytest.warns(UserWarning, match="metrics.jsonl, corrector moved to .*previous_1"):
        trainer_of(tmp_path, learning_rate=5e-4).train()
    lines = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines == [2, 4, 6]
    assert (folder / "previous_1/metrics.jsonl").read_text() == first
    trainer_of(tmp_path, learning_rate=5e-4, resume_from_checkpoint=True, max_steps=7).train()
    assert not (folder / "previous_2").exists()


@pytest.mark.parametrize("obstacle", ["gate", "corrector"])
def test_a_denoiser_in_which_no_lora_can_be_trained_is_refused_first(tmp_path, obstacle):
    pipeline, data = tiny_sd3(), Dataset.from_dict({"latents": noise_of(2, (4, 8, 8)).numpy(), "prompt": ["a", "b"]})
    size, config = {"height": 16, "width": 16}, make_config(tmp_path, corrector="lora", lora_rank=4, tolerance=1e-3)
    if obstacle == "gate":
        add_adapter(pipeline.transformer, default_lora_config(pipeline.transformer, 4), "style", seed=0)
        TimestepGate(pipeline.transformer, "style", 500.0)
    else:
        NoiseCorrectionTrainer(config, pipeline, data, pipeline_kwargs=size)
    with pytest.raises(ValueError, match="a TimestepGate" if obstacle == "gate" else "has a corrector already"):
        NoiseCorrectionTrainer(config, pipeline, data, pipeline_kwargs=size)
    config = make_config(tmp_path, tolerance=1e-3, max_steps=1)
    NoiseCorrectionTrainer(config, pipeline, data, pipeline_kwargs=size).train()


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    trainer_of(tmp_path).train()
    other = trainer_of(tmp_path, learning_rate=5e-4, resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="learning_rate was 0.001 and is 0.0005"):
        other.train()


def test_a_checkpoint_of_another_adapter_or_network_is_refused(tmp_path):
    data = Dataset.from_dict({"latents": noise_of(2, (4, 8, 8)).numpy(), "prompt": ["a cat", "two"]})
    for alpha, resume in ((4, False), (8, True)):
        options = {"corrector": "lora", "tolerance": 1e-3, "max_steps": 1, "resume_from_checkpoint": resume}
        trainer = NoiseCorrectionTrainer(
            make_config(tmp_path / "lora", **options), tiny_sd3(), data, pipeline_kwargs={"height": 16, "width": 16},
            peft_config=LoraConfig(r=4, lora_alpha=alpha, target_modules=["to_q", "to_v"]),
        )  # fmt: skip
        if not resume:
            trainer.train()
    with pytest.raises(ValueError, match="corrector's lora_alpha was 4 and is 8"):
        trainer.train()
    trainer_of(tmp_path).train()
    config, network = make_config(tmp_path, resume_from_checkpoint=True), make_network((1, 8, 8), 4)
    with pytest.raises(ValueError, match=r"corrector's block_out_channels was \[8, 16, 16\] and is \[4, 8, 8\]"):
        NoiseCorrectionTrainer(config, tiny_flow(), flow_data(), network=network).train()


def test_a_setting_that_a_checkpoint_is_older_than_counts_as_its_default(tmp_path):
    data = Dataset.from_dict({"latents": noise_of(2, (4, 8, 8)).numpy(), "prompt": ["a cat", "two"]})

    def train(rslora, **options):
        config = make_config(tmp_path, corrector="lora", tolerance=1e-3, **options)
        lora = LoraConfig(r=4, target_modules=["to_q", "to_v"], use_rslora=rslora)
        size = {"height": 16, "width": 16}
        NoiseCorrectionTrainer(config, tiny_sd3(), data, pipeline_kwargs=size, peft_config=lora).train()

    train(rslora=False, max_steps=1)
    path = tmp_path / "out/checkpoint.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    run = json.loads(metadata["run"])
    assert run.pop("corrector's use_rslora") is False
    save_file(load_file(path), path, {**metadata, "run": json.dumps(run)})
    with pytest.raises(ValueError, match="corrector's use_rslora was False and is True"):
        train(rslora=True, max_steps=2, resume_from_checkpoint=True)
    train(rslora=False, max_steps=2, resume_from_checkpoint=True)
    steps = [json.loads(line)["step"] for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


@pytest.mark.parametrize("make", [tiny_sd3, tiny_flux])
def test_a_lora_is_trained_on_prompts(tmp_path, make):
    pipeline = make()
    shape = (4, 8, 8) if make is tiny_sd3 else (16, 16)
    prompts = ["a cat", "two", "a cat", "one"] * 3
    data = Dataset.from_dict({"latents": noise_of(12, shape).numpy(), "prompt": prompts})
    config = make_config(tmp_path, corrector="lora", lora_rank=4, tolerance=1e-4, gradient_checkpointing=True)
    size = {"height": 16, "width": 16, "guidance_scale": 3.0}
    trainer = NoiseCorrectionTrainer(config, pipeline, data, pipeline_kwargs=size)
    before = weights(trainer).clone()
    corrected = trainer.train()
    assert not torch.equal(weights(trainer), before)
    assert all(p.dtype == torch.float32 for p in trainer.corrector.parameters)
    call = {**size, "num_inference_steps": 3, "prompt": "a cat", "output_type": "latent"}
    images = [corrected(**call, corrector_steps=n, generator=torch.Generator().manual_seed(0)).images for n in (0, 1)]
    assert not torch.equal(*images)
    loaded = NoiseCorrectedPipeline.from_pretrained(tmp_path / "out/corrector", make())
    again = loaded(**call, generator=torch.Generator().manual_seed(0)).images
    torch.testing.assert_close(again, images[1], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_compiled_denoiser_is_corrected_alike(tmp_path):
    data = Dataset.from_dict({"latents": noise_of(8, (4, 8, 8)).numpy(), "prompt": ["a cat", "two"] * 4})
    size, found = {"height": 16, "width": 16, "guidance_scale": 1.0}, []
    for is_compiled in (False, True):
        pipeline = tiny_sd3()
        if is_compiled:
            pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
        config = make_config(tmp_path / str(is_compiled), corrector="lora", lora_rank=4, tolerance=1e-4, max_steps=2)
        trainer = NoiseCorrectionTrainer(config, pipeline, data, pipeline_kwargs=size)
        trainer.train()
        found.append(weights(trainer))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)
    loaded = NoiseCorrectedPipeline.from_pretrained(tmp_path / "True/out/corrector", tiny_sd3())
    torch.testing.assert_close(torch.cat([p.flatten() for p in loaded.corrector.parameters]), found[1])


def test_guided_inversion_is_another_inversion(tmp_path):
    data = Dataset.from_dict({"latents": noise_of(4, (4, 8, 8)).numpy(), "prompt": ["a cat"] * 4})
    size = {"height": 16, "width": 16, "guidance_scale": 3.0}
    found = []
    for guided in (False, True):
        config = make_config(tmp_path / str(guided), guided=guided, corrector="lora")
        trainer = NoiseCorrectionTrainer(config, tiny_sd3(), data, pipeline_kwargs=size)
        found.append(trainer.invert().noise)
    assert not torch.allclose(*found, atol=1e-3)


def test_images_are_encoded(tmp_path):
    images = [Image.new("RGB", (8, 8), (level, 128, 0)) for level in (0, 255)]
    found = encode_images(tiny_flow(), {}, images)
    assert found.shape == (2, 1, 8, 8)
    assert found[1].mean() - found[0].mean() == pytest.approx(2 * 0.299, abs=0.01)
    pipeline = tiny_sd3()
    latents = encode_images(pipeline, {"height": 16, "width": 16}, images)
    assert latents.shape == (2, 4, 8, 8)
    config = pipeline.vae.config
    pixels = pipeline.image_processor.preprocess(images, 16, 16)
    with torch.no_grad():
        expected = (pipeline.vae.encode(pixels).latent_dist.mean - (config.shift_factor or 0)) * config.scaling_factor
    torch.testing.assert_close(latents, expected)
    pixels = torch.randint(256, (10, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = Dataset.from_dict({"image": [Image.fromarray(array) for array in pixels.numpy()]})
    config = make_config(tmp_path, tolerance=1e-3, num_inference_steps=10)
    assert len(NoiseCorrectionTrainer(config, tiny_flow(), data).invert().noise) == 10
    own = make_config(tmp_path / "own", tolerance=1e-3)
    trainer = NoiseCorrectionTrainer(own, tiny_flow(), data, encode=lambda images: noise_of(len(images)))
    found = trainer.invert().noise
    again = tiny_flow()(latents=found, num_inference_steps=STEPS, output_type="latent").images
    torch.testing.assert_close(again, noise_of(10), rtol=0, atol=0.02)


def test_arguments_of_the_call_are_checked_as_the_other_trainer_does(tmp_path):
    data = Dataset.from_dict({"latents": torch.zeros(4, 4, 8, 8).numpy(), "prompt": ["a"] * 4})
    for given in ({"generator": 1}, {"num_inference_steps": 99}, {"widht": 16}):
        with pytest.raises(ValueError, match=f"pipeline_kwargs: .*{next(iter(given))}"):
            NoiseCorrectionTrainer(make_config(tmp_path), tiny_sd3(), data, pipeline_kwargs=given)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_images_of_any_mode_are_encoded_as_the_vae_takes_them(mode):
    image = Image.new("RGB", (16, 16), (255, 255, 255))
    found = [encode_images(tiny_sd3(), {"height": 16, "width": 16}, [i]) for i in (image, image.convert(mode))]
    assert torch.equal(*found)


def test_images_are_encoded_where_an_offloaded_vae_computes():
    pipeline = tiny_sd3()
    cpu_offload_with_hook(pipeline.vae, "meta")  # as pipelines are offloaded to a GPU
    image = Image.new("RGB", (16, 16))
    assert encode_images(pipeline, {"height": 16, "width": 16}, [image]).device.type == "meta"


def test_images_of_several_sizes_are_refused_where_nothing_resizes_them():
    images = [Image.new("L", (8, 8)), Image.new("L", (8, 9))]
    with pytest.raises(ValueError, match=r"sizes \[\(8, 8\), \(8, 9\)\], and FlowPipeline has no VAE"):
        encode_images(tiny_flow(), {}, images)


@pytest.mark.parametrize("format", ["torch", "numpy"])
def test_formatted_data_are_those_of_plain_ones(tmp_path, format):
    pixels = torch.randint(256, (2, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    data = Dataset.from_dict({"image": [Image.fromarray(a) for a in pixels.numpy()], "prompt": ["a cat", "two"]})
    size = {"height": 16, "width": 16, "guidance_scale": 1.0}
    found = []
    for name, dataset in (("plain", data), ("other", data.with_format(format, columns=["image"]))):
        config = make_config(tmp_path / name, tolerance=1e-3, num_inference_steps=10)
        found.append(NoiseCorrectionTrainer(config, tiny_sd3(), dataset, pipeline_kwargs=size).invert().noise)
    assert torch.equal(*found)
    data = Dataset.from_dict({"latents": noise_of(2, (4, 8, 8)).numpy(), "prompt": ["a cat", "two"]})
    config = make_config(tmp_path / "latents", max_steps=1, tolerance=1e-3, corrector="lora", lora_rank=4)
    trainer = NoiseCorrectionTrainer(config, tiny_sd3(), data.with_format(format), pipeline_kwargs=size)
    trainer.train()
    assert trainer.finetuner.data.prompts.tolist() == [0, 1]


def test_encoding_needs_no_gradients(tmp_path):
    def encode(images):
        assert not torch.is_grad_enabled()
        return noise_of(len(images))

    data = Dataset.from_dict({"image": [Image.new("L", (8, 8))] * 2})
    config = make_config(tmp_path, tolerance=1e-3)
    assert len(NoiseCorrectionTrainer(config, tiny_flow(), data, encode=encode).invert().noise) == 2


def test_what_is_compared_with_standard_noise_is_a_random_part_and_not_too_much():
    noise = torch.arange(30_000.0)[:, None]
    found = random_part(noise, 0)
    assert len(found) == 10_000 and found.mean().item() == pytest.approx(15_000, rel=0.03)
    assert torch.equal(random_part(noise[:50], 0).sort(dim=0).values, noise[:50])
    assert random_part(torch.empty(3000, 1).expand(3000, 100_000), 0).shape == (300, 100_000)
    assert len(random_part(torch.empty(50, 1).expand(50, 10_000_000), 0)) == 20


def test_prompts_are_not_encoded_for_a_network(tmp_path):
    """It does not depend on them, and of a captioned data set there are as many as images."""
    pipeline, prompts = tiny_sd3(), ["a", "b", "c", "d", "e", "f"]
    data = Dataset.from_dict({"latents": noise_of(6, (4, 8, 8)).numpy(), "prompt": prompts})
    config = make_config(tmp_path, tolerance=1e-3, inversion_batch_size=2, max_steps=1)
    trainer = NoiseCorrectionTrainer(config, pipeline, data, pipeline_kwargs={"height": 16, "width": 16})
    encode, encoded = pipeline.encode_prompt, []

    def note(*args, **kwargs):
        encoded.append(kwargs.get("prompt", args[0] if args else None))
        return encode(*args, **kwargs)

    pipeline.encode_prompt = note
    trainer.train()
    assert encoded == [["a", "b"], ["c", "d"], ["e", "f"], ["a", "b"]], "the last for the round trip"


def test_held_out_samples_are_evaluated_as_many_at_a_time_as_a_process_trains_on(tmp_path, monkeypatch):
    found, sizes = [], []
    for processes in (1, 3):
        trainer = trainer_of(tmp_path / str(processes), held_out_fraction=0.3, train_batch_size=15, max_steps=1)
        trainer.train()
        torch.nn.init.ones_(trainer.corrector.module.conv_out.bias)
        trainer.finetuner.average = None
        monkeypatch.setattr(type(trainer.accelerator), "num_processes", processes)
        trainer.corrector.module.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
        found.append(trainer.finetuner.evaluate())
        monkeypatch.undo()
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert sizes == [15] * 3 + [11] + [5] * 11 + [1]


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path):
    network = make_network((1, 8, 8), 8)
    torch.nn.init.constant_(network.conv_out.bias, math.nan)
    trainer = NoiseCorrectionTrainer(make_config(tmp_path, max_steps=20), tiny_flow(), flow_data(), network=network)
    with pytest.raises(RuntimeError, match="The last 10 optimizer steps had non-finite .* Lower learning_rate"):
        trainer.train()


def test_a_gaussian_is_fitted(tmp_path):
    data = flow_data(200)
    corrected = trainer_of(tmp_path, data, corrector="gaussian").train()
    noise = torch.randn(2000, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    found = corrected.corrector.correct(noise, None, {}, 1)
    assert found.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert found.std().item() == pytest.approx(STD, abs=0.03)
    assert "held_out/nats_gained" in (tmp_path / "out/metrics.jsonl").read_text()
    loaded = NoiseCorrectedPipeline.from_pretrained(tmp_path / "out/corrector", tiny_flow())
    assert (loaded.corrector.family, loaded.trained_for["family"]) == (corrected.corrector.family,) * 2
    assert torch.equal(loaded.corrector.correct(noise, None, {}, 1), found)


def test_a_corrector_of_an_unknown_kind_is_refused(tmp_path):
    (tmp_path / "noise_correction.json").write_text('{"corrector": "diffeomorphism"}')
    with pytest.raises(ValueError, match="kind 'diffeomorphism'; this version .* supports lora, network, gaussian"):
        NoiseCorrectedPipeline.from_pretrained(tmp_path, tiny_flow())


@pytest.mark.parametrize(
    ("choice", "message"),
    [("gaussian_full", "8 samples of 64 elements .* more samples than elements"), ("gaussian", "holds out 0 of 8")],
)
def test_too_few_samples_for_a_gaussian_are_refused_before_the_inversion(tmp_path, choice, message):
    trainer = trainer_of(tmp_path, flow_data(8), corrector=choice)
    with pytest.raises(ValueError, match=f"corrector='{choice}'.* {message}"):
        trainer.train()
    assert not (trainer.output_dir / "inverted").exists()


def test_noise_that_no_gaussian_describes_better_is_left_alone(tmp_path, hub):
    """Said when it is fitted, when it is loaded, and in the card; the pipeline then samples as it is."""
    latents = tiny_flow()(
        latents=torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        num_inference_steps=STEPS, output_type="latent",
    ).images  # fmt: skip
    data = Dataset.from_dict({"latents": latents.numpy()})
    options = {"held_out_fraction": 0.3, "inversion_batch_size": 100, "tolerance": 1e-3, "corrector": "gaussian"}
    with pytest.warns(UserWarning, match="corrector='gaussian': no Gaussian describes .* samples as it is"):
        corrected = trainer_of(tmp_path, data, **options).train()
    assert json.loads((tmp_path / "out/corrector/noise_correction.json").read_text())["corrector"] == "none"
    with pytest.warns(UserWarning, match="no Gaussian describes .* samples as it is"):
        loaded = NoiseCorrectedPipeline.from_pretrained(tmp_path / "out", tiny_flow())
    call = {"batch_size": 2, "num_inference_steps": STEPS, "output_type": "latent"}
    images = [p(**call, generator=torch.Generator().manual_seed(1)).images for p in (corrected, loaded, tiny_flow())]
    for image in images[:2]:
        torch.testing.assert_close(image, images[2], rtol=0, atol=1e-5)
    corrected.push_to_hub("none", **TOKEN)
    assert "no Gaussian describes it better than N(0, I)" in hub.repo("ann/none").files["README.md"].decode()


def test_the_report_of_the_same_noise_is_kept(tmp_path, monkeypatch):
    trainer_of(tmp_path).invert()
    before = (tmp_path / "out/inversion.json").read_text()
    monkeypatch.setattr("trl_pgraft.noise_correction.trainer.gaussianity", lambda *_: pytest.fail("again"))
    trainer_of(tmp_path, corrector="gaussian").invert()
    assert (tmp_path / "out/inversion.json").read_text() == before


def test_a_network_of_the_users_is_trained(tmp_path):
    network = make_network((1, 8, 8), 4)
    config = make_config(tmp_path)
    trainer = NoiseCorrectionTrainer(config, tiny_flow(), flow_data(), network=network)
    trainer.train()
    assert trainer.corrector.module is network
    assert network.conv_out.weight.abs().max() > 0
    assert not network.training, "what samples is what was trained and what is loaded: without dropout"


def test_it_is_pushed(tmp_path, hub):
    trainer = trainer_of(tmp_path, push_to_hub=True, hub_model_id="fixer", hub_token=TOKEN["token"])
    trainer.train()
    assert json.loads(hub.repo("ann/fixer").files["noise_correction.json"])["trained_for"]["samples"] == 48
    assert TOKEN["token"] not in "".join(p.read_text() for p in (tmp_path / "out").glob("*.json*"))


def test_arguments_are_checked_before_anything_is_inverted(tmp_path):
    data, config, lora = flow_data(2), make_config(tmp_path), make_config(tmp_path, corrector="lora")
    prompted, size = data.add_column("prompt", ["a", "b"]), {"height": 16, "width": 16}
    high = make_config(tmp_path, lowest_sigma=0.9)
    refused = [
        ((config, None, data), {}, "pipeline and train_dataset are required"),
        ((config, tiny_flow(), data.rename_column("latents", "x")), {}, "needs `image`"),
        ((config, tiny_flow(), data.select([])), {}, "empty"),
        ((config, tiny_flow(), data.to_iterable_dataset()), {}, "IterableDataset; .* not streamed"),
        ((config, tiny_sd3(), data), {}, "StableDiffusion3Pipeline takes prompts, so it needs `prompt`"),
        ((config, tiny_sd(), prompted), {"pipeline_kwargs": size}, "no Euler sampler of a flow"),
        ((lora, tiny_flow(), data), {"network": make_network((1, 8, 8), 4)}, "network: given with corrector='lora'"),
        ((config, tiny_flow(), data), {"network": torch.nn.Conv2d(1, 1, 1)}, "a Conv2d is no diffusers model"),
        ((config, tiny_flow(), data), {"peft_config": object()}, "peft_config: given with corrector='network'"),
        ((high, tiny_flow(), data), {}, "lowest_sigma=0.9: none of the 4 steps ends at .*, the first at 0.857"),
    ]
    for arguments, further, message in refused:
        with pytest.raises(ValueError, match=message):
            NoiseCorrectionTrainer(*arguments, **further)
    wrong = Dataset.from_dict({"latents": torch.zeros(2, 1, 4, 4).numpy()})
    with pytest.raises(ValueError, match="latents have shape \\(2, 1, 4, 4\\)"):
        NoiseCorrectionTrainer(config, tiny_flow(), wrong).invert()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("corrector", "unet"), ("tolerance", 0.0), ("tolerance", math.nan), ("max_unconverged", 1.0), ("max_steps", 0),
        ("ema_decay", 1.0), ("corrector_steps", -1), ("lowest_sigma", 1.0), ("mixed_precision", "fp8"),
    ],
)  # fmt: skip
def test_fields_out_of_range_are_named(tmp_path, field, value):
    with pytest.raises(ValueError, match=field):
        make_config(tmp_path, **{field: value})


# Processes of their own.


def start(folder, launcher=(), **options):
    script = Path(__file__).parents[1] / "helpers" / "noise_correction_in_process.py"
    paths = [str(script.parents[2]), str(script.parents[2] / "examples"), str(script.parent), *sys.path]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "PYTHONPATH": os.pathsep.join(paths)}
    folder.mkdir(exist_ok=True)
    command = [sys.executable, *launcher, str(script), json.dumps({"folder": str(folder), **options})]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def weights_in(folder, rank=0):
    return torch.cat([p.flatten() for p in torch.load(folder / f"weights-{rank}.pt")])


@pytest.mark.slow
@pytest.mark.parametrize("die_at", ["inversion", "training"])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, die_at):
    assert start(tmp_path / "straight").returncode == 0
    killed = start(tmp_path / "killed", die_at=die_at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed/out/inverted").glob("*.safetensors")}
    assert len(there) == (1 if die_at == "inversion" else 3)
    resumed = start(tmp_path / "killed", resume_from_checkpoint=True)
    assert resumed.returncode == 0, resumed.stderr
    assert torch.equal(weights_in(tmp_path / "killed"), weights_in(tmp_path / "straight"))
    logs = [(tmp_path / run / "out/metrics.jsonl").read_text() for run in ("killed", "straight")]
    assert logs[0] == logs[1]
    assert all(path.stat().st_mtime_ns == made for path, made in there.items())


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    assert start(tmp_path / "one", float64=True).returncode == 0
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    both = start(tmp_path / "two", launcher, float64=True)
    assert both.returncode == 0, both.stderr
    first, second = weights_in(tmp_path / "two"), weights_in(tmp_path / "two", rank=1)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, weights_in(tmp_path / "one"), rtol=0, atol=1e-6)
