"""Jobs on a Ray cluster: each in slices, on any node, so that a node's death costs one slice at most."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import mamlctl
from mamlctl.core.errors import ExitCode, MamlctlError
from mamlctl.core.events import Notice, OnEvent
from mamlctl.core.files import one_writer
from mamlctl.core.formatting import plural
from mamlctl.experiments.executors.jobs import Ended, Job
from mamlctl.experiments.executors.ray_worker import SliceResult, WorkerSlot, pack, unpack
from mamlctl.run_folder import run_state

TRIES = 4  # of one slice: that many nodes do not die by chance within one
CONNECT_S = 10.0
REACH_S = 60.0  # for ray's health check, which imports ray: 1 s on an idle machine. ray.init tries for 122 s
STOP_S = 60.0  # for all to save and come back: more than ray_worker.SAVE_S
HEARD_S = 10.0  # for a slot to receive a stop; one that does not has no node yet
POLL_S = 0.1
LOOK_S = 2.0  # between two looks at which nodes there are
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # neither its question nor its reports
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # no GPU asked, none seen; said, so that ray does not warn
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # all: else ray prints a dead node's log on stdout, over any result
}


@dataclass
class RunningJob:
    """A job, the slot that it has, and the slice that is awaited from there."""

    job: Job
    lock: ExitStack  # holds the run folder's lock
    limit_s: float
    tries: int = 0  # of this slice
    slot: Any = None  # ray's handle of a WorkerSlot
    slice: Any = None  # ray's reference to a SliceResult
    node: Any = None  # ray's reference to the id of the slot's node
    testing: bool = False


class RayExecutor:
    """Runs jobs on the cluster that `open_cluster` reached. Follows jobs.Executor."""

    def __init__(
        self, ray: Any, *, slots: int | None, cpus: float, gpus: float, slice_s: float, on_event: OnEvent
    ) -> None:
        """Arguments are those of `open_cluster`, which documents them."""
        self._ray, self._on_event, self._slice_s = ray, on_event, slice_s
        self._cpus, self._gpus, self._fixed_slots = cpus, gpus, slots
        # One thread works, another takes the stop meanwhile, a third answers which node it is.
        self._actor = ray.remote(WorkerSlot).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0, max_concurrency=3
        )
        self._running: list[RunningJob] = []
        self._ended: list[Ended] = []
        self._stopped_by = 0
        self._nodes: dict[str, str] = {}  # id -> name, of those alive at the last look
        self._last_look = -LOOK_S
        self.slots = slots or 1
        self._look_at_nodes()

    def start(self, job: Job) -> None:
        """Begin a job, as soon as a node has room for it."""
        job.folder.mkdir(parents=True, exist_ok=True)
        lock = ExitStack()
        try:
            lock.enter_context(one_writer(job.folder))
        except MamlctlError as error:
            self._ended.append(Ended(job.name, error.exit_code, error.message))
            return
        running = RunningJob(job, lock, self._slice_s)
        self._running.append(running)
        self._continue(running)

    def ended(self) -> Sequence[Ended]:
        """The jobs that ended since the last call; takes in what slices have finished, waits for none."""
        self._collect_slices()
        if time.monotonic() > self._last_look + LOOK_S:
            self._look_at_nodes()
        ended, self._ended = self._ended, []
        return ended

    def stop(self, number: int) -> None:
        """Have every job save and end as that signal asks, and its folder brought back; a minute at most."""
        self._stopped_by = number
        began = time.monotonic()
        heard = {running.job.name: running.slot.stop.remote(number) for running in self._running}
        while self._running and time.monotonic() < began + STOP_S:
            self._collect_slices()
            if time.monotonic() > began + HEARD_S:
                for running in [*self._running]:
                    if not self._ready([heard[running.job.name]]):
                        self._end(running, self._stop_code, "stopped before a node had room for it")
            time.sleep(POLL_S)
        for running in [*self._running]:
            self._end(
                running, self._stop_code, "stopped, but its node did not answer: its last slice is lost"
            )

    def close(self) -> None:
        """Give every slot back, at once."""
        for running in [*self._running]:
            self._end(running, -signal.SIGKILL)

    @property
    def _stop_code(self) -> int:
        """The exit code of jobs that are stopped; 0 before a stop."""
        return 128 + self._stopped_by if self._stopped_by else 0

    def _look_at_nodes(self) -> None:
        """Find the nodes that are alive, report those that came and went, and set `slots`."""
        nodes = alive_nodes(self._ray)
        names = {node["NodeID"]: _node_name(node) for node in nodes}
        self.slots = self._fixed_slots or max(room(nodes, self._cpus, self._gpus), 1)
        total = f"{len(nodes)} {plural(len(nodes), 'node')}, {self.slots} jobs at a time"
        if not self._nodes:
            self._on_event(Notice(f"ray cluster: {total}"))
        else:
            for node in self._nodes.keys() ^ names.keys():
                change = "joined" if node in names else "died"
                self._on_event(Notice(f"node {(self._nodes | names)[node]} {change}: {total}"))
        self._nodes, self._last_look = names, time.monotonic()

    def _collect_slices(self) -> None:
        by_slice = {running.slice: running for running in self._running}
        for reference in self._ready([*by_slice]):
            self._collect(by_slice[reference])

    def _ready(self, references: list[Any]) -> list[Any]:
        if not references:
            return []
        ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        return list(ready)

    def _collect(self, running: RunningJob) -> None:
        """Take in a slice that came back, or did not."""
        errors = self._ray.exceptions
        try:
            result: SliceResult = self._ray.get(running.slice)
        except errors.RayTaskError as error:  # the node cannot do it, or we made a mistake
            self._end(running, ExitCode.FAILED, f"{type(error.cause).__name__}: {error.cause}")
            return
        except errors.RayError as error:  # the slot is gone
            self._restart(running, str(error).partition("\n")[0])
            return
        step = run_state(running.job.folder).step
        if result.files is not None:
            unpack(result.files, running.job.folder)
        if result.code != ExitCode.OK or running.testing:
            # A child that cannot handle a signal yet dies of it.
            killed = self._stopped_by > 0 and result.code == -self._stopped_by
            self._end(running, self._stop_code if killed else result.code, result.error)
            return
        if (
            run_state(running.job.folder).step == step
        ):  # too short for its start and a meta-step, or in validation
            running.limit_s *= 2
        running.tries = 0
        self._continue(running)

    def _restart(self, running: RunningJob, error: str) -> None:
        """Try a lost slice in another slot, unless it was tried often enough."""
        running.tries += 1
        self._release(running)
        if self._stopped_by or running.tries >= TRIES:
            self._end(running, self._stop_code or ExitCode.FAILED, error)
            return
        name, step = running.job.name, run_state(running.job.folder).step
        node = self._node_of(running)
        self._on_event(Notice(f"{name} lost its place{node}: it goes on elsewhere from meta-step {step}"))
        self._continue(running)

    def _node_of(self, running: RunningJob) -> str:
        """' on node NAME' of the job's slot; empty if it never had one."""
        if self._ready([running.node]):
            with suppress(self._ray.exceptions.RayError):
                node = self._ray.get(running.node)
                return f" on node {self._nodes.get(node, node[:8])}"
        return ""

    def _continue(self, running: RunningJob) -> None:
        """Ask for the next slice, in the slot that the job has or in a new one; or end the job."""
        job, limit = running.job, f"{running.limit_s:.3f}s"
        training = job.train_command(job.folder, limit)
        if self._stopped_by or not (training or job.eval_command(job.folder)):
            self._end(running, self._stop_code)  # 0 is OK
            return
        running.testing = training is None
        files = None
        if running.slot is None:
            files = pack(job.folder)
            running.slot = self._actor.remote(job, self._cpus, mamlctl.__version__)
            running.node = running.slot.node.remote()
        running.slice = running.slot.work.remote(files, limit)

    def _end(self, running: RunningJob, code: int, error: str = "") -> None:
        self._release(running)
        running.lock.close()
        self._running.remove(running)
        self._ended.append(Ended(running.job.name, code, error))

    def _release(self, running: RunningJob) -> None:
        """Give a slot back: its folder removed if it still answers, its resources free at once."""
        slot, running.slot = running.slot, None
        if slot is not None:
            self._ray.wait([slot.leave.remote()], timeout=1.0)
            self._ray.kill(slot)


