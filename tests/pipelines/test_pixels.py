# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch

from trl_pgraft.pipelines.pixels import to_pil, to_uint8, to_unit_range


def test_floats_are_rounded_to_the_nearest_level_and_clamped():
    values = torch.tensor([-0.2, 0.0, 0.49 / 255, 0.51 / 255, 1.0, 1.3])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 255, 255] and to_uint8(values).dtype == torch.uint8


def test_every_level_survives_the_way_to_floats_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_unit_range(levels)), levels)
    assert to_unit_range(levels).dtype == torch.float32 and to_unit_range(levels)[-1] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="non-finite"):
        to_uint8(torch.tensor([0.5, value]))


@pytest.mark.parametrize("channels", [1, 3])
def test_pil_images_are_rgb(channels):
    pixels = torch.randint(256, (2, channels, 4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = to_pil(pixels)
    assert [image.size for image in images] == [(5, 4), (5, 4)] and all(image.mode == "RGB" for image in images)
    found = torch.stack([torch.tensor(np.asarray(image)) for image in images]).permute(0, 3, 1, 2)
    assert torch.equal(found, pixels.expand(-1, 3, -1, -1))


def test_a_video_is_a_list_of_images():
    video = torch.zeros(2, 3, 3, 4, 4, dtype=torch.uint8)
    video[1, 2] = 255
    frames = to_pil(video)
    assert [len(images) for images in frames] == [3, 3]
    assert frames[1][2].getpixel((0, 0)) == (255, 255, 255) and frames[1][1].getpixel((0, 0)) == (0, 0, 0)
