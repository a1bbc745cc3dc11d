# SPDX-License-Identifier: Apache-2.0

import io

import numpy as np
import pytest
import torch
from PIL import Image

from trl_pgraft.pipelines.pixels import as_image, to_pil, to_uint8, to_unit_range


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


GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
COLOURS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
RGB = Image.fromarray(COLOURS)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned():
    """Encoded as a camera does that is held upright: turned by 90 degrees, with a note of it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(RGB.rotate(90, expand=True), exif=exif)


def few_colours():
    image = Image.fromarray(GREY // 64)
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    return image


PALETTE = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]], dtype=np.uint8)[GREY // 64]
IMAGES = {
    "RGB": (RGB, COLOURS),
    "bytes": (encoded(RGB), COLOURS),
    "what datasets stores": ({"bytes": encoded(RGB), "path": "elsewhere.png"}, COLOURS),
    "array": (COLOURS, COLOURS),
    "tensor": (torch.tensor(COLOURS).permute(2, 0, 1), COLOURS),
    "grey": (Image.fromarray(GREY), GREY),
    "grey array": (GREY[..., None], GREY),
    "grey tensor": (torch.tensor(GREY)[None], GREY),
    "black and white": (Image.fromarray(GREY > 99), np.where(GREY > 99, 255, 0)),
    "palette": (few_colours(), PALETTE),
    "16 bits": (Image.fromarray(GREY.astype(np.uint16) * 257), GREY),
    "16 bits, rounded": (encoded(Image.fromarray(GREY.astype(np.uint16) * 257 + 99)), GREY),
    "opaque": (RGB.convert("RGBA"), COLOURS),
    "CMYK": (Image.fromarray(255 - COLOURS).convert("CMYK"), 255 - COLOURS),
    "turned": (turned(), COLOURS),
}


@pytest.mark.parametrize("value, expected", IMAGES.values(), ids=IMAGES)
def test_whatever_an_image_comes_as_it_is_its_pixels_in_rgb(value, expected):
    image = as_image(value, "image")
    assert image.mode == "RGB" and image.info == {} and image.format is None
    expected = np.broadcast_to(expected[..., None], (*expected.shape, 3)) if expected.ndim == 2 else expected
    assert np.array_equal(np.asarray(image), expected)


def test_an_image_of_a_file_has_no_path_and_lists_are_lists(tmp_path):
    RGB.save(tmp_path / "photo.jpg")
    for value in (tmp_path / "photo.jpg", str(tmp_path / "photo.jpg"), Image.open(tmp_path / "photo.jpg")):
        (image,) = as_image([value], "image")
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / "photo.jpg")))
        assert not getattr(image, "filename", "") and image.format is None


@pytest.mark.parametrize("value", [torch.rand(3, 4, 4), [[0.5, 0.25]], 7, np.ones((4, 4))])
def test_what_is_no_image_is_left_as_it_is(value):
    assert as_image(value, "image") is value


def test_a_pipeline_of_four_channels_is_handed_the_transparency():
    half = RGB.copy()
    half.putalpha(128)
    assert np.array_equal(np.asarray(as_image(half, "image", "RGBA")), np.asarray(half))


@pytest.mark.parametrize(
    "value, message",
    [
        (Image.new("RGBA", (4, 4), (1, 2, 3, 99)), "control_image: .*'RGBA' has transparent pixels.*background"),
        (Image.new("LA", (4, 4), (1, 99)), "'LA' has transparent pixels"),
        (COLOURS.tolist(), "a list of whole numbers is not taken for an image"),
        (Image.new("F", (4, 4)), "mode 'F', whose range is unknown; convert it"),
        ("no/such/file.png", "cannot be read.*no/such/file.png"),
        (encoded(RGB)[:100], "cannot be read"),
        ({"bytes": b"GIF", "path": None}, "cannot be read"),
    ],
)
def test_an_image_that_has_no_such_pixels_is_refused(value, message):
    with pytest.raises(ValueError, match=f"(?s)control_image: .*{message.removeprefix('control_image: ')}"):
        as_image(value, "control_image")
