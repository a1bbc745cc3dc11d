# SPDX-License-Identifier: Apache-2.0

"""Push adapters and samples to the Hub, with retries. After a failure, the error has the command to run later."""

import shlex
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi
from peft import PeftConfig

from ..adapters.files import (
    ADAPTER_FILES,
    CORRECTOR_FILE,
    CORRECTOR_FILES,
    MARKERS,
    clean,
    read_switch,
    redacted,
)
from .cards import CARD_FILE, GRID_FILE, write_adapter_card, write_corrector_card, write_samples_card
from .facts import ROUND_FILES, AdapterFacts, kind_of
from .repositories import new_files, prepare_repository
from .retries import retried


# In cards that a push writes. Those of a folder that gets another adapter are written anew.
SHORT_CARD = "<!-- Each push writes this card anew. To keep your changes, remove this line. -->"


class PushError(RuntimeError):
    """A push failed after all retries; the message has the command that pushes later."""


def push_adapter_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Upload adapter",
    revision: str | None = None,
) -> str:
    """
    Push an adapter folder to a model repository on the Hub, which is made if it is missing.

    Args:
        folder (`str` or `Path`):
            Folder of [`save_pgraft_adapter`] or of `trainer.save_model`. It gets a short model card if it has none.
        repo_id (`str`):
            `user/name`, or a name in the token's own namespace.
        private (`bool`, *optional*, defaults to `False`):
            Make the repository private; an existing public one is refused. `False` keeps an existing one as it is.
        token (`str`, *optional*):
            Token that may write there; the one of `HF_TOKEN` or `hf auth login` where not given.
        commit_message (`str`, *optional*, defaults to `"Upload adapter"`):
            Message of the commit.
        revision (`str`, *optional*):
            Branch to push to; the main one where not given.

    Returns:
        `str`: the repository, as `user/name`.

    Raises:
        `ValueError`: the folder has no adapter, or the repository is not private.
        [`PushError`]: the upload failed, also when it was repeated.
    """
    read_switch(folder)  # before any request, it refuses a folder without an adapter
    files = [*ADAPTER_FILES, CARD_FILE, GRID_FILE]
    return _push(folder, repo_id, "model", _write_short_card, files, private, token, commit_message, revision)


def push_corrector_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Upload noise corrector",
    revision: str | None = None,
) -> str:
    """
    Push a folder of [`NoiseCorrectedPipeline.save_pretrained`] to a model repository on the Hub.

    Args:
        folder (`str` or `Path`):
            The folder. It gets a short model card if it has none.
        repo_id (`str`):
            `user/name`, or a name in the token's own namespace.
        private (`bool`, *optional*, defaults to `False`):
            Make the repository private; an existing public one is refused. `False` keeps an existing one as it is.
        token (`str`, *optional*):
            Token that may write there; the one of `HF_TOKEN` or `hf auth login` where not given.
        commit_message (`str`, *optional*, defaults to `"Upload noise corrector"`):
            Message of the commit.
        revision (`str`, *optional*):
            Branch to push to; the main one where not given.

    Returns:
        `str`: the repository, as `user/name`.

    Raises:
        `ValueError`: the folder has no noise corrector, or the repository is not private.
        [`PushError`]: the upload failed, also when it was repeated.
    """
    if not (Path(folder) / CORRECTOR_FILE).is_file():
        raise ValueError(f"push_corrector_to_hub: {folder} has no {CORRECTOR_FILE}, so it holds no noise corrector.")
    files = [*CORRECTOR_FILES, CARD_FILE]
    return _push(folder, repo_id, "model", write_corrector_card, files, private, token, commit_message, revision)


