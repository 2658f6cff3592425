"""Check and complete the settings that depend on the algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mamlctl.core.problems import Problem, flag, nearest
from mamlctl.core.user_code.references import names_tasks
from mamlctl.data.rules import REGRESSION_DEFAULTS
from mamlctl.data.sets.registry import has_rewards, is_regression, kind_of
from mamlctl.engine.algorithms.algorithm import Algorithm
from mamlctl.engine.algorithms.registry import ALGORITHMS, algorithm_of, definition
from mamlctl.settings.schema import FIELDS, TrainConfig

# Settings that have an effect only with the algorithms that list them.
OWNED = {name for entry in ALGORITHMS.values() for name in entry.exclusive_settings}

# Why the tasks of some meta-batches cannot be divided.
ONE_BATCH = "a meta-batch is one batch with shared batch-norm statistics"


def algorithm_problems(config: TrainConfig) -> list[Problem]:
    """Find settings that contradict the definition of the algorithm, or have no effect with it.

    Returns:
        The problems, as pairs of fact and hint; empty if there are none.
    """
    algo = f"--algo {config.algo}"
    if config.algo not in ALGORITHMS:
        hint = nearest(config.algo, ALGORITHMS, otherwise=f"use one of {', '.join(ALGORITHMS)}")
        return [(f"unknown algorithm '{config.algo}'", hint)]
    entry, problems = algorithm_of(config), list[Problem]()
    if has_rewards(config) and not isinstance(refusal := ALGORITHMS[config.algo].on_rewards, Algorithm):
        return [(f"{algo} learns no policies: it {refusal[0]}", refusal[1])]
    if entry.needs_rewards and not has_rewards(config):
        fact = f"{algo} needs rewards, but {config.dataset} {kind_of(config).predicate}"
        return [(fact, "use --dataset navigation, or another --algo")]
    if entry.on_curves is None and is_regression(config):
        fact = f"{algo} needs classes, but {config.dataset} {kind_of(config).predicate}"
        problems.append((fact, f"use {REGRESSION_DEFAULTS['algo']}"))
    if entry.training_head == "classes" and names_tasks(config.dataset) and not is_regression(config):
        fact = f"{algo} needs classes that tasks share, but {config.dataset} {kind_of(config).predicate}"
        problems.append((fact, "use another --algo"))
    for name, value in entry.forced.items():
        if getattr(config, name) != value:
            fact = f"{flag(name)} is {getattr(config, name)}, but {algo} requires {value}"
            only_training = name == "inner_steps" and "eval_inner_steps" not in entry.forced
            problems.append((fact, "use --eval-inner-steps" if only_training else "use another --algo"))
    for name, why in entry.unsupported.items():
        if getattr(config, name) != _unset(entry, name):
            problems.append((f"{flag(name)} has no effect with {algo}: {why}", "leave it out"))
    learners = _algorithms_for(rewards=has_rewards(config))
    for name in sorted(OWNED - set(entry.exclusive_settings)):
        if getattr(config, name) is not None:
            owners = [owner for owner, other in learners.items() if name in other.exclusive_settings]
            hint = f"leave it out, or use --algo {' or '.join(owners)}" if owners else "leave it out"
            problems.append((f"{flag(name)} has no effect with {algo}", hint))
    for name in entry.exclusive_settings:
        if getattr(config, name) is None and entry.defaults.get(name) is not None:
            problems.append((f"{algo} needs {flag(name)}", "leave it out to use the default"))
    if config.adapts not in entry.may_adapt:
        from_zero = "zeros" in (entry.classifier, entry.head_start)
        why = ": its head starts at zero, so the body gets no gradient" if from_zero else ""
        fact = f"--adapts {config.adapts} does nothing with {algo}{why}"
        problems.append((fact, f"use {' or '.join(entry.may_adapt)}"))
    if config.inner_steps == 0 and entry.forced.get("inner_steps") != 0:
        problems.append((f"--inner-steps is 0, but {config.algo} adapts in training", "use 1 or more"))
    if "engine" not in entry.unsupported and (problem := _compiled_problem(config, entry)):
        problems.append(problem)
    if config.cuda_graph and not entry.captured:
        problems.append((f"--cuda-graph is not available with {algo}", "leave it out"))
    if config.task_chunk != "auto" and entry.whole_batches and "task_chunk" not in entry.unsupported:
        problems.append((f"--task-chunk has no effect with {algo}: {ONE_BATCH}", "leave it out"))
    return problems


def sharing_problems(config: TrainConfig, processes: int) -> list[Problem]:
    """Find out why several processes cannot share the tasks of a meta-batch.

    Args:
        config: the settings.
        processes: their number.

    Returns:
        The problems, as pairs of fact and hint; empty if there are none.
    """
    if processes == 1:
        return []
    hint, entry = "use one process", algorithm_of(config)
    if entry.whole_batches:
        why = entry.unsupported.get("task_chunk", ONE_BATCH)
        return [(f"{processes} processes cannot share the tasks of --algo {config.algo}: {why}", hint)]
    if config.body_epochs:
        fact = f"{processes} processes cannot share the tasks of --body-epochs: {ONE_BATCH}"
        return [(fact, f"{hint}, or leave it out")]
    return []


def _compiled_problem(config: TrainConfig, entry: Algorithm) -> Problem | None:
    """Why --engine compiled cannot be used; None if it can, or if the engine is another one."""
    compiled = is_regression(config) and "engine" in (entry.on_curves or {})
    if config.engine != "compiled":
        return None
    if compiled and config.loss not in (None, "mse"):
        fact = f"--engine compiled computes the mean squared error only, but --loss is {config.loss}"
        return fact, "use --engine adjoint"
    if compiled and config.net == "mlp":
        return None
    if compiled:
        return f"--engine compiled does not support --net {config.net}", "use --engine adjoint"
    needed = f"does not support --algo {config.algo}" if is_regression(config) else "is for curves"
    return f"--engine compiled {needed}", "use --engine adjoint"


def slower_because_of_loss(config: TrainConfig) -> str | None:
    """Why meta-gradients are not computed in C, if the loss is the only reason; None otherwise."""
    entry, in_c = ALGORITHMS[config.algo], replace(config, engine="compiled")
    if config.engine == "compiled" or _compiled_problem(replace(in_c, loss=None), entry):
        return None
    if _compiled_problem(in_c, entry) is None:
        return None
    return f"--loss {config.loss} uses torch operations, since the faster code in C is for mse only"


def needs_second_derivatives(config: TrainConfig) -> bool:
    """Whether the meta-gradient contains second derivatives of the loss."""
    entry = ALGORITHMS[config.algo]
    return entry.implicit or (entry.unrolls and not config.first_order)


def _algorithms_for(*, rewards: bool) -> dict[str, Algorithm]:
    """The algorithms that learn policies, or all that learn from examples, by name."""
    entries = {name: entry.on_rewards if rewards else entry for name, entry in ALGORITHMS.items()}
    return {name: entry for name, entry in entries.items() if isinstance(entry, Algorithm)}


def _unset(entry: Algorithm, name: str) -> Any:
    return entry.defaults.get(name, FIELDS[name].default)


def algorithm_forced(config: TrainConfig) -> dict[str, Any]:
    """Return the settings that can have only one value with this algorithm, and the value."""
    if config.algo not in ALGORITHMS:
        return {}
    entry = algorithm_of(config)
    unused = (OWNED - set(entry.exclusive_settings)) | entry.unsupported.keys()
    forced = {name: _unset(entry, name) for name in unused} | dict(entry.forced)
    return forced | ({"engine": FIELDS["engine"].default} if _compiled_problem(config, entry) else {})


def algorithm_defaults(config: TrainConfig) -> Mapping[str, Any]:
    """Return the defaults that --algo implies with the data set; empty for an unknown name."""
    if config.algo not in ALGORITHMS:
        return {}
    entry = algorithm_of(config)
    return {**entry.defaults, **((entry.on_curves or {}) if is_regression(config) else {})}


def settings_of_algorithm(name: str) -> set[str]:
    """Return the names of the settings that define an algorithm; empty for an unknown one."""
    if name not in ALGORITHMS:
        return set()
    entries = [definition(name, rewards=rewards) for rewards in (False, True)]
    return {part for entry in entries for part in (*entry.defaults, *entry.forced, *entry.exclusive_settings)}
