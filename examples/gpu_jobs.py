# SPDX-License-Identifier: Apache-2.0

"""Processes spread over the GPUs of one machine."""

import os
import queue
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar


Job = TypeVar("Job")


def run_module(
    module: str, arguments: Sequence[str], gpu: int, log: Path, environment: dict[str, str] | None = None
) -> bool:
    """
    Run a module in a process of its own that sees one GPU, and write what it prints to a file.

    Args:
        module (`str`): its name.
        arguments (`Sequence[str]`): its command line.
        gpu (`int`): number of the GPU.
        log (`Path`): the file.
        environment (`dict`, *optional*): variables that are set for it.

    Returns:
        `bool`: whether it exited with 0.
    """
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu), "PYTHONUNBUFFERED": "1", **(environment or {})}
    with open(log, "w") as file:
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(command, env=variables, stdout=file, stderr=subprocess.STDOUT).returncode == 0


def spread(work: Callable[[Job, int], bool], jobs: Sequence[Job], at_a_time: int, gpus: Sequence[int]) -> list[bool]:
    """What `work(job, gpu)` returns for each job, `at_a_time` of them at once, shared evenly by the GPUs."""
    free: queue.Queue[int] = queue.Queue()
    for number in range(at_a_time):
        free.put(gpus[number % len(gpus)])

    def on_a_free_gpu(job: Job) -> bool:
        gpu = free.get()
        try:
            return work(job, gpu)
        finally:
            free.put(gpu)

    with ThreadPoolExecutor(at_a_time) as pool:
        return list(pool.map(on_a_free_gpu, jobs))
