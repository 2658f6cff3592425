"""Files that are cut short or have flipped bits: every command must give the same result, or an error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

from faults.commands import Ended, Undisturbed, call, numbers

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


def damage_one(folder: Path, random: Random) -> str:
    """Damage a random file of a folder and its subfolders."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return damage(random.choice(files), random)


def outcome(what: str, ended: Ended, same: bool) -> str:
    """What was lost, or "": a command may fail with an error, but not succeed with another result."""
    problem = ended.problem(*ALLOWED)
    if not problem and ended.code == 0 and not same:
        problem = f"another result without an error ({' '.join(ended.words)})"
    return f"{what}: {problem}" if problem else ""


def run_then_evaluate(undisturbed: Undisturbed, random: Random, folder: Path) -> Iterator[str]:
    """Damage a finished run, then test it."""
    run = Path(shutil.copytree(undisturbed.run, folder / "run"))
    what = damage_one(run, random)
    ended = call(undisturbed.eval_words(run), folder)
    yield outcome(what, ended, ended.code != 0 or same_numbers(ended, undisturbed))


def run_then_resume(undisturbed: Undisturbed, random: Random, folder: Path) -> Iterator[str]:
    """Damage an unfinished run, then resume it."""
    run = Path(shutil.copytree(undisturbed.unfinished, folder / "run"))
    what = damage_one(run, random)
    words = ["train", "--resume", str(run), "--data-root", str(undisturbed.data), "--offline"]
    ended = call(words, folder)
    yield outcome(what, ended, (run / "checkpoints" / "last.pt").read_bytes() == undisturbed.last)


def data(undisturbed: Undisturbed, random: Random, folder: Path) -> Iterator[str]:
    """Damage the data root, then train, test or verify."""
    root = Path(shutil.copytree(undisturbed.data, folder / "data"))
    what = damage_one(root, random)
    run = Path(shutil.copytree(undisturbed.run, folder / "run"))
    place = ["--data-root", str(root), "--offline"]
    command = random.choice(["train", "eval", "verify"])
    if command == "train":
        new = folder / "new"
        ended = call(["train", *undisturbed.train_words, *place, "--out", str(new)], folder)
        same = ended.code != 0 or (new / "checkpoints" / "last.pt").read_bytes() == undisturbed.last
    elif command == "eval":
        ended = call([*undisturbed.eval_words(run), *place], folder)
        same = ended.code != 0 or same_numbers(ended, undisturbed)
    else:
        ended = call(["fetch", "--verify", "--data-root", str(root)], folder)
        same = ended.code != 0
        if ended.code == 0:  # harmless only if the pack is whole, i.e. its sidecar was damaged in a comment
            same = all(
                path.read_bytes() == (undisturbed.data / path.relative_to(root)).read_bytes()
                for path in root.rglob("*.npy")
            )
    yield outcome(what, ended, same)


def same_numbers(ended: Ended, undisturbed: Undisturbed) -> bool:
    """Whether all numbers are the undisturbed ones, or a note names the checkpoint that was not used."""
    notes = json.loads(ended.out)["notes"]
    return numbers(ended) == undisturbed.numbers or any("checkpoint" in note for note in notes)
