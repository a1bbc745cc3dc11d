# SPDX-License-Identifier: Apache-2.0

"""The optimizer steps that every fine-tuning takes, on one parameter with values found by hand."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers.training_utils import EMAModel

from trl_pgraft.training.optimizer import OptimizerSteps, launched_accelerator, learning_rates


@pytest.fixture
def make():
    """Steps of plain gradient descent from (3, 4), and the parameter."""

    def steps_of(average=None, **options):
        parameter = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        optimizer = torch.optim.SGD([{"params": [parameter]}], lr=123.0)
        accelerator = Accelerator(cpu=True)
        average = EMAModel([parameter], decay=average) if average else None
        prepared = accelerator.prepare(optimizer)
        return OptimizerSteps(accelerator, prepared, 10.0, "learning_rate", average, **options), parameter

    return steps_of


def take(steps, parameter, gradient, learning_rate=0.5):
    parameter.grad = torch.tensor(gradient)
    steps.take(learning_rate)


def test_a_step_has_the_learning_rate_it_is_given_and_clears_the_gradient(make):
    steps, parameter = make()
    take(steps, parameter, [2.0, 0.0], learning_rate=0.5)
    assert parameter.tolist() == [2.0, 4.0] and parameter.grad is None
    take(steps, parameter, [0.0, 2.0], learning_rate=0.25)
    assert parameter.tolist() == [2.0, 3.5]
    assert (steps.taken, steps.skipped) == (2, 0)


def test_a_gradient_of_a_larger_norm_is_scaled_down(make):
    steps, parameter = make()
    take(steps, parameter, [30.0, 40.0])
    torch.testing.assert_close(parameter.detach(), torch.tensor([3.0 - 0.5 * 6.0, 4.0 - 0.5 * 8.0]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_without_a_finite_gradient_is_skipped_and_counted(make, value):
    steps, parameter = make()
    take(steps, parameter, [value, 1.0])
    assert parameter.tolist() == [3.0, 4.0] and parameter.grad is None
    take(steps, parameter, [2.0, 0.0])
    assert parameter.tolist() == [2.0, 4.0]
    assert (steps.taken, steps.skipped) == (2, 1)


def test_the_tenth_skipped_step_in_a_row_is_an_error(make):
    steps, parameter = make()
    for gradient in (*[float("nan")] * 9, 1.0, *[float("nan")] * 9):
        take(steps, parameter, [gradient, 1.0])
    assert (steps.taken, steps.skipped) == (19, 18)
    with pytest.raises(RuntimeError, match="The last 10 optimizer steps .* Lower learning_rate or train in a higher"):
        take(steps, parameter, [float("nan"), 1.0])


def test_the_average_follows_the_parameters(make):
    """diffusers' average warms up: its decay is 0 at the first step, and 2 / 11 at the second."""
    steps, parameter = make(average=0.9)
    take(steps, parameter, [2.0, 0.0])
    take(steps, parameter, [2.0, 0.0])
    (average,) = steps.average.shadow_params
    torch.testing.assert_close(average, torch.tensor([2.0 + (1 - 2 / 11) * (1.0 - 2.0), 4.0]))
    assert parameter.tolist() == [1.0, 4.0]


def test_events_come_around_the_step_and_before_the_gradient_is_cleared(make):
    seen = []

    def on_event(event):
        seen.append((event, parameter.tolist(), parameter.grad.norm().item()))

    steps, parameter = make(on_event=on_event)
    take(steps, parameter, [20.0, 0.0])
    names = [event for event, _, _ in seen]
    assert names == ["on_pre_optimizer_step", "on_optimizer_step"]
    assert [values for _, values, _ in seen] == [[3.0, 4.0], pytest.approx([-2.0, 4.0])]
    assert [norm for *_, norm in seen] == pytest.approx([10.0, 10.0])


def test_the_learning_rate_stays_at_the_end_of_its_schedule():
    rate = learning_rates("cosine", 0.4, 2, 6)
    assert [rate(step) for step in (0, 1, 2, 4, 6, 9)] == pytest.approx([0.0, 0.2, 0.4, 0.2, 0.0, 0.0])


# What `accelerate launch` sets.

FIELD = ("train_gradient_accumulation_steps", 2)


@pytest.fixture
def launcher(monkeypatch):
    """Sets what the launcher does, in a process that has no accelerator yet; afterwards it has none again."""

    def forget():
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    def launch(**environment):
        forget()
        for name, value in environment.items():
            monkeypatch.setenv(f"ACCELERATE_{name}", value)

    yield launch
    forget()


@pytest.mark.parametrize(
    ("launched", "configured", "found"),
    [
        (None, None, "no"), ("no", None, "no"), ("bf16", None, "bf16"), ("bf16", "bf16", "bf16"),
        (None, "bf16", "bf16"), ("no", "bf16", "bf16"),
    ],
)  # fmt: skip
def test_the_launchers_precision_is_taken_where_the_configuration_has_none(launcher, launched, configured, found):
    launcher(**{"MIXED_PRECISION": launched} if launched else {})
    assert launched_accelerator(configured).mixed_precision == found


def test_the_precision_by_device_is_taken_where_neither_names_one(launcher):
    launcher(MIXED_PRECISION="no")
    assert launched_accelerator(None, "bf16").mixed_precision == "bf16"


@pytest.mark.parametrize(("launched", "configured"), [("bf16", "no"), ("fp16", "bf16"), ("fp8", None)])
def test_a_launcher_that_contradicts_the_precision_is_refused(launcher, launched, configured):
    launcher(MIXED_PRECISION=launched)
    with pytest.raises(ValueError, match=f"mixed_precision='{launched}'"):
        launched_accelerator(configured)


@pytest.mark.parametrize("steps", ["1", "2"])
def test_gradients_are_those_of_the_loss_whatever_the_launcher_accumulates(launcher, steps):
    launcher(GRADIENT_ACCUMULATION_STEPS=steps)
    accelerator, parameter = launched_accelerator(None, accumulation=FIELD), torch.nn.Parameter(torch.ones(()))
    OptimizerSteps(accelerator, torch.optim.SGD([parameter]), 1.0, "learning_rate").backward(3 * parameter)
    assert parameter.grad == 3


def test_an_accumulation_of_the_launcher_is_refused(launcher):
    launcher(GRADIENT_ACCUMULATION_STEPS="4")
    with pytest.raises(ValueError, match="gradient_accumulation_steps=4, and train_gradient_accumulation_steps is 2"):
        launched_accelerator(None, accumulation=FIELD)
    with pytest.raises(ValueError, match="noise correction is 1. Nothing is accumulated here: leave it out"):
        launched_accelerator(None)
    launcher(GRADIENT_ACCUMULATION_STEPS="1")
    with pytest.raises(ValueError, match="gradient_accumulation_steps=3"):
        launched_accelerator(None, accumulation=FIELD, gradient_accumulation_steps=3)


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_a_model_that_accelerate_splits_is_refused(launcher, name):
    launcher(**{f"USE_{name}": "true"})
    with pytest.raises(ValueError, match=f"{name}, which splits the model"):
        launched_accelerator(None)
