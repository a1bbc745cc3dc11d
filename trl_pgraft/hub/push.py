# SPDX-License-Identifier: Apache-2.0

"""Push adapters and samples to the Hub: with retries, and with the command that makes up for a failure."""

import functools
import hashlib
import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from peft import PeftConfig

from ..adapters.files import ADAPTER_FILES, CORRECTOR_FILE, CORRECTOR_FILES, clean, read_switch, redacted
from .cards import (
    CARD_FILE,
    GRID_FILE,
    ROUND_FILES,
    AdapterFacts,
    kind_of,
    write_adapter_card,
    write_corrector_card,
    write_samples_card,
)


# Seconds before a push is tried again; the client itself repeats single requests as well.
WAITS = (1.0, 4.0, 16.0)
WORTH_ANOTHER_TRY = (408, 409, 412, 429)


class PushError(RuntimeError):
    """A push failed for good; the message has the command that makes up for it."""


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
    Push an adapter folder to a model repository on the Hub, which is made if missing.

    Args:
        folder (`str` or `Path`):
            Folder of [`save_pgraft_adapter`] or of `trainer.save_model`. It gets a short model card if it has none.
        repo_id (`str`):
            `user/name`, or a name in the token's own namespace.
        private (`bool`, *optional*, defaults to `False`):
            Make the repository private; one that is there and public is refused.
        token (`str`, *optional*):
            Token that may write there; the one of `HF_TOKEN` or `hf auth login` where not given.
        commit_message (`str`, *optional*, defaults to `"Upload adapter"`):
            Message of the commit.
        revision (`str`, *optional*):
            Branch; the main one where not given.

    Returns:
        `str`: the repository, as `user/name`.

    Raises:
        `ValueError`: the folder has no adapter, or the repository is not private.
        [`PushError`]: the Hub did not take it after bounded retries.
    """
    folder, switch = Path(folder), read_switch(folder)

    def write_card(repo_id: str) -> None:
        if not (folder / CARD_FILE).is_file():
            kind = kind_of(PeftConfig.from_pretrained(str(folder)))
            write_adapter_card(folder, repo_id, AdapterFacts(switch, kind=kind))

    files = [*ADAPTER_FILES, CARD_FILE, GRID_FILE]
    return _push_model(write_card, files, folder, repo_id, private, token, commit_message, revision)


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

    Arguments, result and errors are those of [`push_adapter_to_hub`].
    """
    folder = Path(folder)
    if not (folder / CORRECTOR_FILE).is_file():
        raise ValueError(f"push_corrector_to_hub: {folder} has no {CORRECTOR_FILE}, so it holds no noise corrector.")

    def write_card(repo_id: str) -> None:
        if not (folder / CARD_FILE).is_file():
            write_corrector_card(folder, repo_id, json.loads((folder / CORRECTOR_FILE).read_text()))

    files = [*CORRECTOR_FILES, CARD_FILE]
    return _push_model(write_card, files, folder, repo_id, private, token, commit_message, revision)


def push_samples_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Upload samples",
) -> str:
    """
    Push the rounds of a run to a dataset repository on the Hub that are not there yet; nothing there is rewritten.

    Args:
        folder (`str` or `Path`):
            The run's `samples` folder, with a folder of parquet files for each round. It gets a dataset card.
        repo_id (`str`):
            `user/name`, or a name in the token's own namespace.
        private (`bool`, *optional*, defaults to `False`):
            Make the repository private; one that is there and public is refused.
        token (`str`, *optional*):
            Token that may write there; the one of `HF_TOKEN` or `hf auth login` where not given.
        commit_message (`str`, *optional*, defaults to `"Upload samples"`):
            Message of the commit.

    Returns:
        `str`: the repository, as `user/name`.

    Raises:
        `ValueError`: there are no rounds, the repository has other samples under their names, or it is not private.
        [`PushError`]: the Hub did not take them after bounded retries.
    """
    folder = Path(folder)
    if not any(folder.glob(ROUND_FILES)):
        raise ValueError(f"push_samples_to_hub: {folder} has no {ROUND_FILES}, which a run writes to its samples/.")

    def push(repo_id: str, api: HfApi) -> None:
        there = _remote_files(api, repo_id)
        _check_same_samples(folder, repo_id, there)
        new = [name for name in [CARD_FILE, *_rounds(folder)] if name not in there]
        if new:
            api.upload_folder(
                repo_id=repo_id,
                repo_type="dataset",
                folder_path=folder,
                allow_patterns=new,
                commit_message=commit_message,
            )

    def write_card(repo_id: str) -> None:
        write_samples_card(folder, repo_id)

    return _push(write_card, push, folder, repo_id, "dataset", private, token)


