# SPDX-License-Identifier: Apache-2.0

"""The output folder of a run: begun or resumed, with its checkpoints and its adapter."""

import json
from pathlib import Path
from typing import Any

from ..adapters.files import save_pgraft_adapter
from ..rollouts.collect import RolloutCollector
from .checkpoints import (
    adapter_values,
    archive_previous_run,
    check_same_run,
    checkpoints_in,
    find_checkpoint,
    load_optimizer,
    load_trainer_state,
    prune_checkpoints,
    reading,
    save_checkpoint,
)
from .finetuner import Finetuner
from .run_log import METRICS_FILE, RunLog
from .state import TrainerState


# Names in a checkpoint's signature. The second is followed by a component's name.
MODEL, WEIGHTS = "model, scheduler and sampling arguments", "weights of the pipeline's "


class RunFolder:
    """
    Saves and resumes the adapter, the optimizer and the state of a run.

    Args:
        path (`Path`):
            The run's output folder; checkpoints are written to `checkpoints` in it.
        finetuner ([`Finetuner`]):
            Has the adapter and the optimizer that are saved and resumed.
        collector ([`RolloutCollector`]):
            Has the reward functions, on which the run's results depend, and the samples of unfinished iterations.
    """

    def __init__(self, path: Path, finetuner: Finetuner, collector: RolloutCollector):
        self.path, self.checkpoints = path, path / "checkpoints"
        self.finetuner, self.collector = finetuner, collector
        self.has_begun = self.is_resumed = False

    def begin(self, run_log: RunLog, state: TrainerState) -> None:
        """
        Before each iteration check the pipeline and start trackers that have ended. Before the first also move what an
        earlier run left to `previous_<n>`, unless that run is resumed.

        Args:
            run_log ([`RunLog`]):
                Its file is written anew from the state's history.
            state ([`TrainerState`]):
                State of the run.

        Raises:
            `ValueError`: components of the pipeline were replaced after the trainer was made.
        """
        self.finetuner.policy.check_unchanged()
        run_log.start_trackers()
        if self.has_begun:
            return
        self.has_begun, accelerator, policy = True, self.finetuner.accelerator, self.finetuner.policy
        if not self.is_resumed:
            self.collector.clear_cache()
        if not self.is_resumed and accelerator.is_main_process:
            samples = [] if self.collector.prompt_source is None else ["samples"]
            # A run that has one already saves it in any case, and may have been started from this folder.
            adapter = [] if policy.has_adapter or policy.start is not None else ["adapter"]
            archive_previous_run(self.path, [*adapter, self.checkpoints.name, METRICS_FILE, *samples])
        accelerator.wait_for_everyone()
        run_log.rewrite(state.history)

    def save_adapter(self, folder: str | Path) -> None:
        """Save the adapter with its switch level to `folder`; it is a `ValueError` where there is no adapter yet."""
        policy = self.finetuner.policy
        if not policy.has_adapter:
            raise ValueError("save_model: with a control adapter there is none to save before the first iteration.")
        if self.finetuner.accelerator.is_main_process:
            save_pgraft_adapter(policy.pipeline, folder, policy.switch)

    def save_checkpoint(self, state: TrainerState) -> None:
        """Write the checkpoint of the last iteration in `state`, and remove the oldest beyond the limit."""
        finetuner, policy, config = self.finetuner, self.finetuner.policy, self.finetuner.config
        if finetuner.accelerator.is_main_process:
            save_adapter = self.save_adapter if policy.has_adapter else None
            save_checkpoint(self.checkpoints, state, self.resume_signature(), finetuner.optimizer, save_adapter)
            # `total_limit` is accelerate's name, with which DDPO's scripts set it.
            prune_checkpoints(
                self.checkpoints, config.project_kwargs.get("total_limit") or config.num_checkpoint_limit
            )
        finetuner.accelerator.wait_for_everyone()
        self.collector.clear_cache()

    def resume(self, source: str | bool | None, state: TrainerState | None = None) -> TrainerState:
        """
        Load a checkpoint's adapter and optimizer.

        Args:
            source (`str`, `bool` or `None`):
                A checkpoint, or a folder of checkpoints of which the newest is taken; `True` is the run's own folder,
                if it has any, and so are "true" and "latest" if there is no such folder. Nothing is loaded where it is
                empty, `None`, `False` or one of these as a string.
            state ([`TrainerState`], *optional*):
                State of the run so far; that of a new run where not given.

        Returns:
            [`TrainerState`]: the state that was saved; `state` where nothing was loaded.

        Raises:
            `ValueError`: there is no checkpoint at `source`, it cannot be read, or it is of another run.
        """
        if isinstance(source, str) and not Path(source).exists():  # from a command line
            source = {"true": True, "latest": True, "false": False, "none": None}.get(source.lower(), source)
        self.is_resumed = bool(source)
        if source is True:
            source = str(self.checkpoints) if checkpoints_in(self.checkpoints) else None
        if not source:
            return state or TrainerState()
        checkpoint, finetuner = find_checkpoint(source), self.finetuner
        with reading(checkpoint):
            check_same_run(checkpoint, self._signature_for(checkpoint), finetuner.config, finetuner.policy.peft_config)
            state = load_trainer_state(checkpoint)
            if (checkpoint / "adapter_config.json").is_file():
                finetuner.load_adapter(checkpoint)
            if finetuner.optimizer is not None:
                load_optimizer(checkpoint, finetuner.optimizer)
        return state

    def resume_signature(self) -> dict[str, Any]:
        """Values on which the run's results depend, by name; a checkpoint is resumed only where they are the same."""
        policy = self.finetuner.policy
        return {
            **self.finetuner.config.resume_signature(self.finetuner.accelerator.num_processes),
            "adapter": adapter_values(policy.peft_config.to_dict()),
            "rewards": {reward.name: reward.weight for reward in self.collector.rewards},
            "weights of the starting adapter": policy.start.fingerprint if policy.start else None,
            MODEL: policy.fingerprint,
            **{WEIGHTS + name: value for name, value in policy.weights.items()},
        }

    def _signature_for(self, checkpoint: Path) -> dict[str, Any]:
        """The signature to compare with a checkpoint's; one of an earlier version knows less of the model."""
        stored, signature = json.loads((checkpoint / "run.json").read_text()), self.resume_signature()
        known = {n: value for n, value in signature.items() if not n.startswith(WEIGHTS) or n in stored}
        model = stored.get(MODEL, "")
        return {**known, MODEL: model} if self.finetuner.policy.has_fingerprint(model) else known
