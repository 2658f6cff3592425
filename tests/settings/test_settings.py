"""Settings: precedence, problems, derived values and presets."""

from dataclasses import asdict
from pathlib import Path

import pytest

from mamlctl.core.errors import SettingsError
from mamlctl.engine.algorithms.registry import ALGORITHMS
from mamlctl.engine.algorithms.rules import algorithm_problems
from mamlctl.experiments.settings import resolve_settings
from mamlctl.settings.merge import fill_schedules, stored_settings
from mamlctl.settings.presets import load_file, load_preset, parse_sets, preset_names, to_yaml
from mamlctl.settings.rules import COMPANIONS, check
from mamlctl.settings.schema import FIELDS, IMPROVEMENTS, TrainConfig


def resolved(*layers):
    return resolve_settings(layers)


def problems_of(*layers):
    with pytest.raises(SettingsError) as caught:
        resolved(*layers)
    return [fact for fact, _ in caught.value.problems]


def test_stronger_layers_override_weaker_ones_and_are_recorded():
    settings = resolved(
        ("preset p", {"algo": "maml++", "ways": 7, "shots": 2, "queries": 3}),
        ("f.yaml", {"shots": 3, "queries": 4}),
        ("--set", {"queries": 5}),
        ("flag", {"lslr": False}),
    )
    config = settings.config
    assert (config.ways, config.shots, config.queries, config.lslr, config.msl) == (7, 3, 5, False, True)
    sources = {"ways": "preset p", "shots": "f.yaml", "queries": "--set", "lslr": "flag"}
    assert {name: settings.sources[name] for name in sources} == sources
    assert settings.sources["msl"] == "algorithm maml++"
    assert settings.sources["filters"] == "default"


def test_the_algorithm_may_come_from_any_layer():
    config = resolved(("preset p", {"algo": "maml++"}), ("flag", {"algo": "fomaml"})).config
    assert config.first_order
    assert config.improvements == ()


def test_all_problems_are_reported_at_once():
    facts = problems_of(
        ("f.yaml", {"wyas": 5, "shots": "many"}), ("flag", {"queries": 0, "algo": "mamal", "da_epochs": 3})
    )
    assert any("unknown setting 'wyas' in f.yaml" in fact for fact in facts)
    assert any("shots is 'many'" in fact for fact in facts)
    assert any("--queries is 0" in fact for fact in facts)
    assert any("unknown algorithm 'mamal'" in fact for fact in facts)
    assert any("--da-epochs has no effect without --da" in fact for fact in facts)
    assert len(facts) == 5


def test_errors_for_unknown_names_suggest_the_nearest_name():
    with pytest.raises(SettingsError) as caught:
        resolved(("--set", {"inner_step": 3}))
    assert caught.value.hint == "did you mean 'inner_steps'?"
    with pytest.raises(SettingsError, match="unknown preset") as caught:
        load_preset("omniglot-20w1s-mamlpp")
    assert "omniglot-20w1s-maml" in caught.value.hint


@pytest.mark.parametrize(
    ("settings", "fact"),
    [
        ({"msl": True, "inner_steps": 1}, "--msl needs 2 inner steps or more, but --inner-steps is 1"),
        ({"da": True, "first_order": True}, "--da has no effect with --first-order"),
        ({"clip_value": 1.0, "clip_norm": 1.0}, "both given"),
        ({"ca": True, "min_meta_lr": 1.0}, "is above --meta-lr"),
        ({"da": True, "da_epochs": 101}, "is more than --epochs 100"),
        ({"body_epochs": 100}, "--body-epochs 100 leaves no epoch of 100 for the inner loop"),
        ({"body_epochs": 2, "adapts": "body"}, "--body-epochs has no effect with --adapts body"),
        ({"ways": 1}, "--ways is 1, but the minimum is 2"),
        ({"inner_lr": 0.0}, "must be above 0"),
        ({"inner_lr": float("nan")}, "not a finite number"),
        ({"adam_beta1": 1.0}, "must be below 1"),
        ({"meta_lr": 1e39}, "must be below 1e+38"),
        ({"seed": 2**64}, "must be below"),
        ({"meta_batch_size": 10**8}, "must be below 100001"),
        ({"bn": "transduktive"}, "is not one of transductive, running, support"),
        ({"msl_epochs": 5}, "--msl-epochs has no effect without --msl"),
        ({"min_meta_lr": 1e-5}, "--min-meta-lr has no effect without --ca"),
    ],
)
def test_settings_that_break_a_rule_are_refused(settings, fact):
    ((problem, _),) = check(TrainConfig(**settings))
    assert fact in problem


