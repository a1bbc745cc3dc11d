# SPDX-License-Identifier: Apache-2.0

import dataclasses
import json
import random
import warnings

import numpy as np
import pytest
import torch
from ddpo_defaults import DDPO_DEFAULTS
from diffusers.optimization import SchedulerType, get_scheduler
from trl import TrlParser

from trl_pgraft import GraftConfig, NoiseCorrectionConfig, accept_all
from trl_pgraft.config import LR_SCHEDULES, MAY_CHANGE
from trl_pgraft.core.acceptance import get_acceptance, probabilities_of


OTHER_DEFAULTS = {"sample_eta": 0.0, "train_cfg": False, "mixed_precision": None}


def test_it_has_every_field_of_ddpo_with_its_default():
    found = {f.name: getattr(GraftConfig(), f.name) for f in dataclasses.fields(GraftConfig)}
    assert {name: found[name] for name in DDPO_DEFAULTS} == {**DDPO_DEFAULTS, **OTHER_DEFAULTS}
    assert isinstance(found["exp_name"], str)
    for name, default in DDPO_DEFAULTS.items():
        assert type(found[name]) is type(default) or name == "mixed_precision"


def test_ddpos_defaults_are_taken():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert GraftConfig(**DDPO_DEFAULTS).guidance_loss == "combined"


def test_every_field_has_help_and_differing_defaults_say_why():
    fields = {f.name: f.metadata["help"] for f in dataclasses.fields(GraftConfig)}
    assert all(fields.values())
    assert all("DDPO" in fields[name] for name in OTHER_DEFAULTS)


