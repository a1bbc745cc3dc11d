# SPDX-License-Identifier: Apache-2.0

"""The corrected pipeline: a drop-in for its pipeline, saved, loaded and pushed."""

import json
import warnings

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hub_cases import TOKEN
from huggingface_hub import HfApi
from runs import SWITCH
from tiny_flow import tiny_flow
from tiny_pipelines import add_random_adapter, tiny_flux, tiny_sd
from tiny_transformers import tiny_sd3

from trl_pgraft import NoiseCorrectedPipeline, save_pgraft_adapter
from trl_pgraft.adapters.lora import default_lora_config
from trl_pgraft.hub.push import push_corrector_to_hub
from trl_pgraft.noise_correction.correctors import GaussianCorrector, LoraCorrector, NetworkCorrector
from trl_pgraft.noise_correction.correctors.full import FullGaussian
from trl_pgraft.noise_correction.correctors.network import make_network
from trl_pgraft.pipelines.denoiser_call import denoiser_of


PROMPTED = {"height": 16, "width": 16, "num_inference_steps": 3, "output_type": "latent"}
CASES = {
    "unconditional": (tiny_flow, {"batch_size": 3, "num_inference_steps": 3, "output_type": "latent"}),
    "sd3": (tiny_sd3, {**PROMPTED, "prompt": ["a cat", "two"], "guidance_scale": 1.0}),
    "sd3, guided": (tiny_sd3, {**PROMPTED, "prompt": ["a cat", "two"], "guidance_scale": 4.0}),
    "sd3, two images of a prompt": (tiny_sd3, {**PROMPTED, "prompt": "a cat", "num_images_per_prompt": 2}),
    "flux": (tiny_flux, {**PROMPTED, "prompt": ["a cat", "two"]}),
}


def generator():
    return torch.Generator().manual_seed(7)


def with_lora(pipeline, size=0.0):
    denoiser = denoiser_of(pipeline)
    corrector = LoraCorrector.new(denoiser, default_lora_config(denoiser, 4), seed=0)
    for parameter in corrector.parameters:
        parameter.data.add_(size)
    return NoiseCorrectedPipeline(pipeline, corrector)


def with_network(pipeline, shift):
    """A network that adds to the noise: u = shift gives each of n midpoint steps shift / sqrt(1 - c^2) / n."""
    network = make_network((1, 8, 8), 8)
    torch.nn.init.constant_(network.conv_out.bias, shift)
    return NoiseCorrectedPipeline(pipeline, NetworkCorrector(network))


@pytest.mark.parametrize("name", CASES)
def test_without_correction_it_is_the_pipeline(name):
    make, kwargs = CASES[name]
    plain = make()(**kwargs, generator=generator()).images
    untrained, trained = with_lora(make()), with_lora(make(), size=0.1)
    same = {"rtol": 0, "atol": 1e-5}  # layers that PEFT wraps round otherwise
    torch.testing.assert_close(untrained(**kwargs, generator=generator()).images, plain, **same)
    torch.testing.assert_close(trained(**kwargs, corrector_steps=0, generator=generator()).images, plain, **same)
    assert not torch.allclose(trained(**kwargs, generator=generator()).images, plain, atol=1e-3)


