# SPDX-License-Identifier: Apache-2.0

import asyncio
import itertools
import json
import os
import random
import subprocess
import sys

import datasets
import pytest
import torch
from diffusers import DDIMScheduler
from peft import LoHaConfig, LoraConfig
from runs import ANIMALS, adapter_of, any_animal, brightness, make_trainer, sample_iteration
from tiny_pipelines import ATTENTION, adapter_use, tiny_flux, tiny_sd, tiny_sdxl
from transformers import TrainerCallback

from trl_pgraft import PGraftTrainer, TimestepGate, accept_best_of_n, load_pgraft_adapter, register_reward
from trl_pgraft.adapters.files import read_switch
from trl_pgraft.adapters.lora import AdapterSwitch, adapter_parameters, tuner_layers
from trl_pgraft.pipelines.denoiser_call import denoiser_of
from trl_pgraft.rewards import RewardError, registry as functions
from trl_pgraft.training import difference, finetuner as finetuner_module


def colour(images):
    return 100 * (images[:, 0] - images[:, 2]).mean((1, 2))


def redness(*, prompts, images, **columns):
    """A reward in TRL's convention."""
    return [float(image.getpixel((0, 0))[0]) for image in images]


def base_of(denoiser):
    return {n.replace("base_layer.", ""): p.clone() for n, p in denoiser.named_parameters() if "lora_" not in n}


def equal(one, other):
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def assert_close(one, other, atol):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def assert_base_is_untouched(trainer, base):
    found = base_of(trainer.denoiser)
    assert found.keys() == base.keys()
    assert all(torch.equal(found[name], base[name]) for name in base)


def assert_nothing_is_left_behind(trainer):
    assert len(trainer.denoiser._forward_pre_hooks) == len(trainer.denoiser._forward_hooks) == 0
    assert "step" not in vars(trainer.pipeline.scheduler)


