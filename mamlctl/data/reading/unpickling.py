"""Pickles read without running them: numbers, strings, lists, dicts and numpy arrays, and nothing else.

A pickle is a program for a stack machine, and Python's own reader calls whatever it names. This machine has
only the operations that data need; it imports nothing, and calls nothing but six makers of arrays.
"""

from __future__ import annotations

import codecs
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

import numpy as np

from mamlctl.core.errors import DataError
from mamlctl.data.reading.pickled_arrays import GLOBALS, Global, Made, Makers, UnsafePickle

# Python 2 does not tell text from bytes. A string above this is an array's pixels, which decoding would copy.
LONGEST_TEXT = 64 * 1024

# A step of one byte can make an object of 64. CIFAR-100's train, with 50,000 names, takes 200,000 steps.
MOST_STEPS = 20_000_000

NEWEST = 5  # the newest protocol there is

PLAIN = (str, bytes, bytearray, int, float, np.generic, np.ndarray, type(None))


def load_arrays(data: bytes | BinaryIO, told: str) -> Any:
    """The object in a pickle of any protocol, written by Python 2 or 3; `data`: its bytes, or a file.

    Python 2's strings become text. Arrays lie in the bytes as read, and may be read-only for it.
    `told`: the file's name, for DataError, which is raised for anything else and for what is damaged.
    """
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        return _checked(_Machine(file).run())
    except UnsafePickle as error:
        message, hint = f"{told} is refused: {error}", "do not trust it: get the file from its authors"
        raise DataError(message, hint=hint) from error
    except (EOFError, OSError, zlib.error) as error:  # of a file, or of the archive that it is read from
        raise DataError(f"{told} is cut off or unreadable", hint="get the file anew") from error
    except (ValueError, TypeError, LookupError, OverflowError, MemoryError, struct.error) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        message = f"{told} is no sound pickle of arrays: {reason:.100}"
        raise DataError(message, hint="get the file anew") from error


def _checked(result: Any) -> Any:
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


