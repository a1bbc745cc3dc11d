# SPDX-License-Identifier: Apache-2.0

"""Inverse noise correction: a flow model's noise is learned from real data, without a reward."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from PIL import Image

from ..adapters.gate import gate_on
from ..adapters.lora import default_lora_config, tuner_layers
from ..core.seeding import seed_of
from ..hub.cards import repository_of
from ..pipelines.conditioning import Conditioning
from ..pipelines.denoiser_call import denoiser_of
from ..pipelines.denoiser_format import DenoiserFormat, uncompiled
from ..pipelines.inputs import takes_prompts
from ..pipelines.placement import check_adaptable, on_device, place_pipeline
from ..training.checkpoints import archive_previous_run
from .config import NoiseCorrectionConfig
from .correctors.flow import (
    CORRECTION_ADAPTER,
    AdapterCorrector,
    FlowCorrector,
    NetworkCorrector,
    add_correction_adapter,
    make_network,
)
from .correctors.gaussian import GaussianCorrector, check_size
from .dataset import DatasetInverter, InvertedData, encode_images
from .fine_tuning import CHECKPOINT_FILE, CorrectorData, CorrectorFit, split
from .gaussianity import gaussianity
from .inversion import FlowSampler
from .pipeline import NoiseCorrectedPipeline


# Samples that are compared with N(0, I), and values: the classifier's features are some ten times as many.
MOST_COMPARED = 10_000
MOST_VALUES_COMPARED = 30_000_000
METRICS_FILE = "metrics.jsonl"
CORRECTOR_FOLDER = "corrector"


class NoiseCorrectionTrainer:
    """
    Make a flow model's samples more like real data by correcting the noise that it starts from (arXiv 2510.02692).

    Real data are mapped back to noise by the exact inverse of the sampler in use. Because the model is imperfect, that
    noise is not standard normal. A corrector learns to generate it, and sampling runs corrector, then model. No reward
    is needed.

    Args:
        config ([`NoiseCorrectionConfig`], *optional*):
            Configuration.
        pipeline (`DiffusionPipeline`):
            A flow pipeline with an Euler scheduler (`FlowMatchEulerDiscreteScheduler`), whose call takes `latents`.
        train_dataset (`datasets.Dataset`):
            Real data: a column `image` of PIL images, or `latents` in the layout that the pipeline returns with
            `output_type="latent"`; and a column `prompt` where the pipeline takes prompts.
        peft_config (`PeftConfig`, *optional*):
            Adapter for `corrector="lora"`; a LoRA on the attention projections where not given.
        network (`torch.nn.Module`, *optional*):
            For `corrector="network"`: a diffusers model called as `network(x, timestep).sample`; a small UNet where
            not given.
        pipeline_kwargs (`dict`, *optional*):
            Further arguments of the pipeline call, `height` and `width` among them.
        encode (`Callable`, *optional*):
            List of PIL images to latents of shape `(B, ...)`; the pipeline's VAE where not given, or pixels in [-1, 1]
            where it has none.
        denoiser_format (`type`, *optional*):
            Subclass of [`DenoiserFormat`] for a denoiser that the default does not serve.

    Raises:
        `ValueError`: the arguments do not fit together, or the sampler is not Euler's.

    Example:

    ```python
    config = NoiseCorrectionConfig(num_inference_steps=10, corrector="network", max_unconverged=0.01)
    trainer = NoiseCorrectionTrainer(config, pipeline, load_dataset("path/to/images", split="train"))
    corrected = trainer.train()
    image = corrected(num_inference_steps=10).images[0]
    ```
    """

    def __init__(
        self,
        config: NoiseCorrectionConfig | None = None,
        pipeline: Any = None,
        train_dataset: Any = None,
        *,
        peft_config: Any = None,
        network: torch.nn.Module | None = None,
        pipeline_kwargs: dict[str, Any] | None = None,
        encode: Callable[[list[Image.Image]], torch.Tensor] | None = None,
        denoiser_format: type[DenoiserFormat] | None = None,
    ):
        self.config = config = config or NoiseCorrectionConfig()
        _check_arguments(config, pipeline, train_dataset, peft_config, network)
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision)
        if config.train_batch_size % self.accelerator.num_processes:
            raise ValueError(
                f"train_batch_size={config.train_batch_size} is not divisible by the {self.accelerator.num_processes} "
                "processes that share it."
            )
        # With all columns, images as PIL's and latents as arrays, whatever format is set; a transform stays.
        plain = train_dataset.with_format("numpy" if "latents" in train_dataset.column_names else None)
        self.train_dataset = train_dataset if train_dataset.format["type"] == "custom" else plain
        self.pipeline = pipeline
        self.output_dir = Path(config.output_dir)
        # In its own precision: an inverse cannot be closer than that.
        place_pipeline(pipeline, self.accelerator.device)
        self.kwargs = {**(pipeline_kwargs or {}), "num_inference_steps": config.num_inference_steps}
        self.sampler = FlowSampler.of(pipeline, self.kwargs, config.guided, denoiser_format)
        self.inverted_steps = self.sampler.steps_down_to(config.lowest_sigma)
        if not self.inverted_steps:
            raise ValueError(
                f"lowest_sigma={config.lowest_sigma:g}: none of the {config.num_inference_steps} steps ends at that "
                f"noise level or above, the first at {self.sampler.levels[0]:.3g}. Lower it, or raise "
                "num_inference_steps."
            )
        self.encode = encode or partial(encode_images, pipeline, self.kwargs)
        # A Gaussian is there once it is fitted.
        self.corrector = None if config.corrector == "gaussian" else self._make_corrector(peft_config, network)
        trained_for = {
            "base_model": repository_of(pipeline),
            "num_inference_steps": config.num_inference_steps,
            "guided": config.guided,
            "samples": len(train_dataset),
        }
        self.corrected = NoiseCorrectedPipeline(
            pipeline, self.corrector, config.corrector_steps, trained_for, denoiser_format
        )

    def _make_corrector(self, peft_config: Any, network: torch.nn.Module | None) -> FlowCorrector:
        denoiser, seed = denoiser_of(self.pipeline), seed_of(self.config.seed, "corrector")
        if self.config.corrector == "lora":
            check_adaptable(denoiser)
            _check_free(denoiser)
            peft_config = peft_config or default_lora_config(uncompiled(denoiser), self.config.lora_rank)
            add_correction_adapter(uncompiled(denoiser), peft_config, seed)
            if self.config.gradient_checkpointing:
                denoiser.enable_gradient_checkpointing()
            return AdapterCorrector(denoiser)
        if network is None:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                network = make_network(tuple(self.sampler.like.shape[1:]), self.config.network_channels)
        if self.config.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        return NetworkCorrector(network.to(self.accelerator.device).eval().requires_grad_(True))

    def invert(self) -> InvertedData:
        """
        Map the data set to noise, and write to `inversion.json` how far that is from N(0, I).

        What is on disk already, of this model, sampler and data, is not inverted again.

        Raises:
            [`InversionError`]: more samples than `max_unconverged` allows did not converge; its notes name them.
        """
        started = time.perf_counter()
        inverter = DatasetInverter(
            self.sampler, self.train_dataset, self.encode, self.config, self.output_dir / "inverted"
        )
        data = inverter.run(self.accelerator)
        if self.accelerator.is_main_process:
            self._report(data, time.perf_counter() - started)
        return data

    def _report(self, data: InvertedData, seconds: float) -> None:
        """Write `inversion.json`, unless it is there and tells of the same noise."""
        path = self.output_dir / "inversion.json"
        if path.is_file() and json.loads(path.read_text()).get("noise") == data.fingerprint:
            return
        report = {
            "noise": data.fingerprint,
            "samples": len(data.rows),
            "left_out": len(self.train_dataset) - len(data.rows),
            "largest_residual": data.residuals.max().item(),
            "evaluations_per_step": data.iterations.double().mean().item() / self.inverted_steps,
            "seconds": seconds,
        }
        if len(data.rows) >= 20:
            found = gaussianity(some_of(data.noise, self.config.seed), self.config.seed)
            self.accelerator.print(f"Inverted noise beside standard normal noise:\n{found}")
            report["gaussianity"] = asdict(found)
        path.write_text(json.dumps(report, indent=2) + "\n")

    def train(self) -> NoiseCorrectedPipeline:
        """
        Invert the data, fit the corrector and save it to `corrector` in the output folder.

        The checkpoint, metrics and corrector of an earlier run that is not resumed are moved to `previous_<n>` there.

        Returns:
            [`NoiseCorrectedPipeline`]: the pipeline with its corrector.

        Raises:
            `ValueError`: the corrector is a Gaussian, and there are too few samples for it, or too many elements.
        """
        if self.config.corrector == "gaussian":
            check_size(len(split(len(self.train_dataset), self.config)[1]), self.sampler.like[0].numel())
        data = self.invert()
        if self.accelerator.is_main_process and not self.config.resume_from_checkpoint:
            archive_previous_run(self.output_dir, [CHECKPOINT_FILE, METRICS_FILE, CORRECTOR_FOLDER])
        self.accelerator.wait_for_everyone()
        if self.config.corrector == "gaussian":
            self.corrector = self.corrected.corrector = self._fit_gaussian(data.noise)
        else:
            self.fit = CorrectorFit(
                self.accelerator, self.corrector, self._training_data(data), self.config, self.output_dir, self.log
            )
            with on_device(self.pipeline, denoiser_of(self.pipeline), self.accelerator):
                self.fit.run()
        self.save_model()
        if self.config.push_to_hub:
            self.push_to_hub()
        return self.corrected

    def _fit_gaussian(self, noise: torch.Tensor) -> GaussianCorrector:
        held_out, rows = split(len(noise), self.config)
        gaussian = GaussianCorrector.fit(noise[rows].to(self.accelerator.device))
        if len(held_out):
            self.log({"held_out/nats_gained": gaussian.nats_gained(noise[held_out].to(self.accelerator.device))})
        return gaussian

    def _training_data(self, data: InvertedData) -> CorrectorData:
        if isinstance(self.corrector, NetworkCorrector):  # knows no prompts, and there may be many
            rows = torch.zeros(len(data.rows), dtype=torch.int64)
            return CorrectorData(data, rows, self.sampler.call, Conditioning({}, None, {}))
        has_prompts = "prompt" in self.train_dataset.column_names
        prompts = list(self.train_dataset["prompt"]) if has_prompts else [""] * len(self.train_dataset)
        unique = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        rows = torch.tensor([unique[prompts[row]] for row in data.rows.tolist()])
        return CorrectorData(data, rows, self.sampler.call, self.sampler.record(list(unique)))

    def log(self, metrics: dict[str, float]) -> None:
        """Append a line of metrics to `metrics.jsonl` in the output folder."""
        if self.accelerator.is_main_process:
            with open(self.output_dir / METRICS_FILE, "a") as file:
                file.write(json.dumps(metrics) + "\n")

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Save the corrector to a folder; `corrector` in the output folder where none is given."""
        if self.accelerator.is_main_process:
            self.corrected.save_pretrained(output_dir or self.output_dir / CORRECTOR_FOLDER)
        self.accelerator.wait_for_everyone()

    def push_to_hub(self, commit_message: str = "Upload noise corrector", revision: str | None = None) -> str | None:
        """
        Push the corrector to `config.hub_model_id`, from the main process.

        Returns:
            `str` or `None`: the repository, on the main process.

        Raises:
            [`PushError`]: the Hub did not take it; the message has the command that pushes it later.
        """
        config = self.config
        if self.accelerator.is_main_process:
            return self.corrected.push_to_hub(
                config.hub_model_id or self.output_dir.resolve().name,
                private=config.hub_private_repo,
                token=config.hub_token,
                commit_message=commit_message,
                revision=revision,
            )


