# SPDX-License-Identifier: Apache-2.0

"""Runs that are killed, starved and confused, in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch


RUN = Path(__file__).parent / "helpers" / "run_in_process.py"
ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
ENVIRONMENT["PYTHONPATH"] = os.pathsep.join([*sys.path, str(RUN.parent)])
BATCHES = 3 * 4  # of the whole run

pytestmark = pytest.mark.slow


def command(folder: Path, **options) -> list[str]:
    return [sys.executable, str(RUN), json.dumps({"output_dir": str(folder / "out"), **options})]


def run(folder: Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(folder, **options), env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def result(folder: Path, rank: int = 0) -> dict:
    return torch.load(folder / f"result{rank}.pt")


def untimed(history: list[dict]) -> list[dict]:
    return [{name: value for name, value in metrics.items() if "time/" not in name} for metrics in history]


def batches(folder: Path, name: str) -> list[tuple[str, ...]]:
    return [tuple(json.loads(line)) for line in (folder / f"{name}.log").read_text().splitlines()]


def assert_the_same(found: dict, expected: dict) -> None:
    for one, other in zip(found["adapter"], expected["adapter"], strict=True):
        assert torch.equal(one, other)
    assert untimed(found["history"]) == untimed(expected["history"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert len(batches(folder, "drawn")) == len(batches(folder, "scored")) == BATCHES
    return folder


STAGES = ("sampling", "scoring", "training")


@pytest.mark.parametrize("stage, save_freq", [(s, 1) for s in (*STAGES, "saving")] + [(s, 3) for s in STAGES])
def test_a_killed_run_resumes_bit_for_bit(whole, tmp_path, stage, save_freq):
    """The second round is interrupted; with `save_freq=3` no checkpoint is there, and both rounds are repeated."""
    killed = run(tmp_path, die_at=stage, save_freq=save_freq)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run(tmp_path, resume_from_checkpoint=True, save_freq=save_freq)
    assert resumed.returncode == 0, resumed.stderr
    assert_the_same(result(tmp_path), result(whole))
    drawn, scored = batches(tmp_path, "drawn"), batches(tmp_path, "scored")
    # The reward notes a batch when it has been asked, so that the one it died on is noted by the second run alone.
    assert len(drawn) == len(set(drawn)) == BATCHES, "no batch that was drawn is drawn again"
    assert len(scored) == len(set(scored)) == BATCHES, "no batch that was scored is scored again"
    assert not (tmp_path / "out" / "unfinished").exists()
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2]


def test_a_run_killed_in_the_fit_of_its_control_resumes_bit_for_bit(tmp_path):
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    assert run(folders[0], control_adapter=True).returncode == 0
    killed = run(folders[1], control_adapter=True, die_at="control")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run(folders[1], control_adapter=True, resume_from_checkpoint=True)
    assert resumed.returncode == 0, resumed.stderr
    assert_the_same(*map(result, folders[::-1]))
    assert len(batches(folders[1], "drawn")) == BATCHES, "no batch that was drawn is drawn again"


def test_a_run_killed_from_outside_resumes(whole, tmp_path):
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(tmp_path), env=ENVIRONMENT, **quiet)
    log = tmp_path / "scored.log"
    while not (log.exists() and len(log.read_text().splitlines()) > 5):
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.01)
    process.kill()
    process.wait()
    resumed = run(tmp_path, resume_from_checkpoint=True)
    assert resumed.returncode == 0, resumed.stderr
    assert_the_same(result(tmp_path), result(whole))


def test_a_full_disk_leaves_the_last_checkpoint(whole, tmp_path):
    failed = run(tmp_path, die_at="full disk")
    assert failed.returncode == 1
    assert "checkpoint_1 could not be written" in failed.stderr and "checkpoint_0" in failed.stderr
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["checkpoint_0"]
    resumed = run(tmp_path, resume_from_checkpoint=True)
    assert resumed.returncode == 0, resumed.stderr
    assert_the_same(result(tmp_path), result(whole))


def test_without_resuming_a_run_starts_anew(whole, tmp_path):
    assert run(tmp_path, die_at="scoring").returncode == -signal.SIGKILL
    assert run(tmp_path).returncode == 0
    assert_the_same(result(tmp_path), result(whole))
    assert len(batches(tmp_path, "scored")) > BATCHES


# Several processes.


def torchrun(folder: Path, **options) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return launcher + command(folder, **options)[1:]


# One accepted sample at three timesteps: of the second batch the second process has none.
REMAINDER = {"samples_per_prompt": 8, "train_timestep_fraction": 0.75, "train_gradient_accumulation_steps": 2}


@pytest.mark.parametrize("options", [{}, {"control_adapter": True}, REMAINDER], ids=str)
def test_two_processes_are_one(tmp_path, options):
    """Three rounds in double precision: the same samples are accepted, and the adapters agree."""
    options |= {"float64": True, "train_batch_size": 2}
    assert run(tmp_path / "one", **options).returncode == 0
    shared = {**options, "sample_num_batches_per_epoch": 2, "train_batch_size": 1}
    subprocess.run(torchrun(tmp_path / "two", **shared), env=ENVIRONMENT, check=True, timeout=300)
    one, first, second = result(tmp_path / "one"), result(tmp_path / "two"), result(tmp_path / "two", rank=1)
    for alone, ours, theirs in zip(one["adapter"], first["adapter"], second["adapter"], strict=True):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, alone, rtol=0, atol=1e-6)
    for name in ("reward", "reward_accepted", "accepted", "images", "denoiser_calls"):
        assert [m[name] for m in first["history"]] == pytest.approx([m[name] for m in one["history"]], rel=1e-9)
    losses = [[m["loss"] for m in run["history"]] for run in (first, second, one)]
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-6), "of all rows, in float32"
    assert accepted_seeds(tmp_path / "two") == accepted_seeds(tmp_path / "one")


def accepted_seeds(folder: Path) -> list[set[int]]:
    rounds = []
    for path in sorted((folder / "out" / "samples").iterdir()):
        rows = datasets.concatenate_datasets([datasets.Dataset.from_parquet(str(p)) for p in sorted(path.iterdir())])
        rounds.append({row["seed"] for row in rows.select_columns(["seed", "accepted"]) if row["accepted"]})
    return rounds


def test_when_the_first_process_dies_the_others_end(tmp_path):
    """Without a launcher that would end them: each waits for the other in an exchange."""
    port = "29555"
    processes = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        # Two images accepted a round are one microbatch a pass, so that twice the passes are the same six steps.
        options = {"sample_num_batches_per_epoch": 2, "train_num_inner_epochs": 6}
        options |= {"die_at": "training"} if rank == "0" else {}
        processes.append(
            subprocess.Popen(command(tmp_path, **options), env={**ENVIRONMENT, **place}, stderr=subprocess.PIPE)
        )
    assert processes[0].wait(timeout=240) == -signal.SIGKILL
    died = time.monotonic()
    assert processes[1].wait(timeout=60) not in (0, None)
    assert time.monotonic() - died < 60
