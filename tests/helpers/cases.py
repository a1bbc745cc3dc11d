# SPDX-License-Identifier: Apache-2.0

"""Every pipeline that is tested, with what its call is handed, and a small run on each."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import datasets
import tiny_pipelines as tiny
import tiny_transformers as transformers
import torch
from PIL import Image
from worked_overrides import overrides

from trl_pgraft import GraftConfig, PGraftTrainer
from trl_pgraft.pipelines.denoiser_call import denoiser_of
from trl_pgraft.pipelines.denoiser_format import DenoiserFormat
from trl_pgraft.pipelines.inputs import as_batch, call_pipeline, inputs_of, sampling_arguments, takes_prompts
from trl_pgraft.pipelines.introspection import introspect
from trl_pgraft.pipelines.observe import observe_steps


SMALL = {"height": 16, "width": 16}
PROMPTS = ["a cat", "two brown dogs"]
BLACK, WHITE = (Image.new("RGB", (16, 16), colour) for colour in ("black", "white"))
LEFT = Image.new("L", (16, 16), 0)
LEFT.paste(255, (0, 0, 8, 16))


@dataclass
class Case:
    """A pipeline, what its call is handed, and what its prompts have beside them."""

    make: Callable[[], Any]
    kwargs: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, list] = field(default_factory=dict)
    format: str | None = None

    @property
    def denoiser_format(self) -> type[DenoiserFormat] | None:
        return overrides()[self.format] if self.format else None

    def arguments(self, pipeline: Any, **options: Any) -> dict[str, Any]:
        config = GraftConfig(**{"sample_num_steps": 4, "sample_guidance_scale": 3.0, **options})
        return sampling_arguments(config, pipeline, self.kwargs)

    def inputs(self, pipeline: Any, arguments: dict[str, Any], rows: list[int]) -> list[dict[str, Any]]:
        own = [{name: values[row] for name, values in self.columns.items()} for row in rows]
        return [inputs_of(pipeline, columns, arguments) for columns in own]

    def learn(self, pipeline: Any, arguments: dict[str, Any]) -> Any:
        example = {name: as_batch([value]) for name, value in self.inputs(pipeline, arguments, [0])[0].items()}
        return introspect(pipeline, {**example, **arguments}, self.denoiser_format).call


LENGTH = {"max_sequence_length": 24}
CASES = {
    "SD 1.5": Case(tiny.tiny_sd),
    "SD 2": Case(tiny.tiny_sd2),
    "SD 2, zero SNR": Case(partial(tiny.tiny_sd2, zero_snr=True)),
    "SDXL": Case(tiny.tiny_sdxl),
    "SD 3": Case(transformers.tiny_sd3, {**SMALL, **LENGTH}),
    "Flux": Case(tiny.tiny_flux),
    "Flux, guidance embedded": Case(partial(tiny.tiny_flux, guidance_embeds=True)),
    "Flux, true_cfg_scale": Case(tiny.tiny_flux, {"true_cfg_scale": 3.0}),
    "Qwen-Image": Case(transformers.tiny_qwen_image, SMALL),
    "Sana": Case(
        transformers.tiny_sana,
        {"height": 32, "width": 32, "use_resolution_binning": False, "complex_human_instruction": None, **LENGTH},
    ),
    "Lumina 2": Case(
        transformers.tiny_lumina2, {"height": 64, "width": 64, "system_prompt": "", "max_sequence_length": 48}
    ),
    "PixArt": Case(
        transformers.tiny_pixart, {**SMALL, "use_resolution_binning": False, "clean_caption": False, **LENGTH}
    ),
    "HunyuanDiT": Case(transformers.tiny_hunyuan_dit, {**SMALL, "use_resolution_binning": False}),
    "Wan": Case(transformers.tiny_wan, {**SMALL, **LENGTH, "num_frames": 5}),
    "AuraFlow": Case(transformers.tiny_auraflow, {**SMALL, **LENGTH}),
    "Chroma": Case(transformers.tiny_chroma, {**SMALL, **LENGTH}),
    "Z-Image": Case(transformers.tiny_z_image, {**SMALL, **LENGTH}, format="ListFormat"),
    "DDPM": Case(tiny.tiny_ddpm, columns={"label": [0, 1]}),
    "DDPM, learned variance": Case(partial(tiny.tiny_ddpm, learned_variance=True), columns={"label": [0, 1]}),
    "DiT": Case(transformers.tiny_dit, columns={"class_labels": [3, 7]}),
    "image to image": Case(tiny.tiny_image_to_image, {"strength": 0.75}, columns={"image": [BLACK, WHITE]}),
    "inpainting": Case(
        tiny.tiny_inpainting, SMALL, {"image": [BLACK, WHITE], "mask_image": [LEFT, LEFT]}, format="InpaintingFormat"
    ),
}


def brightness(images, prompts, metadata):
    return images.flatten(1).mean(1), {}


def make_trainer(case: Case, folder: Any, eval_dataset: Any = None, **options: Any) -> PGraftTrainer:
    defaults = {
        "num_epochs": 1,
        "sample_num_steps": 4,
        "sample_guidance_scale": 3.0,
        "sample_batch_size": 2,
        "sample_num_batches_per_epoch": 2,
        "samples_per_prompt": 2,
        "acceptance_kwargs": {"k": 1},
        "train_batch_size": 2,
        "train_timestep_fraction": 0.25,
        "train_learning_rate": 1e-2,
        "lora_rank": 2,
        "caption_dropout": 0.5,
        "control_adapter": False,
        "output_dir": str(folder),
    }
    pipeline = case.make()
    columns = {"prompt": PROMPTS} if takes_prompts(pipeline) else {}
    return PGraftTrainer(
        GraftConfig(**{**defaults, **options}),
        brightness,
        sd_pipeline=pipeline,
        train_dataset=datasets.Dataset.from_dict({**columns, **case.columns}),
        eval_dataset=eval_dataset,
        pipeline_kwargs=case.kwargs,
        denoiser_format=case.denoiser_format,
    )


def observed_run(
    pipeline: Any, case: Case, arguments: dict[str, Any], output_type: str
) -> list[tuple[list[tuple], torch.Tensor]]:
    """Of each step of a run: arguments and output of the denoiser's calls, and what the scheduler was given."""
    steps, calls, denoiser = [], [], denoiser_of(pipeline)
    names = list(inspect.signature(type(denoiser).forward).parameters)[1:]

    def on_call(module, args, kwargs, output):
        calls.append(({**dict(zip(names, args, strict=False)), **kwargs}, output))

    def on_step(model_output, **_):
        steps.append((calls.copy(), model_output))
        calls.clear()

    handle = denoiser.register_forward_hook(on_call, with_kwargs=True)
    with observe_steps(pipeline.scheduler, on_step):
        inputs = case.inputs(pipeline, arguments, [0, 1])
        call_pipeline(pipeline, PROMPTS, [5, 6], {**arguments, "output_type": output_type}, inputs)
    handle.remove()
    return steps
