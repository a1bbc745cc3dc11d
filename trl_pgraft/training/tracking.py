# SPDX-License-Identifier: Apache-2.0

"""What accelerate's trackers are given: their arguments, plain values, and pictures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker
from PIL import Image

from ..config import GraftConfig


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