def test_fields_that_only_ppo_uses_are_named_in_one_warning():
    with pytest.warns(UserWarning) as caught:
        GraftConfig(train_clip_range=0.2, per_prompt_stat_tracking=True, train_adv_clip_max=5.0)
    assert len(caught) == 1 and caught[0].filename == __file__
    message = str(caught[0].message)
    assert "train_clip_range" in message and "per_prompt_stat_tracking" in message
    assert "train_adv_clip_max" not in message, "it has its default"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tuned_fraction": 0}, r"tuned_fraction=0 is outside \(0, 1\]"),
        ({"tuned_fraction": 1.5}, r"tuned_fraction=1.5 is outside \(0, 1\]"),
        ({"train_timestep_fraction": 0.0}, r"train_timestep_fraction=0.0 is outside \(0, 1\]"),
        ({"samples_per_prompt": 1}, "samples_per_prompt=1.*at least 2"),
        ({"samples_per_prompt": 4, "acceptance_kwargs": {"k": 4}}, "k=4 of samples_per_prompt=4 must be.*less"),
        ({"acceptance_kwargs": {"k": 8}}, "k=8 of samples_per_prompt=8"),
        ({"acceptance_kwargs": {"k": 0}}, "k=0 of samples_per_prompt=8"),
        ({"acceptance": "best"}, "acceptance='best' is not one of top_k.*callable"),
        ({"acceptance_kwargs": {"top": 2}}, "acceptance_kwargs do not fit acceptance='top_k'.*'top'"),
        ({"acceptance": "exponential"}, "acceptance_kwargs do not fit acceptance='exponential'.*'beta'"),
        ({"acceptance": "threshold"}, "acceptance_kwargs do not fit acceptance='threshold'.*exactly one of threshold"),
        (
            {"acceptance": "threshold", "acceptance_kwargs": {"quantile": 2.0}},
            "acceptance_kwargs do not fit acceptance='threshold'.*quantile.*got 2.0",
        ),
        (
            {"acceptance": "exponential", "acceptance_kwargs": {"beta": 0.0, "reward_max": 1.0}},
            "acceptance_kwargs do not fit acceptance='exponential'.*beta.*positive",
        ),
        ({"acceptance_kwargs": "{k: 2}"}, "acceptance_kwargs='{k: 2}' is not JSON"),
        ({"project_kwargs": "[1]"}, r"project_kwargs=\[1\] must be a dict"),
        ({"acceptance": "preference", "samples_per_prompt": 4}, "samples_per_prompt=4.*preference.*2"),
        ({"guidance_loss": "guided"}, "guidance_loss='guided' is not one of 'conditional', 'corrected', 'combined'"),
        ({"sample_from": "base"}, "sample_from='base' is not one of 'policy', 'reference'"),
        ({"timestep_sampling": "uniform"}, "timestep_sampling='uniform' is not one of"),
        ({"mixed_precision": "fp32"}, "mixed_precision='fp32' is not one of 'no', 'fp16', 'bf16'"),
        ({"log_with": "paper"}, "log_with='paper' is not one of"),
        ({"num_epochs": 0}, "num_epochs=0 must be at least 1"),
        ({"sample_batch_size": 0}, "sample_batch_size=0 must be at least 1"),
        ({"train_gradient_accumulation_steps": 0}, "train_gradient_accumulation_steps=0 must be at least 1"),
        ({"num_checkpoint_limit": 0}, "num_checkpoint_limit=0 must be at least 1"),
        ({"max_merged_rank": 0}, "max_merged_rank=0 must be at least 1"),
        ({"train_learning_rate": 0.0}, "train_learning_rate=0.0 must be positive"),
        ({"control_scale": 0.0}, "control_scale=0.0 must be positive"),
        ({"sample_guidance_scale": 0.0}, "sample_guidance_scale=0.0 must be positive"),
        ({"tuned_guidance_scale": 0.0}, "tuned_guidance_scale=0.0 must be positive"),
        ({"caption_dropout": 1.0}, r"caption_dropout=1.0 is outside \[0, 1\)"),
        ({"ema_decay": 1.0}, r"ema_decay=1.0 is outside \(0, 1\)"),
        ({"reward_retries": -1}, "reward_retries=-1 must be at least 0"),
    ],
)
def test_what_is_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        GraftConfig(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_epochs": "many"}, r"num_epochs='many' \(str\) is not a whole number"),
        ({"num_epochs": 8.0}, r"num_epochs=8.0 \(float\) is not a whole number"),
        ({"num_epochs": True}, r"num_epochs=True \(bool\) is not a whole number"),
        ({"num_epochs": None}, r"num_epochs=None \(NoneType\) is not a whole number\."),
        ({"samples_per_prompt": "all"}, r"samples_per_prompt='all' \(str\) is not a whole number or None"),
        ({"train_learning_rate": "high"}, r"train_learning_rate='high' \(str\) is not a number"),
        ({"train_learning_rate": "nan"}, "train_learning_rate='nan' is not a finite number"),
        ({"train_learning_rate": float("inf")}, "train_learning_rate=inf is not a finite number"),
        ({"train_cfg": "no"}, r"train_cfg='no' \(str\) is not True or False"),
        ({"allow_tf32": 1}, r"allow_tf32=1 \(int\) is not True or False"),
        ({"output_dir": 3}, r"output_dir=3 \(int\) is not a string"),
        ({"eval_prompts": ["a", 1]}, r"eval_prompts=\['a', 1\] \(list\) is not a list of strings or None"),
        ({"negative_prompts": [1]}, r"negative_prompts=\[1\] \(list\) is not a list of strings"),
        ({"deduplicate_by": "hash"}, r"deduplicate_by='hash' \(str\) is not a callable or None"),
        ({"acceptance": 3}, r"acceptance=3 is not|acceptance=3 \(int\) is not a string or a callable"),
        ({"accelerator_kwargs": {1: 2}}, r"accelerator_kwargs=\{1: 2\} must be a dict of names"),
        ({"acceptance_kwargs": {"k": "two"}}, r"acceptance_kwargs: k='two' \(str\) is not a whole number"),
        ({"acceptance_kwargs": {"k": "2"}, "acceptance": "all"}, "acceptance_kwargs do not fit acceptance='all'.*'k'"),
        ({"acceptance_kwargs": {"rewards": 1}}, "acceptance_kwargs do not fit acceptance='top_k'.*'rewards'"),
        ({"acceptance_kwargs": {"return": 1}}, "acceptance_kwargs do not fit acceptance='top_k'.*'return'"),
        (
            {"acceptance": "threshold", "acceptance_kwargs": {"threshold": float("nan")}},
            "threshold=nan is not a finite",
        ),
        ({"seed": 10**30}, "seed=1.*beyond 64 bits"),
        ({"sample_num_steps": 10**9}, "sample_num_steps=1000000000 must be at least 1 and at most 10,000"),
        ({"lora_rank": 10**9}, "lora_rank=1000000000 must be at least 1 and at most 10,000"),
        (
            {"sample_batch_size": 10**6, "sample_num_batches_per_epoch": 100},
            "sample_num_batches_per_epoch = 100000000",
        ),
        ({"warmup_steps": -1}, "warmup_steps=-1 must be at least 0"),
        ({"sample_eta": 2.0}, r"sample_eta=2.0 is outside \[0, 1\]"),
    ],
)
def test_what_has_another_type_or_is_beyond_any_use_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        GraftConfig(**options)


