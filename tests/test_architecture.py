"""The structure of the package: floors, sizes, docstrings, and modules that work without torch."""

import ast
import itertools
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest
from helpers.shared import ROOT

from mamlctl.core import errors

PACKAGE = ROOT / "mamlctl"
# A package imports only from earlier floors; inside a package, imports must not form a cycle.
FLOORS = [
    ["core"],
    ["settings"],
    ["data", "report", "run_folder", "shipped_models"],
    ["engine", "display"],
    ["experiments"],
    ["cli"],
    ["__main__"],
]
ENGINE = [
    ["devices", "distributed", "optimizers"],
    ["nets"],
    ["kernels", "inner_loop"],
    ["derivatives", "reinforcement"],
    ["evaluation"],
    ["algorithms"],
    ["training"],
]
MODULES_PER_PACKAGE = 12  # except in engine/algorithms, which has one module per method
FILE_LINES = 350
FUNCTION_LINES = 80
C_COLUMNS = 120
PARAMETERS = 7  # except for commands, whose parameters are options, and Triton kernels
CODE = sorted(PACKAGE.rglob("*.py"))


def dotted(path):
    """The name of a file's module: mamlctl/core/errors.py -> mamlctl.core.errors."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(path): path for path in CODE}


def imported(path):
    """The modules of this package that a file imports, at any level."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import, which this test does not follow"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= (names & MODULES.keys()) or {node.module}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return {name for name in modules if name.startswith("mamlctl.")}


def climbs(floors, inside):
    """Imports among the parts of the package `inside` that do not go down, as (module, imported) pairs."""
    floor_of = {name: number for number, names in enumerate(floors) for name in names}
    depth = inside.count(".") + 1
    for name, path in MODULES.items():
        if not name.startswith(f"{inside}."):
            continue
        importer = name.split(".")[depth]
        for target in imported(path):
            if target.startswith(f"{inside}."):
                part = target.split(".")[depth]
                if part != importer and floor_of[part] >= floor_of[importer]:
                    yield name, target


@pytest.mark.parametrize(("floors", "inside"), [(FLOORS, "mamlctl"), (ENGINE, "mamlctl.engine")])
def test_imports_only_go_down(floors, inside):
    parts = {name.split(".")[inside.count(".") + 1] for name in MODULES if name.startswith(f"{inside}.")}
    assert parts == set(itertools.chain.from_iterable(floors))
    assert list(climbs(floors, inside)) == []


def test_imports_have_no_cycles():
    graph = {name: imported(path) for name, path in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_c_files_stay_readable():
    for path in sorted(PACKAGE.rglob("*.[ch]")):
        lines = path.read_text().splitlines()
        assert len(lines) <= FILE_LINES, f"{path.name} is too long"
        for number, line in enumerate(lines, start=1):
            assert len(line) <= C_COLUMNS, f"{path.name}:{number} is too long"


def test_packages_files_and_functions_stay_readable():
    for folder in {path.parent for path in CODE}:
        count = len([path for path in folder.glob("*.py") if path.name != "__init__.py"])
        assert count <= MODULES_PER_PACKAGE or folder.name == "algorithms", folder
    for name, path in MODULES.items():
        text = path.read_text()
        assert text.count("\n") <= FILE_LINES, f"{name} is too long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < FUNCTION_LINES, f"{name}.{node.name} is too long"
                if not name.startswith("mamlctl.cli.") and not is_triton(node):
                    arguments = node.args.args + node.args.kwonlyargs
                    count = len([argument for argument in arguments if argument.arg != "self"])
                    assert count <= PARAMETERS, f"{name}.{node.name} has {count} parameters"
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                assert caught not in {"everything", "Exception", "BaseException"}, f"{name} catches {caught}"


def test_core_settings_and_the_command_line_open_without_torch():
    low = [name for name in MODULES if name.split(".")[1:2] in (["core"], ["settings"], ["cli"])]
    code = f"import sys, {', '.join(low)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_top_level_has_only_the_known_entries():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = subprocess.run(
        ["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True
    ).stdout
    visible = {line.split("/")[0] for line in tracked.splitlines() if not line.startswith(".")}
    assert visible == {"pyproject.toml", "README.md", "Makefile", "LICENSE", "mamlctl", "presets", "tests"}


def is_triton(node):
    """Whether a function is a Triton kernel or part of one."""
    return any(ast.unparse(decorator) == "triton.jit" for decorator in getattr(node, "decorator_list", ()))


def is_command(function):
    return any("with_options" in ast.unparse(decorator) for decorator in function.decorator_list)


def public_functions():
    """Every public function and method except commands, whose arguments are options, and Triton kernels."""
    for name in MODULES:
        body = [node for node in ast.parse(MODULES[name].read_text()).body if not is_triton(node)]
        classes = [node for node in body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
        for node in itertools.chain(body, *(item.body for item in classes)):
            if isinstance(node, ast.FunctionDef) and re.match("[a-z]|__", node.name) and not is_command(node):
                yield name, node


def signature(function):
    """The name of a function, then those of its parameters."""
    return function.name, *(item.arg for item in (*function.args.args, *function.args.kwonlyargs))


def describes_arguments(function):
    return re.search("Args:|[Aa]rguments", ast.get_docstring(function) or "") is not None


def raised_errors(function):
    """The errors for users that a function raises itself."""
    raised = {
        ast.unparse(node.exc) for node in ast.walk(function) if isinstance(node, ast.Raise) and node.exc
    }
    names = {text.split("(")[0] for text in raised}
    return {name for name in names if issubclass(getattr(errors, name, int), errors.MamlctlError)}


def test_public_functions_describe_many_arguments_and_their_errors():
    documented = {signature(node) for _, node in public_functions() if describes_arguments(node)}
    for name, node in public_functions():
        text = " ".join((ast.get_docstring(node) or "").split())
        _, *arguments = signature(node)
        implements = arguments[:1] == ["self"] and signature(node) in documented  # of an interface
        if len(set(arguments) - {"self", "cls"}) > 2 and not implements:
            assert describes_arguments(node), f"{name}.{node.name} does not describe its arguments"
        for error in raised_errors(node):
            assert re.search(rf"Raises?\b.*\b{error}\b", text), f"{name}.{node.name} raises {error}"
