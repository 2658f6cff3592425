"""The models that ship with the package, by name: `mamlctl eval omniglot-5w1s`.

A model is a run folder in `models/` without what only training needs. When it is used, it is copied into the
folder of runs, so that tests and predictions are written there and not into the installed package.
"""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path
from tempfile import mkdtemp

from mamlctl.core.errors import MamlctlError
from mamlctl.settings.variables import runs_folder

FOLDER = Path(__file__).parent / "models"
BEST = Path("checkpoints", "best.pt")


def model_names() -> list[str]:
    """The names of the models."""
    return sorted(path.name for path in FOLDER.iterdir() if (path / BEST).is_file())


def local_run(path: Path) -> Path:
    """Return the run folder that a path or the name of a model stands for.

    An existing path wins over a name. A path that is neither is returned as it is.

    Raises:
        MamlctlError: the folder of runs has another version of the model.
    """
    name = str(path)
    if path.exists() or name not in model_names():
        return path
    source, copy = FOLDER / name, runs_folder() / "models" / name
    if not copy.exists():
        _copy(source, copy)
    if not (copy / BEST).is_file() or not filecmp.cmp(source / BEST, copy / BEST, shallow=False):
        raise MamlctlError(
            f"{copy} is not this version of the model {name}", hint="rename or remove that folder"
        )
    return copy


def _copy(source: Path, copy: Path) -> None:
    """Copy a folder in one step, so that no reader sees a part of it."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    part = Path(mkdtemp(prefix=f".{copy.name}-", dir=copy.parent))
    try:
        whole = shutil.copytree(source, part / copy.name)
        whole.rename(copy)
    except FileExistsError:
        pass  # another process was faster
    finally:
        shutil.rmtree(part)
