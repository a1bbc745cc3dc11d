# SPDX-License-Identifier: Apache-2.0

"""Runs with less memory: the same results as without, or a refusal in words."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import compile_regions
from runs import brightness
from safetensors.torch import load_file
from tiny_pipelines import adapter_use, add_random_adapter, tiny_flux, tiny_sd

from trl_pgraft import PGraftTrainer, SwitchLevel, TimestepGate, load_pgraft_adapter, save_pgraft_adapter
from trl_pgraft.adapters.lora import adapter_parameters, tuner_layers
from trl_pgraft.pipelines.placement import device_of, offload_device


LORA_OF_4096 = 256  # bitsandbytes keeps the moments of smaller weights in float32: 256 * 16 features are just enough


@pytest.fixture
def make_trainer(config, tmp_path):
    """Makes a trainer of a small configuration in a folder of its own, on a pipeline."""

    def make(folder, pipeline, **options):
        settings = config(output_dir=str(tmp_path / folder), **options)
        return PGraftTrainer(settings, brightness, lambda: ("a cat", {}), pipeline)

    return make


def weights(trainer):
    return [p.detach().cpu().clone() for p in adapter_parameters(trainer.denoiser, "pgraft")]


def losses(trainer):
    return [metrics["loss"] for metrics in trainer.history]


def sample(pipeline):
    generator = torch.Generator().manual_seed(0)
    return pipeline("a dog", num_inference_steps=4, generator=generator, output_type="pt").images.cpu()


def assert_same_results(trainer, plain, tolerance=1e-6):
    assert losses(trainer) == pytest.approx(losses(plain), abs=tolerance)
    for found, expected in zip(weights(trainer), weights(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


# Gradient checkpointing, slices of the VAE.


def test_gradient_checkpointing_changes_no_result(make_trainer):
    calls = {}
    trainers = []
    for name in ("plain", "checkpointing"):
        pipeline, calls[name] = tiny_sd(), []
        block = pipeline.unet.up_blocks[0].resnets[0]
        block.register_forward_pre_hook(lambda *_, name=name: calls[name].append(torch.is_grad_enabled()))
        trainers.append(make_trainer(name, pipeline, num_epochs=2, gradient_checkpointing=name == "checkpointing"))
        trainers[-1].train()
    assert sum(calls["checkpointing"]) == 2 * sum(calls["plain"]) > 0, "computed again in the backward pass"
    assert_same_results(trainers[1], trainers[0])


@pytest.mark.parametrize("feature", ["enable_slicing", "enable_tiling"])
def test_decoding_in_parts_changes_no_result(make_trainer, feature):
    plain, pipeline = make_trainer("plain", tiny_sd()), tiny_sd()
    getattr(pipeline.vae, feature)()
    sizes = []
    pipeline.vae.decoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    trainer = make_trainer("parts", pipeline)
    for each in (plain, trainer):
        each.train()
    assert set(sizes) == ({1} if feature == "enable_slicing" else {4})
    assert_same_results(trainer, plain)


# Offloading.


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.5}, {"control_adapter": True}], ids=str)
def test_a_run_leaves_the_pipeline_offloaded(make_trainer, options):
    """Without a GPU offloaded modules move nowhere: what is seen here is when the hooks are on, and the results."""
    plain, pipeline = make_trainer("plain", tiny_sd(), num_epochs=2, **options), tiny_sd()
    pipeline.enable_model_cpu_offload(device="cpu")
    trainer = make_trainer("offloaded", pipeline, num_epochs=2, **options)
    offloaded_seen = []
    pipeline.unet.conv_in.register_forward_hook(
        lambda *_: offloaded_seen.append(offload_device(pipeline) is not None) if torch.is_grad_enabled() else None
    )
    for each in (plain, trainer):
        each.train()
    assert offload_device(pipeline) is not None
    assert offloaded_seen and not any(offloaded_seen)
    assert_same_results(trainer, plain)


def test_a_fit_that_fails_leaves_the_pipeline_offloaded(make_trainer):
    pipeline = tiny_sd()
    pipeline.enable_model_cpu_offload(device="cpu")
    trainer = make_trainer("failing", pipeline)

    def fail(module, args):
        assert not torch.is_grad_enabled(), "on purpose"

    pipeline.unet.conv_in.register_forward_pre_hook(fail)
    with pytest.raises(AssertionError, match="on purpose"):
        trainer.train()
    assert offload_device(pipeline) is not None


def test_offloading_to_another_device_than_the_training_is_refused(make_trainer, sd):
    sd.enable_model_cpu_offload(device="cpu:1")
    with pytest.raises(ValueError, match="enable_model_cpu_offload.. named cpu:1, and this process trains on cpu"):
        make_trainer("refused", sd)


def test_where_a_pipeline_computes_is_told(sd):
    assert offload_device(sd) is None and device_of(sd) == torch.device("cpu")
    sd.enable_model_cpu_offload(device="cpu")
    assert offload_device(sd) == device_of(sd) == torch.device("cpu:0")


def test_sequential_offload_is_refused_and_model_offload_takes_its_place(make_trainer, tmp_path):
    plain, pipeline = make_trainer("plain", tiny_sd()), tiny_sd()
    plain.train()
    pipeline.enable_sequential_cpu_offload(device="cpu")
    for attempt in (
        lambda: make_trainer("refused", pipeline),
        lambda: load_pgraft_adapter(pipeline, tmp_path / "plain" / "adapter"),
    ):
        with pytest.raises(ValueError, match=r"meta device \(conv_in.weight\).*enable_model_cpu_offload\(\) instead"):
            attempt()
    assert not hasattr(pipeline.unet, "peft_config")
    pipeline.enable_model_cpu_offload(device="cpu")
    trainer = make_trainer("model", pipeline)
    trainer.train()
    assert_same_results(trainer, plain)


def test_an_offloaded_pipeline_samples_with_a_loaded_adapter(make_trainer, tmp_path):
    make_trainer("plain", tiny_sd()).train()
    images = []
    for offload in (False, True):
        pipeline = tiny_sd()
        if offload:
            pipeline.enable_model_cpu_offload(device="cpu")
        with load_pgraft_adapter(pipeline, tmp_path / "plain" / "adapter"), adapter_use(pipeline.unet) as use:
            images.append(sample(pipeline))
        assert list(use.values()) == [True, True, False, False]
    assert torch.equal(*images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_parameters_and_optimizer_state_move_together(make_trainer):
    def places(trainer):
        state = [t for s in trainer.finetuner.optimizer.state.values() for t in s.values() if t.ndim > 0]
        return {t.device.type for t in [*adapter_parameters(trainer.denoiser, "pgraft"), *state]}

    options = {"ema_decay": 0.5, "num_epochs": 2}
    plain, pipeline = make_trainer("plain", tiny_sd(), **options), tiny_sd()
    pipeline.enable_model_cpu_offload()
    trainer = make_trainer("offloaded", pipeline, **options)
    assert {p.device.type for m in (pipeline.unet, pipeline.vae) for p in m.parameters()} == {"cpu"}
    seen = set()
    pipeline.unet.conv_in.register_forward_hook(
        lambda *_: seen.update({pipeline.vae.device.type, *places(trainer)}) if torch.is_grad_enabled() else None
    )
    trainer.train(epochs=1)
    assert places(trainer) == {"cpu"}
    trainer.train()
    assert places(trainer) == {"cpu"}
    assert "cuda" in seen and len(seen) == 2, "in training the denoiser alone is on the device"
    plain.train()
    assert losses(trainer) == pytest.approx(losses(plain), rel=1e-2)
    resumed = make_trainer("offloaded", pipeline, **{**options, "num_epochs": 3}, resume_from_checkpoint=True)
    assert resumed.state.epoch == 2
    resumed.train()
    assert all(p.isfinite().all() for p in weights(resumed))


# 8-bit AdamW.


def test_8_bit_adam_resumes_bit_for_bit(make_trainer, tmp_path):
    pytest.importorskip("bitsandbytes")
    options = {"train_use_8bit_adam": True, "lora_rank": LORA_OF_4096}
    whole = make_trainer("whole", tiny_sd(), num_epochs=3, **options)
    before = weights(whole)
    whole.train()
    assert not any(torch.equal(new, old) for new, old in zip(weights(whole), before, strict=True))
    make_trainer("parts", tiny_sd(), num_epochs=1, **options).train()
    stored = load_file(tmp_path / "parts" / "checkpoints" / "checkpoint_0" / "optimizer.safetensors")
    assert torch.uint8 in {tensor.dtype for tensor in stored.values()}
    resumed = make_trainer("parts", tiny_sd(), num_epochs=3, resume_from_checkpoint=True, **options)
    assert resumed.state.epoch == 1
    assert {type(state["step"]) for state in resumed.finetuner.optimizer.state.values()} == {int}
    resumed.train()
    for found, expected in zip(weights(resumed), weights(whole), strict=True):
        assert torch.equal(found, expected)


# torch.compile.


GRAPHS = []


def eager(graph, inputs):
    """A backend that runs what was captured as it is, and notes whether it was captured for training."""
    GRAPHS.append(torch.is_grad_enabled())
    return graph.forward


@pytest.fixture
def graphs():
    """Of each graph of a test, whether it is for training. What others left would count: there is a limit."""
    torch.compiler.reset()
    GRAPHS.clear()
    yield GRAPHS
    torch.compiler.reset()


def compiled(how, backend=eager):
    """A tiny Flux with a compiled denoiser."""
    pipeline = tiny_flux()
    if how == "whole":
        pipeline.transformer = torch.compile(pipeline.transformer, backend=backend, fullgraph=True)
    elif how == "in place":
        pipeline.transformer.compile(backend=backend)
    elif how == "regional":
        pipeline.transformer.compile_repeated_blocks(backend=backend)
    return pipeline


def sample_and_watch(pipeline):
    """Images, and for each denoiser call whether the adapter was on; its layers' own hooks a compiled graph skips."""
    layer, on = tuner_layers(pipeline.transformer, "pgraft")[0], []
    # Before the gate's own hook, which puts the adapter back after the call.
    handle = pipeline.transformer.register_forward_hook(
        lambda *_: on.append("pgraft" in layer.active_adapters), prepend=True
    )
    images = sample(pipeline)
    handle.remove()
    return images, on


