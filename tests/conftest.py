"""Prepared data, made once a session."""

import os
import signal

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels then run on a CPU

from helpers.shared import SHARED, ignore

from mamlctl.data.sets import glyphs, omniglot

# A shell starts what it puts in the background deaf to Ctrl-C, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# These learners are tiny: a second thread gains nothing, and on a busy machine it loses a lot.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def omniglot_zips():
    """The folder with the two real archives."""
    folder = SHARED / "omniglot"
    if not (folder / "images_background.zip").is_file():
        pytest.skip("real Omniglot is not in ../shared/data/omniglot")
    return folder


@pytest.fixture(scope="session")
def omniglot_root(omniglot_zips, tmp_path_factory):
    """A data root with real Omniglot, fetched from the local archives."""
    root = tmp_path_factory.mktemp("omniglot-root")
    omniglot.fetch(root, source=[omniglot_zips], offline=True, force=False, on_event=ignore)
    return root


@pytest.fixture(scope="session")
def glyphs_root(tmp_path_factory):
    """A data root with the embedded set."""
    root = tmp_path_factory.mktemp("glyphs-root")
    glyphs.open_pack(root, on_event=ignore)
    return root