def test_companions_in_a_preset_are_dropped_when_a_flag_turns_off_their_improvement():
    config = resolved(("preset p", {"algo": "maml++", "msl_epochs": 9}), ("flag", {"msl": False})).config
    assert config.msl_epochs is None
    problems_of(("preset p", {"algo": "maml++"}), ("flag", {"msl": False, "msl_epochs": 9}))


def test_short_runs_keep_the_shape_of_the_published_schedules():
    on = dict.fromkeys(IMPROVEMENTS, True)
    assert fill_schedules(TrainConfig(epochs=100, **on), {}).msl_epochs == 10
    assert fill_schedules(TrainConfig(epochs=150, **on), {}).da_epochs == 50
    short = fill_schedules(
        TrainConfig(epochs=3, meta_lr=0.01, seed=4, inner_steps=7, **on), {"resize": "box"}
    )
    assert (short.msl_epochs, short.da_epochs, short.min_meta_lr) == (1, 1, pytest.approx(1e-4))
    assert (short.init_seed, short.train_seed, short.eval_inner_steps, short.resize) == (4, 4, 7, "box")
    plain = fill_schedules(TrainConfig(), {"resize": "box"})
    assert (plain.msl_epochs, plain.da_epochs, plain.min_meta_lr) == (None, None, None)


@pytest.mark.parametrize("name", IMPROVEMENTS)
def test_a_single_improvement_derives_only_its_own_companions(name):
    filled = fill_schedules(TrainConfig(**{name: True}), {})
    derived = {companion for companion in COMPANIONS if getattr(filled, companion) is not None}
    assert derived == set(IMPROVEMENTS[name].companions)


def test_a_written_configuration_reads_back_unchanged(tmp_path):
    config = TrainConfig(algo="maml++", **dict.fromkeys(IMPROVEMENTS, True))
    completed = fill_schedules(config, {"resize": "box"})
    text = to_yaml(config, completed)
    assert "msl_epochs: null  # derived: 10\n" in text
    (tmp_path / "config.yaml").write_text(text)
    assert stored_settings("file", load_file(tmp_path / "config.yaml")) == config


def test_a_new_seed_or_epoch_count_changes_the_derived_settings_of_a_stored_file(tmp_path):
    config = TrainConfig(algo="maml++", **dict.fromkeys(IMPROVEMENTS, True))
    (tmp_path / "config.yaml").write_text(to_yaml(config, fill_schedules(config, {})))
    again = resolved(("file", load_file(tmp_path / "config.yaml")), ("flag", {"seed": 3, "epochs": 20}))
    completed = fill_schedules(again.config, {})
    assert (completed.init_seed, completed.train_seed, completed.msl_epochs, completed.da_epochs) == (
        3,
        3,
        2,
        7,
    )


def test_fomaml_cannot_be_made_second_order():
    facts = [fact for fact, _ in algorithm_problems(TrainConfig(algo="fomaml", first_order=False))]
    assert facts == ["--first-order is False, but --algo fomaml requires True"]
    assert not algorithm_problems(TrainConfig(algo="maml", first_order=True))


@pytest.mark.parametrize("text", ["a: [1\nb: }", "- 1", "7", "\x00", "", "a: [*b]", "a: &a [*a]"])
def test_files_that_are_not_settings_are_refused(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError):
        load_file(path)
    with pytest.raises(SettingsError):
        load_file(tmp_path / "absent.yaml")


