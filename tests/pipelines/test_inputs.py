# SPDX-License-Identifier: Apache-2.0

import typing
from typing import Any, Literal

import datasets
import pytest
import torch
from cases import BLACK, CASES, LEFT, PROMPTS, WHITE, Case, brightness, make_trainer
from PIL import Image
from tiny_pipelines import tiny_ddpm, tiny_flux, tiny_image_to_image, tiny_sd, tiny_sdxl
from tiny_transformers import tiny_dit, tiny_qwen_image

from trl_pgraft import GraftConfig, PGraftTrainer
from trl_pgraft.adapters.lora import adapter_parameters
from trl_pgraft.pipelines.conditioning import record_conditioning
from trl_pgraft.pipelines.fingerprint import sampling_fingerprint
from trl_pgraft.pipelines.inputs import (
    as_batch,
    call_pipeline,
    input_names,
    inputs_of,
    prompt_arguments,
    sampling_arguments,
)
from trl_pgraft.pipelines.introspection import introspect


GUIDED = {"num_inference_steps": 3, "guidance_scale": 3.0}


def sample(pipeline, arguments, inputs=None, prompts=PROMPTS):
    return call_pipeline(pipeline, prompts, [1, 2], {**arguments, "output_type": "pt"}, inputs).images


def embeddings_of(pipeline, prompts):
    prompt, negative = pipeline.encode_prompt(prompts, "cpu", 1, True)
    return prompt.detach(), negative.detach()


def test_inputs_are_told_by_name():
    names = input_names(tiny_sdxl())
    assert {"prompt_2", "negative_prompt", "negative_prompt_2", "prompt_embeds", "pooled_prompt_embeds"} <= names
    assert names.isdisjoint({"prompt", "num_images_per_prompt", "height", "guidance_scale", "ip_adapter_image"})
    assert {"image", "mask_image", "masked_image_latents"} <= input_names(CASES["inpainting"].make())
    assert input_names(tiny_dit()) == {"class_labels"} and input_names(tiny_ddpm()) == set()


def call_of_many_types(
    self,
    prompt: "str | list[str]" = None,
    prompt_2: "typing.Optional[typing.Union[str, typing.List[str]]]" = None,  # noqa: UP006, UP007, UP045
    negative_prompt: str = "",
    prompt_embeds: torch.FloatTensor | None = None,
    image: "Image.Image | list['Image.Image'] | Missing" = None,  # noqa: F821
    mask_image: list["Image.Image"] | None = None,
    prompt_3=None,
    control_image=None,
    image_2: Any | None = None,
    system_prompt: str | list[str] | None = None,
    complex_human_instruction: list[str] | None = None,
    prompt_template: dict[str, Any] | None = None,
    prompt_prefix: str | None = None,
    prompt_stop_words: list[str] | None = None,
    prompt_cache: dict[str, torch.Tensor] | None = None,
    prompt_weights: list[float] | float = 1.0,
    prompt_mode: Literal["plain", "image"] = "plain",
    rewrite_prompt: bool | None = True,
    enhance_prompt: "bool | Missing" = None,  # noqa: F821
    image_scale: float | int = 1.0,
    image_count=1,
    on_image=None,
    use_image=None,
    prompt_reps=None,
):
    """What a pipeline's call may look like."""


def test_what_the_annotation_allows_to_be_a_list_is_repeated_and_nothing_else():
    own = {"__call__": call_of_many_types, "components": {}, "device": "cpu", "dtype": torch.float32}
    pipeline = type("Many", (), own)()
    embeds = torch.zeros(1, 3)
    per_prompt = dict.fromkeys(("prompt_2", "negative_prompt", "prompt_3"), "x")
    per_prompt |= dict.fromkeys(("image", "mask_image", "control_image", "image_2"), BLACK)
    once = {
        **dict.fromkeys(("system_prompt", "prompt_prefix", "prompt_mode"), "x"),
        **{"complex_human_instruction": ["x"], "prompt_stop_words": ["x"], "prompt_template": {"template": "{}"}},
        **{"prompt_cache": {"x": embeds}, "prompt_weights": [0.5], "image_scale": 2.0, "on_image": print},
        **{"rewrite_prompt": False, "enhance_prompt": False, "use_image": False, "image_count": 3, "prompt_reps": 2},
    }
    call = prompt_arguments(pipeline, PROMPTS, {**per_prompt, **once})
    assert call == {"prompt": PROMPTS, **{n: [value] * 2 for n, value in per_prompt.items()}, **once}
    assert prompt_arguments(pipeline, PROMPTS, {"prompt_embeds": embeds})["prompt_embeds"].shape == (2, 3)
    assert inputs_of(pipeline, {**once, "prompt_2": "x"}, {}).keys() == {"prompt_2", "on_image", "prompt_reps"}


