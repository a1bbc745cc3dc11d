# SPDX-License-Identifier: Apache-2.0

import datasets
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import get_session


def test_files_survive_the_round_trip(hub, tmp_path):
    api = HfApi(token="hf_write")
    files = {"a.txt": b"text", "deep/er/b.safetensors": bytes(range(256))}
    additions = [CommitOperationAdd(path, content) for path, content in files.items()]
    api.create_repo("things")
    api.create_commit("ann/things", additions, commit_message="two files")
    assert hub.repo("ann/things").files == files
    folder = snapshot_download("ann/things", cache_dir=tmp_path)
    for path, content in files.items():
        with open(f"{folder}/{path}", "rb") as file:
            assert file.read() == content
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("ann/things", "c.txt", cache_dir=tmp_path)
    tree = api.list_repo_tree("ann/things", recursive=True)
    assert {entry.path for entry in tree} == {"a.txt", "deep", "deep/er", "deep/er/b.safetensors"}


def test_a_dataset_survives_the_round_trip(hub, tmp_path):
    dataset = datasets.Dataset.from_dict({"number": list(range(7))})
    dataset.push_to_hub("ann/numbers", token="hf_write")
    found = datasets.load_dataset("ann/numbers", split="train", cache_dir=str(tmp_path))
    assert found["number"][:] == list(range(7))


def test_ranges_are_served(hub):
    HfApi(token="hf_write").create_repo("ann/things")
    hub.repo("ann/things").files["a.bin"] = bytes(range(100))
    answer = get_session().get(f"{hub.url}/ann/things/resolve/main/a.bin", headers={"Range": "bytes=10-19"})
    assert (answer.status_code, answer.content) == (206, bytes(range(10, 20)))


@pytest.mark.parametrize("token, status", [("hf_read", 403), ("hf_other", 403), ("hf_unknown", 401)])
def test_only_the_owner_with_a_token_to_write_may_write(hub, token, status):
    HfApi(token="hf_write").create_repo("ann/things")
    with pytest.raises(HfHubHTTPError) as refused:
        HfApi(token=token).upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="ann/things")
    assert refused.value.response.status_code == status
    assert hub.repo("ann/things").files == {}


def test_private_repositories_are_hidden_from_others(hub):
    HfApi(token="hf_write").create_repo("ann/secret", private=True)
    assert HfApi(token="hf_read").repo_info("ann/secret").private
    for token in ("hf_other", False):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(token=token).repo_info("ann/secret")


def test_failures_come_on_demand(hub):
    hub.fail_next(1, "whoami", status=500)
    api = HfApi(token="hf_write")
    with pytest.raises(HfHubHTTPError):
        api.whoami()
    assert api.whoami()["name"] == "ann"
