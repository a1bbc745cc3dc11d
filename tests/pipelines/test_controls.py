# SPDX-License-Identifier: Apache-2.0

"""ControlNets: what is trained is given what the ControlNet makes of the very state that is trained at."""

import copy
import math
from dataclasses import replace

import datasets
import pytest
import tiny_controlnets as tiny
import torch
from cases import BLACK, LEFT, PROMPTS, SMALL, WHITE, Case, make_trainer, observed_run
from tiny_pipelines import adapter_use

from trl_pgraft import PGraftTrainer, load_pgraft_adapter
from trl_pgraft.adapters.lora import adapter_parameters
from trl_pgraft.core.seeding import generator_of
from trl_pgraft.pipelines.conditioning import record_conditioning
from trl_pgraft.pipelines.controls import matching_rows
from trl_pgraft.pipelines.denoiser_call import denoiser_of, replay
from trl_pgraft.pipelines.inputs import call_pipeline
from trl_pgraft.pipelines.introspection import introspect
from trl_pgraft.training.graft_loss import graft_loss


HALF = {"control_guidance_end": 0.5}
LENGTH = {**SMALL, "max_sequence_length": 24}
IMAGES = {"image": [BLACK, WHITE]}
CONTROL = {"control_image": [BLACK, WHITE]}
CASES = {
    "SD": Case(tiny.tiny_sd_controlnet, HALF, IMAGES),
    "SD, guess_mode": Case(tiny.tiny_sd_controlnet, {**HALF, "guess_mode": True}, IMAGES),
    "SD, two": Case(
        lambda: tiny.tiny_sd_controlnet(2),
        {"controlnet_conditioning_scale": [0.5, 2.0], "control_guidance_end": [1.0, 0.5]},
        {"image": [[BLACK, WHITE], [WHITE, LEFT.convert("RGB")]]},
    ),
    "SD, image to image": Case(tiny.tiny_sd_controlnet_img2img, {"strength": 0.75}, {**IMAGES, **CONTROL}),
    "SD, inpainting": Case(tiny.tiny_sd_controlnet_inpaint, {}, {**IMAGES, **CONTROL, "mask_image": [LEFT, LEFT]}),
    "SDXL": Case(tiny.tiny_sdxl_controlnet, {"control_guidance_start": 0.5}, IMAGES),
    "SDXL, guess_mode": Case(tiny.tiny_sdxl_controlnet, {"control_guidance_start": 0.5, "guess_mode": True}, IMAGES),
    "SDXL, two": Case(lambda: tiny.tiny_sdxl_controlnet(2), {"image": [BLACK, WHITE], **HALF}),
    "SDXL, union": Case(tiny.tiny_sdxl_union, {"control_image": [BLACK, WHITE], "control_mode": [1, 3]}),
    "SD 3": Case(tiny.tiny_sd3_with_controlnet, {**LENGTH, **HALF}, CONTROL),
    "SD 3, two": Case(
        lambda: tiny.tiny_sd3_with_controlnet(2),
        {**LENGTH, "control_image": [BLACK, WHITE], "controlnet_conditioning_scale": [1.0, 0.5]},
    ),
    "Flux": Case(tiny.tiny_flux_with_controlnet, {**LENGTH, **HALF}, CONTROL),
    "Flux, true_cfg_scale": Case(tiny.tiny_flux_with_controlnet, {**LENGTH, **HALF, "true_cfg_scale": 3.0}, CONTROL),
    "Flux, guidance of its own": Case(
        lambda: tiny.tiny_flux_with_controlnet(guidance_embeds=True, num_mode=3),
        {**LENGTH, "control_mode": 2},
        CONTROL,
    ),
    "Flux, two": Case(
        lambda: tiny.tiny_flux_with_controlnet(2),
        {
            **LENGTH,
            "control_image": [BLACK, WHITE],
            "control_guidance_end": [1.0, 0.5],
            "controlnet_conditioning_scale": [1.0, 0.5],
        },
    ),
}


def recorded(case, pipeline, arguments):
    """How the denoiser is called, and the conditioning of both prompts."""
    call = case.learn(pipeline, arguments)
    return call, record_conditioning(pipeline, call, PROMPTS, arguments, case.inputs(pipeline, arguments, [0, 1]))


