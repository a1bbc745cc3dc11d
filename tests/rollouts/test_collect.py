# SPDX-License-Identifier: Apache-2.0

from itertools import repeat

import pytest
import torch
from runs import make_trainer, sample_iteration
from tiny_pipelines import add_random_adapter, tiny_flux, tiny_sd

from trl_pgraft import GraftConfig, TimestepGate
from trl_pgraft.pipelines.denoiser_call import denoiser_of
from trl_pgraft.pipelines.inputs import call_pipeline, sampling_arguments
from trl_pgraft.pipelines.introspection import introspect
from trl_pgraft.rollouts.prompts import form_groups, samples_of
from trl_pgraft.rollouts.rollout import RolloutBatch
from trl_pgraft.rollouts.sampling import sample_batches


STEPS = 4
ARGUMENTS = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "eta": 0.0}
FLUX_ARGUMENTS = {"num_inference_steps": STEPS, "guidance_scale": 3.0}


def prompts(*texts):
    return iter([(text, {"number": i}) for i, text in enumerate(texts)])


def samples(count=24, epoch=0):
    return samples_of(form_groups(prompts("a cat", "a dog"), count, count // 2), 0, first=count * epoch)


def sample_with(pipeline, batch_size, wanted, arguments=ARGUMENTS, step_index=2):
    call = introspect(pipeline, arguments).call
    batches = list(sample_batches(pipeline, call, wanted, step_index, batch_size, arguments))
    images, states = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "x_i"))
    return RolloutBatch(wanted, images, states, sum(batch.denoiser_calls for batch in batches))


def test_groups_of_an_iteration_and_its_smaller_last_group():
    groups = form_groups(prompts("a", "b", "c"), images=20, group_size=8)
    assert [(g.index, g.prompt, g.size, g.columns) for g in groups] == [
        (0, "a", 8, {"number": 0}),
        (1, "b", 8, {"number": 1}),
        (2, "c", 4, {"number": 2}),
    ]


def test_one_prompt_is_taken_for_each_group():
    source = prompts("a", "b", "c")
    form_groups(source, images=16, group_size=8)
    assert next(source)[0] == "c"


def test_samples_have_seeds_of_their_own():
    wanted = samples(24, epoch=3)
    assert len({s.seed for s in wanted}) == 24
    assert [s.seed for s in wanted] == [s.seed for s in samples(24, epoch=3)]
    assert not {s.seed for s in wanted} & {s.seed for s in samples(24, epoch=4)}


def test_only_arguments_that_the_pipeline_takes_are_given(sd, flux):
    config = GraftConfig(sample_num_steps=7, sample_guidance_scale=2.0, negative_prompts="ugly")
    expected = {"num_inference_steps": 7, "guidance_scale": 2.0, "eta": 0.0, "negative_prompt": "ugly"}
    assert sampling_arguments(config, sd, None) == expected
    assert "eta" not in sampling_arguments(config, flux, None)
    assert sampling_arguments(config, sd, {"guidance_scale": 9.0, "height": 8})["guidance_scale"] == 9.0
    assert "negative_prompt" not in sampling_arguments(GraftConfig(), sd, None)


@pytest.mark.parametrize("make, arguments", [(tiny_sd, ARGUMENTS), (tiny_flux, FLUX_ARGUMENTS)])
def test_a_group_of_24_in_batches_of_5_is_the_same_as_one_by_one(make, arguments):
    """The group size is independent of the batch size, and so are the samples."""
    pipeline, wanted = make(), samples_of(form_groups(prompts("a cat"), 24, 24), 0)
    together = sample_with(pipeline, 5, wanted, arguments)
    assert together.images.shape == (24, 3, 16, 16) and together.images.dtype == torch.uint8
    few = [0, 4, 5, 23]
    alone = sample_with(pipeline, 1, [wanted[i] for i in few], arguments)
    torch.testing.assert_close(alone.x_i, together.x_i[few], rtol=0, atol=1e-5)
    assert (alone.images.int() - together.images[few].int()).abs().max() <= 1
    assert together.images.float().std(0).mean() > 1, "the samples differ from each other"


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_are_what_the_pipeline_returns(sd, eta):
    wanted, arguments = samples(4), {**ARGUMENTS, "eta": eta}
    batch = sample_with(sd, 2, wanted, arguments)
    for i, sample in enumerate(wanted):
        image = sd(
            prompt=sample.group.prompt,
            generator=torch.Generator().manual_seed(sample.seed),
            output_type="np",
            **arguments,
        ).images[0]
        assert abs(batch.images[i].permute(1, 2, 0).numpy() / 255 - image).max() <= 0.6 / 255
    assert batch.denoiser_calls == 4 * STEPS * 2


