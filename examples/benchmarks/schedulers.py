# SPDX-License-Identifier: Apache-2.0

"""
The schedulers that are tested, and what is measured of each with exact denoisers: the tables of docs/schedulers.md.

    python -m examples.benchmarks.schedulers

A scheduler is run alone, without a model. Data that are always c tell at which noise level its states lie; a mixture
of two Gaussians in one dimension, of weights 0.2 and 0.8 for the tuned model and 0.5 and 0.5 for the reference, tells
what the switch between them gives.
"""

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from trl_pgraft import GraftConfig
from trl_pgraft.core.noise_schedules import NoiseSchedule
from trl_pgraft.core.parameterizations import combine
from trl_pgraft.pipelines.schedulers import Sampler, prediction_type_of, run_on_known_data
from trl_pgraft.pipelines.timesteps import tuned_levels


BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
SPACINGS = ("leading", "linspace", "trailing")
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


@dataclass(frozen=True)
class Case:
    """
    A scheduler as it is tested.

    Args:
        kind (`type`):
            diffusers' class.
        options (`dict`):
            Its configuration, without the timestep spacing.
        spacings (`tuple`, *optional*):
            Timestep spacings that it has; `None` is its own.
        is_stochastic (`bool`, *optional*, defaults to `False`):
            Whether it adds noise.
        is_rounded (`bool`, *optional*, defaults to `False`):
            Whether its noise levels are no whole timesteps, while it tells the denoiser whole ones.
    """

    kind: type
    options: dict[str, Any] = field(default_factory=dict)
    spacings: tuple[str | None, ...] = (None,)
    is_stochastic: bool = False
    is_rounded: bool = False

    @property
    def is_flow(self) -> bool:
        return "flow" in str(self.options.get("prediction_type")) or self.kind.__name__.startswith("FlowMatch")

    def make(self, spacing: str | None = None, **options: Any) -> Any:
        """The scheduler."""
        betas = {} if self.is_flow else BETAS
        spaced = {} if spacing is None else {"timestep_spacing": spacing, "steps_offset": 1}
        return self.kind(**{**betas, **spaced, **self.options, **options})


_SDE = {"algorithm_type": "sde-dpmsolver++"}
_UNCLIPPED = {"clip_sample": False}

