# SPDX-License-Identifier: Apache-2.0

import asyncio
import errno
import functools
import http.client
import http.server
import io
import json
import math
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request

import httpx
import huggingface_hub
import numpy as np
import pytest
import requests
import torch
from PIL import Image

from trl_pgraft.rewards import (
    Patience,
    RewardError,
    get_reward,
    jpeg_compressibility,
    list_rewards,
    make_reward,
    register_reward,
    registry as functions,
    score,
    score_all,
)
from trl_pgraft.rewards.registry import choose_rewards
from trl_pgraft.rollouts.sampling import map_in_threads


PROMPTS = ["a cat", "a dog", "a car"]
ddpo_reward = functools.partial(make_reward, convention="ddpo")


def batch(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)


def table_of(reward, images=None):
    """Rewards (3, 1) of a batch by one reward function that is called once."""
    return score_all([reward], batch() if images is None else images, PROMPTS, {}, Patience(0))[0]


def redness(*, prompts, images, **columns):
    return [float(np.asarray(image)[..., 0].mean()) for image in images]


async def redness_later(*, prompts, images, **columns):
    await asyncio.sleep(0)
    return redness(prompts=prompts, images=images)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(functions, "_REGISTRY", dict(functions._REGISTRY))


def test_a_reward_in_ddpos_convention_gets_what_ddpo_gives():
    seen = {}

    def brightness(images, prompts, metadata):
        seen.update(images=images, prompts=prompts, metadata=metadata)
        return images.mean((1, 2, 3)), {"note": 1}

    images, metadata = batch(), [{"a": 1}, {"a": 2}, {"a": 3}]
    values, info = score(ddpo_reward(brightness), images, PROMPTS, {"metadata": metadata})
    assert seen["prompts"] == tuple(PROMPTS) and seen["metadata"] == tuple(metadata)
    torch.testing.assert_close(seen["images"], images / 255)
    assert values == pytest.approx((images / 255).mean((1, 2, 3)).tolist()) and info == {"note": 1}
    assert ddpo_reward(brightness).name == "brightness"


@pytest.mark.parametrize(
    "returned", [[0.5, 1, 2], (0.5, 1, 2), np.array([0.5, 1, 2]), torch.tensor([[0.5], [1.0], [2.0]])]
)
def test_ddpo_rewards_may_be_of_any_array_type(returned):
    assert score(ddpo_reward(lambda *_: (returned, {})), batch(), PROMPTS, {})[0] == [0.5, 1.0, 2.0]


def test_rewards_keep_their_precision():
    """A threshold of 0.7 must not refuse a reward of 0.7."""
    assert score(ddpo_reward(lambda *_: ([0.7, 0.1, 0.3], {})), batch(), PROMPTS, {})[0] == [0.7, 0.1, 0.3]


def test_a_ddpo_reward_may_leave_samples_out():
    assert score(ddpo_reward(lambda *_: ([0.5, None, 2.0], {})), batch(), PROMPTS, {})[0] == [0.5, None, 2.0]


def test_a_ddpo_reward_without_its_info_gets_an_error_that_names_what_is_expected():
    reward = ddpo_reward(lambda images, prompts, metadata: images.mean((1, 2, 3))[:2])
    with pytest.raises(RewardError, match=r"a tuple \(rewards, info\) is expected"):
        score(reward, batch(), PROMPTS, {}, Patience(0))


def test_a_ddpo_reward_without_metadata_gets_empty_ones():
    reward = ddpo_reward(lambda images, prompts, metadata: ([len(m) for m in metadata], {}))
    assert score(reward, batch(), PROMPTS, {})[0] == [0, 0, 0]


@pytest.mark.parametrize("function", [redness, redness_later])
def test_a_reward_in_trls_convention_gets_pil_images_and_columns(function):
    images, seen = batch(), {}

    def spy(*, prompts, images, **columns):
        seen.update(prompts=prompts, images=images, columns=columns)
        return function(prompts=prompts, images=images)

    values, _ = score(make_reward(spy), images, PROMPTS, {"number": [1, 2, 3]})
    assert values == pytest.approx(images[:, 0].float().mean((1, 2)).tolist())
    assert seen["prompts"] == PROMPTS and seen["columns"] == {"number": [1, 2, 3]}
    assert all(isinstance(image, Image.Image) for image in seen["images"])
    assert np.array_equal(np.asarray(seen["images"][1]), images[1].permute(1, 2, 0).numpy())


