"""The kinds of the user's code in a run: the setting that names each, and its place in the run folder.

A run folder has a subfolder of code/ for each kind that its settings name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mamlctl.core.errors import MamlctlError, SettingsError
from mamlctl.core.files import read_object
from mamlctl.core.user_code.importing import UserCode
from mamlctl.core.user_code.references import is_reference, names_tasks
from mamlctl.core.user_code.stored import (
    DESCRIPTION,
    StoredCode,
    load_codes,
    read_code,
    trust,
    trusted_codes,
    trusted_digests,
    write_code,
)

CODE = "code"  # in a run folder
# The setting that may name code -> the subfolder of code/ with its copy.
KINDS: Mapping[str, str] = {"net": "net", "loss": "loss", "dataset": "tasks"}


def named_code(settings: Mapping[str, Any]) -> dict[str, str]:
    """The settings that name code -> the references."""
    values = {name: value for name in KINDS if isinstance(value := settings.get(name), str)}
    return {
        name: value
        for name, value in values.items()
        if (names_tasks(value) if name == "dataset" else is_reference(value))
    }


def code_folder(run: Path, setting: str) -> Path:
    """The folder of a run with the copy of the code that a setting names."""
    return run / CODE / KINDS[setting]


def write_run_code(run: Path, codes: Mapping[str, StoredCode]) -> None:
    """Write the code of each setting into a run folder."""
    for setting, code in codes.items():
        write_code(code_folder(run, setting), code)


def check_trusted(run: Path, settings: Iterable[str]) -> None:
    """Raise SettingsError unless the user trusts the code that these settings of a run name; run nothing."""
    trusted_codes([code_folder(run, setting) for setting in settings])


def load_run_code(run: Path, settings: Iterable[str]) -> dict[str, tuple[UserCode, StoredCode]]:
    """Import the code that settings of a run name, from its copy, if the user trusts all of it.

    Args:
        run: the run folder.
        settings: the settings, e.g. those of `named_code`.

    Returns:
        For each setting: the code ready to be called, and as it is stored.

    Raises:
        SettingsError: code is damaged, or not trusted yet. Nothing of any code was run then.
    """
    names = list(settings)
    return dict(zip(names, load_codes([code_folder(run, name) for name in names]), strict=True))


def code_digests(run: Path) -> dict[str, str]:
    """The settings for which a run folder has code -> the first digits of its digest, by its code.json."""
    stored = {name: read_object(code_folder(run, name) / DESCRIPTION).get("digest") for name in KINDS}
    return {name: str(digest)[:12] for name, digest in stored.items() if digest}


def is_trusted(run: Path) -> bool:
    """Whether a run folder has no code yet, or only code that the user trusts."""
    try:
        return {code.digest for code in _codes(run)} <= trusted_digests()
    except MamlctlError:
        return False


def trust_runs(runs: Iterable[Path]) -> int:
    """Add the code of run folders to the user's list, and return how many copies of code they contain.

    Raises SettingsError if any is damaged; nothing is added then.
    """
    codes = [code for run in runs for code in _codes(run)]
    for code in codes:
        trust(code)
    return len(codes)


def _codes(run: Path) -> list[StoredCode]:
    """All code in a run folder. Raises SettingsError if it is damaged."""
    folders = (code_folder(run, name) for name in KINDS)
    return [read_code(folder) for folder in folders if folder.is_dir()]


def check_same_code(run: Path, codes: Mapping[str, StoredCode]) -> None:
    """Raise SettingsError if a run has another version of the code that settings name now."""
    for setting, code in codes.items():
        folder = code_folder(run, setting)
        if folder.is_dir() and read_code(folder).digest != code.digest:
            fact = f"{run} was trained with another version of {code}"
            raise SettingsError([(fact, "choose another --out, or restore the file")])
