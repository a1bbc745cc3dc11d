# SPDX-License-Identifier: Apache-2.0

"""The table and the figures of a comparison, from its evaluations (one row a prompt and evaluation)."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import load_file

from examples.emoji.scenes import CATEGORIES


def final_scores(evaluations: pd.DataFrame, column: str = "score") -> pd.DataFrame:
    """Final value of each prompt (rows) by method and seed (columns)."""
    final = evaluations[evaluations.final]
    return final.pivot(index="prompt", columns=["method", "seed"], values=column)


def gain_interval(scores: pd.DataFrame, method: str, base: str) -> tuple[float, float]:
    """Mean gain over the base, and half its 95% interval over prompts (seeds are averaged first)."""
    gains = scores[method].mean(axis=1) - scores[base].mean(axis=1)
    return gains.mean(), 1.96 * gains.std() / len(gains) ** 0.5


def table(evaluations: pd.DataFrame, methods: list[str], base: str) -> str:
    """One row a method: final scores with their spread over seeds, cost, fidelity and diversity."""
    scores = final_scores(evaluations)
    final = evaluations[evaluations.final]
    runs = final.groupby(["method", "seed"])
    numbers = runs[["score", "judge", "diversity", "diversity_right", "frechet_real", "implied_kl", "images"]].mean()
    numbers = numbers.join(runs[["seconds", "memory"]].max())
    reference = numbers.loc[base].mean()
    lines = [
        "| method | score | gain, 95% over prompts | relative | second judge | Fréchet | diversity | among right | "
        "implied KL | images | seconds | memory, MiB |",
        "| --- | --: | --- | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for method in methods:
        rows = numbers.loc[method]
        mean, spread = rows.mean(), rows.std()
        gain, half = gain_interval(scores, method, base)
        relative = {name: mean[name] / reference[name] - 1 for name in ("score", "frechet_real", "diversity")}
        right = mean.diversity_right / reference.diversity_right - 1
        kl = "" if np.isnan(mean.implied_kl) else f"{mean.implied_kl:.2f}"
        cost = f"{kl} | {mean.images:,.0f} | {mean.seconds:.0f} | {mean.memory:.0f}"
        gains = f"{gain:+.3f} ({gain - half:+.3f} to {gain + half:+.3f}) | {relative['score']:+.1%}"
        lines.append(
            f"| {method} | {_with_spread(mean.score, spread.score)} | {gains if method != base else '| '} | "
            f"{_with_spread(mean.judge, spread.judge)} | {mean.frechet_real:.2f} ({relative['frechet_real']:+.1%}) | "
            f"{relative['diversity']:+.1%} | {right:+.1%} | {cost} |"
        )
    return "\n".join(lines)


def difference_line(evaluations: pd.DataFrame, ours: str, theirs: str) -> str:
    """How far one method's final score is from another's, over the seeds that both have."""
    scores = final_scores(evaluations)
    seeds = sorted(set(scores[ours].columns) & set(scores[theirs].columns))
    if not seeds:
        return f"{ours} and {theirs} have no seed in common yet."
    common = scores.loc[:, (slice(None), seeds)]
    gain, half = gain_interval(common, ours, theirs)
    counted = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
    return f"{ours} above {theirs}: {gain:+.3f} ({gain - half:+.3f} to {gain + half:+.3f}), {counted}."


def best_of_n_line(evaluations: pd.DataFrame, base: str) -> str:
    """The untuned model with the image of the best soft score among a prompt's, at inference."""
    best = evaluations[evaluations.final & (evaluations.method == base)]
    return f"Best of n at inference, untuned: score {best.best_score.mean():.3f}, judge {best.best_judge.mean():.3f}."


def by_category(evaluations: pd.DataFrame) -> pd.DataFrame:
    """Final score by method (rows) and category (columns)."""
    means = evaluations[evaluations.final].groupby(["method", "category"]).score.mean().unstack()
    return means[[name for name in CATEGORIES if name in means]]


def categories(evaluations: pd.DataFrame, methods: list[str]) -> str:
    """Final score by category of prompts."""
    means = by_category(evaluations)
    lines = ["| method | " + " | ".join(means.columns) + " |", "| --- |" + " --: |" * means.shape[1]]
    rows = [f"| {name} | " + " | ".join(f"{value:.3f}" for value in means.loc[name]) + " |" for name in methods]
    return "\n".join(lines + rows)


def means(evaluations: pd.DataFrame) -> pd.DataFrame:
    """One row an evaluation: what it measured, averaged over prompts, and the score of each category."""
    keys = ["method", "seed", "images", "seconds", "final"]
    numbers = [name for name in evaluations.select_dtypes("number") if name not in keys]
    by_category = evaluations.pivot_table(index=keys, columns="category", values="score")
    return evaluations.groupby(keys)[numbers].mean().join(by_category).reset_index()


