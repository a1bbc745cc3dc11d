# SPDX-License-Identifier: Apache-2.0

"""A run's pushes to the Hub: checked before the first sample; after that, a failed push does not stop the run."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from huggingface_hub import HfApi

from ..adapters.files import clean, redacted
from ..config import GraftConfig
from ..report.grids import before_after_grid
from ..rollouts.prompts import Prompt
from .cards import GRID_FILE, write_adapter_card
from .facts import AdapterFacts, label_of
from .push import push_adapter_to_hub, push_samples_to_hub
from .repositories import check_samples_repository, prepare_repository
from .retries import retried


class Publisher:
    """
    Pushes a run's adapter and samples from its main process.

    Args:
        config ([`GraftConfig`]):
            The run's configuration, of which the fields `push_to_hub` and `hub_*` are read.
        output_dir (`Path`):
            The run's folder. Its `samples` are pushed, and its name is the model repository's where none is given.
        accelerator (`Accelerator`):
            The processes of the run, of which the main one pushes.
        is_sampling (`bool`, *optional*, defaults to `True`):
            Whether the run samples; `False` never pushes samples, because the run was given them.
    """

    def __init__(self, config: GraftConfig, output_dir: Path, accelerator: Accelerator, is_sampling: bool = True):
        self.config = config
        self.samples_folder = output_dir / "samples"
        self.model_id = config.hub_model_id or output_dir.resolve().name
        self.dataset_id = config.hub_dataset_id
        self.pushes_samples = is_sampling and bool(config.hub_dataset_id)
        self._accelerator = accelerator

    def check(self, first_iteration: int) -> None:
        """
        Check token, permission and repository names.

        Args:
            first_iteration (`int`):
                Number of the next iteration to be sampled, from 0; the dataset must not have it yet.

        Raises:
            `ValueError`: the run cannot push, raised on all processes; the message has the field and the fix.
        """
        error: list[str | None] = [None]
        if self._accelerator.is_main_process:
            try:
                self._check(first_iteration)
            except Exception as reason:
                error = [redacted(reason, self.config.hub_token)]
        broadcast_object_list(error)
        if error[0]:
            raise ValueError(error[0])

    def _check(self, first_iteration: int) -> None:
        if self.config.push_to_hub:
            self.model_id = self._prepared("hub_model_id", self.model_id, "model")
        if self.pushes_samples and self.dataset_id:
            self.dataset_id = self._prepared("hub_dataset_id", self.dataset_id, "dataset")
            where = self.samples_folder, self.dataset_id, first_iteration, self.config.hub_token
            retried(lambda: check_samples_repository(*where))

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
        """Push the iterations that are not on the Hub yet, if the run pushes samples; a failure becomes a warning."""
        self._accelerator.wait_for_everyone()
        repo_id = self.dataset_id if self.pushes_samples and self._accelerator.is_main_process else None
        if repo_id:
            private, token = self.config.hub_private_repo, self.config.hub_token
            self.attempt(lambda: push_samples_to_hub(self.samples_folder, repo_id, private=private, token=token))

    def complete_name(self) -> None:
        """Put the token's own namespace before a bare name of the model repository, if the Hub returns it."""
        if "/" not in self.model_id and self._accelerator.is_main_process:
            with contextlib.suppress(Exception):
                self.model_id = f"{HfApi(token=clean(self.config.hub_token)).whoami()['name']}/{self.model_id}"

    def write_card(
        self,
        folder: Path,
        facts: AdapterFacts,
        shown: Sequence[Prompt],
        sample: Callable[[Sequence[Prompt], bool], torch.Tensor],
        title: str | None = None,
    ) -> None:
        """
        Write the card of the model repository, and the grid of images that it shows.

        Args:
            folder (`Path`):
                Folder of the adapter; made if missing.
            facts ([`AdapterFacts`]):
                What the card says.
            shown (`Sequence[Prompt]`):
                `P` prompts of the grid; there is none without prompts.
            sample (`Callable[[Sequence[Prompt], bool], torch.Tensor]`):
                Returns an image of each prompt, of shape `(P, 3, H, W)` and uint8: of the base model if its second
                argument is `True`, otherwise of the tuned model.
            title (`str`, *optional*):
                Heading; the repository's name where not given.
        """
        folder.mkdir(parents=True, exist_ok=True)
        if shown:
            labels = [label_of(prompt) for prompt in shown]
            before_after_grid(sample(shown, True), sample(shown, False), labels).save(folder / GRID_FILE)
        write_adapter_card(folder, self.model_id, facts, title)

    def push_adapter(
        self, folder: Path, commit_message: str, blocking: bool, token: str | None, revision: str | None
    ) -> str | Future[str] | None:
        """
        Push an adapter's folder to the model repository, from the main process.

        Args:
            folder (`Path`):
                Folder of the adapter and its card.
            commit_message (`str`):
                Message of the commit.
            blocking (`bool`):
                Whether to wait for the end of the push.
            token (`str` or `None`):
                Token that may write there; `None` for `config.hub_token`.
            revision (`str` or `None`):
                Branch; `None` for the main one.

        Returns:
            `str`, `Future[str]` or `None`: the repository, as `user/name`, or a future of it where not `blocking`;
                `None` in the other processes.

        Raises:
            [`PushError`]: the upload failed, also when it was repeated.
        """
        if not self._accelerator.is_main_process:
            return None
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

    def attempt(self, push: Callable[[], object]) -> None:
        """Call `push`; an error becomes a warning with what was not pushed and the command to push it later."""
        try:
            push()
        except Exception as error:
            warnings.warn(
                f"The run goes on, but a push failed: {redacted(error, self.config.hub_token)}", stacklevel=2
            )
