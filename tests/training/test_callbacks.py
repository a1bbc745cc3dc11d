# SPDX-License-Identifier: Apache-2.0

"""transformers' callbacks, TRL's among them, on a run of this loop."""

import pytest
from runs import any_animal, brightness
from tiny_pipelines import tiny_sd
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import RichProgressCallback

from trl_pgraft import GraftConfig, PGraftTrainer


EVENTS = [name for name in dir(TrainerCallback) if name.startswith("on_")]


class Recorder(TrainerCallback):
    """Notes every event, with the state at the time and the names of what came with it."""

    def __init__(self):
        self.events, self.states, self.values = [], [], []


def _recorded(event):
    def method(self, args, state, control, **values):
        self.events.append(event)
        self.states.append((state.epoch, state.global_step, state.max_steps))
        self.values.append(values)

    return method


for _event in EVENTS:
    setattr(Recorder, _event, _recorded(_event))


@pytest.fixture
def train(tmp_path):
    """Runs iterations of one group of four images: one accepted, two passes of two microbatches, one step each."""

    def run(*callbacks, **options):
        config = GraftConfig(
            sample_num_steps=4,
            sample_batch_size=4,
            sample_num_batches_per_epoch=1,
            train_timestep_fraction=0.5,
            train_num_inner_epochs=2,
            train_gradient_accumulation_steps=2,
            output_dir=str(tmp_path / "out"),
            **{"num_epochs": 2, **options},
        )
        trainer = PGraftTrainer(config, brightness, any_animal, tiny_sd(), callbacks=list(callbacks))
        trainer.train()
        return trainer

    return run


STEP = ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"]
ROUND = ["on_epoch_begin", *STEP, *STEP, "on_log", "on_epoch_end", "on_log", "on_evaluate", "on_save"]


def test_every_event_comes_in_transformers_order(train):
    recorder = Recorder()
    trainer = train(recorder, eval_prompts=["a cat"])
    start = ["on_init_end", "on_train_begin", "on_log", "on_evaluate"]
    assert recorder.events == [*start, *ROUND, *ROUND, "on_train_end"]
    assert all(values["model"] is trainer.denoiser for values in recorder.values)
    assert all(values["optimizer"] is trainer.finetuner.optimizer for values in recorder.values)
    ends = [state for event, state in zip(recorder.events, recorder.states, strict=True) if event == "on_step_end"]
    assert [step for _, step, _ in ends] == [1, 2, 3, 4] and {most for _, _, most in ends} == {4}
    begin = recorder.states[recorder.events.index("on_train_begin")]
    assert begin == (0, 0, 4), "the number of steps is set at the start"
    logged = [values for event, values in zip(recorder.events, recorder.values, strict=True) if event == "on_evaluate"]
    assert all("eval/reward" in values["metrics"] for values in logged)


def test_a_control_is_no_step(train):
    recorder = Recorder()
    trainer = train(recorder, control_adapter=True)
    assert recorder.events.count("on_step_end") == trainer.state.global_step == 4


class Requesting(TrainerCallback):
    """Requests something at the end of the first iteration."""

    def __init__(self, what):
        self.what = what

    def on_epoch_end(self, args, state, control, **values):
        if state.epoch == 1:
            setattr(control, self.what, True)


@pytest.mark.parametrize("what, event", [("should_save", "on_save"), ("should_evaluate", "on_evaluate")])
def test_a_callback_may_request_to_save_and_to_evaluate(train, what, event):
    options = {"num_epochs": 3, "save_freq": 9, "eval_freq": 9, "eval_prompts": ["a cat"]}
    usual, requested = Recorder(), Recorder()
    train(usual, **options)
    train(requested, Requesting(what), **options)
    assert requested.events.count(event) == usual.events.count(event) + 1


def test_a_run_that_is_stopped_is_saved(train):
    trainer = train(Requesting("should_training_stop"), num_epochs=5, save_freq=9)
    assert len(trainer.history) == 1
    assert (trainer.output_dir / "checkpoints" / "checkpoint_0").is_dir()


def test_trls_and_transformers_own_callbacks_work(train, capsys):
    trainer = train(RichProgressCallback, PrinterCallback(), ProgressCallback(), eval_prompts=["a cat"])
    printed = capsys.readouterr().out
    assert "'eval/reward'" in printed and "Step 4" in printed
    assert trainer.state.global_step == 4


def test_rich_shows_the_whole_run(train):
    bars = []

    class Watching(RichProgressCallback):
        def on_train_end(self, args, state, control, **values):
            (task,) = self.training_bar.tasks
            bars.append((task.completed, task.total))
            super().on_train_end(args, state, control, **values)

    train(Watching)
    assert bars == [(4, 4)]
