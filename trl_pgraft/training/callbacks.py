# SPDX-License-Identifier: Apache-2.0

"""transformers' trainer callbacks, called by a loop that is not transformers' own."""

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState

from ..config import GraftConfig


class Callbacks:
    r"""
    Calls transformers' callbacks with a state and a control of transformers' own types.

    Args:
        callbacks (`Sequence[TrainerCallback]`):
            Callbacks or their classes, in the order of the calls.
        config ([`GraftConfig`]):
            Configuration of the run, which they get as `args`.
    """

    def __init__(self, callbacks: Sequence[TrainerCallback | type[TrainerCallback]], config: GraftConfig):
        self.callbacks = [callback() if isinstance(callback, type) else callback for callback in callbacks]
        self.config = config
        self.state = TrainerState(num_train_epochs=config.num_epochs, log_history=[])
        self.control = TrainerControl()
        self.values: dict[str, Any] = {}

    def begin(self, accelerator: Accelerator, **values: Any) -> None:
        r"""
        Call `on_init_end`.

        Args:
            accelerator (`Accelerator`):
                Accelerator of the run, from which the state has which process this is.
            values (`Any`):
                What every event passes on as transformers' trainer does: `model`, `optimizer`.
        """
        self.state.is_world_process_zero = accelerator.is_main_process
        self.state.is_local_process_zero = accelerator.is_local_main_process
        self.values = values
        self.notify("on_init_end")

    def pop_request(self, what: str) -> bool:
        """Whether a callback has requested `what`, "save" or "evaluate", since the last call of this method."""
        requested = getattr(self.control, f"should_{what}")
        setattr(self.control, f"should_{what}", False)
        return requested

    def notify(self, event: str, **values: Any) -> None:
        """Call the method `event` of every callback, with further `values` of this event."""
        for callback in self.callbacks:
            getattr(callback, event)(self.config, self.state, self.control, **{**self.values, **values})
