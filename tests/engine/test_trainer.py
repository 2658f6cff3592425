"""The trainer: a run that is stopped anywhere and resumed equals an uninterrupted one bit for bit."""

import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.trainer_cases import CPU, comparable, config_of, make_run, trainer_of

from mamlctl.core.errors import DivergedError, MamlctlError
from mamlctl.core.events import MetaStepDone, TrainReport, ValidationDone
from mamlctl.core.results import KEPT
from mamlctl.engine.evaluation.evaluator import EvaluationPlan, evaluate
from mamlctl.engine.evaluation.prediction import adapted
from mamlctl.engine.nets.batch_norm import Statistics
from mamlctl.engine.training import checkpoints
from mamlctl.engine.training.initial_state import build
from mamlctl.run_folder import open_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    run = make_run(tmp_path_factory.mktemp("whole") / "run", config_of())
    assert trainer_of(run, run.config).train() == ""
    return run


@pytest.mark.parametrize("stops", [[0], [1], [4], [5], [2, 2], [3, 0, 4], [1] * 40])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(whole, tmp_path, stops):
    """`stops`: the call of `stop_reason` that stops each start; calls come before steps and in validation."""
    run = make_run(tmp_path / "run", config_of())
    trainer = trainer_of(run, run.config, stop_at=stops[0])
    reason = trainer.train()
    assert reason == "asked"
    for stop_at in [*stops[1:], None]:
        trainer = trainer_of(run, run.config, stop_at=stop_at)
        trainer.resume()
        reason = trainer.train()
        if not reason:
            break
    assert reason == ""
    assert comparable(run) == comparable(whole)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == sorted(
        path.name for path in whole.checkpoints.iterdir()
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"algo": "reptile", "inner_optimizer": "adam", "train_shots": 4, "inner_batch": 2, "meta_lr": 0.5},
        {"algo": "reptile", "inner_optimizer": "sgd", "inner_batch": 2, "meta_lr": 0.5, "inner_steps": 2},
        {"algo": "alpha-maml", "hyper_lr": 0.02},
        {"algo": "meta-sgd"},
        {"algo": "anil", "adapts": "head"},
        {"algo": "imaml", "proximal": 2.0, "cg_steps": 2, "inner_steps": 2},
        {"algo": "transfer", "inner_steps": 0, "eval_inner_steps": 2},
        {"algo": "protonet", "inner_steps": 0},
        {"algo": "maml", "body_epochs": 1},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_each_algorithm_resumes_bit_for_bit(tmp_path, settings):
    config = config_of(
        **settings, bnrs=False, epochs=2, meta_lr_final=0.0 if "reptile" in settings.values() else None
    )
    whole = make_run(tmp_path / "whole", config)
    assert trainer_of(whole, config).train() == ""
    run = make_run(tmp_path / "run", config)
    assert trainer_of(run, config, stop_at=3).train() == "asked"
    trainer = trainer_of(run, config)
    trainer.resume()
    assert trainer.train() == ""
    assert comparable(run) == comparable(whole)


def test_a_run_killed_within_an_epoch_resumes_from_its_last_timed_checkpoint(whole, tmp_path):
    run = make_run(tmp_path / "run", config_of(checkpoint_every="0.000001s"))
    trainer = trainer_of(run, run.config)

    def die_in_the_second_epoch(event):
        if event == MetaStepDone(7, 1):
            raise KeyboardInterrupt

    trainer.on_event = die_in_the_second_epoch
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer = trainer_of(run, run.config)
    trainer.resume()
    assert trainer.position.step == 6
    trainer.train()
    assert comparable(run) == comparable(whole), "neither the saves nor the kill change the results"


def test_metrics_after_the_checkpoint_are_dropped_when_a_killed_run_resumes(whole, tmp_path):
    run = make_run(tmp_path / "run", config_of())
    trainer_of(run, run.config, stop_at=2).train()
    run.append_metrics("validation", {"step": 9, "epoch": 2, "val_accuracy": 0.9, "val_tasks": 4})
    trainer = trainer_of(run, run.config)
    trainer.resume()
    trainer.train()
    assert comparable(run) == comparable(whole)


