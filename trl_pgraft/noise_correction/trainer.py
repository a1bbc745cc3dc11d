# SPDX-License-Identifier: Apache-2.0

"""Train a noise corrector: invert the data, train the corrector on the noise, save it and push it."""

import json
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft import PeftConfig

from ..adapters.files import CORRECTOR_FOLDER
from ..adapters.lora import default_lora_config
from ..core.seeding import seed_of
from ..hub.facts import repository_of
from ..pipelines.conditioning import Conditioning
from ..pipelines.denoiser_call import denoiser_of
from ..pipelines.denoiser_format import DenoiserFormat, uncompiled
from ..pipelines.placement import on_device, place_pipeline
from ..training.checkpoints import archive_previous_run
from ..training.optimizer import launched_accelerator
from ..training.run_log import METRICS_FILE, RunLog
from .checks import check_arguments
from .config import NoiseCorrectionConfig
from .correctors import Corrector, FlowCorrector, LoraCorrector, NetworkCorrector, NoCorrector
from .correctors.gaussian import NO_CORRECTOR, families_of, fit_gaussian
from .correctors.network import make_network
from .dataset import DatasetInverter, Encoder, InvertedData
from .fine_tuning import CHECKPOINT_FILE, CorrectorData, CorrectorFinetuner, split
from .flow_sampler import FlowSampler
from .gaussianity import gaussianity, random_part
from .pipeline import NoiseCorrectedPipeline
from .round_trip import round_trip, said_of


ROUND_TRIPS = 8  # samples