# Training moves what it should move.


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_loss": "conditional"},
        {"guidance_loss": "corrected"},
        {"guidance_loss": "combined"},
        {"train_cfg": True, "tuned_fraction": 1.0},
        {"sample_guidance_scale": 1.0},
        {"tuned_guidance_scale": 1.0},
        {"tuned_fraction": 1.0},
        {"timestep_sampling": "sampler", "ema_decay": 0.5, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_every_trainable_parameter_moves_and_no_other(config, options):
    trainer = make_trainer(config(**options))
    base, before = base_of(trainer.denoiser), adapter_of(trainer)
    trainable = {id(p) for p in trainer.denoiser.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapter_parameters(trainer.denoiser, "pgraft")}
    (metrics,) = trainer.train()
    assert metrics["skipped_steps"] == 0 and trainer.state.global_step == 2
    for old, new in zip(before, adapter_of(trainer), strict=True):
        assert not torch.equal(old, new)
    assert_base_is_untouched(trainer, base)
    assert_nothing_is_left_behind(trainer)


@pytest.mark.parametrize("make", [tiny_sdxl, tiny_flux])
def test_the_same_holds_for_other_models(config, make):
    trainer = make_trainer(config(), make())
    base, before = base_of(trainer.denoiser), adapter_of(trainer)
    trainer.train()
    assert not any(torch.equal(old, new) for old, new in zip(before, adapter_of(trainer), strict=True))
    assert_base_is_untouched(trainer, base)


@pytest.mark.parametrize(
    "make, options",
    [
        (tiny_sd, {"guidance_loss": "conditional"}),
        (tiny_sd, {"guidance_loss": "corrected", "num_epochs": 2}),
        (tiny_sd, {"guidance_loss": "combined"}),
        (tiny_sd, {"tuned_guidance_scale": 1.0}),
        (tiny_flux, {}),
    ],
)
def test_with_a_control_the_difference_becomes_the_adapter(config, make, options):
    trainer = make_trainer(config(control_adapter=True, **options), make())
    base = base_of(trainer.denoiser)
    assert not trainer.policy.has_adapter
    trainer.train()
    assert list(trainer.denoiser.peft_config) == ["pgraft"]
    layers = tuner_layers(trainer.denoiser, "pgraft")
    assert all(layer.get_delta_weight("pgraft").abs().max() > 1e-6 for layer in layers)
    assert {layer.r["pgraft"] for layer in layers} == {4 * trainer.config.num_epochs}
    assert_base_is_untouched(trainer, base)
    assert_nothing_is_left_behind(trainer)


def spied_fine_tunings(monkeypatch):
    """What each call of `fine_tune_adapter` was given: the trained adapter's parameters and all rows."""
    runs, original = [], finetuner_module.fine_tune_adapter

    def spy(accelerator, loss, states, passes, *args, **kwargs):
        passes = list(passes)
        runs.append((loss, states, passes))
        return original(accelerator, loss, states, iter(passes), *args, **kwargs)

    monkeypatch.setattr(finetuner_module, "fine_tune_adapter", spy)
    return runs


def test_where_all_are_accepted_both_adapters_see_the_same_rows(config, monkeypatch):
    runs = spied_fine_tunings(monkeypatch)
    trainer = make_trainer(config(acceptance="all", control_adapter=True))
    trainer.train()
    accepted, control = ([sorted(rows.states.tolist()) for rows in passes] for _, _, passes in runs)
    assert accepted == control == [list(range(4))] * 2
    assert [rows.seeds for rows in runs[0][2]] == [rows.seeds for rows in runs[1][2]]


def test_a_control_sees_as_many_rows_of_the_same_groups(config, monkeypatch):
    runs = spied_fine_tunings(monkeypatch)
    make_trainer(config(sample_num_batches_per_epoch=3, acceptance_kwargs={"k": 2}, control_adapter=True)).train()
    (_, _, accepted), (_, _, control) = runs
    for one, other in zip(accepted, control, strict=True):
        assert len(one) == len(other) == 6
        assert [i // 4 for i in one.states.tolist()] == [i // 4 for i in other.states.tolist()]
    states = [{i for rows in passes for i in rows.states.tolist()} for passes in (accepted, control)]
    assert states[0] != states[1]


@pytest.mark.parametrize(
    "options, scale, guidance",
    [
        ({"guidance_loss": "conditional"}, 1.0, 3.0),
        ({"guidance_loss": "corrected"}, 3.0, 3.0),
        ({"guidance_loss": "combined"}, 1.0, 3.0),
        ({"guidance_loss": "corrected", "tuned_guidance_scale": 1.0}, 1.0, 1.0),
        ({"guidance_loss": "conditional", "tuned_guidance_scale": 2.0, "control_scale": 1.0}, 1.0, 2.0),
        ({"guidance_loss": "conditional", "control_scale": 6.0}, 6.0, 3.0),
        ({"guidance_loss": "corrected", "control_scale": 6.0}, 18.0, 3.0),
    ],
    ids=str,
)
def test_guidance_is_that_of_the_tuned_steps(config, monkeypatch, options, scale, guidance):
    """The adapters' difference is scaled to `scale`, less what it moves the guided field by if that is not fitted."""
    runs, scales, original = spied_fine_tunings(monkeypatch), [], difference.merge_difference

    def spy(denoiser, policy, accepted, control, scale, max_rank):
        scales.append(scale)
        original(denoiser, policy, accepted, control, scale, max_rank)

    monkeypatch.setattr(difference, "merge_difference", spy)
    history = make_trainer(config(control_adapter=True, num_epochs=2, **options)).train()
    assert [metrics["control/scale"] for metrics in history] == scales
    movements = [metrics["control/movement"] for metrics in history]
    divides = options["guidance_loss"] != "combined"
    assert scales == pytest.approx([scale / movement if divides else scale for movement in movements])
    for movement in movements:
        assert 1 <= movement < 1.2 * guidance and (guidance > 1 or movement == 1)
    assert {loss.guidance_scale for loss, _, _ in runs} == {guidance}
    expected = [["pgraft_accepted"], ["pgraft_control"], ["pgraft", "pgraft_accepted"], ["pgraft", "pgraft_control"]]
    assert [loss.adapters for loss, _, _ in runs] == expected, "which distinguish the policy from the reference"


@pytest.mark.parametrize("guidance_loss, fitted", [("conditional", 1.0), ("corrected", 3.0)])
def test_the_guided_field_moves_by_control_scale_of_what_was_fitted(config, monkeypatch, guidance_loss, fitted):
    """On other states than those that the scale is measured on; the unconditional branch moves as well."""
    original, found = difference.merge_difference, []
    options = {"guidance_loss": guidance_loss, "train_learning_rate": 2e-4, "control_scale": 2.0}
    trainer = make_trainer(config(control_adapter=True, train_num_inner_epochs=8, **options))
    runs = spied_fine_tunings(monkeypatch)

    def fields(loss):
        generator = torch.Generator().manual_seed(5)
        timesteps = loss.levels.sample(32, generator)
        x_t, prompts = torch.randn(32, 4, 8, 8, generator=generator), torch.zeros(32, dtype=torch.long)
        with torch.no_grad():
            c, u = (loss._predict(loss.denoiser, x_t, timesteps, prompts, is_u) for is_u in (False, True))
        return c, u, u + 3.0 * (c - u)

    def measured(denoiser, policy, accepted, control, *rest):
        of_fits = []
        for name in (accepted, control):
            AdapterSwitch(denoiser, name).turn(True)
            of_fits.append(fields(runs[0][0]))
            AdapterSwitch(denoiser, name).turn(False)
        c, u, _ = (one - other for one, other in zip(*of_fits, strict=True))
        before = fields(runs[0][0])[2]
        original(denoiser, policy, accepted, control, *rest)
        moved = fields(runs[0][0])[2] - before
        found.append([(moved * c).sum() / c.square().sum(), (u * c).sum() / c.square().sum()])

    monkeypatch.setattr(difference, "merge_difference", measured)
    (metrics,) = trainer.train()
    moved, unconditional = found[0]
    assert moved == pytest.approx(2.0 * fitted, rel=0.1)
    assert unconditional > 0.2, "with 1/w for the scale it would be wrong"
    assert 0 < metrics["control/merge_error"] < 0.1


def test_without_a_signal_the_control_changes_next_to_nothing(config):
    """Where everything is accepted, both adapters learn the same, and less is left than one of them alone changes."""
    options = {"acceptance": "all", "train_num_inner_epochs": 4, "sample_num_batches_per_epoch": 8}
    options |= {"train_batch_size": 8, "train_learning_rate": 1e-3, "train_timestep_fraction": 1.0}
    plain = make_trainer(config(**options))
    plain.train()
    controlled = make_trainer(config(**options, control_adapter=True, control_scale=1.0))
    controlled.train()
    changes = [
        torch.cat([layer.get_delta_weight("pgraft").flatten() for layer in tuner_layers(t.denoiser, "pgraft")]).norm()
        for t in (plain, controlled)
    ]
    assert 0 < changes[1] < 0.5 * changes[0]


def test_a_moving_average_lags_behind(config, tmp_path):
    changes = []
    for decay in (None, 0.9):
        options = {"ema_decay": decay, "output_dir": str(tmp_path / str(decay))}
        trainer = make_trainer(config(train_num_inner_epochs=6, **options))
        before = adapter_of(trainer)
        trainer.train()
        changes.append([(new - old).norm() for old, new in zip(before, adapter_of(trainer), strict=True)])
    at_once, lagging = map(torch.stack, changes)
    assert (lagging > 0).all() and lagging.norm() < at_once.norm()


def test_the_learning_rate_follows_its_schedule_over_the_iterations(config, monkeypatch):
    rates, original = [], finetuner_module.fine_tune_adapter

    def spy(*args, **kwargs):
        *rest, lr_schedule = args
        return original(*rest, lambda step: rates.append(lr_schedule(step)) or rates[-1], **kwargs)

    monkeypatch.setattr(finetuner_module, "fine_tune_adapter", spy)
    make_trainer(config(num_epochs=3, lr_scheduler_type="linear", warmup_steps=2, train_learning_rate=0.4)).train()
    assert rates == pytest.approx([0.0, 0.2, 0.4, 0.3, 0.2, 0.1]), "two of warm-up, then down to the end of six"


def test_no_iteration_is_run_where_none_is_wanted(config):
    trainer = make_trainer(config())
    before = adapter_of(trainer)
    assert trainer.train(epochs=0) == [] and equal(before, adapter_of(trainer))
    assert len(trainer.train(epochs=2)) == 2 and len(trainer.train(epochs=2)) == 2, "they are done"


def test_graft_has_no_switch(config):
    trainer = make_trainer(config(tuned_fraction=1.0))
    assert trainer.policy.switch.switch_timestep is None and trainer.policy.levels.level_i == (1.0, 0.0)
    trainer.train()
    assert read_switch(trainer.output_dir / "adapter").switch_timestep is None
    with trainer.sampler() as pipeline, adapter_use(trainer.denoiser) as use:
        pipeline(prompt="a cat", **trainer.policy.arguments)
    assert all(use.values()) and len(use) == 4


def test_p_graft_runs_the_adapter_on_the_tuned_steps(config):
    trainer = make_trainer(config(tuned_fraction=0.25))
    with trainer.sampler() as pipeline, adapter_use(trainer.denoiser) as use:
        pipeline(prompt="a cat", **trainer.policy.arguments)
    assert list(use.values()) == [True, False, False, False]
    with trainer.sampler(reference=True) as pipeline, adapter_use(trainer.denoiser) as use:
        pipeline(prompt="a cat", **trainer.policy.arguments)
    assert list(use.values()) == [False] * 4
    assert_nothing_is_left_behind(trainer)


def exact_gaussian():
    """
    A pipeline that starts out right: for latents of law N(0, I) the exact velocity is zero, and that of a network
    with small random weights is nearly so.
    """
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1,
        set_alpha_to_one=False, prediction_type="v_prediction",
    )  # fmt: skip
    return tiny_sd(scheduler)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"control_adapter": True, "control_scale": 2.0},
        pytest.param({"tuned_fraction": 1.0}, marks=pytest.mark.slow),
    ],
    ids=["P-GRAFT", "P-GRAFT with control", "GRAFT"],
)
def test_rewards_improve_towards_red_and_towards_blue(config, options):
    """
    Paired with the reference's images of the same seeds, and in both directions, so that drift cannot pass: without a
    control adapter it is as large as the gain for some seeds, and is taken out by the mean of the two.
    """
    defaults = {"num_epochs": 2, "sample_guidance_scale": 1.0, "sample_batch_size": 24, "samples_per_prompt": 12}
    defaults |= {"acceptance_kwargs": {"k": 3}, "train_batch_size": 6, "train_timestep_fraction": 0.5}
    defaults |= {"train_num_inner_epochs": 4}
    lora = LoraConfig(r=8, lora_alpha=8, target_modules=["conv_in", "conv_out", "conv1", "conv2", *ATTENTION])
    gains = []
    for sign in (1, -1):
        trainer = make_trainer(
            config(**{**defaults, **options}),
            exact_gaussian(),
            lambda images, prompts, metadata, sign=sign: (sign * colour(images), {}),
            peft_config=lora,
        )
        before = trainer.evaluate(["a cat"] * 24, reference=True).reward
        trainer.train()
        gains.append(trainer.evaluate(["a cat"] * 24).reward - before)
    without_drift = (gains[0] + gains[1]) / 2
    for gain in gains if "control_adapter" in options else [without_drift]:
        assert gain.mean() > 0.25 * before.std()
        assert gain.mean() > 4 * gain.std() / 24**0.5


