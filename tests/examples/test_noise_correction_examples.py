# SPDX-License-Identifier: Apache-2.0

"""Noise correction's examples: data, training scripts, Frechet distance, comparison and report, at toy size."""

import gzip
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import UNet2DModel
from noise_correction import (
    compare,
    frechet,
    gaussians,
    remake,
    report,
    samples,
    tolerance,
    train_classifier,
    train_flow,
)
from noise_correction.data import Images, centred, dequantise, load_images, to_bytes
from noise_correction.flow_pipeline import FlowPipeline
from PIL import Image
from safetensors.torch import load_file
from tiny_flow import flow_data
from torch.utils.flop_counter import FlopCounterMode

from trl_pgraft.noise_correction.correctors import GaussianCorrector


FLOW = ["--domain", "emoji", "--widths", "8", "16", "--layers", "1", "--patch-size", "4", "--limit", "64"]


def write_idx(folder, prefix, images, labels):
    for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
        data = bytes(4) + np.array(values.shape, ">i4").tobytes() + values.astype(np.uint8).tobytes()
        (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(data))


def test_fashion_mnist_is_read_by_split(tmp_path):
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 256, (5, 28, 28)), rng.integers(0, 256, (3, 28, 28))
    write_idx(tmp_path, "train", train, np.array([0, 9, 3, 3, 1]))
    write_idx(tmp_path, "t10k", test, np.array([2, 4, 6]))
    found = load_images("fashion_mnist", "train", tmp_path, limit=4)
    assert torch.equal(found.pixels[:, 0], torch.tensor(train[:4], dtype=torch.uint8))
    assert found.labels.tolist() == [0, 9, 3, 3]
    assert found.classes[9] == "ankle boot"
    assert torch.equal(load_images("fashion_mnist", "test", tmp_path).pixels[:, 0].long(), torch.tensor(test))


