"""Training on curves by mamlctl's engines and by JAX; a worker: `python -m benchmarks.curves`.

The loop is that of the preset sinusoid-5s-maml: draw 25 sinusoids, one inner step on 5 points, the loss on 10
other points, second order, and a step of Adam. mamlctl also reports every 100 meta-steps and saves
checkpoints.
"""

from __future__ import annotations

import atexit
import functools
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.pipes import Answer, Document, Worker, WorkerFailed, serve
from mamlctl.data.tasks.episodes import Placement
from mamlctl.data.tasks.streams import open_streams
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.trainer import Trainer
from mamlctl.experiments.settings import fill_defaults, resolve_settings
from mamlctl.run_folder import new_run
from mamlctl.settings.presets import load_preset
from mamlctl.settings.schema import TrainConfig

LEARNERS = ("compiled", "plain", "jax")
PRESET = "sinusoid-5s-maml"
SCANNED = 500  # meta-steps per call of the program that JAX compiles
SECONDS = 1.0  # per measurement
COLUMNS = ("case", "order", "learner", "s/meta-step", "min-max", "n", "vs plain")


@dataclass
class CurveRow:
    """The measurements of one learner."""

    learner: str
    seconds: list[float] = field(default_factory=list)  # per meta-step; one number per repeat
    skipped: str | None = None


def measure_curves(repeats: int) -> list[CurveRow]:
    """Measure all learners in turn; one that cannot run is skipped, such as JAX if it is not installed."""
    rows = [CurveRow(learner) for learner in LEARNERS]
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker("benchmarks.curves", {"learner": row.learner})) for row in rows]
        for repeat in range(-1, repeats):  # the first round is a warm-up
            for row, worker in zip(rows, workers, strict=True):
                if row.skipped:
                    continue
                try:
                    if repeat < 0:
                        worker.hear()
                    answer = worker.ask({"seconds": SECONDS})
                except WorkerFailed as failure:
                    row.skipped = str(failure)
                    continue
                if repeat >= 0:
                    row.seconds.append(answer["seconds"])
    return rows


def curves_table(rows: Sequence[CurveRow]) -> Table:
    """Return the table of the learners on curves."""
    skipped = [f"{row.learner} skipped: {row.skipped}" for row in rows if row.skipped]
    note = "compiled, plain: the whole training loop. jax: draws, meta-step and Adam in one compiled loop."
    table = Table(title="Training on curves", caption="\n".join([*skipped, note]), caption_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:3] else "right", no_wrap=True)
    plain = next(row.seconds for row in rows if row.learner == "plain")
    for row in rows:
        cells = ["skipped"]
        if row.seconds:
            median = statistics.median(row.seconds)
            faster = f"{statistics.median(plain) / median:.2f}x" if plain else ""
            spread = f"{min(row.seconds):.3g}-{max(row.seconds):.3g}"
            cells = [f"{median:.3g}", spread, str(len(row.seconds)), faster]
        table.add_row("sinusoid-5s", "second", row.learner, *cells)
    return table


def curve_config(**settings: Any) -> TrainConfig:
    """Return the settings of the preset, changed by `settings`."""
    layers = [("preset", load_preset(PRESET)), ("flag", {"device": "cpu", "val_tasks": 2} | settings)]
    return fill_defaults(resolve_settings(layers).config)


def engine_loop(engine: str, folder: Path) -> Callable[[float], float]:
    """Return a function that trains for some seconds and returns the seconds per meta-step."""
    config = curve_config(engine=engine, epochs=1, steps_per_epoch=10**9)
    place = Placement(torch.device("cpu"))
    streams, source = open_streams(config, ("train", "val"), place, offline=True, on_event=lambda event: None)
    net, state = build(config, source.example_shape, place.device)
    deadline, before = 0.0, 0

    def stop_reason() -> Any:
        late = time.perf_counter() > deadline and trainer.position.step > before
        return "SIGTERM" if late else ""

    with new_run(folder / engine, config, config, command="", environment={}) as run:
        trainer = Trainer(
            config, net, state, streams, run, on_event=lambda event: None, stop_reason=stop_reason
        )

    def train(seconds: float) -> float:
        nonlocal deadline, before
        start, before = time.perf_counter(), trainer.position.step
        deadline = start + seconds
        trainer.train()
        return (time.perf_counter() - start) / (trainer.position.step - before)

    return train


