"""Tables of regression tasks: noisy periodic curves with trends, and CSV files of any rows.

`python -m helpers.own_tables FILE` writes the table of docs/regression.md.
"""

import sys

import numpy as np

PERIOD = 5.0
NOISE = 0.5  # standard deviation, in the units of y


def periodic_tasks(tasks=40, seed=7):
    """Task -> rows (x, y): a sine wave of random phase and amplitude on a random line, and normal noise."""
    generator = np.random.default_rng(seed)
    drawn = {}
    for task in range(tasks):
        x = generator.uniform(0, 10, generator.integers(24, 33))
        level, slope = generator.normal(20, 5), generator.normal(0, 1)
        amplitude, phase = generator.uniform(8, 12), generator.uniform(0, 2 * np.pi)
        y = level + slope * (x - 5) + amplitude * np.sin(2 * np.pi * x / PERIOD + phase)
        y += generator.normal(0, NOISE, len(x))
        drawn[f"curve{task:02d}"] = np.stack([x, y], axis=1).round(4)
    return drawn


def csv_text(rows, heads=("task", "x", "y")):
    """A CSV file of rows of cells."""
    return "".join(",".join(map(str, row)) + "\n" for row in (heads, *rows))


def periodic_csv(path, tasks=40, seed=7):
    """Write the periodic tasks as a CSV file, and return its path."""
    rows = [(task, *row) for task, values in periodic_tasks(tasks, seed).items() for row in values.tolist()]
    path.write_text(csv_text(rows))
    return path


def linear_tasks(tasks=12, rows=9, inputs=2, targets=2, seed=3):
    """The rows (task, x1, ..., y1, ...) of linear functions with noise, whose columns have other scales."""
    generator = np.random.default_rng(seed)
    lines = []
    for task in range(tasks):
        weights = generator.normal(size=(inputs, targets))
        x = generator.normal(3, 2, (rows, inputs))
        y = (x @ weights + generator.normal(0, 0.1, (rows, targets))) * 10.0 ** np.arange(targets) + 100
        lines += [(f"t{task}", *values) for values in np.concatenate([x, y], axis=1).tolist()]
    heads = ["task", *(f"x{n + 1}" for n in range(inputs)), *(f"y{n + 1}" for n in range(targets))]
    return lines, heads


if __name__ == "__main__":
    from pathlib import Path

    periodic_csv(Path(sys.argv[1]))
