"""A start from given weights is bitwise those weights, and everything that does not fit is refused."""

import os
import pickle
import zipfile

import pytest
import torch
from helpers.algorithm_cases import CPU
from helpers.engine_cases import IMAGE, small_config
from helpers.module_cases import FILTERS, conv4
from safetensors.torch import save_file
from torch import nn

from mamlctl.core.errors import SettingsError
from mamlctl.engine.derivatives.selection import select_derivatives
from mamlctl.engine.evaluation.adapted_model import AdaptedModel, plain_weights
from mamlctl.engine.nets.batch_norm import NormPass, Statistics
from mamlctl.engine.nets.factory import Parts, torchvision_plan
from mamlctl.engine.nets.module_net import ModulePlan
from mamlctl.engine.training.initial_state import build
from mamlctl.engine.training.starting_weights import start_from
from mamlctl.engine.training.weight_files import file_digest, read_weights

CPU_FLOAT = torch.empty(())


class Branches(nn.Module):
    """Batch norm, shared weights, a buffer, reserved names, and a head with another name."""

    def __init__(self, shape, outputs, scale=2.0):
        super().__init__()
        self.module = nn.Conv2d(shape[0], 4, 3, 4, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.rate = nn.Linear(4, 4)
        self.fc = nn.Linear(4, outputs)
        self.again = self.rate
        self.register_buffer("scale", torch.tensor([scale]))

    def forward(self, x):
        x = self.norm(self.module(x)).mean((2, 3))
        return self.fc(self.again(self.rate(x).tanh()).tanh() * self.scale)


def drawn(module, seed=5):
    """The module with random parameters and running statistics."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in module.state_dict().values():
        if tensor.is_floating_point() and tensor.dim() and tensor.numel() > 1:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return module


def written(path, content):
    """A file with this content, which is that of its ending."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)
    return read_weights(path)


def started(weights, make=None, *, image=IMAGE, **settings):
    """A new learner that starts from weights, its state before that, and the record of the start."""
    settings = {"precision": "float32"} | ({"net": "net.py:make"} if make else {}) | settings
    config = small_config(**settings)
    parts = Parts(make if isinstance(make, ModulePlan) or make is None else ModulePlan(make))
    net, state = build(config, image, CPU, classes=7, parts=parts)
    before = {name: tensor.clone() for name, tensor in state.stored().items()}
    start = start_from(weights, config, net, state, source="the file")
    return net, state, before, start


def refusal(weights, *words, **settings):
    """The message and the hint of a start that is refused."""
    with pytest.raises(SettingsError) as refused:
        started(weights, *words, **settings)
    ((fact, hint),) = refused.value.problems
    assert hint
    return fact, hint


MODULES = {
    "a copy of conv4": (conv4, IMAGE, {}),
    "branches": (Branches, IMAGE, {}),
    "resnet18": (torchvision_plan("resnet18"), (3, 32, 32), {"net": "resnet18"}),
}


@pytest.mark.parametrize("ending", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("algo", ["maml++", "transfer", "protonet"])
@pytest.mark.parametrize("name", MODULES)
def test_a_module_starts_bitwise_as_its_state_dictionary(name, algo, ending, tmp_path):
    make, image, settings = MODULES[name]
    outputs = 7 if algo == "transfer" else 3
    factory = make.make if isinstance(make, ModulePlan) else make
    module = drawn(factory(image, outputs))
    weights = written(tmp_path / f"w{ending}", module.state_dict())
    net, state, _, start = started(weights, make, image=image, algo=algo, **settings)
    own = state.stored()
    for path, stored in net.template.own.items():
        if isinstance(stored, str):
            running = path.endswith(("running_mean", "running_var"))
            if algo == "protonet" and stored.startswith("linear."):
                assert stored not in own
                continue
            found = own[f"running.{stored}" if running else stored]
            for row in found.view(-1, *module.state_dict()[path].shape):
                assert torch.equal(row, module.state_dict()[path]), path
    assert start.digest == file_digest(tmp_path / f"w{ending}")
    tensors = [name for name in module.state_dict() if not name.endswith(("num_batches_tracked", "scale"))]
    assert len(start.read) == len(tensors) - 2 * (algo == "protonet")


def test_the_started_module_computes_what_the_file_did(tmp_path):
    """All rows of batch norm have the file's weights, and --bn running its statistics."""
    module = drawn(conv4(IMAGE, 3))
    weights = written(tmp_path / "w.pt", module.state_dict())
    for settings in ({"filters": FILTERS, "make": None}, {"make": conv4}):
        make = settings.pop("make")
        net, state, *_ = started(weights, make, algo="maml", bnwb=True, bnrs=True, **settings)
        x = torch.rand(1, 6, *IMAGE)
        fast = {name: weight.unsqueeze(0) for name, weight in state.slow.items()}
        with torch.no_grad():
            for step in (0, 2):
                norm = NormPass(state.norm, state.running, step, Statistics.RUNNING)
                expected = module.eval()(x[0])
                torch.testing.assert_close(net(fast, x, norm)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("net", ["conv4", "mlp", "resnet12"])
@pytest.mark.parametrize("algo", ["maml++", "reptile"])
def test_built_in_networks_start_bitwise_from_what_save_adapted_writes(net, algo, tmp_path):
    settings = {"net": net, "algo": algo, "hidden": "8-8" if net == "mlp" else None}
    built, other = build(small_config(precision="float32", **settings | {"algo": "maml"}), IMAGE, CPU)
    weights, norm, running = (
        {name: torch.rand(1, *tensor.shape[first:]) for name, tensor in part.items()}
        for part, first in ((other.slow, 0), (other.norm, 1), (other.running, 1))
    )
    file = plain_weights(AdaptedModel(select_derivatives(built, CPU_FLOAT), weights, norm, running, {}))
    _, state, _, start = started(written(tmp_path / "w.safetensors", file), **settings)
    assert start.read.keys() == file.keys() and not start.not_read
    for name, tensor in (state.slow | state.norm).items():
        assert torch.equal(tensor, (weights | norm)[name][0].expand_as(tensor)), name
    for name, rows in state.running.items():
        assert torch.equal(rows, running[name].expand_as(rows)), name


def test_skipped_tensors_stay_as_drawn_and_the_head_may_have_another_size(tmp_path):
    module = drawn(conv4(IMAGE, 9))
    weights = written(tmp_path / "w.pt", module.state_dict())
    fact, hint = refusal(weights, conv4)
    assert fact.splitlines()[0] == "--init: the file does not have the tensors of --net net.py:make"
    assert "linear.weight (9x4 in place of 3x4), linear.bias (9 in place of 3)" in fact
    assert hint == "add --init-skip head, to start with a head as drawn"
    for skip, drawn_names in (
        ("head", {"linear.weight", "linear.bias"}),
        ("head, conv[12]", {"linear.weight", "linear.bias", "conv1.weight", "conv2.weight"}),
        ("linear.*,norm4", {"linear.weight", "linear.bias", "norm4.weight", "norm4.bias"}),
    ):
        _, state, before, start = started(weights, conv4, init_skip=skip)
        for name, tensor in state.slow.items():
            assert torch.equal(tensor, before[name]) == (name in drawn_names), name
        assert set(start.not_read) >= drawn_names
        assert "as drawn: " in start.notice
    assert {"norm4.running_mean", "norm4.running_var"} < set(start.not_read)
    assert refusal(weights, conv4, init_skip="head,fc")[0] == (
        "--init-skip: 'fc' matches no tensor of the network"
    )


def test_differences_are_counted_and_named(tmp_path):
    state = dict(drawn(conv4(IMAGE, 3)).state_dict())
    del state["conv2.weight"], state["norm1.bias"]
    state |= {f"extra{number}.weight": torch.ones(2) for number in range(9)}
    state["conv3.weight"] = torch.ones(4, 4, 5, 5)
    fact, hint = refusal(written(tmp_path / "w.pt", state), conv4)
    assert fact.splitlines()[1:] == [
        "  matched             19",
        "  missing              2  norm1.bias, conv2.weight",
        "  left over            9  extra0.weight, extra1.weight, extra2.weight and 6 more",
        "  of another shape     1  conv3.weight (4x4x5x5 in place of 4x4x3x3)",
    ]
    assert "--init-skip" in hint
    odd = {"\x1b[31mred\nline": torch.ones(1), "long" * 99: torch.ones(1)}
    lines = refusal(written(tmp_path / "w.pt", drawn(conv4(IMAGE, 3)).state_dict() | odd), conv4)[
        0
    ].splitlines()
    assert lines[2].startswith("  left over            2  ?[31mred?line, long") and len(lines[2]) < 200
    wide = {name: torch.ones(9, *part.shape) for name, part in drawn(conv4(IMAGE, 3)).state_dict().items()}
    _, hint = refusal(written(tmp_path / "w.pt", wide), conv4)
    assert hint == "use the sizes of network and images that these weights have, or --init-skip"
    with pytest.raises(SettingsError, match="--init-skip: '' matches no tensor"):
        started(written(tmp_path / "w.pt", drawn(conv4(IMAGE, 3)).state_dict()), conv4, init_skip="")
    written(tmp_path / "w.pt", state)
    # What --init-skip matches is not looked for in the network, and not missed in the file.
    _, _, _, start = started(
        read_weights(tmp_path / "w.pt"), conv4, init_skip="extra?,conv2,norm1.bias,conv3.weight"
    )
    assert start.not_read == ("norm1.bias", "conv2.weight", "conv3.weight")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda state: state | {"norm.bias": torch.full((4,), float("nan"))},
            "norm.bias (NaN or infinite values)",
        ),
        (
            lambda state: state | {"norm.bias": torch.full((4,), 1e300, dtype=torch.float64)},
            "norm.bias (values beyond",
        ),
        (lambda state: state | {"norm.running_var": -torch.ones(4)}, "norm.running_var (negative values)"),
        (lambda state: state | {"fc.bias": torch.ones(3, dtype=torch.int64)}, "fc.bias (int64)"),
        (lambda state: state | {"scale": torch.ones(1)}, "scale (a buffer, which the module of --net makes"),
        (lambda state: state | {"rate.bias": torch.ones(4)}, "again.bias (differs from rate.bias"),
        (lambda state: state | {"fc.bias": torch.ones(3).to_sparse()}, "fc.bias (not a dense tensor)"),
        (lambda state: state | {"fc.bias": torch.ones(3, device="meta")}, "fc.bias (not a dense tensor)"),
    ],
)
def test_values_that_cannot_be_used_are_named(spoil, words, tmp_path):
    state = dict(drawn(Branches(IMAGE, 3)).state_dict())
    fact, _ = refusal(written(tmp_path / "w.pt", spoil(state)), Branches)
    assert words in fact and "not usable" in fact


