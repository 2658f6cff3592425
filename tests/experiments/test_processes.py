"""Jobs of several processes: the others wait for rank 0, however long it needs to open the data."""

import time
from types import SimpleNamespace

import pytest
from helpers.rank_cases import in_ranks
from helpers.shared import ignore

from mamlctl.core.errors import DataError, ExitCode, SettingsError
from mamlctl.core.events import Notice
from mamlctl.core.user_code.kinds import is_trusted, write_run_code
from mamlctl.core.user_code.stored import StoredCode
from mamlctl.experiments.processes import shares
from mamlctl.experiments.processes.together import (
    BEAT_S,
    EvaluationJob,
    check_code_of_ranks,
    jobs,
    send_after,
)
from mamlctl.settings.evaluation import EvalConfig

pytestmark = pytest.mark.process

TIMEOUT_S = 2.0
LONG_S = 1.5 * TIMEOUT_S  # of a download


def test_a_download_may_last_longer_than_the_rank_timeout(tmp_path):
    def work(ranks):
        if ranks.rank:
            return list(jobs(ranks))
        shown = []
        with send_after("job", shown.append) as show:
            end = time.monotonic() + LONG_S
            while time.monotonic() < end:
                time.sleep(BEAT_S / 2)
                show(Notice("downloading"))
        show(Notice("after the job"))
        ranks.from_first(None)
        return len(shown)

    shown, received = in_ranks(2, work, tmp_path, timeout_s=TIMEOUT_S)
    assert shown > 2
    assert received == ["job"]


def test_a_single_process_sends_nothing():
    shown = []
    with send_after("job", shown.append) as show:
        show(Notice("opening"))
    assert shown == [Notice("opening")]


def test_no_job_is_sent_if_the_data_cannot_be_opened(tmp_path):
    def work(ranks):
        if ranks.rank:
            return list(jobs(ranks))
        with pytest.raises(DataError), send_after("job", ignore):
            raise DataError("no data")
        ranks.from_first(None)
        return []

    assert in_ranks(2, work, tmp_path) == [[], []]


def code(content):
    return StoredCode("net.py", "make", False, {"net.py": content})


def test_a_rank_whose_machine_has_other_code_is_refused(tmp_path):
    def work(ranks):
        check_code_of_ranks(SimpleNamespace(stored={"net": code(b"same")}))
        changed = SimpleNamespace(stored={"net": code(b"of rank %d" % ranks.rank)})
        if ranks.rank == 0:
            check_code_of_ranks(changed)
            return
        with pytest.raises(SettingsError, match=r"the files of --net \(net.py:make\) differ"):
            check_code_of_ranks(changed)

    in_ranks(2, work, tmp_path)


@pytest.mark.parametrize("trust_code", [True, False])
def test_a_rank_on_another_machine_obeys_trust_code(tmp_path, monkeypatch, trust_code):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(shares, "prepared", lambda *_, **__: (None, None))
    monkeypatch.setattr(shares, "scores_of", lambda *_: None)
    write_run_code(tmp_path, {"net": code(b"")})
    job = EvaluationJob(tmp_path, EvalConfig(), offline=True)
    assert shares.do_share(job, trust_code=trust_code) == ExitCode.OK
    assert is_trusted(tmp_path) == trust_code
