# SPDX-License-Identifier: Apache-2.0

"""Draw a round: groups of samples of one prompt each, their images, and their trajectories' state at the switch."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, set_seed
from tqdm.auto import tqdm

from ..adapters.policy import Policy
from ..config import GraftConfig
from ..core.acceptance import get_acceptance
from ..core.seeding import seed_of
from ..pipelines.denoiser_call import DenoiserCall, denoiser_name_of
from ..pipelines.inputs import call_pipeline, inputs_of
from ..pipelines.observe import Trajectory, record_trajectory
from ..pipelines.pixels import to_pil, to_uint8
from ..rewards.conventions import Reward
from ..rewards.scorer import Patience, Scorer
from .batch import Batch, Drawn, collate
from .cache import UnfinishedRound
from .dataset import to_dataset
from .prompts import Prompt, PromptGroup, Sample, columns_of, form_groups, samples_of
from .selection import Rollout, accept, combined_rewards


@torch.no_grad()
def draw(
    pipeline: Any,
    call: DenoiserCall,
    samples: Sequence[Sample],
    position: int,
    batch_size: int,
    arguments: dict[str, Any],
    progress: bool = False,
) -> Iterator[tuple[Sequence[Sample], Drawn]]:
    """
    Draw samples with the pipeline as it is, batch by batch, and keep each trajectory's state at `position`.

    Args:
        pipeline (`DiffusionPipeline`):
            The pipeline; adapters and gates on it take part.
        call ([`DenoiserCall`]):
            How it calls its denoiser.
        samples (`Sequence[Sample]`):
            What to draw.
        position (`int`):
            Position of x_I among the sampler's steps; the number of steps is the final latents.
        batch_size (`int`):
            Images of one pipeline call.
        arguments (`dict`):
            From [`sampling_arguments`].
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Yields:
        `tuple[Sequence[Sample], Drawn]`: a batch of the samples, and what was drawn for them.
    """
    starts = range(0, len(samples), batch_size)
    for start in tqdm(starts, desc="sampling", leave=False, disable=not progress):
        batch = samples[start : start + batch_size]
        with record_trajectory(pipeline, call, position, len(batch)) as trajectory:
            inputs = [inputs_of(pipeline, s.group.columns, arguments) for s in batch]
            prompts, seeds = [s.group.prompt for s in batch], [s.seed for s in batch]
            output = call_pipeline(pipeline, prompts, seeds, {**arguments, "output_type": "pt"}, inputs)
        _check_trajectory(trajectory, pipeline)
        images = to_uint8(output.images if hasattr(output, "images") else output.frames).cpu()
        yield batch, Drawn(images, trajectory.x_i.float().cpu(), trajectory.denoiser_calls)


def _check_trajectory(trajectory: Trajectory, pipeline: Any) -> None:
    name = denoiser_name_of(pipeline)
    if trajectory.x_i is None:
        raise ValueError(
            f"{type(pipeline).__name__} made {len(trajectory.timesteps)} steps and none at position "
            f"{trajectory.step_index}, where its state was to be recorded. Does its `{name}` run at every step?"
        )
    if trajectory.steps_without:
        raise ValueError(
            f"{type(pipeline).__name__} made {trajectory.steps_without} of the first {trajectory.step_index} steps "
            f"without its `{name}`, which is what is tuned. Where another model takes over at low noise, choose a "
            "tuned_fraction that ends before it does."
        )


def draw_and_score(
    samples: Sequence[Sample],
    draw: Callable[[Sequence[Sample]], Iterable[tuple[Sequence[Sample], Drawn]]],
    scorer: Scorer,
    unfinished: UnfinishedRound | None = None,
) -> list[Batch]:
    """
    Images, states and rewards of `samples`, in batches.

    Args:
        samples (`Sequence[Sample]`):
            What is wanted.
        draw (`Callable`):
            Draws samples batch by batch, as [`~trl_pgraft.rollout.draw`].
        scorer ([`Scorer`]):
            Scores each batch while the next is drawn, if it has threads.
        unfinished ([`UnfinishedRound`], *optional*):
            Where batches are kept as soon as they are drawn and scored, and found again; nothing is kept without.
    """
    found = list(unfinished.load(samples)) if unfinished else []
    for batch, drawn, values in found:
        if values is None:
            _score(batch, drawn, scorer, unfinished)
    there = {sample.seed for batch, *_ in found for sample in batch}
    for batch, drawn in draw([sample for sample in samples if sample.seed not in there]):
        if unfinished:
            unfinished.keep_images(batch, drawn)
        _score(batch, drawn, scorer, unfinished)
        found.append((batch, drawn, None))
    new = iter(scorer.results())
    return [Batch(*part, values, []) if values is not None else Batch(*part, *next(new)) for *part, values in found]


def _score(batch: Sequence[Sample], drawn: Drawn, scorer: Scorer, unfinished: UnfinishedRound | None) -> None:
    def keep(values: torch.Tensor) -> None:
        if unfinished:
            unfinished.keep_values(batch, values)

    scorer.add(drawn.images, [sample.group.prompt for sample in batch], columns_of(batch), keep)


class RolloutCollector:
    """
    Draws the rounds of a run, each process its share.

    Args:
        policy ([`Policy`]):
            What draws.
        rewards (`Sequence[Reward]`):
            `F` rewards.
        prompt_source (`Callable` or `None`):
            `prompt_source(epoch, groups)` gives prompts with their columns; `None` where rounds are not drawn.
        config ([`GraftConfig`]):
            How.
        accelerator (`Accelerator`):
            The processes.
        output_dir (`Path`):
            Folder of the run: rounds are written to `samples` in it, and what no checkpoint has yet to `unfinished`.

    Raises:
        `ValueError`: a round has too few images for a selection.
    """

    def __init__(
        self,
        policy: Policy,
        rewards: Sequence[Reward],
        prompt_source: Callable | None,
        config: GraftConfig,
        accelerator: Accelerator,
        output_dir: Path,
    ):
        self.policy, self.rewards, self.prompt_source = policy, rewards, prompt_source
        self.config, self.accelerator = config, accelerator
        self.folder, self.unfinished = output_dir / "samples", output_dir / "unfinished"
        self.acceptance = get_acceptance(config.acceptance)
        self.images = config.sample_batch_size * config.sample_num_batches_per_epoch * accelerator.num_processes
        self.group_size = config.group_size(self.images)

    def groups(self, epoch: int) -> list[PromptGroup]:
        """Prompts of a round and the samples to be drawn for each, the same on all processes."""
        # With this seed, prompt functions that use global random state repeat themselves when a run is resumed.
        set_seed(seed_of(self.config.seed, "prompts", epoch) % 2**32)
        groups: list[Any] = [None]
        if self.accelerator.is_main_process:
            source = self.prompt_source(epoch, -(-self.images // self.group_size))
            groups = [form_groups(source, self.images, self.group_size)]
        return broadcast_object_list(groups)[0]

    def draw(self, epoch: int) -> tuple[Rollout, list[Batch]]:
        """
        Draw and score a round, and write it to disk.

        Returns:
            `tuple[Rollout, list[Batch]]`: the round of all processes, and this process's batches.
        """
        config = self.config
        groups = self.groups(epoch)
        samples = samples_of(groups, config.seed, epoch)
        own = samples[self._own_share(len(samples))]
        unfinished = UnfinishedRound(
            self.unfinished / f"round_{epoch:04d}", self.policy.sampled_by(), [reward.name for reward in self.rewards]
        )
        with self.policy.sampler(reference=config.sample_from == "reference"):
            batches = self.draw_and_score(own, unfinished)
        drawn, values = collate(own, batches)
        states, values = self._gather(drawn.x_i), self._gather(values)
        reward = self.combine(values, groups)
        seed = (config.seed, epoch, "accept")
        keys = self._duplicate_keys(own, drawn)
        decision = accept(reward, groups, self.acceptance, config.acceptance_kwargs, seed, keys)
        calls = int(self._gather(torch.tensor([drawn.denoiser_calls])).sum())
        round_ = Rollout(groups, samples, states, values, reward, decision, calls)
        self._keep(round_, drawn, epoch)
        return round_, batches

    def draw_evaluation(
        self, prompts: Sequence[Prompt], reference: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        One image of each prompt, with seeds that depend on its place alone.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: weighted rewards `(P,)` and values `(P, F)` of all
            processes, and the uint8 images of this one.
        """
        groups, samples = self._evaluated(prompts)
        own = samples[self._own_share(len(samples))]
        with self.policy.sampler(reference):
            # A process without a share draws one too, because nothing has no shape.
            drawn, values = collate(own or samples[:1], self.draw_and_score(own or samples[:1]))
        values = torch.tensor(gather_object(values[: len(own)].tolist()), dtype=torch.float64)
        return self.combine(values, groups), values, drawn.images[: len(own)]

    def draw_pictures(self, prompts: Sequence[Prompt], reference: bool) -> torch.Tensor:
        """The images of an evaluation, unscored and drawn by this process alone: uint8, `(P, 3, H, W)`."""
        _, samples = self._evaluated(prompts)
        with self.policy.sampler(reference):
            return torch.cat([drawn.images for _, drawn in self._draw(samples)])

    def _evaluated(self, prompts: Sequence[Prompt]) -> tuple[list[PromptGroup], list[Sample]]:
        groups = [PromptGroup(i, prompt, 1, columns) for i, (prompt, columns) in enumerate(prompts)]
        return groups, samples_of(groups, self.config.seed, "evaluation")

    def draw_and_score(self, samples: Sequence[Sample], unfinished: UnfinishedRound | None = None) -> list[Batch]:
        """Batches of images, states and rewards of some samples; with `unfinished`, on disk as they come."""
        scorer = self.make_scorer(self.config.async_reward_computation)
        return draw_and_score(samples, self._draw, scorer, unfinished)

    def _draw(self, samples: Sequence[Sample]) -> Iterator[tuple[Sequence[Sample], Drawn]]:
        policy, size = self.policy, self.config.sample_batch_size
        progress = self.accelerator.is_local_main_process
        return draw(policy.pipeline, policy.call, samples, policy.levels.step_index, size, policy.arguments, progress)

    def make_scorer(self, in_threads: bool = False) -> Scorer:
        """A scorer of this run's rewards, with threads where asked."""
        config = self.config
        patience = Patience(config.reward_retries, config.reward_retry_wait, config.reward_timeout)
        return Scorer(self.rewards, patience, config.max_workers if in_threads else 0)

    def combine(self, values: torch.Tensor, groups: Sequence[PromptGroup]) -> torch.Tensor:
        """Weighted sum `(N,)` of the rewards' values `(N, F)`, NaN where a sample is left out."""
        return combined_rewards(values, [reward.weight for reward in self.rewards], groups)

    def forget_unfinished(self) -> None:
        """Remove what no checkpoint has, because one has it now or because the run starts anew."""
        if self.accelerator.is_local_main_process:
            shutil.rmtree(self.unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _own_share(self, count: int) -> slice:
        share = -(-count // self.accelerator.num_processes)
        return slice(share * self.accelerator.process_index, share * (self.accelerator.process_index + 1))

    def _duplicate_keys(self, samples: Sequence[Sample], drawn: Drawn) -> list[Any] | None:
        """Keys that tell equal samples, gathered over the processes."""
        key = self.config.deduplicate_by
        if key is None:
            return None
        images = to_pil(drawn.images)
        return gather_object([key(image, s.group.prompt) for image, s in zip(images, samples, strict=True)])

    def _keep(self, round_: Rollout, drawn: Drawn, epoch: int) -> None:
        """Write this process's shard of the round as parquet."""
        own, policy = self._own_share(len(round_.samples)), self.policy
        named = {f"reward_{r.name}": round_.values[own, i].tolist() for i, r in enumerate(self.rewards)}
        rewards = {"reward": round_.reward[own].tolist(), **named}
        accepted = round_.decision.accepted[own].tolist()
        samples, t_i = round_.samples[own], policy.switch.state_timestep
        inputs = [policy.inputs_of(sample.group.columns) for sample in samples]
        dataset = to_dataset(samples, drawn, rewards, accepted, epoch, t_i, policy.fingerprint, inputs)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        folder = self.folder / f"round_{epoch:04d}"
        folder.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            # Of the same round, kept by another number of processes before a resume.
            for path in set(folder.glob("*.parquet")) - set(folder.glob(f"*-of-{world:05d}.parquet")):
                path.unlink()
        dataset.to_parquet(folder / f"samples-{rank:05d}-of-{world:05d}.parquet")

    def _gather(self, values: torch.Tensor) -> torch.Tensor:
        """Values of all processes, in their order, on the host."""
        return self.accelerator.gather(values.to(self.accelerator.device)).cpu()
