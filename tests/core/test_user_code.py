"""The user's code: found without running it, imported apart from other modules, stored, and trusted."""

import json
import os
import py_compile
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest

from mamlctl.core.errors import MamlctlError, SettingsError
from mamlctl.core.user_code import stored as stored_code
from mamlctl.core.user_code.importing import import_code
from mamlctl.core.user_code.kinds import code_digests, code_folder
from mamlctl.core.user_code.references import absolute, is_reference, locate, module_file
from mamlctl.core.user_code.stored import (
    DESCRIPTION,
    StoredCode,
    as_stored,
    load_codes,
    read_code,
    trust,
    trust_file,
    write_code,
)

pytestmark = pytest.mark.usefixtures("here")

MAIN = """
from pathlib import Path
import helper
from parts import deep

def make(first, second):
    import late
    return helper.NAME, deep.NAME, late.NAME, first + second

def broken(first, second):
    return [][first]
"""


def write(folder, name="net", **files):
    """A folder with the main file and its helpers, whose NAMEs are `name` and the file."""
    texts = {"net.py": MAIN, "parts/deep.py": "", "helper.py": "", "late.py": ""} | files
    for file, text in texts.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text or f"NAME = {name + ' ' + file!r}\n")
    return f"{folder}/net.py:make"


def loaded(reference):
    return import_code(locate(reference, "--net"))


def load_code(folder):
    (code,) = load_codes([folder])
    return code


def stored(folder, reference, *, trusted=True):
    """Write the code of a reference into a folder, after one call."""
    code = loaded(reference)
    code(1, 2)
    saved = as_stored(code)
    write_code(folder, saved)
    if trusted:
        trust(saved)
    return saved


def test_files_with_equal_names_do_not_meet(here):
    before = set(sys.modules), list(sys.path), list(sys.meta_path)
    one, two = (loaded(write(here / name, name)) for name in ("one", "two"))
    for _ in range(2):
        for name, code in (("one", one), ("two", two)):
            assert code(1, 2) == (f"{name} helper.py", f"{name} parts/deep.py", f"{name} late.py", 3)
    assert (set(sys.modules), sys.path, sys.meta_path) == before


def test_all_local_files_that_were_imported_are_stored(here):
    write(here / "one", **{"unused.py": ""})
    saved = stored(here / "run", "one/net.py:make")
    assert set(saved.files) == {"net.py", "helper.py", "parts/deep.py", "late.py"}
    shutil.rmtree(here / "one")
    code, again = load_code(here / "run")
    assert code(1, 2)[:3] == ("net helper.py", "net parts/deep.py", "net late.py") and again == saved
    assert not list(here.rglob("__pycache__"))


def test_a_module_of_the_current_folder_is_stored_with_its_packages(here, monkeypatch):
    write(here / "own/models", **{"__init__.py": "NAME = 'package'\n"})
    net = here / "own/models/net.py"
    net.write_text(
        "from models import NAME\nfrom .helper import NAME as other\ndef make(a, b): return NAME, other\n"
    )
    monkeypatch.chdir(here / "own")
    saved = stored(here / "run", "models.net:make")
    assert set(saved.files) == {"models/__init__.py", "models/net.py", "models/helper.py"}
    monkeypatch.chdir(here)
    assert load_code(here / "run")[0](1, 2) == ("package", "net helper.py")


def test_an_installed_module_is_stored_by_its_digest(here):
    assert module_file("json.decoder") == Path(json.__file__).with_name("decoder.py")
    code = loaded("shlex:join")
    saved = as_stored(code)
    assert saved.installed and list(saved.files) == ["shlex.py"]
    write_code(here / "run", saved)
    assert [path.name for path in (here / "run").iterdir()] == [DESCRIPTION]
    with pytest.raises(SettingsError, match="do not trust"):
        load_code(here / "run")
    trust(saved)
    assert load_code(here / "run")[0](["a b"]) == "'a b'"
    document = json.loads((here / "run" / DESCRIPTION).read_text())
    document["files"]["shlex.py"] = "0" * 64
    (here / "run" / DESCRIPTION).write_text(json.dumps(document))
    with pytest.raises(SettingsError, match="another version"):
        load_code(here / "run")


