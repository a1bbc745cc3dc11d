# SPDX-License-Identifier: Apache-2.0

"""Push adapters and samples to the Hub, with retries. After a failure, the error has the command to run later."""

import shlex
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi
from peft import PeftConfig

from ..adapters.files import ADAPTER_FILES, CORRECTOR_FILE, CORRECTOR_FILES, clean, read_switch, redacted
from .cards import CARD_FILE, GRID_FILE, write_adapter_card, write_corrector_card, write_samples_card
from .facts import ROUND_FILES, AdapterFacts, kind_of
from .repositories import new_files, prepare_repository
from .retries import retried


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

    A model's card is written where the folder has none, and the files that match the patterns `files` are uploaded; a
    data set's card is always written, and the samples that the repository does not have yet are uploaded.
    """
    folder, token, name = Path(folder), clean(token), repo_id

    def ensure_card() -> None:
        if kind == "dataset" or not (folder / CARD_FILE).is_file():
            write_card(folder, name)

    def attempt() -> str:
        nonlocal name
        name, api = prepare_repository(repo_id, kind, private, token), HfApi(token=token)
        ensure_card()
        patterns = new_files(folder, api, name) if kind == "dataset" else files
        if patterns:
            options = {"repo_type": kind, "commit_message": commit_message, "revision": revision}
            api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=patterns, **options)
        return name

    try:
        return retried(attempt)
    except ValueError:
        raise
    except Exception as error:
        ensure_card()
        command = [
            *("hf", "upload", name, str(folder.resolve()), ".", "--repo-type", kind),
            *(["--private"] if private else []),
            *(["--revision", revision] if revision else []),
        ]
        raise PushError(
            f"{folder} was not pushed to {kind} repository {name}: {redacted(error, token)}\nNothing is lost. To "
            "push it later, logged in with `hf auth login` or HF_TOKEN:\n"
            f"  {shlex.join(command)}"
        ) from None
