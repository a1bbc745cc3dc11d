# SPDX-License-Identifier: Apache-2.0

"""What is written is there whole or not at all."""

import pytest
import torch

from trl_pgraft.core.atomic import atomic_save
from trl_pgraft.core.tensor_files import load_tensors, save_tensors


def write(folder, text):
    folder.mkdir()
    (folder / "a").write_text(text)


def test_a_folder_takes_the_place_of_the_one_before(tmp_path):
    target = tmp_path / "deep" / "checkpoint"
    for text in ("first", "second"):
        with atomic_save(target) as aside:
            write(aside, text)
    assert (target / "a").read_text() == "second"
    assert list(target.parent.iterdir()) == [target]


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path):
    target = tmp_path / "checkpoint"
    write(target, "first")
    with pytest.raises(KeyboardInterrupt), atomic_save(target) as aside:
        write(aside, "second")
        raise KeyboardInterrupt
    assert (target / "a").read_text() == "first"
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_process_left_is_replaced(tmp_path):
    target = tmp_path / "values.safetensors"
    (tmp_path / ".values.safetensors.tmp").write_text("half")
    save_tensors(target, {"x": torch.ones(2)}, {"made_from": "a"})
    assert list(tmp_path.iterdir()) == [target]


def test_tensors_of_other_tags_or_of_a_damaged_file_are_not_taken(tmp_path):
    path, wanted = tmp_path / "values.safetensors", torch.arange(6.0).reshape(2, 3).T
    assert load_tensors(path, {"made_from": "a"}) is None
    save_tensors(path, {"x": wanted}, {"made_from": "a"})
    assert torch.equal(load_tensors(path, {"made_from": "a"})["x"], wanted)
    assert load_tensors(path, {"made_from": "b"}) is None
    path.write_bytes(path.read_bytes()[:20])
    with pytest.warns(UserWarning, match="values.safetensors cannot be read"):
        assert load_tensors(path, {"made_from": "a"}) is None


def test_a_folder_that_is_a_link_is_replaced(tmp_path):
    """As where a user has moved a checkpoint to another disk."""
    elsewhere, target = tmp_path / "disk", tmp_path / "run" / "checkpoint"
    write(elsewhere, "moved")
    target.parent.mkdir()
    target.symlink_to(elsewhere, target_is_directory=True)
    with atomic_save(target) as aside:
        write(aside, "new")
    assert (target / "a").read_text() == "new" and (elsewhere / "a").read_text() == "moved"
    assert list(target.parent.iterdir()) == [target]
