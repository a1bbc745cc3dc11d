# SPDX-License-Identifier: Apache-2.0

"""Map data back to noise by the exact inverse of the Euler sampler that a flow pipeline uses."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..core.losses import guided as combine_branches
from ..core.noise_schedules import NoiseSchedule
from ..pipelines.conditioning import Conditioning, record_conditioning
from ..pipelines.denoiser_call import DenoiserCall, denoiser_of, replay
from ..pipelines.denoiser_format import DenoiserFormat
from ..pipelines.introspection import introspect_denoiser_call
from ..pipelines.observe import calls_of_first_step
from ..pipelines.placement import device_of
from ..pipelines.schedulers import Sampler, sampler_of
from ..pipelines.tree import put_on


ANDERSON_DEPTH = 8
ANDERSON_RIDGE = 1e-6
ROUNDING = 1e-5  # of noise levels, which are sums of float32 step sizes
Velocity = Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Inversion:
    """
    What [`invert_flow`] found; steps are in the sampler's order, from noise to data.

    Args:
        noise (`torch.Tensor` of shape `(B, ...)`):
            The state from which the sampler reaches the data.
        residuals (`torch.Tensor` of shape `(steps, B)`, float64):
            Largest element of `|x_i + h_i v(x_i, s_i) - x_{i+1}|`: by how much the sampler's own step from the state
            found misses the next.
        iterations (`torch.Tensor` of shape `(steps, B)`, int64):
            Denoiser evaluations of each step and sample; a guided one counts once.
    """

    noise: torch.Tensor
    residuals: torch.Tensor
    iterations: torch.Tensor


class InversionError(RuntimeError):
    """
    A step of the sampler could not be inverted.

    Attributes:
        step (`int`):
            Index of the step in the sampler's order.
        residual (`float`):
            Largest residual of its samples.
        samples (`torch.Tensor` of shape `(U,)`, int64):
            Which samples of the batch did not converge.
    """

    def __init__(self, step: int, residual: float, samples: torch.Tensor, count: int, allowed: float):
        self.step, self.residual, self.samples = step, residual, samples
        super().__init__(
            f"invert_flow: {len(samples)} of {count} samples did not converge at step {step}: residual "
            f"{residual:.3g}, a step's share of the tolerance {allowed:.3g}. Raise max_iterations, use more sampling "
            "steps (a shorter step is easier to invert), or a tolerance that the model's precision can reach."
        )


@dataclass(frozen=True)
class EulerField:
    """
    An Euler sampler `x_{i+1} = x_i + h_i v(x_i, s_i)`.

    Args:
        steps (`Sequence[float]`):
            h_i, negative where the noise level falls.
        velocity (`Callable`):
            `(x, i, rows)` to v(x, s_i) of the samples `rows`, of the shape of x.
    """

    steps: Sequence[float]
    velocity: Velocity


@torch.no_grad()
def invert_flow(
    model: Any,
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

    Each step is inverted exactly, not by a step of the reversed ODE: given x_{i+1}, the equation
    `x_i = x_{i+1} - h_i v(x_i, s_i)` is solved by fixed point with Anderson's acceleration. For `|h_i|` times the
    Lipschitz constant of v below 1 the solution is unique.

    Args:
        model (`DiffusionPipeline` or `Callable`):
            A pipeline, asked for its own timesteps and step sizes, or `v(x, sigma)` of x of shape `(B, ...)` and sigma
            of shape `(B,)`, of the dtype of x.
        latents (`torch.Tensor` of shape `(B, ...)`):
            Data in the layout that the pipeline returns with `output_type="latent"` (scaled, shifted and packed).
        sigmas (`Sequence[float]`, *optional*):
            Noise levels of a callable's sampler, from noise to data, the last one included.
        prompts (`Sequence[str]`, *optional*):
            One for each sample; empty where not given.
        pipeline_kwargs (`dict`, *optional*):
            Arguments of the pipeline call whose sampler is inverted: `num_inference_steps`, `height`, `width`, ...
        guided (`bool`, *optional*, defaults to `False`):
            Invert the sampler with the classifier-free guidance that `pipeline_kwargs` ask for. Otherwise the
            conditional branch alone is the velocity, whatever they say; an embedded guidance is always kept.
        denoiser_format (`type`, *optional*):
            Subclass of [`DenoiserFormat`] for a denoiser that the default does not serve.
        tolerance (`float`, *optional*, defaults to `1e-4`):
            Largest sum over the steps of an element's residual, in units of the latents: the errors of steps add up.
            Each step is allowed an equal share.
        max_iterations (`int`, *optional*, defaults to `200`):
            Denoiser evaluations of a step.

    Returns:
        [`Inversion`].

    Raises:
        `ValueError`: an argument does not fit, or the scheduler's step is not Euler's.
        [`InversionError`]: a step did not converge.
    """
    _check_arguments(model, latents, sigmas, prompts, tolerance, max_iterations)
    if sigmas is not None:
        return invert(_field_of_callable(model, sigmas), latents, tolerance, max_iterations)[0]
    sampler = FlowSampler.of(model, pipeline_kwargs or {}, guided, denoiser_format)
    sampler.check_shape(latents)
    conditioning = sampler.record(list(prompts) if prompts is not None else [""] * len(latents))
    return invert(sampler.field(conditioning), latents.to(device_of(model)), tolerance, max_iterations)[0]


