# SPDX-License-Identifier: Apache-2.0

"""The denoiser's conditioning of each prompt: recorded once, without sampling, and kept on the host."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from diffusers import DiffusionPipeline

from .denoiser_call import DenoiserCall, branches_of
from .recording import calls_of_first_step
from .tree import take_rows


@dataclass(frozen=True)
class Conditioning:
    """
    Denoiser arguments of some prompts, one row a prompt, kept on the host.

    Args:
        conditional (`dict`):
            Arguments of the prompts' own branch, without latents and timestep.
        unconditional (`dict` or `None`):
            Arguments of the other branch of a guided call, `None` without classifier-free guidance.
        batch_axes (`dict`):
            See [`DenoiserCall`].
    """

    conditional: dict[str, Any]
    unconditional: dict[str, Any] | None
    batch_axes: dict[str, Any]

    def rows(
        self, indices: Sequence[int] | torch.Tensor, device: torch.device | str, unconditional: bool = False
    ) -> dict[str, Any]:
        """Denoiser arguments of the prompts at `indices`, on `device`."""
        branch = self.unconditional if unconditional else self.conditional
        return send_to_device(take_rows(branch, self.batch_axes, torch.as_tensor(indices).tolist()), device)


def record_conditioning(
    pipeline: DiffusionPipeline,
    call: DenoiserCall,
    prompts: Sequence[str],
    pipeline_kwargs: dict[str, Any] | None = None,
    inputs: Sequence[dict[str, Any]] | None = None,
) -> Conditioning:
    """
    Record the denoiser's conditioning for `prompts` without sampling: the pipeline is left when it calls its denoiser.

    Args:
        pipeline (`DiffusionPipeline`):
            The pipeline.
        call ([`DenoiserCall`]):
            How it calls its denoiser.
        prompts (`Sequence[str]`):
            `P` prompts; row `i` of the result belongs to prompt `i`.
        pipeline_kwargs (`dict`, *optional*):
            Arguments of the sampling call.
        inputs (`Sequence[dict]`, *optional*):
            `P` dicts of each prompt's own inputs of the pipeline.
    """
    calls = calls_of_first_step(pipeline, call, prompts, pipeline_kwargs or {}, inputs)
    parts = [send_to_device(part, "cpu") for part in branches_of(calls, call.format, call.batch_axes, len(prompts))]
    unconditional = parts[1 - call.conditional_branch] if call.is_guided else None
    return Conditioning(parts[call.conditional_branch], unconditional, call.batch_axes)