def test_the_model_starts_from_the_corrected_noise():
    corrected, noise = with_network(tiny_flow(), 0.5), torch.randn(2, 1, 8, 8)
    expected = noise + 0.5 / 0.75**0.5
    for start in ({"latents": noise}, {"batch_size": 2, "generator": torch.Generator().manual_seed(1)}):
        if "generator" in start:
            expected = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)) + 0.5 / 0.75**0.5
        images = corrected(**start, num_inference_steps=3, output_type="latent").images
        wanted = tiny_flow()(latents=expected, num_inference_steps=3, output_type="latent").images
        torch.testing.assert_close(images, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_a_lora_corrects_by_the_prompts_own_branch(guidance_scale):
    """What is corrected does not depend on guidance or on the negative prompt, and does on the prompt."""
    pipeline, seen = tiny_sd3(), []
    corrected = with_lora(pipeline, size=0.1)
    original = pipeline.prepare_latents

    def note(*args, **kwargs):
        seen.append(kwargs.get("latents", args[-1]))
        return original(*args, **kwargs)

    pipeline.prepare_latents = note

    def noise_of(**kwargs):
        corrected(**{**PROMPTED, "guidance_scale": guidance_scale, **kwargs}, generator=generator())
        return seen[-1]

    first = noise_of(prompt="a cat")
    assert first.shape == (1, 4, 8, 8)
    torch.testing.assert_close(noise_of(prompt="a cat", negative_prompt="two"), first, rtol=0, atol=1e-6)
    torch.testing.assert_close(noise_of(prompt="a cat", guidance_scale=2.0), first, rtol=0, atol=1e-6)
    assert not torch.allclose(noise_of(prompt="two"), first, atol=1e-4)


def test_positional_arguments_and_attributes_are_the_pipelines():
    corrected = with_network(tiny_flow(), 0.5)
    by_name = corrected(batch_size=2, num_inference_steps=3, generator=generator(), output_type="latent").images
    by_place = corrected(2, 3, generator(), None, "latent").images
    assert torch.equal(by_name, by_place)
    assert corrected.scheduler is corrected.pipeline.scheduler
    with pytest.raises(TypeError, match="nonsense"):
        corrected(nonsense=1)
    with pytest.raises(AttributeError, match="nonsense"):
        corrected.nonsense  # noqa: B018


def test_a_scheduler_that_is_set_is_the_pipelines():
    corrected = with_network(tiny_flow(), 0.5)
    call = {"latents": torch.randn(1, 1, 8, 8), "num_inference_steps": 3, "output_type": "latent"}
    before = corrected(**call).images
    corrected.scheduler = FlowMatchEulerDiscreteScheduler(shift=9.0)
    assert corrected.pipeline.scheduler is corrected.scheduler
    assert not torch.allclose(corrected(**call).images, before, atol=1e-3)


def test_moved_it_is_still_corrected():
    """`pipeline = Pipeline.from_pretrained(...).to(device)` is how pipelines are moved."""
    pipeline = tiny_sd3()
    corrected = with_lora(pipeline, size=0.1).to(torch.float64)
    assert isinstance(corrected, NoiseCorrectedPipeline)
    assert pipeline.transformer.dtype == torch.float64


def test_a_network_follows_the_pipeline_to_its_device():
    corrected = with_network(tiny_flow(), 0.5)
    corrected.corrector.module.to("meta")
    # No other device is there: it is moved back, and has no data.
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        corrected(num_inference_steps=2)


def test_callbacks_are_called_once_a_step():
    corrected, steps = with_lora(tiny_sd3(), size=0.1), []
    for _ in range(2):
        note = {"callback_on_step_end": lambda pipeline, i, t, kwargs: steps.append(i) or {}}
        corrected("a cat", **PROMPTED, **note)
    assert steps == [0, 1, 2] * 2


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="corrector_steps=-1"):
        with_network(tiny_flow(), 0.5)(corrector_steps=-1)
    with pytest.raises(ValueError, match="corrector_steps=1.5"):
        NoiseCorrectedPipeline(tiny_flow(), NetworkCorrector(make_network((1, 8, 8), 8)), corrector_steps=1.5)

    class NoLatents(type(tiny_flow())):
        def __call__(self, batch_size=1, num_inference_steps=2):
            """A pipeline that cannot be handed its noise."""

    pipeline = NoLatents(**tiny_flow().components)
    with pytest.raises(ValueError, match="NoLatents does not take `latents`"):
        with_network(pipeline, 0.5)


def lora_case():
    return with_lora(tiny_sd3(), 0.1), tiny_sd3, CASES["sd3"][1]


def network_case():
    return with_network(tiny_flow(), 0.3), tiny_flow, CASES["unconditional"][1]


def gaussian_case():
    corrector = GaussianCorrector(FullGaussian(torch.linspace(-1, 1, 64).reshape(1, 8, 8), torch.eye(64) * 0.9))
    return NoiseCorrectedPipeline(tiny_flow(), corrector), tiny_flow, CASES["unconditional"][1]


