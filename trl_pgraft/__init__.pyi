# SPDX-License-Identifier: Apache-2.0

"""The public names of the package. `__init__.py` reads this file, and imports each when it is first used."""

from .adapters.files import load_pgraft_adapter as load_pgraft_adapter, save_pgraft_adapter as save_pgraft_adapter
from .adapters.gate import TimestepGate as TimestepGate
from .adapters.guidance import TunedGuidance as TunedGuidance
from .analysis.intermediate_step import choose_intermediate_step as choose_intermediate_step
from .compat.ddpo import DefaultDDPOStableDiffusionPipeline as DefaultDDPOStableDiffusionPipeline
from .config import GraftConfig as GraftConfig
from .core.acceptance import (
    accept_all as accept_all,
    accept_best_of_n as accept_best_of_n,
    accept_exponential as accept_exponential,
    accept_preference as accept_preference,
    accept_threshold as accept_threshold,
    accept_top_k as accept_top_k,
    deduplicate as deduplicate,
)
from .core.divergence import implied_kl as implied_kl
from .core.parameterizations import renoise as renoise
from .core.switch_level import SwitchLevel as SwitchLevel
from .hub.push import push_adapter_to_hub as push_adapter_to_hub, push_samples_to_hub as push_samples_to_hub
from .noise_correction.config import NoiseCorrectionConfig as NoiseCorrectionConfig
from .noise_correction.gaussianity import Gaussianity as Gaussianity, gaussianity as gaussianity
from .noise_correction.inversion import (
    Inversion as Inversion,
    InversionError as InversionError,
    invert_flow as invert_flow,
)
from .noise_correction.pipeline import NoiseCorrectedPipeline as NoiseCorrectedPipeline
from .noise_correction.trainer import NoiseCorrectionTrainer as NoiseCorrectionTrainer
from .pipelines.denoiser_format import DenoiserFormat as DenoiserFormat
from .pipelines.introspection import introspect as introspect
from .rewards.registry import (
    get_reward as get_reward,
    list_rewards as list_rewards,
    register_reward as register_reward,
)
from .trainer import PGraftTrainer as PGraftTrainer
from .training.memory import MemoryEstimate as MemoryEstimate, estimate_memory as estimate_memory
