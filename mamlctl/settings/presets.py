"""Read presets and settings files, and write settings files."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

from mamlctl.core.errors import SettingsError
from mamlctl.core.problems import nearest
from mamlctl.settings.schema import TrainConfig

MOST_CHARACTERS = 100_000  # 80 times a complete config.yaml
SYNTAX = "write each setting once, as 'name: value' on its own line"


# The functions below import OmegaConf when they are called, since `mamlctl train --help` does not need it.


def yaml_errors() -> tuple[type[Exception], ...]:
    """What reading YAML raises: PyYAML lets errors of tagged values (`!!bool x`) and huge numbers through."""
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    base = (ValueError, LookupError, AttributeError, TypeError, RecursionError)
    return (YAMLError, OmegaConfBaseException, *base)


def presets_folder() -> Path:
    """The folder of the presets: next to the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).parents[1]
    in_wheel = package / "presets"
    return in_wheel if in_wheel.is_dir() else package.parent / "presets"


def preset_names() -> list[str]:
    """The names of all presets, as `--preset` accepts them."""
    folder = presets_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def preset_summaries() -> dict[str, str]:
    """The names of all presets, each with the first sentence of the comment at its head."""
    return {name: _summary(presets_folder() / f"{name}.yaml") for name in preset_names()}


def _summary(path: Path) -> str:
    """The first sentence of the comment at the head of a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    lines = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    text = " ".join(line.lstrip("# ") for line in lines)
    return re.split(r"(?<=\.) (?=[A-Z])", text)[0]


def load_preset(name: str) -> dict[str, Any]:
    """The values of a preset. Raises SettingsError for an unknown name."""
    if name not in (names := preset_names()):
        raise SettingsError(
            [(f"unknown preset '{name}'", nearest(name, names, otherwise=f"use one of {', '.join(names)}"))]
        )
    return load_file(presets_folder() / f"{name}.yaml")


def load_file(path: Path) -> dict[str, Any]:
    """The flat mapping in a YAML file. Raises SettingsError if the file is anything else."""
    from omegaconf import OmegaConf

    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError([(f"{path} cannot be read: {reason}", "use a YAML file of settings")]) from error
    if len(text) > MOST_CHARACTERS:
        fact = f"{path} has more than {MOST_CHARACTERS:,} characters"
        raise SettingsError([(fact, "use a YAML file of settings")])
    try:
        # Interpolations stay text, which `merge` refuses: a file must not read environment variables.
        values = OmegaConf.to_container(OmegaConf.load(StringIO(text)), resolve=False)
    except OSError:  # OmegaConf's error for a file with a single number
        values = None
    except yaml_errors() as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f"line {mark.line + 1}: "
        raise SettingsError([(f"{path} is not YAML: {line}{_problem(error)}", SYNTAX)]) from error
    if not isinstance(values, dict) or not values:
        raise SettingsError([(f"{path} contains no settings", SYNTAX)])
    return {str(key): value for key, value in values.items()}


def _problem(error: Exception) -> str:
    """What a YAML parser reports, on one line."""
    return getattr(error, "problem", None) or next(iter(str(error).splitlines()), type(error).__name__)


def parse_sets(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse the `key=value` pairs of `--set`. Raises SettingsError for a pair that is not valid."""
    from omegaconf import OmegaConf

    problems = [(f"--set {pair} has no '='", "write --set key=value") for pair in pairs if "=" not in pair]
    if problems:
        raise SettingsError(problems)
    values: dict[str, Any] = {}
    for pair in pairs:
        try:
            values.update(OmegaConf.to_container(OmegaConf.from_dotlist([pair]), resolve=False))  # type: ignore[arg-type]
        except yaml_errors() as error:
            raise SettingsError([(f"--set {pair}: {_problem(error)}", "write --set key=value")]) from error
    return {str(key): value for key, value in values.items()}


def to_yaml(config: TrainConfig, completed: TrainConfig) -> str:
    """The settings as a file for `--config`, with the derived value of each null setting as a comment.

    Null settings are not replaced by their derived values, since those follow a later change of, say, the
    seed or the number of epochs.
    """
    from omegaconf import OmegaConf

    lines = OmegaConf.to_yaml(asdict(config)).splitlines()
    return "".join(line + _derived_note(line, completed) + "\n" for line in lines)


def _derived_note(line: str, completed: TrainConfig) -> str:
    name, _, value = line.partition(": ")
    derived = getattr(completed, name) if value == "null" else None
    return "" if derived is None else f"  # derived: {derived}"
