"""`eval --support`: the user's own images told apart by a run that was adapted to their classes."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mamlctl.core.errors import DataError, SettingsError
from mamlctl.core.events import Notice, OnEvent, Progress
from mamlctl.core.files import replacing
from mamlctl.core.results import ClassifiedImage, ClassifyResult
from mamlctl.data.tasks.user_images import Query, find_queries
from mamlctl.engine.derivatives.selection import tasks_per_pass
from mamlctl.engine.nets.batch_norm import Statistics
from mamlctl.experiments.image_classifier import ImageClassifier, adapt_classifier, save_adapted
from mamlctl.report.figures import contact_sheet
from mamlctl.report.figures.style import save
from mamlctl.settings.schema import EvalConfig

MOST_AT_ONCE = 2**28  # numbers of the largest tensor with --bn transductive: 1 GiB, and several are alive


@dataclass(frozen=True)
class ClassifyRequest:
    """What to learn from, what to tell apart, what to write."""

    support: Path
    queries: Sequence[Path] = ()
    plot: bool = False
    csv: Path | None = None
    save_adapted: Path | None = None


def classify_images(
    path: Path, settings: EvalConfig, wanted: ClassifyRequest, *, on_event: OnEvent
) -> ClassifyResult:
    """Adapt a run's best checkpoint to class folders and tell images apart.

    Raises what `adapt_classifier` does, DataError for queries that are not there or cannot be read.
    """
    started = time.monotonic()
    for switch, target in (("--csv", wanted.csv), ("--save-adapted", wanted.save_adapted)):
        if target is not None and target.is_dir():
            raise SettingsError([(f"{switch} is {target}, which is a folder", "name a file")])
    to_save = wanted.save_adapted is not None
    model = adapt_classifier(path, settings, wanted.support, to_save=to_save, on_event=on_event)
    queries, twice = find_queries(wanted.queries, model.support.classes)
    if twice:
        on_event(Notice(f"query files named twice, which count once: {twice}"))
    told = _tell_apart(model, queries, on_event)
    pictures = _draw(model, told) if wanted.plot else ()
    if wanted.csv is not None:
        _write_csv(wanted.csv, told.images)
    if wanted.save_adapted is not None:
        save_adapted(wanted.save_adapted, model, on_event)
    return ClassifyResult(
        run=str(path),
        algo=model.config.algo,
        model=model.name,
        classes=model.support.classes,
        shots=model.support.counts,
        head=model.head,
        inner_steps=model.inner_steps,
        bn=model.bn,
        images=tuple(told.images),
        left_out=len(model.support.unreadable),
        seconds=time.monotonic() - started,
        pictures=pictures,
        csv=None if wanted.csv is None else str(wanted.csv),
        saved=None if wanted.save_adapted is None else str(wanted.save_adapted),
    )


@dataclass
class Predictions:
    """What came out, and the pictures of the first ones."""

    images: list[ClassifiedImage] = field(default_factory=list)
    shown: list[contact_sheet.QueryPicture] = field(default_factory=list)
    copies: int = 0  # images of the support set


def _tell_apart(model: ImageClassifier, queries: Sequence[Query], on_event: OnEvent) -> Predictions:
    """Every query, a few at a time, so that memory does not grow with their number."""
    net, told = model.fitted.derivatives.net, Predictions()
    chunk = tasks_per_pass(net, 1, model.device)
    if model.bn == Statistics.OWN.value:
        chunk = max(len(queries), 1)  # their statistics are those of all of them
        if chunk * net.largest > MOST_AT_ONCE:
            fact = f"--bn transductive takes all {chunk} images at once, which are too many"
            raise SettingsError([(fact, "use --bn support, which takes them one by one")])
    for first in range(0, len(queries), chunk):
        _tell_part(model, queries[first : first + chunk], told)
        on_event(Progress("predicting", len(told.images), len(queries)))
    if queries and all(image.predicted is None for image in told.images):
        fact = f"none of the {len(queries)} query images can be read: {told.images[0].problem}"
        raise DataError(fact, hint="name images that Pillow can open")
    if told.copies:
        fact = "query images that are in the support set too, which flatters any accuracy"
        on_event(Notice(f"{fact}: {told.copies}"))
    return told


def _tell_part(model: ImageClassifier, queries: Sequence[Query], told: Predictions) -> None:
    """Add what comes out for some queries."""
    read, pixels, known = [], [], set(model.support.digests)
    for query in queries:
        try:
            image_CHW, digest = model.read(query.path)
        except DataError as error:
            told.images.append(ClassifiedImage(str(query.path), label=query.label, problem=error.message))
            continue
        told.copies += digest in known
        # Its place now, so that the table keeps the order in which files were named.
        read.append(len(told.images))
        told.images.append(ClassifiedImage(str(query.path), label=query.label))
        pixels.append(image_CHW)
    if not read:
        return
    for place, image_CHW, p_N in zip(read, pixels, model.probabilities(np.stack(pixels)), strict=True):
        image, predicted = told.images[place], model.support.classes[int(p_N.argmax())]
        told.images[place] = ClassifiedImage(image.file, predicted, tuple(p_N.tolist()), image.label)
        if len(told.shown) < contact_sheet.SHOWN:
            right = None if image.label is None else predicted == image.label
            told.shown.append(contact_sheet.QueryPicture(image_CHW, predicted, float(p_N.max()), right))


def _draw(model: ImageClassifier, told: Predictions) -> tuple[str, ...]:
    """The contact sheet in the run's folder plots/ -> the files."""
    images, y_E = model.support.x_ECHW, model.support.y_E
    support = [(name, images[y_E == label]) for label, name in enumerate(model.support.classes)]
    readable = sum(image.predicted is not None for image in told.images)
    figure = contact_sheet.sheet(support, told.shown, readable, f"{model.config.algo}, {model.run.path.name}")
    return tuple(map(str, save(figure, model.run.path / "plots" / "own-images")))


def _write_csv(path: Path, images: Sequence[ClassifiedImage]) -> None:
    """One line a file; a cell is empty where nobody knows."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file", "predicted", "probability", "label", "problem"])
    for image in images:
        probability = "" if image.probability is None else f"{image.probability:.6f}"
        writer.writerow([image.file, image.predicted, probability, image.label, image.problem])
    with replacing(path) as file:
        # A file's name may be no text; what its bytes were is kept.
        file.write(text.getvalue().encode(errors="surrogateescape"))
