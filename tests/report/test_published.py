"""Published numbers equal the reference, keep its marks, and are found by their learner."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers.table_cases import LETTERS, learner

from mamlctl.experiments.grid.build_table import _published_scores
from mamlctl.experiments.settings import resolve_settings
from mamlctl.report.published import FILE, entries, published
from mamlctl.settings.evaluation import EvalConfig
from mamlctl.settings.schema import IMPROVEMENTS

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT.parent / "shared" / "reference" / "published.yaml"
ONE_ON = ["maml", *(f"maml + {letters}" for letters in ("msl", "lslr", "bnrs + bnwb", "ca", "da"))]
LABELS = [*ONE_ON, "maml++", "fomaml", "reptile", "meta-sgd", "anil", "imaml", "transfer", "nearest"]
NAMES = {"nearest neighbour": "nearest", "pre-trained on all tasks": "transfer"}
EVERY = [
    (dataset, source, row)
    for dataset, sources in entries().items()
    for source in sources
    for row in source["rows"]
]


def name(case):
    dataset, source, row = case
    return f"{dataset}-{source.get('ways', 1)}w{source['shots']}s-{source['paper'][:8]}-{row['row']}"


@pytest.mark.parametrize("case", EVERY, ids=name)
def test_every_published_number_is_found_by_exactly_one_label_and_unchanged(case):
    dataset, source, row = case
    ways = source.get("ways", 1)
    found = {
        label: [
            entry
            for entry in published(dataset, ways, source["shots"], *learner(label))
            if (entry.source, entry.row) == (source["paper"], row["row"])
        ]
        for label in LABELS
    }
    (entry,) = [entry for entries_ in found.values() for entry in entries_]
    assert entry.metric == ("accuracy" if "acc" in row else "mse")
    scale = 100 if "acc" in row else 1
    assert round(scale * entry.score, 4) == row["acc" if "acc" in row else "mse"]
    assert (None if entry.half_width is None else round(scale * entry.half_width, 4)) == row.get("pm")
    assert entry.score == float(f"{entry.score:.4f}")  # no rounding error of a division
    assert entry.verified is (row["seen"] == "transcript")
    assert row["seen"] in {"transcript", "recalled"}
    assert entry.note == row.get("note", "")


def test_the_numbers_equal_the_reference():
    if not REFERENCE.is_file():
        pytest.skip("../shared/reference does not exist")
    numbers = yaml.safe_load(FILE.read_text())
    for source in itertools.chain(*numbers.values()):
        for row in source["rows"]:
            for key in (
                "algo",
                "improvements",
                "inner_steps",
                "bn",
            ):  # ours: they repeat the row's text
                row.pop(key, None)
    assert numbers == yaml.safe_load(REFERENCE.read_text())


def labelled(dataset, ways, shots, label, **how):
    return published(dataset, ways, shots, *learner(label), **how)


def first(*key, **how):
    return labelled(*key, **how)[0]


def test_improvements_are_compared_as_sets():
    orders = ("maml + bnrs + bnwb", "maml + bnwb + bnrs")
    one, other = (labelled("omniglot", 20, 1, label) for label in orders)
    assert one == other
    assert one[0].score == 0.9535
    assert not one[0].verified
    everything = "maml + msl + da + bnrs + bnwb + lslr + ca"
    assert labelled("omniglot", 20, 1, everything) == labelled("omniglot", 20, 1, "maml++")


def test_the_rerun_by_the_maml_plus_plus_authors_comes_before_the_maml_paper():
    sources = [(entry.source, entry.row) for entry in labelled("omniglot", 20, 1, "maml")]
    assert sources == [
        ("MAML++ (Antoniou et al. 2019)", "maml (their re-run)"),
        ("MAML (Finn et al. 2017)", "maml"),
        ("ANIL (Raghu et al. 2020)", "maml"),
    ]
    assert first("omniglot", 5, 1, "maml").source == "MAML (Finn et al. 2017)"
    assert first("mini-imagenet", 5, 1, "maml").row == "maml (their re-run), 5 steps"


def test_inner_steps_select_a_number_and_the_most_come_first():
    rows = [entry.row for entry in labelled("mini-imagenet", 5, 1, "maml++")]
    assert rows == [f"maml++, {steps} step{'s' * (steps > 1)}" for steps in (5, 4, 3, 2, 1)]
    (only,) = labelled("mini-imagenet", 5, 1, "maml++", inner_steps=2)
    assert only.score == 0.5149
    assert [entry.score for entry in labelled("sinusoid", 1, 5, "maml", inner_steps=1)] == [0.67]
    assert [entry.score for entry in labelled("sinusoid", 1, 5, "transfer")] == [2.19, 2.41]


def test_the_batch_norm_mode_selects_the_first_number_of_reptile():
    assert first("omniglot", 5, 1, "reptile").score == 0.9768
    assert first("omniglot", 5, 1, "reptile", bn="running").score == 0.9539
    assert len(labelled("omniglot", 5, 1, "reptile")) == 2
    assert labelled("omniglot", 5, 1, "maml", bn="running") == (), "papers are transductive"


@pytest.mark.parametrize(
    "key",
    [
        ("omniglot", 20, 1, "maml++ - msl"),  # the paper has no rows with one improvement removed
        ("omniglot", 20, 1, "maml + bnrs"),  # the paper has only both together
        ("omniglot", 5, 1, "maml + msl"),
        ("omniglot", 7, 1, "maml"),
        ("omniglot", 5, 3, "maml"),
        ("glyphs", 5, 1, "maml"),
        ("/a/folder", 5, 1, "maml"),
        ("omniglot", 20, 1, "inner_lr=0.1"),
        ("omniglot", 20, 1, ""),
    ],
)
def test_nothing_is_published_for_other_rows(key):
    assert labelled(*key) == ()


@pytest.mark.parametrize("case", EVERY, ids=name)
def test_the_fields_of_a_number_agree_with_the_text_of_its_row(case):
    """ "maml + bnwb + bnrs (their re-run), 5 steps" -> maml, {bnrs, bnwb}, 5 steps."""
    row = case[-1]
    words = re.split(r" \(|, ", row["row"])[0]
    algo, improvements = learner(NAMES.get(words, words))
    assert row["algo"] == algo
    assert sorted(row.get("improvements", ())) == sorted(improvements)
    steps = re.search(r", (\d+) steps?$", row["row"])
    assert row.get("inner_steps") == (int(steps[1]) if steps else None)
    way = re.search(r"\(((?:non-)?transductive)\)", row["row"])
    assert row.get("bn") == (None if way is None else {"non-transductive": "support"}.get(way[1], way[1]))


def test_a_new_improvement_does_not_hide_published_numbers(monkeypatch):
    """The published MAML++ has six improvements, however many this program has."""
    setup = ("flag", {"dataset": "omniglot", "ways": 20, "algo": "maml++"})
    config = resolve_settings([setup], checked=False).config
    numbers = _published_scores(config, EvalConfig(), 5, "transductive")
    assert numbers[0].row == "maml++"
    monkeypatch.setitem(IMPROVEMENTS, "first_order", replace(IMPROVEMENTS["msl"], name="first_order"))
    assert _published_scores(config, EvalConfig(), 5, "transductive") == numbers
    as_maml = replace(config, algo="maml")
    assert _published_scores(as_maml, EvalConfig(), 5, "transductive") == numbers
    assert published("omniglot", 20, 1, "maml", [*LETTERS, "first_order"]) == ()


def test_the_wheel_contains_data_files_and_documentation(tmp_path):
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    code = "from hatchling.build import build_wheel; import sys; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    files = ("published.yaml", "templates/report.css", "templates/report.html.j2")
    assert {f"mamlctl/report/{file}" for file in files} <= names
    docs = (ROOT / "mamlctl" / "docs").glob("*.md")
    assert {f"mamlctl/docs/{page.name}" for page in docs} <= names
