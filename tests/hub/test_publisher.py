# SPDX-License-Identifier: Apache-2.0

import json
import os
import subprocess
import sys
import warnings
from concurrent.futures import Future
from pathlib import Path

import datasets
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from hub_cases import MALICIOUS, run_printed_command
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from tiny_pipelines import tiny_sd

from trl_pgraft import PGraftTrainer, load_pgraft_adapter
from trl_pgraft.adapters.lora import adapter_parameters
from trl_pgraft.hub import retries
from trl_pgraft.hub.push import PushError


TOKEN = "hf_write"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(retries, "WAITS", (0.0, 0.0))


def redness(*, prompts, images, **columns):
    return [float(image.getpixel((0, 0))[0]) for image in images]


def make_trainer(config, pipeline=None, prompt="a cat", **options):
    sources = {"train_dataset": datasets.Dataset.from_dict({"prompt": [prompt]}), "reward_funcs": redness}
    return PGraftTrainer(config, sd_pipeline=pipeline or tiny_sd(), **{**sources, **options})


def adapter_of(trainer):
    return [p.detach().clone() for p in adapter_parameters(trainer.denoiser, "pgraft")]


def no_call(*args, **kwargs):
    raise AssertionError("nothing is to be sampled")


def forbid_sampling(trainer, monkeypatch):
    monkeypatch.setattr(trainer.pipeline.scheduler, "step", no_call)
    return trainer


@pytest.fixture
def base(hub, tmp_path):
    """The tiny model, loaded from a repository on the Hub."""
    tiny_sd().save_pretrained(tmp_path / "base")
    api = HfApi(token=TOKEN)
    api.create_repo("ann/base")
    api.upload_folder(repo_id="ann/base", folder_path=tmp_path / "base")
    return StableDiffusionPipeline.from_pretrained("ann/base", safety_checker=None)


def snippet_of(card):
    return card.text.split("```python\n")[1].split("```")[0]


def test_a_run_reaches_the_hub_and_its_card_runs(hub, base, config, tmp_path, monkeypatch, capfd):
    options = {"push_to_hub": True, "hub_model_id": "lora", "hub_dataset_id": "samples", "hub_token": TOKEN}
    trainer = make_trainer(config(num_epochs=2, eval_prompts=["a dog"], **options), base)
    trainer.train()
    card = ModelCard.load("ann/lora")
    assert card.data.base_model == "ann/base" and {"trl", "pgraft", "diffusers", "lora"} <= set(card.data.tags)
    assert card.data.datasets == "ann/samples"
    evaluations = [record["eval/reward"] for record in trainer.history if "eval/reward" in record]
    assert [result.metric_value for result in card.data.eval_results] == [evaluations[-1]] * 2
    assert f"- `redness`: {evaluations[0]:.4g} -> {evaluations[-1]:.4g}" in card.text
    assert hub.repo("ann/lora").files["before_after.png"] == (trainer.adapter_dir / "before_after.png").read_bytes()
    with Image.open(trainer.adapter_dir / "before_after.png") as grid:
        assert grid.size[1] > 256
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet_of(card), "snippet", "exec"), {})
    with Image.open("image.png") as image:
        assert image.size == (16, 16)
    iterations = [commit.paths for commit in hub.repo("ann/samples", "dataset").commits[1:]]
    assert len(iterations) == 2 and [[p for p in paths if "round_" in p][0][:10] for paths in iterations] == [
        "round_0000", "round_0001"
    ]  # fmt: skip
    printed = "".join(capfd.readouterr())
    written = [path for path in Path(trainer.output_dir).rglob("*") if path.is_file()]
    assert len(written) > 10 and TOKEN not in printed
    assert TOKEN not in f"{trainer.config!r} {trainer.config.to_dict()}"
    pushed = [content for repo in hub.repos.values() for content in repo.files.values()]
    assert not any(TOKEN.encode() in content for content in [*pushed, *(path.read_bytes() for path in written)])