def test_columns_that_are_no_inputs_stay_with_the_rewards(sd):
    columns = {"prompt_embeds": 1, "height": 8, "label": "x", "negative_prompt": None}
    assert inputs_of(sd, columns, {}) == {"prompt_embeds": 1}
    assert inputs_of(sd, columns, {"prompt_embeds": 2}) == {}, "what pipeline_kwargs set, no column sets"


def test_a_pipeline_without_prompts_is_asked_for_a_number_of_images():
    assert prompt_arguments(tiny_ddpm(), ["", ""], {"num_inference_steps": 3}) == {
        "num_inference_steps": 3,
        "batch_size": 2,
    }
    assert prompt_arguments(tiny_dit(), ["", ""], {}, [{"class_labels": 4}, {"class_labels": 2}]) == {
        "class_labels": [4, 2]
    }


def test_inputs_of_the_call_are_repeated_for_each_prompt(sd):
    embeds = torch.arange(6.0).reshape(1, 2, 3)
    call = prompt_arguments(sd, PROMPTS, {"negative_prompt": "ugly", "prompt_embeds": embeds, "height": 8})
    assert call["negative_prompt"] == ["ugly", "ugly"] and call["height"] == 8 and "prompt" not in call
    assert torch.equal(call["prompt_embeds"], torch.cat([embeds, embeds]))
    image_to_image = tiny_image_to_image()
    assert prompt_arguments(image_to_image, PROMPTS, {"image": BLACK})["image"] == [BLACK, BLACK]
    assert prompt_arguments(image_to_image, PROMPTS, {"image": [BLACK]})["image"] == [BLACK, BLACK]
    assert prompt_arguments(image_to_image, PROMPTS, {"image": [BLACK, WHITE]})["image"] == [BLACK, WHITE]


def test_an_input_that_some_prompts_lack_is_named(sd):
    with pytest.raises(ValueError, match="Some prompts of a batch have no negative_prompt"):
        prompt_arguments(sd, PROMPTS, {}, [{"negative_prompt": "ugly"}, {}])


def test_an_input_that_the_pipeline_needs_is_named(tmp_path):
    with pytest.raises(ValueError, match="DiTPipeline needs class_labels for each image: give it as a column"):
        make_trainer(Case(tiny_dit, columns={"other": [0, 0]}), tmp_path)
    trainer = make_trainer(Case(tiny_dit, {"class_labels": [3]}, {"other": [0, 0]}), tmp_path)
    assert torch.isfinite(trainer.evaluate(["", ""]).reward).all(), "one for all, from pipeline_kwargs"
    with pytest.raises(ValueError, match="in `evaluate`, of `columns`"):
        make_trainer(CASES["DiT"], tmp_path).evaluate(["", ""])


def test_rows_of_a_dataset_become_tensors():
    rows = [[[1.0, 2.0]], [[3.0, 4.0]]]
    assert torch.equal(as_batch(rows), torch.tensor(rows)) and as_batch(["a", "b"]) == ["a", "b"]
    assert as_batch([3, 7]) == [3, 7] and as_batch([BLACK, WHITE]) == [BLACK, WHITE]


def test_each_prompt_has_its_own_negative_prompt(sd):
    inputs = [{"negative_prompt": "ugly"}, {"negative_prompt": "a dog"}]
    together = sample(sd, GUIDED, inputs)
    for row, own in enumerate(inputs):
        alone = sample(sd, {**GUIDED, **own})[row]
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-5)
    call = introspect(sd, GUIDED).call
    unconditional = record_conditioning(sd, call, PROMPTS, GUIDED, inputs).unconditional["encoder_hidden_states"]
    _, expected = sd.encode_prompt(PROMPTS, "cpu", 1, True, negative_prompt=["ugly", "a dog"])
    torch.testing.assert_close(unconditional, expected.detach())


