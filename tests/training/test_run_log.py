# SPDX-License-Identifier: Apache-2.0

import json

from accelerate import Accelerator
from runs import make_trainer

from trl_pgraft import PGraftTrainer
from trl_pgraft.training.run_log import RunLog


def test_values_that_are_not_finite_are_null_in_the_file(tmp_path):
    log = RunLog(tmp_path, Accelerator(cpu=True))
    log.rewrite([{"loss": 0.5}])
    log.write({"loss": float("nan"), "reward": float("-inf"), "epoch": 1})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == ['{"loss": 0.5}', '{"loss": null, "reward": null, "epoch": 1}']
    log.rewrite([])
    assert (tmp_path / "metrics.jsonl").read_text() == ""


class Overriding(PGraftTrainer):
    """Records which of its public methods the loop calls."""

    def __init__(self, *args, **kwargs):
        self.calls = []
        super().__init__(*args, **kwargs)

    def step(self, epoch, global_step):
        self.calls.append("step")
        return super().step(epoch, global_step)

    def log(self, metrics):
        self.calls.append("log")
        super().log({**metrics, "mine": 1.0})

    def evaluate(self, *args, **kwargs):
        self.calls.append("evaluate")
        return super().evaluate(*args, **kwargs)

    def save_checkpoint(self):
        self.calls.append("save_checkpoint")
        super().save_checkpoint()

    def save_model(self, output_dir=None):
        self.calls.append("save_model")
        super().save_model(output_dir)


def test_a_subclass_may_override_what_the_loop_calls(config, monkeypatch):
    monkeypatch.setattr("runs.PGraftTrainer", Overriding)
    trainer = make_trainer(config(eval_prompts=["a cat"]))
    trainer.train()
    once = ["step", "log", "evaluate", "log", "save_checkpoint", "save_model"]
    assert trainer.calls == ["evaluate", "log", *once]
    lines = (trainer.output_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["mine"] for line in lines] == [1.0] * 3