@pytest.mark.parametrize("how", ["whole", "in place", "regional"])
def test_the_gate_switches_an_adapter_of_a_compiled_denoiser(tmp_path, graphs, how):
    """It is loaded after the denoiser was compiled and has run; another gate with another level follows."""
    plain, clock = tiny_flux(), (1e-3, 0.0)
    add_random_adapter(plain.transformer)
    save_pgraft_adapter(plain, tmp_path, SwitchLevel(850.0, -2.0, 800.0, clock))
    pipeline = compiled(how)
    torch.testing.assert_close(sample(pipeline), sample(tiny_flux()), rtol=0, atol=1e-6)
    assert len(graphs) > 0
    gate = load_pgraft_adapter(pipeline, tmp_path)
    for level, expected in ((850.0, [True, True, False, False]), (600.0, [True, True, True, False])):
        with TimestepGate(plain.transformer, "pgraft", level, clock):
            images = sample(plain)
        found, on = sample_and_watch(pipeline)
        assert on == expected
        torch.testing.assert_close(found, images, rtol=0, atol=1e-6)
        gate.remove()
        gate = TimestepGate(pipeline.transformer, "pgraft", 600.0, clock)


@pytest.mark.parametrize("how", [pytest.param("whole", marks=pytest.mark.slow), "regional"])
def test_a_compiled_denoiser_is_trained_alike(make_trainer, tmp_path, graphs, how):
    """And its adapter goes by the same names on disk, so that a pipeline that is not compiled loads it."""
    options = {"sample_num_steps": 2, "gradient_checkpointing": how == "regional"}
    plain, trainer = make_trainer("plain", tiny_flux(), **options), make_trainer("compiled", compiled(how), **options)
    assert not graphs, "asking how the pipeline calls its denoiser compiles nothing"
    assert trainer.finetuner.memory == plain.finetuner.memory
    assert trainer.policy.sampled_by() == plain.policy.sampled_by()
    for each in (plain, trainer):
        each.train()
    assert True in graphs and False in graphs, "trained and sampled with what was compiled"
    assert_same_results(trainer, plain)
    files = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("plain", "compiled")]
    assert load_file(files[0]).keys() == load_file(files[1]).keys()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole", "regional"])
