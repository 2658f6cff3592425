"""The check that tasks of the user's code are the same whenever and wherever they are made.

They are made twice in this process, and once in a new one: from a copy of the code as run folders have it, in
another order, and with another hash of strings.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from mamlctl.core.errors import SettingsError
from mamlctl.core.files import read_object, write_json
from mamlctl.core.literals import SPLITS
from mamlctl.core.user_code.stored import StoredCode, import_stored, read_code, write_code
from mamlctl.data.user_tasks.code import CHECKED, UserTasks, call_words, exact_digest

PURE = "make it a function of the split and the number, with random numbers that both of them seed"


def check_pure(tasks: UserTasks) -> None:
    """Make the checked tasks again, here and from a copy of the code in a new process.

    Raises SettingsError if they differ, or cannot be made there.
    """
    if tasks.is_pure:
        return
    first = {call_words(*key): exact_digest(arrays) for key, arrays in tasks.samples.items()}
    again = tasks.digests_of(reversed(tasks.samples))
    _check_same(first, again, tasks.name, "when it is called again")
    _check_same(first, _digests_in_new_process(tasks.stored, tasks.name), tasks.name, "in a new process")
    tasks.is_pure = True


def _check_same(first: Mapping[str, str], other: Mapping[str, str], name: str, when: str) -> None:
    for task, digest in first.items():
        if other.get(task) != digest:
            raise SettingsError([(f"{task} of {name} gives another task {when}", PURE)])


def _digests_in_new_process(code: StoredCode, name: str) -> dict[str, str]:
    """Make the checked tasks from a copy of the code in a new process, in another order."""
    with tempfile.TemporaryDirectory(prefix="mamlctl-") as folder:
        copy, answer = Path(folder) / "code", Path(folder) / "answer.json"
        write_code(copy, code)
        # With the module search path of this process, and another hash of strings.
        program = (
            f"import sys; sys.path[:] = sys.argv[3:]; import {__name__} as it; it.make_again(*sys.argv[1:3])"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(copy), str(answer), *sys.path],
            env={**os.environ, "PYTHONHASHSEED": "20261126"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        found = read_object(answer)
    if "digests" in found:
        return dict(found["digests"])
    lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
    why = found.get("error") or lines[-1]
    fact = f"{name} works here, but not from a copy of its code in a new process: {why}"
    raise SettingsError([(fact, "read data files by an absolute path: only Python files are copied")])


def make_again(copy: str, file: str) -> None:
    """Write the digests of the checked tasks, or why there are none: the work of the new process."""
    try:
        folder = Path(copy)
        code = read_code(folder)
        keys = [(split, number) for number in reversed(CHECKED) for split in SPLITS]
        digests = UserTasks(import_stored(folder, code), code).digests_of(keys)
        write_json(Path(file), {"digests": digests})
    except SettingsError as error:
        write_json(Path(file), {"error": error.problems[0][0]})
