"""Random settings: training works, refuses them or diverges, but never ends with a traceback."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from dataclasses import Field
from pathlib import Path
from random import Random

import hypothesis
from hypothesis import strategies

from faults.commands import LENGTH, Undisturbed, call
from mamlctl.core.literals import BUILT_IN_NETS
from mamlctl.data.sets.curves import FAMILIES
from mamlctl.engine.algorithms.registry import ALGORITHMS
from mamlctl.settings.rules import VALUE_TYPES
from mamlctl.settings.schema import FIELDS, TrainConfig

ALLOWED = (0, 2, 4)
EXAMPLES = 20  # of one seed
MOST_SETTINGS = 8  # of one example
# The largest values that are tried, so that a run takes little memory and time; 4 for other counts.
LARGEST = {"image_size": 40, "filters": 8, "ways": 6, "cg_steps": 3, "report_every": 3}
# Settings that are not drawn.
FIXED = {*(name.replace("-", "_") for name in LENGTH), "data_root", "filters", "meta_batch_size"}
WORDS = {
    "dataset": ["glyphs", "glyphs", *FAMILIES, "nothing"],
    "algo": [*ALGORITHMS],
    "split_scheme": ["own", "vinyals", "folders", ""],
    "split_fractions": ["60-20-20", "98-1-1", "50-50", "x"],
    "resize": ["none", "box", ""],
    "net": [*BUILT_IN_NETS, "conv5", "net.py:make"],
    "head": ["fc", ""],
    "init": ["omniglot-5w1s", "nothing.pt", "."],
    "init_skip": ["head", "conv1,norm?", "body", ""],
    "freeze": ["body", "head", "conv[12],norm*", "*", "fc"],
    "hidden": ["8-8", "4", "0", "a-b", ""],
    "device": ["cpu", "auto", "cuda:7", "gpu"],
    "task_chunk": ["auto", "1", "3", "0", "all"],
    "checkpoint_every": ["1s", "9m", "0", "soon"],
}
_one_at_a_time = threading.Lock()  # hypothesis keeps global state while it draws


def values(item: Field[object]) -> strategies.SearchStrategy[str]:
    """Values of one setting as words of the command line: possible ones, and a few that are not."""
    kind, limits = VALUE_TYPES[TrainConfig][item.name], item.metadata["limits"]
    if kind.choices or item.name in WORDS:
        return strategies.sampled_from([*map(str, kind.choices), *WORDS.get(item.name, [])])
    if kind.kind is int:
        least = int(limits.least or 0)
        usual = strategies.integers(least, max(least + 2, LARGEST.get(item.name, 4)))
        return (usual | strategies.just(least - 1)).map(str)
    usual = strategies.floats(1e-4, 1, allow_nan=False)
    wild = strategies.floats(allow_nan=True, allow_infinity=True)
    return (usual | usual | wild).map(lambda number: f"{number:.6g}")


def words() -> strategies.SearchStrategy[list[str]]:
    """The words of random settings."""
    names = [name for name in FIELDS if name not in FIXED]

    @strategies.composite
    def draw_words(draw: strategies.DrawFn) -> list[str]:
        chosen = draw(strategies.lists(strategies.sampled_from(names), unique=True, max_size=MOST_SETTINGS))
        found = []
        for name in chosen:
            flag = name.replace("_", "-")
            if VALUE_TYPES[TrainConfig][name].kind is bool:
                found.append(f"--{draw(strategies.sampled_from(['', 'no-']))}{flag}")
            else:
                found.append(f"--{flag}={draw(values(FIELDS[name]))}")
        return found

    return draw_words()


def drawn(seed: int, count: int) -> list[list[str]]:
    """Examples that hypothesis draws with this seed."""
    examples: list[list[str]] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(words())
    def collect(example: list[str]) -> None:
        examples.append(example)

    with _one_at_a_time:
        collect()
    return examples


def train(undisturbed: Undisturbed, random: Random, folder: Path) -> Iterator[str]:
    """Train two meta-steps with random settings."""
    small = ["--dataset=glyphs", "--filters=4", "--meta-batch-size=2", "--epochs=1", "--steps-per-epoch=2"]
    small += ["--val-tasks=2", "--offline", f"--data-root={undisturbed.data}", f"--out={folder / 'run'}"]
    for example in drawn(random.getrandbits(32), EXAMPLES):
        yield call(["train", *small, *example], folder).problem(*ALLOWED)
        shutil.rmtree(folder / "run", ignore_errors=True)