@pytest.mark.parametrize(
    ("wrap", "unwrapped"),
    [
        (lambda state: {"state_dict": state, "epoch": 3}, ("in the entry 'state_dict'",)),
        (
            lambda state: {"model": {"state_dict": state}},
            ("in the entry 'model'", "in the entry 'state_dict'"),
        ),
        (
            lambda state: {f"module.{name}": part for name, part in state.items()},
            ("without the prefix 'module.'",),
        ),
        (
            lambda state: {"params": {f"module.net.{name}": part for name, part in state.items()}},
            ("in the entry 'params'", "without the prefix 'module.'", "without the prefix 'net.'"),
        ),
        (lambda state: {"format": 1, "classes": ["a"], "weights": state}, ("in the entry 'weights'",)),
    ],
)
def test_wrappers_are_taken_off_and_named(wrap, unwrapped, tmp_path):
    module = drawn(conv4(IMAGE, 3))
    weights = written(tmp_path / "w.pt", wrap(module.state_dict()))
    _, state, _, start = started(weights, conv4)
    assert start.unwrapped == unwrapped and unwrapped[0] in start.notice
    assert torch.equal(state.slow["conv2.weight"], module.state_dict()["conv2.weight"])


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class Wrapped(nn.Module):
    """A backbone under a name, and a head."""

    def __init__(self, shape, outputs):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(shape[0], 4, 3, 4), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, outputs)

    def forward(self, x):
        return self.head(self.backbone(x).mean((2, 3)))


