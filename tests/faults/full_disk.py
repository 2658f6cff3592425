"""File systems that fill up: the error names the file, and with more space the work can be finished."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from faults.commands import Undisturbed, call, numbers
from faults.kills import pack_digests
from faults.trials import Skipped

ENOUGH = "64m"
PAGE = 4096  # bytes, the unit in which a tmpfs is filled
TRAIN_BYTES, EVAL_BYTES, FETCH_BYTES = 300_000, 300_000, 7_000_000  # about what each one writes


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A tmpfs of that many bytes during the block."""
    disk = folder / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    mounted = subprocess.run(words, capture_output=True, text=True, check=False)
    if mounted.returncode:
        raise Skipped(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def enlarge(disk: Path) -> None:
    """Give the tmpfs enough space."""
    subprocess.run(["mount", "-o", f"remount,size={ENOUGH}", str(disk)], check=True)


def fill(undisturbed: Undisturbed, random: Random, folder: Path) -> Iterator[str]:
    """Train, test or fetch on a disk that fills up, then finish the work with more space."""
    command = random.choice([train, evaluate, fetch])
    yield command(undisturbed, random, folder)


def train(undisturbed: Undisturbed, random: Random, folder: Path) -> str:
    """Train on a small disk, then resume."""
    with small_disk(folder, random.randrange(PAGE, TRAIN_BYTES, PAGE)) as disk:
        run = disk / "run"
        first = call(undisturbed.resume_words(run), folder)
        if problem := first.problem(0, 1) or unnamed(first.code, first.err, disk):
            return problem
        enlarge(disk)
        last = call(undisturbed.resume_words(run), folder)
        if problem := last.problem(0):
            return problem
        same = (run / "checkpoints" / "last.pt").read_bytes() == undisturbed.last
    return "" if same else "last.pt differs"


def evaluate(undisturbed: Undisturbed, random: Random, folder: Path) -> str:
    """Test a run on a small disk, then again."""
    run_bytes = sum(-(-path.stat().st_size // PAGE) * PAGE for path in undisturbed.run.rglob("*"))
    with small_disk(folder, run_bytes + random.randrange(PAGE, EVAL_BYTES // 10, PAGE)) as disk:
        run = Path(shutil.copytree(undisturbed.run, disk / "run"))
        first = call(undisturbed.eval_words(run), folder)
        if problem := first.problem(0, 1) or unnamed(first.code, first.err, disk):
            return problem
        enlarge(disk)
        last = call(undisturbed.eval_words(run), folder)
        return last.problem(0) or ("" if numbers(last) == undisturbed.numbers else "other numbers")


def fetch(undisturbed: Undisturbed, random: Random, folder: Path) -> str:
    """Fetch into a small disk, then again."""
    with small_disk(folder, random.randrange(PAGE, FETCH_BYTES, PAGE)) as disk:
        words = ["fetch", "glyphs", "--data-root", str(disk / "data")]
        first = call(words, folder)
        if problem := first.problem(0, 1, 3) or unnamed(first.code, first.err, disk):
            return problem
        enlarge(disk)
        last = call(words, folder)
        same = pack_digests(disk / "data") == pack_digests(undisturbed.data)
        return last.problem(0) or ("" if same else "the pack differs")


def unnamed(code: int, err: str, disk: Path) -> str:
    """A complaint about an error that names no path on the disk, or ""."""
    return f"the error names no path: {err}" if code and str(disk) not in err else ""
