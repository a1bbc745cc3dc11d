# SPDX-License-Identifier: Apache-2.0

"""What a run pushes to the Hub: checked before the first sample is drawn, and never a reason to stop after that."""

import contextlib
import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi

from ..adapters.files import clean, redacted
from ..config import GraftConfig
from .push import check_samples_repository, prepare_repository, push_adapter_to_hub, push_samples_to_hub, retried


class Publisher:
    """
    Pushes a run's adapter and samples from its main process.

    Args:
        config ([`GraftConfig`]):
            Its `push_to_hub` and `hub_*` fields.
        output_dir (`Path`):
            The run's folder.
        accelerator (`Accelerator`):
            Its main process pushes.
        draws (`bool`, *optional*, defaults to `True`):
            Whether the run draws samples; it does not push those that it was given.
    """

    def __init__(self, config: GraftConfig, output_dir: Path, accelerator: Accelerator, draws: bool = True):
        self.config = config
        self.samples_folder = output_dir / "samples"
        self.model_id = config.hub_model_id or output_dir.resolve().name
        self.dataset_id = config.hub_dataset_id
        self.pushes_samples = draws and bool(config.hub_dataset_id)
        self._accelerator = accelerator

    def check(self, first_round: int) -> None:
        """
        Check token, permission and repository names.

        Args:
            first_round (`int`):
                Number of the next round to be drawn, whose place must be free.

        Raises:
            `ValueError`: on all processes; the message has the field and the fix.
        """
        error = [None]
        if self._accelerator.is_main_process:
            try:
                self._check(first_round)
            except Exception as reason:
                error = [redacted(reason, self.config.hub_token)]
        broadcast_object_list(error)
        if error[0]:
            raise ValueError(error[0])

    def _check(self, first_round: int) -> None:
        if self.config.push_to_hub:
            self.model_id = self._prepared("hub_model_id", self.model_id, "model")
        if self.pushes_samples:
            self.dataset_id = self._prepared("hub_dataset_id", self.dataset_id, "dataset")
            check_samples_repository(self.samples_folder, self.dataset_id, first_round, self.config.hub_token)

    def _prepared(self, name: str, repo_id: str, kind: str) -> str:
        config = self.config
        try:
            return retried(lambda: prepare_repository(repo_id, kind, config.hub_private_repo, config.hub_token))
        except Exception as error:
            raise ValueError(
                f"{name}={repo_id!r} cannot be pushed to: {error}\nCheck the name, and that the token (hub_token, "
                "HF_TOKEN or `hf auth login`) may write there."
            ) from error

    def push_samples(self) -> None:
        """Push the rounds that are not on the Hub yet, if the run pushes samples."""
        self._accelerator.wait_for_everyone()
        if self.pushes_samples and self._accelerator.is_main_process:
            options = {"private": self.config.hub_private_repo, "token": self.config.hub_token}
            self.attempt(lambda: push_samples_to_hub(self.samples_folder, self.dataset_id, **options))

    def complete_name(self) -> None:
        """Put the token's own namespace before a model repository's bare name, if the Hub says what it is."""
        if "/" not in self.model_id and self._accelerator.is_main_process:
            with contextlib.suppress(Exception):
                self.model_id = f"{HfApi(token=clean(self.config.hub_token)).whoami()['name']}/{self.model_id}"

    def push_adapter(
        self, folder: Path, commit_message: str, blocking: bool, token: str | None, revision: str | None
    ) -> Any:
        """Push the adapter's folder; a future where not `blocking`."""
        push = functools.partial(
            push_adapter_to_hub,
            folder,
            self.model_id,
            private=self.config.hub_private_repo,
            token=token or self.config.hub_token,
            commit_message=commit_message,
            revision=revision,
        )
        return push() if blocking else HfApi().run_as_future(push)

    def attempt(self, push: Callable[[], Any]) -> Any:
        """Push; a failure becomes a warning that says what was not pushed and how it is pushed later."""
        try:
            return push()
        except Exception as error:
            message = redacted(error, self.config.hub_token)
            warnings.warn(f"The run goes on, but a push failed: {message}", stacklevel=2)