def alive_nodes(ray: Any) -> list[Mapping[str, Any]]:
    """The cluster's nodes that are alive, as ray describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def _node_name(node: Mapping[str, Any]) -> str:
    """Several nodes may be on one host, so with the beginning of ray's own name."""
    return f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})"


def room(nodes: Sequence[Mapping[str, Any]], cpus: float, gpus: float) -> int:
    """How many jobs of so many CPUs and GPUs ray's nodes have room for, each of them on one node."""
    needs = {name: number for name, number in (("CPU", cpus), ("GPU", gpus)) if number > 0}
    rooms = ([int(node["Resources"].get(name, 0) / need) for name, need in needs.items()] for node in nodes)
    return sum(min(each, default=1) for each in rooms)


@contextmanager
def open_cluster(
    address: str, *, slots: int | None, cpus: float, gpus: float, slice_s: float, on_event: OnEvent
) -> Iterator[RayExecutor]:
    """A cluster's executor for the block.

    Args:
        address: HOST:PORT, "auto" (the cluster that this machine is part of) or "local" (started here, ended
            with the block).
        slots: jobs at a time; None: as many as there is room for, counted again whenever a node dies.
        cpus: of each job.
        gpus: of each job; it may be a part of one.
        slice_s: seconds of training after which a run folder comes back.
        on_event: receives a notice for every node that joins or dies and every slice that is lost.

    Raises:
        MamlctlError: ray is not installed, no cluster answers, or no node has room for one job.
    """
    ray = _ray()
    _connect(ray, address)
    try:
        nodes = alive_nodes(ray)
        if not room(nodes, cpus, gpus):
            fact = f"no node of the cluster ({len(nodes)}) has {cpus:g} CPUs and {gpus:g} GPUs"
            raise MamlctlError(fact, hint="ask for less for each job, or add a node that has them")
        executor = RayExecutor(ray, slots=slots, cpus=cpus, gpus=gpus, slice_s=slice_s, on_event=on_event)
        try:
            yield executor
        finally:
            executor.close()
    finally:
        ray.shutdown()


