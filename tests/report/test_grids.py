# SPDX-License-Identifier: Apache-2.0

import torch

from trl_pgraft.report.grids import before_after_grid, image_grid


def images(*values):
    return torch.stack([torch.full((3, 8, 8), value, dtype=torch.uint8) for value in values])


def test_grid_shows_each_pair_above_each_other():
    grid = before_after_grid(images(10, 20, 30), images(110, 120, 130), ["one", "two", "three"], columns=2, size=32)
    first, second = 56 + 16, 56 + 36 + 16
    assert grid.getpixel((first, 4 + 16)) == (10,) * 3 and grid.getpixel((first, 4 + 36 + 16)) == (110,) * 3
    assert grid.getpixel((second, 4 + 16)) == (20,) * 3 and grid.getpixel((second, 4 + 36 + 16)) == (120,) * 3
    below = 4 + 2 * 32 + 4 + 46
    assert grid.getpixel((first, below + 16)) == (30,) * 3


def test_of_videos_the_middle_frame_is_shown():
    videos = torch.stack([images(10, 20, 30), images(40, 50, 60)])
    assert image_grid(videos, ["", ""], size=16).tobytes() == image_grid(videos[:, 1], ["", ""], size=16).tobytes()
    pairs = before_after_grid(videos, videos.flip(0), ["", ""], size=16)
    assert pairs.tobytes() == before_after_grid(videos[:, 1], videos.flip(0)[:, 1], ["", ""], size=16).tobytes()


def test_grid_takes_any_prompt():
    labels = ["x" * 10_000, "<b>&\x00\x1b[31m\n\u202e", ""]
    grid = before_after_grid(images(1, 2, 3), images(4, 5, 6), labels, size=16)
    assert grid.size[0] > 3 * 16


def test_image_grid_fills_rows_and_leaves_out_what_is_too_much():
    grid = image_grid(images(10, 20, 30, 40, 50), ["one", "\x00\u202e" * 99, "", "four", "five"], 2, 16, most=4)
    first, second, below = 4 + 8, 4 + 20 + 8, 4 + 76 + 8
    assert [grid.getpixel((x, 12)) for x in (first, second)] == [(10,) * 3, (20,) * 3]
    assert [grid.getpixel((x, below)) for x in (first, second)] == [(30,) * 3, (40,) * 3]
    assert grid.size == (44, 2 * 76)