def test_async_rewards_work_in_a_notebook():
    """There the calling thread runs an event loop already."""

    async def cell():
        return score(make_reward(redness_later), batch(), PROMPTS, {}, Patience(0))[0]

    assert asyncio.run(cell()) == pytest.approx(batch()[:, 0].float().mean((1, 2)).tolist())


def test_async_rewards_work_in_threads():
    tables = map_in_threads(lambda seed: table_of(make_reward(redness_later), batch(seed=seed)), range(4), workers=2)
    for seed, values in enumerate(tables):
        assert values[:, 0].tolist() == pytest.approx(batch(seed=seed)[:, 0].float().mean((1, 2)).tolist())


def test_none_leaves_a_sample_out():
    values, _ = score(make_reward(lambda *, prompts, images: [1.0, None, 0.0]), batch(), PROMPTS, {})
    assert values == [1.0, None, 0.0]
    table = table_of(make_reward(lambda *, prompts, images: [1.0, None, 0.0]))
    assert table[[0, 2], 0].tolist() == [1.0, 0.0] and table[1, 0].isnan()


def test_a_registered_reward_is_found_by_its_name(registry):
    register_reward("red")(redness)
    assert get_reward("red") is redness and "red" in list_rewards()
    assert make_reward("red", 2.0).name == "red" and make_reward("red", 2.0).weight == 2.0
    assert make_reward(redness).name == "redness"


def test_a_reward_can_be_imported():
    assert get_reward("trl_pgraft.rewards.jpeg:jpeg_compressibility") is jpeg_compressibility
    assert make_reward("trl_pgraft.rewards.jpeg:jpeg_compressibility").name == "jpeg_compressibility"


@pytest.mark.parametrize(
    "name, message",
    [
        ("no_such_reward", "reward_funcs: no reward is registered as 'no_such_reward'.*jpeg_compressibility"),
        ("no_such_module:f", "reward_funcs: 'no_such_module:f' cannot be imported"),
        ("trl_pgraft.rewards:no_such_function", "reward_funcs.*cannot be imported.*no_such_function"),
        (3, r"reward_funcs: 3 \(int\) is neither a function nor a name"),
        (None, r"reward_funcs: None \(NoneType\) is neither"),
    ],
)
def test_an_unknown_reward_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        make_reward(name)


def test_jpeg_compressibility_is_minus_the_kilobytes():
    plain, noisy = (Image.fromarray(array) for array in (np.zeros((64, 64, 3), np.uint8), _noise(64)))
    values = jpeg_compressibility(images=[plain, noisy], prompts=["", ""], anything=[1, 2])
    buffer = io.BytesIO()
    noisy.save(buffer, format="JPEG", quality=95)
    assert values[1] == -len(buffer.getvalue()) / 1000
    assert values[0] > values[1]
    assert jpeg_compressibility(images=[plain.convert("RGBA")]) == [values[0]]


def _noise(size):
    return np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)


@pytest.mark.parametrize("returned", [[1.0], [1.0] * 4, torch.ones(1), []])
@pytest.mark.parametrize("make", [ddpo_reward, make_reward])
def test_a_wrong_number_of_values_is_an_error(make, returned):
    def short(*args, **kwargs):
        return (returned, {}) if make is ddpo_reward else returned

    with pytest.raises(RewardError, match=r"Reward 'short' on prompts \['a cat'.*returned \d values for 3 images"):
        score(make(short), batch(), PROMPTS, {})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_an_error(value):
    def broken(*, prompts, images):
        return [1.0, value, 2.0]

    with pytest.raises(RewardError, match="Reward 'broken'.*returned .*(nan|inf) for 'a dog'.*None"):
        score(make_reward(broken), batch(), PROMPTS, {})


