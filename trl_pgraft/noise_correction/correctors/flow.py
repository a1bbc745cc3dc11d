# SPDX-License-Identifier: Apache-2.0

"""The corrector: a short flow from N(0, I) to the noise that an exact inverse gives to real data.

The path is the variance-preserving one, `x_c = c y + sqrt(1 - c^2) eps`, of inverted noise y at signal level c. Its
velocity `dx/dc = E[u | x_c] / sqrt(1 - c^2)`, with `u = sqrt(1 - c^2) y - c eps`, is zero where y is standard normal.
Inverted noise nearly is, so what is learned is small, an untrained corrector changes nothing, and because the
velocity's response to a mean or a covariance is linear in c, one step at the midpoint c = 1/2 gives both to first
order. On the straight path between independent y and eps the velocity is large for standard normal y too, and one
Euler step ends in the mean of y.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from diffusers import AutoModel, UNet2DModel
from peft import PeftConfig

from ...adapters.files import NETWORK_FOLDER, load_frozen_adapter, save_adapter_weights
from ...adapters.lora import AdapterSwitch, adapter_parameters, add_adapter, without_adapters
from ...core.noise_schedules import expand
from ...pipelines.denoiser_call import DenoiserCall, denoiser_of, replay
from ...pipelines.denoiser_format import uncompiled
from ...pipelines.placement import check_adaptable, device_of
from ...training.checkpoints import adapter_values
from .gaussian import GaussianCorrector


CORRECTION_ADAPTER = "noise_correction"
TIMESTEPS = 1000


class Corrector(Protocol):
    """
    Carries standard normal noise to noise of the inverted kind.

    Attributes:
        kind (`str`):
            Its name in the configuration and on disk.
    """

    kind: ClassVar[str]

    def save(self, folder: Path) -> None:
        """Write it to a folder that is there."""

    @classmethod
    def load(cls, folder: Path, pipeline: Any) -> "Corrector":
        """Read what [`~Corrector.save`] wrote, for a pipeline."""

    def correct(
        self, noise: torch.Tensor, call: DenoiserCall, conditioning: dict[str, Any], steps: int
    ) -> torch.Tensor:
        """Arguments and result as those of [`transport`]."""


class FlowCorrector(Corrector, Protocol):
    """
    A [`Corrector`] that is learned: predicts `E[u | x_c]`.

    Attributes:
        module (`torch.nn.Module`):
            What is trained and called.
    """

    module: torch.nn.Module

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Its trained parameters."""

    @property
    def settings(self) -> dict[str, Any]:
        """What it was made with, so that a resumed fit is told from another's."""

    def active(self) -> AbstractContextManager[None]:
        """Context in which it can be called."""

    def __call__(
        self,
        x: torch.Tensor,
        signal: torch.Tensor,
        call: DenoiserCall,
        conditioning: dict[str, Any],
        model: Callable[..., Any] | None = None,
    ) -> torch.Tensor:
        """
        Predict u.

        Args:
            x (`torch.Tensor` of shape `(B, ...)`):
                States x_c.
            signal (`torch.Tensor` of shape `(B,)`):
                Signal levels c in [0, 1).
            call ([`DenoiserCall`]):
                How the pipeline calls its denoiser.
            conditioning (`dict`):
                Arguments of that call for the samples' prompts.
            model (`Callable`, *optional*):
                The module as accelerate prepared it.

        Returns:
            `torch.Tensor` of the shape of `x`, float32.
        """

    def correct(
        self, noise: torch.Tensor, call: DenoiserCall, conditioning: dict[str, Any], steps: int
    ) -> torch.Tensor:
        """See [`Corrector`]."""
        return transport(self, noise, call, conditioning, steps)


@dataclass(frozen=True)
class NetworkCorrector(FlowCorrector):
    """
    A network of its own, which knows nothing of prompts.

    Args:
        module (`torch.nn.Module`):
            Called as `module(x, timestep).sample`, timesteps from 1000 at pure noise to 0.
    """

    kind: ClassVar[str] = "network"
    module: torch.nn.Module

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """All parameters of the network."""
        return list(self.module.parameters())

    @property
    def settings(self) -> dict[str, Any]:
        """The network's configuration."""
        return {name: value for name, value in self.module.config.items() if not name.startswith("_")}

    def active(self) -> AbstractContextManager[None]:
        """Nothing is to be switched."""
        return nullcontext()

    def __call__(
        self,
        x: torch.Tensor,
        signal: torch.Tensor,
        call: DenoiserCall,
        conditioning: dict[str, Any],
        model: Callable[..., Any] | None = None,
    ) -> torch.Tensor:
        """See [`FlowCorrector`]."""
        model, timesteps = self.module if model is None else model, TIMESTEPS * (1 - signal)
        dtype = next(self.module.parameters()).dtype
        return model(x.to(dtype), timesteps.to(x.device, dtype)).sample.float()

    def correct(
        self, noise: torch.Tensor, call: DenoiserCall, conditioning: dict[str, Any], steps: int
    ) -> torch.Tensor:
        """See [`Corrector`]."""
        self.module.to(noise.device)  # the pipeline may have been moved, and does not know of it
        return super().correct(noise, call, conditioning, steps)

    def save(self, folder: Path) -> None:
        """See [`Corrector`]."""
        self.module.save_pretrained(folder / NETWORK_FOLDER)

    @classmethod
    def load(cls, folder: Path, pipeline: Any) -> "NetworkCorrector":
        """See [`Corrector`]."""
        network = AutoModel.from_pretrained(str(folder / NETWORK_FOLDER))
        return cls(network.to(device_of(pipeline)).requires_grad_(False))


