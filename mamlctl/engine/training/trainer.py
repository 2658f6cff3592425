"""The outer loop: meta-steps, reports, validation and checkpoints; it can stop after every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mamlctl.core.errors import DivergedError
from mamlctl.core.events import MetaStepDone, Notice, OnEvent, Progress, TrainReport, ValidationDone
from mamlctl.core.formatting import parse_seconds
from mamlctl.core.literals import StopReason
from mamlctl.core.results import KEPT, named
from mamlctl.core.statistics import mean_ci95
from mamlctl.data.tasks.episodes import Tasks
from mamlctl.engine.algorithms.meta_gradient import MetaStepResult
from mamlctl.engine.algorithms.registry import algorithm_of
from mamlctl.engine.derivatives.selection import select_derivatives
from mamlctl.engine.devices import memory_bytes
from mamlctl.engine.distributed import ALONE, Ranks, StopVote
from mamlctl.engine.evaluation.evaluator import Stopped, evaluate
from mamlctl.engine.inner_loop import MetaState
from mamlctl.engine.nets.base import Net, bn_mode
from mamlctl.engine.training import checkpoints
from mamlctl.engine.training.cuda_graphs import runner_of
from mamlctl.engine.training.initial_state import evaluation_net, evaluation_plan
from mamlctl.engine.training.meta_step import MetaStep, first_non_finite, steadier
from mamlctl.engine.training.progress import Period, Position, RunFiles, Saver
from mamlctl.settings.schema import TrainConfig

MOST_TASKS = 2**12  # that are drawn for one call of `take_many`
LONGEST_S = 0.05  # of such a call, in which training cannot stop


class Trainer:
    """Runs meta-steps until the end of training or until `stop_reason` returns a reason."""

    def __init__(
        self,
        config: TrainConfig,
        net: Net,
        state: MetaState,
        streams: Mapping[str, Tasks],
        run: RunFiles | None,
        *,
        on_event: OnEvent,
        stop_reason: Callable[[], StopReason],
    ) -> None:
        """Start at meta-step 0; call `resume` to continue from the last checkpoint.

        Args:
            config: the settings.
            net: the network.
            state: the tensors to train, in place, on the device of the run.
            streams: the tasks of the splits "train" and "val".
            run: the run folder; None in a process that writes nothing.
            on_event: called with every event.
            stop_reason: returns why to stop, or ""; called before each meta-step and each chunk of validation
                tasks.
        """
        self.config, self.net, self.state, self.streams, self.run = config, net, state, streams, run
        self.on_event, self.stop_reason, self.saver = on_event, stop_reason, Saver(run)
        self.meta_step = MetaStep(config, net, state)
        self.ranks, self.vote = ALONE, StopVote(ALONE, lambda: self.stop_reason(), state.example_tensor)
        self.device = self.meta_step.device
        no_graph = "meta-steps run without a CUDA graph, because the capture failed"
        self.runner = runner_of(self.meta_step, lambda why: on_event(Notice(f"{no_graph}: {why}")))
        self.plan = evaluation_plan(config, config.val_tasks)
        self.unrolls = algorithm_of(config).unrolls
        self.derivatives = select_derivatives(
            evaluation_net(config, net), state.example_tensor, config.engine
        )
        self.metric = net.objective.metric
        self.position = Position()
        self.period = Period.empty(config.inner_steps, self.device)
        self._latest: MetaStepResult | None = None
        self._saved_epoch = False  # whether `last.pt` contains the end of the latest epoch
        self._moved = False  # whether this process has finished any meta-step or validation
        self._reported_at, self._saved_at, self._tasks_since = time.perf_counter(), time.monotonic(), 0
        self._at_once = 2  # meta-steps of the next `take_many`
        self._checkpoint_every_s = parse_seconds(config.checkpoint_every)

    @property
    def last(self) -> Path:
        """The checkpoint that a resume starts from."""
        return (self.run.checkpoints if self.run else Path()) / checkpoints.LAST

    def share(self, ranks: Ranks) -> None:
        """Share the tasks with other processes, which continue from the state of rank 0."""
        if ranks.count == 1:
            return
        self.ranks, self.vote = ranks, StopVote(ranks, self.stop_reason, self.state.example_tensor)
        self.meta_step.vote = self.vote
        content = ranks.from_first(checkpoints.on_cpu(self._content()))
        self.position = Position(**content["position"])
        if ranks.rank:
            checkpoints.restore(self._content(), content, Path("of rank 0"))

    def train(self) -> StopReason:
        """Train to the end, or until `stop_reason` returns a reason.

        Returns:
            The reason, or "" at the end of training.

        Raises:
            DivergedError: a loss, gradient or prediction is not finite.
        """
        config, position = self.config, self.position
        self._reported_at, self._tasks_since = time.perf_counter(), 0
        if position.step == 0:
            self.save()  # the last good checkpoint, in case the first epoch diverges
        while True:
            if position.step // config.steps_per_epoch > position.validated:
                try:
                    self._validate()
                except Stopped:
                    self.save()
                    self._announce(reason := self._stop())
                    return reason
            if position.step >= config.total_steps:
                return ""
            if reason := self._stop():
                self.save_checked()
                self._announce(reason)
                return reason
            if not self._take_many():
                self._step()
            self._moved = True

    def _announce(self, reason: StopReason) -> None:
        """Say why training stops if another process was asked to."""
        if self.ranks.count > 1 and not self.stop_reason():
            self.on_event(Notice(f"{reason} on another rank: saved"))

    def _stop(self) -> StopReason:
        """Return why to stop, or ""."""
        return self._allowed(self.vote.reason())

    def _allowed(self, reason: StopReason) -> StopReason:
        """Drop a time limit before the first step or validation of this process: a resume must advance."""
        return "" if reason == "time limit" and not self._moved else reason

    def _step(self) -> None:
        config, position = self.config, self.position
        epoch = position.step // config.steps_per_epoch
        if position.step and position.step == config.body_epochs * config.steps_per_epoch:
            self.meta_step.optimizer.restart()  # its moments are those of the body's gradient
        step = position.step + 1
        reports = step == 1 or step % config.report_every == 0 or step % config.steps_per_epoch == 0
        share = self.ranks.share(config.meta_batch_size)
        first = position.step * config.meta_batch_size + share.first
        episodes = self.streams["train"].episodes(first, share.tasks)
        self.vote.cast()
        measured = self.runner.measure(episodes, epoch, measure_all=reports)
        self._latest = measured
        # On a CPU the check is free, so a bad step never changes the weights. On CUDA it synchronises, so it
        # is done once per report.
        if reports or self.device.type == "cpu":
            self._check(step)
        self.runner.apply(measured, epoch, position.step / config.total_steps)
        self._finish_step(measured, epoch)
        if measured.votes is not None:
            self.vote.hear(measured.votes)
        if reports:
            self._report(epoch)
        self._save_if_due(measured)

    def _take_many(self) -> bool:
        """Take meta-steps until the next report in one call, if possible; return whether all were taken.

        How many has no influence on the results. The first one that is not finite is left to `_step`, which
        raises the error.
        """
        config, step = self.config, self.position.step
        epoch, batch = step // config.steps_per_epoch, config.meta_batch_size
        every = config.report_every
        report = min((step // every + 1) * every, (epoch + 1) * config.steps_per_epoch)
        count = min(report - 1 - step, self._at_once, MOST_TASKS // batch)
        if step == 0 or count < 2 or not self.meta_step.takes_many:
            return False
        start = time.perf_counter()
        episodes = self.streams["train"].episodes(step * batch, count * batch)
        done = [taken / config.total_steps for taken in range(step, step + count)]
        results = self.meta_step.take_many(episodes, epoch, done)
        for measured in results:
            self._finish_step(measured, epoch)
        quick = time.perf_counter() - start < LONGEST_S
        # The next report may have been the reason for a small count, which is then no measure of the time.
        self._at_once = max(self._at_once, 2 * count) if quick else max(count // 2, 2)
        if len(results) < count:
            return False
        self._save_if_due(results[-1])
        return True

    def _finish_step(self, measured: MetaStepResult, epoch: int) -> None:
        """Count a meta-step that has been taken."""
        self._latest = measured
        self.period.add_no_sync(measured)
        self._tasks_since += self.config.meta_batch_size
        self.position.step += 1
        self.on_event(MetaStepDone(self.position.step, epoch))

    def _save_if_due(self, measured: MetaStepResult) -> None:
        due = time.monotonic() - self._saved_at >= self._checkpoint_every_s
        # On CUDA, losses have not been checked since the last report; the next one raises the error.
        if due and first_non_finite(measured) is None:
            self.save()

    def _check(self, step: int) -> None:
        what = first_non_finite(self._latest, self.metric) if self._latest else None
        if what:
            hint = f"start a new run {steadier(self.config)}; the last good checkpoint is {self.last}"
            raise DivergedError(what, hint=hint, step=step)

    def _report(self, epoch: int) -> None:
        means, size = self.period.means(), self.config.inner_steps + 1
        now = time.perf_counter()
        # There is no inner loop while only the body is trained.
        body_only = self.config.trains_body_only(epoch)
        steps = 0 if body_only else self.config.inner_steps
        losses, scores = means[: steps + 1], means[size : size + steps + 1]
        accuracies = tuple(scores) if self.net.objective.has_classes else ()
        weights, first_order, _ = self.meta_step.schedule(epoch)
        learnt = self.state.rates.items() if self.state.rates_learnt else ()
        report = TrainReport(
            step=self.position.step,
            epoch=epoch,
            support_loss=means[-2] if steps else None,
            query_losses=tuple(losses),
            query_accuracies=accuracies,
            query_accuracy=accuracies[-1] if accuracies else None,
            meta_loss=means[-1],
            msl_weights=weights,
            meta_lr=self.meta_step.optimizer.lr_now(),
            first_order=first_order if self.unrolls and not body_only else None,
            tasks_per_second=self._tasks_since / max(now - self._reported_at, 1e-9),
            memory_bytes=memory_bytes(self.device),
            # With one rate per weight, the mean over the tensor.
            rates={
                name: tuple(rate.flatten(1).mean(1).tolist() if rate.dim() > 1 else rate.tolist())
                for name, rate in learnt
            },
        )
        self.period = Period.empty(self.config.inner_steps, self.device)
        self._reported_at, self._tasks_since = now, 0
        row = {key: value for key, value in vars(report).items() if key != "rates" or value}
        self.saver.append("report", row)
        self.on_event(report)

    def _validate(self) -> None:
        config, position = self.config, self.position
        self._saved_epoch = False
        scores = evaluate(
            self.derivatives,
            [self.state],
            self.streams["val"],
            self.plan,
            on_progress=self._validated_some,
            should_stop=lambda: bool(self._allowed(self.vote.agree())),
            ranks=self.ranks,
        ).single[0]
        position.validated += 1
        self._moved = True
        score, ci95 = mean_ci95(scores.last_T)
        self._keep_best(position.validated, score, ci95)
        best_epoch, best_score, best_ci95 = position.top[0]
        done = ValidationDone(
            step=position.step,
            epoch=position.validated,
            metric=self.metric,
            val_score=score,
            val_ci95=ci95,
            val_tasks=len(scores.last_T),
            bn=bn_mode(self.net, config.bn),
            best_val_score=best_score,
            best_val_ci95=best_ci95,
            best_epoch=int(best_epoch),
        )
        self.saver.append("validation", named(done))
        self.save()
        # Not earlier: until `last.pt` lists the new best epochs, a reader may still open the old files.
        self.saver.remove_others(position.top)
        self.on_event(done)
        # Exclude the time of validation from the tasks per second of training.
        self._reported_at, self._tasks_since = time.perf_counter(), 0

    def _validated_some(self, done: int) -> None:
        if not self._saved_epoch and self.device.type == "cpu":
            # The first chunk had finite scores: save, so that a crash in validation does not lose the epoch.
            # On CUDA, scores are checked at the end only.
            self.save()
            self._saved_epoch = True
        self.on_event(Progress("validating", done, self.config.val_tasks))

    def _keep_best(self, epoch: int, score: float, ci95: float) -> None:
        top = self.position.top
        top.append([float(epoch), score, ci95])
        sign = 1 if self.metric == "mse" else -1
        top.sort(key=lambda entry: (sign * entry[1], entry[0]))  # of equal scores, the earlier epoch first
        del top[KEPT:]
        content = {"stored": self.state.stored(), "epoch": epoch, "val_score": score, "val_ci95": ci95}
        self.saver.save_best(epoch, content, top)

    def _content(self) -> dict[str, Mapping[str, Any]]:
        """Everything that `resume` needs."""
        return {
            "stored": self.state.stored(),
            "optimizer": self.meta_step.optimizer.stored(),
            "period": vars(self.period),
            "position": vars(self.position),
        }

    def save(self) -> None:
        """Write `last.pt`, and keep the one before it."""
        self.saver.save_last(self._content())
        self._saved_at = time.monotonic()

    def save_checked(self) -> None:
        """Save between meta-steps. Raises DivergedError if the latest loss is not finite."""
        self._check(self.position.step)  # on CUDA, losses have not been checked since the last report
        self.save()

    def resume(self) -> None:
        """Continue from `last.pt`, or from the checkpoint before it if that one is damaged or missing.

        Raises:
            MamlctlError: both are missing, damaged, or do not fit the settings.
        """
        assert self.run is not None
        path, content, damage = checkpoints.load_last(self.run.checkpoints, owner=self.run.owner)
        self.position = Position(**content["position"])
        step, total = self.position.step, self.config.total_steps
        if step > total:
            raise checkpoints.damaged(path, f"is from meta-step {step}, but the run has {total}")
        checkpoints.restore(self._content(), content, path)
        if damage:
            path.replace(self.last)  # the next save must not keep the damaged file as the previous one
            self.on_event(Notice(f"{damage}: resuming from {path.name}, which is from meta-step {step}"))
        if damaged := self.run.rewind_metrics(step, self.position.validated):
            self.on_event(Notice(damaged))
