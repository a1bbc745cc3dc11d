# SPDX-License-Identifier: Apache-2.0

import functools
import traceback

import datasets
import pytest
import torch
from hub_cases import TOKEN, run_printed_command
from huggingface_hub import HfApi
from peft import LoHaConfig
from random_rounds import as_dataset, random_round
from runs import SWITCH, sample
from tiny_pipelines import add_random_adapter, tiny_sd

from trl_pgraft import load_pgraft_adapter, push_adapter_to_hub, push_samples_to_hub, save_pgraft_adapter
from trl_pgraft.adapters.files import redacted
from trl_pgraft.adapters.gate import TimestepGate
from trl_pgraft.adapters.lora import adapter_parameters, add_adapter, full_copy_config
from trl_pgraft.hub import push as pushing, repositories, retries
from trl_pgraft.hub.push import PushError
from trl_pgraft.hub.repositories import check_samples_repository


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(retries, "WAITS", (0.0, 0.0))


@pytest.fixture
def adapter(tmp_path):
    """A pipeline with an adapter of alpha != r, and its folder."""
    pipeline = tiny_sd()
    add_random_adapter(pipeline.unet, rank=4, alpha=12)
    save_pgraft_adapter(pipeline, tmp_path / "adapter", SWITCH)
    return pipeline, tmp_path / "adapter"


@pytest.fixture
def samples(tmp_path):
    """Folder of samples, and a function that adds an iteration to it."""

    def add_iteration(number, seed=None):
        folder = tmp_path / "samples" / f"round_{number:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        dataset = as_dataset(random_round(seed=number if seed is None else seed))
        dataset.to_parquet(folder / "samples-00000-of-00001.parquet")

    return tmp_path / "samples", add_iteration


def commits(repo):
    return [sorted(commit.paths) for commit in repo.commits[1:]]


def test_a_pushed_adapter_comes_back_with_its_gate(hub, adapter):
    pipeline, folder = adapter
    assert push_adapter_to_hub(folder, "lora", **TOKEN) == "ann/lora"
    assert set(hub.repo("ann/lora").files) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "pgraft.json",
        "pytorch_lora_weights.safetensors",
    }  # fmt: skip
    with TimestepGate(pipeline.unet, "pgraft", SWITCH.switch_timestep):
        expected = sample(pipeline)
    fresh = tiny_sd()
    gate = load_pgraft_adapter(fresh, "ann/lora")
    assert gate.switch_timestep == SWITCH.switch_timestep
    assert torch.equal(sample(fresh), expected)


@pytest.mark.parametrize("kind", ["all weights of the denoiser", "A LOHA adapter"])
def test_adapters_of_other_kinds_are_pushed_and_come_back(hub, tmp_path, kind):
    pipeline = tiny_sd()
    whole = kind.startswith("all")
    peft_config = full_copy_config(pipeline.unet) if whole else LoHaConfig(r=2, target_modules=["to_q"])
    add_adapter(pipeline.unet, peft_config, "pgraft")
    with torch.no_grad():
        for parameter in adapter_parameters(pipeline.unet, "pgraft"):
            parameter.add_(0.01 * torch.randn_like(parameter))
    save_pgraft_adapter(pipeline, tmp_path / "adapter", SWITCH)
    push_adapter_to_hub(tmp_path / "adapter", "other", **TOKEN)
    repo = hub.repo("ann/other")
    assert "pytorch_lora_weights.safetensors" not in repo.files
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert kind in card and "load_lora_weights" not in card
    with TimestepGate(pipeline.unet, "pgraft", SWITCH.switch_timestep):
        expected = sample(pipeline)
    fresh = tiny_sd()
    assert not torch.equal(sample(fresh), expected)
    load_pgraft_adapter(fresh, "ann/other")
    assert torch.equal(sample(fresh), expected)


def test_plain_diffusers_loads_the_same_repository(hub, adapter):
    pipeline, folder = adapter
    push_adapter_to_hub(folder, "ann/lora", **TOKEN)
    fresh, expected = tiny_sd(), sample(pipeline)
    assert not torch.allclose(sample(fresh), expected, atol=1e-2)
    fresh.load_lora_weights("ann/lora")
    torch.testing.assert_close(sample(fresh), expected, rtol=0, atol=1e-5)


def test_a_private_adapter_needs_the_token(hub, adapter):
    push_adapter_to_hub(adapter[1], "ann/lora", private=True, **TOKEN)
    assert hub.repo("ann/lora").private
    with pytest.raises(OSError, match="ann/lora"):
        load_pgraft_adapter(tiny_sd(), "ann/lora")
    load_pgraft_adapter(tiny_sd(), "ann/lora", token="hf_read").remove()


def test_a_public_repository_is_not_taken_for_a_private_one(hub, adapter):
    HfApi(**TOKEN).create_repo("ann/lora")
    with pytest.raises(ValueError, match="ann/lora is public, and a private one is required"):
        push_adapter_to_hub(adapter[1], "ann/lora", private=True, **TOKEN)
    assert hub.repo("ann/lora").files == {}


