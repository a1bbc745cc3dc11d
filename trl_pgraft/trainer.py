# Copyright 2026 The trl_pgraft authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.


"""The training loop: rounds of drawing, scoring, accepting and fine-tuning, in the interface of TRL's DDPOTrainer."""

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from peft import PeftConfig
from tqdm.auto import tqdm

from .acceptance import get_acceptance, implied_kl
from .adapters import (
    ADAPTER_NAME,
    AdapterSwitch,
    adapter_parameters,
    add_adapter,
    default_lora_config,
    merge_difference,
    remove_adapter,
    without_adapters,
)
from .callbacks import Callbacks
from .checkpoints import (
    Progress,
    checkpoints_in,
    find_checkpoint,
    load_optimizer,
    load_progress,
    prune_checkpoints,
    save_checkpoint,
)
from .config import GraftConfig
from .denoiser_call import Conditioning, denoiser_of, record_conditioning
from .denoiser_format import DenoiserFormat
from .engine import make_accelerator, make_optimizer, place_pipeline, tracker_values
from .fine_tuning import FitReport, GraftLoss, count_microbatches, fit
from .hub import load_adapter_weights, read_switch, save_pgraft_adapter
from .levels import tuned_levels
from .memory import estimate_memory
from .parameterizations import prediction_type_of
from .pipeline_checks import check_call, check_peft_config, few_step_warning
from .pipeline_inputs import as_batch, inputs_of, takes_prompts
from .probe import learn_denoiser_call
from .prompts import choose_prompt_source
from .rewards import Scorer, choose_rewards, to_pil
from .rollout import Drawn, Group, Sample, draw, form_groups, samples_of, sampling_arguments, seed_of
from .samples import INPUT_PREFIX, sampling_fingerprint, to_dataset
from .selection import Round, SelectedRows, accept, combined_rewards
from .timestep_gate import TimestepGate, TunedGuidance


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


