# SPDX-License-Identifier: Apache-2.0

"""Run a fine-tuned adapter above a noise level and not below it, whatever the sampler and its number of steps."""

import weakref
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..pipelines.denoiser_format import argument_names
from ..pipelines.observe import observe_calls
from .lora import AdapterSwitch


class TimestepGate(AbstractContextManager["TimestepGate"]):
    r"""
    Run the denoiser with an adapter at noisy timesteps and without it at clean ones (P-GRAFT's inference).

    A forward pre-hook reads the timestep of each denoiser call and switches the adapter where the noise level crosses
    the switch. Only the named adapter is touched: other adapters stay as they are. The gate acts from its creation
    until [`~TimestepGate.remove`], or as a context manager; both leave every adapter and `requires_grad` flag as they
    were before, and so does an exception inside the denoiser.

    Args:
        denoiser (`torch.nn.Module`):
            Module that the pipeline calls, with PEFT layers inside; perhaps compiled.
        adapter_name (`str`):
            Name of the adapter to switch.
        switch_timestep (`float` or `None`):
            Training timestep (larger is noisier) above which the adapter is on; `None` keeps it on throughout (GRAFT).
        clock (`tuple[float, float]`, *optional*, defaults to `(1.0, 0.0)`):
            `(scale, offset)` of the denoiser's own clock, see [`DenoiserCall`]; the default is the training clock.
        pipeline (`DiffusionPipeline`, *optional*):
            The pipeline that calls the denoiser. Its scheduler shows which calls complete a step begun before (the
            second call of Heun's method, at the step's end); they run as that step began. Each call is a step of its
            own where it is not given.

    Raises:
        `ValueError`: the denoiser has no adapter of that name; or, in a call of the denoiser, its rows have different
            timesteps.
    """

    def __init__(
        self,
        denoiser: torch.nn.Module,
        adapter_name: str,
        switch_timestep: float | None,
        clock: tuple[float, float] = (1.0, 0.0),
        pipeline: DiffusionPipeline | None = None,
    ):
        self.adapter_name = adapter_name
        self.switch_timestep = switch_timestep
        self.clock = clock
        self._pipeline = pipeline
        self._is_on = False
        self._adapter = AdapterSwitch(denoiser, adapter_name)
        self._timestep_name = argument_names(denoiser)[1]
        self.denoiser = denoiser
        self._hooks = ExitStack()
        self._hooks.callback(self._adapter.restore)
        self._hooks.enter_context(observe_calls(denoiser, self._on_call))
        self._hooks.callback(denoiser.register_forward_hook(self._restore_after_failure, always_call=True).remove)
        _active_gates.add(self)

    def __exit__(self, *exception: Any) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the gate off the denoiser and restore the adapters; harmless when already removed."""
        self._hooks.close()
        _active_gates.discard(self)

    def is_on_at(self, timestep: float) -> bool:
        """Whether the adapter takes part at a training timestep."""
        return self.switch_timestep is None or timestep > self.switch_timestep

    def _on_call(self, arguments: dict[str, Any]) -> None:
        value = arguments[self._timestep_name]
        values = value.flatten() if isinstance(value, torch.Tensor) else torch.tensor([float(value)])
        if not torch.equal(values, values[:1].expand_as(values)):
            raise ValueError(
                "TimestepGate: the rows of one denoiser call have different timesteps. The gate serves sampling; call "
                "`remove()` (or leave its `with` block) before training."
            )
        scheduler = getattr(self._pipeline, "scheduler", None)
        if getattr(scheduler, "state_in_first_order", True):  # otherwise the call completes a step begun before
            scale, offset = self.clock
            self._is_on = self.is_on_at((float(values[0]) - offset) / scale)
        self._adapter.turn(self._is_on)

    def _restore_after_failure(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        if output is None:
            self._adapter.restore()


# Denoisers keep their gates alive by their hooks; nothing else needs to.
_active_gates: weakref.WeakSet[TimestepGate] = weakref.WeakSet()


def gate_on(denoiser: torch.nn.Module) -> TimestepGate | None:
    """The gate on `denoiser`, or `None` where there is none."""
    return next((gate for gate in _active_gates if gate.denoiser is denoiser), None)
