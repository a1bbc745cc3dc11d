# SPDX-License-Identifier: Apache-2.0

"""The choice of t_I: each curve in cases with a known result, and a trainer that is left as it was."""

import inspect
import json
import math
import warnings

import pytest
import torch
from diffusers import DDIMScheduler
from peft import LoraConfig
from safety_checkers import tiny_checked_sd
from tiny_pipelines import ATTENTION, tiny_flux, tiny_sd

from examples import quickstart
from examples.benchmarks import intermediate_step
from trl_pgraft import GraftConfig, PGraftTrainer, choose_intermediate_step
from trl_pgraft.adapters.lora import active_adapters, adapter_parameters
from trl_pgraft.analysis.gradients import squared_mean
from trl_pgraft.analysis.intermediate_step import (
    _proposed,
    _warn_if_unresolved,
    conditional_variance,
    rank_correlation,
    with_scores,
)
from trl_pgraft.analysis.pilot import sample_pilot, score_completions
from trl_pgraft.pipelines.observe import observe_steps, record_trajectory
from trl_pgraft.report.plots import draw_choice


# Pilots of three prompts resolve little, and warn about it.
pytestmark = pytest.mark.filterwarnings("ignore:choose_intermediate_step")

PROMPTS = ["a cat", "a dog", "an ant"]


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3)).double(), {}


@pytest.fixture
def make(tmp_path):
    """Makes trainers with groups of four on a tiny pipeline of four steps."""

    def make(pipeline=None, reward=brightness, reward_funcs=None, peft_config=None, pipeline_kwargs=None, **options):
        defaults = {
            "sample_num_steps": 4,
            "sample_guidance_scale": 3.0,
            "sample_batch_size": 6,
            "sample_num_batches_per_epoch": 2,
            "samples_per_prompt": 4,
            "acceptance_kwargs": {"k": 1},
            "control_adapter": False,
            "train_batch_size": 8,
            "mixed_precision": "no",
            "output_dir": str(tmp_path / "out"),
        }
        config = GraftConfig(**{**defaults, **options})
        prompts = iter(PROMPTS * 100)
        source, pipeline = lambda: (next(prompts), {}), pipeline or tiny_sd()
        given = {"reward_funcs": reward_funcs, "peft_config": peft_config, "pipeline_kwargs": pipeline_kwargs}
        return PGraftTrainer(config, reward, source, pipeline, **given)

    return make


def test_flagged_images_are_left_out_and_counted(make):
    """One of each call: of two calls for the pilot, two for each fraction's predictions, two for completions."""

    def whiteness(*, images, **_):
        assert all(image.getextrema() != ((0, 0),) * 3 for image in images)
        return [sum(image.resize((1, 1)).getpixel((0, 0))) for image in images]

    for eta, flagged in ((0.0, 4), (1.0, 6)):
        trainer = make(tiny_checked_sd(), None, [whiteness], sample_eta=eta)
        result = choose_intermediate_step(trainer, fractions=[0.25, 0.5], completions=2)
        assert column(result, "flagged") == [flagged, flagged]


def test_a_callback_of_the_users_own_is_refused(make):
    trainer = make(pipeline_kwargs={"callback_on_step_end": lambda pipeline, step, timestep, tensors: tensors})
    with pytest.raises(ValueError, match="pipeline_kwargs has a `callback_on_step_end`"):
        choose_intermediate_step(trainer)


def column(result, name):
    return [row[name] for row in result.curves]


# The pilot.


def test_the_pilot_is_the_trainers_first_rollout(make):
    trainer = make(tuned_fraction=0.5)
    groups = trainer.collector.groups(0)
    with trainer.sampler(reference=True), torch.no_grad():
        pilot = sample_pilot(trainer.collector, groups, [1, 2, 4])
    rollout, _ = make(tuned_fraction=0.5).collector.sample_rollout(0)
    assert [s.seed for s in pilot.samples] == [s.seed for s in rollout.samples]
    assert torch.equal(pilot.total_reward, rollout.total_reward)
    assert torch.equal(pilot.accepted, rollout.accepted)
    assert torch.equal(pilot.states[2], rollout.states)
    assert not torch.equal(pilot.states[1], pilot.states[2])