class _Machine:
    """The stack, the memo, and one method per group of operations."""

    def __init__(self, file: BinaryIO) -> None:
        start = file.tell()
        self._size = file.seek(0, io.SEEK_END) - start
        file.seek(start)
        self._file = file
        self._makers = Makers(self._size)
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        read = self._file.read
        for number in range(MOST_STEPS):
            code = read(1)
            if code == b".":
                return self._pop()
            step = _STEPS.get(code)
            if step is None:
                self._unknown(code, number)
            step(self)
        raise UnsafePickle(f"it takes more than {MOST_STEPS:,} steps")

    def _unknown(self, code: bytes, number: int) -> NoReturn:
        if not code:
            raise EOFError
        if code in _FOREIGN and number > 0:  # at the start: any other file, such as a zip
            raise UnsafePickle(_FOREIGN[code])
        raise ValueError(f"there is no operation {code!r}")

    # Reading. Lengths are held to the file's before anything is allocated for them.

    def _read(self, count: int) -> bytes:
        if not 0 <= count <= self._size:
            raise EOFError
        data = self._file.read(count)
        if len(data) < count:
            raise EOFError
        return data

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._read(struct.calcsize(form)))[0]

    def _sized(self, form: str) -> bytes:
        return self._read(self._number(form))

    def _frame(self) -> None:
        self._read(8)  # its length helps only those who read in blocks

    def _line(self) -> bytes:
        line = self._file.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        return line[:-1]

    # The stack.

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise ValueError("it takes from an empty stack")
        return self._stack.pop()

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _since_mark(self) -> list[Any]:
        if not self._marks:
            raise ValueError("it lacks a mark")
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _top(self, kind: type[Any]) -> Any:
        value = self._pop()
        if type(value) is not kind:
            raise UnsafePickle(f"it treats a {type(value).__name__} as a {kind.__name__}")
        self._stack.append(value)
        return value

    # Scalars and strings.

    def _protocol(self) -> None:
        version = self._number("<B")
        if version > NEWEST:
            raise ValueError(f"its protocol is {version}, the newest known is {NEWEST}")

    def _int_line(self) -> None:
        line = self._line()
        # Protocol 0 has no other word for truth.
        self._push({b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line))

    def _short_long(self) -> None:
        self._push(int.from_bytes(self._read(self._number("<B")), "little", signed=True))

    def _bytearray(self) -> None:
        count = self._number("<Q")
        if count > self._size:
            raise EOFError
        data = bytearray(count)  # filled in place, since an array will lie in it
        if self._file.readinto(data) < count:  # type: ignore[attr-defined]
            raise EOFError
        self._push(data)

    def _old_string(self, data: bytes) -> None:
        self._push(data if len(data) > LONGEST_TEXT else data.decode("latin-1"))

    def _old_line(self) -> None:
        line = self._line()
        if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1]:
            raise ValueError("a string lacks its quotes")
        self._old_string(codecs.escape_decode(line[1:-1])[0])

    # Containers.

    def _append(self) -> None:
        value = self._pop()
        self._top(list).append(value)

    def _appends(self) -> None:
        values = self._since_mark()
        self._top(list).extend(values)

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._fill(self._top(dict), [key, value])

    def _set_items(self) -> None:
        items = self._since_mark()
        self._fill(self._top(dict), items)

    def _fill(self, target: dict[Any, Any], items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("a key lacks its value")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashing a tuple goes as deep as the tuple: one of a million levels ends the process.
            if not isinstance(key, str | bytes | int | float):
                raise UnsafePickle(f"it has a {type(key).__name__} as a key")
            target[key] = value

    def _old_dict(self) -> None:
        items: dict[Any, Any] = {}
        self._fill(items, self._since_mark())
        self._push(items)

    def _tuple(self, count: int) -> None:
        items = [self._pop() for _ in range(count)]
        self._push(tuple(reversed(items)))

    # The memo.

    def _put(self, key: int) -> None:
        self._memo[key] = self._pop()
        self._push(self._memo[key])

    def _get(self, key: int) -> None:
        value = self._memo[key]
        if isinstance(value, Made):
            if value.value is None:
                raise UnsafePickle("it uses an array before it is there")
            value = value.value
        self._push(value)

    # What is neither number, string nor container.

    def _global(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise UnsafePickle("it asks for what has no name")
        kind = GLOBALS.get((module, name))
        if kind is None:
            raise UnsafePickle(f"it asks for {f'{module}.{name}'!a:.80}, which is no array")
        self._push(Global(kind))

    def _global_lines(self) -> None:
        self._global(self._line().decode(), self._line().decode())

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self._global(module, name)

    def _reduce(self) -> None:
        arguments, maker = self._pop(), self._pop()
        self._push(self._makers.call(maker, arguments))

    def _build(self) -> None:
        state, made = self._pop(), self._pop()
        self._push(self._makers.complete(made, state))


# The operations by their codes, as the standard library's pickletools lists them.
_STEPS: dict[bytes, Callable[[_Machine], None]] = {
    b"N": lambda m: m._push(None),
    b"\x88": lambda m: m._push(True),
    b"\x89": lambda m: m._push(False),
    b"I": _Machine._int_line,
    b"J": lambda m: m._push(m._number("<i")),
    b"K": lambda m: m._push(m._number("<B")),
    b"M": lambda m: m._push(m._number("<H")),
    b"L": lambda m: m._push(int(m._line().removesuffix(b"L"))),
    b"\x8a": _Machine._short_long,
    b"F": lambda m: m._push(float(m._line())),
    b"G": lambda m: m._push(m._number(">d")),
    b"S": _Machine._old_line,
    b"T": lambda m: m._old_string(m._sized("<i")),
    b"U": lambda m: m._old_string(m._sized("<B")),
    b"C": lambda m: m._push(m._sized("<B")),
    b"B": lambda m: m._push(m._sized("<I")),
    b"\x8e": lambda m: m._push(m._sized("<Q")),
    b"\x96": _Machine._bytearray,
    b"V": lambda m: m._push(m._line().decode("raw-unicode-escape")),
    b"\x8c": lambda m: m._push(m._sized("<B").decode("utf-8")),
    b"X": lambda m: m._push(m._sized("<I").decode("utf-8")),
    b"\x8d": lambda m: m._push(m._sized("<Q").decode("utf-8")),
    b"(": lambda m: m._marks.append(len(m._stack)),
    b"t": lambda m: m._push(tuple(m._since_mark())),
    b")": lambda m: m._push(()),
    b"\x85": lambda m: m._tuple(1),
    b"\x86": lambda m: m._tuple(2),
    b"\x87": lambda m: m._tuple(3),
    b"]": lambda m: m._push([]),
    b"l": lambda m: m._push(m._since_mark()),
    b"a": _Machine._append,
    b"e": _Machine._appends,
    b"}": lambda m: m._push({}),
    b"d": _Machine._old_dict,
    b"s": _Machine._set_item,
    b"u": _Machine._set_items,
    b"p": lambda m: m._put(int(m._line())),
    b"q": lambda m: m._put(m._number("<B")),
    b"r": lambda m: m._put(m._number("<I")),
    b"\x94": lambda m: m._put(len(m._memo)),
    b"g": lambda m: m._get(int(m._line())),
    b"h": lambda m: m._get(m._number("<B")),
    b"j": lambda m: m._get(m._number("<I")),
    b"c": _Machine._global_lines,
    b"\x93": _Machine._stack_global,
    b"R": _Machine._reduce,
    b"b": _Machine._build,
    b"\x80": _Machine._protocol,
    b"\x95": _Machine._frame,
}

_OBJECTS, _ELSEWHERE = "it makes objects of classes", "it names things that lie outside it"

_FOREIGN = {
    **dict.fromkeys((b"i", b"o", b"\x81", b"\x92"), _OBJECTS),
    **dict.fromkeys((b"P", b"Q"), _ELSEWHERE),  # persistent ids
    **dict.fromkeys((b"\x82", b"\x83", b"\x84"), _ELSEWHERE),  # the extension registry
    **dict.fromkeys((b"\x97", b"\x98"), _ELSEWHERE),  # buffers beside the pickle
    **dict.fromkeys((b"\x8f", b"\x90", b"\x91"), "it holds a set"),
    b"\x8b": "it holds a number of absurd size",
    **dict.fromkeys((b"0", b"1", b"2"), "it turns its stack as no honest pickle of arrays does"),
}