NOT_REWARDS = {
    "None": (None, "returned None, a NoneType; a list, tuple, array or tensor"),
    "a number": (3.0, "returned 3.0, a float; a list"),
    "a string": ("123", "returned '123', a str; a list"),
    "bytes": (b"123", "returned b'123', a bytes; a list"),
    "a dict": ({1.0: "a", 2.0: "b", 3.0: "c"}, "returned {1.0: 'a', .*a dict; a list"),
    "a set": ({1.0, 2.0, 3.0}, "returned {1.0, 2.0, 3.0}, a set; a list"),
    "a generator": ((float(i) for i in range(3)), "returned <generator.*a generator; a list"),
    "a map": (map(float, range(3)), "returned <map.*a map; a list"),
    "an array of no axis": (np.array(1.0), "returned 1 values for 3 images, array"),
    "words": (["high", "low", "low"], "returned 'high' for 'a cat', a str; a finite number"),
    "digits": ([1.0, "2", 3.0], "returned '2' for 'a dog', a str; a finite number"),
    "an array of digits": (np.array(["1", "2", "3"]), "returned '1' for 'a cat', a str"),
    "bools": ([True, False, True], "returned True for 'a cat', a bool; .*in place of a bool 1.0 or 0.0"),
    "an array of bools": (np.array([True, False, True]), "returned True for 'a cat', a bool"),
    "a tensor of bools": (torch.tensor([True, False, True]), "returned True for 'a cat', a bool"),
    "complex numbers": (np.array([1j, 2j, 3j]), "returned 1j for 'a cat', a complex"),
    "an integer beyond float": ([1, 10**400, 2], "returned 1000.* for 'a dog', a int"),
    "rows": (torch.ones(3, 2), r"returned \[1.0, 1.0\] for 'a cat', a list; a finite number"),
    "a square": (np.ones((2, 2)), "returned 2 values for 3 images, array"),
    "a dict a row": ([{"score": 1.0}] * 3, "returned {'score': 1.0} for 'a cat', a dict"),
}


@pytest.mark.parametrize("make", [ddpo_reward, make_reward])
@pytest.mark.parametrize("returned, message", NOT_REWARDS.values(), ids=NOT_REWARDS)
def test_what_is_no_list_of_numbers_is_shown_and_never_becomes_a_reward(make, returned, message):
    calls = []

    def odd(*args, **kwargs):
        calls.append(1)
        return (returned, {}) if make is ddpo_reward else returned

    with pytest.raises(RewardError, match=r"Reward 'odd' on prompts \['a cat'.*" + message):
        score(make(odd), batch(), PROMPTS, {}, Patience(2))
    assert len(calls) == 1