def test_references_are_checked_without_running_the_file(here):
    ran = here / "ran"
    write(
        here / "one",
        **{"net.py": f"open({str(ran)!r}, 'w')\nif True:\n    def make(a, b): pass\nx = y = 1\n"},
    )
    assert locate("one/net.py:make", "--net").root == here / "one"
    assert locate("one/net.py:x", "--net").entry == "net.py"
    assert absolute("one/net.py:make") == f"{here}/one/net.py:make" and absolute("a.b:c") == "a.b:c"
    assert is_reference("a:b") and not is_reference("conv4")
    (here / "one/a-longer-name.py").mkdir()
    problems = {
        "one/net.py:mak": "did you mean 'make'?",
        "one/nett.py:make": "did you mean 'net.py'?",
        "one/net.py:": "write one/net.py:make",
        "nowhere.at.all:make": "nowhere/at/all.py",
        "no such:make": "write net.py:make",
        f"{'x' * 300}.py:make": "check the path",
        f"{'x' * 300}/net.py:make": "check the path",
        "one/a-longer-name.py:make": "check the path",
        "math:sin": "math.py",
    }
    for reference, hint in problems.items():
        with pytest.raises(SettingsError) as raised:
            locate(reference, "--net")
        assert hint in raised.value.hint, reference
    (here / "one/net.py").write_text("def make(:\n")
    with pytest.raises(SettingsError, match=r"net.py, line 1: SyntaxError"):
        locate("one/net.py:make", "--net")
    assert not ran.exists()
    for option, example in {"--loss": "loss.py:fn", "--dataset": "tasks.py:Tasks"}.items():
        with pytest.raises(SettingsError) as raised:
            locate("no such:f", option)
        assert raised.value.hint == f"write {example}, with the path of your file"


def test_errors_of_the_code_name_file_line_and_exception(here):
    write(here / "one")
    with pytest.raises(SettingsError) as raised:
        loaded("one/net.py:broken")(1, 2)
    assert (
        raised.value.message == f"{here}/one/net.py, line 11, in broken: IndexError: list index out of range"
    )
    cases = {
        "import helper\nimport missing\n": "line 2: ModuleNotFoundError: No module named 'missing'",
        "import sys\nsys.exit('bye')\n": "line 2: SystemExit: bye",
        "make = 3\n": "has an int called 'make'",
        "if False:\n    make = 3\n": "has no 'make'",
        "import helper\n": "late.py, line 1, in value: ZeroDivisionError",
    }
    (here / "one/late.py").write_text("def value(): return 1 / 0\n")
    (here / "one/helper.py").write_text("import late\n")
    for text, words in cases.items():
        tail = "" if "make" in text else "make = print\n"
        if text == "import helper\n":
            text = "import helper\nhelper.late.value()\n"
        (here / "one/net.py").write_text(text + tail)
        with pytest.raises(SettingsError) as raised:
            loaded("one/net.py:make")
        assert words in raised.value.message, text


def test_errors_in_a_library_below_the_folder_name_the_line_that_called_it(here, monkeypatch):
    """As in a project with a virtual environment in its own folder."""
    library = here / "one/.venv/lib/site-packages/library.py"
    write(here / "one", **{str(library.relative_to(here / "one")): "def fail(): return [][0]\n"})
    monkeypatch.syspath_prepend(library.parent)
    (here / "one/net.py").write_text("import library\ndef make(a, b):\n    return library.fail()\n")
    with pytest.raises(SettingsError, match=r"one/net.py, line 3, in make: IndexError"):
        loaded("one/net.py:make")(1, 2)
    del sys.modules["library"]


def test_what_the_code_prints_goes_to_stderr(here, capsys):
    write(here / "one", **{"net.py": "print('imported')\ndef make(a, b): print('called')\n"})
    loaded("one/net.py:make")(1, 2)
    assert capsys.readouterr() == ("", "imported\ncalled\n")


