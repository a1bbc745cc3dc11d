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


"""Checkpoints at round boundaries: the adapter, the optimizer and how far the run is, without pickles."""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .hub import SwitchLevel, save_pgraft_adapter


PREFIX = "checkpoint_"


@dataclass
class Progress:
    """
    How far a run is.

    Args:
        epoch (`int`):
            Rounds completed.
        global_step (`int`):
            Optimizer steps taken on accepted samples.
        images (`int`):
            Images drawn for training.
        denoiser_calls (`int`):
            Denoiser evaluations for them, counted per image and branch.
        kl_rounds (`int`):
            Rounds whose selection accumulates.
        kl_sum (`float`):
            KL to the reference that these rounds imply, in nats.
        planned_steps (`int`):
            Optimizer steps of the whole run, as the first round suggests; the learning-rate schedule's length.
        history (`list[dict[str, float]]`):
            Metrics logged so far.
    """

    epoch: int = 0
    global_step: int = 0
    images: int = 0
    denoiser_calls: int = 0
    kl_rounds: int = 0
    kl_sum: float = 0.0
    planned_steps: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def save_checkpoint(
    folder: Path,
    pipeline: Any,
    switch: SwitchLevel,
    adapter: str | None,
    optimizer: torch.optim.Optimizer | None,
    progress: Progress,
) -> Path:
    """
    Write `folder/checkpoint_<last epoch>`, whole or not at all: it is made aside and renamed into place.

    Args:
        folder (`Path`):
            Folder of checkpoints.
        pipeline (`DiffusionPipeline`):
            Pipeline with the adapter.
        switch ([`SwitchLevel`]):
            Its switch level.
        adapter (`str` or `None`):
            Name of the adapter; `None` where there is none yet.
        optimizer (`torch.optim.Optimizer` or `None`):
            Optimizer whose state continues.
        progress ([`Progress`]):
            How far the run is.
    """
    target = folder / f"{PREFIX}{progress.epoch - 1}"
    aside = folder / f"tmp-{target.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    if adapter is not None:
        save_pgraft_adapter(pipeline, aside, switch, adapter)
    if optimizer is not None:
        save_file(_optimizer_tensors(optimizer), aside / "optimizer.safetensors")
    (aside / "progress.json").write_text(json.dumps(asdict(progress), indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(aside, target)
    return target


def load_progress(checkpoint: Path) -> Progress:
    """The [`Progress`] stored in a checkpoint."""
    return Progress(**json.loads((checkpoint / "progress.json").read_text()))


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's optimizer state into `optimizer`, if it has one."""
    path = checkpoint / "optimizer.safetensors"
    if not path.is_file():
        return
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(path).items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def find_checkpoint(path: str | Path) -> Path:
    """
    The checkpoint at `path`, or the newest one in it.

    Raises:
        `ValueError`: there is none.
    """
    path = Path(path).expanduser()
    if path.name.startswith(PREFIX) and (path / "progress.json").is_file():
        return path
    found = checkpoints_in(path)
    if not found:
        raise ValueError(f"resume_from: {path} is no checkpoint and has none ({PREFIX}<epoch>) inside.")
    return found[-1]


def checkpoints_in(folder: Path) -> list[Path]:
    """Complete checkpoints of a folder, oldest first."""
    complete = [path.parent for path in folder.glob(f"{PREFIX}*/progress.json")]
    return sorted(complete, key=lambda path: int(path.name.removeprefix(PREFIX)))


def prune_checkpoints(folder: Path, limit: int) -> None:
    """Remove the oldest checkpoints beyond `limit`."""
    for path in checkpoints_in(folder)[:-limit]:
        shutil.rmtree(path)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value).contiguous()
        for index, values in state.items()
        for name, value in values.items()
        if value is not None
    }
