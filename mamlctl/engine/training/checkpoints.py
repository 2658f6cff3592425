"""Checkpoints: tensors and plain values, loaded without executing code and checked by a digest."""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamlctl.core.errors import MamlctlError
from mamlctl.core.files import replacing
from mamlctl.engine.inner_loop import MetaState

FORMAT = 3


def save(path: Path, content: Mapping[str, object], *, owner: str) -> None:
    """Write a checkpoint atomically.

    Args:
        path: the file.
        content: dicts, lists, numbers, strings and tensors.
        owner: the digest of the run's settings, which `load` compares.
    """
    digest = _digest(content)
    save_tensors(path, {"format": FORMAT, "owner": owner, "digest": digest, "content": dict(content)})


def save_tensors(path: Path, content: Mapping[str, object]) -> None:
    """Write a file for torch.load atomically."""
    # Through memory: on a full disk torch.save raises a RuntimeError that looks like a bug, not an OSError.
    whole = io.BytesIO()
    torch.save(content, whole)
    with replacing(path) as file:
        file.write(whole.getbuffer())


def load(path: Path, *, owner: str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint.

    Args:
        path: the file.
        owner: the digest of the run's settings.
        device: where the tensors are placed.

    Returns:
        The content that `save` received.

    Raises:
        MamlctlError: the file is missing or damaged, has another format or belongs to another run.
    """
    if not path.is_file():
        raise MamlctlError(f"there is no checkpoint {path}", hint="start a new run, or name another one")
    # torch tries its old format for any other file, and that reader raises all kinds of exceptions.
    if not zipfile.is_zipfile(path):
        raise damaged(path, "cannot be read (it is not a zip archive)")
    try:
        stored = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, LookupError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise damaged(path, f"cannot be read ({reason[:100]})") from error
    if not isinstance(stored, dict) or not {"format", "owner", "digest", "content"} <= stored.keys():
        raise damaged(path, "is not a checkpoint of mamlctl")
    if stored["format"] != FORMAT:
        raise damaged(path, f"has format {stored['format']}, but this mamlctl reads format {FORMAT}")
    if stored["digest"] != _digest(stored["content"]):
        raise damaged(path, "has changed since it was written: its digest differs")
    if stored["owner"] != owner:
        raise damaged(path, "was written by a run with other settings")
    content: dict[str, Any] = stored["content"]
    return content


def restore(state: MetaState, stored: Mapping[str, Tensor], path: Path) -> None:
    """Copy stored tensors into a state, in place.

    Args:
        state: the state to overwrite.
        stored: the tensors of a checkpoint, by name.
        path: the checkpoint, for the error.

    Raises:
        MamlctlError: names or shapes differ.
    """
    tensors = state.stored()
    if tensors.keys() != stored.keys():
        odd = min(tensors.keys() ^ stored.keys())
        excess = "an unknown" if odd in stored else "no"
        raise damaged(path, f"does not fit the run's settings: it has {excess} tensor '{odd}'")
    for name, tensor in tensors.items():
        if tensor.shape != stored[name].shape:
            shapes = f"{list(stored[name].shape)}, but the settings need {list(tensor.shape)}"
            raise damaged(path, f"does not fit the run's settings: '{name}' has shape {shapes}")
    for name, tensor in tensors.items():
        tensor.copy_(stored[name])


def damaged(path: Path, what: str) -> MamlctlError:
    """Return the error for a checkpoint that cannot be used."""
    return MamlctlError(f"checkpoint {path} {what}", hint="use another checkpoint of the run, or train again")


def _digest(content: object) -> str:
    digest = hashlib.sha256()
    _feed(digest, content)
    return digest.hexdigest()


def _feed(digest: hashlib._Hash, item: object) -> None:
    if isinstance(item, Mapping):
        for key in item:
            digest.update(repr(key).encode())
            _feed(digest, item[key])
    elif isinstance(item, list | tuple):
        for part in item:
            _feed(digest, part)
    elif isinstance(item, Tensor):
        digest.update(f"{item.dtype}{list(item.shape)}".encode())
        digest.update(item.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    else:
        digest.update(repr(item).encode())
