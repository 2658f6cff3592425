"""Meta-steps that processes share, with one thread each; a worker: `python -m benchmarks.scaling`.

The case is Omniglot's size, 5-way 1-shot, 64 filters, 8 tasks, second order, with random images.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field

import torch
from helpers.engine_cases import random_episodes
from rich.table import Table

from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.distributed import Ranks, StopVote, open_ranks
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.meta_step import MetaStep
from mamlctl.experiments.settings import fill_defaults, resolve_settings

COUNTS = (1, 2)
STEPS = 10  # meta-steps, and exchanges, per measurement
COLUMNS = ("ranks", "s/meta-step", "min-max", "n", "speed-up", "exchange")


@dataclass
class ScalingRow:
    """The measurements with one number of ranks."""

    ranks: int
    seconds: list[float] = field(default_factory=list)  # per meta-step; one number per repeat
    exchange_s: list[float] = field(default_factory=list)  # of as many numbers as a meta-step exchanges


def measure_scaling(repeats: int) -> list[ScalingRow]:
    """Measure with one and two ranks in turn."""
    rows = [ScalingRow(count) for count in COUNTS]
    for _ in range(repeats):
        for row in rows:
            words = ["--nproc-per-node", str(row.ranks), "--standalone", "-m", "benchmarks.scaling"]
            command = [sys.executable, "-m", "torch.distributed.run", *words]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
            answer = json.loads(done.stdout)
            row.seconds.append(answer["seconds"])
            row.exchange_s.append(answer["exchange_s"])
    return rows


def scaling_table(rows: list[ScalingRow]) -> Table:
    """The medians, and the speed-up compared with one rank."""
    table = Table(*COLUMNS, title="Ranks with one thread each")
    alone = statistics.median(rows[0].seconds)
    for row in rows:
        median = statistics.median(row.seconds)
        exchange = f"{statistics.median(row.exchange_s) * 1e3:.2f} ms" if row.ranks > 1 else ""
        extremes = f"{min(row.seconds):.3g}-{max(row.seconds):.3g}"
        cells = str(row.ranks), f"{median:.3g}", extremes, str(len(row.seconds))
        table.add_row(*cells, f"{alone / median:.2f}", exchange)
    return table


def timed(ranks: Ranks) -> dict[str, float]:
    """The seconds of a meta-step and of an exchange."""
    torch.set_num_threads(1)
    layers = [("flag", {"dataset": "omniglot", "algo": "maml", "precision": "float32"})]
    config = fill_defaults(resolve_settings(layers).config)
    net, state = build(config, (1, 28, 28), torch.device("cpu"))
    step = MetaStep(config, net, state)
    if ranks.count > 1:
        step.vote = StopVote(ranks, lambda: "", state.example_tensor)
    share = ranks.share(config.meta_batch_size)
    episodes = random_episodes(config, image=(1, 28, 28)).split(share.tasks)[ranks.rank]
    support_x, support_y, query_x, query_y = episodes.sets
    own = Episodes(support_x.float(), support_y, query_x.float(), query_y)

    def steps() -> None:
        for _ in range(STEPS):
            step.apply(step.measure(own, 0, measure_all=False), 0)

    def exchanges() -> None:
        weights = [tensor.detach() for tensor in step.learnable.values()]
        for _ in range(STEPS):
            ranks.mean(weights, share.weight, torch.zeros(4))

    found = []
    for work in (steps, exchanges):
        work()
        start = time.perf_counter()
        work()
        found.append((time.perf_counter() - start) / STEPS)
    return {"seconds": found[0], "exchange_s": found[1]}


def main() -> None:
    """Do the share of one rank; rank 0 prints the result."""
    ranks = open_ranks(60, on_stuck=lambda lost: os._exit(1))
    found = timed(ranks)
    if ranks.rank == 0:
        sys.stdout.write(json.dumps(found) + "\n")
    ranks.from_first()
    torch.distributed.destroy_process_group()  # else its threads can abort the interpreter at its end


if __name__ == "__main__":
    main()