def _check_arguments(
    config: NoiseCorrectionConfig, pipeline: Any, dataset: Any, peft_config: Any, network: Any
) -> None:
    if pipeline is None or dataset is None:
        raise ValueError("pipeline and train_dataset are required: a diffusers flow pipeline, and real data.")
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(
            f"train_dataset is a {type(dataset).__name__}; it needs to be a datasets.Dataset: one split, not streamed."
        )
    columns = dataset.column_names
    if "image" not in columns and "latents" not in columns:
        raise ValueError(f"train_dataset has the columns {columns}; it needs `image` (PIL images) or `latents`.")
    if "prompt" not in columns and takes_prompts(pipeline):
        raise ValueError(
            f"train_dataset has the columns {columns}; {type(pipeline).__name__} takes prompts, so it needs `prompt` "
            "as well, of empty strings where there is nothing to say."
        )
    if not len(dataset):
        raise ValueError("train_dataset is empty.")
    if network is not None and not isinstance(network, ModelMixin):
        raise ValueError(
            f"network: a {type(network).__name__} is no diffusers model, so it could not be saved. Derive it from "
            "diffusers.ModelMixin and ConfigMixin."
        )
    if network is not None and config.corrector != "network":
        raise ValueError(f"network: given with corrector={config.corrector!r}; set corrector='network'.")
    if peft_config is not None and config.corrector != "lora":
        raise ValueError(f"peft_config: given with corrector={config.corrector!r}; set corrector='lora'.")


def _check_free(denoiser: torch.nn.Module) -> None:
    """Refuse a denoiser that a LoRA corrector cannot be trained in, before anything is inverted."""
    if gate_on(denoiser) is not None:
        raise ValueError(
            "corrector='lora': the denoiser has a TimestepGate, and the rows of a training batch have different noise "
            "levels. Remove the gate, or use corrector='network', for which it stays."
        )
    if tuner_layers(uncompiled(denoiser), CORRECTION_ADAPTER):
        raise ValueError(
            "corrector='lora': the denoiser has a corrector already, of another NoiseCorrectionTrainer or of "
            "NoiseCorrectedPipeline.from_pretrained. Load the pipeline anew."
        )


def some_of(noise: torch.Tensor, seed: int) -> torch.Tensor:
    """A random part of the samples, which may be sorted, that is quickly compared with N(0, I)."""
    count = min(MOST_COMPARED, max(20, MOST_VALUES_COMPARED // noise[0].numel()))
    generator = torch.Generator().manual_seed(seed_of(seed, "compared"))
    return noise[torch.randperm(len(noise), generator=generator)[:count]]
