# SPDX-License-Identifier: Apache-2.0

"""
GRAFT and P-GRAFT: fine-tune diffusion models on rewards by rejection sampling, in TRL's ecosystem.

`__init__.pyi` lists the public names and where each is defined. A name is imported when it is first used.
"""

import ast
import importlib
import importlib.util
from pathlib import Path
from typing import Any


_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text())
_MODULES = {alias.name: node.module for node in _STUB.body if isinstance(node, ast.ImportFrom) for alias in node.names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
        return globals().setdefault(name, value)
    if importlib.util.find_spec(f".{name}", __name__):  # `trl_pgraft.trainer` and the other modules
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
