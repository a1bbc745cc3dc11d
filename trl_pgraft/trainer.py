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
import shutil
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
from peft import LoraConfig, PeftConfig
from tqdm.auto import tqdm

from .acceptance import get_acceptance, implied_kl
from .adapters import (
    ADAPTER_NAME,
    AdapterSwitch,
    adapter_parameters,
    add_adapter,
    default_lora_config,
    full_copy_config,
    make_trainable,
    merge_difference,
    without_adapters,
)
from .callbacks import Callbacks
from .cards import GRID_FILE, facts_of, write_adapter_card
from .checkpoints import (
    Progress,
    check_same_run,
    checkpoints_in,
    find_checkpoint,
    load_optimizer,
    load_progress,
    prune_checkpoints,
    reading,
    save_checkpoint,
)
from .config import GraftConfig
from .denoiser_call import Conditioning, denoiser_of, record_conditioning
from .drawing import Batch, draw_and_score, in_order
from .engine import make_accelerator, make_optimizer, place_pipeline
from .fine_tuning import FitReport, GraftLoss, count_microbatches, fit
from .hub import load_adapter_weights, save_pgraft_adapter
from .levels import tuned_levels
from .parameterizations import prediction_type_of
from .pictures import before_after_grid, image_grid
from .probe import learn_denoiser_call
from .prompts import choose_prompt_source
from .publisher import Publisher
from .rewards import Patience, Scorer, choose_rewards, to_pil
from .rollout import Drawn, Group, Sample, draw, form_groups, samples_of, sampling_arguments, seed_of
from .samples import check_samples, fingerprint_of, sampling_fingerprint, to_dataset
from .selection import Round, SelectedRows, accept, combined_rewards
from .timestep_gate import SwitchLevel, TimestepGate, TunedGuidance
from .trackers import NoTracker, log_image, tracker_arguments, tracker_values
from .unfinished import UnfinishedRound


