# SPDX-License-Identifier: Apache-2.0

from contextlib import contextmanager

import pytest
import torch
from cases import CASES
from diffusers import EulerDiscreteScheduler
from tiny_pipelines import adapter_use, add_random_adapter, tiny_flux, tiny_sd

from trl_pgraft import GraftConfig, TimestepGate
from trl_pgraft.adapters.guidance import TunedGuidance
from trl_pgraft.adapters.lora import active_adapters
from trl_pgraft.pipelines.inputs import call_pipeline
from trl_pgraft.pipelines.introspection import introspect
from trl_pgraft.pipelines.timesteps import tuned_levels


PROMPTS = ["a cat", "a dog"]
STEPS = 6
GUIDANCE = 3.0
SWITCH = 500.0


def sample(pipeline, steps=STEPS):
    return pipeline(
        prompt=PROMPTS,
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images


@torch.no_grad()
def sample_by_hand(pipeline, before_step=lambda t: None, guidance=lambda t: GUIDANCE, steps=STEPS):
    """Stable Diffusion's sampling written out; `before_step(t)` may switch adapters, `guidance(t)` is the scale."""

    def embed(texts):
        length = pipeline.tokenizer.model_max_length
        tokens = pipeline.tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt")
        return pipeline.text_encoder(tokens.input_ids)[0]

    embeddings = torch.cat([embed([""] * len(PROMPTS)), embed(PROMPTS)])
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(steps)
    x_t = torch.randn(len(PROMPTS), 4, 8, 8, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        before_step(t)
        both = scheduler.scale_model_input(torch.cat([x_t, x_t]), t)
        u, c = pipeline.unet(both, t, encoder_hidden_states=embeddings).sample.chunk(2)
        x_t = scheduler.step(u + guidance(t) * (c - u), t, x_t).prev_sample
    return x_t


def two_phases(unet, above=("pgraft",), below=()):
    def switch(t):
        wanted = list(above if t > SWITCH else below)
        if wanted:
            unet.enable_adapters()
            unet.set_adapters(wanted)
        else:
            unet.disable_adapters()

    return switch


@contextmanager
def failing_at(module, call_number):
    """Make the n-th call of `module` inside the block raise."""
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == call_number:
            raise FloatingPointError("broken on purpose")

    handle = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


def hooks_of(module):
    return (len(module._forward_pre_hooks), len(module._forward_hooks))


def flags_of(module):
    return {name: parameter.requires_grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("scheduler", [None, EulerDiscreteScheduler(timestep_spacing="leading")])
def test_gated_sampling_is_the_adapter_above_and_the_base_below(scheduler):
    by_hand, gated = tiny_sd(scheduler), tiny_sd(scheduler)
    for pipeline in (by_hand, gated):
        add_random_adapter(pipeline.unet)
    expected = sample_by_hand(by_hand, two_phases(by_hand.unet))
    with TimestepGate(gated.unet, "pgraft", SWITCH):
        latents = sample(gated)
    assert torch.equal(latents, expected)
    assert not torch.allclose(latents, sample(tiny_sd(scheduler)), atol=0.1), "the adapter has a large effect"


def test_nothing_tuned_is_the_base(sd):
    base = sample(sd)
    add_random_adapter(sd.unet)
    with TimestepGate(sd.unet, "pgraft", switch_timestep=1000.0):
        assert torch.equal(sample(sd), base)


def test_without_a_switch_the_adapter_runs_throughout(sd):
    add_random_adapter(sd.unet)
    tuned = sample(sd)
    with TimestepGate(sd.unet, "pgraft", switch_timestep=None):
        assert torch.equal(sample(sd), tuned)


@pytest.mark.parametrize("steps", [3, 10, 25])
def test_another_number_of_steps_switches_at_the_same_noise_level(sd, steps):
    add_random_adapter(sd.unet)
    with TimestepGate(sd.unet, "pgraft", SWITCH), adapter_use(sd.unet) as use:
        sample(sd, steps)
    assert len(use) == steps
    assert use == {t: t > SWITCH for t in use}
    assert {True, False} == set(use.values())


def test_bf16_timesteps_of_a_shifted_flow_schedule_switch_at_the_right_step_everywhere():
    steps = 14
    flux = tiny_flux(shift=3.0).to(dtype=torch.bfloat16)
    arguments = {"num_inference_steps": steps, "guidance_scale": 1.0}
    introspection = introspect(flux, arguments)
    call = introspection.call
    add_random_adapter(flux.transformer, std=0.01)
    at_its_own_level = []
    for step_index in range(1, steps):
        config = GraftConfig(tuned_fraction=step_index / steps, sample_num_steps=steps)
        levels, switch = tuned_levels(config, introspection.sampler, call.clock)
        with (
            TimestepGate(flux.transformer, "pgraft", switch.switch_timestep, call.clock),
            adapter_use(flux.transformer) as use,
        ):
            flux(prompt=["a"], output_type="latent", generator=torch.Generator().manual_seed(0), **arguments)
        assert levels.step_index == step_index
        assert list(use.values()) == [True] * step_index + [False] * (steps - step_index)
        at_its_own_level.append(sum(1000 * t > switch.state_timestep for t in use))
    assert at_its_own_level != list(range(1, steps)), "a strict t > t_I would do here, so this test shows nothing"


def test_another_lora_takes_part_above_and_below(sd):
    by_hand = tiny_sd()
    for pipeline in (by_hand, sd):
        add_random_adapter(pipeline.unet, "style", seed=2)
        add_random_adapter(pipeline.unet, "pgraft", seed=1)
    expected = sample_by_hand(by_hand, two_phases(by_hand.unet, above=("style", "pgraft"), below=("style",)))
    before = flags_of(sd.unet)
    with TimestepGate(sd.unet, "pgraft", SWITCH), adapter_use(sd.unet, "style") as use:
        assert torch.equal(sample(sd), expected)
    assert all(use.values()) and len(use) == STEPS
    assert sorted(active_adapters(sd.unet)) == ["pgraft", "style"]
    assert flags_of(sd.unet) == before


def test_an_inactive_lora_stays_inactive(sd):
    add_random_adapter(sd.unet, "style")
    add_random_adapter(sd.unet, "pgraft")
    sd.unet.set_adapters(["pgraft"])
    with TimestepGate(sd.unet, "pgraft", SWITCH), adapter_use(sd.unet, "style") as use:
        sample(sd)
    assert not any(use.values())
    assert active_adapters(sd.unet) == ["pgraft"]


def test_a_lora_loaded_after_the_gate_is_untouched(sd, tmp_path):
    donor, by_hand = tiny_sd(), tiny_sd()
    add_random_adapter(donor.unet, "style", seed=2, alpha=4)
    donor.save_lora_weights(tmp_path, unet_lora_layers=_lora_state(donor.unet, "style"))
    add_random_adapter(by_hand.unet, "style", seed=2, alpha=4)
    add_random_adapter(by_hand.unet, "pgraft", seed=1)
    expected = sample_by_hand(by_hand, two_phases(by_hand.unet, above=("style", "pgraft"), below=("style",)))

    add_random_adapter(sd.unet, "pgraft", seed=1)
    gate = TimestepGate(sd.unet, "pgraft", SWITCH)
    sd.load_lora_weights(tmp_path, adapter_name="style")
    before = {name: flag for name, flag in flags_of(sd.unet).items() if ".style." in name}
    torch.testing.assert_close(sample(sd), expected, rtol=1e-4, atol=1e-5)
    gate.remove()
    assert sorted(active_adapters(sd.unet)) == ["pgraft", "style"]
    assert {name: flag for name, flag in flags_of(sd.unet).items() if ".style." in name} == before


def _lora_state(denoiser, name):
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(denoiser, adapter_name=name)


def test_an_exception_in_the_denoiser_leaves_the_adapters_as_they_were(sd):
    add_random_adapter(sd.unet)
    flags, gate = flags_of(sd.unet), TimestepGate(sd.unet, "pgraft", SWITCH)
    expected = sample(sd)
    with pytest.raises(FloatingPointError), failing_at(sd.unet.conv_out, call_number=STEPS):
        sample(sd)
    assert active_adapters(sd.unet) == ["pgraft"], "the last step is below the switch, where the adapter was off"
    assert flags_of(sd.unet) == flags
    assert torch.equal(sample(sd), expected), "the gate works on"
    gate.remove()


def test_leaving_the_block_by_an_exception_removes_the_gate(sd):
    add_random_adapter(sd.unet)
    flags, hooks = flags_of(sd.unet), hooks_of(sd.unet)
    with pytest.raises(KeyboardInterrupt), TimestepGate(sd.unet, "pgraft", SWITCH):
        sample(sd)
        raise KeyboardInterrupt
    assert active_adapters(sd.unet) == ["pgraft"]
    assert flags_of(sd.unet) == flags and hooks_of(sd.unet) == hooks


def test_remove_twice_is_harmless(sd):
    add_random_adapter(sd.unet)
    tuned, gate = sample(sd), TimestepGate(sd.unet, "pgraft", SWITCH)
    gate.remove()
    gate.remove()
    assert torch.equal(sample(sd), tuned)


def test_rows_with_different_timesteps_are_refused(sd):
    add_random_adapter(sd.unet)
    x_t, embeddings = torch.randn(2, 4, 8, 8), torch.randn(2, 24, 16)
    with TimestepGate(sd.unet, "pgraft", SWITCH):
        sd.unet(x_t, torch.tensor([700, 700]), encoder_hidden_states=embeddings)
        with pytest.raises(ValueError, match="different timesteps.*remove"):
            sd.unet(x_t, torch.tensor([700, 300]), encoder_hidden_states=embeddings)


def test_an_unknown_adapter_is_named(sd):
    with pytest.raises(ValueError, match="no adapter named 'pgraft'"):
        TimestepGate(sd.unet, "pgraft", SWITCH)


@pytest.mark.parametrize("tuned_scale", [1.0, 5.0])
def test_tuned_guidance_is_another_scale_above_the_switch(sd, tuned_scale):
    call = introspect(sd, {"guidance_scale": GUIDANCE}).call
    expected = sample_by_hand(sd, guidance=lambda t: tuned_scale if t > SWITCH else GUIDANCE)
    hooks = hooks_of(sd.unet)
    with TunedGuidance(sd, call, GUIDANCE, tuned_scale, SWITCH):
        torch.testing.assert_close(sample(sd), expected, rtol=1e-4, atol=1e-5)
    assert hooks_of(sd.unet) == hooks
    assert not torch.allclose(expected, sample(sd), atol=1e-3)


@pytest.mark.parametrize("same_noise", [False, True])
@pytest.mark.parametrize("prompts", [1, 2, 4])
def test_tuned_guidance_does_not_take_prompts_for_branches(sd, prompts, same_noise):
    """Two prompts without guidance are as many rows as one with it; with equal noise not even the latents differ."""
    call = introspect(sd, {"guidance_scale": GUIDANCE}).call
    seeds = [0] * prompts if same_noise else range(prompts)
    arguments = {"prompt": ["a cat", "a dog", "a bird", ""][:prompts], "num_inference_steps": 2}
    calls, hooks = [], hooks_of(sd.unet)
    with TunedGuidance(sd, call, GUIDANCE, 1.0, SWITCH):
        for scale in (1.0, 2 * GUIDANCE):
            with pytest.raises(ValueError, match="called without guidance, or with another scale than the 3"):
                sd(
                    **arguments, guidance_scale=scale, generator=[torch.Generator().manual_seed(s) for s in seeds],
                    callback_on_step_end=lambda *step: calls.append(step) or {},
                )  # fmt: skip
    assert not calls and hooks_of(sd.unet) == hooks and "step" not in vars(sd.scheduler)


@pytest.mark.parametrize("name", ["DiT", "PixArt", "Sana"])
def test_tuned_guidance_is_seen_in_other_pipelines(name):
    """DiT hands its scheduler both branches; of learned variances, some pipelines hand on a part or nothing."""
    case, pipeline = CASES[name], CASES[name].make()
    arguments = {**case.arguments(pipeline), "output_type": "pt"}
    inputs = case.inputs(pipeline, arguments, [0, 1])

    def run(scale):
        return call_pipeline(pipeline, PROMPTS, [1, 2], {**arguments, "guidance_scale": scale}, inputs).images

    with TunedGuidance(pipeline, case.learn(pipeline, arguments), GUIDANCE, 5.0, None):
        found = run(GUIDANCE)
    torch.testing.assert_close(found, run(5.0), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(found, run(GUIDANCE), atol=1e-3)


def test_tuned_guidance_needs_both_branches_in_one_call(flux):
    call = introspect(flux, {"guidance_scale": GUIDANCE}).call
    with pytest.raises(ValueError, match="tuned_guidance_scale"):
        TunedGuidance(flux, call, GUIDANCE, 1.0, SWITCH)