def test_prompt_embeddings_stand_for_prompts(sd):
    embeds, negative = embeddings_of(sd, PROMPTS)
    inputs = [{"prompt_embeds": e, "negative_prompt_embeds": n} for e, n in zip(embeds, negative, strict=True)]
    torch.testing.assert_close(sample(sd, GUIDED, inputs), sample(sd, GUIDED), rtol=0, atol=1e-5)
    shared = {**GUIDED, "prompt_embeds": embeds[:1], "negative_prompt_embeds": negative[:1]}
    expected = sample(sd, GUIDED, prompts=[PROMPTS[0]] * 2)
    torch.testing.assert_close(sample(sd, shared), expected, rtol=0, atol=1e-5)


def test_embeddings_come_in_the_pipelines_precision():
    """As rows of a dataset they are float32; Flux hands them to its transformer as they are."""
    pipeline = tiny_flux().to(dtype=torch.bfloat16)
    with torch.no_grad():
        embeds, pooled, _ = pipeline.encode_prompt(PROMPTS, PROMPTS, "cpu")
    inputs = [
        {"prompt_embeds": e.float().tolist(), "pooled_prompt_embeds": p.float().tolist()}
        for e, p in zip(embeds, pooled, strict=True)
    ]
    torch.testing.assert_close(sample(pipeline, GUIDED, inputs), sample(pipeline, GUIDED), rtol=0, atol=1e-5)


def trained_with(make, dataset, folder):
    options = {"num_epochs": 1, "sample_num_steps": 4, "sample_guidance_scale": 3.0, "samples_per_prompt": 2}
    options |= {"sample_batch_size": 2, "acceptance_kwargs": {"k": 1}, "train_timestep_fraction": 0.25}
    config = GraftConfig(**options, output_dir=str(folder))
    trainer = PGraftTrainer(config, brightness, sd_pipeline=make(), train_dataset=datasets.Dataset.from_dict(dataset))
    (metrics,) = trainer.train()
    return metrics["loss"], trainer


def test_embeddings_train_as_their_prompts_do(tmp_path):
    """Without a column `prompt`, too; the adapters are equal."""
    embeds, negative = embeddings_of(tiny_sd(), PROMPTS)
    columns = {"prompt_embeds": embeds.tolist(), "negative_prompt_embeds": negative.tolist()}
    expected, by_prompts = trained_with(tiny_sd, {"prompt": PROMPTS}, tmp_path / "prompts")
    loss, by_embeddings = trained_with(tiny_sd, columns, tmp_path / "embeddings")
    assert loss == pytest.approx(expected, rel=1e-5)
    adapters = [adapter_parameters(t.denoiser, "pgraft") for t in (by_prompts, by_embeddings)]
    for one, other in zip(*adapters, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["negative_prompt", "prompt_2", "negative_prompt_2"])
def test_further_prompts_are_trained_with(name, tmp_path):
    # All else is the same for both; without a negative prompt SDXL takes zeros for both encoders.
    columns = {"prompt": ["a cat"] * 2, "negative_prompt": ["ugly"] * 2, name: ["a house", "an old tree"]}
    loss, trainer = trained_with(tiny_sdxl, columns, tmp_path)
    assert loss > 0 and trainer.state.global_step > 0
    rollout, _ = trainer.collector.sample_rollout(0)
    conditioning = trainer.finetuner.training_set(rollout, 0).conditioning
    changed = conditioning.conditional if name == "prompt_2" else conditioning.unconditional
    for part in (conditioning.conditional, conditioning.unconditional):
        one, other = part["encoder_hidden_states"]
        assert torch.allclose(one, other, atol=1e-5) != (part is changed)


def test_a_second_prompt_reaches_its_text_encoder():
    for pipeline in (tiny_sdxl(), tiny_flux()):
        call = introspect(pipeline, GUIDED).call
        inputs = [{"prompt_2": "a house"}, {"prompt_2": "a tree"}]
        own = record_conditioning(pipeline, call, ["a cat", "a cat"], GUIDED, inputs).conditional
        same = record_conditioning(pipeline, call, ["a cat", "a cat"], GUIDED).conditional
        rows = own["encoder_hidden_states"]
        assert not torch.allclose(rows[0], rows[1], atol=1e-4)
        assert not torch.allclose(rows, same["encoder_hidden_states"], atol=1e-4)


@pytest.mark.parametrize("negative", ["a", "a longer prompt", "of words"])
def test_a_negative_prompt_may_be_the_one_that_is_asked_with(sd, negative):
    assert introspect(sd, {**GUIDED, "negative_prompt": negative}).call.conditional_branch == 1


def test_guidance_between_equal_branches_is_refused(sd):
    embeds, _ = embeddings_of(sd, ["a cat"])
    with pytest.raises(ValueError, match="both branches of its guided call are the same"):
        introspect(sd, {**GUIDED, "prompt_embeds": embeds, "negative_prompt_embeds": embeds})


