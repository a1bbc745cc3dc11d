# SPDX-License-Identifier: Apache-2.0

"""Where noisy latents, timestep and prediction are in a denoiser's arguments and output; a subclass overrides it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from diffusers import ModelMixin


@dataclass(frozen=True)
class DenoiserFormat:
    """
    How a denoiser takes noisy latents and a timestep, and gives a prediction.

    The default serves denoisers that take the latents as a tensor in their first argument, a timestep, and return a
    tensor of the latents' shape (with a learned variance, of more channels). For another denoiser, override the
    methods that differ and pass the class to [`PGraftTrainer`] as `denoiser_format`.

    Args:
        latents_name (`str`):
            Argument that takes the noisy latents.
        timestep_name (`str`):
            Argument that takes the timestep.
    """

    latents_name: str
    timestep_name: str

    @classmethod
    def of(cls, denoiser: torch.nn.Module) -> "DenoiserFormat":
        """The format with the names that `denoiser.forward` has."""
        return cls(*argument_names(denoiser))

    def latents(self, arguments: dict[str, Any]) -> torch.Tensor:
        """The noisy latents in the named arguments of a call: one row per image and branch."""
        return arguments[self.latents_name]

    def timestep(self, arguments: dict[str, Any]) -> torch.Tensor:
        """The timestep in the named arguments of a call, on the denoiser's own clock."""
        return torch.as_tensor(arguments[self.timestep_name])

    def conditioning(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What else is in the named arguments of a call: recorded once per prompt."""
        return {n: value for n, value in arguments.items() if n not in (self.latents_name, self.timestep_name)}

    def arguments(self, x_t: torch.Tensor, timestep: torch.Tensor, conditioning: dict[str, Any]) -> dict[str, Any]:
        """
        The named arguments of a call: the inverse of the three methods above.

        Args:
            x_t (`torch.Tensor` of shape `(B, ...)`):
                Noisy latents, in the layout of [`~DenoiserFormat.latents`].
            timestep (`torch.Tensor` of shape `(B,)`):
                Timesteps on the denoiser's own clock.
            conditioning (`dict`):
                What else the call takes, with `B` rows, as [`~DenoiserFormat.conditioning`] returned it.
        """
        return {self.latents_name: x_t, self.timestep_name: timestep, **conditioning}

    def prediction(self, output: Any) -> torch.Tensor:
        """The prediction in the denoiser's `output`, in the layout of [`~DenoiserFormat.latents`]."""
        return output[0] if isinstance(output, tuple) else output.sample


def uncompiled(denoiser: torch.nn.Module) -> ModelMixin:
    """The module that `torch.compile` wrapped: with its own signature, names of parameters, and PEFT's attributes."""
    return extract_model_from_parallel(denoiser, keep_torch_compile=False)


def named_arguments(denoiser: torch.nn.Module) -> Callable[..., dict[str, Any]]:
    """A function that gives the arguments of a call of the denoiser by their names, positional ones included."""
    signature = inspect.signature(type(uncompiled(denoiser)).forward)
    further = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")

    def named(*args: Any, **kwargs: Any) -> dict[str, Any]:
        arguments = dict(signature.bind(denoiser, *args, **kwargs).arguments)
        arguments.pop(next(iter(signature.parameters)))  # self
        extra = arguments.pop(further, {})
        return {**arguments, **extra}

    return named


def argument_names(denoiser: torch.nn.Module) -> tuple[str, str]:
    """Names of the denoiser's arguments for the noisy latents and for the timestep."""
    denoiser = uncompiled(denoiser)
    names, timesteps = list(inspect.signature(type(denoiser).forward).parameters)[1:], usual_timestep_names(denoiser)
    if not timesteps:
        raise ValueError(
            f"{type(denoiser).__name__}.forward has no argument `timestep`; it takes {', '.join(names)}. Override "
            "DenoiserFormat.of to name it, and pass the class as denoiser_format (docs/models.md)."
        )
    return names[0], timesteps[0]


def usual_timestep_names(denoiser: torch.nn.Module) -> list[str]:
    """The denoiser's arguments that take a timestep by their names."""
    names = inspect.signature(type(uncompiled(denoiser)).forward).parameters
    return [name for name in names if name in ("timestep", "timesteps", "t")]
