# SPDX-License-Identifier: Apache-2.0

"""Texts of values that are the same in another process, and for nothing else."""

import functools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from trl_pgraft.core.identity import code_of, name_of, stable


VALUES = """
import functools
import math
import operator

import numpy as np
import torch
from PIL import Image

SCALE = 2.0


class Callback:
    def __init__(self, level, inside=None):
        self.level, self.inside = level, inside

    def __call__(self, pipeline, step, timestep, kwargs):
        return kwargs

    def method(self):
        return self.level


class OtherCallback(Callback):
    def __call__(self, pipeline, step, timestep, kwargs):
        return {}


class Slots:
    __slots__ = ("level",)

    def __init__(self, level):
        self.level = level


def made(level):
    def function(x):
        return x * level
    return function


def function(x, y=1):
    return x in {"a", "b", "c"} or x * SCALE + y


VALUES = {
    "function": function,
    "the same name": lambda x: x,
    "another default": lambda x, y=2: x,
    "another constant": lambda x: x + 1,
    "another name": lambda x: x + SCALE,
    "nested": lambda x: [i + 1 for i in x],
    "another nested one": lambda x: (lambda i: i + 2)(x),
    "keyword": lambda *, x=3: x,
    "closure": made(1),
    "another closure": made(2),
    "partial": functools.partial(function, y=2),
    "another partial": functools.partial(function, y=3),
    "partial of a lambda": functools.partial(lambda x: x - 1, 3),
    "object": Callback(1),
    "another state": Callback(2),
    "another class": OtherCallback(1),
    "inside": Callback(1, [Callback(3)]),
    "method": Callback(1).method,
    "another method": Callback(2).method,
    "slots": Slots(1),
    "other slots": Slots(2),
    "class": Callback,
    "built in": math.sqrt,
    "operator": operator.itemgetter("a"),
    "dict": {"f": function, "a": 1},
    "dict of an object": {"f": Callback(1)},
    "set": {function},
    "array": np.arange(5000),
    "another array": np.arange(5000) // 2500 + np.arange(5000),
    "module": torch.nn.Linear(2, 3),
    "another module": torch.nn.Linear(3, 2),
    "image": Image.new("RGB", (4, 4), "red"),
}
"""


def values():
    space = {"__name__": "somewhere"}
    exec(VALUES, space)
    return space["VALUES"]


def test_values_are_the_same_in_another_process_and_differ_from_each_other(tmp_path):
    printing = "from trl_pgraft.core.identity import stable\nfor name, v in VALUES.items(): print(name, stable(v))"
    (tmp_path / "there.py").write_text(f"__name__ = 'somewhere'\n{VALUES}\n{printing}")
    runs = [
        subprocess.run(
            [sys.executable, "there.py"], cwd=tmp_path, capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": seed},
        ).stdout
        for seed in "12"
    ]  # fmt: skip
    here = {name: stable(value) for name, value in values().items()}
    assert runs[0] == runs[1] == "".join(f"{name} {text}\n" for name, text in here.items())
    assert len(set(here.values())) == len(here) and " at 0x" not in runs[0]


def test_large_whole_numbers_of_a_tensor_are_told_apart():
    assert stable(torch.tensor([2**24])) != stable(torch.tensor([2**24 + 1]))


def test_plain_values_have_the_texts_that_stored_fingerprints_have():
    image, tensor = Image.new("RGB", (4, 4), "red"), torch.ones(2)
    assert [stable(v) for v in (1, 0.5, True, None, "a", np.float32(0.5), torch.float16)] == [
        *("1", "0.5", "True", "None", "a", "0.5", "torch.float16"),
    ]  # fmt: skip
    assert stable({"a": 1, "b": [2]}) == "{'a': 1, 'b': [2]}" and stable((1, "a")) == "['1', 'a']"
    assert stable(image) == stable(image.tobytes()) and stable(tensor) == stable(tensor.numpy().tobytes())


def test_what_has_no_state_is_refused():
    with pytest.raises(ValueError, match="no state that can be compared.*functools.partial"):
        stable({"each": iter([functools.partial(print), (i for i in "ab")])})


def test_names_are_those_that_are_read():
    assert [name_of(f) for f in (print, functools.partial(name_of, 1, b="c"), torch.nn.Linear(1, 1))] == [
        *("print", "partial(name_of, 1, b='c')", "Linear"),
    ]  # fmt: skip
    one, other = (lambda rewards: rewards > 0), (lambda rewards: rewards > 1)
    assert code_of(one) != code_of(other) and code_of(one).startswith("<lambda>, code ")
    assert len(code_of(one)) < 40, "it is in an error's message"
