"""An executor for a Ray cluster: jobs run in slices on any node, so a lost node costs at most one slice."""

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
from mamlctl.experiments.executors.jobs import KILLED, Ended, Job
from mamlctl.experiments.executors.ray_worker import SliceResult, WorkerSlot, pack, unpack
from mamlctl.run_folder import run_state

TRIES = 4  # of one slice; if so many nodes die, the slice is probably the reason
CONNECT_S = 10.0
REACH_S = 60.0  # for ray's health check, which takes 1 s on an idle machine; ray.init would try for 122 s
STOP_S = 60.0  # for all jobs to save and send their folders back; more than ray_worker.SAVE_S
HEARD_S = 10.0  # for a slot to acknowledge a stop; one that does not has no node yet
POLL_S = 0.1
LOOK_S = 2.0  # between two checks for new and dead nodes
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no usage reports, and no question about them
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # jobs without a GPU see none; set because ray warns otherwise
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # everything: ray would print the log of a dead node on stdout
}


@dataclass
class RunningJob:
    """A job with its slot and the slice that runs there."""

    job: Job
    lock: ExitStack  # releases the lock of the run folder
    limit_s: float  # of a slice
    tries: int = 0  # of the current slice
    slot: Any = None  # ray's handle of a WorkerSlot
    slice: object = None  # ray's reference to a SliceResult
    node: object = None  # ray's reference to the id of the slot's node
    testing: bool = False


class RayExecutor:
    """Runs jobs on the cluster to which `open_cluster` has connected. Implements jobs.Executor."""

    def __init__(
        self, ray: Any, *, slots: int | None, cpus: float, gpus: float, slice_s: float, on_event: OnEvent
    ) -> None:
        """See `open_cluster` for the arguments."""
        self._ray, self._on_event, self._slice_s = ray, on_event, slice_s
        self._cpus, self._gpus, self._fixed_slots = cpus, gpus, slots
        # Three threads: one works, one receives a stop in the meantime, one answers `node`.
        self._actor = ray.remote(WorkerSlot).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0, max_concurrency=3
        )
        self._running: list[RunningJob] = []
        self._ended: list[Ended] = []
        self._stopped_by = 0
        self._nodes: dict[str, str] = {}  # names by id, as of the last check
        self._last_look = -LOOK_S
        self.slots = slots or 1
        self._look_at_nodes()

    def start(self, job: Job) -> None:
        """Start a job, which runs as soon as a node has room for it."""
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
        """The jobs that have ended since the last call; handles finished slices and does not wait."""
        self._collect_slices()
        if time.monotonic() > self._last_look + LOOK_S:
            self._look_at_nodes()
        ended, self._ended = self._ended, []
        return ended

    def stop(self, number: int) -> None:
        """Make every job save, end and send its folder back; wait for at most a minute."""
        self._stopped_by = number
        began = time.monotonic()
        heard = {running.job.name: running.slot.stop.remote(number) for running in self._running}
        while self._running and time.monotonic() < began + STOP_S:
            self._collect_slices()
            if time.monotonic() > began + HEARD_S:
                for running in [*self._running]:
                    if not self._ready([heard[running.job.name]]):
                        self._end(running, self._stop_code, "stopped before a node had room for the job")
            time.sleep(POLL_S)
        for running in [*self._running]:
            self._end(running, self._stop_code, "stopped, but its node did not answer: a slice is lost")

    def close(self) -> None:
        """Release every slot at once."""
        for running in [*self._running]:
            self._end(running, KILLED)

    @property
    def _stop_code(self) -> int:
        """The exit code of stopped jobs; 0 before a stop."""
        return 128 + self._stopped_by if self._stopped_by else 0

    def _look_at_nodes(self) -> None:
        """Find the nodes that are alive, report new and dead ones, and set `slots`."""
        nodes = alive_nodes(self._ray)
        names = {node["NodeID"]: _node_name(node) for node in nodes}
        self.slots = self._fixed_slots or max(room(nodes, self._cpus, self._gpus), 1)
        total = (
            f"{len(nodes)} {plural(len(nodes), 'node')}, {self.slots} {plural(self.slots, 'job')} at a time"
        )
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

    def _ready(self, references: list[object]) -> list[object]:
        if not references:
            return []
        ready, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        return list(ready)

    def _collect(self, running: RunningJob) -> None:
        """Handle a slice that has finished or was lost."""
        errors = self._ray.exceptions
        try:
            result: SliceResult = self._ray.get(running.slice)
        except errors.RayTaskError as error:  # an error on the node, or a bug
            self._end(running, ExitCode.FAILED, f"{type(error.cause).__name__}: {error.cause}")
            return
        except errors.RayError as error:  # the slot no longer exists
            self._restart(running, str(error).partition("\n")[0])
            return
        step = run_state(running.job.folder).step
        if result.files is not None:
            unpack(result.files, running.job.folder)
        if result.code != ExitCode.OK or running.testing:
            # A child that has not installed its signal handlers yet is killed by the signal.
            killed = self._stopped_by > 0 and result.code == -self._stopped_by
            self._end(running, self._stop_code if killed else result.code, result.error)
            return
        if run_state(running.job.folder).step == step:
            # The slice was too short for the start and a meta-step, or was spent on validation.
            running.limit_s *= 2
        running.tries = 0
        self._continue(running)

    def _restart(self, running: RunningJob, error: str) -> None:
        """Run a lost slice again in another slot, up to TRIES times."""
        running.tries += 1
        self._release(running)
        if self._stopped_by or running.tries >= TRIES:
            self._end(running, self._stop_code or ExitCode.FAILED, error)
            return
        name, step = running.job.name, run_state(running.job.folder).step
        node = self._node_of(running)
        self._on_event(Notice(f"{name} lost its slot{node}: restarting elsewhere from meta-step {step}"))
        self._continue(running)

    def _node_of(self, running: RunningJob) -> str:
        """The node of the job's slot, for a message; empty if the slot has not started."""
        if self._ready([running.node]):
            with suppress(self._ray.exceptions.RayError):
                node = self._ray.get(running.node)
                return f" on node {self._nodes.get(node, node[:8])}"
        return ""

    def _continue(self, running: RunningJob) -> None:
        """Start the next slice, in the job's slot or in a new one; end the job if nothing is left to do."""
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
        """Release the job's slot at once; if it still answers, it removes its folder first."""
        slot, running.slot = running.slot, None
        if slot is not None:
            self._ray.wait([slot.leave.remote()], timeout=1.0)
            self._ray.kill(slot)


