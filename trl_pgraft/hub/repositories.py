# SPDX-License-Identifier: Apache-2.0

"""Repositories on the Hub: made and checked before a push."""

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.hf_api import RepoFile

from ..adapters.files import clean
from .cards import CARD_FILE
from .facts import ROUND_FILES


def prepare_repository(repo_id: str, kind: str, private: bool, token: str | None) -> str:
    """
    Make a repository if it is missing, and check that it can be written to.

    Args:
        repo_id (`str`):
            `user/name`, or a name in the token's own namespace.
        kind (`str`):
            `"model"` or `"dataset"`.
        private (`bool`):
            Whether the repository must be private; `False` takes it as it is.
        token (`str` or `None`):
            Token that may write there; `None` for the client's own.

    Returns:
        `str`: its name with the namespace.

    Raises:
        `ValueError`: it is public and must be private.
    """
    api = HfApi(token=clean(token))
    repo_id = api.create_repo(repo_id, repo_type=kind, private=private or None, exist_ok=True).repo_id
    # Every push begins with this: it needs the right to write, and for a small text file it uploads nothing.
    api.preupload_lfs_files(repo_id, [CommitOperationAdd(CARD_FILE, b"\n")], repo_type=kind)
    if private and not api.repo_info(repo_id, repo_type=kind).private:
        raise ValueError(
            f"{kind} repository {repo_id} is public, and a private one is required: change its visibility, or give "
            "another name."
        )
    return repo_id


def check_samples_repository(folder: Path, repo_id: str, first_iteration: int, token: str | None) -> None:
    """
    Check that a dataset repository has no samples but those of a run's iterations before `first_iteration`.

    Args:
        folder (`Path`):
            The run's `samples` folder.
        repo_id (`str`):
            The dataset repository, as `user/name`.
        first_iteration (`int`):
            Number of the next iteration to be sampled, from 0.
        token (`str` or `None`):
            Token that may read there; `None` for the client's own.

    Raises:
        `ValueError`: it has others, which may take the names of samples to come.
    """
    there = files_on_hub(HfApi(token=clean(token)), repo_id)
    own = {name for name in sample_files(folder) if int(Path(name).parts[0].removeprefix("round_")) < first_iteration}
    others = sorted(name for name in there.keys() - own if name.endswith(".parquet"))
    if others:
        raise ValueError(
            f"hub_dataset_id={repo_id!r} has samples that are not of this run, e.g. {others[0]}. Give another name, "
            "or resume the run that sampled them in its own output_dir."
        )
    _check_same_samples(folder, repo_id, there)


def new_files(folder: Path, api: HfApi, repo_id: str) -> list[str]:
    """
    Names of a run's card and samples that a dataset repository does not have yet.

    Args:
        folder (`Path`):
            The run's `samples` folder.
        api (`HfApi`):
            The Hub, with a token that may read the repository.
        repo_id (`str`):
            The dataset repository, as `user/name`.

    Raises:
        `ValueError`: the repository has other samples under a name of the run's.
    """
    there = files_on_hub(api, repo_id)
    _check_same_samples(folder, repo_id, there)
    return [name for name in [CARD_FILE, *sample_files(folder)] if name not in there]


def _check_same_samples(folder: Path, repo_id: str, there: Mapping[str, RepoFile]) -> None:
    for name in sample_files(folder):
        if name in there and not _is_same_file(folder / name, there[name]):
            raise ValueError(
                f"{folder} was not pushed: dataset repository {repo_id} has other samples as {name}. Give another "
                "repository; nothing there is rewritten."
            )


def sample_files(folder: Path) -> list[str]:
    """Names of the parquet files in a run's `samples` folder, as the Hub has them."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob(ROUND_FILES))


def files_on_hub(api: HfApi, repo_id: str) -> dict[str, RepoFile]:
    """The files of dataset repository `repo_id` by name, listed with the token of `api`."""
    return {
        entry.path: entry
        for entry in api.list_repo_tree(repo_id, recursive=True, repo_type="dataset")
        if isinstance(entry, RepoFile)
    }


def _is_same_file(path: Path, remote: RepoFile) -> bool:
    status = path.stat()
    return status.st_size == remote.size and (
        remote.lfs is None or remote.lfs.sha256 == _sha256(path, status.st_size, status.st_mtime_ns)
    )


@functools.cache
def _sha256(path: Path, size: int, modified: int) -> str:
    """Hash of a file; read once as long as it does not change."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