def test_the_file_of_a_backbone_fits_a_module_that_contains_it(tmp_path):
    own = drawn(Wrapped(IMAGE, 3)).backbone.state_dict()
    _, state, _, start = started(written(tmp_path / "w.pt", own), Wrapped, init_skip="head")
    assert torch.equal(state.slow["backbone.0.weight"], own["0.weight"])
    assert torch.equal(state.running["backbone.1.mean"][0], own["1.running_mean"])
    assert start.unwrapped == ("with the prefix 'backbone.'",)
    renamed = {f"module.{name}": part for name, part in own.items()}
    _, state, _, start = started(written(tmp_path / "w.pt", renamed), Wrapped, init_skip="head")
    assert torch.equal(state.slow["backbone.0.weight"], own["0.weight"])
    assert start.unwrapped == ("without the prefix 'module.'", "with the prefix 'backbone.'")


def test_a_hostile_file_executes_nothing(tmp_path):
    made = tmp_path / "ran"
    state = drawn(conv4(IMAGE, 3)).state_dict()
    torch.save({"state_dict": state, "extra": Evil(made)}, tmp_path / "zip.pt")
    torch.save({**state, "x": Evil(made)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Evil(made)))
    with zipfile.ZipFile(tmp_path / "jit.pt", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(Evil(made)))
        archive.writestr("a/constants.pkl", pickle.dumps(Evil(made)))
        archive.writestr("a/version", "3")
    for name in ("zip.pt", "old.pt", "bare.pt", "jit.pt"):
        with pytest.raises(SettingsError) as refused:
            read_weights(tmp_path / name)
        ((fact, hint),) = refused.value.problems
        assert fact.startswith(f"--init {tmp_path / name} ") and "\n" not in fact + hint
    assert not made.exists()
    torch.save(conv4(IMAGE, 3), tmp_path / "module.pt")
    torch.save({"blocked by torch": os.system}, tmp_path / "command.pt")
    for name in ("module.pt", "command.pt"):
        with pytest.raises(SettingsError, match="objects other than tensors are not read, since they could"):
            read_weights(tmp_path / name)


