# SPDX-License-Identifier: Apache-2.0

"""The log of a run: `metrics.jsonl` in the output folder, accelerate's trackers, and the log event of callbacks."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from ..config import GraftConfig
from .callbacks import Callbacks


METRICS_FILE = "metrics.jsonl"
Metrics = dict[str, float]


class RunLog:
    """
    Writes a run's metrics, from its main process.

    Args:
        output_dir (`Path`):
            Folder of the run, where `metrics.jsonl` is written: one JSON object a line.
        accelerator (`Accelerator`):
            The processes of the run, with their trackers if there are any.
        callbacks ([`Callbacks`], *optional*):
            Called with `on_log`, in every process; without them, the log has the file and the trackers alone.
        config ([`GraftConfig`], *optional*):
            Configuration whose `log_with` names trackers, which get its fields as parameters.
        values (`Any`):
            Further parameters for them.
    """

    def __init__(
        self,
        output_dir: Path,
        accelerator: Accelerator,
        callbacks: Callbacks | None = None,
        config: GraftConfig | None = None,
        **values: Any,
    ):
        self.path, self.accelerator, self.callbacks = output_dir / METRICS_FILE, accelerator, callbacks
        self.config, self._values = config, values

    def start_trackers(self) -> None:
        """Start the configuration's trackers, unless they run."""
        if self.config is not None and not self.accelerator.trackers:
            values = tracker_values({**self.config.to_dict(), **self._values})
            self.accelerator.init_trackers(self.config.tracker_project_name, values, tracker_arguments(self.config))

    def finish_trackers(self) -> None:
        """Have the trackers write what they have; accelerate's `end_training` would end the process group as well."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []

    def rewrite(self, history: Sequence[Metrics]) -> None:
        """Replace the lines of `metrics.jsonl` by those of `history`, oldest first."""
        if self.accelerator.is_main_process:
            self.path.write_text("".join(map(_as_json, history)))

    def write(self, metrics: Metrics, step: int | None = None) -> None:
        """
        Append metrics to `metrics.jsonl`, and send them to trackers and callbacks.

        Args:
            metrics (`dict[str, float]`):
                Values by name; values that are not finite are `null` in the file.
            step (`int`, *optional*):
                Optimizer steps so far, for trackers and callbacks; the trackers count themselves without it.
        """
        self.accelerator.log(metrics, step=step)
        if self.callbacks is not None:
            self.callbacks.state.log_history.append({**metrics, "step": step})
            self.callbacks.notify("on_log", logs=metrics)
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(_as_json(metrics))


def _as_json(metrics: Metrics) -> str:
    """A line of JSON, which has no numbers that are not finite: they become null."""
    return json.dumps({name: value if math.isfinite(value) else None for name, value in metrics.items()}) + "\n"


class NoTracker(GeneralTracker):
    """The tracker of an `image_samples_hook` where `log_with` names none: it takes everything and keeps nothing."""

    name = "none"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__(_blank=True)

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Take images as accelerate's trackers do."""


def tracker_values(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a configuration as every tracker takes them: numbers and strings."""
    return {name: v if isinstance(v, int | float | str | bool) else str(v) for name, v in values.items()}


def tracker_arguments(config: GraftConfig) -> dict[str, dict[str, Any]]:
    """Arguments by tracker: the configuration's `tracker_kwargs`, and its `run_name` where the tracker takes one."""
    arguments = config.tracker_kwargs
    if not config.run_name or config.log_with not in ("wandb", "trackio"):
        return arguments
    return {**arguments, config.log_with: {"name": config.run_name, **arguments.get(config.log_with, {})}}


def log_image(trackers: Sequence[GeneralTracker], name: str, image: Image.Image, step: int) -> None:
    r"""
    Send a picture to every tracker that takes pictures.

    Args:
        trackers (`Sequence[GeneralTracker]`):
            Trackers of an accelerator.
        name (`str`):
            Name of the picture in the tracker.
        image (`PIL.Image.Image`):
            The picture, of any size.
        step (`int`):
            Optimizer steps so far, on the tracker's axis.
    """
    for tracker in trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "trackio":
            from trackio import Image as TrackioImage

            tracker.log({name: TrackioImage(image)}, step=step)
        elif hasattr(tracker, "log_images"):
            tracker.log_images({name: [image]}, step=step)
