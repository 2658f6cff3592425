"""An executor for this machine, which runs each job in its own process."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mamlctl.core.errors import ExitCode
from mamlctl.experiments.executors.jobs import Arguments, ChildProcess, Ended, Job


@dataclass
class _Running:
    job: Job
    slot: int
    log: BinaryIO
    child: ChildProcess
    testing: bool


class LocalExecutor:
    """Runs several jobs at once, which share the cores or the CUDA devices. Implements jobs.Executor."""

    def __init__(self, slots: int, logs: Path, *, cuda_devices: Sequence[str] = ()) -> None:
        """An executor without jobs.

        Args:
            slots: jobs at a time.
            logs: the folder for the output of the jobs.
            cuda_devices: the devices to use, as CUDA_VISIBLE_DEVICES names them; empty for the CPU.
        """
        self.slots, self._logs, self._cuda_devices = slots, logs, list(cuda_devices)
        self._running: list[_Running] = []
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, job: Job) -> None:
        """Start a job in a free slot. Raises ValueError if the job has nothing to do."""
        training = job.train_command(job.folder)
        command = training or job.eval_command(job.folder)
        if command is None:
            raise ValueError(f"{job.name} has nothing to do")
        slot = min(set(range(self.slots)) - {running.slot for running in self._running})
        log = (self._logs / f"{job.name}.txt").open("ab")
        child = self._start_command(command, slot, log)
        self._running.append(_Running(job, slot, log, child, testing=training is None))

    def ended(self) -> list[Ended]:
        """The jobs that have ended since the last call."""
        ends = [self._poll(running) for running in list(self._running)]
        return [end for end in ends if end is not None]

    def stop(self, number: int) -> None:
        """Pass the signal on and wait for the jobs, which save after their current meta-step."""
        for running in self._running:
            running.child.stop(number)
        for running in self._running:
            running.child.wait()
            running.log.close()
        self._running.clear()

    def _poll(self, running: _Running) -> Ended | None:
        """How the job ended, or None if it is running. Starts the job's test after its training."""
        if running.child.process.poll() is None:
            return None
        job, (code, error) = running.job, running.child.wait()
        if code == ExitCode.OK and not running.testing and (test := job.eval_command(job.folder)):
            running.child = self._start_command(test, running.slot, running.log)
            running.testing = True
            return None
        self._running.remove(running)
        running.log.close()
        return Ended(job.name, code, error)

    def _start_command(self, command: Arguments, slot: int, log: BinaryIO) -> ChildProcess:
        log.write(f"$ {shlex.join(['mamlctl', *command])}\n".encode(errors="surrogateescape"))
        log.flush()
        environment = dict(os.environ)
        if self._cuda_devices:
            environment["CUDA_VISIBLE_DEVICES"] = self._cuda_devices[slot % len(self._cuda_devices)]
        # Too many threads of several cells would slow each other down. A value that the user has set is kept.
        environment.setdefault("OMP_NUM_THREADS", str(threads_each(self.slots)))
        return ChildProcess(command, environment, log)


def threads_each(slots: int) -> int:
    """Threads per job, so that all jobs together use one per core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // slots, 1)


def visible_cuda_devices() -> list[str]:
    """The CUDA devices of this process, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return names or [str(number) for number in range(torch.cuda.device_count())]
