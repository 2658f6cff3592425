"""Export of the models that `eval --support` adapts: classifiers of images, and networks for tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import mamlctl
from mamlctl.core.events import Notice, OnEvent, Waiting
from mamlctl.core.formatting import evenly_spaced
from mamlctl.core.literals import BatchNormMode
from mamlctl.core.results import ExportedModel
from mamlctl.data.reading.table_files import Floats
from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.devices import precision_of
from mamlctl.engine.evaluation.plain_module import plain_module
from mamlctl.engine.nets.base import Net, bn_mode
from mamlctl.engine.nets.batch_norm import Statistics
from mamlctl.engine.nets.module_net import ModuleNet
from mamlctl.experiments.export.formats import Check, Exportable, export
from mamlctl.experiments.export.predictors import ImagePredictor, TablePredictor
from mamlctl.experiments.image_classifier import ImageClassifier, preparation
from mamlctl.experiments.tables.table_model import TableModel
from mamlctl.run_folder import RunFolder
from mamlctl.settings.schema import TrainConfig

FORMAT = 1  # of the metadata
CHECKED = 256  # examples whose predictions are compared
# The largest relative difference of scores between the arithmetic of an evaluation and float32.
ROUNDING = {"float32": 1e-4, "float64": 1e-4, "tf32": 1e-2, "bf16": 5e-2}
FROZEN = "exported with the support set's statistics, as --bn support predicts"


def export_classifier(
    path: Path, model: ImageClassifier, queries: Sequence[NDArray[np.uint8]], on_event: OnEvent
) -> ExportedModel:
    """Export a classifier from uint8 images to probabilities.

    Args:
        path: the file.
        model: the adapted model.
        queries: images to check besides those of the support set.
        on_event: receives notices.

    Raises:
        SettingsError: the network cannot be exported, or predicts differently.
        DivergedError: a prediction is not finite.
    """
    on_event(Waiting("exporting"))
    if model.bn == Statistics.OWN.value:
        on_event(Notice(f"{FROZEN}: --bn transductive depends on all images of a batch"))
        fixed = replace(model.adapted, fixed=model.adapted.support)
        model = replace(model, config=replace(model.config, bn=Statistics.SUPPORT.value), adapted=fixed)
    prepared, net = preparation(model), model.adapted.derivatives.net
    settings = {name: prepared[name] for name in ("mean", "deviation")}
    predictor = ImagePredictor(plain_module(model.adapted), ink=prepared["ink"] or 0, **settings)
    x_MCHW = np.stack([*queries, *model.support.x_ECHW])
    x_MCHW = x_MCHW[[*evenly_spaced(len(x_MCHW), CHECKED)]]
    scores_MN = model.scores(x_MCHW).double()
    about = _about(model.run, model.config, model.name, model.bn) | prepared
    about["input"] = _tensor("images", "uint8", x_MCHW.shape[1:])
    about["output"] = _tensor("probabilities", "float32", scores_MN.shape[1:])
    check = Check(
        torch.from_numpy(x_MCHW),
        scores_MN.softmax(1).cpu().numpy(),
        np.ones(1),
        _allowed(model.config, model.device, float(scores_MN.abs().max())),
    )
    return _written(path, predictor, net, about, check)


def export_table(
    path: Path, model: TableModel, support: Episodes, x_MD: Floats, on_event: OnEvent
) -> ExportedModel:
    """Export a network from the inputs of a table to its targets, both in the units of the table.

    Args:
        path: the file.
        model: the trained model.
        support: the task to adapt to.
        x_MD: inputs to check.
        on_event: receives notices.

    Raises:
        SettingsError: the network cannot be exported, or predicts differently.
        DivergedError: a prediction is not finite.
    """
    on_event(Waiting("exporting"))
    net, values, bn = model.derivatives.net, model.values, bn_mode(model.derivatives.net, model.config.bn)
    if bn == Statistics.OWN.value:
        on_event(Notice(f"{FROZEN}: in this run each prediction depends on all rows of the query table"))
        bn = Statistics.SUPPORT.value
        model = replace(model, config=replace(model.config, bn=bn))
    x_MD = x_MD[[*evenly_spaced(len(x_MD), CHECKED)]]
    expected_MN = model.predictions(support, x_MD)
    first = len(values.inputs)
    mean_N, scale_N = np.array(values.mean[first:]), np.array(values.deviation[first:])
    about = _about(model.run, model.config, model.name, bn)
    about |= {"inputs": list(values.inputs), "targets": list(values.targets)}
    about |= {"mean": list(values.mean), "deviation": list(values.deviation)}
    about["input"] = _tensor("inputs", "float64", x_MD.shape[1:])
    about["output"] = _tensor("targets", "float64", expected_MN.shape[1:])
    largest = float(np.abs((expected_MN - mean_N) / scale_N).max())
    allowed = _allowed(model.config, model.device, largest)
    check = Check(torch.from_numpy(x_MD), expected_MN, scale_N, allowed)
    return _written(path, TablePredictor(plain_module(model.adapted(support)), values), net, about, check)


def _about(run: RunFolder, config: TrainConfig, name: str, bn: BatchNormMode) -> dict[str, Any]:
    """The part of the metadata that images and tables share."""
    return {
        "format": FORMAT,
        "mamlctl": mamlctl.__version__,
        "run": run.path.name,
        "run_digest": run.owner,
        "model": name,
        "algo": config.algo,
        "net": Path(config.net).name,  # of the user's file: without its folder
        "inner_steps": config.evaluation_inner_steps,
        "bn": bn,
    }


def _tensor(name: str, dtype: str, shape: Sequence[int]) -> dict[str, Any]:
    """An input or output; its first axis has any number of examples."""
    return {"name": name, "dtype": dtype, "shape": ["batch", *shape]}


def _allowed(config: TrainConfig, device: torch.device, largest: float) -> float:
    """The difference that rounding explains, for scores up to `largest`."""
    return ROUNDING[precision_of(config.precision, device)] * max(1.0, largest)


def _written(
    path: Path, module: nn.Module, net: Net, about: Mapping[str, Any], check: Check
) -> ExportedModel:
    names = about["input"]["name"], about["output"]["name"]
    code = net.code if isinstance(net, ModuleNet) else None
    difference = export(path, Exportable(module.eval(), names, about, code), check)
    return ExportedModel(str(path), len(check.inputs), difference)
