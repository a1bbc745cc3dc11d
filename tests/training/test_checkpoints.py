# SPDX-License-Identifier: Apache-2.0

import json
import shutil

import pytest
import torch
from cases import CASES, make_trainer
from peft import LoraConfig
from tiny_pipelines import add_random_adapter, tiny_sd

from trl_pgraft import GraftConfig, SwitchLevel, save_pgraft_adapter
from trl_pgraft.adapters.files import load_adapter_weights, read_switch
from trl_pgraft.adapters.lora import adapter_parameters
from trl_pgraft.training.checkpoints import (
    ChangedRunError,
    check_same_run,
    checkpoints_in,
    find_checkpoint,
    load_optimizer,
    load_trainer_state,
    prune_checkpoints,
    reading,
    save_checkpoint,
)
from trl_pgraft.training.state import TrainerState


SWITCH = SwitchLevel(500.0, -0.5, 450.0)
CONFIGS = (GraftConfig(), LoraConfig())


def optimizer_of(parameters):
    return torch.optim.AdamW(parameters, lr=0.1, betas=(0.8, 0.9), weight_decay=0.01)


def descend(optimizer, steps, seed=0):
    """Optimizer steps on gradients that the seed alone determines."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def save(folder, epoch, pipeline=None, optimizer=None, **options):
    save_adapter = None if pipeline is None else lambda path: save_pgraft_adapter(pipeline, path, SWITCH)
    return save_checkpoint(folder, TrainerState(epoch=epoch, **options), {"seed": 0}, optimizer, save_adapter)


def test_the_state_comes_back(tmp_path):
    state = TrainerState(3, 40, 96, 1920, 2, 1.25, False, 120, [{"loss": 0.5, "epoch": 2}])
    path = save_checkpoint(tmp_path, state, {})
    assert path == tmp_path / "checkpoint_2"
    assert load_trainer_state(path) == state


def test_adapter_and_optimizer_continue_where_they_were(sd, tmp_path):
    """Two steps, saved, loaded, and two more are the same as four."""
    add_random_adapter(sd.unet)
    optimizer = optimizer_of(adapter_parameters(sd.unet, "pgraft"))
    descend(optimizer, 2)
    path = save(tmp_path, 1, pipeline=sd, optimizer=optimizer)
    descend(optimizer, 2, seed=1)

    fresh = tiny_sd()
    load_adapter_weights(fresh.unet, path, "pgraft")
    parameters = adapter_parameters(fresh.unet, "pgraft")
    assert all(p.requires_grad and p.dtype == torch.float32 for p in parameters)
    loaded = optimizer_of(parameters)
    load_optimizer(path, loaded)
    descend(loaded, 2, seed=1)
    for found, expected in zip(parameters, adapter_parameters(sd.unet, "pgraft"), strict=True):
        assert torch.equal(found, expected)
    assert loaded.param_groups[0]["betas"] == (0.8, 0.9)
    assert read_switch(path) == SWITCH


def test_a_checkpoint_has_no_pickles(sd, tmp_path):
    add_random_adapter(sd.unet)
    optimizer = optimizer_of(adapter_parameters(sd.unet, "pgraft"))
    descend(optimizer, 1)
    path = save(tmp_path, 1, pipeline=sd, optimizer=optimizer)
    assert {file.suffix for file in path.iterdir()} <= {".safetensors", ".json", ".md"}


def test_an_optimizer_without_stored_state_stays_fresh(tmp_path):
    path = save(tmp_path, 1)
    optimizer = optimizer_of([torch.nn.Parameter(torch.zeros(2))])
    load_optimizer(path, optimizer)
    assert optimizer.state_dict()["state"] == {}


def test_the_newest_checkpoint_is_found_by_number(tmp_path):
    for epoch in (2, 10, 1):
        save(tmp_path, epoch)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint_0", "checkpoint_1", "checkpoint_9"]
    assert find_checkpoint(tmp_path).name == "checkpoint_9"
    assert find_checkpoint(tmp_path / "checkpoint_1").name == "checkpoint_1"


def test_where_there_is_no_checkpoint_the_field_is_named(tmp_path):
    with pytest.raises(ValueError, match="resume_from: .* is no checkpoint and has none"):
        find_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="resume_from"):
        find_checkpoint(tmp_path / "checkpoint_3")


def test_an_interrupted_write_is_not_taken_for_a_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(json, "dumps", _fail)
    with pytest.raises(OSError):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert find_checkpoint(tmp_path).name == "checkpoint_0"
    save(tmp_path, 2)
    assert find_checkpoint(tmp_path).name == "checkpoint_1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_0", "checkpoint_1"]


def _fail(*_, **__):
    raise OSError("disk full, on purpose")


def test_a_checkpoint_is_replaced_by_one_of_the_same_iteration(tmp_path):
    save(tmp_path, 1, images=8)
    assert load_trainer_state(save(tmp_path, 1, images=16)).images == 16


def test_copies_of_users_beside_the_checkpoints_are_left_alone(tmp_path):
    path = save(tmp_path, 1)
    shutil.copytree(path, tmp_path / "checkpoint_0_good")
    save(tmp_path, 2)
    assert [p.name for p in checkpoints_in(tmp_path)] == ["checkpoint_0", "checkpoint_1"]


def test_an_output_folder_is_resumed_from_its_checkpoints(tmp_path):
    path = save(tmp_path / "checkpoints", 1)
    assert find_checkpoint(tmp_path) == path


def test_the_oldest_checkpoints_go_first(tmp_path):
    for epoch in range(1, 13):
        save(tmp_path, epoch)
    prune_checkpoints(tmp_path, 3)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint_9", "checkpoint_10", "checkpoint_11"]
    prune_checkpoints(tmp_path, 5)
    assert len(checkpoints_in(tmp_path)) == 3


def test_a_run_of_other_values_is_refused(tmp_path):
    run = {"seed": 0, "acceptance": "top_k", "rewards": {"red": 1.0}}
    path = save_checkpoint(tmp_path, TrainerState(epoch=1), run)
    check_same_run(path, dict(run), *CONFIGS)
    with pytest.raises(ChangedRunError, match="seed was 0 and is 1; rewards was {'red': 1.0} and is {}"):
        check_same_run(path, {**run, "seed": 1, "rewards": {}}, *CONFIGS)


def test_functions_of_one_name_are_told_apart_but_in_older_checkpoints(tmp_path):
    one, other = (GraftConfig(acceptance=lambda rewards, c=c: rewards > c).resume_signature(1) for c in (0.2, 0.4))
    path = save_checkpoint(tmp_path, TrainerState(epoch=1), one)
    check_same_run(
        path, GraftConfig(acceptance=lambda rewards, c=0.2: rewards > c).resume_signature(1) | one, *CONFIGS
    )
    with pytest.raises(
        ChangedRunError, match="functions was {'acceptance': '<lambda>, code .* and is .*'<lambda>, code"
    ):
        check_same_run(path, other, *CONFIGS)
    older = {name: value for name, value in one.items() if name != "functions"}
    check_same_run(save_checkpoint(tmp_path, TrainerState(epoch=2), older), other, *CONFIGS)


@pytest.mark.parametrize("damage", ["truncated", "missing", "nonsense"])
def test_a_checkpoint_that_cannot_be_read_is_named_and_left_alone(tmp_path, damage):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    file = path / "progress.json"
    file.write_text({"truncated": file.read_text()[:20], "missing": "{}", "nonsense": '{"epochs": 3}'}[damage])
    if damage == "missing":
        (path / "run.json").unlink()
    before = sorted((p.name, p.read_bytes()) for p in path.iterdir())
    with pytest.raises(ValueError, match="checkpoint_1 cannot be read .*left as it was|checkpoint_0") as error:
        with reading(path):
            check_same_run(path, {"seed": 0}, *CONFIGS)
            load_trainer_state(path)
    assert "checkpoint_1" in str(error.value) and "checkpoint_0" in str(error.value)
    assert before == sorted((p.name, p.read_bytes()) for p in path.iterdir())


def test_a_changed_run_is_not_taken_for_an_unreadable_checkpoint(tmp_path):
    path = save(tmp_path, 1)
    with pytest.raises(ChangedRunError), reading(path):
        check_same_run(path, {"seed": 1}, *CONFIGS)


def test_a_run_that_accepts_nothing_leaves_no_adapter_of_an_earlier_one(tmp_path):
    """It is moved aside, as its samples are."""
    case, options = CASES["SD 1.5"], {"control_adapter": True}
    make_trainer(case, tmp_path, **options).train()
    earlier = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    nothing = {"acceptance": lambda rewards: rewards * 0.0, "acceptance_kwargs": {}}
    with pytest.warns(UserWarning, match="adapter, checkpoints.* moved to .*previous_1"):
        make_trainer(case, tmp_path, **options, **nothing).train()
    assert not (tmp_path / "adapter").exists()
    moved = tmp_path / "previous_1" / "adapter"
    assert (moved / "adapter_model.safetensors").read_bytes() == earlier and (moved / "pgraft.json").is_file()
