# SPDX-License-Identifier: Apache-2.0

"""Curves, plotted with matplotlib."""

from pathlib import Path

from ..analysis.intermediate_step import IntermediateStep


# Of each panel the title, the label and the lower end of its axis, and its curves: column of the rows, format, colour,
# label.
PANELS = (
    (
        "What $x_I$ holds of the reward",
        "share",
        None,
        (
            ("readable", "o--", "gray", "readable (rank correlation)"),
            ("reward_variance", "o:", "purple", "reward variance given $x_I$"),
            ("information", "o-", "blue", "information"),
            ("score", "s-", "green", "score"),
        ),
    ),
    (
        "What a fit must learn",
        "squared mean gradient x steps",
        None,
        (
            ("refit", "o-", "red", "refit: all states"),
            ("selection", "o-", "orange", "selection: accepted less all"),
        ),
    ),
    (
        "Weighted loss of the reference",
        "",
        0,
        (
            ("difficulty", "o-", "brown", "accepted states"),
            ("difficulty_all", "o--", "gray", "all states"),
        ),
    ),
)


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
    figure = Figure(figsize=(14, 4), layout="constrained")
    for axes, (title, ylabel, bottom, curves) in zip(figure.subplots(1, 3), PANELS, strict=True):
        for name, line, colour, label in curves:
            if name != "reward_variance" or result.stochastic:
                x, y = zip(*((row["fraction"], row[name]) for row in rows), strict=True)
                style = {"color": f"tab:{colour}", "label": label}
                if f"{name}_error" in rows[0]:
                    axes.errorbar(x, y, [row[f"{name}_error"] for row in rows], fmt=line, capsize=3, **style)
                else:
                    axes.plot(x, y, line, **style)
        if bottom is not None:
            axes.set_ylim(bottom, None)
        axes.axhline(0, color="black", linewidth=0.5)
        axes.axvline(result.fraction, color="tab:green", alpha=0.4, label=f"proposal {result.fraction:g}")
        axes.set(title=title, xlabel="tuned fraction", ylabel=ylabel)
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