def jax_loss(weights: Any, tasks: Any, config: TrainConfig) -> Any:
    """Return the meta-loss in JAX.

    Args:
        weights: W and b of every layer.
        tasks: support x and y, query x and y of all tasks, x _TED and y _TE.
        config: the inner rate.
    """
    import jax
    import jax.numpy as jnp

    def loss(layers: Any, x_ED: Any, y_E: Any) -> Any:
        for weight, bias in layers[:-1]:
            x_ED = jax.nn.relu(x_ED @ weight.T + bias)
        weight, bias = layers[-1]
        return jnp.mean(((x_ED @ weight.T + bias)[:, 0] - y_E) ** 2)

    def of_task(support_x: Any, support_y: Any, query_x: Any, query_y: Any) -> Any:
        grads = jax.grad(loss)(weights, support_x, support_y)
        fast = jax.tree.map(lambda weight, grad: weight - config.inner_lr * grad, weights, grads)
        return loss(fast, query_x, query_y)

    return jnp.mean(jax.vmap(of_task)(*tasks))


def jax_loop() -> Callable[[float], float]:
    """Return the same as `engine_loop` for JAX: one compiled program runs `SCANNED` meta-steps."""
    if os.environ.get("OMP_NUM_THREADS") == "1":
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp

    config = curve_config()
    _, state = build(config, (1,), torch.device("cpu"))
    flat = [jnp.asarray(tensor.numpy()) for tensor in state.slow.values()]
    weights = list(zip(flat[::2], flat[1::2], strict=True))
    sizes = config.meta_batch_size, config.shots + config.queries
    b1, b2 = config.adam_beta1, config.adam_beta2

    def draw(key: Any) -> tuple[Any, ...]:
        amplitude_key, phase_key, x_key = jax.random.split(key, 3)
        amplitude = jax.random.uniform(amplitude_key, (sizes[0], 1), minval=0.1, maxval=5.0)
        phase = jax.random.uniform(phase_key, (sizes[0], 1), maxval=math.pi)
        x = jax.random.uniform(x_key, sizes, minval=-5.0, maxval=5.0)
        y, cut = amplitude * jnp.sin(x - phase), config.shots
        return x[:, :cut, None], y[:, :cut], x[:, cut:, None], y[:, cut:]

    def step(carry: Any, _: Any) -> tuple[Any, Any]:
        weights, first, second, taken, key = carry
        key, task_key = jax.random.split(key)
        loss, grads = jax.value_and_grad(jax_loss)(weights, draw(task_key), config)
        taken = taken + 1
        first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, first, grads)
        second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, second, grads)
        rate, correction = config.meta_lr / (1 - b1**taken), jnp.sqrt(1 - b2**taken)
        weights = jax.tree.map(
            lambda w, m, v: w - rate * m / (jnp.sqrt(v) / correction + 1e-8), weights, first, second
        )
        return (weights, first, second, taken, key), loss

    scan = jax.jit(functools.partial(jax.lax.scan, step, length=SCANNED))
    zeros = jax.tree.map(jnp.zeros_like, weights)
    carry = jax.block_until_ready(scan((weights, zeros, zeros, jnp.float32(0), jax.random.PRNGKey(0))))[0]

    def train(seconds: float) -> float:
        nonlocal carry
        start, steps = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            carry, losses = scan(carry)
            jax.block_until_ready(losses)
            steps += SCANNED
        return (time.perf_counter() - start) / steps

    return train


def open_learner(opening: Document) -> tuple[Document, Answer]:
    """Prepare the learner `learner`; the answer to `seconds` is the seconds per meta-step."""
    name, folder = opening["learner"], Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    loop = jax_loop() if name == "jax" else engine_loop(name, folder)

    def answer(question: Document) -> Document:
        return {"seconds": loop(question["seconds"])}

    return {}, answer


if __name__ == "__main__":
    serve(open_learner)
