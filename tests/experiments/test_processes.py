"""Jobs of several processes: the others wait for rank 0, however long it needs to open the data."""

import time

import pytest
from helpers.rank_cases import in_ranks
from helpers.shared import ignore

from mamlctl.core.errors import DataError
from mamlctl.core.events import Notice
from mamlctl.experiments.processes.together import BEAT_S, jobs, send_after

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
