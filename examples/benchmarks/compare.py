# SPDX-License-Identifier: Apache-2.0

"""
Compare P-GRAFT with GRAFT, TRL's DDPO and the untuned model on the embedded emoji model.

    python -m examples.benchmarks.compare --plan examples/benchmarks/plans/final.yaml --output outputs/compare \\
        --old-trl trl-0.23.1 --jobs 8 --gpus 0 1
    python -m examples.benchmarks.compare --plan examples/benchmarks/plans/final.yaml --output outputs/compare --report

The first command runs every method with every seed, each in a process of its own, and leaves out what is there
already; `--old-trl` is a folder with trl 0.23.1 (`pip install --no-deps --target trl-0.23.1 trl==0.23.1`), the last
release that has DDPO. Both write `evaluations.parquet` (one row a prompt and evaluation), `table.md` and the figures.

Seconds can be compared where runs had a GPU to themselves. So the methods that a plan has as `timed` are run first,
the first seed of each, with `--jobs 1`, `--seeds` and `--methods`; tables and figure of seconds have these only.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from examples.benchmarks import figures
from examples.gpu_jobs import run_module, spread


def runs_of(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """
    The runs of a plan: `evaluation`, `seeds`, and `methods` (name to `trainer` and its fields; `seeds` of its own).

    Fields named `like` take over those of another method.
    """
    runs = []
    for name in plan["methods"]:
        fields = resolve(plan["methods"], name)
        trainer, seeds = fields.pop("trainer"), fields.pop("seeds", plan["seeds"])
        seeds = [0] if trainer == "base" else seeds
        common = {"method": name, "trainer": trainer, "fields": fields, "evaluation": plan["evaluation"]}
        runs += [{**common, "seed": seed} for seed in seeds]
    # All others need the untuned model. Then seed by seed, so that what is done is a whole comparison, and long
    # runs first, so that none is left alone at the end.
    return sorted(runs, key=lambda run: (run["trainer"] != "base", run["seed"], run["trainer"] != "ddpo"))


def resolve(methods: dict[str, dict], name: str) -> dict[str, Any]:
    """A method's fields, with those of the method that it is `like`."""
    fields = dict(methods[name] or {})
    parent = fields.pop("like", None)
    return {**resolve(methods, parent), **fields} if parent else fields


def folder_of(output: Path, run: dict[str, Any]) -> Path:
    """Where a run's files are."""
    return output / "runs" / f"{run['method']}-{run['seed']}".replace(" ", "_").replace("/", "_")


