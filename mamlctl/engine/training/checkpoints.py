"""Checkpoints: tensors and plain values, loaded without executing code and checked by a digest."""

from __future__ import annotations

import hashlib
import io
import pickle
import pickletools
import re
import shutil
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mamlctl.core.errors import MamlctlError, is_out_of_memory
from mamlctl.core.files import replacing

FORMAT = 3
ENTRIES = {"format", "owner", "digest", "content"}  # of a file
BEST = "best.pt"  # a copy of the best epoch's file
LAST = "last.pt"  # what training resumes from
PREVIOUS = "previous.pt"  # the `last.pt` before it

# What checkpoints contain: a type, a dict of named parts, {str: part} for any names, [part] for any number.
WEIGHTS = {"stored": {str: Tensor}, "epoch": int, "val_score": float, "val_ci95": float}
TRAINING = {
    "stored": {str: Tensor},
    "optimizer": {str: {str: Tensor}},
    "period": {"sums": Tensor, "counts": Tensor},
    "position": {"step": int, "validated": int, "top": [[float, float, float]]},
}
# The functions and classes that torch.save names in a pickle of dicts, lists, numbers, strings and tensors.
GLOBALS = re.compile(r"torch\._utils _rebuild_tensor_v2|torch \w+Storage|collections OrderedDict")
# What zipfile, pickle and torch raise for damaged and forged files.
UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)
LARGEST_PICKLE = 2**24  # bytes; valid ones have about 100 per tensor


def save(path: Path, content: Mapping[str, object], *, owner: str) -> None:
    """Write a checkpoint atomically.

    Args:
        path: the file.
        content: dicts, lists, numbers, strings and tensors.
        owner: the digest of the run's settings, which `load` compares.
    """
    content = on_cpu(content)  # so that a machine without this device can read the file
    digest = _digest(content)
    save_tensors(path, {"format": FORMAT, "owner": owner, "digest": digest, "content": dict(content)})


def save_tensors(path: Path, content: Mapping[str, object]) -> None:
    """Write a file for torch.load atomically."""
    # Through memory: on a full disk torch.save raises a RuntimeError that looks like a bug, not an OSError.
    whole = io.BytesIO()
    torch.save(content, whole)
    with replacing(path) as file:
        file.write(whole.getbuffer())


def save_last(folder: Path, content: Mapping[str, object], *, owner: str) -> None:
    """Write `last.pt` and keep the one before it as `previous.pt`; arguments as in `save`."""
    last, link = (folder / LAST).resolve(), folder / f".{PREVIOUS}.link"
    if last.exists():
        link.unlink(missing_ok=True)
        try:
            link.hardlink_to(last)  # a second name, so that there is a `last.pt` at every moment
        except OSError:  # a file system without hard links
            shutil.copyfile(last, link)
        link.replace(folder / PREVIOUS)
        link.unlink(missing_ok=True)  # it remains if both were the same file
    save(last, content, owner=owner)


def load_last(folder: Path, *, owner: str) -> tuple[Path, dict[str, Any], str]:
    """Read `last.pt`, or `previous.pt` if that is not possible.

    Args:
        folder: the folder of the checkpoints.
        owner: the digest of the run's settings.

    Returns:
        The file, its content, and why it is not `last.pt`, or "".

    Raises:
        MamlctlError: as `load` does, about `last.pt`.
    """
    last, previous = folder / LAST, folder / PREVIOUS
    try:
        return last, _load_training(last, owner), ""
    except MamlctlError as error:
        try:
            return previous, _load_training(previous, owner), error.message
        except MamlctlError:
            raise error from None


def _load_training(path: Path, owner: str) -> dict[str, Any]:
    content = load(path, owner=owner)
    if "position" not in content:
        raise damaged(path, "contains weights only, from which training cannot resume")
    return content