def test_damaged_and_forged_files_are_refused(tmp_path):
    loop = {}
    loop["model"] = loop
    cases = {"nothing.pt": {}, "loop.pt": loop, "list.pt": [torch.ones(2)], "numbers.pt": {0: torch.ones(2)}}
    for name, content in cases.items():
        torch.save(content, tmp_path / name)
    torch.save({"w": torch.ones(99)}, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:400])
    (tmp_path / "text.pt").write_text("hello\n")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("hello hello hello\n")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as source,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w") as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry), zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("notes.txt", "hello")
    names = [*cases, "cut.pt", "other.pt", "text.pt", "empty.pt", "text.safetensors", "bomb.pt", "none.pt"]
    for name in names:
        with pytest.raises(SettingsError) as refused:
            read_weights(tmp_path / name)
        ((fact, hint),) = refused.value.problems
        assert str(tmp_path / name) in fact and hint and "\n" not in fact, name


def test_a_huge_view_of_one_number_is_compared_by_its_shape_only(tmp_path):
    state = dict(drawn(conv4(IMAGE, 3)).state_dict()) | {"conv1.weight": torch.zeros(1).expand(10**15)}
    fact, _ = refusal(written(tmp_path / "w.pt", state), conv4)
    assert "conv1.weight (1000000000000000 in place of 4x1x3x3)" in fact


def test_a_missing_safetensors_library_is_explained(tmp_path, monkeypatch):
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(SettingsError) as refused:
        read_weights(tmp_path / "w.safetensors")
    ((fact, hint),) = refused.value.problems
    assert fact.endswith("needs the package safetensors, which is not installed")
    assert hint == "run: pip install 'mamlctl[safetensors]'"


def test_the_head_of_algorithms_that_define_it_is_not_read(tmp_path):
    module = drawn(conv4(IMAGE, 3))
    weights = written(tmp_path / "w.pt", module.state_dict())
    for settings in ({"algo": "maml-zero"}, {"algo": "maml", "body_epochs": 1}):
        _, state, before, start = started(weights, conv4, **settings)
        assert not state.slow["linear.weight"].any() and start.not_read == ("linear.weight", "linear.bias")
    fact, hint = refusal(weights, conv4, algo="unicorn-maml")
    assert fact == "--algo unicorn-maml starts all classes from one row, but the file has different rows"
    assert hint == "add --init-skip head"
    _, state, before, _ = started(weights, conv4, algo="unicorn-maml", init_skip="head")
    assert torch.equal(state.slow["linear.weight"], before["linear.weight"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_converted(dtype, tmp_path):
    state = {
        name: part.to(dtype) if part.is_floating_point() else part
        for name, part in drawn(conv4(IMAGE, 3)).state_dict().items()
    }
    _, own, *_ = started(written(tmp_path / "w.pt", state), conv4)
    assert torch.equal(own.slow["conv1.weight"], state["conv1.weight"].float())
