"""The shares of ranks other than 0: training and evaluation without a display and without writing files."""

from __future__ import annotations

from mamlctl.core.errors import STOP_EXIT_CODES, DivergedError, ExitCode
from mamlctl.core.user_code.kinds import trust_runs
from mamlctl.engine.distributed import current
from mamlctl.engine.training.run_code import code_of_run
from mamlctl.engine.training.trainer import Trainer
from mamlctl.experiments.evaluate import prepared, scores_of
from mamlctl.experiments.interrupts import StopRequests
from mamlctl.experiments.processes.together import EvaluationJob, Job, ignore
from mamlctl.experiments.train import prepare
from mamlctl.run_folder import open_run


def do_share(job: Job, *, trust_code: bool) -> ExitCode:
    """Do this rank's share of a job, and return the exit code of the process.

    Args:
        job: the job.
        trust_code: the option --trust-code; on another machine, the user has another list of trusted code.
    """
    if trust_code and job.run is not None:
        trust_runs([job.run])
    if isinstance(job, EvaluationJob):
        model, settings = prepared(job.run, job.settings, offline=job.offline, on_event=ignore)
        scores_of(model, settings, ignore)
        return ExitCode.OK
    stop = StopRequests(ignore, time_limit_s=None)
    code = None if job.run is None else code_of_run(open_run(job.run))
    stored = (code.tasks if code else None) or job.stored
    ready = prepare(job, stop, ignore, code, stored)
    with stop:
        trainer = Trainer(
            ready.config,
            ready.net,
            ready.state,
            ready.streams,
            None,
            on_event=ignore,
            stop_reason=stop.reason,
        )
        trainer.share(current())
        try:
            return STOP_EXIT_CODES[trainer.train()]
        except DivergedError:
            return ExitCode.DIVERGED  # rank 0 reports it
