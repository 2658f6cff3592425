"""Import the user's code: local files are read as source, recorded, and kept apart from other modules.

The modules of a folder are importable only inside `LocalModules.importing`, and leave `sys.modules` after it,
so that two runs whose files have the same names do not share them. Bytecode files are neither read nor
written. With given `contents`, only those files exist for an import, whatever else the folder contains.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_file_location
from inspect import unwrap
from pathlib import Path, PurePosixPath
from traceback import walk_tb
from types import ModuleType
from typing import Any

from mamlctl.core.errors import MamlctlError, SettingsError, is_out_of_memory
from mamlctl.core.formatting import with_article
from mamlctl.core.user_code.references import SUFFIX, Located

# The name of an entry file's module, which no other module has.
ENTRY = "mamlctl_user_code"
SIGNAL = 128  # exit codes from here on are those of signals, which end the process
PACKAGE = Path(__file__).parents[2]  # mamlctl
RAISED = (Exception, SystemExit)  # whatever the user's code raises, except for Ctrl-C


class LocalModules(MetaPathFinder, Loader):
    """The modules in a folder, importable as if the folder came first in `sys.path`."""

    def __init__(self, root: Path, entry: str | None, contents: Mapping[str, bytes] | None = None) -> None:
        """Import nothing yet.

        Args:
            root: the folder.
            entry: the file in it that is imported as ENTRY; None if the entry is a module of the folder.
            contents: the only files of the folder, by relative path; None for those on disk.
        """
        self.root, self.entry, self.contents = root, entry, contents
        self.read: dict[str, bytes] = {}  # the files that were imported, by relative path
        self._modules: dict[str, ModuleType] = {}
        self._names: set[str] = set()  # of modules that this object has found
        self._others = frozenset(sys.modules)  # what was imported before

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module of the folder; see `importlib.abc.MetaPathFinder`.

        Args:
            fullname: the dotted name.
            path: not used, since the name says where the file is.
            target: not used.
        """
        package = fullname.rpartition(".")[0]
        if package and package not in self._names:
            return None
        base = fullname.replace(".", "/")
        if fullname == ENTRY and self.entry is not None:
            return self._found(fullname, self.entry, None)
        if self._source(f"{base}/__init__{SUFFIX}") is not None:
            return self._found(fullname, f"{base}/__init__{SUFFIX}", base)
        if self._source(f"{base}{SUFFIX}") is not None:
            return self._found(fullname, f"{base}{SUFFIX}", None)
        if self._has_folder(base, fullname):
            self._names.add(fullname)
            spec = ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = [str(self.root / base)]
            return spec
        return None

    def create_module(self, spec: ModuleSpec) -> None:
        """Have the import system make the module."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the source of a module, and record it."""
        assert module.__spec__ is not None and module.__spec__.origin is not None
        file = Path(module.__spec__.origin)
        relative = file.relative_to(self.root).as_posix()
        source = self._source(relative)
        assert source is not None
        self.read[relative] = source
        exec(compile(source, str(file), "exec", dont_inherit=True), module.__dict__)

    @contextmanager
    def importing(self) -> Iterator[None]:
        """Make the folder's modules importable in the block."""
        own = self._modules.keys() | self._names_of_contents
        hidden = {name: sys.modules.pop(name) for name in own if name in sys.modules}
        sys.modules.update(self._modules)
        sys.meta_path.insert(0, self)
        try:
            yield
        finally:
            sys.meta_path.remove(self)
            for name in self._names:
                module = sys.modules.pop(name, None)
                if module is not None:
                    self._modules[name] = module
            sys.modules.update(hidden)

    def unrecorded(self) -> Path | None:
        """A file below the folder that was imported in another way; None if there is none."""
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if name not in self._others and isinstance(file, str) and _is_local(Path(file), self.root):
                return Path(file)
        return None

    @cached_property
    def _names_of_contents(self) -> set[str]:
        """The dotted names of the given files, and of their packages."""
        files = [PurePosixPath(relative).with_suffix("") for relative in self.contents or ()]
        parts = [[part for part in file.parts if part != "__init__"] for file in files]
        return {".".join(names[: end + 1]) for names in parts for end in range(len(names))}

    def _found(self, name: str, relative: str, package: str | None) -> ModuleSpec | None:
        self._names.add(name)
        locations = None if package is None else [str(self.root / package)]
        file = self.root / relative
        return spec_from_file_location(name, file, loader=self, submodule_search_locations=locations)

    def _source(self, relative: str) -> bytes | None:
        if self.contents is not None:
            return self.contents.get(relative)
        file = self.root / relative
        return file.read_bytes() if file.is_file() else None

    def _has_folder(self, base: str, name: str) -> bool:
        """Whether there is a folder of modules without an __init__.py, which a regular package precedes."""
        if self.contents is not None:
            return any(relative.startswith(f"{base}/") for relative in self.contents)
        folder = self.root / base
        if not folder.is_dir():
            return False
        regular = PathFinder.find_spec(name) if "." not in name else None
        return (regular is None or regular.loader is None) and any(folder.rglob(f"*{SUFFIX}"))


