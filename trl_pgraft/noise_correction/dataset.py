# SPDX-License-Identifier: Apache-2.0

"""A data set mapped to noise by a sampler's exact inverse, kept on disk batch by batch."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..adapters.gate import gate_on
from ..adapters.lora import tuner_layers
from ..core.seeding import seed_of
from ..pipelines.denoiser_call import denoiser_of
from ..pipelines.denoiser_format import uncompiled
from ..pipelines.fingerprint import fingerprint_of, stable
from ..pipelines.placement import device_of, offload_device
from .config import NoiseCorrectionConfig
from .correctors.flow import CORRECTION_ADAPTER
from .inversion import EulerField, FlowSampler, InversionError, invert


Encoder = Callable[[list[Image.Image]], torch.Tensor]


@dataclass(frozen=True)
class InvertedData:
    """
    Noise that a data set was mapped to.

    Args:
        noise (`torch.Tensor` of shape `(N, ...)`, float32):
            One state for each sample that converged.
        rows (`torch.Tensor` of shape `(N,)`, int64):
            Which rows of the data set these are.
        residuals (`torch.Tensor` of shape `(N,)`, float64):
            Sum of a sample's residuals over its steps.
        iterations (`torch.Tensor` of shape `(N,)`, int64):
            Denoiser evaluations of all its steps.
    """

    noise: torch.Tensor
    rows: torch.Tensor
    residuals: torch.Tensor
    iterations: torch.Tensor

    @cached_property
    def fingerprint(self) -> str:
        """Of the noise."""
        return fingerprint_of({"noise": self.noise})


class DatasetInverter:
    """
    Invert a data set in files of `inversion_batch_size` samples; files that are there already are not made again.

    Args:
        sampler ([`FlowSampler`]):
            What is inverted.
        dataset (`datasets.Dataset`):
            With a column `latents` or `image`, and `prompt` where the pipeline takes one.
        encode (`Callable`):
            PIL images to latents.
        config ([`NoiseCorrectionConfig`]):
            Tolerance and bounds.
        folder (`Path`):
            Where the files are kept.
    """

    def __init__(
        self, sampler: FlowSampler, dataset: Any, encode: Encoder, config: NoiseCorrectionConfig, folder: Path
    ):
        self.sampler, self.dataset, self.encode, self.config, self.folder = sampler, dataset, encode, config, folder
        self._starts = range(0, len(dataset), config.inversion_batch_size)
        self._steps = sampler.steps_down_to(config.lowest_sigma)
        self._made_by = json.dumps([_made_by(sampler, config, self._steps), self._encoding()])
        self._left_out = 0

    def run(self, accelerator: Accelerator) -> InvertedData:
        """
        Invert what is not inverted yet, each process its part.

        Raises:
            [`InversionError`]: more samples than `max_unconverged` allows did not converge; what did is kept.
            `RuntimeError`: those of all processes, or of earlier runs, are more; or the data set is not the same at
                each reading.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        own = self._starts[accelerator.process_index :: accelerator.num_processes]
        for start in tqdm(own, desc="inverting", disable=not accelerator.is_local_main_process):
            self._ensure(start)
        accelerator.wait_for_everyone()
        parts = [self._made(start) for start in self._starts]
        data = InvertedData(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        self._check_left_out(data.rows)
        return data

    def _made(self, start: int) -> dict[str, torch.Tensor]:
        """One batch as it is on disk, whoever inverted it."""
        found = self._read(start, self._tag(self._batch(start)))
        if found is None:
            raise RuntimeError(
                f"{self._path(start)} is missing, or not of the rows that train_dataset has from {start} on. These "
                "must be the same at each reading, without random transforms, and all processes must see one folder."
            )
        return found

    def _check_left_out(self, rows: torch.Tensor) -> None:
        """Each process stops by its own count, and a run before this one may have been allowed more."""
        left_out = sorted(set(range(len(self.dataset))) - set(rows.tolist()))
        if len(left_out) > self.config.max_unconverged * len(self.dataset):
            raise RuntimeError(
                f"{len(left_out)} of {len(self.dataset)} samples did not converge, among them the rows "
                f"{left_out[:16]} of train_dataset: more than max_unconverged={self.config.max_unconverged:g} allows. "
                "The others are kept. Raise it, or max_iterations, or use more sampling steps."
            )

    def _encoding(self) -> str | None:
        """What a user's `encode` makes of the first image: what it does with others cannot be told beforehand."""
        if getattr(self.encode, "func", None) is encode_images or "image" not in self.dataset.column_names:
            return None
        batch = self.dataset[:1]
        with torch.no_grad():
            return None if "latents" in batch else fingerprint_of({"latents": self.encode(batch["image"])})

    def _batch(self, start: int) -> dict[str, list[Any]]:
        return self.dataset[start : start + self.config.inversion_batch_size]

    def _ensure(self, start: int) -> None:
        """Invert one batch, unless that was done."""
        batch = self._batch(start)
        tag, count = self._tag(batch), len(next(iter(batch.values())))
        found = self._read(start, tag)
        if found is not None:
            self._left_out += count - len(found["rows"])
            return
        found = self._invert(start, batch, count)
        path = self._path(start)
        aside = path.with_suffix(".tmp")
        save_file({n: tensor.contiguous() for n, tensor in found.items()}, aside, metadata={"made_from": tag})
        os.replace(aside, path)

    @torch.no_grad()
    def _invert(self, start: int, batch: dict[str, list[Any]], count: int) -> dict[str, torch.Tensor]:
        """Noise of one batch; samples that do not converge are left out as far as that is allowed."""
        latents = latents_of(batch, self.encode).to(device_of(self.sampler.pipeline))
        self.sampler.check_shape(latents)
        latents = self._noised(latents, start)
        field = self.sampler.field(self.sampler.record(list(batch["prompt"]) if "prompt" in batch else [""] * count))
        inverted = EulerField(field.steps[: self._steps], field.velocity)
        bounds = (self.config.tolerance, self.config.max_iterations)
        found, rows = invert(inverted, latents, *bounds, partial(self._leave_out, start))
        return {
            "noise": found.noise.float().cpu(),
            "rows": start + rows,
            "residuals": found.residuals.sum(0),
            "iterations": found.iterations.sum(0),
        }

    def _noised(self, latents: torch.Tensor, start: int) -> torch.Tensor:
        """The data as they are before the steps that are not inverted."""
        if self._steps == len(self.sampler.steps):
            return latents
        sigma = self.sampler.levels[self._steps - 1]
        noise = torch.empty_like(latents, device="cpu")
        for i in range(len(latents)):
            generator = torch.Generator().manual_seed(seed_of(self.config.seed, "skipped steps", start + i))
            noise[i].normal_(generator=generator)
        return (1 - sigma) * latents + sigma * noise.to(latents.device)

    def _leave_out(self, start: int, error: InversionError) -> None:
        """Count samples that do not converge, and raise if they are more than is allowed."""
        self._left_out += len(error.samples)
        if self._left_out > self.config.max_unconverged * len(self.dataset):
            error.add_note(
                f"These are rows {(start + error.samples).tolist()} of train_dataset. What was inverted before is "
                "kept. `max_unconverged` is the share of samples that may be left out."
            )
            raise error

    def _tag(self, batch: dict[str, list[Any]]) -> str:
        """Tells what a file is made from: the sampler with its models, and the batch bit for bit."""
        digest = hashlib.blake2b(self._made_by.encode(), digest_size=16)
        for name in ("latents", "image", "prompt"):
            for value in batch.get(name, []):
                digest.update(_bits(value))
        return digest.hexdigest()

    def _path(self, start: int) -> Path:
        return self.folder / f"noise-{start:08d}.safetensors"

    def _read(self, start: int, tag: str) -> dict[str, torch.Tensor] | None:
        """A file's tensors, unless there is none, it is damaged, or it was made from something else."""
        try:
            with safe_open(self._path(start), framework="pt") as file:
                if file.metadata() == {"made_from": tag}:
                    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            pass
        return None


def _made_by(sampler: FlowSampler, config: NoiseCorrectionConfig, steps: int) -> list[Any]:
    """Tells the models bit for bit, the sampler, and how its first `steps` are inverted."""
    modules = {n: uncompiled(m) for n, m in sampler.pipeline.components.items() if isinstance(m, torch.nn.Module)}
    parameters = {f"{name}.{n}": p for name, module in modules.items() for n, p in module.named_parameters()}
    # A corrector's adapter takes no part in the inversion, and PEFT renames the layers that it wraps.
    own = {n.replace(".base_layer", ""): p for n, p in parameters.items() if f".{CORRECTION_ADAPTER}." not in n}
    return [
        fingerprint_of(own),
        _adapters_at_work(denoiser_of(sampler.pipeline)),
        {name: stable(value) for name, value in sorted(sampler.kwargs.items())},
        [sampler.sampler.timesteps, list(sampler.steps), sampler.guided],
        [config.tolerance, config.max_iterations, steps, config.seed if steps < len(sampler.steps) else None],
    ]


def _adapters_at_work(denoiser: torch.nn.Module) -> list[Any]:
    """Which adapters take part and with what scale, which their weights do not tell; a gate has its own rule."""
    gate, found = gate_on(denoiser), set()
    left_out = {CORRECTION_ADAPTER, gate.adapter_name if gate else None}
    for layer in tuner_layers(uncompiled(denoiser)):
        names = [] if layer.disable_adapters else [n for n in layer.active_adapters if n not in left_out]
        found |= {(name, getattr(layer, "scaling", {}).get(name)) for name in names}
    return [sorted(found, key=str), gate and [gate.adapter_name, gate.switch_timestep]]


def latents_of(batch: dict[str, list[Any]], encode: Encoder) -> torch.Tensor:
    """Latents of some rows of a data set."""
    if "latents" in batch:
        return torch.stack([torch.as_tensor(value, dtype=torch.float32) for value in batch["latents"]])
    return encode(batch["image"])


def encode_images(pipeline: Any, kwargs: dict[str, Any], images: list[Image.Image]) -> torch.Tensor:
    """
    Latents of images, as far as public parts of the pipeline make them.

    Args:
        pipeline (`DiffusionPipeline`):
            Its VAE and image processor are used; one without a VAE denoises pixels in [-1, 1].
        kwargs (`dict`):
            Arguments of the pipeline call, of which `height` and `width` are those of the images.
        images (`list[PIL.Image.Image]`):
            `B` images.

    Returns:
        `torch.Tensor` of shape `(B, C, H, W)`.
    """
    vae = getattr(pipeline, "vae", None)
    channels = (denoiser_of(pipeline) if vae is None else vae).config.in_channels
    images = [image.convert("L" if channels == 1 else "RGB") for image in images]
    if vae is None:
        _check_sizes(pipeline, images)
        pixels = torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) for image in images])) / 127.5 - 1
        return pixels[:, None] if channels == 1 else pixels.permute(0, 3, 1, 2)
    pixels = pipeline.image_processor.preprocess(images, kwargs.get("height"), kwargs.get("width"))
    with torch.no_grad():
        encoded = vae.encode(pixels.to(offload_device(pipeline) or vae.device, vae.dtype))
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (latents.float() - shift) * vae.config.scaling_factor


def _check_sizes(pipeline: Any, images: list[Image.Image]) -> None:
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise ValueError(
            f"train_dataset has images of the sizes {sizes}, and {type(pipeline).__name__} has no VAE whose image "
            "processor would resize them. Resize them first, or pass an `encode` that does."
        )


def _bits(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, Image.Image):
        return f"{value.mode}{value.size}".encode() + value.tobytes()
    return torch.as_tensor(value, dtype=torch.float32).contiguous().numpy().tobytes()
