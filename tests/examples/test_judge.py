# SPDX-License-Identifier: Apache-2.0

"""The second judge of the emoji example: its rules, its targets, and its files."""

from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from examples.emoji.judge import GRID, NONE, OTHER, Judge, View, distinct, find_objects
from examples.emoji.scenes import (
    ALL_STYLES,
    BACKGROUNDS,
    CATEGORIES,
    FOLDER,
    NOUNS,
    STYLES,
    Layout,
    Renderer,
    Spec,
    layout,
    random_spec,
    vocabulary,
)
from examples.emoji.train_judge import (
    FAR,
    OTHER_SHARE,
    cell_targets,
    contents,
    judge_loss,
    judge_pool,
    other_colors,
    train_judge,
)
from examples.emoji.verifier import Detection, is_right


CAT, DOG = NOUNS.index("cat"), NOUNS.index("dog")


@pytest.fixture(scope="module")
def untrained() -> Judge:
    torch.manual_seed(0)
    return Judge(width=32, depth=2).eval()


def scene(*objects: tuple[int, int, int, int], background: int = 0) -> Layout:
    """One scene of (noun, side, left, top), in the first style."""
    rows = [*objects, *[(-1, 16, 0, 0)] * (5 - len(objects))]
    noun, side, left, top = (torch.tensor(column)[None] for column in zip(*rows, strict=True))
    return Layout(noun, torch.zeros_like(noun), side, left, top, torch.tensor([background]))


def view(claims: dict[tuple[int, int], tuple[int, float, float, float]]) -> View:
    """One image in which cell (row, column) claims a noun with some logit over "none", its centre at (x, y)."""
    nouns, offsets = torch.zeros(1, GRID, GRID, NONE + 1), torch.zeros(1, GRID, GRID, 2)
    nouns[..., NONE] = 20
    for (row, column), (noun, logit, x, y) in claims.items():
        nouns[0, row, column, noun] = 20 + logit
        offsets[0, row, column] = torch.tensor([x / 4 - column - 0.5, y / 4 - row - 0.5])
    return View(nouns, offsets, torch.zeros(1, OTHER + 1), torch.zeros(1, len(NOUNS) + len(ALL_STYLES)))


# The rule ------------------------------------------------------------------------------------------------------------


CAT_LEFT, DOG_RIGHT = Detection("cat", 0.9, 16.0, 30.0), Detection("dog", 0.8, 48.0, 34.0)
BOTH = (("cat", 1), ("dog", 1))


@pytest.mark.parametrize(
    ("objects", "background", "spec", "right"),
    [
        ([CAT_LEFT], "white", Spec((("cat", 1),)), True),
        ([CAT_LEFT], "white", Spec((("dog", 1),)), False),
        ([], "white", Spec((("cat", 1),)), False),
        ([CAT_LEFT, replace(CAT_LEFT, x=48.0)], None, Spec((("cat", 2),)), True),
        ([CAT_LEFT, replace(CAT_LEFT, x=48.0)], None, Spec((("cat", 1),)), False),
        ([CAT_LEFT], None, Spec((("cat", 2),)), False),
        ([CAT_LEFT, DOG_RIGHT], None, Spec(BOTH), True),
        ([CAT_LEFT, DOG_RIGHT], None, Spec(BOTH, "left of"), True),
        ([DOG_RIGHT, CAT_LEFT], None, Spec(BOTH[::-1], "right of"), True),
        ([CAT_LEFT, DOG_RIGHT], None, Spec(BOTH, "right of"), False),
        ([CAT_LEFT, DOG_RIGHT], None, Spec(BOTH, "above"), False),
        ([CAT_LEFT], "pink", Spec((("cat", 1),), background="pink"), True),
        ([CAT_LEFT], "blue", Spec((("cat", 1),), background="pink"), False),
        ([CAT_LEFT], None, Spec((("cat", 1),), background="pink"), False),
    ],
)
def test_right_is_exactly_what_is_asked_for(objects, background, spec, right):
    assert is_right(objects, background, spec) == right


def test_one_object_claimed_by_neighbouring_cells_counts_once():
    claims = {(3, 3): (CAT, 4.0, 15.8, 14.0), (3, 4): (CAT, 6.0, 16.1, 14.1), (10, 4): (CAT, 3.0, 18.0, 42.0)}
    found = find_objects(view(claims))[0]
    assert len(found) == 3
    kept = distinct(found)
    assert [(round(cat.x, 3), round(cat.y, 3)) for cat in kept] == [(16.1, 14.1), (18.0, 42.0)]
    assert kept[0].confidence > kept[1].confidence > 0.9


def test_neighbouring_objects_of_different_nouns_are_both_kept():
    found = find_objects(view({(3, 3): (CAT, 4.0, 15.8, 14.0), (3, 4): (DOG, 6.0, 16.1, 14.1)}))[0]
    assert [detection.noun for detection in distinct(found)] == ["dog", "cat"]


def test_cells_that_are_not_sure_hold_nothing():
    assert find_objects(view({(3, 3): (CAT, -0.5, 14.0, 14.0)})) == [[]]


# Targets and loss ----------------------------------------------------------------------------------------------------


def test_a_centre_is_taught_to_its_cell_and_not_held_against_the_next():
    noun, offset, near = cell_targets(scene((CAT, 20, 11, 12)))  # its centre (21, 22) is in row 5, column 5
    assert noun[0, 5, 5] == CAT and offset[0, 5, 5].tolist() == [-0.25, 0.0]
    assert noun[0, 5, 4] == -100 and offset[0, 5, 4].tolist() == [0.75, 0.0]
    assert near.sum() == 2 and (noun == NONE).sum() == GRID**2 - 2


