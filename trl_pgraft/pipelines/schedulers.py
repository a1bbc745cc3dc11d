# SPDX-License-Identifier: Apache-2.0

"""What a pipeline's scheduler does between its steps: where steps begin, and at which noise level states lie.

No scheduler is special: a copy of it, set as the pipeline has set it, is run on data whose exact denoiser is known.
"""

import copy
import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from ..core.noise_schedules import NoiseSchedule, expand
from ..core.parameterizations import check_prediction_type, combine
from .recording import Recording


@dataclass(frozen=True)
class Sampler:
    """
    A pipeline's scheduler before its first step, as the pipeline sets it and calls it.

    Args:
        scheduler:
            A copy of the pipeline's diffusers scheduler, with its timesteps set.
        timesteps (`list[float]`):
            Training timesteps of the denoiser calls of one trajectory.
        options (`dict`):
            What the pipeline hands `scheduler.step` beside model output, timestep and sample.
    """

    scheduler: Any
    timesteps: list[float]
    options: dict[str, Any]

    @property
    def description(self) -> str:
        """The scheduler in words, for messages."""
        config = self.scheduler.config
        names = ("timestep_spacing", "variance_type", "prediction_type")
        marks = [f"{name}={config[name]!r}" for name in names if config.get(name) is not None]
        return f"{type(self.scheduler).__name__} ({', '.join([*marks, f'{len(self.timesteps)} denoiser calls'])})"

    def step_starts(self) -> list[int]:
        """
        Denoiser calls that begin a step, among all calls of a trajectory.

        A step makes `scheduler.order` calls. Where two calls share a timestep the first still belongs to the step
        before: it corrects a prediction that is thrown away.

        Raises:
            `ValueError`: the scheduler starts with more extra calls than one, as Runge-Kutta warm-ups do.
        """
        order, steps = self.scheduler.order, getattr(self.scheduler, "num_inference_steps", None)
        extra = 0 if steps is None else len(self.scheduler.timesteps) - order * steps
        if extra > 1:
            raise ValueError(
                f"{self.description} makes {extra} denoiser calls more than its {steps} steps: some of them begin no "
                "step, and which cannot be determined. Use DDIMScheduler or DPMSolverMultistepScheduler; with "
                "PNDMScheduler set `skip_prk_steps=True`."
            )
        last_of = {self.timesteps[call]: call for call in range(0, len(self.timesteps), order)}
        return sorted(last_of.values())


def sampler_of(recording: Recording) -> Sampler:
    """The sampler of a recorded pipeline call."""
    timesteps = [float(timestep) for timestep in recording.scheduler.timesteps]
    # Image-to-image starts in the midst of the scheduler's timesteps.
    first = timesteps.index(recording.first.timestep)
    return Sampler(recording.scheduler, timesteps[first:], recording.first.options)


@dataclass(frozen=True)
class KnownRun:
    """
    A trajectory of a scheduler on data with a known denoiser, see [`run_on_known_data`].

    Args:
        levels (`list[tuple[float, float]]`):
            Measured (alpha, sigma) of the state that enters each denoiser call, and of the final one.
        is_stochastic (`bool`):
            Whether the scheduler added noise.
    """

    levels: list[tuple[float, float]]
    is_stochastic: bool


# Elements enough for standard errors of 0.003 where noise is added; a deterministic sampler is measured exactly.
_SHAPE = (2, 3, 148, 148)
# Every consistent scheduler that was measured stays below 0.007, see docs/schedulers.md.
_LEVEL_TOLERANCE = 0.02


def check_sampler(sampler: Sampler, step_index: int, eta: float) -> None:
    """
    Refuse a sampler whose states are not at the noise levels of their timesteps, and warn of unexpected noise.

    Args:
        sampler ([`Sampler`]):
            From [`sampler_of`].
        step_index (`int`):
            Denoiser call that x_I enters; the number of calls is the final state.
        eta (`float`):
            The configured stochasticity.

    Raises:
        `ValueError`: as [`run_on_known_data`], or x_I of a deterministic sampler is not at its timestep's level.
    """
    known = run_on_known_data(sampler)
    is_intermediate = step_index < len(sampler.timesteps)
    _warn_of_noise(sampler, known.is_stochastic, is_intermediate, eta)
    if is_intermediate:
        _check_level(sampler, step_index, known)


def _check_level(sampler: Sampler, step_index: int, known: KnownRun) -> None:
    timestep, measured = sampler.timesteps[step_index], known.levels[step_index]
    expected = [value.item() for value in NoiseSchedule.from_scheduler(sampler.scheduler)(timestep)]
    error = max(abs(one - other) for one, other in zip(expected, measured, strict=True))
    if error <= _LEVEL_TOLERANCE:
        return
    found = (
        f"{sampler.description}: x_I enters the denoiser as timestep {timestep:g}, (alpha, sigma) = "
        f"({expected[0]:.3f}, {expected[1]:.3f}), but with an exact denoiser of constant data it lies at "
        f"({measured[0]:.3f}, {measured[1]:.3f})"
    )
    if not known.is_stochastic:
        raise ValueError(
            f"{found}: the scheduler steps to other levels than those of the denoiser's timesteps, by up to "
            f"{error:.2f} (at most {_LEVEL_TOLERANCE} is accepted). Use timestep_spacing 'leading' or 'trailing', or "
            "more steps, or DPMSolverMultistepScheduler."
        )
    warnings.warn(
        f"{found}: it adds more or less noise than such data ask for. If it has a `variance_type`, 'fixed_small' is "
        "exact there.",
        stacklevel=2,
    )


