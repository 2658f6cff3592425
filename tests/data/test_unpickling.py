"""Pickles of arrays from any version of Python are read; all other pickles are refused and run nothing."""

import base64
import contextlib
import copyreg
import io
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from mamlctl.core.errors import DataError
from mamlctl.data.reading import unpickling
from mamlctl.data.reading.unpickling import load_arrays

PIXELS = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
# Written by Python 2.7.18's cPickle with numpy 1.16.6, protocols 0, 1 and 2, of a dict with `data` and `f`
# (PIXELS in C and Fortran order), `big` ([0, 1, 2] as >i4), `names` ("x\n'y", u"é"), and one of each number.
PYTHON_2 = {
    0: """
        KGRwMQpTJ2JpZycKcDIKY251bXB5LmNvcmUubXVsdGlhcnJheQpfcmVjb25zdHJ1Y3QKcDMKKGNudW1weQpuZGFycmF5CnA0
        CihJMAp0UydiJwp0UnA1CihJMQooSTMKdGNudW1weQpkdHlwZQpwNgooUydpNCcKSTAKSTEKdFJwNwooSTMKUyc+JwpOTk5J
        LTEKSS0xCkkwCnRiSTAwClMnXHgwMFx4MDBceDAwXHgwMFx4MDBceDAwXHgwMFx4MDFceDAwXHgwMFx4MDBceDAyJwp0YnNT
        J3JhdycKcDgKUydceGZmXHgwMCcKcDkKc1MnZmluZV9sYWJlbHMnCnAxMAoobHAxMQpJMwphSTEKYXNTJ2RhdGEnCnAxMgpn
        MwooZzQKKEkwCnRTJ2InCnRScDEzCihJMQooSTIKSTMKSTQKdGc2CihTJ3UxJwpJMApJMQp0UnAxNAooSTMKUyd8JwpOTk5J
        LTEKSS0xCkkwCnRiSTAwClMnXHgwMFx4MDFceDAyXHgwM1x4MDRceDA1XHgwNlx4MDdceDA4XHRcblx4MGJceDBjXHJceDBl
        XHgwZlx4MTBceDExXHgxMlx4MTNceDE0XHgxNVx4MTZceDE3Jwp0YnNTJ2InCkkwMQpzUydkJwpGMC41CnNTJ2YnCmczCihn
        NAooSTAKdFMnYicKdFJwMTUKKEkxCihJMgpJMwpJNAp0ZzE0CkkwMQpTJ1x4MDBceDBjXHgwNFx4MTBceDA4XHgxNFx4MDFc
        clx4MDVceDExXHRceDE1XHgwMlx4MGVceDA2XHgxMlxuXHgxNlx4MDNceDBmXHgwN1x4MTNceDBiXHgxNycKdGJzUydpJwpJ
        LTUKc1MnbCcKTDExODA1OTE2MjA3MTc0MTEzMDM0MjRMCnNTJ24nCk5zUydzJwpjbnVtcHkuY29yZS5tdWx0aWFycmF5CnNj
        YWxhcgpwMTYKKGcxNApTJ1x4MTEnCnRScDE3CnNTJ25hbWVzJwpwMTgKKGxwMTkKUyJ4XG4neSIKcDIwCmFW6Qphcy4=
    """,
    1: """
        fXEBKFUDYmlncQJjbnVtcHkuY29yZS5tdWx0aWFycmF5Cl9yZWNvbnN0cnVjdApxAyhjbnVtcHkKbmRhcnJheQpxBChLAHRV
        AWJ0UnEFKEsBKEsDdGNudW1weQpkdHlwZQpxBihVAmk0SwBLAXRScQcoSwNVAT5OTk5K/////0r/////SwB0YkkwMApVDAAA
        AAAAAAABAAAAAnRiVQNyYXdxCFUC/wBxCVULZmluZV9sYWJlbHNxCl1xCyhLA0sBZVUEZGF0YXEMaAMoaAQoSwB0VQFidFJx
        DShLAShLAksDSwR0aAYoVQJ1MUsASwF0UnEOKEsDVQF8Tk5OSv////9K/////0sAdGJJMDAKVRgAAQIDBAUGBwgJCgsMDQ4P
        EBESExQVFhd0YlUBYkkwMQpVAWRHP+AAAAAAAABVAWZoAyhoBChLAHRVAWJ0UnEPKEsBKEsCSwNLBHRoDkkwMQpVGAAMBBAI
        FAENBREJFQIOBhIKFgMPBxMLF3RiVQFpSvv///9VAWxMMTE4MDU5MTYyMDcxNzQxMTMwMzQyNEwKVQFuTlUBc2NudW1weS5j
        b3JlLm11bHRpYXJyYXkKc2NhbGFyCnEQKGgOVQERdFJxEVUFbmFtZXNxEl1xEyhVBHgKJ3lxFFgCAAAAw6lldS4=
    """,
    2: """
        gAJ9cQEoVQNiaWdxAmNudW1weS5jb3JlLm11bHRpYXJyYXkKX3JlY29uc3RydWN0CnEDY251bXB5Cm5kYXJyYXkKcQRLAIVV
        AWKHUnEFKEsBSwOFY251bXB5CmR0eXBlCnEGVQJpNEsASwGHUnEHKEsDVQE+Tk5OSv////9K/////0sAdGKJVQwAAAAAAAAA
        AQAAAAJ0YlUDcmF3cQhVAv8AcQlVC2ZpbmVfbGFiZWxzcQpdcQsoSwNLAWVVBGRhdGFxDGgDaARLAIVVAWKHUnENKEsBSwJL
        A0sEh2gGVQJ1MUsASwGHUnEOKEsDVQF8Tk5OSv////9K/////0sAdGKJVRgAAQIDBAUGBwgJCgsMDQ4PEBESExQVFhd0YlUB
        YohVAWRHP+AAAAAAAABVAWZoA2gESwCFVQFih1JxDyhLAUsCSwNLBIdoDohVGAAMBBAIFAENBREJFQIOBhIKFgMPBxMLF3Ri
        VQFpSvv///9VAWyKCQAAAAAAAAAAQFUBbk5VAXNjbnVtcHkuY29yZS5tdWx0aWFycmF5CnNjYWxhcgpxEGgOVQERhlJxEVUF
        bmFtZXNxEl1xEyhVBHgKJ3lxFFgCAAAAw6lldS4=
    """,
}


