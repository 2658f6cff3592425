"""Copies of the user's code in folders, and the user's list of trusted code.

A copy consists of the files that were imported, and of code.json, which names the entry and the digest of
each file. `kinds.py` says where a run folder has them. Evaluating or resuming the run imports the copy, from
memory, after all of it was read and compared with code.json.

A run folder may come from anybody. So its code runs only if its digest is in the user's own list, which is
outside of run folders. The digest covers the entry, the name of the function, and the names and contents of
all files. For an installed module it covers that module's file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path, PurePosixPath

import platformdirs

from mamlctl.core.errors import MamlctlError, SettingsError
from mamlctl.core.events import Notice, OnEvent
from mamlctl.core.files import append_text, read_object, replacing, write_json
from mamlctl.core.user_code.importing import UserCode, import_code
from mamlctl.core.user_code.references import SUFFIX, Located, Reference, module_file

DESCRIPTION = "code.json"
FORMAT = 1
TRUSTED = "trusted-code.txt"
MOST_FILES, MOST_BYTES = 1000, 10_000_000


@dataclass(frozen=True)
class StoredCode:
    """Code that a run folder contains, or one that is about to be stored."""

    entry: str  # the name of a file, or the dotted name of a module
    name: str  # of the function in it
    installed: bool
    files: Mapping[str, bytes]  # by path relative to the folder; for an installed module, its own file

    @cached_property
    def digests(self) -> dict[str, str]:
        """The digest of each file."""
        return {name: hashlib.sha256(content).hexdigest() for name, content in self.files.items()}

    @cached_property
    def digest(self) -> str:
        """The digest of all this."""
        content = [FORMAT, self.entry, self.name, self.installed, sorted(self.digests.items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def __str__(self) -> str:
        return f"{self.entry}:{self.name}"


def as_stored(code: UserCode) -> StoredCode:
    """The code with the files that it has imported by now.

    Raises SettingsError if it has imported a local file that cannot be copied.
    """
    if code.modules is None:
        return StoredCode(code.entry, code.name, True, _installed(code.entry))
    if (other := code.modules.unrecorded()) is not None:
        fact = f"{code.entry} imports {other}, which cannot be copied into the run folder"
        hint = f"import Python files by their path below {code.root}, without a changed sys.path"
        raise SettingsError([(fact, hint)])
    files = dict(code.modules.read)
    odd = [name for name, content in files.items() if not _is_plain(name) or len(content) > MOST_BYTES]
    if odd or len(files) > MOST_FILES:
        what = f"{code.root / odd[0]}, which" if odd else f"{len(files):,} files, which"
        fact = f"{code.entry} imports {what} cannot be copied into the run folder"
        hint = f"import at most {MOST_FILES:,} files of at most {MOST_BYTES:,} bytes, with plain names"
        raise SettingsError([(fact, hint)])
    return StoredCode(code.entry, code.name, False, files)


def _installed(module: str) -> dict[str, bytes]:
    """The file of an installed module, by its name in its package."""
    file = module_file(module)
    return {} if file is None else {f"{module.replace('.', '/')}{SUFFIX}": file.read_bytes()}


def write_code(folder: Path, code: StoredCode) -> None:
    """Write the code into its folder."""
    if not code.installed:
        for name, content in code.files.items():
            with replacing(folder / name) as file:
                file.write(content)
    document = {
        "format": FORMAT,
        "entry": code.entry,
        "name": code.name,
        "installed": code.installed,
        "files": code.digests,
        "digest": code.digest,
    }
    write_json(folder / DESCRIPTION, document)


def read_code(folder: Path) -> StoredCode:
    """Read the code of a run without running it.

    Raises SettingsError if files are missing, changed or not in code.json.
    """
    if not (folder / DESCRIPTION).is_file():
        raise _damaged(folder, f"has no {DESCRIPTION}")
    document = read_object(folder / DESCRIPTION)
    entry, name, digests = (document.get(key) for key in ("entry", "name", "files"))
    installed = document.get("installed")
    if document.get("format") != FORMAT or not isinstance(entry, str) or not isinstance(name, str):
        raise _damaged(folder, f"has a {DESCRIPTION} that this version cannot read")
    if not isinstance(digests, dict) or not isinstance(installed, bool) or not name.isidentifier():
        raise _damaged(folder, f"has a {DESCRIPTION} that this version cannot read")
    if len(digests) > MOST_FILES or not all(map(_is_plain, digests)):
        raise _damaged(folder, f"names files in {DESCRIPTION} that no run has")
    listed = set() if installed else set(digests)
    if not _is_entry(entry, installed, listed):
        raise _damaged(folder, f"does not list its entry in {DESCRIPTION}")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not _is_folder(path)}
    if extra := found - listed - {DESCRIPTION}:
        raise _damaged(folder, f"contains {min(extra)}, which is not in {DESCRIPTION}")
    if missing := listed - found:
        raise _damaged(folder, f"does not contain {min(missing)}")
    if installed and module_file(entry) is None:
        raise _damaged(folder, f"names {entry}, which is not the module of a Python file here")
    files = _installed(entry) if installed else {file: _content(folder, file) for file in sorted(listed)}
    code = StoredCode(entry, name, installed, files)
    if installed and code.digests != digests:
        fact = f"{folder.parents[1]} was trained with another version of the module {entry}"
        raise SettingsError([(fact, "install that version of it")])
    if changed := [file for file, digest in code.digests.items() if digests.get(file) != digest]:
        raise _damaged(folder, f"contains {changed[0]}, which has changed")
    if document.get("digest") != code.digest:
        raise _damaged(folder, f"does not have the digest in {DESCRIPTION}")
    return code


def _is_entry(entry: str, installed: bool, listed: set[str]) -> bool:
    """Whether an entry is one of the listed files, or a module that consists of one or is installed."""
    if entry.endswith(SUFFIX) and not installed:
        return entry in listed
    base = entry.replace(".", "/")
    own = {f"{base}{SUFFIX}", f"{base}/__init__{SUFFIX}"} & listed
    return all(map(str.isidentifier, entry.split("."))) and (installed or bool(own))


def _is_plain(name: str) -> bool:
    """Whether a name is the relative path of a Python file, without characters that hide what it is."""
    path = PurePosixPath(name)
    relative = not path.is_absolute() and ".." not in path.parts and "\\" not in name
    return path.suffix == SUFFIX and relative and name.isprintable()


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _content(folder: Path, name: str) -> bytes:
    path = folder / name
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise _damaged(folder, f"contains {name}, which is not an ordinary file of a run")
    return path.read_bytes()


def _damaged(folder: Path, why: str) -> SettingsError:
    return SettingsError([(f"{folder} {why}: none of its code was run", "restore that folder")])


def trusted_codes(folders: Sequence[Path]) -> list[StoredCode]:
    """Read code of a run without running it. Raises SettingsError if any is damaged, or not trusted yet."""
    codes, trusted = [read_code(folder) for folder in folders], trusted_digests()
    untrusted = [
        f"{folder} has code ({code})"
        for folder, code in zip(folders, codes, strict=True)
        if code.digest not in trusted
    ]
    if untrusted:
        fact = f"{' and '.join(untrusted)} that you do not trust yet: none of it was run"
        which = "that folder" if len(untrusted) == 1 else "those folders"
        raise SettingsError([(fact, f"read {which}, then add --trust-code")])
    return codes


def load_codes(folders: Sequence[Path]) -> list[tuple[UserCode, StoredCode]]:
    """Import code of a run, if the user trusts all of it -> each ready to be called, and as it is stored.

    Raises SettingsError as `trusted_codes` does; nothing of any code is run then.
    """
    folders = [folder.absolute() for folder in folders]
    codes = trusted_codes(folders)
    return [(import_stored(folder, code), code) for folder, code in zip(folders, codes, strict=True)]


def import_stored(folder: Path, code: StoredCode) -> UserCode:
    """Import code that was read from a folder, whether or not it is trusted.

    Raises SettingsError if it fails.
    """
    reference = Reference(code.entry, code.name)
    if code.installed:
        file = module_file(code.entry)
        assert file is not None  # its digest was compared
        return import_code(Located(reference, file, None))
    return import_code(Located(reference, folder / code.entry, folder), code.files)


def trust_file() -> Path:
    """The user's list of trusted code."""
    base = os.environ.get("XDG_CONFIG_HOME")  # platformdirs reads it on Linux only
    folder = Path(base) / "mamlctl" if base else platformdirs.user_config_path("mamlctl")
    return folder / TRUSTED