def test_guidance_goes_where_the_pipeline_has_it():
    config = GraftConfig(sample_guidance_scale=3.0)
    qwen = sampling_arguments(config, tiny_qwen_image(), None)
    assert qwen["true_cfg_scale"] == 3.0 and "guidance_scale" not in qwen and qwen["negative_prompt"] == ""
    flux = sampling_arguments(config, tiny_flux(), None)
    assert flux["guidance_scale"] == 3.0 and "true_cfg_scale" not in flux and "negative_prompt" not in flux
    both = sampling_arguments(config, tiny_flux(), {"true_cfg_scale": 2.0})
    assert both["true_cfg_scale"] == 2.0 and both["guidance_scale"] == 3.0 and both["negative_prompt"] == ""


@pytest.mark.parametrize("name", ["image to image", "DiT", "SD 1.5"])
def test_a_stored_round_is_trained_on_with_its_inputs(name, tmp_path):
    """Stored samples are trained on with the conditioning that they were sampled with, to the same adapter."""
    case = CASES[name]
    sampled = make_trainer(case, tmp_path / "sampled", sample_num_batches_per_epoch=4)
    sampled.train()
    files = [str(path) for path in (tmp_path / "sampled" / "samples").rglob("*.parquet")]
    dataset = datasets.Dataset.from_parquet(files)
    for column, values in case.columns.items():
        kept = {row["group"]: _content(row[f"input_{column}"]) for row in dataset}
        assert len(kept) == 4 and set(kept.values()) == {_content(value) for value in values}
    stored = PGraftTrainer(
        GraftConfig(**{**sampled.config.__dict__, "output_dir": str(tmp_path / "stored")}),
        brightness,
        sd_pipeline=case.make(),
        samples_dataset=dataset,
        pipeline_kwargs=case.kwargs,
    )
    (metrics,) = stored.train()
    assert metrics["loss"] == pytest.approx(sampled.history[0]["loss"], rel=1e-4)


def _content(value):
    return value.tobytes() if isinstance(value, Image.Image) else value


def test_fingerprints_know_images_by_their_content():
    pipeline = tiny_image_to_image()
    black, same, white = (
        sampling_fingerprint(pipeline, {"image": image}, 2) for image in (BLACK, BLACK.copy(), WHITE)
    )
    assert black == same != white


def test_prompts_may_be_missing_only_where_the_pipeline_takes_none(tmp_path):
    labels = datasets.Dataset.from_dict({"class_labels": [3, 7]})
    options = {"reward_function": brightness, "train_dataset": labels}
    with pytest.raises(ValueError, match="no column `prompt`"):
        PGraftTrainer(GraftConfig(output_dir=str(tmp_path)), sd_pipeline=tiny_sd(), **options)


def test_evaluation_takes_columns(tmp_path):
    trainer = make_trainer(CASES["DiT"], tmp_path)
    one, other = (trainer.evaluate(["", ""], columns={"class_labels": labels}) for labels in ([3, 3], [3, 7]))
    assert torch.equal(one.images[0], other.images[0]) and not torch.equal(one.images[1], other.images[1])


FURTHER = {
    "image to image": {"image": [WHITE, BLACK]},
    "inpainting": {"image": [WHITE, BLACK], "mask_image": [LEFT, LEFT]},
    "DiT": {"class_labels": [5, 9]},
    "Wan": {},
}


@pytest.mark.parametrize("name", FURTHER)
def test_held_out_images_are_drawn_with_their_inputs(name, tmp_path):
    """In evaluations, in a tracker's pictures and on the card, where a run has no other prompts than its samples'."""
    case, columns = CASES[name], FURTHER[name]
    prompts = {"prompt": ["a fox", "a fox"]} if name != "DiT" else {}
    held_out = datasets.Dataset.from_dict({**prompts, **columns})
    options = {"log_with": "tensorboard", "logdir": "logs", "num_epochs": 1}
    trainer = make_trainer(case, tmp_path / "run", eval_dataset=held_out, **options)
    base = trainer.evaluate(reference=True)
    trainer.train()
    assert [record["epoch"] for record in trainer.history if "eval/reward" in record] == [0, 1]
    assert torch.equal(trainer.collector.sample_images(trainer.held_out, True), base.images)
    given = trainer.evaluate(held_out["prompt"] if prompts else ["", ""], True, columns)
    assert torch.equal(given.images, base.images)
    swapped = trainer.evaluate(["a fox"] * 2, True, {column: values[::-1] for column, values in columns.items()})
    assert torch.equal(swapped.images, base.images) == (name == "Wan")
    trainer.held_out = []
    trainer.create_model_card()
    with Image.open(trainer.adapter_dir / "before_after.png") as grid:
        assert grid.width == 56 + 2 * 132, "the two prompts that were trained on"
    assert any((tmp_path / "run").rglob("events.out.tfevents*"))


