# SPDX-License-Identifier: Apache-2.0

"""
Table and figure of a comparison.

    python -m examples.noise_correction.report outputs/fm/compare

Results of several folders of one domain are taken together; table and figure go into the first, or `--output`.
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
    "gaussian_chosen": ("Gaussian chosen by likelihood", "tab:red"),
    "network": ("network", "tab:blue"),
    "lora": ("LoRA", "tab:orange"),
    "inverted": ("inverted training images", "tab:gray"),
}
HAVE_STEPS = ("network", "lora")
KEY = ["arm", "steps", "corrector_steps", "seed"]
LINES = {0: "-", 1: "-", 2: "--", 4: "-."}  # of corrector steps


def read_results(*folders: Path) -> pd.DataFrame:
    """One row a result; a column `frechet_...` for each kind of features. Of equal keys the first counts."""
    lines = [line for folder in folders for line in (folder / "results.jsonl").read_text().splitlines()]
    return pd.DataFrame([_flat(json.loads(line)) for line in lines]).drop_duplicates(KEY)


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
    if not len(xs) or not xs[0] * 0.999 <= x <= xs[-1] * 1.001:
        return float("nan")
    return float(np.exp(np.interp(np.log(x), np.log(xs), np.log(ys))))


def markdown_table(table: pd.DataFrame) -> str:
    """
    Each sampler's cost and distance; beside it the uncorrected model's distance at that cost and at twice that cost,
    and the FLOPs that the uncorrected model needs for that distance, as a multiple.
    """
    lines = [
        "| noise | corrector steps | model steps | MFLOP an image | Fréchet distance | uncorrected at equal FLOPs | "
        "uncorrected at twice the FLOPs | FLOPs of uncorrected at equal distance |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    base = table[table.arm == "uncorrected"]
    flops, means = base.flops.to_numpy(), base["mean"].to_numpy()
    for row in table.itertuples():
        is_other = row.arm not in ("uncorrected", "inverted")
        at_cost = [_number(interpolated(k * row.flops, flops, means)) if is_other else "" for k in (1, 2)]
        ratio = _number(cost_of(row.mean, base) / row.flops, " times") if is_other else ""
        if is_other and (row.mean < means).all():
            ratio = "never reached" if len(means) else ""
        count = row.corrector_steps if row.arm in HAVE_STEPS else ""
        spread = f" ± {row.std:.2f}" if row.seeds > 1 else ""
        lines.append(
            f"| {STYLES[row.arm][0]} | {count} | {row.steps} | {row.flops / 1e6:,.0f} | "
            f"{row.mean:.2f}{spread} | {at_cost[0]} | {at_cost[1]} | {ratio} |"
        )
    return "\n".join(lines)


def _number(value: float, unit: str = "") -> str:
    return f"{value:.2f}{unit}" if np.isfinite(value) else ""


def cost_of(distance: float, rows: pd.DataFrame) -> float:
    """FLOPs at which samplers that differ in steps only reach a distance; NaN where they do not."""
    rows = rows.sort_values("flops")
    falling = (rows["mean"].cummin() == rows["mean"]).to_numpy()
    return interpolated(distance, rows["mean"].to_numpy()[falling], rows.flops.to_numpy()[falling])


def best_reached(table: pd.DataFrame) -> str:
    """The uncorrected model's best distance, and the share of its FLOPs at which each corrector has it."""
    base = table[table.arm == "uncorrected"]
    if base.empty:
        return "Not measured: the model from N(0, I)."
    best = base.loc[base["mean"].idxmin()]
    lines = [f"Uncorrected at best: {best['mean']:.2f}, {best.steps} steps, {best.flops / 1e6:,.0f} MFLOP an image."]
    for (arm, count), rows in table[~table.arm.isin(["uncorrected", "inverted"])].groupby(["arm", "corrector_steps"]):
        first = rows.sort_values("flops").iloc[0]
        cost = first.flops if first["mean"] <= best["mean"] else cost_of(best["mean"], rows)
        share = f"as good at {cost / best.flops:.0%} of these FLOPs" if np.isfinite(cost) else "never as good"
        lines.append(f"{_label(arm, count)}: {share}.")
    return "\n".join(f"- {line}" for line in lines)


