# SPDX-License-Identifier: Apache-2.0

"""
How long imports take: torch alone, the package with torch, and the package's trainer, whose libraries load with it.

    python -m examples.benchmarks.import_time --repeats 7

Each import is timed in a process of its own, without the start of Python. The imports take turns.
"""

import argparse
import statistics
import subprocess
import sys


IMPORTS = ["import torch", "import torch, trl_pgraft", "from trl_pgraft import PGraftTrainer"]
TIMED = "import time; started = time.perf_counter(); {}; print(time.perf_counter() - started)"


def seconds(statement: str) -> float:
    """Seconds that an import statement takes in a new process."""
    command = [sys.executable, "-W", "ignore", "-c", TIMED.format(statement)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="Processes of each import.")
    repeats = parser.parse_args().repeats
    for statement in IMPORTS:
        seconds(statement)  # the first reads files from disk
    turns = [[seconds(statement) for statement in IMPORTS] for _ in range(repeats)]
    print("| seconds | min | median | max |\n| --- | --: | --: | --: |")
    for statement, times in zip(IMPORTS, zip(*turns, strict=True), strict=True):
        print(f"| `{statement}` | {min(times):.2f} | {statistics.median(times):.2f} | {max(times):.2f} |")


if __name__ == "__main__":
    main()