# Iterations.


def test_an_iteration_is_the_same_whatever_the_batches(config):
    """Groups of 24 and of 6 in six batches of 5 and in one batch."""
    trainers = []
    for size, count in ((5, 6), (30, 1)):
        options = {"sample_batch_size": size, "sample_num_batches_per_epoch": count, "train_batch_size": 4}
        trainers.append(make_trainer(config(**options, samples_per_prompt=24)))
    rollouts = [sample_iteration(trainer) for trainer in trainers]
    assert [group.size for group in rollouts[0].groups] == [24, 6]
    torch.testing.assert_close(rollouts[0].states, rollouts[1].states, rtol=0, atol=1e-5)
    torch.testing.assert_close(rollouts[0].total_reward, rollouts[1].total_reward, rtol=0, atol=1 / 255)
    assert torch.equal(rollouts[0].accepted, rollouts[1].accepted)
    for trainer, rollout in zip(trainers, rollouts, strict=True):
        trainer.finetuner.fine_tune(trainer.finetuner.training_set(rollout, 0), 0, lambda step: 1e-2)
    assert_close(adapter_of(trainers[0]), adapter_of(trainers[1]), atol=1e-3)


def test_equal_seeds_are_equal_runs_and_other_seeds_are_not(config, tmp_path):
    runs = []
    for number, seed in enumerate((0, 0, 1)):
        runs.append(make_trainer(config(seed=seed, output_dir=str(tmp_path / str(number)))))
        runs[-1].train()
    one, same, other = (adapter_of(trainer) for trainer in runs)
    assert equal(one, same) and not equal(one, other)


