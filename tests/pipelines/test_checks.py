# SPDX-License-Identifier: Apache-2.0

import warnings
from dataclasses import replace

import pytest
import torch
from cases import CASES, SMALL, brightness, make_trainer
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPAGPipeline
from peft import LoraConfig, inject_adapter_in_model
from tiny_pipelines import (
    ToyDenoiser,
    ToyPipeline,
    add_random_adapter,
    tiny_ddpm,
    tiny_flux,
    tiny_inpainting,
    tiny_sd,
    tiny_unet,
)
from tiny_transformers import tiny_lumina2, tiny_qwen_image, tiny_sd3, tiny_z_image
from worked_overrides import overrides

from trl_pgraft import DenoiserFormat, GraftConfig, PGraftTrainer
from trl_pgraft.adapters.lora import add_adapter
from trl_pgraft.pipelines.checks import check_call, check_peft_config, check_steps, warn_if_distilled
from trl_pgraft.pipelines.inputs import sampling_arguments
from trl_pgraft.pipelines.introspection import introspect
from trl_pgraft.pipelines.timesteps import tuned_levels


LUMINA = CASES["Lumina 2"].kwargs


def warned(pipeline, **arguments):
    """Messages about few-step models."""
    call = introspect(pipeline, arguments).call
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_distilled(pipeline, call, arguments)
    return [str(warning.message) for warning in caught]


def learned(make, config, **kwargs):
    pipeline = make()
    return introspect(pipeline, sampling_arguments(config, pipeline, kwargs)).call, pipeline


# Few-step distilled models.


def test_a_distilled_models_scheduler_is_noticed(sd):
    sd.scheduler = LCMScheduler.from_config(sd.scheduler.config)
    (message,) = warned(sd, num_inference_steps=20, guidance_scale=3.0)
    assert "its scheduler is LCMScheduler" in message and "undo the distillation" in message


def test_a_distilled_models_guidance_input_is_noticed(sd):
    sd.unet = tiny_unet(time_cond_proj_dim=8)
    (message,) = warned(sd, num_inference_steps=20, guidance_scale=3.0)
    assert "takes the guidance scale as an input" in message


def test_few_steps_without_guidance_are_noticed(sd):
    sd.scheduler = DDIMScheduler.from_config(sd.scheduler.config, timestep_spacing="trailing")
    (message,) = warned(sd, num_inference_steps=4, guidance_scale=0.0)
    assert "4 steps without guidance on trailing timesteps" in message
    (message,) = warned(tiny_flux(), num_inference_steps=4)
    assert "4 steps without guidance." in message


def test_a_distilled_model_is_trained_with_the_warning(sd, config):
    """As LCM's: the guidance scale goes into the denoiser, and is replayed with the rest."""
    sd.unet = tiny_unet(time_cond_proj_dim=8)
    sd.scheduler = LCMScheduler.from_config(sd.scheduler.config)
    options = {"reward_function": brightness, "prompt_function": lambda: ("a", {}), "sd_pipeline": sd}
    with pytest.warns(UserWarning, match="looks like a few-step distilled model"):
        trainer = PGraftTrainer(config(tuned_fraction=1.0), **options)
    (metrics,) = trainer.train()
    assert metrics["skipped_steps"] == 0 and metrics["loss"] > 0
    rollout, _ = trainer.collector.sample_rollout(0)
    assert "timestep_cond" in trainer.finetuner.training_set(rollout, 0).conditioning.conditional


@pytest.mark.parametrize(
    "make, arguments",
    [
        (tiny_sd, {"num_inference_steps": 4, "guidance_scale": 3.0}),
        (tiny_sd, {"num_inference_steps": 9, "guidance_scale": 1.0}),
        (tiny_ddpm, {"num_inference_steps": 4}),
    ],
)
def test_other_models_are_not_warned_about(make, arguments):
    assert warned(make(), **arguments) == []


# Guidance that is something else than u + w (c - u).


