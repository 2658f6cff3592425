"""The attack itself: it repeats trials by their seed, and does not count what it could not try."""

import json
import signal
from dataclasses import fields
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
from faults import effects, readers
from faults.commands import Ended
from faults.damage import allowed, damage, outcome, same_models
from faults.trials import Fault, Row, Skipped, attack, table

from mamlctl.core.errors import MamlctlError
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.schema import TrainConfig

MODELS = [{"epochs": [2], "accuracy": 0.5}, {"epochs": [2, 1], "accuracy": 0.6}]


@pytest.fixture
def undisturbed(tmp_path):
    """Only the folder, which is all that `attack` itself uses."""
    return SimpleNamespace(folder=tmp_path)


def odd(undisturbed, random, folder):
    """Lose something if the first random number is odd."""
    assert folder.is_dir()
    yield ""
    yield "lost" if random.getrandbits(32) % 2 else ""


def test_a_trial_is_repeated_by_its_seed(undisturbed):
    row = attack(Fault("odd", odd), undisturbed, seed=5, seconds=0, trials=20)
    assert row.tried == 40
    assert 0 < len(row.lost) < 20
    seed, _ = row.lost[0]
    assert attack(Fault("odd", odd), undisturbed, seed=seed, seconds=0, trials=1).lost == [(seed, "lost")]
    assert not list(undisturbed.folder.iterdir())


def test_a_fault_is_tried_at_least_once(undisturbed):
    assert attack(Fault("odd", odd), undisturbed, seed=5, seconds=0).tried >= 2


def test_a_trial_that_fails_counts_as_a_loss(undisturbed):
    def broken(undisturbed, random, folder):
        raise KeyError("results")
        yield

    row = attack(Fault("broken", broken), undisturbed, seed=0, seconds=0, trials=1)
    assert (row.tried, row.lost) == (1, [(0, "KeyError: 'results'")])


def test_a_skipped_fault_gives_its_reason_and_does_not_fail(undisturbed):
    def forbidden(undisturbed, random, folder):
        raise Skipped("mounting is forbidden")
        yield

    row = attack(Fault("full disk", forbidden), undisturbed, seed=0, seconds=0)
    assert not row.failed
    assert "| full disk | skipped: mounting is forbidden |  |" in table([row])


def test_the_table_shows_what_was_lost_before_a_fault_was_skipped():
    row = Row("full disk", 3, [(0, "a run"), (2, "a run")], "no more mounts")
    assert row.failed
    assert "| full disk | 3, then skipped: no more mounts | 2 |" in table([row])


def test_a_folder_that_an_earlier_fault_left_behind_changes_nothing(undisturbed):
    (undisturbed.folder / "trial-5").mkdir()
    assert attack(Fault("odd", odd), undisturbed, seed=5, seconds=0, trials=2).tried == 4


def test_losses_and_untried_faults_fail():
    assert Row("untried").failed
    assert Row("lost", 3, [(0, "a run")]).failed
    assert not Row("held", 3).failed


def test_damage_changes_a_file_in_the_same_way_for_the_same_seed(tmp_path):
    path, results = tmp_path / "file", set()
    for _ in range(2):
        path.write_bytes(bytes(1000))
        results.add((damage(path, Random(3)), path.read_bytes()))
    assert len(results) == 1
    assert path.read_bytes() != bytes(1000)


def test_a_command_may_only_fail_without_a_file_that_nothing_replaces():
    failed = Ended(("eval",), 1, "", "error: damaged")
    for name in ("checkpoints/last.pt", "checkpoints/best.pt", "checkpoints/epoch-0001.pt", "metrics.jsonl"):
        assert "exit code 1" in outcome("cut", failed, False, allowed(Path(name)))
    assert outcome("cut", failed, False, allowed(Path("config.yaml"))) == ""


def test_only_the_ensemble_may_lack_a_damaged_checkpoint():
    def same(name, best, ensemble, note="epoch-0001.pt cannot be read: using epoch-0002.pt"):
        out = json.dumps({"notes": [note], "results": [best, ensemble]})
        return same_models(Ended(("eval",), 0, out, ""), SimpleNamespace(numbers=MODELS), Path(name))

    best, ensemble = MODELS
    alone = {"epochs": [2], "accuracy": 0.5}
    assert same("epoch-0001.pt", best, ensemble)
    assert same("epoch-0001.pt", best, alone)
    assert not same("epoch-0001.pt", best, alone, "with checkpoint last.pt")
    assert not same("epoch-0001.pt", best | {"accuracy": 0.4}, alone)
    assert not same("epoch-0001.pt", best, ensemble | {"accuracy": 0.4})
    assert not same("last.pt", best, alone, "last.pt cannot be read: using epoch-0002.pt")


def test_a_slow_file_is_a_loss_even_if_the_reader_handles_all_errors(tmp_path, monkeypatch):
    def read(path):
        try:
            signal.raise_signal(signal.SIGALRM)
        except Exception as error:
            raise MamlctlError("the file cannot be read", hint="use another one") from error

    monkeypatch.setitem(readers.READERS, "yaml", readers.Reader(lambda: [b"ways: 5"], read))
    monkeypatch.setattr(readers, "FILES", 1)
    before = signal.getsignal(signal.SIGALRM)
    try:
        (lost,) = readers.losses("yaml", 0, tmp_path / "file.yaml")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert "a file takes more than 20 s" in lost


def test_every_setting_must_have_an_effect_or_a_reason():
    for config_type in (TrainConfig, EvalConfig):
        names = {item.name for item in fields(config_type) if item.metadata["decides"]}
        tried = {item.name for item in effects.must_matter(config_type, effects.NO_EFFECT)}
        assert tried == names - effects.NO_EFFECT.keys()
        for item in fields(config_type):
            if item.name in tried:
                base = effects.BASES.get(item.name, effects.MAML) if config_type is TrainConfig else []
                found = effects.values(item, config_type, base)
                assert found, item.name
                assert not {f"--{item.name.replace('_', '-')}={value}" for value in found} & {*base}
    assert effects.NO_EFFECT.keys() <= {item.name for item in fields(TrainConfig)}


def test_a_setting_is_lost_without_an_effect_or_without_an_accepted_value():
    def tries(*pairs):
        return iter([(Ended(("train",), code, "", "error: no"), same) for code, same in pairs])

    assert effects.lost("x", tries((2, False), (0, False), (0, True))) == ""
    assert effects.lost("x", tries((2, False), (0, True))) == "x has no effect (train)"
    assert effects.lost("x", tries((2, True))) == "no value of x is accepted: error: no"
    assert effects.lost("x", tries()) == "no value of x is accepted: there is none"
    assert "exit code 1" in effects.lost("x", tries((1, False)))
