# SPDX-License-Identifier: Apache-2.0

"""Images of `train_dataset`, from the column to the pipeline's call and to what is stored."""

import io
import itertools

import datasets
import numpy as np
import pytest
from PIL import Image
from runs import brightness
from tiny_pipelines import tiny_image_to_image

from trl_pgraft import GraftConfig, PGraftTrainer


def jpeg(seed):
    noise = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG", quality=80)
    return {"bytes": file.getvalue(), "path": None}


def make_trainer(folder, data, eval_dataset=None, **options):
    size = {"sample_num_steps": 5, "sample_batch_size": 2, "sample_num_batches_per_epoch": 4, "samples_per_prompt": 4}
    fields = {**size, "num_epochs": 1, "tuned_fraction": 0.8, "output_dir": str(folder), "reward_retries": 0}
    return PGraftTrainer(
        GraftConfig(**{**fields, **options}),
        brightness,
        sd_pipeline=tiny_image_to_image(),
        train_dataset=data,
        eval_dataset=eval_dataset,
        pipeline_kwargs={"strength": 0.8},
    )


def images(column, prompts=("a cat", "a house")):
    return datasets.Dataset.from_dict({"prompt": list(prompts), "image": column})


def stored_inputs(folder):
    (path,) = folder.rglob("*.parquet")
    raw = datasets.Dataset.from_parquet(str(path), cache_dir=str(folder / "cache"))
    assert all(
        row["path"] is None for row in raw.cast_column("input_image", datasets.Image(decode=False))["input_image"]
    )
    return {row["prompt"]: np.asarray(row["input_image"]) for row in raw}


def sampled(folder, data):
    """The images of an iteration by seed, and the stored inputs by prompt."""
    rollout, batches = make_trainer(folder, data).collector.sample_rollout(0)
    return {s.seed: image for b in batches for s, image in zip(b.samples, b.images, strict=True)}, stored_inputs(
        folder
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What is sampled from arrays of the same pixels, and these pixels."""
    column = [np.asarray(Image.open(io.BytesIO(jpeg(i)["bytes"]))) for i in range(2)]
    return *sampled(tmp_path_factory.mktemp("expected"), images([Image.fromarray(c) for c in column])), column


@pytest.mark.parametrize("kind", ["jpeg", "not decoded", "paths", "bytes", "numpy", "transform"])
def test_what_images_are_sampled_with_is_stored_pixel_by_pixel_without_a_path(tmp_path, kind, expected):
    data = images([jpeg(0), jpeg(1)]).cast_column("image", datasets.Image())
    if kind == "not decoded":
        data = data.cast_column("image", datasets.Image(decode=False))
    if kind in ("paths", "transform"):
        for i in range(2):
            (tmp_path / f"{i}.jpg").write_bytes(jpeg(i)["bytes"])
        data = images([str(tmp_path / f"{i}.jpg") for i in range(2)])
    if kind == "bytes":
        data = images([jpeg(i)["bytes"] for i in range(2)])
    if kind == "numpy":
        data = data.with_format("numpy")
    if kind == "transform":
        data = data.with_transform(lambda rows: {**rows, "image": [Image.open(path) for path in rows["image"]]})
    found, inputs = sampled(tmp_path / "run", data)
    by_seed, stored, column = expected
    assert found.keys() == by_seed.keys() and all((found[seed] == by_seed[seed]).all() for seed in found)
    for prompt, pixels in zip(("a cat", "a house"), column, strict=True):
        assert np.array_equal(inputs[prompt], pixels) and np.array_equal(stored[prompt], pixels)


def test_a_palette_is_looked_up_also_in_a_data_set_of_arrays(tmp_path):
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    _, inputs = sampled(tmp_path, images([image, image]).with_format("torch"))
    assert np.array_equal(inputs["a cat"], np.broadcast_to(np.array([200, 100, 50]), (16, 16, 3)))


def squares(*edges, mode="RGB", colour="red"):
    return [Image.new(mode, (edge, edge), colour) for edge in edges]


@pytest.mark.parametrize("turned", [False, True], ids=["in this order", "the other way round"])
@pytest.mark.parametrize(
    "column, message",
    [
        (squares(16, 24), "train_dataset: images in `image` must be of one size.*size \\(.*; .*size \\(.*Resize them"),
        ([*squares(16), None], "train_dataset: give `image` for each prompt, or for none; .* has none"),
        ([*squares(16), *squares(16, mode="RGBA", colour=(0, 0, 0, 0))], "image: .*'RGBA' has transparent pixels"),
    ],
)
def test_images_that_do_not_fit_together_are_refused_before_anything_is_sampled(tmp_path, column, message, turned):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, images(column[::-1] if turned else column))


def test_held_out_images_and_those_of_a_transform_are_checked_before_they_are_sampled_with(tmp_path):
    one = images(squares(16, 16))
    with pytest.raises(ValueError, match="held-out prompts: images in `image` must be of one size"):
        make_trainer(tmp_path, one, eval_dataset=images(squares(16, 24)))
    trainer = make_trainer(tmp_path, one)
    with pytest.raises(ValueError, match="evaluate: images in `image` must be of one size"):
        trainer.evaluate(["a", "b"], columns={"image": squares(16, 24)})
    edges = itertools.repeat(16)
    grown = one.with_transform(lambda rows: {**rows, "image": squares(*(next(edges) for _ in rows["prompt"]))})
    trainer = make_trainer(tmp_path, grown)
    edges = iter([16, 24])
    with pytest.raises(ValueError, match="train_dataset: images in `image` must be of one size"):
        trainer.train()
    assert not list(tmp_path.rglob("*.parquet"))


def test_columns_that_would_be_taken_for_something_else_are_refused_or_named(tmp_path):
    data = images(squares(16, 16))
    for name in ("generator", "num_images_per_prompt"):
        with pytest.raises(ValueError, match=f"train_dataset: column `{name}` would not be used; rename it"):
            make_trainer(tmp_path, data.add_column(name, [1, 2]))
    with pytest.warns(UserWarning, match="takes one value of guidance_scale, strength for all prompts"):
        make_trainer(tmp_path, data.add_column("strength", [0.5, 0.8]).add_column("guidance_scale", [1, 2]))
    _, kept = sampled(tmp_path / "run", data.add_column("seed", [1, 2]).add_column("accepted", ["a", "b"]))
    (path,) = (tmp_path / "run").rglob("*.parquet")
    stored = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    assert set(stored["seed"]) != {1, 2} and set(stored["accepted"]) == {True, False}, (
        "its own, not the columns of prompts"
    )
    with pytest.raises(ValueError, match="train_dataset has the columns of samples that a run kept.*samples_dataset"):
        make_trainer(tmp_path, stored)
