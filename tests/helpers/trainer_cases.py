"""Small training runs, interrupted or not, and the part of their results that must be equal."""

import itertools

import numpy as np
import torch

from helpers.data_cases import image_stream
from helpers.engine_cases import small_config
from mamlctl.data.reading.packs import pack
from mamlctl.engine.training import checkpoints
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.trainer import Trainer
from mamlctl.run_folder import new_run

CPU = torch.device("cpu")
CLASSES, IMAGES = 12, 6


TIMES = {"tasks_per_second", "memory_bytes"}  # metrics that differ between any two runs


def patterns():
    """Images of 16x16 whose classes are random patterns with noise."""
    generator = np.random.default_rng(0)
    pattern = generator.integers(0, 256, (CLASSES, 1, 1, 16, 16))
    images = (pattern + generator.integers(-60, 60, (CLASSES, IMAGES, 1, 16, 16))).clip(0, 255)
    return pack(images.reshape(-1, 1, 16, 16).astype(np.uint8), np.full(CLASSES, IMAGES), ("c",) * CLASSES)


def config_of(**settings):
    defaults = {"algo": "maml++", "epochs": 3, "steps_per_epoch": 4, "report_every": 3, "val_tasks": 10}
    return small_config(**defaults | {"queries": 1} | settings)


def trainer_of(run, config, *, stop_at=None, events=None):
    """A trainer; `stop_at` is the call of `stop_reason`, counted from 0, that returns a reason to stop."""
    packed = patterns()
    net, state = build(config, (1, 16, 16), CPU, classes=8)
    common = {"name": "patterns", "ways": 3, "shots": 2, "queries": 1, "rotations": "none", "ink": 1}
    streams = {
        split: image_stream(packed, classes, split=split, dtype=torch.float64, **common)
        for split, classes in (("train", np.arange(8)), ("val", np.arange(8, 12)))
    }
    questions = itertools.count()

    def stop_reason():
        return "asked" if stop_at is not None and next(questions) >= stop_at else ""

    kept = events if events is not None else []
    return Trainer(config, net, state, streams, run, on_event=kept.append, stop_reason=stop_reason)


def make_run(path, config):
    with new_run(path, config, config, command="test", environment={}) as run:
        return run


def comparable(run):
    """All metrics except times, and a digest of all tensors and numbers of the last checkpoint."""
    metrics = [{key: value for key, value in entry.items() if key not in TIMES} for entry in run.metrics()]
    return metrics, checkpoints._digest(checkpoints.load(run.checkpoints / "last.pt", owner=run.owner))
