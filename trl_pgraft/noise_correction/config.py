# SPDX-License-Identifier: Apache-2.0

"""The configuration of [`NoiseCorrectionTrainer`]: its fields with their descriptions, and their ranges."""

from dataclasses import dataclass
from typing import Any

from typing_extensions import deprecated

from ..config import LR_SCHEDULES, check_fields, config_field, plain_fields


# Fields that may differ when a run is resumed.
MAY_CHANGE = (
    *("output_dir", "corrector_steps", "inversion_batch_size", "mixed_precision", "gradient_checkpointing"),
    *("max_steps", "logging_steps", "save_steps", "resume_from_checkpoint"),
    *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_token"),
)
_RANGES = {
    "is outside [0, 1)": ("lowest_sigma", "max_unconverged", "held_out_fraction"),
    "is outside (0, 1)": ("ema_decay",),
    "must be at least 0": ("corrector_steps", "weight_decay", "warmup_steps"),
    "must be at least 1": ("max_iterations", "max_steps", "logging_steps", "save_steps"),
    "must be at least 1 and at most 10,000": ("lora_rank", "network_channels", "num_inference_steps"),
    "must be at least 1 and at most 1,000,000": ("inversion_batch_size", "train_batch_size"),
    "must be positive": ("tolerance", "learning_rate", "max_grad_norm"),
}


@dataclass
class NoiseCorrectionConfig:
    r"""
    Configuration class for the [`NoiseCorrectionTrainer`].

    The data set is mapped to noise by the exact inverse of the sampler of `num_inference_steps` steps, and a corrector
    is trained to generate that noise from N(0, I). Each field's description is in its metadata:
    `{f.name: f.metadata["help"] for f in dataclasses.fields(NoiseCorrectionConfig)}` lists them.

    Raises:
        `ValueError`: a field is out of range; the message names the field.
    """

    output_dir: str = config_field(
        "noise_correction_output", "Folder for the inverted noise, the checkpoint, metrics and the corrector."
    )
    seed: int = config_field(0, "Random seed of initial weights, batches and noise.")
    corrector: str = config_field(
        "network",
        "What is trained: a small 'network' without prompts; a 'gaussian' of the noise, which needs no training: the "
        "best of those named below it on held-out noise, or none; or a 'lora' on the model, which uses the prompts "
        "(docs/noise_correction.md).",
        choices=["network", "gaussian", "gaussian_full", "gaussian_spectral", "gaussian_low_rank", "lora"],
    )
    corrector_steps: int = config_field(1, "Steps of the corrector when sampling, unless a call asks for others.")
    lora_rank: int = config_field(16, "Rank of the default LoRA, where no `peft_config` is given.")
    network_channels: int = config_field(64, "Channels of the default network, where no `network` is given.")
    num_inference_steps: int = config_field(
        20, "Steps of the sampler that is inverted. Fewer steps leave more to correct, and are harder to invert."
    )
    lowest_sigma: float = config_field(
        0.2,
        "Noise level, from 0 to 1, to which the data are noised; only steps that end there or above are inverted. "
        "0 inverts all steps (docs/noise_correction.md).",
    )
    guided: bool = config_field(
        False, "Invert the sampler with the guidance of `pipeline_kwargs`, not that of the prompts alone."
    )
    tolerance: float = config_field(
        1e-2,
        "Largest sum of an element's residuals over the inverted steps, in units of the latents; each step is allowed "
        "an equal share.",
    )
    max_iterations: int = config_field(200, "Largest number of denoiser evaluations of an inverted step, per sample.")
    max_unconverged: float = config_field(
        0.0, "Largest share of the samples that may be left out because one of their steps did not converge."
    )
    inversion_batch_size: int = config_field(
        64, "Samples inverted at a time, per process; each file of inverted noise has as many."
    )
    held_out_fraction: float = config_field(
        0.05, "Share of the samples that are kept from training, to report the loss on."
    )
    max_steps: int = config_field(
        2000, "Number of optimizer steps. A run that is resumed with more continues on the longer run's schedule."
    )
    train_batch_size: int = config_field(
        64,
        "Samples of an optimizer step, over all processes. Larger batches gave better samples in as many steps "
        "(docs/noise_correction.md).",
    )
    learning_rate: float = config_field(1e-4, "Learning rate of AdamW.")
    weight_decay: float = config_field(0.0, "Weight decay of AdamW.")
    max_grad_norm: float = config_field(1.0, "Gradient norm above which gradients are scaled down.")
    ema_decay: float | None = config_field(
        0.999, "Decay of the moving average of the weights, which is what is saved. None: the last weights."
    )
    lr_scheduler_type: str = config_field(
        "cosine", "Learning-rate schedule of `diffusers.optimization.get_scheduler`.", choices=LR_SCHEDULES
    )
    warmup_steps: int = config_field(100, "Optimizer steps of learning-rate warm-up.")
    mixed_precision: str | None = config_field(
        None,
        "Precision of the forward pass in training. None: that of `accelerate launch`, or 'no'. The inversion runs in "
        "the pipeline's own precision.",
        choices=["no", "fp16", "bf16"],
    )
    gradient_checkpointing: bool = config_field(
        False, "Recompute activations in the backward pass, which saves memory and costs time."
    )
    logging_steps: int = config_field(50, "Optimizer steps between lines of metrics.")
    save_steps: int = config_field(500, "Optimizer steps between checkpoints.")
    resume_from_checkpoint: bool = config_field(
        False, "Continue from the checkpoint in `output_dir`, if there is one. Inverted noise is always reused."
    )
    push_to_hub: bool = config_field(False, "Push the corrector to the Hub at the end of training.")
    hub_model_id: str | None = config_field(
        None, "Repository of the corrector on the Hub. None: the name of the output folder."
    )
    hub_private_repo: bool = config_field(False, "Make the repository private; an existing public one is refused.")
    hub_token: str | None = config_field(
        None, "Token for the Hub; never stored. None: the token of the Hub's login.", repr=False
    )

    def __post_init__(self) -> None:
        check_fields(self, _RANGES)

    def resume_signature(self) -> dict[str, Any]:
        """What the trained corrector depends on, and so must not change when a run is resumed."""
        return plain_fields(self, without=MAY_CHANGE)

    @deprecated("NoiseCorrectionConfig.shaping is now NoiseCorrectionConfig.resume_signature.")
    def shaping(self) -> dict[str, Any]:
        """The former name of `resume_signature`."""
        return self.resume_signature()