def test_nothing_but_the_adapter_is_pushed_and_only_once(hub, adapter):
    folder = adapter[1]
    (folder / "secret.txt").write_text("not for the Hub")
    (folder / "README.md").write_text("---\ntags: [mine]\n---\nMy own card.\n")
    for _ in range(2):
        push_adapter_to_hub(folder, "ann/lora", commit_message="Mine", **TOKEN)
    repo = hub.repo("ann/lora")
    assert "secret.txt" not in repo.files and b"My own card" in repo.files["README.md"]
    assert repo.commits[1].title == "Mine"
    assert not any(path.endswith(".safetensors") for commit in repo.commits[2:] for path in commit.paths)


def test_an_adapter_of_another_kind_replaces_the_earlier_one_and_leaves_other_files(hub, adapter):
    """Its files, its grid and the card that the push wrote; not what else the repository holds."""
    folder = adapter[1]
    (folder / "before_after.png").write_bytes(b"a grid")
    push_adapter_to_hub(folder, "ann/lora", **TOKEN)
    for name in ("notes.md", "network/mine.txt", "style/pytorch_lora_weights.safetensors"):
        HfApi(**TOKEN).upload_file(path_or_fileobj=b"mine", path_in_repo=name, repo_id="ann/lora")
    pipeline = tiny_sd()
    add_adapter(pipeline.unet, LoHaConfig(r=2, target_modules=["to_q"]), "pgraft")
    save_pgraft_adapter(pipeline, folder, SWITCH)
    (folder / "before_after.png").unlink()
    push_adapter_to_hub(folder, "ann/lora", **TOKEN)
    files = hub.repo("ann/lora").files
    assert set(files) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "pgraft.json", "notes.md", "network/mine.txt",
        "style/pytorch_lora_weights.safetensors",
    }  # fmt: skip
    assert b"LOHA" in files["README.md"]


def test_files_of_a_repository_that_is_not_ours_stay(hub, tmp_path):
    HfApi(**TOKEN).create_repo("ann/mixed")
    name = "pytorch_lora_weights.safetensors"
    HfApi(**TOKEN).upload_file(path_or_fileobj=b"mine", path_in_repo=name, repo_id="ann/mixed")
    pipeline = tiny_sd()
    add_adapter(pipeline.unet, LoHaConfig(r=2, target_modules=["to_q"]), "pgraft")
    save_pgraft_adapter(pipeline, tmp_path, SWITCH)
    push_adapter_to_hub(tmp_path, "ann/mixed", **TOKEN)
    assert hub.repo("ann/mixed").files[name] == b"mine"


def test_the_command_of_a_failed_push_deletes_as_the_push_does(hub, adapter):
    folder = adapter[1]
    push_adapter_to_hub(folder, "ann/lora", **TOKEN)
    pipeline = tiny_sd()
    add_adapter(pipeline.unet, LoHaConfig(r=2, target_modules=["to_q"]), "pgraft")
    save_pgraft_adapter(pipeline, folder, SWITCH)
    hub.fail_next(3, "commit", 500)
    with pytest.raises(PushError) as failure:
        push_adapter_to_hub(folder, "ann/lora", **TOKEN)
    hub._failures.clear()
    run_printed_command(failure.value)
    assert "pytorch_lora_weights.safetensors" not in hub.repo("ann/lora").files


def test_a_card_that_was_changed_by_hand_stays(hub, adapter):
    folder = adapter[1]
    push_adapter_to_hub(folder, "ann/lora", **TOKEN)
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace(pushing.SHORT_CARD, "Mine."))
    push_adapter_to_hub(folder, "ann/lora", **TOKEN)
    assert b"Mine." in hub.repo("ann/lora").files["README.md"]


def test_a_folder_without_an_adapter_is_refused_before_any_request(hub, tmp_path):
    with pytest.raises(ValueError, match="pgraft.json"):
        push_adapter_to_hub(tmp_path, "ann/lora", **TOKEN)
    with pytest.raises(ValueError, match="has no round_"):
        push_samples_to_hub(tmp_path, "ann/samples", **TOKEN)
    assert hub.requests == []


def test_iterations_are_appended_and_nothing_is_rewritten(hub, samples):
    folder, add_iteration = samples
    for number in range(3):
        add_iteration(number)
        assert push_samples_to_hub(folder, "samples", **TOKEN) == "ann/samples"
    push_samples_to_hub(folder, "ann/samples", **TOKEN)
    name = "round_{:04d}/samples-00000-of-00001.parquet"
    repo = hub.repo("ann/samples", "dataset")
    assert commits(repo) == [["README.md", name.format(0)], [name.format(1)], [name.format(2)]]
    puts = [request for request in hub.requests if request.startswith("PUT")]
    assert len(puts) == len(set(puts)) == 3
    found = datasets.load_dataset("ann/samples", split="train")
    assert isinstance(found.features["image"], datasets.Image) and len(found) == 24
    expected = torch.cat([random_round(seed=number).x_i for number in range(3)])
    assert torch.equal(torch.tensor(found.with_format("numpy")["x_I"][:]), expected)


