# SPDX-License-Identifier: Apache-2.0

"""An adapter of a denoiser whose arguments have other names trains, is saved, loads and is gated."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from runs import make_trainer, sample
from tiny_pipelines import adapter_use, tiny_sd
from worked_overrides import overrides

from trl_pgraft import DenoiserFormat, GraftConfig, load_pgraft_adapter
from trl_pgraft.adapters.files import SWITCH_FILE


class LevelUNet(UNet2DConditionModel):
    """Takes `x` and `level` where other denoisers take `sample` and `timestep`."""

    def forward(self, x, level, encoder_hidden_states, **options):
        options.pop("timestep_cond", None)
        return super().forward(x, level, encoder_hidden_states, **options)


class CountdownFormat(DenoiserFormat):
    """Reads the time that has passed since noise, of 1,000 steps."""

    @classmethod
    def of(cls, denoiser):
        return cls("x", "level")

    def timestep(self, arguments):
        return 1000 - super().timestep(arguments)

    def arguments(self, x_t, timestep, conditioning):
        return super().arguments(x_t, 1000 - timestep, conditioning)


def level_sd():
    pipeline = tiny_sd()
    unet = LevelUNet.from_config(pipeline.unet.config).eval()
    unet.load_state_dict(pipeline.unet.state_dict())
    pipeline.register_modules(unet=unet)
    return pipeline


def train(folder, denoiser_format):
    size = {"sample_num_steps": 6, "sample_batch_size": 4, "sample_num_batches_per_epoch": 1, "samples_per_prompt": 4}
    options = {
        "num_epochs": 1,
        "control_adapter": False,
        "tuned_fraction": 0.5,
        "lora_rank": 2,
        "train_learning_rate": 0.05,
        "sample_guidance_scale": 3.0,
    }
    config = GraftConfig(**size, **options, output_dir=str(folder))
    trainer = make_trainer(config, level_sd(), denoiser_format=denoiser_format)
    trainer.train()
    with trainer.sampler() as pipeline:
        return sample(pipeline)


def check(pipeline, tuned):
    with adapter_use(pipeline.unet) as use:
        torch.testing.assert_close(sample(pipeline), tuned, rtol=0, atol=1e-5)
    assert list(use.values()) == [True] * 3 + [False] * 3


def test_an_argument_of_another_name_is_kept_with_the_adapter(tmp_path):
    tuned = train(tmp_path, overrides()["LevelFormat"])
    assert not torch.allclose(tuned, sample(level_sd()), atol=1e-3)
    assert json.loads((tmp_path / "adapter" / SWITCH_FILE).read_text())["timestep_name"] == "level"
    for given in ({}, {"denoiser_format": overrides()["LevelFormat"]}):
        pipeline = level_sd()
        load_pgraft_adapter(pipeline, tmp_path / "adapter", **given)
        check(pipeline, tuned)


def test_a_timestep_that_is_read_in_another_way_needs_its_class(tmp_path):
    tuned, pipeline = train(tmp_path, CountdownFormat), level_sd()
    with pytest.raises(ValueError, match="denoiser_format=CountdownFormat.*load_pgraft_adapter"):
        load_pgraft_adapter(pipeline, tmp_path / "adapter")
    load_pgraft_adapter(pipeline, tmp_path / "adapter", denoiser_format=CountdownFormat)
    check(pipeline, tuned)


def test_a_usual_denoiser_keeps_nothing_further(tmp_path):
    config = GraftConfig(sample_num_steps=4, lora_rank=2, control_adapter=False, output_dir=str(tmp_path))
    make_trainer(config).save_model(str(tmp_path))
    fields = {"switch_timestep", "switch_log_snr", "state_timestep", "clock", "tuned_guidance_scale"}
    assert set(json.loads(next(tmp_path.rglob(SWITCH_FILE)).read_text())) == fields


def test_an_unknown_name_names_both_remedies():
    with pytest.raises(ValueError, match="DenoiserFormat.of.*denoiser_format"):
        DenoiserFormat.of(level_sd().unet)
