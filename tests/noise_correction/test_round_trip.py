# SPDX-License-Identifier: Apache-2.0

"""A round trip from known noise: reported with the residual, and warned of where the inverse is another."""

import json

import pytest
import torch
from datasets import Dataset
from tiny_flow import flow_data, make_config, noise_of, tiny_flow
from tiny_transformers import tiny_sd3

from trl_pgraft import NoiseCorrectionTrainer
from trl_pgraft.noise_correction.round_trip import round_trip, said_of


def test_it_is_reported_with_the_residual(tmp_path, capsys):
    NoiseCorrectionTrainer(make_config(tmp_path), tiny_flow(), flow_data(10)).invert()
    found = json.loads((tmp_path / "out/inversion.json").read_text())["round_trip"]
    assert (found["samples"], found["left_out"]) == (8, 0)
    assert 0 < found["relative_error"] <= found["largest_error"] < 1e-4
    assert 0 < found["largest_residual"] <= 4e-5
    assert f"to a relative error of {found['relative_error']:.2g}" in capsys.readouterr().out


def test_it_starts_from_the_noise_that_the_pipeline_would_and_takes_the_prompts(tmp_path):
    """The state after the last inverted step is the pipeline's own."""
    data = Dataset.from_dict({"latents": noise_of(2, (4, 8, 8)).numpy(), "prompt": ["a cat", "two"]})
    size, seen = {"height": 16, "width": 16, "guidance_scale": 1.0}, []
    trainer = NoiseCorrectionTrainer(make_config(tmp_path, tolerance=1e-3), tiny_sd3(), data, pipeline_kwargs=size)
    velocity = trainer.sampler.velocity

    def noted(conditioning):
        inner = velocity(conditioning)

        def call(x, step, rows):
            seen.append(x)
            return inner(x, step, rows)

        return call

    trainer.sampler.velocity = noted
    round_trip(trainer.sampler, 3, data[:], trainer.config)
    states = []
    tiny_sd3()(
        ["a cat", "two"], latents=seen[0], num_inference_steps=4, output_type="latent", **size,
        callback_on_step_end=lambda pipeline, step, t, tensors: states.append(tensors["latents"]) or {},
    )  # fmt: skip
    torch.testing.assert_close(seen[3], states[2], rtol=0, atol=1e-5)


def test_a_small_residual_at_another_noise_is_warned_of(tmp_path):
    """A velocity that folds: two states reach the same one, and the inversion finds the other."""
    trainer = NoiseCorrectionTrainer(make_config(tmp_path), tiny_flow(), flow_data(2))
    step = trainer.sampler.steps[0]

    def folded(conditioning):  # x + h v = |x|: exact, and negative values are not found again
        return lambda x, i, rows: (x.abs() - x) / step

    trainer.sampler.velocity = folded
    found = round_trip(trainer.sampler, 1, flow_data(2)[:], trainer.config)
    assert found["left_out"] == 0 and found["largest_residual"] < 1e-6 and found["relative_error"] > 0.5
    with pytest.warns(UserWarning, match="relative error of 1.* The inverse is not unique or not stable here"):
        said_of(found, trainer.config.tolerance)
