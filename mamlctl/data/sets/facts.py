"""What the registry says about a data set of images, in types that import without numpy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from mamlctl.core.events import OnEvent
from mamlctl.core.literals import Metric, Normalize, Rotations
from mamlctl.data.sets import folder_layout

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mamlctl.data.fetching.downloads import Archive
    from mamlctl.data.reading.packs import PackedImages


@dataclass(frozen=True)
class DataKind:
    """What tasks are made of; the metric decides whether they are classification, regression or control."""

    noun: str  # for messages: "trained on curves"
    predicate: str  # for messages: "sinusoid has curves"
    metric: Metric


IMAGES = DataKind("images", "has images", "accuracy")
CURVES = DataKind("curves", "has curves", "mse")
TABLE = DataKind("a table", "is a table", "mse")
REWARDS = DataKind("navigation tasks", "has rewards", "return")
OWN_CLASSES = DataKind("the tasks of its code", "makes its own tasks", "accuracy")
OWN_VALUES = DataKind("the tasks of its code", "makes its own tasks", "mse")

# (data root, sources, on_event): verify the sources and pack them into the data root.
Prepare = Callable[[Path, Sequence[Path], OnEvent], None]

# (images, split scheme, seed) -> the class numbers of train, val and test.
SplitClasses: TypeAlias = "Callable[[PackedImages, str, int], dict[str, NDArray[np.int64]]]"


class OpenPack(Protocol):
    """Opens all images of a data set."""

    def __call__(self, root: Path, resize: str, *, on_event: OnEvent) -> PackedImages:
        """Return the images.

        Args:
            root: the data root.
            resize: the filter with which originals are shrunk.
            on_event: receives notices and progress.
        """


class OpenShaped(Protocol):
    """Opens all images in any shape, made from the originals."""

    def __call__(
        self, root: Path, resize: str, *, side: int, channels: int, on_event: OnEvent
    ) -> PackedImages:
        """Return the images, [C, side, side] each.

        Args:
            root: the data root.
            resize: the filter with which originals are shrunk.
            side: the height and width in pixels.
            channels: 1 or 3.
            on_event: receives notices and progress.
        """


@dataclass(frozen=True)
class DataSet:
    """The facts about a data set of images, and the functions that fetch, open and split it."""

    name: str
    summary: str
    licence: str
    origin: str  # where it comes from
    download_bytes: int | None  # 0: nothing to download; None: only available with --from
    image_shape_CHW: tuple[int, int, int]
    split_schemes: tuple[str, ...]  # the first is the default
    prepare: Prepare
    open_pack: OpenPack
    split_classes: SplitClasses
    is_here: Callable[[Path], bool]  # whether `open_pack` can open it in a data root without `prepare`
    resizes: tuple[str, ...] = ("none",)  # the first is the default
    rotations: Rotations = "none"  # the default of the setting; so are `ink` and `normalize`
    ink: int = 0
    normalize: Normalize = "none"
    archives: Callable[[], tuple[Archive, ...]] | None = None  # the downloads, if there are any
    open_shaped: OpenShaped | None = None
    own_files: bool = False  # whether it is the user's folder, which may have bad images and small classes
    folder: str = ""  # the folder of its packs in the data root, if not its name

    def home(self, root: Path) -> Path:
        """The folder of its packs."""
        return root / (self.folder or self.name)

    @property
    def defaults(self) -> dict[str, Any]:
        """The values of settings that are not set otherwise."""
        channels, side, _ = self.image_shape_CHW
        values = {name: getattr(self, name) for name in ("rotations", "ink", "normalize")}
        values |= {"split_scheme": self.split_schemes[0], "resize": self.resizes[0], "augment": "none"}
        if self.own_files:
            values["split_fractions"] = folder_layout.FRACTIONS
        return values | {"image_size": side, "channels": channels}


SIDE = 84  # height and width of ImageNet's images, in pixels


@dataclass(frozen=True)
class ListedSet:
    """A data set whose files the user must provide, and what they must contain."""

    name: str
    title: str
    classes: tuple[int, int, int]  # train, val, test
    images: tuple[int, int, int]
    split_schemes: tuple[str, ...]
    where: str  # how to get it, in the imperative

    @property
    def hint(self) -> str:
        """The hint if files are missing."""
        return f"{self.where}; then: mamlctl fetch {self.name} --from FOLDER_OR_ARCHIVES"


MINI = ListedSet(
    "mini-imagenet",
    "mini-ImageNet",
    (64, 16, 20),
    (38_400, 9_600, 12_000),
    ("ravi",),
    "create it from ImageNet with github.com/yaoyao-liu/mini-imagenet-tools, or get a copy",
)
TIERED = ListedSet(
    "tiered-imagenet",
    "tieredImageNet",
    (351, 97, 160),
    (448_695, 124_261, 206_209),
    ("ren",),
    "create it from ImageNet with github.com/yaoyao-liu/tiered-imagenet-tools, or get a copy",
)
