"""Published class splits, as lists that ship with the package.

mini-imagenet: Ravi & Larochelle 2017, 64/16/20 (twitter-research/meta-learning-lstm, data/miniImagenet).
cifar-fs: Bertinetto et al. 2019, 64/16/20, and fc100: Oreshkin et al. 2018, 60/20/20 (12, 4 and 4
superclasses, each with its five classes): copied from tristandeleu/pytorch-meta. FC100's superclasses agree
with ElementAI/TADAM; CIFAR-FS's classes have no second source to compare with.
"""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mamlctl.core.errors import DataError
from mamlctl.core.literals import SPLITS
from mamlctl.data.reading.packs import PackedImages

# Split scheme, named after its authors -> name of the list.
SCHEMES = {"ravi": "mini-imagenet", "bertinetto": "cifar-fs", "oreshkin": "fc100"}


@cache
def listed_split(name: str) -> dict[str, str]:
    """Return class -> split of data set `name`, in the order of the list. Callers share the dict."""
    path = Path(__file__).with_name("splits") / f"{name}.csv"
    with path.open(encoding="ascii", newline="") as file:
        return {row["class"]: row["split"] for row in csv.DictReader(file)}


def split_classes(packed: PackedImages, scheme: str, seed: int) -> dict[str, NDArray[np.int64]]:
    """Return the published classes of train, val and test.

    Args:
        packed: all images of the data set.
        scheme: a key of `SCHEMES`.
        seed: not used, since the lists are fixed.

    Raises:
        DataError: the classes are not exactly those of the list.
    """
    listed = listed_split(SCHEMES[scheme])
    if set(packed.names) != listed.keys():
        odd = sorted(set(packed.names) ^ listed.keys())
        message = f"the classes are not those of {SCHEMES[scheme]}: {len(odd)} differ, for example {odd[0]}"
        raise DataError(message, hint=f"run mamlctl fetch {SCHEMES[scheme]} --force")
    places = np.array([listed[name] for name in packed.names])
    return {split: np.flatnonzero(places == split) for split in SPLITS}
