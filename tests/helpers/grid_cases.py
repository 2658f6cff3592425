"""Small grids, shared by the tests of `ablate` and `compare`."""

import sys
from contextlib import nullcontext
from unittest.mock import patch

from helpers import preloaded
from helpers.shared import ignore
from mamlctl.experiments.grid.ablate import ablate, local_executor
from mamlctl.experiments.grid.grid import resolve_rows
from mamlctl.experiments.grid.grid_folder import open_grid
from mamlctl.experiments.grid.plans import grid_rows
from mamlctl.settings.evaluation import EvalConfig

TINY = {
    "dataset": "glyphs",
    "algo": "maml",
    "ways": 3,
    "filters": 4,
    "inner_steps": 2,
    "meta_batch_size": 2,
    "epochs": 2,
    "steps_per_epoch": 3,
    "val_tasks": 6,
}
TESTED = EvalConfig(tasks=12)
QUICK_WORDS = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def tiny_grid(folder, data_root, *pairs, seeds=(0, 1), evaluate=TESTED, **settings):
    """A grid over `key=v1,v2` pairs, with runs that take milliseconds."""
    given = TINY | {"data_root": str(data_root)} | settings
    rows = resolve_rows(grid_rows(pairs), [], given, seeds[0])
    return open_grid(folder, "grid", rows, seeds, evaluate, "mamlctl ablate")


def filled(grid, workers=2, on_event=ignore, pictures=False):
    """Train and test all cells -> GridResult."""
    drawing = nullcontext() if pictures else preloaded.without_pictures()
    with drawing, patch.object(sys, "executable", preloaded.python()):
        return ablate(grid, local_executor(grid, workers), time_limit_s=None, on_event=on_event)


def without_times(document):
    """A table's document without times and paths, which differ between two runs of the same grid."""
    if isinstance(document, dict):
        return {
            key: without_times(value)
            for key, value in document.items()
            if not any(word in key for word in ("second", "step_s", "command", "environment"))
        }
    return [without_times(value) for value in document] if isinstance(document, list) else document