def _ray() -> Any:
    os.environ.update(ENVIRONMENT)
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise MamlctlError("ray is not installed", hint="pip install 'mamlctl[cluster]'") from error
    return ray


def _connect(ray: Any, address: str) -> None:
    if address != "local":
        _reach(address)
    handler = signal.getsignal(signal.SIGTERM)  # ray replaces it
    options = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        ray.shutdown()
        raise _unreachable(address, str(error).strip().partition("\n")[0]) from error
    finally:
        signal.signal(signal.SIGTERM, handler)


def _reach(address: str) -> None:
    """Ask ray's own health check, in a process that can be left. Raises MamlctlError if there is no answer.

    ray.init tries for two minutes where nobody answers, and then ends its whole process.
    """
    named = address != "auto"
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check"]
    if named:
        command += ["--address", address]
    host, _, port = address.rpartition(":")
    if named and (not port.isdecimal() or "/" in host):
        raise _unreachable(address, "an address is HOST:PORT, as 'ray start --head' told it")
    try:
        if named:  # where nobody listens, the health check would still try for 40 s
            socket.create_connection((host, int(port)), CONNECT_S).close()
    except OSError as error:
        raise _unreachable(address, error.strerror or str(error)) from error
    try:
        check = subprocess.run(command, capture_output=True, timeout=REACH_S)
    except subprocess.TimeoutExpired as error:
        raise _unreachable(address, f"no answer in {REACH_S:g} s") from error
    if check.returncode and b"InvalidAuthToken" in check.stderr:
        hint = "set RAY_AUTH_MODE=token here and on every node, with the head's token (ray get-auth-token)"
        raise MamlctlError(f"the ray cluster at {address} asks for a token", hint=hint)
    if check.returncode:
        raise _unreachable(address, "its health check failed")


def _unreachable(address: str, why: str) -> MamlctlError:
    hint = "begin one with 'ray start --head'; mamlctl must run on one of its machines"
    return MamlctlError(f"no ray cluster can be used at {address}: {why}", hint=hint)
