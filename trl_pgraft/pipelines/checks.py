# SPDX-License-Identifier: Apache-2.0

"""Checks of a pipeline before anything is sampled: refusals in words, and a warning about distilled models."""

import math
import re
import warnings
from typing import Any

import torch
from diffusers import DiffusionPipeline, LCMScheduler, TCDScheduler
from peft import PeftConfig

from ..config import GraftConfig
from .denoiser_call import DenoiserCall, denoiser_of
from .denoiser_format import DenoiserFormat
from .inputs import parameters_of
from .introspection import Introspection, StepFacts


FEW_STEPS = 8
# LoRA initialisations by which PEFT takes the adapter's share out of the frozen weights.
TAKEN_FROM_THE_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def guides_plainly(call: DenoiserCall) -> bool:
    """Whether the pipeline guides as `u + w (c - u)`, with a w that is known, or not at all."""
    return not call.is_guided or call.guidance_scale is not None


def check_call(call: DenoiserCall, config: GraftConfig, pipeline: DiffusionPipeline) -> None:
    """
    Check that what the configuration does with guidance fits how the pipeline guides.

    Raises:
        `ValueError`: guidance other than `u + w (c - u)`, and a loss, sampling or difference that needs w; or a scale
            of the tuned steps where the denoiser's output is not the prediction.
    """
    if config.tuned_guidance_scale is not None and type(call.format).prediction is not DenoiserFormat.prediction:
        raise ValueError(
            f"tuned_guidance_scale: {type(call.format).__name__} overrides what the prediction is, and the scale is "
            "changed in the denoiser's own output. Leave it at None."
        )
    if guides_plainly(call):
        return
    needing = {
        f"guidance_loss={config.guidance_loss!r}": config.guidance_loss != "conditional",
        f"tuned_guidance_scale={config.tuned_guidance_scale}": config.tuned_guidance_scale is not None,
        "control_adapter=True": config.control_adapter,
    }
    named = [name for name, is_set in needing.items() if is_set]
    if named:
        raise ValueError(
            f"{', '.join(named)}: {type(pipeline).__name__} combines its two branches otherwise than as "
            "u + w (c - u), for example by rescaling the sum, and w is needed here. Switch the rescaling off in "
            "pipeline_kwargs (`cfg_normalization=False`, `guidance_rescale=0.0`) where the pipeline lets you, or use "
            "guidance_loss='conditional' without these."
        )


def check_steps(introspection: Introspection, step_index: int, pipeline: DiffusionPipeline) -> None:
    """
    Check that the denoiser is called alike in all tuned steps, because one recording of a prompt serves them all.

    Args:
        introspection ([`Introspection`]):
            What the pipeline's steps showed.
        step_index (`int`):
            Denoiser calls that come before x_I, those of the tuned steps.
        pipeline (`DiffusionPipeline`):
            The pipeline, for its name.

    Raises:
        `ValueError`: an argument of the denoiser changes with the step or the state, or guidance does; the message
            names it, and the share of the steps before the change.
    """
    name, steps = type(pipeline).__name__, introspection.steps
    first, latents = steps[0], introspection.call.format.latents(introspection.first_step[0])
    for index, step in enumerate(steps[:step_index]):
        share = f"Set tuned_fraction to at most {index / len(steps):.3g}, or "
        if step.changed:
            raise ValueError(
                f"{name} gives its denoiser another {', '.join(step.changed)} in step {index + 1} of {len(steps)}: it "
                "depends on the step or on the state, and training records it once for each prompt. "
                f"{share}tune with a pipeline without it."
            )
        if step.denoiser_timestep is not None and not _guided_alike(step, first, latents.dtype):
            raise ValueError(
                f"{name} changes its guidance in step {index + 1} of {len(steps)}: {step.branches} branches with "
                f"scale {step.guidance_scale} after {first.branches} with {first.guidance_scale}, and the tuned steps "
                f"must be guided alike. {share}let pipeline_kwargs keep the guidance constant."
            )


def _guided_alike(step: StepFacts, other: StepFacts, dtype: torch.dtype) -> bool:
    # In half precision rounding may hide which guidance it is.
    own, others = step.guidance_scale, other.guidance_scale
    if own is None or others is None:
        return step.branches == other.branches and (own is others or dtype != torch.float32)
    return step.branches == other.branches and math.isclose(own, others, rel_tol=0.02)


