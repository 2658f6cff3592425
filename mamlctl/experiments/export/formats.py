"""Write a module as ONNX or as a program of torch.export, after its predictions have been compared."""

from __future__ import annotations

import io
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_tb
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node

from mamlctl.core.errors import SettingsError
from mamlctl.core.files import replacing
from mamlctl.core.user_code.importing import UserCode, errors_of_user_code
from mamlctl.experiments.export.target import ONNX, PT2

ENTRY = "mamlctl"  # the name of the JSON text in both formats; torch.export adds its ending
TRACED = 3  # examples of the traced batch: torch.export treats 0 and 1 as special
FATAL = 4  # of onnxruntime's levels of messages
NOWHERE = Path("-")  # a folder without files of the user
FRAME = re.compile(r'File "(.+?)", line (\d+)')  # of a traceback

Floats = NDArray[np.float64]
Run = Callable[[Tensor], Floats]


@dataclass(frozen=True)
class Exportable:
    """A module of one input and one output, each with the examples as its first axis."""

    module: nn.Module  # in evaluation mode, on the CPU
    names: tuple[str, str]  # of the input and the output
    metadata: Mapping[str, Any]
    code: UserCode | None = None  # of the user, whose files are named in errors


@dataclass(frozen=True)
class Check:
    """Inputs with the predictions of `eval`, which the exported file has to repeat."""

    inputs: Tensor
    expected: Floats
    scale: Floats  # of each column, by which differences are divided
    allowed: float  # the largest difference that rounding explains


def export(path: Path, item: Exportable, check: Check) -> float:
    """Write a file, if its predictions for a batch and for a single example are those of `eval`.

    Args:
        path: the file, whose ending chooses the format.
        item: what to export.
        check: the predictions to compare with.

    Returns:
        The largest difference from these predictions.

    Raises:
        SettingsError: the module cannot be exported, or predicts differently.
    """
    text = json.dumps(item.metadata, indent=2)
    with _silence():
        with _failing(
            path,
            "torch.export cannot trace the network",
            "change that code, and train a run with it",
            item.code,
        ):
            program = _traced(item.module, check.inputs)
        data, run = (_as_onnx if path.suffix == ONNX else _as_pt2)(path, program, item, text)
        with _failing(path, "the exported network does not run", "change the network"):
            difference = max(_difference(run, check, count) for count in (len(check.inputs), 1))
    if difference > check.allowed:
        fact = f"its predictions differ from those of eval by {difference:.3g}: nothing was written"
        hint = f"change the network: rounding explains {check.allowed:.3g} at most"
        raise SettingsError([(f"--export {path}: {fact}", hint)])
    with replacing(path) as file:
        file.write(data)
    return difference


@contextmanager
def _failing(path: Path, what: str, hint: str, code: UserCode | None = None) -> Iterator[None]:
    """Raise a SettingsError for every exception of the exporters, which are of many classes.

    Args:
        path: the file to write.
        what: what failed.
        hint: what to do about it.
        code: as in `Exportable`.
    """
    try:
        with errors_of_user_code(NOWHERE) if code is None else code.running():
            yield
    except SettingsError as error:
        raise SettingsError([(f"--export {path}: {what}: {error.message}", hint)]) from error


@contextmanager
def _silence() -> Iterator[None]:
    """Hide the warnings, messages and printed graphs of the exporters, which are about their own code."""
    before, printed = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(printed), redirect_stderr(printed):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _difference(run: Run, check: Check, count: int) -> float:
    """The largest difference of the first `count` predictions."""
    differences = np.abs(run(check.inputs[:count]) - check.expected[:count]) / check.scale
    return float(differences.max()) if np.isfinite(differences).all() else float("inf")


def _traced(module: nn.Module, like: Tensor) -> ExportedProgram:
    """The graph of a module for any number of examples. Raises SettingsError if it has none."""
    example = like.new_zeros(TRACED, *like.shape[1:])
    try:
        with torch.no_grad():
            return torch.export.export(module, (example,), dynamic_shapes=({0: Dim("batch")},))
    except RuntimeError as error:
        if "Constraints violated" in str(error):
            raise SettingsError([("its code fixes the number of examples", "")]) from error
        raise


def _as_pt2(path: Path, program: ExportedProgram, item: Exportable, text: str) -> tuple[bytes, Run]:
    """The bytes of a .pt2 file, and what it predicts when it is loaded from them."""
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # has paths of this machine
    buffer = io.BytesIO()
    with _failing(path, "torch.export cannot store the network", "change that layer"):
        torch.export.save(program, buffer, extra_files={f"{ENTRY}.json": text})
        loaded = torch.export.load(io.BytesIO(buffer.getvalue())).module()

    @torch.no_grad()
    def run(inputs: Tensor) -> Floats:
        predicted: Floats = loaded(inputs).double().numpy()
        return predicted

    return buffer.getvalue(), run


def _as_onnx(path: Path, program: ExportedProgram, item: Exportable, text: str) -> tuple[bytes, Run]:
    """The bytes of an .onnx file, and what onnxruntime predicts with them."""
    names: dict[str, Any] = {"input_names": item.names[:1], "output_names": item.names[1:]}
    hint = f"use another operation, or export to {path.with_suffix(PT2).name}"
    with _failing(path, "the network cannot be converted to ONNX", hint):
        exported = _converted(program, item.code, dynamic_shapes=({0: "batch"},), **names)
        proto = exported.model_proto
        for part in (*proto.graph.node, *proto.graph.value_info, *proto.graph.input, *proto.graph.output):
            del part.metadata_props[:]  # has paths of this machine
        entry = proto.metadata_props.add()
        entry.key, entry.value = ENTRY, text
        data = proto.SerializeToString()
        import onnxruntime  # optional, like the packages that torch imports here

        options = onnxruntime.SessionOptions()
        options.log_severity_level = FATAL
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def run(inputs: Tensor) -> Floats:
        (predicted,) = session.run(None, {item.names[0]: inputs.numpy()})
        return np.asarray(predicted, dtype=np.float64)

    return data, run


def _converted(program: ExportedProgram, code: UserCode | None, **options: Any) -> torch.onnx.ONNXProgram:
    """The program in ONNX. Raises SettingsError if ONNX lacks an operator."""
    try:
        exported = torch.onnx.export(program, (), dynamo=True, verbose=False, external_data=False, **options)
    except torch.onnx.OnnxExporterError as error:
        node = _failed_node(error)
        if node is None:
            raise
        fact = f"it has no operator for {node.target}{_place(node, code)}"
        raise SettingsError([(fact, "")]) from error
    assert exported is not None
    return exported


def _failed_node(error: BaseException | None) -> Node | None:
    """The node of the graph that could not be converted; None if the error has another cause."""
    while error is not None:
        for frame, _ in walk_tb(error.__traceback__):
            if isinstance(node := frame.f_locals.get("node"), Node):
                return node
        error = error.__cause__
    return None


def _place(node: Node, code: UserCode | None) -> str:
    """The layer of a node, and its line in the user's code, as words."""
    words = ""
    if stack := [*(node.meta.get("nn_module_stack") or {}).values()]:
        path, kind = stack[-1]
        kind = kind if isinstance(kind, str) else kind.__name__
        path = path.removeprefix("network").removeprefix(".")
        words = f" in {f'layer {path!r} of type ' if path else ''}{kind.rpartition('.')[2]}"
    for file, line in FRAME.findall(node.meta.get("stack_trace") or ""):
        if code is not None and Path(file).is_relative_to(code.root):
            return f"{words} ({file}, line {line})"
    return words