def test_samples_from_the_reference_do_not_depend_on_the_policy(config, tmp_path):
    rollouts = {}
    for source in ("policy", "reference"):
        trainer = make_trainer(config(sample_from=source, num_epochs=2, output_dir=str(tmp_path / source)))
        for parameter in adapter_parameters(trainer.denoiser, "pgraft"):
            parameter.data.fill_(0.5)
        rollouts[source] = sample_iteration(trainer).states
    untouched = sample_iteration(make_trainer(config())).states
    assert torch.equal(rollouts["reference"], untouched)
    assert not torch.allclose(rollouts["policy"], untouched, atol=1e-3)


def test_the_prompt_function_is_called_once_a_group_and_its_columns_reach_the_reward(config):
    count, seen = itertools.count(), []

    def spy(*, prompts, images, number, legs):
        seen.extend(zip(prompts, number, legs, strict=True))
        return [float(i) for i in range(len(prompts))]

    dataset = datasets.Dataset.from_dict({"prompt": ["a cat", "an ant"], "number": [0, 1], "legs": [4, 6]})
    two_groups = config(sample_num_batches_per_epoch=2)
    options = {"reward": None, "prompts": None, "reward_funcs": spy, "train_dataset": dataset}
    sample_iteration(make_trainer(two_groups, **options))
    assert sorted(seen) == [("a cat", 0, 4)] * 4 + [("an ant", 1, 6)] * 4
    sample_iteration(make_trainer(two_groups, prompts=lambda: (f"prompt {next(count)}", {})))
    assert next(count) == 2


def test_prompts_chosen_at_random_are_new_in_each_iteration_and_the_same_when_it_is_repeated(config):
    trainer = make_trainer(config(), prompts=lambda: (str(random.random()), {}))
    prompts = [trainer.collector.groups(epoch)[0].prompt for epoch in (0, 1, 2, 3, 2)]
    assert len(set(prompts)) == 4 and prompts[4] == prompts[2]


def test_weights_and_left_out_samples_enter_the_sum(config):
    def first(*, prompts, images, **_):
        return [1.0, 2.0, None, 4.0]

    def second(*, prompts, images, **_):
        return [40.0, 30.0, 20.0, 10.0]

    trainer = make_trainer(config(), reward=None, reward_funcs=[first, second], reward_weights=[1.0, 0.1])
    rollout = sample_iteration(trainer)
    assert (
        rollout.total_reward[[0, 1, 3]].tolist() == pytest.approx([5.0, 5.0, 5.0]) and rollout.total_reward[2].isnan()
    )
    metrics = trainer.train()[-1]
    assert metrics["rewards/first/mean"] == pytest.approx(7 / 3) and metrics["rewards/second/mean"] == 25


def test_rewards_may_be_async_and_scored_in_threads(config, tmp_path):
    async def later(*, prompts, images, **_):
        await asyncio.sleep(0.01)
        return redness(prompts=prompts, images=images)

    later.__name__ = "redness"
    rollouts = []
    for reward, is_async in ((redness, False), (later, True)):
        options = {"async_reward_computation": is_async, "max_workers": 3, "sample_batch_size": 2}
        trainer = make_trainer(config(**options, sample_num_batches_per_epoch=4), reward=None, reward_funcs=reward)
        rollouts.append(sample_iteration(trainer))
    assert torch.equal(rollouts[0].rewards, rollouts[1].rewards) and rollouts[0].rewards.unique().numel() > 2
    assert torch.equal(rollouts[0].accepted, rollouts[1].accepted)