def test_training_goes_on_from_the_samples_on_the_hub(hub, config, tmp_path, monkeypatch):
    first = make_trainer(config(hub_dataset_id="ann/samples", hub_token=TOKEN))
    first.train()
    other = {"output_dir": str(tmp_path / "again"), "hub_dataset_id": "ann/samples", "hub_token": TOKEN}
    again = make_trainer(config(**other), train_dataset=None, samples_dataset=datasets.load_dataset("ann/samples"))
    forbid_sampling(again, monkeypatch).train()
    assert all(torch.equal(a, b) for a, b in zip(adapter_of(first), adapter_of(again), strict=True))
    samples = datasets.load_dataset("ann/samples", split="train")
    changed = tiny_sd()
    changed.unet.conv_in.weight.data.mul_(1.5)
    for pipeline, options in [
        (None, {"sample_guidance_scale": 2.0}),
        (None, {"tuned_fraction": 1.0}),
        (tiny_sd(DDIMScheduler(clip_sample=False, prediction_type="v_prediction")), {}),
        (changed, {}),
    ]:
        with pytest.raises(ValueError, match="sampled from another model .*, scheduler, guidance"):
            make_trainer(config(**other, **options), pipeline, train_dataset=None, samples_dataset=samples)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hub_token": "hf_unknown"}, "hub_model_id='ann/lora' cannot be pushed to.*may write there"),
        ({"hub_token": "hf_read"}, "hub_model_id='ann/lora' cannot be pushed to.*403"),
        ({"hub_token": "hf_other"}, "hub_model_id='ann/lora' cannot be pushed to.*403"),
        ({"hub_token": None}, "hub_model_id='ann/lora' cannot be pushed to.*401"),
        ({"hub_token": "hf_wri\nte"}, "hub_token has line breaks"),
        ({"hub_model_id": "ann/two/parts"}, "hub_model_id='ann/two/parts' cannot be pushed to.*Repo id"),
        ({"hub_model_id": "ann/a b"}, "hub_model_id='ann/a b' cannot be pushed to.*Repo id"),
        ({"hub_model_id": "ann/public", "hub_private_repo": True}, "ann/public is public"),
        ({"hub_dataset_id": "ann/"}, "hub_dataset_id='ann/' cannot be pushed to"),
        ({"hub_dataset_id": "bob/data"}, "hub_dataset_id='bob/data' cannot be pushed to.*403"),
        ({"hub_dataset_id": "ann/taken"}, "hub_dataset_id='ann/taken' has samples that are not of this run"),
    ],
    ids=str,
)
def test_what_cannot_be_pushed_to_is_found_before_sampling(hub, config, monkeypatch, options, message):
    api = HfApi(token=TOKEN)
    api.create_repo("ann/public")
    api.create_repo("ann/lora")
    HfApi(token="hf_other").create_repo("bob/data", repo_type="dataset")
    api.create_repo("ann/taken", repo_type="dataset")
    hub.repo("ann/taken", "dataset").files["round_0000/samples-00000-of-00001.parquet"] = b"of another run"
    defaults = {"push_to_hub": True, "hub_model_id": "ann/lora", "hub_token": TOKEN}
    trainer = forbid_sampling(make_trainer(config(**{**defaults, **options})), monkeypatch)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        trainer.train()


def test_without_a_push_no_request_is_made(hub, config):
    make_trainer(config(hub_model_id="ann/lora", hub_token=TOKEN)).train()
    assert hub.requests == []


def test_a_failed_push_does_not_stop_the_run_and_is_made_up_for(hub, config):
    trainer = make_trainer(config(num_epochs=2, hub_dataset_id="ann/samples", hub_token=TOKEN))
    hub.fail_next(3, "commit")
    with pytest.warns(UserWarning, match="(?s)The run goes on, but .*samples was not pushed.*hf upload ann/samples"):
        trainer.train()
    files = hub.repo("ann/samples", "dataset").files
    assert [path[:10] for path in files if path.endswith(".parquet")] == ["round_0000", "round_0001"]


def test_the_command_that_the_run_prints_pushes_the_adapter(hub, config, capfd):
    options = {"push_to_hub": True, "hub_model_id": "lora", "hub_private_repo": True, "hub_token": TOKEN}
    trainer = make_trainer(config(**options))
    hub.fail_next(1, "commit", status=403)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    (warning,) = [w.message for w in caught if "The run goes on" in str(w.message)]
    assert TOKEN not in str(warning) and hub.repo("ann/lora").files == {}
    run_printed_command(warning)
    assert hub.repo("ann/lora").private
    assert {"README.md", "before_after.png", "pgraft.json"} <= set(hub.repo("ann/lora").files)
    load_pgraft_adapter(tiny_sd(), "ann/lora", token=TOKEN).remove()


def test_a_resumed_run_pushes_only_what_is_missing(hub, config):
    options = {"hub_dataset_id": "ann/samples", "hub_token": TOKEN, "num_epochs": 2}
    make_trainer(config(**options)).train(epochs=1)
    trainer = make_trainer(config(**options, resume_from_checkpoint=True))
    trainer.train()
    commits = hub.repo("ann/samples", "dataset").commits[1:]
    assert [len(commit.paths) for commit in commits] == [2, 1] and commits[1].paths[0].startswith("round_0001")
    with pytest.raises(ValueError, match="samples that are not of this run"):
        make_trainer(config(**options, seed=1)).train()