def refused(data, match="."):
    """Reading raises a DataError whose message and hint have one line each."""
    with pytest.raises(DataError, match=match) as raised:
        load_arrays(data, "evil.pkl")
    assert raised.value.message.startswith("evil.pkl ") and raised.value.message.isascii()
    assert "\n" not in raised.value.message and len(raised.value.message) < 200
    assert raised.value.hint and "\n" not in raised.value.hint


def same(value, other):
    """Whether two values are equal in type, shape and content, including nested ones."""
    if isinstance(other, dict):
        return value.keys() == other.keys() and all(same(value[key], other[key]) for key in other)
    if isinstance(other, list | tuple):
        return len(value) == len(other) and all(map(same, value, other)) and type(value) is type(other)
    if isinstance(other, np.ndarray):
        return value.dtype == other.dtype and np.array_equal(value, other)
    return type(value) is type(other) and value == other


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_data_of_every_kind_are_read(protocol):
    shared = PIXELS.copy()
    content = {
        "c": PIXELS,
        "fortran": np.asfortranarray(PIXELS),
        "turned": PIXELS.transpose(1, 2, 0),
        "part": PIXELS[:, ::2],
        "none": np.zeros((0, 3), dtype=np.uint8),
        "point": np.array(7, dtype=np.int16),
        "kinds": [np.arange(3).astype(kind) for kind in ("?", "i1", ">u2", "<i8", "f2", ">f4", "f8", "c16")],
        "numbers": [np.uint8(3), np.float32(0.5), np.bool_(True), 0, -1, 255, 256, 70_000, 2**40, -(2**200)],
        "others": [None, True, False, 1.5, float("-inf"), (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], {}],
        "text": ["", "é\n\\u1234", "x" * 300, "𝄞"],
        "bytes": [b"", bytes(range(256)) * 2],
        "again": [shared, shared],
        3: {b"inner": {"deep": [[["end"]]]}},
    }
    data = pickle.dumps(content, protocol)
    assert same(load_arrays(data, "x"), content)
    assert same(load_arrays(io.BytesIO(data), "x"), content)


