"""Several processes that share tasks, started by forks, so that each of them needs no new imports."""

import os
import socket
import sys
import traceback
import warnings

import torch

from mamlctl.engine import distributed

WAIT_S = 60


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def in_ranks(count, work, folder, timeout_s=WAIT_S):
    """Run `work(ranks)` in `count` processes; return what each of them returns."""
    port, children = free_port(), []
    for rank in range(count):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer versions of Python warn of forks in programs with threads
            pid = os.fork()
        if pid == 0:
            _become(rank, count, port, work, folder, timeout_s)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert codes == [0] * count
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _become(rank, count, port, work, folder, timeout_s):
    facts = {"RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in facts.items()}, GLOO_SOCKET_IFNAME="lo")
    code = 1
    try:
        ranks = distributed.open_ranks(timeout_s, on_stuck=lambda lost: os._exit(3))
        torch.save(work(ranks), folder / f"{rank}.pt")
        ranks.from_first()
        ranks.lifeline.leave(0)
        code = 0
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    os._exit(code)
