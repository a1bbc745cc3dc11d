# SPDX-License-Identifier: Apache-2.0

"""Which part of the trajectory to tune: what its states hold of the reward, against what fine-tuning must learn."""

import copy
import inspect
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from ..adapters.policy import Policy
from ..pipelines.placement import on_device
from ..pipelines.schedulers import check_sampler
from ..pipelines.timesteps import TunedLevels, tuned_levels
from ..rollouts.collect import RolloutCollector
from ..rollouts.prompts import PromptGroup, form_groups
from .gradients import LEAST_PARTS, losses_and_gradients, pilot_adapter, pilot_loss
from .pilot import Pilot, is_stochastic, sample_pilot, score_completions, score_predictions


class PilotSource(Protocol):
    """What is needed of a [`PGraftTrainer`]: its policy, and the collector that samples and scores with it."""

    policy: Policy
    collector: RolloutCollector


@dataclass(frozen=True)
class Candidate:
    r"""
    A fraction of the sampler's steps that may be tuned.

    Args:
        fraction (`float`):
            The fraction, in (0, 1].
        timestep (`float` or `None`):
            Training timestep of x_I; `None` for final latents.
        levels ([`TunedLevels`]):
            The noise levels that are tuned.
    """

    fraction: float
    timestep: float | None
    levels: TunedLevels

    def to_row(self) -> dict[str, Any]:
        """The first entries of the candidate's row of curves."""
        log_snr = None if self.timestep is None else self.levels.schedule.log_snr(self.timestep).item()
        return {
            "fraction": self.fraction,
            "position": self.levels.step_index,
            "timestep": self.timestep,
            "log_snr": log_snr,
        }


@dataclass(frozen=True)
class IntermediateStep:
    r"""
    A proposed `tuned_fraction`, and the curves that it is read from.

    Args:
        fraction (`float`):
            The proposal.
        stochastic (`bool`):
            Whether the sampler adds noise after x_I, so that `information` is from `reward_variance`; otherwise it is
            from `readable`.
        curves (`list[dict[str, Any]]`):
            One row for each fraction, see [`choose_intermediate_step`].
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
    r"""
    Sample one pilot from the reference model and propose a `tuned_fraction`.

    Each row of `curves` has, for states x_I at one fraction of the steps:

    - `fraction`, `position`, `timestep`, `log_snr`: where x_I lies; the last two are `None` for final latents.
    - `readable`: rank correlation, within groups, of the final reward with the reward of the x_0 that the sampler
      predicts from x_I in one step.
    - `reward_variance`: `E[Var(r | x_I)] / Var(r)` within groups, from `completions` images that share x_I; 0 by
      construction if the sampler adds no noise after x_I.
    - `information`: what is left of the selection if a model learns only what x_I shows: `1 - reward_variance` of a
      stochastic sampler, the square of `readable` of a deterministic one, within [0, 1].
    - `flagged`: images, of the pilot and of those made for this fraction, that a safety checker flagged: left out.
    - `difficulty`, `difficulty_all`, `difficulty_levels`: the trainer's weighted loss of the reference on accepted
      states, on all states, and on the accepted in equal parts of the tuned range from the cleanest. Most of it is
      noise that no model predicts, and the accepted may be the easier images: neither has to be learned.
    - `refit`: what fine-tuning has to learn even if everything is accepted, because states of a sampler with few steps
      or with guidance do not follow the model's own distribution, and the model does not match its data exactly. It
      is the squared mean gradient of the loss on all states in a new adapter's parameters, without bias from noise,
      times the number of tuned steps.
    - `selection`: the same of the accepted states' gradient minus that of all states: the part that is due to the
      reward.
    - `refit_error`, `selection_error`: jackknife standard errors of the two. `selection` is usually within its error
      below some hundred prompts, so the proposal does not depend on it.
    - `score`: `information - refit / max(refit)`. The proposal is the fraction with the largest score, of those below
      1 if there are any.

    The score is the knee of two curves: beyond it, a further step adds a smaller share of the information than of what
    has to be learned beside the reward. The response to selection is the selection differential times the share of
    the reward's variance that is passed on (the breeder's equation; here `information`).

    Limits: the exchange rate of the two shares is a convention. At a fraction of 1.0 the states are images without a
    sampler's errors, so that its score cannot be compared with the others. A reference fit on all samples
    (`control_adapter`) cancels much of what `refit` counts, a model may learn more of x_I than the one-step prediction
    shows, and `refit` is about the first step of fine-tuning. Take the proposal as the middle of a short search.

    Args:
        trainer ([`PGraftTrainer`]):
            Its pipeline, rewards, acceptance rule, loss and sampler are used. Its adapter is off meanwhile, and is
            left as it is.
        prompts (`Sequence[str]`, *optional*):
            One group is sampled for each, without further columns. At least 3; some tens for smooth curves. Defaults
            to the prompts of the trainer's first iteration.
        fractions (`Sequence[float]`, *optional*):
            Candidates in (0, 1]. Defaults to at most ten evenly spread steps of the sampler.
        completions (`int`, *optional*, defaults to `4`):
            Number of images that share x_I, the pilot's own included; at least 2. Each further one costs a run of the
            sampler for each fraction, if the sampler is stochastic.

    Raises:
        `ValueError`: a fraction is out of range or falls on no step of its own, prompts or completions are too few,
            the pipeline has no `callback_on_step_end`, there are several processes, or rewards do not differ.
    """
    policy, collector = trainer.policy, trainer.collector
    _check(policy, collector, completions)
    candidates = _candidates(policy, fractions)
    groups = _groups(collector, prompts)
    with policy.sampler(reference=True):
        with torch.no_grad():
            pilot = sample_pilot(collector, groups, [c.levels.step_index for c in candidates])
            _check_rewards(pilot)
            stochastic = is_stochastic(collector, pilot, candidates[0].levels.step_index)
            count = completions if stochastic else 1
            information = [_information(collector, pilot, c.levels.step_index, count) for c in candidates]
        with pilot_adapter(policy) as parameters:
            loss = pilot_loss(policy, pilot)
            with on_device(policy.pipeline, policy.modules, policy.accelerator):
                losses = [
                    losses_and_gradients(policy, replace(loss, levels=c.levels), pilot, parameters) for c in candidates
                ]
    curves = with_scores(
        [c.to_row() | left | right for c, left, right in zip(candidates, information, losses, strict=True)]
    )
    _warn_if_unresolved(curves)
    return IntermediateStep(_proposed(curves), stochastic, curves)


def with_scores(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The `rows` with their `score`: `information` minus `refit` as a share of the largest one."""
    most = max(row["refit"] for row in rows)
    shares = [max(0.0, row["refit"]) / most if most > 0 else 0.0 for row in rows]
    return [{**row, "score": row["information"] - share} for row, share in zip(rows, shares, strict=True)]


