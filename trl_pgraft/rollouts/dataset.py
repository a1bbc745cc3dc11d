# SPDX-License-Identifier: Apache-2.0

"""Rollouts as data sets of samples, written and read, with the fingerprint of what they were sampled with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import datasets
import torch
from accelerate import Accelerator

from ..config import GraftConfig
from ..core.acceptance import get_acceptance
from ..pipelines.pixels import as_image, to_pil
from ..rewards.registry import Reward
from .prompts import Prompt, PromptGroup, Sample
from .rollout import Rollout, RolloutBatch
from .selection import accept_rounds, duplicate_keys, total_rewards


# Prefix of the columns with a prompt's own inputs; without it, an input `image` would be taken for a sample.
INPUT_PREFIX = "input_"
SAMPLE_COLUMNS = ("prompt", "image", "reward", "accepted", "round", "group", "seed", "x_I", "t_I", "fingerprint")


def check_samples(
    dataset: datasets.Dataset | datasets.DatasetDict | None,
    has_fingerprint: Callable[[str], bool],
    names: Sequence[str],
) -> datasets.Dataset | None:
    r"""
    The samples to train on in the order of their groups, checked against the model that is to be trained; `None` for a
    run that samples.

    Args:
        dataset (`datasets.Dataset`, `datasets.DatasetDict` of one split, or `None`):
            Samples of one or several iterations, as a run has written them; `None` for a run that samples.
        has_fingerprint (`Callable[[str], bool]`):
            Whether a stored fingerprint is that of the present model, scheduler and sampling arguments.
        names (`Sequence[str]`):
            Names of the rewards whose columns are read.

    Raises:
        `ValueError`: columns are missing, there are no rows or several splits, or the fingerprint is another one.
    """
    if dataset is None:
        return None
    if isinstance(dataset, dict):
        if len(dataset) != 1:
            raise ValueError(f"samples_dataset has the splits {', '.join(dataset)}; give one of them.")
        (dataset,) = dataset.values()
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(f"samples_dataset is a {type(dataset).__name__}; load it without streaming.")
    needed = [*SAMPLE_COLUMNS, *(f"reward_{name}" for name in names)]
    missing = [name for name in needed if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"samples_dataset has no column {', '.join(missing)}; it has {', '.join(dataset.column_names)}. It must "
            "be what a run with these rewards kept, in samples/ of its output folder or on the Hub."
        )
    found = set(dataset["fingerprint"])
    if not found:
        raise ValueError("samples_dataset is empty: there is nothing to train on.")
    if not all(map(has_fingerprint, map(str, found))):
        raise ValueError(
            "samples_dataset was sampled from another model (denoiser, text encoders, VAE or other weights, also the "
            "same ones in another precision), scheduler, guidance or tuned_fraction (fingerprint "
            f"{', '.join(sorted(map(str, found)))}, which is not this configuration's). Train with the pipeline and "
            "the configuration that it was sampled with."
        )
    keys = list(zip(dataset["round"], dataset["group"], dataset["prompt"], strict=True))
    return dataset if keys == sorted(keys) else dataset.select(sorted(range(len(keys)), key=keys.__getitem__))


def example_columns(dataset: datasets.Dataset | None) -> dict[str, Any]:
    """
    Further columns of one prompt of a data set of prompts or samples; of samples, the pipeline's inputs.

    It is the first one that has all of them, among the first 99, so that the pipeline can be called with them.
    """
    if not isinstance(dataset, datasets.Dataset) or not len(dataset):
        return {}
    rows = map(dataset.__getitem__, range(min(99, len(dataset))))
    row = next((row for row in rows if None not in row.values()), dataset[0])
    return _without_prefix(row) if "x_I" in row else row


def prompts_of_samples(samples: datasets.Dataset) -> Iterator[Prompt]:
    """The prompt of each group of `samples`, with the inputs that the pipeline was given beside it."""
    kept = samples.select_columns([n for n in samples.column_names if n == "prompt" or n.startswith(INPUT_PREFIX)])
    first = {group: i for i, group in reversed(list(enumerate(zip(samples["round"], samples["group"], strict=True))))}
    for row in sorted(first.values()):
        yield kept[row]["prompt"], _without_prefix(kept[row])


def rollout_from_dataset(dataset: datasets.Dataset, names: Sequence[str]) -> Rollout:
    r"""
    The rollout that is stored in a data set of samples as it was decided then; its iterations are taken together as
    one.

    Args:
        dataset (`datasets.Dataset`):
            Samples of one or several iterations, in any order; see [`to_dataset`] for its columns.
        names (`Sequence[str]`):
            Names of the F rewards to read, in their order.
    """
    inputs = [name for name in dataset.column_names if name.startswith(INPUT_PREFIX)]
    # By way of pandas, because the numpy format makes rewards float32.
    table = dataset.remove_columns(["image", "x_I", *inputs]).to_pandas()
    # The numbers of groups start anew in each iteration.
    members: dict[tuple[int, int, str], list[int]] = {}
    for row, key in enumerate(zip(table["round"], table["group"], table["prompt"], strict=True)):
        members.setdefault(key, []).append(row)
    stored = dataset.select_columns(inputs) if inputs else [{}] * len(dataset)
    groups = [
        PromptGroup(i, prompt, len(rows), _without_prefix(stored[rows[0]]))
        for i, ((*_, prompt), rows) in enumerate(members.items())
    ]
    order = [row for rows in members.values() for row in rows]
    seeds = iter(table["seed"][order])
    states = torch.as_tensor(dataset.select_columns("x_I").with_format("numpy")[:]["x_I"])

    def column(name: str) -> torch.Tensor:
        return torch.tensor(table[name].to_numpy())[order]

    return Rollout(
        groups,
        [Sample(group, i, int(next(seeds))) for group in groups for i in range(group.size)],
        states[order],
        torch.stack([column(f"reward_{name}") for name in names], 1) if names else torch.empty(len(order), 0),
        column("reward"),
        column("accepted"),
    )


def stored_rollout(
    dataset: datasets.Dataset | None, rewards: Sequence[Reward], config: GraftConfig, accelerator: Accelerator
) -> Rollout | None:
    r"""
    The rollout of stored samples, decided anew by the configuration's acceptance, weights and de-duplication.

    Args:
        dataset (`datasets.Dataset` or `None`):
            Samples of one or several iterations, from [`check_samples`]; `None` for a run that samples.
        rewards (`Sequence[Reward]`):
            The F reward functions, whose stored rewards are read by their names and weighted; with none of them, the
            stored sum decides.
        config ([`GraftConfig`]):
            Acceptance rule, de-duplication, and the seed: an iteration that was sampled with it is decided alike.
        accelerator (`Accelerator`):
            Prints in one process what was decided, and by what.

    Returns:
        `Rollout` or `None`: of all iterations together; `None` without samples.

    Raises:
        `ValueError`: the acceptance rule does not fit the stored groups.
    """
    if dataset is None:
        return None
    stored = rollout_from_dataset(dataset, [reward.name for reward in rewards])
    total = stored.total_reward
    if rewards:
        total = total_rewards(stored.rewards, [reward.weight for reward in rewards], stored.groups)
    samples = ((as_image(row["image"], "image"), row["prompt"]) for row in dataset)
    keys = duplicate_keys(config.deduplicate_by, samples)
    rule, kwargs, named = get_acceptance(config.acceptance), config.acceptance_kwargs, config.to_dict()["acceptance"]
    try:
        accepted, kl, skipped = accept_rounds(total, stored.groups, dataset["round"], rule, kwargs, config.seed, keys)
    except ValueError as error:
        raise ValueError(f"samples_dataset: acceptance={named!r} does not fit it: {error}") from error
    counted = " + ".join(f"{reward.weight:g} * {reward.name}" for reward in rewards) or "the stored reward"
    accelerator.print(
        f"Stored samples are decided anew: acceptance {named} {kwargs} of {counted}"
        f"{', without duplicates' if keys else ''}. {accepted.sum()} of {len(total)} are accepted; "
        f"{stored.accepted.sum()} were when they were stored."
    )
    return replace(stored, total_reward=total, accepted=accepted, implied_kl=kl, groups_skipped=skipped)


def to_dataset(
    batch: RolloutBatch,
    names: Sequence[str],
    total_reward: torch.Tensor,
    accepted: torch.Tensor,
    epoch: int,
    state_timestep: float | None,
    fingerprint: str,
    inputs: Sequence[dict[str, Any]] = (),
) -> datasets.Dataset:
    r"""
    Scored samples as a data set with the columns `SAMPLE_COLUMNS`, one for each reward, and one for each input.

    Args:
        batch ([`RolloutBatch`]):
            B samples with their images, states and rewards (B, F).
        names (`Sequence[str]`):
            Names of the F rewards, for columns `reward_<name>`.
        total_reward (`torch.Tensor`):
            (B,), NaN where a sample is left out; column `reward`.
        accepted (`torch.Tensor`):
            Which samples are accepted (B,), bool.
        epoch (`int`):
            Number of the iteration; column `round`.
        state_timestep (`float` or `None`):
            Training timestep of x_I; `None` for final latents. Column `t_I`.
        fingerprint (`str`):
            Fingerprint of model, scheduler and sampling arguments, from [`sampling_fingerprint`].
        inputs (`Sequence[dict[str, Any]]`, *optional*, defaults to `()`):
            What the pipeline was given for each sample beside its prompt, for columns `input_<name>`.
    """
    count, samples, x_i = len(batch.samples), batch.samples, batch.x_i
    array = {2: datasets.Array2D, 3: datasets.Array3D, 4: datasets.Array4D, 5: datasets.Array5D}[x_i.ndim - 1]
    image = datasets.Image() if batch.images.ndim == 4 else datasets.List(datasets.Image())
    rewards = {"reward": total_reward, **{f"reward_{n}": batch.rewards[:, i] for i, n in enumerate(names)}}
    columns = {
        "prompt": (datasets.Value("string"), batch.prompts),
        "image": (image, to_pil(batch.images)),
        **{name: (datasets.Value("float64"), values.tolist()) for name, values in rewards.items()},
        "accepted": (datasets.Value("bool"), accepted.tolist()),
        "round": (datasets.Value("int64"), [epoch] * count),
        "group": (datasets.Value("int64"), [sample.group.index for sample in samples]),
        "seed": (datasets.Value("int64"), [sample.seed for sample in samples]),
        "x_I": (array(shape=tuple(x_i.shape[1:]), dtype="float32"), list(x_i.numpy())),
        "t_I": (datasets.Value("float64"), [state_timestep] * count),
        "fingerprint": (datasets.Value("string"), [fingerprint] * count),
    }
    features = datasets.Features({name: feature for name, (feature, _) in columns.items()})
    dataset = datasets.Dataset.from_dict({n: values for n, (_, values) in columns.items()}, features=features)
    given = dict.fromkeys(name for row in inputs for name in row)
    own = {INPUT_PREFIX + name: [_storable(row.get(name)) for row in inputs] for name in given}
    return datasets.concatenate_datasets([dataset, datasets.Dataset.from_dict(own)], axis=1) if own else dataset


def _without_prefix(row: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(INPUT_PREFIX): value for name, value in row.items() if name.startswith(INPUT_PREFIX)}


def _storable(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value
