"""The machine, the versions and the code with which a run is started, and the preparation of its kernels."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import mamlctl
from mamlctl.core.events import OnEvent, Waiting
from mamlctl.core.literals import Precision
from mamlctl.core.metrics_rows import METRICS_VERSION
from mamlctl.data.tasks.streams import TaskSource
from mamlctl.engine.devices import cpu_model, device_words, precision_of
from mamlctl.engine.kernels.c_library import compilation
from mamlctl.settings.schema import TrainConfig

NOT_CODE = [f":(exclude){path}" for path in ("mamlctl/records", "mamlctl/docs", "README.md")]


def environment(config: TrainConfig, source: TaskSource, device: torch.device) -> dict[str, Any]:
    """What a reader needs to repeat a run: versions, machine, code, data and seeds.

    Args:
        config: the settings, with all derived values.
        source: the data of the run.
        device: the device of the run.
    """
    return code_and_machine(config.precision, device) | {
        "dataset_digest": source.digest,
        "dataset_older_digests": list(source.older_digests),
        "brightness": source.brightness,
        "seeds": {
            "init": config.init_seed,
            "train": config.train_seed,
            "split": config.split_seed,
            "eval": config.eval_seed,
        },
        "executable": sys.executable,
        "metrics_version": METRICS_VERSION,
    }


def code_and_machine(precision: Precision, device: torch.device) -> dict[str, Any]:
    """The part of `environment` that can change when a run is resumed elsewhere."""
    return {
        "mamlctl": mamlctl.__version__,
        "git": _git_state(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "device": device_words(device),
        "cpu": cpu_model(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "precision": precision_of(precision, device),
        "platform": platform.platform(),
    }


@contextmanager
def kernels_announced(device: torch.device, on_event: OnEvent) -> Iterator[None]:
    """Report it if kernels are prepared or compiled in the block, since this may take half a minute."""
    if device.type == "cuda":
        on_event(Waiting("preparing kernels"))  # Triton compiles those that are not in its cache
    with compilation(lambda: on_event(Waiting("compiling kernels"))):
        yield


def _git_state() -> dict[str, Any] | None:
    """The commit of this package's checkout and whether it has changes; None in an installed wheel.

    Changes of receipts and documentation do not count, because they do not change what a run computes.
    """
    root = Path(mamlctl.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    # With optional locks, a `git status` that Ctrl-C or the timeout kills would leave the index locked.
    git = ["git", "--no-optional-locks", "-C", str(root)]
    try:
        commit, dirt = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True, timeout=10)
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--", ".", *NOT_CODE))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(dirt.stdout.strip())}
