"""A trained run on a table, which adapts to the examples of a new task."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from mamlctl.core.errors import DivergedError
from mamlctl.core.events import OnEvent
from mamlctl.data.reading.table_files import Floats
from mamlctl.data.tasks.episodes import Episodes
from mamlctl.data.tasks.streams import own_task
from mamlctl.data.tasks.table_tasks import Standardisation
from mamlctl.engine.algorithms.algorithm import inner_rule
from mamlctl.engine.algorithms.registry import algorithm_of
from mamlctl.engine.derivatives.interface import Derivatives
from mamlctl.engine.derivatives.selection import select_derivatives
from mamlctl.engine.devices import tensor_dtype
from mamlctl.engine.evaluation.adapted_model import AdaptedModel, adapt_to_support_set
from mamlctl.engine.evaluation.measured_loop import TaskSets
from mamlctl.engine.evaluation.prediction import PredictRequest
from mamlctl.engine.inner_loop import MetaState
from mamlctl.engine.nets.batch_norm import Statistics
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.run_code import code_of_run
from mamlctl.experiments.evaluation_settings import evaluation_setup
from mamlctl.experiments.tables.plots import in_units
from mamlctl.experiments.tables.stored import stored_facts
from mamlctl.experiments.trained_model import checkpoint_files, load_states
from mamlctl.run_folder import RunFolder
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.schema import TrainConfig

CHUNK = 2**16  # rows that are predicted at once


@dataclass(frozen=True)
class TableModel:
    """The best checkpoint of a run on a table."""

    run: RunFolder
    config: TrainConfig  # with all derived values, and those that the evaluation replaces
    values: Standardisation
    device: torch.device
    derivatives: Derivatives
    state: MetaState  # frozen
    name: str

    def task(self, support: tuple[Floats, Floats]) -> Episodes:
        """The support set, inputs and targets in the units of the table, as a task without queries."""
        dtype = tensor_dtype(self.config.precision)
        scaled = torch.from_numpy(self.values.apply(np.concatenate(support, axis=1))).to(self.device, dtype)
        parts = torch.tensor_split(scaled, [len(self.values.inputs)], dim=1)
        return own_task(self.config, *(part.contiguous() for part in parts))

    def with_queries(self, support: Episodes, x_MD: Floats, y_MN: Floats) -> Episodes:
        """Return a task with a query set.

        Args:
            support: the task.
            x_MD: the inputs of its queries, in the units of the table.
            y_MN: their targets.
        """
        like, width = support.support_x_TECHW, len(self.values.inputs)
        scaled = torch.from_numpy(self.values.apply(np.concatenate([x_MD, y_MN], axis=1))).to(like)
        query_x_1MD, query_y_1MN = scaled[None, :, :width].contiguous(), scaled[None, :, width:]
        return replace(support, query_x_TECHW=query_x_1MD, query_y_TE=query_y_1MN)

    @torch.no_grad()
    def outputs(self, episodes: Episodes, per_step: bool) -> torch.Tensor:
        """Adapt to tasks and predict their queries -> outputs_ITEN."""
        predict, sets = algorithm_of(self.config).predict(self.config), TaskSets(self.derivatives, episodes)
        steps, statistics = self.config.evaluation_inner_steps, Statistics(self.config.bn)
        return predict(PredictRequest(sets, self.state, steps, statistics, per_step))

    def predictions(self, support: Episodes, x_MD: Floats) -> Floats:
        """Predict the targets of inputs, in the units of the table and in chunks, which limits memory.

        Raises DivergedError if one is not finite.
        """
        parts = [np.empty((0, len(self.values.targets)))]
        for first in range(0, len(x_MD), CHUNK):
            chunk_MD = x_MD[first : first + CHUNK]
            unknown_MN = np.zeros((len(chunk_MD), len(self.values.targets)))
            outputs_ITEN = self.outputs(self.with_queries(support, chunk_MD, unknown_MN), False)
            parts.append(in_units(self.values, outputs_ITEN[-1]))
        predicted_MN = np.concatenate(parts)
        if not np.isfinite(predicted_MN).all():
            hint = "use fewer --inner-steps, a lower --inner-lr, or another run"
            raise DivergedError("the adapted model's predictions are not finite", hint=hint)
        return predicted_MN

    def adapted(self, support: Episodes) -> AdaptedModel:
        """The network after its inner steps on the support set."""
        return adapt_to_support_set(
            self.derivatives,
            self.state,
            support,
            inner_steps=self.config.evaluation_inner_steps,
            statistics=Statistics(self.config.bn),
            classifier=algorithm_of(self.config).classifier,
            rule=inner_rule(self.config),
        )


def open_table_model(run: RunFolder, settings: EvalConfig, on_event: OnEvent) -> TableModel:
    """Load the best checkpoint of a run; its training data are not needed.

    Args:
        run: the run.
        settings: the settings of the evaluation.
        on_event: receives notices.
    """
    values = stored_facts(run).standardisation
    config, device, _ = evaluation_setup(run, settings, on_event)
    shape, settings = (len(values.inputs),), replace(settings, models="best")
    files, _ = checkpoint_files(run, settings.checkpoint, on_event)
    code = code_of_run(run)
    states, epochs, _ = load_states(run, files, settings, shape, device, on_event, code=code)
    net, _ = build(config, shape, torch.device("meta"), targets=len(values.targets), parts=code.parts)
    derivatives = select_derivatives(net, states[0].example_tensor, config.engine)
    name = f"best, epoch {epochs[0]}" if epochs else "last"
    return TableModel(run, config, values, device, derivatives, states[0].frozen(), name)