@pytest.mark.parametrize("protocol", PYTHON_2)
def test_pickles_of_python_2_are_read(protocol):
    result = load_arrays(base64.b64decode(PYTHON_2[protocol]), "x")
    expected = {
        "data": PIXELS,
        "f": PIXELS,
        "big": np.arange(3, dtype=">i4"),
        "fine_labels": [3, 1],
        "names": ["x\n'y", "é"],
        "raw": "ÿ\0",
        **{"n": None, "b": True, "l": 2**70, "i": -5, "d": 0.5, "s": np.uint8(17)},
    }
    assert same(result, expected)


def python_2_array(raw):
    """A pickle of Python 2, protocol 2, of a dict with an array, like the files of CIFAR."""
    string = b"T" + struct.pack("<i", len(raw)) + raw
    return (
        b"\x80\x02}q\x01U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\0\x85U\x01b"
        b"\x87Rq\x05(K\x01J" + struct.pack("<i", len(raw)) + b"\x85cnumpy\ndtype\nq\x06U\x02u1K\0K\x01\x87R"
        b"q\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb\x89" + string + b"tbs."
    )


@pytest.mark.parametrize("length", [1, 255, unpickling.LONGEST_TEXT, unpickling.LONGEST_TEXT + 1])
def test_a_python_2_array_of_any_length_is_read(length):
    raw = np.random.default_rng(0).integers(0, 256, length, dtype=np.uint8)
    assert np.array_equal(load_arrays(python_2_array(raw.tobytes()), "x")["data"], raw)


@pytest.mark.parametrize(
    "written_by", [python_2_array, lambda raw: pickle.dumps(np.frombuffer(raw, "u1"), 4)]
)
def test_large_array_is_in_memory_only_once(written_by, tmp_path):
    size = 8 * 1024**2
    path = tmp_path / "large.pkl"
    path.write_bytes(written_by(bytes(size)))
    with path.open("rb") as file:
        tracemalloc.start()
        pixels = load_arrays(file, "x")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(pixels) and peak < 1.1 * size


class Call:
    """An object whose pickle calls a function when Python's own reader reads it."""

    def __init__(self, function, *arguments):
        self.how = function, arguments

    def __reduce__(self):
        return self.how


def text(words):
    return b"X" + struct.pack("<I", len(words)) + words.encode()


def named(module, name):
    return b"\x80\x04" + text(module) + text(name) + b"\x93"


def in_objects(call, protocol=4):
    """The pickle of an array of objects whose element is a call."""
    array = np.empty(1, dtype=object)
    array[0] = call
    return pickle.dumps(array, protocol)


def by_numpy_load(code, folder):
    path = folder / "harm.pkl"
    path.write_bytes(pickle.dumps(Call(exec, code)))
    return pickle.dumps(Call(np.load, str(path), None, True))


