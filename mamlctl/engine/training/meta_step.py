"""One meta-step: schedules, meta-gradient, clipping and the outer optimiser."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from mamlctl.core.errors import MamlctlError, is_out_of_memory
from mamlctl.core.formatting import plural, reported
from mamlctl.core.literals import Metric
from mamlctl.data.tasks.episodes import Episodes
from mamlctl.engine.algorithms.body_start import body_start
from mamlctl.engine.algorithms.compiled_mlp import CompiledAdam, available, compiled, compiled_steps
from mamlctl.engine.algorithms.meta_gradient import MetaStepRequest, MetaStepResult
from mamlctl.engine.algorithms.registry import algorithm_of
from mamlctl.engine.derivatives.selection import tasks_per_pass
from mamlctl.engine.distributed import StopVote
from mamlctl.engine.inner_loop import RATE, RUNNING, MetaState
from mamlctl.engine.nets.base import Net
from mamlctl.engine.nets.batch_norm import NormPass, accumulate, mean_passes
from mamlctl.engine.nets.mlp import Mlp
from mamlctl.engine.training.schedules import cosine_meta_lr, first_order_at, linear_meta_lr, msl_weights_at
from mamlctl.settings.schema import TrainConfig

Key = TypeVar("Key", int, str)


class MetaStep:
    """The body of the outer loop: from a meta-batch to the new slow weights."""

    def __init__(self, config: TrainConfig, net: Net, state: MetaState) -> None:
        """Choose algorithm and optimiser.

        Args:
            config: the settings of the run.
            net: the network.
            state: the tensors to train, in place; the learnable ones are set to require gradients.
        """
        self.config, self.net, self.state = config, net, state
        entry = algorithm_of(config)
        self.outer = entry.outer(config)
        self.body_start = partial(body_start, engine=config.engine)
        self.learnable = {name: tensor.requires_grad_() for name, tensor in state.learnable().items()}
        frozen = state.frozen_names
        self.running = {name: rows for name, rows in state.running.items() if RUNNING + name not in frozen}
        self.device = state.example_tensor.device
        self.optimizer = entry.optimizer(self.learnable, config)
        chunk = config.task_chunk
        # Tasks per pass; None until the first meta-batch shows the size of its sets.
        self.chunk = None if chunk == "auto" else min(int(chunk), config.meta_batch_size)
        self.whole = entry.whole_batches or entry.in_one_pass
        if self.whole:
            self.chunk = config.meta_batch_size
        self.vote: StopVote | None = None  # of several ranks, which exchange it with their results

    def schedule(self, epoch: int, done: float = 0.0) -> tuple[tuple[float, ...], bool, float]:
        """Evaluate the schedules.

        Args:
            epoch: counted from 0.
            done: the finished fraction of all meta-steps, 0..1, for a rate that changes within an epoch.

        Returns:
            The MSL weights, whether the derivatives are first order, and the meta learning rate.
        """
        config = self.config
        meta_lr = config.meta_lr
        if config.ca:
            meta_lr = cosine_meta_lr(epoch, config.epochs, meta_lr, config.min_meta_lr or 0.0)
        elif config.meta_lr_final is not None:
            meta_lr = linear_meta_lr(done, meta_lr, config.meta_lr_final)
        return msl_weights_at(config, epoch), first_order_at(config, epoch), meta_lr

    def measure(self, episodes: Episodes, epoch: int, *, measure_all: bool) -> MetaStepResult:
        """Compute losses and clipped meta-gradients without changing any weight.

        Args:
            episodes: the meta-batch.
            epoch: counted from 0.
            measure_all: also measure the query losses that do not enter the meta-loss.

        Raises:
            MamlctlError: the memory is too small, even for one task per pass.
        """
        weights, first_order, _ = self.schedule(epoch)
        body_only = self.config.trains_body_only(epoch)
        request = MetaStepRequest(
            self.config.inner_steps, weights, first_order, measure_all, body_only, self._mean
        )
        if self.chunk is None:
            examples = max(episodes.support_x_TECHW.shape[1], episodes.query_x_TECHW.shape[1])
            self.chunk = min(len(episodes.query_y_TE), tasks_per_pass(self.net, examples, self.device))
        while True:
            try:
                measured = self._of_own_tasks(episodes, request)
                break
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                whole = self.whole or body_only
                if self.config.task_chunk != "auto" or self.chunk == 1 or whole:
                    if whole:
                        hint = "use a smaller --meta-batch-size"
                    elif self.chunk == 1:
                        hint = "use a smaller network, or fewer ways, shots or queries"
                    else:
                        hint = "use --task-chunk auto"
                    tasks = f"{self.chunk} {plural(self.chunk, 'task')}"
                    message = f"{self.device} does not have enough memory for {tasks} per pass"
                    raise MamlctlError(message, hint=hint) from error
                self.chunk = (self.chunk + 1) // 2
            # Outside the handler, whose traceback keeps the tensors of the failed pass alive.
            torch.cuda.empty_cache()
        return self._of_all_tasks(measured)

    def measure_as(self, episodes: Episodes, request: MetaStepRequest) -> MetaStepResult:
        """Compute the same for given values of the schedules, without a retry if memory runs out."""
        return self._of_all_tasks(self._of_own_tasks(episodes, request))

    def _of_own_tasks(self, episodes: Episodes, request: MetaStepRequest) -> MetaStepResult:
        tasks = len(episodes.query_y_TE)
        outer = self.body_start if request.body_only else self.outer
        chunk = tasks if self.chunk is None or request.body_only else self.chunk
        split = [episodes] if chunk >= tasks else episodes.split(chunk)
        parts = [self._of_learnable(outer(self.net, self.state, part, request)) for part in split]
        return joined(parts, [len(part.query_y_TE) for part in split])

    def _of_all_tasks(self, measured: MetaStepResult) -> MetaStepResult:
        """Average over the tasks of all ranks, then clip."""
        if self.vote is not None:
            measured = exchanged(measured, self.state.running, self.vote, self._weight(self.vote))
        self._clip(measured.grads)
        return measured

    def _weight(self, vote: StopVote) -> float:
        """The weight of this rank in means over all tasks."""
        return vote.ranks.share(self.config.meta_batch_size).weight

    def _mean(self, mean_of_own: Tensor) -> Tensor:
        """The mean over the tasks of all ranks."""
        if self.vote is None:
            return mean_of_own
        weight = self._weight(self.vote)
        (mean,), _ = self.vote.ranks.mean([mean_of_own], weight, mean_of_own.new_zeros(0))
        return mean

    def apply(self, measured: MetaStepResult, epoch: int, done: float = 0.0) -> None:
        """Update the learnable tensors, the running statistics and the inner Adam's moments.

        Args:
            measured: the result of `measure`.
            epoch: counted from 0.
            done: the finished fraction of all meta-steps, 0..1.
        """
        self.set_meta_lr(epoch, done)
        self.move(measured)

    @property
    def takes_many(self) -> bool:
        """Whether `take_many` can take the next meta-steps; never before the first one of this process."""
        config = self.config
        if self.vote is not None:  # the ranks meet in each meta-step
            return False
        in_c = self.outer is compiled and isinstance(self.optimizer, CompiledAdam)
        whole = self.chunk is not None and self.chunk >= config.meta_batch_size
        clipped = config.clip_value is not None or config.clip_norm is not None
        return in_c and whole and not clipped and available(self.net, self.state.example_tensor)

    def take_many(self, episodes: Episodes, epoch: int, done: Sequence[float]) -> list[MetaStepResult]:
        """Do the same as `measure` and `apply` for one meta-step after another, with the same results.

        Args:
            episodes: the tasks of all these meta-steps.
            epoch: counted from 0.
            done: for each meta-step, the finished fraction of all meta-steps, 0..1.

        Returns:
            The measurements of the meta-steps; fewer if one of them is not finite, which is then not taken.
        """
        assert isinstance(self.net, Mlp) and isinstance(self.optimizer, CompiledAdam)
        weights, first_order, _ = self.schedule(epoch)
        request = MetaStepRequest(self.config.inner_steps, weights, first_order, measure_all=False)
        meta_lrs = [self.schedule(epoch, fraction)[2] for fraction in done]
        return compiled_steps(self.net, self.state, episodes, request, self.optimizer, meta_lrs)

    def set_meta_lr(self, epoch: int, done: float = 0.0) -> None:
        """Set the optimiser's learning rate from the schedule."""
        self.optimizer.set_lr(self.schedule(epoch, done)[2])

    def move(self, measured: MetaStepResult) -> None:
        """Do the same as `apply`, with the optimiser's current learning rate."""
        self.optimizer.step(measured.grads)
        accumulate(self.running, measured.norm_passes)
        for name, moment in measured.moments.items():
            self.state.moments[name].copy_(moment)

    def _of_learnable(self, result: MetaStepResult) -> MetaStepResult:
        """The result without the gradients of frozen tensors, which do not count for --clip-norm either."""
        if not self.state.frozen_names:
            return result
        return replace(result, grads={name: result.grads[name] for name in self.learnable})

    def _clip(self, grads: dict[str, Tensor]) -> None:
        if self.config.clip_value is not None:
            for name, grad in grads.items():
                # As in the published MAML++ code, which does not clip the gradients of learnt rates.
                if not name.startswith(RATE):
                    grad.clamp_(-self.config.clip_value, self.config.clip_value)
        if self.config.clip_norm is not None:
            norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
            scale = (self.config.clip_norm / (norm + 1e-12)).clamp(max=1.0)  # 1e-12 avoids a division by 0
            for grad in grads.values():
                grad.mul_(scale)


