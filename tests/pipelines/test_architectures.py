# SPDX-License-Identifier: Apache-2.0

"""Every pipeline alike: its calls are replayed exactly, and an adapter is trained, saved, loaded and gated."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import datasets
import pytest
import tiny_pipelines as tiny
import tiny_transformers as transformers
import torch
from PIL import Image
from worked_overrides import overrides

from trl_pgraft import GraftConfig, PGraftTrainer, load_pgraft_adapter
from trl_pgraft.adapters.lora import adapter_parameters
from trl_pgraft.pipelines.conditioning import record_conditioning
from trl_pgraft.pipelines.denoiser_call import denoiser_of, prediction_of, replay
from trl_pgraft.pipelines.denoiser_format import DenoiserFormat
from trl_pgraft.pipelines.inputs import as_batch, call_pipeline, inputs_of, sampling_arguments, takes_prompts
from trl_pgraft.pipelines.introspection import introspect_denoiser_call
from trl_pgraft.pipelines.observe import observe_steps
from trl_pgraft.pipelines.tree import same_shapes
from trl_pgraft.training.graft_loss import graft_loss


SMALL = {"height": 16, "width": 16}
PROMPTS = ["a cat", "two brown dogs"]
BLACK, WHITE = (Image.new("RGB", (16, 16), colour) for colour in ("black", "white"))
LEFT = Image.new("L", (16, 16), 0)
LEFT.paste(255, (0, 0, 8, 16))


@dataclass
class Case:
    """A pipeline, what its call is handed, and what its prompts have beside them."""

    make: Callable[[], Any]
    kwargs: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, list] = field(default_factory=dict)
    format: str | None = None

    @property
    def denoiser_format(self) -> type[DenoiserFormat] | None:
        return overrides()[self.format] if self.format else None

    def arguments(self, pipeline: Any, **options: Any) -> dict[str, Any]:
        config = GraftConfig(**{"sample_num_steps": 4, "sample_guidance_scale": 3.0, **options})
        return sampling_arguments(config, pipeline, self.kwargs)

    def inputs(self, pipeline: Any, arguments: dict[str, Any], rows: list[int]) -> list[dict[str, Any]]:
        own = [{name: values[row] for name, values in self.columns.items()} for row in rows]
        return [inputs_of(pipeline, columns, arguments) for columns in own]

    def learn(self, pipeline: Any, arguments: dict[str, Any]) -> Any:
        example = {name: as_batch([value]) for name, value in self.inputs(pipeline, arguments, [0])[0].items()}
        return introspect_denoiser_call(pipeline, {**example, **arguments}, self.denoiser_format)


LENGTH = {"max_sequence_length": 24}
CASES = {
    "SD 1.5": Case(tiny.tiny_sd),
    "SD 2": Case(tiny.tiny_sd2),
    "SD 2, zero SNR": Case(partial(tiny.tiny_sd2, zero_snr=True)),
    "SDXL": Case(tiny.tiny_sdxl),
    "SD 3": Case(transformers.tiny_sd3, {**SMALL, **LENGTH}),
    "Flux": Case(tiny.tiny_flux),
    "Flux, guidance embedded": Case(partial(tiny.tiny_flux, guidance_embeds=True)),
    "Flux, true_cfg_scale": Case(tiny.tiny_flux, {"true_cfg_scale": 3.0}),
    "Qwen-Image": Case(transformers.tiny_qwen_image, SMALL),
    "Sana": Case(
        transformers.tiny_sana,
        {"height": 32, "width": 32, "use_resolution_binning": False, "complex_human_instruction": None, **LENGTH},
    ),
    "Lumina 2": Case(
        transformers.tiny_lumina2, {"height": 64, "width": 64, "system_prompt": "", "max_sequence_length": 48}
    ),
    "PixArt": Case(
        transformers.tiny_pixart, {**SMALL, "use_resolution_binning": False, "clean_caption": False, **LENGTH}
    ),
    "HunyuanDiT": Case(transformers.tiny_hunyuan_dit, {**SMALL, "use_resolution_binning": False}),
    "Wan": Case(transformers.tiny_wan, {**SMALL, **LENGTH, "num_frames": 5}),
    "AuraFlow": Case(transformers.tiny_auraflow, {**SMALL, **LENGTH}),
    "Chroma": Case(transformers.tiny_chroma, {**SMALL, **LENGTH}),
    "Z-Image": Case(transformers.tiny_z_image, {**SMALL, **LENGTH}, format="ListFormat"),
    "DDPM": Case(tiny.tiny_ddpm, columns={"label": [0, 1]}),
    "DDPM, learned variance": Case(partial(tiny.tiny_ddpm, learned_variance=True), columns={"label": [0, 1]}),
    "DiT": Case(transformers.tiny_dit, columns={"class_labels": [3, 7]}),
    "image to image": Case(tiny.tiny_image_to_image, {"strength": 0.75}, columns={"image": [BLACK, WHITE]}),
    "inpainting": Case(
        tiny.tiny_inpainting, SMALL, {"image": [BLACK, WHITE], "mask_image": [LEFT, LEFT]}, format="InpaintingFormat"
    ),
}
each_pipeline = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def observed_run(pipeline: Any, case: Case, arguments: dict[str, Any]) -> list[tuple[list[tuple], torch.Tensor]]:
    """Of each step of a run: arguments and output of the denoiser's calls, and what the scheduler was given."""
    steps, calls, denoiser = [], [], denoiser_of(pipeline)
    names = list(inspect.signature(type(denoiser).forward).parameters)[1:]

    def on_call(module, args, kwargs, output):
        calls.append(({**dict(zip(names, args, strict=False)), **kwargs}, output))

    def on_step(model_output, **_):
        steps.append((calls.copy(), model_output))
        calls.clear()

    handle = denoiser.register_forward_hook(on_call, with_kwargs=True)
    with observe_steps(pipeline.scheduler, on_step):
        inputs = case.inputs(pipeline, arguments, [0, 1])
        call_pipeline(pipeline, PROMPTS, [5, 6], {**arguments, "output_type": "pt"}, inputs)
    handle.remove()
    return steps


