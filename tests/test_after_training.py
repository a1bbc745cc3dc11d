# SPDX-License-Identifier: Apache-2.0

"""What works after `train()` with one process works with several."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


SCRIPT = Path(__file__).parent / "helpers" / "after_training_in_process.py"
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def run(kind, folder, launcher=()):
    """What each process found, the first one's first."""
    folder.mkdir()
    paths = [str(SCRIPT.parents[2]), str(SCRIPT.parents[2] / "examples"), str(SCRIPT.parent), *sys.path]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [sys.executable, *launcher, str(SCRIPT), kind, str(folder)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return [json.loads(path.read_text()) for path in sorted(folder.glob("result-*.json"))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pgraft", "noise_correction"])
def test_two_processes_can_do_what_one_can(hub, tmp_path, kind):
    (alone,), (first, second) = run(kind, tmp_path / "one"), run(kind, tmp_path / "two", TWO)
    assert first["rewards"] == second["rewards"] == pytest.approx(alone["rewards"], rel=1e-3)
    assert first["pushed"] == alone["pushed"] and second["pushed"] is None
    for folder in (tmp_path / "one", tmp_path / "two"):
        assert list((folder / "copy").iterdir())
    if kind == "pgraft":
        assert first["iterations"] == second["iterations"] == alone["iterations"] == 3
        assert_tracked(tmp_path / "two" / "out")


def assert_tracked(folder):
    """The trackers have the metrics of both trainings, and of the iteration after them."""
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (logs,) = (folder / "logs" / "mine").iterdir()
    found = event_accumulator.EventAccumulator(str(logs)).Reload().Scalars("reward")
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [e.value for e in found] == pytest.approx([metrics["reward"] for metrics in history], rel=1e-6)