@pytest.mark.parametrize("text", ["[" * 3000, "ways: " + 5000 * "9", "ways: !!bool x", "ways: !!timestamp x"])
def test_values_that_the_yaml_library_cannot_read_are_refused(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(SettingsError, match=r"x\.yaml is not YAML: "):
        load_file(tmp_path / "x.yaml")
    with pytest.raises(SettingsError, match=r"^--set "):
        parse_sets([f"algo={text.removeprefix('ways: ')}"])


def test_an_endless_file_is_refused():
    with pytest.raises(SettingsError, match="/dev/zero has more than 100,000 characters"):
        load_file(Path("/dev/zero"))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("ways: 5\nshots: 1\nways: 20\n", "line 3: found duplicate key ways"),
        ("ways: 5\n\tshots: 1\n", "line 2: found a tab character"),
    ],
)
def test_a_file_that_is_not_yaml_is_refused_with_the_line(tmp_path, text, problem):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(SettingsError, match=f"x.yaml is not YAML: {problem}"):
        load_file(tmp_path / "x.yaml")


@pytest.mark.parametrize("value", ["${oc.env:SECRET}", "x/${algo}", "???"])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("data_root", ", but OmegaConf's placeholders are not filled in"),
        ("ways", ", which is not a whole number"),
    ],
)
def test_placeholders_are_refused_and_not_filled_in(tmp_path, monkeypatch, name, why, value):
    monkeypatch.setenv("SECRET", "7")
    (tmp_path / "x.yaml").write_text(f"{name}: {value}\n")
    for layer in (("x.yaml", load_file(tmp_path / "x.yaml")), ("--set", parse_sets([f"{name}={value}"]))):
        assert problems_of(layer) == [f"{name} is '{value}' in {layer[0]}{why}"]
    stored = asdict(TrainConfig()) | load_file(tmp_path / "x.yaml")
    with pytest.raises(SettingsError, match=f"{why}$"):
        stored_settings("config.yaml", stored)


def test_a_number_that_no_float_can_represent_is_refused():
    assert problems_of(("flag", {"inner_lr": 10**400})) == [
        f"inner_lr is {10**400} on the command line, which is not a number"
    ]


def test_a_data_set_whose_path_is_not_utf8_is_refused():
    assert problems_of(("flag", {"dataset": "p\udce9"})) == [
        "dataset is 'p\\udce9' on the command line, which is not UTF-8"
    ]


def test_values_of_set_are_parsed_as_yaml():
    assert parse_sets(["ways=7", "inner_lr=1e-2", "msl=false", "clip_norm=null"]) == {
        "ways": 7,
        "inner_lr": 0.01,
        "msl": False,
        "clip_norm": None,
    }
    with pytest.raises(SettingsError, match="has no '='"):
        parse_sets(["ways"])
    with pytest.raises(SettingsError):
        parse_sets(["ways=[1"])


PUBLISHED_STEPS = {
    **{f"omniglot-{w}w{s}s-{a}": 75_000 for w in (5, 20) for s in (1, 5) for a in ("maml", "maml++")},
    **{f"omniglot-{w}w{s}s-reptile": n for w, n in ((5, 100_000), (20, 200_000)) for s in (1, 5)},
    **{f"omniglot-5w{s}s-mlp-maml": 60_000 for s in (1, 5)},
    "omniglot-5w1s-imaml": 20_000,
    "sinusoid-10s-maml": 70_000,
    **{f"mini-imagenet-5w{shots}s-{algo}": 75_000 for shots in (1, 5) for algo in ("maml", "maml++")},
}


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_matches_its_name(name):
    config = resolved((f"preset {name}", load_preset(name))).config
    if name == "demo":
        assert config.dataset == "glyphs"
        return
    if config.dataset == "navigation":
        assert (name, config.total_steps) == (f"navigation-{config.shots}s-{config.algo}", 100)
        return
    folder, _, row = name.rpartition("/")
    curves = config.dataset == "sinusoid"
    ways = "" if curves else f"{config.ways}w"
    net = "mlp-" if config.net == "mlp" and not curves else ""
    assert row == f"{config.dataset}-{ways}{config.shots}s-{net}{config.algo}"
    if folder == "fast":
        assert config.total_steps < 50_000
        return
    steps = 30_000 if curves else 50_000
    assert config.total_steps == (PUBLISHED_STEPS[row] if folder == "paper" else steps)


def test_every_published_task_has_its_presets():
    tasks = [f"omniglot-{w}w{s}s" for w in (5, 20) for s in (1, 5)]
    tasks += [f"mini-imagenet-5w{s}s" for s in (1, 5)]
    rows = [f"{task}-{algo}" for task in tasks for algo in ("maml", "maml++")]
    assert {f"{folder}{row}" for row in rows for folder in ("", "paper/", "official/")} < set(preset_names())


