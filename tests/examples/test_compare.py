# SPDX-License-Identifier: Apache-2.0

import argparse
import json
import math
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from benchmarks import compare, figures, one_run
from benchmarks.evaluation import frechet_distance, pairwise_distances
from emoji.judge import Judge
from PIL import Image


PLANS = Path(compare.__file__).parent / "plans"


def test_frechet_distance_of_gaussians_is_known():
    torch.manual_seed(0)
    samples = torch.randn(4000, 3, dtype=torch.float64)
    assert frechet_distance(samples, samples) == pytest.approx(0, abs=1e-9)
    # Shifted: the squared distance of the means. Twice as wide: trace of (2 - 1)^2 times the covariance.
    assert frechet_distance(samples + 2, samples) == pytest.approx(12, rel=1e-9)
    wider = 2 * (samples - samples.mean(0)) + samples.mean(0)
    assert frechet_distance(wider, samples) == pytest.approx(samples.T.cov().trace().item(), rel=1e-9)


def test_pairwise_distances_are_those_of_each_prompts_pairs():
    features = torch.tensor([[[0.0, 0], [3, 4], [0, 8]], [[1, 1], [1, 1], [1, 2]]])
    assert pairwise_distances(features).tolist() == [[5, 8, 5], [0, 1, 1]]


def test_plans_take_over_fields_and_every_seed_is_a_run():
    methods = {
        "base": {"trainer": "base"},
        "ours": {"trainer": "pgraft", "lora_rank": 4},
        "other": {"like": "ours", "tuned_fraction": 1.0, "seeds": [7]},
    }
    runs = compare.runs_of({"methods": methods, "seeds": [0, 1], "evaluation": {}})
    assert [(run["method"], run["seed"]) for run in runs] == [("base", 0), ("ours", 0), ("ours", 1), ("other", 7)]
    assert runs[-1]["fields"] == {"lora_rank": 4, "tuned_fraction": 1.0} and runs[-1]["trainer"] == "pgraft"


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.yaml")), ids=lambda path: path.stem)
def test_committed_plans_are_of_equal_cost_in_images(path):
    runs = compare.runs_of(yaml.safe_load(path.read_text()))
    assert runs[0]["trainer"] == "base"
    trained = [run["fields"] for run in runs if run["trainer"] != "base"]
    images = {f["num_epochs"] * f["sample_batch_size"] * f["sample_num_batches_per_epoch"] for f in trained}
    assert len(images) == 1


def evaluations() -> pd.DataFrame:
    rows = []
    for method, scores in {"base": [0.5], "ours": [0.6, 0.8], "theirs": [0.55, 0.6]}.items():
        for seed in (0, 1):
            for step, score in enumerate(scores):
                for index, category in enumerate(["single", "count"]):
                    row = {"method": method, "seed": seed, "images": 100 * step, "seconds": (1 + seed) * step}
                    row |= {"prompt": f"p{index}", "category": category}
                    row |= {"score": score + 0.1 * index, "judge": score, "diversity": 1.0, "diversity_right": 1.0}
                    row |= {"frechet_real": 2.0, "implied_kl": math.nan, "memory": 1.0, "best_score": 1.0}
                    row |= {"best_judge": 1.0}
                    rows += [row | {"final": False}] + [row | {"final": True}] * (step == len(scores) - 1)
    return pd.DataFrame(rows)


def test_gain_is_paired_over_prompts():
    gain, half = figures.gain_interval(figures.final_scores(evaluations()), "ours", "base")
    assert gain == pytest.approx(0.3) and half == pytest.approx(0, abs=1e-9)


def test_methods_are_compared_on_the_seeds_that_both_have():
    table = evaluations()
    only_one = table[(table.method != "theirs") | (table.seed == 1)]
    assert figures.difference_line(only_one, "ours", "theirs") == (
        "ours above theirs: +0.200 (+0.200 to +0.200), 1 seed."
    )


def test_methods_without_a_common_seed_are_not_compared():
    table = evaluations()
    apart = table[(table.method == "base") | (table.seed == (table.method == "ours"))]
    assert figures.difference_line(apart, "ours", "theirs") == "ours and theirs have no seed in common yet."


def test_a_command_may_ask_for_some_methods_and_seeds(tmp_path):
    runs = compare.runs_of(
        {"methods": {"base": {"trainer": "base"}, "ours": {"trainer": "pgraft"}}, "seeds": [0, 1], "evaluation": {}}
    )

    def asked(**options):
        arguments = argparse.Namespace(output=tmp_path, **{"methods": None, "seeds": None, **options})
        return [(run["method"], run["seed"]) for run in runs if compare.is_wanted(run, arguments)]

    assert asked() == [("base", 0), ("ours", 0), ("ours", 1)]
    assert asked(seeds=[1]) == [("base", 0), ("ours", 1)] and asked(methods=["base"]) == [("base", 0)]
    done = compare.folder_of(tmp_path, runs[1])
    done.mkdir(parents=True)
    (done / "evaluations.parquet").touch()
    assert asked(methods=["ours"]) == [("base", 0), ("ours", 1)]


