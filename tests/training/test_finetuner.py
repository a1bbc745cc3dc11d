# SPDX-License-Identifier: Apache-2.0

import itertools
from typing import NamedTuple

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from runs import make_trainer
from tiny_pipelines import add_random_adapter

from trl_pgraft import GraftConfig, renoise
from trl_pgraft.adapters.lora import active_adapters, adapter_parameters, add_adapter
from trl_pgraft.pipelines.conditioning import record_conditioning
from trl_pgraft.pipelines.denoiser_call import replay
from trl_pgraft.pipelines.introspection import introspect
from trl_pgraft.pipelines.timesteps import tuned_levels
from trl_pgraft.training.finetuner import fine_tune_adapter
from trl_pgraft.training.graft_loss import GraftLoss
from trl_pgraft.training.metrics import FineTuningReport
from trl_pgraft.training.rows import Rows, SelectedRows, count_microbatches, microbatches_of


PROMPTS = ["a cat", "a dog"]
GUIDANCE = 3.0
STEPS = 10


def loss_of(pipeline, guidance_loss="corrected", guidance=GUIDANCE, adapters=("pgraft",), **options):
    arguments = {"num_inference_steps": STEPS, "guidance_scale": guidance}
    introspection = introspect(pipeline, arguments)
    call = introspection.call
    levels, _ = tuned_levels(GraftConfig(sample_num_steps=STEPS), introspection.sampler, call.clock)
    return GraftLoss(
        denoiser=pipeline.unet,
        call=call,
        conditioning=record_conditioning(pipeline, call, PROMPTS, arguments),
        levels=levels,
        prediction_type="epsilon",
        guidance_loss=guidance_loss,
        guidance_scale=guidance,
        caption_dropout=options.get("caption_dropout", 0.0),
        adapters=list(adapters),
    )


@pytest.fixture
def tuned(sd):
    add_random_adapter(sd.unet)
    return sd


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x_i, noise = torch.randn(2, 3, 4, 8, 8, generator=generator)
    return {"x_i": x_i, "noise": noise, "timesteps": torch.tensor([901.0, 700.0, 605.0]), "prompts": [0, 1, 1]}


def evaluate(loss, batch, dropped=(False, False, False)):
    return loss(loss.denoiser, **batch, dropped=torch.tensor(dropped))


def predictions(loss, batch, adapter=True):
    """Conditional and unconditional prediction on the batch, with or without the adapter, and its weighted target."""
    unet = loss.denoiser
    level_t = loss.levels.schedule(batch["timesteps"])
    x_t, target, weight = renoise(batch["x_i"], batch["noise"], loss.levels.level_i, level_t, "epsilon")
    if not adapter:
        unet.disable_adapters()
    parts = []
    for unconditional in (False, True)[: loss.call.branches]:
        rows = loss.conditioning.rows(batch["prompts"], "cpu", unconditional)
        with torch.no_grad():
            parts.append(replay(unet, loss.call, x_t, batch["timesteps"], rows))
    unet.enable_adapters()
    return *parts, target, weight


def squared(difference, weight):
    return weight.float() * difference.square().flatten(1).mean(1)


def test_the_conditional_loss_compares_the_conditional_prediction(tuned, batch):
    loss = loss_of(tuned, "conditional")
    c, _, target, weight = predictions(loss, batch)
    torch.testing.assert_close(evaluate(loss, batch).detach(), squared(c - target, weight))


def test_dropped_rows_get_the_unconditional_input(tuned, batch):
    loss = loss_of(tuned, "conditional")
    c, u, target, weight = predictions(loss, batch)
    expected = squared(torch.stack([c[0], u[1], c[2]]) - target, weight)
    torch.testing.assert_close(evaluate(loss, batch, (False, True, False)).detach(), expected)


def test_the_combined_loss_compares_the_guided_prediction(tuned, batch):
    loss = loss_of(tuned, "combined")
    c, u, target, weight = predictions(loss, batch)
    torch.testing.assert_close(evaluate(loss, batch).detach(), squared(u + GUIDANCE * (c - u) - target, weight))


def test_the_corrected_loss_compares_the_conditional_prediction_with_a_target_by_the_reference(tuned, batch):
    loss = loss_of(tuned, "corrected")
    c, _, target, weight = predictions(loss, batch)
    _, u, _, _ = predictions(loss, batch, adapter=False)
    expected = squared(c - (u + (target - u) / GUIDANCE), weight)
    torch.testing.assert_close(evaluate(loss, batch).detach(), expected)
    assert active_adapters(tuned.unet) == ["pgraft"], "the reference was only called"