def alive_nodes(ray: Any) -> list[Mapping[str, Any]]:
    """The living nodes of the cluster, as ray describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def _node_name(node: Mapping[str, Any]) -> str:
    """The host and the beginning of ray's id, since a host may run several nodes."""
    return f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})"


def room(nodes: Sequence[Mapping[str, Any]], cpus: float, gpus: float) -> int:
    """The number of jobs for which the nodes have room; each job runs on one node.

    Args:
        nodes: the nodes, as ray describes them.
        cpus: CPUs per job.
        gpus: GPUs per job, which may be a fraction.
    """
    needs = {name: number for name, number in (("CPU", cpus), ("GPU", gpus)) if number > 0}
    rooms = ([int(node["Resources"].get(name, 0) / need) for name, need in needs.items()] for node in nodes)
    return sum(min(each, default=1) for each in rooms)


@contextmanager
def open_cluster(
    address: str, *, slots: int | None, cpus: float, gpus: float, slice_s: float, on_event: OnEvent
) -> Iterator[RayExecutor]:
    """Connect to a cluster for the duration of the block.

    Args:
        address: HOST:PORT, "auto" (the cluster of this machine) or "local" (a new cluster on this machine,
            which ends with the block).
        slots: jobs at a time; None to fill the cluster, with a new count whenever nodes join or die.
        cpus: CPUs per job.
        gpus: GPUs per job, which may be a fraction.
        slice_s: seconds of training after which a run folder is sent back.
        on_event: receives a notice for every node that joins or dies and for every lost slice.

    Raises:
        MamlctlError: ray is not installed, no cluster answers, or no node has room for one job.
    """
    ray = _ray()
    _connect(ray, address)
    try:
        nodes = alive_nodes(ray)
        if not room(nodes, cpus, gpus):
            fact = f"no node of the cluster ({len(nodes)}) has {cpus:g} CPUs and {gpus:g} GPUs"
            raise MamlctlError(fact, hint="lower --cell-cpus or --cell-gpus, or add a larger node")
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
    handler = signal.getsignal(signal.SIGTERM)  # ray.init replaces it
    options = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        ray.shutdown()
        raise _unreachable(address, str(error).strip().partition("\n")[0]) from error
    finally:
        signal.signal(signal.SIGTERM, handler)


def _reach(address: str) -> None:
    """Run ray's health check in a child process. Raises MamlctlError if the cluster does not answer.

    Without an answer, ray.init would try for two minutes and then exit this process.
    """
    named = address != "auto"
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check"]
    if named:
        command += ["--address", address]
    host, _, port = address.rpartition(":")
    if named and (not port.isdecimal() or "/" in host):
        raise _unreachable(address, "the address must be HOST:PORT, as 'ray start --head' prints it")
    try:
        if named:  # the health check would try for 40 s if nothing listens
            socket.create_connection((host, int(port)), CONNECT_S).close()
    except OSError as error:
        raise _unreachable(address, error.strerror or str(error)) from error
    try:
        check = subprocess.run(command, capture_output=True, timeout=REACH_S)
    except subprocess.TimeoutExpired as error:
        raise _unreachable(address, f"no answer in {REACH_S:g} s") from error
    if check.returncode and b"InvalidAuthToken" in check.stderr:
        hint = "set RAY_AUTH_MODE=token here and on every node, with the head's token (ray get-auth-token)"
        raise MamlctlError(f"the ray cluster at {address} requires a token", hint=hint)
    if check.returncode:
        raise _unreachable(address, "its health check failed")


def _unreachable(address: str, why: str) -> MamlctlError:
    hint = "start one with 'ray start --head', and run mamlctl on one of its machines"
    return MamlctlError(f"no ray cluster can be used at {address}: {why}", hint=hint)
