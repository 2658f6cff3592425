"""The file of `--export`, checked before the work starts."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

from mamlctl.core.problems import Problem

ONNX, PT2 = ".onnx", ".pt2"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # onnxruntime checks the file


def export_problems(path: Path) -> list[Problem]:
    """Why a model cannot be exported to this path, as (fact, hint) pairs."""
    named = f"--export {path}"
    if path.is_dir():
        return [(f"{named} is a folder", "use the name of a file")]
    if path.suffix not in (ONNX, PT2):
        return [(f"{named} does not end in {ONNX} or {PT2}", "choose one of the two formats by its name")]
    if path.exists() or path.is_symlink():
        return [(f"{named} exists already", "choose another name, or remove the file")]
    if not path.absolute().parent.is_dir():
        return [(f"{named} is in {path.parent}, which is not a folder", "create it, or choose another place")]
    try:
        tempfile.TemporaryFile(dir=path.absolute().parent).close()  # has no name, so no other process sees it
    except OSError as error:
        return [(f"{named} cannot be written: {error.strerror}", "choose a folder that can be written")]
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if path.suffix == ONNX and missing:
        verb = "are" if len(missing) > 1 else "is"
        fact = f"{named} needs {' and '.join(missing)}, which {verb} not installed"
        return [(fact, f"pip install 'mamlctl[onnx]', or export to {path.with_suffix(PT2)}")]
    return []
