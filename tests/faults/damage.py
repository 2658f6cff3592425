"""Files that are cut short or have flipped bits: every command must give the same result, or an error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

from faults.commands import Ended, Undisturbed, call, numbers, scores

ALLOWED = (0, 1, 3)
MOST_FLIPS = 8


def damage(path: Path, random: Random) -> str:
    """Cut a file short or flip some of its bits; return what was done."""
    data = bytearray(path.read_bytes())
    if not data or random.random() < 0.4:
        length = random.choice([0, random.randrange(len(data) + 1), max(0, len(data) - 1)])
        path.write_bytes(data[:length])
        return f"{path.name} cut from {len(data)} to {length} bytes"
    places = [
        (random.randrange(len(data)), random.randrange(8)) for _ in range(random.randint(1, MOST_FLIPS))
    ]
    for place, bit in places:
        data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"{path.name} with bits flipped at {', '.join(f'{place}.{bit}' for place, bit in places)}"


def damaged_copies(original: Path, folder: Path, random: Random) -> Iterator[tuple[Path, Path, str]]:
    """Copies of a folder, in each of which another file is damaged, that file, and what was done to it."""
    for file in sorted(path for path in original.rglob("*") if path.is_file() and path.name != "lock"):
        copy = Path(shutil.copytree(original, folder / "damaged"))
        damaged = copy / file.relative_to(original)
        yield copy, damaged, damage(damaged, random)
        shutil.rmtree(copy)


def allowed(file: Path) -> tuple[int, ...]:
    """Exit codes after damage to a file of a run: no single checkpoint is needed, and no line of metrics."""
    return (0,) if file.suffix == ".pt" or file.name == "metrics.jsonl" else ALLOWED


def outcome(what: str, ended: Ended, same: bool, codes: tuple[int, ...] = ALLOWED) -> str:
    """What was lost, or "": a command may fail with these codes, but not succeed with another result."""
    problem = ended.problem(*codes)
    if not problem and ended.code == 0 and not same:
        problem = f"another result without an error ({' '.join(ended.words)})"
    return f"{what}: {problem}" if problem else ""


def run_then_evaluate(undisturbed: Undisturbed, random: Random, folder: Path) -> Iterator[str]:
    """Damage each file of a finished run, then test it."""
    for run, file, what in damaged_copies(undisturbed.run, folder, random):
        ended = call(undisturbed.eval_words(run), folder)
        same = ended.code == 0 and same_models(ended, undisturbed, file)
        yield outcome(what, ended, same, allowed(file))


def run_then_resume(undisturbed: Undisturbed, random: Random, folder: Path) -> Iterator[str]:
    """Damage each file of an unfinished run, then resume it."""
    for run, file, what in damaged_copies(undisturbed.unfinished, folder, random):
        words = ["train", "--resume", str(run), "--data-root", str(undisturbed.data), "--offline"]
        ended = call(words, folder)
        same = (run / "checkpoints" / "last.pt").read_bytes() == undisturbed.last
        yield outcome(what, ended, same, allowed(file))


def runs_then_compare(undisturbed: Undisturbed, random: Random, folder: Path) -> Iterator[str]:
    """Damage each file of two tested runs, then compare the runs."""
    for pair, _, what in damaged_copies(undisturbed.pair, folder, random):
        ended = call(undisturbed.compare_words(pair), folder)
        same = ended.code == 0 and scores(ended) == undisturbed.scores
        yield outcome(what, ended, same, (*ALLOWED, 2))


def data(undisturbed: Undisturbed, random: Random, folder: Path) -> Iterator[str]:
    """Damage each file of the data root, then train, test or verify."""
    for command in (train, evaluate, verify):
        for root, _, what in damaged_copies(undisturbed.data, folder, random):
            ended, same = command(undisturbed, root, folder)
            yield outcome(what, ended, same)


def train(undisturbed: Undisturbed, root: Path, folder: Path) -> tuple[Ended, bool]:
    """Train with a data root; return the end, and whether the result is the undisturbed one."""
    new = folder / "run"
    words = ["train", *undisturbed.train_words, "--data-root", str(root), "--out", str(new)]
    ended = call(words, folder)
    same = ended.code == 0 and (new / "checkpoints" / "last.pt").read_bytes() == undisturbed.last
    shutil.rmtree(new, ignore_errors=True)
    return ended, same


def evaluate(undisturbed: Undisturbed, root: Path, folder: Path) -> tuple[Ended, bool]:
    """Test a run with a data root, like `train`."""
    run = Path(shutil.copytree(undisturbed.run, folder / "run"))
    ended = call([*undisturbed.eval_words(run), "--data-root", str(root), "--offline"], folder)
    shutil.rmtree(run)
    return ended, ended.code == 0 and numbers(ended) == undisturbed.numbers


def verify(undisturbed: Undisturbed, root: Path, folder: Path) -> tuple[Ended, bool]:
    """Verify a data root, which may only succeed if the packed images are whole."""
    ended = call(["fetch", "--verify", "--data-root", str(root)], folder)
    packs = [path.relative_to(root) for path in root.rglob("*.npy")]
    return ended, all((root / pack).read_bytes() == (undisturbed.data / pack).read_bytes() for pack in packs)


def same_models(ended: Ended, undisturbed: Undisturbed, file: Path) -> bool:
    """Whether all numbers are the undisturbed ones, or only the ensemble lacks a file that a note names."""
    found, whole = numbers(ended), undisturbed.numbers
    if found == whole:
        return True
    others = [epoch for epoch in whole[-1]["epochs"] if file.name != f"epoch-{epoch:04d}.pt"]
    lacking = found[-1]["epochs"] == others != whole[-1]["epochs"]
    named = any(file.name in note for note in json.loads(ended.out)["notes"])
    return bool(found[0] == whole[0] and lacking and named)