def test_a_card_edited_on_the_hub_stays(hub, samples):
    folder, add_iteration = samples
    add_iteration(0)
    push_samples_to_hub(folder, "ann/samples", **TOKEN)
    hub.repo("ann/samples", "dataset").files["README.md"] += b"edited"
    add_iteration(1)
    push_samples_to_hub(folder, "ann/samples", **TOKEN)
    assert hub.repo("ann/samples", "dataset").files["README.md"].endswith(b"edited")


def test_samples_of_another_run_are_not_overwritten(hub, samples):
    folder, add_iteration = samples
    add_iteration(0)
    push_samples_to_hub(folder, "ann/samples", **TOKEN)
    check_samples_repository(folder, "ann/samples", 1, "hf_write")
    add_iteration(0, seed=99)
    add_iteration(1)
    for check in (push_samples_to_hub, functools.partial(check_samples_repository, first_iteration=1)):
        with pytest.raises(ValueError, match="ann/samples has other samples as round_0000/samples-00000"):
            check(folder, "ann/samples", token="hf_write")
    assert len(commits(hub.repo("ann/samples", "dataset"))) == 1


def test_a_file_of_equal_size_is_recognised_by_its_content(hub, samples):
    folder, add_iteration = samples
    add_iteration(0)
    push_samples_to_hub(folder, "ann/samples", **TOKEN)
    path = folder / "round_0000" / "samples-00000-of-00001.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="has other samples"):
        push_samples_to_hub(folder, "ann/samples", **TOKEN)


def test_a_repository_with_iterations_to_come_is_refused(hub, samples, tmp_path):
    folder, add_iteration = samples
    add_iteration(0)
    push_samples_to_hub(folder, "ann/samples", **TOKEN)
    for run, first_iteration in [(tmp_path / "another", 0), (tmp_path / "another", 1), (folder, 0)]:
        with pytest.raises(ValueError, match="samples that are not of this run, e.g. round_0000.*output_dir"):
            check_samples_repository(run, "ann/samples", first_iteration, "hf_write")


@pytest.mark.parametrize("failing", ["repos/create", "commit", "validate-yaml"])
def test_a_push_that_fails_now_and_then_is_repeated(hub, adapter, failing):
    hub.fail_next(2, failing)
    push_adapter_to_hub(adapter[1], "ann/lora", **TOKEN)
    assert "adapter_model.safetensors" in hub.repo("ann/lora").files
    assert len([request for request in hub.requests if failing in request]) >= 3


@pytest.mark.parametrize("failing, status", [("repos/create", 503), ("commit", 500), ("commit", 403)])
def test_the_command_of_a_failed_push_of_an_adapter_works(hub, adapter, failing, status):
    hub.fail_next(3, failing, status)
    with pytest.raises(PushError, match="was not pushed to model repository ann/lora") as failure:
        push_adapter_to_hub(adapter[1], "ann/lora", private=True, **TOKEN)
    requests = [request for request in hub.requests if failing in request]
    assert len(requests) == (1 if status == 403 else 3), "a refused request is not repeated"
    assert ("ann/lora" not in str(hub.repos)) or hub.repo("ann/lora").files == {}
    hub._failures.clear()
    run_printed_command(failure.value)
    assert hub.repo("ann/lora").private
    load_pgraft_adapter(tiny_sd(), "ann/lora", token="hf_write").remove()


def test_the_command_of_a_failed_push_of_samples_works(hub, samples):
    folder, add_iteration = samples
    add_iteration(0)
    push_samples_to_hub(folder, "ann/samples", **TOKEN)
    add_iteration(1)
    hub.fail_next(3, "commit")
    with pytest.raises(PushError, match="dataset repository ann/samples") as failure:
        push_samples_to_hub(folder, "ann/samples", **TOKEN)
    run_printed_command(failure.value)
    assert len(datasets.load_dataset("ann/samples", split="train")) == 16


def test_a_dead_hub_is_given_up_on(hub, adapter, monkeypatch):
    api = HfApi(endpoint="http://127.0.0.1:9", **TOKEN)
    for module in (pushing, repositories):
        monkeypatch.setattr(module, "HfApi", lambda token: api)
    with pytest.raises(PushError, match="hf upload ann/lora"):
        push_adapter_to_hub(adapter[1], "ann/lora", **TOKEN)


@pytest.mark.parametrize("token", ["hf_secret\nhf_secret", "hf_secret\x00", "hf_sécret", "  hf_unknown\n"])
def test_a_broken_token_is_not_repeated_in_the_error(hub, adapter, token):
    with pytest.raises(Exception) as failure:
        push_adapter_to_hub(adapter[1], "ann/lora", token=token)
    printed = "".join(traceback.format_exception(failure.value))
    assert "hf_s" not in printed and "hf_unknown" not in printed


def test_white_space_around_a_token_does_no_harm(hub, adapter):
    push_adapter_to_hub(adapter[1], "ann/lora", token=" hf_write\n")


def test_tokens_are_blotted_out(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_environment")
    assert redacted(ValueError("hf_a, hf_environment"), "hf_a") == "<token>, <token>"
