# SPDX-License-Identifier: Apache-2.0

"""A data set mapped to noise by a sampler's exact inverse, kept on disk batch by batch."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from ..adapters.gate import gate_on
from ..adapters.layers import active_scales
from ..core.identity import stable
from ..core.seeding import noise_of
from ..core.tensor_files import load_tensors, save_tensors
from ..pipelines.denoiser_call import denoiser_of
from ..pipelines.denoiser_format import uncompiled
from ..pipelines.fingerprint import fingerprint_of
from ..pipelines.pixels import as_image
from ..pipelines.placement import device_of, offload_device
from .checks import check_values
from .config import NoiseCorrectionConfig
from .correctors.lora import CORRECTION_ADAPTER
from .flow_sampler import FlowSampler
from .inversion import InversionError, invert


Encoder = Callable[[list[Image.Image]], torch.Tensor]


@dataclass(frozen=True)
class InvertedData:
    """
    The noise that a data set was mapped to, on the CPU.

    Args:
        noise (`torch.Tensor` of shape `(N, ...)`, float32):
            One state for each of the `N` samples that converged, in the layout of the denoiser's latents.
        rows (`torch.Tensor` of shape `(N,)`, int64):
            Rows of the data set that they belong to.
        residuals (`torch.Tensor` of shape `(N,)`, float64):
            Sum of each sample's residuals over the inverted steps, in units of the latents.
        iterations (`torch.Tensor` of shape `(N,)`, int64):
            Denoiser evaluations of each sample in all inverted steps.
    """

    noise: torch.Tensor
    rows: torch.Tensor
    residuals: torch.Tensor
    iterations: torch.Tensor

    @cached_property
    def fingerprint(self) -> str:
        """Short hash of the noise, bit for bit."""
        return fingerprint_of({"noise": self.noise})


class DatasetInverter:
    """
    Invert a data set in files of `inversion_batch_size` samples. Files that are there already are not made again.

    Args:
        sampler ([`FlowSampler`]):
            The sampler that is inverted.
        dataset (`datasets.Dataset`):
            Real data: a column `latents` or `image`, and `prompt` where the pipeline takes prompts.
        encode (`Callable` or `None`):
            Maps a list of `B` PIL images to latents of shape `(B, ...)`; `None` for [`encode_images`].
        config ([`NoiseCorrectionConfig`]):
            Batch size, tolerance, lowest noise level, bounds and seed of the inversion.
        folder (`Path`):
            Folder of the files; it is made if missing.

    Attributes:
        steps (`int`):
            Number of the sampler's steps that are inverted: the first ones, which end at `lowest_sigma` or above.

    Raises:
        `ValueError`: none of the steps ends at `lowest_sigma` or above.
    """

    def __init__(
        self,
        sampler: FlowSampler,
        dataset: Dataset,
        encode: Encoder | None,
        config: NoiseCorrectionConfig,
        folder: Path,
    ):
        self.sampler, self.dataset, self.encode, self.config, self.folder = sampler, dataset, encode, config, folder
        self.steps = sampler.steps_down_to(config.lowest_sigma)
        if not self.steps:
            raise ValueError(
                f"lowest_sigma={config.lowest_sigma:g}: none of the {config.num_inference_steps} steps ends at that "
                f"noise level or above, the first at {sampler.levels[0]:.3g}. Lower it, or raise num_inference_steps."
            )

    def run(self, accelerator: Accelerator) -> InvertedData:
        """
        Invert what is not inverted yet, each process its part.

        Args:
            accelerator (`Accelerator`):
                Its processes share the batches. All of them must see one folder.

        Returns:
            [`InvertedData`]: the noise of the whole data set, in every process.

        Raises:
            [`InversionError`]: more samples than `max_unconverged` allows did not converge. The batches that were
                inverted before are kept.
            `RuntimeError`: more samples did not converge in all processes, or in earlier runs, than are allowed; or
                the data set is not the same at each reading.
        """
        self._made_by, self._left_out = json.dumps([self._sampler_tag(), self._encoding_tag()]), 0
        starts = range(0, len(self.dataset), self.config.inversion_batch_size)
        for start in tqdm(
            starts[accelerator.process_index :: accelerator.num_processes],
            desc="inverting",
            disable=not accelerator.is_local_main_process,
        ):
            path, batch, tags, found = self._read(start)
            if found is None:
                save_tensors(path, self._invert(start, batch), tags)
            else:
                self._left_out += len(next(iter(batch.values()))) - len(found["rows"])
        accelerator.wait_for_everyone()
        parts = []
        for start in starts:
            path, _, _, found = self._read(start)
            if found is None:
                raise RuntimeError(
                    f"{path} is missing, or not of the rows that train_dataset has from {start} on. These must be the "
                    "same at each reading, without random transforms, and all processes must see one folder."
                )
            parts.append(found)
        data = InvertedData(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        self._check_left_out(data.rows)
        return data

    def _check_left_out(self, rows: torch.Tensor) -> None:
        # Each process has stopped by its own count alone, and an earlier run may have been allowed more.
        left_out = sorted(set(range(len(self.dataset))) - set(rows.tolist()))
        if len(left_out) > self.config.max_unconverged * len(self.dataset):
            raise RuntimeError(
                f"{len(left_out)} of {len(self.dataset)} samples did not converge, among them the rows "
                f"{left_out[:16]} of train_dataset: more than max_unconverged={self.config.max_unconverged:g} allows. "
                "The others are kept. Raise it, or max_iterations, or use more sampling steps."
            )

    @torch.no_grad()
    def _invert(self, start: int, batch: dict[str, list[Any]]) -> dict[str, torch.Tensor]:
        """Noise of one batch; samples that do not converge are left out as far as that is allowed."""
        latents = self._latents(batch).to(device_of(self.sampler.pipeline))
        self.sampler.check_shape(latents)
        found, rows = invert(
            self.sampler.velocity(self.sampler.record(list(batch.get("prompt", [""] * len(latents))))),
            self.sampler.steps[: self.steps],
            self._noised(latents, start),
            self.config.tolerance,
            self.config.max_iterations,
            leave_out=partial(self._leave_out, start),
        )
        return {
            "noise": found.noise.float().cpu(),
            "rows": start + rows,
            "residuals": found.residuals.sum(0),
            "iterations": found.iterations.sum(0),
        }

    def _latents(self, batch: dict[str, list[Any]]) -> torch.Tensor:
        if "latents" in batch:
            return torch.stack([torch.as_tensor(value, dtype=torch.float32) for value in batch["latents"]])
        encode = self.encode or partial(encode_images, self.sampler.pipeline, self.sampler.kwargs)
        return encode(batch["image"])

    def _noised(self, latents: torch.Tensor, start: int) -> torch.Tensor:
        """The data noised to where the inverted steps end, by the flow's forward kernel `(1 - s) x + s noise`."""
        if self.steps == len(self.sampler.steps):
            return latents
        sigma = self.sampler.levels[self.steps - 1]
        rows = range(start, start + len(latents))
        noise = torch.stack([noise_of(latents.shape[1:], self.config.seed, "skipped steps", row) for row in rows])
        return (1 - sigma) * latents + sigma * noise.to(latents)

    def _leave_out(self, start: int, error: InversionError) -> None:
        self._left_out += len(error.samples)
        if self._left_out > self.config.max_unconverged * len(self.dataset):
            error.add_note(
                f"These are rows {(start + error.samples).tolist()} of train_dataset. What was inverted before is "
                "kept. `max_unconverged` is the share of samples that may be left out."
            )
            raise error

    def _read(self, start: int) -> tuple[Path, dict[str, list[Any]], dict[str, str], dict[str, torch.Tensor] | None]:
        """
        Path, rows and tags of the batch that begins at row `start`, and the tensors of its file: `None` where there is
        no file, it is damaged, or it was made from something else. The tags have a hash of what the file is made from:
        the sampler with its models, and the batch bit for bit.
        """
        path = self.folder / f"noise-{start:08d}.safetensors"
        batch = self.dataset[start : start + self.config.inversion_batch_size]
        digest = hashlib.blake2b(self._made_by.encode(), digest_size=16)
        for name in ("latents", "image", "prompt"):
            check_values(name, batch.get(name, []), start)
            for value in batch.get(name, []):
                digest.update(_bits(value))
        tags = {"made_from": digest.hexdigest()}
        return path, batch, tags, load_tensors(path, tags)

    def _sampler_tag(self) -> list[Any]:
        """Identifies the models bit for bit, the sampler, and how its first steps are inverted."""
        sampler, config = self.sampler, self.config
        parameters = {
            f"{name}.{n}": parameter
            for name, module in sampler.pipeline.components.items()
            if isinstance(module, torch.nn.Module)
            for n, parameter in uncompiled(module).named_parameters()
        }
        # A corrector's adapter takes no part in the inversion, and PEFT renames the layers that it wraps.
        own = {n.replace(".base_layer", ""): p for n, p in parameters.items() if f".{CORRECTION_ADAPTER}." not in n}
        seed = config.seed if self.steps < len(sampler.steps) else None
        return [
            fingerprint_of(own),
            _active_adapters(denoiser_of(sampler.pipeline)),
            {name: stable(value) for name, value in sorted(sampler.kwargs.items())},
            [sampler.sampler.timesteps, sampler.steps, sampler.guidance_scale is not None],
            [config.tolerance, config.max_iterations, self.steps, seed],
        ]

    @torch.no_grad()
    def _encoding_tag(self) -> str | None:
        """Hash of what a user's `encode` makes of the first image; for other images it cannot be found beforehand."""
        if self.encode is None or "image" not in self.dataset.column_names:
            return None
        batch = self.dataset[:1]
        return None if "latents" in batch else fingerprint_of({"latents": self.encode(batch["image"])})


