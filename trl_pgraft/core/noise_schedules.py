# SPDX-License-Identifier: Apache-2.0

"""
Noise levels alpha_t, sigma_t of a diffusers scheduler, on its training clock: larger t is noisier.

The forward kernel is `x_t = alpha_t x_0 + sigma_t noise`. Coefficients are float64 tensors on the CPU, because float32
loses the small differences between neighbouring levels and not every accelerator has float64.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch


Level = tuple[float | torch.Tensor, float | torch.Tensor]
# The noise level (alpha, sigma) of x_0.
CLEAN: Level = (1.0, 0.0)


def as_coefficients(values: float | torch.Tensor) -> torch.Tensor:
    """Timesteps or noise levels `values`, of any shape, as a float64 tensor on the CPU of the same shape."""
    return torch.as_tensor(values, dtype=torch.float64, device="cpu")


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    r"""
    The pair (alpha_t, sigma_t) as a function of the training timestep t.

    A variance-preserving (VP) schedule is held as the angle `phi = atan2(sigma, alpha)` of every integer timestep and
    is interpolated in phi in between, which keeps `alpha^2 + sigma^2 = 1` and is finite where alpha is 0. Rectified
    flow is the straight line `alpha = 1 - s, sigma = s` with `s = t / num_train_timesteps`.

    Args:
        num_train_timesteps (`int`):
            Length T of the training clock. Timesteps lie in [0, T - 1] for VP and in [0, T] for rectified flow.
        angles (`torch.Tensor`, *optional*):
            Shape (T,), the angles phi of a VP schedule in radians. `None` is rectified flow.
    """

    num_train_timesteps: int
    angles: torch.Tensor | None = None

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "NoiseSchedule":
        r"""
        Read the training noise levels of a diffusers scheduler.

        Args:
            scheduler (`SchedulerMixin`):
                Any scheduler with `alphas_cumprod` (T,), which is VP, or one of rectified flow: with
                `config.use_flow_sigmas`, with `config.prediction_type == "flow_prediction"`, or a flow-matching one
                (`config.shift`, no `config.prediction_type`).

        Raises:
            `ValueError`: the scheduler is neither, or its clock runs backwards (`config.invert_sigmas`).
        """
        config, name = scheduler.config, type(scheduler).__name__
        if getattr(config, "invert_sigmas", False):
            raise ValueError(f"{name} has `invert_sigmas=True`: its timesteps grow towards the data; not supported.")
        prediction_type = getattr(config, "prediction_type", None)
        is_flow = getattr(config, "use_flow_sigmas", False) or prediction_type == "flow_prediction"
        is_vp = not is_flow and hasattr(scheduler, "alphas_cumprod")
        if is_flow or (not is_vp and prediction_type is None and hasattr(config, "shift")):
            return cls(int(config.num_train_timesteps))
        if not is_vp:
            raise ValueError(
                f"{name} is not supported: it has neither `alphas_cumprod` (variance-preserving) nor the marks of "
                "rectified flow (`use_flow_sigmas`, prediction_type 'flow_prediction', or `shift` without a "
                "prediction_type). Use for example DDIMScheduler or FlowMatchEulerDiscreteScheduler."
            )
        alphas_cumprod = as_coefficients(scheduler.alphas_cumprod)
        angles = torch.atan2((1 - alphas_cumprod).sqrt(), alphas_cumprod.sqrt())
        return cls(len(angles), angles)

    @property
    def is_flow(self) -> bool:
        """Whether this is rectified flow; otherwise it is variance-preserving."""
        return self.angles is None

    def __call__(self, timesteps: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        r"""
        Noise levels at training timesteps, which need not be integers.

        Args:
            timesteps (`torch.Tensor` or `float`):
                Any shape, in [0, T - 1] for VP and [0, T] for rectified flow.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: alpha and sigma, float64 on the CPU, each of the shape of `timesteps`.

        Raises:
            `ValueError`: a timestep lies outside the clock.
        """
        t = as_coefficients(timesteps)
        last = self.num_train_timesteps - (0 if self.is_flow else 1)
        if not ((t >= 0) & (t <= last)).all():
            raise ValueError(f"Timesteps must lie in [0, {last}]; got {t.min().item()} to {t.max().item()}.")
        if self.angles is None:
            s = t / self.num_train_timesteps
            return 1 - s, s
        below = t.floor().long()
        above = (below + 1).clamp(max=last)
        phi = torch.lerp(self.angles[below], self.angles[above], t - below)
        # sin(pi/2 - phi) rather than cos(phi): exactly 0 at pure noise.
        return (math.pi / 2 - phi).sin(), phi.sin()

    def log_snr(self, timesteps: torch.Tensor | float) -> torch.Tensor:
        """`log(alpha_t^2 / sigma_t^2)` of `timesteps` (any shape), in nats; -inf at pure noise, inf at clean data."""
        alpha, sigma = self(timesteps)
        return 2 * (alpha.log() - sigma.log())


def transition(
    alpha_i: float | torch.Tensor,
    sigma_i: float | torch.Tensor,
    alpha_t: float | torch.Tensor,
    sigma_t: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The kernel `x_t = scale x_I + sigma_tI noise` from a state at level I to a noisier level t.

    `scale = alpha_t / alpha_I` and `sigma_tI^2 = sigma_t^2 - scale^2 sigma_I^2`, so that noising x_0 first to I and
    then to t has the law of noising it to t at once.

    Args:
        alpha_i, sigma_i (`float` or `torch.Tensor`):
            () or (B,), the level of x_I.
        alpha_t, sigma_t (`float` or `torch.Tensor`):
            () or (B,), the level of x_t, noisier than that of x_I.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: scale and sigma_tI, each () or (B,), float64 on the CPU.

    Raises:
        `ValueError`: some t is not noisier than its t_I, or x_I is pure noise (alpha_I = 0).
    """
    alpha_i, sigma_i, alpha_t, sigma_t = map(as_coefficients, (alpha_i, sigma_i, alpha_t, sigma_t))
    if not (alpha_i > 0).all():
        raise ValueError("x_I is pure noise (alpha_I = 0): no level is noisier. Choose an earlier switch t_I.")
    scale = alpha_t / alpha_i
    variance = sigma_t.square() - (scale * sigma_i).square()
    if not (variance > 0).all():
        raise ValueError(
            "Every training timestep t must be noisier than t_I; got levels (alpha_t, sigma_t) = "
            f"({alpha_t.tolist()}, {sigma_t.tolist()}) for (alpha_I, sigma_I) = "
            f"({alpha_i.tolist()}, {sigma_i.tolist()})."
        )
    return scale, variance.sqrt()


def expand(values: float | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    r"""
    Reshape one value per sample so that it multiplies `like`: (B,) becomes (B, 1, 1, ...).

    Args:
        values (`float` or `torch.Tensor`):
            () or (B,).
        like (`torch.Tensor`):
            (B, ...), the tensor to multiply. The result has its device, and its dtype or float32 where that is a half
            one.

    Returns:
        `torch.Tensor`: (1, 1, ...) or (B, 1, ...), with as many axes as `like`.

    Raises:
        `ValueError`: `values` is neither a single value nor one per sample of `like`.
    """
    values = values if isinstance(values, torch.Tensor) else as_coefficients(values)
    if values.ndim > 1 or (values.ndim == 1 and len(values) != len(like)):
        raise ValueError(
            f"Expected one value per sample, shape ({len(like)},), or a single one; got shape {tuple(values.shape)} "
            f"for a batch of shape {tuple(like.shape)}."
        )
    values = values.to(like.device, torch.promote_types(like.dtype, torch.float32))
    return values.reshape(-1, *[1] * (like.ndim - 1))