def test_predicted_originals_are_the_schedulers_own(make):
    trainer, own = make(), []
    with observe_steps(trainer.pipeline.scheduler, lambda result, **_: own.append(result[1])):
        with trainer.sampler(reference=True), torch.no_grad():
            pilot = sample_pilot(trainer.collector, trainer.collector.groups(0), [1, 3, 4])
    for step_index in (1, 3):
        # Two batches of six images, four steps each.
        expected = torch.cat([own[step_index], own[4 + step_index]])
        torch.testing.assert_close(pilot.originals[step_index], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(pilot.originals[4], pilot.states[4])


def test_completions_share_x_i_and_differ_after_it(make):
    trainer, states, finals = make(sample_eta=1.0, sample_batch_size=12, sample_num_batches_per_epoch=1), [], []
    with trainer.sampler(reference=True), torch.no_grad():
        pilot = sample_pilot(trainer.collector, trainer.collector.groups(0), [2, 4])
        for number in (1, 2):
            pipeline, call = trainer.pipeline, trainer.policy.call
            with record_trajectory(pipeline, call, 2, 12) as middle, record_trajectory(pipeline, call, 4, 12) as end:
                score_completions(trainer.collector, pilot, 2, number)[0]
            states.append(middle.x_i)
            finals.append(end.x_i)
    assert torch.equal(states[0], pilot.states[2]) and torch.equal(states[1], pilot.states[2])
    for one, other in ((finals[0], finals[1]), (finals[0], pilot.states[4])):
        assert ((one - other).flatten(1).abs().amax(1) > 1e-3).all()


# The curves.


def test_with_a_deterministic_sampler_any_state_determines_the_reward(make):
    result = choose_intermediate_step(make())
    assert not result.stochastic
    assert column(result, "fraction") == [0.25, 0.5, 0.75, 1.0]
    assert column(result, "reward_variance") == [0.0] * 4
    assert result.curves[-1]["readable"] == pytest.approx(1.0) and result.curves[-1]["information"] == pytest.approx(1)
    for row in result.curves:
        assert row["information"] == pytest.approx(max(0.0, row["readable"]) ** 2)
    assert result.fraction in column(result, "fraction")


def test_what_is_proposed_leaves_steps_to_the_reference():
    rows = [{"fraction": f, "score": score} for f, score in ((0.25, 0.1), (0.5, 0.4), (0.75, 0.2), (1.0, 0.9))]
    assert _proposed(rows) == 0.5
    assert _proposed(rows[3:]) == 1.0


@pytest.mark.slow
def test_reward_variance_of_a_stochastic_sampler_falls_to_zero(make):
    result = choose_intermediate_step(make(sample_eta=1.0), PROMPTS * 2, completions=4)
    assert result.stochastic
    shares = column(result, "reward_variance")
    assert shares[-1] == 0.0 and result.curves[-1]["readable"] == pytest.approx(1.0)
    assert shares[0] > shares[2] > shares[3]
    assert column(result, "information") == pytest.approx([min(1, max(0, 1 - share)) for share in shares])


def test_a_flow_pipeline_has_the_same_curves(make):
    result = choose_intermediate_step(make(tiny_flux()), PROMPTS, [0.5, 1.0])
    assert not result.stochastic and result.curves[-1]["readable"] == pytest.approx(1.0)
    assert result.curves[-1]["timestep"] is None and result.curves[0]["timestep"] > 0
    assert math.isfinite(result.curves[0]["log_snr"])


@pytest.mark.parametrize("options", [{"guidance_loss": "corrected"}, {"guidance_loss": "combined"}, {}], ids=str)
def test_gradients_do_not_depend_on_the_batch(make, options):
    one, other = (choose_intermediate_step(make(train_batch_size=n, **options), PROMPTS, [0.5]) for n in (4, 64))
    for name in ("difficulty", "difficulty_all", "refit", "selection", "refit_error"):
        assert one.curves[0][name] == pytest.approx(other.curves[0][name], rel=1e-3, abs=1e-9)


def test_samples_left_out_by_the_reward_are_left_out(make):
    def patchy(*, images, prompts, **columns):
        return [None if i == 1 else float(image.getpixel((3, 3))[0]) for i, image in enumerate(images)]

    trainer = make(reward=None, reward_funcs=patchy)
    with trainer.sampler(reference=True), torch.no_grad():
        assert sample_pilot(trainer.collector, trainer.collector.groups(0), [4]).total_reward.isnan().sum() == 2
    result = choose_intermediate_step(trainer, PROMPTS, [0.5, 1.0])
    assert result.curves[-1]["readable"] == pytest.approx(1.0)
    assert all(math.isfinite(row[name]) for row in result.curves for name in ("difficulty", "refit", "score"))


def test_the_trainer_is_left_as_it_was_and_the_pilot_is_from_the_reference(make):
    trainer = make(train_learning_rate=1e-2)
    before = choose_intermediate_step(trainer, PROMPTS, [0.5, 1.0])
    for parameter in adapter_parameters(trainer.denoiser, "pgraft"):
        parameter.data.normal_(0, 0.3)
    kept = [p.detach().clone() for p in adapter_parameters(trainer.denoiser, "pgraft")]
    after = choose_intermediate_step(trainer, PROMPTS, [0.5, 1.0])
    assert after == before
    now = adapter_parameters(trainer.denoiser, "pgraft")
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True)) and all(p.requires_grad for p in now)
    assert set(trainer.denoiser.peft_config) == {"pgraft"} and active_adapters(trainer.denoiser) == ["pgraft"]
    assert not trainer.denoiser.training and trainer.pipeline.scheduler.step.__name__ == "step"
    assert "step" not in vars(trainer.pipeline.scheduler) and not trainer.denoiser._forward_pre_hooks
    trainer.step(0, 0)


