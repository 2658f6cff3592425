"""The settings of data and tasks: the first fields of the schema of training settings."""

# ruff: noqa: RUF009 - every default here is a field of a frozen dataclass

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mamlctl.core.literals import Augment, ClassLevel, Normalize, Rotations, TaskType
from mamlctl.settings.fields import EPISODE, setting


@dataclass(frozen=True)
class DataSettings:
    """What a task is made of: the data set, its splits, and the examples of a task."""

    dataset: str = setting(
        "omniglot",
        EPISODE,
        "Data set: a name, a folder of images, a table (.csv, .npz), or tasks.py:Tasks for your own code.",
        common=True,
    )
    ways: int = setting(5, EPISODE, "Classes per task.", common=True, least=2)
    shots: int = setting(
        1,
        EPISODE,
        "Support examples per class, or trajectories.",
        common=True,
        least=1,
    )
    queries: int = setting(
        1,
        EPISODE,
        "Query examples per class, or trajectories.",
        common=True,
        least=1,
    )
    train_shots: int | None = setting(
        None, EPISODE, "Support examples per class in training, if different from --shots.", least=1
    )
    split_scheme: str | None = setting(None, EPISODE, "How classes are divided into train, val and test.")
    split_fractions: str | None = setting(
        None, EPISODE, "Shares of a folder's classes or a table's tasks per split (default: 64-16-20)."
    )
    classes: ClassLevel = setting(
        "top",
        EPISODE,
        "Classes of a folder: its top folders, or the innermost ones (leaf; also chosen if all top folders "
        "contain only folders).",
    )
    strict: bool = setting(
        False,
        EPISODE,
        "Refuse unreadable images and too small classes in a folder, or incomplete rows and too small tasks "
        "in a table, instead of skipping them.",
    )
    inputs: str | None = setting(
        None, EPISODE, "Input columns of a table: names or patterns, joined by commas (default: x*)."
    )
    targets: str | None = setting(
        None, EPISODE, "Columns of a table to predict: names or patterns, joined by commas (default: y*)."
    )
    task_type: TaskType | None = setting(
        None, EPISODE, "Kind of your own tasks; their targets decide it, and another value is refused."
    )
    rotations: Rotations | None = setting(
        None,
        EPISODE,
        "Quarter turns of training classes: a random one per task, each as a new class, or none.",
    )
    augment: Augment | None = setting(
        None,
        EPISODE,
        "Random changes to training images: mirroring, shifts by up to an eighth, both, or none.",
    )
    ink: Literal[0, 1] | None = setting(
        None, EPISODE, "Pixel value of ink; paper has the other value (default: 1 for characters, else 0)."
    )
    normalize: Normalize | None = setting(
        None,
        EPISODE,
        "Shift and scale colours by ImageNet's mean and standard deviation "
        "(default: imagenet for colour data sets, none for a folder).",
    )
    image_size: int | None = setting(
        None, EPISODE, "Image side in pixels (default: the data set's; 84 for a folder).", least=4, below=1025
    )
    channels: Literal[1, 3] | None = setting(
        None, EPISODE, "Image channels, grey or colour (default: the data set's; 3 for a folder)."
    )
    resize: str | None = setting(None, EPISODE, "Filter used to shrink the original images.")