def test_the_state_before_the_first_step_is_the_noise_of_the_seed(sd):
    wanted = samples(4)
    noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s.seed)) for s in wanted])
    torch.testing.assert_close(sample_with(sd, 3, wanted, step_index=0).x_i, noise, rtol=0, atol=1e-6)


def test_gates_and_adapters_take_part(sd):
    wanted, base = samples(4), sample_with(sd, 4, samples(4), step_index=STEPS)
    add_random_adapter(sd.unet)
    with TimestepGate(sd.unet, "pgraft", 500.0):
        gated = sample_with(sd, 4, wanted, step_index=STEPS)
    assert not torch.allclose(gated.x_i, base.x_i, atol=0.1)


def test_finished_batches_come_in_order(sd):
    wanted = samples(7 * 2)
    seen = list(sample_batches(sd, introspect(sd, ARGUMENTS).call, wanted, 2, 5, ARGUMENTS))
    assert [s for batch in seen for s in batch.samples] == wanted
    assert [len(batch.images) for batch in seen] == [5, 5, 4] and not any(batch.is_scored for batch in seen)


@pytest.mark.parametrize("batches", [1, 2])
def test_nothing_is_left_behind_between_batches_or_after_the_last(sd, batches):
    sampling = sample_batches(sd, introspect(sd, ARGUMENTS).call, samples(4), 2, 2, ARGUMENTS)
    for _ in range(batches):
        next(sampling)
    assert len(sd.unet._forward_pre_hooks) == len(sd.unet._forward_hooks) == 0
    assert "step" not in vars(sd.scheduler)


def test_an_exception_in_the_denoiser_leaves_nothing_behind(sd):
    call = introspect(sd, ARGUMENTS).call

    def fail(*_):
        raise FloatingPointError("broken on purpose")

    handle = sd.unet.conv_out.register_forward_pre_hook(fail)
    with pytest.raises(FloatingPointError):
        list(sample_batches(sd, call, samples(4), 2, 2, ARGUMENTS))
    handle.remove()
    assert len(sd.unet._forward_pre_hooks) == len(sd.unet._forward_hooks) == 0
    assert "step" not in vars(sd.scheduler)


def test_one_negative_prompt_serves_every_prompt(sd):
    arguments = {**ARGUMENTS, "negative_prompt": "ugly", "output_type": "latent"}
    found = call_pipeline(sd, ["a cat", "a dog"], [1, 2], arguments).images
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    own = {**arguments, "negative_prompt": ["ugly", "ugly"]}
    assert torch.equal(found, sd(prompt=["a cat", "a dog"], generator=generators, **own).images)
    without = call_pipeline(sd, ["a cat", "a dog"], [1, 2], {**arguments, "negative_prompt": ""}).images
    assert not torch.allclose(found, without)


def test_a_step_that_is_never_reached_is_an_error(sd):
    with pytest.raises(ValueError, match=f"made {STEPS} steps and none with index 9"):
        sample_with(sd, 2, samples(2), step_index=9)


def test_images_that_are_not_finite_stop_the_sampling(sd):
    sd.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="non-finite.*precision"):
        sample_with(sd, 2, samples(2))


def test_weights_stay_without_gradient(sd):
    denoiser_of(sd).requires_grad_(True)
    assert not sample_with(sd, 2, samples(2)).x_i.requires_grad


def test_prompt_sources_may_be_endless():
    assert len(form_groups(repeat(("a", {})), 6, 2)) == 3


def test_an_acceptance_rule_of_an_unknown_name_is_refused_before_sampling(config):
    """Also where it was set after the configuration was made."""
    late = config()
    late.acceptance = "typo"
    with pytest.raises(ValueError, match="typo"):
        make_trainer(late)


def test_no_two_samples_of_a_run_share_their_noise(config, monkeypatch):
    """Rounds and held-out prompts; only an evaluation that is repeated has the same again."""
    trainer, seeds = make_trainer(config()), []
    prepare = trainer.pipeline.prepare_latents

    def noted(*arguments, **keywords):
        seeds.extend(generator.initial_seed() for generator in arguments[6])
        return prepare(*arguments, **keywords)

    monkeypatch.setattr(trainer.pipeline, "prepare_latents", noted)
    for epoch in (0, 1, 2):
        sample_iteration(trainer, epoch)
    for _ in range(2):
        trainer.evaluate(["a cat", "a dog"])
    count = 3 * trainer.images_per_round
    assert len(seeds) == count + 4 and len(set(seeds)) == count + 2 and max(seeds) < 2**32
    assert seeds[-2:] == seeds[-4:-2]