def test_metrics_contain_the_documented_fields(whole):
    metrics = whole.metrics()
    reports = [entry for entry in metrics if "val_accuracy" not in entry]
    validations = [entry for entry in metrics if "val_accuracy" in entry]
    assert [entry["step"] for entry in reports] == [1, 3, 4, 6, 8, 9, 12]
    assert [entry["epoch"] for entry in validations] == [1, 2, 3]
    expected = {"step", "epoch", "support_loss", "query_losses", "query_accuracy", "meta_lr", "first_order"}
    for entry in reports:
        assert expected | {"tasks_per_second"} <= entry.keys()
        assert len(entry["query_losses"]) == 4, "index = inner steps taken, 0 before adaptation"
        assert entry["query_accuracies"][-1] == entry["query_accuracy"]
    assert [entry["first_order"] for entry in reports] == [True] * 3 + [False] * 4
    assert all(entry["val_ci95"] >= 0 for entry in validations)


def test_a_report_is_the_mean_of_its_meta_steps(tmp_path):
    every, third = (
        config_of(report_every=number, da=False, epochs=1, steps_per_epoch=6) for number in (1, 3)
    )
    runs = [make_run(tmp_path / name, config) for name, config in (("every", every), ("third", third))]
    for run in runs:
        trainer_of(run, run.config).train()
    single, mean = ([entry for entry in run.metrics() if "support_loss" in entry] for run in runs)
    assert [entry["step"] for entry in mean] == [1, 3, 6]
    for name in ("support_loss", "meta_loss", "query_accuracy"):
        assert mean[2][name] == pytest.approx(np.mean([entry[name] for entry in single[3:6]]))


def test_the_five_best_checkpoints_and_best_pt_are_kept(tmp_path):
    run = make_run(tmp_path / "run", config_of(epochs=8, steps_per_epoch=1, inner_steps=2))
    events = []
    trainer = trainer_of(run, run.config, events=events)
    trainer.train()
    accuracy = {event.epoch: event.val_score for event in events if isinstance(event, ValidationDone)}
    best = sorted(accuracy, key=lambda epoch: (-accuracy[epoch], epoch))[:KEPT]
    names = {f"epoch-{epoch:04d}.pt" for epoch in best} | {"best.pt", "last.pt", "previous.pt"}
    assert {path.name for path in run.checkpoints.iterdir()} == names
    assert checkpoints.load(run.checkpoints / "best.pt", owner=run.owner)["epoch"] == best[0]


def test_a_kept_checkpoint_has_the_score_of_its_validation(whole):
    content = checkpoints.load(whole.checkpoints / "best.pt", owner=whole.owner)
    trainer = trainer_of(whole, whole.config)
    checkpoints.restore(trainer.state.stored(), content["stored"], whole.checkpoints / "best.pt")
    scores = evaluate(
        trainer.derivatives,
        [trainer.state],
        trainer.streams["val"],
        EvaluationPlan(10, 3, Statistics.OWN),
    )
    assert scores.single[0].last_T.mean() == pytest.approx(content["val_score"], abs=1e-12)
    assert np.array_equal(scores.ensemble.last_T, scores.single[0].last_T), (
        "an ensemble of one equals the model"
    )


def test_every_meta_step_sends_an_event_and_reports_follow_report_every(tmp_path):
    run = make_run(tmp_path / "run", config_of(epochs=1))
    events = []
    trainer_of(run, run.config, events=events).train()
    assert [event.step for event in events if isinstance(event, MetaStepDone)] == [1, 2, 3, 4]
    reports = [event for event in events if isinstance(event, TrainReport)]
    assert [event.step for event in reports] == [1, 3, 4]
    assert list(reports[0].rates) == [f"conv{block}.weight" for block in range(1, 5)] + [
        "linear.weight",
        "linear.bias",
    ]
    assert all(len(rates) == 3 for rates in reports[0].rates.values())


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_weights(tmp_path):
    config = config_of(inner_lr=1e200, first_order=True, da=False, inner_steps=3)
    run = make_run(tmp_path / "run", config)
    trainer = trainer_of(run, config)
    with pytest.raises(
        DivergedError, match=r"diverged at meta-step 1: the support loss after \d inner steps? is"
    ):
        trainer.train()
    stored = checkpoints.load(run.checkpoints / "last.pt", owner=run.owner)["stored"]
    assert all(bool(tensor.isfinite().all()) for tensor in stored.values())
    assert all(bool(tensor.isfinite().all()) for tensor in trainer.state.stored().values())


def test_predictions_that_are_not_finite_raise_diverged_error(tmp_path):
    run = make_run(tmp_path / "run", config_of(epochs=1, steps_per_epoch=1, meta_lr=1e200))
    with pytest.raises(DivergedError, match="predictions in tasks 0 to 9 are not finite"):
        trainer_of(run, run.config).train()
    assert [path.name for path in run.checkpoints.iterdir()] == ["last.pt"]
    assert checkpoints.load(run.checkpoints / "last.pt", owner=run.owner)["position"]["step"] == 0


