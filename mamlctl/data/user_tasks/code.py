"""The user's code that makes tasks: opened, called, checked, and described by a digest.

It has one method, task(split, number) -> support_x, support_y, query_x, query_y. What it returns has to be a
function of the split and the number alone, and of the seed if the method has a parameter `seed`. Torch is not
imported here, since settings are completed from the shapes of a task.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from mamlctl.core.errors import SettingsError
from mamlctl.core.literals import BUILT_IN_NETS, SPLITS
from mamlctl.core.problems import Problem, flag
from mamlctl.core.user_code.importing import UserCode, import_code
from mamlctl.core.user_code.references import Located, is_reference, locate
from mamlctl.core.user_code.stored import StoredCode, as_stored
from mamlctl.data.user_tasks.form import Arrays, TaskForm, four_arrays
from mamlctl.settings.schema import TrainConfig

CHECKED = (0, 1)  # the numbers of the tasks that are checked in each split
BITS = 20  # of a value in digests: the last bits of a sine, for example, differ between machines


class UserTasks:
    """The user's tasks of all splits."""

    def __init__(self, code: UserCode, stored: StoredCode | None = None) -> None:
        """Make the object whose method is called.

        Args:
            code: a class, a function that returns an object, or an object.
            stored: its copy in a run; None if it comes from the original files.

        Raises:
            SettingsError: the code fails, or has no such method.
        """
        self.code, self._stored, self.is_pure = code, stored, False
        is_made = hasattr(code.function, "task") and not isinstance(code.function, type)
        made = code.function if is_made else code()
        self._method: Callable[..., Any] | None = getattr(made, "task", None)
        if not callable(self._method):
            fact = f"{self.name} has no method task(split, number)"
            raise SettingsError(
                [(fact, "name a class with this method, or a function that returns such an object")]
            )
        self.takes_seed = self._takes_seed()

    @property
    def name(self) -> str:
        """File and class, for messages."""
        return f"{self.code.entry}:{self.code.name}"

    def where(self, split: str, number: int) -> str:
        """The call of a task and the class, for messages."""
        return f"{call_words(split, number)} of {self.name}"

    def _takes_seed(self) -> bool:
        assert self._method is not None
        try:
            signature = inspect.signature(self._method)
        except (TypeError, ValueError):  # of a function without Python code
            return False
        named = signature.parameters.get("seed")
        takes_seed = named is not None and named.kind in (named.KEYWORD_ONLY, named.POSITIONAL_OR_KEYWORD)
        try:
            signature.bind("train", 0, **({"seed": 0} if takes_seed else {}))
        except TypeError as error:
            fact = f"the method of {self.name} is task{signature}, but it is called as task(split, number)"
            raise SettingsError([(fact, "write def task(self, split, number)")]) from error
        return takes_seed

    def make(self, split: str, numbers: Iterable[int], seed: int, use: Callable[[int, Arrays], None]) -> None:
        """Make tasks one after another, unchecked.

        Args:
            split: train, val or test.
            numbers: of the tasks.
            seed: passed on if the method takes one.
            use: called with each number and task, whose arrays the code may change later.

        Raises:
            SettingsError: the code fails, or does not return four arrays.
        """
        assert self._method is not None
        more = {"seed": seed} if self.takes_seed else {}
        called: int | None = None  # the number of the task that the code is making
        try:
            with self.code.running():
                for number in numbers:
                    called = number
                    made = self._method(split, number, **more)
                    called = None
                    use(number, four_arrays(made, self.where(split, number)))
        except SettingsError as error:
            if called is None:  # `use` raises it, about what the code has returned
                raise
            ((fact, hint),) = error.problems
            raise SettingsError([(f"{call_words(split, called)} failed: {fact}", hint)]) from error

    @cached_property
    def form(self) -> TaskForm:
        """What all tasks have in common, by the first one. Raises SettingsError as `make` and `of` do."""
        forms = list[TaskForm]()
        where = self.where("train", 0)
        self.make("train", [0], 0, lambda number, arrays: forms.append(TaskForm.of(arrays, where)))
        return forms[0]

    @cached_property
    def samples(self) -> dict[tuple[str, int], Arrays]:
        """The tasks that are checked, by split and number, in the order in which they are made."""
        samples = dict[tuple[str, int], Arrays]()
        for split in SPLITS:

            def keep(number: int, arrays: Arrays, split: str = split) -> None:
                where = self.where(split, number)
                self.form.check(arrays, where)
                self.form.check_values(arrays, where)
                samples[split, number] = tuple(array.copy() for array in arrays)

            self.make(split, CHECKED, 0, keep)
        return samples

    @cached_property
    def stored(self) -> StoredCode:
        """The files of the code, with those that a task imports. Raises SettingsError as `as_stored` does."""
        if self._stored is None:
            self.samples  # noqa: B018 - it imports what tasks need
            return as_stored(self.code)
        return self._stored

    @cached_property
    def digest(self) -> str:
        """The digest of the code and of a few tasks, which depend on files that the code reads."""
        hashed = hashlib.sha256(json.dumps([self.stored.digest, BITS]).encode())
        for arrays in self.samples.values():
            for array in arrays:
                mantissa, exponent = np.frexp(array.astype(np.float64))
                hashed.update(str(array.shape).encode())
                hashed.update(np.rint(np.ldexp(mantissa, BITS)).astype("<i4").tobytes())
                hashed.update(exponent.astype("<i4").tobytes())
        return hashed.hexdigest()

    def digests_of(self, keys: Iterable[tuple[str, int]]) -> dict[str, str]:
        """Make tasks by split and number, in this order -> a digest of all bits of each."""
        digests = dict[str, str]()
        for split, number in keys:

            def keep(number: int, arrays: Arrays, split: str = split) -> None:
                digests[call_words(split, number)] = exact_digest(arrays)

            self.make(split, [number], 0, keep)
        return digests

    def contradictions(self, config: TrainConfig) -> list[Problem]:
        """Settings that the tasks decide and that have other values, as (fact, hint) pairs."""
        values = vars(config)
        return [
            (f"{flag(name)} is {values[name]}, but it is {value} in the tasks of {self.name}", "leave it out")
            for name, value in self.form.settings.items()
            if values[name] != value
        ]

    def problems(
        self, config: TrainConfig, sources: Mapping[str, str], given: Collection[str]
    ) -> list[Problem]:
        """Settings that do not fit the tasks, as (fact, hint) pairs.

        Args:
            config: the settings.
            sources: where each setting comes from.
            given: the sources whose settings must have an effect.
        """
        problems = self.contradictions(config)
        shape, other = self.form.example_shape, "use --net mlp, or net.py:make with your own function"
        if len(shape) == 1 and config.net != "mlp" and not is_reference(config.net):
            fact = f"--net {config.net} needs images, but examples of {self.name} have the shape {shape}"
            problems.append((fact, other))
        elif self.form.ways == 1 and config.net in BUILT_IN_NETS and config.net != "mlp":
            fact = (
                f"--net {config.net} predicts classes, but targets of {self.name} are floating-point numbers"
            )
            problems.append((fact, other))
        if not self.takes_seed:
            problems += [
                (f"{flag(name)} has no effect: the method task of {self.name} takes no seed", "leave it out")
                for name in ("train_seed", "eval_seed")
                if sources[name] in given
            ]
        return problems

    @property
    def is_current(self) -> bool:
        """Whether the files on disk are still those that were imported."""
        modules = self.code.modules
        if modules is None:
            return True
        files = {modules.root / name: content for name, content in modules.read.items()}
        return all(file.is_file() and file.read_bytes() == content for file, content in files.items())


def call_words(split: str, number: int) -> str:
    """The call of a task, for messages."""
    return f"task({split!r}, {number})"


def exact_digest(arrays: Arrays) -> str:
    """A digest of all bits of a task."""
    hashed = hashlib.sha256()
    for array in arrays:
        hashed.update(f"{array.dtype} {array.shape}".encode())
        hashed.update(array.tobytes())
    return hashed.hexdigest()


def open_tasks(reference: str) -> UserTasks:
    """Import the tasks that --dataset names; the latest ones are opened once.

    Raises SettingsError if the file does not exist, fails, or has no such method.
    """
    located = locate(reference, "--dataset")
    if not _opened(located).is_current:
        _opened.cache_clear()
    return _opened(located)


@lru_cache(maxsize=1)
def _opened(located: Located) -> UserTasks:
    return UserTasks(import_code(located))
