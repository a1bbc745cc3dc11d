# SPDX-License-Identifier: Apache-2.0

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import pytest
import torch
from cases import CASES, make_trainer
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from tiny_pipelines import ToyPipeline, tiny_flux, tiny_sd
from tiny_transformers import tiny_wan
from torch import nn

from trl_pgraft.pipelines.conditioning import record_conditioning
from trl_pgraft.pipelines.denoiser_call import denoiser_of
from trl_pgraft.pipelines.inputs import parameters_of
from trl_pgraft.pipelines.introspection import introspect
from trl_pgraft.pipelines.stand_in import answer_like


GUIDED = {"num_inference_steps": 5, "guidance_scale": 3.0}
UNGUIDED = {"num_inference_steps": 5, "guidance_scale": 1.0}


@pytest.mark.parametrize("arguments", [GUIDED, UNGUIDED, {**GUIDED, "negative_prompt": "ugly"}])
def test_stable_diffusion_is_understood(sd, arguments):
    call = introspect(sd, arguments).call
    assert (call.format.latents_name, call.format.timestep_name) == ("sample", "timestep")
    assert call.clock == (1.0, 0.0) and call.sign == 1 and call.calls_per_step == 1
    assert call.is_guided == (arguments is not UNGUIDED)
    assert call.conditional_branch == (1 if call.is_guided else 0)
    assert call.batch_axes["encoder_hidden_states"] == 0


