# SPDX-License-Identifier: Apache-2.0

"""
Map data back to noise by the exact inverse of the Euler sampler that a flow pipeline uses.

This is the first half of inverse noise correction (arXiv 2510.02692); `dataset.py` applies it to a data set.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..pipelines.denoiser_format import DenoiserFormat
from ..pipelines.placement import device_of
from .flow_sampler import FlowSampler, Velocity


ANDERSON_DEPTH = 8
ANDERSON_RIDGE = 1e-6


@dataclass(frozen=True)
class Inversion:
    """
    Result of [`invert_flow`]. Steps are in the sampler's order, from noise to data.

    Args:
        noise (`torch.Tensor` of shape `(B, ...)`):
            The state from which the sampler reaches the data, in the layout of the latents; float32 or better.
        residuals (`torch.Tensor` of shape `(steps, B)`, float64):
            Largest element of `|x_i + h_i v(x_i, s_i) - x_{i+1}|`, in units of the latents: by how much the sampler's
            own step from the state found misses the next state.
        iterations (`torch.Tensor` of shape `(steps, B)`, int64):
            Denoiser evaluations of each step and sample; a guided evaluation counts once.
    """

    noise: torch.Tensor
    residuals: torch.Tensor
    iterations: torch.Tensor


class InversionError(RuntimeError):
    """
    A step of the sampler could not be inverted for some samples.

    Args:
        step (`int`):
            Index of the step in the sampler's order, from noise to data.
        residual (`float`):
            Largest residual of the step over its samples, in units of the latents.
        samples (`torch.Tensor` of shape `(U,)`, int64):
            Rows of the batch whose samples did not converge.
        count (`int`):
            Number of samples in the batch, for the message.
        allowed (`float`):
            Residual that a step may have: its share of the tolerance, for the message.
    """

    def __init__(self, step: int, residual: float, samples: torch.Tensor, count: int, allowed: float):
        self.step, self.residual, self.samples = step, residual, samples
        super().__init__(
            f"invert_flow: {len(samples)} of {count} samples did not converge at step {step}: residual "
            f"{residual:.3g}, a step's share of the tolerance {allowed:.3g}. Raise max_iterations, use more sampling "
            "steps (a shorter step is easier to invert), or a tolerance that the model's precision can reach."
        )


@torch.no_grad()
def invert_flow(
    model: DiffusionPipeline | Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    latents: torch.Tensor,
    *,
    sigmas: Sequence[float] | None = None,
    prompts: Sequence[str] | None = None,
    pipeline_kwargs: dict[str, Any] | None = None,
    guided: bool = False,
    denoiser_format: type[DenoiserFormat] | None = None,
    tolerance: float = 1e-4,
    max_iterations: int = 200,
) -> Inversion:
    """
    Find the noise from which the Euler sampler in use reaches the data.

    The sampler's step is `x_{i+1} = x_i + h_i v(x_i, s_i)`. Each step is inverted exactly, not by a step of the
    reversed ODE: given x_{i+1}, the equation `x_i = x_{i+1} - h_i v(x_i, s_i)` is solved by fixed-point iteration with
    Anderson's acceleration. The solution is unique where `|h_i|` times the Lipschitz constant of v is below 1. The
    method is the inversion of inverse noise correction (arXiv 2510.02692).

    Args:
        model (`DiffusionPipeline` or `Callable`):
            A flow pipeline, whose own timesteps and step sizes are inverted, or a velocity `v(x, sigma)` of x of shape
            `(B, ...)` and sigma of shape `(B,)`, both of the dtype of `latents`.
        latents (`torch.Tensor` of shape `(B, ...)`):
            Data in the layout that the pipeline returns with `output_type="latent"` (scaled, shifted and packed).
        sigmas (`Sequence[float]`, *optional*):
            Noise levels of a callable's sampler, from noise to data, the last one included: `n + 1` values for `n`
            steps. Needed for a callable, and refused for a pipeline.
        prompts (`Sequence[str]`, *optional*):
            One prompt for each sample; empty prompts where not given.
        pipeline_kwargs (`dict`, *optional*):
            Arguments of the pipeline call whose sampler is inverted, such as `num_inference_steps`, `height` and
            `width`. The pipeline's own defaults hold for those that are not given.
        guided (`bool`, *optional*, defaults to `False`):
            Invert the sampler with the classifier-free guidance that `pipeline_kwargs` ask for. By default the
            velocity is that of the conditional branch alone, whatever `pipeline_kwargs` say. An embedded guidance, as
            Flux has, is always kept.
        denoiser_format (`type`, *optional*):
            Subclass of [`DenoiserFormat`] for a denoiser whose arguments or output the default does not read.
        tolerance (`float`, *optional*, defaults to `1e-4`):
            Largest sum over the steps of a sample's residuals, in units of the latents: the errors of steps add up.
            Each step may have an equal share.
        max_iterations (`int`, *optional*, defaults to `200`):
            Largest number of denoiser evaluations of one step for a sample.

    Returns:
        [`Inversion`]: noise, residuals and iterations of the `B` samples.

    Raises:
        `ValueError`: an argument does not fit, or the scheduler's step is not Euler's.
        [`InversionError`]: a step did not converge for some samples.
    """
    _check_arguments(model, latents, sigmas, prompts, tolerance, max_iterations)
    if sigmas is not None:
        levels = [float(sigma) for sigma in sigmas]

        def at_step(x: torch.Tensor, step: int, rows: torch.Tensor) -> torch.Tensor:
            return model(x, torch.full((len(x),), levels[step], dtype=x.dtype, device=x.device))

        return invert(
            at_step,
            [after - before for before, after in zip(levels[:-1], levels[1:], strict=True)],
            latents,
            tolerance,
            max_iterations,
        )[0]
    sampler = FlowSampler(model, pipeline_kwargs or {}, guided, denoiser_format)
    sampler.check_shape(latents)
    velocity = sampler.velocity(sampler.record(list(prompts) if prompts is not None else [""] * len(latents)))
    return invert(velocity, sampler.steps, latents.to(device_of(model)), tolerance, max_iterations)[0]


def invert(
    velocity: Velocity,
    steps: Sequence[float],
    latents: torch.Tensor,
    tolerance: float,
    max_iterations: int,
    leave_out: Callable[[InversionError], None] | None = None,
) -> tuple[Inversion, torch.Tensor]:
    """
    Invert the steps `x_{i+1} = x_i + h_i v(x_i, s_i)` of an Euler sampler, the last one first.

    Args:
        velocity (`Callable`):
            Maps `(x, i, rows)` to v(x, s_i), of the shape of x, where x holds the states of the samples `rows`.
        steps (`Sequence[float]`):
            Step sizes h_i from noise to data, negative where the noise level falls.
        latents (`torch.Tensor` of shape `(B, ...)`):
            The states after the last of these steps.
        tolerance (`float`):
            Largest sum over the steps of a sample's residuals, in units of the latents.
        max_iterations (`int`):
            Largest number of evaluations of a step for a sample.
        leave_out (`Callable[[InversionError], None]`, *optional*):
            Called where samples did not converge. If it returns, the others go on without them. Where it is not given,
            the error is raised.

    Returns:
        `tuple[Inversion, torch.Tensor]`: the inversion of the samples that converged, and which these are, of shape
            `(U,)`.

    Raises:
        [`InversionError`]: a step did not converge for some samples, and they are not left out.
    """
    x, rows = latents.to(torch.promote_types(latents.dtype, torch.float32)), torch.arange(len(latents))
    residuals = torch.zeros(len(steps), len(x), dtype=torch.float64)
    iterations, allowed = torch.zeros(len(steps), len(x), dtype=torch.int64), tolerance / len(steps)
    for step in reversed(range(len(steps))):
        if not len(rows):
            break
        x, residual, iterations[step, rows] = invert_step(
            velocity, steps[step], step, x, rows, allowed, max_iterations
        )
        residuals[step, rows], converged = residual, residual <= allowed
        if not converged.all():
            error = InversionError(step, residual.max().item(), rows[~converged], len(latents), allowed)
            if leave_out is None:
                raise error
            leave_out(error)
            x, rows = x[converged.to(x.device)], rows[converged]
    return Inversion(x, residuals[:, rows], iterations[:, rows]), rows


def invert_step(
    velocity: Velocity,
    step_size: float,
    step: int,
    target: torch.Tensor,
    rows: torch.Tensor,
    tolerance: float,
    max_iterations: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Solve `x + h v(x, s_i) = target` for x. Samples that have converged are not computed again.

    Args:
        velocity (`Callable`):
            See [`invert`].
        step_size (`float`):
            The step size h.
        step (`int`):
            Index i of the step.
        target (`torch.Tensor` of shape `(B, ...)`):
            States after the step.
        rows (`torch.Tensor` of shape `(B,)`, int64):
            Which samples these are.
        tolerance (`float`):
            Largest residual, in units of the latents.
        max_iterations (`int`):
            Largest number of evaluations for a sample.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: the x of least residual, of the shape of `target`, and
            residuals and iterations of shape `(B,)` on the CPU.
    """
    best, residual = target.clone(), torch.full((len(target),), math.inf, dtype=torch.float64)
    iterations, active = torch.zeros(len(target), dtype=torch.int64), torch.arange(len(target))
    x, history = target, list[tuple[torch.Tensor, torch.Tensor]]()
    for _ in range(max_iterations):
        on_device = active.to(target.device)
        defect = target[on_device] - step_size * velocity(x, step, rows[active]) - x
        found = defect.abs().flatten(1).amax(1).cpu().double()
        better = found < residual[active]
        residual[active[better]] = found[better]
        best[on_device[better.to(target.device)]] = x[better.to(target.device)]
        iterations[active] += 1
        going = (found > tolerance) & found.isfinite()
        if not going.any():
            break
        active, kept = active[going], going.to(target.device)
        history = [(states[kept], defects[kept]) for states, defects in [*history, (x, defect)][-ANDERSON_DEPTH:]]
        x = _anderson(history)
    return best, residual, iterations