def test_with_inductor_results_agree(make_trainer, graphs, how):
    plain, trainer = make_trainer("plain", tiny_flux()), make_trainer("compiled", compiled(how, backend="inductor"))
    images = []
    for each in (plain, trainer):
        each.train()
        with each.sampler() as pipeline:
            images.append(sample(pipeline))
    assert_same_results(trainer, plain, 1e-5)
    torch.testing.assert_close(*images, rtol=0, atol=1e-5)


def test_a_whole_copy_of_a_compiled_denoiser_has_its_layers(make_trainer):
    class Wrapper:
        use_lora = False

        def __init__(self, pipeline):
            self.sd_pipeline = pipeline

    counts = [len(weights(make_trainer("full", Wrapper(p)))) for p in (tiny_flux(), compiled("whole"))]
    assert counts[0] == counts[1] == len(list(tiny_flux().transformer.parameters()))


@pytest.mark.parametrize("how", ["accelerate", "by hand", "by hand in a whole"])
def test_modules_that_were_replaced_by_compiled_ones_are_refused(make_trainer, tmp_path, how):
    pipeline = tiny_flux()
    if how == "accelerate":
        pipeline.transformer = compile_regions(pipeline.transformer, backend="eager")
    else:
        blocks = pipeline.transformer.transformer_blocks
        blocks[0] = torch.compile(blocks[0], backend="eager")
    if how == "by hand in a whole":
        pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    add = "FluxTransformer2DModel: some of its modules.*compile_repeated_blocks"
    with pytest.raises(ValueError, match=add):
        make_trainer("refused", pipeline)
    plain = tiny_flux()
    add_random_adapter(plain.transformer)
    save_pgraft_adapter(plain, tmp_path / "adapter", SwitchLevel(None, None, None))
    with pytest.raises(ValueError, match=add):
        load_pgraft_adapter(pipeline, tmp_path / "adapter")


