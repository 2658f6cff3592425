"""A trained run adapted to the user's own classes, for predictions and for saving."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mamlctl.core.errors import DivergedError, SettingsError
from mamlctl.core.events import Notice, OnEvent, Waiting
from mamlctl.core.literals import BatchNormMode
from mamlctl.core.user_code.references import names_tasks
from mamlctl.data.reading.image_files import FILTERS
from mamlctl.data.sets.folder_layout import contain_only_folders
from mamlctl.data.sets.registry import has_classes, kind_of
from mamlctl.data.tasks.image_tasks import IMAGENET_DEVIATION, IMAGENET_MEAN, PixelValues
from mamlctl.data.tasks.streams import own_task
from mamlctl.data.tasks.user_images import Reader, SupportImages, read_support
from mamlctl.engine.algorithms.algorithm import inner_rule
from mamlctl.engine.algorithms.registry import ALGORITHMS, algorithm_of
from mamlctl.engine.derivatives.selection import select_derivatives
from mamlctl.engine.devices import tensor_dtype
from mamlctl.engine.evaluation.adapted_model import (
    AdaptedModel,
    adapt_to_support_set,
    head_words,
    plain_weights,
    resize_head,
)
from mamlctl.engine.evaluation.plain_module import norms_without_statistics
from mamlctl.engine.nets.base import bn_mode
from mamlctl.engine.nets.batch_norm import Statistics
from mamlctl.engine.nets.module_net import ModuleNet
from mamlctl.engine.training.checkpoints import save_tensors
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.run_code import code_of_run
from mamlctl.experiments.environment import kernels_announced
from mamlctl.experiments.evaluation_settings import evaluation_setup
from mamlctl.experiments.trained_model import checkpoint_files, load_states
from mamlctl.run_folder import RunFolder, open_run
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.schema import TrainConfig

FORMAT = 1  # of the file written by `save_adapted`
PLAIN = 0.2  # mean brightness further than this from 0.5 shows whether the paper is white or black


@dataclass(frozen=True)
class ImageClassifier:
    """A run's best checkpoint, adapted to the user's own classes."""

    run: RunFolder
    config: TrainConfig  # with all derived values, and those that the evaluation replaces
    name: str
    support: SupportImages
    read: Reader
    device: torch.device
    adapted: AdaptedModel
    head: str  # how classes are predicted, for people

    @property
    def bn(self) -> BatchNormMode:
        """The batch-norm mode; "none" without batch norm."""
        return bn_mode(self.adapted.derivatives.net, self.config.bn)

    @property
    def inner_steps(self) -> int:
        """Inner steps on the support set."""
        return self.config.evaluation_inner_steps

    def scores(self, x_MCHW: NDArray[np.uint8]) -> torch.Tensor:
        """The score of every class (_MN). Raises DivergedError if one is not finite."""
        scores_MN = self.adapted.scores(_network_input(self.config, x_MCHW, self.device))
        if not bool(scores_MN.isfinite().all()):
            hint = "use fewer --inner-steps, a lower --inner-lr, or another run"
            raise DivergedError("the adapted model's predictions are not finite", hint=hint)
        return scores_MN

    def probabilities(self, x_MCHW: NDArray[np.uint8]) -> NDArray[np.float64]:
        """The probability of every class (_MN). Raises DivergedError as `scores` does."""
        probability_MN: NDArray[np.float64] = self.scores(x_MCHW).double().softmax(1).cpu().numpy()
        return probability_MN


def adapt_classifier(
    path: Path, settings: EvalConfig, support_path: Path, *, to_save: bool, on_event: OnEvent
) -> ImageClassifier:
    """Adapt a run's best checkpoint to class folders; its training data are not needed.

    Args:
        path: the run folder.
        settings: the settings of the evaluation.
        support_path: a folder with one subfolder of images per class.
        to_save: whether `save_adapted` will be called, which not every algorithm supports.
        on_event: receives notices.

    Raises:
        SettingsError: the run does not support the settings.
        DataError: images are missing or unreadable.
        MamlctlError: the run is damaged.
    """
    run = open_run(path)
    if not has_classes(run.config):
        trained = f"{run.config.dataset}, which {kind_of(run.config).predicate}"
        fact = f"--support contains images, but the run was trained on {trained}"
        raise SettingsError([(fact, "use a run that was trained on images")])
    if names_tasks(run.config.dataset):
        fact = f"--support contains images, but the run was trained on the tasks of {run.config.dataset}"
        raise SettingsError([(fact, "use a run that was trained on images")])
    if settings.bn is None and run.config.bn == Statistics.OWN.value:
        # Papers report transductive accuracy, but the prediction for one image should not depend on others.
        settings = replace(settings, bn=Statistics.SUPPORT.value)
    code = code_of_run(run)
    config, device, _ = evaluation_setup(run, settings, on_event)
    entry, shape = algorithm_of(config), _example_shape(config)
    if to_save and entry.classifier == "neighbours":
        fact = f"--save-adapted writes layers, but --algo {config.algo} compares with the support images"
        others = [name for name, other in ALGORITHMS.items() if other.classifier == "prototypes"]
        raise SettingsError([(fact, f"leave it out, or use a run with --algo {' or '.join(others)}")])
    (best, *_), _ = checkpoint_files(run, settings.checkpoint, on_event)
    (learnt,), epochs, _ = load_states(run, [best], settings, shape, device, on_event, code=code)
    read = Reader(shape[-1], shape[0], config.resize if config.resize in FILTERS else "bilinear")
    on_event(Waiting("reading support images"))
    support = read_support(support_path, read)
    if contain_only_folders(support_path / name for name in support.classes):
        groups = f"the {len(support.classes)} top folders of {support_path}"
        on_event(Notice(f"the classes are {groups}, each with the images of all its folders"))
    _notice_support(run, support, on_event)
    ways = len(support.classes)
    head = head_words(entry.classifier, config.ways, learnt, ways)
    state = resize_head(learnt, ways, entry.classifier)
    net, _ = build(replace(config, ways=ways), shape, torch.device("meta"), parts=code.parts)
    with kernels_announced(device, on_event):
        derivatives = select_derivatives(net, state.example_tensor, config.engine)
    on_event(Waiting("adapting"))
    x_ECHW, y_E = _network_input(config, support.x_ECHW, device), torch.from_numpy(support.y_E).to(device)
    adapted = adapt_to_support_set(
        derivatives,
        state,
        own_task(config, x_ECHW, y_E),
        inner_steps=config.evaluation_inner_steps,
        statistics=Statistics(config.bn),
        classifier=entry.classifier,
        rule=inner_rule(config),
    )
    name = f"best, epoch {epochs[0]}" if epochs else "last"
    return ImageClassifier(run, config, name, support, read, device, adapted, head)


def _example_shape(config: TrainConfig) -> tuple[int, int, int]:
    """C, H, W of the run's images."""
    assert config.channels is not None and config.image_size is not None  # `fill_defaults` set them
    return config.channels, config.image_size, config.image_size


