# SPDX-License-Identifier: Apache-2.0

"""transformers' trainer callbacks, called by a loop that is not transformers' own."""

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState


class Callbacks:
    """
    Calls `TrainerCallback`s with a state and a control of their own types.

    Args:
        callbacks (`Sequence[TrainerCallback]`):
            Callbacks or their classes.
        config ([`GraftConfig`]):
            Handed to them as `args`.
    """

    def __init__(self, callbacks: Sequence[TrainerCallback | type[TrainerCallback]], config: Any):
        self.callbacks = [callback() if isinstance(callback, type) else callback for callback in callbacks]
        self.config = config
        self.state = TrainerState(num_train_epochs=config.num_epochs, log_history=[])
        self.control = TrainerControl()
        self.values: dict[str, Any] = {}

    def begin(self, accelerator: Accelerator, **values: Any) -> None:
        """
        Tell the callbacks that the trainer is made.

        Args:
            accelerator (`Accelerator`):
                Says which process this is.
            values (`Any`):
                What every event is handed, as transformers' trainer does: `model`, `optimizer`.
        """
        self.state.is_world_process_zero = accelerator.is_main_process
        self.state.is_local_process_zero = accelerator.is_local_main_process
        self.values = values
        self.notify("on_init_end")

    @property
    def should_stop(self) -> bool:
        """Whether a callback asked to stop training."""
        return self.control.should_training_stop

    def asked(self, what: str) -> bool:
        """Whether a callback asked to `"save"` or to `"evaluate"` since this was asked last."""
        wanted = getattr(self.control, f"should_{what}")
        setattr(self.control, f"should_{what}", False)
        return wanted

    def notify(self, event: str, **values: Any) -> None:
        """Call method `event` of every callback."""
        for callback in self.callbacks:
            getattr(callback, event)(self.config, self.state, self.control, **{**self.values, **values})