def test_seconds_are_those_of_the_first_seed_of_timed_methods():
    table, plan = evaluations(), {"seeds": [0, 1], "timed": ["theirs"]}
    alone = compare.had_a_gpu_alone(plan, table, "base")
    assert set(zip(alone.method, alone.seed, strict=True)) == {("base", 0), ("base", 1), ("theirs", 0)}
    assert compare.had_a_gpu_alone({"seeds": [0, 1]}, table, "base") is table


def test_figures_are_of_the_methods_that_a_plan_draws(tmp_path, monkeypatch):
    drawn = {}
    for name in ("draw_curves", "draw_categories", "draw_fractions"):
        monkeypatch.setattr(
            compare.figures, name, lambda table, methods, *rest, name=name: drawn.setdefault(name, methods)
        )
    methods = {name: {"trainer": "any", "tuned_fraction": 0.6} for name in ("base", "ours", "theirs")}
    plan = {"methods": methods, "seeds": [0], "evaluation": {}}
    plan |= {"drawn": ["base", "theirs"], "fractions": ["ours", "no"]}
    compare.draw(plan, evaluations(), tmp_path)
    assert drawn["draw_curves"] == drawn["draw_categories"] == ["base", "theirs"]
    assert drawn["draw_fractions"] == {"ours": 0.6}


def test_results_of_a_plan_that_has_changed_are_refused(tmp_path):
    plan = {"methods": {"base": {"trainer": "base"}}, "seeds": [0], "evaluation": {"steps": 10}}
    with pytest.raises(SystemExit, match="no evaluations"):
        compare.collect(plan, tmp_path)
    folder = compare.folder_of(tmp_path, compare.runs_of(plan)[0])
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(compare.runs_of(plan)[0]))
    evaluations().to_parquet(folder / "evaluations.parquet")
    assert len(compare.collect(plan, tmp_path)) == len(evaluations())
    with pytest.raises(SystemExit, match="another --output"):
        compare.collect({**plan, "evaluation": {"steps": 20}}, tmp_path)


def test_seconds_to_reach_a_score():
    assert figures.seconds_to_reach(evaluations(), "ours", 0.6) == 0
    assert figures.seconds_to_reach(evaluations(), "ours", 0.66) == 1.5
    assert figures.seconds_to_reach(evaluations(), "theirs", 0.9) == math.inf


def test_table_has_a_line_for_each_method():
    lines = figures.table(evaluations(), ["base", "ours", "theirs"], "base").splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| base", "| ours", "| theirs"]
    assert "+0.300 (+0.300 to +0.300) | +54.5%" in lines[3]


def test_a_run_leaves_its_evaluations_and_the_report_its_figures(tmp_path, monkeypatch):
    Judge().save(tmp_path / "judge")
    evaluation = {"split": "held_out", "steps": 2, "guidance": 3.0, "batch": 4, "limit": 2, "every": 4}
    evaluation |= {"curve_images": 1, "final_images": 2, "judge": str(tmp_path / "judge")}
    ours = {"trainer": "pgraft", "num_epochs": 1, "sample_num_steps": 2, "sample_batch_size": 4, "lora_rank": 2}
    ours |= {"sample_num_batches_per_epoch": 1, "samples_per_prompt": 4, "acceptance_kwargs": {"k": 1}}
    methods = {"base": {"trainer": "base"}, "ours": ours}
    plan = {"evaluation": evaluation, "seeds": [0], "methods": methods, "pictured": ["base", "ours"]}
    base = None
    for run in compare.runs_of(plan):
        folder = compare.folder_of(tmp_path, run)
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(run))
        monkeypatch.setattr(sys, "argv", ["one_run", str(folder), *(["--base", str(base)] if base else [])])
        one_run.main()
        base = base or folder / "features.safetensors"
    compare.report(plan, tmp_path)
    table = pd.read_parquet(tmp_path / "evaluations.parquet")
    assert table[~table.final].groupby("method").images.unique().map(list).to_dict() == {"base": [0], "ours": [4]}
    final = table[table.final].groupby("method").agg({"images": "max", "prompt": "count", "frechet_base": "mean"})
    assert final.loc["ours", "images"] == 4 and (final.prompt == 2).all() and final.loc["ours", "frechet_base"] >= 0
    assert (tmp_path / "score_over_images.png").stat().st_size > 5000
    assert Image.open(tmp_path / "pictures.png").size == (2 * 64, 2 * 64)
