# SPDX-License-Identifier: Apache-2.0

"""
Copy the emoji that the scenes need out of four npm packages, given in the order of `ALL_STYLES`.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 \\
        @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/emojione@1.2.3
    python -m examples.emoji.extract_sprites emoji-datasource-google-16.0.0.tgz \\
        emoji-datasource-twitter-16.0.0.tgz iconify-json-fluent-emoji-flat-1.2.6.tgz iconify-json-emojione-1.2.3.tgz

The first two hold pictures of 64 pixels; the last two hold drawings, rasterised by `resvg-py` 0.5.0.
"""

import json
import sys
import tarfile
from collections.abc import Callable

from examples.emoji.scenes import ALL_STYLES, CODE_POINTS, FOLDER


# Noun -> name of the drawing, where it is another.
DRAWINGS = {
    "apple": "red-apple",
    "cat": "cat-face",
    "dog": "dog-face",
    "fish": "tropical-fish",
    "car": "automobile",
    "tree": "evergreen-tree",
    "cake": "shortcake",
}


def pictures(archive: tarfile.TarFile, vendor: str) -> dict[str, bytes]:
    """Noun -> PNG, out of an `emoji-datasource` package."""
    return {
        noun: archive.extractfile(f"package/img/{vendor}/64/{code_point}.png").read()
        for noun, code_point in CODE_POINTS.items()
    }


def drawings(archive: tarfile.TarFile) -> dict[str, bytes]:
    """Noun -> PNG of 64 x 64 pixels, out of an `@iconify-json` package."""
    from resvg_py import svg_to_bytes

    icons = json.load(archive.extractfile("package/icons.json"))
    box = f'viewBox="0 0 {icons["width"]} {icons["height"]}"'
    result = {}
    for noun in CODE_POINTS:
        name = DRAWINGS.get(noun, noun)
        name = icons["aliases"].get(name, {}).get("parent", name)
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" {box}>{icons["icons"][name]["body"]}</svg>'
        result[noun] = bytes(svg_to_bytes(svg_string=svg, width=64, height=64))
    return result


READERS: dict[str, Callable[[tarfile.TarFile], dict[str, bytes]]] = {
    "noto": lambda archive: pictures(archive, "google"),
    "twemoji": lambda archive: pictures(archive, "twitter"),
    "fluent": drawings,
    "emojione": drawings,
}


def extract(package: str, style: str) -> None:
    """Write `sprites/<style>/<noun>.png` from one npm package (a .tgz file)."""
    target = FOLDER / "sprites" / style
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(package) as archive:
        for noun, png in READERS[style](archive).items():
            (target / f"{noun}.png").write_bytes(png)


if __name__ == "__main__":
    for package, style in zip(sys.argv[1:], ALL_STYLES, strict=True):
        extract(package, style)