@pytest.mark.parametrize("case", [lora_case, network_case, gaussian_case])
def test_saved_and_loaded_it_samples_the_same(case, tmp_path):
    corrected, make, kwargs = case()
    corrected.corrector_steps = 2
    corrected.save_pretrained(tmp_path / "corrector")
    loaded = NoiseCorrectedPipeline.from_pretrained(tmp_path / "corrector", make())
    assert loaded.corrector_steps == 2
    wanted = corrected(**kwargs, generator=generator()).images
    assert torch.equal(loaded(**kwargs, generator=generator()).images, wanted)
    assert not any(p.requires_grad for p in getattr(loaded.corrector, "parameters", []))
    loaded.save_pretrained(tmp_path / "again")
    assert files_in(tmp_path / "again") == files_in(tmp_path / "corrector")


KINDS = [lora_case, network_case, gaussian_case]


@pytest.mark.parametrize("case, earlier", [(a, b) for a in KINDS for b in KINDS if a is not b])
def test_a_corrector_of_another_kind_leaves_no_file_of_the_earlier_one(case, earlier, tmp_path):
    """Nor is anything else in the folder touched."""
    earlier()[0].save_pretrained(tmp_path / "corrector")
    (tmp_path / "corrector" / "network").mkdir(exist_ok=True)
    (tmp_path / "corrector" / "network" / "mine.txt").write_text("mine")
    corrected, make, kwargs = case()
    corrected.save_pretrained(tmp_path / "corrector")
    corrected.save_pretrained(tmp_path / "alone")
    assert files_in(tmp_path / "corrector") == {*files_in(tmp_path / "alone"), "network/mine.txt"}
    loaded = NoiseCorrectedPipeline.from_pretrained(tmp_path / "corrector", make())
    wanted = corrected(**kwargs, generator=generator()).images
    assert torch.equal(loaded(**kwargs, generator=generator()).images, wanted)


def test_correctors_and_adapters_are_not_saved_over_each_other(tmp_path):
    pipeline = tiny_sd()
    add_random_adapter(pipeline.unet)
    save_pgraft_adapter(pipeline, tmp_path / "adapter", SWITCH)
    corrected = gaussian_case()[0]
    corrected.save_pretrained(tmp_path / "corrector")
    before = {folder: files_in(tmp_path / folder) for folder in ("adapter", "corrector")}
    with pytest.raises(ValueError, match="holds an adapter. Save to another folder"):
        corrected.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="holds a noise corrector. Save to another folder"):
        save_pgraft_adapter(pipeline, tmp_path / "corrector", SWITCH)
    assert before == {folder: files_in(tmp_path / folder) for folder in ("adapter", "corrector")}


def test_a_pushed_corrector_replaces_one_of_another_kind(hub):
    network_case()[0].push_to_hub("fixer", **TOKEN)
    HfApi(**TOKEN).upload_file(path_or_fileobj=b"mine", path_in_repo="network/mine.txt", repo_id="ann/fixer")
    corrected, make, kwargs = gaussian_case()
    corrected.push_to_hub("fixer", **TOKEN)
    files = {"README.md", "noise_correction.json", "gaussian.safetensors", "network/mine.txt"}
    assert set(hub.repo("ann/fixer").files) == files
    loaded = NoiseCorrectedPipeline.from_pretrained("ann/fixer", make(), **TOKEN)
    wanted = corrected(**kwargs, generator=generator()).images
    assert torch.equal(loaded(**kwargs, generator=generator()).images, wanted)


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_what_is_no_corrector_or_of_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no noise_correction.json"):
        NoiseCorrectedPipeline.from_pretrained(tmp_path, tiny_flow())
    with_lora(tiny_sd3()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="do not fit|cannot put"):
        NoiseCorrectedPipeline.from_pretrained(tmp_path, tiny_sd())


