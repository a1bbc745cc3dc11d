# SPDX-License-Identifier: Apache-2.0

"""Runs with functions among their arguments are resumed where these do the same, and command lines ask for it."""

import functools

import pytest
from runs import make_trainer
from trl import TrlParser

from trl_pgraft import GraftConfig
from trl_pgraft.training.checkpoints import ChangedRunError


def options(folder, **others):
    size = {"sample_num_steps": 4, "sample_batch_size": 4, "sample_num_batches_per_epoch": 1, "samples_per_prompt": 4}
    return {"num_epochs": 1, "control_adapter": False, **size, "output_dir": str(folder), **others}


class Note:
    """An object to call at each step, with a state."""

    def __init__(self, level):
        self.level = level

    def __call__(self, pipeline, step, timestep, kwargs):
        return kwargs


def note(pipeline, step, timestep, kwargs, level=0):
    return kwargs


MADE = {
    "lambda": lambda level: lambda pipeline, step, timestep, kwargs: kwargs if level else dict(kwargs),
    "partial": lambda level: functools.partial(note, level=level),
    "object": Note,
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_a_run_with_a_function_is_resumed_with_that_function_alone(tmp_path, make):
    def trainer(level, **others):
        config = GraftConfig(**options(tmp_path, **others))
        return make_trainer(config, pipeline_kwargs={"callback_on_step_end": make(level)})

    trainer(1).train()
    assert trainer(1, resume_from_checkpoint="True").state.epoch == 1
    with pytest.raises(ChangedRunError, match="model, scheduler and sampling arguments"):
        trainer(2, resume_from_checkpoint="True")


def test_a_command_line_asks_for_the_newest_checkpoint_of_the_output_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_trainer(GraftConfig(**options(tmp_path / "run"))).train()

    def epoch(given):
        (config,) = TrlParser([GraftConfig]).parse_args_and_config(["--resume_from_checkpoint", given])
        fields = options(tmp_path / "run", num_epochs=2, resume_from_checkpoint=config.resume_from_checkpoint)
        return make_trainer(GraftConfig(**fields)).state.epoch

    assert [epoch(given) for given in ("True", "true", "latest", "False", "none")] == [1, 1, 1, 0, 0]
    assert make_trainer(GraftConfig(**options(tmp_path / "new", resume_from_checkpoint="true"))).state.epoch == 0
    with pytest.raises(ValueError, match="resume_from: yes is no checkpoint"):
        epoch("yes")
    (tmp_path / "latest").mkdir()
    with pytest.raises(ValueError, match="resume_from: latest is no checkpoint"):
        epoch("latest")
