"""Read presets and settings files, and write settings files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mamlctl.core.errors import SettingsError
from mamlctl.core.problems import nearest
from mamlctl.settings.schema import TrainConfig


def presets_folder() -> Path:
    """The folder of the presets: next to the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).parents[1]
    in_wheel = package / "presets"
    return in_wheel if in_wheel.is_dir() else package.parent / "presets"


def preset_names() -> list[str]:
    """The names of all presets, as `--preset` accepts them."""
    folder = presets_folder()
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def load_preset(name: str) -> dict[str, Any]:
    """The values of a preset. Raises SettingsError for an unknown name."""
    if name not in (names := preset_names()):
        raise SettingsError(
            [(f"unknown preset '{name}'", nearest(name, names, otherwise=f"use one of {', '.join(names)}"))]
        )
    return load_file(presets_folder() / f"{name}.yaml")


def load_file(path: Path) -> dict[str, Any]:
    """The flat mapping in a YAML file. Raises SettingsError if the file is anything else."""
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError([(f"{path} cannot be read: {reason}", "use a YAML file of settings")]) from error
    except (YAMLError, OmegaConfBaseException) as error:
        raise SettingsError(
            [(f"{path} is not YAML: {_first_line(error)}", "write one 'name: value' per line")]
        ) from error
    if not isinstance(values, dict):
        raise SettingsError([(f"{path} contains no settings", "write one 'name: value' per line")])
    return {str(key): value for key, value in values.items()}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def parse_sets(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse the `key=value` pairs of `--set`. Raises SettingsError for a pair that is not valid."""
    problems = [(f"--set {pair} has no '='", "write --set key=value") for pair in pairs if "=" not in pair]
    if problems:
        raise SettingsError(problems)
    values: dict[str, Any] = {}
    for pair in pairs:
        try:
            values.update(OmegaConf.to_container(OmegaConf.from_dotlist([pair]), resolve=True))  # type: ignore[arg-type]
        except (YAMLError, OmegaConfBaseException) as error:
            raise SettingsError([(f"--set {pair}: {_first_line(error)}", "write --set key=value")]) from error
    return {str(key): value for key, value in values.items()}


def to_yaml(config: TrainConfig, completed: TrainConfig) -> str:
    """The settings as a file for `--config`, with the derived value of each null setting as a comment.

    Null settings are not replaced by their derived values, since those follow a later change of, say, the
    seed or the number of epochs.
    """
    lines = OmegaConf.to_yaml(asdict(config)).splitlines()
    return "".join(line + _derived_note(line, completed) + "\n" for line in lines)


def _derived_note(line: str, completed: TrainConfig) -> str:
    name, _, value = line.partition(": ")
    derived = getattr(completed, name) if value == "null" else None
    return "" if derived is None else f"  # derived: {derived}"
