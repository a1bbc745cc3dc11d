# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from trl_pgraft.pipelines.tree import (
    choose_rows,
    find_batch_axes,
    map_tree,
    merge_axes,
    same_shapes,
    take_rows,
)


def recording(count):
    """Arguments of every kind: tensors of either axis, a list that grows, nested values and constants."""
    return {
        "rows": torch.arange(2.0 * count).reshape(count, 2),
        "second": torch.arange(2.0 * count).reshape(2, count),
        "constant": torch.ones(3, 2),
        "list": [torch.full((i + 1,), float(i)) for i in range(count)],
        "nested": {"rows": torch.arange(count), "scale": 0.5},
        "pair": (torch.ones(4), torch.arange(count)),
        "nothing": None,
    }


AXES = find_batch_axes(recording(2), recording(3))


def test_axes_are_those_that_grow_with_the_prompts():
    assert AXES == {
        "rows": 0,
        "second": 1,
        "constant": None,
        "list": 0,
        "nested": {"rows": 0, "scale": None},
        "pair": [None, 0],
        "nothing": None,
    }


def test_guided_calls_grow_twofold():
    assert find_batch_axes(torch.zeros(4, 7), torch.zeros(6, 7)) == 0


def test_a_shape_that_changes_otherwise_is_an_error():
    with pytest.raises(ValueError, match=r"\(2, 5\) for two prompts and \(2, 6\) for three"):
        find_batch_axes(torch.zeros(2, 5), torch.zeros(2, 6))


def test_rows_are_taken_from_everything_that_has_them():
    taken = take_rows(recording(3), AXES, [2, 0])
    assert taken["rows"].tolist() == [[4, 5], [0, 1]] and taken["second"].tolist() == [[2, 0], [5, 3]]
    assert torch.equal(taken["constant"], torch.ones(3, 2)) and [len(v) for v in taken["list"]] == [3, 1]
    assert taken["nested"]["rows"].tolist() == [2, 0] and taken["nested"]["scale"] == 0.5
    assert isinstance(taken["pair"], tuple) and taken["pair"][1].tolist() == [2, 0] and taken["nothing"] is None


def test_what_one_branch_lacks_the_other_tells():
    assert merge_axes({"a": None, "b": [None, 0]}, {"a": 1, "b": [1, None], "c": 0}) == {"a": 1, "b": [1, 0], "c": 0}
    assert merge_axes(None, {"a": 0}) == {"a": 0}
    assert take_rows({"mask": None}, {"mask": 0}, [0, 1]) == {"mask": None}


def test_rows_are_chosen_one_by_one():
    mask = torch.tensor([True, False, True])
    other = map_tree(
        lambda v, axis: v if axis is None else (-v if torch.is_tensor(v) else v[::-1]), recording(3), AXES
    )
    mixed = choose_rows(mask, other, recording(3), AXES)
    assert mixed["rows"].tolist() == [[0, -1], [2, 3], [-4, -5]]
    assert mixed["second"].tolist() == [[0, 1, -2], [-3, 4, -5]]
    assert [len(v) for v in mixed["list"]] == [3, 2, 1] and mixed["pair"][1].tolist() == [0, 1, -2]
    assert torch.equal(mixed["constant"], torch.ones(3, 2)) and mixed["nothing"] is None


def test_shapes_are_compared_throughout():
    assert same_shapes(recording(3), recording(3)) and not same_shapes(recording(3), recording(2))
    assert not same_shapes({"mask": None}, {"mask": torch.ones(1)}) and not same_shapes({"a": 1}, {"b": 1})