def prepare_repository(repo_id: str, kind: str, private: bool, token: str | None) -> str:
    """
    Make a repository if it is missing, and check that it can be written to and is as private as asked.

    Returns:
        `str`: its name with the namespace.
    """
    api = HfApi(token=clean(token))
    repo_id = api.create_repo(repo_id, repo_type=kind, private=private or None, exist_ok=True).repo_id
    # What every push begins with: it needs the right to write, and for a small text file it uploads nothing.
    api.preupload_lfs_files(repo_id, [CommitOperationAdd(CARD_FILE, b"\n")], repo_type=kind)
    if private and not api.repo_info(repo_id, repo_type=kind).private:
        raise ValueError(
            f"{kind} repository {repo_id} is public, and a private one is asked for: change its visibility, or give "
            "another name."
        )
    return repo_id


def check_samples_repository(folder: Path, repo_id: str, first_round: int, token: str | None) -> None:
    """
    Check that a dataset repository has no samples but those of a run's rounds before `first_round`.

    Raises:
        `ValueError`: it has, so that the rounds yet to be drawn may find their place taken.
    """
    there = _remote_files(HfApi(token=clean(token)), repo_id)
    own = {name for name in _rounds(folder) if int(Path(name).parts[0].removeprefix("round_")) < first_round}
    others = sorted(name for name in there.keys() - own if name.endswith(".parquet"))
    if others:
        raise ValueError(
            f"hub_dataset_id={repo_id!r} has samples that are not of this run, e.g. {others[0]}. Give another name, "
            "or resume the run that drew them in its own output_dir."
        )
    _check_same_samples(folder, repo_id, there)


def upload_command(folder: Path, repo_id: str, kind: str, private: bool = False, revision: str | None = None) -> str:
    """The shell command that pushes a folder."""
    command = ["hf", "upload", repo_id, str(folder.resolve()), ".", "--repo-type", kind]
    command += ["--private"] if private else []
    return shlex.join(command + (["--revision", revision] if revision else []))


def _push_model(
    write_card: Callable[[str], None],
    files: list[str],
    folder: Path,
    repo_id: str,
    private: bool,
    token: str | None,
    commit_message: str,
    revision: str | None,
) -> str:
    """Push the files of a folder that match one of the patterns `files` to a model repository."""

    def push(repo_id: str, api: HfApi) -> None:
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=files,
            commit_message=commit_message,
            revision=revision,
        )

    return _push(write_card, push, folder, repo_id, "model", private, token, revision)


def _push(
    write_card: Callable[[str], None],
    push: Callable[[str, HfApi], None],
    folder: Path,
    repo_id: str,
    kind: str,
    private: bool,
    token: str | None,
    revision: str | None = None,
) -> str:
    """Prepare the repository and push, with retries."""
    token, names = clean(token), [repo_id]

    def attempt() -> str:
        names[0] = prepare_repository(repo_id, kind, private, token)
        write_card(names[0])
        push(names[0], HfApi(token=token))
        return names[0]

    try:
        return retried(attempt)
    except ValueError:
        raise
    except Exception as error:
        write_card(names[0])
        raise PushError(
            f"{folder} was not pushed to {kind} repository {names[0]}: {redacted(error, token)}\nNothing is lost. To "
            "push it later, logged in with `hf auth login` or HF_TOKEN:\n"
            f"  {upload_command(folder, names[0], kind, private, revision)}"
        ) from None


def retried(action: Callable[[], Any]) -> Any:
    """The result of `action`, tried again after growing waits unless another try would end the same."""
    for wait in (*WAITS, None):
        try:
            return action()
        except Exception as error:
            if wait is None or _is_final(error):
                raise
        time.sleep(wait)


def _is_final(error: Exception) -> bool:
    """Whether the error is one of wrong input, or of a request that the Hub refuses."""
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return 400 <= status < 500 and status not in WORTH_ANOTHER_TRY
    return isinstance(error, ValueError | TypeError | OfflineModeIsEnabled)


def _rounds(folder: Path) -> list[str]:
    """Names of the rounds' files in a samples folder, as the Hub has them."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob(ROUND_FILES))


def _remote_files(api: HfApi, repo_id: str) -> dict[str, Any]:
    tree = api.list_repo_tree(repo_id, recursive=True, repo_type="dataset")
    return {entry.path: entry for entry in tree if hasattr(entry, "size")}


def _check_same_samples(folder: Path, repo_id: str, there: dict[str, Any]) -> None:
    """Refuse to push to a repository that has other samples under the names of these."""
    for name in _rounds(folder):
        if name in there and not _is_same_file(folder / name, there[name]):
            raise ValueError(
                f"{folder} was not pushed: dataset repository {repo_id} has other samples as {name}. Give another "
                "repository; nothing there is rewritten."
            )


def _is_same_file(path: Path, remote: Any) -> bool:
    status = path.stat()
    if status.st_size != remote.size:
        return False
    return remote.lfs is None or remote.lfs.sha256 == _sha256(path, status.st_size, status.st_mtime_ns)


@functools.cache
def _sha256(path: Path, size: int, modified: int) -> str:
    """Hash of a file; read once as long as it does not change."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
