"""Options without effect: every setting that a command accepts must change the run or the evaluation."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, fields
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from PIL import Image

from faults.commands import Ended, Undisturbed, call, numbers, succeed
from faults.trials import TrialRandom
from mamlctl.core.problems import flag
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.rules import VALUE_TYPES
from mamlctl.settings.schema import TrainConfig

# Settings whose values need not change a tiny run on a CPU, and why. Those that the schema marks as not
# deciding results (`decides=False`) need not change any run.
NO_EFFECT = {
    "precision": "auto and tf32 are float32 on a CPU",
    "engine": "both compute the same meta-gradient, up to rounding",
    "head": "every network that is built in has a single possible head",
    "strict": "it refuses a folder that has unreadable images or small classes; this one has none",
}
TASKS = ["--tasks=30"]
SMALL = ["--ways=3", "--queries=3", "--inner-steps=2", "--meta-batch-size=2", "--epochs=3"]
SMALL += ["--steps-per-epoch=3", "--val-tasks=30", "--image-size=16"]
GLYPHS = [*SMALL, "--filters=4", "--dataset=glyphs"]
MAML = [*GLYPHS, "--algo=maml"]
MAMLPP = [*GLYPHS, "--algo=maml++"]
FOLDER = [*SMALL, "--filters=4", "--dataset=FOLDER/groups", "--algo=maml"]
IMAML = [*GLYPHS, "--algo=imaml"]
REPTILE = [*GLYPHS, "--algo=reptile"]
# The run with which a setting is compared, if not with `MAML`.
BASES = {
    **dict.fromkeys(("msl_epochs", "da_epochs", "min_meta_lr"), MAMLPP),
    **dict.fromkeys(("inner_optimizer", "inner_batch", "eval_inner_batch"), REPTILE),
    **dict.fromkeys(("resize", "normalize", "channels", "classes", "split_fractions"), FOLDER),
    **dict.fromkeys(("proximal", "cg_steps"), IMAML),
    "bnrs": [*MAML, "--bn=running"],
    "hidden": [*SMALL, "--dataset=glyphs", "--algo=maml", "--net=mlp"],
    "hyper_lr": [*GLYPHS, "--algo=alpha-maml"],
    "split_scheme": [*SMALL, "--filters=4", "--dataset=FOLDER/splits", "--algo=maml"],
}
# The words of the test with which a setting of a test is compared, if there are any.
EVAL_BASES = {
    "classes": ["--dataset=FOLDER/groups", "--allow-overlap"],
    "per_step_tasks": ["--per-step"],
}
# Values of settings for which `values` has none or one that is too weak.
VALUES = {
    "dataset": ["FOLDER/groups", "FOLDER/splits"],
    "algo": ["maml++", "protonet", "reptile", "anil"],
    "split_scheme": ["fractions"],
    "split_fractions": ["50-25-25"],
    "resize": ["nearest", "box", "bicubic"],
    "net": ["resnet12"],
    "hidden": ["8-8", "16"],
    "clip_value": ["0.0001"],
    "clip_norm": ["0.0001"],
    "adam_beta2": ["0.5"],
    "pooling": ["stride"],
    "readout": ["mean"],
    "activation": ["relu"],
    "augment": ["flips", "crops", "flips+crops"],
    "rotations": ["classes", "none"],
    "inner_batch": ["1", "2"],
    "eval_inner_batch": ["1", "2"],
    "classes": ["top"],
    "ink": ["0"],
    "normalize": ["imagenet"],
    "channels": ["1"],
    "image_size": ["20", "24"],
    "checkpoint": ["epoch-0001.pt"],
    "min_meta_lr": ["0.0005"],
    "adapts": ["head", "body"],
    "hyper_lr": ["0.5"],
    "cg_steps": ["1"],
    "bn": ["running", "support"],
    "inner_optimizer": ["sgd"],
}
PARTS = 6  # of the settings; a trial tries one part, and the next trial the next part
_lock = Lock()
_bases: dict[tuple[str, ...], str] = {}  # command, folder and words -> result


def values(item: Field[object], config_type: type, base: Sequence[str] = ()) -> list[str]:
    """Values of a setting other than that of the words `base`, as words of the command line."""
    kind = VALUE_TYPES[config_type][item.name]
    given = [word.partition("=")[2] for word in base if word.startswith(f"{flag(item.name)}=")]
    now = given[0] if given else None if item.default is None else str(item.default)
    if item.name in VALUES:
        return [value for value in VALUES[item.name] if value not in given]
    if kind.kind is bool:
        return ["true"]
    if kind.choices:
        return [choice for choice in map(str, kind.choices) if choice != now]
    if kind.kind is int:
        return [str(int(now or 2) + change) for change in (1, 2)]
    return ["0.02" if now is None else str(float(now) / 2)]


def flags(name: str, value: str, config_type: type) -> list[str]:
    """The words that set a setting."""
    return [flag(name)] if VALUE_TYPES[config_type][name].kind is bool else [f"{flag(name)}={value}"]


def images(undisturbed: Undisturbed) -> Path:
    """A folder of colour images in which top and innermost folders differ, and one with split folders."""
    folder = undisturbed.folder / "images"
    with _lock:
        if not folder.exists():
            draw = np.random.default_rng(0)
            groups = [f"groups/{n}/{name}" for n in range(16) for name in ("one", "two")]
            groups += [
                f"splits/{part}/{n}"
                for part in ("train", "val", "test")
                for n in map(part.__add__, "abcdefgh")
            ]
            for name in groups:
                (folder.with_suffix(".new") / name).mkdir(parents=True)
                for number in range(6):
                    pixels = draw.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(folder.with_suffix(".new") / name / f"{number}.png")
            folder.with_suffix(".new").rename(folder)
    return folder


class Effects:
    """Runs and evaluations of one trial, and what they are compared with."""

    def __init__(self, undisturbed: Undisturbed, folder: Path) -> None:
        self.undisturbed, self.folder = undisturbed, folder
        self.images = images(undisturbed)
        self.run = undisturbed.folder / "maml"  # whose inner learning rate is not learnt
        with _lock:
            if not self.run.exists():
                place = [f"--data-root={undisturbed.data}", "--offline", f"--out={self.run}"]
                succeed(["train", *MAML, *place], folder)

    def train(self, words: list[str]) -> tuple[Ended, str]:
        """Train; the end, and the digest of what last.pt contains."""
        run = self.folder / "run"
        place = [f"--data-root={self.undisturbed.data}", "--offline", f"--out={run}"]
        given = [word.replace("FOLDER", str(self.images)) for word in words]
        ended = call(["train", *given, *place], self.folder)
        last = run / "checkpoints" / "last.pt"
        digest = str(torch.load(last, weights_only=True)["digest"]) if ended.code == 0 else ""
        shutil.rmtree(run, ignore_errors=True)
        return ended, digest

    def base(self, words: list[str], command: Callable[[list[str]], tuple[Ended, str]]) -> str:
        """The result of a command, `train` or `evaluate`, without the setting."""
        key = (command.__name__, str(self.undisturbed.folder), *words)
        if key not in _bases:
            ended, digest = command(words)
            if problem := ended.problem(0):
                raise RuntimeError(f"without the setting: {problem}")
            _bases[key] = digest
        return _bases[key]

    def evaluate(self, words: list[str]) -> tuple[Ended, str]:
        """Test a run of MAML; the end, and its numbers."""
        run = Path(shutil.copytree(self.run, self.folder / "tested"))
        given = [word.replace("FOLDER", str(self.images)) for word in words]
        ended = call([*self.undisturbed.eval_words(run), *TASKS, *given], self.folder)
        shutil.rmtree(run)
        return ended, str(numbers(ended)) if ended.code == 0 else ""


def lost(name: str, tries: Iterator[tuple[Ended, bool]]) -> str:
    """What is wrong with a setting: no value is accepted, or the first accepted one changes nothing."""
    ended = None
    for ended, same in tries:
        if ended.code != 2:
            return ended.problem(0) or (f"{name} has no effect ({' '.join(ended.words)})" if same else "")
    return f"no value of {name} is accepted: {ended.err.strip() if ended else 'there is none'}"


def must_matter(config_type: type, reasons: Mapping[str, str]) -> list[Field[object]]:
    """The settings that must change results."""
    return [item for item in fields(config_type) if item.metadata["decides"] and item.name not in reasons]


def every_setting(undisturbed: Undisturbed, random: TrialRandom, folder: Path) -> Iterator[str]:
    """Train or test once for each setting of one part, with a value that is not its default."""
    effects = Effects(undisturbed, folder)

    def trained(item: Field[object]) -> Iterator[tuple[Ended, bool]]:
        base = BASES.get(item.name, MAML)
        for value in random.sample(found := values(item, TrainConfig, base), len(found)):
            ended, digest = effects.train([*base, *flags(item.name, value, TrainConfig)])
            yield ended, digest == effects.base(base, effects.train)

    def tested(item: Field[object]) -> Iterator[tuple[Ended, bool]]:
        base = EVAL_BASES.get(item.name, [])
        before = effects.base(base, effects.evaluate)
        for value in random.sample(found := values(item, EvalConfig, [*MAML, *base]), len(found)):
            ended, after = effects.evaluate([*base, *flags(item.name, value, EvalConfig)])
            yield ended, after == before

    part = random.number % PARTS
    for item in must_matter(TrainConfig, NO_EFFECT)[part::PARTS]:
        yield lost(item.name, trained(item))
    for item in must_matter(EvalConfig, {})[part::PARTS]:
        yield lost(f"eval {item.name}", tested(item))
