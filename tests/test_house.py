"""The structure of the package, and the documents that describe it."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from mamlctl.config import FIELDS
from mamlctl.errors import ExitCode
from mamlctl.layers import preset_names

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mamlctl"
# Imports run strictly downward: a module may import only from floors before its own.
FLOORS = [
    ["mamlctl"],  # the version
    ["errors", "records", "stats", "schedules", "words", "cells"],
    ["config", "comparisons"],
    ["checks"],
    ["layers"],
    ["runs", "plans"],
    ["data.draws", "data.files", "data.images", "data.archives", "data.answers", "data.locks", "data.parts"],
    ["data.downloads", "data.labelled", "data.split_lists", "data.pickled_arrays"],
    ["data.pickles"],
    ["data.caches", "data.cifar", "data.glyphs", "data.omniglot", "data.episodes", "data.folder"],
    ["data.listed"],
    ["data.regression", "data.own", "data.disjoint", "data.relabelled"],
    ["report.plots", "report.published", "report.columns"],
    ["data.sets", "report.sheet", "report.figures", "report.tables", "report.inline"],
    ["report.html"],
    ["report.files"],
    ["data.choices"],
    ["engine.devices", "engine.norms", "engine.adam"],
    ["engine.nets", "engine.convolutions", "engine.optimizers"],
    ["engine.mlp", "engine.resnet12"],
    ["engine.inner", "engine.derivatives", "engine.blocks"],
    ["engine.outer", "engine.conv4", "engine.kernels"],
    ["engine.native", "engine.triton_kernels"],
    ["engine.triton_block"],
    ["engine.fast"],
    ["engine.adjoint", "engine.predict"],
    ["engine.relatives", "engine.evaluator", "engine.fitted"],
    ["engine.algorithms"],
    ["engine.build", "engine.step", "engine.checkpoints"],
    ["engine.capture"],
    ["engine.trainer"],
    ["commands.stopping", "commands.data", "commands.jobs"],
    ["commands.fetch", "commands.train", "commands.judged", "commands.local", "commands.slices"],
    ["commands.evaluate", "commands.pictures", "commands.own_model", "commands.results", "commands.cluster"],
    ["commands.own_images", "commands.grid", "commands.tabulate"],
    ["commands.spelling"],
    ["commands.ablate", "commands.estimate"],
    ["commands.compare"],
    ["grid_view", "options", "listing", "predictions", "table_view"],
    ["live"],
    ["display"],
    ["cli_fetch", "cli_own", "estimate_view"],
    ["table_options"],
    ["cli_ablate", "cli_compare"],
    ["cli"],
    ["__main__", "child"],
]
LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor}


def modules():
    """Every module of the package by its dotted name below mamlctl."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            yield name, path


def imported(path):
    """The package's modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mamlctl":
            base = node.module.removeprefix("mamlctl").removeprefix(".")
            names = {".".join(filter(None, [base, alias.name])) for alias in node.names}
            yield from names & LEVEL.keys() or {base or "mamlctl"}
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name == "mamlctl")


def test_every_module_has_its_floor():
    assert {name for name, _ in modules()} == LEVEL.keys() - {"mamlctl"}


@pytest.mark.parametrize(
    ("name", "path"), list(modules()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_imports_only_go_down(name, path):
    for target in imported(path):
        assert LEVEL[target] < LEVEL[name], f"{name} imports {target}, which is not below it"


def test_files_and_functions_stay_readable():
    for name, path in modules():
        text = path.read_text()
        assert text.count("\n") <= 350, f"{name} is too long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, f"{name}.{node.name} is too long"
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type else "everything"
                assert caught not in {"everything", "Exception", "BaseException"}, f"{name} catches {caught}"


def test_only_the_first_rooms_are_visible():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    tracked = subprocess.run(
        ["git", "-C", ROOT, "ls-files"], capture_output=True, text=True, check=True
    ).stdout
    visible = {line.split("/")[0] for line in tracked.splitlines() if not line.startswith(".")}
    assert visible == {"pyproject.toml", "README.md", "Makefile", "LICENSE", "mamlctl", "presets", "tests"}


@pytest.fixture(scope="module")
def readme():
    return (ROOT / "README.md").read_text()


def test_readme_tells_every_setting(readme):
    flags = set(re.findall(r"--[a-z0-9-]+", readme))
    missing = {"--" + name.replace("_", "-") for name in FIELDS} - flags
    assert not missing


def test_readme_tells_every_command_preset_family_and_exit_code(readme):
    for command in ("fetch", "train", "eval", "compare", "ablate"):
        assert f"mamlctl {command}" in readme
    for code in ExitCode:
        assert re.search(rf"\b{code.value}\b", readme), code
    for name in re.findall(r"--preset ([a-z][\w/+.-]+)", readme):
        assert name in preset_names(), name


def test_readme_points_only_at_what_is_there(readme):
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", readme):
        path = target[0] or target[1]
        if not path.startswith("http"):
            assert (ROOT / path).is_file(), path


def test_readme_names_only_real_make_targets(readme):
    for target in re.findall(r"^\t?make (\w+)", readme, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), target