def test_held_out_prompts_without_inputs_are_refused_before_anything_is_drawn(tmp_path):
    with pytest.raises(ValueError, match="is handed image, mask_image for each prompt .*columns image, mask_image"):
        make_trainer(CASES["inpainting"], tmp_path, eval_prompts=["a fox"])
    with pytest.raises(ValueError, match="DiTPipeline is handed class_labels.*an eval_dataset with a column class_l"):
        make_trainer(CASES["DiT"], tmp_path, eval_prompts=[""])
    same_for_all = Case(tiny_image_to_image, {"strength": 0.75, "image": BLACK})
    trainer = make_trainer(same_for_all, tmp_path, eval_prompts=["a fox"])
    assert [row["skipped_steps"] for row in trainer.train() if "reward" in row] == [0]


def test_held_out_prompts_reach_the_rewards_with_their_columns(tmp_path):
    seen = []

    def reward(*, images, prompts, **columns):
        seen.append((prompts, columns.get("answer")))
        return [0.5] * len(images)

    held_out = datasets.Dataset.from_dict({"prompt": ["a fox", "a hen"], "answer": [1, 2]})
    PGraftTrainer(
        GraftConfig(output_dir=str(tmp_path), sample_batch_size=2, sample_num_steps=2),
        sd_pipeline=tiny_sd(),
        reward_funcs=reward,
        prompt_function=lambda: ("a", {}),
        eval_dataset=held_out,
    ).evaluate()
    assert seen == [(["a fox", "a hen"], [1, 2])]


@pytest.mark.parametrize(
    "eval_dataset, prompts, message",
    [
        (datasets.Dataset.from_dict({"prompt": ["a"]}), ["b"], "eval_dataset and config.eval_prompts both"),
        (datasets.Dataset.from_dict({"text": ["a"]}), None, "eval_dataset has no column `prompt`; it has text"),
        (datasets.Dataset.from_dict({"prompt": []}), None, "eval_dataset is empty"),
        (datasets.DatasetDict({"test": datasets.Dataset.from_dict({"prompt": ["a"]})}), None, "is a DatasetDict"),
    ],
)
def test_held_out_prompts_are_checked(tmp_path, eval_dataset, prompts, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(CASES["SD 1.5"], tmp_path, eval_dataset=eval_dataset, eval_prompts=prompts)


def test_steps_that_an_image_skips_are_not_tuned(tmp_path):
    """Of four steps the noisiest is not made at strength 0.75: two of the three others are tuned, up to its first."""
    trainer = make_trainer(CASES["image to image"], tmp_path, tuned_fraction=0.6)
    assert trainer.policy.levels.step_index == 2
    trainer.train()
    steps = trainer.pipeline.scheduler.timesteps.tolist()
    assert len(steps) == 4 and trainer.policy.levels.highest == steps[1]
    assert trainer.policy.switch.state_timestep == steps[3]
    sampled = trainer.policy.levels.sample(100, torch.Generator().manual_seed(0))
    assert sampled.max() <= steps[1] and sampled.min() > trainer.policy.switch.switch_timestep


@pytest.mark.parametrize(
    "name, value, advice",
    [
        ("num_images_per_prompt", 2, "samples_per_prompt"),
        ("num_videos_per_prompt", 1, "samples_per_prompt"),
        ("latents", torch.zeros(1, 4, 4, 4), "`seed`"),
        ("generator", torch.Generator(), "`seed`"),
        ("return_dict", False, "leave it out"),
        ("output_type", "latent", "PIL images"),
        ("prompt", "a cat", "train_dataset or prompt_function"),
        ("batch_size", 4, "sample_batch_size"),
    ],
)
def test_what_the_library_sets_is_refused_in_pipeline_kwargs(name, value, advice):
    with pytest.raises(ValueError, match=f"pipeline_kwargs: `{name}` cannot be given here.*{advice}"):
        sampling_arguments(GraftConfig(), tiny_sd(), {"height": 16, name: value})
