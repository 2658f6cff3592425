"""Jobs on this machine: each a process of its own, so that a crash or a full memory takes one cell only."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mamlctl.core.errors import ExitCode
from mamlctl.experiments.executors.jobs import Ended, Job

SAID = 12  # last lines of a log that tell why a cell failed


@dataclass
class _Running:
    job: Job
    slot: int
    process: subprocess.Popen[bytes]
    log: BinaryIO


class LocalExecutor:
    """So many jobs at a time, sharing the processor's threads, or each with one of the CUDA devices."""

    def __init__(self, slots: int, logs: Path, *, cuda_devices: Sequence[str] = ()) -> None:
        """`logs`: a folder for what the jobs say. `cuda_devices`: as CUDA_VISIBLE_DEVICES names them."""
        self.slots, self._logs, self._cuda_devices = slots, logs, list(cuda_devices)
        self._running: list[_Running] = []
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, job: Job) -> None:
        """Begin a job in a free slot."""
        slot = min(set(range(self.slots)) - {running.slot for running in self._running})
        log = (self._logs / f"{job.name}.txt").open("ab")
        command = self._next(job)
        if command is None:
            raise ValueError(f"{job.name} has nothing to do")
        self._running.append(_Running(job, slot, self._process(command, slot, log), log))

    def ended(self) -> list[Ended]:
        """The jobs that ended since the last call."""
        return [ended for running in list(self._running) if (ended := self._looked_at(running)) is not None]

    def stop(self, number: int) -> None:
        """Pass the signal on, and wait: trainings save after their meta-step."""
        for running in self._running:
            running.process.send_signal(number)
        for running in self._running:
            running.process.wait()
            running.log.close()
        self._running.clear()

    def _looked_at(self, running: _Running) -> Ended | None:
        """None while the job goes on; a training that ended well is followed by the job's test."""
        code = running.process.poll()
        if code is None:
            return None
        after = self._next(running.job) if code == ExitCode.OK and not _is_test(running.process) else None
        if after is not None and after[0] == "eval":
            running.process = self._process(after, running.slot, running.log)
            return None
        self._running.remove(running)
        running.log.close()
        return Ended(running.job.name, code, _last_lines(self._logs / f"{running.job.name}.txt"))

    def _next(self, job: Job) -> tuple[str, ...] | None:
        return job.train_command(job.folder) or job.eval_command(job.folder)

    def _process(self, command: Sequence[str], slot: int, log: BinaryIO) -> subprocess.Popen[bytes]:
        log.write(f"$ {shlex.join(['mamlctl', *command])}\n".encode())
        log.flush()
        return subprocess.Popen(
            [sys.executable, "-m", "mamlctl.cli.child_process", *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=self._environment(slot),
            start_new_session=True,  # Ctrl-C is for whoever started them all, who passes it on
        )

    def _environment(self, slot: int) -> dict[str, str]:
        environment = dict(os.environ)
        if self._cuda_devices:
            environment["CUDA_VISIBLE_DEVICES"] = self._cuda_devices[slot % len(self._cuda_devices)]
        # Threads of several cells that want the same cores stop each other; whoever has set them knows why.
        environment.setdefault("OMP_NUM_THREADS", str(threads_each(self.slots)))
        return environment


def threads_each(slots: int) -> int:
    """Threads of a job, so that all together have one a core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // slots, 1)


def visible_cuda_devices() -> list[str]:
    """The CUDA devices that a job may be given, as CUDA_VISIBLE_DEVICES names them; empty without any."""
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named or [str(number) for number in range(torch.cuda.device_count())]


def _is_test(process: subprocess.Popen[bytes]) -> bool:
    return "eval" in list(process.args)[3:4]  # type: ignore[arg-type]


def _last_lines(path: Path) -> str:
    """What a job said last, from its last command on."""
    text = path.read_text(errors="replace").rpartition("\n$ mamlctl ")[2]
    return "\n".join(text.splitlines()[-SAID:])
