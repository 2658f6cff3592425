"""One learner in a process of its own: `python -m benchmarks.worker`, told over a pipe when to go."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import INNER_LR, Case, case_of, engine_settings, train_config
from benchmarks.official import Official
from benchmarks.peers import PEERS
from benchmarks.pipes import Answer, Document, serve
from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.devices import memory_bytes, open_device
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.meta_step import MetaStep

Step = Callable[[Episodes], Tensor]


def random_episodes(case: Case, device: torch.device, dtype: torch.dtype = torch.float32) -> Episodes:
    """Tasks of random grey values: the arithmetic is that of real images."""
    generator = torch.Generator().manual_seed(0)
    label_N = torch.arange(case.ways)

    def images(each: int) -> Tensor:
        shape = (case.tasks, case.ways * each, *case.image)
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def labels(each: int) -> Tensor:
        return label_N.repeat_interleave(each).repeat(case.tasks, 1).to(device)

    return Episodes(images(case.shots), labels(case.shots), images(case.queries), labels(case.queries))


def engine_step(case: Case, name: str, device: torch.device) -> Step:
    """A meta-step of ours as training does it."""
    config = train_config(case, engine_settings(name))
    step = MetaStep(config, *build(config, case.image, device))

    def meta_step(episodes: Episodes) -> Tensor:
        measured = step.measure(episodes, 0, measure_all=False)
        step.apply(measured, 0)
        return measured.meta_loss

    return meta_step


def peer_step(case: Case, name: str, device: torch.device) -> Step:
    """Somebody else's, from our starting weights."""
    _, state = build(train_config(case, {}), case.image, device)
    return PEERS[name](case, state.slow, INNER_LR).meta_step


def open_learner(opening: Document) -> tuple[Document, Answer]:
    """`case`, `learner`, `device`, and for the published code `official`, its folder."""
    case, name = case_of(opening["case"]), opening["learner"]
    ours = name not in PEERS and name != "official"
    device = open_device(opening["device"], engine_settings(name)["precision"] if ours else "float32")
    if ours:
        step = engine_step(case, name, device)
    elif name == "official":
        step = Official(Path(opening["official"]), case, device).meta_step
    else:
        step = peer_step(case, name, device)
    episodes = random_episodes(case, device)

    def answer(question: Document) -> Document:
        """`count` meta-steps in a row -> seconds of one, what the last one lost, peak memory until now."""
        seconds, loss = timed(step, episodes, question["count"], device)
        return {
            "seconds": seconds,
            "loss": loss if math.isfinite(loss) else None,
            "peak_bytes": peak_bytes(device),
        }

    return {"idle_bytes": peak_bytes(device)}, answer


def timed(step: Step, episodes: Episodes, count: int, device: torch.device) -> tuple[float, float]:
    """Mean seconds of `count` meta-steps between two waits for the device, and the last meta-loss."""
    # Shallow copies: engines that recognise a meta-batch which they have seen gain nothing.
    batches = [replace(episodes) for _ in range(count)]
    loss = torch.zeros(())
    wait(device)
    start = time.perf_counter()
    for batch in batches:
        loss = step(batch)
    wait(device)
    return (time.perf_counter() - start) / count, loss.item()


def wait(device: torch.device) -> None:
    """For all that a CUDA device still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int:
    """Peak memory of this process: resident, or allocated by torch on a CUDA device."""
    status = Path("/proc/self/status")
    if device.type == "cuda" or not status.exists():
        return memory_bytes(device)
    # getrusage would also count the parent, whose memory a process has until it becomes another program.
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    serve(open_learner)
