# SPDX-License-Identifier: Apache-2.0

"""Every scheduler, in a pipeline, on data with a known denoiser: recorded states, steps and the gate's calls."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tiny_pipelines import (
    add_random_adapter,
    character_tokenizer,
    tiny_flux,
    tiny_sd,
    tiny_text_encoder,
    tiny_vae,
)
from transformers import CLIPTextModelWithProjection

from examples.benchmarks.schedulers import BETAS, CASES, ZERO_SNR
from trl_pgraft import GraftConfig, TimestepGate
from trl_pgraft.adapters.lora import active_adapters
from trl_pgraft.pipelines.conditioning import record_conditioning
from trl_pgraft.pipelines.denoiser_call import denoiser_of, replay
from trl_pgraft.pipelines.introspection import introspect
from trl_pgraft.pipelines.observe import record_trajectory
from trl_pgraft.pipelines.schedulers import check_sampler
from trl_pgraft.pipelines.timesteps import tuned_levels


STEPS = 10
BATCH = 64
EACH = [(name, spacing) for name, case in CASES.items() for spacing in case.spacings]
each_scheduler = pytest.mark.parametrize("name, spacing", EACH, ids=[f"{n}-{s}" if s else n for n, s in EACH])

pytestmark = pytest.mark.filterwarnings("ignore:.*adds noise at its steps", "ignore:The pipeline does not hand")


def tiny_sd3(scheduler):
    """Stable Diffusion 3 on 16 x 16 images: it takes every flow scheduler, those without custom sigmas too."""
    torch.manual_seed(0)
    tokenizer = character_tokenizer()
    encoders = [tiny_text_encoder(tokenizer, kind=CLIPTextModelWithProjection) for _ in range(2)]
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
        pos_embed_max_size=16,
    )  # fmt: skip
    pipeline = StableDiffusion3Pipeline(
        transformer.eval(), scheduler, tiny_vae(shift_factor=0.1), *(encoders[0], tokenizer, encoders[1], tokenizer),
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pipeline_with(scheduler, is_flow):
    if not is_flow:
        return tiny_sd(scheduler)
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return tiny_sd3(scheduler)
    flux = tiny_flux()
    flux.scheduler = scheduler
    return flux


def pipeline_of(name, spacing, **options):
    if "beta" in name:
        pytest.importorskip("scipy", reason="diffusers' beta sigmas need it")
    return pipeline_with(CASES[name].make(spacing, **options), CASES[name].is_flow)


def arguments_for(pipeline, steps=STEPS, guidance_scale=1.0):
    size = {"height": 16, "width": 16} if isinstance(pipeline, StableDiffusion3Pipeline) else {}
    return {"num_inference_steps": steps, "guidance_scale": guidance_scale, **size}


def checked_levels(config, pipeline, arguments):
    introspection = introspect(pipeline, arguments)
    levels, switch = tuned_levels(config, introspection.sampler, introspection.call.clock)
    check_sampler(introspection.sampler, levels.step_index, config.sample_eta)
    return levels, switch


def levels_of(pipeline, fraction, call=None, **options):
    arguments = arguments_for(pipeline)
    config = GraftConfig(tuned_fraction=fraction, sample_num_steps=STEPS, **options)
    call = call or introspect(pipeline, arguments).call
    return call, *checked_levels(config, pipeline, arguments)


def true_level(scheduler, timestep):
    """alpha and sigma of a training timestep, from diffusers' own tables."""
    if not hasattr(scheduler, "alphas_cumprod") or scheduler.config.get("use_flow_sigmas"):
        return 1 - timestep / 1000, timestep / 1000
    table = scheduler.alphas_cumprod.double().cpu().numpy()
    angle = np.interp(timestep, np.arange(len(table)), np.arctan2(np.sqrt(1 - table), np.sqrt(table)))
    return math.cos(angle), math.sin(angle)


def log_snr(scheduler, timestep):
    alpha, sigma = true_level(scheduler, timestep)
    return -math.inf if alpha < 1e-12 else 2 * math.log(alpha / sigma)