def test_dropout_is_off_in_the_pilot_and_each_module_keeps_its_mode(make):
    """Of the denoiser, here in training mode but for one part, and of the adapter."""

    def pilot(**dropout):
        pipeline = tiny_sd()
        pipeline.unet.conv_out = torch.nn.Sequential(
            torch.nn.Dropout(dropout.get("denoiser", 0)), pipeline.unet.conv_out
        )
        lora = LoraConfig(r=2, target_modules=ATTENTION, lora_dropout=dropout.get("adapter", 0))
        trainer = make(pipeline, peft_config=lora, sample_batch_size=12, sample_num_batches_per_epoch=1)
        trainer.denoiser.train()
        trainer.denoiser.conv_in.eval()
        result = choose_intermediate_step(trainer, PROMPTS, [0.5, 1.0])
        assert [p.training for p in (trainer.denoiser, trainer.denoiser.mid_block, trainer.denoiser.conv_in)] == [
            1,
            1,
            0,
        ]
        return result

    assert pilot(denoiser=0.9, adapter=0.9) == pilot()


def test_with_a_control_adapter_there_is_no_adapter_before_and_after(make):
    trainer = make(control_adapter=True)
    choose_intermediate_step(trainer, PROMPTS, [0.5])
    assert not trainer.policy.has_adapter and active_adapters(trainer.denoiser) == []
    trainer.step(0, 0)
    assert trainer.policy.has_adapter


# Statistics.


def test_rank_correlation_is_within_groups():
    one = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0])]
    # Offsets and stretched values of a group do not count.
    assert rank_correlation(one, [torch.tensor([7.0, 70.0, 700.0]), torch.tensor([0.1, 0.2, 0.3])]) == pytest.approx(1)
    assert rank_correlation(one, [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 1.0])]) == pytest.approx(0)
    assert rank_correlation(one, [torch.zeros(3), torch.zeros(3)]) == 0.0
    left_out = [torch.tensor([1.0, torch.nan, 3.0, 4.0])]
    assert rank_correlation(left_out, [torch.tensor([1.0, -9.0, 3.0, 4.0])]) == pytest.approx(1)
    # Spearman's formula without ties: 1 - 6 sum d^2 / (n (n^2 - 1)) with d = (0, 1, 1, 0).
    assert rank_correlation([torch.arange(4.0)], [torch.tensor([0.0, 2.0, 1.0, 3.0])]) == pytest.approx(1 - 12 / 60)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_conditional_variance_of_a_known_case(share):
    generator = torch.Generator().manual_seed(0)
    groups, size, completions = 2000, 8, 3
    of_group = torch.randn(groups, generator=generator).repeat_interleave(size)
    of_state = torch.randn(groups * size, generator=generator) * math.sqrt(1 - share)
    noise = torch.randn(completions, groups * size, generator=generator) * math.sqrt(share)
    rewards = (10 * of_group + of_state + noise).double()
    # The group's own level, a hundred times as strong, is no variance within it; about 3 standard errors.
    assert conditional_variance(rewards, [size] * groups) == pytest.approx(share, abs=0.03)
    rewards[0, 5] = torch.nan
    assert conditional_variance(rewards, [size] * groups) == pytest.approx(share, abs=0.03)


def test_squared_mean_and_its_error_are_without_bias():
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([0.3, 0.0, -0.1]).double()
    vectors = mean + torch.randn(3000, 12, 3, generator=generator).double()
    estimates, errors = torch.tensor([squared_mean(own) for own in vectors]).T
    assert estimates.mean().item() == pytest.approx(0.1, abs=4 * estimates.std().item() / 3000**0.5)
    assert errors.mean().item() == pytest.approx(estimates.std().item(), rel=0.25)
    assert squared_mean(mean.repeat(3, 1)) == pytest.approx((0.1, 0.0), abs=1e-7)