def start(run: dict[str, Any], output: Path, gpu: int, old_trl: Path | None, base: Path | None) -> bool:
    """Do one run in a process of its own; whether it finished."""
    folder = folder_of(output, run)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run, indent=1))
    environment = {}
    if run["trainer"] == "ddpo":
        paths = [str(old_trl), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    arguments = [str(folder), *(["--base", str(base)] if base else [])]
    finished = run_module("examples.benchmarks.one_run", arguments, gpu, folder / "log.txt", environment)
    lines = (folder / "log.txt").read_text().splitlines()
    last = [line for line in lines if line.startswith(run["method"])][-1:]
    print(f"[{time.strftime('%H:%M:%S')}] {(last or [run['method']])[0]}", flush=True)
    if not finished:
        print("\n".join([f"failed: {folder / 'log.txt'}", *lines[-12:]]), flush=True)
    return finished


def check_same(run: dict[str, Any], folder: Path) -> None:
    """What is in a run's folder must be of this run: plans change, and keep their names."""
    path = folder / "run.json"
    if path.exists() and json.loads(path.read_text()) != run:
        raise SystemExit(f"{path} is of other fields than the plan's. Give another --output, or remove {folder}.")


def is_wanted(run: dict[str, Any], arguments: argparse.Namespace) -> bool:
    """Whether a run is not there yet, and the command line asks for it; all others need the untuned model."""
    check_same(run, folder_of(arguments.output, run))
    if (folder_of(arguments.output, run) / "evaluations.parquet").exists():
        return False
    asked = (run["method"], arguments.methods), (run["seed"], arguments.seeds)
    return run["trainer"] == "base" or all(chosen is None or value in chosen for value, chosen in asked)


def run_all(plan: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Run what is asked for, `jobs` at a time, spread over the GPUs."""
    output = arguments.output
    todo = [run for run in runs_of(plan) if is_wanted(run, arguments)]
    if arguments.old_trl is None and any(run["trainer"] == "ddpo" for run in todo):
        raise SystemExit("--old-trl: the plan has runs of DDPO, which need a folder with trl 0.23.1.")

    first = [run for run in runs_of(plan) if run["trainer"] == "base"][0]
    if first in todo and not start(first, output, arguments.gpus[0], arguments.old_trl, None):
        raise SystemExit("the untuned model could not be evaluated")
    others, base = [run for run in todo if run != first], folder_of(output, first) / "features.safetensors"

    def work(run: dict[str, Any], gpu: int) -> bool:
        return start(run, output, gpu, arguments.old_trl, base)

    done = spread(work, others, arguments.jobs, arguments.gpus)
    if not all(done):
        print(f"{done.count(False)} runs failed; start again to try them once more.")


def collect(plan: dict[str, Any], output: Path) -> pd.DataFrame:
    """All evaluations of the plan's runs; of one that was interrupted, those until then."""
    there = []
    for run in runs_of(plan):
        folder = folder_of(output, run)
        check_same(run, folder)
        files = [folder / name for name in ("evaluations.parquet", "evaluations.unfinished")]
        there += [file for file in files if file.exists()][:1]
    if not there:
        raise SystemExit(f"{output / 'runs'} has no evaluations of the plan's runs.")
    return pd.concat([pd.read_parquet(file) for file in there], ignore_index=True)


def had_a_gpu_alone(plan: dict[str, Any], evaluations: pd.DataFrame, base: str) -> pd.DataFrame:
    """The evaluations whose seconds can be compared: the first seed of the plan's `timed` methods; else all."""
    if "timed" not in plan:
        return evaluations
    alone = evaluations.method.isin(plan["timed"]) & (evaluations.seed == plan["seeds"][0])
    return evaluations[alone | (evaluations.method == base)]


def report(plan: dict[str, Any], output: Path) -> None:
    """Write `evaluations.parquet`, `evaluations.jsonl`, `table.md` and the figures of the runs that are there."""
    evaluations = collect(plan, output)
    evaluations.to_parquet(output / "evaluations.parquet")
    figures.means(evaluations).to_json(output / "evaluations.jsonl", orient="records", lines=True, double_precision=4)
    parts = tables(plan, evaluations)
    (output / "table.md").write_text("\n\n".join(parts) + "\n")
    draw(plan, evaluations, output)
    print("\n\n".join(parts))


def methods_of(plan: dict[str, Any], evaluations: pd.DataFrame) -> tuple[list[str], list[str]]:
    """The plan's methods that were evaluated, and those among them that came to an end."""
    there, ended = set(evaluations.method), set(evaluations[evaluations.final].method)
    return [name for name in plan["methods"] if name in there], [name for name in plan["methods"] if name in ended]


def tables(plan: dict[str, Any], evaluations: pd.DataFrame, base: str = "base") -> list[str]:
    """Tables and lines of Markdown."""
    methods, finished = methods_of(plan, evaluations)
    timed = had_a_gpu_alone(plan, evaluations, base)
    in_time = methods_of(plan, timed)[1]
    parts = [figures.table(evaluations, finished, base), figures.best_of_n_line(evaluations, base)]
    parts += [figures.equal_images(evaluations, methods), figures.equal_seconds(timed, in_time, base)]
    parts += [figures.categories(evaluations, finished)]
    for pair in (pair for pair in plan.get("pairs", []) if set(pair) <= set(finished)):
        parts += [figures.difference_line(evaluations, *pair)]
        parts += [figures.speed_line(timed, *pair)] if set(pair) <= set(in_time) else []
    return parts


def draw(plan: dict[str, Any], evaluations: pd.DataFrame, output: Path, base: str = "base") -> None:
    """The figures: over images and by category of the plan's `drawn` methods, over seconds of its `timed` ones."""
    shown = evaluations[evaluations.method.isin(plan.get("drawn", list(plan["methods"])))]
    timed = had_a_gpu_alone(plan, evaluations, base)
    figures.draw_curves(shown, methods_of(plan, shown)[0], base, "images", output / "score_over_images.png")
    figures.draw_curves(timed, methods_of(plan, timed)[1], base, "seconds", output / "score_over_seconds.png")
    figures.draw_categories(shown, methods_of(plan, shown)[1], output / "categories.png")
    finished = [name for name in plan.get("fractions", []) if name in methods_of(plan, evaluations)[1]]
    if finished:
        fractions = {name: resolve(plan["methods"], name)["tuned_fraction"] for name in finished}
        figures.draw_fractions(evaluations, fractions, base, output / "tuned_fraction.png")
    first = {run["method"]: folder_of(output, run) / "pictures.safetensors" for run in reversed(runs_of(plan))}
    pictured = [first[name] for name in plan.get("pictured", []) if first[name].exists()]
    if pictured:
        figures.draw_pictures(pictured, output / "pictures.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--old-trl", type=Path, help="folder with trl 0.23.1")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--gpus", type=int, nargs="+", default=[0], help="numbers of the GPUs")
    parser.add_argument("--methods", nargs="+", help="run only these of the plan, and the untuned model")
    parser.add_argument("--seeds", type=int, nargs="+", help="run only these of the plan")
    parser.add_argument("--report", action="store_true", help="run nothing; write the table and the figures")
    arguments = parser.parse_args()
    plan = yaml.safe_load(arguments.plan.read_text())
    arguments.output.mkdir(parents=True, exist_ok=True)
    if not arguments.report:
        run_all(plan, arguments)
    report(plan, arguments.output)


if __name__ == "__main__":
    main()