def _warn_of_noise(sampler: Sampler, is_stochastic: bool, is_intermediate: bool, eta: float) -> None:
    name = type(sampler.scheduler).__name__
    if is_stochastic and is_intermediate and eta == 0:
        warnings.warn(
            f"{name} adds noise at its steps, though sample_eta is 0: the final image is then no function of x_I, and "
            "part of the selection is lost. DDIMScheduler and DPMSolverMultistepScheduler are deterministic.",
            stacklevel=2,
        )
    if eta > 0 and "eta" not in sampler.options:
        warnings.warn(f"sample_eta={eta:g} has no effect: {name} takes no `eta`.", stacklevel=2)
    if is_stochastic and "generator" not in sampler.options:
        warnings.warn(
            f"The pipeline does not hand {name} the samples' generators: its noise depends on the batch and on the "
            "global random state, not on each sample's seed.",
            stacklevel=2,
        )


@torch.no_grad()
def run_on_known_data(sampler: Sampler) -> KnownRun:
    """
    Run the scheduler, without a model, on data that are always c, once for c = 1 and once for c = -1.

    The exact denoiser is given the timestep t and finds the noise `(x_t - alpha_t c) / sigma_t`. A trajectory that
    starts on the forward kernel stays on `x_t = alpha_t c + sigma_t noise` if the scheduler goes to the levels of
    its timesteps; so half the difference of the means is alpha and the standard deviation is sigma.

    Raises:
        `ValueError`: the scheduler is not supported, fails, or its states are not finite.
    """
    sampler.step_starts()  # raises where steps cannot be determined
    scheduler, device = copy.deepcopy(sampler.scheduler), sampler.scheduler.timesteps.device
    schedule = NoiseSchedule.from_scheduler(scheduler)
    kind = prediction_type_of(scheduler)
    scale_input = getattr(scheduler, "scale_model_input", lambda x, _: x)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, *_SHAPE[1:], generator=generator)
    noise = ((noise - noise.mean()) / noise.std(correction=0)).expand(_SHAPE).to(device)
    c = torch.tensor([1.0, -1.0], device=device).reshape(2, 1, 1, 1).expand(_SHAPE)
    options, untouched = _step_options(sampler, generator), generator.get_state()
    x = torch.empty(0)
    levels: list[tuple[float, float]] = []
    for t in scheduler.timesteps[-len(sampler.timesteps) :]:
        level = schedule(t)
        alpha, sigma = (expand(value, c) for value in level)
        if not levels:
            x = (alpha * c + sigma * noise) / scale_input(torch.ones_like(c), t)
        x_t = scale_input(x, t)
        levels.append(_level_of(x_t))
        prediction = combine(kind, c, (x_t - alpha * c) / sigma, *level)
        x = _step(sampler, scheduler, prediction, t, x, options)
    levels.append(_level_of(x))
    if not torch.tensor(levels).isfinite().all():
        raise ValueError(
            f"{sampler.description}: states are not finite even for a denoiser that is exact. An epsilon prediction "
            "says nothing about the data at pure noise (`rescale_betas_zero_snr=True`, alpha = 0): use a model and "
            "scheduler with prediction_type 'v_prediction', or betas without zero SNR."
        )
    return KnownRun(levels, not torch.equal(untouched, generator.get_state()))


def _step(
    sampler: Sampler,
    scheduler: Any,
    prediction: torch.Tensor,
    t: torch.Tensor,
    x: torch.Tensor,
    options: dict[str, Any],
) -> torch.Tensor:
    try:
        return scheduler.step(_with_variance(prediction, scheduler), t, x, **options)[0]
    except IndexError as error:
        raise ValueError(
            f"{sampler.description} fails in its step at timestep {float(t):g} ({error}), and so would the pipeline. "
            "Where its first noise levels are rounded to one timestep it starts at the second of them: use fewer "
            "steps, or other sigmas."
        ) from error


def _level_of(x: torch.Tensor) -> tuple[float, float]:
    positive, negative = x.double()
    variance = (positive.var(correction=0) + negative.var(correction=0)) / 2
    return (positive.mean() - negative.mean()).item() / 2, variance.sqrt().item()


def _step_options(sampler: Sampler, generator: torch.Generator) -> dict[str, Any]:
    takes_generator = "generator" in inspect.signature(sampler.scheduler.step).parameters
    return {**sampler.options, **({"generator": generator} if takes_generator else {}), "return_dict": False}


def _with_variance(prediction: torch.Tensor, scheduler: Any) -> torch.Tensor:
    """Where the scheduler expects a learned variance beside the prediction, the least one: that of known data."""
    if not str(scheduler.config.get("variance_type")).startswith("learned"):
        return prediction
    return torch.cat([prediction, -torch.ones_like(prediction)], dim=1)


def prediction_type_of(scheduler: Any) -> str:
    r"""
    What the denoiser of a diffusers scheduler predicts, one of `PREDICTION_TYPES`.

    Flow-matching schedulers do not say; theirs is `"flow_prediction"`.

    Raises:
        `ValueError`: the scheduler names another prediction type.
    """
    config = scheduler.config
    default = "flow_prediction" if hasattr(config, "shift") else None
    return check_prediction_type(getattr(config, "prediction_type", default), owner=type(scheduler).__name__)
