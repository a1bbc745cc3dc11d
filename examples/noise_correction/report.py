# Copyright 2026 The trl_pgraft authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""
Table and figure of a comparison.

    python -m examples.noise_correction.report outputs/fm/compare
"""

import argparse
import json
from pathlib import Path

import matplotlib
import matplotlib.ticker


matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd


STYLES = {
    "uncorrected": ("from N(0, I)", "black"),
    "gaussian": ("Gaussian fit of the inverted noise", "tab:green"),
    "network": ("network", "tab:blue"),
    "lora": ("LoRA", "tab:orange"),
    "inverted": ("inverted training images", "tab:gray"),
}
HAVE_STEPS = ("network", "lora")


def read_results(folder: Path) -> pd.DataFrame:
    """One row a result; a column `frechet_...` for each kind of features."""
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return pd.DataFrame([_flat(line) for line in lines])


def _flat(line: dict) -> dict:
    distances = {f"frechet_{name}": value for name, value in line.pop("frechet").items()}
    return {**line, **distances}


def over_seeds(results: pd.DataFrame, column: str) -> pd.DataFrame:
    """Mean and standard deviation over seeds, one row an arm, number of steps and number of corrector steps."""
    groups = results.dropna(subset=[column]).groupby(["arm", "corrector_steps", "steps"])
    table = groups.agg(flops=("flops", "mean"), mean=(column, "mean"), std=(column, "std"), seeds=("seed", "nunique"))
    return table.reset_index().sort_values(["steps", "flops"], kind="stable")


def interpolated(x: float, xs: np.ndarray, ys: np.ndarray) -> float:
    """`y` at `x` on the broken line through `(xs, ys)` in logarithms; NaN outside."""
    order = np.argsort(xs)
    xs, ys = xs[order], ys[order]
    if not xs[0] * 0.999 <= x <= xs[-1] * 1.001:
        return float("nan")
    return float(np.exp(np.interp(np.log(x), np.log(xs), np.log(ys))))


def markdown_table(table: pd.DataFrame) -> str:
    """
    Each sampler's cost and distance; beside it the uncorrected model's distance at that cost, and the share of the
    FLOPs that the uncorrected model needs for that distance.
    """
    lines = [
        "| noise | corrector steps | model steps | MFLOP an image | Fréchet distance | uncorrected at equal FLOPs | "
        "FLOPs of uncorrected at equal distance |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    base = table[table.arm == "uncorrected"]
    flops, means = base.flops.to_numpy(), base["mean"].to_numpy()
    falling = np.minimum.accumulate(means) == means
    for row in table.itertuples():
        is_other = row.arm not in ("uncorrected", "inverted")
        at_cost = interpolated(row.flops, flops, means) if is_other else float("nan")
        cost = interpolated(row.mean, means[falling], flops[falling]) if is_other else float("nan")
        ratio = f"{cost / row.flops:.2f} times" if np.isfinite(cost) else ""
        if is_other and row.mean < means.min():
            ratio = "never reached"
        count = row.corrector_steps if row.arm in HAVE_STEPS else ""
        spread = f" ± {row.std:.2f}" if row.seeds > 1 else ""
        lines.append(
            f"| {STYLES[row.arm][0]} | {count} | {row.steps} | {row.flops / 1e6:,.0f} | "
            f"{row.mean:.2f}{spread} | {f'{at_cost:.2f}' if np.isfinite(at_cost) else ''} | {ratio} |"
        )
    return "\n".join(lines)


def draw(tables: dict[str, pd.DataFrame], path: Path) -> None:
    """One panel for each kind of features: distance over FLOPs per image, both in logarithms."""
    figure, axes = plt.subplots(1, len(tables), figsize=(6.4 * len(tables), 4.8), squeeze=False)
    for axis, (name, table) in zip(axes[0], tables.items(), strict=True):
        for (arm, count), rows in table.groupby(["arm", "corrector_steps"]):
            label, color = STYLES[arm]
            label += f", {count} step{'s' if count > 1 else ''}" if arm in HAVE_STEPS else ""
            rows = rows.sort_values("flops")
            style = {"linestyle": ":" if arm == "inverted" else "-" if count < 2 else "--", "marker": "o"}
            spread = rows["std"].fillna(0)
            axis.errorbar(rows.flops / 1e6, rows["mean"], spread, label=label, color=color, markersize=4, **style)
            if arm == "uncorrected":
                for row in rows.itertuples():
                    axis.annotate(str(row.steps), (row.flops / 1e6, row.mean), (3, 5), textcoords="offset points")
        axis.set(xscale="log", yscale="log", xlabel="MFLOP per image", ylabel=f"Fréchet distance, {name} features")
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_formatter("{x:g}")
            scale.set_minor_locator(matplotlib.ticker.LogLocator(subs=(2, 3, 5)))
            scale.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.3, which="both")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_report(folder: Path) -> str:
    """Write `table.md` and `frechet_over_flops.png` into the folder, and return the table."""
    results = read_results(folder)
    names = [column.removeprefix("frechet_") for column in results if column not in ("frechet_code",)]
    names = [name for name in names if f"frechet_{name}" in results]
    tables = {name: over_seeds(results, f"frechet_{name}") for name in names}
    text = "\n\n".join(f"{name} features\n\n{markdown_table(table)}" for name, table in tables.items())
    (folder / "table.md").write_text(text + "\n")
    draw(tables, folder / "frechet_over_flops.png")
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(write_report(parser.parse_args().folder))
