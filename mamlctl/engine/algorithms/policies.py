"""How algorithms learn policies: the records for data sets with rewards, and why others have none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from mamlctl.core.problems import Problem
from mamlctl.data.worlds import WORLDS
from mamlctl.engine.algorithms.algorithm import (
    NO_STEPS,
    NOTHING_ADAPTED,
    NOTHING_TRAINED,
    OWN_RATES,
    Algorithm,
    adam_optimizer,
    inner_rule,
    refusals,
    sgd_optimizer,
)
from mamlctl.settings.schema import TrainConfig, improvements_without_meaning

if TYPE_CHECKING:
    from torch import Tensor

    from mamlctl.engine.algorithms.meta_gradient import Outer
    from mamlctl.engine.evaluation.prediction import Predict
    from mamlctl.engine.optimizers import Optimizer
    from mamlctl.engine.reinforcement.policy_gradient import Sampling


def sampling(config: TrainConfig, *, sees_goal: bool = False) -> Sampling:
    """How the policies of a run collect trajectories."""
    from mamlctl.engine.reinforcement.policy_gradient import Sampling

    assert config.discount is not None and config.gae is not None
    return Sampling(WORLDS[config.dataset], config.discount, config.gae, sees_goal)


def _search(config: TrainConfig, *, sees_goal: bool = False) -> Outer:
    from mamlctl.engine.algorithms.policy_search import PolicySearch

    assert (config.outer == "trpo") == (config.max_kl is not None)
    return PolicySearch(sampling(config, sees_goal=sees_goal), config.max_kl)


def _reptile(config: TrainConfig) -> Outer:
    from mamlctl.engine.algorithms.policy_search import reptile_of_policies

    assert config.inner_optimizer is not None
    return partial(reptile_of_policies, sampling=sampling(config), inner_optimizer=config.inner_optimizer)


def _no_training(config: TrainConfig) -> Outer:
    from mamlctl.engine.algorithms.policy_search import untrained_policies

    return partial(untrained_policies, sampling=sampling(config))


def _returns(config: TrainConfig, *, sees_goal: bool = False) -> Predict:
    from mamlctl.engine.algorithms.policy_search import returns_of_policies

    return partial(
        returns_of_policies, sampling=sampling(config, sees_goal=sees_goal), rule=inner_rule(config)
    )


def _outer_step(learnable: Mapping[str, Tensor], config: TrainConfig) -> Optimizer:
    from mamlctl.engine.optimizers import WholeSteps

    return WholeSteps(learnable) if config.outer == "trpo" else adam_optimizer(learnable, config)


UNUSED = refusals("the derivatives of policies are computed in one way", "engine") | refusals(
    "trajectories of a meta-batch are not divided", "task_chunk"
)
OF_UNROLLED = (*improvements_without_meaning("no unrolled loop"), "first_order")
OF_OUTER = ("outer", "max_kl")
OF_ADAM = ("adam_beta1", "adam_beta2")
OF_GRADIENTS = (*OF_ADAM, "clip_value", "clip_norm")
NO_LOOP = UNUSED | refusals("there is no inner loop in training", "train_shots", *OF_UNROLLED)


MAML = Algorithm(
    "",  # its entry in the registry has one
    _search,
    optimizer=_outer_step,
    predictor=_returns,
    in_one_pass=True,
    unrolls=True,
    unsupported=UNUSED,
)
FOMAML = replace(MAML, defaults={"first_order": True}, forced={"first_order": True})
MAML_PLUS_PLUS = replace(
    MAML,
    improves="maml",
    defaults={"inner_steps": 3, "msl": True, "da": True, "lslr": True, "ca": True},
)
META_SGD = replace(MAML, inner_rates="weight", unsupported=UNUSED | OWN_RATES)
REPTILE = replace(
    MAML,
    outer=_reptile,
    optimizer=sgd_optimizer,
    unrolls=False,
    defaults={"inner_optimizer": "sgd", "inner_steps": 3, "meta_lr": 1.0, "meta_lr_final": 0.0},
    exclusive_settings=("inner_optimizer",),
    unsupported=UNUSED
    | refusals("its outer step is an interpolation", *OF_OUTER, *OF_ADAM)
    | refusals("its meta-gradient does not depend on the query loss", *OF_UNROLLED),
)
TRANSFER = replace(
    MAML,
    unrolls=False,
    start="pre-trained",
    defaults={"inner_steps": 0},
    forced={"inner_steps": 0},
    unsupported=NO_LOOP,
)
SCRATCH = replace(
    MAML,
    outer=_no_training,
    optimizer=adam_optimizer,
    unrolls=False,
    start="random start",
    defaults={"inner_steps": 0, "epochs": 1, "steps_per_epoch": 1},
    forced={"inner_steps": 0, "epochs": 1, "steps_per_epoch": 1},
    unsupported=NO_LOOP | NOTHING_TRAINED | refusals("nothing is trained", *OF_OUTER, *OF_GRADIENTS),
)
ORACLE = replace(
    MAML,
    summary="a policy that sees the goal: the bound for algorithms that must find it (Finn et al. 2017)",
    needs_rewards=True,
    on_curves=None,
    sees_goal=True,
    outer=partial(_search, sees_goal=True),
    predictor=partial(_returns, sees_goal=True),
    unrolls=False,
    start="pre-trained",
    defaults=NO_STEPS,
    forced=NO_STEPS,
    unsupported=NO_LOOP | NOTHING_ADAPTED,
)

# Why the other algorithms learn no policies, and the hint of the error.
CLASSES: Problem = ("needs classes", "use --algo maml")
ADAPTS_HEAD: Problem = (
    "adapts its head on stored features, and every trajectory has new states",
    "use --algo maml --adapts head",
)
ADAPTS_BODY: Problem = ("is --algo maml with another --adapts there", "use --algo maml --adapts body")
NO_MINIMUM: Problem = (
    "needs a minimum of the support loss, and new trajectories have another one",
    "use --algo maml",
)
NO_GRADIENT: Problem = (
    "compares the gradients of successive meta-steps, and steps inside a trust region are none",
    "use --algo maml",
)