@pytest.mark.parametrize("is_async", [False, True])
def test_rewards_of_images_can_be_computed_as_in_ddpo(config, is_async):
    trainer = make_trainer(config(), reward=lambda images, prompts, metadata: (images.mean((1, 2, 3)), metadata))
    images = torch.rand(2, 3, 8, 8)
    batches = [(images, ("a", "b"), (1, 2)), ((255 * images).to(torch.uint8), ("c", "d"), (3, 4))]
    rewards, infos = trainer.compute_rewards(batches, is_async)
    for found in rewards:
        torch.testing.assert_close(found.float(), images.mean((1, 2, 3)), rtol=0, atol=1 / 255)
    assert infos == ((1, 2), (3, 4))


def test_rewards_are_found_by_name(config, monkeypatch):
    monkeypatch.setattr(functions, "_REGISTRY", dict(functions._REGISTRY))
    register_reward("red")(redness)
    trainer = make_trainer(config(), reward=None, reward_funcs=["red", "trl_pgraft.rewards.jpeg:jpeg_compressibility"])
    assert [reward.name for reward in trainer.rewards] == ["red", "jpeg_compressibility"]
    assert trainer.train()[0]["rewards/red/mean"] > 0


def test_of_equal_images_one_is_accepted(config):
    options = {"acceptance": "all", "deduplicate_by": lambda image, prompt: prompt}
    rollout = sample_iteration(make_trainer(config(**options, sample_num_batches_per_epoch=2)))
    assert rollout.accepted.tolist() == [True, False, False, False] * 2


@pytest.mark.parametrize("acceptance", ["best_of_n", accept_best_of_n])
def test_acceptance_by_name_or_callable(config, acceptance):
    metrics = make_trainer(config(acceptance=acceptance)).train()[0]
    assert metrics["accepted"] == 1 and metrics["acceptance_rate"] == 0.25


def test_an_iteration_without_signal_trains_nothing_and_goes_on(config):
    trainer = make_trainer(config(num_epochs=2), reward=lambda images, *_: (torch.ones(len(images)), {}))
    before = adapter_of(trainer)
    history = trainer.train()
    assert [m["accepted"] for m in history] == [0, 0] and history[0]["frac_reward_zero_std"] == 1
    assert equal(before, adapter_of(trainer)) and trainer.state.global_step == 0


def test_the_hook_gets_what_ddpo_gives(config):
    seen = []
    trainer = PGraftTrainer(
        config(sample_num_batches_per_epoch=2),
        lambda images, prompts, metadata: (images.mean((1, 2, 3)), {"n": len(images)}),
        any_animal,
        tiny_sd(),
        lambda *args: seen.append(args),
    )
    trainer.train()
    ((batches, global_step, tracker),) = seen
    assert len(batches) == 2 and global_step == 0 and tracker.name == "none"
    images, prompts, metadata, rewards, info = batches[0]
    assert images.shape == (4, 3, 16, 16) and 0 <= images.min() and images.max() <= 1
    assert len(prompts) == 4 and metadata[0] == {"kind": "animal"} and info == {"n": 4}
    torch.testing.assert_close(rewards.float(), images.mean((1, 2, 3)))


def test_a_second_lora_of_the_users_takes_part_and_stays(config):
    pipeline = tiny_sd()
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=ATTENTION, init_lora_weights=False), "style")
    style = [p.detach().clone() for p in adapter_parameters(pipeline.unet, "style")]
    trainer = make_trainer(config(control_adapter=True), pipeline)
    with trainer.sampler(reference=True), adapter_use(trainer.denoiser, "style") as use:
        pipeline(prompt="a cat", **trainer.policy.arguments)
    assert all(use.values()), "the reference is the pipeline as it was handed in"
    trainer.train()
    assert equal(style, [p.detach() for p in adapter_parameters(pipeline.unet, "style")])


# What is logged and saved.