def test_official_presets_have_the_settings_of_the_published_code():
    config = resolved(("preset", load_preset("official/omniglot-20w1s-maml++"))).config
    assert config.improvements == ("msl", "bnrs", "bnwb", "lslr", "ca"), "derivative-order annealing is off"
    assert (config.msl_epochs, config.min_meta_lr, config.meta_batch_size) == (10, 1e-5, 8)
    assert (config.ink, config.resize, config.rotations) == (0, "nearest", "augment")
    assert resolved(("preset", load_preset("official/omniglot-5w1s-maml"))).config.improvements == ("ca",)
    config = resolved(("preset", load_preset("official/mini-imagenet-5w1s-maml++"))).config
    assert config.improvements == ("msl", "bnrs", "bnwb", "lslr"), "both annealings are off"
    assert (config.msl_epochs, config.inner_lr, config.clip_value, config.meta_batch_size) == (
        15,
        0.1,
        10.0,
        2,
    )
    assert (config.filters, config.queries, config.normalize) == (48, 15, "imagenet")


def test_every_setting_has_help_and_a_panel():
    for item in FIELDS.values():
        assert item.metadata["help"].endswith("."), item.name
        assert item.metadata["panel"] in {
            "Episode",
            "Network",
            "Inner loop",
            "Meta-optimiser",
            "Reinforcement learning",
            "MAML++",
            "Hardware",
            "Output",
        }


REFUSED = [
    ({"algo": "reptile", "msl": True}, "--msl has no effect with --algo reptile"),
    ({"algo": "protonet", "inner_steps": 3}, "--inner-steps is 3, but --algo protonet requires 0"),
    ({"algo": "protonet", "inner_lr": 0.3}, "--inner-lr has no effect with --algo protonet"),
    ({"algo": "anil", "adapts": "all"}, "--adapts is all, but --algo anil requires head"),
    ({"algo": "anil", "bnwb": True}, "--bnwb has no effect with --algo anil: the body runs once"),
    ({"algo": "meta-sgd", "lslr": True}, "--lslr has no effect with --algo meta-sgd: it learns a rate"),
    ({"algo": "alpha-maml", "ca": True}, "--ca has no effect with --algo alpha-maml"),
    ({"algo": "imaml", "da": True}, "--da has no effect with --algo imaml"),
    ({"algo": "maml", "cg_steps": 3}, "--cg-steps has no effect with --algo maml"),
    ({"algo": "maml", "inner_batch": 3}, "--inner-batch has no effect with --algo maml"),
    ({"algo": "maml", "inner_steps": 0}, "--inner-steps is 0, but maml adapts in training"),
    ({"algo": "transfer", "task_chunk": "2"}, "--task-chunk has no effect with --algo transfer"),
    ({"algo": "scratch", "epochs": 4}, "--epochs is 4, but --algo scratch requires 1"),
    ({"algo": "reptile", "cuda_graph": True}, "--cuda-graph is not available with --algo reptile"),
    ({"algo": "maml", "ca": True, "meta_lr_final": 0.1}, "--meta-lr-final and --ca both"),
    ({"dataset": "sinusoid", "ways": 5}, "--ways has no meaning: sinusoid has no classes"),
    ({"dataset": "sinusoid", "net": "conv4"}, "--net conv4 needs images"),
    ({"dataset": "sinusoid", "algo": "protonet"}, "--algo protonet needs classes"),
    ({"dataset": "sinusoid", "bnwb": True}, "--bnwb has no meaning: sinusoid is learnt without"),
    ({"algo": "transfer", "adapts": "body"}, "--adapts body does nothing with --algo transfer"),
    ({"algo": "reptile", "shots": 15}, "--train-shots 10 is below --shots 15"),
    ({"algo": "transfer", "inner_steps": 2}, "--inner-steps is 2, but --algo transfer requires 0"),
    ({"net": "mlp", "filters": 8}, "--filters has no effect with --net mlp"),
    ({"net": "mlp", "precision": "bf16"}, "--precision bf16 has no effect"),
    ({"net": "resnet12", "pooling": "max"}, "--pooling has no effect with --net resnet12"),
    ({"net": "mlp", "hidden": "40-x"}, "--hidden is '40-x'"),
]


