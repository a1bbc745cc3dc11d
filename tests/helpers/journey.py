# SPDX-License-Identifier: Apache-2.0

"""Follow a value through the package: the files that hand it on, in the order in which they are first entered.

A file hands a value on if one of its functions returns it, or what was made of it: a prompt becomes a `PromptGroup`,
then `Sample`s, a `RolloutBatch`, and so on. What only writes or shows it hands nothing on, and a record's own methods
are no station. Files more than `DEPTH` files below the trainer are the inside of a stage.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import trl_pgraft


PACKAGE = Path(trl_pgraft.__file__).parent
DEPTH = 3


@dataclass
class Journey:
    """
    Args:
        files (`list[str]`, *optional*):
            Files that hand the value on, in the order in which they were first called to do so.
        entered_from (`dict[str, set[str]]`, *optional*):
            Of each of these, the files that called it; a file that calls back into one of its callers returns to it.
    """

    files: list[str] = field(default_factory=list)
    entered_from: dict[str, set[str]] = field(default_factory=dict)


@contextmanager
def followed(carries: Callable[[Any], bool], end: str) -> Iterator[Journey]:
    """
    Record a journey inside the block.

    Args:
        carries (`Callable`):
            Whether a result is, or holds, what is followed.
        end (`str`):
            Function by which the journey ends, as `"file.py:function"`; it need not return anything.
    """
    started: dict[FrameType, int] = {}
    seen: list[tuple[int, list[str]]] = []
    names: dict[CodeType, str | None] = {}

    def name_of(frame: FrameType) -> str | None:
        code = frame.f_code
        if code not in names:
            path = Path(code.co_filename)
            names[code] = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else None
        return names[code]

    def stack_of(frame: FrameType | None) -> list[str]:
        """Files of the package on the stack, the innermost first; one that calls back into a caller returns to it."""
        found: list[str] = []
        while frame is not None:
            name = name_of(frame)
            if name in found:
                del found[found.index(name) + 1 :]
            elif name:
                found.append(name)
            frame = frame.f_back
        return found

    def watch(frame: FrameType, event: str, result: Any) -> None:
        if event == "call" and name_of(frame):
            started.setdefault(frame, len(started))
        elif event == "return" and name_of(frame):
            stack, owner = stack_of(frame), frame.f_locals.get("self", frame.f_locals.get("cls"))
            is_end = f"{stack[0]}:{frame.f_code.co_name}" == end
            is_function = not frame.f_code.co_name.startswith("<")  # and no comprehension
            if is_function and len(stack) <= DEPTH + 1 and not carries(owner) and (carries(result) or is_end):
                seen.append((started.get(frame, -1), stack))

    sys.setprofile(watch)
    journey = Journey()
    try:
        yield journey
    finally:
        sys.setprofile(None)
    for _, stack in sorted(seen, key=lambda call: call[0]):
        for caller, file in itertools.pairwise([None, *reversed(stack)]):
            if file not in journey.entered_from:
                journey.files.append(file)
            journey.entered_from.setdefault(file, set()).update([caller] if caller else [])
        if stack[0] == end.partition(":")[0]:
            break
