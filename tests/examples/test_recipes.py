# SPDX-License-Identifier: Apache-2.0

"""The recipes of examples/configs and the table of docs/models.md, which must agree with what is tested."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from cases import CASES
from diffusers import (
    AuraFlowTransformer2DModel,
    ChromaTransformer2DModel,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from worked_overrides import PAGE, overrides

from trl_pgraft import DenoiserFormat, GraftConfig
from trl_pgraft.adapters.lora import adapter_parameters, add_adapter, default_lora_config
from trl_pgraft.pipelines.inputs import input_names, parameters_of, sampling_arguments


RECIPES = sorted((Path(__file__).parents[2] / "examples" / "configs").glob("*.yaml"))
LINES = [line.strip("| ").split("|") for line in PAGE.read_text().splitlines() if "../examples/configs" in line]
ROWS = {cells[0].strip(): cells for cells in LINES}


def read(recipe):
    """The model, the pipeline's arguments, and the configuration."""
    values = yaml.safe_load(recipe.read_text())
    return values.pop("model_name_or_path"), values.pop("pipeline_kwargs", {}), GraftConfig(**values)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_is_a_configuration(recipe):
    model, pipeline_kwargs, config = read(recipe)
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", model)
    assert config.output_dir == f"outputs/{recipe.stem}"
    images = config.sample_batch_size * config.sample_num_batches_per_epoch
    assert images % config.samples_per_prompt == 0 and f": {images} images" in recipe.read_text()
    assert isinstance(pipeline_kwargs, dict)


def test_the_table_has_what_is_tested_and_nothing_else():
    assert ROWS.keys() == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_recipe_fits_the_pipeline_beside_it(name):
    """Its arguments are taken by the pipeline that was tested, and what that needs beside a prompt is in its row."""
    (stem,) = re.findall(r"configs/(\w+)\.yaml", ROWS[name][-1])
    _, pipeline_kwargs, config = read(next(recipe for recipe in RECIPES if recipe.stem == stem))
    pipeline = CASES[name].make()
    arguments = sampling_arguments(config, pipeline, pipeline_kwargs)
    assert arguments.keys() <= parameters_of(pipeline).keys()
    beside = set(re.findall(r"`(\w+)`", ROWS[name][3])) - {CASES[name].format}
    assert beside == CASES[name].columns.keys() & input_names(pipeline)


def test_every_recipe_stands_in_the_table():
    stems = {stem for row in ROWS.values() for stem in re.findall(r"configs/(\w+)\.yaml", row[-1])}
    assert stems == {recipe.stem for recipe in RECIPES}


def test_the_overrides_of_the_page_are_formats():
    formats = {n for n, v in overrides().items() if isinstance(v, type) and issubclass(v, DenoiserFormat)}
    assert formats == {"DenoiserFormat", "ListFormat", "InpaintingFormat", "LevelFormat"}


# Published sizes of the denoisers; where a dict is empty, they are diffusers' defaults.
SIZES = {
    "sd15": (UNet2DConditionModel, {"cross_attention_dim": 768, "attention_head_dim": 8}),
    "sdxl": (
        UNet2DConditionModel,
        {
            "cross_attention_dim": 2048,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "flux": (FluxTransformer2DModel, {"guidance_embeds": True}),
    "qwen_image": (QwenImageTransformer2DModel, {}),
    "sana": (SanaTransformer2DModel, {}),
    "lumina2": (Lumina2Transformer2DModel, {}),
    "pixart": (PixArtTransformer2DModel, {"caption_channels": 4096}),
    "wan": (WanTransformer3DModel, {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}),
    "auraflow": (AuraFlowTransformer2DModel, {}),
    "chroma": (ChromaTransformer2DModel, {}),
    "z_image": (ZImageTransformer2DModel, {}),
    "dit": (DiTTransformer2DModel, {"out_channels": 8}),
}


@pytest.mark.slow
@pytest.mark.parametrize("stem", SIZES)
def test_the_pages_sizes_are_those_of_the_real_models(stem):
    """Denoiser in bf16, and adapter, gradients and AdamW's moments in float32, counted on models without weights."""
    kind, sizes = SIZES[stem]
    rank = yaml.safe_load((RECIPES[0].parent / f"{stem}.yaml").read_text())["lora_rank"]
    with torch.device("meta"):
        denoiser = kind(**sizes)
        parameters = sum(p.numel() for p in denoiser.parameters())
        add_adapter(denoiser, default_lora_config(denoiser, rank), "pgraft")
    trained = sum(p.numel() for p in adapter_parameters(denoiser, "pgraft"))
    row = f"| {stem} | {parameters / 1e9:.2f} | {2 * parameters / 2**30:.1f} | {16 * trained / 2**30:.2f} |"
    assert row in PAGE.read_text()
