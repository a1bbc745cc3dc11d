# SPDX-License-Identifier: Apache-2.0

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from peft import LoHaConfig, PeftModel
from runs import SWITCH, sample
from safetensors.torch import load_file, save_file
from tiny_pipelines import add_random_adapter, tiny_flux, tiny_sd

import trl_pgraft
from trl_pgraft import SwitchLevel, TimestepGate, load_pgraft_adapter, save_pgraft_adapter
from trl_pgraft.adapters.files import read_switch
from trl_pgraft.adapters.lora import adapter_parameters


FLUX_SWITCH = SwitchLevel(500.0, 0.0, 450.0, (0.001, 0.0))


@pytest.fixture
def saved(sd, tmp_path):
    """A pipeline with an adapter of alpha != r, and the folder in which it is saved."""
    add_random_adapter(sd.unet, rank=4, alpha=12)
    save_pgraft_adapter(sd, tmp_path, SWITCH)
    return sd, tmp_path


def test_a_loaded_adapter_gives_the_same_images(saved):
    pipeline, folder = saved
    with TimestepGate(pipeline.unet, "pgraft", SWITCH.switch_timestep):
        expected = sample(pipeline)
    fresh = tiny_sd()
    assert not torch.allclose(sample(fresh), expected, atol=1e-2)
    gate = load_pgraft_adapter(fresh, folder)
    assert torch.equal(sample(fresh), expected)
    assert gate.switch_timestep == SWITCH.switch_timestep
    assert not any(p.requires_grad for p in fresh.unet.parameters())


def test_the_same_holds_for_flux(flux, tmp_path):
    add_random_adapter(flux.transformer, alpha=12)
    save_pgraft_adapter(flux, tmp_path, FLUX_SWITCH)
    with TimestepGate(flux.transformer, "pgraft", 500.0, FLUX_SWITCH.clock):
        expected = sample(flux)
    fresh = tiny_flux()
    gate = load_pgraft_adapter(fresh, tmp_path)
    assert torch.equal(sample(fresh), expected)
    assert gate.clock == FLUX_SWITCH.clock
    gate.remove()
    assert not torch.allclose(sample(fresh), expected, atol=1e-3), "above and below the switch differ"


def test_no_file_of_an_earlier_adapter_of_another_kind_is_left(saved):
    _, folder = saved
    (folder / "README.md").write_text("a card")
    (folder / "optimizer.safetensors").write_bytes(b"a file of somebody else")
    assert (folder / "pytorch_lora_weights.safetensors").is_file()
    pipeline = tiny_sd()
    pipeline.unet.add_adapter(LoHaConfig(r=2, target_modules=["to_q"]), "pgraft")
    save_pgraft_adapter(pipeline, folder, SWITCH)
    kept = {"pgraft.json", "adapter_model.safetensors", "adapter_config.json", "README.md", "optimizer.safetensors"}
    assert {path.name for path in folder.iterdir()} == kept
    load_pgraft_adapter(tiny_sd(), folder)


def test_it_can_be_loaded_under_another_name_and_in_half_precision(saved):
    _, folder = saved
    fresh = tiny_sd().to(dtype=torch.bfloat16)
    load_pgraft_adapter(fresh, folder, name="mine")
    assert {p.dtype for p in adapter_parameters(fresh.unet, "mine")} == {torch.bfloat16}


@pytest.mark.parametrize("make, switch", [(tiny_sd, SWITCH), (tiny_flux, FLUX_SWITCH)])
def test_diffusers_loads_the_folder(make, switch, tmp_path):
    pipeline, fresh = make(), make()
    add_random_adapter(getattr(pipeline, "unet", None) or pipeline.transformer, alpha=12)
    save_pgraft_adapter(pipeline, tmp_path, switch)
    expected = sample(pipeline)
    fresh.load_lora_weights(tmp_path)
    torch.testing.assert_close(sample(fresh), expected, rtol=0, atol=1e-5)