# Precision: accelerate has one for a process, so that these run in one of their own.

IN_HALF_PRECISION = """
import sys
from test_memory_features import *
from trl_pgraft import GraftConfig

folder, precision = sys.argv[1:]
options = {"sample_num_steps": 2, "num_epochs": 2, "sample_batch_size": 4, "sample_num_batches_per_epoch": 1}
options |= {"train_learning_rate": 1e-2, "mixed_precision": precision, "control_adapter": False}

def train(name, pipeline, **further):
    settings = GraftConfig(**options, **further, output_dir=f"{folder}/{name}")
    trainer = PGraftTrainer(settings, brightness, lambda: ("a cat", {}), pipeline)
    before = weights(trainer)
    trainer.train()
    assert {p.dtype for p in weights(trainer)} == {torch.float32}
    assert all(p.isfinite().all() for p in weights(trainer))
    assert not any(torch.equal(old, new) for old, new in zip(before, weights(trainer), strict=True))
    with trainer.sampler() as pipeline:
        assert sample(pipeline).isfinite().all()
    return trainer

plain = train("plain", tiny_flux())
frozen = [p for name, p in plain.denoiser.named_parameters() if ".pgraft." not in name]
assert {p.dtype for p in frozen} == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
assert "forward" not in vars(plain.denoiser), "the class's own, with its decorators"
assert_same_results(train("checkpointing", tiny_flux(), gradient_checkpointing=True), plain)
offloaded = tiny_flux()
offloaded.enable_model_cpu_offload(device="cpu")
assert_same_results(train("offloaded", offloaded), plain)
with torch.compiler.set_stance("force_eager"):  # what accelerate wraps and unwraps is what takes no compiling
    assert_same_results(train("compiled", compiled("whole")), plain)
"""


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_half_precision_trains_float32_adapters(tmp_path, precision):
    script = tmp_path / "script.py"
    script.write_text(IN_HALF_PRECISION)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, tmp_path, precision]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
