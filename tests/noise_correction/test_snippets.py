# SPDX-License-Identifier: Apache-2.0

"""The documents' code runs as it stands: on a tiny model and images at the paths that it names, with fewer steps."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from hub_cases import TOKEN
from PIL import Image
from tiny_transformers import tiny_sd3

import trl_pgraft


ROOT = Path(__file__).parents[2]


def snippet_of(document):
    """The first Python block that has the trainer."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)
    return next(block for block in blocks if "NoiseCorrectionTrainer(" in block)


@pytest.mark.parametrize("document", ["README.md", "docs/noise_correction.md"])
def test_the_documents_code_runs(document, tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN["token"])
    hub.tokens[TOKEN["token"]] = ("me", "write")
    tiny_sd3().save_pretrained("path/to/model")
    Path("path/to/images").mkdir()
    pixels = torch.randint(256, (20, 20, 20, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for i, array in enumerate(pixels.numpy()):
        Image.fromarray(array).save(f"path/to/images/{i:02d}.png")
    rows = [{"file_name": f"{i:02d}.png", "prompt": "a cat" if i % 2 else "a dog"} for i in range(20)]
    Path("path/to/images/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = partial(trl_pgraft.NoiseCorrectionConfig, max_steps=2, network_channels=8, warmup_steps=0)
    monkeypatch.setattr(trl_pgraft, "NoiseCorrectionConfig", small)
    names = {}
    exec(snippet_of(document).replace("512", "16"), names)
    assert isinstance(names["image"], Image.Image) and names["image"].size == (16, 16)
    assert names["corrected"].trained_for["samples"] == 20
    assert json.loads(Path("noise_correction_output/inversion.json").read_text())["left_out"] == 0
