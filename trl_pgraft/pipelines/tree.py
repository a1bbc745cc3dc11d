# SPDX-License-Identifier: Apache-2.0

"""Find the batch axis of each of a denoiser's arguments, and pick rows of them, whatever they are nested in."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


def find_batch_axes(for_two: Any, for_three: Any) -> Any:
    """
    Batch axis of every tensor among arguments recorded for two and for three prompts.

    Args:
        for_two, for_three (`Any`):
            Dicts, lists and tuples of tensors and other values, of one structure.

    Returns:
        The same nesting with an axis for each tensor that grows with the prompts, 0 for a list that does, and `None`
        for everything else.

    Raises:
        `ValueError`: a tensor's shape changes otherwise than in proportion to the prompts.
    """
    if isinstance(for_two, dict):
        return {name: find_batch_axes(value, for_three[name]) for name, value in for_two.items()}
    if isinstance(for_two, torch.Tensor):
        return _tensor_axis(for_two.shape, for_three.shape)
    if isinstance(for_two, list | tuple):
        if len(for_two) != len(for_three):
            return 0
        return [find_batch_axes(*pair) for pair in zip(for_two, for_three, strict=True)]
    return None


def _tensor_axis(two: torch.Size, three: torch.Size) -> int | None:
    if two == three:
        return None
    for axis, sizes in enumerate(zip(two, three, strict=False)):
        if 3 * sizes[0] == 2 * sizes[1]:
            return axis
    raise ValueError(f"its shape is {tuple(two)} for two prompts and {tuple(three)} for three")


def merge_axes(one: Any, other: Any) -> Any:
    """Axes of either recording: a branch may lack what the other has."""
    if isinstance(one, dict) and isinstance(other, dict):
        return {name: merge_axes(one.get(name), other.get(name)) for name in one | other}
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [merge_axes(*pair) for pair in zip(one, other, strict=True)]
    return other if one is None else one


def map_tree(function: Callable[[Any, Any], Any], tree: Any, axes: Any) -> Any:
    """Apply `function(value, axis)` to the leaves of a tree of arguments; the axes say how far it is nested."""
    if tree is None:
        return None
    if isinstance(axes, dict):
        return {name: map_tree(function, value, axes[name]) for name, value in tree.items()}
    if isinstance(axes, list):
        return type(tree)(map_tree(function, *pair) for pair in zip(tree, axes, strict=True))
    return function(tree, axes)


def take_rows(tree: Any, axes: Any, rows: Sequence[int]) -> Any:
    """The rows at these places of everything that has a batch axis."""

    def take(value: Any, axis: int | None) -> Any:
        if axis is None:
            return value
        if isinstance(value, torch.Tensor):
            return value.index_select(axis, torch.as_tensor(rows, device=value.device))
        return [value[row] for row in rows]

    return map_tree(take, tree, axes)


def choose_rows(mask: torch.Tensor, chosen: Any, other: Any, axes: Any) -> Any:
    """
    Rows of `chosen` where `mask`, of `other` elsewhere.

    Args:
        mask (`torch.Tensor` of shape `(B,)`, bool):
            Which to take.
        chosen, other (`Any`):
            Arguments of `B` rows each.
        axes (`Any`):
            From [`find_batch_axes`].
    """
    if isinstance(axes, dict):
        return {name: choose_rows(mask, chosen[name], value, axes[name]) for name, value in other.items()}
    if isinstance(axes, list):
        return type(other)(choose_rows(mask, *parts) for parts in zip(chosen, other, axes, strict=True))
    if axes is None or other is None:
        return other
    if isinstance(other, list | tuple):
        return [c if m else o for m, c, o in zip(mask.tolist(), chosen, other, strict=True)]
    shape = [-1 if axis == axes else 1 for axis in range(other.ndim)]
    return torch.where(mask.to(other.device).reshape(shape), chosen, other)


def same_shapes(one: Any, other: Any) -> bool:
    """Whether two trees have tensors of equal shapes at equal places, so that rows of both make one batch."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_shapes(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_shapes, one, other))
    return type(one) is type(other)


def tensors_in(tree: Any, kind: Any = torch.Tensor) -> list[Any]:
    """All tensors, or other leaves of one `kind`, in a tree of dicts, lists and tuples, in its order."""
    if isinstance(tree, kind):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [leaf for part in parts for leaf in tensors_in(part, kind)]


def fill_tree(numbers: Any, values: Sequence[Any]) -> Any:
    """A tree of numbers with the value of each number in its place."""
    if isinstance(numbers, dict):
        return {name: fill_tree(part, values) for name, part in numbers.items()}
    if isinstance(numbers, list | tuple):
        return type(numbers)(fill_tree(part, values) for part in numbers)
    return values[numbers]


def nearly_equal(one: Any, other: Any, tolerance: float = 1e-3) -> bool:
    """Whether arguments are equal, tensors to a share of their norm."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and one.shape == other.shape:
        return bool((one.float() - other.float()).norm() <= tolerance * one.float().norm())
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(nearly_equal(one[name], other[name], tolerance) for name in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return all(nearly_equal(*pair, tolerance) for pair in zip(one, other, strict=True))
    if isinstance(one, torch.Tensor | dict | list | tuple) or type(one) is not type(other):
        return False
    return one == other or not isinstance(one, float | int | str)
