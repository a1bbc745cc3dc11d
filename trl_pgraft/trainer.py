# SPDX-License-Identifier: Apache-2.0

"""The training loop: rounds of drawing, scoring, accepting and fine-tuning, in the interface of TRL's DDPOTrainer."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftConfig

from .adapters.files import save_pgraft_adapter
from .adapters.policy import Policy
from .compat.ddpo import as_ddpo, hook_data
from .config import GraftConfig
from .core.acceptance import default_k
from .hub.cards import GRID_FILE, facts_of, label_of, some_prompts, write_adapter_card
from .hub.publisher import Publisher
from .pipelines.denoiser_format import DenoiserFormat
from .pipelines.inputs import check_held_out, takes_prompts
from .pipelines.pixels import to_uint8
from .report.grids import before_after_grid, image_grid
from .rewards.conventions import choose_rewards
from .rollouts.collect import RolloutCollector
from .rollouts.dataset import check_samples, example_columns, rollout_from_dataset
from .rollouts.prompts import choose_prompt_source, held_out_prompts
from .rollouts.rollout import Rollout, RolloutBatch
from .training.callbacks import Callbacks
from .training.checkpoints import (
    TrainerState,
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
from .training.finetuner import Finetuner, FineTuningReport
from .training.optimizer import learning_rates, make_accelerator
from .training.tracking import NoTracker, log_image, tracker_arguments, tracker_values


@dataclass(frozen=True)
class Evaluation:
    """
    Images of held-out prompts and their rewards.

    Args:
        reward (`torch.Tensor` of shape `(P,)`):
            Weighted sum of the rewards of each prompt, over all processes.
        values (`torch.Tensor` of shape `(P, F)`):
            Each reward function's value.
        images (`torch.Tensor` of shape `(p, 3, H, W)`, uint8):
            Images of this process's prompts.
    """

    reward: torch.Tensor
    values: torch.Tensor
    images: torch.Tensor


class PGraftTrainer:
    """
    Fine-tune a diffusion pipeline on rewards by rejection sampling at an intermediate noise level.

    A round draws groups of images for prompts, accepts the best of each group, and fine-tunes an adapter on the states
    at `tuned_fraction` of the trajectories that led to accepted images. At inference the adapter runs above that noise
    level and the reference model below. With `tuned_fraction=1.0` this is GRAFT, with less P-GRAFT.

    Args:
        config ([`GraftConfig`]):
            What to do.
        reward_function (`Callable`, *optional*):
            Reward in DDPO's convention: `f(images, prompts, metadata) -> (rewards, info)`, images a float tensor of
            shape `(B, 3, H, W)` in [0, 1].
        prompt_function (`Callable`, *optional*):
            Returns `(prompt, metadata)`; called once a group.
        sd_pipeline (`DiffusionPipeline`):
            The pipeline to tune; required. The reference is this pipeline as it is handed in. Where it says
            `use_lora=False`, a copy of all weights of its denoiser is trained, and the reference kept beside it.
        image_samples_hook (`Callable`, *optional*):
            `f(image_data, global_step, tracker)`, once a round with a list of batches, each `[images, prompts,
            metadata, rewards, reward_metadata]`; `tracker` is the first tracker, or one that does nothing.
        reward_funcs (`str`, `Callable` or list of them, *optional*):
            Rewards in TRL's convention, by function, registered name or `"package.module:function"`.
        reward_weights (`list[float]`, *optional*):
            Weights of `reward_funcs` in their sum.
        train_dataset (`datasets.Dataset`, *optional*):
            Prompts in a column `prompt`; further columns go to the rewards, and those that the pipeline's call takes
            for each prompt (`image`, `negative_prompt`, `prompt_2`, `class_labels`, ...) to the pipeline as well.
        eval_dataset (`datasets.Dataset`, *optional*):
            Held-out prompts with columns as those of `train_dataset`, where `config.eval_prompts`, which has none,
            does not do.
        samples_dataset (`datasets.Dataset`, *optional*):
            Samples that a run kept, of one or several rounds; they are trained on without drawing.
        peft_config (`PeftConfig`, `str` or `Path`, *optional*):
            The adapter; a LoRA on the attention projections where it is not given. A folder, or a repository of the
            Hub, continues the adapter that it holds, in PEFT's or in diffusers' format, and the reference is the
            pipeline without it. An adapter of this library must have the configuration's switch level; another one
            has run at all noise levels, so that it needs `tuned_fraction=1.0`.
        pipeline_kwargs (`dict`, *optional*):
            Further arguments of the pipeline call, such as `height`.
        callbacks (`list[TrainerCallback]`, *optional*):
            transformers callbacks, with `config` as their `args`. An epoch is a round, a step an optimizer step; they
            may ask to save, to evaluate and to stop, which is done at the end of the round.
        denoiser_format (`type`, *optional*):
            Subclass of [`DenoiserFormat`], for a denoiser that takes its latents otherwise than as one tensor.

    Raises:
        `ValueError`: arguments that do not fit together, before anything is drawn.
    """

    _tag_names = ["trl", "pgraft"]

    def __init__(
        self,
        config: GraftConfig,
        reward_function: Callable[..., Any] | None = None,
        prompt_function: Callable[[], tuple[str, Any]] | None = None,
        sd_pipeline: Any = None,
        image_samples_hook: Callable[..., Any] | None = None,
        *,
        reward_funcs: Any = None,
        reward_weights: Sequence[float] | None = None,
        train_dataset: datasets.Dataset | None = None,
        eval_dataset: datasets.Dataset | None = None,
        samples_dataset: datasets.Dataset | None = None,
        peft_config: PeftConfig | str | Path | None = None,
        pipeline_kwargs: dict[str, Any] | None = None,
        callbacks: Sequence[Any] | None = None,
        denoiser_format: type[DenoiserFormat] | None = None,
    ):
        self.config = config
        self.output_dir = Path(config.project_kwargs.get("project_dir") or config.output_dir)
        self.rewards = choose_rewards(reward_function, reward_funcs, reward_weights, required=samples_dataset is None)
        pipeline = getattr(sd_pipeline, "sd_pipeline", sd_pipeline)
        has_prompts = not callable(pipeline) or takes_prompts(pipeline)
        prompt_source = choose_prompt_source(
            config.seed, prompt_function, train_dataset, samples_dataset, required=has_prompts
        )
        self.held_out = held_out_prompts(config.eval_prompts, eval_dataset, required=has_prompts)
        self.image_samples_hook = image_samples_hook
        self.callbacks = Callbacks(callbacks or [], config)
        self.accelerator = make_accelerator(config, self.output_dir)
        _check_round(config, self.accelerator.num_processes, samples_dataset)
        self.sd_pipeline = sd_pipeline
        example = example_columns(samples_dataset if train_dataset is None else train_dataset)
        self.policy = Policy(
            sd_pipeline, config, self.accelerator, peft_config, pipeline_kwargs, denoiser_format, example
        )
        self.finetuner = Finetuner(self.policy, config, self.accelerator)
        self.pipeline, self.denoiser = self.policy.pipeline, self.policy.denoiser
        for _, columns in self.held_out:
            check_held_out(self.pipeline, self.policy.inputs_of(example), self.policy.inputs_of(columns))
        self.collector = RolloutCollector(
            self.policy, self.rewards, prompt_source, config, self.accelerator, self.output_dir
        )
        self.samples_dataset = samples_dataset
        if samples_dataset is not None:
            names = [reward.name for reward in self.rewards]
            self.samples_dataset = check_samples(samples_dataset, self.policy.fingerprint, names)
        self.publisher = Publisher(config, self.output_dir, self.accelerator, draws=samples_dataset is None)
        self.state = TrainerState()
        self.epochs = config.num_epochs
        self.has_begun = False
        self._resume(config.resume_from or config.resume_from_checkpoint)
        start = self.policy.start
        values = tracker_values({**config.to_dict(), "starting_adapter": start.source if start else None})
        self.accelerator.init_trackers(config.tracker_project_name, values, tracker_arguments(config))
        self.callbacks.begin(self.accelerator, model=self.denoiser, optimizer=self.finetuner.optimizer)

    # The run.

    @property
    def history(self) -> list[dict[str, float]]:
        """Metrics logged so far, those before a resume included."""
        return self.state.history

    @property
    def images_per_round(self) -> int:
        """Images of a round, over all processes."""
        return self.collector.images

    def sampler(self, reference: bool = False) -> AbstractContextManager[Any]:
        """
        The pipeline as the policy samples with it, as a context manager.

        Args:
            reference (`bool`, *optional*, defaults to `False`):
                As the reference model samples, instead.
        """
        return self.policy.sampler(reference)

    def train(
        self, epochs: int | None = None, resume_from_checkpoint: str | bool | None = None
    ) -> list[dict[str, float]]:
        """
        Run rounds until `epochs` are done, and save the adapter.

        Args:
            epochs (`int`, *optional*):
                Rounds of the whole run, those before a resume included; `config.num_epochs` where not given.
            resume_from_checkpoint (`str` or `bool`, *optional*):
                As the configuration's field of this name.

        Returns:
            `list[dict[str, float]]`: the metrics of each round.
        """
        if epochs is None:
            epochs = 1 if self.samples_dataset is not None else self.config.num_epochs
        if resume_from_checkpoint:
            self._resume(resume_from_checkpoint)
            self.callbacks.values["optimizer"] = self.finetuner.optimizer
        self.epochs = epochs
        self._begin()
        self.publisher.check(first_round=self.state.epoch)
        state = self.callbacks.state
        state.epoch, state.global_step = self.state.epoch, self.state.global_step
        state.max_steps = (self.state.steps_per_round or self._expected_steps()) * epochs
        self.callbacks.notify("on_train_begin")
        if self.held_out and self.state.epoch == 0:
            self._log_evaluation(epoch=0)
        for epoch in range(self.state.epoch, epochs):
            self.callbacks.notify("on_epoch_begin")
            self.step(epoch, self.state.global_step)
            self.callbacks.notify("on_epoch_end")
            last = epoch + 1 == epochs or self.callbacks.should_stop
            must_evaluate, must_save = (self.callbacks.pop_request(what) for what in ("evaluate", "save"))
            if self.held_out and (last or must_evaluate or (epoch + 1) % self.config.eval_freq == 0):
                self._log_evaluation(epoch + 1)
            if last or must_save or (epoch + 1) % self.config.save_freq == 0:
                self.save_checkpoint()
                self.publisher.push_samples()
            if last:
                break
        # Once more, for what an interruption or a failed push has left.
        self.publisher.push_samples()
        if self.policy.has_adapter:
            self.save_model()
        self.callbacks.notify("on_train_end")
        self.accelerator.end_training()
        return self.history

    def step(self, epoch: int, global_step: int) -> int:
        """
        One round: draw, score, accept, fine-tune, log.

        Args:
            epoch (`int`):
                Number of the round.
            global_step (`int`):
                Optimizer steps so far.

        Returns:
            `int`: optimizer steps after the round.
        """
        self._begin()
        started = time.perf_counter()
        round_ = self._draw_round(epoch) if self.samples_dataset is None else self._stored_round()
        drawn = time.perf_counter()
        report = self._fine_tune(round_, epoch)
        progress, state = self.state, self.callbacks.state
        progress.epoch, progress.global_step = epoch + 1, global_step + (report.steps if report else 0)
        state.epoch, state.global_step = progress.epoch, progress.global_step
        metrics = round_.metrics([reward.name for reward in self.rewards])
        metrics |= report.to_metrics() if report else {}
        metrics |= {"implied_kl_sum": progress.add_kl(round_, self.config), "images": progress.images}
        metrics |= {"denoiser_calls": progress.denoiser_calls}
        metrics |= {"time/sampling": drawn - started, "time/training": time.perf_counter() - drawn, "epoch": epoch}
        self.log(metrics)
        return progress.global_step

    def _draw_round(self, epoch: int) -> Rollout:
        round_, batches = self.collector.sample_rollout(epoch)
        self._show(round_, batches)
        self.state.images += len(round_.samples)
        self.state.denoiser_calls += round_.denoiser_calls
        return round_

    def _stored_round(self) -> Rollout:
        return rollout_from_dataset(self.samples_dataset, self.collector.reward_names)

    def _show(self, round_: Rollout, batches: Sequence[RolloutBatch]) -> None:
        """Hand this process's samples to DDPO's hook, and the main process's to the trackers as a picture."""
        trackers, step = self.accelerator.trackers, self.state.global_step
        if trackers and self.accelerator.is_main_process:
            images = torch.cat([batch.images for batch in batches])
            grid = image_grid(images, round_.captions()[: len(images)], round_.groups[0].size)
            log_image(trackers, "samples", grid, step)
        if self.image_samples_hook is not None:
            tracker = trackers[0] if trackers else NoTracker()
            self.image_samples_hook([hook_data(batch, self.rewards) for batch in batches], step, tracker)

    def _fine_tune(self, round_: Rollout, epoch: int) -> FineTuningReport | None:
        data = self.finetuner.training_set(round_, epoch)
        if data is None:
            self.accelerator.print(f"Round {epoch}: nothing was accepted, so nothing is trained.")
            return None
        state, progress, steps = self.callbacks.state, self.state, self.finetuner.steps_for(len(data.rows))
        progress.steps_per_round = progress.steps_per_round or steps
        state.max_steps = progress.steps_per_round * self.epochs

        def on_event(event: str) -> None:
            state.global_step += event == "on_step_end"
            self.callbacks.notify(event)

        return self.finetuner.fine_tune(data, epoch, self._learning_rate(), on_event)

    def _learning_rate(self) -> Callable[[int], float]:
        """
        Learning rate of a round's n-th optimizer step, on diffusers' schedule over the whole run, of which the first
        round tells the length. A run that is resumed for more rounds goes on with the schedule of that many.
        """
        config, start = self.config, self.state.global_step
        length = self.state.steps_per_round * self.epochs
        rate = learning_rates(config.lr_scheduler_type, config.train_learning_rate, config.warmup_steps, length)
        return lambda step: rate(start + step)

    def _expected_steps(self) -> int:
        """Optimizer steps of a round in which `k` of each group is accepted, a quarter where nothing says more."""
        size = self.collector.group_size
        k = self.config.acceptance_kwargs.get("k", default_k(size))
        return self.finetuner.steps_for(self.collector.images // size * k)

    def compute_rewards(self, prompt_image_pairs: Sequence[Sequence[Any]], is_async: bool = False) -> Iterator[tuple]:
        """
        Score batches of images, as DDPO's method of this name.

        Args:
            prompt_image_pairs (`Sequence`):
                Batches `(images, prompts, metadata)`; images of shape `(B, 3, H, W)`, uint8 or float in [0, 1].
            is_async (`bool`, *optional*, defaults to `False`):
                Score the batches in threads.

        Returns:
            `Iterator[tuple]`: the batches' rewards, each of shape `(B,)` with NaN where left out, then their infos.
        """
        scorer = self.collector.make_scorer(is_async)
        for images, prompts, metadata in prompt_image_pairs:
            images = images if images.dtype == torch.uint8 else to_uint8(images)
            scorer.add(images, list(prompts), {"metadata": list(metadata)})
        return zip(*(as_ddpo(*result, self.rewards) for result in scorer.results()), strict=True)

    # Evaluation, logging, saving.

    def evaluate(
        self, prompts: Sequence[str] | None = None, reference: bool = False, columns: dict[str, list] | None = None
    ) -> Evaluation:
        """
        Draw one image of each prompt with seeds that depend on its place alone, and score it.

        Args:
            prompts (`Sequence[str]`, *optional*):
                Prompts; those of `eval_dataset` or `config.eval_prompts` where not given.
            reference (`bool`, *optional*, defaults to `False`):
                Draw with the reference model in place of the policy.
            columns (`dict[str, list]`, *optional*):
                Further columns of the prompts, as those of `train_dataset`.
        """
        rows = self.held_out
        if prompts is not None:
            rows = [(p, {name: values[i] for name, values in (columns or {}).items()}) for i, p in enumerate(prompts)]
        if not rows:
            raise ValueError("evaluate: no prompts given, and neither eval_dataset nor config.eval_prompts has any.")
        return Evaluation(*self.collector.sample_evaluation(rows, reference))

    def _log_evaluation(self, epoch: int) -> None:
        result = self.evaluate()
        means = result.values.nanmean(0).tolist()
        metrics = {f"eval/rewards/{r.name}/mean": mean for r, mean in zip(self.rewards, means, strict=True)}
        metrics |= {"eval/reward": result.reward.nanmean().item(), "epoch": epoch}
        self.log(metrics)
        self.callbacks.notify("on_evaluate", metrics=metrics)

    def log(self, metrics: dict[str, float]) -> None:
        """Send metrics to the trackers and callbacks, and append them to `history` and to `metrics.jsonl`."""
        self.history.append(metrics)
        self.callbacks.state.log_history.append({**metrics, "step": self.state.global_step})
        self.accelerator.log(metrics, step=self.state.global_step)
        self.callbacks.notify("on_log", logs=metrics)
        if self.accelerator.is_main_process:
            with open(self.output_dir / "metrics.jsonl", "a") as file:
                file.write(_as_json(metrics))

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """
        Save the adapter with its switch level, in PEFT's and in diffusers' format; with `config.push_to_hub`, push it.

        Args:
            output_dir (`str` or `Path`, *optional*):
                Folder; `adapter` inside the output folder where not given.
        """
        self._save_adapter(output_dir or self.adapter_dir)
        if self.config.push_to_hub:
            self.publisher.attempt(lambda: self.push_to_hub(commit_message="Save adapter"))

    def _save_adapter(self, folder: str | Path) -> None:
        if not self.policy.has_adapter:
            raise ValueError("save_model: with a control adapter there is none to save before the first round.")
        if self.accelerator.is_main_process:
            save_pgraft_adapter(self.pipeline, folder, self.policy.switch)

    @property
    def adapter_dir(self) -> Path:
        """Folder of the adapter and its card, inside the output folder."""
        return self.output_dir / "adapter"

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | Sequence[str] | None = None,
    ) -> None:
        """
        Write a model card with images of base and tuned model into [`~PGraftTrainer.adapter_dir`].

        Args:
            model_name (`str`, *optional*):
                Heading; the repository's name where not given.
            dataset_name (`str`, *optional*):
                Dataset repository to name; `config.hub_dataset_id` where not given.
            tags (`str` or `Sequence[str]`, *optional*):
                Further tags.
        """
        if not self.accelerator.is_main_process:
            return
        tags = [tags] if isinstance(tags, str) else tags or []
        shown = some_prompts(self.held_out, self.samples_dataset, self.output_dir / "samples")
        facts = facts_of(self, shown, dataset_name or self.publisher.dataset_id, tags)
        self.adapter_dir.mkdir(parents=True, exist_ok=True)
        if shown:
            before, after = (self.collector.sample_images(shown, reference) for reference in (True, False))
            before_after_grid(before, after, [*map(label_of, shown)]).save(self.adapter_dir / GRID_FILE)
        write_adapter_card(self.adapter_dir, self.publisher.model_id, facts, model_name)

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Save the adapter, write its card and push both to `config.hub_model_id`.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                Message of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                Wait for the push; a future is returned otherwise.
            token (`str`, *optional*):
                Token; `config.hub_token` where not given.
            revision (`str`, *optional*):
                Branch.
            **kwargs:
                Arguments of [`~PGraftTrainer.create_model_card`].

        Returns:
            `str`, `Future` or `None`: the repository, on the main process.

        Raises:
            [`PushError`]: the Hub did not take it; the message has the command that pushes it later.
        """
        self._save_adapter(self.adapter_dir)
        self.publisher.complete_name()
        self.create_model_card(**kwargs)
        if self.accelerator.is_main_process:
            return self.publisher.push_adapter(self.adapter_dir, commit_message, blocking, token, revision)

    def save_pretrained(self, output_dir: str | Path) -> None:
        """Save the adapter to `output_dir`, as [`~PGraftTrainer.save_model`]."""
        self.save_model(output_dir)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the last round, and remove the oldest beyond `num_checkpoint_limit`."""
        if self.accelerator.is_main_process:
            folder = self.output_dir / "checkpoints"
            save_adapter = self._save_adapter if self.policy.has_adapter else None
            save_checkpoint(folder, self.state, self._run(), self.finetuner.optimizer, save_adapter)
            # `total_limit` is accelerate's name, with which DDPO's scripts set it.
            limit = self.config.project_kwargs.get("total_limit") or self.config.num_checkpoint_limit
            prune_checkpoints(folder, limit)
        self.accelerator.wait_for_everyone()
        self.collector.clear_cache()
        self.callbacks.notify("on_save")

    def _run(self) -> dict[str, Any]:
        """What the run's result depends on."""
        values = self.config.resume_signature(self.accelerator.num_processes)
        rewards = {reward.name: reward.weight for reward in self.rewards}
        start = self.policy.start
        adapter = {"adapter": adapter_values(self.policy.peft_config), "rewards": rewards}
        adapter["weights of the starting adapter"] = start.fingerprint if start else None
        return {**values, **adapter, "model, scheduler and sampling arguments": self.policy.fingerprint}

    def _begin(self) -> None:
        """Before the first round: a run that does not go on from another puts aside what that has left."""
        if self.has_begun:
            return
        self.has_begun = True
        if not self.is_resumed:
            self.collector.clear_cache()
        if not self.is_resumed and self.accelerator.is_main_process:
            names = ["checkpoints", "metrics.jsonl"] + (["samples"] if self.samples_dataset is None else [])
            archive_previous_run(self.output_dir, names)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (self.output_dir / "metrics.jsonl").write_text("".join(map(_as_json, self.history)))

    def _resume(self, source: str | bool | None) -> None:
        self.is_resumed = bool(source)
        if source is True:
            folder = self.output_dir / "checkpoints"
            source = folder if checkpoints_in(folder) else None
        if not source:
            return
        checkpoint = find_checkpoint(source)
        with reading(checkpoint):
            check_same_run(checkpoint, self._run(), self.config, self.policy.peft_config)
            self.state = load_trainer_state(checkpoint)
            if (checkpoint / "adapter_config.json").is_file():
                self.finetuner.load_adapter(checkpoint)
            if self.finetuner.optimizer is not None:
                load_optimizer(checkpoint, self.finetuner.optimizer)


def _check_round(config: GraftConfig, processes: int, samples_dataset: Any) -> None:
    """A round must have more images of a prompt than are selected of them."""
    images = config.sample_batch_size * config.sample_num_batches_per_epoch * processes
    size, k = config.group_size(images), config.acceptance_kwargs.get("k", 1)
    if samples_dataset is None and size <= k:
        raise ValueError(
            f"sample_batch_size * sample_num_batches_per_epoch * processes = {images}: a round's groups have {size} "
            f"images, of which k={k} cannot be selected. Draw more images a round."
        )


def _as_json(metrics: dict[str, float]) -> str:
    """A line of JSON, which has no numbers that are not finite: they become null."""
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return json.dumps(finite) + "\n"
