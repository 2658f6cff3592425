"""What tests of runs with the user's code share."""

import re
import sys

import pytest
import torch

from mamlctl.cli.app import main
from mamlctl.core.user_code.stored import StoredCode, read_code, trust_file, write_code
from mamlctl.engine.training import checkpoints
from mamlctl.run_folder import open_run

EVIL = "from pathlib import Path\nPath('ran').touch()\n"


class Once(torch.autograd.Function):
    """The square, without a second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def with_data_root(cli, root):
    """The function `cli`; the commands that need a data root get this one."""

    def call(*words):
        needs_root = words[0] in {"train", "eval", "compare", "ablate"} and "--support" not in words
        more = ("--data-root", root) if needs_root and "--data-root" not in words else ()
        return cli(*words, *more)

    return call


def train_as_another_user(folder, *words):
    """Train a run, with the list of trusted code in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        patch.setattr(sys, "argv", ["mamlctl", "train", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
    assert not left.value.code


def is_refused(answer, *words):
    """Whether a command ended with exit code 2 and an error of two lines that contains the words."""
    code, out, err = answer
    lines = [line for line in err.splitlines() if line.startswith(("error: ", "hint:  "))]
    is_short = code == 2 and not out and len(lines) == 2 and err.splitlines()[-2:] == lines
    assert is_short and all(word in err for word in words), (code, out, err)
    return True


def assert_another_user_has_to_trust(cli, monkeypatch, run, *words, trusting="eval"):
    """Another user's commands refuse a run, until one of them has --trust-code.

    `words` are for `eval` and for the command that is `trusting`.
    """
    monkeypatch.setenv("XDG_CONFIG_HOME", str(run.parent / "of another user"))
    assert is_refused(cli("eval", run, *words), "that you do not trust yet: none of it was run")
    assert is_refused(cli("train", "--resume", run), "do not trust")
    assert not trust_file().exists()
    assert cli(trusting, run, *words, "--trust-code", "--quiet")[0] == 0
    assert cli("eval", run, *words, "--quiet")[0] == 0


def stored_tensors(run):
    """The tensors of a run's last checkpoint, and the first moments of its optimiser."""
    content = checkpoints.load(run / "checkpoints" / "last.pt", owner=open_run(run).owner)
    moments = content["optimizer"].get("first", {})
    return content["stored"] | {f"first moment of {name}": tensor for name, tensor in moments.items()}


def same_training(one, other):
    """Whether the last checkpoints of two runs have bitwise the same tensors."""
    tensors, others = stored_tensors(one), stored_tensors(other)
    assert tensors.keys() == others.keys()
    return all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())


def forge_code(run, kind, file):
    """Other code of a kind, described consistently."""
    folder = run / "code" / kind
    code = read_code(folder)
    files = dict(code.files) | {file: EVIL.encode() + code.files[file]}
    write_code(folder, StoredCode(code.entry, code.name, code.installed, files))


def forge_setting(run, name, value):
    """Another value of a setting in config.yaml."""
    path = run / "config.yaml"
    path.write_text(re.sub(f"^{name}: .*$", f"{name}: '{value}'", path.read_text(), flags=re.MULTILINE))
