# SPDX-License-Identifier: Apache-2.0

"""Which part of the trajectory to tune: what its states hold of the reward, against what a fit must learn for them."""

import copy
import inspect
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..pipelines.placement import on_device
from ..pipelines.timesteps import TunedLevels, tuned_levels
from ..rollouts.prompts import PromptGroup, form_groups
from .gradients import LEAST_PARTS, pilot_adapter, pilot_loss, to_learn
from .pilot import Pilot, PilotSource, complete, draw_pilot, is_stochastic, probe


@dataclass(frozen=True)
class Candidate:
    """A fraction of the steps, where its x_I lies, and the noise levels that it tunes."""

    fraction: float
    timestep: float | None
    levels: TunedLevels

    @property
    def position(self) -> int:
        return self.levels.step_index

    def to_row(self) -> dict[str, Any]:
        log_snr = None if self.timestep is None else self.levels.schedule.log_snr(self.timestep).item()
        place = {"fraction": self.fraction, "position": self.position}
        return {**place, "timestep": self.timestep, "log_snr": log_snr}


@dataclass(frozen=True)
class IntermediateStep:
    """
    A proposed `tuned_fraction` and the curves it was read from.

    Args:
        fraction (`float`):
            The proposal.
        stochastic (`bool`):
            Whether the sampler draws noise after x_I, so that `information` is from `reward_variance`; otherwise it is
            from `readable`.
        curves (`list[dict[str, Any]]`):
            One row a fraction, see [`choose_intermediate_step`].
    """

    fraction: float
    stochastic: bool
    curves: list[dict[str, Any]]


def choose_intermediate_step(
    trainer: PilotSource,
    prompts: Sequence[str] | None = None,
    fractions: Sequence[float] | None = None,
    completions: int = 4,
) -> IntermediateStep:
    """
    Draw one pilot from the reference model and propose a `tuned_fraction`.

    Each row of `curves` has, for states x_I at one fraction of the steps:

    - `fraction`, `position`, `timestep`, `log_snr`: where x_I lies; the last two are `None` for final latents.
    - `readable`: rank correlation, within groups, of the final reward with the reward of the x_0 that the sampler
      predicts from x_I in one step.
    - `reward_variance`: `E[Var(r | x_I)] / Var(r)` within groups, from `completions` images that share x_I; 0 by
      construction where the sampler draws no noise after x_I.
    - `information`: what of the selection is left if a model learns only what x_I shows: `1 - reward_variance` of a
      stochastic sampler, the square of `readable` of a deterministic one, within [0, 1].
    - `difficulty`, `difficulty_all`, `difficulty_levels`: the trainer's weighted loss of the reference on accepted
      states, on all states, and on the accepted in equal parts of the tuned range from the cleanest. Most of it is
      noise that no model predicts, and the accepted may be the easier images: neither is work to be learnt.
    - `refit`: what a fit has to learn even if everything is accepted, because states of a sampler with few steps or
      with guidance do not follow the model's own law, nor does the model fit its data exactly. It is the squared
      mean gradient of the loss on all states in a fresh adapter's parameters, without bias from noise, times the
      number of tuned steps.
    - `selection`: the same of the accepted minus all states' gradient: the part that the reward asks for.
    - `refit_error`, `selection_error`: jackknife standard errors of the two. `selection` is usually within its error
      below some hundred prompts, so the proposal does not depend on it.
    - `score`: `information - refit / max(refit)`; the proposal is the fraction where it is largest, of those below
      1 if there are any.

    The response to selection is the selection differential times the share of the reward's variance that is passed on
    (`information`; the breeder's equation), and is bought with refitting the sampler's errors. The score is the knee
    of the two curves: beyond it a further step adds a smaller share of the information than of the refitting. Its
    limits: it cannot say whether tuning everything beats the knee, because at 1.0 a fit is to images, which have no
    sampler's noise left to refit, and the score there is of another kind (it is in the curves, and not proposed); the
    exchange rate of the two is a convention; a control adapter cancels much of what `refit` counts, which the score
    does not know; a model may learn more of x_I than the one-step prediction shows; and `refit` is about the first
    step of a fit. Treat it as the middle of a short search.

    Args:
        trainer ([`PGraftTrainer`]):
            Pipeline, rewards, acceptance, loss and sampler. Its adapter is switched off and left as it is.
        prompts (`Sequence[str]`, *optional*):
            One group is drawn for each, without further columns; those of the trainer's first round where not given.
            At least 3; some tens for curves that are smooth.
        fractions (`Sequence[float]`, *optional*):
            Candidates in (0, 1]; at most ten evenly spread steps of the sampler where not given.
        completions (`int`, *optional*, defaults to `4`):
            Images that share x_I, the pilot's own included; at least 2. Each further one costs a run of the sampler
            for each fraction, where the sampler is stochastic.

    Raises:
        `ValueError`: a fraction that is out of range or falls on no step of its own, too few prompts or completions, a
            pipeline without `callback_on_step_end`, several processes, or rewards without differences.
    """
    _check(trainer, completions)
    candidates = _candidates(trainer, fractions)
    groups = _groups(trainer, prompts)
    with trainer.sampler(reference=True):
        with torch.no_grad():
            pilot = draw_pilot(trainer, groups, [c.position for c in candidates])
            _check_rewards(pilot)
            stochastic = is_stochastic(trainer, pilot, candidates[0].position)
            held = [_held(trainer, pilot, c.position, completions if stochastic else 1) for c in candidates]
        with pilot_adapter(trainer) as parameters:
            loss = pilot_loss(trainer, pilot)
            with on_device(trainer.pipeline, trainer.denoiser, trainer.accelerator):
                learnt = [to_learn(trainer, replace(loss, levels=c.levels), pilot, parameters) for c in candidates]
    rows = [c.to_row() | left | right for c, left, right in zip(candidates, held, learnt, strict=True)]
    curves = scored(rows)
    _warn_if_unresolved(curves)
    return IntermediateStep(_proposed(curves), stochastic, curves)


