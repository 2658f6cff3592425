"""One learner in its own process, controlled over pipes: `python -m benchmarks.worker`."""

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
from mamlctl.engine.training.cuda_graphs import runner_of
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.meta_step import MetaStep

Step = Callable[[Episodes], Tensor]


def random_episodes(case: Case, device: torch.device, dtype: torch.dtype = torch.float32) -> Episodes:
    """Return tasks of random grey values, which need the same arithmetic as real images."""
    generator = torch.Generator().manual_seed(0)
    label_N = torch.arange(case.ways)

    def images(each: int) -> Tensor:
        shape = (case.tasks, case.ways * each, *case.image)
        return torch.rand(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def labels(each: int) -> Tensor:
        return label_N.repeat_interleave(each).repeat(case.tasks, 1).to(device)

    return Episodes(images(case.shots), labels(case.shots), images(case.queries), labels(case.queries))


def engine_step(case: Case, name: str, device: torch.device) -> Step:
    """Return mamlctl's meta-step, as in training."""
    config = train_config(case, engine_settings(name))
    runner = runner_of(MetaStep(config, *build(config, case.image, device)))

    def meta_step(episodes: Episodes) -> Tensor:
        measured = runner.measure(episodes, 0, measure_all=False)
        runner.apply(measured, 0)
        return measured.meta_loss

    return meta_step


def peer_step(case: Case, name: str, device: torch.device) -> Step:
    """Return a peer's meta-step, with the same initial weights as mamlctl's."""
    _, state = build(train_config(case, {}), case.image, device)
    return PEERS[name](case, state.slow, INNER_LR).meta_step


def open_learner(opening: Document) -> tuple[Document, Answer]:
    """Prepare the learner; return its memory use and a function that runs meta-steps.

    Args:
        opening: `case`, `learner` and `device`; for the published code also `official`, its folder.
    """
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
        """Run `count` meta-steps; return the seconds per step, the last loss, and the peak memory so far."""
        seconds, loss = timed(step, episodes, question["count"], device)
        return {
            "seconds": seconds,
            "loss": loss if math.isfinite(loss) else None,
            "peak_bytes": peak_bytes(device),
        }

    return {"idle_bytes": peak_bytes(device)}, answer


def timed(step: Step, episodes: Episodes, count: int, device: torch.device) -> tuple[float, float]:
    """Return the mean seconds of `count` meta-steps between two synchronisations, and the last meta-loss."""
    # Shallow copies, so that an engine cannot recognise a meta-batch and reuse earlier results.
    batches = [replace(episodes) for _ in range(count)]
    loss = torch.zeros(())
    wait(device)
    start = time.perf_counter()
    for batch in batches:
        loss = step(batch)
    wait(device)
    return (time.perf_counter() - start) / count, loss.item()


def wait(device: torch.device) -> None:
    """Wait until a CUDA device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory of this process: resident, or allocated by torch on a CUDA device."""
    status = Path("/proc/self/status")
    if device.type == "cuda" or not status.exists():
        return memory_bytes(device)
    # getrusage also counts the memory of the parent, which a child shares until it calls exec.
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    serve(open_learner)
