# SPDX-License-Identifier: Apache-2.0

"""What is replaced on the pipeline after the trainer was made is seen before anything is sampled."""

import copy
from functools import partial

import pytest
from cases import CASES, Case, make_trainer
from diffusers import EulerDiscreteScheduler
from tiny_pipelines import tiny_sd


def replace_scheduler(pipeline):
    config = pipeline.scheduler.config
    pipeline.scheduler = EulerDiscreteScheduler.from_config(config, timestep_spacing="trailing")


def set_scheduler(pipeline):
    pipeline.scheduler.register_to_config(timestep_spacing="trailing")


def replace_text_encoder(pipeline):
    pipeline.text_encoder = copy.deepcopy(pipeline.text_encoder)


def replace_vae_and_tokenizer(pipeline):
    pipeline.vae, pipeline.tokenizer = copy.deepcopy(pipeline.vae), copy.deepcopy(pipeline.tokenizer)


@pytest.fixture
def make(tmp_path):
    return lambda case="SD 1.5", **options: make_trainer(CASES[case], tmp_path, **options)


@pytest.mark.parametrize(
    "change, named",
    [
        (replace_scheduler, "its scheduler changed"),
        (set_scheduler, "its scheduler changed"),
        (replace_text_encoder, "its text_encoder changed"),
        (replace_vae_and_tokenizer, "its vae, tokenizer changed"),
    ],
)
def test_a_component_that_is_replaced_is_named_before_anything_is_sampled(make, change, named):
    trainer = make(eval_prompts=["a fox"])
    change(trainer.pipeline)
    calls = []
    trainer.pipeline.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    for run in (trainer.train, lambda: trainer.step(0, 0)):
        with pytest.raises(ValueError, match=f"{named} after the trainer was made.*Make a new trainer"):
            run()
    assert not calls and trainer.history == []


def test_a_shift_of_the_scheduler_is_seen(make):
    trainer = make("SD 3")
    trainer.pipeline.scheduler.set_shift(9.0)
    with pytest.raises(ValueError, match="its scheduler changed"):
        trainer.train()


def test_it_is_seen_between_two_iterations(make):
    trainer = make(num_epochs=2)
    trainer.step(0, 0)
    replace_scheduler(trainer.pipeline)
    with pytest.raises(ValueError, match="its scheduler changed"):
        trainer.step(1, trainer.state.global_step)


def test_what_changes_no_samples_may_be_replaced(make):
    trainer = make()
    pipeline = trainer.pipeline
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    pipeline.safety_checker = pipeline.feature_extractor = None
    pipeline.vae.enable_slicing()
    assert trainer.train()[0]["accepted"] == 2


def test_a_second_trainer_on_the_pipeline_has_the_same_switch_level(tmp_path):
    """Otherwise one adapter would be trained for two levels."""
    pipeline = tiny_sd()
    make = partial(make_trainer, Case(lambda: pipeline), tmp_path)
    for trainer in (make(tuned_fraction=0.5), make(tuned_fraction=0.5)):
        assert trainer.train()[0]["accepted"] == 2
    with pytest.raises(ValueError, match="its adapter switches at timestep .* load the pipeline anew"):
        make(tuned_fraction=1.0)


def test_a_second_trainer_without_an_adapter_yet_takes_the_pipeline_over(tmp_path):
    pipeline = tiny_sd()
    first, second = (
        make_trainer(Case(lambda: pipeline), tmp_path, tuned_fraction=fraction, control_adapter=True)
        for fraction in (0.5, 1.0)
    )
    with pytest.raises(ValueError, match="its switch level"):
        first.train()
    assert second.train()[0]["accepted"] == 2