def load(path: Path, *, owner: str) -> dict[str, Any]:
    """Read a checkpoint.

    Args:
        path: the file.
        owner: the digest of the run's settings.

    Returns:
        The content that `save` received, with tensors on the CPU.

    Raises:
        MamlctlError: the file is missing or damaged, has another format or belongs to another run.
    """
    if not path.is_file():
        raise MamlctlError(
            f"there is no checkpoint {path}", hint="name another checkpoint, or start a new run"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of damage, which becomes an error below
            stored = _read(path)
    except MamlctlError:
        raise
    except UNREADABLE as error:
        if is_out_of_memory(error):  # the file may be whole
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise damaged(path, f"cannot be read ({reason[:100]})") from error
    if stored["owner"] != owner:
        raise damaged(path, "was written by a run with other settings")
    content: dict[str, Any] = stored["content"]
    return content


def _read(path: Path) -> dict[str, Any]:
    """Read and check a file, using no more memory than a few times its size."""
    if not zipfile.is_zipfile(path):
        # torch tries its old format for any other file.
        raise damaged(path, "cannot be read (it is not a zip archive)")
    for pickled in check_archive(path):
        _check_pickle(pickled)
    size = path.stat().st_size
    # On this device tensors have a shape but no memory, so a forged shape cannot allocate any.
    outline = torch.load(path, map_location="meta", weights_only=True)
    if not isinstance(outline, dict) or not outline.keys() >= ENTRIES:
        raise damaged(path, "is not a checkpoint of mamlctl")
    if outline["format"] != FORMAT:
        raise damaged(path, f"has format {outline['format']}, but this mamlctl reads format {FORMAT}")
    content = outline["content"]
    training = isinstance(content, dict) and "position" in content
    if misfit := _misfit(content, TRAINING if training else WEIGHTS, "content"):
        raise damaged(path, f"is not a checkpoint of mamlctl: {misfit[:100]}")
    needed = sum(tensor.numel() * tensor.element_size() for _, tensor in _tensors(content))
    if needed > size:
        raise damaged(path, f"has {size:,} bytes, but its tensors would take {needed:,}")
    if training and not _is_possible(**content["position"]):
        raise damaged(path, "is not a checkpoint of mamlctl: its position in the training is impossible")
    stored: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if stored["digest"] != _digest(stored["content"]):
        raise damaged(path, "has changed since it was written: its digest differs")
    return stored


def check_archive(path: Path) -> list[bytes]:
    """Check the zip archive of torch.save, and return its pickles.

    Raises ValueError if torch would crash, or use more memory than a few times the size of the file.
    """
    pickles = []
    with zipfile.ZipFile(path) as archive:
        entries, size = archive.infolist(), path.stat().st_size
        plain = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
        if not plain or sum(entry.file_size for entry in entries) > size:
            raise ValueError("its records are compressed or overlap")
        for entry in entries:
            if entry.filename.endswith("data.pkl"):
                if entry.file_size > LARGEST_PICKLE:
                    excess = f"{entry.file_size:,} bytes, more than the limit of {LARGEST_PICKLE:,}"
                    raise ValueError(f"its pickle has {excess}")
                pickles.append(archive.read(entry))
            if entry.filename.endswith(".storage_alignment") and int(archive.read(entry)[:20]) <= 0:
                raise ValueError("its tensors have no alignment")  # torch would divide by it, and crash
    return pickles


def _check_pickle(pickled: bytes) -> None:
    """Raise ValueError for a pickle that names anything but tensors and containers."""
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL" and not GLOBALS.fullmatch(str(argument)):
            raise ValueError(f"it names {argument}")


def _misfit(item: object, schema: Any, place: str) -> str | None:
    """Where an item differs from a schema, or None; looks no deeper than the schema."""
    if isinstance(schema, type):
        return None if type(item) is schema else f"{place} is not of type {schema.__name__}"
    if not isinstance(item, type(schema)):
        return f"{place} is not of type {type(schema).__name__}"
    if isinstance(item, list):
        if len(schema) not in (1, len(item)):
            return f"{place} has {len(item)} numbers, not {len(schema)}"
        parts = [(str(number), part, schema[0]) for number, part in enumerate(item)]
    else:
        assert isinstance(item, dict)
        if not all(type(name) is str for name in item):
            return f"{place} has a name that is not of type str"
        if str not in schema and item.keys() != schema.keys():
            return f"{place} does not have the parts {', '.join(schema)}"
        parts = [(name, part, schema.get(str) or schema[name]) for name, part in item.items()]
    misfits = (_misfit(part, of, f"{place}.{name}") for name, part, of in parts)
    return next((misfit for misfit in misfits if misfit), None)


def _is_possible(step: int, validated: int, top: list[list[float]]) -> bool:
    """Whether a position can occur: the best epochs are among those that were validated."""
    epochs = [epoch for epoch, _, _ in top]
    whole = all(1 <= epoch <= validated and epoch.is_integer() for epoch in epochs)
    return whole and 0 <= validated <= step


def _tensors(item: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts, each with its names joined by dots."""
    if isinstance(item, Tensor):
        yield name, item
    elif isinstance(item, Mapping):
        for key, part in item.items():
            yield from _tensors(part, f"{name}.{key}" if name else key)


def on_cpu(item: Any) -> Any:
    """Return nested dicts with their tensors copied to the CPU, without gradients."""
    if isinstance(item, Tensor):
        return item.detach().cpu()
    return {key: on_cpu(part) for key, part in item.items()} if isinstance(item, Mapping) else item


def restore(own: Mapping[str, object], stored: Mapping[str, object], path: Path) -> None:
    """Copy the tensors of a checkpoint, in place and across devices.

    Args:
        own: the tensors to overwrite, in nested dicts.
        stored: the same part of the checkpoint.
        path: the checkpoint, for the error.

    Raises:
        MamlctlError: names, shapes or kinds of numbers differ.
    """
    tensors, values = dict(_tensors(own)), dict(_tensors(stored))
    if tensors.keys() != values.keys():
        odd = min(tensors.keys() ^ values.keys())
        excess = "an unknown" if odd in values else "no"
        raise damaged(path, f"does not fit the run's settings: it has {excess} tensor '{odd}'")
    for name, tensor in tensors.items():
        if tensor.shape != values[name].shape:
            shapes = f"{list(values[name].shape)}, but the settings need {list(tensor.shape)}"
            raise damaged(path, f"does not fit the run's settings: '{name}' has shape {shapes}")
        if tensor.is_floating_point() != values[name].is_floating_point():
            types = f"{values[name].dtype}, but the settings need {tensor.dtype}"
            raise damaged(path, f"does not fit the run's settings: '{name}' is of type {types}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(values[name])


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
