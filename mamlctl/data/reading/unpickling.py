"""Pickles read without running code: only numbers, strings, lists, dicts and numpy arrays.

The standard library's reader in Python decodes the format, restricted to the operations that data need. The
names in a pickle never reach an importer: they stand for a few makers of arrays and bytes in this module.

The library's usual reader, in C, would not be safe even with a `find_class` that refuses every name (measured
with Python 3.11; `tests/data/test_unpickling.py` has the files):

- 9 bytes that store an object at index 2^28 of the memo take 4.1 GiB of memory, and 16 times that at 2^32;
- 0.9 MB of nested tuples as the key of a dict crash the process with a segmentation fault;
- 87 bytes of tuples that contain each other twice, as a key, take 2^40 steps;
- an array of 200 MB from Python 2 takes 381 MiB and 1.4 s; this reader takes 191 MiB and 0.4 s.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from mamlctl.core.errors import DataError

# Python 2 does not distinguish text from bytes. A longer string is an array's pixels, which decoding copies.
LONGEST_TEXT = 64 * 1024

# Each operation reads at least once, and one of a single byte can make an object of 64 bytes. The train file
# of CIFAR-100, with 50,000 names, takes 600,000 reads.
MOST_READS = 60_000_000

# What the reader raises for a damaged file.
DAMAGE = (pickle.PickleError, struct.error, ValueError, TypeError, LookupError, OverflowError)

PLAIN = (str, bytes, bytearray, int, float, np.generic, np.ndarray, type(None))
NUMBERS = re.compile(r"[biufc]\d{1,2}")  # dtypes of plain numbers: no objects, strings, fields or dates
MOST_AXES = 64  # the limit of numpy 2
ORDERS = ("|", "<", ">", "=")  # byte orders

Maker = Literal["ndarray", "dtype", "encode", "bytes", "array", "scalar", "buffer"]

# The names that a pickle may use -> their makers.
GLOBALS: dict[tuple[str, str], Maker] = {
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",  # Python 3 writes bytes like this for Python 2
    ("__builtin__", "bytes"): "bytes",  # and empty bytes like this
    ("builtins", "bytes"): "bytes",
}

for _core in ("numpy.core", "numpy._core"):  # numpy 1, numpy 2
    GLOBALS[f"{_core}.multiarray", "_reconstruct"] = "array"
    GLOBALS[f"{_core}.multiarray", "scalar"] = "scalar"
    GLOBALS[f"{_core}.numeric", "_frombuffer"] = "buffer"


class UnsafePickle(Exception):
    """The pickle contains something that pickles of arrays never contain."""


@dataclass(frozen=True)
class Global:
    """A name in a pickle, replaced by one of the makers here."""

    kind: Maker


@dataclass(eq=False)
class Unbuilt:
    """A dtype (with a spec) or an array (without), complete only after the BUILD that must follow."""

    spec: str | None = None
    value: np.dtype[Any] | NDArray[Any] | None = None


def load_arrays(data: bytes | BinaryIO, display_name: str) -> object:
    """Read a pickle of any protocol, written by Python 2 or 3.

    Strings of Python 2 become text. Arrays share memory with the bytes that were read, and may be read-only.

    Args:
        data: the bytes of the pickle, or a file at its start.
        display_name: the name in messages.

    Raises:
        DataError: it contains anything except data, or is damaged.
    """
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        return _checked(_Reader(file).load())
    except UnsafePickle as error:
        hint = "do not trust this file: download it from its authors"
        raise DataError(f"{display_name} is refused: {error}", hint=hint) from error
    except (EOFError, OSError, zlib.error) as error:  # from the file, or from the archive that contains it
        message = f"{display_name} is cut off or unreadable"
        raise DataError(message, hint="download the file again") from error
    except DAMAGE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        message = f"{display_name} is not a valid pickle of arrays: {reason:.100}"
        raise DataError(message, hint="download the file again") from error


def _checked(result: object) -> object:
    """The result, if it contains only data: one of the markers here might be left in a list."""
    waiting, seen = [result], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, PLAIN):
            continue
        if not isinstance(value, list | tuple | dict):
            raise UnsafePickle("it contains a function or an unfinished array")
        if id(value) not in seen:  # once, since a list may contain itself
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
    return result


class _WholeReads:
    """A file that returns every requested byte, or raises EOFError before it allocates memory."""

    def __init__(self, file: BinaryIO) -> None:
        self.start = file.tell()
        self.size = file.seek(0, io.SEEK_END) - self.start
        file.seek(self.start)
        self.file = file
        self._reads = 0

    def read(self, count: int) -> bytes:
        self._reads += 1
        if self._reads > MOST_READS:
            raise UnsafePickle(f"it takes more than {MOST_READS:,} reads")
        data = self.file.read(count) if 0 <= count <= self.size else b""
        if len(data) != count:
            raise EOFError
        return data

    def readline(self) -> bytes:
        line = self.file.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        return line

    def read_writable(self, count: int) -> bytearray:
        """Read into new memory that an array can use without a copy."""
        data = bytearray(count if count <= self.size else 0)
        if len(data) != count or self.file.readinto(data) != count:  # type: ignore[attr-defined]
            raise EOFError
        return data


class _Memo(dict[int, object]):
    """The memo of a pickle, which returns arrays and dtypes only when they are complete."""

    def __getitem__(self, place: int) -> object:
        value = super().__getitem__(place)
        if not isinstance(value, Unbuilt):
            return value
        if value.value is None:
            raise UnsafePickle("it uses an array before it is complete")
        return value.value


class _Reader(pickle._Unpickler):
    """The standard library's reader with fewer operations, some of them stricter."""

    stack: list[object]
    append: Callable[[object], None]
    pop_mark: Callable[[], list[object]]

    def __init__(self, file: BinaryIO) -> None:
        self._source = _WholeReads(file)
        super().__init__(self._source)
        self.memo = _Memo()
        self._room = self._source.size  # bytes of text that may still be encoded

    def find_class(self, module: object, name: object) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise UnsafePickle("it uses a name that is not text")
        kind = GLOBALS.get((module, name))
        if kind is None:
            raise UnsafePickle(f"it uses {f'{module}.{name}'!a:.80}, which pickles of arrays never use")
        return Global(kind)

    def _decode_string(self, data: bytes) -> str | bytes:
        return data if len(data) > LONGEST_TEXT else data.decode("latin-1")

    def _refuse(self, reason: str) -> None:
        if self._source.file.tell() == self._source.start + 1:  # any other file, such as a zip
            raise ValueError("it does not start like a pickle")
        raise UnsafePickle(reason)

    def _skip_frame(self) -> None:
        self._source.read(8)  # the length of the frame, needed only by readers that buffer

    def _load_bytearray(self) -> None:
        self.append(self._source.read_writable(int.from_bytes(self._source.read(8), "little")))

    def _load_stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.append(self.find_class(module, name))

    def _top(self, kind: type[Any]) -> Any:
        if type(self.stack[-1]) is not kind:
            raise UnsafePickle(f"it treats a {type(self.stack[-1]).__name__} as a {kind.__name__}")
        return self.stack[-1]

    def _append_one(self) -> None:
        value = self.stack.pop()
        self._top(list).append(value)

    def _append_many(self) -> None:
        values = self.pop_mark()
        self._top(list).extend(values)

    def _set_one(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill(self._top(dict), [key, value])

    def _set_many(self) -> None:
        items = self.pop_mark()
        self._fill(self._top(dict), items)

    def _marked_as_dict(self) -> None:
        items, target = self.pop_mark(), dict[object, object]()
        self._fill(target, items)
        self.append(target)

    def _fill(self, target: dict[object, object], items: list[object]) -> None:
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a tuple recurses into it: a million levels crash the process.
            if not isinstance(key, str | bytes | int | float):
                raise UnsafePickle(f"it uses a {type(key).__name__} as a key")
            target[key] = value

    def _reduce(self) -> None:
        arguments, maker = self.stack.pop(), self.stack.pop()
        if not isinstance(maker, Global) or maker.kind == "ndarray":
            raise UnsafePickle(f"it calls {_kind_of(maker)}")
        if not isinstance(arguments, tuple) or (maker.kind == "bytes" and arguments):
            raise UnsafePickle(f"it calls {_kind_of(maker)} with invalid arguments")
        self.append(getattr(self, f"_make_{maker.kind}")(*arguments))

    def _build(self) -> None:
        """Complete an array or a dtype, which replaces its marker on the stack."""
        state, unbuilt = self.stack.pop(), self.stack.pop()
        if not isinstance(unbuilt, Unbuilt) or unbuilt.value is not None or not isinstance(state, tuple):
            raise UnsafePickle(f"it changes {_kind_of(unbuilt)}")
        if unbuilt.spec is None:
            *_, shape, dtype, fortran, raw = state
            unbuilt.value = self._in_bytes(shape, dtype, "F" if fortran else "C", raw)
        else:
            _, order, *foreign = state
            if order not in ORDERS or any(part is not None for part in foreign[:3]):
                raise UnsafePickle("it contains an array of fields, not of plain numbers")
            unbuilt.value = np.dtype(unbuilt.spec).newbyteorder(order)
        self.append(unbuilt.value)

    def _make_bytes(self) -> bytes:
        return b""

    def _make_array(self, subtype: object, shape: object, code: object) -> Unbuilt:
        if subtype != Global("ndarray"):
            raise UnsafePickle("it makes an array of another type than numpy's")
        return Unbuilt()

    def _make_dtype(self, spec: object, align: object = False, copy: object = True) -> Unbuilt:
        if not isinstance(spec, str) or not NUMBERS.fullmatch(spec):
            what = f"{spec!a:.40}" if isinstance(spec, str) else _kind_of(spec)
            raise UnsafePickle(f"it contains an array of {what}, not of plain numbers")
        return Unbuilt(spec)

    def _make_scalar(self, dtype: object, raw: object) -> object:
        return self._in_bytes((), dtype, "C", raw)[()]

    def _make_buffer(self, raw: object, dtype: object, shape: object, order: object, axes: Any = None) -> Any:
        array = self._in_bytes(shape, dtype, order, raw)
        return array if axes is None else array.transpose(axes)  # axes: from numpy 2.3 and later

    def _make_encode(self, text: object, code: object = "") -> bytes:
        if not isinstance(text, str) or code not in ("latin1", "latin-1"):
            raise UnsafePickle("it encodes something other than Latin-1 text")
        self._room -= len(text)
        # Text is read before it is encoded, so only an attack that repeats it exceeds the size of the file.
        if self._room < 0:
            raise UnsafePickle("it expands far beyond its own size")
        return text.encode("latin-1")

    def _in_bytes(self, shape: object, dtype: object, order: object, raw: object) -> NDArray[Any]:
        """An array that shares memory with the bytes, which may be 815 MB."""
        if not isinstance(dtype, np.dtype):
            raise UnsafePickle("it makes an array without a dtype")
        if isinstance(raw, str):  # a short string from Python 2
            raw = self._make_encode(raw, "latin-1")
        if not isinstance(raw, bytes | bytearray):
            raise UnsafePickle(f"it makes an array of {_kind_of(raw)}")
        sides = shape if isinstance(shape, tuple) else (None,)
        if len(sides) > MOST_AXES or not all(type(side) is int and side >= 0 for side in sides):
            raise UnsafePickle("it makes an array without a valid shape")
        if math.prod(sides) * dtype.itemsize != len(raw):
            raise ValueError(f"an array of {dtype} {sides} does not fit {len(raw):,} bytes")
        return np.ndarray(sides, dtype, raw, order="F" if order == "F" else "C")


def _kind_of(value: object) -> str:
    return value.kind if isinstance(value, Global) else f"a {type(value).__name__.lower()}"


def _refusing(reason: str) -> Callable[[_Reader], None]:
    return lambda reader: reader._refuse(reason)


# The codes of operations are listed in the standard library's pickletools.
_REFUSED = {
    "it creates instances of classes": b"io\x81\x92",
    "it refers to objects outside the file": b"PQ\x82\x83\x84\x97\x98",  # persistent ids, extensions, buffers
    "it contains a set": b"\x8f\x90\x91",
    "it contains an integer of more than 255 bytes": b"\x8b",
    "it uses stack operations that pickles of arrays never contain": b"012",
}

# The library's own operations: None, booleans, numbers, strings, tuples, lists, names, and the memo.
_KEPT = b"\x80.(N\x88\x89IJKML\x8aFGSTUBC\x8eVX\x8c\x8d)t\x85\x86\x87]l}cpqr\x94ghj"

_STRICTER: dict[int, Callable[[_Reader], None]] = {
    pickle.FRAME[0]: _Reader._skip_frame,
    pickle.BYTEARRAY8[0]: _Reader._load_bytearray,
    pickle.STACK_GLOBAL[0]: _Reader._load_stack_global,
    pickle.APPEND[0]: _Reader._append_one,
    pickle.APPENDS[0]: _Reader._append_many,
    pickle.SETITEM[0]: _Reader._set_one,
    pickle.SETITEMS[0]: _Reader._set_many,
    pickle.DICT[0]: _Reader._marked_as_dict,
    pickle.REDUCE[0]: _Reader._reduce,
    pickle.BUILD[0]: _Reader._build,
}

_STRICTER |= {code: _refusing(reason) for reason, codes in _REFUSED.items() for code in codes}

# typeshed declares that the functions take the C reader.
_Reader.dispatch = {code: pickle._Unpickler.dispatch[code] for code in _KEPT} | _STRICTER  # type: ignore[assignment]
