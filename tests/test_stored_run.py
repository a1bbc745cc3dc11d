# SPDX-License-Identifier: Apache-2.0

"""A run that an earlier version of the package stored: what it left is resumed, trained on and loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from make_stored_run import make_trainer
from peft import LoraConfig
from runs import sample
from safetensors.torch import load_file
from tiny_pipelines import ATTENTION, tiny_sd

from trl_pgraft import NoiseCorrectionConfig, load_pgraft_adapter
from trl_pgraft.config import default_values
from trl_pgraft.training.checkpoints import ChangedRunError, refuse_changes


STORED = Path(__file__).parent / "fixtures" / "stored_run"


@pytest.fixture
def stored(tmp_path):
    """Copies a run of the fixture; `without` are names to remove from its run.json, or `(name, nested name)`."""

    def copy(name="plain", without=()):
        folder = Path(shutil.copytree(STORED / name, tmp_path / name))
        path = folder / "checkpoints" / "checkpoint_0" / "run.json"
        run = json.loads(path.read_text())
        for *outer, field in without:
            del (run[outer[0]] if outer else run)[field]
        path.write_text(json.dumps(run))
        return folder

    return copy


def resume(folder, **options):
    options = {"control_adapter": folder.name == "control", "resume_from_checkpoint": True, **options}
    if "control_scale" in json.loads((folder / "checkpoints" / "checkpoint_0" / "run.json").read_text()):
        options.setdefault("control_scale", 2.0)  # the default of then
    return make_trainer(folder, **options)


def untimed(folder):
    """Metrics of a run, without the seconds that it took."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "time/" not in name} for line in lines]


@pytest.mark.parametrize("name", ["plain", "control"])
def test_a_stored_checkpoint_resumes_and_trains(stored, name):
    """With other noise than the earlier version had, so that what is sampled and lost is not compared."""
    folder = stored(name)
    with pytest.warns(UserWarning, match="Not checked: text encoders, VAE"):
        trainer = resume(folder)
    assert trainer.state.epoch == 1
    trainer.train()
    (kept, new), (first, second) = untimed(folder), untimed(STORED / name)
    assert kept == first and {name for name in second if "loss/level" not in name} <= new.keys()
    for field in ("accepted", "acceptance_rate", "images", "denoiser_calls", "epoch"):
        assert new[field] == pytest.approx(second[field], rel=1e-4)
    if name == "plain":
        weights, earlier, start = (
            load_file(path / "adapter_model.safetensors")
            for path in (folder / "adapter", STORED / name / "adapter", STORED / name / "checkpoints" / "checkpoint_0")
        )
        for key, value in weights.items():
            assert 0 < (value - start[key]).abs().max() < 3e-3, "two steps of 1e-3, with the stored optimizer's state"
            torch.testing.assert_close(value, earlier[key], rtol=0, atol=4e-3)


def test_stored_samples_are_trained_on(tmp_path):
    samples = load_dataset("parquet", data_files=str(STORED / "plain/samples/*/*.parquet"), split="train")
    assert len(samples) == 4
    with pytest.warns(UserWarning, match="Not checked: text encoders, VAE"):
        trainer = make_trainer(tmp_path / "out", samples_dataset=samples, control_adapter=False, num_epochs=1)
    trainer.train()
    (metrics,), (earlier, _) = untimed(tmp_path / "out"), untimed(STORED / "plain")
    for name in ("reward", "reward_accepted", "accepted"):
        assert metrics[name] == pytest.approx(earlier[name], rel=1e-4)
    assert metrics["loss"] == pytest.approx(earlier["loss"], rel=0.2), "of other noise"


def test_a_stored_adapter_samples():
    pipeline = tiny_sd()
    before = sample(pipeline)
    gate = load_pgraft_adapter(pipeline, STORED / "plain" / "adapter")
    gated = sample(pipeline)
    assert gate.switch_timestep == 376.0
    gate.remove()
    always_on = sample(pipeline)
    assert not torch.equal(gated, before) and not torch.equal(gated, always_on)


@pytest.mark.parametrize("field, other", [("warmup_steps", 3), ("control_scale", 3.0), ("ema_decay", 0.5)])
def test_a_field_newer_than_the_run_counts_as_its_default(stored, field, other):
    folder = stored(without=[[field]])
    resume(folder)
    with pytest.raises(ChangedRunError, match=f"run: {field} was .* and is {other}. Resume"):
        resume(folder, **{field: other})


def test_a_field_of_the_adapter_newer_than_the_run_counts_as_its_default(stored):
    folder = stored(without=[["adapter", "use_rslora"], ["adapter", "rank_pattern"]])

    def lora(**options):
        fields = {"r": 2, "lora_alpha": 2, "target_modules": ATTENTION, "init_lora_weights": "gaussian"}
        return LoraConfig(**fields, **options)

    resume(folder, peft_config=lora())
    with pytest.raises(ChangedRunError, match="run: adapter's use_rslora was False and is True. Resume"):
        resume(folder, peft_config=lora(use_rslora=True))
    with pytest.raises(ChangedRunError, match="run: adapter's rank_pattern was '{}' and is .*to_q"):
        resume(folder, peft_config=lora(rank_pattern={"to_q": 1}))


def test_a_field_that_the_run_has_does_not_count_as_its_default(stored):
    with pytest.raises(ChangedRunError, match="run: train_learning_rate was 0.001 and is 0.0003. Resume"):
        resume(stored(), train_learning_rate=3e-4)


def test_a_field_of_noise_correction_newer_than_the_run_counts_as_its_default():
    config = NoiseCorrectionConfig(warmup_steps=7)
    run = config.resume_signature()
    stored = {name: value for name, value in run.items() if name not in ("warmup_steps", "seed")}
    with pytest.raises(ChangedRunError, match="run: warmup_steps was 100 and is 7. Resume"):
        refuse_changes(Path("checkpoint"), stored, run, default_values(config))
