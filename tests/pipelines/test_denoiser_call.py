# SPDX-License-Identifier: Apache-2.0

import inspect

import pytest
import torch
from diffusers import (
    DDIMScheduler,
)
from tiny_pipelines import ToyPipeline, tiny_flux, tiny_sd
from torch import nn

from trl_pgraft.pipelines.conditioning import record_conditioning
from trl_pgraft.pipelines.denoiser_call import denoiser_of, replay
from trl_pgraft.pipelines.introspection import introspect
from trl_pgraft.pipelines.observe import observe_calls, record_trajectory


PROMPTS = ["a cat", "two dogs", "a cat"]
GUIDED = {"num_inference_steps": 5, "guidance_scale": 3.0}


def run(pipeline, arguments, prompts=PROMPTS, seed=0):
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    if "negative_prompt" in arguments:
        arguments = {**arguments, "negative_prompt": [arguments["negative_prompt"]] * len(prompts)}
    return pipeline(prompt=prompts, generator=generators, output_type="latent", **arguments).images


def hooks_of(module):
    return (len(module._forward_pre_hooks), len(module._forward_hooks))


def recorded_predictions(pipeline, arguments):
    """Latents, timestep and output of each denoiser call of one run of the pipeline."""
    calls, denoiser = [], denoiser_of(pipeline)
    names = list(inspect.signature(type(denoiser).forward).parameters)[1:]

    def keep(module, args, kwargs, output):
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        calls.append((named[names[0]].clone(), named["timestep"], output[0].clone()))

    handle = denoiser.register_forward_hook(keep, with_kwargs=True)
    run(pipeline, arguments)
    handle.remove()
    return calls


def test_rows_of_prompts_are_replayed_with_and_without_their_prompt(sd):
    """In any number and order; without its prompt, a row has the negative prompt."""
    arguments = {**GUIDED, "negative_prompt": "ugly"}
    call = introspect(sd, arguments).call
    conditioning = record_conditioning(sd, call, ["a cat", "two dogs"], arguments)
    prompts = [0, 1, 0]
    for latents, timestep, output in recorded_predictions(sd, arguments):
        t = torch.full((3,), call.training_timestep(float(timestep.flatten()[0])))
        parts = output.chunk(2)
        x_t = latents[: len(prompts)]
        with torch.no_grad():
            conditional = replay(sd.unet, call, x_t, t, conditioning.rows(prompts, "cpu"))
            unconditional = replay(sd.unet, call, x_t, t, conditioning.rows(prompts, "cpu", unconditional=True))
        torch.testing.assert_close(conditional, parts[call.conditional_branch], rtol=0, atol=1e-5)
        torch.testing.assert_close(unconditional, parts[1 - call.conditional_branch], rtol=0, atol=1e-5)
        assert not torch.allclose(conditional, unconditional, atol=1e-4)


def test_replay_takes_a_timestep_for_each_row_and_has_gradients(sd):
    call = introspect(sd, GUIDED).call
    conditioning = record_conditioning(sd, call, ["a cat", "a dog"], GUIDED)
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([900.0, 17.0])
    together = replay(sd.unet, call, x_t, t, conditioning.rows([0, 1], "cpu"))
    apart = [replay(sd.unet, call, x_t[i : i + 1], t[i : i + 1], conditioning.rows([i], "cpu")) for i in (0, 1)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=1e-5)
    together.sum().backward()
    assert sd.unet.conv_in.weight.grad.abs().sum() > 0


def test_replay_keeps_the_sign_of_the_scheduler():
    pipeline = ToyPipeline(sign=-1)
    call = introspect(pipeline).call
    x_t, t = torch.randn(2, 2, 4, 4), torch.tensor([400.0, 800.0])
    condition = {"condition": torch.tensor([1.0, 2.0])}
    expected = -pipeline.transformer(x_t, 1 - t / 1000, **condition)[0]
    torch.testing.assert_close(replay(pipeline.transformer, call, x_t, t, condition), expected)


def test_arguments_beyond_the_signature_are_seen_as_they_were_given():
    class Open(nn.Module):
        def forward(self, x, timestep, **kwargs):
            return (x,)

    seen = []
    with observe_calls(module := Open(), seen.append):
        module(torch.zeros(1), 3, text="a")
    assert [{**seen[0], "x": None}] == [{"x": None, "timestep": 3, "text": "a"}]


def test_conditioning_is_recorded_without_sampling(sd):
    call = introspect(sd, GUIDED).call
    calls = []
    sd.unet.register_forward_hook(lambda *_: calls.append(1))
    record_conditioning(sd, call, ["a", "b"], GUIDED)
    assert calls == []


