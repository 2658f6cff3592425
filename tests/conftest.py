"""Session-wide setup: threads, prepared data, and a list of slow tests in the quick tier."""

import gc
import os
import signal
import sys

import pytest
from filelock import FileLock
from helpers import preloaded
from helpers.shared import SHARED, ignore

# A shell starts background jobs with SIGINT ignored, and nohup ignores SIGHUP: child processes inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The environment variables of whoever runs the tests must not change the defaults.
for name in [name for name in os.environ if name.startswith("MAMLCTL_")]:
    del os.environ[name]

# The markers that `make quick` skips; it runs smoke tests however long they take.
HEAVY = {"process", "cluster", "render", "montecarlo", "realdata", "gpu"}
QUICK_S = 2.0  # processor time that a test of the quick tier should not exceed


def pytest_sessionstart(session):
    """Set up torch, except in the process that only distributes tests to workers."""
    if session.config.getoption("numprocesses", None):
        return
    import torch

    if not torch.cuda.is_available():
        # Set before Triton is imported, so that its kernels run on the CPU.
        os.environ["TRITON_INTERPRET"] = "1"
    # The learners are tiny: a second thread gains nothing, and costs a lot of time on a busy machine.
    torch.set_num_threads(1)


def pytest_sessionfinish():
    preloaded.stop()


def pytest_collection_modifyitems(items):
    """Run the files that start processes first, because they take longest."""
    long = {item.path for item in items if not {"process", "cluster"}.isdisjoint(item.keywords)}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish():
    """Exclude all imported modules from garbage collection: 8 % less processor time."""
    gc.collect()
    gc.freeze()


def processor_s():
    """Return the processor time of this process and of the children that it has waited for."""
    return sum(os.times()[:4])


def pytest_runtest_setup(item):
    item.began_s = processor_s()


def pytest_runtest_makereport(item, call):
    if call.when == "call":
        item.user_properties.append(("processor_s", processor_s() - item.began_s))


def pytest_terminal_summary(terminalreporter):
    """List the tests of the quick tier that need too much processor time, without failing."""
    for report in terminalreporter.stats.get("passed", []):
        spent_s = dict(report.user_properties).get("processor_s", 0)
        if spent_s > QUICK_S and (HEAVY | {"smoke"}).isdisjoint(report.keywords):
            terminalreporter.write_line(f"slow for `make quick`: {spent_s:.1f} s {report.nodeid}")


def shared_folder(tmp_path_factory, name, fill):
    """Return a folder that one worker of the session fills and all workers use."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            fill(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def config_folder(tmp_path_factory):
    """A folder for the user's list of trusted code, in place of the real one."""
    os.environ["XDG_CONFIG_HOME"] = str(tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="session")
def omniglot_zips():
    """The folder with the two real Omniglot archives."""
    folder = SHARED / "omniglot"
    if not (folder / "images_background.zip").is_file():
        pytest.skip("real Omniglot is not in ../shared/data/omniglot")
    return folder


@pytest.fixture(scope="session")
def omniglot_root(omniglot_zips, tmp_path_factory):
    """A data root with the real Omniglot, fetched from the local archives."""
    from mamlctl.data.sets.registry import fetch_or_open, find_data_set

    def fetch(root):
        fetch_or_open(find_data_set("omniglot"), root, source=[omniglot_zips], offline=True, on_event=ignore)

    return shared_folder(tmp_path_factory, "omniglot-root", fetch)


@pytest.fixture(scope="session")
def glyphs_root(tmp_path_factory):
    """A data root with the embedded data set, glyphs."""
    from mamlctl.data.sets import glyphs

    def draw(root):
        glyphs.open_pack(root, on_event=ignore)

    return shared_folder(tmp_path_factory, "glyphs-root", draw)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current folder, and an empty list of trusted code."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(capsys, monkeypatch):
    """A function that runs the command line in this process and returns exit code, stdout and stderr."""
    from mamlctl.cli.app import main

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["mamlctl", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        return (int(left.value.code or 0), *capsys.readouterr())

    return call