@dataclass(frozen=True)
class AdapterCorrector(FlowCorrector):
    """
    The model itself: what an adapter changes in its velocity, so that a fresh LoRA corrects nothing.

    Costs two denoiser evaluations a step, one with the adapter and one without.

    Args:
        module (`torch.nn.Module`):
            The denoiser.
    """

    kind: ClassVar[str] = "lora"
    module: torch.nn.Module

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Parameters of the adapter."""
        return adapter_parameters(self.module, CORRECTION_ADAPTER)

    @property
    def settings(self) -> dict[str, Any]:
        """The adapter's configuration."""
        return adapter_values(uncompiled(self.module).peft_config[CORRECTION_ADAPTER])

    @contextmanager
    def active(self) -> Iterator[None]:
        """The adapter takes part inside, as backward passes of gradient checkpointing need."""
        switch = AdapterSwitch(self.module, CORRECTION_ADAPTER)
        switch.turn(True)
        try:
            yield
        finally:
            switch.restore()

    def __call__(
        self,
        x: torch.Tensor,
        signal: torch.Tensor,
        call: DenoiserCall,
        conditioning: dict[str, Any],
        model: Callable[..., Any] | None = None,
    ) -> torch.Tensor:
        """See [`FlowCorrector`]."""
        arguments = (call, x.to(self.module.dtype), TIMESTEPS * (1 - signal), conditioning)
        with torch.no_grad(), without_adapters(self.module, [CORRECTION_ADAPTER]):
            reference = replay(self.module, *arguments)
        return replay(self.module if model is None else model, *arguments).float() - reference.float()

    def save(self, folder: Path) -> None:
        """See [`Corrector`]."""
        save_adapter_weights(uncompiled(self.module), folder, CORRECTION_ADAPTER, {"format": "pt"})

    @classmethod
    def load(cls, folder: Path, pipeline: Any) -> "AdapterCorrector":
        """See [`Corrector`]."""
        check_adaptable(denoiser_of(pipeline))
        denoiser = uncompiled(denoiser_of(pipeline))
        load_frozen_adapter(denoiser, folder, CORRECTION_ADAPTER)
        AdapterSwitch(denoiser, CORRECTION_ADAPTER).turn(False)
        return cls(denoiser_of(pipeline))


CORRECTORS = {kind.kind: kind for kind in (AdapterCorrector, NetworkCorrector, GaussianCorrector)}


def add_correction_adapter(denoiser: torch.nn.Module, peft_config: PeftConfig, seed: int | None = None) -> None:
    """Add a corrector's adapter to the denoiser, inactive."""
    add_adapter(denoiser, peft_config, CORRECTION_ADAPTER, seed)
    AdapterSwitch(denoiser, CORRECTION_ADAPTER).turn(False)


def make_network(shape: tuple[int, ...], channels: int) -> UNet2DModel:
    """
    A small UNet for latents of shape `(C, H, W)` whose output is zero.

    Raises:
        `ValueError`: the latents are of another kind.
    """
    if len(shape) != 3:
        raise ValueError(
            f"corrector='network': latents of shape {shape} are no images (C, H, W). Pass a `network`, called as "
            "network(x, timestep).sample, or use corrector='lora'."
        )
    levels = 1 + sum(all(size % 2**k == 0 for size in shape[1:]) for k in (1, 2))
    network = UNet2DModel(
        in_channels=shape[0],
        out_channels=shape[0],
        block_out_channels=tuple(channels * min(2**level, 2) for level in range(levels)),
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
        norm_num_groups=math.gcd(channels, 8),
        layers_per_block=1,
        add_attention=False,
    )
    torch.nn.init.zeros_(network.conv_out.weight)
    torch.nn.init.zeros_(network.conv_out.bias)
    return network


def perturb(y: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    States and targets of the corrector's loss.

    Args:
        y, noise (`torch.Tensor` of shape `(B, ...)`):
            Inverted noise, and standard normal noise.
        signal (`torch.Tensor` of shape `(B,)`):
            Signal levels c in [0, 1).

    Returns:
        `tuple`: x_c and u, both of the shape of `y`.
    """
    c, s = expand(signal, y), expand((1 - signal.double().square()).sqrt(), y)
    return c * y + s * noise, s * y - c * noise


def transport(
    corrector: FlowCorrector, noise: torch.Tensor, call: DenoiserCall, conditioning: dict[str, Any], steps: int
) -> torch.Tensor:
    """
    Carry standard normal noise to noise of the inverted kind, in `steps` steps evaluated at their midpoints.

    Args:
        corrector ([`FlowCorrector`]):
            The corrector.
        noise (`torch.Tensor` of shape `(B, ...)`):
            Standard normal noise.
        call, conditioning:
            See [`FlowCorrector`].
        steps (`int`):
            How many; 0 leaves the noise as it is.

    Returns:
        `torch.Tensor` of the shape and dtype of `noise`.
    """
    x = noise.float()
    with torch.no_grad(), corrector.active():
        for step in range(steps):
            c = (step + 0.5) / steps
            signal = torch.full((len(x),), c, dtype=torch.float64)
            x = x + corrector(x, signal, call, conditioning) / (math.sqrt(1 - c**2) * steps)
    return x.to(noise.dtype)