def _notice_support(run: RunFolder, support: SupportImages, on_event: OnEvent) -> None:
    for problem in support.unreadable:
        on_event(Notice(f"left out: {problem}"))
    if copies := len(support.digests) - len(set(support.digests)):
        on_event(Notice(f"support files that are copies of others and count too: {copies}"))
    # Runs without a recorded brightness were trained on dark ink on white paper.
    trained = float(run.environment().get("brightness") or 0.9)
    brightness = float(support.x_ECHW.mean() / 255)
    plain = min(abs(trained - 0.5), abs(brightness - 0.5)) > PLAIN
    if plain and (brightness - 0.5) * (trained - 0.5) < 0:
        trained_on = "dark on white" if trained > 0.5 else "bright on black"
        fact = f"mean brightness {brightness:.2f}, but {run.config.dataset} has {trained:.2f}"
        hint = f"the run was trained on images {trained_on}, so invert yours"
        on_event(Notice(f"support images have {fact}: {hint}"))


def _network_input(config: TrainConfig, x_MCHW: NDArray[np.uint8], device: torch.device) -> torch.Tensor:
    """Images as the network's input."""
    values = PixelValues(
        ink=int(config.ink or 0),
        normalize=config.normalize or "none",
        channels=x_MCHW.shape[1],
        device=device,
        dtype=tensor_dtype(config.precision),
    )
    return values(torch.from_numpy(x_MCHW).to(device))


def save_adapted(path: Path, model: ImageClassifier, on_event: OnEvent) -> None:
    """Write the weights for torch's own layers, and everything else that predictions without mamlctl need.

    Args:
        path: the file to write, for torch.load.
        model: the adapted model.
        on_event: receives notices.
    """
    if model.bn == Statistics.OWN.value:
        on_event(Notice("saved with the support set's statistics: --bn transductive has none to save"))
    net = model.adapted.derivatives.net
    layers = norms_without_statistics(net.original(0)) if isinstance(net, ModuleNet) else {}
    if layers:
        fact = (
            f"saved without the statistics of {', '.join(layers)}, since track_running_stats is False there"
        )
        on_event(Notice(f"{fact}: these layers will use those of each batch, unlike a file of --export"))
    config = model.config
    names = ("algo", "net", "filters", "hidden", "pooling", "readout", "activation")
    content = {
        "format": FORMAT,
        **preparation(model),
        "settings": {name: getattr(config, name) for name in names},
        "weights": plain_weights(model.adapted),
    }
    save_tensors(path, content)


def preparation(model: ImageClassifier) -> dict[str, Any]:
    """The classes, and how an image becomes the network's input, for files that are used without mamlctl."""
    config, read = model.config, model.read
    colours = config.normalize == "imagenet"
    return {
        "classes": list(model.support.classes),
        "channels": read.channels,
        "side": read.side,
        "resize": read.resize,
        # input = (x - mean) / deviation, where x is value / 255, or 1 - value / 255 if ink is 1
        "ink": config.ink,
        "mean": list(IMAGENET_MEAN) if colours else [0.0],
        "deviation": list(IMAGENET_DEVIATION) if colours else [1.0],
    }
