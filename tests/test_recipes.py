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

"""The recipes of examples/configs and the table of docs/models.md, which must agree with what is tested."""

import re
from pathlib import Path

import pytest
import yaml
from test_pipelines import CASES
from worked_overrides import PAGE, overrides

from trl_pgraft import DenoiserFormat, GraftConfig
from trl_pgraft.pipeline_inputs import input_names, parameters_of
from trl_pgraft.rollout import sampling_arguments


RECIPES = sorted((Path(__file__).parents[1] / "examples" / "configs").glob("*.yaml"))
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
