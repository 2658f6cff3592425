"""Weights in files of torch and of safetensors, read without running any code."""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamlctl.core.errors import SettingsError, is_out_of_memory
from mamlctl.engine.training.checkpoints import ENTRIES, UNREADABLE, check_archive

SAFETENSORS = ".safetensors"  # all other files are read as those of torch.save
# The entries under which training scripts save a state dictionary, the first one first.
WRAPPERS = ("state_dict", "model_state_dict", "model", "network", "net", "weights", "params")
DEEPEST = 4  # wrappers in each other
SAVE = "save its weights with torch.save(module.state_dict(), 'weights.pt')"


@dataclass(frozen=True)
class Weights:
    """The tensors of a file."""

    file: Path
    digest: str  # SHA-256 of the file
    tensors: Mapping[str, Tensor]  # by their names in the file
    unwrapped: tuple[str, ...] = ()  # where they were, for people
    of_checkpoint: bool = False  # with the names and rows of mamlctl's checkpoints


def read_weights(file: Path) -> Weights:
    """Read the weights of a file.

    Args:
        file: the file, of safetensors if its name ends so, otherwise of torch.save.

    Raises:
        SettingsError: it cannot be read, or contains no tensors with names.
    """
    if not file.is_file():
        raise SettingsError([(f"--init: {file} is not a file", "check the path")])
    try:
        digest = file_digest(file)
        content = _read_safetensors(file) if file.suffix == SAFETENSORS else _read_torch(file)
    except UNREADABLE as error:
        if is_out_of_memory(error):
            raise
        raise _unreadable(file, error) from error
    return _unwrapped(file, digest, content)


def file_digest(file: Path) -> str:
    """The SHA-256 of a file."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _read_torch(file: Path) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about earlier formats and damage
        if zipfile.is_zipfile(file):
            if not check_archive(file):
                raise ValueError("it is an archive without tensors")
        elif not _begins_with_pickle(file):
            raise ValueError("it is cut off, or not a file of torch.save")
        return torch.load(file, map_location="cpu", weights_only=True)


def _begins_with_pickle(file: Path) -> bool:
    """Whether a file can be in torch's format before version 1.6."""
    with file.open("rb") as opened:
        return opened.read(1) == pickle.PROTO


def _read_safetensors(file: Path) -> object:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        fact = f"--init {file} needs the package safetensors, which is not installed"
        raise SettingsError([(fact, "run: pip install 'mamlctl[safetensors]'")]) from error
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _unreadable(file: Path, error: BaseException) -> SettingsError:
    """The error for a file that cannot be read: it names other objects, or is damaged."""
    whole = str(error).strip()
    text = (whole.partition("WeightsUnpickler error:")[2] or whole).strip()  # torch adds paragraphs
    if found := re.search(r"(?i)unsupported (?:global: )?GLOBAL (\S+)", text):
        fact = f"--init {file} contains {found[1][:60]}: objects other than tensors are not read"
        return SettingsError([(f"{fact}, since they could run code", SAVE)])
    reason = (text.splitlines() or [type(error).__name__])[0].partition(". ")[0][:100]
    return SettingsError([(f"--init {file} cannot be read ({reason})", f"check that file, or {SAVE}")])


def _unwrapped(file: Path, digest: str, content: Any) -> Weights:
    """The state dictionary in what a file contains. Raises SettingsError if there is none."""
    words: list[str] = []
    if isinstance(content, Mapping) and content.keys() >= ENTRIES and isinstance(content["content"], Mapping):
        stored = content["content"].get("stored")
        return Weights(file, digest, _named_tensors(file, stored), ("in a checkpoint of mamlctl",), True)
    for _ in range(DEEPEST):
        entries = content if isinstance(content, Mapping) else {}
        wrapper = next((name for name in WRAPPERS if isinstance(entries.get(name), Mapping)), None)
        if wrapper is None:
            break
        words.append(f"in the entry '{wrapper}'")
        content = content[wrapper]
    return Weights(file, digest, _named_tensors(file, content), tuple(words))


def _named_tensors(file: Path, content: object) -> dict[str, Tensor]:
    """The tensors of a mapping. Raises SettingsError if it has none."""
    entries = content.items() if isinstance(content, Mapping) else ()
    tensors = {
        name: part
        for name, part in entries
        if isinstance(name, str) and isinstance(part, Tensor) and not part.is_nested
    }
    if not tensors:
        raise SettingsError([(f"--init {file} contains no state dictionary, which names tensors", SAVE)])
    return tensors
