# SPDX-License-Identifier: Apache-2.0

"""Configuration of [`PGraftTrainer`]: the fields of TRL's `DDPOConfig`, and those that GRAFT adds."""

import dataclasses
import json
import math
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .core.acceptance import ACCEPTANCE_RULES


GUIDANCE_LOSSES = ("conditional", "corrected", "combined")
PPO_ONLY_FIELDS = (
    "train_adv_clip_max",
    "train_clip_range",
    "per_prompt_stat_tracking",
    "per_prompt_stat_tracking_buffer_size",
    "per_prompt_stat_tracking_min_count",
)
# Fields that a resumed run may give otherwise: they leave the result as it is, or are about what comes after.
MAY_CHANGE = (
    *PPO_ONLY_FIELDS,
    *("exp_name", "run_name", "log_with", "tracker_kwargs", "tracker_project_name", "logdir"),
    *("accelerator_kwargs", "project_kwargs", "mixed_precision", "allow_tf32", "gradient_checkpointing"),
    *("num_epochs", "save_freq", "num_checkpoint_limit", "output_dir", "resume_from", "resume_from_checkpoint"),
    *("async_reward_computation", "max_workers", "reward_retries", "reward_retry_wait", "reward_timeout"),
    *("eval_prompts", "eval_freq"),
    *("push_to_hub", "hub_model_id", "hub_dataset_id", "hub_private_repo", "hub_token"),
    # What counts of these is their product, over all processes.
    *("sample_batch_size", "sample_num_batches_per_epoch"),
    *("train_batch_size", "train_gradient_accumulation_steps"),
)


