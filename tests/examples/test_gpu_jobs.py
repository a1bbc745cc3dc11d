# SPDX-License-Identifier: Apache-2.0

"""Processes on the GPUs of one machine."""

import threading

from gpu_jobs import run_module, spread


def test_jobs_share_the_gpus_evenly_and_answer_in_order():
    at_work, gpus = threading.Barrier(4), []

    def work(job, gpu):
        at_work.wait(timeout=30)  # four at a time, or this breaks
        gpus.append(gpu)
        return job % 3 > 0

    assert spread(work, range(8), 4, [5, 7]) == [False, True, True, False, True, True, False, True]
    assert sorted(gpus) == [5] * 4 + [7] * 4


def test_a_module_sees_its_gpu_and_its_failure_is_told(tmp_path):
    log = tmp_path / "log.txt"
    printing = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['FURTHER'])"
    assert run_module("timeit", ["-n1", "-r1", printing], 3, log, {"FURTHER": "here"})
    assert log.read_text().startswith("3 here\n")
    assert not run_module("timeit", ["-n1", "-r1", "raise OSError('broken')"], 3, log)
    assert "OSError: broken" in log.read_text()
