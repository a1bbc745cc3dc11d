# SPDX-License-Identifier: Apache-2.0

"""What accelerate's trackers are told: how they start, plain values, and pictures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker
from PIL import Image

from ..config import GraftConfig


class NoTracker(GeneralTracker):
    """What an `image_samples_hook` gets where `log_with` names no tracker: it takes everything and keeps nothing."""

    name = "none"
    requires_logging_directory = False

    def __init__(self):
        super().__init__(_blank=True)

    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Take images as accelerate's trackers do."""


def tracker_values(values: dict[str, Any]) -> dict[str, Any]:
    """Values that every tracker takes: numbers and strings."""
    return {name: v if isinstance(v, int | float | str | bool) else str(v) for name, v in values.items()}


def tracker_arguments(config: GraftConfig) -> dict[str, dict[str, Any]]:
    """Each tracker's own arguments: `run_name` where it takes one, and `tracker_kwargs`."""
    if not config.run_name or config.log_with not in ("wandb", "trackio"):
        return config.tracker_kwargs
    named = {"name": config.run_name, **config.tracker_kwargs.get(config.log_with, {})}
    return {**config.tracker_kwargs, config.log_with: named}


def log_image(trackers: Sequence[GeneralTracker], name: str, image: Image.Image, step: int) -> None:
    """
    Send a picture to every tracker that takes pictures.

    Args:
        trackers (`Sequence[GeneralTracker]`):
            accelerate's trackers.
        name (`str`):
            Under which name.
        image (`PIL.Image.Image`):
            The picture.
        step (`int`):
            Optimizer steps so far.
    """
    for tracker in trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "trackio":
            from trackio import Image as TrackioImage

            tracker.log({name: TrackioImage(image)}, step=step)
        elif hasattr(tracker, "log_images"):
            tracker.log_images({name: [image]}, step=step)
