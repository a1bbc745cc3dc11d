# SPDX-License-Identifier: Apache-2.0

"""Follow a value through the package: the files that hand it on, in the order in which they are first entered.

A file hands a value on if one of its functions gets it and returns it, or what it has made of it: a prompt becomes a
`PromptGroup`, then `Sample`s, a `RolloutBatch`, and so on. What writes it to a cache or shows it hands nothing on, and
a record's own methods are no station. Files that are more than two files below the trainer are the inside of a stage.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import trl_pgraft


PACKAGE = Path(trl_pgraft.__file__).parent
DEPTH = 2


@dataclass
class Journey:
    """
    Args:
        files (`list[str]`, *optional*):
            Files that hand the value on, in the order of their first such call.
        entered_from (`dict[str, set[str]]`, *optional*):
            Of each of these, the other files that called it with the value.
    """

    files: list[str] = field(default_factory=list)
    entered_from: dict[str, set[str]] = field(default_factory=dict)


@contextmanager
def followed(carries: Callable[[Any], bool], end: str) -> Iterator[Journey]:
    """
    Record a journey inside the block.

    Args:
        carries (`Callable`):
            Whether an argument or a result is, or holds, what is followed.
        end (`str`):
            File in which the journey ends: it need not return anything.
    """
    calls: list[tuple[FrameType, str, set[str], int]] = []
    seen: list[tuple[int, str, set[str]]] = []
    names: dict[CodeType, str | None] = {}
    count = 0

    def name_of(frame: FrameType) -> str | None:
        code = frame.f_code
        if code not in names:
            path = Path(code.co_filename)
            names[code] = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else None
        return names[code]

    def stack_of(frame: FrameType | None) -> list[str]:
        """Files of the package on the stack, the innermost first, each run of calls inside one file once."""
        found: list[str] = []
        while frame is not None:
            name = name_of(frame)
            if name and found[-1:] != [name]:
                found.append(name)
            frame = frame.f_back
        return found

    def watch(frame: FrameType, event: str, result: Any) -> None:
        nonlocal count
        if event not in ("call", "return") or name_of(frame) is None:
            return
        if event == "call":
            code, count = frame.f_code, count + 1
            number = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
            arguments = {name: frame.f_locals.get(name) for name in code.co_varnames[:number]}
            is_method_of_it = "self" in arguments and carries(arguments["self"])
            file, *outer = stack_of(frame)
            if len(outer) <= DEPTH and not is_method_of_it and any(map(carries, arguments.values())):
                calls.append((frame, file, set(outer[:1]), count))
        elif calls and calls[-1][0] is frame:
            _, file, door, number = calls.pop()
            if carries(result) or file == end:
                seen.append((number, file, door))

    sys.setprofile(watch)
    journey = Journey()
    try:
        yield journey
    finally:
        sys.setprofile(None)
    for _, file, door in sorted(seen, key=lambda call: call[0]):
        if file not in journey.entered_from:
            journey.files.append(file)
        journey.entered_from.setdefault(file, set()).update(door)
