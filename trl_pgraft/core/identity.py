# SPDX-License-Identifier: Apache-2.0

"""Texts of values that are the same in another process, so that two runs can be compared."""

import functools
import hashlib
import inspect
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

import torch


PLAIN = (str, int, float, bool, type(None))
NAMED = (type, ModuleType, BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType)
DEEPEST = 8  # of nested values; deeper ones count by their types


def stable(value: Any, depth: int = 0) -> str:
    """
    Text of `value`, which is the same in another process and for nothing else.

    Images, tensors and arrays count by their content. Functions count by their code, defaults, closure and the plain
    globals that they name; objects with an address as their text, and all that can be called, by type and state;
    modules by the shapes of their weights. `depth` (default `0`) is the number of values that this one is inside.

    Raises:
        `ValueError`: a value has neither content nor state that can be read.
    """
    inner = functools.partial(stable, depth=depth + 1)
    if depth > DEEPEST:
        return type(value).__qualname__
    if isinstance(value, list | tuple):
        return str([inner(v) for v in value])
    if isinstance(value, set | frozenset):
        return str(sorted(map(inner, value)))
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy().tobytes()
    elif hasattr(value, "tobytes") and getattr(value, "ndim", 1) != 0:  # an image or an array, but no number of numpy
        value = value.tobytes()
    if isinstance(value, bytes):
        return _hash_of(value)
    if isinstance(value, PLAIN) or (not callable(value) and " at 0x" not in str(value)):
        return str(value)
    if isinstance(value, dict):
        return str({key: inner(v) for key, v in value.items()})
    return _hash_of(str([inner(part) for part in _parts_of(value)]).encode())


def _hash_of(value: bytes) -> str:
    return hashlib.blake2b(value, digest_size=8).hexdigest()


def _parts_of(value: Any) -> list[Any]:
    """What makes a function or an object what it is, without its address."""
    if isinstance(value, NAMED):
        return [getattr(value, "__module__", None), getattr(value, "__qualname__", value.__name__)]
    if isinstance(value, functools.partial):
        return ["partial", value.func, value.args, value.keywords]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, CodeType):
        return [value.co_code, value.co_names, value.co_varnames, value.co_freevars, value.co_consts]
    if isinstance(value, FunctionType):
        names = inspect.getclosurevars(value)
        plain = {name: v for name, v in names.globals.items() if isinstance(v, PLAIN)}
        return [
            *(value.__module__, value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__),
            *(names.nonlocals, plain),
        ]
    if isinstance(value, torch.nn.Module):
        return [type(value), [f"{name} {tuple(p.shape)}" for name, p in value.named_parameters()]]
    try:
        return [type(value), type(value).__call__ if callable(value) else None, value.__reduce_ex__(4)[1:]]
    except Exception as error:
        raise ValueError(
            f"{value!r} has no state that can be compared with that of another run ({error}). Use a function, a "
            "functools.partial, or an object of plain values."
        ) from error


def name_of(function: Any) -> str:
    """The name of a function to show; of a partial one with its arguments, of an object that of its class."""
    if isinstance(function, functools.partial):
        given = [*map(repr, function.args), *(f"{name}={value!r}" for name, value in function.keywords.items())]
        return f"partial({', '.join([name_of(function.func), *given])})"
    return getattr(function, "__name__", type(function).__name__)


def code_of(function: Any) -> str:
    """The name of a function, and a hash that differs for another one of the same name; see [`stable`]."""
    return f"{name_of(function)}, code {_hash_of(stable(function).encode())}"