class NoiseCorrectionTrainer:
    """
    Make a flow model's samples more like real data by correcting the noise that it starts from (arXiv 2510.02692).

    Real data are mapped back to noise by the exact inverse of the sampler in use. Because the model is imperfect, that
    noise is not standard normal. A corrector learns to generate it, and sampling runs corrector, then model. No reward
    is needed.

    Args:
        config ([`NoiseCorrectionConfig`], *optional*):
            Configuration; all defaults where not given.
        pipeline (`DiffusionPipeline`):
            A flow pipeline with an Euler scheduler (`FlowMatchEulerDiscreteScheduler`), whose call takes `latents`. It
            is moved to this process's device in its own precision, and its weights are frozen.
        train_dataset (`datasets.Dataset`):
            Real data: a column `image` of PIL images, or `latents` in the layout that the pipeline returns with
            `output_type="latent"`; and a column `prompt` where the pipeline takes prompts.
        peft_config (`PeftConfig`, *optional*):
            Adapter for `corrector="lora"`; a LoRA of rank `config.lora_rank` on the attention projections where not
            given.
        network (`diffusers.ModelMixin`, *optional*):
            Network for `corrector="network"`, called as `network(x, timestep).sample` with x of the shape of the
            latents; a UNet of `config.network_channels` channels where not given.
        pipeline_kwargs (`dict`, *optional*):
            Further arguments of the pipeline call, such as `height` and `width` in pixels and `guidance_scale`; the
            call's own defaults hold for the others. `num_inference_steps` is that of the configuration.
        encode (`Callable`, *optional*):
            Maps a list of `B` PIL images to latents of shape `(B, ...)`; the pipeline's VAE where not given, or pixels
            in [-1, 1] where it has none.
        denoiser_format (`type`, *optional*):
            Subclass of [`DenoiserFormat`] for a denoiser whose arguments or output the default does not read.

    Raises:
        `ValueError`: the arguments do not fit together, the sampler is not Euler's, none of its steps ends at
            `config.lowest_sigma` or above, or the denoiser takes no LoRA as it is.

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
        pipeline: DiffusionPipeline | None = None,
        train_dataset: datasets.Dataset | None = None,
        *,
        peft_config: PeftConfig | None = None,
        network: ModelMixin | None = None,
        pipeline_kwargs: dict[str, Any] | None = None,
        encode: Encoder | None = None,
        denoiser_format: type[DenoiserFormat] | None = None,
    ):
        self.config = config = config or NoiseCorrectionConfig()
        if pipeline is None or train_dataset is None:
            raise ValueError("pipeline and train_dataset are required: a diffusers flow pipeline, and real data.")
        check_arguments(config, pipeline, train_dataset, peft_config, network, pipeline_kwargs)
        self.accelerator = launched_accelerator(config.mixed_precision)
        if config.train_batch_size % self.accelerator.num_processes:
            raise ValueError(
                f"train_batch_size={config.train_batch_size} is not divisible by the {self.accelerator.num_processes} "
                "processes that share it."
            )
        # Read all columns, images as PIL's and latents as arrays, whatever format is set. A transform is kept.
        plain = train_dataset.with_format("numpy" if "latents" in train_dataset.column_names else None)
        self.train_dataset = train_dataset if train_dataset.format["type"] == "custom" else plain
        self.pipeline, self.output_dir = pipeline, Path(config.output_dir)
        # In its own precision: an inverse cannot be more exact than that.
        place_pipeline(pipeline, self.accelerator.device)
        kwargs = {**(pipeline_kwargs or {}), "num_inference_steps": config.num_inference_steps}
        self.sampler = FlowSampler(pipeline, kwargs, config.guided, denoiser_format)
        self.inverter = DatasetInverter(self.sampler, self.train_dataset, encode, config, self.output_dir / "inverted")
        # A Gaussian is made when it is fitted.
        self.corrector: Corrector | None = None if self._is_gaussian else self._make_corrector(peft_config, network)
        trained_for = {
            "base_model": repository_of(pipeline),
            "num_inference_steps": config.num_inference_steps,
            "guided": config.guided,
            "samples": len(train_dataset),
            "shape": list(self.sampler.like.shape[1:]),
        }
        self.corrected = NoiseCorrectedPipeline(
            pipeline, self.corrector, config.corrector_steps, trained_for, denoiser_format
        )

    @property
    def _is_gaussian(self) -> bool:
        return self.config.corrector.startswith("gaussian")

    def _make_corrector(self, peft_config: PeftConfig | None, network: ModelMixin | None) -> FlowCorrector:
        denoiser, seed = denoiser_of(self.pipeline), seed_of(self.config.seed, "corrector")
        if self.config.corrector == "lora":
            corrector: FlowCorrector = LoraCorrector.new(
                denoiser, peft_config or default_lora_config(uncompiled(denoiser), self.config.lora_rank), seed
            )
        else:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                network = network or make_network(tuple(self.sampler.like.shape[1:]), self.config.network_channels)
            corrector = NetworkCorrector(network.to(self.accelerator.device).eval().requires_grad_(True))
        if self.config.gradient_checkpointing:
            uncompiled(corrector.module).enable_gradient_checkpointing()
        return corrector

    def invert(self) -> InvertedData:
        """
        Map the data set to noise, and write to `inversion.json` how far that is from N(0, I).

        What the output folder has already, of the same model, sampler and data, is not inverted again.

        Returns:
            [`InvertedData`]: the noise of the samples that converged, in every process.

        Raises:
            [`InversionError`]: more samples than `max_unconverged` allows did not converge; its notes name the rows.
            `RuntimeError`: more samples did not converge in all processes, or in earlier runs, than are allowed; or
                the data set is not the same at each reading.
        """
        started = time.perf_counter()
        data = self.inverter.run(self.accelerator)
        if self.accelerator.is_main_process:
            self._write_report(data, time.perf_counter() - started)
        return data

    def _write_report(self, data: InvertedData, seconds: float) -> None:
        path = self.output_dir / "inversion.json"
        earlier = json.loads(path.read_text()) if path.is_file() else {}
        if earlier.get("noise") == data.fingerprint and "round_trip" in earlier:
            return
        batch = self.train_dataset[: min(ROUND_TRIPS, self.config.inversion_batch_size)]
        trip = round_trip(self.sampler, self.inverter.steps, batch, self.config)
        self.accelerator.print(said_of(trip, self.config.tolerance))
        report = {
            "noise": data.fingerprint,
            "samples": len(data.rows),
            "left_out": len(self.train_dataset) - len(data.rows),
            "largest_residual": data.residuals.max().item(),
            "evaluations_per_step": data.iterations.double().mean().item() / self.inverter.steps,
            "seconds": seconds,
            "round_trip": trip,
        }
        if len(data.rows) >= 20:
            found = gaussianity(random_part(data.noise, self.config.seed), self.config.seed)
            self.accelerator.print(f"Inverted noise and standard normal noise:\n{found}")
            report["gaussianity"] = asdict(found)
        path.write_text(json.dumps(report, indent=2) + "\n")

    def train(self) -> NoiseCorrectedPipeline:
        """
        Invert the data, train the corrector and save it to `corrector` in the output folder.

        The checkpoint, metrics and corrector of an earlier run that is not resumed are moved to `previous_<n>` there.

        Returns:
            [`NoiseCorrectedPipeline`]: the pipeline with its corrector.

        Raises:
            `ValueError`: the corrector is a Gaussian, and there are too few samples for it, or too many elements; or
                the checkpoint that is resumed is of another configuration.
            `RuntimeError`: see [`~NoiseCorrectionTrainer.invert`]; or ten optimizer steps in a row had a non-finite
                loss or gradient.
            [`InversionError`]: see [`~NoiseCorrectionTrainer.invert`].
        """
        if self._is_gaussian:
            held_out, rows = split(len(self.train_dataset), self.config)
            families_of(self.config.corrector, len(rows), len(held_out), self.sampler.like.shape[1:])
        data = self.invert()
        if self.accelerator.is_main_process and not self.config.resume_from_checkpoint:
            archive_previous_run(self.output_dir, [CHECKPOINT_FILE, METRICS_FILE, CORRECTOR_FOLDER])
        self.accelerator.wait_for_everyone()
        if not isinstance(self.corrector, FlowCorrector):
            self.corrector = self.corrected.corrector = self._fit_gaussian(data.noise)
        else:
            training_data = self._training_data(data)
            called = [denoiser_of(self.pipeline), *self.sampler.call.control_modules]
            with on_device(self.pipeline, called, self.accelerator):
                self.finetuner = CorrectorFinetuner(
                    self.accelerator, self.corrector, training_data, self.config, self.output_dir, self.log
                )
                self.finetuner.run()
        self.save_model()
        if self.config.push_to_hub:
            self.push_to_hub()
        return self.corrected

    def _fit_gaussian(self, noise: torch.Tensor) -> Corrector:
        held_out, rows = split(len(noise), self.config)
        arguments = (self.config.corrector, self.accelerator.device)
        corrector, gained = fit_gaussian(noise[rows], noise[held_out], *arguments)
        if gained:
            best = 0.0 if isinstance(corrector, NoCorrector) else gained[corrector.family]
            of_each = {f"held_out/nats_gained_{name}": value for name, value in gained.items()}
            self.log({"held_out/nats_gained": best, **of_each})
        if isinstance(corrector, NoCorrector):
            warnings.warn(f"corrector={self.config.corrector!r}: {NO_CORRECTOR}", stacklevel=3)
        self.corrected.trained_for["family"] = getattr(corrector, "family", "N(0, I)")
        return corrector

    def _training_data(self, data: InvertedData) -> CorrectorData:
        if isinstance(self.corrector, NetworkCorrector):  # does not depend on prompts, and encoding many takes long
            return CorrectorData(
                data, torch.zeros(len(data.rows), dtype=torch.int64), self.sampler.call, Conditioning({}, None, {})
            )
        has_prompts = "prompt" in self.train_dataset.column_names
        prompts = list(self.train_dataset["prompt"]) if has_prompts else [""] * len(self.train_dataset)
        row_of = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        rows = torch.tensor([row_of[prompts[sample]] for sample in data.rows.tolist()])
        return CorrectorData(data, rows, self.sampler.call, self.sampler.record(list(row_of)))

    def log(self, metrics: dict[str, float]) -> None:
        """Append a line of `metrics` to `metrics.jsonl` in the output folder."""
        RunLog(self.output_dir, self.accelerator).write(metrics)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """
        Save the corrector, without the pipeline, from the main process.

        Args:
            output_dir (`str` or `Path`, *optional*):
                Folder to write to; `corrector` in the output folder where not given.
        """
        if self.accelerator.is_main_process:
            self.corrected.save_pretrained(output_dir or self.output_dir / CORRECTOR_FOLDER)
        self.accelerator.wait_for_everyone()

    def push_to_hub(self, commit_message: str = "Upload noise corrector", revision: str | None = None) -> str | None:
        """
        Push the corrector to `config.hub_model_id`, from the main process.

        Args:
            commit_message (`str`, *optional*, defaults to `"Upload noise corrector"`):
                Message of the commit.
            revision (`str`, *optional*):
                Branch to push to; the default branch where not given.

        Returns:
            `str` or `None`: id of the repository, with its owner; `None` in the other processes.

        Raises:
            [`PushError`]: the Hub did not take it; the message has the command that pushes it later.
        """
        if not self.accelerator.is_main_process:
            return None
        return self.corrected.push_to_hub(
            self.config.hub_model_id or self.output_dir.resolve().name,
            private=self.config.hub_private_repo,
            token=self.config.hub_token,
            commit_message=commit_message,
            revision=revision,
        )