UNFINISHED = "unfinished"  # folder, in the output folder, of samples that no checkpoint has yet


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
            Prompts in a column `prompt`; further columns go to the rewards.
        samples_dataset (`datasets.Dataset`, *optional*):
            Samples that a run kept, of one or several rounds; they are trained on without drawing.
        peft_config (`PeftConfig`, *optional*):
            The adapter; a LoRA on the attention projections where it is not given.
        pipeline_kwargs (`dict`, *optional*):
            Further arguments of the pipeline call, such as `height`.
        callbacks (`list[TrainerCallback]`, *optional*):
            transformers callbacks, with `config` as their `args`. An epoch is a round, a step an optimizer step; they
            may ask to save, to evaluate and to stop, which is done at the end of the round.

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
    ):
        self.config = config
        self.sd_pipeline = sd_pipeline
        self.pipeline = _checked_pipeline(sd_pipeline)
        self.denoiser = denoiser_of(self.pipeline)
        self.samples_dataset = samples_dataset
        self.prompt_source = choose_prompt_source(config.seed, prompt_function, train_dataset, samples_dataset)
        self.rewards = choose_rewards(
            reward_function, reward_funcs, reward_weights, required=samples_dataset is None
        )
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
        self.peft_config = self._choose_adapter(peft_config)
        place_pipeline(self.pipeline, self.accelerator)
        self.arguments = sampling_arguments(config, self.pipeline, pipeline_kwargs)
        self.call = learn_denoiser_call(self.pipeline, self.arguments)
        self.prediction_type = prediction_type_of(self.pipeline.scheduler)
        self.levels, self.switch = tuned_levels(config, self.pipeline, self.call, self.arguments)
        _hand_over(self.switch, sd_pipeline)
        self.fingerprint = sampling_fingerprint(self.pipeline, self.arguments, self.levels.position)
        if samples_dataset is not None:
            names = [reward.name for reward in self.rewards]
            self.samples_dataset = check_samples(samples_dataset, self.fingerprint, names)
        self.publisher = Publisher(config, self.output_dir, self.accelerator, draws=samples_dataset is None)
        self.progress = Progress()
        self.optimizer: torch.optim.Optimizer | None = None
        if not config.control_adapter:
            self._make_adapter()
            self.optimizer = make_optimizer(adapter_parameters(self.denoiser, ADAPTER_NAME), config)
        if config.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        self.has_begun = False
        self._resume(config.resume_from or config.resume_from_checkpoint)
        self.accelerator.init_trackers(
            config.tracker_project_name, config=tracker_values(config.to_dict()), init_kwargs=tracker_arguments(config)
        )
        self.callbacks.begin(self.accelerator, model=self.denoiser, optimizer=self.optimizer)

    # The run.

    @property
    def history(self) -> list[dict[str, float]]:
        """Metrics logged so far, those before a resume included."""
        return self.progress.history

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
            self.callbacks.values["optimizer"] = self.optimizer
        self.publisher.check(first_round=self.progress.epoch)
        state = self.callbacks.state
        state.epoch, state.global_step = self.progress.epoch, self.progress.global_step
        state.max_steps = self.progress.planned_steps or self._expected_steps() * epochs
        self._begin()
        self.callbacks.notify("on_train_begin")
        if self.config.eval_prompts and self.progress.epoch == 0:
            self._log_evaluation(epoch=0)
        for epoch in range(self.progress.epoch, epochs):
            self.callbacks.notify("on_epoch_begin")
            self.step(epoch, self.progress.global_step)
            self.callbacks.notify("on_epoch_end")
            last = epoch + 1 == epochs or self.callbacks.should_stop
            asked_to_evaluate, asked_to_save = self.callbacks.asked("evaluate"), self.callbacks.asked("save")
            if self.config.eval_prompts and (last or asked_to_evaluate or (epoch + 1) % self.config.eval_freq == 0):
                self._log_evaluation(epoch + 1)
            if last or asked_to_save or (epoch + 1) % self.config.save_freq == 0:
                self.save_checkpoint()
                self.publisher.push_samples()
            if last:
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
        self._begin()
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
            batches = self.draw_and_score(samples[own], self._unfinished(epoch))
        drawn, values = in_order(samples[own], batches)
        states, values = self._gather(drawn.x_i), self._gather(values)
        reward = combined_rewards(values, [r.weight for r in self.rewards], groups)
        keys = self._duplicate_keys(samples[own], drawn)
        seed = (config.seed, epoch, "accept")
        decision = accept(reward, groups, self.acceptance, config.acceptance_kwargs, seed, keys)
        round_ = Round(groups, samples, states, values, reward, decision)
        self._keep(round_, drawn, own, epoch)
        self._show(round_, drawn, batches)
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

    def draw_and_score(self, samples: list[Sample], unfinished: UnfinishedRound | None = None) -> list[Batch]:
        """Batches of images, states and rewards of some samples; with `unfinished`, on disk as they come."""
        in_threads = self.config.async_reward_computation
        return draw_and_score(samples, self._draw, self.make_scorer(in_threads), unfinished)

    def _draw(self, samples: Sequence[Sample]) -> Iterator[tuple[Sequence[Sample], Drawn]]:
        """Batches of samples with what was drawn for them."""
        return draw(
            self.pipeline,
            self.call,
            samples,
            self.levels.position,
            self.config.sample_batch_size,
            self.arguments,
            progress=self.accelerator.is_local_main_process,
        )

    def make_scorer(self, in_threads: bool = False) -> Scorer:
        """A scorer of this run's rewards, with threads where asked."""
        config = self.config
        patience = Patience(config.reward_retries, config.reward_retry_wait, config.reward_timeout)
        return Scorer(self.rewards, patience, config.max_workers if in_threads else 0)

    def _unfinished(self, epoch: int) -> UnfinishedRound:
        """Where a round's samples are kept until a checkpoint has it."""
        policy = {}
        if self.has_adapter and self.config.sample_from == "policy":
            policy = {name: p for name, p in self.denoiser.named_parameters() if f".{ADAPTER_NAME}." in name}
        drawn_by = f"{self.fingerprint} {fingerprint_of(policy)}"
        folder = self.output_dir / UNFINISHED / f"round_{epoch:04d}"
        return UnfinishedRound(folder, drawn_by, [reward.name for reward in self.rewards])

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
        scorer = self.make_scorer(is_async)
        for images, prompts, metadata in prompt_image_pairs:
            images = images if images.dtype == torch.uint8 else (images * 255).round().to(torch.uint8)
            scorer.add(images, list(prompts), {"metadata": list(metadata)})
        return zip(*(self._as_ddpo(*result) for result in scorer.results()), strict=True)

    def _as_ddpo(self, values: torch.Tensor, infos: list[Any]) -> tuple[torch.Tensor, Any]:
        """A batch's values and infos as DDPO knows them: one reward a sample, and the info of the only function."""
        weights = torch.tensor([reward.weight for reward in self.rewards], dtype=torch.float64)
        return values @ weights, infos[0] if len(infos) == 1 else infos

    def _for_hook(self, batch: Batch) -> list[Any]:
        """A batch as DDPO's hook takes it: images in [0, 1], prompts, metadata, rewards and their info."""
        columns = batch.columns
        metadata = columns.get("metadata", [sample.group.columns for sample in batch.samples])
        images = batch.drawn.images.float() / 255
        return [images, tuple(batch.prompts), tuple(metadata), *self._as_ddpo(batch.values, batch.infos)]

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
        dataset = to_dataset(
            round_.samples[own], drawn, rewards, accepted, self.switch.state_timestep, self.fingerprint
        )
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        folder = self.output_dir / "samples" / f"round_{epoch:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        dataset.to_parquet(folder / f"samples-{rank:05d}-of-{world:05d}.parquet")

    def _show(self, round_: Round, drawn: Drawn, batches: list[Batch]) -> None:
        """Hand this process's samples to DDPO's hook, and the main process's to the trackers as a picture."""
        trackers, step = self.accelerator.trackers, self.progress.global_step
        if trackers and self.accelerator.is_main_process:
            captions = round_.captions()[: len(drawn.images)]
            log_image(trackers, "samples", image_grid(drawn.images, captions, round_.groups[0].size), step)
        if self.image_samples_hook is not None:
            tracker = trackers[0] if trackers else NoTracker()
            self.image_samples_hook(list(map(self._for_hook, batches)), step, tracker)

    def _stored_round(self) -> Round:
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
    def is_full(self) -> bool:
        """Whether all weights of the denoiser are trained, because the pipeline says `use_lora=False`."""
        return getattr(self.sd_pipeline, "use_lora", True) is False

    def _choose_adapter(self, peft_config: PeftConfig | None) -> PeftConfig:
        """What is trained: the adapter that is given, the one that the pipeline has, all weights, or a LoRA."""
        if peft_config is not None and self.is_full:
            raise ValueError("peft_config: the pipeline says use_lora=False, which trains all weights. Choose one.")
        if peft_config is not None and self.has_adapter:
            raise ValueError(f"peft_config: the pipeline has an adapter {ADAPTER_NAME!r} already, which is trained.")
        if self.has_adapter:
            peft_config = self.denoiser.peft_config[ADAPTER_NAME]
        elif peft_config is None and self.is_full:
            peft_config = full_copy_config(self.denoiser)
        peft_config = peft_config or default_lora_config(self.denoiser, self.config.lora_rank)
        if self.config.control_adapter and not isinstance(peft_config, LoraConfig):
            raise ValueError(
                "peft_config: control_adapter=True subtracts one LoRA from another; "
                f"{type(peft_config).__name__} makes none. Give a LoraConfig, or set control_adapter=False."
            )
        return peft_config

    def _make_adapter(self) -> None:
        """Add the adapter, or go on with the one that the pipeline has."""
        if not self.has_adapter:
            seed = seed_of(self.config.seed, "adapter")
            add_adapter(self.denoiser, copy.deepcopy(self.peft_config), ADAPTER_NAME, seed)
        make_trainable(self.denoiser, ADAPTER_NAME)

    @property
    def tuned_guidance_scale(self) -> float:
        """Guidance scale of the tuned steps; 1.0 where the pipeline does not combine two branches."""
        if not self.call.is_guided:
            return 1.0
        scale = self.config.tuned_guidance_scale
        return self.arguments["guidance_scale"] if scale is None else scale

    @contextmanager
    def sampler(self, reference: bool = False) -> Iterator[Any]:
        """The pipeline as the policy samples with it, gate and guidance included, or as the reference does."""
        with ExitStack() as stack:
            if self.is_full:
                # The trained copy is in float32 also where the frozen weights are not.
                stack.enter_context(self.accelerator.autocast())
            if self.has_adapter:
                stack.enter_context(
                    without_adapters(self.denoiser, [ADAPTER_NAME])
                    if reference
                    else TimestepGate(self.denoiser, ADAPTER_NAME, self.switch.switch_timestep, self.call.clock)
                )
            if self.config.tuned_guidance_scale is not None and not reference:
                scales = (self.arguments["guidance_scale"], self.tuned_guidance_scale)
                stack.enter_context(TunedGuidance(self.denoiser, self.call, *scales, self.switch.switch_timestep))
            yield self.pipeline

    def _fine_tune(self, round_: Round, epoch: int) -> FitReport | None:
        """Fit the adapter to the accepted states of a round; with a control, keep what the selection alone taught."""
        config = self.config
        rows = SelectedRows(round_, config.train_num_inner_epochs, (config.seed, epoch))
        if len(rows) == 0:
            self.accelerator.print(f"Round {epoch}: nothing was accepted, so nothing is trained.")
            return None
        data = TrainingSet(
            rows, round_.states, record_conditioning(self.pipeline, self.call, rows.prompts, self.arguments)
        )
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

    def _fit(
        self, name: str, optimizer: torch.optim.Optimizer, data: TrainingSet, control: bool = False
    ) -> FitReport:
        """Fit adapter `name` to the accepted states, or to as many unselected ones."""
        config, parameters = self.config, adapter_parameters(self.denoiser, name)
        total = count_microbatches(len(data.rows), config, self.accelerator.num_processes)
        steps = -(-total // config.train_gradient_accumulation_steps)
        self.progress.planned_steps = self.progress.planned_steps or steps * config.num_epochs
        average = EMAModel(parameters, decay=config.ema_decay) if config.ema_decay else None
        self.callbacks.state.max_steps = self.progress.planned_steps
        hidden = not self.accelerator.is_local_main_process

        def on_event(event: str) -> None:
            if average is not None and event == "on_optimizer_step":
                average.step(parameters)
            if event in ("on_substep_end", "on_step_end"):
                bar.update()
            if not control:
                self.callbacks.state.global_step += event == "on_step_end"
                self.callbacks.notify(event)

        with tqdm(total=total, desc=f"training {name}", leave=False, disable=hidden) as bar:
            report = fit(
                self.accelerator,
                self._loss(name, data.conditioning),
                data.states,
                data.rows.passes(control),
                optimizer,
                config,
                self._learning_rate_schedule(),
                on_event=on_event,
            )
        if average is not None:
            average.copy_to(parameters)
        return report

    def _expected_steps(self) -> int:
        """Optimizer steps of a round in which `k` of each group is accepted, a quarter where nothing says more."""
        size = self.config.group_size(self.images_per_round)
        rows = self.images_per_round // size * self.config.acceptance_kwargs.get("k", max(1, round(size / 4)))
        total = count_microbatches(rows, self.config, self.accelerator.num_processes)
        return -(-total // self.config.train_gradient_accumulation_steps)

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
        """
        KL to the reference that the rounds so far imply: their sum, or, where the policy drew all of them for one
        top-k selection without ties, the KL of the composed selections.
        """
        progress, kl = self.progress, round_.decision.implied_kl
        if self.config.sample_from == "reference":
            return kl
        size = round_.groups[0].size
        k = self.config.acceptance_kwargs.get("k", max(1, round(size / 4)))
        progress.kl_rounds, progress.kl_sum = progress.kl_rounds + 1, progress.kl_sum + kl
        is_top_k = self.config.acceptance == "top_k" and k < size
        progress.kl_composes &= is_top_k and abs(kl - implied_kl(size, k)) < 1e-9
        return implied_kl(size, k, rounds=progress.kl_rounds) if progress.kl_composes else progress.kl_sum

    # Evaluation, logging, saving.

    def evaluate(self, prompts: Sequence[str] | None = None, reference: bool = False) -> Evaluation:
        """
        Draw one image of each prompt with seeds that depend on its place alone, and score it.

        Args:
            prompts (`Sequence[str]`, *optional*):
                Prompts; `config.eval_prompts` where not given.
            reference (`bool`, *optional*, defaults to `False`):
                Draw with the reference model in place of the policy.
        """
        prompts = list(prompts if prompts is not None else self.config.eval_prompts or [])
        if not prompts:
            raise ValueError("evaluate: no prompts given, and config.eval_prompts is empty.")
        groups = [Group(i, prompt, 1, {}) for i, prompt in enumerate(prompts)]
        samples = samples_of(groups, self.config.seed, "evaluation")
        own = samples[self._own_share(len(samples))]
        with self.sampler(reference):
            # A process without a share draws one too, because nothing has no shape.
            drawn, values = in_order(own or samples[:1], self.draw_and_score(own or samples[:1]))
        values = torch.tensor(gather_object(values[: len(own)].tolist()), dtype=torch.float64)
        reward = combined_rewards(values, [r.weight for r in self.rewards], groups)
        return Evaluation(reward, values, drawn.images[: len(own)])

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
        self.callbacks.state.log_history.append({**metrics, "step": self.progress.global_step})
        self.accelerator.log(metrics, step=self.progress.global_step)
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
        if not self.has_adapter:
            raise ValueError("save_model: with control_adapter=True there is no adapter before the first round.")
        if self.accelerator.is_main_process:
            save_pgraft_adapter(self.pipeline, folder, self.switch)

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
        facts = facts_of(self, dataset_name or self.publisher.dataset_id, tags)
        self.adapter_dir.mkdir(parents=True, exist_ok=True)
        if facts.prompts:
            before, after = (self._pictures(facts.prompts, reference) for reference in (True, False))
            before_after_grid(before, after, facts.prompts).save(self.adapter_dir / GRID_FILE)
        write_adapter_card(self.adapter_dir, self.publisher.model_id, facts, model_name)

    def _pictures(self, prompts: Sequence[str], reference: bool) -> torch.Tensor:
        """One unscored image of each prompt, drawn by this process alone with the seeds of an evaluation."""
        samples = samples_of([Group(i, p, 1, {}) for i, p in enumerate(prompts)], self.config.seed, "evaluation")
        with self.sampler(reference):
            return torch.cat([drawn.images for _, drawn in self._draw(samples)])

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
            adapter = ADAPTER_NAME if self.has_adapter else None
            save_checkpoint(folder, self.pipeline, self.switch, adapter, self.optimizer, self.progress, self._run())
            # `total_limit` is accelerate's name, with which DDPO's scripts set it.
            prune_checkpoints(folder, self.config.project_kwargs.get("total_limit", self.config.num_checkpoint_limit))
        self.accelerator.wait_for_everyone()
        self._forget_unfinished()
        self.callbacks.notify("on_save")

    def _run(self) -> dict[str, Any]:
        """What the run's result depends on."""
        values = self.config.shaping(self.accelerator.num_processes)
        rewards = {reward.name: reward.weight for reward in self.rewards}
        return {**values, "rewards": rewards, "model, scheduler and sampling arguments": self.fingerprint}

    def _begin(self) -> None:
        """Before the first round: a run that does not go on from another forgets what that has left."""
        if self.has_begun:
            return
        self.has_begun = True
        if not self.is_resumed:
            self._forget_unfinished()
        if self.accelerator.is_main_process:
            (self.output_dir / "metrics.jsonl").write_text("".join(map(_as_json, self.history)))

    def _forget_unfinished(self) -> None:
        if self.accelerator.is_local_main_process:
            shutil.rmtree(self.output_dir / UNFINISHED, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _resume(self, source: str | bool | None) -> None:
        self.is_resumed = bool(source)
        if source is True:
            folder = self.output_dir / "checkpoints"
            source = folder if checkpoints_in(folder) else None
        if not source:
            return
        checkpoint = find_checkpoint(source)
        with reading(checkpoint):
            check_same_run(checkpoint, self._run())
            self.progress = load_progress(checkpoint)
            if (checkpoint / "adapter_config.json").is_file():
                if self.has_adapter:
                    self.denoiser.delete_adapters(ADAPTER_NAME)
                load_adapter_weights(self.denoiser, checkpoint, ADAPTER_NAME)
            if self.optimizer is not None:
                # The optimizer must hold the parameters that were loaded, not those they replaced.
                self.optimizer = make_optimizer(adapter_parameters(self.denoiser, ADAPTER_NAME), self.config)
                load_optimizer(checkpoint, self.optimizer)


def _as_json(metrics: dict[str, float]) -> str:
    """A line of JSON, which has no numbers that are not finite: they become null."""
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return json.dumps(finite) + "\n"


def _checked_pipeline(sd_pipeline: Any) -> Any:
    if sd_pipeline is None:
        raise ValueError("sd_pipeline is required: the diffusers pipeline to fine-tune.")
    return getattr(sd_pipeline, "sd_pipeline", sd_pipeline)


def _hand_over(switch: SwitchLevel, sd_pipeline: Any) -> None:
    """Tell a pipeline that samples with its adapter where that switches, unless it was trained for another level."""
    known = getattr(sd_pipeline, "switch", None)
    if known is not None and known.switch_timestep != switch.switch_timestep:
        raise ValueError(
            f"sd_pipeline: its adapter switches at timestep {known.switch_timestep}, this configuration at "
            f"{switch.switch_timestep}. Keep the tuned_fraction and sample_num_steps that it was trained with."
        )
    if hasattr(sd_pipeline, "switch"):
        sd_pipeline.switch = switch