def warn_if_distilled(pipeline: DiffusionPipeline, call: DenoiserCall, arguments: dict[str, Any]) -> None:
    """Warn where scheduler or guidance show a few-step distilled model, and say what the risk is."""
    steps = arguments.get("num_inference_steps", 0)
    spacing = getattr(pipeline.scheduler.config, "timestep_spacing", None)
    could_guide = any("guidance_scale" in name or name == "true_cfg_scale" for name in parameters_of(pipeline))
    if isinstance(pipeline.scheduler, LCMScheduler | TCDScheduler):
        sign = f"its scheduler is {type(pipeline.scheduler).__name__}"
    elif getattr(denoiser_of(pipeline).config, "time_cond_proj_dim", None) is not None:
        sign = "its denoiser takes the guidance scale as an input (time_cond_proj_dim)"
    elif could_guide and not call.is_guided and steps <= FEW_STEPS:
        sign = f"it makes {steps} steps without guidance" + (" on trailing timesteps" if spacing == "trailing" else "")
    else:
        return
    warnings.warn(
        f"{type(pipeline).__name__} looks like a few-step distilled model: {sign}. Fine-tuning regresses on targets "
        "of a many-step diffusion model, whose mean is blurred at high noise, so it tends to undo the distillation: "
        "few-step samples lose detail while the reward may still rise. Compare held-out images (eval_prompts), or "
        "tune the model that was distilled.",
        stacklevel=3,
    )


def check_peft_config(pipeline: DiffusionPipeline, peft_config: PeftConfig) -> None:
    """
    Check that an adapter's modules are the denoiser's, and that without it the denoiser is what it was.

    Raises:
        `ValueError`: its modules are a text encoder's, or no component has them; or it changes more than the adapter.
    """
    _check_that_it_can_be_taken_out(peft_config)
    targets = getattr(peft_config, "target_modules", None)
    if not targets or targets == "all-linear":
        return
    if _has_any(denoiser_of(pipeline), targets):
        return
    encoders = {n: m for n, m in pipeline.components.items() if n.startswith("text_encoder") and m is not None}
    found = [name for name, module in encoders.items() if _has_any(module, targets)]
    wanted = targets if isinstance(targets, str) else ", ".join(sorted(targets))
    if found:
        raise ValueError(
            f"peft_config: target_modules {wanted} are modules of {' and '.join(found)}. An "
            "adapter on a text encoder is not supported: the conditioning is recorded once for each prompt, and "
            "cannot be switched at a noise level, because the text is encoded before the first step. Name modules of "
            f"the {type(denoiser_of(pipeline)).__name__}."
        )
    raise ValueError(f"peft_config: {type(denoiser_of(pipeline)).__name__} has no modules {wanted}.")


def _check_that_it_can_be_taken_out(peft_config: PeftConfig) -> None:
    """The reference is the denoiser with the adapter off: nothing may stay behind."""
    start, bias = getattr(peft_config, "init_lora_weights", None), getattr(peft_config, "bias", "none")
    if isinstance(start, str) and start.lower().startswith(TAKEN_FROM_THE_WEIGHTS):
        raise ValueError(
            f"peft_config: init_lora_weights={start!r} changes the frozen weights, and the reference is the model as "
            "it was handed in. Use another initialisation, such as 'gaussian'."
        )
    if bias != "none":
        raise ValueError(
            f"peft_config: bias={bias!r} trains biases of the model itself, which cannot be switched off at a noise "
            "level. Use bias='none'."
        )
    if getattr(peft_config, "modules_to_save", None):
        raise ValueError(
            f"peft_config: modules_to_save={list(peft_config.modules_to_save)} are no part of an adapter that is "
            "switched at a noise level. Name them in target_modules, or leave them out."
        )


def _has_any(module: torch.nn.Module, targets: Any) -> bool:
    names = [name for name, _ in module.named_modules()]
    if isinstance(targets, str):  # to PEFT, a regular expression
        return any(re.fullmatch(targets, name) for name in names)
    return any(name == target or name.endswith(f".{target}") for name in names for target in targets)