@pytest.mark.parametrize(
    "options, named",
    [
        ({"guidance_loss": "combined"}, "guidance_loss='combined'"),
        ({"guidance_loss": "corrected"}, "guidance_loss='corrected'"),
        ({"tuned_guidance_scale": 1.0}, "tuned_guidance_scale=1.0"),
        ({"control_adapter": True}, "control_adapter=True"),
    ],
)
@pytest.mark.parametrize("make, kwargs", [(tiny_qwen_image, SMALL), (tiny_lumina2, LUMINA)])
def test_rescaled_guidance_is_refused_where_its_scale_is_needed(make, kwargs, options, named):
    config = GraftConfig(sample_guidance_scale=3.0, **options)
    call, pipeline = learned(make, config, **kwargs)
    with pytest.raises(ValueError, match=f"{named}: {type(pipeline).__name__} combines its two branches otherwise"):
        check_call(call, config, pipeline)
    check_call(call, GraftConfig(), pipeline)


def test_without_the_rescaling_all_losses_are_taken():
    config = GraftConfig(sample_guidance_scale=3.0, guidance_loss="combined", control_adapter=True)
    call, pipeline = learned(tiny_lumina2, config, **LUMINA, cfg_normalization=False)
    assert call.guidance_scale == 3.0
    check_call(call, config, pipeline)


def test_another_guidance_scale_needs_the_denoisers_own_output(tmp_path):
    with pytest.raises(ValueError, match="ListFormat overrides what the prediction is"):
        make_trainer(CASES["Z-Image"], tmp_path, tuned_guidance_scale=1.0)


# What changes from step to step.


def steps_of(pipeline, fraction=0.5, **kwargs):
    """Introspect a pipeline of ten steps, and check those that this fraction tunes."""
    config = GraftConfig(sample_num_steps=10, sample_guidance_scale=3.0, tuned_fraction=fraction)
    found = introspect(pipeline, sampling_arguments(config, pipeline, kwargs))
    check_steps(found, tuned_levels(config, found.sampler)[0].step_index, pipeline)


