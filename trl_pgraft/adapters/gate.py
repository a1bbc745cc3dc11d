# SPDX-License-Identifier: Apache-2.0

"""Run a fine-tuned adapter above a noise level and not below it, whatever the sampler and its number of steps."""

import math
import warnings
import weakref
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..pipelines.denoiser_format import DenoiserFormat, uncompiled
from ..pipelines.observe import observe_calls
from .layers import active_adapters, check_layers, tuner_layers
from .lora import AdapterSwitch, switch_on


class TimestepGate(AbstractContextManager["TimestepGate"]):
    r"""
    Run the denoiser with an adapter at noisy timesteps and without it at clean ones (P-GRAFT's inference).

    A forward pre-hook reads the timestep of each denoiser call and switches the adapter off for a call below the
    switch. Only the named adapter is touched, and between the calls it is as the user has it: `set_adapters` and
    `disable_lora` switch it off at all timesteps, [`~TimestepGate.disable`] does without regard to the other adapters.
    The gate acts from its creation, which switches the adapter on, until [`~TimestepGate.remove`], or as a context
    manager; both leave every adapter and `requires_grad` flag as they were before.

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
        format ([`DenoiserFormat`], *optional*):
            How the timestep is read from the denoiser's arguments; by its usual name where not given.

    Raises:
        `ValueError`: the denoiser has no adapter of that name, or a gate of it. In a call of the denoiser: its rows
            have different timesteps, or an adapter would not act as it should, because adapters or projections were
            fused or a cache is on.
    """

    def __init__(
        self,
        denoiser: torch.nn.Module,
        adapter_name: str,
        switch_timestep: float | None,
        clock: tuple[float, float] = (1.0, 0.0),
        pipeline: DiffusionPipeline | None = None,
        format: DenoiserFormat | None = None,
    ):
        if gate_on(denoiser, adapter_name) is not None:
            raise ValueError(
                f"{adapter_name!r} has a gate on this denoiser already. Call that gate's `remove()` first."
            )
        self.adapter_name = adapter_name
        self.switch_timestep = switch_timestep
        self.clock = clock
        self.denoiser = denoiser
        self._pipeline = pipeline
        self._format = format or DenoiserFormat.of(denoiser)
        self._adapter = AdapterSwitch(denoiser, adapter_name)
        self._is_enabled = self._is_on = True
        self._is_off_for_call = False
        self._last = -math.inf
        self._known = set(uncompiled(denoiser).peft_config)
        self._hooks = ExitStack()
        if not self._adapter.is_on:
            self._hooks.callback(lambda: self._adapter.turn(False))
            self.enable()
        self._hooks.enter_context(observe_calls(denoiser, self._on_call))
        self._hooks.callback(denoiser.register_forward_hook(self._after_call, always_call=True).remove)
        _active_gates.add(self)

    def __exit__(self, *exception: Any) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the gate off the denoiser and restore the adapters; harmless when already removed."""
        self._hooks.close()
        _active_gates.discard(self)

    def enable(self) -> None:
        """
        Let the adapter take part above its switch level again, after [`~TimestepGate.disable`], or after
        `set_adapters` or `disable_lora` have left it out; other adapters stay as they are.
        """
        self._is_enabled = True
        if not self._adapter.is_on:
            switch_on(self.denoiser, self.adapter_name)

    def disable(self) -> None:
        """Leave the adapter out at all timesteps, for a comparison; other adapters stay as they are."""
        self._is_enabled = False

    def is_on_at(self, timestep: float) -> bool:
        """Whether the adapter takes part at a training timestep."""
        return self.switch_timestep is None or timestep > self.switch_timestep

    def _on_call(self, arguments: dict[str, Any]) -> None:
        values = self._format.timestep(arguments).flatten()
        if not torch.equal(values, values[:1].expand_as(values)):
            raise ValueError(
                "TimestepGate: the rows of one denoiser call have different timesteps. The gate serves sampling; call "
                "`remove()` (or leave its `with` block) before training."
            )
        scale, offset = self.clock
        timestep = (float(values[0]) - offset) / scale
        # The walk through all modules is made once a trajectory, whose timesteps fall.
        if timestep >= self._last and not self._find_adapter():
            return
        self._last = timestep
        scheduler = getattr(self._pipeline, "scheduler", None)
        if getattr(scheduler, "state_in_first_order", True):  # otherwise the call completes a step begun before
            self._is_on = self.is_on_at(timestep)
        if not (self._is_on and self._is_enabled) and self._adapter.is_on:
            self._is_off_for_call = True
            self._adapter.turn(False)

    def _find_adapter(self) -> bool:
        """Look at the denoiser as it is now; `False` where the adapter was deleted, whose gate goes with it."""
        if tuner_layers(self.denoiser, self.adapter_name):
            check_layers(self.denoiser, can_cache=self.switch_timestep is None)
            self._adapter = AdapterSwitch(self.denoiser, self.adapter_name)
            self._meet_new_adapters()
            return True
        if self._adapter.is_merged:
            raise ValueError(
                f"fuse_lora() has fused {self.adapter_name!r} into the weights, for all noise levels, and the adapter "
                "was unloaded after that. Load the pipeline and the adapter anew. To go on with the fused weights "
                "call the gate's `remove()`."
            )
        self.remove()
        return False

    def _meet_new_adapters(self) -> None:
        """Let the adapter take part beside one that was loaded, which diffusers makes the only one."""
        known, self._known = self._known, {*self._known, *uncompiled(self.denoiser).peft_config}
        new = set(active_adapters(self.denoiser)) - known
        if new and not self._adapter.is_on:
            switch_on(self.denoiser, self.adapter_name)
            warnings.warn(
                f"{', '.join(sorted(new))} became the only active adapter when it was loaded; {self.adapter_name!r} "
                "takes part beside it. Call the gate's `disable()` to sample without.",
                stacklevel=2,
            )

    def _after_call(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        if self._is_off_for_call:
            self._is_off_for_call = False
            self._adapter.turn(True)


# Denoisers keep their gates alive by their hooks; nothing else needs to.
_active_gates: weakref.WeakSet[TimestepGate] = weakref.WeakSet()


def gate_on(denoiser: torch.nn.Module, adapter_name: str | None = None) -> TimestepGate | None:
    """The gate on `denoiser`, of one adapter where its name is given; `None` where there is none."""
    return next((g for g in _active_gates if g.denoiser is denoiser and adapter_name in (None, g.adapter_name)), None)
