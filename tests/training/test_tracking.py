# SPDX-License-Identifier: Apache-2.0

"""Each tracker for real, without a network: what was sent is read back from what the library wrote."""

import json
import sqlite3

import pytest
from PIL import Image
from runs import any_animal, brightness
from tiny_pipelines import tiny_sd

from trl_pgraft import GraftConfig, PGraftTrainer
from trl_pgraft.training.run_log import NoTracker, tracker_arguments, tracker_values


NAMES = ("reward", "loss", "implied_kl", "rewards/brightness/mean")


def train(tmp_path, tracker, hook=None, **options):
    config = GraftConfig(
        num_epochs=2,
        sample_num_steps=4,
        sample_batch_size=4,
        train_timestep_fraction=0.25,
        log_with=tracker,
        tracker_project_name="project",
        run_name="mine",
        output_dir=str(tmp_path / "out"),
        **options,
    )
    trainer = PGraftTrainer(config, brightness, any_animal, tiny_sd(), hook)
    trainer.train()
    return trainer.history


def log_last_image(image_data, global_step, tracker):
    """A hook as DDPO's users wrote them."""
    images, prompts, _, rewards, _ = image_data[-1]
    named = {f"{p:.25} | {r:.2f}": image[None] for image, p, r in zip(images, prompts, rewards, strict=True)}
    tracker.log_images(named, step=global_step)


def assert_is_grid(image):
    """A picture of one group of eight samples in a row, not all of one colour."""
    assert image.width > 8 * 128 and 128 < image.height < 256
    assert len(image.convert("RGB").getcolors(maxcolors=2**24)) > 10


def test_tensorboard(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = train(tmp_path, "tensorboard", log_last_image)
    (folder,) = (tmp_path / "out" / "logs" / "mine").iterdir()
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    for name in NAMES:
        found = events.Scalars(name)
        assert [e.value for e in found] == pytest.approx([metrics[name] for metrics in history], rel=1e-6)
        assert [e.step for e in found] == [2, 4]
    grids = events.Images("samples")
    assert [e.step for e in grids] == [0, 2]
    (tmp_path / "grid.png").write_bytes(grids[0].encoded_image_string)
    assert_is_grid(Image.open(tmp_path / "grid.png"))
    assert any("|" in tag for tag in events.Tags()["images"]), "the hook's own pictures"


def test_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    options = {"wandb": {"mode": "offline", "dir": str(tmp_path)}}
    history = train(tmp_path, "wandb", log_last_image, tracker_kwargs=options)
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (written,) = (path.read_bytes() for path in folder.glob("run-*.wandb"))
    for metrics in history:
        for name in NAMES:
            assert name.encode() in written and json.dumps(metrics[name]).encode() in written
    assert b"mine" in written and b"project" in written and b"tuned_fraction" in written
    pictures = list((folder / "files" / "media" / "images").iterdir())
    grids = [path for path in pictures if path.name.startswith("samples_")]
    assert len(grids) == 2 and len(pictures) > 2, "a grid an iteration, and the hook's own"
    assert_is_grid(Image.open(grids[0]))


def test_trackio(tmp_path, monkeypatch):
    # The library reads this when it is imported, which nothing does before.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    folder = tmp_path / "trackio"
    history = train(tmp_path, "trackio")
    with sqlite3.connect(folder / "project.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    logged = [(step, json.loads(metrics)) for name, step, metrics in rows if name == "mine"]
    scalars = [(step, values) for step, values in logged if "reward" in values]
    assert [step for step, _ in scalars] == [2, 4]
    for (_, values), metrics in zip(scalars, history, strict=True):
        assert [values[name] for name in NAMES] == pytest.approx([metrics[name] for name in NAMES])
    grids = list(folder.rglob("*.png"))
    assert [step for step, values in logged if "samples" in values] == [0, 2] and len(grids) == 2
    assert_is_grid(Image.open(grids[0]))


def test_the_run_is_named_where_the_tracker_takes_a_name():
    named = GraftConfig(log_with="wandb", run_name="mine", tracker_kwargs={"wandb": {"entity": "me"}})
    assert tracker_arguments(named) == {"wandb": {"name": "mine", "entity": "me"}}
    given = GraftConfig(log_with="trackio", run_name="mine", tracker_kwargs={"trackio": {"name": "given"}})
    assert tracker_arguments(given) == {"trackio": {"name": "given"}}
    assert tracker_arguments(GraftConfig(log_with="tensorboard", run_name="mine")) == {}


def test_values_are_plain():
    assert tracker_values({"a": 1, "b": None, "c": {"d": 2}}) == {"a": 1, "b": "None", "c": "{'d': 2}"}


def test_no_tracker_takes_what_a_tracker_takes():
    tracker = NoTracker()
    tracker.log({"reward": 1.0}, step=3)
    tracker.log_images({"image": []}, step=3)