def with_constant_data(pipeline, target, seen=None):
    """Replace the denoiser's forward by the exact one of data that are always `target`; `seen` gets its timesteps."""
    denoiser, scheduler = denoiser_of(pipeline), pipeline.scheduler
    unit = 1000 if type(pipeline).__name__ == "FluxPipeline" else 1
    name = "hidden_states" if hasattr(pipeline, "transformer") else "sample"

    def forward(*args, **kwargs):
        x_t = args[0] if args else kwargs[name]
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        t = unit * float(timestep.flatten()[0])
        if seen is not None:
            seen.append((t, "pgraft" in active_adapters(denoiser)))
        alpha, sigma = true_level(scheduler, t)
        noise = (x_t - alpha * target) / sigma
        match getattr(scheduler.config, "prediction_type", None):
            case "epsilon":
                return (noise,)
            case "v_prediction":
                return (alpha * noise - sigma * target,)
            case _:
                return (noise - target,)

    denoiser.forward = forward
    return pipeline


def run(pipeline, steps=STEPS, batch=BATCH, guidance_scale=1.0, **options):
    return pipeline(
        prompt=["a"] * batch,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        **arguments_for(pipeline, steps, guidance_scale),
        **options,
    ).images


def shape_of(pipeline):
    return (16, 16) if type(pipeline).__name__ == "FluxPipeline" else (4, 8, 8)


def state_at(pipeline, call, step_index, **options):
    with record_trajectory(pipeline, call, step_index, BATCH) as trajectory:
        run(pipeline, **options)
    return trajectory.x_i, trajectory.timesteps


def decompose(x, c, noise):
    """Coefficients of x = alpha c + sigma noise + rest by least squares, and the standard deviation of the rest."""
    regressors = torch.stack([c.flatten(), noise.flatten()], 1).double()
    coefficients = torch.linalg.lstsq(regressors, x.flatten().double()[:, None]).solution
    rest = x.flatten().double() - (regressors @ coefficients)[:, 0]
    return *(value.item() for value in coefficients), rest.std().item()


@each_scheduler
def test_recorded_states_follow_the_forward_kernel(name, spacing):
    """x_I = alpha_I c + sigma_I noise for constant data c, started at x_T = alpha_T c + sigma_T noise."""
    pipeline, case = pipeline_of(name, spacing), CASES[name]
    generator = torch.Generator().manual_seed(7)
    c = torch.randn(shape_of(pipeline), generator=generator)
    noise = torch.randn(BATCH, *c.shape, generator=generator)
    with_constant_data(pipeline, c)
    call = introspect(pipeline, arguments_for(pipeline)).call
    unit, timesteps = state_at(pipeline, call, 0, latents=torch.ones_like(noise))
    alpha_t, sigma_t = true_level(pipeline.scheduler, timesteps[0])
    start = (alpha_t * c + sigma_t * noise) / unit
    tolerance = (0.03 if case.is_stochastic else 0) + (0.01 if case.is_rounded else 2e-4)
    for fraction in (0.3, 0.8):
        _, levels, switch = levels_of(pipeline, fraction, call)
        x_i, _ = state_at(pipeline, call, levels.step_index, latents=start)
        alpha, sigma, rest = decompose(x_i, c.expand_as(x_i), noise)
        assert timesteps[levels.step_index] == switch.state_timestep
        assert (rest > 0.05) == case.is_stochastic and (rest < 1e-4) == (not case.is_stochastic)
        assert (alpha, math.hypot(sigma, rest)) == pytest.approx(levels.level_i, abs=tolerance)
        assert levels.level_i[1] < sigma_t


@each_scheduler
def test_the_tuned_fraction_is_a_share_of_steps(name, spacing):
    pipeline, case = pipeline_of(name, spacing), CASES[name]
    call = None
    for fraction in (0.1, 0.5, 0.9):
        call, levels, _ = levels_of(pipeline, fraction, call)
        steps = round(fraction * STEPS)
        calls = {"Heun": 2 * steps, "PNDM": steps + 1}
        assert levels.step_index == next((count for kind, count in calls.items() if kind in name), steps)
        if hasattr(pipeline.scheduler, "sigmas"):
            ratio = float(pipeline.scheduler.sigmas[levels.step_index])
            sigma = ratio if case.is_flow else math.sin(math.atan(ratio))
            assert levels.level_i[1] == pytest.approx(sigma, abs=0.007 if case.is_rounded else 1e-4)


