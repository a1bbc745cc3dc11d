# SPDX-License-Identifier: Apache-2.0

"""The examples at a small size: the real embedded model, the real verifier."""

import json

import pytest
import torch

from examples import ddpo_dropin, quickstart
from examples.benchmarks import recipes
from trl_pgraft.rollouts.rollout import Evaluation


SMALL = {
    "num_epochs": 1,
    "sample_batch_size": 16,
    "sample_num_batches_per_epoch": 1,
    "train_batch_size": 4,
    "train_num_inner_epochs": 1,
}


@pytest.mark.parametrize("control_adapter", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_on_the_embedded_model(control_adapter):
    fields = {"name": "small", "eval_repeats": 1, "categories": ["single"], **SMALL}
    fields["control_adapter"] = control_adapter
    result = recipes.run(fields, "held_out")
    (last,) = result["rounds"]
    assert last["prompts"] == last["images"] == 32
    # One cautious round of four accepted images must leave what the base can do.
    assert last["base_score"] >= 0.9 and last["tuned_score"] >= 0.9
    (round_,) = result["logged"]
    assert round_["reward_accepted"] >= round_["reward"]


@pytest.mark.slow
def test_quickstart_writes_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "RECIPE", {**quickstart.RECIPE, **SMALL})
    monkeypatch.setattr(quickstart, "CATEGORIES", ("single",))
    monkeypatch.setattr(quickstart, "load_prompts", lambda split: ["a cat", "a dog", "two apples"] * 8)
    monkeypatch.setattr("sys.argv", ["quickstart", "--seed", "3", "--output-dir", str(tmp_path)])
    quickstart.main()
    summary = json.loads((tmp_path / "metrics.json").read_text())
    assert summary["seed"] == 3 and summary["prompts"] == 3 and summary["images"] == 48
    assert {"adapter", "samples", "before_after.png", "metrics.json"} <= {path.name for path in tmp_path.iterdir()}
    assert ("shows no improvement" in capsys.readouterr().out) == (not summary["significant"])


def test_a_ddpo_script_runs_with_another_import_line(tmp_path):
    arguments = "--num_epochs 2 --sample_num_steps 4 --sample_batch_size 4 --train_batch_size 2".split()
    trainer = ddpo_dropin.main([*arguments, "--save_dir", str(tmp_path)])
    assert [metrics["accepted"] for metrics in trainer.history] == [2, 2], "of a group of eight a round"
    assert trainer.history[0]["reward_accepted"] > trainer.history[0]["reward"]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"checkpoint_0", "checkpoint_1"}
    assert (tmp_path / "model" / "pytorch_lora_weights.safetensors").is_file()


def test_gain_is_averaged_over_images_of_a_prompt():
    prompts = ["a", "b", "a", "b"]
    base, tuned = torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    gain, half = quickstart.paired_gain(prompts, base, tuned)
    # The prompts' gains are 1 and 0: standard deviation 1 / sqrt(2), two prompts.
    assert gain == pytest.approx(0.5)
    assert half == pytest.approx(1.96 * 0.5**0.5 / 2**0.5)


def test_summary_is_not_significant_without_a_gain():
    values = torch.zeros(4, 2)
    evaluation = Evaluation(values[:, 0], values, torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    assert quickstart.summarize(["a", "b", "c", "d"], evaluation, evaluation)["significant"] is False