@pytest.mark.parametrize("case", [lora_case, network_case, gaussian_case])
def test_pushed_it_comes_back_with_a_card(hub, case):
    corrected, make, kwargs = case()
    corrected.trained_for = {"base_model": "ann/flow", "num_inference_steps": 7, "samples": 123}
    assert corrected.push_to_hub("fixer", **TOKEN) == "ann/fixer"
    repo = hub.repo("ann/fixer")
    card = repo.files["README.md"].decode()
    for part in ('from_pretrained("ann/fixer", pipeline)', "num_inference_steps=7", "base_model: ann/flow"):
        assert part in card
    assert json.loads(repo.files["noise_correction.json"])["trained_for"]["samples"] == 123
    loaded = NoiseCorrectedPipeline.from_pretrained("ann/fixer", make(), **TOKEN)
    wanted = corrected(**kwargs, generator=generator()).images
    assert torch.equal(loaded(**kwargs, generator=generator()).images, wanted)


def test_an_output_folder_of_the_trainer_is_searched(tmp_path):
    corrected, make, kwargs = gaussian_case()
    corrected.save_pretrained(tmp_path / "corrector")
    loaded = NoiseCorrectedPipeline.from_pretrained(tmp_path, make())
    wanted = corrected(**kwargs, generator=generator()).images
    assert torch.equal(loaded(**kwargs, generator=generator()).images, wanted)


@pytest.mark.parametrize("case", [lora_case, network_case, gaussian_case])
def test_an_output_folder_on_the_hub_is_searched(hub, case, tmp_path):
    """Pushed as it is, with files that are no part of the corrector and are not downloaded."""
    corrected, make, kwargs = case()
    corrected.save_pretrained(tmp_path / "corrector")
    (tmp_path / "inverted.safetensors").write_bytes(b"noise")
    api = HfApi(**TOKEN)
    api.create_repo("ann/output")
    api.upload_folder(repo_id="ann/output", folder_path=tmp_path)
    loaded = NoiseCorrectedPipeline.from_pretrained("ann/output", make(), **TOKEN)
    wanted = corrected(**kwargs, generator=generator()).images
    assert torch.equal(loaded(**kwargs, generator=generator()).images, wanted)


def test_another_size_is_run_with_a_warning_or_refused():
    """A LoRA and a network run at other sizes as the model does, and it is said once that this was not measured."""
    corrected, _, kwargs = lora_case()
    corrected.trained_for = {"shape": [4, 8, 8], "num_inference_steps": 3, "guided": False}
    corrected(**kwargs)
    larger = {**kwargs, "height": 32}
    with pytest.warns(UserWarning, match=r"latents of shape \[4, 16, 8\], trained for \[4, 8, 8\]"):
        assert corrected(**larger).images.shape == (2, 4, 16, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corrected(**larger)
    with pytest.warns(UserWarning, match=r"num_inference_steps 5, trained for 3; guidance True, trained for False"):
        corrected(**{**kwargs, "num_inference_steps": 5, "guidance_scale": 4.0})
    corrected, _, _ = network_case()
    corrected.trained_for = {"shape": [1, 8, 8]}
    with pytest.warns(UserWarning, match="not measured"):
        assert corrected(latents=torch.zeros(1, 1, 16, 16), num_inference_steps=2).images[0].size == (16, 16)
    with pytest.raises(ValueError, match=r"trained on latents of shape \[1, 8, 8\] and cannot run on \[1, 10, 10\]"):
        corrected(latents=torch.zeros(1, 1, 10, 10), num_inference_steps=2)
    with pytest.raises(ValueError, match=r"fitted to latents of shape \(1, 8, 8\), and this call starts from"):
        gaussian_case()[0](latents=torch.zeros(1, 1, 16, 16), num_inference_steps=2)


def test_a_corrector_that_is_not_trained_yet_is_refused():
    with pytest.raises(ValueError, match="no corrector yet"):
        NoiseCorrectedPipeline(tiny_flow(), None)(num_inference_steps=2)


def test_a_folder_without_a_corrector_is_not_pushed(tmp_path):
    with pytest.raises(ValueError, match="holds no noise corrector"):
        push_corrector_to_hub(tmp_path, "fixer", **TOKEN)
