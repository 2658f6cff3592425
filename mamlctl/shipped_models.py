"""The models that ship with the package, by name: `mamlctl eval omniglot-5w1s`.

A model is a run folder in `models/` without what only training needs. When it is used, it is copied into the
folder of runs, so that tests and predictions are written there and not into the installed package.
"""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp

from mamlctl.core.errors import MamlctlError, SettingsError
from mamlctl.core.files import exists, expanded
from mamlctl.core.problems import nearest
from mamlctl.settings.variables import runs_folder

FOLDER = Path(__file__).parent / "models"
COPIES = "models"  # the folder of copies in the folder of runs
BEST = Path("checkpoints", "best.pt")
LAST = BEST.with_name("last.pt")  # which only runs have


def model_names() -> list[str]:
    """The names of the models."""
    return sorted(path.name for path in FOLDER.iterdir() if (path / BEST).is_file())


def local_run(path: Path) -> Path:
    """Return the run folder that a path or the name of a model stands for.

    An existing path wins over a name. A path that is neither is returned as it is.

    Raises:
        MamlctlError: the name is almost that of a model, or the folder of runs has another version of it.
    """
    name = str(path)
    if path.exists():
        return path
    if name not in model_names():
        if len(path.parts) == 1 and (meant := nearest(name, model_names(), otherwise="")):
            raise MamlctlError(f"there is no run folder or model {name}", hint=meant)
        return path
    source, copy = FOLDER / name, runs_folder() / COPIES / name
    files = [file.relative_to(source) for file in source.rglob("*") if file.is_file()]
    if not copy.exists():
        _copy(source, files, copy)
    _, different, missing = filecmp.cmpfiles(source, copy, files, shallow=False)
    if different or missing:
        raise MamlctlError(
            f"{copy} is not this version of the model {name}", hint="rename or remove that folder"
        )
    return copy


def weights_place(text: str) -> Path:
    """The file, run folder or model that --init names; an existing path wins over a name.

    Raises SettingsError if there is none.
    """
    path = expanded(text)
    if text.strip() and exists(path):
        return path.absolute()
    if text in model_names():
        return FOLDER / text
    beside = path.parent.glob("*") if exists(path.parent) else ()
    names = [*model_names(), *(file.name for file in beside if file.name != path.name)]
    hint = nearest(path.name, names, otherwise="check the path")
    raise SettingsError([(f"--init: there is no file, run folder or model '{text}'", hint)])


def is_model(text: str) -> bool:
    """Whether a text is the name of a model, and not that of an existing path."""
    return text in model_names() and not Path(text).exists()


def refuse_model(path: Path) -> None:
    """Raise SettingsError for a model or its copy, where a run is needed that can be trained further."""
    copies = {(runs_folder() / COPIES / name).resolve(): name for name in model_names()}
    name = str(path) if is_model(str(path)) else copies.get(path.resolve())
    if name is not None and not (path / LAST).exists():
        fact = f"{path} is a model that ships with mamlctl, which cannot be resumed"
        raise SettingsError([(fact, f"start a new run from it, with --init {name}")])


def _copy(source: Path, files: Sequence[Path], copy: Path) -> None:
    """Copy the files of a folder in one step, so that no reader sees a part of them."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    part = Path(mkdtemp(prefix=f".{copy.name}-", dir=copy.parent))
    try:
        for file in files:  # without the modes, since the package may be read-only
            target = part / copy.name / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, target)
        (part / copy.name).rename(copy)
    except OSError:
        if not copy.is_dir():  # another process was faster
            raise
    finally:
        shutil.rmtree(part)
