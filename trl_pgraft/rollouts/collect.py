# SPDX-License-Identifier: Apache-2.0

"""Collect rollouts: form groups of samples, sample and score each process's share, gather and select."""

import shutil
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed

from ..adapters.policy import Policy
from ..config import GraftConfig
from ..core.acceptance import get_acceptance
from ..core.atomic import atomic_save
from ..core.seeding import seed_of
from ..pipelines.pixels import to_pil
from ..rewards.registry import Reward
from ..rewards.scorer import Patience, score_all
from .cache import RolloutCache
from .columns import check_held_out_columns, check_inputs, check_names
from .dataset import to_dataset
from .prompts import Prompt, PromptGroup, PromptSource, Sample, form_groups, samples_of
from .rollout import Evaluation, Rollout, RolloutBatch
from .sampling import map_in_threads, sample_batches
from .selection import accept, duplicate_keys, total_rewards


class RolloutCollector:
    r"""
    Collects the rollouts of a run; each process samples and scores its share.

    Args:
        policy ([`Policy`]):
            The pipeline and adapter to sample with.
        rewards (`Sequence[Reward]`):
            The F reward functions with their weights.
        prompt_source (`Callable` or `None`):
            `prompt_source(epoch, groups)` yields a prompt with its columns for each of `groups` groups; see
            [`choose_prompts`]. `None` for a run on stored samples, which collects no rollouts.
        config ([`GraftConfig`]):
            Batch size, number of samples and acceptance rule, among others.
        accelerator (`Accelerator`):
            The processes that share the sampling.
        output_dir (`Path`):
            Folder of the run: rollouts are written to `samples` in it, and what no checkpoint has yet to `unfinished`.
    """

    def __init__(
        self,
        policy: Policy,
        rewards: Sequence[Reward],
        prompt_source: PromptSource | None,
        config: GraftConfig,
        accelerator: Accelerator,
        output_dir: Path,
    ) -> None:
        self.policy, self.prompt_source = policy, prompt_source
        self.rewards, self.reward_names = rewards, [reward.name for reward in rewards]
        self.weights, self.acceptance = [reward.weight for reward in rewards], get_acceptance(config.acceptance)
        self.config, self.accelerator = config, accelerator
        self.samples_dir, self.cache_dir = output_dir / "samples", output_dir / "unfinished"
        self.images = config.sample_batch_size * config.sample_num_batches_per_epoch * accelerator.num_processes
        self.group_size = config.group_size(self.images)

    def check_prompts(
        self, held_out: Sequence[Prompt], example: dict[str, Any], dataset: datasets.Dataset | None
    ) -> None:
        r"""
        Check, before anything is sampled, what the run's prompts have beside their text.

        Args:
            held_out (`Sequence[Prompt]`):
                Held-out prompts, with their columns.
            example (`dict[str, Any]`):
                Further columns of one prompt of training.
            dataset (`datasets.Dataset` or `None`):
                The data set that prompts come from, if they do; those that the configured iterations take are read.

        Raises:
            `ValueError`: see [`check_held_out_columns`], [`check_inputs`] and [`check_names`].
        """
        check_held_out_columns(self.policy, held_out, example)
        check_inputs(self.policy, held_out, "held-out prompts")
        if dataset is None or self.prompt_source is None:
            return
        check_names(self.policy.pipeline, dataset.column_names)
        if self.policy.inputs_of(example):
            wanted = min(len(dataset), self.config.num_epochs * -(-self.images // self.group_size))
            check_inputs(self.policy, self.prompt_source(0, wanted), "train_dataset")

    def groups(self, epoch: int) -> list[PromptGroup]:
        r"""
        The groups of an iteration, the same on all processes.

        Args:
            epoch (`int`):
                Number of the iteration.

        Raises:
            `ValueError`: the run has no source of prompts.
        """
        if self.prompt_source is None:
            raise ValueError("There are no prompts to sample images for: the trainer is on a samples_dataset.")
        # With this seed, prompt functions that use global random state repeat themselves when a run is resumed.
        set_seed(seed_of(self.config.seed, "prompts", epoch) % 2**32)
        groups: list[Any] = [None]
        if self.accelerator.is_main_process:
            prompts = self.prompt_source(epoch, -(-self.images // self.group_size))
            groups = [form_groups(prompts, self.images, self.group_size)]
        found = broadcast_object_list(groups)[0]
        # Again, because transforms compute another image each time, and runs go on for longer than they were to.
        check_inputs(self.policy, ((group.prompt, group.columns) for group in found), "train_dataset")
        return found

    def sample_rollout(self, epoch: int) -> tuple[Rollout, list[RolloutBatch]]:
        r"""
        Sample, score and select the samples of an iteration, and write them to disk.

        Args:
            epoch (`int`):
                Number of the iteration.

        Returns:
            `tuple[Rollout, list[RolloutBatch]]`: the rollout of all processes, and this process's batches.

        Raises:
            [`RewardError`]: a reward function failed.
        """
        config, groups = self.config, self.groups(epoch)
        samples = samples_of(groups, config.seed, first=epoch * self.images)
        own = samples[self._own_share(len(samples))]
        cache = RolloutCache(self.cache_dir / f"round_{epoch:04d}", self.policy.sampled_by(), self.reward_names)
        with self.policy.sampler(reference=config.sample_from == "reference"):
            batches = self.sample_and_score(own, cache)
        batch = RolloutBatch.collate(own, batches)
        states, rewards = gathered(self.accelerator, batch.x_i), gathered(self.accelerator, batch.rewards)
        total_reward = total_rewards(rewards, self.weights, groups)
        seed_parts, keys = (config.seed, epoch, "accept"), self._duplicate_keys(batch)
        selection = accept(total_reward, groups, self.acceptance, config.acceptance_kwargs, seed_parts, keys)
        calls = int(gathered(self.accelerator, torch.tensor([batch.denoiser_calls])).sum())
        rollout = Rollout(
            groups,
            samples,
            states,
            rewards,
            total_reward,
            *selection,
            calls,
            gathered(self.accelerator, batch.flagged),
        )
        self._save_samples(rollout, batch, epoch)
        return rollout, batches

    def evaluate(self, prompts: Sequence[Prompt], reference: bool) -> Evaluation:
        r"""
        Sample one image of each prompt, with seeds that depend on the prompt's index alone, and score it.

        Args:
            prompts (`Sequence[Prompt]`):
                P prompts with their columns.
            reference (`bool`):
                Sample with the reference model in place of the policy.

        Raises:
            `ValueError`: there are no prompts.
            [`RewardError`]: a reward function failed.
        """
        if not prompts:
            raise ValueError("evaluate: no prompts given, and neither eval_dataset nor config.eval_prompts has any.")
        check_inputs(self.policy, prompts, "evaluate")
        groups, samples = self._held_out(prompts)
        own = samples[self._own_share(len(samples))]
        with self.policy.sampler(reference):
            # A process without a share samples one too, because nothing has no shape.
            batch = RolloutBatch.collate(own or samples[:1], self.sample_and_score(own or samples[:1]))
        rewards = torch.tensor(gather_object(batch.rewards[: len(own)].tolist()), dtype=torch.float64)
        flagged = torch.tensor(gather_object(batch.flagged[: len(own)].tolist()))
        return Evaluation(total_rewards(rewards, self.weights, groups), rewards, batch.images[: len(own)], flagged)

    def sample_images(self, prompts: Sequence[Prompt], reference: bool) -> torch.Tensor:
        r"""
        The images of [`~RolloutCollector.evaluate`], unscored, and all of them sampled by this process.

        Args:
            prompts (`Sequence[Prompt]`):
                P prompts with their columns.
            reference (`bool`):
                Sample with the reference model in place of the policy.

        Returns:
            `torch.Tensor`: uint8 images (P, 3, H, W).
        """
        _, samples = self._held_out(prompts)
        with self.policy.sampler(reference):
            return torch.cat([batch.images for batch in self.sample(samples)])

    def _held_out(self, prompts: Sequence[Prompt]) -> tuple[list[PromptGroup], list[Sample]]:
        groups = [PromptGroup(i, prompt, 1, columns) for i, (prompt, columns) in enumerate(prompts)]
        return groups, samples_of(groups, self.config.seed, "evaluation")

    def sample_and_score(self, samples: Sequence[Sample], cache: RolloutCache | None = None) -> list[RolloutBatch]:
        r"""
        Scored batches of some samples: those that the cache has first, then those that are sampled now.

        With threads, a batch is scored while the next one is sampled.

        Args:
            samples (`Sequence[Sample]`):
                The samples wanted.
            cache ([`RolloutCache`], *optional*):
                Where batches are read from, and written to as soon as they are sampled and scored. `None` keeps
                nothing.

        Raises:
            [`RewardError`]: a reward function failed.
        """
        cached = list(cache.load(samples)) if cache else []
        found = {sample.seed for batch in cached for sample in batch.samples}

        def not_scored() -> Iterator[RolloutBatch]:
            yield from (batch for batch in cached if not batch.is_scored)
            for batch in self.sample([wanted for wanted in samples if wanted.seed not in found]):
                if cache:
                    cache.save_images(batch)
                yield batch

        def score(batch: RolloutBatch) -> RolloutBatch:
            scored = self.score_batch(batch)
            if cache:
                cache.save_rewards(batch.samples, scored.rewards)
            return scored

        workers = self.config.max_workers if self.config.async_reward_computation else 0
        return [batch for batch in cached if batch.is_scored] + map_in_threads(score, not_scored(), workers)

    def sample(self, samples: Sequence[Sample]) -> Iterator[RolloutBatch]:
        """Batches of `samples`, not scored, from the pipeline as it is; see [`sample_batches`]."""
        policy, size = self.policy, self.config.sample_batch_size
        index, progress = policy.levels.step_index, self.accelerator.is_local_main_process
        return sample_batches(policy.pipeline, policy.call, samples, index, size, policy.arguments, progress)

    def score_batch(self, batch: RolloutBatch) -> RolloutBatch:
        """A sampled batch with its rewards; those of flagged images are NaN."""
        kept = (batch.flagged != 1).expand(len(batch.samples))
        rewards, infos = torch.full((len(kept), len(self.rewards)), torch.nan, dtype=torch.float64), list[Any]()
        if kept.any():
            own = replace(batch, samples=[batch.samples[row] for row in kept.nonzero()])
            rewards[kept], infos = self.score(batch.images[kept], own.prompts, own.columns)
        return replace(batch, rewards=rewards, infos=infos)

    def score(
        self, images: torch.Tensor, prompts: list[str], columns: dict[str, list]
    ) -> tuple[torch.Tensor, list[Any]]:
        """Rewards (B, F) of B `images` with their `prompts` and further `columns`, and infos; see [`score_all`]."""
        config = self.config
        patience = Patience(config.reward_retries, config.reward_retry_wait, config.reward_timeout)
        return score_all(self.rewards, images, prompts, columns, patience)

    def clear_cache(self) -> None:
        """Remove what no checkpoint has, because one has it now or because the run starts anew."""
        if self.accelerator.is_local_main_process:
            shutil.rmtree(self.cache_dir, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _own_share(self, count: int) -> slice:
        share = -(-count // self.accelerator.num_processes)
        return slice(share * self.accelerator.process_index, share * (self.accelerator.process_index + 1))

    def _duplicate_keys(self, batch: RolloutBatch) -> list[Hashable] | None:
        """Keys that are the same for equal samples, gathered over the processes."""
        samples = zip(to_pil(batch.images), batch.prompts, strict=True)
        keys = duplicate_keys(self.config.deduplicate_by, samples)
        return None if keys is None else gather_object(keys)

    def _save_samples(self, rollout: Rollout, batch: RolloutBatch, epoch: int) -> None:
        """Write this process's shard of the rollout as parquet."""
        own, policy = self._own_share(len(rollout.samples)), self.policy
        total_reward, accepted = rollout.total_reward[own], rollout.accepted[own]
        t_i, inputs = policy.switch.state_timestep, [policy.inputs_of(s.group.columns) for s in batch.samples]
        names, fingerprint = self.reward_names, policy.fingerprint
        dataset = to_dataset(batch, names, total_reward, accepted, epoch, t_i, fingerprint, inputs)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        folder = self.samples_dir / f"round_{epoch:04d}"
        if rank == 0:
            # Of the same iteration, written by another number of processes before a resume.
            for path in set(folder.glob("*.parquet")) - set(folder.glob(f"*-of-{world:05d}.parquet")):
                path.unlink()
        with atomic_save(folder / f"samples-{rank:05d}-of-{world:05d}.parquet") as aside:
            dataset.to_parquet(aside)


def gathered(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """Values of all processes, in their order, on the host."""
    # As their bits, because not every device has float64.
    bits = values.view(torch.int64) if values.dtype == torch.float64 else values
    return accelerator.gather(bits.to(accelerator.device)).cpu().view(values.dtype)