def trusted_digests() -> set[str]:
    """The digests of the code that the user trusts. Raises MamlctlError if the list cannot be read."""
    try:
        lines = trust_file().read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return set()
    except OSError as error:
        raise _unusable_list("read", error) from error
    return {line.split()[0] for line in lines if line.strip() and not line.startswith("#")}


def trust_by_use(code: StoredCode, on_event: OnEvent) -> None:
    """Add code that the user trains with to the user's list; a notice says if that is not possible."""
    try:
        trust(code)
    except MamlctlError as error:
        on_event(Notice(f"{error.message}: eval and --resume will need --trust-code"))


def trust(code: StoredCode) -> None:
    """Add code to the user's list. Raises MamlctlError if it cannot be read or written."""
    if code.digest in trusted_digests():
        return
    path = trust_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The last line of a list that an editor has written may not have ended.
        unended = path.exists() and not path.read_bytes().endswith(b"\n")
        line = f"{code.digest}  {date.today().isoformat()}  {code}\n"
        append_text(path, f"\n{line}" if unended else line)
    except OSError as error:
        raise _unusable_list("written", error) from error


def _unusable_list(what: str, error: OSError) -> MamlctlError:
    fact = f"the list of trusted code {trust_file()} cannot be {what}: {error.strerror}"
    return MamlctlError(fact, hint="make it readable and writable, or set XDG_CONFIG_HOME to another folder")
