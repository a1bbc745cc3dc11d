# SPDX-License-Identifier: Apache-2.0

"""How far a run is, and the fine-tuning of an iteration, which moves it on."""

from dataclasses import dataclass, field

from ..config import GraftConfig
from ..core.acceptance import accept_top_k, default_k, get_acceptance
from ..core.divergence import accumulated_kl
from ..rollouts.rollout import Rollout
from ..rollouts.selection import RANK_RULES
from .callbacks import Callbacks
from .finetuner import Finetuner
from .optimizer import learning_rates


@dataclass
class TrainerState:
    r"""
    How far a run is.

    Args:
        epoch (`int`, *optional*, defaults to `0`):
            Iterations completed.
        global_step (`int`, *optional*, defaults to `0`):
            Optimizer steps taken on accepted samples.
        images (`int`, *optional*, defaults to `0`):
            Images sampled for training, over all processes.
        denoiser_calls (`int`, *optional*, defaults to `0`):
            Denoiser evaluations for these images, counted per image and branch.
        kl_rounds (`int`, *optional*, defaults to `0`):
            Iterations whose selection accumulates.
        kl_sum (`float`, *optional*, defaults to `0.0`):
            Sum of the KL that each of them implies, in nats.
        kl_composes (`bool`, *optional*, defaults to `True`):
            Whether all of them were the same top-k selection, whose composition has a formula.
        steps_per_round (`int`, *optional*, defaults to `0`):
            Optimizer steps of the first iteration, which determine the length of the learning-rate schedule; 0 before
            it.
        history (`list[dict[str, float]]`, *optional*):
            Metrics logged so far; none where not given.
    """

    epoch: int = 0
    global_step: int = 0
    images: int = 0
    denoiser_calls: int = 0
    kl_rounds: int = 0
    kl_sum: float = 0.0
    kl_composes: bool = True
    steps_per_round: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    def add_kl(self, rollout: Rollout, config: GraftConfig) -> float:
        r"""
        Count the KL of an iteration, unless it was sampled from the reference, from where nothing accumulates.

        Args:
            rollout ([`Rollout`]):
                The iteration's samples, selected.
            config ([`GraftConfig`]):
                The acceptance rule, and which model is sampled from.

        Returns:
            `float`: KL to the reference that the iterations so far imply, in nats.
        """
        if config.sample_from == "reference":
            return rollout.implied_kl
        kl, size = rollout.implied_kl, rollout.groups[0].size
        rule, k = get_acceptance(config.acceptance), None
        if rule in RANK_RULES:
            # Best of M and the winner of a pair are the top one.
            k = config.acceptance_kwargs.get("k", default_k(size)) if rule is accept_top_k else 1
        self.kl_rounds, self.kl_sum = self.kl_rounds + 1, self.kl_sum + kl
        total, self.kl_composes = accumulated_kl(kl, self.kl_sum, self.kl_rounds, size, k, self.kl_composes)
        return total


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
) -> dict[str, float]:
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
        `dict[str, float]`: losses, skipped steps, accumulated KL, and the images and denoiser calls of the run so far;
            without losses and skipped steps where nothing was accepted.
    """
    data, config, shown = finetuner.training_set(rollout, epoch), finetuner.config, callbacks.state
    metrics: dict[str, float] = {}
    if data is not None:
        state.steps_per_round = state.steps_per_round or finetuner.steps_for(len(data.rows))
        shown.max_steps, start = state.steps_per_round * epochs, state.global_step
        rate = learning_rates(
            config.lr_scheduler_type, config.train_learning_rate, config.warmup_steps, shown.max_steps
        )

        def on_event(event: str) -> None:
            shown.global_step += event == "on_step_end"
            callbacks.notify(event)

        report = finetuner.fine_tune(data, epoch, lambda step: rate(start + step), on_event)
        metrics, global_step = report.to_metrics(finetuner.accelerator), global_step + report.steps
    else:
        finetuner.accelerator.print(f"Iteration {epoch}: nothing was accepted, so nothing is trained.")
    state.epoch, state.global_step = epoch + 1, global_step
    shown.epoch, shown.global_step = state.epoch, state.global_step
    return {
        **metrics,
        "implied_kl_sum": state.add_kl(rollout, config),
        "images": state.images,
        "denoiser_calls": state.denoiser_calls,
    }
