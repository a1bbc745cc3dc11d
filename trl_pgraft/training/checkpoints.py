# SPDX-License-Identifier: Apache-2.0

"""Checkpoints between iterations: the adapter, the optimizer and how far the run is, without pickles."""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..config import GraftConfig, default_values
from ..core.atomic import atomic_save
from .state import TrainerState


PREFIX = "checkpoint_"


def save_checkpoint(
    folder: Path,
    state: TrainerState,
    signature: dict[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
    save_adapter: Callable[[Path], None] | None = None,
) -> Path:
    r"""
    Write `folder/checkpoint_<last epoch>`, whole or not at all.

    Args:
        folder (`Path`):
            Folder of checkpoints, made if missing.
        state ([`TrainerState`]):
            How far the run is.
        signature (`dict[str, Any]`):
            What the run's result depends on, by name, see [`check_same_run`].
        optimizer (`torch.optim.Optimizer`, *optional*):
            Optimizer whose state continues in the next iteration; each has a new one where not given.
        save_adapter (`Callable[[Path], None]`, *optional*):
            Writes the adapter to a folder; there is none yet where not given.

    Returns:
        `Path`: folder of the checkpoint.

    Raises:
        `OSError`: it could not be written, for example because the disk is full; the message names the last whole one.
    """
    target = folder / f"{PREFIX}{state.epoch - 1}"
    try:
        with atomic_save(target) as aside:
            aside.mkdir()
            if save_adapter is not None:
                save_adapter(aside)
            if optimizer is not None:
                save_file(optimizer_tensors(optimizer), aside / "optimizer.safetensors")
            (aside / "run.json").write_text(json.dumps(signature, indent=2, default=str) + "\n")
            (aside / "progress.json").write_text(json.dumps(asdict(state), indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        last = [path.name for path in checkpoints_in(folder)][-1:] or ["none"]
        raise OSError(
            f"{target} could not be written ({error}). The last whole checkpoint is {last[0]}; make room and go on "
            "with resume_from_checkpoint=True."
        ) from error
    return target


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Turn errors inside the block into a `ValueError` that names the checkpoint, and another one to resume from."""
    try:
        yield
    except ChangedRunError:
        raise
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        others = [path.name for path in checkpoints_in(checkpoint.parent) if path != checkpoint]
        hint = f"resume_from={str(checkpoint.parent / others[-1])!r}" if others else "start without resume_from"
        raise ValueError(
            f"resume_from: {checkpoint} cannot be read ({type(error).__name__}: {error}). It was left as it is; go on "
            f"with {hint}."
        ) from error


class ChangedRunError(ValueError):
    """A checkpoint was written by a run of another configuration."""


def check_same_run(checkpoint: Path, signature: dict[str, Any], config: GraftConfig, peft_config: PeftConfig) -> None:
    r"""
    Check that a checkpoint was written by a run whose result depends on the same values.

    Args:
        checkpoint (`Path`):
            Folder of the checkpoint.
        signature (`dict[str, Any]`):
            Values by name, as given to [`save_checkpoint`].
        config ([`GraftConfig`]):
            The present configuration. A field that the checkpoint lacks counts as the field's default.
        peft_config (`PeftConfig`):
            The present adapter's configuration, to which the same applies.

    Raises:
        `ChangedRunError`: they differ; the message names each.
    """
    stored = json.loads((checkpoint / "run.json").read_text())
    if "functions" not in stored:  # written when functions were compared by their names alone
        signature = {name: value for name, value in signature.items() if name != "functions"}
    defaults = {**default_values(config), "adapter": adapter_values(default_values(peft_config))}
    refuse_changes(checkpoint, *map(_with_adapter_spread, (stored, signature, defaults)))


def _with_adapter_spread(values: dict[str, Any]) -> dict[str, Any]:
    """The values with those of the adapter under a name each."""
    adapter = {f"adapter's {name}": value for name, value in values.get("adapter", {}).items()}
    return {**{name: value for name, value in values.items() if name != "adapter"}, **adapter}


def refuse_changes(
    checkpoint: Path, stored: dict[str, Any], signature: dict[str, Any], defaults: dict[str, Any]
) -> None:
    r"""
    Check that a run's signature is the one stored in a checkpoint.

    Args:
        checkpoint (`Path`):
            File or folder of the checkpoint, for the error's message.
        stored (`dict[str, Any]`):
            Signature in the checkpoint, as JSON has it.
        signature (`dict[str, Any]`):
            What the present run's result depends on, by name.
        defaults (`dict[str, Any]`):
            What a value of the signature counts as where the checkpoint is older than it.

    Raises:
        `ChangedRunError`: they differ; the message names each value.
    """
    now = json.loads(json.dumps(signature, default=str))
    was = {**{name: value for name, value in defaults.items() if name in now}, **stored}
    names = [name for name in {**stored, **now} if was.get(name) != now.get(name)]
    if names:
        changes = "; ".join(f"{name} was {was.get(name)!r} and is {now.get(name)!r}" for name in names)
        raise ChangedRunError(
            f"resume_from: {checkpoint} is of another run: {changes}. Resume with what it was written with, or start "
            "a new run in another output_dir."
        )


def adapter_values(values: dict[str, Any]) -> dict[str, Any]:
    """Those `values` of an adapter's configuration on which its training depends, comparable after a resume."""
    left_out = ("peft_version", "base_model_name_or_path", "inference_mode")
    values = {name: sorted(v) if isinstance(v, set) else v for name, v in values.items() if name not in left_out}
    return {name: v if isinstance(v, str | int | float | list | None) else str(v) for name, v in values.items()}


def archive_previous_run(output_dir: Path, names: Sequence[str]) -> None:
    r"""
    Move what an earlier run left in an output folder to a folder `previous_<n>` there, with a warning.

    Args:
        output_dir (`Path`):
            The output folder.
        names (`Sequence[str]`):
            Names of the files and folders to move, where they are there.
    """
    left = [path for path in (output_dir / name for name in names) if path.exists()]
    if not left:
        return
    folder = output_dir / f"previous_{1 + len(list(output_dir.glob('previous_*')))}"
    folder.mkdir()
    for path in left:
        os.replace(path, folder / path.name)
    warnings.warn(
        f"{output_dir} has an earlier run, which is not resumed: {', '.join(path.name for path in left)} moved to "
        f"{folder}. To go on with it, use resume_from_checkpoint=True.",
        stacklevel=4,
    )


def load_trainer_state(checkpoint: Path) -> TrainerState:
    """The [`TrainerState`] stored in a checkpoint."""
    return TrainerState(**json.loads((checkpoint / "progress.json").read_text()))


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's optimizer state into `optimizer`, if it has one."""
    path = checkpoint / "optimizer.safetensors"
    if path.is_file():
        load_optimizer_tensors(load_file(path), optimizer)


def load_optimizer_tensors(tensors: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Put the state that [`optimizer_tensors`] returned into `optimizer`."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        index, *nesting, name = key.split(".")
        values = state.setdefault(int(index), {})
        for part in nesting:
            values = values.setdefault(part, {})
        # bitsandbytes counts its steps in an int, AdamW in a float tensor.
        values[name] = value.item() if value.dtype == torch.int64 and value.ndim == 0 else value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def find_checkpoint(path: str | Path) -> Path:
    r"""
    Find the checkpoint to resume from.

    Args:
        path (`str` or `Path`):
            A checkpoint, a folder of checkpoints, or an output folder with a folder `checkpoints`. The newest
            checkpoint is taken.

    Raises:
        `ValueError`: there is none.
    """
    path = Path(path).expanduser()
    if path.name.startswith(PREFIX) and (path / "progress.json").is_file():
        return path
    found = checkpoints_in(path) or checkpoints_in(path / "checkpoints")
    if not found:
        raise ValueError(f"resume_from: {path} is no checkpoint and has none ({PREFIX}<epoch>) inside.")
    return found[-1]


def checkpoints_in(folder: Path) -> list[Path]:
    """Complete checkpoints of a folder, oldest first."""
    complete = [path.parent for path in folder.glob(f"{PREFIX}*/progress.json")]
    # Users keep copies beside them, under names of their own.
    numbered = [path for path in complete if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix(PREFIX)))


def prune_checkpoints(folder: Path, limit: int) -> None:
    """Remove the oldest checkpoints beyond `limit`."""
    for path in checkpoints_in(folder)[:-limit]:
        shutil.rmtree(path)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """State of an optimizer as tensors, named by parameter and value, such as `0.exp_avg`."""
    return dict(_tensors_of(optimizer.state_dict()["state"]))


def _tensors_of(state: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of nested dicts by their path. They are copies, because bitsandbytes shares some between weights."""
    for name, value in state.items():
        if isinstance(value, dict):
            yield from _tensors_of(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", torch.as_tensor(value).clone(memory_format=torch.contiguous_format)
