"""References to the user's code, such as net.py:make or package.module:make, checked without running it."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from mamlctl.core.errors import SettingsError
from mamlctl.core.files import exists, expanded
from mamlctl.core.problems import nearest

SUFFIX = ".py"
EXAMPLES = {"--net": "net.py:make", "--loss": "loss.py:fn", "--dataset": "tasks.py:Tasks"}


@dataclass(frozen=True)
class Reference:
    """A function or class in a file or in a module."""

    place: str  # the path of a file, or the dotted name of a module
    name: str

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Split "net.py:make" or "package.module:make"; see `is_reference`."""
        place, _, name = text.rpartition(":")
        return cls(place, name)

    @property
    def is_file(self) -> bool:
        """Whether the code is in a file, not in a module that Python's import finds."""
        return self.place.endswith(SUFFIX)

    def __str__(self) -> str:
        return f"{self.place}:{self.name}"


def is_reference(text: str) -> bool:
    """Whether a setting names code instead of something built in."""
    return ":" in text


def names_tasks(dataset: str) -> bool:
    """Whether --dataset names code that makes tasks: file.py:Tasks or package.module:Tasks."""
    reference = Reference.parse(dataset)
    is_module = all(part.isidentifier() for part in reference.place.split("."))
    return reference.name.isidentifier() and (reference.is_file or is_module)


def folder_name(dataset: str) -> str:
    """A data set in the name of a folder: 'omniglot', or 'tasks.py-Tasks' for '/home/me/tasks.py:Tasks'."""
    return Path(dataset).name.replace(":", "-") if names_tasks(dataset) else Path(dataset).name


@dataclass(frozen=True)
class Located:
    """The source file of a reference."""

    reference: Reference
    file: Path
    root: Path | None  # the folder from which the file's imports start; None for an installed module

    @property
    def entry(self) -> str:
        """The name of the file in its folder, or the dotted name of the module."""
        return self.file.name if self.reference.is_file else self.reference.place


def absolute(text: str) -> str:
    """The reference with an absolute path, so that child processes find the same file."""
    reference = Reference.parse(text)
    if not reference.is_file:
        return text
    return str(Reference(str(expanded(reference.place).absolute()), reference.name))


def locate(text: str, option: str) -> Located:
    """Find the file of a reference, and the name in it, without running any code.

    A module is looked for in the current folder first, then among the installed ones.

    Args:
        text: the reference.
        option: the flag that has it as its value, for messages.

    Raises:
        SettingsError: the file, the module or the name does not exist, or the file is not valid Python.
    """
    reference = Reference.parse(text)
    if not reference.name.isidentifier():
        fact = f"{option} is '{text}', which names no function"
        example = Reference.parse(EXAMPLES[option])
        hint = f"write {reference.place or example.place}:{example.name}, with its name in your file"
        raise SettingsError([(fact, hint)])
    if reference.is_file:
        file = expanded(reference.place).absolute()
        located = Located(reference, file, file.parent)
        if not (exists(file) and file.is_file()):
            files = file.parent.glob(f"*{SUFFIX}") if exists(file.parent) else ()
            names = [path.name for path in files if path.is_file()]
            hint = nearest(file.name, names, otherwise="check the path")
            raise SettingsError([(f"{option}: there is no file {file}", hint)])
    else:
        located = _located_module(reference, option)
    defined = _names(located.file, option)
    if defined is not None and reference.name not in defined:
        hint = nearest(reference.name, defined, otherwise="name a function at the top level of that file")
        raise SettingsError([(f"{option}: {located.file} has no '{reference.name}'", hint)])
    return located


def module_file(name: str) -> Path | None:
    """The source file of an installed module, found without importing its packages; None if there is none."""
    spec, locations = None, None
    for end in range(1, name.count(".") + 2):
        part = ".".join(name.split(".")[:end])
        spec = _spec(part, locations)
        if spec is None:
            return None
        locations = spec.submodule_search_locations
        if locations is None and end <= name.count("."):
            return None
    origin = None if spec is None else spec.origin
    return Path(origin) if origin is not None and origin.endswith(SUFFIX) else None


def _spec(name: str, locations: Sequence[str] | None) -> ModuleSpec | None:
    """The spec of a module in the folders of its package; None: from the top."""
    if locations is not None:
        return PathFinder.find_spec(name, locations)
    found = (finder.find_spec(name, None) for finder in sys.meta_path)  # also those of editable installations
    return next((spec for spec in found if spec is not None), None)


def _located_module(reference: Reference, option: str) -> Located:
    parts = reference.place.split(".")
    if not all(part.isidentifier() for part in parts):
        fact = f"{option} is '{reference}', which is not a file.py:name or a module:name"
        raise SettingsError([(fact, f"write {EXAMPLES[option]}, with the path of your file")])
    here = Path.cwd()
    base = here.joinpath(*parts)
    for file in (base / f"__init__{SUFFIX}", base.with_suffix(SUFFIX)):
        if file.is_file() and parts[0] not in sys.modules:
            return Located(reference, file, here)
    installed = module_file(reference.place)
    if installed is None:
        fact = f"{option}: no module '{reference.place}' has a Python file, here or among the installed ones"
        raise SettingsError([(fact, f"write the path of its file, such as {'/'.join(parts)}{SUFFIX}")])
    return Located(reference, installed, None)


def _names(file: Path, option: str) -> set[str] | None:
    """The names at the top level of a file; None if `from ... import *` may add others."""
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (OSError, SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        where = f"{file}, line {line}" if line else str(file)
        reason = getattr(error, "msg", None) or getattr(error, "strerror", None) or error
        fact = f"{where}: {type(error).__name__}: {reason}"
        raise SettingsError([(fact, f"correct the file that {option} names")]) from error
    names: set[str] = set()
    for node in _top_level(tree.body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                if alias.name == "*":
                    return None
                names.add(alias.asname or alias.name.partition(".")[0])
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            stored = (part for part in ast.walk(node) if isinstance(part, ast.Name))
            names |= {part.id for part in stored if isinstance(part.ctx, ast.Store)}
    return names


def _top_level(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, also those in an `if`, `try` or `with`."""
    for node in body:
        yield node
        if not isinstance(node, ast.FunctionDef | ast.ClassDef):
            for field in ("body", "orelse", "finalbody"):
                yield from _top_level(getattr(node, field, ()))
            for handler in getattr(node, "handlers", ()):
                yield from _top_level(handler.body)