@pytest.mark.parametrize("guidance_embeds", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flux_is_understood(guidance_embeds, dtype):
    flux = tiny_flux(guidance_embeds=guidance_embeds).to(dtype=dtype)
    call = introspect(flux, GUIDED).call
    assert (call.format.latents_name, call.format.timestep_name) == ("hidden_states", "timestep")
    assert call.clock == (0.001, 0.0) and call.training_timestep(0.5) == pytest.approx(500)
    assert not call.is_guided and call.timestep_dtype == dtype
    axes = call.batch_axes
    assert axes["encoder_hidden_states"] == 0 and axes["img_ids"] is None and axes["txt_ids"] is None
    assert axes["guidance"] == (0 if guidance_embeds else None)


@pytest.mark.parametrize("conditional_first", [True, False])
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("sign", [1, -1])
def test_other_conventions_are_found_out(conditional_first, calls, sign):
    pipeline = ToyPipeline(conditional_first, calls, clock=lambda t: 1 - t / 1000, sign=sign)
    call = introspect(pipeline, {"guidance_scale": 2.0}).call
    assert (call.format.latents_name, call.format.timestep_name) == ("x", "t")
    assert call.clock == (-0.001, 1.0) and call.training_timestep(0.25) == 750
    assert call.sign == sign and call.calls_per_step == calls and call.is_guided
    assert call.conditional_branch == (0 if conditional_first else 1)
    assert call.batch_axes == {"condition": 0}
    conditioning = record_conditioning(pipeline, call, ["a", "abc"], {"guidance_scale": 2.0})
    assert conditioning.conditional["condition"].tolist() == [1.0, 3.0]
    assert conditioning.unconditional["condition"].tolist() == [0.0, 0.0]


def test_an_uncommon_clock_is_fitted():
    pipeline = ToyPipeline(clock=lambda t: 0.3 * t + 7, sign=1)
    scale, offset = introspect(pipeline).call.clock
    assert scale == pytest.approx(0.3, rel=1e-5) and offset == pytest.approx(7, abs=1e-3)


@pytest.mark.parametrize("scale, expected", [(1.0, 3.0), (0.7, None)])
def test_guidance_of_any_scale_is_measured(scale, expected):
    """Neither the argument's value nor one more: known from the prediction alone; rescaled, it is no such guidance."""
    pipeline = ToyPipeline(sign=1)
    guided = pipeline._guided
    pipeline._guided = lambda x, t, c, w: guided(x, t, c, w if w == 1.0 else 1 + w) * (1.0 if w == 1.0 else scale)
    found = introspect(pipeline, {"guidance_scale": 2.0}).call.guidance_scale
    assert found == expected
    pipeline._guided = lambda x, t, c, w: guided(x, t, c, w if w == 1.0 else 2.5 * w) * (1.0 if w == 1.0 else scale)
    found = introspect(pipeline, {"guidance_scale": 2.0}).call.guidance_scale
    assert found == (pytest.approx(5.0, rel=1e-4) if expected else None)


def test_introspection_leaves_no_trace(sd):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    call = introspect(sd, GUIDED).call
    record_conditioning(sd, call, ["a"], GUIDED)
    assert torch.equal(torch.rand(3), expected)
    assert len(sd.unet._forward_pre_hooks) == len(sd.unet._forward_hooks) == 0
    assert "step" not in vars(sd.scheduler)


def test_sampler_timesteps_are_those_of_a_run(sd, flux):
    for pipeline in (sd, flux):
        found = introspect(pipeline, GUIDED).sampler.timesteps
        pipeline(prompt="a", output_type="latent", **GUIDED)
        assert found == pipeline.scheduler.timesteps.tolist()


def test_a_denoiser_without_a_timestep_is_refused(sd):
    sd.unet = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear.forward has no argument `timestep`"):
        introspect(sd, GUIDED)


def test_a_pipeline_that_changes_the_prediction_is_refused():
    pipeline = ToyPipeline(sign=2)
    with pytest.raises(ValueError, match="something other than plus or minus"):
        introspect(pipeline)


@pytest.mark.parametrize(
    "unguided, message",
    [
        (lambda guided, x, t, condition: guided(x, t, condition, 2.0), "setting guidance_scale to 1.0 leaves both"),
        (lambda guided, x, t, condition: guided(x, t, condition + 5, 1.0), "no branch .*sample_guidance_scale=1.0"),
    ],
    ids=["still guided", "conditioned otherwise"],
)
def test_guidance_that_cannot_be_turned_off_is_refused(unguided, message):
    pipeline = ToyPipeline()
    guided = pipeline._guided
    pipeline._guided = lambda x, t, c, scale: unguided(guided, x, t, c) if scale == 1.0 else guided(x, t, c, scale)
    with pytest.raises(ValueError, match=message):
        introspect(pipeline, {"guidance_scale": 2.0})


def test_a_pipeline_that_skips_its_denoiser_is_refused():
    pipeline = ToyPipeline()
    pipeline._guided = lambda x, *_: x
    with pytest.raises(ValueError, match="without calling its `transformer`"):
        introspect(pipeline)


@pytest.mark.parametrize("name", CASES)
def test_the_denoiser_computes_one_call_of_the_smallest_image(name, tmp_path, monkeypatch):
    """The trainer's constructor determines all else with a stand-in."""
    case = CASES[name]
    size = {n: 4 * value for n, value in case.kwargs.items() if n in ("height", "width")}
    case = replace(case, kwargs={**case.kwargs, **size})
    pipelines, computed = [], []
    make = case.make
    case.make = lambda: pipelines.append(make()) or pipelines[0]
    kind = type(denoiser_of(make()))
    forward = kind.forward

    def counted(self, *args, **kwargs):
        if self is denoiser_of(pipelines[0]):
            latents = args[0] if args else next(iter(kwargs.values()))
            computed.append(torch.cat(latents).numel() if isinstance(latents, list) else latents.numel())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", functools.wraps(forward)(counted))
    trainer = make_trainer(case, tmp_path)
    first = trainer.policy.introspection.first_step[0]
    own = trainer.policy.call.format.latents(first).numel()
    assert len(computed) == 1 and computed[0] <= own
    if size:
        assert computed[0] <= own / 4, "a smaller image than that of the run"


def test_a_second_denoiser_is_not_computed(tmp_path):
    """As Wan 2.2, whose other transformer makes the last steps."""
    case = CASES["Wan"]
    pipeline = tiny_wan(boundary_ratio=0.8)
    calls = []
    pipeline.transformer_2.patch_embedding.register_forward_hook(lambda *_: calls.append(1))
    found = introspect(pipeline, case.arguments(pipeline))
    assert [step.branches for step in found.steps] == [2, 2, 0, 0] and not calls


def test_guidance_is_determined_for_every_step(sd):
    """A callback that ends guidance half-way is seen in the steps that it concerns."""

    def end_guidance(pipeline, step, timestep, tensors):
        if step == 1:
            pipeline._guidance_scale = 1.0
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
        return tensors

    further = {"callback_on_step_end": end_guidance, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    found = introspect(sd, {**GUIDED, **further})
    assert [(step.branches, step.guidance_scale) for step in found.steps] == [(2, 3.0)] * 2 + [(1, 1.0)] * 3
    assert [step.timestep for step in found.steps] == found.sampler.timesteps


def test_the_real_size_is_what_is_recorded(sd):
    found = introspect(sd, {**GUIDED, "height": 64, "width": 48})
    assert found.first_step[0]["sample"].shape == (2, 4, 32, 24)


def test_a_size_that_a_pipeline_does_not_take_is_passed_over(sd):
    """Of the sizes that are tried the first that works counts; an error at the run's own size is the user's to see."""
    call, tried = type(sd).__call__, []

    class Picky(type(sd)):
        def __call__(self, prompt=None, height=None, width=None, guidance_scale=5.0, **kwargs):
            tried.append(height)
            if height % 64:
                raise RuntimeError(f"{height} is no multiple of 64")
            return call(self, prompt, height, width, guidance_scale=guidance_scale, **kwargs)

    sd.__class__ = Picky
    introspect(sd, {**GUIDED, "height": 128, "width": 128})
    assert tried[:3] == [16, 32, 64] and set(tried[3:]) == {128}
    with pytest.raises(RuntimeError, match="100 is no multiple of 64"):
        introspect(sd, {**GUIDED, "height": 100, "width": 100})


@pytest.mark.parametrize("steps", [1, 2])
def test_the_clock_of_one_step_is_determined_from_two(steps):
    """One pair, t = 1 and 0.999 for the denoiser, fits a clock of t within rounding as well as one of 1 - t / 1000."""
    pipeline = ToyPipeline()
    set_timesteps = pipeline.scheduler.set_timesteps

    def from_the_middle(count):
        set_timesteps(2 * count)
        pipeline.scheduler.timesteps = pipeline.scheduler.timesteps[-count:] + (1 if count == 1 else 0)

    pipeline.scheduler.set_timesteps = from_the_middle
    assert introspect(pipeline, {"num_inference_steps": steps}).call.clock == (-0.001, 1.0)


def test_a_stand_in_has_the_layout_of_what_was_returned():
    """Channels beyond the latents' stay, rows and sizes follow; a second output of other axes has the rows."""
    answer = answer_like(torch.ones(2, 4, 2, 2), (torch.ones(2, 8, 2, 2), torch.ones(2, 5), None))
    prediction, further, nothing = answer(torch.ones(3, 4, 6, 8))
    assert prediction.shape == (3, 8, 6, 8) and further.shape == (3, 5) and nothing is None
    lists = answer_like([torch.ones(4, 1, 2, 2)] * 2, ([torch.ones(4, 1, 2, 2)] * 2,))
    assert [part.shape for part in lists([torch.ones(4, 1, 6, 6)] * 3)[0]] == [(4, 1, 6, 6)] * 3
    named = answer_like(torch.ones(2, 4, 2, 2), UNet2DConditionOutput(sample=torch.ones(2, 4, 2, 2)))
    assert named(torch.ones(1, 4, 6, 6)).sample.shape == (1, 4, 6, 6)
    assert answer_like(torch.ones(2, 4, 2, 2), (torch.ones(2, 16),)) is None


@pytest.mark.parametrize("make", [lambda: tiny_sd(), lambda: tiny_flux(), lambda: CASES["Wan"].make()])
def test_an_offloaded_denoiser_computes_one_call_too(make):
    """What is offloaded is freed after each recording, by which accelerate puts modules' own `forward` back."""
    pipeline = make()
    pipeline.enable_model_cpu_offload(device="cpu")
    denoiser, calls = denoiser_of(pipeline), []
    next(denoiser.children()).register_forward_hook(lambda *_: calls.append(1))
    size = {"height": 16, "width": 16} if "num_frames" in parameters_of(pipeline) else {}
    introspect(pipeline, {"num_inference_steps": 5, "guidance_scale": 3.0, **size})
    assert len(calls) == 1
    before = pipeline(prompt="a", num_inference_steps=2, output_type="latent", **size)
    assert before is not None and len(calls) >= 3, "it computes again"


def test_outputs_of_other_kinds_are_stood_in_for():
    class Named(NamedTuple):
        sample: torch.Tensor
        note: str

    @dataclass
    class Plain:
        sample: torch.Tensor

    given, larger = torch.ones(2, 4, 2, 2), torch.ones(3, 4, 6, 6)
    named = answer_like(given, Named(given, "note"))(larger)
    assert isinstance(named, Named) and named.sample.shape == (3, 4, 6, 6) and named.note == "note"
    assert answer_like(given, Plain(given))(larger).sample.shape == (3, 4, 6, 6)


def test_a_pipeline_that_never_calls_its_denoiser_is_refused():
    class Idle(ToyPipeline):
        def __call__(self, prompt, num_inference_steps=2, guidance_scale=1.0, generator=None, output_type="latent"):
            return torch.zeros(len(prompt), 2, 4, 4)

    with pytest.raises(ValueError, match="its end, without calling its `transformer`"):
        introspect(Idle())


def test_the_scheduler_is_left_as_the_call_itself_leaves_it(sd):
    introspect(sd, GUIDED)
    left = sd.scheduler.timesteps.tolist()
    sd(prompt="a", output_type="latent", **GUIDED)
    assert left == sd.scheduler.timesteps.tolist() and len(left) == 5
