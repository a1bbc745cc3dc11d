# SPDX-License-Identifier: Apache-2.0

"""The emoji example: captions, scenes, prompt files, verifier and model folder."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from examples.emoji.check_verifier import hard_negatives, measure
from examples.emoji.evaluate import read_prompts
from examples.emoji.prompts import turned
from examples.emoji.scenes import (
    ALL_STYLES,
    CATEGORIES,
    FOLDER,
    NOUNS,
    OPENINGS,
    RELATIONS,
    Renderer,
    Spec,
    caption,
    layout,
    noisy_spec,
    parse_prompt,
    random_spec,
    vocabulary,
)
from examples.emoji.verifier import Verifier, emoji_score, emoji_soft_score


SPLITS = ("train", "held_out", "test")


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    return Verifier.load()


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER / "model")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def render(specs: list[Spec], seed: int = 0) -> torch.Tensor:
    return Renderer()(layout(specs, np.random.default_rng(seed)))


def folder_bytes(name: str) -> int:
    return sum(path.stat().st_size for path in (FOLDER / name).rglob("*") if path.is_file())


@pytest.mark.parametrize("split", SPLITS)
def test_prompt_files_round_trip(split):
    for row in read_prompts(split):
        spec = parse_prompt(row["prompt"])
        assert row["prompt"] in [caption(spec, opening) for opening in OPENINGS]
        assert spec.category == row["category"]
        assert [list(item) for item in spec.objects] == row["objects"]
        assert (spec.relation, spec.background) == (row["relation"], row["background"])


def test_splits_share_no_spec():
    specs = [{parse_prompt(row["prompt"]) for row in read_prompts(split)} for split in SPLITS]
    specs = [known | {turned(spec) for spec in known if len(spec.objects) > 1} for known in specs]
    assert not specs[0] & specs[1] and not specs[0] & specs[2] and not specs[1] & specs[2]


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_are_many_and_different(split):
    rows = read_prompts(split)
    assert len({row["prompt"] for row in rows}) == len(rows)
    for category in ("relation", "count"):
        assert sum(row["category"] == category for row in rows) >= 128


@pytest.mark.parametrize("category", CATEGORIES)
def test_random_specs_round_trip(category):
    rng = np.random.default_rng(0)
    for _ in range(100):
        spec = random_spec(rng, category)
        assert spec.category == category
        assert parse_prompt(caption(spec, OPENINGS[rng.integers(4)])) == spec


@pytest.mark.parametrize("text", ["", "a cat and", "a unicorn", "five cats", "a cat on a black background", "A cat"])
def test_unknown_captions_are_refused(text):
    with pytest.raises(ValueError, match="not a caption"):
        parse_prompt(text)


def test_noisy_captions_change_what_they_should():
    rng = np.random.default_rng(0)
    relation = Spec((("cat", 1), ("dog", 1)), "above")
    said = [noisy_spec(relation, rng) for _ in range(2000)]
    # A random word is the true one in a quarter of the cases.
    assert np.mean([spec.relation != "above" for spec in said]) == pytest.approx(0.5 * 3 / 4, abs=0.05)
    assert np.mean([spec.objects[1][0] != "dog" for spec in said]) == pytest.approx(0.15 * 15 / 16, abs=0.03)
    assert noisy_spec(relation, rng, relation=0, second_noun=0) == relation


def test_layouts_hold_their_relation_and_stay_on_the_canvas():
    specs = [Spec((("cat", 1), ("dog", 1)), relation) for relation in RELATIONS for _ in range(50)]
    scenes = layout(specs, np.random.default_rng(0))
    x, y = scenes.left + scenes.side / 2, scenes.top + scenes.side / 2
    dx, dy = (x[:, 1] - x[:, 0]).reshape(4, 50), (y[:, 1] - y[:, 0]).reshape(4, 50)
    assert (dx[0] > abs(dy[0])).all() and (-dx[1] > abs(dy[1])).all()
    assert (dy[2] > abs(dx[2])).all() and (-dy[3] > abs(dx[3])).all()
    assert (scenes.left >= 0).all() and (scenes.left + scenes.side <= 64).all()


def test_renderer_draws_the_sprite_where_the_layout_says():
    scenes = layout([Spec((("apple", 1),), background="white", style="noto")], np.random.default_rng(0))
    changed = (Renderer()(scenes)[0] - 250 / 255).abs().amax(0) > 0.02
    rows, columns = torch.nonzero(changed, as_tuple=True)
    left, top, side = (int(value[0, 0]) for value in (scenes.left, scenes.top, scenes.side))
    assert left <= columns.min() and columns.max() < left + side
    assert top <= rows.min() and rows.max() < top + side
    assert changed.sum() > 0.3 * side**2


def test_every_noun_has_a_sprite_in_every_style():
    for style in ALL_STYLES:
        for noun in NOUNS:
            assert Image.open(FOLDER / "sprites" / style / f"{noun}.png").size == (64, 64)


def test_verifier_passes_right_scenes(verifier):
    rng = np.random.default_rng(7)
    specs = [random_spec(rng, CATEGORIES[i % 6]) for i in range(200)]
    assert measure(verifier, specs, specs, rng) >= 0.97


def test_verifier_refuses_hard_negatives(verifier):
    rng = np.random.default_rng(8)
    specs = [random_spec(rng, CATEGORIES[i % 6]) for i in range(100)]
    pairs = [(spec, wrong) for spec in specs for wrong in hard_negatives(spec, rng).values()]
    assert measure(verifier, *map(list, zip(*pairs, strict=True)), rng) < 0.01


def test_verifier_takes_tensors_pictures_text_and_specs(verifier):
    spec = Spec((("cat", 1), ("dog", 1)), "above")
    images = render([spec, spec])
    pictures = [Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()) for image in images]
    prompts = [caption(spec), "a drawing of a dog above a cat"]
    assert verifier.score(images, [spec, spec]) == [1.0, 1.0]
    assert emoji_score(prompts=prompts, images=pictures) == [1.0, 0.0]
    right, wrong = emoji_soft_score(prompts=prompts, images=pictures, category=["relation"] * 2)
    assert 0 <= wrong < 0.6 < right <= 1


def test_soft_score_falls_with_each_mistake(verifier):
    asked = Spec((("fish", 4),), background="blue")
    shown = [asked, Spec((("fish", 3),), background="blue"), Spec((("fish", 2),), background="blue"),
             Spec((("fish", 2),), background="pink"), Spec((("car", 2),), background="pink")]  # fmt: skip
    scores = verifier.soft_score(render(shown), [asked] * len(shown))
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == len(scores)


def test_verifier_says_what_is_wrong_with_its_input(verifier):
    with pytest.raises(ValueError, match="1 images for 2 prompts"):
        verifier.score(torch.zeros(1, 3, 64, 64), ["a cat", "a dog"])
    with pytest.raises(ValueError, match="3 x 64 x 64"):
        verifier.score(torch.zeros(1, 3, 32, 32), ["a cat"])


def test_every_word_is_one_token(pipeline):
    for word in vocabulary():
        assert len(pipeline.tokenizer(word).input_ids) == 3, word
    rows = [row for split in SPLITS for row in read_prompts(split)]
    lengths = [len(ids) for ids in pipeline.tokenizer([row["prompt"] for row in rows]).input_ids]
    assert max(lengths) <= pipeline.tokenizer.model_max_length


def test_tokenizer_is_rebuilt_the_same(pipeline, tmp_path):
    from examples.emoji.build_model import build_tokenizer

    text = "a picture of three mushrooms on a purple background"
    assert build_tokenizer(tmp_path)(text).input_ids == pipeline.tokenizer(text).input_ids
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / name).read_bytes() == (FOLDER / "model" / "tokenizer" / name).read_bytes()


def test_pipeline_draws_what_is_asked_for(pipeline, verifier):
    prompts = ["a cat", "an apple on a white background", "a frog", "a car on a blue background"]
    generator = [torch.Generator().manual_seed(seed) for seed in range(4)]
    options = {"num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "pt"}
    images = pipeline(prompts, generator=generator, **options).images
    assert images.shape == (4, 3, 64, 64)
    assert sum(verifier.score(images, prompts)) >= 3


def test_scheduler_has_stable_diffusions_settings():
    config = json.loads((FOLDER / "model" / "scheduler" / "scheduler_config.json").read_text())
    assert config["beta_schedule"] == "scaled_linear" and config["prediction_type"] == "epsilon"
    assert config["steps_offset"] == 1 and not config["clip_sample"] and not config["set_alpha_to_one"]


def test_folders_are_small():
    assert folder_bytes("model") < 20e6
    assert folder_bytes("verifier") < 8e6
    assert folder_bytes("sprites") < 0.5e6