def test_conditioning_rows_follow_the_prompts(sd):
    call = introspect(sd, GUIDED).call
    both = record_conditioning(sd, call, ["a cat", "a dog"], GUIDED)
    dog = record_conditioning(sd, call, ["a dog"], GUIDED)
    rows = both.rows([1, 1, 0], "cpu")["encoder_hidden_states"]
    torch.testing.assert_close(rows[:2], dog.rows([0, 0], "cpu")["encoder_hidden_states"])
    assert not torch.allclose(rows[2], rows[1])


@pytest.mark.parametrize("make", [tiny_sd, tiny_flux])
def test_the_final_latents_are_recorded_after_the_last_step(make):
    pipeline = make()
    call = introspect(pipeline, GUIDED).call
    expected = run(pipeline, GUIDED)
    with record_trajectory(pipeline, call, step_index=5, batch_size=3) as trajectory:
        assert torch.equal(run(pipeline, GUIDED), expected), "observing changes nothing"
    assert torch.equal(trajectory.x_i, expected)
    assert trajectory.timesteps == pipeline.scheduler.timesteps.tolist()
    assert trajectory.denoiser_calls == 3 * 5 * call.branches


def test_recording_leaves_the_samplers_own_noise_alone(sd):
    """Pipelines ask the signature of `scheduler.step` whether it takes `eta` and the samples' generators."""
    call, stochastic = introspect(sd, GUIDED).call, {**GUIDED, "eta": 1.0}
    expected = run(sd, stochastic)
    with record_trajectory(sd, call, step_index=5, batch_size=3) as trajectory:
        assert torch.equal(run(sd, stochastic), expected)
    assert torch.equal(trajectory.x_i, expected)
    assert not torch.allclose(expected, run(sd, GUIDED), atol=0.1)


@pytest.mark.parametrize("step_index", [0, 3, 9])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_recorded_states_restart_the_sampler(sd, step_index, prediction_type):
    """What is recorded at a step_index, put back at that timestep, leads to the same end."""
    sd.scheduler = DDIMScheduler.from_config(sd.scheduler.config, prediction_type=prediction_type)
    arguments = {**GUIDED, "num_inference_steps": 10}
    call = introspect(sd, arguments).call
    with record_trajectory(sd, call, step_index, batch_size=3) as trajectory:
        expected = run(sd, arguments)
    conditioning = record_conditioning(sd, call, PROMPTS, arguments)
    x_t = trajectory.x_i
    with torch.no_grad():
        for t in sd.scheduler.timesteps[step_index:]:
            c = replay(sd.unet, call, x_t, t.expand(3), conditioning.rows([0, 1, 2], "cpu"))
            u = replay(sd.unet, call, x_t, t.expand(3), conditioning.rows([0, 1, 2], "cpu", unconditional=True))
            x_t = sd.scheduler.step(u + 3.0 * (c - u), t, x_t).prev_sample
    torch.testing.assert_close(x_t, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("calls, conditional_first", [(1, True), (1, False), (2, True), (2, False)])
def test_states_are_recorded_whatever_the_branches(calls, conditional_first):
    pipeline = ToyPipeline(conditional_first, calls)
    call = introspect(pipeline, {"guidance_scale": 2.0}).call
    with record_trajectory(pipeline, call, step_index=0, batch_size=3) as trajectory:
        pipeline(["a", "b", "c"], 4, 2.0, torch.Generator().manual_seed(1))
    expected = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(trajectory.x_i, expected)
    assert trajectory.denoiser_calls == 3 * 4 * 2


def test_an_exception_while_recording_leaves_nothing_behind(sd):
    call = introspect(sd, GUIDED).call
    with pytest.raises(KeyboardInterrupt), record_trajectory(sd, call, step_index=2, batch_size=3):
        run(sd, GUIDED)
        raise KeyboardInterrupt
    assert hooks_of(sd.unet) == (0, 0) and "step" not in vars(sd.scheduler)


def test_a_scheduler_step_of_the_users_own_is_put_back(sd):
    original = sd.scheduler.step
    sd.scheduler.step = own = lambda *args, **kwargs: original(*args, **kwargs)
    call = introspect(sd, GUIDED).call
    with record_trajectory(sd, call, step_index=1, batch_size=3):
        run(sd, GUIDED)
    assert sd.scheduler.step is own


def test_what_is_no_pipeline_is_refused():
    with pytest.raises(ValueError, match="sd_pipeline: dict has neither.*transformer.*unet"):
        denoiser_of({})
