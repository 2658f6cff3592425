"""The command line in the process of the test."""

import sys

import pytest

from mamlctl.cli.app import main


@pytest.fixture
def cli(capsys, monkeypatch):
    """A function that runs the command line in this process and returns exit code, stdout and stderr."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["mamlctl", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        return (int(left.value.code or 0), *capsys.readouterr())

    return call