def test_push_to_hub_has_the_signature_of_trl(hub, config, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    trainer = make_trainer(config())
    trainer.train()
    assert trainer.push_to_hub(dataset_name="ann/prompts", model_name="Mine", tags="extra") == "ann/out"
    repo = hub.repo("ann/out")
    assert repo.commits[1].title == "End of training" and not repo.private
    card = ModelCard.load("ann/out")
    assert card.data.datasets == "ann/prompts" and "extra" in card.data.tags and "# Mine\n" in card.text
    assert 'load_pgraft_adapter(pipeline, "ann/out")' in card.text and "a local model" in card.text
    assert card.data.base_model is None and str(Path.cwd()) not in card.content
    later = trainer.push_to_hub(commit_message="Again", blocking=False)
    assert isinstance(later, Future) and later.result(60) == "ann/out"
    hub.fail_next(1, "create", status=403)
    hub.fail_next(1, "models/ann/out", status=404)
    with pytest.raises(PushError, match="hf upload"):
        trainer.push_to_hub()


def test_a_saved_model_is_pushed_where_the_configuration_says_so(hub, config, tmp_path):
    trainer = make_trainer(config(push_to_hub=True, hub_model_id="ann/lora", hub_token=TOKEN))
    trainer.save_model(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "pgraft.json").is_file()
    assert "pgraft.json" in hub.repo("ann/lora").files
    assert make_trainer(config()).save_model() is None


def test_a_card_without_a_push(hub, config):
    trainer = make_trainer(config())
    trainer.create_model_card()
    assert not (trainer.adapter_dir / "before_after.png").exists(), "nothing was sampled yet to take prompts from"
    trainer.train()
    trainer.create_model_card()
    card = ModelCard.load(trainer.adapter_dir / "README.md")
    assert "- `a cat`" in card.text and "](before_after.png)" in card.text and hub.requests == []
    with Image.open(trainer.adapter_dir / "before_after.png") as grid:
        assert grid.size[0] > 128
    pictures = trainer.collector.sample_images([("a cat", {})], reference=True)
    assert torch.equal(pictures, trainer.evaluate(["a cat"], reference=True).images)


@pytest.mark.parametrize("prompt", [*(MALICIOUS[i] for i in (0, 2, 5, 7, 9)), "x" * 20_000], ids=range(6))
def test_no_prompt_breaks_a_run_that_is_pushed(hub, config, prompt):
    options = {"push_to_hub": True, "hub_model_id": "ann/lora", "hub_dataset_id": "ann/samples", "hub_token": TOKEN}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The run goes on")
        make_trainer(config(**options), prompt=prompt).train()
    assert json.loads(hub.repo("ann/lora").files["pgraft.json"])
    assert "before_after.png" in hub.repo("ann/lora").files
    assert datasets.load_dataset("ann/samples", split="train")["prompt"][:] == [prompt] * 4


ON_TWO_PROCESSES = """
import sys
from test_publisher import make_trainer
from trl_pgraft import GraftConfig

try:
    make_trainer(GraftConfig(**eval(sys.argv[1]))).train()
except ValueError as error:
    assert "may write there" in str(error)
    print("refused", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("token, refused", [(TOKEN, 0), ("hf_read", 2)])
def test_one_of_two_processes_pushes_and_both_are_refused(hub, config, tmp_path, token, refused):
    options = {"push_to_hub": True, "hub_model_id": "ann/lora", "hub_dataset_id": "ann/samples", "hub_token": token}
    HfApi(token=TOKEN).create_repo("ann/lora")
    script = tmp_path / "script.py"
    script.write_text(ON_TWO_PROCESSES)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {"ACCELERATE_USE_CPU": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    command += [repr(vars(config(**options)))]
    output = subprocess.run(command, check=True, env={**os.environ, **environment}, capture_output=True, text=True)
    assert output.stdout.count("refused") == refused
    if not refused:
        assert len(hub.repo("ann/lora").commits) == len(hub.repo("ann/samples", "dataset").commits) == 2
        files = [path for path in hub.repo("ann/samples", "dataset").files if path.endswith(".parquet")]
        assert files == [f"round_0000/samples-{rank:05d}-of-00002.parquet" for rank in (0, 1)]