@pytest.mark.parametrize("guidance", [3.0, 1.0])
@each_pipeline
def test_replay_is_the_pipelines_own_prediction(case, guidance):
    pipeline = case.make()
    arguments = case.arguments(pipeline, sample_guidance_scale=guidance)
    if guidance == 1.0:
        arguments = {**arguments, **({"true_cfg_scale": 1.0} if "true_cfg_scale" in case.kwargs else {})}
    call = case.learn(pipeline, arguments)
    conditioning = record_conditioning(
        pipeline, call, PROMPTS[::-1], arguments, case.inputs(pipeline, arguments, [1, 0])
    )
    for calls, model_output in observed_run(pipeline, case, arguments):
        outputs = torch.cat([call.sign * prediction_of(call.format, o, call.format.latents(a)) for a, o in calls])
        x_t = call.format.latents(calls[0][0])[:2]
        t = torch.full((2,), call.training_timestep(float(call.format.timestep(calls[0][0]).flatten()[0])))
        replayed = []
        for branch in range(call.branches):
            rows = conditioning.rows([1, 0], "cpu", unconditional=branch != call.conditional_branch)
            with torch.no_grad():
                replayed.append(replay(denoiser_of(pipeline), call, x_t, t, rows))
        torch.testing.assert_close(torch.cat(replayed), outputs, rtol=0, atol=1e-5)
        assert outputs.abs().mean() > 1e-3
        if call.branches == 1:
            prediction = model_output[:, : x_t.shape[1]].reshape(x_t.shape)
            torch.testing.assert_close(replayed[0], prediction, rtol=0, atol=1e-5)
        elif call.guidance_scale is not None:
            c, u = replayed[call.conditional_branch], replayed[1 - call.conditional_branch]
            guided = u + call.guidance_scale * (c - u)
            torch.testing.assert_close(guided, model_output[:2].reshape(x_t.shape), rtol=0, atol=5e-5)


