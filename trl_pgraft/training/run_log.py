# SPDX-License-Identifier: Apache-2.0

"""The log of a run: `metrics.jsonl` in the output folder, trackers, and the log event of callbacks."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..config import GraftConfig
from .callbacks import Callbacks
from .tracking import tracker_arguments, tracker_values


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
    """

    def __init__(self, output_dir: Path, accelerator: Accelerator, callbacks: Callbacks | None = None):
        self.path, self.accelerator, self.callbacks = output_dir / METRICS_FILE, accelerator, callbacks

    def start_trackers(self, config: GraftConfig, **values: Any) -> None:
        """Start the trackers that `config.log_with` names, with its fields and further `values` as parameters."""
        parameters = tracker_values({**config.to_dict(), **values})
        self.accelerator.init_trackers(config.tracker_project_name, parameters, tracker_arguments(config))

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
        if self.callbacks is not None:
            self.callbacks.state.log_history.append({**metrics, "step": step})
        self.accelerator.log(metrics, step=step)
        if self.callbacks is not None:
            self.callbacks.notify("on_log", logs=metrics)
        if self.accelerator.is_main_process:
            with open(self.path, "a") as file:
                file.write(_as_json(metrics))


def _as_json(metrics: Metrics) -> str:
    """A line of JSON, which has no numbers that are not finite: they become null."""
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return json.dumps(finite) + "\n"
