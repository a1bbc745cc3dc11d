# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from PIL import Image

from trl_pgraft.pipelines.fingerprint import fingerprint_of
from trl_pgraft.rewards import Patience, RewardError, Scorer, trl_reward
from trl_pgraft.rollouts.batch import Drawn, collate
from trl_pgraft.rollouts.cache import UnfinishedRound
from trl_pgraft.rollouts.collect import draw_and_score
from trl_pgraft.rollouts.prompts import form_groups, samples_of


def samples(count=8, prompts=("a cat", "a dog")):
    source = iter([(prompt, {"number": i}) for i, prompt in enumerate(prompts)])
    return samples_of(form_groups(source, count, count // len(prompts)), 0, 0)


class Draw:
    """Draws in batches what depends on each sample's seed alone, and notes what it was asked for."""

    def __init__(self, batch_size=3, fails_after=100):
        self.batch_size, self.fails_after, self.asked = batch_size, fails_after, []

    def __call__(self, wanted):
        self.asked.append(list(wanted))
        for start in range(0, len(wanted), self.batch_size):
            if start // self.batch_size == self.fails_after:
                raise KeyboardInterrupt
            batch = wanted[start : start + self.batch_size]
            noise = [torch.Generator().manual_seed(sample.seed) for sample in batch]
            states = torch.stack([torch.randn(2, 4, generator=generator) for generator in noise])
            images = torch.stack([torch.randint(256, (3, 2, 2), generator=g, dtype=torch.uint8) for g in noise])
            yield batch, Drawn(images, states, 7 * len(batch))


def redness(*, prompts, images: list[Image.Image], number):
    return [float(image.getpixel((0, 0))[0]) + n for image, n in zip(images, number, strict=True)]


def go(folder, wanted, draw, reward=redness, drawn_by="policy", workers=0):
    unfinished = UnfinishedRound(folder, drawn_by, [reward.__name__]) if folder else None
    batches = draw_and_score(wanted, draw, Scorer([trl_reward(reward)], Patience(0), workers), unfinished)
    return collate(wanted, batches)


def assert_equal(found, expected):
    (drawn, values), (other, others) = found, expected
    assert torch.equal(drawn.images, other.images) and torch.equal(drawn.x_i, other.x_i)
    assert torch.equal(values, others) and drawn.denoiser_calls == other.denoiser_calls


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fails_after", [0, 1, 2])
def test_what_was_drawn_is_not_drawn_again(tmp_path, fails_after, workers):
    wanted, again = samples(), Draw()
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, wanted, Draw(fails_after=fails_after), workers=workers)
    found = go(tmp_path, wanted, again, workers=workers)
    assert again.asked == [wanted[3 * fails_after :]]
    assert_equal(found, go(None, wanted, Draw()))


def test_what_was_scored_is_not_scored_again(tmp_path):
    wanted, asked = samples(), []

    def fails_at_the_dog(*, prompts, images, number):
        asked.append(prompts)
        if "a dog" in prompts and len(asked) < 3:
            raise ConnectionError("gone")
        return redness(prompts=prompts, images=images, number=number)

    with pytest.raises(RewardError):
        go(tmp_path, wanted, Draw(), reward=fails_at_the_dog)
    found = go(tmp_path, wanted, Draw(), reward=fails_at_the_dog)
    assert_equal(found, go(None, wanted, Draw()))
    assert [len(prompts) for prompts in asked] == [3, 3, 3, 2], "the first batch once, the second again, the third"


def test_a_batch_that_nobody_scored_is_scored(tmp_path):
    wanted = samples()
    go(tmp_path, wanted, Draw())
    for path in list(tmp_path.glob("values-*"))[:2]:
        path.unlink()
    again = Draw()
    assert_equal(go(tmp_path, wanted, again), go(None, wanted, Draw()))
    assert again.asked == [[]]


@pytest.mark.parametrize("change", ["policy", "prompts"])
def test_samples_of_another_policy_or_prompt_are_drawn_anew(tmp_path, change):
    go(tmp_path, samples(), Draw())
    wanted = samples(prompts=("a cat", "an ant")) if change == "prompts" else samples()
    again = Draw()
    found = go(tmp_path, wanted, again, drawn_by="another" if change == "policy" else "policy")
    assert again.asked == [wanted[4:] if change == "prompts" else wanted]
    expected = go(None, wanted, Draw())
    assert torch.equal(found[0].x_i, expected[0].x_i) and torch.equal(found[1], expected[1])


def test_values_of_another_reward_are_not_taken(tmp_path):
    wanted, again = samples(), Draw()
    go(tmp_path, wanted, Draw())

    def blueness(*, prompts, images, number):
        return [float(image.getpixel((0, 0))[2]) for image in images]

    found = go(tmp_path, wanted, again, reward=blueness)
    assert again.asked == [[]] and not torch.equal(found[1], go(None, wanted, Draw())[1])


def test_two_processes_take_over_from_one(tmp_path):
    wanted = samples()
    go(tmp_path, wanted, Draw(batch_size=8))
    halves = []
    for part in (wanted[:4], wanted[4:]):
        again = Draw()
        halves.append(go(tmp_path, part, again))
        assert again.asked == [[]]
    expected = go(None, wanted, Draw())
    assert torch.equal(torch.cat([drawn.x_i for drawn, _ in halves]), expected[0].x_i)
    assert sum(drawn.denoiser_calls for drawn, _ in halves) == expected[0].denoiser_calls


def test_a_file_that_was_cut_off_is_not_there(tmp_path):
    """A file has its name only when it is whole; what is left of one that was being written is passed over."""
    wanted = samples()
    go(tmp_path, wanted, Draw())
    whole = sorted(tmp_path.glob("images-*"))[0]
    whole.with_suffix(".tmp").write_bytes(whole.read_bytes()[:50])
    whole.unlink()
    again = Draw()
    assert_equal(go(tmp_path, wanted, again), go(None, wanted, Draw()))
    assert len(again.asked[0]) in (2, 3)


def test_what_two_processes_scored_of_one_batch_is_found_by_one(tmp_path):
    """One process draws a batch and is interrupted; two score a half each; then one goes on."""
    wanted = samples()
    for batch, drawn in Draw(batch_size=8)(wanted):
        UnfinishedRound(tmp_path, "policy", ["redness"]).keep_images(batch, drawn)
    for part in (wanted[:4], wanted[4:6]):
        go(tmp_path, part, Draw())
    again, asked = Draw(), []

    def counting(*, prompts, images, number):
        asked.extend(prompts)
        return redness(prompts=prompts, images=images, number=number)

    counting.__name__ = "redness"
    assert_equal(go(tmp_path, wanted, again, reward=counting), go(None, wanted, Draw(batch_size=8)))
    assert again.asked == [[]] and len(asked) == 2


@pytest.mark.parametrize("kind", ["images", "values"])
@pytest.mark.parametrize("left", [0, 5, 200])
def test_a_damaged_file_is_named_and_made_anew(tmp_path, kind, left):
    wanted = samples()
    go(tmp_path, wanted, Draw())
    damaged = sorted(tmp_path.glob(f"{kind}-*"))[0]
    damaged.write_bytes(damaged.read_bytes()[:left])
    again = Draw()
    with pytest.warns(UserWarning, match=f"{damaged.name} cannot be read"):
        found = go(tmp_path, wanted, again)
    assert_equal(found, go(None, wanted, Draw()))
    assert (len(again.asked[0]) > 0) == (kind == "images")


def test_nothing_but_safetensors_is_written(tmp_path):
    go(tmp_path, samples(), Draw())
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}


def test_the_fingerprint_of_tensors_tells_every_bit_and_the_names():
    tensors = {"a": torch.zeros(3), "b": torch.ones(2)}
    prints = {fingerprint_of(tensors), fingerprint_of({"a": torch.zeros(3), "c": torch.ones(2)})}
    prints |= {fingerprint_of({**tensors, "b": torch.nextafter(torch.ones(2), torch.zeros(2))}), fingerprint_of({})}
    assert len(prints) == 4 and fingerprint_of(dict(reversed(tensors.items()))) in prints
