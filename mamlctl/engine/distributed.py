"""The processes ("ranks") that share the tasks of a run: who takes which tasks, and their means.

Rank r of N computes a contiguous part of the tasks of a meta-step. The ranks exchange one buffer per
meta-step, with the meta-gradient and everything that is measured. All of them then take the same step, so no
rank ever needs the weights of another one.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from mamlctl.core.errors import MamlctlError, RankLostError
from mamlctl.core.lifeline import Lifeline, Lost
from mamlctl.core.literals import StopReason
from mamlctl.core.problems import Problem
from mamlctl.core.process import world

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

REASONS: tuple[StopReason, ...] = get_args(StopReason)[1:]  # without "", which is not a reason
ADDRESS = "mamlctl/lifeline"  # the key under which rank 0 stores its addresses for the others


RETRY_S = 0.2  # between attempts to connect to rank 0


@dataclass(frozen=True)
class Share:
    """The tasks of a rank."""

    first: int  # of the tasks that all ranks share, counted from 0
    tasks: int
    weight: float  # of their mean in the mean over all tasks


class Ranks:
    """This process among those of its run. With a single process, nothing is exchanged."""

    def __init__(self, rank: int = 0, count: int = 1, lifeline: Lifeline | None = None) -> None:
        """Without arguments: a single process.

        Args:
            rank: the number of this process, from 0.
            count: the number of processes.
            lifeline: shows which process is lost, if there are several.
        """
        self.rank, self.count, self.lifeline = rank, count, lifeline

    def share(self, tasks: int) -> Share:
        """The contiguous part of `tasks` tasks that this rank computes; parts differ by one task at most.

        With fewer tasks than ranks, a rank without a task computes that of another one with a weight of 0,
        because all ranks have to exchange the same numbers.
        """
        first, end = (number * tasks // self.count for number in (self.rank, self.rank + 1))
        if first == end:
            return Share(min(first, tasks - 1), 1, 0.0)
        return Share(first, end - first, (end - first) / tasks)

    def mean(self, tensors: Sequence[Tensor], weight: float, counts: Tensor) -> tuple[list[Tensor], Tensor]:
        """Average over all ranks in a single exchange; does nothing with a single process.

        Args:
            tensors: means over the tasks of this rank, of equal shapes on all ranks.
            weight: the weight of this rank; those of all ranks sum to 1.
            counts: numbers that are added up instead.

        Returns:
            The means over all tasks, equal to the bit on all ranks, and the sums of the counts.
        """
        if self.count == 1:
            return [*tensors], counts
        flat = torch.cat([torch.cat([tensor.detach().flatten() for tensor in tensors]) * weight, counts])
        self._add_up(flat)
        *parts, summed = torch.split(flat, [*(tensor.numel() for tensor in tensors), counts.numel()])
        pairs = zip(parts, tensors, strict=True)
        return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in pairs], summed

    def total(self, tensor: Tensor) -> Tensor:
        """Add up a tensor of the CPU over all ranks, in place, and return it."""
        if self.count > 1:
            self._add_up(tensor)
        return tensor

    def from_first(self, value: Any = None) -> Any:
        """Return what rank 0 calls this with, on all ranks: plain values, and tensors on the CPU."""
        if self.count == 1:
            return value
        values = [value]
        with self._exchange():
            torch.distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def _add_up(self, tensor: Tensor) -> None:
        with self._exchange():
            torch.distributed.all_reduce(tensor)

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        """Turn the failure of an exchange into the error that names the rank which caused it."""
        assert self.lifeline is not None
        with self.lifeline.waiting():
            try:
                yield
            except RuntimeError as error:
                lost = self.lifeline.cause()
                if self.lifeline.ended is not None:
                    raise SystemExit(self.lifeline.ended) from None
                raise RankLostError(str(error).partition("\n")[0] if lost is None else lost.text) from error

    def wait_for(self, event: torch.cuda.Event) -> None:
        """Wait until a CUDA device has done its work, which may wait for other ranks."""
        assert self.lifeline is not None
        with self.lifeline.waiting():
            event.synchronize()

    def device_problems(self, device: str) -> list[Problem]:
        """Why the ranks of this machine cannot use a device, as pairs of fact and hint."""
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if self.count == 1 or device == "cpu" or not torch.cuda.is_available():
            return []
        if device.startswith("cuda:"):
            fact = f"--device is {device}, but each of {self.count} processes needs a device of its own"
            return [(fact, "use --device cuda, which takes the first ones")]
        if (devices := torch.cuda.device_count()) < here:
            fact = f"{here} processes need a CUDA device each, but this machine has {devices}"
            return [(fact, f"start {devices}, or use --device cpu")]
        return []


ALONE = Ranks()
_current = ALONE


def current() -> Ranks:
    """The ranks of this process: those that `open_ranks` has met, else this process alone."""
    return _current


def leave_ranks() -> None:
    """Work alone from now on, after the others have received their last job."""
    global _current
    _current = ALONE


class StopVote:
    """Why to stop: a request on any rank stops all ranks after the same meta-step."""

    def __init__(self, ranks: Ranks, ask: Callable[[], StopReason], like: Tensor) -> None:
        """Start without a request.

        Args:
            ranks: the processes.
            ask: returns why this process should stop, or "".
            like: a tensor of the device and dtype of the exchanged numbers.
        """
        self.ranks, self.ask = ranks, ask
        self.counts = torch.zeros(len(REASONS), dtype=like.dtype, device=like.device)  # of this rank
        self._agreed: StopReason = ""
        self._before: tuple[Tensor, torch.cuda.Event] | None = None
        self._own: StopReason = ""

    def reason(self) -> StopReason:
        """Why to stop now, or "". With several ranks: what all of them know since the last exchange."""
        return self.ask() if self.ranks.count == 1 else self._agreed

    def cast(self) -> None:
        """Put the request of this rank into `counts`, which the next exchange adds up."""
        if self.ranks.count > 1 and (own := self.ask()) != self._own:
            self._own = own
            self.counts.copy_(torch.tensor(_counts_of(own), dtype=self.counts.dtype))

    def hear(self, summed: Tensor) -> None:
        """Note the sum of all counts. On CUDA it is read one meta-step later, when it has arrived."""
        if summed.device.type == "cpu":
            self._decide(summed.tolist())
            return
        if self._before is not None:
            copy, event = self._before
            self.ranks.wait_for(event)
            self._decide(copy.tolist())
        copy = torch.empty(summed.shape, dtype=summed.dtype, pin_memory=True)
        copy.copy_(summed, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._before = copy, event

    def agree(self) -> StopReason:
        """Why to stop, after an exchange of its own: for validation, between its chunks of tasks."""
        if self.ranks.count == 1:
            return self.ask()
        self._decide(self.ranks.total(torch.tensor(_counts_of(self.ask()))).tolist())
        return self._agreed

    def _decide(self, counts: Sequence[float]) -> None:
        # The reason with the highest number, since a signal is more urgent than a time limit.
        reasons = [reason for reason, count in zip(REASONS, counts, strict=True) if count]
        if reasons:
            self._agreed = self._agreed or reasons[-1]


def _counts_of(reason: StopReason) -> list[float]:
    return [float(reason == name) for name in REASONS]


def open_ranks(timeout_s: float, on_stuck: Callable[[Lost], None]) -> Ranks:
    """Meet the other processes of the run.

    Args:
        timeout_s: how long any wait for another process may last.
        on_stuck: as in `Lifeline`.

    Raises:
        MamlctlError: not all processes arrive in time.
    """
    from torch.distributed import PrefixStore, init_process_group  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    rank, count = world()
    timeout = timedelta(seconds=timeout_s)
    lifeline = Lifeline(rank, count, timeout_s=timeout_s, on_stuck=on_stuck)
    backend = "gloo"
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        if rank == 0:
            token = secrets.token_hex()
            facts = {"hosts": _own_addresses(), "port": lifeline.listen(token), "token": token}
            store.set(ADDRESS, json.dumps(facts))
        else:
            token = _connected(lifeline, store, timeout_s)
        # After a restart, torchrun's store may still contain the addresses of dead processes.
        own_store = PrefixStore(token, store)
        init_process_group(backend, store=own_store, rank=rank, world_size=count, timeout=timeout)
    except (RuntimeError, OSError) as error:
        lost = lifeline.lost
        why = str(error).partition("\n")[0] if lost is None else lost.text
        fact = f"the {count} processes of this run did not meet: {why}"
        hint = "check the other processes, and that rank 0 can be reached; --rank-timeout waits longer"
        if "EADDRINUSE" in why:
            hint = "choose another port, e.g. with torchrun --master-port, or start the command again"
        raise MamlctlError(fact, hint=hint) from error
    global _current
    _current = Ranks(rank, count, lifeline)
    return _current


def _connected(lifeline: Lifeline, store: Store, timeout_s: float) -> str:
    """Connect to rank 0, and return its token; the address may be that of a dead process at first."""
    deadline = time.monotonic() + timeout_s
    while True:
        facts = json.loads(store.get(ADDRESS))
        try:
            lifeline.connect(**facts)
            return str(facts["token"])
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(RETRY_S)


def _own_addresses() -> list[str]:
    """The addresses under which other ranks may reach this machine, the likeliest first."""
    master, names = os.environ["MASTER_ADDR"], [socket.gethostname(), socket.getfqdn()]
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master, int(os.environ["MASTER_PORT"])))  # sends nothing; chooses the interface
        names.insert(0, probe.getsockname()[0])
    return list(dict.fromkeys([*names, master]))