def _proposed(rows: list[dict[str, Any]]) -> float:
    """The fraction of the largest score, of those that leave steps to the reference if there are any."""
    partial = [row for row in rows if row["fraction"] < 1]
    return max(partial or rows, key=lambda row: row["score"])["fraction"]


def _warn_if_unresolved(rows: list[dict[str, Any]]) -> None:
    most, error = (max(row[name] for row in rows) for name in ("refit", "refit_error"))
    if most < 2 * error:
        warnings.warn(
            f"choose_intermediate_step: standard errors of refit reach {error:.2g}, of a largest refit {most:.2g}, so "
            "the proposal is mostly noise. Use more prompts.",
            stacklevel=3,
        )


def _check(policy: Policy, collector: RolloutCollector, completions: int) -> None:
    if completions < 2:
        raise ValueError(f"completions={completions}: a variance needs at least 2 images that share x_I.")
    if policy.accelerator.num_processes > 1:
        raise ValueError("choose_intermediate_step runs in one process; start it without `accelerate launch`.")
    if not collector.rewards:
        raise ValueError("choose_intermediate_step: the trainer has no reward function to score the pilot with.")
    if "callback_on_step_end" not in inspect.signature(policy.pipeline.__call__).parameters:
        raise ValueError(
            f"{type(policy.pipeline).__name__} takes no `callback_on_step_end`, by which completions are branched."
        )
    if policy.arguments.get("callback_on_step_end") is not None:
        raise ValueError(
            "choose_intermediate_step: pipeline_kwargs has a `callback_on_step_end`, and completions are branched by "
            "another one in its place. Leave it out for this measurement."
        )


def _candidates(policy: Policy, fractions: Sequence[float] | None) -> list[Candidate]:
    """Candidates, noisiest first."""
    steps = len(policy.introspection.sampler.step_starts())
    if fractions is None:
        count = min(10, steps)
        fractions = [round(steps * (i + 1) / count) / steps for i in range(count)]
    taken: dict[int, float] = {}
    for fraction in sorted(fractions):
        step = round(fraction * steps)
        if not 0 < fraction <= 1 or step == 0 or step in taken:
            why = f"falls on the same step as {taken[step]}" if step in taken else "falls on no step"
            raise ValueError(
                f"fractions: {fraction} {why}; the sampler makes {steps} steps, so candidates are multiples of "
                f"1/{steps} from there to 1."
            )
        taken[step] = fraction
    if not taken:
        raise ValueError("fractions is empty: there is nothing to choose from.")
    return [_candidate(policy, fraction) for fraction in taken.values()]