def test_a_token_of_another_type_is_not_shown():
    with pytest.raises(ValueError, match=r"^hub_token \(bytes\) is not a string or None") as caught:
        GraftConfig(hub_token=b"hf_secret")
    assert "secret" not in str(caught.value)


def test_what_stands_for_a_type_is_taken(tmp_path):
    config = GraftConfig(
        train_learning_rate="1e-4", control_scale=2, num_epochs=np.int64(3), tuned_fraction=np.float32(0.5),
        allow_tf32=np.bool_(False), output_dir=tmp_path, eval_prompts=("a", "b"), acceptance_kwargs={"k": np.int64(2)},
    )  # fmt: skip
    assert config.train_learning_rate == 1e-4 and type(config.num_epochs) is int and config.num_epochs == 3
    assert type(config.tuned_fraction) is float and config.allow_tf32 is False and config.control_scale == 2
    assert config.output_dir == str(tmp_path) and config.eval_prompts == ["a", "b"]
    assert type(config.acceptance_kwargs["k"]) is int and GraftConfig(eval_prompts="a cat").eval_prompts == ["a cat"]
    json.dumps(config.to_dict())


def test_numbers_of_a_file_are_numbers(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "train_learning_rate: 1e-4\nacceptance: exponential\nacceptance_kwargs: {beta: 1e-1, reward_max: 1}\n"
    )
    (config,) = TrlParser([GraftConfig]).parse_args_and_config(["--config", str(path)])
    assert config.train_learning_rate == 1e-4 and config.acceptance_kwargs == {"beta": 0.1, "reward_max": 1}


@pytest.mark.parametrize("options", [{}, {"acceptance": lambda rewards: rewards}, {"acceptance_kwargs": {"k": 10**8}}])
def test_a_group_of_any_size_costs_no_memory(options):
    assert GraftConfig(samples_per_prompt=10**9, **options).group_size(16) == 16


RULES = {
    "a float": (lambda rewards: 1.0, "returned 1.0"),
    "nothing": (lambda rewards: None, "returned None"),
    "too few": (lambda rewards: rewards[:2], "for 8 rewards"),
    "a pair": (lambda rewards: (rewards, rewards), "returned"),
    "strings": (lambda rewards: ["yes"] * len(rewards), "returned"),
    "below zero": (lambda rewards: rewards - 0.5, "from 0 to 1"),
    "not a number": (lambda rewards: rewards / 0, "from 0 to 1"),
    "another argument": (lambda rewards, cap: rewards, "'cap'"),
    "an error": (lambda rewards: rewards.sorted(), "sorted"),
}


