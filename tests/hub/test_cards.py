# SPDX-License-Identifier: Apache-2.0

import configparser
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from hub_cases import MALICIOUS
from huggingface_hub import HfApi, ModelCard
from markdown_it import MarkdownIt
from PIL import Image
from random_rounds import as_dataset, random_round
from tiny_pipelines import tiny_sd

from trl_pgraft import SwitchLevel
from trl_pgraft.hub.cards import as_code, plain, write_adapter_card, write_samples_card
from trl_pgraft.hub.facts import AdapterFacts, label_of, metrics_of, repository_of, some_prompts


SWITCH = SwitchLevel(500.0, -0.5, 450.0)


def write(folder, **options):
    write_adapter_card(folder, "ann/lora", AdapterFacts(SWITCH, **options))
    return ModelCard.load(folder / "README.md")


def test_a_card_says_what_was_trained(tmp_path):
    (tmp_path / "before_after.png").write_bytes(b"")
    card = write(
        tmp_path,
        base_model="ann/base",
        prompts=["a cat"],
        rewards={"redness": 0.5},
        metrics={"reward": (0.25, 0.5), "redness": (None, 1.5)},
        settings={"tuned_fraction": 0.5},
        arguments={"num_inference_steps": 10},
        tags=["mine", "lora"],
        dataset="ann/samples",
    )
    data = card.data.to_dict()
    assert data["base_model"] == "ann/base" and data["base_model_relation"] == "adapter"
    assert data["tags"] == ["trl", "pgraft", "diffusers", "text-to-image", "lora", "mine"]
    assert data["library_name"] == "diffusers" and data["datasets"] == "ann/samples"
    (model,) = data["model-index"]
    assert model["name"] == "lora"
    metrics = [(m["type"], m["name"], m["value"]) for m in model["results"][0]["metrics"]]
    assert metrics == [("reward", "reward", 0.5), ("reward", "redness", 1.5)]
    for text in (
        "P-GRAFT",
        "[ann/base](https://huggingface.co/ann/base)",
        "](before_after.png)",
        "- `reward`: 0.25 -> 0.5",
        "- `redness`: 1.5",
        "- `redness`, weight 0.5",
        "- `tuned_fraction`: `0.5`",
        "- `a cat`",
        "training timestep 500 (log-SNR -0.50)",
        'DiffusionPipeline.from_pretrained("ann/base")',
        "pipeline('a cat', num_inference_steps=10)",
        'load_lora_weights("ann/lora")',
        "eprint        = {2510.02692}",
    ):
        assert text in card.content, text


@pytest.mark.parametrize("kind, said", [("full copy", "all weights of the denoiser"), ("LOHA", "A LOHA adapter of")])
def test_what_is_no_lora_is_not_called_one(tmp_path, kind, said):
    card = write(tmp_path, kind=kind)
    assert said in card.content and "A LoRA" not in card.content and "load_lora_weights" not in card.content
    assert "lora" not in card.data.to_dict()["tags"]


def test_a_card_of_little_has_no_empty_sections(tmp_path):
    card = write(tmp_path)
    assert all(text not in card.content for text in ("before_after", "## Results", "## Training"))
    assert "model-index" not in card.data.to_dict() and "base_model" not in card.data.to_dict()
    assert "## Use" in card.content and "## Citation" in card.content


def test_the_card_of_an_adapter_without_a_switch(tmp_path):
    write_adapter_card(tmp_path, "ann/lora", AdapterFacts(SwitchLevel(None, None, None)), title="My LoRA")
    content = (tmp_path / "README.md").read_text()
    assert "# My LoRA\n" in content and "at all noise levels" in content and "P-GRAFT" not in content


@pytest.mark.parametrize("prompt", MALICIOUS, ids=range(len(MALICIOUS)))
def test_no_prompt_breaks_a_model_card(prompt, tmp_path, hub):
    harmless = write(tmp_path, prompts=["a cat"], rewards={"r": 1.0}, metrics={"r": (0.0, 1.0)})
    facts = {"rewards": {prompt: 1.0}, "metrics": {prompt: (0.0, 1.0)}, "settings": {"s": prompt}}
    card = write(tmp_path, prompts=[prompt], **facts)
    HfApi(token="hf_write").create_repo("ann/lora")
    HfApi(token="hf_write").upload_file(
        path_or_fileobj=tmp_path / "README.md", path_in_repo="README.md", repo_id="ann/lora"
    )
    assert set(card.data.to_dict()) == set(harmless.data.to_dict())
    assert "license" not in card.data.to_dict()
    lines, expected = card.text.splitlines(), harmless.text.splitlines()
    assert [line for line in lines if line.startswith(("#", "```", "!", "---"))] == [
        line for line in expected if line.startswith(("#", "```", "!", "---"))
    ]
    assert len(card.content) < 6000 and len(lines) == len(expected) + 4, "the setting adds a short paragraph"
    assert all(character.isprintable() or character == "\n" for character in card.content)
    snippet = card.text.split("```python\n")[1].split("```")[0]
    compile(snippet, "snippet", "exec")
    assert snippet.count("\n") == harmless.text.split("```python\n")[1].split("```")[0].count("\n")


@pytest.mark.parametrize("text", MALICIOUS, ids=range(len(MALICIOUS)))
def test_code_spans_hold_their_text_and_nothing_else(text):
    (paragraph,) = [token for token in MarkdownIt("commonmark").parse("- " + as_code(text)) if token.type == "inline"]
    assert [child.type for child in paragraph.children] == ["code_inline"]
    assert paragraph.children[0].content.strip() == plain(text)