def test_an_argument_that_changes_in_a_tuned_step_is_refused_by_name(sd):
    def change_the_text(pipeline, step, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] + (step == 3)}

    further = {"callback_on_step_end": change_the_text, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with pytest.raises(
        ValueError, match="another encoder_hidden_states in step 5 of 10.*tuned_fraction to at most 0.4"
    ):
        steps_of(sd, **further)
    steps_of(sd, fraction=0.4, **further)


def test_guidance_that_ends_in_a_tuned_step_is_refused(tmp_path):
    """Before it ends all is as with constant guidance, also the state that enters the first step without it."""
    further = {**LUMINA, "cfg_normalization": False, "cfg_trunc_ratio": 0.5}
    with pytest.raises(ValueError, match="guidance in step 6 of 10: 1 branches .*tuned_fraction to at most 0.5"):
        steps_of(tiny_lumina2(), fraction=0.6, **further)
    case = replace(CASES["Lumina 2"], kwargs={**further, "cfg_trunc_ratio": 0.5})
    trainer = make_trainer(case, tmp_path, tuned_fraction=0.5, samples_per_prompt=4, sample_batch_size=4)
    rollout, _ = trainer.collector.sample_rollout(0)
    assert [step.branches for step in trainer.policy.introspection.steps] == [2, 2, 1, 1]
    assert len(rollout.states) == len(rollout.samples) and rollout.states.flatten(1).std(0).min() > 0


def test_skip_layer_guidance_in_a_tuned_step_is_refused():
    """SD3's further branch is there in some steps alone."""
    further = {**CASES["SD 3"].kwargs, "skip_guidance_layers": [0], "skip_layer_guidance_stop": 0.9}
    with pytest.raises(ValueError, match="guidance in step 8 of 10: 3 branches .*tuned_fraction to at most 0.7"):
        steps_of(tiny_sd3(), fraction=1.0, **further, skip_layer_guidance_start=0.6)
    steps_of(tiny_sd3(), fraction=0.7, **further, skip_layer_guidance_start=0.6)


@pytest.mark.parametrize("scale, named", [(3.0, "on 3 branches a step"), (1.0, "1.0 leaves both")])
def test_perturbed_attention_guidance_is_refused(scale, named):
    parts = {**tiny_sd().components, "requires_safety_checker": False}
    steps_of(StableDiffusionPAGPipeline(**parts, pag_applied_layers=["mid"]), pag_scale=0.0)
    with pytest.raises(ValueError, match=named):
        steps_of(StableDiffusionPAGPipeline(**parts, pag_applied_layers=["mid"]), guidance_scale=scale, pag_scale=3.0)


def test_a_guidance_scale_that_rises_in_a_tuned_step_is_refused(sd):
    """As CogVideoX's `use_dynamic_cfg`."""

    def raise_scale(pipeline, step, timestep, tensors):
        pipeline._guidance_scale = 3.0 + 0.1 * step
        return tensors

    with pytest.raises(ValueError, match="guidance in step 3 of 10: 2 branches with scale 3.0999.* after 2 with 3.0"):
        steps_of(sd, callback_on_step_end=raise_scale)
    steps_of(sd, fraction=0.2, callback_on_step_end=raise_scale)


def test_a_schedule_of_adapters_scales_is_refused(sd):
    """No argument of the denoiser shows it; IP-Adapters are scheduled by such callbacks too."""
    add_random_adapter(sd.unet, "style")

    def fade(pipeline, step, timestep, tensors):
        if step == 7:
            pipeline.set_adapters(["style"], [0.5])
        return tensors

    with pytest.raises(ValueError, match="to_k.scaling of its denoiser is no longer what it was by timestep 101"):
        steps_of(sd, fraction=0.2, callback_on_step_end=fade)


@pytest.mark.parametrize("own", [0.0, 1.0])
def test_timesteps_of_single_rows_or_tokens_are_refused_by_name(own):
    """As of a video's first frame, which is kept free of noise; equal ones are one timestep."""

    class ByToken(ToyDenoiser):
        def forward(self, x, t, condition):
            return super().forward(x, t.reshape(len(x), -1).mean(1), condition)

    pipeline = ToyPipeline(sign=1, clock=float)
    pipeline.transformer = ByToken()

    def by_token(x, t, condition, scale):
        return pipeline.transformer(x, t * torch.tensor([[1.0, own]]).expand(len(x), 2), condition=condition)[0]

    pipeline._guided = by_token
    if own == 1.0:
        steps_of(pipeline)
        return
    with pytest.raises(ValueError, match="ToyPipeline gives its denoiser several values as `t` in one step"):
        steps_of(pipeline)


def test_an_argument_that_depends_on_the_seed_is_refused_by_name():
    pipeline = ToyPipeline(sign=1)
    guided = pipeline._guided
    pipeline._guided = lambda x, t, condition, scale: guided(x, t, condition + x.mean((1, 2, 3)), scale)
    with pytest.raises(ValueError, match="ToyPipeline gives its denoiser condition, which depends on a sample's seed"):
        steps_of(pipeline)


# Adapters.


def test_an_adapter_on_the_text_encoder_is_refused(sd):
    with pytest.raises(ValueError, match="are modules of text_encoder.*recorded once.*switched at a noise level"):
        check_peft_config(sd, LoraConfig(target_modules=["q_proj", "v_proj"]))
    options = {"reward_function": brightness, "prompt_function": lambda: ("a", {})}
    with pytest.raises(ValueError, match="are modules of text_encoder"):
        PGraftTrainer(GraftConfig(), sd_pipeline=sd, peft_config=LoraConfig(target_modules=["q_proj"]), **options)


def test_a_pattern_for_the_text_encoder_is_refused(sd):
    with pytest.raises(ValueError, match=r"target_modules \.\*q_proj are modules of text_encoder"):
        check_peft_config(sd, LoraConfig(target_modules=".*q_proj"))


def test_a_lora_that_the_text_encoder_has_stays_as_it_is(sd, config):
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    inject_adapter_in_model(lora, sd.text_encoder)
    before = {name: p.clone() for name, p in sd.text_encoder.named_parameters()}
    options = {"reward_function": brightness, "prompt_function": lambda: ("a", {})}
    trainer = PGraftTrainer(config(), sd_pipeline=sd, **options)
    plain = PGraftTrainer(config(), sd_pipeline=tiny_sd(), **options)
    sampled, without = (t.evaluate(["a"], reference=True).images for t in (trainer, plain))
    assert not torch.equal(sampled, without), "it takes part"
    trainer.train()
    after = dict(sd.text_encoder.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(p.requires_grad or p.grad is not None for p in after.values())
    assert torch.equal(trainer.evaluate(["a"], reference=True).images, sampled)


@pytest.mark.parametrize("targets", [["nonesuch"], "nonesuch"])
def test_modules_that_nobody_has_are_named(sd, targets):
    with pytest.raises(ValueError, match="UNet2DConditionModel has no modules nonesuch"):
        check_peft_config(sd, LoraConfig(target_modules=targets))


@pytest.mark.parametrize(
    "options, named",
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the frozen weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changes"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' changes"),
        ({"bias": "all"}, "bias='all' trains biases of the model itself"),
        ({"modules_to_save": ["conv_in"]}, r"modules_to_save=\['conv_in'\] are no part of an adapter"),
    ],
)
def test_adapters_that_cannot_be_taken_out_are_refused(sd, options, named):
    with pytest.raises(ValueError, match=f"peft_config: {named}"):
        check_peft_config(sd, LoraConfig(target_modules=["to_q"], **options))


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "mica"])
def test_other_initialisations_leave_the_reference_alone(sd, start):
    config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=start)
    check_peft_config(sd, config)
    before = {name: p.detach().clone() for name, p in sd.unet.named_parameters()}
    add_adapter(sd.unet, config, "pgraft")
    kept = {n.replace("base_layer.", ""): p for n, p in sd.unet.named_parameters() if "lora_" not in n}
    assert kept.keys() == before.keys() and all(torch.equal(kept[name], before[name]) for name in before)