@pytest.mark.parametrize(
    "returned",
    [
        (0.5, None, 2),
        [[0.5], [None], [2.0]],
        [torch.tensor(0.5), None, np.float32(2.0)],
        [torch.tensor([0.5], requires_grad=True), None, np.array([[2]])],
        np.array([0.5, None, 2.0], dtype=object),
        [[0.5, None, 2.0]],
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [ddpo_reward, make_reward])
def test_lists_tuples_and_what_is_in_them_are_taken(make, returned):
    reward = make(lambda *args, **kwargs: (returned, {}) if make is ddpo_reward else returned)
    assert score(reward, batch(), PROMPTS, {})[0] == [0.5, None, 2.0]


@pytest.mark.parametrize(
    "returned",
    [
        np.array([0.5, 1, 2], dtype=np.float16),
        torch.tensor([0.5, 1, 2], dtype=torch.bfloat16, requires_grad=True),
        torch.tensor([[0.5], [1], [2]]),
        torch.tensor([[0.5, 1, 2]]),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [ddpo_reward, make_reward])
def test_arrays_and_tensors_are_taken(make, returned):
    reward = make(lambda *args, **kwargs: (returned, {}) if make is ddpo_reward else returned)
    assert score(reward, batch(), PROMPTS, {})[0] == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("returned", [[0.5], torch.tensor([[0.5]]), torch.tensor(0.5), (np.float64(0.5),)], ids=str)
def test_one_image_has_one_reward(returned):
    assert score(make_reward(lambda **_: returned), batch(1), PROMPTS[:1], {})[0] == [0.5]


def http_errors():
    """Errors of the network as libraries make them, by name."""
    request = httpx.Request("POST", "http://judge")
    return {
        "socket": socket.gaierror(-2, "Name or service not known"),
        "no route": OSError(errno.EHOSTUNREACH, "No route to host"),
        "reset": ConnectionResetError("reset by peer"),
        "time-out": TimeoutError("too late"),
        "process": subprocess.TimeoutExpired("judge", 1.0),
        "cut off": http.client.IncompleteRead(b""),
        "urllib": urllib.error.URLError("unreachable"),
        "urllib's status": urllib.error.HTTPError("http://judge", 503, "busy", None, None),
        "requests": requests.ConnectionError("refused"),
        "requests' status": requests.HTTPError("503"),
        "requests' time-out": requests.ReadTimeout("too late"),
        "httpx": httpx.ConnectError("refused"),
        "httpx's time-out": httpx.ReadTimeout("too late"),
        "httpx's status": httpx.HTTPStatusError("503", request=request, response=httpx.Response(503)),
        "the Hub's time-out": huggingface_hub.errors.InferenceTimeoutError("too late"),
        "a judge's": type("APIConnectionError", (type("APIError", (Exception,), {}),), {})("refused"),
    }


@pytest.mark.parametrize("error", http_errors().values(), ids=http_errors())
def test_errors_of_the_network_are_retried(error):
    errors = [error]

    def remote(*, prompts, images):
        if errors:
            raise errors.pop()
        return [1.0, 2.0, 3.0]

    assert score(make_reward(remote), batch(), PROMPTS, {}, Patience(1))[0] == [1.0, 2.0, 3.0]


OWN_ERRORS = [
    *(TypeError("no"), ValueError("no"), KeyError("no"), AttributeError("no"), RuntimeError("no"), ImportError("no")),
    *(ZeroDivisionError("no"), AssertionError("no"), FileNotFoundError(errno.ENOENT, "no"), PermissionError("no")),
    *(torch.OutOfMemoryError("no"), httpx.InvalidURL("no"), requests.exceptions.MissingSchema("no")),
    *(requests.exceptions.JSONDecodeError("no", "", 0), json.JSONDecodeError("no", "", 0)),
]


@pytest.mark.parametrize("error", OWN_ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("timeout", [None, 30])
def test_any_other_error_is_raised_at_once_and_named(error, timeout):
    calls = []

    def wrong(*, prompts, images):
        calls.append(1)
        raise error

    with pytest.raises(RewardError, match=rf"Reward 'wrong' .*'a car'.*{type(error).__name__}.*no") as caught:
        score(make_reward(wrong), batch(), PROMPTS, {}, Patience(3, timeout=timeout))
    assert len(calls) == 1 and caught.value.__cause__ is error


@pytest.mark.parametrize("retries", [0, 1, 3])
def test_a_reward_that_keeps_raising_is_retried_and_named(retries):
    calls = []

    def flaky(*, prompts, images):
        calls.append(1)
        raise ConnectionError("no connection")

    with pytest.raises(RewardError, match=rf"Reward 'flaky' .*'a car'.*no connection.*in {retries + 1} attempts"):
        score(make_reward(flaky), batch(), PROMPTS, {}, Patience(retries))
    assert len(calls) == retries + 1


def test_a_reward_that_recovers_is_used():
    calls = []

    def flaky(*, prompts, images):
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionError("no connection")
        return [1.0, 2.0, 3.0]

    assert score(make_reward(flaky), batch(), PROMPTS, {}, Patience(2))[0] == [1.0, 2.0, 3.0]


def test_waits_between_attempts_grow(monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)

    def flaky(*, prompts, images):
        raise ConnectionError("no connection")

    with pytest.raises(RewardError):
        score(make_reward(flaky), batch(), PROMPTS, {}, Patience(retries=3, wait=0.5))
    assert waits == [0.5, 1.0, 2.0]


def test_a_reward_that_hangs_is_left_behind():
    release = threading.Event()

    def hangs(*, prompts, images):
        release.wait(30)
        return [0.0] * len(prompts)

    started = time.monotonic()
    with pytest.raises(RewardError, match=r"'hangs' .*'a cat'.*no result within 0.05 s.*in 2 attempts"):
        score(make_reward(hangs), batch(), PROMPTS, {}, Patience(retries=1, timeout=0.05))
    release.set()
    assert time.monotonic() - started < 10


def test_within_the_time_the_result_counts_and_an_exception_is_the_functions_own():
    images = batch()
    expected = score(make_reward(redness), images, PROMPTS, {})[0]
    assert score(make_reward(redness), images, PROMPTS, {}, Patience(timeout=30))[0] == expected

    def late(*, prompts, images):
        raise TimeoutError("the model's own")

    with pytest.raises(RewardError, match="the model's own"):
        score(make_reward(late), batch(), PROMPTS, {}, Patience(retries=0, timeout=30))


def test_a_reward_server_that_is_gone_is_named():
    """A real server on loopback responds, is shut down, and is called again."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            count = int(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps([0.5] * count).encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def remote(*, prompts, images):
        address = f"http://127.0.0.1:{server.server_address[1]}"
        with urllib.request.urlopen(address, data=str(len(prompts)).encode(), timeout=5) as response:
            return json.loads(response.read())

    assert score(make_reward(remote), batch(), PROMPTS, {})[0] == [0.5, 0.5, 0.5]
    server.shutdown()
    server.server_close()
    with pytest.raises(RewardError, match=r"'remote' .*'a cat'.*refused.*in 3 attempts"):
        score(make_reward(remote), batch(), PROMPTS, {}, Patience(retries=2, wait=0.01))


def test_without_threads_an_item_is_done_before_the_next_is_made():
    events = []

    def items():
        for number in range(3):
            events.append(f"made {number}")
            yield number

    assert map_in_threads(lambda number: events.append(f"done {number}") or -number, items()) == [0, -1, -2]
    assert events == [f"{what} {number}" for number in range(3) for what in ("made", "done")]


def test_long_lists_of_prompts_are_shortened_in_errors():
    with pytest.raises(RewardError) as error:
        score(make_reward(lambda *, prompts, images: []), batch(9), ["x" * 500] * 9, {})
    assert "and 5 more" in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize("workers", [0, 3])
def test_results_come_in_the_order_of_the_batches(workers):
    def slow_first(*, prompts, images):
        time.sleep(0.05 if prompts[0] == "0" else 0)
        return [float(prompt) for prompt in prompts]

    def score_number(number):
        rewards = [make_reward(slow_first), make_reward(redness)]
        return score_all(rewards, batch(2), [str(number), str(number + 0.5)], {}, Patience(0))

    results = map_in_threads(score_number, range(5), workers)
    assert [values[:, 0].tolist() for values, _ in results] == [[n, n + 0.5] for n in range(5)]
    assert all(values.shape == (2, 2) and values.dtype == torch.float64 for values, _ in results)
    assert [len(infos) for _, infos in results] == [2] * 5


def test_scoring_overlaps_with_several_threads():
    both_at_work = threading.Barrier(2, timeout=5)

    def meets(*, prompts, images):
        both_at_work.wait()
        return [0.0] * len(prompts)

    assert len(map_in_threads(lambda seed: table_of(make_reward(meets), batch(seed=seed)), range(2), workers=2)) == 2


def test_an_error_in_a_thread_is_raised():
    with pytest.raises(RewardError):
        map_in_threads(table_of, [make_reward(lambda *, prompts, images: [])], workers=2)


def test_no_rewards_are_no_columns():
    assert score_all([], batch(), PROMPTS, {}, Patience(0))[0].shape == (3, 0)


def test_an_error_while_sampling_does_not_wait_for_the_scores_that_are_queued():
    started, go = [], threading.Event()

    def slow(number):
        started.append(number)
        go.wait(10)

    def items():
        yield from range(5)
        go.set()  # the one that runs may end, and the four behind it need not begin
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        map_in_threads(slow, items(), workers=1)
    assert len(started) <= 2


@pytest.mark.parametrize(
    "weights, message",
    [
        ([math.nan], "reward_weights=nan is not a finite number"),
        (["high"], r"reward_weights='high' \(str\) is not a number"),
        ([True], r"reward_weights=True \(bool\) is not a number"),
        ([1.0, 2.0], "reward_weights has 2 values for 1 reward_funcs"),
    ],
)
def test_a_weight_is_a_finite_number_for_each_reward(weights, message):
    with pytest.raises(ValueError, match=message):
        choose_rewards(None, lambda **_: [], weights)


@pytest.mark.parametrize("weights", [0.5, [0.5], ("0.5",), np.array([0.5])])
def test_weights_are_taken_in_any_form(weights):
    (reward,) = choose_rewards(None, lambda **_: [], weights)
    assert type(reward.weight) is float and reward.weight == 0.5
