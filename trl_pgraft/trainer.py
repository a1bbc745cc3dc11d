# SPDX-License-Identifier: Apache-2.0

"""The training loop: sample, score, accept and fine-tune, in the interface of TRL's DDPOTrainer."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import datasets
from diffusers import DiffusionPipeline
from peft import PeftConfig
from transformers import TrainerCallback

from .adapters.policy import PipelineWrapper, Policy
from .compat.ddpo import score_batches, show_samples
from .config import GraftConfig
from .hub.facts import gather_facts, some_prompts
from .hub.publisher import Publisher
from .pipelines.denoiser_format import DenoiserFormat
from .rewards.registry import DDPORewardFunction, RewardFunction, choose_rewards
from .rollouts.collect import RolloutCollector
from .rollouts.dataset import check_samples, example_columns, stored_rollout
from .rollouts.prompts import PromptData, check_group_size, choose_prompts, with_columns
from .rollouts.rollout import Evaluation
from .training.callbacks import Callbacks
from .training.finetuner import Finetuner
from .training.optimizer import make_accelerator
from .training.run_folder import RunFolder
from .training.run_log import Metrics, RunLog
from .training.state import begin_training, fine_tune


class PGraftTrainer:
    """
    Fine-tune a diffusion pipeline on rewards by rejection sampling at an intermediate noise level (GRAFT, P-GRAFT).

    Args:
        config ([`GraftConfig`]):
            Configuration of the run.
        reward_function (`Callable`, *optional*):
            Reward in DDPO's form, `f(images, prompts, metadata) -> (rewards, info)`; images `(B, 3, H, W)` in [0, 1].
        prompt_function (`Callable`, *optional*):
            Returns `(prompt, metadata)`; called once a group.
        sd_pipeline (`DiffusionPipeline`, or an object with one as its `sd_pipeline`):
            Pipeline to fine-tune, which as given is the reference; required. `use_lora=False` trains all weights.
        image_samples_hook (`Callable`, *optional*):
            `f(image_data, global_step, tracker)`, called in each iteration, see [`show_samples`].
        reward_funcs (`str`, `Callable` or a list of them, *optional*):
            Rewards in TRL's form: functions, registered names or `"package.module:function"`.
        reward_weights (`list[float]`, *optional*):
            Weights of `reward_funcs` in their sum; 1 each where not given.
        train_dataset (`datasets.Dataset`, list of `str`, or the Hub's name of a split `train`, *optional*):
            Prompts in a column `prompt`. Rewards get the further columns, the pipeline's call those that it takes.
        eval_dataset (`datasets.Dataset`, list of `str`, or the Hub's name of a split `train`, *optional*):
            Held-out prompts with the columns of `train_dataset`, in place of `config.eval_prompts`.
        samples_dataset (`datasets.Dataset`, *optional*):
            Samples that a run kept, to train on without sampling; which are accepted is decided anew by `config`.
        peft_config (`PeftConfig`, `str` or `Path`, *optional*):
            Adapter (by default a LoRA on the attention), or folder or Hub repository of one to continue: one of this
            library at its own switch level, any other with `tuned_fraction=1.0`.
        pipeline_kwargs (`dict`, *optional*):
            Further arguments of the pipeline call, such as `height`.
        callbacks (`list[TrainerCallback]`, *optional*):
            transformers callbacks. `config` is their `args`, an epoch is an iteration; at its end they save or stop.
        denoiser_format (`type`, *optional*):
            Subclass of [`DenoiserFormat`], for a denoiser whose arguments or output the default does not read.

    Raises:
        `ValueError`: arguments that do not fit together, before anything is sampled.
    """

    _tag_names = ["trl", "pgraft"]

    def __init__(
        self,
        config: GraftConfig,
        reward_function: DDPORewardFunction | None = None,
        prompt_function: Callable[[], tuple[str, Any]] | None = None,
        sd_pipeline: DiffusionPipeline | PipelineWrapper | None = None,
        image_samples_hook: Callable[..., Any] | None = None,
        *,
        reward_funcs: str | RewardFunction | list[str | RewardFunction] | None = None,
        reward_weights: Sequence[float] | None = None,
        train_dataset: PromptData | None = None,
        eval_dataset: PromptData | None = None,
        samples_dataset: datasets.Dataset | datasets.DatasetDict | None = None,
        peft_config: PeftConfig | str | Path | None = None,
        pipeline_kwargs: dict[str, Any] | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
        denoiser_format: type[DenoiserFormat] | None = None,
    ):
        self.sd_pipeline, self.image_samples_hook = sd_pipeline, image_samples_hook
        self.output_dir = Path(config.project_kwargs.get("project_dir") or config.output_dir)
        self.callbacks = Callbacks(callbacks or [], config)
        self.rewards = choose_rewards(reward_function, reward_funcs, reward_weights, required=samples_dataset is None)
        given = (getattr(sd_pipeline, "sd_pipeline", sd_pipeline), prompt_function, train_dataset, eval_dataset)
        source, self.held_out, prompts = choose_prompts(config, self.rewards, *given, samples_dataset)
        example = example_columns(samples_dataset if prompts is None else prompts)
        self.accelerator = accelerator = make_accelerator(config, self.output_dir)
        check_group_size(config, accelerator.num_processes, is_sampling=source is not None)
        self.policy = Policy(sd_pipeline, config, accelerator, peft_config, pipeline_kwargs, denoiser_format, example)
        config, self.pipeline, self.denoiser = self.policy.config, self.policy.pipeline, self.policy.denoiser
        self.finetuner = Finetuner(self.policy, config, accelerator)
        self.collector = RolloutCollector(self.policy, self.rewards, source, config, accelerator, self.output_dir)
        self.collector.check_prompts(self.held_out, example, prompts)
        self.samples_dataset = check_samples(samples_dataset, self.policy.has_fingerprint, self.collector.reward_names)
        self.stored = stored_rollout(self.samples_dataset, self.rewards, config, accelerator)
        self.publisher = Publisher(config, self.output_dir, accelerator, samples_dataset is None)
        self.run_folder = RunFolder(self.output_dir, self.finetuner, self.collector)
        self.run_log = RunLog(self.output_dir, accelerator, self.callbacks, config, starting_adapter=self.policy.start)
        self.config, self.epochs = config, config.num_epochs
        self.state = self.run_folder.resume(config.resume_from or config.resume_from_checkpoint)
        self.run_log.start_trackers()
        self.callbacks.begin(accelerator, model=self.denoiser, optimizer=self.finetuner.optimizer)

    history = property(lambda self: self.state.history, doc="Metrics logged so far, those before a resume included.")
    images_per_round = property(lambda self: self.collector.images, doc="Images of an iteration, of all processes.")
    adapter_dir = property(lambda self: self.output_dir / "adapter", doc="Folder of the adapter and its card.")

    def sampler(self, reference: bool = False) -> AbstractContextManager[DiffusionPipeline]:
        """A context with the pipeline as the policy samples with it, or as the `reference` (default `False`) does."""
        return self.policy.sampler(reference)

    def train(self, epochs: int | None = None, resume_from_checkpoint: str | bool | None = None) -> list[Metrics]:
        """
        Run iterations until there are `epochs` in all (by default `config.num_epochs`), and save the adapter.

        `resume_from_checkpoint` is a checkpoint's folder, or `True` for the newest of this run, or by default none.
        Returns the metrics of the whole run, those before a resume included.
        """
        if resume_from_checkpoint:
            self.state = self.run_folder.resume(resume_from_checkpoint, self.state)
            self.callbacks.values["optimizer"] = self.finetuner.optimizer
        self.epochs = (self.config.num_epochs if self.samples_dataset is None else 1) if epochs is None else epochs
        self.run_folder.begin(self.run_log, self.state)
        self.publisher.check(first_iteration=self.state.epoch)
        begin_training(self.finetuner, self.images_per_round, self.epochs, self.state, self.callbacks)
        if self.held_out and self.state.epoch == 0:
            self._log_evaluation(epoch=0)
        for epoch in range(self.state.epoch, self.epochs):
            self.callbacks.notify("on_epoch_begin")
            self.step(epoch, self.state.global_step)
            self.callbacks.notify("on_epoch_end")
            last = epoch + 1 == self.epochs or self.callbacks.control.should_training_stop
            evaluate, save = self.callbacks.pop_request("evaluate"), self.callbacks.pop_request("save")
            if self.held_out and (last or evaluate or (epoch + 1) % self.config.eval_freq == 0):
                self._log_evaluation(epoch + 1)
            if last or save or (epoch + 1) % self.config.save_freq == 0:
                self.save_checkpoint()
                self.publisher.push_samples()
            if last:
                break
        self.publisher.push_samples()  # once more, for samples that an interruption or a failed push has left
        if self.policy.has_adapter:
            self.save_model()
        self.callbacks.notify("on_train_end")
        self.run_log.finish_trackers()
        return self.history

    def step(self, epoch: int, global_step: int) -> int:
        """Run iteration number `epoch`, after `global_step` optimizer steps; returns the optimizer steps after it."""
        self.run_folder.begin(self.run_log, self.state)
        started = time.perf_counter()
        if self.stored is None:
            rollout, batches = self.collector.sample_rollout(epoch)
            show_samples(self.image_samples_hook, rollout, batches, self.collector, self.state.global_step)
            self.state.images += len(rollout.samples)
            self.state.denoiser_calls += rollout.denoiser_calls
        else:
            rollout = self.stored
        sampled = time.perf_counter()
        metrics = fine_tune(self.finetuner, rollout, epoch, self.epochs, global_step, self.state, self.callbacks)
        times = {"time/sampling": sampled - started, "time/training": time.perf_counter() - sampled}
        self.log({**rollout.metrics(self.collector.reward_names), **metrics, **times, "epoch": epoch})
        return self.state.global_step

    def compute_rewards(self, prompt_image_pairs: Sequence[Sequence[Any]], is_async: bool = False) -> Iterator[tuple]:
        """Score `prompt_image_pairs` as [`score_batches`] does, in threads with `is_async` (default `False`)."""
        return score_batches(self.collector, prompt_image_pairs, is_async)

    def evaluate(
        self, prompts: Sequence[str] | None = None, reference: bool = False, columns: dict[str, list] | None = None
    ) -> Evaluation:
        """
        Sample and score one image of each of `prompts` (by default the held-out ones), with seeds by place alone.

        Further `columns` are lists of one value a prompt; with `reference` (default `False`) the reference samples.
        """
        return self.collector.evaluate(self.held_out if prompts is None else with_columns(prompts, columns), reference)

    def _log_evaluation(self, epoch: int) -> None:
        metrics = {**self.evaluate().metrics(self.collector.reward_names), "epoch": epoch}
        self.log(metrics)
        self.callbacks.notify("on_evaluate", metrics=metrics)

    def log(self, metrics: Metrics) -> None:
        """Append `metrics` to `history` and to `metrics.jsonl`, and send them to trackers and callbacks."""
        self.history.append(metrics)
        self.run_log.write(metrics, self.state.global_step)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Save the adapter to `output_dir`, by default `adapter_dir`; with `config.push_to_hub`, push it."""
        self.run_folder.save_adapter(output_dir or self.adapter_dir)
        if self.config.push_to_hub:
            self.publisher.attempt(lambda: self.push_to_hub(commit_message="Save adapter"))

    def save_pretrained(self, output_dir: str | Path) -> None:
        """Save the adapter to `output_dir`, as [`~PGraftTrainer.save_model`]."""
        self.save_model(output_dir)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the last iteration, and remove the oldest beyond `num_checkpoint_limit`."""
        self.run_folder.save_checkpoint(self.state)
        self.callbacks.notify("on_save")

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | Sequence[str] | None = None
    ) -> None:
        """
        Write a card with images of both models to `adapter_dir`, headed `model_name` (by default the repository's).

        It names a dataset repository `dataset_name` (by default `config.hub_dataset_id`) and further `tags` (none).
        """
        if self.accelerator.is_main_process:
            shown = some_prompts(self.held_out, self.samples_dataset, self.output_dir / "samples")
            parts = (dataset_name or self.publisher.dataset_id, tags)
            facts = gather_facts(self.finetuner, self.rewards, self.history, shown, *parts)
            self.publisher.write_card(self.adapter_dir, facts, shown, self.collector.sample_images, model_name)

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> str | Future[str] | None:
        """
        Save the adapter, write its card (`kwargs` are for `create_model_card`), push both to `config.hub_model_id`.

        `commit_message`, `token` (by default `config.hub_token`), branch `revision` (the main one): the commit's.
        Returns the main process the repository, or a future if not `blocking`. See [`Publisher.push_adapter`].
        """
        self.run_folder.save_adapter(self.adapter_dir)
        self.publisher.complete_name()
        self.create_model_card(**kwargs)
        return self.publisher.push_adapter(self.adapter_dir, commit_message, blocking, token, revision)
