"""Locks exclude other threads and processes, and a lock file left by a killed process excludes nobody."""

import signal
import subprocess
import sys
import threading

import pytest
from helpers.shared import ignore

from mamlctl.core.errors import LockedError
from mamlctl.core.files import is_locked, one_writer
from mamlctl.data.fetching.locks import locked

HOLDER = """
import sys, time
from pathlib import Path
from mamlctl.core.files import one_writer
with one_writer(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_threads_take_turns_and_each_gets_one_notice(tmp_path):
    path, count, notices = tmp_path / "downloads" / "a.lock", [0], []

    def count_up():
        for _ in range(20):
            with locked(path, "a", notices.append):
                before = count[0]
                threading.Event().wait(0.001)
                count[0] = before + 1

    threads = [threading.Thread(target=count_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count == [80]
    assert len(notices) <= 80
    assert not path.parent.exists()


def test_writer_excludes_threads_and_every_error_names_it(tmp_path):
    seen = []

    def try_it():
        try:
            with one_writer(tmp_path):
                seen.append("written")
        except LockedError as error:
            seen.append(error.message)

    with one_writer(tmp_path):
        for _ in range(2):
            thread = threading.Thread(target=try_it)
            thread.start()
            thread.join()
        assert is_locked(tmp_path)
    try_it()
    assert not is_locked(tmp_path)
    name = (tmp_path / "lock").read_text()
    assert seen == [f"run folder {tmp_path} is in use by {name}"] * 2 + ["written"]


def test_lock_of_a_killed_process_is_free(tmp_path):
    words = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(LockedError, match=f"is in use by process {process.pid}"), one_writer(tmp_path):
            raise AssertionError("both processes write")
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / "lock").read_text() == f"process {process.pid}"
    assert not is_locked(tmp_path)
    with one_writer(tmp_path):
        assert is_locked(tmp_path)


def test_lock_creates_and_removes_its_folder(tmp_path):
    path = tmp_path / "downloads" / "a.lock"
    for _ in range(3):
        with locked(path, "a", ignore):
            assert path.exists()
        assert not path.parent.exists()