def test_the_reference_is_without_each_of_the_adapters(tuned, batch):
    before = loss_of(tuned, "corrected")
    _, u, target, weight = predictions(before, batch, adapter=False)
    add_random_adapter(tuned.unet, "accepted", seed=3)
    loss = loss_of(tuned, "corrected", adapters=("pgraft", "accepted"))
    c, _, _, _ = predictions(loss, batch)
    torch.testing.assert_close(evaluate(loss, batch).detach(), squared(c - (u + (target - u) / GUIDANCE), weight))


@pytest.mark.parametrize("guidance_loss", ["conditional", "corrected", "combined"])
def test_without_guidance_all_losses_are_one(tuned, batch, guidance_loss):
    loss = loss_of(tuned, guidance_loss, guidance=1.0)
    c, target, weight = predictions(loss, batch)
    torch.testing.assert_close(evaluate(loss, batch).detach(), squared(c - target, weight))


@pytest.mark.parametrize("guidance_loss", ["conditional", "corrected", "combined"])
def test_gradients_reach_the_adapter_and_nothing_else(tuned, batch, guidance_loss):
    loss = loss_of(tuned, guidance_loss)
    evaluate(loss, batch).mean().backward()
    own = {id(p) for p in adapter_parameters(tuned.unet, "pgraft")}
    for parameter in tuned.unet.parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == (id(parameter) in own)


# The optimizer loop.


def config_of(**options):
    defaults = {"train_batch_size": 2, "sample_num_steps": STEPS, "train_timestep_fraction": 0.1}
    return GraftConfig(**{**defaults, **options})


def rows_of(*passes, timesteps=1):
    """Passes over rows of the given numbers, in order, one timestep after the other."""
    for n, rows in enumerate(passes):
        numbers = torch.tensor(rows).repeat(timesteps)
        uses = torch.arange(timesteps).repeat_interleave(len(rows))
        yield Rows(numbers, numbers % 2, (1000 * (8 * n + numbers)).tolist(), uses)


def fine_tune_on(pipeline, passes, config, loss=None, **options):
    """Fine-tune the adapter, with plain gradient descent so that equal gradients give equal steps."""
    states = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    parameters = adapter_parameters(pipeline.unet, "pgraft")
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    schedule = options.pop("lr_schedule", lambda step: 0.05)
    loss = loss or loss_of(pipeline)
    return fine_tune_adapter(
        Accelerator(cpu=True),
        loss,
        states,
        rows_of(*passes, timesteps=config.num_train_timesteps),
        optimizer,
        config,
        schedule,
        **options,
    )


def values_of(pipeline):
    return [p.detach().clone() for p in adapter_parameters(pipeline.unet, "pgraft")]


def base_of(pipeline):
    return {n: p.detach().clone() for n, p in pipeline.unet.named_parameters() if "lora_" not in n}


def test_fine_tuning_moves_the_adapter_and_not_the_base(tuned):
    before, base = values_of(tuned), base_of(tuned)
    report = fine_tune_on(tuned, [[0, 1, 2, 3]], config_of())
    assert report.steps == 2 and report.skipped == 0
    assert not any(torch.equal(a, b) for a, b in zip(before, values_of(tuned), strict=True))
    assert all(torch.equal(value, base[name]) for name, value in base_of(tuned).items())
    assert not tuned.unet.training and tuned.unet.forward.__func__ is type(tuned.unet).forward, "as it was"


@pytest.mark.parametrize("guidance_loss", ["conditional", "corrected", "combined"])
def test_fine_tuning_lowers_its_loss(sd, guidance_loss):
    """One microbatch can be learnt by heart: 20 steps on the same rows, noise and timesteps."""
    add_adapter(sd.unet, LoraConfig(r=8, target_modules=["conv_in", "conv1", "conv2", "conv_out"]), "pgraft", seed=0)
    states = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.Adam(adapter_parameters(sd.unet, "pgraft"))
    passes = iter([Rows(torch.tensor([0, 1]), torch.tensor([0, 1]), [5, 6], torch.tensor([0, 0]))] * 20)
    loss = loss_of(sd, guidance_loss)
    report = fine_tune_adapter(Accelerator(cpu=True), loss, states, passes, optimizer, config_of(), lambda step: 0.03)
    assert report.losses[-1].mean() < 0.5 * report.losses[0].mean()


@pytest.mark.parametrize(
    "rows, options, microbatches, steps",
    [
        (4, {}, 2, 2),
        (5, {}, 3, 3),
        (4, {"train_timestep_fraction": 0.3}, 6, 6),
        (5, {"train_timestep_fraction": 0.3}, 8, 8),
        (4, {"train_gradient_accumulation_steps": 2}, 2, 1),
        (5, {"train_gradient_accumulation_steps": 2}, 3, 2),
        (4, {"train_num_inner_epochs": 3, "train_gradient_accumulation_steps": 4}, 6, 2),
    ],
)
def test_microbatches_and_steps_are_counted(tuned, rows, options, microbatches, steps):
    config, seen = config_of(**options), []
    passes = [list(range(rows))] * config.train_num_inner_epochs
    report = fine_tune_on(tuned, passes, config, on_event=seen.append)
    ends = seen.count("on_substep_end") + seen.count("on_step_end")
    assert count_microbatches(rows, config, processes=1) == ends == microbatches
    for event in ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"):
        assert report.steps == seen.count(event) == steps


