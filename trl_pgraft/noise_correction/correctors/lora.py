# SPDX-License-Identifier: Apache-2.0

"""An adapter on the denoiser as a corrector: it depends on prompts and costs two denoiser evaluations a step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from peft import PeftConfig

from ...adapters.files import load_frozen_adapter, save_adapter_weights
from ...adapters.gate import gate_on
from ...adapters.lora import AdapterSwitch, adapter_parameters, add_adapter, tuner_layers, without_adapters
from ...config import default_values
from ...pipelines.denoiser_call import DenoiserCall, denoiser_of, replay
from ...pipelines.denoiser_format import uncompiled
from ...pipelines.placement import check_adaptable
from ...training.checkpoints import adapter_values
from .transport import TIMESTEPS, transport


CORRECTION_ADAPTER = "noise_correction"


@dataclass(frozen=True)
class LoraCorrector:
    """
    An adapter on the denoiser: u is what it changes in the model's velocity, so a new LoRA corrects nothing.

    The arguments of a call are those of [`~network.NetworkCorrector.__call__`].

    Args:
        module (`torch.nn.Module`):
            The denoiser, with the adapter inside; perhaps compiled.
    """

    kind: ClassVar[str] = "lora"
    module: torch.nn.Module
    correct = transport  # a method: corrector.correct(noise, call, conditioning, steps)

    @classmethod
    def new(cls, denoiser: torch.nn.Module, peft_config: PeftConfig, seed: int | None = None) -> "LoraCorrector":
        """
        Add an adapter to a denoiser, trainable and switched off.

        Args:
            denoiser (`torch.nn.Module`):
                What the pipeline calls; perhaps compiled.
            peft_config (`PeftConfig`):
                Configuration of the adapter.
            seed (`int`, *optional*):
                Seed of its initial values; they come from the global random state where not given.

        Raises:
            `ValueError`: adapters cannot be put into the denoiser as it is offloaded or compiled, it has a
                [`TimestepGate`], or it has a corrector already.
        """
        check_adaptable(denoiser)
        if gate_on(denoiser) is not None:
            raise ValueError(
                "corrector='lora': the denoiser has a TimestepGate, and the rows of a training batch have different "
                "noise levels. Remove the gate, or use corrector='network', for which it stays."
            )
        if tuner_layers(uncompiled(denoiser), CORRECTION_ADAPTER):
            raise ValueError(
                "corrector='lora': the denoiser has a corrector already, of another NoiseCorrectionTrainer or of "
                "NoiseCorrectedPipeline.from_pretrained. Load the pipeline anew."
            )
        add_adapter(uncompiled(denoiser), peft_config, CORRECTION_ADAPTER, seed)
        AdapterSwitch(denoiser, CORRECTION_ADAPTER).turn(False)
        return cls(denoiser)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return adapter_parameters(self.module, CORRECTION_ADAPTER)

    @property
    def settings(self) -> dict[str, Any]:
        return adapter_values(uncompiled(self.module).peft_config[CORRECTION_ADAPTER].to_dict())

    @property
    def default_settings(self) -> dict[str, Any]:
        return adapter_values(default_values(uncompiled(self.module).peft_config[CORRECTION_ADAPTER]))

    @contextmanager
    def active(self) -> Iterator[None]:
        # Gradient checkpointing calls the model in the backward pass, where the adapter must still be on.
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
        arguments = (call, x.to(uncompiled(self.module).dtype), TIMESTEPS * (1 - signal), conditioning)
        with torch.no_grad(), without_adapters(self.module, [CORRECTION_ADAPTER]):
            reference = replay(self.module, *arguments)
        with self.active():
            return replay(self.module if model is None else model, *arguments).float() - reference.float()

    def save(self, folder: Path) -> None:
        save_adapter_weights(uncompiled(self.module), folder, CORRECTION_ADAPTER, {"format": "pt"})

    @classmethod
    def load(cls, folder: Path, pipeline: DiffusionPipeline) -> "LoraCorrector":
        denoiser = denoiser_of(pipeline)
        check_adaptable(denoiser)
        load_frozen_adapter(uncompiled(denoiser), folder, CORRECTION_ADAPTER)
        AdapterSwitch(denoiser, CORRECTION_ADAPTER).turn(False)
        return cls(denoiser)
