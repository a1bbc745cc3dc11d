# SPDX-License-Identifier: Apache-2.0

"""One iteration's fine-tuning within its run: learning rate, state, metrics and the events of callbacks."""

from ..core.acceptance import default_k
from ..rollouts.rollout import Rollout
from .callbacks import Callbacks
from .checkpoints import TrainerState
from .finetuner import Finetuner, FineTuningReport
from .optimizer import learning_rates


def begin_training(finetuner: Finetuner, images: int, epochs: int, state: TrainerState, callbacks: Callbacks) -> None:
    """
    Set the state that callbacks get, and call `on_train_begin`.

    Args:
        finetuner ([`Finetuner`]):
            Has the configuration, from which the optimizer steps of the run are estimated before the first iteration:
            `k` of each group is accepted, a quarter where the configuration has no `k`.
        images (`int`):
            Images of an iteration, over all processes.
        epochs (`int`):
            Iterations of the whole run.
        state ([`TrainerState`]):
            State of the run.
        callbacks ([`Callbacks`]):
            The run's callbacks.
    """
    size = finetuner.config.group_size(images)
    k = finetuner.config.acceptance_kwargs.get("k", default_k(size))
    steps = state.steps_per_round or finetuner.steps_for(images // size * k)
    shown = callbacks.state
    shown.epoch, shown.global_step, shown.max_steps = state.epoch, state.global_step, steps * epochs
    callbacks.notify("on_train_begin")


def fine_tune(
    finetuner: Finetuner,
    rollout: Rollout,
    epoch: int,
    epochs: int,
    global_step: int,
    state: TrainerState,
    callbacks: Callbacks,
) -> FineTuningReport | None:
    """
    Fine-tune on the accepted samples of an iteration, and count it in the run's state.

    The learning rate follows diffusers' schedule over the whole run, whose length in optimizer steps is that of the
    first iteration times `epochs`. A run that is resumed with more iterations continues on the schedule of that many.

    Args:
        finetuner ([`Finetuner`]):
            Has the adapter, the optimizer and the configuration.
        rollout ([`Rollout`]):
            Samples of all processes, with what is accepted.
        epoch (`int`):
            Number of the iteration, from 0.
        epochs (`int`):
            Iterations of the whole run.
        global_step (`int`):
            Optimizer steps before the iteration.
        state ([`TrainerState`]):
            State of the run; its `epoch`, `global_step` and, in the first iteration, `steps_per_round` are set.
        callbacks ([`Callbacks`]):
            Called at every optimizer step; their state is set as well.

    Returns:
        [`FineTuningReport`] or `None`: losses and steps; `None` where nothing was accepted.
    """
    data, config, shown, report = finetuner.training_set(rollout, epoch), finetuner.config, callbacks.state, None
    if data is not None:
        state.steps_per_round = state.steps_per_round or finetuner.steps_for(len(data.rows))
        shown.max_steps, start = state.steps_per_round * epochs, state.global_step
        schedule = (config.lr_scheduler_type, config.train_learning_rate, config.warmup_steps, shown.max_steps)
        rate = learning_rates(*schedule)

        def on_event(event: str) -> None:
            shown.global_step += event == "on_step_end"
            callbacks.notify(event)

        report = finetuner.fine_tune(data, epoch, lambda step: rate(start + step), on_event)
    else:
        finetuner.accelerator.print(f"Iteration {epoch}: nothing was accepted, so nothing is trained.")
    state.epoch, state.global_step = epoch + 1, global_step + (report.steps if report else 0)
    shown.epoch, shown.global_step = state.epoch, state.global_step
    return report


def iteration_metrics(
    finetuner: Finetuner, rollout: Rollout, report: FineTuningReport | None, rewards: list[str], state: TrainerState
) -> dict[str, float]:
    """
    The metrics of an iteration but for its times.

    Args:
        finetuner ([`Finetuner`]):
            Has the configuration.
        rollout ([`Rollout`]):
            Samples of all processes, with what is accepted.
        report ([`FineTuningReport`] or `None`):
            Losses and steps; `None` where nothing was accepted.
        rewards (`list[str]`):
            Names of the reward functions.
        state ([`TrainerState`]):
            State of the run after the iteration, whose accumulated KL is continued.
    """
    return {
        **rollout.metrics(rewards),
        **(report.to_metrics() if report else {}),
        "implied_kl_sum": state.add_kl(rollout, finetuner.config),
        "images": state.images,
        "denoiser_calls": state.denoiser_calls,
    }