def joined(parts: Sequence[MetaStepResult], tasks: Sequence[int]) -> MetaStepResult:
    """Combine the results of parts of a meta-batch into that of the whole.

    Args:
        parts: the results, whose values are means over their tasks.
        tasks: the number of tasks of each part, which is its weight in the mean.
    """
    if len(parts) == 1:
        return parts[0]
    shares = [count / sum(tasks) for count in tasks]

    def mean(values: Iterable[Tensor]) -> Tensor:
        return torch.stack([value * share for value, share in zip(values, shares, strict=True)]).sum(0)

    def means(values: Sequence[Mapping[Key, Tensor]]) -> dict[Key, Tensor]:
        return {key: mean(value[key] for value in values) for key in values[0]}

    return MetaStepResult(
        means([part.grads for part in parts]),
        mean(part.meta_loss for part in parts),
        mean(part.support_losses_I for part in parts),
        means([part.query_losses for part in parts]),
        means([part.query_scores for part in parts]),
        [norm_pass for part in parts for norm_pass in part.norm_passes],
        means([part.moments for part in parts]),
    )


def exchanged(
    measured: MetaStepResult, running: Mapping[str, Tensor], vote: StopVote, weight: float
) -> MetaStepResult:
    """Average over the ranks everything that a meta-step moves or measures, in one exchange.

    Args:
        measured: the result for the tasks of this rank.
        running: the running batch-norm statistics, which the passes update.
        vote: the request to stop, which is part of the exchange.
        weight: the weight of this rank.
    """
    passes = mean_passes(running, measured.norm_passes)
    single = {"meta": measured.meta_loss, "support": measured.support_losses_I}
    parts: list[Mapping[Any, Tensor]] = [measured.grads, measured.moments, single]
    parts += [measured.query_losses, measured.query_scores]
    for norm in passes:
        parts += [{layer: mean for layer, (mean, _) in norm.seen.items()}]
        parts += [{layer: var for layer, (_, var) in norm.seen.items()}]
    flat = [tensor for part in parts for tensor in part.values()]
    means, votes = vote.ranks.mean(flat, weight, vote.counts)
    values = iter(means)
    grads, moments, single, losses, scores, *seen = [{name: next(values) for name in part} for part in parts]
    norm_passes = [
        NormPass({}, {}, norm.step, seen={layer: (mean[layer], var[layer]) for layer in mean})
        for norm, mean, var in zip(passes, seen[::2], seen[1::2], strict=True)
    ]
    return MetaStepResult(
        grads, single["meta"], single["support"], losses, scores, norm_passes, moments, votes
    )


