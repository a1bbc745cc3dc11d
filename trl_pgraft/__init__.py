# SPDX-License-Identifier: Apache-2.0

"""GRAFT and P-GRAFT: fine-tune diffusion models on rewards by rejection sampling, in TRL's ecosystem."""

from .adapters.files import load_pgraft_adapter, save_pgraft_adapter
from .adapters.gate import TimestepGate
from .analysis.intermediate_step import choose_intermediate_step
from .compat.ddpo import DefaultDDPOStableDiffusionPipeline
from .config import GraftConfig
from .core.acceptance import (
    accept_all,
    accept_best_of_n,
    accept_exponential,
    accept_preference,
    accept_threshold,
    accept_top_k,
    deduplicate,
)
from .core.divergence import implied_kl
from .core.parameterizations import renoise
from .core.switch_level import SwitchLevel
from .hub.push import push_adapter_to_hub, push_samples_to_hub
from .noise_correction.config import NoiseCorrectionConfig
from .noise_correction.gaussianity import Gaussianity, gaussianity
from .noise_correction.inversion import Inversion, InversionError, invert_flow
from .noise_correction.pipeline import NoiseCorrectedPipeline
from .noise_correction.trainer import NoiseCorrectionTrainer
from .pipelines.denoiser_format import DenoiserFormat
from .rewards.registry import get_reward, list_rewards, register_reward
from .trainer import PGraftTrainer
from .training.memory import MemoryEstimate, estimate_memory


__all__ = [
    "DefaultDDPOStableDiffusionPipeline",
    "DenoiserFormat",
    "Gaussianity",
    "GraftConfig",
    "Inversion",
    "InversionError",
    "MemoryEstimate",
    "NoiseCorrectedPipeline",
    "NoiseCorrectionConfig",
    "NoiseCorrectionTrainer",
    "PGraftTrainer",
    "SwitchLevel",
    "TimestepGate",
    "accept_all",
    "accept_best_of_n",
    "accept_exponential",
    "accept_preference",
    "accept_threshold",
    "accept_top_k",
    "choose_intermediate_step",
    "deduplicate",
    "estimate_memory",
    "gaussianity",
    "get_reward",
    "implied_kl",
    "invert_flow",
    "list_rewards",
    "load_pgraft_adapter",
    "push_adapter_to_hub",
    "push_samples_to_hub",
    "register_reward",
    "renoise",
    "save_pgraft_adapter",
]