def _label(arm: str, count: int, fewest: int = 1, most: int = 1) -> str:
    """A sampler's name, and how many seeds its points have, unless that is one."""
    label = STYLES[arm][0] + (f", {count} step{'s' if count > 1 else ''}" if arm in HAVE_STEPS else "")
    seeds = f"{most}" if fewest == most else f"{fewest} to {most}"
    return label + (f" ({seeds} seeds)" if most > 1 else "")


def draw(tables: dict[str, pd.DataFrame], path: Path) -> None:
    """
    One panel for each kind of features: distance over FLOPs, both in logarithms, with the deviation over seeds.

    What starts from inverted training images may leave a panel below, so that the others can be told apart.
    """
    figure, axes = plt.subplots(1, len(tables), figsize=(6.4 * len(tables) + 3.2, 5.2), squeeze=False)
    for axis, (name, table) in zip(axes[0], tables.items(), strict=True):
        curves = dict(list(table.groupby(["arm", "corrector_steps"])))
        for (arm, count), rows in sorted(curves.items(), key=lambda item: list(STYLES).index(item[0][0])):
            _curve(axis, arm, count, rows.sort_values("flops"))
        axis.set(xscale="log", yscale="log", xlabel="MFLOP per image", ylabel=f"Fréchet distance, {name} features")
        reached = table[table.arm != "inverted"]["mean"]
        if len(reached):
            axis.set_ylim(reached.min() / 1.3, reached.max() * 1.3)
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_major_formatter("{x:g}")
            scale.set_minor_locator(matplotlib.ticker.LogLocator(subs=(2, 5)))
            scale.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.25, which="both")
    axes[0, -1].legend(fontsize=8, title="numbers: model steps", loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _curve(axis: plt.Axes, arm: str, count: int, rows: pd.DataFrame) -> None:
    """One sampler's distance over its cost, with its numbers of steps."""
    x, mean, spread = rows.flops / 1e6, rows["mean"], rows["std"].fillna(0)
    line = ":" if arm == "inverted" else LINES.get(count, "-.")
    style = {"color": STYLES[arm][1], "linestyle": line, "marker": "o", "markersize": 4, "capsize": 2}
    axis.errorbar(x, mean, spread, label=_label(arm, count, rows.seeds.min(), rows.seeds.max()), **style)
    if arm in ("uncorrected", "gaussian"):
        offset = (4, 5) if arm == "uncorrected" else (-4, -11)
        for steps, at, height in zip(rows.steps, x, mean, strict=True):
            place = {"textcoords": "offset points", "fontsize": 8, "color": STYLES[arm][1]}
            axis.annotate(str(steps), (at, height), offset, **place)


def write_report(*folders: Path, output: Path | None = None) -> str:
    """Write `table.md` and `frechet_over_flops.png` into `output`, or the first folder, and return the table."""
    results, output = read_results(*folders), output or folders[0]
    names = [column.removeprefix("frechet_") for column in results if column not in ("frechet_code",)]
    names = [name for name in names if f"frechet_{name}" in results]
    tables = {name: over_seeds(results, f"frechet_{name}") for name in names}
    parts = [f"{name} features\n\n{markdown_table(t)}\n\n{best_reached(t)}" for name, t in tables.items()]
    output.mkdir(parents=True, exist_ok=True)
    (output / "table.md").write_text("\n\n".join(parts) + "\n")
    draw(tables, output / "frechet_over_flops.png")
    return "\n\n".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, help="the first folder where not given")
    args = parser.parse_args()
    print(write_report(*args.folders, output=args.output))