def calls_under_the_gate(pipeline, call, switch_timestep, steps, knows_the_pipeline=True):
    """Timesteps of the denoiser's calls, and whether the adapter was on."""
    given = pipeline if knows_the_pipeline else None
    seen = []
    with_constant_data(pipeline, torch.zeros(shape_of(pipeline)), seen)
    with TimestepGate(denoiser_of(pipeline), "pgraft", switch_timestep, call.clock, given):
        run(pipeline, steps, batch=1)
    return [t for t, _ in seen], [is_on for _, is_on in seen]


def check_calls_around(pipeline, timesteps, is_on, switch):
    """The adapter is on in all steps that begin above the stored noise level, in all their calls, and in no other."""
    order = pipeline.scheduler.order
    begins, steps = timesteps[::order], is_on[::order]
    assert is_on == [on for on in steps for _ in range(order)][: len(is_on)]
    tuned = sum(steps)
    assert steps == [True] * tuned + [False] * (len(steps) - tuned) and 0 < tuned < len(steps)
    last_on, first_off = (log_snr(pipeline.scheduler, begins[i]) for i in (tuned - 1, tuned))
    assert last_on < switch.switch_log_snr < first_off


@each_scheduler
def test_the_gate_switches_at_the_right_call(name, spacing):
    pipeline = pipeline_of(name, spacing)
    call, levels, switch = levels_of(pipeline, 0.5)
    add_random_adapter(denoiser_of(pipeline))
    timesteps, is_on = calls_under_the_gate(pipeline, call, switch.switch_timestep, STEPS)
    assert timesteps[levels.step_index] == pytest.approx(switch.state_timestep, rel=1e-6)
    assert sum(is_on) == levels.step_index
    check_calls_around(pipeline, timesteps, is_on, switch)
    for other_number in (4, 23):
        timesteps, is_on = calls_under_the_gate(pipeline, call, switch.switch_timestep, other_number)
        check_calls_around(pipeline, timesteps, is_on, switch)


def test_midpoints_begin_no_step():
    """KDPM2's second call lies between two steps' timesteps: only `scheduler.order` tells that it begins none."""
    pipeline = tiny_sd(KDPM2DiscreteScheduler(**BETAS, steps_offset=1))
    call, levels, switch = levels_of(pipeline, 0.7)
    assert levels.step_index == 14
    add_random_adapter(pipeline.unet)
    timesteps, is_on = calls_under_the_gate(pipeline, call, switch.switch_timestep, STEPS)
    assert len(set(timesteps)) == len(timesteps) == 2 * STEPS - 1 and sum(is_on) == levels.step_index
    check_calls_around(pipeline, timesteps, is_on, switch)


def test_without_the_pipeline_the_gate_goes_by_each_calls_noise_level():
    """Heun's last tuned step then ends with a call of the reference, at t_I itself."""
    pipeline = pipeline_of("Heun", "leading")
    call, levels, switch = levels_of(pipeline, 0.5)
    add_random_adapter(pipeline.unet)
    timesteps, is_on = calls_under_the_gate(pipeline, call, switch.switch_timestep, STEPS, False)
    assert is_on == [t > switch.switch_timestep for t in timesteps] and sum(is_on) == levels.step_index - 1


def test_a_failed_trajectory_does_not_spoil_the_next_ones_gate():
    pipeline = pipeline_of("Heun", "leading")
    call, levels, switch = levels_of(pipeline, 0.5)
    add_random_adapter(pipeline.unet)
    seen = []
    with_constant_data(pipeline, torch.zeros(4, 8, 8), seen)
    with TimestepGate(pipeline.unet, "pgraft", switch.switch_timestep, call.clock, pipeline):
        with pytest.raises(KeyboardInterrupt):
            run(pipeline, batch=1, callback_on_step_end=interrupted_late)
        seen.clear()
        run(pipeline, batch=1)
    assert sum(is_on for _, is_on in seen) == levels.step_index


def interrupted_late(pipeline, step, timestep, kwargs):
    """Between the two calls of a step."""
    if step == 2 * STEPS - 4:
        raise KeyboardInterrupt
    return kwargs


@pytest.fixture(scope="module")
def trained_with_ddim():
    return levels_of(pipeline_of("DDIM", "leading"), 0.6)


