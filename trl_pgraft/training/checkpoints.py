# SPDX-License-Identifier: Apache-2.0

"""Checkpoints at round boundaries: the adapter, the optimizer and how far the run is, without pickles."""

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..adapters.files import save_pgraft_adapter
from ..config import GraftConfig, default_values
from ..core.acceptance import default_k
from ..core.divergence import accumulated_kl
from ..core.switch_level import SwitchLevel
from ..rollouts.rollout import Rollout


PREFIX = "checkpoint_"


@dataclass
class TrainerState:
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
            Sum of the KL that each of them implies, in nats.
        kl_composes (`bool`):
            Whether all of them were the same top-k selection, whose composition is known.
        steps_per_round (`int`):
            Optimizer steps of the first round, from which the length of the learning-rate schedule is told.
        history (`list[dict[str, float]]`):
            Metrics logged so far.
    """

    epoch: int = 0
    global_step: int = 0
    images: int = 0
    denoiser_calls: int = 0
    kl_rounds: int = 0
    kl_sum: float = 0.0
    kl_composes: bool = True
    steps_per_round: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def add_kl(self, rollout: Rollout, config: GraftConfig) -> float:
        r"""
        Count the KL of an iteration, unless it was sampled from the reference, from where nothing accumulates.

        Args:
            rollout ([`Rollout`]):
                The iteration's samples, selected.
            config ([`GraftConfig`]):
                The acceptance rule, and which model is sampled from.

        Returns:
            `float`: KL to the reference that the iterations so far imply, in nats.
        """
        if config.sample_from == "reference":
            return rollout.implied_kl
        kl, size = rollout.implied_kl, rollout.groups[0].size
        k = config.acceptance_kwargs.get("k", default_k(size)) if config.acceptance == "top_k" else None
        self.kl_rounds, self.kl_sum = self.kl_rounds + 1, self.kl_sum + kl
        total, self.kl_composes = accumulated_kl(kl, self.kl_sum, self.kl_rounds, size, k, self.kl_composes)
        return total


def save_checkpoint(
    folder: Path,
    pipeline: Any,
    switch: SwitchLevel,
    adapter: str | None,
    optimizer: torch.optim.Optimizer | None,
    progress: TrainerState,
    run: dict[str, Any],
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
        progress ([`TrainerState`]):
            How far the run is.
        run (`dict`):
            What the result depends on, see [`check_same_run`].

    Raises:
        `OSError`: it could not be written, on a full disk for one; the message names the last whole one.
    """
    target = folder / f"{PREFIX}{progress.epoch - 1}"
    aside = folder / f"tmp-{target.name}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        if adapter is not None:
            save_pgraft_adapter(pipeline, aside, switch, adapter)
        if optimizer is not None:
            save_file(optimizer_tensors(optimizer), aside / "optimizer.safetensors")
        (aside / "run.json").write_text(json.dumps(run, indent=2, default=str) + "\n")
        (aside / "progress.json").write_text(json.dumps(asdict(progress), indent=2) + "\n")
        _put_in_place(aside, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        last = [path.name for path in checkpoints_in(folder)][-1:] or ["none"]
        raise OSError(
            f"{target} could not be written ({error}). The last whole checkpoint is {last[0]}; make room and go on "
            "with resume_from_checkpoint=True."
        ) from error
    return target


def _put_in_place(aside: Path, target: Path) -> None:
    """Rename a folder; one that is there is renamed out of the way first, so that none is there in part."""
    replaced = target.with_name(f"old-{target.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        os.replace(target, replaced)
    os.replace(aside, target)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Say of what goes wrong inside which checkpoint it was, and what to do."""
    try:
        yield
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, ChangedRunError):
            raise
        others = [path.name for path in checkpoints_in(checkpoint.parent) if path != checkpoint]
        hint = f"resume_from={str(checkpoint.parent / others[-1])!r}" if others else "start without resume_from"
        raise ValueError(
            f"resume_from: {checkpoint} cannot be read ({type(error).__name__}: {error}). It was left as it is; go on "
            f"with {hint}."
        ) from error


class ChangedRunError(ValueError):
    """A checkpoint was written by a run of another configuration."""


def check_same_run(checkpoint: Path, run: dict[str, Any], config: GraftConfig, peft_config: PeftConfig) -> None:
    """
    Check that a checkpoint was written by a run whose results depend on the same values.

    Args:
        checkpoint (`Path`):
            The checkpoint.
        run (`dict`):
            Values by name, as given to [`save_checkpoint`].
        config ([`GraftConfig`]):
            The present configuration. A field that the checkpoint lacks counts as the field's default.
        peft_config (`PeftConfig`):
            The present adapter's configuration, to which the same applies.

    Raises:
        `ChangedRunError`: they differ; the message names each.
    """
    stored = json.loads((checkpoint / "run.json").read_text())
    defaults = {**default_values(config), "adapter": _comparable(default_values(peft_config))}
    refuse_changes(checkpoint, *map(_with_adapter_spread, (stored, run, defaults)))


def _with_adapter_spread(values: dict[str, Any]) -> dict[str, Any]:
    """The values with those of the adapter under a name each."""
    adapter = {f"adapter's {name}": value for name, value in values.get("adapter", {}).items()}
    return {**{name: value for name, value in values.items() if name != "adapter"}, **adapter}


def refuse_changes(checkpoint: Path, stored: dict[str, Any], run: dict[str, Any], defaults: dict[str, Any]) -> None:
    """
    Raise [`ChangedRunError`] where the run of `checkpoint` had other values (`stored`) than the present `run` has. A
    field that was added since then counts as its value in `defaults`.
    """
    now = json.loads(json.dumps(run, default=str))
    was = {**{name: value for name, value in defaults.items() if name in now}, **stored}
    names = [name for name in {**stored, **now} if was.get(name) != now.get(name)]
    if names:
        changes = "; ".join(f"{name} was {was.get(name)!r} and is {now.get(name)!r}" for name in names)
        raise ChangedRunError(
            f"resume_from: {checkpoint} is of another run: {changes}. Resume with what it was written with, or start "
            "a new run in another output_dir."
        )


def adapter_values(peft_config: PeftConfig) -> dict[str, Any]:
    """What an adapter's configuration says of the adapter, in values that can be compared after a resume."""
    return _comparable(peft_config.to_dict())


def _comparable(values: dict[str, Any]) -> dict[str, Any]:
    values = {name: sorted(v) if isinstance(v, set) else v for name, v in values.items()}
    return {name: v if isinstance(v, str | int | float | list | None) else str(v) for name, v in values.items()
            if name not in ("peft_version", "base_model_name_or_path", "inference_mode")}  # fmt: skip


def archive_previous_run(output_dir: Path, names: Sequence[str]) -> None:
    """Move what an earlier run left under `names` to a folder of its own, `previous_<n>`, and say so."""
    left = [path for path in (output_dir / name for name in names) if path.exists()]
    if not left:
        return
    number = 1 + len(list(output_dir.glob("previous_*")))
    folder = output_dir / f"previous_{number}"
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
    """
    The checkpoint at `path`, or the newest one in it or in its folder `checkpoints`.

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
    """State of an optimizer as tensors with names."""
    return dict(_tensors_of(optimizer.state_dict()["state"]))


def _tensors_of(state: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of nested dicts, by the path to them. They are copies, for bitsandbytes shares some between weights."""
    for name, value in state.items():
        if isinstance(value, dict):
            yield from _tensors_of(value, f"{prefix}{name}.")
        elif value is not None:
            yield f"{prefix}{name}", torch.as_tensor(value).clone(memory_format=torch.contiguous_format)
