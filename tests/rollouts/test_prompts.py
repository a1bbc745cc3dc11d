# SPDX-License-Identifier: Apache-2.0

import itertools

import datasets
import pytest

from trl_pgraft.rollouts.prompts import prompts_from_dataset, prompts_from_function


@pytest.fixture
def animals():
    return datasets.Dataset.from_dict({"prompt": ["a cat", "a dog", "an ant"], "legs": [4, 4, 6]})


def test_a_function_is_called_once_for_each_prompt():
    count = itertools.count()
    source = prompts_from_function(lambda: (f"prompt {next(count)}", {"n": 1}))
    assert list(source(0, 2)) == [("prompt 0", {"metadata": {"n": 1}}), ("prompt 1", {"metadata": {"n": 1}})]
    assert next(source(1, 2))[0] == "prompt 2"


@pytest.mark.parametrize("returned", [None, 3, ["a cat"]])
def test_a_function_that_returns_no_string_is_refused(returned):
    with pytest.raises(ValueError, match=r"prompt_function must return \(str, metadata\).*" + type(returned).__name__):
        next(prompts_from_function(lambda: (returned, {}))(0, 1))


def test_a_dataset_is_gone_through_once_a_pass_in_a_new_order_each_time(animals):
    source = prompts_from_dataset(animals, seed=0)
    rows = [row for epoch in range(6) for row in source(epoch, 2)]
    passes = [rows[i : i + 3] for i in range(0, 12, 3)]
    for one in passes:
        assert sorted(prompt for prompt, _ in one) == ["a cat", "a dog", "an ant"]
    assert len({tuple(prompt for prompt, _ in one) for one in passes}) > 1
    assert all(columns == {"legs": 6 if prompt == "an ant" else 4} for prompt, columns in rows)


def test_an_iteration_has_the_same_prompts_whenever_it_is_sampled(animals):
    source = prompts_from_dataset(animals, seed=0)
    list(source(0, 2))
    third = list(source(2, 2))
    assert third == list(prompts_from_dataset(animals, seed=0)(2, 2))
    assert any(list(prompts_from_dataset(animals, seed=s)(2, 2)) != third for s in range(1, 5))


def test_a_dataset_without_prompts_is_refused(animals):
    with pytest.raises(ValueError, match="train_dataset has no column `prompt`; it has caption, legs"):
        prompts_from_dataset(animals.rename_column("prompt", "caption"), seed=0)
    with pytest.raises(ValueError, match="train_dataset is empty"):
        prompts_from_dataset(animals.select([]), seed=0)
