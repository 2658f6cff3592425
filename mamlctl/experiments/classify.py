"""Classification of the user's own images by a run that is adapted to their classes (`eval --support`)."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mamlctl.core.errors import DataError, SettingsError
from mamlctl.core.events import Notice, OnEvent, Progress
from mamlctl.core.files import write_text
from mamlctl.core.formatting import csv_cell
from mamlctl.core.results import ClassifiedImage, ClassifyResult
from mamlctl.data.tasks.user_images import Query, find_queries
from mamlctl.engine.derivatives.selection import tasks_per_pass
from mamlctl.engine.nets.batch_norm import Statistics
from mamlctl.experiments.image_classifier import ImageClassifier, adapt_classifier, save_adapted
from mamlctl.report.figures import contact_sheet
from mamlctl.report.figures.style import save
from mamlctl.settings.evaluation import EvalConfig

# Limit for the elements of the largest tensor with --bn transductive: 1 GiB each, and several exist at once.
MOST_AT_ONCE = 2**28


@dataclass(frozen=True)
class ClassifyRequest:
    """The support folder, the images to classify, and the files to write."""

    support: Path
    queries: Sequence[Path] = ()
    plot: bool = False
    csv: Path | None = None
    save_adapted: Path | None = None
    export: Path | None = None


@dataclass
class Predictions:
    """The predictions for all query images, and pictures of the first ones."""

    images: list[ClassifiedImage] = field(default_factory=list)
    shown: list[contact_sheet.QueryPicture] = field(default_factory=list)
    copies: int = 0  # query images that are also in the support set


def classify_images(
    path: Path, settings: EvalConfig, request: ClassifyRequest, *, on_event: OnEvent
) -> ClassifyResult:
    """Adapt a run's best checkpoint to class folders and classify images.

    Args:
        path: the run folder.
        settings: the settings of the evaluation.
        request: the images and the files to write.
        on_event: receives progress and notices.

    Raises:
        SettingsError: the run does not support the settings or the request.
        DataError: images are missing or unreadable.
        MamlctlError: the run is damaged.
    """
    started = time.monotonic()
    for switch, target in (("--csv", request.csv), ("--save-adapted", request.save_adapted)):
        if target is not None and target.is_dir():
            raise SettingsError([(f"{switch} {target} is a folder", "use the name of a file")])
    to_save = request.save_adapted is not None
    model = adapt_classifier(path, settings, request.support, to_save=to_save, on_event=on_event)
    queries, repeated = find_queries(request.queries, model.support.classes)
    if repeated:
        on_event(Notice(f"query files that are given twice and count once: {repeated}"))
    predictions = _classify_all(model, queries, on_event)
    exported = None  # first, since nothing is written if it fails
    if request.export is not None:
        from mamlctl.experiments.export.models import export_classifier  # imports torch.export

        queries_CHW = [picture.image_CHW for picture in predictions.shown]
        exported = export_classifier(request.export, model, queries_CHW, on_event)
    pictures = _draw(model, predictions) if request.plot else ()
    if request.csv is not None:
        _write_csv(request.csv, predictions.images)
    if request.save_adapted is not None:
        save_adapted(request.save_adapted, model, on_event)
    return ClassifyResult(
        run=str(path),
        algo=model.config.algo,
        model=model.name,
        classes=model.support.classes,
        shots=model.support.counts,
        head=model.head,
        inner_steps=model.inner_steps,
        bn=model.bn,
        images=tuple(predictions.images),
        left_out=len(model.support.unreadable),
        seconds=time.monotonic() - started,
        pictures=pictures,
        csv=None if request.csv is None else str(request.csv),
        saved=None if request.save_adapted is None else str(request.save_adapted),
        exported=exported,
    )


def _classify_all(model: ImageClassifier, queries: Sequence[Query], on_event: OnEvent) -> Predictions:
    """Classify every query, in chunks, so that memory does not grow with their number."""
    net, predictions = model.adapted.derivatives.net, Predictions()
    images = predictions.images
    chunk = tasks_per_pass(net, 1, model.device)
    if model.bn == Statistics.OWN.value:
        chunk = max(len(queries), 1)  # normalised with the statistics of all of them
        most = MOST_AT_ONCE // net.largest
        if chunk > most:
            fact = f"--bn transductive takes all {chunk} images at once, but the limit is {most}"
            raise SettingsError([(fact, "use --bn support, which classifies each image on its own")])
    for first in range(0, len(queries), chunk):
        _classify_chunk(model, queries[first : first + chunk], predictions)
        on_event(Progress("predicting", len(images), len(queries)))
    if queries and all(image.predicted is None for image in images):
        fact = f"no query image can be read ({len(queries)} given): {images[0].problem}"
        raise DataError(fact, hint="use images of a supported format, such as PNG or JPEG")
    if predictions.copies:
        fact = "query images that are also in the support set, which flatters the accuracy"
        on_event(Notice(f"{fact}: {predictions.copies}"))
    return predictions


def _classify_chunk(model: ImageClassifier, queries: Sequence[Query], predictions: Predictions) -> None:
    """Add the predictions for some queries, in order; unreadable images get a `problem`."""
    images, places, pixels = predictions.images, [], []
    support_digests = set(model.support.digests)
    for query in queries:
        images.append(ClassifiedImage(str(query.path), label=query.label))
        try:
            image_CHW, digest = model.read(query.path)
        except DataError as error:
            images[-1] = replace(images[-1], problem=error.message)
            continue
        predictions.copies += digest in support_digests
        places.append(len(images) - 1)
        pixels.append(image_CHW)
    if not places:
        return
    for place, image_CHW, p_N in zip(places, pixels, model.probabilities(np.stack(pixels)), strict=True):
        image, predicted = images[place], model.support.classes[int(p_N.argmax())]
        images[place] = replace(image, predicted=predicted, probabilities=tuple(p_N.tolist()))
        if len(predictions.shown) < contact_sheet.SHOWN:
            right = None if image.label is None else predicted == image.label
            picture = contact_sheet.QueryPicture(image_CHW, predicted, float(p_N.max()), right)
            predictions.shown.append(picture)


def _draw(model: ImageClassifier, predictions: Predictions) -> tuple[str, ...]:
    """Draw the contact sheet in the run's folder plots/ and return the files."""
    images, y_E = model.support.x_ECHW, model.support.y_E
    support = [(name, images[y_E == label]) for label, name in enumerate(model.support.classes)]
    readable = sum(image.predicted is not None for image in predictions.images)
    title = f"{model.config.algo}, {model.run.path.name}"
    figure = contact_sheet.sheet(support, predictions.shown, readable, title)
    return tuple(map(str, save(figure, model.run.path / "plots" / "own-images")))


def _write_csv(path: Path, images: Sequence[ClassifiedImage]) -> None:
    """Write one line per file; unknown values are empty."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file", "predicted", "probability", "label", "problem"])
    for image in images:
        probability = "" if image.probability is None else f"{image.probability:.6f}"
        cells = (image.file, image.predicted, probability, image.label, image.problem)
        writer.writerow(map(csv_cell, cells))
    write_text(path, text.getvalue())