def invert(
    field: EulerField,
    latents: torch.Tensor,
    tolerance: float,
    max_iterations: int,
    leave_out: Callable[[InversionError], None] | None = None,
) -> tuple[Inversion, torch.Tensor]:
    """
    Invert every step of a sampler; further arguments and errors are those of [`invert_flow`].

    Args:
        leave_out (`Callable[[InversionError], None]`, *optional*):
            Called where samples did not converge; if it returns, the others go on without them.

    Returns:
        `tuple`: [`Inversion`] of the samples that converged, and which these are, shape `(U,)`.
    """
    x, rows = latents.to(torch.promote_types(latents.dtype, torch.float32)), torch.arange(len(latents))
    residuals, iterations = torch.empty(0, len(x), dtype=torch.float64), torch.empty(0, len(x), dtype=torch.int64)
    allowed = tolerance / len(field.steps)
    for step in reversed(range(len(field.steps))):
        x, residual, count = invert_step(field, x, step, rows, allowed, max_iterations)
        residuals, iterations = torch.cat([residual[None], residuals]), torch.cat([count[None], iterations])
        converged = residual <= allowed
        if not converged.all():
            error = InversionError(step, residual.max().item(), rows[~converged], len(latents), allowed)
            if leave_out is None:
                raise error
            leave_out(error)
            x, rows = x[converged.to(x.device)], rows[converged]
            residuals, iterations = residuals[:, converged], iterations[:, converged]
        if not len(rows):
            break
    return Inversion(x, residuals, iterations), rows


def invert_step(
    field: EulerField, target: torch.Tensor, step: int, rows: torch.Tensor, tolerance: float, max_iterations: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Solve `x + h v(x) = target` for x of the samples `rows`, to a residual of `tolerance`; converged samples are not
    computed again.

    Returns:
        `tuple`: the best x found, of the shape of `target`, and its residuals and iterations of shape `(B,)` on the
            CPU.
    """
    best, residual = target.clone(), torch.full((len(target),), math.inf, dtype=torch.float64)
    iterations, active = torch.zeros(len(target), dtype=torch.int64), torch.arange(len(target))
    x, history = target, []
    for _ in range(max_iterations):
        on_device = active.to(target.device)
        defect = target[on_device] - field.steps[step] * field.velocity(x, step, rows[active]) - x
        found = defect.abs().double().flatten(1).amax(1).cpu()
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
    Next state of a fixed-point iteration by Anderson's acceleration, each sample for itself.

    The last states with their defects are combined, with weights that sum to 1, so that the combined defect is least.
    """
    states, defects = (torch.stack(parts, dim=1) for parts in zip(*history, strict=True))
    flat = defects.flatten(2)
    products = (flat @ flat.mT).double()
    # Defects become nearly parallel; without the ridge their weights would be large and cancel.
    ridge = ANDERSON_RIDGE * products.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-300)
    system = products + ridge[:, None, None] * torch.eye(len(history), dtype=torch.float64, device=flat.device)
    weights = torch.linalg.solve(system, torch.ones_like(system[:, :, :1]))
    weights = (weights / weights.sum(1, keepdim=True)).to(states.dtype)
    return (weights.reshape(*weights.shape[:2], *[1] * (states.ndim - 2)) * (states + defects)).sum(1)