@dataclass(frozen=True)
class TrainingSet:
    """What one round is fitted on: its rows, the states they point to, and the conditioning of their prompts."""

    rows: SelectedRows
    states: torch.Tensor
    conditioning: Conditioning


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
            The pipeline to tune; required. The reference is this pipeline as it is handed in.
        image_samples_hook (`Callable`, *optional*):
            `f(image_data, global_step, tracker)`, once a round with a list of batches, each `[images, prompts,
            metadata, rewards, reward_metadata]`; `tracker` is the first tracker, or `None`.
        reward_funcs (`str`, `Callable` or list of them, *optional*):
            Rewards in TRL's convention, by function, registered name or `"package.module:function"`.
        reward_weights (`list[float]`, *optional*):
            Weights of `reward_funcs` in their sum.
        train_dataset (`datasets.Dataset`, *optional*):
            Prompts in a column `prompt`; further columns go to the rewards, and those that the pipeline's call takes
            for each prompt (`image`, `negative_prompt`, `prompt_2`, `class_labels`, ...) to the pipeline as well.
        samples_dataset (`datasets.Dataset`, *optional*):
            A round's dataset; it is trained on without drawing.
        peft_config (`PeftConfig`, *optional*):
            The adapter; a LoRA on the attention projections where it is not given.
        pipeline_kwargs (`dict`, *optional*):
            Further arguments of the pipeline call, such as `height`.
        callbacks (`list[TrainerCallback]`, *optional*):
            transformers callbacks.
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
        samples_dataset: datasets.Dataset | None = None,
        peft_config: PeftConfig | None = None,
        pipeline_kwargs: dict[str, Any] | None = None,
        callbacks: Sequence[Any] | None = None,
        denoiser_format: type[DenoiserFormat] | None = None,
    ):
        self.config = config
        self.pipeline = _checked_pipeline(sd_pipeline)
        self.denoiser = denoiser_of(self.pipeline)
        self.samples_dataset = samples_dataset
        self.prompt_source = choose_prompt_source(
            config.seed, prompt_function, train_dataset, samples_dataset, takes_prompts(self.pipeline)
        )
        self.rewards = choose_rewards(reward_function, reward_funcs, reward_weights, required=samples_dataset is None)
        self.image_samples_hook = image_samples_hook
        self.acceptance = get_acceptance(config.acceptance)
        self.callbacks = Callbacks(callbacks or [], config)
        self.output_dir = Path(config.project_kwargs.get("project_dir") or config.output_dir)
        self.accelerator = make_accelerator(config, self.output_dir)
        self.images_per_round = (
            config.sample_batch_size * config.sample_num_batches_per_epoch * self.accelerator.num_processes
        )
        size, k = config.group_size(self.images_per_round), config.acceptance_kwargs.get("k", 1)
        if samples_dataset is None and size <= k:
            raise ValueError(
                f"sample_batch_size * sample_num_batches_per_epoch * processes = {self.images_per_round}: a round's "
                f"groups have {size} images, of which k={k} cannot be selected. Draw more images a round."
            )
        place_pipeline(self.pipeline, self.accelerator)
        self.arguments = sampling_arguments(config, self.pipeline, pipeline_kwargs)
        example = {**self._example_inputs(train_dataset), **self.arguments}
        self.call = learn_denoiser_call(self.pipeline, example, denoiser_format)
        check_call(self.call, config, self.pipeline)
        few_step_warning(self.pipeline, self.call, self.arguments)
        self.prediction_type = prediction_type_of(self.pipeline.scheduler)
        self.levels, self.switch = tuned_levels(config, self.pipeline, self.call, example)
        self.peft_config = peft_config or default_lora_config(self.denoiser, config.lora_rank)
        check_peft_config(self.pipeline, self.peft_config)
        self.memory = estimate_memory(self.pipeline, config, self.peft_config, example, self.call)
        self.accelerator.print(self.memory)
        self.fingerprint = sampling_fingerprint(self.pipeline, self.arguments, self.levels.position)
        self.progress = Progress()
        self.optimizer: torch.optim.Optimizer | None = None
        if not config.control_adapter:
            add_adapter(self.denoiser, copy.deepcopy(self.peft_config), ADAPTER_NAME, seed_of(config.seed, "adapter"))
            self.optimizer = make_optimizer(adapter_parameters(self.denoiser, ADAPTER_NAME), config)
        if config.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        self._resume()
        self.accelerator.init_trackers(
            config.tracker_project_name, config=tracker_values(config.to_dict()), init_kwargs=config.tracker_kwargs
        )

    def _inputs_of(self, columns: dict[str, Any]) -> dict[str, Any]:
        """What the pipeline is handed of a prompt's further columns."""
        return inputs_of(self.pipeline, columns, self.arguments)

    def _example_inputs(self, train_dataset: datasets.Dataset | None) -> dict[str, Any]:
        """Inputs of one prompt, with which the pipeline is asked how it calls its denoiser."""
        dataset = train_dataset if self.samples_dataset is None else self.samples_dataset
        row = dataset[0] if isinstance(dataset, datasets.Dataset) and len(dataset) else {}
        if self.samples_dataset is not None:
            stored = [name for name in row if name.startswith(INPUT_PREFIX)]
            row = {name.removeprefix(INPUT_PREFIX): row[name] for name in stored}
        return {name: as_batch([value]) for name, value in self._inputs_of(row).items()}

    # The run.

    @property
    def history(self) -> list[dict[str, float]]:
        """Metrics logged so far, those before a resume included."""
        return self.progress.history

    def train(self, epochs: int | None = None) -> list[dict[str, float]]:
        """
        Run rounds until `epochs` (default: `config.num_epochs`) are done, and save the adapter.

        Returns:
            `list[dict[str, float]]`: the metrics of each round.
        """
        epochs = epochs or (1 if self.samples_dataset is not None else self.config.num_epochs)
        self.callbacks.notify("on_train_begin")
        if self.config.eval_prompts and self.progress.epoch == 0:
            self._log_evaluation(epoch=0)
        for epoch in range(self.progress.epoch, epochs):
            self.callbacks.notify("on_epoch_begin")
            self.step(epoch, self.progress.global_step)
            last = epoch + 1 == epochs
            if self.config.eval_prompts and (last or (epoch + 1) % self.config.eval_freq == 0):
                self._log_evaluation(epoch + 1)
            if last or (epoch + 1) % self.config.save_freq == 0:
                self.save_checkpoint()
            self.callbacks.notify("on_epoch_end")
            if self.callbacks.should_stop:
                break
        if self.has_adapter:
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
        started = time.perf_counter()
        round_ = self._draw_round(epoch) if self.samples_dataset is None else self._stored_round()
        drawn = time.perf_counter()
        report = self._fine_tune(round_, epoch)
        self.progress.epoch = epoch + 1
        self.progress.global_step = global_step + (report.steps if report else 0)
        self.callbacks.state.epoch, self.callbacks.state.global_step = epoch + 1, self.progress.global_step
        metrics = round_.metrics([reward.name for reward in self.rewards])
        metrics |= {**(report.to_metrics() if report else {}), "implied_kl_sum": self._accumulate_kl(round_)}
        metrics |= {"images": self.progress.images, "denoiser_calls": self.progress.denoiser_calls}
        metrics |= {"time/sampling": drawn - started, "time/training": time.perf_counter() - drawn, "epoch": epoch}
        self.log(metrics)
        return self.progress.global_step

    # Drawing and scoring.

    def _draw_round(self, epoch: int) -> Round:
        """Draw and score this process's share of the round, exchange what acceptance needs, and keep it all."""
        config = self.config
        groups = self._groups(epoch)
        samples = samples_of(groups, config.seed, epoch)
        own = self._own_share(len(samples))
        with self.sampler(reference=config.sample_from == "reference"):
            drawn, values, batches = self._draw_and_score(samples[own], self.levels.position)
        states, values = self._gather(drawn.x_i), self._gather(values)
        reward = combined_rewards(values, [r.weight for r in self.rewards], groups)
        keys = self._duplicate_keys(samples[own], drawn)
        seed = (config.seed, epoch, "accept")
        decision = accept(reward, groups, self.acceptance, config.acceptance_kwargs, seed, keys)
        round_ = Round(groups, samples, states, values, reward, decision)
        self._keep(round_, drawn, own, epoch)
        if self.image_samples_hook is not None:
            tracker = self.accelerator.trackers[0] if self.accelerator.trackers else None
            self.image_samples_hook(batches, self.progress.global_step, tracker)
        self.progress.images += len(samples)
        self.progress.denoiser_calls += int(self._gather(torch.tensor([drawn.denoiser_calls])).sum())
        return round_

    def _groups(self, epoch: int) -> list[Group]:
        size = self.config.group_size(self.images_per_round)
        # With this seed, prompt functions that use global random state repeat themselves when a run is resumed.
        set_seed(seed_of(self.config.seed, "prompts", epoch) % 2**32)
        groups: list[Any] = [None]
        if self.accelerator.is_main_process:
            source = self.prompt_source(epoch, -(-self.images_per_round // size))
            groups = [form_groups(source, self.images_per_round, size)]
        return broadcast_object_list(groups)[0]

    def _own_share(self, count: int) -> slice:
        share = -(-count // self.accelerator.num_processes)
        return slice(share * self.accelerator.process_index, share * (self.accelerator.process_index + 1))

    def _draw_and_score(self, samples: list[Sample], position: int) -> tuple[Drawn, torch.Tensor, list[list[Any]]]:
        """Images, states and rewards of some samples, and the batches as DDPO's hook takes them."""
        workers = self.config.max_workers if self.config.async_reward_computation else 0
        scorer = Scorer(self.rewards, self.config.reward_retries, workers)
        batches: list[list[Any]] = []

        def add(batch: Sequence[Sample], images: torch.Tensor) -> None:
            prompts, columns = [s.group.prompt for s in batch], _columns(batch)
            scorer.add(images, prompts, columns)
            metadata = columns.get("metadata", [s.group.columns for s in batch])
            batches.append([images.float() / 255, tuple(prompts), tuple(metadata)])

        drawn = draw(
            self.pipeline,
            self.call,
            samples,
            position,
            self.config.sample_batch_size,
            self.arguments,
            on_batch=add,
            progress=self.accelerator.is_local_main_process,
        )
        results = scorer.results()
        for batch, result in zip(batches, results, strict=True):
            batch += self._as_ddpo(*result)
        return drawn, torch.cat([values for values, _ in results]), batches

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
        scorer = Scorer(self.rewards, self.config.reward_retries, self.config.max_workers if is_async else 0)
        for images, prompts, metadata in prompt_image_pairs:
            images = images if images.dtype == torch.uint8 else (images * 255).round().to(torch.uint8)
            scorer.add(images, list(prompts), {"metadata": list(metadata)})
        return zip(*(self._as_ddpo(*result) for result in scorer.results()), strict=True)

    def _as_ddpo(self, values: torch.Tensor, infos: list[Any]) -> tuple[torch.Tensor, Any]:
        """A batch's values and infos as DDPO knows them: one reward a sample, and the info of the only function."""
        weights = torch.tensor([reward.weight for reward in self.rewards], dtype=torch.float64)
        return values @ weights, infos[0] if len(infos) == 1 else infos

    def _duplicate_keys(self, samples: list[Sample], drawn: Drawn) -> list[Any] | None:
        """Keys that tell equal samples, gathered over the processes."""
        if self.config.deduplicate_by is None:
            return None
        images = to_pil(drawn.images)
        return gather_object(
            [self.config.deduplicate_by(image, s.group.prompt) for image, s in zip(images, samples, strict=True)]
        )

    def _keep(self, round_: Round, drawn: Drawn, own: slice, epoch: int) -> None:
        """Write this process's shard of the round as parquet, under the output folder."""
        named = {f"reward_{r.name}": round_.values[own, i].tolist() for i, r in enumerate(self.rewards)}
        rewards = {"reward": round_.reward[own].tolist(), **named}
        accepted = round_.decision.accepted[own].tolist()
        inputs = [self._inputs_of(sample.group.columns) for sample in round_.samples[own]]
        dataset = to_dataset(
            round_.samples[own], drawn, rewards, accepted, self.switch.state_timestep, self.fingerprint, inputs
        )
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        folder = self.output_dir / "samples" / f"round_{epoch:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        dataset.to_parquet(folder / f"samples-{rank:05d}-of-{world:05d}.parquet")

    def _stored_round(self) -> Round:
        found = set(self.samples_dataset["fingerprint"])
        if found != {self.fingerprint}:
            raise ValueError(
                f"samples_dataset was drawn from another model, scheduler, guidance or tuned_fraction (fingerprint "
                f"{', '.join(sorted(found))}; this configuration has {self.fingerprint}). Train with the "
                "configuration that drew it."
            )
        return Round.from_dataset(self.samples_dataset, [reward.name for reward in self.rewards])

    def _gather(self, values: torch.Tensor) -> torch.Tensor:
        """Values of all processes, in their order, on the host."""
        return self.accelerator.gather(values.to(self.accelerator.device)).cpu()

    # Fine-tuning.

    @property
    def has_adapter(self) -> bool:
        """Whether there is a policy apart from the reference: with a control adapter, after the first round."""
        return ADAPTER_NAME in getattr(self.denoiser, "peft_config", {})

    @property
    def tuned_guidance_scale(self) -> float:
        """Guidance scale of the tuned steps; 1.0 where the pipeline does not combine two branches."""
        if not self.call.is_guided:
            return 1.0
        scale = self.config.tuned_guidance_scale
        return (self.call.guidance_scale or math.nan) if scale is None else scale

    @contextmanager
    def sampler(self, reference: bool = False) -> Iterator[Any]:
        """The pipeline as the policy samples with it, gate and guidance included, or as the reference does."""
        with ExitStack() as stack:
            if self.has_adapter:
                stack.enter_context(
                    without_adapters(self.denoiser, [ADAPTER_NAME])
                    if reference
                    else TimestepGate(self.denoiser, ADAPTER_NAME, self.switch.switch_timestep, self.call.clock)
                )
            if self.config.tuned_guidance_scale is not None and not reference:
                scales = (self.call.guidance_scale, self.tuned_guidance_scale)
                stack.enter_context(TunedGuidance(self.denoiser, self.call, *scales, self.switch.switch_timestep))
            yield self.pipeline

    def _fine_tune(self, round_: Round, epoch: int) -> FitReport | None:
        """Fit the adapter to the accepted states of a round; with a control, keep what the selection alone taught."""
        config = self.config
        rows = SelectedRows(round_, config.train_num_inner_epochs, (config.seed, epoch), self._inputs_of)
        if len(rows) == 0:
            self.accelerator.print(f"Round {epoch}: nothing was accepted, so nothing is trained.")
            return None
        conditioning = record_conditioning(self.pipeline, self.call, rows.prompts, self.arguments, rows.inputs)
        data = TrainingSet(rows, round_.states, conditioning)
        if not config.control_adapter:
            return self._fit(ADAPTER_NAME, self.optimizer, data)
        accepted, control = "pgraft_accepted", "pgraft_control"
        report = self._fit_new(accepted, data, epoch)
        self._fit_new(control, data, epoch, control=True)
        scale = 1 / self.tuned_guidance_scale if config.guidance_loss == "conditional" else 1.0
        merge_difference(self.denoiser, ADAPTER_NAME, accepted, control, scale, config.max_merged_rank)
        return report

    def _fit_new(self, name: str, data: TrainingSet, epoch: int, control: bool = False) -> FitReport:
        """Fit a fresh adapter on top of the policy, and take it out of the forward pass again."""
        add_adapter(self.denoiser, copy.deepcopy(self.peft_config), name, seed_of(self.config.seed, "adapter", epoch))
        report = self._fit(name, make_optimizer(adapter_parameters(self.denoiser, name), self.config), data, control)
        AdapterSwitch(self.denoiser, name).turn(False)
        return report

    def _fit(self, name: str, optimizer: torch.optim.Optimizer, data: TrainingSet, control: bool = False) -> FitReport:
        """Fit adapter `name` to the accepted states, or to as many unselected ones."""
        config, parameters = self.config, adapter_parameters(self.denoiser, name)
        total = count_microbatches(len(data.rows), config, self.accelerator.num_processes)
        steps = -(-total // config.train_gradient_accumulation_steps)
        self.progress.planned_steps = self.progress.planned_steps or steps * config.num_epochs
        average = EMAModel(parameters, decay=config.ema_decay) if config.ema_decay else None
        hidden = not self.accelerator.is_local_main_process
        with tqdm(total=total, desc=f"training {name}", leave=False, disable=hidden) as bar:
            report = fit(
                self.accelerator,
                self._loss(name, data.conditioning),
                data.states,
                data.rows.passes(control),
                optimizer,
                config,
                self._learning_rate_schedule(),
                on_microbatch=bar.update,
                on_step=(lambda: average.step(parameters)) if average else None,
            )
        if average is not None:
            average.copy_to(parameters)
        return report

    def _loss(self, name: str, conditioning: Conditioning) -> GraftLoss:
        adapters = [n for n in dict.fromkeys([ADAPTER_NAME, name]) if n in self.denoiser.peft_config]
        return GraftLoss(
            self.denoiser,
            self.call,
            conditioning,
            self.levels,
            self.prediction_type,
            self.config.guidance_loss,
            self.tuned_guidance_scale,
            self.config.caption_dropout,
            adapters,
        )

    def _learning_rate_schedule(self) -> Callable[[int], float]:
        """Learning rate of a round's n-th optimizer step, on diffusers' schedule over the whole run."""
        config, start = self.config, self.progress.global_step
        unit = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        plan = {"num_warmup_steps": config.warmup_steps, "num_training_steps": self.progress.planned_steps}
        factor = get_scheduler(config.lr_scheduler_type, unit, **plan).lr_lambdas[0]
        return lambda step: config.train_learning_rate * factor(start + step)

    def _accumulate_kl(self, round_: Round) -> float:
        """KL to the reference that the rounds so far imply: composed for top-k, where the policy drew them."""
        progress, kl = self.progress, round_.decision.implied_kl
        if self.config.sample_from == "reference":
            progress.kl_rounds, progress.kl_sum = 1, kl
            return kl
        progress.kl_rounds += 1
        size = round_.groups[0].size
        k = self.config.acceptance_kwargs.get("k", max(1, round(size / 4)))
        one_round = implied_kl(size, k)
        if self.config.acceptance == "top_k" and abs(kl - one_round) < 1e-9:
            progress.kl_sum = implied_kl(size, k, rounds=progress.kl_rounds)
        else:
            progress.kl_sum += kl
        return progress.kl_sum

    # Evaluation, logging, saving.

    def evaluate(
        self, prompts: Sequence[str] | None = None, reference: bool = False, columns: dict[str, list] | None = None
    ) -> Evaluation:
        """
        Draw one image of each prompt with seeds that depend on its place alone, and score it.

        Args:
            prompts (`Sequence[str]`, *optional*):
                Prompts; `config.eval_prompts` where not given.
            reference (`bool`, *optional*, defaults to `False`):
                Draw with the reference model in place of the policy.
            columns (`dict[str, list]`, *optional*):
                Further columns of the prompts, as those of `train_dataset`.
        """
        prompts = list(prompts if prompts is not None else self.config.eval_prompts or [])
        if not prompts:
            raise ValueError("evaluate: no prompts given, and config.eval_prompts is empty.")
        rows = [{name: values[i] for name, values in (columns or {}).items()} for i in range(len(prompts))]
        groups = [Group(i, prompt, 1, row) for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))]
        samples = samples_of(groups, self.config.seed, "evaluation")
        own = samples[self._own_share(len(samples))]
        with self.sampler(reference):
            # A process without a share draws one too, because nothing has no shape.
            drawn, values, _ = self._draw_and_score(own or samples[:1], self.levels.position)
        values = torch.tensor(gather_object(values[: len(own)].tolist()), dtype=torch.float64)
        reward = combined_rewards(values, [r.weight for r in self.rewards], groups)
        return Evaluation(reward, values, drawn.images[: len(own)])

    def _log_evaluation(self, epoch: int) -> None:
        result = self.evaluate()
        means = result.values.nanmean(0).tolist()
        metrics = {f"eval/rewards/{r.name}/mean": mean for r, mean in zip(self.rewards, means, strict=True)}
        self.log({**metrics, "eval/reward": result.reward.nanmean().item(), "epoch": epoch})

    def log(self, metrics: dict[str, float]) -> None:
        """Send metrics to the trackers and callbacks, and append them to `history` and to `metrics.jsonl`."""
        self.history.append(metrics)
        self.accelerator.log(metrics, step=self.progress.global_step)
        self.callbacks.notify("on_log", logs=metrics)
        if self.accelerator.is_main_process:
            with open(self.output_dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps(metrics) + "\n")

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """
        Save the adapter with its switch level, in PEFT's and in diffusers' format.

        Args:
            output_dir (`str` or `Path`, *optional*):
                Folder; `adapter` inside the output folder where not given.
        """
        if not self.has_adapter:
            raise ValueError("save_model: with control_adapter=True there is no adapter before the first round.")
        if self.accelerator.is_main_process:
            save_pgraft_adapter(self.pipeline, output_dir or self.output_dir / "adapter", self.switch)

    def save_pretrained(self, output_dir: str | Path) -> None:
        """Save the adapter to `output_dir`, as [`~PGraftTrainer.save_model`]."""
        self.save_model(output_dir)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the last round, and remove the oldest beyond `num_checkpoint_limit`."""
        if self.accelerator.is_main_process:
            folder = self.output_dir / "checkpoints"
            adapter = ADAPTER_NAME if self.has_adapter else None
            save_checkpoint(folder, self.pipeline, self.switch, adapter, self.optimizer, self.progress)
            prune_checkpoints(folder, self.config.num_checkpoint_limit)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        source = self.config.resume_from or self.config.resume_from_checkpoint
        if source is True:
            folder = self.output_dir / "checkpoints"
            source = folder if checkpoints_in(folder) else None
        if not source:
            return
        checkpoint = find_checkpoint(source)
        self.progress = load_progress(checkpoint)
        if (checkpoint / "adapter_config.json").is_file():
            stored = read_switch(checkpoint).switch_timestep
            if stored != self.switch.switch_timestep:
                raise ValueError(
                    f"resume_from: the adapter of {checkpoint} switches at timestep {stored}, this configuration at "
                    f"{self.switch.switch_timestep}. Resume with the tuned_fraction, the sample_num_steps and the "
                    "scheduler that it was trained with."
                )
            if self.has_adapter:
                remove_adapter(self.denoiser, ADAPTER_NAME)
            load_adapter_weights(self.denoiser, checkpoint, ADAPTER_NAME)
        if self.optimizer is not None:
            # The optimizer must hold the parameters that were loaded, not those they replaced.
            self.optimizer = make_optimizer(adapter_parameters(self.denoiser, ADAPTER_NAME), self.config)
            load_optimizer(checkpoint, self.optimizer)


def _checked_pipeline(sd_pipeline: Any) -> Any:
    if sd_pipeline is None:
        raise ValueError("sd_pipeline is required: the diffusers pipeline to fine-tune.")
    if getattr(sd_pipeline, "use_lora", True) is False:
        raise ValueError("sd_pipeline: use_lora=False (full fine-tuning) is not supported; tune an adapter.")
    return getattr(sd_pipeline, "sd_pipeline", sd_pipeline)


def _columns(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Further columns of the samples' prompts, as lists."""
    names = dict.fromkeys(name for sample in samples for name in sample.group.columns)
    return {name: [sample.group.columns.get(name) for sample in samples] for name in names}