CASES = {
    "DDIM": Case(DDIMScheduler, _UNCLIPPED, ("leading", "trailing")),
    "DDIM, zero SNR": Case(DDIMScheduler, {**_UNCLIPPED, **ZERO_SNR}, ("trailing",)),
    "DDPM": Case(DDPMScheduler, _UNCLIPPED, SPACINGS, is_stochastic=True),
    "DPM++": Case(DPMSolverMultistepScheduler, {}, SPACINGS),
    "DPM++ to sigma_min, order kept": Case(
        DPMSolverMultistepScheduler, {"final_sigmas_type": "sigma_min", "lower_order_final": False}, SPACINGS
    ),
    "DPM++, zero SNR": Case(DPMSolverMultistepScheduler, ZERO_SNR, ("trailing",)),
    "DPM++ Karras": Case(DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, is_rounded=True),
    "DPM++ exponential": Case(DPMSolverMultistepScheduler, {"use_exponential_sigmas": True}, is_rounded=True),
    "DPM++ beta": Case(DPMSolverMultistepScheduler, {"use_beta_sigmas": True}, is_rounded=True),
    "DPM++ SDE": Case(DPMSolverMultistepScheduler, _SDE, SPACINGS, is_stochastic=True),
    "DPM++ SDE Karras": Case(
        DPMSolverMultistepScheduler, {**_SDE, "use_karras_sigmas": True}, is_stochastic=True, is_rounded=True
    ),
    "UniPC": Case(UniPCMultistepScheduler, {}, SPACINGS),
    "UniPC Karras": Case(UniPCMultistepScheduler, {"use_karras_sigmas": True}, is_rounded=True),
    "Euler": Case(EulerDiscreteScheduler, {}, SPACINGS),
    "Euler, zero SNR": Case(EulerDiscreteScheduler, ZERO_SNR, ("trailing",)),
    "Euler Karras": Case(EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "Euler ancestral": Case(EulerAncestralDiscreteScheduler, {}, SPACINGS, is_stochastic=True),
    "Heun": Case(HeunDiscreteScheduler, {}, SPACINGS),
    "Heun Karras": Case(HeunDiscreteScheduler, {"use_karras_sigmas": True}),
    "PNDM": Case(PNDMScheduler, {"skip_prk_steps": True}, ("leading", "trailing")),
    "LCM": Case(LCMScheduler, {}, is_stochastic=True),
    "flow Euler": Case(FlowMatchEulerDiscreteScheduler),
    "flow Euler, shift 3": Case(FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    "flow Euler, dynamic shift": Case(FlowMatchEulerDiscreteScheduler, {"use_dynamic_shifting": True}),
    "flow Euler, stochastic": Case(
        FlowMatchEulerDiscreteScheduler, {"shift": 3.0, "stochastic_sampling": True}, is_stochastic=True
    ),
    "flow Heun, shift 3": Case(FlowMatchHeunDiscreteScheduler, {"shift": 3.0}),
    "flow DPM++": Case(DPMSolverMultistepScheduler, FLOW_SIGMAS, is_rounded=True),
    "flow UniPC": Case(UniPCMultistepScheduler, FLOW_SIGMAS, is_rounded=True),
}


MEANS, STD = (-1.0, 1.0), 0.3
TUNED, REFERENCE = (0.2, 0.8), (0.5, 0.5)
SAMPLES = 20_000
FINE = {False: Case(DDIMScheduler, _UNCLIPPED), True: Case(FlowMatchEulerDiscreteScheduler, {"shift": 3.0})}


def sampler_with(case: Case, spacing: str | None, steps: int, **options: Any) -> Sampler:
    """The scheduler as a pipeline would set it; a dynamic shift as for images of 1,024 x 1,024."""
    scheduler = case.make(spacing, **options)
    scheduler.set_timesteps(steps, **({"mu": 1.15} if scheduler.config.get("use_dynamic_shifting") else {}))
    return Sampler(scheduler, [float(t) for t in scheduler.timesteps], {})


def level_error(case: Case, spacing: str | None, steps: int) -> float:
    """The largest difference in alpha or sigma between a state that may be x_I and its timestep; nan: it fails."""
    sampler = sampler_with(case, spacing, steps)
    schedule = NoiseSchedule.from_scheduler(sampler.scheduler)
    try:
        known = run_on_known_data(sampler)
    except ValueError:
        return math.nan
    errors = [
        max(abs(one.item() - other) for one, other in zip(schedule(t), level, strict=True))
        for t, level in zip(sampler.timesteps, known.levels, strict=False)
    ]
    return max(errors[start] for start in sampler.step_starts())


def exact_prediction(kind: str, x_t: torch.Tensor, level: tuple[torch.Tensor, ...], weights: tuple) -> torch.Tensor:
    """What an exact denoiser predicts of the mixture with these weights."""
    alpha, sigma = level
    means, variance = alpha * torch.tensor(MEANS, dtype=torch.float64), sigma**2 + (alpha * STD) ** 2
    log_weights = torch.tensor(weights).log() - (x_t - means).square() / (2 * variance)
    mean = (log_weights.softmax(1) * means).sum(1, keepdim=True)
    offset = (x_t - mean) / variance
    x_0 = mean / alpha if alpha > 0 else torch.full_like(mean, sum(m * w for m, w in zip(MEANS, weights, strict=True)))
    return combine(kind, x_0 + alpha * STD**2 * offset, sigma * offset, alpha, sigma)


def walk(
    sampler: Sampler, x_t: torch.Tensor, weights: Callable[[float], tuple], begin: int = 0
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run the scheduler from the state x_t of call `begin`; the final states and those that entered each call."""
    scheduler, states = copy.deepcopy(sampler.scheduler), []
    schedule, kind = NoiseSchedule.from_scheduler(scheduler), prediction_type_of(scheduler)
    scale = getattr(scheduler, "scale_model_input", lambda x, _: x)
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": torch.Generator().manual_seed(1)} if takes_generator else {}
    timesteps = scheduler.timesteps[begin:]
    x = x_t / scale(torch.ones_like(x_t), timesteps[0])
    for t in timesteps:
        states.append(scale(x, t))
        if getattr(scheduler, "state_in_first_order", True):  # as the gate does
            model = weights(float(t))
        prediction = exact_prediction(kind, states[-1], schedule(t), model)
        x = scheduler.step(prediction, t, x, return_dict=False, **options)[0]
    return x, states


def noisiest(sampler: Sampler, weights: tuple) -> torch.Tensor:
    """States of the mixture at the sampler's first timestep, (SAMPLES, 1)."""
    generator = torch.Generator().manual_seed(0)
    upper = torch.rand(SAMPLES, 1, generator=generator, dtype=torch.float64) < weights[1]
    noise, spread = torch.randn(2, SAMPLES, 1, generator=generator, dtype=torch.float64)
    x_0 = torch.where(upper, MEANS[1], MEANS[0]) + STD * spread
    alpha, sigma = NoiseSchedule.from_scheduler(sampler.scheduler)(sampler.timesteps[0])
    return alpha * x_0 + sigma * noise


def upper_share(x: torch.Tensor) -> float:
    return (x > 0).double().mean().item()


def gate_row(case: Case, spacing: str | None) -> list[str]:
    """Share of the upper component: tuned throughout, gated by an exact sampler and by this one; restart."""
    sampler = sampler_with(case, spacing, 10)
    levels, switch = tuned_levels(GraftConfig(tuned_fraction=0.5), sampler)
    fine_options = {} if case.is_flow else {k: v for k, v in case.options.items() if k in ZERO_SNR}
    fine = sampler_with(FINE[case.is_flow], None, 1000, **fine_options)

    def gated(boundary: float) -> Callable[[float], tuple]:
        return lambda t: TUNED if t > boundary else REFERENCE

    shares = [
        upper_share(walk(sampler, noisiest(sampler, TUNED), lambda _: TUNED)[0]),
        upper_share(walk(fine, noisiest(fine, TUNED), gated(switch.state_timestep))[0]),
        upper_share(walk(sampler, noisiest(sampler, TUNED), gated(switch.switch_timestep))[0]),
    ]
    end, states = walk(sampler, noisiest(sampler, REFERENCE), lambda _: REFERENCE)
    if case.is_stochastic:
        return [*(f"{share:.3f}" for share in shares), "", ""]
    again, _ = walk(sampler, states[levels.step_index], lambda _: REFERENCE, levels.step_index)
    moved = (again - end).square().mean().sqrt().item()
    flipped = ((again > 0) != (end > 0)).double().mean().item()
    return [*(f"{share:.3f}" for share in shares), f"{moved:.4f}", f"{100 * flipped:.2f}%"]


def level_row(case: Case, spacing: str | None) -> list[str]:
    """Level errors; then x_I's call, and the noise around the switch with the same and other numbers of steps."""
    errors = [f"{level_error(case, spacing, steps):.4f}" for steps in (4, 10, 30, 50)]
    sampler = sampler_with(case, spacing, 10)
    levels, switch = tuned_levels(GraftConfig(tuned_fraction=0.5), sampler)
    around = [str(levels.step_index), f"{levels.schedule(switch.switch_timestep)[1].item():.3f}"]
    for steps in (10, 4, 25):
        other = sampler_with(case, spacing, steps)
        begins = other.timesteps[:: other.scheduler.order]
        tuned = sum(t > switch.switch_timestep for t in begins)
        last, first = (levels.schedule(t)[1].item() for t in (begins[tuned - 1], begins[tuned]))
        around.append(f"{tuned * other.scheduler.order} of {len(other.timesteps)}: {last:.3f} / {first:.3f}")
    return errors + around


def print_table(header: list[str], row: Callable[[Case, str | None], list[str]], cases: dict[str, Case]) -> None:
    print("| " + " | ".join(["scheduler", "spacing", *header]) + " |")
    print("| --- | --- |" + " --: |" * len(header))
    for name, case in cases.items():
        for spacing in case.spacings:
            print("| " + " | ".join([name, spacing or "", *row(case, spacing)]) + " |")
    print()


def inconsistent_row(case: Case, spacing: str | None) -> list[str]:
    return [f"{level_error(case, spacing, steps):.3f}" for steps in (4, 10, 20, 30, 50, 100)]


def main() -> None:
    levels = ["error 4", "10", "30", "50", "x_I", "switch", "10 steps", "4", "25"]
    print_table(levels, level_row, CASES)
    inconsistent = {
        "DDIM": Case(DDIMScheduler, _UNCLIPPED, ("linspace",)),
        "PNDM": Case(PNDMScheduler, {"skip_prk_steps": True}, ("linspace",)),
        "DDPM, fixed_large": Case(DDPMScheduler, {**_UNCLIPPED, "variance_type": "fixed_large"}, SPACINGS),
    }
    print_table(["4", "10", "20", "30", "50", "100"], inconsistent_row, inconsistent)
    print_table(["tuned", "gated, exact", "gated", "moved", "changed side"], gate_row, CASES)


if __name__ == "__main__":
    main()
