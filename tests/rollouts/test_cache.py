# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from trl_pgraft import GraftConfig
from trl_pgraft.pipelines.fingerprint import fingerprint_of
from trl_pgraft.rewards import RewardError, make_reward
from trl_pgraft.rollouts.cache import RolloutCache
from trl_pgraft.rollouts.collect import RolloutCollector
from trl_pgraft.rollouts.prompts import form_groups, samples_of
from trl_pgraft.rollouts.rollout import RolloutBatch


def samples(count=8, prompts=("a cat", "a dog")):
    source = iter([(prompt, {"number": i}) for i, prompt in enumerate(prompts)])
    return samples_of(form_groups(source, count, count // len(prompts)), 0)


class Sampler:
    """Samples in batches, by each sample's seed alone, and notes which samples were requested."""

    def __init__(self, batch_size=3, fails_after=100):
        self.batch_size, self.fails_after, self.requested = batch_size, fails_after, []

    def __call__(self, wanted):
        self.requested.append(list(wanted))
        for start in range(0, len(wanted), self.batch_size):
            if start // self.batch_size == self.fails_after:
                raise KeyboardInterrupt
            batch = wanted[start : start + self.batch_size]
            noise = [torch.Generator().manual_seed(sample.seed) for sample in batch]
            states = torch.stack([torch.randn(2, 4, generator=generator) for generator in noise])
            images = torch.stack([torch.randint(256, (3, 2, 2), generator=g, dtype=torch.uint8) for g in noise])
            yield RolloutBatch(batch, images, states, 7 * len(batch))


def redness(*, prompts, images: list[Image.Image], number):
    return [float(image.getpixel((0, 0))[0]) + n for image, n in zip(images, number, strict=True)]


def go(folder, wanted, sampler, reward=redness, sampled_by="policy", workers=0):
    cache = RolloutCache(folder, sampled_by, [reward.__name__]) if folder else None
    config = GraftConfig(async_reward_computation=workers > 0, max_workers=workers or 1, reward_retries=0)
    collector = RolloutCollector(None, [make_reward(reward)], None, config, Accelerator(cpu=True), Path())
    collector.sample = sampler
    return RolloutBatch.collate(wanted, collector.sample_and_score(wanted, cache))


def assert_equal(found, expected):
    assert torch.equal(found.images, expected.images) and torch.equal(found.x_i, expected.x_i)
    assert torch.equal(found.rewards, expected.rewards) and found.denoiser_calls == expected.denoiser_calls


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fails_after", [0, 1, 2])
def test_what_was_sampled_is_not_sampled_again(tmp_path, fails_after, workers):
    wanted, again = samples(), Sampler()
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, wanted, Sampler(fails_after=fails_after), workers=workers)
    found = go(tmp_path, wanted, again, workers=workers)
    assert again.requested == [wanted[3 * fails_after :]]
    assert_equal(found, go(None, wanted, Sampler()))


def test_what_was_scored_is_not_scored_again(tmp_path):
    wanted, scored = samples(), []

    def fails_at_the_dog(*, prompts, images, number):
        scored.append(prompts)
        if "a dog" in prompts and len(scored) < 3:
            raise ConnectionError("gone")
        return redness(prompts=prompts, images=images, number=number)

    with pytest.raises(RewardError):
        go(tmp_path, wanted, Sampler(), reward=fails_at_the_dog)
    found = go(tmp_path, wanted, Sampler(), reward=fails_at_the_dog)
    assert_equal(found, go(None, wanted, Sampler()))
    assert [len(prompts) for prompts in scored] == [3, 3, 3, 2], "the first batch once, the second again, the third"


def test_a_batch_that_nobody_scored_is_scored(tmp_path):
    wanted = samples()
    go(tmp_path, wanted, Sampler())
    for path in list(tmp_path.glob("values-*"))[:2]:
        path.unlink()
    again = Sampler()
    assert_equal(go(tmp_path, wanted, again), go(None, wanted, Sampler()))
    assert again.requested == [[]]


@pytest.mark.parametrize("change", ["policy", "prompts"])
def test_samples_of_another_policy_or_prompt_are_sampled_anew(tmp_path, change):
    go(tmp_path, samples(), Sampler())
    wanted = samples(prompts=("a cat", "an ant")) if change == "prompts" else samples()
    again = Sampler()
    found = go(tmp_path, wanted, again, sampled_by="another" if change == "policy" else "policy")
    assert again.requested == [wanted[4:] if change == "prompts" else wanted]
    expected = go(None, wanted, Sampler())
    assert torch.equal(found.x_i, expected.x_i) and torch.equal(found.rewards, expected.rewards)


def test_rewards_of_another_function_are_not_loaded(tmp_path):
    wanted, again = samples(), Sampler()
    go(tmp_path, wanted, Sampler())

    def blueness(*, prompts, images, number):
        return [float(image.getpixel((0, 0))[2]) for image in images]

    found = go(tmp_path, wanted, again, reward=blueness)
    assert again.requested == [[]] and not torch.equal(found.rewards, go(None, wanted, Sampler()).rewards)


def test_two_processes_continue_from_one(tmp_path):
    wanted = samples()
    go(tmp_path, wanted, Sampler(batch_size=8))
    halves = []
    for part in (wanted[:4], wanted[4:]):
        again = Sampler()
        halves.append(go(tmp_path, part, again))
        assert again.requested == [[]]
    expected = go(None, wanted, Sampler())
    assert torch.equal(torch.cat([half.x_i for half in halves]), expected.x_i)
    assert sum(half.denoiser_calls for half in halves) == expected.denoiser_calls


def test_a_file_that_was_cut_off_is_not_there(tmp_path):
    """A file has its name only when it is whole; what is left of one that was being written is passed over."""
    wanted = samples()
    go(tmp_path, wanted, Sampler())
    whole = sorted(tmp_path.glob("images-*"))[0]
    whole.with_name(f".{whole.name}.tmp").write_bytes(whole.read_bytes()[:50])
    whole.unlink()
    again = Sampler()
    assert_equal(go(tmp_path, wanted, again), go(None, wanted, Sampler()))
    assert len(again.requested[0]) in (2, 3)


def test_what_two_processes_scored_of_one_batch_is_found_by_one(tmp_path):
    """One process samples a batch and is interrupted; two score a half each; then one continues."""
    wanted = samples()
    for batch in Sampler(batch_size=8)(wanted):
        RolloutCache(tmp_path, "policy", ["redness"]).save_images(batch)
    for part in (wanted[:4], wanted[4:6]):
        go(tmp_path, part, Sampler())
    again, scored = Sampler(), []

    def counting(*, prompts, images, number):
        scored.extend(prompts)
        return redness(prompts=prompts, images=images, number=number)

    counting.__name__ = "redness"
    assert_equal(go(tmp_path, wanted, again, reward=counting), go(None, wanted, Sampler(batch_size=8)))
    assert again.requested == [[]] and len(scored) == 2


@pytest.mark.parametrize("kind", ["images", "values"])
@pytest.mark.parametrize("left", [0, 5, 200])
def test_a_damaged_file_is_named_and_made_anew(tmp_path, kind, left):
    wanted = samples()
    go(tmp_path, wanted, Sampler())
    damaged = sorted(tmp_path.glob(f"{kind}-*"))[0]
    damaged.write_bytes(damaged.read_bytes()[:left])
    again = Sampler()
    with pytest.warns(UserWarning, match=f"{damaged.name} cannot be read"):
        found = go(tmp_path, wanted, again)
    assert_equal(found, go(None, wanted, Sampler()))
    assert (len(again.requested[0]) > 0) == (kind == "images")


def test_nothing_but_safetensors_is_written(tmp_path):
    go(tmp_path, samples(), Sampler())
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}


def test_the_fingerprint_of_tensors_depends_on_every_bit_and_the_names():
    tensors = {"a": torch.zeros(3), "b": torch.ones(2)}
    prints = {fingerprint_of(tensors), fingerprint_of({"a": torch.zeros(3), "c": torch.ones(2)})}
    prints |= {fingerprint_of({**tensors, "b": torch.nextafter(torch.ones(2), torch.zeros(2))}), fingerprint_of({})}
    assert len(prints) == 4 and fingerprint_of(dict(reversed(tensors.items()))) in prints
