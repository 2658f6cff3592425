"""The facts that a run stores about its environment, and what it reports about its kernels."""

import os
import subprocess

import torch

import mamlctl
from mamlctl.engine.kernels import c_library
from mamlctl.experiments.environment import _git_state, kernels_announced


def test_the_state_of_git_is_read_without_writing_its_index(tmp_path, monkeypatch):
    module = tmp_path / "mamlctl" / "__init__.py"
    module.parent.mkdir()
    module.write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=me@example.org"]
    for words in (["init", "--quiet"], ["add", "mamlctl"], ["commit", "--quiet", "--message", "first"]):
        subprocess.run([*git, *words], check=True)
    os.utime(module, (0, 0))  # so that git would refresh its index, for which it locks it
    monkeypatch.setattr(mamlctl, "__file__", str(module))
    index = (tmp_path / ".git" / "index").read_bytes()
    assert not _git_state()["dirty"]
    assert (tmp_path / ".git" / "index").read_bytes() == index


def test_kernels_are_announced_on_cuda_and_where_they_are_compiled():
    events = []
    for device in ("cpu", "cuda"):
        with kernels_announced(torch.device(device), events.append):
            assert [event.what for event in events] == ["preparing kernels"] * (device == "cuda")
            for begins in c_library._before_compiling:
                begins()
        assert events.pop().what == "compiling kernels"
        assert c_library._before_compiling == []
