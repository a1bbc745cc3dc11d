# SPDX-License-Identifier: Apache-2.0

import functools
import itertools

import datasets
import pytest
from runs import brightness
from tiny_pipelines import tiny_sd

from trl_pgraft import GraftConfig, PGraftTrainer
from trl_pgraft.rewards import make_reward
from trl_pgraft.rollouts.prompts import choose_prompts, prompts_from_dataset, prompts_from_function, with_columns


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


def chosen(train=None, evaluation=None, reward=brightness, function=None, **options):
    """The source of prompts and the held-out prompts of a run with one reward."""
    convention = "ddpo" if reward is brightness else "trl"
    rewards = [make_reward(reward, convention=convention)]
    return choose_prompts(GraftConfig(**options), rewards, None, function, train, evaluation, None)


@pytest.mark.parametrize("given", [["a cat", ""], ("a cat", "")])
def test_a_list_of_prompts_is_a_dataset(given):
    source, held_out, dataset = chosen(given, given)
    assert sorted(source(0, 2)) == [("", {}), ("a cat", {})]
    assert held_out == [("a cat", {}), ("", {})] and dataset.column_names == ["prompt"]


def test_a_name_is_loaded_from_the_hub_or_a_folder(tmp_path, animals):
    animals.to_json(tmp_path / "train.jsonl")
    source, _, dataset = chosen(str(tmp_path))
    assert sorted(source(0, 3)) == [("a cat", {"legs": 4}), ("a dog", {"legs": 4}), ("an ant", {"legs": 6})]
    assert len(dataset) == 3


CHAT = [{"role": "user", "content": "a cat"}]


@pytest.mark.parametrize("prompt, shown", [(None, "None, a NoneType"), (CHAT, "role.*a list"), (3, "3, a int")])
@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize("make", [list, lambda prompts: datasets.Dataset.from_dict({"prompt": prompts})])
def test_a_prompt_that_is_no_string_is_named_by_its_row(name, make, prompt, shown):
    text = CHAT if prompt is CHAT and make is not list else 1 if prompt == 3 and make is not list else "a cat"
    given = make([text, prompt])
    row = 1 if text == "a cat" else 0
    with pytest.raises(ValueError, match=rf"{name}: the prompt of row {row} is .*(a int|{shown}).*chat messages"):
        chosen(*((given, None) if name == "train_dataset" else (["a cat"], given)))


@pytest.mark.parametrize(
    "make, kind",
    [
        (lambda data: data.to_iterable_dataset(), "IterableDataset"),
        (lambda data: datasets.DatasetDict(train=data), "DatasetDict"),
        (lambda data: data.to_pandas(), "DataFrame"),
        (lambda data: {"prompt": ["a cat"]}, "dict"),
    ],
)
@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_what_is_no_dataset_is_refused_with_what_is_taken(animals, name, make, kind):
    given = (make(animals), None) if name == "train_dataset" else (animals, make(animals))
    with pytest.raises(
        ValueError, match=f"{name} is a {kind}; give a `datasets.Dataset`, one split.*A list of prompts"
    ):
        chosen(*given)


def test_prompts_are_those_of_a_transform(animals):
    data = animals.with_transform(lambda rows: {"prompt": [f"{p}!" for p in rows["prompt"]], "n": rows["legs"]})
    assert all(prompt.endswith("!") and set(columns) == {"n"} for prompt, columns in chosen(data)[0](0, 3))
    with pytest.raises(ValueError, match="train_dataset: the prompt of row 0 is None"):
        chosen(animals.with_transform(lambda rows: {"prompt": [None] * len(rows["prompt"])}))


def test_one_held_out_prompt_is_one_prompt():
    assert chosen(["a cat"], eval_prompts="a dog")[1] == with_columns("a dog") == [("a dog", {})]
    with pytest.raises(ValueError, match=r"eval_prompts=\[.a dog., None\] \(list\) is not a list of strings"):
        chosen(["a cat"], eval_prompts=["a dog", None])


def needs_legs(*, prompts, images, legs, wings=0, **columns):
    return legs


def takes_legs(prompts, images, legs):
    return legs


def takes_no_more(prompts, images):
    return [0.0] * len(prompts)


@functools.wraps(takes_no_more)
def decorated(**columns):
    return takes_no_more(columns["prompts"], columns["images"])


@pytest.mark.parametrize(
    "reward", [needs_legs, takes_legs, decorated, brightness, functools.partial(needs_legs, wings=2)]
)
def test_a_reward_that_fits_the_columns_is_taken(animals, reward):
    assert chosen(animals, reward=reward)[0] is not None


@pytest.mark.parametrize(
    "reward, columns, owner, message",
    [
        (
            needs_legs,
            {"feet": [4]},
            "train_dataset",
            r"'needs_legs' is called .* train_dataset \(feet\).*missing.*'legs'",
        ),
        (takes_legs, {}, "train_dataset", r"'takes_legs' .* train_dataset \(none\).*missing.*'legs'.*Add a column"),
        (
            takes_no_more,
            {"legs": [4]},
            "train_dataset",
            r"'takes_no_more' .*\(legs\).*unexpected.*'legs'.*\*\*columns",
        ),
        (
            needs_legs,
            {"legs": [4], "images": [1]},
            "train_dataset",
            r".*\(legs, images\).*fit: got multiple values.*'images'.*rename a column `prompts` or `images`",
        ),
        (
            needs_legs,
            {"legs": [4], "prompts": [1]},
            "train_dataset",
            ".*fit: got multiple values.*'prompts'.*rename a column `prompts`",
        ),
        (needs_legs, {"feet": [4]}, "eval_dataset", r"'needs_legs' .* eval_dataset \(feet\).*missing.*'legs'"),
        (needs_legs, {}, "eval_prompts", r"'needs_legs' .* eval_prompts \(none\).*missing.*'legs'"),
        (needs_legs, {}, "prompt_function", r"'needs_legs' .* prompt_function \(metadata\).*missing.*'legs'"),
    ],
)
def test_a_reward_that_does_not_fit_the_columns_is_named(animals, reward, columns, owner, message):
    data = datasets.Dataset.from_dict({"prompt": ["a cat"], **columns})
    given = {
        "train_dataset": {"train": data},
        "eval_dataset": {"train": animals, "evaluation": data},
        "eval_prompts": {"train": animals, "eval_prompts": ["a cat"]},
        "prompt_function": {"function": lambda: ("a cat", {})},
    }
    with pytest.raises(ValueError, match="reward_funcs: " + message):
        chosen(reward=reward, **given[owner])


def test_columns_are_ddpos_own_affair():
    data = datasets.Dataset.from_dict({"prompt": ["a cat"], "images": [1], "prompts": [2]})
    assert list(chosen(data)[0](0, 1)) == [("a cat", {"images": 1, "prompts": 2})]


def test_a_trainer_samples_for_a_list_of_prompts(tmp_path):
    options = {"num_epochs": 1, "sample_num_steps": 3, "sample_batch_size": 2, "samples_per_prompt": 2}
    config = GraftConfig(**options, output_dir=str(tmp_path), acceptance_kwargs={"k": 1}, eval_prompts=["a cow"])
    trainer = PGraftTrainer(config, brightness, sd_pipeline=tiny_sd(), train_dataset=["a cat", "a dog"])
    trainer.train()
    with pytest.raises(ValueError, match="reward_funcs: 'takes_legs' is called"):
        PGraftTrainer(config, reward_funcs=takes_legs, sd_pipeline=tiny_sd(), train_dataset=["a cat", "a dog"])