def equal_images(evaluations: pd.DataFrame, methods: list[str]) -> str:
    """Score of each method after as many images: mean over the seeds that were measured there, and their number."""
    scores = curves(evaluations).groupby(["method", "images"]).score.agg(["mean", "count"])
    counts = sorted(set(scores.index.get_level_values("images")))
    shown = counts[:: -max(1, len(counts) // 9)][::-1]
    lines = ["| method, images | " + " | ".join(f"{n:,}" for n in shown) + " |", "| --- |" + " --: |" * len(shown)]
    for method in methods:
        cells = [scores.loc[(method, n)] if (method, n) in scores.index else None for n in shown]
        texts = ["" if cell is None else f"{cell['mean']:.3f} ({cell['count']:.0f})" for cell in cells]
        lines.append(f"| {method} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def curves(evaluations: pd.DataFrame) -> pd.DataFrame:
    """Score of each evaluation on the way, from the same noise: columns method, seed, images, seconds, score."""
    keys = ["method", "seed", "images", "seconds"]
    return evaluations[~evaluations.final].groupby(keys, as_index=False).score.mean()


def equal_seconds(evaluations: pd.DataFrame, methods: list[str], base: str) -> str:
    """Score of each method when the one that finished first had finished: at the same GPU-seconds."""
    points, trained = curves(evaluations), [name for name in methods if name != base]
    if not trained:
        return "Nothing was trained yet."
    budget = min(points[points.method == name].groupby("seed").seconds.max().mean() for name in trained)
    lines = [f"| method, within {budget:.0f} s | score | images | seconds |", "| --- | --: | --: | --: |"]
    for method in trained:
        within = points[(points.method == method) & (points.seconds <= budget)].sort_values("seconds")
        if within.empty:
            lines.append(f"| {method} | not measured that early | | |")
            continue
        last = within.groupby("seed").last()
        score = _with_spread(last.score.mean(), last.score.std())
        lines.append(f"| {method} | {score} | {last.images.mean():,.0f} | {last.seconds.mean():.0f} |")
    return "\n".join(lines)


def seconds_to_reach(evaluations: pd.DataFrame, method: str, score: float) -> float:
    """Seconds of the first evaluation (mean over seeds) that is at least as good as `score`; infinite if none is."""
    means = curves(evaluations)[lambda points: points.method == method].groupby("images")[["seconds", "score"]].mean()
    return means[means.score >= score].seconds.min() if (means.score >= score).any() else float("inf")


def speed_line(evaluations: pd.DataFrame, ours: str, theirs: str) -> str:
    """How long one method takes to the other's final score."""
    points = curves(evaluations)[lambda points: points.method == theirs]
    last = points[points.images == points.images.max()]
    needed = seconds_to_reach(evaluations, ours, last.score.mean())
    return (
        f"{theirs} ends at {last.score.mean():.3f} after {last.seconds.mean():.0f} s; {ours} is there after "
        f"{needed:.0f} s: {needed / last.seconds.mean():.2f} of it."
    )


def _with_spread(mean: float, spread: float) -> str:
    """A mean over seeds with its standard deviation, which one seed does not have."""
    return f"{mean:.3f}" if np.isnan(spread) else f"{mean:.3f} ± {spread:.3f}"


def draw_curves(evaluations: pd.DataFrame, methods: list[str], base: str, over: str, path: Path) -> None:
    """Score over `images` or `seconds`: the mean over seeds as far as all were measured, and each seed thinly."""
    points = curves(evaluations)
    start = points[points.method == base].score.mean()
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for color, method in enumerate(name for name in methods if name != base):
        runs = points[points.method == method].groupby("seed")
        lines = [np.vstack([[0, start], run.sort_values(over)[[over, "score"]]]) for _, run in runs]
        for line in lines:
            axes.plot(*line.T, color=f"C{color}", alpha=0.3, linewidth=0.8)
        common = [line[: min(map(len, lines))] for line in lines]
        axes.plot(*np.mean(common, axis=0).T, color=f"C{color}", marker="o", markersize=3, label=method)
    axes.axhline(start, color="gray", linestyle="--", linewidth=1, label=base)
    axes.set(xlabel={"images": "images drawn", "seconds": "GPU-seconds"}[over], ylabel="verifier's score")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def draw_categories(evaluations: pd.DataFrame, methods: list[str], path: Path) -> None:
    """Final score by category, a bar a method."""
    means = by_category(evaluations)
    figure, axes = plt.subplots(figsize=(9, 4))
    places, width = np.arange(means.shape[1]), 0.8 / max(1, len(methods))
    for index, method in enumerate(methods):
        axes.bar(places + index * width, means.loc[method], width, label=method)
    axes.set_xticks(places + 0.4 - width / 2, [name.replace("_", "\n") for name in means.columns])
    axes.set(ylabel="verifier's score", ylim=(0, 1.02))
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def draw_pictures(files: list[Path], path: Path, columns: int = 16) -> None:
    """A row of images for each file of `one_run.py`: the first of each of `columns` prompts, from the same noise."""
    rows = [load_file(file)["images"][:, 0] for file in files]
    rows = torch.stack([images[:: max(1, len(images) // columns)][:columns] for images in rows])  # (rows, n, 3, H, W)
    Image.fromarray(rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).contiguous().numpy()).save(path)


def draw_fractions(evaluations: pd.DataFrame, fractions: dict[str, float], base: str, path: Path) -> None:
    """Final score over `tuned_fraction` (method to fraction): bias falls and variance grows towards pure noise."""
    scores = final_scores(evaluations)
    figure, axes = plt.subplots(figsize=(6, 4))
    xs = sorted(fractions.values())
    names = sorted(fractions, key=fractions.get)
    for seed in sorted(set(scores[names[0]].columns)):
        axes.plot(xs, [scores[name][seed].mean() for name in names], marker="o", alpha=0.7, label=f"seed {seed}")
    axes.axhline(scores[base].mean().mean(), color="gray", linestyle="--", linewidth=1, label=base)
    axes.set(xlabel="tuned_fraction (1 is GRAFT)", ylabel="verifier's score")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)