@pytest.mark.parametrize("guidance", [3.0, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_replay_is_the_pipelines_own_prediction(name, guidance):
    """In every step, where the ControlNet's scale changes half-way; each branch as its pipeline makes it."""
    case = CASES[name]
    if guidance == 1.0 and "true_cfg_scale" in case.kwargs:
        case = replace(case, kwargs={**case.kwargs, "true_cfg_scale": 1.0})
    pipeline = case.make()
    arguments = case.arguments(pipeline, sample_guidance_scale=guidance)
    call, conditioning = recorded(case, pipeline, arguments)
    assert [control.name for control in call.controls] == ["controlnet"]
    for calls, _ in observed_run(pipeline, case, arguments, "latent"):
        own = calls[0][0]
        expected = call.sign * torch.cat([output[0] for _, output in calls])
        x_t = call.format.latents(own)[:2]
        t = torch.full((2,), call.training_timestep(float(call.format.timestep(own).flatten()[0])))
        replayed = []
        for branch in range(call.branches):
            rows = conditioning.rows([0, 1], "cpu", unconditional=branch != call.conditional_branch)
            with torch.no_grad():
                replayed.append(replay(denoiser_of(pipeline), call, x_t, t, rows))
        torch.testing.assert_close(torch.cat(replayed), expected, rtol=0, atol=1e-5)
        assert expected.abs().mean() > 1e-2


@pytest.mark.parametrize("name", ["SD", "SD, two", "Flux"])
def test_rows_have_the_scale_of_the_nearest_step(name):
    """In one batch with each other, between the steps of the sampler."""
    case, pipeline = CASES[name], CASES[name].make()
    call, conditioning = recorded(case, pipeline, case.arguments(pipeline))
    settings = [(t, own["conditioning_scale"]) for t, own in call.controls[0].settings]
    assert [scale for _, scale in settings] in ([[0.5, 2.0]] * 2 + [[0.5, 0.0]] * 2, [1.0, 1.0, 0.0, 0.0])
    (above, on), (below, off) = settings[1:3]
    middle = (above + below) / 2
    t = torch.tensor([middle - 1, above, middle + 1, below, 10.0])
    x_t = torch.randn(5, *((4, 8, 8) if "SD" in name else (16, 16)), generator=generator_of(1))
    seen, net = [], call.controls[0].module
    net.register_forward_pre_hook(lambda m, a, k: seen.append((k["conditioning_scale"], m)), with_kwargs=True)
    with torch.no_grad():
        rows = [0, 1, 1, 0, 1]
        together = replay(denoiser_of(pipeline), call, x_t, t, conditioning.rows(rows, "cpu"))
        assert [scale for scale, _ in seen] == [on, off], "one call for each scale"
        seen.clear()
        alone = [
            replay(denoiser_of(pipeline), call, x_t[i : i + 1], t[i : i + 1], conditioning.rows([rows[i]], "cpu"))
            for i in range(5)
        ]
    assert [scale for scale, _ in seen] == [off, on, on, off, off]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_a_controlnet_computes_twice_for_introspection_and_never_for_conditioning():
    """Once at the smallest size and once at the real one, not in each step."""
    case, pipeline, calls = CASES["SD"], tiny.tiny_sd_controlnet(), []
    pipeline.controlnet.conv_in.register_forward_hook(lambda *_: calls.append(1))
    arguments = case.arguments(pipeline, sample_num_steps=20)
    call = case.learn(pipeline, arguments)
    assert len(calls) == 2
    record_conditioning(pipeline, call, PROMPTS, arguments, case.inputs(pipeline, arguments, [0, 1]))
    assert len(calls) == 2 and not pipeline.controlnet._forward_hooks and "forward" not in vars(pipeline.controlnet)


def test_a_controlnet_is_run_without_gradients_and_is_not_trained(tmp_path):
    trainer = make_trainer(CASES["SD"], tmp_path)
    net, seen = trainer.pipeline.controlnet, []
    before = [parameter.clone() for parameter in net.parameters()]
    net.register_forward_hook(lambda module, args, output: seen.append(output[1].requires_grad))
    trainer.train()
    assert seen and not any(seen)
    assert all(map(torch.equal, before, net.parameters()))


@pytest.mark.parametrize("name", ["SD", "SD, guess_mode", "SD, two", "SDXL", "SD 3", "Flux", "Flux, true_cfg_scale"])
def test_a_round_is_trained_saved_loaded_and_gated(name, tmp_path):
    case = CASES[name]
    trainer = make_trainer(case, tmp_path, tuned_fraction=0.75)
    before = [p.detach().clone() for p in adapter_parameters(trainer.denoiser, "pgraft")]
    (metrics,) = trainer.train()
    after = [p.detach().clone() for p in adapter_parameters(trainer.denoiser, "pgraft")]
    assert math.isfinite(metrics["loss"]) and metrics["skipped_steps"] == 0
    assert sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True)) >= 0.5 * len(after)
    pipeline = case.make()
    gate = load_pgraft_adapter(pipeline, tmp_path / "adapter")
    arguments = case.arguments(pipeline)
    with adapter_use(denoiser_of(pipeline)) as use:
        inputs = case.inputs(pipeline, arguments, [0, 1])
        call_pipeline(pipeline, PROMPTS, [5, 6], {**arguments, "output_type": "latent"}, inputs)
    is_on = {trainer.policy.call.training_timestep(t): used for t, used in use.items()}
    assert is_on == {t: t > gate.switch_timestep for t in is_on} and list(is_on.values()) == [True] * 3 + [False]