@pytest.mark.parametrize("name, spacing", [e for e in EACH if not CASES[e[0]].is_flow and "zero SNR" not in e[0]])
def test_an_adapter_of_ddim_switches_at_its_noise_level_in_any_sampler(name, spacing, trained_with_ddim):
    call, levels, switch = trained_with_ddim
    pipeline = pipeline_of(name, spacing)
    add_random_adapter(denoiser_of(pipeline))
    timesteps, is_on = calls_under_the_gate(pipeline, call, switch.switch_timestep, 12)
    check_calls_around(pipeline, timesteps, is_on, switch)
    order = pipeline.scheduler.order
    assert true_level(pipeline.scheduler, timesteps[sum(is_on) - order])[1] > levels.level_i[1]


def test_a_flow_adapter_switches_at_its_noise_level_under_any_shift():
    call, _, switch = levels_of(pipeline_of("flow Euler, dynamic shift", None), 0.5)
    for options in ({"shift": 1.0}, {"shift": 6.0}, {"use_dynamic_shifting": True, "max_shift": 3.0}):
        flux = pipeline_with(FlowMatchEulerDiscreteScheduler(**options), is_flow=True)
        add_random_adapter(flux.transformer)
        check_calls_around(flux, *calls_under_the_gate(flux, call, switch.switch_timestep, 12), switch)


def test_dynamic_shifting_follows_the_images_size():
    """The level is that of the pipeline's own call: larger images have noisier states at the same step."""
    shift = {"base_image_seq_len": 16, "max_image_seq_len": 256, "base_shift": 0.5, "max_shift": 2.0}
    flux = pipeline_of("flow Euler, dynamic shift", None, **shift)
    call = introspect(flux, arguments_for(flux)).call
    config = GraftConfig(tuned_fraction=0.5, sample_num_steps=STEPS)
    levels = []
    for size in (16, 64):
        arguments = {**arguments_for(flux), "height": size, "width": size}
        tuned, switch = checked_levels(config, flux, arguments)
        with record_trajectory(flux, call, tuned.step_index, 1) as trajectory:
            flux(prompt=["a"], output_type="latent", **arguments)
        assert trajectory.timesteps[tuned.step_index] == switch.state_timestep
        levels.append(tuned.level_i[1])
    assert levels[1] > levels[0] + 0.1


@torch.no_grad()
def restarted(pipeline, call, x_i, step_index, rows):
    """Continue from x_I with the pipeline's scheduler set anew to begin at `step_index`."""
    scheduler = copy.deepcopy(pipeline.scheduler)
    timesteps = scheduler.timesteps
    scheduler.set_timesteps(STEPS)
    assert torch.equal(scheduler.timesteps, timesteps)
    scheduler.set_begin_index(step_index)
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    x = x_i / scale(torch.ones_like(x_i), timesteps[step_index])
    for t in timesteps[step_index:]:
        prediction = replay(denoiser_of(pipeline), call, scale(x, t), t.expand(len(x)), rows)
        x = scheduler.step(prediction, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("name", ["Euler", "Heun", "flow Heun, shift 3"])
def test_states_of_one_step_solvers_restart_the_sampler(name):
    """So x_I lies at the end of a full step: the prediction that Heun makes on the way leads elsewhere."""
    pipeline = pipeline_of(name, CASES[name].spacings[0])
    call, levels, _ = levels_of(pipeline, 0.5)
    rows = record_conditioning(pipeline, call, ["a"], arguments_for(pipeline)).rows([0] * 4, "cpu")
    errors = []
    for step_index in (levels.step_index, levels.step_index - 1):
        with record_trajectory(pipeline, call, step_index, 4) as trajectory:
            expected = run(pipeline, batch=4)
        end = restarted(pipeline, call, trajectory.x_i, levels.step_index, rows)
        errors.append((end - expected).abs().max().item())
    assert errors[0] < 1e-4 < 1e-3 < errors[1]


def refused(scheduler, match, fraction=0.5, steps=STEPS):
    pipeline = tiny_sd(scheduler)
    arguments = arguments_for(pipeline, steps)
    config = GraftConfig(tuned_fraction=fraction, sample_num_steps=steps)
    with pytest.raises(ValueError, match=match):
        checked_levels(config, pipeline, arguments)


@pytest.mark.parametrize(
    "kind, options", [(DDIMScheduler, {"clip_sample": False}), (PNDMScheduler, {"skip_prk_steps": True})]
)
def test_levels_that_are_not_those_told_to_the_denoiser_are_refused(kind, options):
    """With linspace these two step by `1000 // steps`, but the next timestep is further away."""
    scheduler = kind(**BETAS, **options, steps_offset=1, timestep_spacing="linspace")
    refused(
        scheduler, f"{kind.__name__} .*linspace.*other levels than those of the denoiser.*'leading' or 'trailing'", 0.8
    )


def test_a_recorded_state_near_its_level_is_taken():
    pipeline = tiny_sd(DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1, timestep_spacing="linspace"))
    _, levels, _ = levels_of(pipeline, 0.1)
    assert levels.step_index == 1, "after one step the error is still small"