def test_hints_for_what_an_algorithm_switches_on_name_flags_that_switch_it_off():
    """MAML++ has --da and --ca, which the user need not have written."""
    for given, flags in (
        ({"first_order": True}, "--no-da or --no-first-order"),
        ({"meta_lr_final": 1e-4}, "--no-ca, or leave out --meta-lr-final"),
        ({"da_epochs": 200}, "--da-epochs 100, or --no-da and --first-order"),
    ):
        with pytest.raises(SettingsError) as caught:
            resolved(("flag", {"algo": "maml++", **given}))
        assert caught.value.hint == f"use {flags}"
    with pytest.raises(SettingsError) as caught:
        resolved(("flag", {"dataset": "navigation", "loss": "huber"}))
    assert caught.value.message.startswith("--loss has no meaning") and caught.value.hint == "leave it out"


@pytest.mark.parametrize(("given", "fact"), REFUSED, ids=lambda value: str(value)[:40])
def test_meaningless_settings_are_refused_with_a_reason(given, fact):
    assert any(problem.startswith(fact) for problem in problems_of(("flag", given)))


def test_settings_that_another_algorithm_fixes_override_a_preset():
    """One preset of data and budget thus works for every algorithm."""
    preset = {"algo": "maml++", "inner_steps": 5, "inner_lr": 0.4, "msl": True, "epochs": 7}
    config = resolved(("preset p", preset), ("flag", {"algo": "protonet"})).config
    assert (config.inner_steps, config.msl, config.epochs) == (0, False, 7)
    assert config.inner_lr == TrainConfig.inner_lr


def test_curves_have_defaults_that_an_algorithm_overrides():
    config = resolved(("flag", {"dataset": "sinusoid"})).config
    assert (config.algo, config.net, config.inner_lr, config.meta_batch_size) == ("maml", "mlp", 0.01, 25)
    config = resolved(("flag", {"dataset": "sinusoid", "algo": "reptile"})).config
    assert (config.inner_lr, config.meta_batch_size, config.net) == (0.001, 5, "mlp")


def test_settings_that_an_algorithm_needs_cannot_be_removed():
    facts = problems_of(("preset p", {"algo": "reptile"}), ("--set", {"inner_optimizer": None}))
    assert facts == ["--algo reptile needs --inner-optimizer"]


OF_IMAGES = sorted(name for name, entry in ALGORITHMS.items() if not entry.needs_rewards)


@pytest.mark.parametrize("new", OF_IMAGES)
@pytest.mark.parametrize("old", OF_IMAGES)
def test_a_settings_file_of_one_algorithm_leaves_no_trace_with_another(old, new):
    """`--config RUN/config.yaml --algo NEW` drops every setting that belongs to the old algorithm."""
    written = asdict(resolved(("flag", {"algo": old, "ways": 7})).config)
    config = resolved(("config.yaml", written), ("flag", {"algo": new})).config
    assert config == resolved(("flag", {"algo": new, "ways": 7})).config


def test_maml_plus_plus_on_curves_has_no_batch_norm_improvements():
    config = resolved(("flag", {"dataset": "sinusoid", "algo": "maml++", "inner_steps": 3})).config
    assert config.improvements == ("msl", "da", "lslr", "ca")
    flags = {"dataset": "sinusoid", "algo": "maml++", "inner_steps": 3, "bnrs": False, "bnwb": False}
    assert resolved(("flag", flags)).config == config


def test_cosine_annealing_replaces_the_linear_schedule_of_reptile():
    assert resolved(("flag", {"algo": "reptile", "ca": True})).config.meta_lr_final is None


def test_image_settings_in_a_preset_are_dropped_for_another_data_set():
    config = resolved(
        ("preset p", load_preset("omniglot-5w1s-maml++")), ("flag", {"dataset": "mini-imagenet"})
    )
    assert (config.config.ink, config.config.rotations, config.config.resize) == (None, None, None)
    preset = load_preset("paper/mini-imagenet-5w1s-maml++")
    assert resolved(("preset p", preset), ("flag", {"dataset": "omniglot"})).config.normalize is None
    assert resolved(("preset p", preset), ("flag", {"channels": 1})).config.normalize is None
