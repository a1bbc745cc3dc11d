# SPDX-License-Identifier: Apache-2.0

"""Rows of the data set that lack a prompt, an image or latents are refused before anything is inverted."""

import pytest
from datasets import Dataset
from PIL import Image
from tiny_flow import make_config, noise_of, tiny_flow
from tiny_transformers import tiny_sd3

from trl_pgraft import NoiseCorrectionTrainer


SIZE = {"height": 16, "width": 16}
LATENTS = noise_of(3, (4, 8, 8)).numpy()


@pytest.mark.parametrize("prompts", [["a", "b", None], [["a"], ["b"], ["c"]], [1, 2, 3], [None] * 3])
def test_a_prompt_that_is_no_text_is_refused(tmp_path, prompts):
    data = Dataset.from_dict({"latents": LATENTS, "prompt": prompts})
    with pytest.raises(ValueError, match=r"rows, the first of them \d, have .* as `prompt`. Each needs a text"):
        NoiseCorrectionTrainer(make_config(tmp_path), tiny_sd3(), data, pipeline_kwargs=SIZE)


def test_the_row_is_that_of_a_selection(tmp_path):
    data = Dataset.from_dict({"latents": LATENTS, "prompt": ["a", None, "c"]})
    with pytest.raises(ValueError, match="1 rows, the first of them 2, have None"):
        NoiseCorrectionTrainer(make_config(tmp_path), tiny_sd3(), data.select([2, 0, 1]), pipeline_kwargs=SIZE)
    NoiseCorrectionTrainer(make_config(tmp_path), tiny_sd3(), data.select([0, 2]), pipeline_kwargs=SIZE)


@pytest.mark.parametrize(("name", "value"), [("image", Image.new("L", (8, 8))), ("latents", LATENTS[0, :1])])
def test_a_missing_image_is_refused(tmp_path, name, value):
    data = Dataset.from_dict({name: [value, value, None]})
    with pytest.raises(ValueError, match=f"first of them 2, have None .*as `{name}`. Leave them out"):
        NoiseCorrectionTrainer(make_config(tmp_path), tiny_flow(), data)
    NoiseCorrectionTrainer(make_config(tmp_path), tiny_flow(), data.select([0, 1]))


def test_a_prompt_that_a_transform_takes_away_is_refused(tmp_path):
    data = Dataset.from_dict({"latents": LATENTS, "prompt": ["a", "b", "c"]})
    data.set_transform(lambda batch: {**batch, "prompt": [None] * len(batch["prompt"])})
    trainer = NoiseCorrectionTrainer(make_config(tmp_path), tiny_sd3(), data, pipeline_kwargs=SIZE)
    with pytest.raises(ValueError, match="3 rows, the first of them 0, have None"):
        trainer.invert()