def _active_adapters(denoiser: torch.nn.Module) -> list[Any]:
    """Which adapters take part and with what scale, which their weights do not show; a gate has its own rule."""
    gate = gate_on(denoiser)
    left_out = {CORRECTION_ADAPTER, gate.adapter_name if gate else None}
    active = [[name, scale] for name, scale in active_scales(denoiser) if name not in left_out]
    return [active, gate and [gate.adapter_name, gate.switch_timestep]]


@torch.no_grad()
def encode_images(pipeline: DiffusionPipeline, kwargs: dict[str, Any], images: list[Image.Image]) -> torch.Tensor:
    """
    Latents of images, made by the public parts of a pipeline.

    Args:
        pipeline (`DiffusionPipeline`):
            Its VAE and image processor are used. A pipeline without a VAE denoises pixels in [-1, 1].
        kwargs (`dict`):
            Arguments of the pipeline call. `height` and `width` are the size in pixels that images are resized to; the
            size of the first image where they are missing.
        images (`list[PIL.Image.Image]`):
            `B` images.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`, float32, scaled and shifted as the denoiser expects.

    Raises:
        `ValueError`: the images differ in size, and there is no VAE whose image processor would resize them.
    """
    vae = getattr(pipeline, "vae", None)
    channels = (uncompiled(denoiser_of(pipeline)) if vae is None else vae).config.in_channels
    images = [as_image(image, "image", "L" if channels == 1 else "RGB") for image in images]
    if vae is None:
        return _pixels(pipeline, images)
    pixels = pipeline.image_processor.preprocess(images, kwargs.get("height"), kwargs.get("width"))
    encoded = vae.encode(pixels.to(offload_device(pipeline) or vae.device, vae.dtype))
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    return (latents.float() - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor


def _pixels(pipeline: DiffusionPipeline, images: list[Image.Image]) -> torch.Tensor:
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise ValueError(
            f"train_dataset has images of the sizes {sizes}, and {type(pipeline).__name__} has no VAE whose image "
            "processor would resize them. Resize them first, or pass an `encode` that does."
        )
    pixels = torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) for image in images])) / 127.5 - 1
    return pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)


def _bits(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, Image.Image):
        return f"{value.mode}{value.size}".encode() + value.tobytes()
    return torch.as_tensor(value, dtype=torch.float32).contiguous().numpy().tobytes()