@pytest.mark.parametrize(("device", "saved"), [("cpu", True), ("cuda", False)])
def test_a_validation_saves_only_weights_whose_predictions_have_been_checked(tmp_path, device, saved):
    run = make_run(tmp_path / "run", config_of())
    trainer = trainer_of(run, run.config)
    trainer.device = torch.device(device)  # on CUDA, predictions are checked at the end
    trainer._validated_some(2)
    assert trainer.last.is_file() == saved


def test_every_start_advances_despite_a_time_limit(tmp_path):
    run = make_run(tmp_path / "run", config_of())
    starts = 0
    reason = "time limit"
    while reason:
        trainer = trainer_of(run, run.config)
        trainer.stop_reason = lambda: "time limit"
        if starts:
            trainer.resume()
        reason, starts = trainer.train(), starts + 1
    assert starts == 12 + 3, "one meta-step or validation per start"


@pytest.mark.parametrize("harm", ["truncate", "flip", "format", "foreign", "garbage", "shape", "owner"])
def test_damaged_checkpoints_raise_an_error_with_a_hint(whole, tmp_path, harm):
    source = (whole.checkpoints / "last.pt").read_bytes()
    path = tmp_path / "last.pt"
    if harm == "truncate":
        path.write_bytes(source[: len(source) // 2])
    elif harm == "garbage":
        path.write_bytes(b"<html>quota exceeded</html>")
    elif harm == "foreign":
        torch.save({"state_dict": {}}, path)
    else:
        stored = torch.load(whole.checkpoints / "last.pt", weights_only=True)
        if harm == "format":
            stored["format"] = 99
        elif harm == "flip":
            stored["content"]["stored"]["conv1.weight"][0] += 1e-9
        torch.save(stored, path)
    if harm == "shape":
        _, state = build(config_of(filters=5), (1, 16, 16), CPU)
        with pytest.raises(MamlctlError, match="does not fit the run's settings"):
            checkpoints.restore(state.stored(), checkpoints.load(path, owner=whole.owner)["stored"], path)
        return
    with pytest.raises(MamlctlError, match=r"checkpoint .*last.pt") as caught:
        checkpoints.load(path, owner="another" if harm == "owner" else whole.owner)
    assert caught.value.hint


def with_itself(content):
    content["position"]["top"].append(content["position"]["top"])


def with_other_weights(content, name, tensor):
    content["stored"][name] = tensor


FORGERIES = {
    "a string for a number": lambda content: content["position"].update(step="12"),
    "a number for tensors": lambda content: content.update(stored=3),
    "a number for a tensor": lambda content: with_other_weights(content, "conv1.weight", 3.0),
    "a name that is a number": lambda content: with_other_weights(content, 3, torch.zeros(1)),
    "a missing part": lambda content: content.pop("period"),
    "a missing moment": lambda content: content["optimizer"]["first"].popitem(),
    "sums of another shape": lambda content: content["period"].update(sums=torch.zeros(1)),
    "whole numbers for weights": lambda content: with_other_weights(
        content, "linear.bias", content["stored"]["linear.bias"].long()
    ),
    "a list that contains itself": with_itself,
    "an entry without a score": lambda content: content["position"]["top"].append([1.0]),
    "an epoch after the last one": lambda content: content["position"].update(top=[[9.0, 0.5, 0.1]]),
    "an epoch that is not a number": lambda content: content["position"].update(top=[[np.nan, 0.5, 0.1]]),
    "a step after the last one": lambda content: content["position"].update(step=10**18),
    "an expanded tensor": lambda content: with_other_weights(
        content, "linear.bias", torch.zeros(1).expand(10**12)
    ),
    "tensors of one storage": lambda content: content["stored"].update(
        dict.fromkeys(map(str, range(10**4)), torch.zeros(10**4))
    ),
    "a sparse tensor": lambda content: with_other_weights(content, "linear.bias", torch.eye(3).to_sparse()),
    "bytes of any length": lambda content: content.update(stored=bytearray(100)),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES)
def test_forged_checkpoints_raise_an_error_with_a_hint(whole, tmp_path, monkeypatch, forge):
    run = make_run(tmp_path / "run", config_of())
    content = checkpoints.load(whole.checkpoints / "last.pt", owner=whole.owner)
    forge(content)
    monkeypatch.setattr(checkpoints, "_digest", lambda content: "the same")
    checkpoints.save(run.checkpoints / "last.pt", content, owner=run.owner)
    with pytest.raises(MamlctlError, match=r"checkpoint .*last.pt") as caught:
        trainer_of(run, run.config).resume()
    assert caught.value.hint


@pytest.mark.parametrize(
    ("forge", "reason"),
    [
        ("compressed", "compressed"),
        ("larger than its storage", "bytes, but its tensors would take 8,796,093,0"),
        ("a huge pickle", "its pickle has [0-9,]+ bytes, more than the limit of 16,777,216"),
        ("not aligned", "its tensors have no alignment"),
    ],
)
def test_a_forged_archive_cannot_allocate_memory_or_crash(whole, tmp_path, forge, reason):
    path = tmp_path / "last.pt"
    with zipfile.ZipFile(whole.checkpoints / "last.pt") as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            data = source.read(entry)
            if forge == "compressed":
                entry.compress_type = zipfile.ZIP_DEFLATED
            elif forge == "not aligned" and entry.filename.endswith(".storage_alignment"):
                data = b"0"
            elif forge == "a huge pickle" and entry.filename.endswith("data.pkl"):
                data += bytes(2**24)
            elif forge == "larger than its storage" and entry.filename.endswith("data.pkl"):
                # In the pickle of a one-dimensional tensor: its offset, its size and its stride.
                data = data.replace(b"K\x00K\x03\x85", b"K\x00\x8a\x06" + bytes(5) + b"\x01\x85", 1)
                assert data != source.read(entry)
            target.writestr(entry, data)
    with pytest.raises(MamlctlError, match=reason):
        checkpoints.load(path, owner=whole.owner)


@pytest.mark.parametrize("harm", ["truncate", "remove"])
def test_a_run_without_a_whole_last_checkpoint_resumes_from_the_one_before_it(whole, tmp_path, harm):
    run, events = make_run(tmp_path / "run", config_of()), []
    for stop_at in (2, 1):
        trainer = trainer_of(run, run.config, stop_at=stop_at)
        if stop_at == 1:
            trainer.resume()
        trainer.train()
    if harm == "truncate":
        trainer.last.write_bytes(trainer.last.read_bytes()[:1000])
    else:
        trainer.last.unlink()
    trainer = trainer_of(run, run.config, events=events)
    trainer.resume()
    assert trainer.position.step == 2
    assert "resuming from previous.pt, which is from meta-step 2" in events[0].text
    assert [path.name for path in run.checkpoints.iterdir()] == ["last.pt"], "no damaged file remains"
    trainer.train()
    assert comparable(run) == comparable(whole)


def test_a_lack_of_memory_is_not_taken_for_damage(whole, monkeypatch):
    def fail(*arguments, **named):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(RuntimeError, match="allocate memory"):
        trainer_of(whole, whole.config).resume()


def test_the_error_is_about_the_last_checkpoint_if_both_are_damaged(whole, tmp_path):
    run = make_run(tmp_path / "run", config_of())
    trainer = trainer_of(run, run.config, stop_at=2)
    trainer.train()
    for name in ("last.pt", "previous.pt"):
        (run.checkpoints / name).write_bytes(b"")
    with pytest.raises(MamlctlError, match=r"last.pt cannot be read"):
        trainer_of(run, run.config).resume()


def test_the_previous_checkpoint_is_kept_without_hard_links(tmp_path, monkeypatch):
    def fail(*arguments):
        raise PermissionError

    monkeypatch.setattr(Path, "hardlink_to", fail)
    run = make_run(tmp_path / "run", config_of())
    trainer_of(run, run.config, stop_at=2).train()
    steps = [
        checkpoints.load(run.checkpoints / name, owner=run.owner)["position"]["step"]
        for name in ("previous.pt", "last.pt")
    ]
    assert steps == [0, 2]


def test_the_run_folder_opens_with_its_settings(whole):
    assert open_run(whole.path).config == whole.config


def test_an_evaluation_that_runs_out_of_memory_continues_with_fewer_tasks(whole):
    trainer = trainer_of(whole, whole.config)
    chunks = []

    def small_device(request):
        chunks.append(len(request.episodes.query_y_TE))
        if chunks[-1] > 3:
            raise torch.OutOfMemoryError("no room")
        return real(request)

    real = adapted
    plan = EvaluationPlan(10, 3, Statistics.OWN)
    models = trainer.derivatives, [trainer.state], trainer.streams["val"]
    at_once = evaluate(*models, plan)
    chunked = evaluate(*models, replace(plan, predict=small_device))
    assert np.array_equal(chunked.ensemble.last_T, at_once.ensemble.last_T)
    assert chunks == [10, 5, 3, 3, 3, 1]
