# Copyright 2026 The trl_pgraft authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Copy the emoji that the scenes need out of the two npm packages.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python -m examples.emoji.extract_sprites emoji-datasource-google-16.0.0.tgz emoji-datasource-twitter-16.0.0.tgz
"""

import sys
import tarfile

from examples.emoji.scenes import CODE_POINTS, FOLDER, STYLES


def extract(package: str, style: str) -> None:
    """Write `sprites/<style>/<noun>.png` from one npm package (a .tgz file)."""
    vendor = {"noto": "google", "twemoji": "twitter"}[style]
    target = FOLDER / "sprites" / style
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(package) as archive:
        for noun, code_point in CODE_POINTS.items():
            png = archive.extractfile(f"package/img/{vendor}/64/{code_point}.png").read()
            (target / f"{noun}.png").write_bytes(png)


if __name__ == "__main__":
    for package, style in zip(sys.argv[1:], STYLES, strict=True):
        extract(package, style)