GUIDED = {
    "SD 1.5": 3.0, "SD 2": 3.0, "SD 2, zero SNR": 3.0, "SDXL": 3.0, "SD 3": 3.0, "Flux, true_cfg_scale": 3.0,
    "Qwen-Image": None, "Sana": 3.0, "Lumina 2": None, "PixArt": 3.0, "HunyuanDiT": 3.0, "Wan": 3.0, "AuraFlow": 3.0,
    "Chroma": 3.0, "Z-Image": 4.0, "DiT": 3.0, "image to image": 3.0, "inpainting": 3.0,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_guidance_is_understood(name, dtype):
    """Z-Image adds `w (c - u)` to c, which is guidance of w + 1; Qwen-Image and Lumina 2 rescale the sum."""
    pipeline = CASES[name].make().to(dtype=dtype)
    call = CASES[name].learn(pipeline, CASES[name].arguments(pipeline))
    assert call.is_guided == (name in GUIDED)
    assert call.guidance_scale == GUIDED.get(name, 1.0)


def brightness(images, prompts, metadata):
    return images.flatten(1).mean(1), {}


def make_trainer(case: Case, folder: Any, eval_dataset: Any = None, **options: Any) -> PGraftTrainer:
    defaults = {
        "num_epochs": 1,
        "sample_num_steps": 4,
        "sample_guidance_scale": 3.0,
        "sample_batch_size": 2,
        "sample_num_batches_per_epoch": 2,
        "samples_per_prompt": 2,
        "acceptance_kwargs": {"k": 1},
        "train_batch_size": 2,
        "train_timestep_fraction": 0.25,
        "train_learning_rate": 1e-2,
        "lora_rank": 2,
        "caption_dropout": 0.5,
        "control_adapter": False,
        "output_dir": str(folder),
    }
    pipeline = case.make()
    columns = {"prompt": PROMPTS} if takes_prompts(pipeline) else {}
    return PGraftTrainer(
        GraftConfig(**{**defaults, **options}),
        brightness,
        sd_pipeline=pipeline,
        train_dataset=datasets.Dataset.from_dict({**columns, **case.columns}),
        eval_dataset=eval_dataset,
        pipeline_kwargs=case.kwargs,
        denoiser_format=case.denoiser_format,
    )


@pytest.mark.parametrize("fraction", [1.0, 0.5], ids=["GRAFT", "P-GRAFT"])
@each_pipeline
def test_a_step_is_trained_saved_loaded_and_gated(case, fraction, tmp_path):
    trainer = make_trainer(case, tmp_path, tuned_fraction=fraction)
    before = [p.detach().clone() for p in adapter_parameters(trainer.denoiser, "pgraft")]
    assert trainer.finetuner.memory.adapter == 4 * sum(p.numel() for p in before)
    (metrics,) = trainer.train()
    after = [p.detach().clone() for p in adapter_parameters(trainer.denoiser, "pgraft")]
    assert math.isfinite(metrics["loss"]) and metrics["skipped_steps"] == 0
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert sum(moved) >= 0.5 * len(moved), "at the first step the gradient of A vanishes where B is zero"

    pipeline = case.make()
    gate = load_pgraft_adapter(pipeline, tmp_path / "adapter")
    loaded = adapter_parameters(denoiser_of(pipeline), "pgraft")
    assert all(torch.equal(a, b) for a, b in zip(after, loaded, strict=True))
    arguments = case.arguments(pipeline)
    with tiny.adapter_use(denoiser_of(pipeline)) as use:
        inputs = case.inputs(pipeline, arguments, [0, 1])
        call_pipeline(pipeline, PROMPTS, [5, 6], {**arguments, "output_type": "pt"}, inputs)
    told = {trainer.policy.call.training_timestep(timestep): is_on for timestep, is_on in use.items()}
    assert told == {t: fraction == 1.0 or t > gate.switch_timestep for t in told}
    assert list(told.values()).count(True) == (len(told) if fraction == 1.0 else trainer.policy.levels.position)
    assert len(told) == len(pipeline.scheduler.timesteps[-len(told) :]) >= 3


def test_a_second_denoiser_at_low_noise_is_left_alone(tmp_path):
    """As Wan 2.2: what is tuned must end before the other transformer takes over."""
    case = Case(partial(transformers.tiny_wan, boundary_ratio=0.8), CASES["Wan"].kwargs)
    trainer = make_trainer(case, tmp_path / "below", tuned_fraction=1.0)
    with pytest.raises(ValueError, match="2 of the first 4 steps without its `transformer`"):
        trainer.train()
    trainer = make_trainer(case, tmp_path / "above", tuned_fraction=0.25)
    other = [p.clone() for p in trainer.pipeline.transformer_2.parameters()]
    (metrics,) = trainer.train()
    assert math.isfinite(metrics["loss"])
    assert all(map(torch.equal, other, trainer.pipeline.transformer_2.parameters()))


@pytest.mark.parametrize("name", ["DiT", "Wan", "Flux, true_cfg_scale"])
def test_a_control_adapter_is_subtracted(name, tmp_path):
    """Also in models of diffusers that have no methods for adapters, such as DiT's."""
    trainer = make_trainer(CASES[name], tmp_path, control_adapter=True, num_epochs=2)
    metrics = trainer.train()
    assert all(math.isfinite(row["loss"]) for row in metrics)
    assert set(trainer.denoiser.peft_config) == {"pgraft"} and trainer.denoiser.peft_config["pgraft"].r == 8


@pytest.mark.parametrize("name", ["DiT", "Qwen-Image"])
def test_a_run_is_resumed(name, tmp_path):
    whole = make_trainer(CASES[name], tmp_path / "whole", num_epochs=2)
    whole.train()
    make_trainer(CASES[name], tmp_path / "parts", num_epochs=1).train()
    resumed = make_trainer(
        CASES[name], tmp_path / "parts", num_epochs=2, resume_from=str(tmp_path / "parts" / "checkpoints")
    )
    resumed.train()
    for one, other in zip(*(adapter_parameters(t.denoiser, "pgraft") for t in (whole, resumed)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, is_one_batch", [("SD 1.5", True), ("Qwen-Image", False)])
def test_captions_are_dropped_row_by_row(name, is_one_batch, tmp_path):
    """Qwen-Image's negative prompt is shorter than its prompts, so that dropped rows make a batch of their own."""
    trainer = make_trainer(CASES[name], tmp_path)
    conditioning = record_conditioning(trainer.pipeline, trainer.policy.call, PROMPTS, trainer.policy.arguments)
    assert same_shapes(conditioning.conditional, conditioning.unconditional) == is_one_batch
    loss, denoiser = graft_loss(trainer.policy, "pgraft", conditioning), trainer.denoiser
    shape = (4, 4, 8, 8) if name == "SD 1.5" else (4, 16, 16)
    x_i, noise = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    timesteps, prompts = torch.tensor([990.0, 900.0, 950.0, 870.0]), torch.tensor([0, 1, 1, 0])
    dropped = torch.tensor([True, False, True, False])
    together = loss(denoiser, x_i, noise, timesteps, prompts, dropped)
    alone = [loss(denoiser, *(v[i : i + 1] for v in (x_i, noise, timesteps, prompts, dropped))) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
    kept = loss(denoiser, x_i, noise, timesteps, prompts, torch.zeros(4, dtype=torch.bool))
    assert [not torch.allclose(a, b, atol=1e-6) for a, b in zip(together, kept, strict=True)] == dropped.tolist()