def option(default: Any, help: str, choices: list[str] | None = None) -> Any:
    """A field of a configuration with its help, and its choices where it has some."""
    metadata = {"help": help, **({"choices": choices} if choices else {})}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class GraftConfig:
    r"""
    Configuration class for the [`PGraftTrainer`].

    The first block has every field of TRL 0.23.1's `DDPOConfig` with its name and meaning. Fields that only PPO has a
    use for are accepted and answered with one warning. Each field's `help` says what it does, and where its default
    differs from DDPO's, why.

    A round ("epoch") draws `sample_batch_size * sample_num_batches_per_epoch` images a process in groups of
    `samples_per_prompt`, accepts by reward within each group, and fine-tunes on what was accepted for
    `train_num_inner_epochs` passes.

    Raises:
        `ValueError`: a field is out of range; the message names the field and the fix.
    """

    exp_name: str = option(os.path.basename(sys.argv[0]).removesuffix(".py"), "Name of this experiment.")
    run_name: str = option("", "Name of this run, used by the trackers.")
    seed: int = option(0, "Random seed. Every sample, timestep and noise is a function of it, whatever the batching.")
    log_with: str | None = option(
        None, "Tracker that accelerate logs to.", choices=["wandb", "tensorboard", "trackio"]
    )
    # `dict | str | None`, because a command line has a dict as JSON.
    tracker_kwargs: dict | str | None = option({}, 'Keyword arguments by tracker, e.g. {"wandb": {"entity": "me"}}.')
    accelerator_kwargs: dict | str | None = option({}, "Keyword arguments for the accelerator.")
    project_kwargs: dict | str | None = option(
        {}, "Keyword arguments for accelerate's project configuration (e.g. project_dir)."
    )
    tracker_project_name: str = option("trl", "Name of the project in the tracker.")
    logdir: str = option("logs", "Folder of the trackers' logs, inside the output folder.")
    num_epochs: int = option(100, "Number of rounds: draw, score, accept, fine-tune.")
    save_freq: int = option(1, "Rounds between checkpoints; the last round is always saved.")
    num_checkpoint_limit: int = option(5, "Checkpoints kept; the oldest go first.")
    mixed_precision: str | None = option(
        None,
        "Precision of the frozen weights and of the forward pass; LoRA weights stay in float32. None chooses bf16 on "
        "an accelerator that has it, fp16 on another CUDA device and no mixed precision on the CPU (DDPO: fp16 "
        "everywhere, which does not run on a CPU).",
        choices=["no", "fp16", "bf16"],
    )
    allow_tf32: bool = option(True, "Allow TF32 matrix products on GPUs that have them.")
    resume_from: str = option("", "Checkpoint folder, or a folder of checkpoints of which the newest is taken.")
    sample_num_steps: int = option(50, "Steps of the sampler.")
    sample_eta: float = option(
        0.0,
        "Stochasticity of the DDIM sampler. 0 (DDPO: 1) because then the final image is a function of the "
        "intermediate state, and the reference, started from accepted states, gives exactly the accepted images.",
    )
    sample_guidance_scale: float = option(5.0, "Classifier-free guidance scale while sampling; 1.0 is no guidance.")
    sample_batch_size: int = option(1, "Images of one pipeline call, per process.")
    sample_num_batches_per_epoch: int = option(2, "Pipeline calls per round and process.")
    train_batch_size: int = option(
        1,
        "Accepted samples of one training step, per process. On the embedded model a quarter as many steps of 512 "
        "at twice the learning rate gained as much as steps of 128, in less than half the time (docs/comparison.md).",
    )
    train_use_8bit_adam: bool = option(False, "Use 8-bit AdamW of bitsandbytes.")
    train_learning_rate: float = option(3e-4, "Learning rate of AdamW.")
    train_adam_beta1: float = option(0.9, "AdamW's beta1.")
    train_adam_beta2: float = option(0.999, "AdamW's beta2.")
    train_adam_weight_decay: float = option(1e-4, "AdamW's weight decay.")
    train_adam_epsilon: float = option(1e-8, "AdamW's epsilon.")
    train_gradient_accumulation_steps: int = option(1, "Microbatches of one optimizer step.")
    train_max_grad_norm: float = option(1.0, "Gradient norm above which gradients are scaled down.")
    train_num_inner_epochs: int = option(1, "Passes over the accepted samples of a round.")
    train_cfg: bool = option(
        False,
        "DDPO's name for `guidance_loss='combined'`. False (DDPO: True) because the guided prediction costs a second "
        "forward and backward pass.",
    )
    train_adv_clip_max: float = option(5.0, "PPO only; ignored.")
    train_clip_range: float = option(1e-4, "PPO only; ignored.")
    train_timestep_fraction: float = option(
        1.0,
        "Timesteps each accepted sample is trained at in one pass, as a share of `sample_num_steps` (at least one).",
    )
    per_prompt_stat_tracking: bool = option(False, "PPO only; ignored. Acceptance is per prompt in any case.")
    per_prompt_stat_tracking_buffer_size: int = option(16, "PPO only; ignored.")
    per_prompt_stat_tracking_min_count: int = option(16, "PPO only; ignored.")
    async_reward_computation: bool = option(False, "Score a batch in a thread while the next one is drawn.")
    max_workers: int = option(2, "Threads of `async_reward_computation`.")
    negative_prompts: str = option("", "Negative prompt of the guided call; of a list, joined by commas.")
    push_to_hub: bool = option(False, "Push the adapter to the Hub, with a model card, at the end of training.")

    tuned_fraction: float = option(
        0.6,
        "Share of the sampler's steps, from pure noise, that is fine-tuned and run by the tuned model; the reference "
        "model finishes. 1.0 is GRAFT, less is P-GRAFT. 0.6, because it was the best of a sweep from 0.2 to 1.0 on "
        "the embedded model (one seed; 0.4 not told apart; with more steps 1.0 is as good; docs/comparison.md). "
        "`choose_intermediate_step` proposes one for other models.",
    )
    samples_per_prompt: int | None = option(
        None, "Group size M. None: 8, or all of the round's images where they are fewer."
    )
    acceptance: str = option("top_k", f"Acceptance rule: {', '.join(ACCEPTANCE_RULES)}, or a callable.")
    acceptance_kwargs: dict | str | None = option(
        {}, "Arguments of the acceptance rule, e.g. k of top_k (default: M / 4)."
    )
    deduplicate_by: Callable | None = option(
        None, "Function of (PIL image, prompt) whose value tells equal samples; only one of them is accepted."
    )
    sample_from: str = option(
        "policy",
        "Model that draws the samples: the policy (KL accumulates over rounds) or the untouched reference.",
        choices=["policy", "reference"],
    )
    guidance_loss: str = option(
        "conditional",
        "What is fitted when samples are drawn with guidance w: the 'conditional' prediction to the target f*; the "
        "conditional prediction to the 'corrected' target f_u + (f* - f_u) / w; or the 'combined', guided prediction. "
        "The first, because it was the only one of the three that gained without a control adapter on a real model.",
        choices=list(GUIDANCE_LOSSES),
    )
    control_adapter: bool | None = option(
        None,
        "Train a second, equal adapter on all samples of the round and subtract it: what training does apart from "
        "the reward cancels. Costs a second training of the same length. None: wherever the adapter is a plain LoRA "
        "and the pipeline guides as u + w (c - u) or not at all, because without it four rounds on guided samples "
        "took the embedded model from 0.65 to 0.46, and to 0.31 where everything was accepted; with it and "
        "control_scale=1, to 0.69 and 0.65 (one seed, docs/comparison.md).",
    )
    control_scale: float = option(
        2.0,
        "Factor of the difference that `control_adapter` keeps. Short fits go only part of the way to what they are "
        "fitted to; a factor above 1 goes on in their direction at no cost, and enlarges their noise as well. 2, "
        "with which the best runs of the searches were made; 1.5 gained as much, in equal steps 3 gained more than 1, "
        "and its noise cost 0.11 in seven small rounds that accepted everything (docs/comparison.md). Fits that go "
        "all the way need 1.",
    )
    tuned_guidance_scale: float | None = option(
        None, "Guidance scale of the tuned steps while sampling; 1.0 is none there. None: `sample_guidance_scale`."
    )
    caption_dropout: float = option(
        0.1, "Share of training rows that get the unconditional input (conditional loss of a guided pipeline)."
    )
    timestep_sampling: str = option(
        "continuous",
        "Training timesteps: 'continuous' over the tuned noise levels, or the tuned steps of the 'sampler', which "
        "learns faster for one number of steps and says nothing about others.",
        choices=["continuous", "sampler"],
    )
    lora_rank: int = option(16, "Rank of the LoRA that is made where no `peft_config` is given.")
    max_merged_rank: int = option(
        128, "Largest rank of the adapter that `control_adapter` merges; each round adds twice the rank, up to this."
    )
    ema_decay: float | None = option(
        None, "Decay of a moving average of the adapter over a round's optimizer steps; it becomes the adapter."
    )
    lr_scheduler_type: str = option("constant", "Learning-rate schedule of `diffusers.optimization.get_scheduler`.")
    warmup_steps: int = option(0, "Optimizer steps of learning-rate warm-up.")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass.")
    reward_retries: int = option(
        2, "How often a reward function that raised or timed out is called again before the run stops."
    )
    reward_retry_wait: float = option(1.0, "Seconds before the first of these calls; doubled before each next one.")
    reward_timeout: float | None = option(
        None, "Seconds that one call of a reward function may take. None: as long as it likes."
    )
    eval_prompts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Held-out prompts, drawn with the same seeds at every evaluation; with further columns, give the "
            "trainer an `eval_dataset` in their place."
        },
    )
    eval_freq: int = option(
        1, "Rounds between evaluations on held-out prompts; what training starts as is evaluated first."
    )
    output_dir: str = option("pgraft_output", "Folder for checkpoints, samples and metrics.")
    resume_from_checkpoint: str | None = option(
        None, "TRL's name for `resume_from`; True takes the newest checkpoint of `output_dir`, if there is one."
    )
    hub_model_id: str | None = option(
        None, "Repository of the adapter on the Hub; the name of the output folder where not given."
    )
    hub_dataset_id: str | None = option(
        None, "Dataset repository on the Hub; if given, each round's samples are pushed to it as they are saved."
    )
    hub_private_repo: bool = option(False, "Make these repositories private; public ones are refused.")
    hub_token: str | None = field(default=None, repr=False, metadata={"help": "Token for the Hub; never stored."})

    def __post_init__(self):
        for name in _DICTS:
            setattr(self, name, _as_dict(name, getattr(self, name)))
        if not isinstance(self.negative_prompts, str):
            self.negative_prompts = ", ".join(self.negative_prompts or [])
        if self.train_cfg:
            self.guidance_loss = "combined"
        self._check_ranges()
        self._check_choices()
        self._check_group()
        self._warn_of_ppo_fields()

    @property
    def num_train_timesteps(self) -> int:
        """Timesteps at which each accepted sample is trained in one pass."""
        return max(1, int(self.sample_num_steps * self.train_timestep_fraction))

    def group_size(self, images: int) -> int:
        """Samples per prompt in a round of `images` images (over all processes)."""
        return min(self.samples_per_prompt or 8, images)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, without the token; callables by their name."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "hub_token"}
        return {name: getattr(v, "__name__", str(v)) if callable(v) else v for name, v in values.items()}

    def shaping(self, processes: int) -> dict[str, Any]:
        """What the result depends on, and so must not change when a run is resumed."""
        images = self.sample_batch_size * self.sample_num_batches_per_epoch * processes
        rows = self.train_batch_size * self.train_gradient_accumulation_steps * processes
        fields = {name: value for name, value in self.to_dict().items() if name not in MAY_CHANGE}
        return {**fields, "images a round": images, "rows of an optimizer step": rows}

    def _check_ranges(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{f.name}={value} is not a finite number.")
        for name in ("tuned_fraction", "train_timestep_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is outside (0, 1].")
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("train_learning_rate", "control_scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout={self.caption_dropout} is outside [0, 1).")
        if self.sample_guidance_scale <= 0:
            raise ValueError(f"sample_guidance_scale={self.sample_guidance_scale} must be positive; 1.0 is none.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} is outside (0, 1).")
        if self.tuned_guidance_scale is not None and self.tuned_guidance_scale <= 0:
            raise ValueError(f"tuned_guidance_scale={self.tuned_guidance_scale} must be positive; 1.0 is none.")
        for name in ("reward_retries", "reward_retry_wait"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0.")
        if self.reward_timeout is not None and self.reward_timeout <= 0:
            raise ValueError(f"reward_timeout={self.reward_timeout} must be positive; None waits without end.")

    def _check_choices(self) -> None:
        for f in dataclasses.fields(self):
            choices, value = f.metadata.get("choices"), getattr(self, f.name)
            if choices and value is not None and value not in choices:
                raise ValueError(f"{f.name}={value!r} is not one of {', '.join(map(repr, choices))}.")
        if isinstance(self.acceptance, str) and self.acceptance not in ACCEPTANCE_RULES:
            raise ValueError(
                f"acceptance={self.acceptance!r} is not one of {', '.join(ACCEPTANCE_RULES)}; a callable is taken too."
            )

    def _check_group(self) -> None:
        size, k = self.samples_per_prompt, self.acceptance_kwargs.get("k")
        if size is not None and size < 2:
            raise ValueError(f"samples_per_prompt={size}: selection needs a group of at least 2 samples.")
        if self.acceptance == "preference" and size not in (None, 2):
            raise ValueError(f"samples_per_prompt={size}: acceptance='preference' compares 2 samples per prompt.")
        if self.acceptance == "preference":
            self.samples_per_prompt = 2
        if k is not None and not 1 <= k < (size or 8):
            raise ValueError(
                f"acceptance_kwargs: k={k} of samples_per_prompt={size or 8} must be at least 1 and less than that."
            )
        if isinstance(self.acceptance, str):
            self._try_acceptance()

    def _try_acceptance(self) -> None:
        """Call the rule on rewards below any bound: what it refuses is better known before anything is drawn."""
        rewards = torch.full((self.samples_per_prompt or 8,), -1e30, dtype=torch.float64)
        try:
            ACCEPTANCE_RULES[self.acceptance](rewards, **self.acceptance_kwargs)
        except (TypeError, ValueError) as error:
            raise ValueError(f"acceptance_kwargs do not fit acceptance={self.acceptance!r}: {error}") from error

    def _warn_of_ppo_fields(self) -> None:
        ppo_only = (f for f in dataclasses.fields(self) if f.name in PPO_ONLY_FIELDS)
        given = [f.name for f in ppo_only if getattr(self, f.name) != f.default]
        if given:
            warnings.warn(f"GraftConfig ignores fields that only PPO has a use for: {', '.join(given)}.", stacklevel=4)


def _as_dict(name: str, value: dict[str, Any] | str | None) -> dict[str, Any]:
    """The field's dict, from JSON where a command line gave it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}={value!r} is not JSON: {error}.") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}={value!r} must be a dict, or a JSON object on the command line.")
    return value or {}


_DICTS = ("tracker_kwargs", "accelerator_kwargs", "project_kwargs", "acceptance_kwargs")
_POSITIVE = (
    "num_epochs",
    "save_freq",
    "num_checkpoint_limit",
    "sample_num_steps",
    "sample_batch_size",
    "sample_num_batches_per_epoch",
    "train_batch_size",
    "train_gradient_accumulation_steps",
    "train_num_inner_epochs",
    "max_workers",
    "eval_freq",
    "lora_rank",
    "max_merged_rank",
)