# Each runs `code`, or the shell command `touch`, if Python's own reader reads it.
ATTACKS = {
    "os.system": lambda code, touch, folder: pickle.dumps(Call(os.system, touch)),
    "exec next to arrays": lambda code, touch, folder: pickle.dumps({"data": [PIXELS, Call(exec, code)]}, 2),
    "name of python 2": lambda code, touch, folder: b"c__builtin__\neval\n(" + text(code) + b"tR.",
    "inst": lambda code, touch, folder: b"(" + text(touch) + b"ios\nsystem\n.",
    "obj": lambda code, touch, folder: b"(cos\nsystem\n" + text(touch) + b"o.",
    "newobj": lambda code, touch, folder: (
        named("builtins", "list")
        + (named("builtins", "map") + named("builtins", "exec") + b"]" + text(code) + b"a\x86\x81")
        + b"\x85R."
    ),
    "dotted name": lambda code, touch, folder: named("os", "path.os.system") + text(touch) + b"\x85R.",
    "dotted name of numpy": lambda code, touch, folder: (
        named("numpy", "f2py.os.system") + text(touch) + b"\x85R."
    ),
    "getattr": lambda code, touch, folder: (
        (named("builtins", "getattr") + named("builtins", "__import__") + text("os") + b"\x85R")
        + (text("system") + b"\x86R" + text(touch) + b"\x85R.")
    ),
    "build": lambda code, touch, folder: (  # sets an object's attributes, then calls one
        (named("types", "SimpleNamespace") + b")R}" + text("__class__") + b"0" + text("run"))
        + (named("os", "system") + b"sb0")
        + (named("os", "system") + text(touch) + b"\x85R.")
    ),
    "runstring": lambda code, touch, folder: (
        named("numpy.testing._private.utils", "runstring") + text(code) + b"}\x86R."
    ),
    "numpy.load": lambda code, touch, folder: by_numpy_load(code, folder),
    "array of objects": lambda code, touch, folder: in_objects(Call(exec, code)),
    "array of objects, text": lambda code, touch, folder: in_objects(Call(exec, code), 0),
    "argument of an array": lambda code, touch, folder: (
        named("numpy.core.multiarray", "_reconstruct")
        + (named("numpy", "ndarray") + named("builtins", "exec") + text(code) + b"\x85R")
        + text("b")
        + b"\x87R."
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python's own reader imports names of numpy 1
def test_attack_runs_nothing(attack, tmp_path):
    mark = tmp_path / "ran"
    data = ATTACKS[attack](f"open({str(mark)!r}, 'w').close()", f"touch {mark}", tmp_path)
    with contextlib.suppress(Exception):
        pickle.loads(data)
    assert mark.exists()  # the attack works with Python's own reader
    mark.unlink()
    refused(data, match="is refused: ")
    assert not mark.exists()


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n"
U1 = b"cnumpy\ndtype\n" + text("u1") + b"\x85R(K\x03" + text("|") + b"NNNtb"


def array(shape=b"K\x03\x85", dtype=U1, raw=b"C\x03abc", subtype=b"cnumpy\nndarray\n", wrap=b"%b"):
    """The pickle of an array; the arguments replace parts of it."""
    pickled = ARRAY + subtype + b"K\x00\x85C\x01b\x87R(K\x01" + shape + dtype + b"\x89" + raw + b"tb"
    return b"\x80\x04" + wrap % pickled + b"."


def test_handmade_array_is_read():
    assert load_arrays(array(), "x").tolist() == [97, 98, 99]


FOREIGN = {
    "another type": array(subtype=b"cnumpy\nmatrix\n"),
    "another type, allowed name": array(subtype=b"cnumpy\ndtype\n"),
    "no dtype": array(dtype=b"N"),
    "text for a dtype": array(dtype=text("u1")),
    "raw list": array(raw=b"]"),
    "raw array": array(raw=array()[2:-1]),
    "negative side": array(shape=b"J\xff\xff\xff\xff\x85"),
    "true side": array(shape=b"\x88\x85"),
    "shape list": array(shape=b"]"),
    "objects": array(dtype=U1.replace(text("u1"), text("O8"))),
    "fields": array(dtype=U1.replace(b"NNNt", b"N)}t")),
    "strings": array(dtype=U1.replace(text("u1"), text("S9"))),
    "dates": array(dtype=U1.replace(text("u1"), text("M8"))),
    "order": array(dtype=U1.replace(text("|"), text("x"))),
    "dtype left": U1 + b".",
    "dtype unbuilt": array(dtype=b"cnumpy\ndtype\n" + text("u1") + b"\x85R"),
    "array unbuilt": ARRAY + b"cnumpy\nndarray\nK\x00\x85C\x01b\x87R.",
    "array unbuilt in a list": b"]" + ARRAY + b"cnumpy\nndarray\nK\x00\x85C\x01b\x87Ra.",
    "array used before it is built": b"]" + ARRAY + b"cnumpy\nndarray\nK\x00\x85C\x01b\x87Rq\x01h\x01a.",
    "array built twice": array(wrap=b"%b(K\x01)Nt")[:-1] + b"b.",
    "function left": b"]cnumpy\ndtype\na.",
    "function in a tuple in a dict": b"}" + text("x") + b"cnumpy\nndarray\n\x85s.",
    "ndarray called": b"cnumpy\nndarray\nK\x09\x85R.",
    "text called": text("os.system") + text("touch x") + b"\x85R.",
    "call without a tuple": b"cnumpy\ndtype\n" + text("u1") + b"R.",
    "bytes of a size": b"cbuiltins\nbytes\nJ\xff\xff\xff\x7f\x85R.",
    "other encoding": b"c_codecs\nencode\n" + text("abc") + text("rot13") + b"\x86R.",
    "list changed": b"]}b.",
    "dict as a list": b"}K\x01a.",
    "array as a list": array(wrap=b"%bK\x01a"),
    "tuple as a key": b"}K\x01\x85K\x01s.",
    "deep tuple as a key": b"})" + b"\x85" * 100_000 + b"K\x01s.",
    "deep list as a dtype": b"cnumpy\ndtype\n" + b")" + b"\x85" * 100_000 + b"\x85R.",
    "deep list as a name": b")" + b"\x85" * 100_000 + text("x") + b"\x93.",
    "shape of many sides": array(shape=b"(" + b"K\x01" * 100_000 + b"t"),
    "persistent id": b"]Pevil\n.",
    "persistent id, binary": text("evil") + b"Q.",
    "extension": b"]\x82\x01.",
    "extension, 4": b"]\x84\x01\0\0\0.",
    "buffer outside": b"\x80\x05\x97.",
    "set": b"]\x8f.",
    "number of 2 GB": b"]\x8b\xff\xff\xff\x7f.",
    "popped": b"K\x01K\x020.",
    "name with a line end": b"\x80\x04" + text("os\nsystem") + text("\x1b[31m" * 99) + b"\x93.",
    "module that is a list": b"]]\x93.",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_everything_except_arrays_is_refused(name):
    refused(FOREIGN[name], match="is refused: it ")


INVALID = {
    "empty": b"",
    "page": b"<!DOCTYPE html><html>",
    "zip": b"PK\x03\x04" + bytes(30),
    "protocol 6": b"\x80\x06N.",
    "empty stack": b"\x80\x04.",
    "no mark": b"t.",
    "below the mark": b"K\x01(a.",
    "key without a value": b"}(K\x01u.",
    "missing memo": b"h\x07.",
    "missing memo, text": b"gx\n.",
    "not a number": b"Iabc\n.",
    "number of many digits": b"L" + b"9" * 100_000 + b"L\n.",
    "no quotes": b"Sabc\n.",
    "one quote": b"S'\n.",
    "not UTF-8": b"X\x01\0\0\0\xff.",
    "negative length": b"T\xff\xff\xff\xff.",
    "4 GB of text": b"X\xff\xff\xff\xffabc.",
    "16 EB of bytes": b"\x8e" + b"\xff" * 8 + b"abc.",
    "16 EB of buffer": b"\x96" + b"\xff" * 8 + b"abc.",
    "too few bytes": array(shape=b"K\x04\x85"),
    "too many bytes": array(shape=b"K\x02\x85"),
    "huge shape": array(shape=b"\x8a\x09" + b"\xff" * 8 + b"\0\x85"),
    "huge empty shape": array(shape=b"K\0\x8a\x09" + b"\xff" * 8 + b"\0\x86", raw=b"C\0"),
    "no such dtype": array(dtype=U1.replace(text("u1"), text("u7"))),
    "too few arguments": ARRAY + b")R.",
    "state too short": ARRAY + b"cnumpy\nndarray\nK\x00\x85C\x01b\x87R)b.",
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_pickles_are_refused(name):
    refused(INVALID[name], match="is not a valid pickle of arrays: |is cut off or unreadable")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pickles_cut_off_anywhere_are_refused(protocol):
    data = pickle.dumps({"a": [PIXELS, "text", b"bytes", 2**99, -7, 0.5, {"k": (1, 2)}]}, protocol)
    for length in range(len(data)):
        refused(data[:length])
        with io.BytesIO(data[:length]) as file:
            refused(file)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_damaged_bytes_give_data_or_a_dataerror(protocol):
    data = pickle.dumps({"a": [PIXELS, "text", b"bytes", 2**99, -7, 0.5, {"k": (1, 2)}]}, protocol)
    generator = np.random.default_rng(protocol)
    for _ in range(2000):
        damaged = bytearray(data)
        for place in generator.integers(0, len(data), 3):
            damaged[place] = generator.integers(0, 256)
        with contextlib.suppress(DataError):
            load_arrays(bytes(damaged), "x")


# Prints the resident memory in MiB that reading one file takes, without that of the modules.
MEMORY = """
import io, pickle, sys
from mamlctl.data.reading.unpickling import load_arrays
def peak():
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith("VmHWM")).split()[1]) / 1024
data, before = bytes.fromhex(sys.argv[2]), peak()
if sys.argv[1] == "standard":
    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            raise pickle.UnpicklingError(name)
    Reader(io.BytesIO(data)).load()
else:
    load_arrays(data, "x")
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_nine_bytes_take_gigabytes_in_the_standard_reader_but_nothing_here():
    def taken(reader, place):
        data = b"\x80\x02Nr" + struct.pack("<I", place) + b"."
        words = [sys.executable, "-c", MEMORY, reader, data.hex()]
        return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)

    # 16 bytes for each smaller index, so the largest index takes 64 GiB.
    assert taken("standard", 2**24) > 250
    assert taken("ours", 2**32 - 1) < 5


def test_encoding_the_same_text_repeatedly_is_refused():
    name = b"c_codecs\nencode\n"
    once = name + text("x" * 1000) + b"q\x02" + text("latin1") + b"q\x03\x86R"
    again = name + b"h\x02h\x03\x86R"
    assert load_arrays(once + b".", "x") == b"x" * 1000
    refused(b"](" + once + 2 * again + b"e.", match="expands far beyond its own size")


def test_reads_are_counted(monkeypatch):
    monkeypatch.setattr(unpickling, "MOST_READS", 100)
    refused(b"(" + b"]" * 1000 + b"t.", match="takes more than 100 reads")


def test_a_list_that_contains_itself_is_read():
    items = load_arrays(b"]q\x01h\x01a.", "x")
    assert items[0] is items


def test_registered_extension_is_refused(tmp_path):
    copyreg.add_extension("os", "system", 240)
    try:
        refused(b"]\x82\xf0" + text(f"touch {tmp_path / 'ran'}") + b"\x85R.", match="outside")
    finally:
        copyreg.remove_extension("os", "system", 240)
    assert not (tmp_path / "ran").exists()