def test_adapters_of_the_denoiser_are_taken(sd):
    for targets in (["to_q"], ["to_q", "conv1"], r".*attn1\.to_q", "all-linear"):
        check_peft_config(sd, LoraConfig(target_modules=targets))


# Pipelines that cannot be handled: the rule and the override.


def test_a_denoiser_that_takes_a_list_is_refused_without_an_override():
    with pytest.raises(ValueError, match=r"ZImageTransformer2DModel: its argument `x` is a list.*denoiser_format"):
        introspect(tiny_z_image(), {**SMALL, "guidance_scale": 3.0})


def test_further_channels_are_refused_without_an_override():
    case = CASES["inpainting"]
    inputs = {name: values[0] for name, values in case.columns.items()}
    with pytest.raises(
        ValueError, match=r"`sample` has shape \(2, 9, 8, 8\) and its output \(2, 4, 8, 8\).*denoiser_f"
    ):
        introspect(tiny_inpainting(), {**SMALL, **inputs, "guidance_scale": 3.0})


def test_a_changed_prediction_names_the_override():
    class Doubled(DenoiserFormat):
        def prediction(self, output):
            return 2 * super().prediction(output)

    with pytest.raises(ValueError, match="something other than plus or minus.*Override DenoiserFormat.prediction"):
        introspect(ToyPipeline(sign=2))
    assert introspect(ToyPipeline(sign=-2), None, Doubled).call.sign == -1


def test_a_timestep_of_another_name_is_named_by_an_override():
    class Toy(ToyPipeline):
        def __init__(self):
            super().__init__()
            toy = self.transformer
            self.transformer = Renamed(toy)

    class Renamed(torch.nn.Module):
        def __init__(self, toy):
            super().__init__()
            self.toy = toy

        def forward(self, x, level, condition):
            return self.toy(x, level, condition)

    with pytest.raises(ValueError, match="no argument `timestep`.*Override DenoiserFormat.of"):
        introspect(Toy())
    assert introspect(Toy(), None, overrides()["LevelFormat"]).call.clock == (-0.001, 1.0)


def test_three_branches_are_refused():
    pipeline = ToyPipeline()

    def guided(x, t, condition, guidance_scale):
        t = torch.as_tensor(t).expand(len(x))
        return sum(pipeline.transformer(x, t, condition=condition)[0] for _ in range(3))

    pipeline._guided = guided
    with pytest.raises(ValueError, match="on 3 branches a step.*Switch further guidance off in pipeline_kwargs"):
        introspect(pipeline)