@pytest.mark.parametrize("options", [
    {"guidance_loss": "combined"}, {"guidance_loss": "corrected"}, {"control_adapter": True},
    {"tuned_guidance_scale": 1.0}, {"tuned_fraction": 1.0, "gradient_checkpointing": True},
])  # fmt: skip
@pytest.mark.parametrize("name", ["SD", "SD, guess_mode"])
def test_every_loss_trains_with_a_controlnet(name, options, tmp_path):
    trainer = make_trainer(CASES[name], tmp_path, **options)
    (metrics,) = trainer.train()
    assert math.isfinite(metrics["loss"]) and metrics["skipped_steps"] == 0
    assert any(p.abs().sum() > 0 for n, p in trainer.denoiser.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("name", ["SD", "SD, guess_mode"])
def test_captions_are_dropped_row_by_row(name, tmp_path):
    """Rows without their caption have the ControlNet as the unconditional branch has it: not in `guess_mode`."""
    case = replace(CASES[name], kwargs={n: v for n, v in CASES[name].kwargs.items() if n == "guess_mode"})
    trainer = make_trainer(case, tmp_path)
    pipeline, policy = trainer.pipeline, trainer.policy
    inputs = case.inputs(pipeline, policy.arguments, [0, 1])
    conditioning = record_conditioning(pipeline, policy.call, PROMPTS, policy.arguments, inputs)
    loss = graft_loss(policy, "pgraft", conditioning)
    x_i, noise = (torch.randn(4, 4, 8, 8, generator=generator_of(seed)) for seed in (1, 2))
    timesteps, prompts = torch.tensor([990.0, 900.0, 950.0, 870.0]), torch.tensor([0, 1, 1, 0])
    dropped, residuals = torch.tensor([True, False, True, False]), []
    trainer.denoiser.register_forward_pre_hook(
        lambda m, a, k: residuals.append(k["mid_block_additional_residual"]), with_kwargs=True
    )
    together = loss(trainer.denoiser, x_i, noise, timesteps, prompts, dropped)
    silent = [not row.any() for row in residuals[0]]
    assert silent == (dropped.tolist() if "guess" in name else [False] * 4)
    alone = [
        loss(trainer.denoiser, *(v[i : i + 1] for v in (x_i, noise, timesteps, prompts, dropped))) for i in range(4)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_a_replaced_controlnet_is_named(tmp_path):
    trainer = make_trainer(CASES["SD"], tmp_path)
    trainer.pipeline.controlnet = tiny.tiny_controlnet(7)
    with pytest.raises(ValueError, match="its controlnet changed after the trainer was made"):
        trainer.train()


def test_one_of_several_controlnets_that_is_replaced_is_seen(tmp_path):
    trainer = make_trainer(CASES["SD, two"], tmp_path)
    trainer.pipeline.controlnet.nets[0] = tiny.tiny_controlnet(9)
    with pytest.raises(ValueError, match="its controlnet changed after the trainer was made"):
        trainer.train()


@pytest.mark.parametrize("name, control_adapter", [("SD", True), ("Flux", False)])
def test_an_offloaded_controlnet_is_trained_with(name, control_adapter, tmp_path):
    def offloaded():
        pipeline = CASES[name].make()
        pipeline.enable_model_cpu_offload(device="cpu")
        return pipeline

    options = {"num_epochs": 2, "control_adapter": control_adapter}
    plain = make_trainer(CASES[name], tmp_path / "plain", **options)
    trainer = make_trainer(replace(CASES[name], make=offloaded), tmp_path / "offloaded", **options)
    plain.train()
    trainer.train()
    for one, other in zip(*(adapter_parameters(t.denoiser, "pgraft") for t in (plain, trainer)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_stored_samples_are_trained_on_with_their_control_images(tmp_path):
    first = make_trainer(CASES["SD"], tmp_path / "first")
    first.train()
    files = [str(path) for path in (tmp_path / "first" / "samples").rglob("*.parquet")]
    samples = datasets.Dataset.from_parquet(files)
    config = copy.copy(first.config)
    config.output_dir = str(tmp_path / "second")
    second = PGraftTrainer(
        config, sd_pipeline=CASES["SD"].make(), samples_dataset=samples, pipeline_kwargs=CASES["SD"].kwargs
    )
    second.train()
    for one, other in zip(*(adapter_parameters(t.denoiser, "pgraft") for t in (first, second)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_a_run_with_a_controlnet_is_resumed(tmp_path):
    whole = make_trainer(CASES["SD"], tmp_path / "whole", num_epochs=2)
    whole.train()
    make_trainer(CASES["SD"], tmp_path / "parts", num_epochs=1).train()
    checkpoints = str(tmp_path / "parts" / "checkpoints")
    resumed = make_trainer(CASES["SD"], tmp_path / "parts", num_epochs=2, resume_from=checkpoints)
    resumed.train()
    for one, other in zip(*(adapter_parameters(t.denoiser, "pgraft") for t in (whole, resumed)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["SD", "SD, guess_mode", "Flux"])
def test_half_precision_is_understood(name):
    pipeline = CASES[name].make().to(dtype=torch.bfloat16)
    case, arguments = CASES[name], CASES[name].arguments(pipeline)
    call, conditioning = recorded(case, pipeline, arguments)
    assert call.guidance_scale == (1.0 if name == "Flux" else 3.0)
    x_t = torch.randn(2, *((4, 8, 8) if "SD" in name else (16, 16))).to(torch.bfloat16)
    output = replay(denoiser_of(pipeline), call, x_t, torch.tensor([900.0, 10.0]), conditioning.rows([0, 1], "cpu"))
    assert output.dtype == torch.bfloat16 and output.isfinite().all()


def test_a_list_of_controlnets_images_for_each_prompt_is_refused_before_anything_is_sampled():
    """Flux takes the outer list for its ControlNets, so that images of several prompts would be mixed up."""
    case = Case(lambda: tiny.tiny_flux_with_controlnet(2), LENGTH, {"control_image": [[BLACK, WHITE], [WHITE, BLACK]]})
    pipeline = case.make()
    with pytest.raises((ValueError, RuntimeError)):
        case.learn(pipeline, case.arguments(pipeline))


def test_a_controlnet_with_latents_of_its_own_is_refused_by_name():
    class Shifted(tiny.StableDiffusionControlNetPipeline):
        """Its ControlNet sees other latents than its UNet."""

        def __call__(self, **kwargs):
            handle = self.controlnet.register_forward_pre_hook(lambda module, args: (args[0] + 1, *args[1:]))
            try:
                return super().__call__(**kwargs)
            finally:
                handle.remove()

    shifted = Shifted(**tiny.tiny_sd_controlnet().components, requires_safety_checker=False)
    with pytest.raises(ValueError, match="calls its `controlnet` with other latents than its denoiser"):
        introspect(shifted, {"num_inference_steps": 4, "image": BLACK})


def test_rows_are_matched_by_value():
    output = torch.randn(3, 2, 5)
    assert matching_rows(output, output) == [0, 1, 2]
    assert matching_rows(torch.cat([torch.zeros(1, 2, 5), output[2:]]), output) == [-1, 2]
    assert matching_rows(output + 1, output) is None
    assert matching_rows(output[:, :1], output) is None
    assert matching_rows(output.bfloat16(), output) is None
    assert matching_rows(torch.tensor(1.0), output) is None
