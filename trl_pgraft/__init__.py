# Copyright 2026 The trl_pgraft authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.


"""GRAFT and P-GRAFT: fine-tune diffusion models on rewards by rejection sampling, in TRL's ecosystem."""

from .acceptance import (
    accept_all,
    accept_best_of_n,
    accept_exponential,
    accept_preference,
    accept_threshold,
    accept_top_k,
    deduplicate,
    implied_kl,
)
from .config import GraftConfig
from .ddpo import DefaultDDPOStableDiffusionPipeline
from .denoiser_format import DenoiserFormat
from .diagnostics import choose_intermediate_step
from .hub import load_pgraft_adapter, save_pgraft_adapter
from .memory import MemoryEstimate, estimate_memory
from .noise_correction import (
    Gaussianity,
    Inversion,
    InversionError,
    NoiseCorrectedPipeline,
    NoiseCorrectionConfig,
    NoiseCorrectionTrainer,
    gaussianity,
    invert_flow,
)
from .parameterizations import renoise
from .publishing import push_adapter_to_hub, push_samples_to_hub
from .rewards import get_reward, list_rewards, register_reward
from .timestep_gate import SwitchLevel, TimestepGate
from .trainer import PGraftTrainer


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