def test_code_that_runs_later_may_import_its_own_modules(here):
    text = (
        "def make(a, b):\n    def later():\n        import late\n        return late.NAME\n    return later\n"
    )
    write(here / "one", **{"net.py": text})
    before = set(sys.modules)
    code = loaded("one/net.py:make")
    later = code(1, 2)
    for _ in range(2):
        with code.running():
            assert later() == "net late.py"
    assert set(sys.modules) == before and set(as_stored(code).files) == {"net.py", "late.py"}


def test_signals_pass_through_the_code(here):
    write(here / "one", **{"net.py": "import sys\nsys.exit(143)\nmake = 1\n"})
    with pytest.raises(SystemExit):
        loaded("one/net.py:make")


def test_a_file_that_cannot_be_copied_is_refused(here):
    write(
        here / "one",
        **{"src/other.py": "", "net.py": "import sys\nsys.path.insert(0, __file__[:-6] + 'src')\n"},
    )
    with (here / "one/net.py").open("a") as file:
        file.write("import other\ndel sys.path[0]\ndef make(a, b): pass\n")
    code = loaded("one/net.py:make")
    with pytest.raises(SettingsError, match=r"net.py imports .*other.py, which cannot be copied"):
        as_stored(code)
    del sys.modules["other"]


def test_untrusted_code_is_not_run(here):
    ran = here / "ran"
    write(here / "one", **{"helper.py": f"NAME = open({str(ran)!r}, 'w').close()\n"})
    stored(here / "run", "one/net.py:make", trusted=False)
    ran.unlink()
    with pytest.raises(SettingsError, match="that you do not trust yet: none of it was run"):
        load_code(here / "run")
    assert not ran.exists()
    trust(read_code(here / "run"))
    load_code(here / "run")
    assert ran.exists()


EVIL = "import pathlib\npathlib.Path('ran').touch()\nNAME = 1\ndef make(a, b): return 1\n"


def rewrite(folder, **changes):
    path = folder / DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def add(folder, name, text=EVIL):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