def test_missing_files_say_how_to_get_them(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        load_images("fashion_mnist", "test", tmp_path)
    with pytest.raises(ValueError, match="domain 'faces'"):
        load_images("faces", "test")


def test_emoji_splits_are_reproducible_and_differ():
    train, again, test = (load_images("emoji", split, limit=30) for split in ("train", "train", "test"))
    assert train.pixels.shape == (30, 3, 32, 32)
    assert torch.equal(train.pixels, again.pixels) and torch.equal(train.labels, again.labels)
    assert not torch.equal(train.pixels, test.pixels)
    assert len(train.classes) == 32 and 0 <= train.labels.min() and train.labels.max() < 32


def test_bytes_survive_both_ways_to_floats():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    drawn = dequantise(pixels, torch.Generator().manual_seed(0))
    assert torch.equal(to_bytes(drawn), pixels) and torch.equal(to_bytes(centred(pixels)), pixels)
    assert not torch.equal(drawn, centred(pixels))
    assert drawn.min() >= -1 and drawn.max() <= 1
    assert to_bytes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_patches_are_undone_and_steps_are_equal():
    pipeline = train_flow.new_pipeline((3, 32, 32), train_flow.parse([*FLOW, "--output", "."]))
    pipeline.set_progress_bar_config(disable=True)
    images = torch.randn(2, 3, 32, 32)
    assert pipeline.encode(images).shape == (2, 48, 8, 8)
    assert torch.equal(pipeline.decode(pipeline.encode(images)), images)
    assert pipeline(batch_size=2, num_inference_steps=4).images[0].size == (32, 32)
    torch.testing.assert_close(pipeline.scheduler.sigmas, torch.tensor([1, 0.75, 0.5, 0.25, 0]))


def loss_of(pipeline, images):
    torch.manual_seed(1)
    with torch.no_grad():
        return train_flow.flow_loss(pipeline.unet, pipeline.encode(centred(images.pixels))).item()


def test_flow_training_learns_goes_on_and_saves_the_average(tmp_path):
    options = [
        *FLOW,
        "--output",
        str(tmp_path),
        "--batch",
        "32",
        "--save-every",
        "40",
        "--ema-decay",
        "0.9",
        "--lr",
        "4e-3",
    ]
    images = load_images("emoji", "train", limit=64)
    train_flow.train(train_flow.parse([*options, "--steps", "40"]))
    first = FlowPipeline.from_pretrained(tmp_path)
    untrained = loss_of(train_flow.new_pipeline((3, 32, 32), train_flow.parse(options)), images)
    assert loss_of(first, images) < 0.8 * untrained
    train_flow.train(train_flow.parse([*options, "--steps", "80"]))
    second = FlowPipeline.from_pretrained(tmp_path)
    assert (tmp_path / "state" / "step").read_text() == "80"
    assert loss_of(second, images) < loss_of(first, images)
    raw = UNet2DModel.from_config(second.unet.config)
    raw.load_state_dict(load_file(tmp_path / "state" / "model.safetensors"))
    assert not torch.equal(raw.conv_in.weight, second.unet.conv_in.weight)


def test_classifier_learns_and_is_saved(tmp_path):
    options = ["--domain", "emoji", "--limit", "100", "--output", str(tmp_path), "--epochs", "12", "--batch", "20"]
    found = train_classifier.train(train_classifier.parse(options))
    test = load_images("emoji", "test", limit=100)
    loaded = train_classifier.DomainClassifier.from_pretrained(tmp_path)
    assert found == train_classifier.accuracy(loaded, test) > 3 / 32
    assert loaded.features(centred(test.pixels[:2])).shape == (2, 128)
    assert train_classifier.accuracy(loaded, Images(test.pixels, test.labels.roll(1), test.classes)) < found


def test_frechet_distance_of_an_affine_map():
    """b = 2 a + 3 has four times the covariance, and both covariances have the same eigenvectors."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(400, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    expected = (a.double().mean(0) + 3).square().sum() + a.double().T.cov().trace()
    assert frechet.frechet_distance(a, 2 * a + 3) == pytest.approx(expected.item(), rel=1e-5)
    assert frechet.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_other_eigenvectors():
    """In two dimensions the trace of the root of S has the closed form sqrt(tr S + 2 sqrt(det S))."""
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(50, 2, generator=generator).double() @ torch.randn(2, 2, generator=generator).double()
        for _ in "ab"
    )
    s1, s2 = a.T.cov(), b.T.cov()
    product = s1 @ s2
    cross = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = (a.mean(0) - b.mean(0)).square().sum() + s1.trace() + s2.trace() - 2 * cross
    assert frechet.frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-6)


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="got 5 and 9"):
        frechet.frechet_distance(torch.randn(5, 6), torch.randn(9, 6))
    with pytest.raises(ValueError, match="features 'vgg'"):
        frechet.feature_extractor("vgg")


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """Folder of a comparison at toy size, with its arguments."""
    folder, rng = tmp_path_factory.mktemp("comparison"), np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        write_idx(folder, prefix, rng.integers(0, 256, (100, 8, 8)), rng.integers(0, 10, 100))
    flow = ["--data", str(folder), "--output", str(folder / "flow"), "--widths", "16", "--layers", "1"]
    train_flow.train(train_flow.parse([*flow, "--steps", "5", "--batch", "8"]))
    classifier = train_classifier.DomainClassifier(1, 10, width=8, features=8)
    classifier.save_pretrained(folder / "classifier")
    options = "--steps 2 4 --corrected 3 --seeds 0 1 --images 24 --real-images 24 --batch 50 --training-steps 3"
    options += " --training-batch 8 --network-channels 8 --corrector-steps 1 2 --lora-rank 2"
    folders = ["--flow", str(folder / "flow"), "--classifier", str(folder / "classifier")]
    arguments = ["--data", str(folder), "--output", str(folder / "out"), *folders, *options.split()]
    compare.main(compare.parse(arguments))
    return folder, arguments


def test_comparison_measures_every_arm_once(comparison):
    folder, arguments = comparison
    before = (folder / "out" / "results.jsonl").read_text()
    compare.main(compare.parse(arguments))
    assert (folder / "out" / "results.jsonl").read_text() == before
    results = report.read_results(folder / "out")
    assert results.groupby("arm").size().to_dict() == {
        "uncorrected": 4, "inverted": 1, "gaussian": 2, "network": 4, "lora": 4
    }  # fmt: skip
    assert (results.images == 24).all() and results.frechet_domain.notna().all()
    assert (folder / "out" / "frechet_over_flops.png").stat().st_size > 10_000


def test_flops_count_model_and_corrector(comparison):
    folder, _ = comparison
    results = report.read_results(folder / "out").query("seed == 0").set_index(["arm", "steps", "corrector_steps"])
    pipeline = FlowPipeline.from_pretrained(folder / "flow")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pipeline.unet(torch.randn(1, 4, 4, 4), 500)
    call = counter.get_total_flops()
    flops = results.flops
    assert flops["uncorrected", 2, 0] == 2 * call and flops["uncorrected", 4, 0] == 4 * call
    assert flops["gaussian", 3, 1] == 3 * call + 2 * 64**2
    network = flops["network", 3, 1] - 3 * call
    assert 0 < network and flops["network", 3, 2] == 3 * call + 2 * network
    assert flops["lora", 3, 1] > 5 * call


def test_the_published_gaussian_is_the_full_one_and_the_chosen_one_is_another_arm(comparison):
    folder, arguments = comparison
    assert GaussianCorrector.load(folder / "out/steps_3/seed_0/gaussian", None).family == "full"
    args = compare.parse([*arguments, "--correctors", "gaussian_chosen"])
    trainer = compare.new_trainer(SimpleNamespace(args=args), flow_data(4), "gaussian_chosen", 3, 0)
    assert trainer.config.corrector == "gaussian"
    assert "gaussian_chosen" in report.STYLES


@pytest.mark.parametrize(("law", "chosen"), [("normal", "none"), ("spectral", "spectral"), ("low_rank", "low_rank")])
def test_gaussians_of_known_laws_are_measured(law, chosen):
    found = gaussians.measure(law, (4, 16, 16), 200, 25)
    assert found["chosen"] == chosen
    assert found["spectral"] != found["low_rank"] and found["seconds"] > 0


def test_samples_are_drawn_with_every_corrector(comparison):
    folder, _ = comparison
    options = ["--data", str(folder), "--flow", str(folder / "flow"), "--compare", str(folder / "out")]
    args = samples.parse([*options, "--count", "5", "--output", str(folder / "samples.png")])
    rows = samples.rows_of(args)
    assert list(rows) == [
        "3 steps", "gaussian, 3 steps", "network, 3 steps", "lora, 3 steps", "10 steps", "test images"
    ]  # fmt: skip
    assert not torch.equal(rows["3 steps"], rows["gaussian, 3 steps"])
    samples.main(args)
    drawn = np.array(Image.open(folder / "samples.png"))
    assert drawn.shape == (6 * 8 * 2, 5 * 8 * 2, 3)
    assert (drawn[5 * 16 :: 2, 16:32:2, 0] == rows["test images"][1, 0].numpy()).all()


def test_results_with_other_settings_are_refused(comparison):
    _, arguments = comparison
    with pytest.raises(SystemExit, match="tolerance=0.01, not 0.1.*another --output"):
        compare.main(compare.parse([*arguments, "--tolerance", "0.1"]))


def test_settings_are_chosen_by_training_images_that_are_not_inverted(comparison):
    folder, arguments = comparison
    options = [*arguments, "--real-split", "train", "--real-images", "30", "--inverted-images", "70"]
    training = load_images("fashion_mnist", "train", folder).pixels
    assert torch.equal(compare.real_images(compare.parse(options)), training[70:])
    with pytest.raises(SystemExit, match="last 30 of 100 training images overlap with the first 71"):
        compare.real_images(compare.parse([*options, "--inverted-images", "71"]))
    with pytest.raises(SystemExit, match="real_split=test, not train"):
        compare.main(compare.parse(options))


def test_a_tighter_tolerance_takes_more_evaluations(comparison, capsys):
    folder, _ = comparison
    options = ["--data", str(folder), "--flow", str(folder / "flow"), "--images", "16", "--steps", "2", "4"]
    tolerance.main(tolerance.parse([*options, "--tolerances", "0.1", "0.0001"]))
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    rows = [[float(cell) for cell in line] for line in lines[2:]]
    assert [row[:2] for row in rows] == [[2, 0.0001], [2, 0.1], [4, 0.0001], [4, 0.1]]
    for tight, loose in (rows[:2], rows[2:]):
        assert tight[3] == 0 and 0 < loose[3] < 0.1 and tight[4] > loose[4] >= 1


def test_processes_may_share_a_folder(comparison):
    """What one adds after the other was started is neither lost nor measured again."""
    folder, arguments = comparison
    options = [*arguments, "--output", str(folder / "shared"), "--seeds", "0"]
    for part in (["--steps", "2", "--corrected"], ["--steps", "--corrected", "3", "--correctors", "gaussian"]):
        compare.main(compare.parse([*options, *part]))
    results = report.read_results(folder / "shared")
    assert sorted(results.arm) == ["gaussian", "inverted", "uncorrected"]
    both = results.merge(report.read_results(folder / "out"), on=report.KEY)
    assert both.frechet_domain_x.tolist() == pytest.approx(both.frechet_domain_y.tolist())


def test_table_says_what_the_uncorrected_model_needs(tmp_path):
    rows = [("uncorrected", 0, 2, 100, 40.0), ("uncorrected", 0, 4, 200, 20.0), ("uncorrected", 0, 8, 400, 10.0),
            ("network", 1, 2, 141.4213562, 10.0), ("network", 1, 4, 241, 5.0)]  # fmt: skip
    names = ["arm", "corrector_steps", "steps", "flops", "mean"]
    table = pd.DataFrame(rows, columns=names).assign(std=0.0, seeds=1)
    table["flops"] *= 1e6
    lines = report.markdown_table(table).splitlines()
    assert lines[5].endswith("| 10.00 | 28.28 | 14.14 | 2.83 times |")
    assert lines[6].endswith("| never reached |")
    best = report.best_reached(table).splitlines()
    assert best[0].endswith("10.00, 8 steps, 400 MFLOP an image.")
    assert best[1].endswith("network, 1 step: as good at 35% of these FLOPs.")


def test_results_of_several_folders_are_taken_together(tmp_path):
    record = {"arm": "uncorrected", "corrector_steps": 0, "flops": 1000, "frechet_code": "this module"}
    folders = [tmp_path / name for name in ("a", "b")]
    for folder, steps in zip(folders, ((2, 3), (3, 5)), strict=True):
        folder.mkdir()
        lines = [{**record, "steps": n, "seed": 0, "frechet": {"domain": float(n)}} for n in steps]
        (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = report.write_report(*folders, output=tmp_path / "c")
    assert [line.split("|")[3].strip() for line in text.splitlines() if "N(0, I)" in line] == ["2", "3", "5"]
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"table.md", "frechet_over_flops.png"}


def test_results_are_read_per_kind_of_features(tmp_path):
    record = {"arm": "uncorrected", "steps": 2, "corrector_steps": 0, "flops": 1000, "frechet_code": "this module"}
    distances = [{"domain": 4.0}, {"domain": 6.0, "efficientnet": 1.0}]
    lines = [json.dumps({**record, "seed": i, "frechet": found}) for i, found in enumerate(distances)]
    (tmp_path / "results.jsonl").write_text("\n".join(lines) + "\n")
    text = report.write_report(tmp_path)
    assert "domain features" in text and "5.00 ± 1.41" in text
    assert "efficientnet features" in text and "| 1.00 |" in text


def test_remaking_has_a_job_for_every_point(tmp_path):
    jobs = remake.comparison_jobs(tuple(remake.FLOWS), tmp_path, ("domain",))
    parsed = [(job.name.split("-")[0], compare.parse(list(job.arguments))) for job in jobs]
    assert len({job.name for job in jobs}) == len(jobs)
    points = {(name, steps, args.seeds[0]) for name, args in parsed for steps in args.corrected}
    assert points == {(n, steps, s) for n, flow in remake.FLOWS.items() for steps in flow.corrected for s in (0, 1, 2)}
    assert {(steps, args.lowest_sigma) for _, args in parsed for steps in args.corrected} == {
        (2, 0.2), (3, 0.2), (5, 0.2), (10, 0.1), (25, 0.2), (50, 0.2)
    }  # fmt: skip
    alone = [args for _, args in parsed if not args.corrected]
    assert len(alone) == 9 and all(args.steps == compare.UNCORRECTED for args in alone)
    training = remake.training_jobs(tuple(remake.FLOWS), tmp_path)[:3]
    trained = {job.name: train_flow.parse(list(job.arguments)) for job in training}
    assert {args.flow for name, args in parsed if name == "weaker"} == {trained["weaker-flow"].output}
    assert trained["weaker-flow"].widths == [32, 64] and trained["emoji-flow"].domain == "emoji"


@pytest.mark.slow
def test_remaking_trains_compares_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(remake, "SEEDS", (0,))
    monkeypatch.setitem(remake.FLOWS, "weaker", remake.Flow("fashion_mnist", remake.WEAKER, corrected=(10, 4)))
    rng = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        write_idx(tmp_path, prefix, rng.integers(0, 256, (300, 8, 8)), rng.integers(0, 10, 300))
    options = ["--data", str(tmp_path), "--output", str(tmp_path / "out"), "--flows", "weaker", "--features", "domain"]
    small = "--images 140 --inverted-images 140 --batch 140 --max-unconverged 0.9 --tolerance 1 --training-steps 1"
    options += ["--compare-options", f"{small} --training-batch 8", "--flow-options", "--steps 2 --batch 8"]
    args = remake.parse([*options, "--jobs", "2"])
    remake.main(args)
    assert "| network | 2 | 10 |" in capsys.readouterr().out
    folders = [tmp_path / "out" / "weaker" / name for name in ("compare_from_0.2", "compare_from_0.1")]
    results = [report.read_results(folder) for folder in folders]
    assert [set(found.steps[found.arm == "network"]) for found in results] == [{4}, {10}]
    assert [set(found.lowest_sigma.dropna()) for found in results] == [{0.2}, {0.1}]
    logs = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "log").iterdir()}
    assert len(logs) == 5
    (tmp_path / "out" / "log" / "weaker-0-4.txt").unlink()
    remake.main(args)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "log").iterdir()}
    assert [path.name for path in logs if after[path] != logs[path]] == ["weaker-0-4.txt"]
    assert [len(report.read_results(folder)) for folder in folders] == [len(found) for found in results]
