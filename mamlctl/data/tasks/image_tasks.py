"""Streams of image tasks: classes and images drawn by task number, gathered on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from mamlctl.core.errors import SettingsError
from mamlctl.core.formatting import plural
from mamlctl.core.literals import Augment, Normalize, Rotations, Split
from mamlctl.core.problems import Problem
from mamlctl.data.counter_rng import k_smallest, random_words
from mamlctl.data.reading.packs import PackedImages
from mamlctl.data.tasks.episodes import Episodes, StreamSettings, to_device_no_sync

TURNS = 4  # quarter turns of a square image
SHIFT = 8  # crops move an image by up to an eighth of its side, as usual (4 of 32 pixels)

# ImageNet's red, green and blue, with which the MAML++ code normalises mini-ImageNet.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEVIATION = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageSettings:
    """How stored images become the examples of a data set's tasks."""

    name: str  # of the data set
    # augment: a random quarter turn for each class of a training task; classes: each turn of a training class
    # is a separate class, so one task may have two turns of a character; none.
    rotations: Rotations = "none"
    ink: int = 0  # the value of ink; stored images have ink 0 and paper 255
    augment: Augment = "none"  # drawn for each image of a training task
    normalize: Normalize = "none"
    channels: int | None = None  # None: as stored


def episode_problems(
    packed: PackedImages,
    classes: NDArray[np.int64],
    settings: StreamSettings,
    images: ImageSettings,
    more_classes: str = "",
) -> list[Problem]:
    """Explain why tasks of this size cannot be drawn from these classes.

    Args:
        packed: all images of the data set.
        classes: the classes of the split, as numbers in `packed`.
        settings: the split and the size of its tasks.
        images: how images become examples.
        more_classes: what else to use if the split has too few classes, for the hint.

    Returns:
        (fact, hint) pairs; none if the tasks can be drawn.
    """
    problems = []
    name, ways, examples = images.name, settings.ways, settings.shots + settings.queries
    height, width = packed.images_MCHW.shape[-2:]
    if images.rotations != "none" and height != width:
        fact = f"images of {name} have {height}x{width} pixels: only square ones can be turned"
        problems.append((fact, "use --rotations none"))
    pool = len(classes) * _turns_as_classes(settings.split, images.rotations)
    if pool < ways:
        fewer = f"--ways {pool} or fewer" if pool > 1 else ""
        hint = f"use {', '.join(filter(None, [fewer, more_classes])) or 'other splits'}"
        classes_in_split = f"{name} '{settings.split}' has {pool} {plural(pool, 'class')}"
        problems.append((f"{classes_in_split}, but --ways is {ways}", hint))
    counts = packed.counts[classes]
    fewest = int(counts.min()) if len(counts) else examples
    if fewest < examples:
        where = "per class" if fewest == counts.max() else "in its smallest class"
        sizes = f"--shots {settings.shots} + --queries {settings.queries}"
        fact = f"{name} has {fewest} {plural(fewest, 'image')} {where}, but {sizes} is {examples}"
        hint = f"use --shots and --queries that sum to {fewest} or fewer" if fewest > 1 else "add images"
        problems.append((fact, hint))
    return problems


def _turns_as_classes(split: Split, rotations: Rotations) -> int:
    """How many classes each class of the split counts as; only training classes are turned."""
    return TURNS if rotations == "classes" and split == "train" else 1