def compiled(folder, name):
    """A bytecode file in __pycache__ that Python would prefer to the source, if it looked for one."""
    source = (folder / name).read_text()
    add(folder, name)
    py_compile.compile(folder / name, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    (folder / name).write_text(source)


def linked(folder, name):
    add(folder.parent, "evil.py")
    (folder / name).unlink()
    (folder / name).symlink_to(folder.parent / "evil.py")


FORGED = {
    "a changed entry": lambda folder: add(folder, "net.py"),
    "a changed helper": lambda folder: add(folder, "helper.py"),
    "a changed module in a folder": lambda folder: add(folder, "parts/deep.py"),
    "another file": lambda folder: add(folder, "json.py"),
    "a package in place of a module": lambda folder: add(folder, "helper/__init__.py"),
    "an __init__ file": lambda folder: add(folder, "parts/__init__.py"),
    "an extension module": lambda folder: add(folder, "helper.so"),
    "bytecode beside a file": lambda folder: compiled(folder, "helper.py"),
    "bytecode in place of a file": lambda folder: (add(folder, "late.pyc"), (folder / "late.py").unlink()),
    "a link": lambda folder: linked(folder, "helper.py"),
    "another function": lambda folder: rewrite(folder, name="broken"),
    "another entry": lambda folder: rewrite(folder, entry="helper.py"),
    "an entry outside": lambda folder: (add(folder.parent, "evil.py"), rewrite(folder, entry="../evil.py")),
    "an installed module": lambda folder: rewrite(folder, entry="os", name="system", installed=True),
    "an installed module with files": lambda folder: rewrite(
        folder, entry="os", name="system", installed=True, files={}
    ),
    "only an installed module": lambda folder: (
        shutil.rmtree(folder),
        write_code(folder, StoredCode("os", "system", True, {})),
    ),
    "a module that is not in the copy": lambda folder: (
        shutil.rmtree(folder),
        write_code(folder, StoredCode("os", "system", False, {})),
        trust(StoredCode("os", "system", False, {})),
    ),
    "a name with a line break": lambda folder: (
        shutil.rmtree(folder),
        write_code(folder, StoredCode("a\nb.py", "make", False, {"a\nb.py": EVIL.encode()})),
        trust(StoredCode("a\nb.py", "make", False, {"a\nb.py": EVIL.encode()})),
    ),
    "other digests": lambda folder: rewrite(folder, files={}),
    "a digest that is trusted": lambda folder: (add(folder, "net.py"), rewrite(folder, digest=TRUSTED[0])),
    "no description": lambda folder: (folder / DESCRIPTION).unlink(),
    "a description of another form": lambda folder: rewrite(folder, files=[1], entry=3),
    "a list": lambda folder: (folder / DESCRIPTION).write_text("[1]"),
    "a named pipe": lambda folder: ((folder / DESCRIPTION).unlink(), os.mkfifo(folder / DESCRIPTION)),
}
TRUSTED = []


@pytest.mark.parametrize("how", list(FORGED))
def test_forged_code_is_not_run(how, here):
    """The rest of the code is trusted; nothing may be run, not even the files that did not change."""
    write(here / "one")
    TRUSTED[:] = [stored(here / "run" / "code", "one/net.py:make").digest]
    FORGED[how](here / "run" / "code")
    before = set(sys.modules)
    with pytest.raises(SettingsError):
        load_code(here / "run" / "code")[0](1, 2)
    assert not list(here.rglob("ran")) and not {"helper", "parts", "late"} & (set(sys.modules) - before)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_the_digests_of_a_hostile_run_are_read_without_waiting(here):
    folder = code_folder(here / "run", "net")
    folder.mkdir(parents=True)
    os.mkfifo(folder / DESCRIPTION)
    assert code_digests(here / "run") == {}


def forged_consistently(folder, text=EVIL):
    """Replace the entry and describe it correctly, as an attacker would."""
    code = read_code(folder)
    files = dict(code.files) | {"net.py": text.encode()}
    shutil.rmtree(folder)
    write_code(folder, type(code)(code.entry, code.name, code.installed, files))


def test_consistently_forged_code_is_not_run(here):
    write(here / "one")
    stored(here / "run", "one/net.py:make")
    forged_consistently(here / "run")
    with pytest.raises(SettingsError, match="do not trust"):
        load_code(here / "run")
    assert not (here / "ran").exists()


def test_the_list_of_trusted_code_is_a_text_file_of_the_user(here):
    write(here / "one")
    saved = stored(here / "run", "one/net.py:make")
    assert trust_file() == here / "config" / "mamlctl" / "trusted-code.txt"
    trust(saved)
    (line,) = trust_file().read_text().splitlines()
    assert line.startswith(f"{saved.digest}  20") and line.endswith("net.py:make")
    trust_file().write_text("# mine\n\n")
    with pytest.raises(SettingsError, match="do not trust"):
        load_code(here / "run")
    trust_file().write_text("# mine")
    trust(saved)
    assert load_codes([here / "run"])
    trust_file().unlink()
    trust_file().mkdir()
    for call in (partial(trust, saved), partial(load_codes, [here / "run"])):
        with pytest.raises(MamlctlError, match="cannot be read: Is a directory"):
            call()
    trust_file().rmdir()
    trust_file().parent.rmdir()
    trust_file().parent.write_text("")
    with pytest.raises(MamlctlError, match="cannot be read: Not a directory"):
        trust(saved)


@pytest.mark.parametrize("content", ["NAME = 1\n" + "#" * 10_000_000, "NAME = 1\n"])
def test_files_that_could_not_be_read_again_are_refused_before_training(content, here, monkeypatch):
    write(here / "one", **{"helper.py": content})
    if len(content) < 100:
        monkeypatch.setattr(stored_code, "MOST_FILES", 1)
    code = loaded("one/net.py:make")
    with pytest.raises(SettingsError, match="cannot be copied into the run folder"):
        as_stored(code)