@pytest.mark.parametrize("rule, message", RULES.values(), ids=RULES)
def test_a_rule_that_returns_no_probabilities_is_refused(rule, message):
    with pytest.raises(ValueError, match=f"do not fit acceptance=.*{message}"):
        GraftConfig(acceptance=rule)


@pytest.mark.parametrize("kind", [list, torch.Tensor.numpy, torch.Tensor.bool, torch.Tensor.float])
def test_probabilities_may_be_of_any_kind(kind):
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    assert torch.equal(probabilities_of(lambda rewards: kind(rewards.round()), rewards, {}), rewards)


def test_trying_a_rule_leaves_random_states_and_rewards_alone():
    def careless(rewards):
        rewards += random.random() + np.random.rand() + torch.rand(1)
        return torch.zeros(len(rewards))

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    GraftConfig(acceptance=careless)
    after = random.random(), np.random.rand(), torch.rand(1)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert after == (random.random(), np.random.rand(), torch.rand(1))
    rewards = torch.arange(3.0)
    probabilities_of(careless, rewards, {})
    assert rewards.tolist() == [0, 1, 2]


def test_a_rule_may_be_named_by_its_module(tmp_path):
    (tmp_path / "own_rules.py").write_text("half = lambda rewards, above=0.5: rewards > above\nnumber = 3\n")
    (tmp_path / "config.yaml").write_text("acceptance: own_rules:half\nacceptance_kwargs: {above: 0.9}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        (config,) = TrlParser([GraftConfig]).parse_args_and_config(["--config", str(tmp_path / "config.yaml")])
        rule = get_acceptance(config.acceptance)
        assert rule(torch.tensor([0.0, 1.0]), **config.acceptance_kwargs).tolist() == [False, True]
        assert config.resume_signature(1)["acceptance"] == config.to_dict()["acceptance"] == "own_rules:half"
        with pytest.raises(ValueError, match="acceptance: 'own_rules:none' cannot be imported"):
            GraftConfig(acceptance="own_rules:none")
        with pytest.raises(ValueError, match="acceptance: 'own_rules:number' is a int, which cannot be called"):
            GraftConfig(acceptance="own_rules:number")


def test_a_callable_acceptance_is_taken():
    assert GraftConfig(acceptance=accept_all).acceptance is accept_all
    assert GraftConfig(acceptance=accept_all).to_dict()["acceptance"] == "accept_all"


def test_a_preference_compares_two_samples():
    assert GraftConfig(acceptance="preference").samples_per_prompt == 2


@pytest.mark.parametrize("images, wanted, size", [(32, None, 8), (4, None, 4), (32, 24, 24), (16, 24, 16)])
def test_the_group_size_is_free_within_a_round(images, wanted, size):
    assert GraftConfig(samples_per_prompt=wanted).group_size(images) == size


@pytest.mark.parametrize("steps, fraction, timesteps", [(50, 1.0, 50), (50, 0.1, 5), (10, 0.05, 1)])
def test_train_timestep_fraction_means_what_it_means_in_ddpo(steps, fraction, timesteps):
    config = GraftConfig(sample_num_steps=steps, train_timestep_fraction=fraction)
    assert config.num_train_timesteps == timesteps


def test_the_token_is_neither_stored_nor_shown():
    config = GraftConfig(hub_token="hf_secret")
    assert config.hub_token == "hf_secret"
    assert "hf_secret" not in str(config.to_dict()) and "hf_secret" not in repr(config)


def test_configurations_can_be_compared_and_do_not_share_their_dicts():
    one, other = GraftConfig(), GraftConfig()
    assert one == other
    one.acceptance_kwargs["k"] = 2
    assert other.acceptance_kwargs == {} and one != other


def test_what_a_resume_compares_is_every_field_but_those_that_may_change():
    names = {f.name for f in dataclasses.fields(GraftConfig)}
    assert set(MAY_CHANGE) < names
    added = {"images a round", "rows of an optimizer step", "functions"}
    assert set(GraftConfig().resume_signature(1)) == names - set(MAY_CHANGE) | added
    one, two = (GraftConfig(sample_batch_size=size, train_batch_size=size) for size in (1, 2))
    assert one.resume_signature(2) == two.resume_signature(1)


def test_trls_parser_reads_it_from_the_command_line():
    arguments = ["--tuned_fraction", "0.3", "--acceptance", "best_of_n", "--samples_per_prompt", "4"]
    arguments += ["--eval_prompts", "a cat", "a dog", "--ema_decay", "0.9", "--resume_from_checkpoint", "somewhere"]
    (config,) = TrlParser([GraftConfig]).parse_args_and_config(arguments)
    assert (config.tuned_fraction, config.acceptance, config.samples_per_prompt) == (0.3, "best_of_n", 4)
    assert (config.eval_prompts, config.ema_decay) == (["a cat", "a dog"], 0.9)
    assert config.resume_from_checkpoint == "somewhere"


def test_dicts_are_json_on_the_command_line():
    arguments = ["--acceptance_kwargs", '{"k": 2}', "--project_kwargs", '{"project_dir": "there"}']
    arguments += ["--tracker_kwargs", '{"wandb": {"mode": "offline"}}', "--accelerator_kwargs", "{}"]
    (config,) = TrlParser([GraftConfig]).parse_args_and_config(arguments)
    assert config.acceptance_kwargs == {"k": 2} and config.project_kwargs == {"project_dir": "there"}
    assert config.tracker_kwargs == {"wandb": {"mode": "offline"}} and config.accelerator_kwargs == {}


def test_bounds_of_negative_rewards_are_taken():
    config = GraftConfig(acceptance="exponential", acceptance_kwargs={"beta": 1.0, "reward_max": -5.0})
    assert config.acceptance_kwargs["reward_max"] == -5.0
    assert GraftConfig(acceptance="threshold", acceptance_kwargs={"quantile": 0.5}).acceptance == "threshold"


@pytest.mark.parametrize("given, prompt", [(["dark", "blurred"], "dark, blurred"), (None, ""), ("dark", "dark")])
def test_negative_prompts_are_one_prompt(given, prompt):
    assert GraftConfig(negative_prompts=given).negative_prompts == prompt


def test_trls_parser_reads_it_from_a_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("tuned_fraction: 0.3\nacceptance_kwargs:\n  k: 3\nsample_num_steps: 20\n")
    (config,) = TrlParser([GraftConfig]).parse_args_and_config(["--config", str(path), "--sample_num_steps", "10"])
    assert (config.tuned_fraction, config.acceptance_kwargs, config.sample_num_steps) == (0.3, {"k": 3}, 10)


@pytest.mark.parametrize("config, processes", [(GraftConfig(), [2]), (NoiseCorrectionConfig(), [])])
def test_the_former_name_of_the_signature_warns(config, processes):
    with pytest.warns(DeprecationWarning, match="shaping is now .*resume_signature"):
        assert config.shaping(*processes) == config.resume_signature(*processes)


@pytest.mark.parametrize("kind", [GraftConfig, NoiseCorrectionConfig])
def test_schedules_that_cannot_be_made_of_the_configuration_are_refused(kind):
    """Of all that diffusers has, these need the optimizer and numbers of steps alone."""
    needing_more = []
    for name in (schedule.value for schedule in SchedulerType):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        try:
            get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=4)
        except AttributeError:
            needing_more.append(name)
        else:
            assert kind(lr_scheduler_type=name).lr_scheduler_type == name
    assert needing_more == ["piecewise_constant"]
    for name in ("cosin", "", None, *needing_more):
        with pytest.raises(ValueError, match=f"lr_scheduler_type={name!r} is not one of 'constant', .*'polynomial'"):
            kind(lr_scheduler_type=name)
    assert len(LR_SCHEDULES) == len(SchedulerType) - 1