def push_samples_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Upload samples",
) -> str:
    """
    Push a run's samples to a dataset repository on the Hub. Iterations that are there already are left as they are.

    Args:
        folder (`str` or `Path`):
            The run's `samples` folder, with a folder of parquet files for each iteration. It gets a dataset card.
        repo_id (`str`):
            `user/name`, or a name in the token's own namespace.
        private (`bool`, *optional*, defaults to `False`):
            Make the repository private; an existing public one is refused. `False` keeps an existing one as it is.
        token (`str`, *optional*):
            Token that may write there; the one of `HF_TOKEN` or `hf auth login` where not given.
        commit_message (`str`, *optional*, defaults to `"Upload samples"`):
            Message of the commit.

    Returns:
        `str`: the repository, as `user/name`.

    Raises:
        `ValueError`: the folder has no samples, the repository has other samples under their names, or it is not
            private.
        [`PushError`]: the upload failed, also when it was repeated.
    """
    if not any(Path(folder).glob(ROUND_FILES)):
        raise ValueError(f"push_samples_to_hub: {folder} has no {ROUND_FILES}, which a run writes to its samples/.")
    return _push(folder, repo_id, "dataset", write_samples_card, [], private, token, commit_message)


def _write_short_card(folder: Path, repo_id: str) -> None:
    kind = kind_of(PeftConfig.from_pretrained(str(folder)))
    write_adapter_card(folder, repo_id, AdapterFacts(read_switch(folder), kind=kind))


def _ensure_card(folder: Path, kind: str, name: str, write_card: Callable[[Path, str], None]) -> None:
    """Write a data set's card, or a model's where the folder has none but such a one."""
    path = folder / CARD_FILE
    if kind == "dataset" or not path.is_file() or SHORT_CARD in path.read_text():
        write_card(folder, name)
        if kind == "model":
            path.write_text(f"{path.read_text().rstrip()}\n\n{SHORT_CARD}\n")


def _files_of_earlier(api: HfApi, name: str, revision: str | None) -> list[str]:
    """Patterns of files of an adapter or corrector of this package, where a model repository has one."""
    is_ours = any(api.file_exists(name, marker, revision=revision) for marker in MARKERS)
    return [*ADAPTER_FILES, *CORRECTOR_FILES, GRID_FILE] if is_ours else []


def _push(
    folder: str | Path,
    repo_id: str,
    kind: str,
    write_card: Callable[[Path, str], None],
    files: list[str],
    private: bool,
    token: str | None,
    commit_message: str,
    revision: str | None = None,
) -> str:
    """
    Prepare the repository, write the folder's card and upload its files, with retries.

    A model's card is written where the folder has none of a user's or of a run's, and the files that match the
    patterns `files` are uploaded; those of an earlier adapter or corrector that are not among them are deleted there.
    A data set's card is always written, and the samples that the repository does not have yet are uploaded.
    """
    folder, token, name = Path(folder), clean(token), repo_id
    earlier: list[str] = []  # patterns of files that an earlier push has left, and this one has not

    def attempt() -> str:
        nonlocal name, earlier
        name, api = prepare_repository(repo_id, kind, private, token), HfApi(token=token)
        _ensure_card(folder, kind, name, write_card)
        patterns = new_files(folder, api, name) if kind == "dataset" else files
        if patterns:
            earlier = _files_of_earlier(api, name, revision) if kind == "model" else []
            options = {"repo_type": kind, "commit_message": commit_message, "revision": revision}
            api.upload_folder(
                repo_id=name, folder_path=folder, allow_patterns=patterns, delete_patterns=earlier or None, **options
            )
        return name

    try:
        return retried(attempt)
    except ValueError:
        raise
    except Exception as error:
        _ensure_card(folder, kind, name, write_card)
        command = [
            *("hf", "upload", name, str(folder.resolve()), ".", "--repo-type", kind),
            *(["--private"] if private else []),
            *(["--revision", revision] if revision else []),
            *(part for pattern in earlier for part in ("--delete", pattern)),
        ]
        raise PushError(
            f"{folder} was not pushed to {kind} repository {name}: {redacted(error, token)}\nNothing is lost. To "
            "push it later, logged in with `hf auth login` or HF_TOKEN:\n"
            f"  {shlex.join(command)}"
        ) from None
