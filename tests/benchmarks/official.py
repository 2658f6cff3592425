"""Antoniou's published code, imported from a checkout; none of it is copied here.

Only MAMLFewShotClassifier of AntreasAntoniou/HowToTrainYourMAMLPytorch is used, with this benchmark's tasks.
With equal weights, its meta-gradients differ from those of the plain engine by at most 1.2e-6 in both orders
(float32, commit 8696470, 5 ways, 1 shot, 2 tasks, 8 filters). In a benchmark it uses its own initial weights.
"""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cases import INNER_LR, Case
from mamlctl.data.tasks.episodes import Episodes


def arguments(case: Case) -> Namespace:
    """Return the settings of the published configurations (experiment_config/*maml++*.json) for the case."""
    channels, height, width = case.image
    return Namespace(
        batch_size=case.tasks,
        image_channels=channels,
        image_height=height,
        image_width=width,
        num_classes_per_set=case.ways,
        num_samples_per_class=case.shots,
        num_target_samples=case.queries,
        cnn_num_filters=case.filters,
        number_of_training_steps_per_iter=case.inner_steps,
        number_of_evaluation_steps_per_iter=case.inner_steps,
        second_order=not case.first_order,
        first_order_to_second_order_epoch=-1,
        use_multi_step_loss_optimization=True,
        multi_step_loss_num_epochs=10,
        learnable_per_layer_per_step_inner_loop_learning_rate=True,
        per_step_bn_statistics=True,
        learnable_bn_gamma=True,
        learnable_bn_beta=True,
        enable_inner_loop_optimizable_bn_params=False,
        norm_layer="batch_norm",
        max_pooling=True,
        conv_padding=True,
        num_stages=4,
        task_learning_rate=INNER_LR,
        meta_learning_rate=0.001,
        min_learning_rate=0.00001,
        total_epochs=100,
        dataset_name=case.name,
        seed=0,
        use_cuda=torch.cuda.is_available(),
    )


class Official:
    """The published classifier with its own initial weights."""

    def __init__(self, folder: Path, case: Case, device: torch.device) -> None:
        sys.path.insert(0, str(folder))
        system = importlib.import_module("few_shot_learning_system")
        self.case = case
        self.classifier = system.MAMLFewShotClassifier((2, *case.image), device, arguments(case))

    def meta_step(self, episodes: Episodes) -> Tensor:
        """Run one training iteration, which copies the images to the device; return the meta-loss."""
        tasks, ways = self.case.tasks, self.case.ways
        support_x, support_y, query_x, query_y = (
            tensor.cpu().unflatten(1, (ways, -1)) for tensor in episodes.sets
        )
        assert len(support_x) == tasks
        losses, _ = self.classifier.run_train_iter((support_x, query_x, support_y, query_y), epoch=0)
        loss: Tensor = losses["loss"].detach()
        return loss