def _anderson(history: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """
    Next state of a fixed-point iteration by Anderson's acceleration (1965), each sample for itself.

    With the defects `f_j = g(x_j) - x_j` of the last states, the weights w minimise `|sum_j w_j f_j|^2` under the
    constraint `sum_j w_j = 1`, and the next state is `sum_j w_j (x_j + f_j)`: the constrained form in Walker and Ni
    (2011), Anderson acceleration for fixed-point iterations.
    """
    states, defects = (torch.stack(parts, dim=1) for parts in zip(*history, strict=True))
    flat = defects.flatten(2)
    # Of a few states each: solved on the host, because not every device has float64.
    products = (flat @ flat.mT).cpu().double()
    # Defects become nearly parallel; without the ridge their weights would be large and cancel.
    ridge = ANDERSON_RIDGE * products.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-300)
    system = products + ridge[:, None, None] * torch.eye(len(history), dtype=torch.float64)
    weights = torch.linalg.solve(system, torch.ones_like(system[:, :, :1]))
    weights = (weights / weights.sum(1, keepdim=True)).to(states)
    return (weights.reshape(*weights.shape[:2], *[1] * (states.ndim - 2)) * (states + defects)).sum(1)


def _check_arguments(
    model: DiffusionPipeline | Callable[..., torch.Tensor],
    latents: torch.Tensor,
    sigmas: Sequence[float] | None,
    prompts: Sequence[str] | None,
    tolerance: float,
    max_iterations: int,
) -> None:
    if hasattr(model, "scheduler") == (sigmas is not None):
        raise ValueError("sigmas: needed for a callable velocity; a pipeline brings its own.")
    if sigmas is not None and len(sigmas) < 2:
        raise ValueError(f"sigmas: at least two noise levels make a step; got {len(sigmas)}.")
    if prompts is not None and len(prompts) != len(latents):
        raise ValueError(f"prompts: one for each of the {len(latents)} latents is needed; got {len(prompts)}.")
    if not latents.isfinite().all():
        raise ValueError("latents: some values are not finite.")
    if tolerance <= 0 or max_iterations < 1:
        raise ValueError(f"tolerance and max_iterations must be positive; got {tolerance} and {max_iterations}.")