def test_the_score_is_the_knee():
    rows = [{"information": i, "refit": r} for i, r in ((0.1, 1.0), (0.8, 2.0), (0.9, 3.0), (1.0, 4.0))]
    assert [row["score"] for row in with_scores(rows)] == pytest.approx([-0.15, 0.3, 0.15, 0.0])
    # If nothing else has to be learned, information alone decides; negative estimates are noise around zero.
    assert [row["score"] for row in with_scores([{**row, "refit": -1.0} for row in rows])] == [0.1, 0.8, 0.9, 1.0]


def test_a_pilot_that_resolves_nothing_gives_a_warning():
    with pytest.warns(UserWarning, match="Use more prompts"):
        _warn_if_unresolved([{"refit": 1.0, "refit_error": 1.6}, {"refit": 3.0, "refit_error": 0.1}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _warn_if_unresolved([{"refit": 1.0, "refit_error": 0.6}, {"refit": 3.0, "refit_error": 1.4}])


# Errors.


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ([0.05, 1.0], "0.05 falls on no step"),
        ([0.5, 1.2], "1.2 falls on no step"),
        ([0.0], "0.0 falls on no step"),
        ([0.5, 0.55], "0.55 falls on the same step as 0.5"),
        ([], "empty"),
    ],
)
def test_fractions_that_are_none_are_refused_before_anything_is_sampled(make, fractions, message):
    def reward(images, prompts, metadata):
        raise AssertionError("sampled")

    with pytest.raises(ValueError, match=message):
        choose_intermediate_step(make(reward=reward), PROMPTS, fractions)


def test_what_cannot_be_measured_is_refused(make):
    with pytest.raises(ValueError, match="completions=1"):
        choose_intermediate_step(make(), PROMPTS, completions=1)
    with pytest.raises(ValueError, match="2 groups are too few"):
        choose_intermediate_step(make(), PROMPTS[:2])
    with pytest.raises(ValueError, match="no group has two images of different reward"):
        choose_intermediate_step(make(reward=lambda images, prompts, metadata: ([1.0] * len(images), {})), PROMPTS)
    trainer = make()
    trainer.collector.prompt_source = None
    with pytest.raises(ValueError, match="no prompts to sample images for"):
        choose_intermediate_step(trainer)
    with pytest.raises(ValueError, match="accepted and rejected in 0 parts"):
        rule = {"acceptance": "threshold", "acceptance_kwargs": {"threshold": 2.0}}
        choose_intermediate_step(make(**rule), PROMPTS, [1.0])


def test_a_pipeline_without_callbacks_is_refused(make):
    trainer = make()

    class Plain:
        def __call__(self, prompt):
            return None

    trainer.policy.pipeline = Plain()
    assert "callback_on_step_end" not in inspect.signature(trainer.policy.pipeline.__call__).parameters
    with pytest.raises(ValueError, match="Plain takes no `callback_on_step_end`"):
        choose_intermediate_step(trainer, PROMPTS)


# The figure and the script.


def test_the_figure_is_drawn(make, tmp_path):
    result = choose_intermediate_step(make(sample_eta=1.0), PROMPTS, [0.5, 1.0], completions=2)
    draw_choice(result, tmp_path / "choice.png")
    assert (tmp_path / "choice.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_script_on_the_embedded_model(tmp_path, monkeypatch, capsys):
    options = ["--prompts", "3", "--fractions", "0.1", "1", "--guidance", "1", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["intermediate_step", *options])
    monkeypatch.setattr(intermediate_step, "RECIPE", {**quickstart.RECIPE, "samples_per_prompt": 4})
    intermediate_step.main()
    record = json.loads((tmp_path / "curves.json").read_text())
    first, last = record["curves"]
    assert last["readable"] == pytest.approx(1.0) and first["readable"] < 0.8
    # Hardly anything of a picture shows in nearly pure noise, so its loss is near that of knowing nothing.
    assert first["difficulty_all"] > 5 * last["difficulty_all"]
    assert f"{record['fraction']:g}" in capsys.readouterr().out and (tmp_path / "curves.png").exists()


def test_a_candidate_at_another_level_than_its_timesteps_is_refused(make):
    """With linspace DDIM's steps end elsewhere than at the next timestep; at 1.0 the trainer sees none of it."""
    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    pipeline = tiny_sd(DDIMScheduler(**options, steps_offset=1, timestep_spacing="linspace"))
    trainer = make(pipeline, sample_num_steps=6, tuned_fraction=1.0)
    with pytest.raises(ValueError, match="other levels than those of the denoiser's timesteps"):
        choose_intermediate_step(trainer, PROMPTS)