def test_metrics_are_returned_logged_and_written(config):
    trainer = make_trainer(config(num_epochs=2, eval_prompts=["a cat", "a dog"], eval_freq=1))
    history = trainer.train()
    written = [json.loads(line) for line in (trainer.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert written == history
    iterations = [m for m in history if "reward" in m]
    assert [m["epoch"] for m in iterations] == [0, 1] and [m["images"] for m in iterations] == [4, 8]
    assert [m["denoiser_calls"] for m in iterations] == [4 * 4 * 2, 4 * 4 * 2 * 2]
    assert iterations[0]["implied_kl_sum"] < iterations[1]["implied_kl_sum"]
    evaluations = [m for m in history if "eval/reward" in m]
    assert [m["epoch"] for m in evaluations] == [0, 1, 2], "the base comes first"
    assert evaluations[0]["eval/reward"] == evaluations[0]["eval/rewards/brightness/mean"]


def test_evaluation_repeats_itself_and_samples_the_reference(config):
    trainer = make_trainer(config(train_learning_rate=0.3))
    before = trainer.evaluate(ANIMALS)
    trainer.train()
    after, again = trainer.evaluate(ANIMALS), trainer.evaluate(ANIMALS)
    reference = trainer.evaluate(ANIMALS, reference=True)
    assert torch.equal(after.images, again.images) and torch.equal(before.images, reference.images)
    assert not torch.equal(after.images, before.images)
    assert before.reward.shape == (3,) and before.values.shape == (3, 1) and before.images.shape == (3, 3, 16, 16)
    with pytest.raises(ValueError, match="evaluate: no prompts"):
        trainer.evaluate()


def test_the_saved_adapter_gives_the_trainers_images(config):
    trainer = make_trainer(config(train_learning_rate=0.3, tuned_fraction=0.5))
    trainer.train()
    trainer.save_pretrained(trainer.output_dir / "mine")

    def sample(pipeline):
        generator = torch.Generator().manual_seed(0)
        return pipeline(prompt="a cat", generator=generator, output_type="pt", **trainer.policy.arguments).images

    with trainer.sampler() as pipeline:
        expected = sample(pipeline)
    for folder in ("mine", "adapter"):
        fresh = tiny_sd()
        base = sample(fresh)
        gate = load_pgraft_adapter(fresh, trainer.output_dir / folder)
        assert torch.equal(sample(fresh), expected) and not torch.allclose(base, expected, atol=1e-3)
        assert gate.switch_timestep == trainer.policy.switch.switch_timestep


class Recorder(TrainerCallback):
    def __init__(self, stop_after=None):
        self.events, self.stop_after = [], stop_after

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append("begin")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.events.append((state.epoch, state.global_step, logs["epoch"]))

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.epoch == self.stop_after

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append("end")


def test_callbacks_are_called_and_can_stop_the_run(config):
    recorder = Recorder(stop_after=2)
    trainer = make_trainer(config(num_epochs=5), callbacks=[recorder, TrainerCallback])
    assert len(trainer.train()) == 2
    assert recorder.events == ["begin", (1, 2, 0), (2, 4, 1), "end"]


# Several processes.

ON_TWO_PROCESSES = """
import sys, torch
from runs import adapter_of, make_trainer
from trl_pgraft import GraftConfig

trainer = make_trainer(GraftConfig(**eval(sys.argv[1])))
trainer.train()
assert trainer.accelerator.num_processes == 2
torch.save((adapter_of(trainer), trainer.history), sys.argv[2] + str(trainer.accelerator.process_index))
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"guidance_loss": "corrected"}, {"control_adapter": True}], ids=str)
def test_two_processes_are_one_with_twice_the_batch(config, tmp_path, options):
    options |= {"samples_per_prompt": 8, "num_epochs": 2, "eval_prompts": ["a cat"], "acceptance_kwargs": {"k": 2}}
    options |= {"train_adam_epsilon": 1e-4}  # Adam makes whole steps of gradients that are nothing but rounding
    alone = make_trainer(config(sample_num_batches_per_epoch=4, train_batch_size=2, **options))
    alone.train()
    shared = config(sample_num_batches_per_epoch=2, train_batch_size=1, **options, output_dir=str(tmp_path / "shared"))
    script = tmp_path / "script.py"
    script.write_text(ON_TWO_PROCESSES)
    environment = {"ACCELERATE_USE_CPU": "1", "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    command += [repr(vars(shared)), str(tmp_path / "rank")]
    subprocess.run(command, check=True, env={**os.environ, **environment})
    (one, history), (other, _) = (torch.load(tmp_path / f"rank{rank}") for rank in (0, 1))
    assert equal(one, other), "the processes agree"
    assert_close(one, adapter_of(alone), atol=1e-5)
    for found, expected in zip(history, alone.history, strict=True):
        for name in ("reward", "eval/reward", "images", "denoiser_calls", "accepted"):
            assert found.get(name) == pytest.approx(expected.get(name), abs=1e-3)


# Interrupted and resumed.


class Interrupting:
    """A reward that leaves the run when it is called for the n-th time."""

    def __init__(self, at):
        self.at, self.calls, self.__name__ = at, 0, "brightness"

    def __call__(self, images, prompts, metadata):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return brightness(images, prompts, metadata)


@pytest.mark.parametrize("control_adapter", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(config, tmp_path, control_adapter):
    def options(name):
        return {
            "num_epochs": 3,
            "control_adapter": control_adapter,
            "max_merged_rank": 10,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 1,
            "output_dir": str(tmp_path / name),
        }

    whole = make_trainer(config(**options("whole")))
    whole.train()
    interrupted = make_trainer(config(**options("parts")), reward=Interrupting(at=2))
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    assert_nothing_is_left_behind(interrupted)
    resumed = make_trainer(config(**options("parts"), resume_from_checkpoint=True))
    assert resumed.state.epoch == 1 and resumed.state.global_step == 2
    if not control_adapter:
        held = {id(p) for group in resumed.finetuner.optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in adapter_parameters(resumed.denoiser, "pgraft")}
    resumed.train()
    assert equal(adapter_of(resumed), adapter_of(whole))
    untimed = [
        [{name: value for name, value in metrics.items() if "time/" not in name} for metrics in trainer.history]
        for trainer in (resumed, whole)
    ]
    assert untimed[0] == untimed[1] and [m["epoch"] for m in untimed[0]] == [0, 1, 2]
    assert [m["images"] for m in untimed[0]] == [4, 8, 12]
    assert resumed.state.global_step == whole.state.global_step == 6


def test_train_resumes_from_the_given_folder(config, tmp_path):
    first = make_trainer(config(num_epochs=2))
    first.train()
    folder = str(first.output_dir / "checkpoints")
    resumed = make_trainer(config(num_epochs=3, output_dir=str(tmp_path / "other")))
    history = resumed.train(resume_from_checkpoint=folder)
    assert [metrics["epoch"] for metrics in history] == [0, 1, 2]
    whole = make_trainer(config(num_epochs=3, output_dir=str(tmp_path / "whole")))
    whole.train()
    assert equal(adapter_of(resumed), adapter_of(whole))


def test_the_newest_checkpoint_is_taken_and_old_ones_are_removed(config):
    trainer = make_trainer(config(num_epochs=4, num_checkpoint_limit=2))
    trainer.train()
    folder = trainer.output_dir / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint_2", "checkpoint_3"]
    resumed = make_trainer(config(num_epochs=4, resume_from=str(folder)))
    assert resumed.state.epoch == 4 and equal(adapter_of(resumed), adapter_of(trainer))
    older = make_trainer(config(num_epochs=4, resume_from=str(folder / "checkpoint_2")))
    assert older.state.epoch == 3 and not equal(adapter_of(older), adapter_of(trainer))


def test_a_new_run_in_a_used_folder_puts_the_old_one_aside(config):
    make_trainer(config(num_epochs=3)).train()
    with pytest.warns(UserWarning, match="earlier run.*checkpoints, metrics.jsonl, samples moved to .*previous_1"):
        trainer = make_trainer(config(num_epochs=2, seed=1))
        trainer.train()
    folder = trainer.output_dir
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["checkpoint_0", "checkpoint_1"]
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["round_0000", "round_0001"]
    old = folder / "previous_1"
    assert len(list((old / "checkpoints").iterdir())) == len(list((old / "samples").iterdir())) == 3
    assert len((old / "metrics.jsonl").read_text().splitlines()) == 3
    resumed = make_trainer(config(num_epochs=2, seed=1, resume_from_checkpoint=True))
    assert resumed.state.epoch == 2 and equal(adapter_of(resumed), adapter_of(trainer))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_a_run_resumed_for_more_iterations_goes_on_with_the_longer_schedule(config, monkeypatch, kind):
    options = {"lr_scheduler_type": kind, "train_learning_rate": 0.4}
    make_trainer(config(num_epochs=1, **options)).train()
    rates, original = [], finetuner_module.fine_tune_adapter

    def spy(*args, **kwargs):
        *rest, lr_schedule = args
        return original(*rest, lambda step: rates.append(lr_schedule(step)) or rates[-1], **kwargs)

    monkeypatch.setattr(finetuner_module, "fine_tune_adapter", spy)
    make_trainer(config(num_epochs=2, resume_from_checkpoint=True, **options)).train()
    halfway = {"linear": [0.2, 0.1], "cosine": [0.2, 0.2 * (1 - 0.5**0.5)]}[kind]
    assert rates == pytest.approx(halfway), "steps two and three of four"


def test_a_run_is_not_resumed_with_another_adapter(config):
    def lora(rank):
        return LoraConfig(r=rank, target_modules=["to_q", "to_k"])

    make_trainer(config(), peft_config=lora(2)).train()
    with pytest.raises(ValueError, match="adapter's r was 2 and is 4"):
        make_trainer(config(resume_from_checkpoint=True), peft_config=lora(4))
    assert make_trainer(config(resume_from_checkpoint=True), peft_config=lora(2)).state.epoch == 1


@pytest.mark.parametrize("limit", [None, 0])
def test_accelerates_default_limit_of_checkpoints_is_the_configurations(config, limit):
    trainer = make_trainer(config(num_epochs=3, num_checkpoint_limit=2, project_kwargs={"total_limit": limit}))
    trainer.train()
    assert len(list((trainer.output_dir / "checkpoints").iterdir())) == 2


def test_a_run_is_not_resumed_with_another_switch(config):
    trainer = make_trainer(config())
    trainer.train()
    folder = str(trainer.output_dir / "checkpoints")
    with pytest.raises(ValueError, match="checkpoint_0 is of another run: tuned_fraction was 0.6 and is 0.75; "):
        make_trainer(config(tuned_fraction=0.75, resume_from=folder))


def test_where_there_is_nothing_to_resume(config, tmp_path):
    assert make_trainer(config(resume_from_checkpoint=True)).state.epoch == 0
    with pytest.raises(ValueError, match="resume_from"):
        make_trainer(config(resume_from=str(tmp_path / "nowhere")))


# Training on samples that were kept.


def kept_samples(trainer, epoch=0):
    folder = trainer.output_dir / "samples" / f"round_{epoch:04d}"
    files = [str(path) for path in sorted(folder.iterdir())]
    return datasets.load_dataset("parquet", data_files=files, cache_dir=str(trainer.output_dir / "cache"))["train"]


@pytest.mark.parametrize("control_adapter", [False, True])
def test_kept_samples_train_the_same_adapter_again(config, tmp_path, monkeypatch, control_adapter):
    options = {"control_adapter": control_adapter, "sample_num_batches_per_epoch": 2}
    first = make_trainer(config(**options))
    first.train()
    dataset = kept_samples(first)
    assert len(dataset) == 8 and sum(dataset["accepted"]) == 2
    options["output_dir"] = str(tmp_path / "again")
    again = make_trainer(config(**options), reward=None, prompts=None, samples_dataset=dataset)
    monkeypatch.setattr(again.pipeline.scheduler, "step", _not_called)
    metrics = again.train()
    assert equal(adapter_of(again), adapter_of(first))
    assert len(metrics) == 1 and metrics[0]["accepted"] == 2
    assert metrics[0]["reward"] == pytest.approx(first.history[0]["reward"], abs=1e-12)


def _not_called(*args, **kwargs):
    raise AssertionError("nothing is to be sampled")


def test_samples_of_another_configuration_are_refused(config, tmp_path):
    first = make_trainer(config())
    first.train()
    other = config(sample_guidance_scale=2.0, output_dir=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="samples_dataset was sampled from another model .*, scheduler, guidance"):
        make_trainer(other, reward=None, prompts=None, samples_dataset=kept_samples(first)).train()


# Wrong input is named before anything is sampled.


@pytest.fixture
def no_call(monkeypatch):
    """A pipeline that must not be called."""
    pipeline = tiny_sd()
    monkeypatch.setattr(type(pipeline), "__call__", _not_called)
    return pipeline


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sd_pipeline": None}, "sd_pipeline is required"),
        ({"sd_pipeline": object()}, "sd_pipeline: object has neither a `transformer` nor a `unet`"),
        ({"prompt_function": None}, "Exactly one of prompt_function, train_dataset, samples_dataset.*got none"),
        (
            {"train_dataset": datasets.Dataset.from_dict({"prompt": ["a cat"]})},
            "Exactly one of.*prompt_function and train_dataset",
        ),
        (
            {"prompt_function": None, "train_dataset": datasets.Dataset.from_dict({"prompt": []})},
            "train_dataset is empty",
        ),
        (
            {"prompt_function": None, "train_dataset": datasets.Dataset.from_dict({"text": ["a cat"]})},
            "train_dataset has no column `prompt`; it has text",
        ),
        ({"reward_function": None}, "No reward: give reward_function.*reward_funcs"),
        ({"reward_funcs": redness}, "reward_function.*or reward_funcs.*not both"),
        ({"reward_function": None, "reward_funcs": "no_such_reward"}, "reward_funcs: no reward.*'no_such_reward'"),
        (
            {"reward_function": None, "reward_funcs": [redness], "reward_weights": [1.0, 2.0]},
            "reward_weights has 2 values for 1 reward_funcs",
        ),
        ({"reward_weights": [1.0]}, "reward_weights are those of reward_funcs"),
        ({"reward_function": None, "reward_funcs": [redness, redness]}, "named redness, redness.*`__name__`"),
        (
            {"options": {"control_adapter": True}, "peft_config": LoHaConfig(r=2, target_modules=ATTENTION)},
            "peft_config: control_adapter=True subtracts one LoRA from another; this is a LoHaConfig",
        ),
        ({"options": {"sample_batch_size": 1}}, "sample_batch_size.*= 1.*Sample more images"),
        ({"options": {"samples_per_prompt": 8, "acceptance_kwargs": {"k": 4}}}, "groups have 4 images, of which k=4"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_any_call(config, no_call, change, message):
    arguments = {"reward_function": brightness, "prompt_function": any_animal, "sd_pipeline": no_call, **change}
    settings = config(sample_num_batches_per_epoch=1, **arguments.pop("options", {}))
    with pytest.raises(ValueError, match=message):
        PGraftTrainer(settings, **arguments)


def test_a_prompt_that_is_no_string_is_refused_before_sampling(config):
    trainer = make_trainer(config(), prompts=lambda: (["a cat"], {}))
    trainer.pipeline.scheduler.step = _not_called
    with pytest.raises(ValueError, match="prompt_function must return"):
        trainer.train()


@pytest.mark.parametrize(
    "reward, message",
    [
        (lambda images, *_: (images.mean((1, 2, 3))[:2], {}), "returned 2 values for 4 images"),
        (lambda images, *_: (images.mean((1, 2, 3)) * float("nan"), {}), "returned nan for"),
    ],
)
def test_a_reward_with_wrong_values_stops_the_iteration(config, reward, message):
    trainer = make_trainer(config(), reward=reward)
    with pytest.raises(RewardError, match=f"Reward '<lambda>' on prompts .*{message}"):
        trainer.train()
    assert_nothing_is_left_behind(trainer)
    assert trainer.state.epoch == 0


def test_a_reward_that_raises_is_retried_as_often_as_configured(config):
    calls = []

    def broken(images, prompts, metadata):
        calls.append(1)
        raise ConnectionError("no answer")

    with pytest.raises(RewardError, match="'broken'.*a .*no answer.*in 4 attempts"):
        make_trainer(config(reward_retries=3), reward=broken).train()
    assert len(calls) == 4


def test_tuned_guidance_needs_a_guided_pipeline(config):
    with pytest.raises(ValueError, match="tuned_guidance_scale"):
        make_trainer(config(tuned_guidance_scale=1.0), tiny_flux()).train()


def test_an_exception_while_sampling_leaves_the_pipeline_as_it_was(config):
    trainer = make_trainer(config(tuned_guidance_scale=1.0))

    def fail(*_):
        raise FloatingPointError("broken on purpose")

    handle = denoiser_of(trainer.pipeline).conv_out.register_forward_pre_hook(fail)
    with pytest.raises(FloatingPointError):
        trainer.train()
    handle.remove()
    assert_nothing_is_left_behind(trainer)
    with TimestepGate(trainer.denoiser, "pgraft", None) as gate:
        assert gate._adapter.is_on
    assert trainer.train()[0]["accepted"] == 1
