# SPDX-License-Identifier: Apache-2.0

"""Random configurations and reward answers: each is valid, or an error names the field or the reward."""

import dataclasses
import json
import math
import random
import typing
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from trl_pgraft import GraftConfig, NoiseCorrectionConfig, accept_all
from trl_pgraft.rewards.registry import Reward
from trl_pgraft.rewards.scorer import Patience, RewardError, score


ANYTHING = (
    *(None, True, False, 0, 1, 2, 3, 8, -1, 10**9, 10**30, 10**400, -(10**18)),
    *(0.0, 0.5, 1.0, -0.1, 1e-4, 1e300, math.nan, math.inf, -math.inf, Fraction(1, 2), 1j),
    *("", "no", "1", "1e-4", "nan", "top_k", "threshold", "exponential", "preference", "cosine", "bf16", "lora"),
    *("True", "{}", '{"k": 2}', "[1]", "{", "os:getcwd", "no.module:rule", "math:pi", b"bytes", "\x00"),
    *((), [], {}, ["a", "b"], ["a", 1], ("a",), {"k": 2}, {"k": "2"}, {"k": math.nan}, {"k": 10**9}, {1: 2}),
    *({"beta": "x", "reward_max": 1}, {"beta": math.nan, "reward_max": 1.0}, {"threshold": None}, {"quantile": 2}),
    *(np.int64(4), np.float32(0.5), np.bool_(True), np.str_("all"), np.zeros(3), torch.tensor(2), torch.zeros(2, 2)),
    *(Path("there"), object(), object, print, accept_all, lambda rewards: None, lambda rewards, **_: rewards > 0.5),
    *(range(3), iter("ab"), {"a"}, Ellipsis),
)


# What fields of a type usually take, and what else is taken for it.
USUAL = {
    bool: [True, False, np.bool_(True)],
    int: [1, 2, 8, np.int64(4), "1"],
    float: [0.5, 0.9, 1, "1e-4", np.float32(0.5), Fraction(1, 2)],
    str: ["there", Path("there"), np.str_("all"), "cosine", "no", "combined"],
    dict: [{}, {"k": np.int64(2)}, '{"k": 2}', None],
}


def kinds_of(hint):
    return [part for kind in [hint, *typing.get_args(hint)] for part in (kind, *typing.get_args(kind))]


def conforms(value, hint):
    """Whether a value has the type of an annotation, checked in another way than the package does."""
    kinds = kinds_of(hint)
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int):
        return (int in kinds or float in kinds) and abs(value) < 2**63
    if isinstance(value, float):
        return float in kinds and math.isfinite(value)
    if isinstance(value, list):
        return list[str] in kinds and all(isinstance(item, str) for item in value)
    return callable(value) or any(
        isinstance(value, kind) for kind in kinds if isinstance(kind, type) and kind is not list
    )


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [GraftConfig, NoiseCorrectionConfig])
def test_a_random_configuration_is_valid_or_its_error_names_a_field(kind, count):
    draw, outcomes = random.Random(0), {True: 0, False: 0}
    hints, names = typing.get_type_hints(kind, include_extras=True), [f.name for f in dataclasses.fields(kind)]
    for _ in range(count):
        chosen = draw.sample(names, draw.choice([1, 1, 1, 2, 3, 8]))
        usual = {name: next((USUAL[k] for k in USUAL if k in kinds_of(hints[name])), ANYTHING) for name in chosen}
        given = {name: draw.choice(draw.choice([ANYTHING, usual[name]])) for name in chosen}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = kind(**given)
        except (TypeError, ValueError) as error:
            outcomes[False] += 1
            assert any(name in str(error) for name in given), (given, error)
            assert not isinstance(error, TypeError), (given, error)
        else:
            outcomes[True] += 1
            values = {name: getattr(config, name) for name in names}
            assert all(conforms(value, hints[name]) for name, value in values.items()), (given, values)
            signature = config.resume_signature(*([1] if kind is GraftConfig else []))
            json.dumps({name: signature[name] for name in signature if not name.endswith("_kwargs")})
    assert min(outcomes.values()) > count / 20, outcomes


ANSWERS = (*ANYTHING, [0.5, None], (1, 2), [[1.0], [2.0]], [[1, 2]], np.ones(2), torch.ones(2, 1), [math.nan, 1.0])


@pytest.mark.parametrize("count", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_random_answer_of_a_reward_is_a_number_for_each_image_or_an_error_names_the_reward(count):
    draw, scored = random.Random(1), 0
    for _ in range(count):
        values = [draw.choice(draw.choice([ANYTHING, USUAL[float], [None]])) for _ in range(2)]
        answer = draw.choice([draw.choice(ANSWERS), values])
        convention = draw.choice(["trl", "ddpo"])
        returned = draw.choice([answer, (answer, {})]) if convention == "ddpo" else answer
        reward = Reward("beauty", lambda *_, returned=returned, **__: returned, convention=convention)
        try:
            values, _ = score(reward, torch.zeros(2, 3, 4, 4, dtype=torch.uint8), ["a", "b"], {}, Patience(0, 0, None))
        except RewardError as error:
            assert "'beauty'" in str(error)
        else:
            scored += 1
            assert len(values) == 2 and all(v is None or type(v) is float and math.isfinite(v) for v in values)
    assert count / 20 < scored < count / 2