def test_peft_loads_the_folder(saved):
    pipeline, folder = saved
    x_t, text = torch.randn(2, 4, 8, 8), torch.randn(2, 24, 16)
    loaded = PeftModel.from_pretrained(tiny_sd().unet, folder)
    with torch.no_grad():
        expected = pipeline.unet(x_t, 700, encoder_hidden_states=text).sample
        found = loaded(x_t, 700, encoder_hidden_states=text).sample
        base = tiny_sd().unet(x_t, 700, encoder_hidden_states=text).sample
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(base, expected, atol=1e-2)


@pytest.mark.parametrize("switch", [SWITCH, SwitchLevel(None, None, None, (0.001, 0.0), tuned_guidance_scale=1.0)])
def test_the_switch_level_is_stored(sd, tmp_path, switch):
    add_random_adapter(sd.unet)
    save_pgraft_adapter(sd, tmp_path, switch)
    assert read_switch(tmp_path) == switch
    assert set(json.loads((tmp_path / "pgraft.json").read_text())) >= {"switch_timestep", "switch_log_snr", "clock"}


def test_an_adapter_for_another_guidance_is_loaded_with_a_warning(sd, tmp_path):
    add_random_adapter(sd.unet)
    save_pgraft_adapter(sd, tmp_path, SwitchLevel(500.0, -0.5, 450.0, tuned_guidance_scale=1.0))
    pipeline, arguments = tiny_sd(), {"num_inference_steps": 4, "guidance_scale": 3.0}
    with pytest.warns(UserWarning, match="trained for guidance 1.0.*TunedGuidance") as warned:
        load_pgraft_adapter(pipeline, tmp_path)
    # What the warning says is code that runs.
    code = re.search(r"`(TunedGuidance\(.*?\))` of trl_pgraft", str(warned[0].message))[1]
    names = {name: getattr(trl_pgraft, name) for name in trl_pgraft.__all__}
    with eval(code, {**names, "pipeline": pipeline, "arguments": arguments, "w": 3.0}) as guidance:
        pipeline("a cat", **arguments)
    assert guidance.ratio == 1 / 3


def test_a_folder_without_a_switch_is_refused(saved):
    _, folder = saved
    (folder / "pgraft.json").unlink()
    with pytest.raises(ValueError, match="pgraft.json.*load_lora_weights"):
        load_pgraft_adapter(tiny_sd(), folder)


def test_an_adapter_for_another_model_is_refused(saved):
    _, folder = saved
    flux = tiny_flux()
    with pytest.raises(ValueError, match="do not fit FluxTransformer2DModel.*another model"):
        load_pgraft_adapter(flux, folder)
    assert getattr(flux.transformer, "peft_config", {}) == {}, "nothing is left behind"
    assert len(flux.transformer._forward_pre_hooks) == 0


def test_an_adapter_of_a_smaller_model_is_refused(saved):
    """All its weights fit, and some layers would stay without: that must not pass in silence."""
    _, folder = saved
    path = folder / "adapter_model.safetensors"
    state = load_file(path)
    save_file({key: value for key, value in state.items() if "mid_block" not in key}, path)
    with pytest.raises(ValueError, match="do not fit UNet2DConditionModel.*mid_block"):
        load_pgraft_adapter(tiny_sd(), folder)


class Trap:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_not_read(hub, saved, tmp_path):
    _, folder = saved
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    (folder / "adapter_model.safetensors").unlink()
    for name in ("adapter_model.bin", "pytorch_lora_weights.bin", "optimizer.pt"):
        (folder / name).write_bytes(trap)
    api = HfApi(token="hf_write")
    api.create_repo("ann/trap")
    api.upload_folder(repo_id="ann/trap", folder_path=folder)
    for source in (folder, "ann/trap"):
        with pytest.raises(OSError, match="adapter_model.safetensors"):
            load_pgraft_adapter(tiny_sd(), source)
    assert not (tmp_path / "sprung").exists()
    assert not any(".bin" in request or ".pt" in request for request in hub.requests if "resolve" in request)


def test_no_source_trusts_remote_code_or_unpickles():
    sources = [path.read_text() for path in Path(trl_pgraft.__file__).parent.rglob("*.py")]
    assert len(sources) > 20
    words = ("trust_remote_code", "import pickle", "torch.load(", "allow_pickle")
    assert not any(word in text for text in sources for word in words)