@dataclass(frozen=True)
class FlowSampler:
    """
    The Euler sampler that a pipeline call with certain arguments runs.

    Args:
        pipeline (`DiffusionPipeline`):
            The pipeline.
        kwargs (`dict`):
            Arguments of the call.
        call ([`DenoiserCall`]):
            How it calls its denoiser.
        sampler ([`Sampler`]):
            Its scheduler.
        steps (`Sequence[float]`):
            Step sizes h_i.
        like (`torch.Tensor` of shape `(1, ...)`):
            Latents as the denoiser gets them.
        guided (`bool`):
            Whether the velocity is the guided one; otherwise that of the conditional branch.
    """

    pipeline: Any
    kwargs: dict[str, Any]
    call: DenoiserCall
    sampler: Sampler
    steps: Sequence[float]
    like: torch.Tensor
    guided: bool

    @classmethod
    def of(
        cls, pipeline: Any, kwargs: dict[str, Any], guided: bool, denoiser_format: type[DenoiserFormat] | None = None
    ) -> "FlowSampler":
        """Ask a pipeline; arguments and errors as those of [`invert_flow`]."""
        sampler = sampler_of(pipeline, kwargs)
        steps = euler_steps(sampler)
        call = introspect_denoiser_call(pipeline, kwargs, denoiser_format)
        if guided and not (call.is_guided and call.guidance_scale is not None):
            raise ValueError(
                f"guided=True: {type(pipeline).__name__} with these pipeline_kwargs does not guide by u + w (c - u). "
                "Ask for guidance in pipeline_kwargs, or leave `guided` out."
            )
        like = call.format.latents(calls_of_first_step(pipeline, 1, [""], kwargs)[0])[:1]
        return cls(pipeline, kwargs, call, sampler, steps, like, guided)

    @property
    def levels(self) -> list[float]:
        """The sigma that each step ends at."""
        last = float(self.sampler.scheduler.sigmas[-1])
        return [last - sum(self.steps[step + 1 :]) for step in range(len(self.steps))]

    def steps_down_to(self, sigma: float) -> int:
        """How many of the steps end at the noise level `sigma` or above."""
        return sum(level >= sigma - ROUNDING for level in self.levels)

    def check_shape(self, latents: torch.Tensor) -> None:
        """Refuse latents that the denoiser would not be given."""
        if self.like.shape[1:] != latents.shape[1:]:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, but {type(self.pipeline).__name__} with these "
                f"pipeline_kwargs denoises (B, {', '.join(map(str, self.like.shape[1:]))}). Set height and width, and "
                "pass latents as it returns them with output_type='latent'."
            )

    def record(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning of `prompts`, in the call that this sampler makes."""
        return record_conditioning(self.pipeline, self.call, prompts, self.kwargs)

    def field(self, conditioning: Conditioning) -> EulerField:
        """The sampler's steps for samples with the rows of `conditioning`."""
        denoiser, call, scale = denoiser_of(self.pipeline), self.call, self.call.guidance_scale
        branches = {"conditional": conditioning.conditional, "unconditional": conditioning.unconditional}
        conditioning = replace(conditioning, **{n: put_on(b, self.like.device) for n, b in branches.items()})

        def velocity(x: torch.Tensor, step: int, rows: torch.Tensor) -> torch.Tensor:
            timesteps = torch.full((len(x),), self.sampler.timesteps[step], dtype=torch.float64)
            x_t = x.to(self.like.dtype)

            def branch(unconditional: bool) -> torch.Tensor:
                return replay(denoiser, call, x_t, timesteps, conditioning.rows(rows, x.device, unconditional))

            found = combine_branches(branch(True), branch(False), scale) if self.guided else branch(False)
            return found.to(x.dtype)

        return EulerField(self.steps, velocity)


def euler_steps(sampler: Sampler) -> list[float]:
    """
    Step sizes h_i of a scheduler whose step is `x + h_i v`, measured on a copy of it.

    Raises:
        `ValueError`: it is not a flow scheduler, or its step is another: of higher order, with memory, or with noise.
    """
    count, is_flow = len(sampler.timesteps), NoiseSchedule.from_scheduler(sampler.scheduler).is_flow
    ones, zeros = torch.ones(count, 4), torch.zeros(count, 4)
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, count, 4, generator=generator)
    steps = _results(sampler, zeros, ones)[:, :1].double()
    found = _results(sampler, x, v).double()
    if not is_flow or not torch.allclose(found, x.double() + steps * v.double(), rtol=1e-5, atol=1e-5):
        raise ValueError(
            f"invert_flow: {sampler.description} does not step as x + h v, so it is no Euler sampler of a flow. Use "
            "FlowMatchEulerDiscreteScheduler without `stochastic_sampling`."
        )
    return steps.flatten().tolist()


def _results(sampler: Sampler, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """What the scheduler makes of state `x[i]` and model output `v[i]` at its i-th step."""
    scheduler, results = copy.deepcopy(sampler.scheduler), []
    timesteps = scheduler.timesteps[-len(sampler.timesteps) :]
    for t, state, output in zip(timesteps, x.to(timesteps.device), v.to(timesteps.device), strict=True):
        results.append(scheduler.step(output[None], t, state[None], return_dict=False)[0][0].cpu())
    return torch.stack(results)


def _field_of_callable(velocity: Callable[..., torch.Tensor], sigmas: Sequence[float]) -> EulerField:
    levels = [float(sigma) for sigma in sigmas]

    def at_step(x: torch.Tensor, step: int, rows: torch.Tensor) -> torch.Tensor:
        return velocity(x, torch.full((len(x),), levels[step], dtype=x.dtype, device=x.device))

    return EulerField([after - before for before, after in zip(levels[:-1], levels[1:], strict=True)], at_step)


def _check_arguments(
    model: Any,
    latents: torch.Tensor,
    sigmas: Sequence[float] | None,
    prompts: Sequence[str] | None,
    tolerance: float,
    max_iterations: int,
) -> None:
    is_pipeline = hasattr(model, "scheduler")
    if is_pipeline == (sigmas is not None):
        raise ValueError("sigmas: needed for a callable velocity; a pipeline brings its own.")
    if sigmas is not None and len(sigmas) < 2:
        raise ValueError(f"sigmas: at least two noise levels make a step; got {len(sigmas)}.")
    if prompts is not None and len(prompts) != len(latents):
        raise ValueError(f"prompts: one for each of the {len(latents)} latents is needed; got {len(prompts)}.")
    if not latents.isfinite().all():
        raise ValueError("latents: some values are not finite.")
    if tolerance <= 0 or max_iterations < 1:
        raise ValueError(f"tolerance and max_iterations must be positive; got {tolerance} and {max_iterations}.")
