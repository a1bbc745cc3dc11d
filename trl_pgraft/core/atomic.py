# SPDX-License-Identifier: Apache-2.0

"""Files and folders that are on disk whole or not at all, whenever the process is killed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_save(path: Path) -> Iterator[Path]:
    r"""
    A path beside `path` to write a file or a folder to; it takes the place of `path` when the block ends.

    Args:
        path (`Path`):
            Where the file or folder is to be. Its parent folder is made if missing; what is there before is replaced.

    Yields:
        `Path`: where to write. It is hidden and has the suffix `.tmp`, so that no pattern of finished files finds it;
            it is removed where the block raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, replaced = (path.with_name(f".{path.name}.{suffix}") for suffix in ("tmp", "old"))
    for left in (aside, replaced):
        _remove(left)
    try:
        yield aside
    except BaseException:
        _remove(aside)
        raise
    if path.is_dir():
        os.replace(path, replaced)  # no folder can be renamed onto another
    os.replace(aside, path)
    with suppress(OSError):  # what is saved is saved
        _remove(replaced)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
