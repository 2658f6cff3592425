"""The documents name every command, setting, preset and exit code, and nothing that is not there."""

import re

import pytest
from helpers.shared import ROOT

from mamlctl.core.errors import ExitCode
from mamlctl.settings.presets import preset_names
from mamlctl.settings.schema import FIELDS


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
