"""How pickles say arrays, numpy's numbers and bytes, and what is made of it: by this code, never theirs."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUMBERS = re.compile(r"[biufc]\d{1,2}")  # dtypes of plain numbers: no objects, strings, fields or dates

MOST_AXES = 64  # numpy 2's limit

ORDERS = ("|", "<", ">", "=")  # of the bytes in a number

GLOBALS = {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",  # how Python 3 writes bytes for Python 2
    ("__builtin__", "bytes"): "bytes",  # and how it writes none of them
    ("builtins", "bytes"): "bytes",
}

for _core in ("numpy.core", "numpy._core"):  # numpy 1, numpy 2
    GLOBALS[f"{_core}.multiarray", "_reconstruct"] = "array"
    GLOBALS[f"{_core}.multiarray", "scalar"] = "scalar"
    GLOBALS[f"{_core}.numeric", "_frombuffer"] = "buffer"


class UnsafePickle(Exception):
    """What no honest pickle of arrays holds."""


@dataclass(frozen=True)
class Global:
    """A name that a pickle may say; what stands for it is ours."""

    kind: str


@dataclass(eq=False)
class Made:
    """A dtype (by its spec) or an array (without one), known only after the BUILD that follows at once."""

    spec: str | None = None
    value: Any = None


class Makers:
    """What a pickle may call, with room for `room` bytes of encoded text."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._makers = {
            "array": self._array,
            "dtype": self._dtype,
            "scalar": self._scalar,
            "buffer": self._buffer,
            "encode": self._encode,
            "bytes": bytes,
        }

    def call(self, maker: object, arguments: object) -> Any:
        """What REDUCE leaves. Raises UnsafePickle, or what Python raises for wrong arguments."""
        if not isinstance(maker, Global) or maker.kind not in self._makers:
            raise UnsafePickle(f"it calls {_word(maker)}")
        if not isinstance(arguments, tuple) or (maker.kind == "bytes" and arguments):
            raise UnsafePickle(f"it calls {_word(maker)} as no pickle does")
        return self._makers[maker.kind](*arguments)  # type: ignore[operator]

    def complete(self, made: object, state: object) -> Any:
        """What BUILD leaves: the array or dtype itself."""
        if not isinstance(made, Made) or made.value is not None or not isinstance(state, tuple):
            raise UnsafePickle(f"it alters {_word(made)}")
        if made.spec is None:
            *_, shape, dtype, fortran, raw = state
            made.value = self._in_bytes(shape, dtype, "F" if fortran else "C", raw)
        else:
            _, order, *foreign = state
            if order not in ORDERS or any(part is not None for part in foreign[:3]):
                raise UnsafePickle("it holds an array of fields, not of plain numbers")
            made.value = np.dtype(made.spec).newbyteorder(order)
        return made.value

    def _array(self, subtype: object, shape: object, code: object) -> Made:
        if subtype != Global("ndarray"):
            raise UnsafePickle("it makes an array of a foreign type")
        return Made()

    def _dtype(self, spec: object, align: object = False, copy: object = True) -> Made:
        if not isinstance(spec, str) or not NUMBERS.fullmatch(spec):
            what = f"{spec!a:.40}" if isinstance(spec, str) else _word(spec)
            raise UnsafePickle(f"it holds an array of {what}, not of plain numbers")
        return Made(spec)

    def _scalar(self, dtype: object, raw: object) -> Any:
        return self._in_bytes((), dtype, "C", raw)[()]

    def _buffer(self, raw: object, dtype: object, shape: object, order: object, axes: Any = None) -> Any:
        array = self._in_bytes(shape, dtype, order, raw)
        return array if axes is None else array.transpose(axes)  # so says numpy 2.3 and later

    def _encode(self, text: object, code: object = "") -> bytes:
        if not isinstance(text, str) or code not in ("latin1", "latin-1"):
            raise UnsafePickle("it encodes what is no bytes")
        self._room -= len(text)
        # What is encoded was read before; only an attack encodes the same again and again.
        if self._room < 0:
            raise UnsafePickle("it grows far beyond its own size")
        return text.encode("latin-1")

    def _in_bytes(self, shape: object, dtype: object, order: object, raw: object) -> NDArray[Any]:
        """An array that lies in the bytes themselves, which may be 815 MB."""
        if not isinstance(dtype, np.dtype):
            raise UnsafePickle("it makes an array without a dtype")
        if isinstance(raw, str):  # a short string of Python 2
            raw = self._encode(raw, "latin-1")
        if not isinstance(raw, bytes | bytearray):
            raise UnsafePickle(f"it makes an array of {_word(raw)}")
        if not isinstance(shape, tuple) or len(shape) > MOST_AXES:
            raise UnsafePickle("it makes an array without a shape")
        if not all(type(side) is int and side >= 0 for side in shape):
            raise UnsafePickle("it makes an array without a shape")
        if math.prod(shape) * dtype.itemsize != len(raw):
            raise ValueError(f"an array of {dtype} {shape} does not lie in {len(raw):,} bytes")
        return np.ndarray(shape, dtype, raw, order="F" if order == "F" else "C")


def _word(value: object) -> str:
    return value.kind if isinstance(value, Global) else f"a {type(value).__name__.lower()}"
