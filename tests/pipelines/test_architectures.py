# SPDX-License-Identifier: Apache-2.0

"""Every pipeline alike: its calls are replayed exactly, and an adapter is trained, saved, loaded and gated."""

import math
from functools import partial

import pytest
import tiny_pipelines as tiny
import tiny_transformers as transformers
import torch
from cases import CASES, PROMPTS, Case, make_trainer, observed_run

from trl_pgraft import load_pgraft_adapter
from trl_pgraft.adapters.lora import adapter_parameters
from trl_pgraft.pipelines.conditioning import record_conditioning
from trl_pgraft.pipelines.denoiser_call import denoiser_of, prediction_of, replay
from trl_pgraft.pipelines.inputs import call_pipeline
from trl_pgraft.pipelines.tree import same_shapes
from trl_pgraft.training.graft_loss import graft_loss


each_pipeline = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


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
    for calls, model_output in observed_run(pipeline, case, arguments, "pt"):
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
    is_on = {trainer.policy.call.training_timestep(timestep): used for timestep, used in use.items()}
    assert is_on == {t: fraction == 1.0 or t > gate.switch_timestep for t in is_on}
    assert list(is_on.values()).count(True) == (len(is_on) if fraction == 1.0 else trainer.policy.levels.step_index)
    assert len(is_on) == len(pipeline.scheduler.timesteps[-len(is_on) :]) >= 3


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