def _candidate(policy: Policy, fraction: float) -> Candidate:
    config = copy.copy(policy.config)
    config.tuned_fraction = fraction
    levels, switch = tuned_levels(config, policy.introspection.sampler, policy.call.clock)
    check_sampler(policy.introspection.sampler, levels.step_index, config.sample_eta)
    return Candidate(fraction, switch.state_timestep, levels)


def _groups(collector: RolloutCollector, prompts: Sequence[str] | None) -> list[PromptGroup]:
    if prompts is None:
        groups = collector.groups(0)
    else:
        size = collector.config.samples_per_prompt or 8
        groups = form_groups(((prompt, {}) for prompt in prompts), size * len(prompts), size)
    if len(groups) < LEAST_PARTS:
        raise ValueError(
            f"choose_intermediate_step: {len(groups)} groups are too few for a standard error; {LEAST_PARTS} or more "
            "are needed (give `prompts`, or sample more images in an iteration)."
        )
    return groups


def _check_rewards(pilot: Pilot) -> None:
    blocks = pilot.total_reward.split([group.size for group in pilot.groups])
    if not any(block[~block.isnan()].unique().numel() > 1 for block in blocks):
        raise ValueError(
            "choose_intermediate_step: no group has two images of different reward, so there is nothing to select. "
            "Use another reward, other prompts or larger groups."
        )


def _information(collector: RolloutCollector, pilot: Pilot, step_index: int, completions: int) -> dict[str, float]:
    """How far x_I determines the reward; with `completions` = 1, wholly."""
    sizes = [group.size for group in pilot.groups]
    predicted, flagged = score_predictions(collector, pilot, step_index)
    flagged += pilot.flagged
    readable = rank_correlation(pilot.total_reward.split(sizes), predicted.split(sizes))
    if completions == 1:
        information = {"reward_variance": 0.0, "information": max(0.0, readable) ** 2}
    else:
        others = [score_completions(collector, pilot, step_index, number) for number in range(1, completions)]
        share = conditional_variance(torch.stack([pilot.total_reward, *(rewards for rewards, _ in others)]), sizes)
        information = {"reward_variance": share, "information": min(1.0, max(0.0, 1 - share))}
        flagged += sum(count for _, count in others)
    return {"readable": readable, **information, "flagged": flagged}


def rank_correlation(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    r"""
    Spearman's rank correlation within groups, pooled over the groups.

    Args:
        one, other (`Sequence[torch.Tensor]`):
            For each group the values (M,) of its samples; NaN leaves a sample out.

    Returns:
        `float`: in [-1, 1]; 0 if the values of either side are equal within each group.
    """
    products = torch.zeros(3, dtype=torch.float64)
    for a, b in zip(one, other, strict=True):
        both = ~(a.isnan() | b.isnan())
        a, b = _centred_ranks(a[both]), _centred_ranks(b[both])
        products += torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()])
    shared, *squares = products.tolist()
    return shared / math.sqrt(math.prod(squares)) if math.prod(squares) > 0 else 0.0


def _centred_ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks less their mean, ties sharing theirs."""
    return (values[:, None] - values[None, :]).sign().double().sum(1)


def conditional_variance(rewards: torch.Tensor, sizes: Sequence[int]) -> float:
    r"""
    `E[Var(r | x_I)] / Var(r)` within groups, both estimated without bias.

    Args:
        rewards (`torch.Tensor`):
            Rewards (C, N) of C completions of each of N states x_I; NaN leaves a sample out.
        sizes (`Sequence[int]`):
            Number of samples of each group, N together.
    """
    within = torch.cat([_variance(block.T) for block in rewards.split(list(sizes), dim=1)])
    total = torch.stack([_variance(row) for block in rewards.split(list(sizes), dim=1) for row in block])
    return (within[~within.isnan()].mean() / total[~total.isnan()].mean()).item()


def _variance(values: torch.Tensor) -> torch.Tensor:
    """Unbiased variance over the last axis, of a vector without its NaNs."""
    return (values[~values.isnan()] if values.ndim == 1 else values).var(-1)