@pytest.mark.parametrize(
    "rows, size, accumulation",
    [
        pytest.param([0, 1, 2, 3], 2, 2, id="equal microbatches"),
        pytest.param([0, 1, 2, 3, 4], 2, 3, id="a smaller last one"),
        pytest.param([0, 1, 2], 2, 4, id="a smaller group"),
    ],
)
def test_accumulated_microbatches_are_one_large_batch(tuned, sd, rows, size, accumulation):
    initial = values_of(tuned)
    fine_tune_on(tuned, [rows], config_of(train_batch_size=len(rows)))
    large = values_of(tuned)
    for parameter, value in zip(adapter_parameters(tuned.unet, "pgraft"), initial, strict=True):
        parameter.data.copy_(value)
    fine_tune_on(tuned, [rows], config_of(train_batch_size=size, train_gradient_accumulation_steps=accumulation))
    for one, other in zip(large, values_of(tuned), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


class Spy:
    """A loss that only keeps what it is given; every parameter takes part so that there is a gradient."""

    def __init__(self, pipeline, levels, caption_dropout=0.0, scale=1.0):
        self.denoiser, self.levels, self.caption_dropout, self.scale = pipeline.unet, levels, caption_dropout, scale
        self.given = []

    def __call__(self, model, x_i, noise, timesteps, prompts, dropped):
        self.given += zip(x_i, noise, timesteps.tolist(), prompts.tolist(), dropped.tolist(), strict=True)
        total = sum(p.sum() for p in adapter_parameters(self.denoiser, "pgraft"))
        return self.scale * total.expand(len(x_i))


def test_timesteps_and_noise_depend_on_the_row_alone(tuned):
    levels = loss_of(tuned).levels
    given = []
    for order, size in (([0, 1, 2, 3], 2), ([3, 1, 0, 2], 4)):
        spy = Spy(tuned, levels, caption_dropout=0.5)
        fine_tune_on(tuned, [order], config_of(train_batch_size=size, train_timestep_fraction=0.3), spy)
        given.append({(float(x_i.sum()), t, float(noise.sum()), dropped) for x_i, noise, t, _, dropped in spy.given})
    assert given[0] == given[1] and len(given[0]) == 12


def test_the_timesteps_of_a_row_are_stratified_over_the_tuned_range(tuned):
    levels = loss_of(tuned).levels
    spy = Spy(tuned, levels)
    fine_tune_on(tuned, [[0, 1]], config_of(train_timestep_fraction=0.4), spy)
    for prompt in (0, 1):
        timesteps = torch.tensor([t for _, _, t, p, _ in spy.given if p == prompt])
        assert sorted(levels.bin_of(timesteps, 4).tolist()) == [0, 1, 2, 3]
        assert (timesteps > levels.switch_timestep).all()


def test_each_row_timestep_and_pass_has_noise_of_its_own(tuned):
    spy = Spy(tuned, loss_of(tuned).levels)
    fine_tune_on(tuned, [[0, 1], [0, 1]], config_of(train_timestep_fraction=0.3), spy)
    noises = [noise for _, noise, _, _, _ in spy.given]
    assert len({float(noise.sum()) for noise in noises}) == 2 * 2 * 3
    correlations = torch.corrcoef(torch.stack([noise.flatten() for noise in noises])) - torch.eye(12)
    assert correlations.abs().max() < 6 / noises[0].numel() ** 0.5


@pytest.mark.parametrize("dropout, low, high", [(0.0, 0, 0), (0.5, 60, 140)])
def test_captions_are_dropped_at_their_rate(tuned, dropout, low, high):
    spy = Spy(tuned, loss_of(tuned).levels, dropout)
    fine_tune_on(tuned, [[i % 8 for i in range(8)]] * 25, config_of(train_batch_size=8), spy)
    assert len(spy.given) == 200 and low <= sum(dropped for *_, dropped in spy.given) <= high


def test_the_last_batch_of_a_pass_is_not_filled_up(tuned):
    spy = Spy(tuned, loss_of(tuned).levels)
    fine_tune_on(tuned, [[2, 3, 4]], config_of(), spy)
    assert [prompt for _, _, _, prompt, _ in spy.given] == [0, 1, 0]


class Rank(NamedTuple):
    """What of an accelerator says which rows are a process's own."""

    process_index: int
    num_processes: int


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_each_pair_of_row_and_timestep_once(processes):
    """7 rows at 3 timesteps in batches of 4 a process, two batches a step; weights make means over the steps."""
    config = config_of(train_batch_size=4, train_timestep_fraction=0.3, train_gradient_accumulation_steps=2)
    given = [
        list(microbatches_of(rows_of(range(7), timesteps=3), config, Rank(p, processes))) for p in range(processes)
    ]
    assert len({len(batches) for batches in given}) == 1, "as many exchanges of gradients"
    assert len(given[0]) == count_microbatches(7, config, processes)
    pairs, step = [], 0.0
    for parts in zip(*given, strict=True):
        assert len({part.ends_step for part in parts}) == 1
        for part in parts:
            step += part.weight * len(part.rows) / processes
            if part.weight:
                pairs += zip(part.rows.seeds, part.rows.uses.tolist(), strict=True)
        if parts[0].ends_step:
            assert step == pytest.approx(1)
            step = 0.0
    assert parts[0].ends_step and len(pairs) == len(set(pairs)) == 21


def test_pairs_of_row_and_timestep_are_shuffled_over_the_pass(config):
    """No sample is trained at its timesteps one after the other; the reference fit has the same order."""
    rollout, _ = make_trainer(config(sample_num_batches_per_epoch=8)).collector.sample_rollout(0)
    rows = SelectedRows(rollout, passes=2, seed_parts=(0, 0))
    (first, second), (control, _) = rows.passes(6), rows.passes(6, control=True)
    for one in (first, second):
        pairs = list(zip(one.states.tolist(), one.uses.tolist(), strict=True))
        assert set(pairs) == {(row, use) for row in rows.accepted.tolist() for use in range(6)}
        assert len(pairs) == len(rows) * 6 and pairs != sorted(pairs)
        runs = sum(a == b for a, b in itertools.pairwise(one.states.tolist()))
        assert runs < len(pairs) / 2, f"{runs} of {len(pairs)} follow one of the same sample"
    assert first.states.tolist() != second.states.tolist()
    assert (first.seeds, first.uses.tolist()) == (control.seeds, control.uses.tolist())


def test_the_learning_rate_is_that_of_the_schedule(tuned):
    numbers = []

    def schedule(step):
        numbers.append(step)
        return 0.1 if step < 2 else 0.0

    start = values_of(tuned)
    fine_tune_on(tuned, [[0, 1]] * 2, config_of(), lr_schedule=schedule)
    after_two = values_of(tuned)
    fine_tune_on(tuned, [[0, 1]] * 2, config_of(), lr_schedule=lambda step: 0.0)
    assert numbers == [0, 1]
    assert not torch.equal(start[0], after_two[0])
    assert all(torch.equal(a, b) for a, b in zip(after_two, values_of(tuned), strict=True))


def test_gradients_are_clipped(tuned):
    start = values_of(tuned)
    spy = Spy(tuned, loss_of(tuned).levels, scale=1e4)
    fine_tune_on(tuned, [[0, 1]], config_of(train_max_grad_norm=0.5), spy, lr_schedule=lambda step: 1.0)
    moved = torch.cat([(a - b).flatten() for a, b in zip(start, values_of(tuned), strict=True)])
    assert moved.norm().item() == pytest.approx(0.5, rel=1e-3)


def test_a_step_with_a_gradient_that_is_not_finite_is_skipped_and_counted(tuned):
    start = values_of(tuned)
    spy = Spy(tuned, loss_of(tuned).levels, scale=float("nan"))
    report = fine_tune_on(tuned, [[0, 1]] * 3, config_of(), spy)
    assert (report.steps, report.skipped) == (3, 3)
    assert all(torch.equal(a, b) for a, b in zip(start, values_of(tuned), strict=True))


def test_ten_skipped_steps_in_a_row_stop_training(tuned):
    spy = Spy(tuned, loss_of(tuned).levels, scale=float("inf"))
    with pytest.raises(RuntimeError, match="last 10 optimizer steps.*train_learning_rate.*mixed_precision"):
        fine_tune_on(tuned, [[0, 1]] * 12, config_of(), spy)


def test_a_report_averages_the_loss_by_level():
    report = FineTuningReport(steps=2, skipped=1)
    report.losses = [torch.tensor([1.0, 3.0]), torch.tensor([5.0])]
    report.bins = [torch.tensor([0, 3]), torch.tensor([3])]
    assert report.to_metrics(Accelerator(cpu=True)) == {
        "loss": 3.0,
        "loss/level_0": 1.0,
        "loss/level_3": 4.0,
        "skipped_steps": 1,
    }
