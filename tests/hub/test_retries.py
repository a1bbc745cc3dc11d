# SPDX-License-Identifier: Apache-2.0

import datasets
import pytest
import torch
from hub_cases import TOKEN
from huggingface_hub.utils import get_session
from runs import SWITCH
from tiny_pipelines import add_random_adapter, tiny_sd

from trl_pgraft import push_adapter_to_hub, save_pgraft_adapter
from trl_pgraft.hub import retries
from trl_pgraft.hub.push import PushError
from trl_pgraft.hub.retries import retried


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(retries, "WAITS", (0.0,) * len(retries.WAITS))


@pytest.fixture
def adapter(tmp_path):
    """A function that changes an adapter, and returns its folder."""
    pipeline = tiny_sd()

    def save(seed):
        torch.manual_seed(seed)
        add_random_adapter(pipeline.unet, rank=2, seed=seed)
        save_pgraft_adapter(pipeline, tmp_path / "adapter", SWITCH)
        pipeline.unet.delete_adapters("pgraft")
        return tmp_path / "adapter"

    return save


def assert_sent_once(hub, commits, repo):
    assert len(hub.stored) == len(set(hub.stored)), "no file was uploaded twice"
    assert len(repo.commits[1:]) == commits
    contents = [commit.files for commit in repo.commits]
    assert all(one != other for one, other in zip(contents, contents[1:], strict=False)), "no commit without a change"


def test_a_push_survives_a_hub_that_is_busy_at_each_fourth_write(hub, adapter):
    hub.be_busy(0.25, seed=0)
    for number in range(4):
        push_adapter_to_hub(adapter(number), "ann/lora", **TOKEN)
    failed = len(hub.requests) - len(set(hub.requests))
    assert failed > 4
    assert_sent_once(hub, 4, hub.repo("ann/lora"))
    assert "send" not in vars(get_session()), "the client's session is left as it was"


def test_a_push_of_datasets_survives_it_as_well(hub):
    hub.be_busy(0.25, seed=1)
    for number in range(4):
        dataset = datasets.Dataset.from_dict({"number": [number]})
        retried(lambda dataset=dataset: dataset.push_to_hub("ann/numbers", token="hf_write"))
    assert_sent_once(hub, 4, hub.repo("ann/numbers", "dataset"))


@pytest.mark.parametrize("lost", ["commit", "repos/create", "preupload", "objects/batch"])
def test_what_was_done_without_an_answer_is_not_done_twice(hub, adapter, lost):
    hub.lose_next(lost)
    push_adapter_to_hub(adapter(0), "ann/lora", **TOKEN)
    sent = len([request for request in hub.requests if lost in request])
    assert sent == 1 if lost == "commit" else sent > 1, "whether a commit was made is looked up"
    assert_sent_once(hub, 1, hub.repo("ann/lora"))


def test_only_what_fails_is_repeated(hub, adapter):
    push_adapter_to_hub(adapter(0), "ann/other", **TOKEN)
    without = len(hub.requests)
    hub.fail_next(3, "validate-yaml")
    push_adapter_to_hub(adapter(1), "ann/lora", **TOKEN)
    assert len(hub.requests) == 2 * without + 3


def test_a_hub_that_stays_busy_is_given_up_on(hub, adapter):
    hub.be_busy(1.0, seed=0)
    with pytest.raises(PushError, match="503"):
        push_adapter_to_hub(adapter(0), "ann/lora", **TOKEN)
    assert len(hub.requests) == len(retries.WAITS) + 1
    assert "send" not in vars(get_session())
