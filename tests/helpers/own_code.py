"""What tests of runs with the user's code share."""

import re

import torch

from mamlctl.core.user_code.stored import StoredCode, read_code, write_code
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


def is_refused(answer, words):
    """Whether a command ended with exit code 2 and an error of two lines that contains the words."""
    code, out, err = answer
    lines = [line for line in err.splitlines() if line.startswith(("error: ", "hint:  "))]
    return code == 2 and not out and len(lines) == 2 and err.splitlines()[-2:] == lines and words in err


def stored_tensors(run):
    """The tensors of a run's last checkpoint, and the first moments of its optimiser."""
    content = checkpoints.load(run / "checkpoints" / "last.pt", owner=open_run(run).owner)
    moments = content["optimizer"].get("first", {})
    return content["stored"] | {f"first moment of {name}": tensor for name, tensor in moments.items()}


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
