# SPDX-License-Identifier: Apache-2.0

"""Configuration of [`NoiseCorrectionTrainer`]."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from ..config import option


# What a resumed run may give otherwise.
MAY_CHANGE = (
    *("output_dir", "corrector_steps", "inversion_batch_size", "mixed_precision", "gradient_checkpointing"),
    *("max_steps", "logging_steps", "save_steps", "resume_from_checkpoint"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_token"),
)


@dataclass
class NoiseCorrectionConfig:
    r"""
    Configuration class for the [`NoiseCorrectionTrainer`].

    The data set is mapped to noise by the exact inverse of the sampler of `num_inference_steps` steps, and a corrector
    is fitted to that noise. Each field's `help` says what it does.

    Raises:
        `ValueError`: a field is out of range; the message names the field.
    """

    output_dir: str = option(
        "noise_correction_output", "Folder for the inverted noise, the checkpoint, metrics and the corrector."
    )
    seed: int = option(0, "Random seed of initial weights, batches and noise.")
    corrector: str = option(
        "network",
        "What is fitted: a small network of its own, which knows no prompts; the Gaussian of the noise's mean and "
        "covariance, which needs no training and next to no time, for latents of some thousand elements and more "
        "samples than that; or a LoRA on the model itself, which knows the prompts and costs two denoiser evaluations "
        "a step. The network, because it was the best in most comparisons (docs/noise_correction.md), can be fitted "
        "to any latents and costs little.",
        choices=["network", "gaussian", "lora"],
    )
    corrector_steps: int = option(1, "Steps of the corrector when sampling, unless a call asks for others.")
    lora_rank: int = option(16, "Rank of the default LoRA, where no `peft_config` is given.")
    network_channels: int = option(64, "Channels of the default network, where no `network` is given.")
    num_inference_steps: int = option(
        20, "Steps of the sampler that is inverted. Fewer steps leave more to correct, and are harder to invert."
    )
    lowest_sigma: float = option(
        0.2,
        "Noise level from which the inversion starts: only steps that end there or above are inverted. The data are "
        "noised to where the last of these ends, by the flow's own forward kernel; 0 inverts all steps. The last step "
        "ends in the mean of the data given its state, and is nearly singular where few steps are made: at 5 steps on "
        "Fashion-MNIST, most images have no inverse through it. Small last steps have one, but it is mostly what they "
        "do to the noise that is left, which hides what they do to the image (docs/noise_correction.md).",
    )
    guided: bool = option(
        False, "Invert the sampler with the guidance that `pipeline_kwargs` ask for, not that of the prompts alone."
    )
    tolerance: float = option(
        1e-2,
        "Largest sum of an element's residuals over the inverted steps, in units of the latents; each step is allowed "
        "an equal share.",
    )
    max_iterations: int = option(200, "Denoiser evaluations of an inverted step, per sample.")
    max_unconverged: float = option(
        0.0, "Largest share of the samples that may be left out because a step of theirs did not converge."
    )
    inversion_batch_size: int = option(64, "Samples inverted at a time, per process; also those of a file.")
    held_out_fraction: float = option(0.05, "Share of the samples that are kept from training, to report the loss on.")
    max_steps: int = option(
        2000, "Optimizer steps; a run that is resumed for more goes on with the learning-rate schedule of that many."
    )
    train_batch_size: int = option(
        64,
        "Samples of an optimizer step, over all processes. What is learned is a small part of the loss, so larger "
        "ones are worth their time: 1,024 gave better samples than 256 in as many steps or fewer.",
    )
    learning_rate: float = option(1e-4, "Learning rate of AdamW.")
    weight_decay: float = option(0.0, "Weight decay of AdamW.")
    max_grad_norm: float = option(1.0, "Norm to which the gradient is clipped.")
    ema_decay: float | None = option(0.999, "Decay of the weights' moving average, which is what is kept.")
    lr_scheduler_type: str = option("cosine", "Learning-rate schedule of `diffusers.optimization.get_scheduler`.")
    warmup_steps: int = option(100, "Optimizer steps of learning-rate warm-up.")
    mixed_precision: str = option(
        "no",
        "Precision of the forward pass in training. The pipeline itself keeps the precision it comes in: an inverse "
        "cannot be closer than that.",
        choices=["no", "fp16", "bf16"],
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass.")
    logging_steps: int = option(50, "Optimizer steps between lines of metrics.")
    save_steps: int = option(500, "Optimizer steps between checkpoints.")
    resume_from_checkpoint: bool = option(
        False, "Go on from the checkpoint in `output_dir`, if there is one. Inverted noise is always taken up again."
    )
    push_to_hub: bool = option(False, "Push the corrector to the Hub at the end of training.")
    hub_model_id: str | None = option(None, "Its repository; the name of the output folder where not given.")
    hub_private_repo: bool = option(False, "Make the repository private; a public one is refused.")
    hub_token: str | None = field(default=None, repr=False, metadata={"help": "Token for the Hub; never stored."})

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), f.metadata.get("choices")
            if choices and value not in choices:
                raise ValueError(f"{f.name}={value!r} is not one of {', '.join(map(repr, choices))}.")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{f.name}={value} is not a finite number.")
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("tolerance", "learning_rate", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        for name in ("corrector_steps", "weight_decay", "warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0.")
        for name in ("lowest_sigma", "max_unconverged", "held_out_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside [0, 1).")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} is outside (0, 1).")

    def shaping(self) -> dict[str, Any]:
        """What the trained corrector depends on, and so must not change when a run is resumed."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in MAY_CHANGE}


_AT_LEAST_ONE = (
    "lora_rank",
    "network_channels",
    "num_inference_steps",
    "max_iterations",
    "inversion_batch_size",
    "max_steps",
    "train_batch_size",
    "logging_steps",
    "save_steps",
)
