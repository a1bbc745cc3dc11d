# SPDX-License-Identifier: Apache-2.0

"""Functions that configurations and command lines name as "package.module:function"."""

import importlib
from collections.abc import Callable
from operator import attrgetter
from typing import Any


def import_function(name: str, field: str) -> Callable[..., Any]:
    r"""
    Import a function.

    Args:
        name (`str`):
            `"package.module:function"`.
        field (`str`):
            What the name was given as, for the error's message.

    Raises:
        `ValueError`: it cannot be imported, or cannot be called.
    """
    module, _, attribute = name.partition(":")
    try:
        function = attrgetter(attribute)(importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{field}: {name!r} cannot be imported ({error}).") from error
    if not callable(function):
        raise ValueError(f"{field}: {name!r} is a {type(function).__name__}, which cannot be called.")
    return function
