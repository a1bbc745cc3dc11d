# SPDX-License-Identifier: Apache-2.0

"""
Remake the measurements of docs/noise_correction.md: train classifiers and flows, compare, report.

    python -m examples.noise_correction.remake --output outputs/noise_correction --gpus 0 1 2 3 --jobs 14

Every job is a process of its own, with a log in `OUTPUT/log`. Started again, it goes on: what is done is not done
again, and a job that broke off goes on from what it had.
"""

import argparse
import itertools
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.gpu_jobs import run_module, spread
from examples.noise_correction.report import write_report


@dataclass(frozen=True)
class Job:
    """
    One process.

    Args:
        name (`str`): that of its log.
        module (`str`): a module of `examples.noise_correction`.
        arguments (`Sequence[str]`): its command line.
    """

    name: str
    module: str
    arguments: Sequence[str]


@dataclass(frozen=True)
class Flow:
    """
    A flow model and what is measured of it.

    Args:
        domain (`str`): its data.
        options (`Sequence[str]`): how it is trained, where that is not `train_flow`'s default.
        corrected (`Sequence[int]`): numbers of steps that are corrected.
    """

    domain: str
    options: Sequence[str] = ()
    corrected: Sequence[int] = (50, 25, 10, 5, 3, 2)


WEAKER = ("--widths", "32", "64", "--layers", "1", "--batch", "128", "--steps", "2700")
FLOWS = {
    "fashion_mnist": Flow("fashion_mnist"),
    "emoji": Flow("emoji"),
    "weaker": Flow("fashion_mnist", WEAKER, corrected=(10,)),
}
SEEDS = (0, 1, 2)
LOWEST_SIGMA, OTHER_SIGMAS = 0.2, {10: 0.1}  # by the number of steps; each has a folder


def training_jobs(flows: Sequence[str], output: Path) -> list[Job]:
    """Flows first, which take longest."""
    jobs = []
    for name in flows:
        options = ("--domain", FLOWS[name].domain, "--output", str(output / name / "flow"), *FLOWS[name].options)
        jobs.append(Job(f"{name}-flow", "train_flow", options))
    for domain in dict.fromkeys(FLOWS[name].domain for name in flows):
        options = ("--domain", domain, "--output", str(output / f"{domain}-classifier"))
        jobs.append(Job(f"{domain}-classifier", "train_classifier", options))
    return jobs


def comparison_command(name: str, seed: int, steps: int | None, output: Path, features: Sequence[str]) -> list[str]:
    """Command line of one comparison: of one number of corrected steps, or of the model alone."""
    lowest_sigma = OTHER_SIGMAS.get(steps, LOWEST_SIGMA)
    domain = FLOWS[name].domain
    options = {
        "--domain": domain,
        "--flow": output / name / "flow",
        "--classifier": output / f"{domain}-classifier",
        "--output": output / name / f"compare_from_{lowest_sigma}",
        "--lowest-sigma": lowest_sigma,
        "--seeds": seed,
    }
    arguments = [*(str(part) for pair in options.items() for part in pair), "--features", *features]
    if steps is None:
        return [*arguments, "--corrected"]
    return [*arguments, "--steps", "--corrected", str(steps), "--correctors", "gaussian", "network"]


def comparison_jobs(flows: Sequence[str], output: Path, features: Sequence[str]) -> list[Job]:
    """The longest first, so that none is left alone at the end: the model alone, then by corrected steps."""
    alone, corrected = [], []
    for name, seed in itertools.product(flows, SEEDS):
        alone.append(
            Job(f"{name}-{seed}-uncorrected", "compare", comparison_command(name, seed, None, output, features))
        )
        for steps in FLOWS[name].corrected:
            command = comparison_command(name, seed, steps, output, features)
            corrected.append((steps, Job(f"{name}-{seed}-{steps}", "compare", command)))
    return alone + [job for _, job in sorted(corrected, key=lambda pair: -pair[0])]


def run(job: Job, gpu: int, logs: Path, extra: Sequence[str]) -> bool:
    """Do a job unless its log says that it is done; whether it is."""
    done, part, started = logs / f"{job.name}.txt", logs / f"{job.name}.part", time.perf_counter()
    if done.exists():
        return True
    finished = run_module(f"examples.noise_correction.{job.module}", [*job.arguments, *extra], gpu, part)
    result = "done" if finished else f"failed, see {part}"
    print(f"{job.name}: {result}, {time.perf_counter() - started:.0f} s", flush=True)
    if finished:
        part.rename(done)
    return finished


def run_all(jobs: Sequence[Job], args: argparse.Namespace) -> None:
    """
    Do jobs, `args.jobs` at a time, spread over the GPUs.

    Raises:
        `SystemExit`: some failed; the others were done.
    """
    logs = args.output / "log"
    logs.mkdir(parents=True, exist_ok=True)
    data = ["--data", str(args.data)] if args.data else []
    further = {"train_flow": args.flow_options, "compare": args.compare_options}

    def work(job: Job, gpu: int) -> bool:
        return run(job, gpu, logs, [*data, *shlex.split(further.get(job.module, ""))])

    done = spread(work, jobs, args.jobs, args.gpus)
    if not all(done):
        raise SystemExit(f"{done.count(False)} of {len(done)} jobs failed. Start again to try them once more.")


def main(args: argparse.Namespace) -> None:
    """Train, compare, report."""
    run_all(training_jobs(args.flows, args.output), args)
    run_all(comparison_jobs(args.flows, args.output, args.features), args)
    for name in args.flows:
        folders = sorted((args.output / name).glob("compare_from_*"))
        print(f"{name}\n\n{write_report(*folders)}\n")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's files")
    parser.add_argument("--flows", nargs="+", choices=FLOWS, default=tuple(FLOWS))
    parser.add_argument("--features", nargs="+", default=("domain", "efficientnet"))
    parser.add_argument("--gpus", type=int, nargs="+", default=[0], help="numbers of the GPUs")
    parser.add_argument("--jobs", type=int, default=4, help="processes at a time; three or four fill a GPU")
    parser.add_argument("--flow-options", default="", help="of every train_flow, as one string: '--limit 30000'")
    parser.add_argument("--compare-options", default="", help="of every compare, as one string: '--images 2000'")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