def test_contents_are_the_nouns_and_styles_that_are_there():
    said = contents(scene((CAT, 20, 0, 0), (DOG, 20, 40, 40), (CAT, 20, 40, 0)))
    assert said[0].nonzero().flatten().tolist() == [CAT, DOG, len(NOUNS)]


def test_loss_is_small_for_the_truth_and_large_for_a_mistake():
    truth = scene((CAT, 20, 12, 12), background=2)
    seen = view({(5, 5): (CAT, 20.0, 22.0, 22.0)})
    right = seen._replace(background=20 * torch.eye(OTHER + 1)[[2]], contents=40 * contents(truth) - 20)
    assert judge_loss(right, truth) < 1e-3
    assert judge_loss(right._replace(nouns=right.nouns.roll(1, dims=2)), truth) > 10
    assert judge_loss(right._replace(offsets=right.offsets + 1), truth) > 0.5
    assert judge_loss(right._replace(background=right.background.roll(1, dims=1)), truth) > 5


def test_some_scenes_have_a_background_without_a_name():
    colors = other_colors(256, np.random.default_rng(0))
    named = np.array(list(BACKGROUNDS.values())) / 255
    assert colors.shape == (256, 3) and np.linalg.norm(colors[:, None] - named, axis=2).min() > FAR
    pool = judge_pool(2000, "cpu", seed=0)
    assert (pool.fields.background >= OTHER).float().mean() == pytest.approx(OTHER_SHARE, abs=0.04)
    assert pool.fields.background.max() < len(pool.renderer.colors)


def test_training_scenes_come_half_from_other_styles():
    fields = judge_pool(2000, "cpu", seed=0).fields
    counts = fields.style[fields.noun >= 0].bincount(minlength=len(ALL_STYLES))
    assert counts.div(counts.sum()).tolist() == pytest.approx([0.25] * 4, abs=0.04)


def test_training_changes_every_weight_and_takes_the_committed_vae():
    vae = AutoencoderKL.from_pretrained(FOLDER / "model", subfolder="vae").requires_grad_(False)
    args = Namespace(device="cpu", compile=False, batch=4, seconds=60, lr=1e-3, max_steps=2)
    torch.manual_seed(3)
    before = Judge().state_dict()
    torch.manual_seed(3)
    after = train_judge(judge_pool(64, "cpu", seed=0), vae, args).state_dict()
    assert [name for name in before if torch.equal(before[name], after[name])] == []


# Styles --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ALL_STYLES)
def test_scenes_are_drawn_in_a_chosen_style(style):
    specs = [Spec((("cat", 1),), background="white")] * 4
    scenes = layout(specs, np.random.default_rng(0), styles=[style])
    assert (scenes.style == ALL_STYLES.index(style)).all()
    images = Renderer()(replace(scenes, side=scenes.side * 0 + 44, left=scenes.left * 0, top=scenes.top * 0))
    sprite = Image.open(FOLDER / "sprites" / style / "cat.png").convert("RGBA").resize((44, 44), Image.BILINEAR)
    paper = Image.new("RGBA", (64, 64), (250, 250, 250))
    paper.alpha_composite(sprite)
    expected = torch.from_numpy(np.array(paper.convert("RGB"))).permute(2, 0, 1) / 255
    assert (images[0] - expected).abs().mean() < 0.005


def test_default_scenes_and_captions_keep_to_the_models_styles():
    rng = np.random.default_rng(0)
    specs = [random_spec(rng, CATEGORIES[i % 6]) for i in range(200)]
    assert {spec.style for spec in specs} == {None, *STYLES}
    assert set(layout(specs, rng).style.flatten()) == {0, 1}
    assert not set(ALL_STYLES[len(STYLES) :]) & set(vocabulary())


# Model and files -----------------------------------------------------------------------------------------------------


def test_features_are_one_row_per_image(untrained):
    images = torch.rand(3, 3, 64, 64)
    features = untrained.features(images)
    assert features.shape == (3, 32) and features.dtype == torch.float32
    pictures = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    torch.testing.assert_close(untrained.features(pictures), features, atol=0.02, rtol=0.02)
    assert (features[0] - features[1]).abs().max() > 1e-3


def test_saving_and_loading_keeps_the_judge(tmp_path):
    saved = Judge()
    saved.save(tmp_path)
    loaded = Judge.load(tmp_path)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(loaded.features(images), saved.eval().features(images), atol=5e-3, rtol=5e-3)
    assert (tmp_path / "judge.safetensors").stat().st_size < 3e6
    assert sum(p.numel() for p in loaded.parameters()) < 2e6


def test_judge_says_what_is_wrong_with_its_input(untrained):
    with pytest.raises(ValueError, match="1 images for 2 prompts"):
        untrained.score(torch.zeros(1, 3, 64, 64), ["a cat", "a dog"])
    with pytest.raises(ValueError, match="3 x 64 x 64"):
        untrained.score(torch.zeros(1, 3, 32, 32), ["a cat"])
    with pytest.raises(ValueError, match="not a caption"):
        untrained.score(torch.zeros(1, 3, 64, 64), ["a unicorn"])


def test_without_weights_the_judge_says_how_they_are_made(tmp_path):
    with pytest.raises(FileNotFoundError, match="train_judge"):
        Judge.load(tmp_path)
