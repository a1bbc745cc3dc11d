# SPDX-License-Identifier: Apache-2.0

"""
Compare configurations on the embedded emoji model: one line of JSON a run, appended to a file.

    python -m examples.benchmarks.recipes --runs runs.json --output results.jsonl --worker 0 --workers 4
    python -m examples.benchmarks.recipes --table results.jsonl

`runs.json` is a list of fields that each run changes in the quickstart's recipe; a field `name` labels it, and
`categories`, `lora_targets`, `eval_repeats` and `eval_every_round` are the script's own. Runs whose line is in the
file already are left out.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from examples.quickstart import CATEGORIES, LORA_TARGETS, RECIPE, load_prompts, make_trainer, summarize
from trl_pgraft import GraftConfig


def run(fields: dict[str, Any], split: str) -> dict[str, Any]:
    """Train with the quickstart's recipe changed by `fields`, and evaluate on a split of the prompts."""
    fields = dict(fields)
    name, repeats = fields.pop("name"), fields.pop("eval_repeats", 2)
    every_round = fields.pop("eval_every_round", False)
    categories, targets = tuple(fields.pop("categories", CATEGORIES)), fields.pop("lora_targets", LORA_TARGETS)
    started = time.perf_counter()
    prompts = load_prompts(split, categories) * repeats
    with tempfile.TemporaryDirectory() as folder:
        config = GraftConfig(output_dir=folder, **{**RECIPE, "save_freq": 1000, **fields})
        trainer = make_trainer(config, load_prompts("train", categories), targets)
        base = trainer.evaluate(prompts, reference=True)
        history = []
        for epoch in range(trainer.config.num_epochs):
            trainer.step(epoch, trainer.state.global_step)
            if every_round or epoch + 1 == trainer.config.num_epochs:
                history.append(summarize(prompts, base, trainer.evaluate(prompts)))
    seconds = time.perf_counter() - started
    kept = ("reward", "loss", "reward_accepted", "time/sampling", "time/training", "implied_kl_sum")
    logged = [{key: line[key] for key in kept if key in line} for line in trainer.history]
    return {"name": name, "fields": fields, "split": split, "seconds": seconds, "rounds": history, "logged": logged}


def table(results: Path) -> str:
    """Markdown table of a file of results, best last score first."""
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    rows.sort(key=lambda row: -row["rounds"][-1]["tuned_score"])
    lines = ["| run | base | tuned | gain | 95% interval |", "| --- | --: | --: | --: | --- |"]
    for row in rows:
        last = row["rounds"][-1]
        low, high = last["gain_95_interval"]
        scores = f"{last['base_score']:.3f} | {last['tuned_score']:.3f} | {last['gain']:+.3f}"
        lines.append(f"| {row['name']} | {scores} | {low:+.3f} to {high:+.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="print the results of this file, run nothing")
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--split", default="held_out")
    parser.add_argument("--worker", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.table))
        return
    lines = arguments.output.read_text().splitlines() if arguments.output.exists() else []
    done = {json.loads(line)["name"] for line in lines}
    todo = [fields for fields in json.loads(arguments.runs.read_text()) if fields["name"] not in done]
    for fields in todo[arguments.worker :: arguments.workers]:
        result = run(fields, arguments.split)
        with open(arguments.output, "a") as file:
            file.write(json.dumps(result) + "\n")
        last = result["rounds"][-1]
        gains = " ".join(f"{r['gain']:+.3f}" for r in result["rounds"])
        print(f"{result['name']:40s} base {last['base_score']:.3f} gains {gains}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