def steadier(config: TrainConfig) -> str:
    """How to change the settings of a run that has diverged, for a hint."""
    if config.outer == "trpo":
        return "with a lower --inner-lr or --max-kl"
    clip = "" if config.clip_value or config.clip_norm else ", or with --clip-value 10"
    return f"with a lower --inner-lr or --meta-lr{clip}"


def first_non_finite(measured: MetaStepResult, metric: Metric = "accuracy") -> str | None:
    """Describe the first loss or gradient that is NaN or infinite, or return None; synchronises.

    The losses of policies, whose `metric` is "return", are minus their returns.
    """
    support, query = ("return", "return") if metric == "return" else ("support loss", "query loss")
    for step, loss in enumerate(measured.support_losses_I.tolist()):
        if not math.isfinite(loss):
            return f"the {support} after {step} inner {plural(step, 'step')} is {reported(metric, loss)}"
    for steps, loss in measured.query_losses.items():
        if not math.isfinite(value := loss.item()):
            return f"the {query} after {steps} inner {plural(steps, 'step')} is {reported(metric, value)}"
    # A sum is finite only if all its terms are. For small networks a test of each tensor takes too long.
    if math.isfinite(torch.cat([grad.flatten() for grad in measured.grads.values()]).sum().item()):
        return None
    for name, grad in measured.grads.items():
        if not bool(grad.isfinite().all()):
            return f"the meta-gradient of {name} is not finite"
    return None