@pytest.mark.parametrize("prompt", MALICIOUS, ids=range(len(MALICIOUS)))
def test_no_prompt_breaks_a_dataset(prompt, tmp_path):
    """Kept as it is, through parquet and back."""
    dataset = as_dataset(random_round(prompts=(prompt, "a dog")))
    (tmp_path / "round_0000").mkdir()
    dataset.to_parquet(tmp_path / "round_0000" / "samples.parquet")
    write_samples_card(tmp_path, "ann/samples")
    found = datasets.load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    assert found["prompt"][:] == [prompt] * 4 + ["a dog"] * 4
    assert some_prompts([], None, tmp_path) == [(prompt, {}), ("a dog", {})]


def test_the_viewer_finds_the_iterations_and_their_features(tmp_path):
    for number in range(2):
        folder = tmp_path / f"round_{number:04d}"
        folder.mkdir()
        as_dataset(random_round(seed=number)).to_parquet(folder / "samples-00000-of-00001.parquet")
    write_samples_card(tmp_path, "ann/samples")
    content = (tmp_path / "README.md").read_text()
    data = yaml.safe_load(content.split("---\n")[1])
    assert data["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "round_*/*.parquet"}]}
    ]
    assert data["task_categories"] == ["text-to-image"] and data["tags"] == ["trl", "pgraft"]
    assert 'load_dataset("ann/samples", split="train")' in content
    found = datasets.load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(found) == 16 and found.column_names[:3] == ["prompt", "image", "reward"]
    assert isinstance(found.features["image"], datasets.Image)
    first, second = random_round(seed=0), random_round(seed=1)
    assert torch.equal(torch.tensor(found.with_format("numpy")["x_I"][:]), torch.cat([first.x_i, second.x_i]))


def test_metrics_come_from_held_out_prompts_or_else_from_the_iterations():
    iterations = [{"reward": 1.0, "rewards/red/mean": 2.0}, {"reward": 3.0, "rewards/red/mean": float("nan")}]
    source, metrics = metrics_of(iterations, ["red"])
    assert "first and last round" in source and metrics == {"reward": (1.0, 3.0)}
    evaluations = [{"eval/reward": value, "eval/rewards/red/mean": value} for value in (0.5, 0.6, 0.75)]
    source, metrics = metrics_of([*iterations, *evaluations], ["red"])
    assert source == "held-out prompts" and metrics == {"reward": (0.5, 0.75), "red": (0.5, 0.75)}
    assert metrics_of(iterations[:1], [])[1] == {"reward": (None, 1.0)}
    assert metrics_of([], ["red"])[1] == {}


def test_a_local_path_is_no_base_model(tmp_path, monkeypatch):
    pipeline = tiny_sd()
    assert repository_of(pipeline) is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local" / "base").mkdir(parents=True)
    for name in (str(tmp_path), "/gone/model", "../model", "local/base"):
        pipeline.register_to_config(_name_or_path=name)
        assert repository_of(pipeline) is None
    pipeline.register_to_config(_name_or_path="ann/base")
    assert repository_of(pipeline) == "ann/base"


def test_held_out_prompts_are_shown_first(tmp_path):
    groups = {"round": [0, 0, 0, 1], "group": [1, 1, 0, 0]}
    samples = datasets.Dataset.from_dict({"prompt": ["a", "a", "b", "a"], **groups})
    assert some_prompts([("x", {}), ("y", {}), ("x", {})], samples, tmp_path) == [("x", {}), ("y", {})]
    assert some_prompts([], samples, tmp_path) == [("a", {}), ("b", {})]
    assert some_prompts([], None, tmp_path) == []
    assert len(some_prompts([(str(i), {}) for i in range(99)], None, tmp_path)) == 8


def test_a_prompt_with_other_inputs_is_another_one(tmp_path):
    black, same, white = (Image.new("RGB", (4, 4), colour) for colour in ("black", "black", "white"))
    rows = [("a", {"image": black}), ("a", {"image": same}), ("a", {"image": white})]
    assert some_prompts(rows, None, tmp_path) == [rows[1], rows[2]]
    groups = {"round": [0] * 3, "group": [0, 1, 2], "input_class_labels": [3, 7, 3]}
    samples = datasets.Dataset.from_dict({"prompt": [""] * 3, **groups})
    shown = some_prompts([], samples, tmp_path)
    assert shown == [("", {"class_labels": 3}), ("", {"class_labels": 7})]
    assert [label_of(prompt) for prompt in [*shown, *rows[:1]]] == ["class_labels 3", "class_labels 7", "a"]


def test_the_snippet_leaves_open_what_depends_on_the_user(tmp_path):
    assert (
        "pipeline(class_labels=..., guidance_scale=4.0)"
        in write(tmp_path, takes_prompts=False, inputs=["class_labels"], arguments={"guidance_scale": 4.0}).text
    )
    assert "pipeline('a fox', image=...)" in write(tmp_path, prompts=["a fox"], inputs=["image"]).text


def test_every_template_is_installed():
    root = Path(__file__).parents[2]
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg")
    package = root / "trl_pgraft"
    installed = {
        path for pattern in setup["options.package_data"]["trl_pgraft"].split() for path in package.glob(pattern)
    }
    assert installed == {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert {path.name for path in installed} >= {"adapter_card.md", "samples_card.md", "corrector_card.md"}