def test_runge_kutta_warm_ups_are_refused():
    refused(PNDMScheduler(**BETAS, steps_offset=1), "PNDMScheduler .* 9 denoiser calls more.*skip_prk_steps=True")


def test_of_steps_at_one_rounded_timestep_the_last_begins_below_it():
    """50 Karras sigmas share timesteps at the clean end; the gate goes by timesteps, so x_I and switch do too."""
    pipeline = pipeline_of("DPM++ Karras", None)
    arguments, config = arguments_for(pipeline, 50), GraftConfig(tuned_fraction=0.96, sample_num_steps=50)
    levels, switch = checked_levels(config, pipeline, arguments)
    timesteps = pipeline.scheduler.timesteps.tolist()
    assert timesteps[levels.step_index - 1] == timesteps[levels.step_index] == switch.state_timestep
    assert timesteps[levels.step_index + 1] < switch.state_timestep < switch.switch_timestep


def test_a_scheduler_that_fails_in_its_steps_is_refused():
    """The first two of 50 beta sigmas are rounded to one timestep; diffusers starts at the second of them."""
    pytest.importorskip("scipy", reason="diffusers' beta sigmas need it")
    refused(CASES["DPM++ beta"].make(), "DPMSolverMultistepScheduler .* fails in its step .*fewer steps", steps=50)


@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_epsilon_at_pure_noise_is_refused(fraction):
    options = {**ZERO_SNR, "prediction_type": "epsilon", "timestep_spacing": "trailing"}
    scheduler = DDIMScheduler(**BETAS, **options, clip_sample=False, steps_offset=1)
    refused(scheduler, "not finite.*zero_snr.*v_prediction", fraction)


def warnings_of(scheduler, fraction=0.5, eta=0.0):
    pipeline = pipeline_with(scheduler, type(scheduler).__name__.startswith("Flow"))
    arguments = {**arguments_for(pipeline), **({"eta": eta} if pipeline.__class__.__name__ != "FluxPipeline" else {})}
    config = GraftConfig(tuned_fraction=fraction, sample_num_steps=STEPS, sample_eta=eta)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checked_levels(config, pipeline, arguments)
    return [str(w.message) for w in caught if "trl_pgraft" in w.filename]


@pytest.mark.parametrize(
    "eta, message", [(0.0, "DDPMScheduler adds noise"), (1.0, "sample_eta=1 has no effect: DDPM")]
)
def test_noise_that_was_not_asked_for_and_eta_without_effect_are_told(eta, message):
    (warning,) = warnings_of(CASES["DDPM"].make("leading"), eta=eta)
    assert message in warning


def test_a_sampler_that_does_as_it_is_told_is_not_warned_of():
    assert warnings_of(CASES["DDIM"].make("leading")) == []
    assert warnings_of(CASES["DDIM"].make("leading"), eta=1.0) == []
    assert warnings_of(CASES["LCM"].make(), fraction=1.0) == [], "final images need no deterministic sampler"


def test_noise_beyond_the_samples_seeds_is_told():
    found = warnings_of(CASES["flow Euler, stochastic"].make())
    assert len(found) == 2 and "does not hand FlowMatchEulerDiscreteScheduler the samples' generators" in found[1]


def test_a_variance_that_moves_the_level_is_told():
    found = warnings_of(DDPMScheduler(**BETAS, clip_sample=False, steps_offset=1, variance_type="fixed_large"))
    assert len(found) == 2 and "variance_type='fixed_large'" in found[1] and "'fixed_small'" in found[1]