def scored(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their `score`: information less the share of the largest refit."""
    most = max(row["refit"] for row in rows)
    shares = [max(0.0, row["refit"]) / most if most > 0 else 0.0 for row in rows]
    return [{**row, "score": row["information"] - share} for row, share in zip(rows, shares, strict=True)]


def _proposed(rows: list[dict[str, Any]]) -> float:
    """The fraction of the largest score, of those that leave steps to the reference, where there are any."""
    partial = [row for row in rows if row["fraction"] < 1]
    return max(partial or rows, key=lambda row: row["score"])["fraction"]


def _warn_if_unresolved(rows: list[dict[str, Any]]) -> None:
    most, error = (max(row[name] for row in rows) for name in ("refit", "refit_error"))
    if most < 2 * error:
        warnings.warn(
            f"choose_intermediate_step: standard errors of refit reach {error:.2g}, of a largest refit {most:.2g}, so "
            "the proposal is mostly noise. Draw more prompts.",
            stacklevel=3,
        )


def _check(trainer: PilotSource, completions: int) -> None:
    if completions < 2:
        raise ValueError(f"completions={completions}: a variance needs at least 2 images that share x_I.")
    if trainer.accelerator.num_processes > 1:
        raise ValueError("choose_intermediate_step runs in one process; start it without `accelerate launch`.")
    if not trainer.rewards:
        raise ValueError("choose_intermediate_step: the trainer has no reward function to score the pilot with.")
    if "callback_on_step_end" not in inspect.signature(trainer.pipeline.__call__).parameters:
        raise ValueError(
            f"{type(trainer.pipeline).__name__} takes no `callback_on_step_end`, by which completions are branched."
        )


def _candidates(trainer: PilotSource, fractions: Sequence[float] | None) -> list[Candidate]:
    """Candidates, noisiest first."""
    steps = len(trainer.policy.introspection.sampler.step_starts())
    if fractions is None:
        count = min(10, steps)
        fractions = [round(steps * (i + 1) / count) / steps for i in range(count)]
    taken: dict[int, float] = {}
    for fraction in sorted(fractions):
        position = round(fraction * steps)
        if not 0 < fraction <= 1 or position == 0 or position in taken:
            why = f"falls on the same step as {taken[position]}" if position in taken else "falls on no step"
            raise ValueError(
                f"fractions: {fraction} {why}; the sampler makes {steps} steps, so candidates are multiples of "
                f"1/{steps} from there to 1."
            )
        taken[position] = fraction
    if not taken:
        raise ValueError("fractions is empty: there is nothing to choose from.")
    return [_candidate(trainer, fraction) for fraction in taken.values()]


def _candidate(trainer: PilotSource, fraction: float) -> Candidate:
    config = copy.copy(trainer.config)
    config.tuned_fraction = fraction
    levels, switch = tuned_levels(config, trainer.policy.introspection.sampler, trainer.policy.call.clock)
    return Candidate(fraction, switch.state_timestep, levels)


def _groups(trainer: PilotSource, prompts: Sequence[str] | None) -> list[PromptGroup]:
    if prompts is None and trainer.collector.prompt_source is None:
        raise ValueError("choose_intermediate_step: a trainer on samples_dataset has no prompts; give `prompts`.")
    if prompts is None:
        groups = trainer.collector.groups(0)
    else:
        size = trainer.config.samples_per_prompt or 8
        groups = form_groups(((prompt, {}) for prompt in prompts), size * len(prompts), size)
    if len(groups) < LEAST_PARTS:
        raise ValueError(
            f"choose_intermediate_step: {len(groups)} groups are too few for a standard error; draw {LEAST_PARTS} or "
            "more (`prompts`, or a larger round)."
        )
    return groups


def _check_rewards(pilot: Pilot) -> None:
    blocks = pilot.reward.split([group.size for group in pilot.groups])
    if not any(block[~block.isnan()].unique().numel() > 1 for block in blocks):
        raise ValueError(
            "choose_intermediate_step: no group has two images of different reward, so there is nothing to select. "
            "Use another reward, other prompts or larger groups."
        )


def _held(trainer: PilotSource, pilot: Pilot, position: int, completions: int) -> dict[str, float]:
    """How far x_I settles the reward; `completions` = 1 says that it does so wholly."""
    sizes = [group.size for group in pilot.groups]
    readable = rank_correlation(pilot.reward.split(sizes), probe(trainer, pilot, position).split(sizes))
    if completions == 1:
        return {"readable": readable, "reward_variance": 0.0, "information": max(0.0, readable) ** 2}
    others = [complete(trainer, pilot, position, number) for number in range(1, completions)]
    share = conditional_variance(torch.stack([pilot.reward, *others]), sizes)
    return {"readable": readable, "reward_variance": share, "information": min(1.0, max(0.0, 1 - share))}


def rank_correlation(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """Spearman's correlation within groups, pooled over them; NaN leaves a sample out, a constant side counts 0."""
    products = torch.zeros(3, dtype=torch.float64)
    for a, b in zip(one, other, strict=True):
        known = ~(a.isnan() | b.isnan())
        a, b = _centred_ranks(a[known]), _centred_ranks(b[known])
        products += torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()])
    shared, *squares = products.tolist()
    return shared / math.sqrt(math.prod(squares)) if math.prod(squares) > 0 else 0.0


def _centred_ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks less their mean, ties sharing theirs."""
    return (values[:, None] - values[None, :]).sign().double().sum(1)


def conditional_variance(rewards: torch.Tensor, sizes: Sequence[int]) -> float:
    """
    `E[Var(r | x_I)] / Var(r)` within groups, both estimated without bias.

    Args:
        rewards (`torch.Tensor` of shape `(C, N)`):
            Rewards of `C` completions of each x_I; NaN leaves a sample out.
        sizes (`Sequence[int]`):
            Samples of each group.
    """
    within = torch.cat([_variance(block.T) for block in rewards.split(list(sizes), dim=1)])
    total = torch.stack([_variance(row) for block in rewards.split(list(sizes), dim=1) for row in block])
    return (within[~within.isnan()].mean() / total[~total.isnan()].mean()).item()


def _variance(values: torch.Tensor) -> torch.Tensor:
    """Unbiased variance over the last axis, of a vector without its NaNs."""
    return (values[~values.isnan()] if values.ndim == 1 else values).var(-1)
