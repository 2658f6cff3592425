"""The command line of the attack."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import SystemRandom
from typing import Annotated

import typer
from helpers import preloaded

from faults import damage, effects, full_disk, kills, random_settings, readers
from faults.commands import Undisturbed
from faults.trials import Fault, attack, table

FAULTS = (
    Fault("signals during train", kills.train, 2),
    Fault("signals during eval", kills.evaluate),
    Fault("signals during fetch", kills.fetch),
    Fault("signals during ablate", kills.ablate, 2),
    Fault("signals during compare", kills.compare),
    Fault("damaged file of a run, then eval", damage.run_then_evaluate, 1.5),
    Fault("damaged file of a run, then train --resume", damage.run_then_resume, 1.5),
    Fault("damaged file of two runs, then compare", damage.runs_then_compare, 1.5),
    Fault("damaged file of the data root", damage.data),
    Fault("full disk", full_disk.fill),
    Fault("random settings", random_settings.train, 2),
    Fault("options without effect", effects.every_setting, 2),
    Fault("malformed YAML", readers.fuzz_yaml, 0.5),
    Fault("malformed archives", readers.fuzz_archive, 0.5),
    Fault("malformed pickles", readers.fuzz_pickle, 0.5),
    Fault("malformed checkpoints", readers.fuzz_checkpoint, 0.5),
)
OWN_MOUNTS = "FAULTS_WITH_OWN_MOUNTS"  # set in the process that may mount file systems


def use_own_mounts() -> None:
    """Start again in a mount namespace of its own, where that is allowed, so that a tmpfs can be mounted."""
    words = ["unshare", "--user", "--map-root-user", "--mount"]
    if OWN_MOUNTS in os.environ or not shutil.which(words[0]):
        return
    if subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0:
        python = [sys.executable, "-m", "faults", *sys.argv[1:]]
        os.execvpe(words[0], [*words, *python], os.environ | {OWN_MOUNTS: "1"})


def main(
    minutes: Annotated[float, typer.Option(min=0, help="Time for all faults together.")] = 12,
    seed: Annotated[
        int | None, typer.Option(min=0, help="First seed of every fault (default: random).")
    ] = None,
    only: Annotated[str, typer.Option(help="Only try faults whose name contains this text.")] = "",
    trials: Annotated[int | None, typer.Option(min=1, help="Seeds per fault, instead of --minutes.")] = None,
) -> None:
    """Cause faults and print what was lost; fail if anything was lost or a fault was not tried."""
    use_own_mounts()
    # A shell ignores SIGINT in background jobs, and nohup ignores SIGHUP: child processes inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    seed = SystemRandom().randrange(10**6) if seed is None else seed
    faults = [fault for fault in FAULTS if only in fault.name]
    if not faults:
        raise typer.BadParameter(f"no fault's name contains '{only}': {', '.join(f.name for f in FAULTS)}")
    shares = sum(fault.share for fault in faults)
    os.environ[preloaded.NO_PICTURES] = "1"
    preloaded.python()
    rows = []
    with tempfile.TemporaryDirectory(prefix="mamlctl-faults-") as folder:
        undisturbed = Undisturbed(Path(folder))
        typer.echo(f"seed {seed}: repeat one trial with --only NAME --seed SEED --trials 1", err=True)
        for fault in faults:
            began = time.monotonic()
            seconds = 60 * minutes * fault.share / shares
            row = attack(fault, undisturbed, seed=seed, seconds=seconds, trials=trials)
            rows.append(row)
            spent_s = time.monotonic() - began
            typer.echo(f"{row.name}: tried {row.tried}, lost {len(row.lost)}, {spent_s:.0f} s", err=True)
            for number, lost in row.lost:
                typer.echo(f"  seed {number}: {lost}", err=True)
    preloaded.stop()
    typer.echo(table(rows), nl=False)
    raise typer.Exit(any(row.failed for row in rows))


if __name__ == "__main__":
    typer.run(main)