def _is_local(file: Path, root: Path) -> bool:
    """Whether a file below a folder is the user's own, not that of a library or of mamlctl in the folder."""
    if not file.is_relative_to(root) or {"site-packages", "dist-packages"} & {*file.relative_to(root).parts}:
        return False
    libraries = (Path(sys.prefix), Path(sys.base_prefix), PACKAGE)
    return not any(root in library.parents and file.is_relative_to(library) for library in libraries)


@dataclass(frozen=True)
class UserCode:
    """A function of the user's code, imported and ready to be called."""

    name: str  # of the function
    entry: str  # file or dotted module
    function: Callable[..., Any]
    modules: LocalModules | None  # None for an installed module
    root: Path  # the folder of its files, for messages

    @property
    def place(self) -> str:
        """The file, the line and the name of the function, for messages; without a line for other objects."""
        # A torch module has its code in `forward`.
        code = getattr(unwrap(getattr(self.function, "forward", self.function)), "__code__", None)
        if code is None:
            return f"{self.entry}:{self.name}"
        return f"{code.co_filename}, line {code.co_firstlineno}, in {self.name}"

    def __call__(self, *arguments: object) -> Any:
        """Call the function. Raises SettingsError if it fails."""
        with self.running():
            return self.function(*arguments)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the code run in the block, and import its own modules. Raises SettingsError if it fails."""
        modules = nullcontext() if self.modules is None else self.modules.importing()
        with errors_of_user_code(self.root, self.place), modules:
            yield


def import_code(located: Located, contents: Mapping[str, bytes] | None = None) -> UserCode:
    """Import the file of a reference, which runs it.

    Args:
        located: the file.
        contents: of its folder, as in `LocalModules`.

    Raises:
        SettingsError: the file fails, or it has no function of that name.
    """
    reference, modules = located.reference, None
    if located.root is not None:
        entry = located.entry if reference.is_file else None
        modules = LocalModules(located.root, entry, contents)
    root = located.root or located.file.parent
    with errors_of_user_code(root):
        if modules is None:
            module = import_module(reference.place)
        else:
            with modules.importing():
                module = import_module(ENTRY if reference.is_file else reference.place)
    function = getattr(module, reference.name, None)
    if not callable(function) and not hasattr(function, "task"):  # an object with the user's tasks
        kind = "has no" if function is None else f"has {with_article(type(function).__name__)} called"
        fact = f"{located.file} {kind} '{reference.name}', which should be a function"
        raise SettingsError([(fact, "name a function or a class of that file")])
    return UserCode(reference.name, located.entry, function, modules, root)


@contextmanager
def errors_of_user_code(root: Path | None, called: str = "") -> Iterator[None]:
    """Raise a SettingsError with file, line and exception for whatever the user's code raises in the block.

    Errors of mamlctl, a lack of memory and signals are not changed. What the code prints goes to stderr,
    since stdout has the results.

    Args:
        root: the folder of the code; None for code of a library.
        called: what was called, for an exception that did not pass through that folder.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except RAISED as error:
        by_signal = isinstance(error, SystemExit) and isinstance(error.code, int) and error.code >= SIGNAL
        if isinstance(error, MamlctlError) or by_signal or is_out_of_memory(error):
            raise
        fact = _described(error, root, called)
        raise SettingsError([(fact, "correct the code that is named here")]) from error


def _described(error: BaseException, root: Path | None, called: str) -> str:
    """The place in the user's files from which an exception came, and the exception; arguments as above."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = [(frame.f_code, line) for frame, line in walk_tb(error.__traceback__)]
    local = [at for at in frames if root is not None and _is_local(Path(at[0].co_filename), root)]
    if not local and root is not None:
        return f"{called}: {text}" if called else text
    code, line = (local or frames)[-1]
    function = "" if code.co_name == "<module>" else f", in {code.co_name}"
    return f"{code.co_filename}, line {line}{function}: {text}"