class PixelValues:
    """Turn stored uint8 images into network inputs: scaled to 0..1, inverted for ink 1, then normalised."""

    def __init__(
        self, *, ink: int, normalize: Normalize, channels: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Copy the constants to the device once, so that no call waits.

        Args:
            ink: the value of ink in the inputs, 0 or 1.
            normalize: the --normalize setting.
            channels: of the inputs; grey images are repeated over them.
            device: where the images are.
            dtype: of the inputs.
        """
        self._ink, self._channels = ink, channels
        self._white = torch.tensor(255, device=device, dtype=dtype)
        self._moments = None
        if normalize == "imagenet":
            moments = torch.tensor([IMAGENET_MEAN, IMAGENET_DEVIATION], device=device, dtype=dtype)
            self._moments = moments[..., None, None]

    def __call__(self, x_MCHW: Tensor) -> Tensor:
        if self._ink == 1:
            x_MCHW = x_MCHW.bitwise_not()  # 255 - x, exact in uint8
        values_MCHW = x_MCHW / self._white  # the result has the dtype of `_white`
        if values_MCHW.shape[1] < self._channels:
            values_MCHW = values_MCHW.expand(-1, self._channels, -1, -1)
        if self._moments is not None:
            mean, deviation = self._moments
            values_MCHW = (values_MCHW - mean) / deviation
        return values_MCHW


class TaskStream:
    """All tasks of a split; task i does not depend on the run, the batch size or the order of calls."""

    def __init__(
        self,
        packed: PackedImages,
        classes: NDArray[np.int64],
        settings: StreamSettings,
        images: ImageSettings,
    ) -> None:
        """Put the split's images on the device.

        Args:
            packed: all images of the data set.
            classes: the classes of the split, as numbers in `packed`.
            settings: the split, the size of its tasks, the seed and the device.
            images: how images become examples.

        Raises:
            SettingsError: the split is too small for such tasks.
        """
        if problems := episode_problems(packed, classes, settings, images):
            raise SettingsError(problems)
        self.split, self.seed, self.ways = settings.split, settings.seed, settings.ways
        self.shots, self.queries, self.device = settings.shots, settings.queries, settings.place.device
        split, rotations, device = settings.split, images.rotations, settings.place.device
        self._turns_as_classes = _turns_as_classes(split, rotations)
        self.pool = len(classes) * self._turns_as_classes  # classes that tasks are drawn from
        self._apart = len(classes) if self._turns_as_classes > 1 else 0  # class numbers per turn
        self._turns = rotations != "none" and split == "train"
        self._augment = images.augment if split == "train" else "none"
        self._values = PixelValues(
            ink=images.ink,
            normalize=images.normalize,
            channels=images.channels or packed.images_MCHW.shape[1],
            device=device,
            dtype=settings.place.dtype,
        )
        self._counts, self._starts = packed.counts[classes], packed.starts[classes]
        self._offsets = np.cumsum(self._counts) - self._counts
        image_M = np.repeat(self._starts - self._offsets, self._counts) + np.arange(self._counts.sum())
        if device.type == "cpu" and not self._turns:
            # Images are read from the memory-mapped file, so only those in use take memory.
            self._offsets, store_MCHW = self._starts, torch.from_numpy(packed.images_MCHW)
        else:
            # Only the images of the split are copied to the device, ordered by class.
            store_MCHW = torch.from_numpy(packed.images_MCHW[image_M]).to(device)
        if self._turns:
            # Turned once, so that a task's turn is index arithmetic; turning took 1.3 of 2 ms per meta-batch.
            views = [torch.rot90(store_MCHW, turn, dims=(-2, -1)) for turn in range(TURNS)]
            store_MCHW = torch.cat(views)
        self._store_MCHW, self._images = store_MCHW, len(image_M)
        label_N = torch.arange(self.ways, device=device)
        self._support_y_E = label_N.repeat_interleave(self.shots)
        self._query_y_E = label_N.repeat_interleave(self.queries)
        self._prepare()

    def _prepare(self) -> None:
        """Extra set-up of a subclass; raises SettingsError if the split is too small for it."""

    def indices(self, first: int, tasks: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return image_TNE (positions in the pack, shots first) and turns_TN (quarter turns) of tasks."""
        class_TN, example_TNE, turns_TN = self._draw(first, tasks)
        return self._starts[class_TN][..., None] + example_TNE, turns_TN

    def episodes(self, first: int, tasks: int) -> Episodes:
        """Return tasks `first`, `first` + 1, ... with their images, without a host sync."""
        class_TN, example_TNE, turns_TN = self._draw(first, tasks)
        at_TNE = (self._offsets[class_TN] + turns_TN * self._images)[..., None] + example_TNE
        # index_select copies whole images; indexing by a tensor copies pixel by pixel (18 times slower).
        x_MCHW = self._store_MCHW.index_select(0, self._to_device_no_sync(at_TNE.ravel()))
        if self._augment != "none":
            x_MCHW = self._augmented(x_MCHW, first, tasks)
        values_MCHW = self._values(x_MCHW)
        x_TNECHW = values_MCHW.reshape(*at_TNE.shape, *values_MCHW.shape[1:])
        return Episodes(
            support_x_TECHW=x_TNECHW[:, :, : self.shots].flatten(1, 2),
            support_y_TE=self._support_y_E.repeat(tasks, 1),
            query_x_TECHW=x_TNECHW[:, :, self.shots :].flatten(1, 2),
            query_y_TE=self._query_y_E.repeat(tasks, 1),
            class_TN=self._to_device_no_sync(class_TN + turns_TN * self._apart),
        )

    def _augmented(self, x_MCHW: Tensor, first: int, tasks: int) -> Tensor:
        """Mirror or shift each image, or both, by random words that depend only on its task."""
        images, side = len(x_MCHW) // tasks, x_MCHW.shape[-1]
        purpose = f"{self.split} augment"
        words = np.stack(
            [random_words(self.seed, purpose, first + task, 3 * images) for task in range(tasks)]
        )
        flip_M, down_M, right_M = words.reshape(tasks * images, 3).T
        if "flips" in self._augment:
            mirrored_M = self._to_device_no_sync((flip_M & np.uint64(1)).astype(np.int64)).bool()
            x_MCHW = torch.where(mirrored_M[:, None, None, None], x_MCHW.flip(-1), x_MCHW)
        if "crops" in self._augment:
            most = max(side // SHIFT, 1)
            places = np.uint64(2 * most + 1)
            from_M2 = np.stack([down_M % places, right_M % places], axis=-1).astype(np.int64)
            down, right = self._to_device_no_sync(from_M2).unbind(-1)
            reach = torch.arange(side, device=self.device)
            image = torch.arange(len(x_MCHW), device=self.device)[:, None, None]
            padded_MHWC = functional.pad(x_MCHW, (most,) * 4).permute(0, 2, 3, 1)
            moved_MHWC = padded_MHWC[
                image, (down[:, None] + reach)[:, :, None], (right[:, None] + reach)[:, None]
            ]
            x_MCHW = moved_MHWC.permute(0, 3, 1, 2)
        return x_MCHW

    def _draw(self, first: int, tasks: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Positions of classes in the split _TN, of examples in their class _TNE, and quarter turns _TN."""
        pool, ways, most = self.pool, self.ways, int(self._counts.max())
        # Classes come before turns, and turns before examples: tasks of two streams that differ only in ways
        # share their first classes, and tasks of two that differ only in queries share the support set.
        words = pool + ways + ways * most
        raw = np.stack([random_words(self.seed, self.split, first + task, words) for task in range(tasks)])
        class_TN = k_smallest(raw[:, :pool], ways)
        turns_TN = np.zeros_like(class_TN)
        if self._turns_as_classes > 1:
            turns_TN, class_TN = np.divmod(class_TN, len(self._counts))
        elif self._turns:
            turns_TN = (raw[:, pool : pool + ways] & np.uint64(TURNS - 1)).astype(np.int64)
        keys_TNM = raw[:, pool + ways :].reshape(tasks, ways, most)
        # Smaller classes do not use their last keys: the largest key is never among the smallest.
        keys_TNM[np.arange(most) >= self._counts[class_TN][..., None]] = np.iinfo(np.uint64).max
        return class_TN, k_smallest(keys_TNM, self.shots + self.queries), turns_TN

    def _to_device_no_sync(self, array: NDArray[np.int64]) -> Tensor:
        return to_device_no_sync(torch.from_numpy(array), self.device)
