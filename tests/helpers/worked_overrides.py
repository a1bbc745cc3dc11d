# SPDX-License-Identifier: Apache-2.0

"""The overrides of docs/models.md, taken from there, so that what is documented is what is tested."""

import re
from functools import cache
from pathlib import Path
from typing import Any


PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@cache
def overrides() -> dict[str, Any]:
    """Names that the page's blocks of Python define."""
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(block, names)
    return names
