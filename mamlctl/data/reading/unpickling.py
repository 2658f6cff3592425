"""Pickles read without running them: numbers, strings, lists, dicts and numpy arrays, and nothing else.

The format is decoded by the standard library's reader in Python. It gets only the operations that data need,
and instead of what a pickle names it gets five makers of arrays and bytes that are written here.

The library's usual reader, in C, is not used even with a `find_class` that refuses every name (measured with
Python 3.11; `tests/data/test_unpickling.py` has the files):

- 9 bytes that put something at place 2^28 of the memo take 4.1 GiB of resident memory, at 2^32 16 times that;
- 0.9 MB of nested tuples as the key of a dict end the process with a segmentation fault;
- 87 bytes of tuples that hold one another twice, as a key, take 2^40 steps;
- an array of 200 MB that Python 2 wrote takes 381 MiB and 1.4 s; this reader takes 191 MiB and 0.4 s.
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

# Python 2 does not tell text from bytes. A string above this is an array's pixels, which decoding would copy.
LONGEST_TEXT = 64 * 1024

# Each step reads at least once, and one of one byte can make an object of 64. CIFAR-100's train, with 50,000
# names, is read in 600,000 reads.
MOST_READS = 60_000_000

# What the reader raises for a file that is damaged.
DAMAGE = (
    *(pickle.UnpicklingError, struct.error),
    *(ValueError, TypeError, LookupError, OverflowError, MemoryError),
)

PLAIN = (str, bytes, bytearray, int, float, np.generic, np.ndarray, type(None))
NUMBERS = re.compile(r"[biufc]\d{1,2}")  # dtypes of plain numbers: no objects, strings, fields or dates
MOST_AXES = 64  # numpy 2's limit
ORDERS = ("|", "<", ">", "=")  # of the bytes in a number

Maker = Literal["ndarray", "dtype", "encode", "bytes", "array", "scalar", "buffer"]

# What a pickle may name, and what it stands for here.
GLOBALS: dict[tuple[str, str], Maker] = {
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

    kind: Maker


@dataclass(eq=False)
class Unbuilt:
    """A dtype (by its spec) or an array (without one), known only after the BUILD that follows at once."""

    spec: str | None = None
    value: np.dtype[Any] | NDArray[Any] | None = None


def load_arrays(data: bytes | BinaryIO, display_name: str) -> object:
    """Read a pickle of any protocol, written by Python 2 or 3.

    Python 2's strings become text. Arrays lie in the bytes as read, and may be read-only for it.

    Args:
        data: the pickle's bytes, or a file at its start.
        display_name: what the file is called in messages.

    Raises:
        DataError: it holds anything but data, or is damaged.
    """
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        return _checked(_Reader(file).load())
    except UnsafePickle as error:
        hint = "do not trust it: get the file from its authors"
        raise DataError(f"{display_name} is refused: {error}", hint=hint) from error
    except (EOFError, OSError, zlib.error) as error:  # of a file, or of the archive that it is read from
        raise DataError(f"{display_name} is cut off or unreadable", hint="get the file anew") from error
    except DAMAGE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        message = f"{display_name} is no sound pickle of arrays: {reason:.100}"
        raise DataError(message, hint="get the file anew") from error


def _checked(result: object) -> object:
    """The result, if nothing in it is but data: a marker of ours might have been left in a list."""
    waiting, seen = [result], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, PLAIN):
            continue
        if not isinstance(value, list | tuple | dict):
            raise UnsafePickle("it holds a function or an unfinished array")
        if id(value) not in seen:  # once, since a list may hold itself
            seen.add(id(value))
            waiting += value.values() if isinstance(value, dict) else value
    return result


class _WholeReads:
    """A file that gives all that it is asked for, or raises EOFError before memory is taken for it."""

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
        """Filled in place, since an array will lie in it."""
        data = bytearray(count if count <= self.size else 0)
        if len(data) != count or self.file.readinto(data) != count:  # type: ignore[attr-defined]
            raise EOFError
        return data


class _Memo(dict[int, object]):
    """What a pickle has put aside: of arrays and dtypes the finished ones."""

    def __getitem__(self, place: int) -> object:
        value = super().__getitem__(place)
        if not isinstance(value, Unbuilt):
            return value
        if value.value is None:
            raise UnsafePickle("it uses an array before it is there")
        return value.value


class _Reader(pickle._Unpickler):
    """The standard library's reader with fewer operations, and with stricter ones in place of some."""

    stack: list[object]
    append: Callable[[object], None]
    pop_mark: Callable[[], list[object]]

    def __init__(self, file: BinaryIO) -> None:
        self._source = _WholeReads(file)
        super().__init__(self._source)
        self.memo = _Memo()
        self._room = self._source.size  # bytes of text that may be encoded

    def find_class(self, module: object, name: object) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise UnsafePickle("it asks for what has no name")
        kind = GLOBALS.get((module, name))
        if kind is None:
            raise UnsafePickle(f"it asks for {f'{module}.{name}'!a:.80}, which is no array")
        return Global(kind)

    def _decode_string(self, data: bytes) -> str | bytes:
        return data if len(data) > LONGEST_TEXT else data.decode("latin-1")

    def _refuse(self, reason: str) -> None:
        if self._source.file.tell() == self._source.start + 1:  # any other file, such as a zip
            raise ValueError("it does not begin as one")
        raise UnsafePickle(reason)

    def _skip_frame(self) -> None:
        self._source.read(8)  # its length helps only those who read in blocks

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
            # Hashing a tuple goes as deep as the tuple: one of a million levels ends the process.
            if not isinstance(key, str | bytes | int | float):
                raise UnsafePickle(f"it has a {type(key).__name__} as a key")
            target[key] = value

    def _reduce(self) -> None:
        arguments, maker = self.stack.pop(), self.stack.pop()
        if not isinstance(maker, Global) or maker.kind == "ndarray":
            raise UnsafePickle(f"it calls {_kind_of(maker)}")
        if not isinstance(arguments, tuple) or (maker.kind == "bytes" and arguments):
            raise UnsafePickle(f"it calls {_kind_of(maker)} as no pickle does")
        self.append(getattr(self, f"_make_{maker.kind}")(*arguments))

    def _build(self) -> None:
        """Put the array or the dtype itself in place of what stood for it."""
        state, unbuilt = self.stack.pop(), self.stack.pop()
        if not isinstance(unbuilt, Unbuilt) or unbuilt.value is not None or not isinstance(state, tuple):
            raise UnsafePickle(f"it alters {_kind_of(unbuilt)}")
        if unbuilt.spec is None:
            *_, shape, dtype, fortran, raw = state
            unbuilt.value = self._in_bytes(shape, dtype, "F" if fortran else "C", raw)
        else:
            _, order, *foreign = state
            if order not in ORDERS or any(part is not None for part in foreign[:3]):
                raise UnsafePickle("it holds an array of fields, not of plain numbers")
            unbuilt.value = np.dtype(unbuilt.spec).newbyteorder(order)
        self.append(unbuilt.value)

    def _make_bytes(self) -> bytes:
        return b""

    def _make_array(self, subtype: object, shape: object, code: object) -> Unbuilt:
        if subtype != Global("ndarray"):
            raise UnsafePickle("it makes an array of a foreign type")
        return Unbuilt()

    def _make_dtype(self, spec: object, align: object = False, copy: object = True) -> Unbuilt:
        if not isinstance(spec, str) or not NUMBERS.fullmatch(spec):
            what = f"{spec!a:.40}" if isinstance(spec, str) else _kind_of(spec)
            raise UnsafePickle(f"it holds an array of {what}, not of plain numbers")
        return Unbuilt(spec)

    def _make_scalar(self, dtype: object, raw: object) -> object:
        return self._in_bytes((), dtype, "C", raw)[()]

    def _make_buffer(self, raw: object, dtype: object, shape: object, order: object, axes: Any = None) -> Any:
        array = self._in_bytes(shape, dtype, order, raw)
        return array if axes is None else array.transpose(axes)  # so says numpy 2.3 and later

    def _make_encode(self, text: object, code: object = "") -> bytes:
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
            raw = self._make_encode(raw, "latin-1")
        if not isinstance(raw, bytes | bytearray):
            raise UnsafePickle(f"it makes an array of {_kind_of(raw)}")
        sides = shape if isinstance(shape, tuple) else (None,)
        if len(sides) > MOST_AXES or not all(type(side) is int and side >= 0 for side in sides):
            raise UnsafePickle("it makes an array without a shape")
        if math.prod(sides) * dtype.itemsize != len(raw):
            raise ValueError(f"an array of {dtype} {sides} does not lie in {len(raw):,} bytes")
        return np.ndarray(sides, dtype, raw, order="F" if order == "F" else "C")


def _kind_of(value: object) -> str:
    return value.kind if isinstance(value, Global) else f"a {type(value).__name__.lower()}"


def _refusing(reason: str) -> Callable[[_Reader], None]:
    return lambda reader: reader._refuse(reason)


# Operations by their codes, as the standard library's pickletools lists them.
_REFUSED = {
    "it makes objects of classes": b"io\x81\x92",
    "it names things that lie outside it": b"PQ\x82\x83\x84\x97\x98",  # persistent ids, extensions, buffers
    "it holds a set": b"\x8f\x90\x91",
    "it holds a number of absurd size": b"\x8b",
    "it turns its stack as no honest pickle of arrays does": b"012",
}

# The library's own: None, truth, numbers, strings, tuples, lists, names, and what is put aside and fetched.
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

# typeshed says that the functions take the C reader.
_Reader.dispatch = {code: pickle._Unpickler.dispatch[code] for code in _KEPT} | _STRICTER  # type: ignore[assignment]
