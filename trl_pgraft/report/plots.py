# SPDX-License-Identifier: Apache-2.0

"""Curves, plotted with matplotlib."""

from pathlib import Path

from ..analysis.intermediate_step import IntermediateStep


def draw_choice(result: IntermediateStep, path: str | Path) -> None:
    """
    Plot the curves of a choice of t_I, and the proposal, to an image file.

    Args:
        result ([`IntermediateStep`]):
            Result of [`choose_intermediate_step`].
        path (`str` or `Path`):
            File to write; its suffix is the format.
    """
    from matplotlib.figure import Figure

    rows = result.curves
    x = [row["fraction"] for row in rows]

    def column(name: str) -> list[float]:
        return [row[name] for row in rows]

    figure = Figure(figsize=(14, 4), layout="constrained")
    information, gradients, losses = figure.subplots(1, 3)
    information.plot(x, column("readable"), "o--", color="tab:gray", label="readable (rank correlation)")
    if result.stochastic:
        information.plot(x, column("reward_variance"), "o:", color="tab:purple", label="reward variance given $x_I$")
    information.plot(x, column("information"), "o-", color="tab:blue", label="information")
    information.plot(x, column("score"), "s-", color="tab:green", label="score")
    information.set(title="What $x_I$ holds of the reward", ylabel="share")
    for name, colour, label in (
        ("refit", "tab:red", "refit: all states"),
        ("selection", "tab:orange", "selection: accepted less all"),
    ):
        style = {"fmt": "o-", "capsize": 3, "color": colour, "label": label}
        gradients.errorbar(x, column(name), column(f"{name}_error"), **style)
    gradients.set(title="What a fit must learn", ylabel="squared mean gradient x steps")
    losses.plot(x, column("difficulty"), "o-", color="tab:brown", label="accepted states")
    losses.plot(x, column("difficulty_all"), "o--", color="tab:gray", label="all states")
    losses.set(title="Weighted loss of the reference", ylim=(0, None))
    for axes in (information, gradients, losses):
        axes.axhline(0, color="black", linewidth=0.5)
        axes.axvline(result.fraction, color="tab:green", alpha=0.4, label=f"proposal {result.fraction:g}")
        axes.set(xlabel="tuned fraction")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
