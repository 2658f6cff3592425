"""Tables of regression tasks: strict reading, their own order, exact statistics, and draws by number."""

import io
import itertools
import os
import random
import statistics
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from helpers.data_cases import stream_settings
from helpers.own_tables import csv_text, linear_tasks

from mamlctl.core.errors import DataError, SettingsError
from mamlctl.data.reading import table_files
from mamlctl.data.reading.tables import read_examples, read_table
from mamlctl.data.tasks.table_tasks import TableStream, divided, standardisation_of, without_repeats

ROWS = [("a", 1, 2), ("b", 3, 4), ("a", 5, -6.5)]


def written(folder, rows, heads=("task", "x", "y"), name="t.csv"):
    (folder / name).write_text(csv_text(rows, heads))
    return folder / name


def read(path, inputs="x*", targets="y*"):
    return read_table(path, inputs, targets)


def stored(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_rows_are_sorted_by_task_and_value(tmp_path):
    table = read(written(tmp_path, ROWS))
    assert table.tasks == ("a", "b") and table.counts.tolist() == [2, 1] and table.starts.tolist() == [0, 2]
    assert table.values_MC.tolist() == [[1, 2], [5, -6.5], [3, 4]]
    assert table.splits == () and table.left_out == ()


def test_the_order_of_rows_has_no_influence_but_every_value_has(tmp_path):
    rows = [(f"t{task}", x, y) for task, x, y in itertools.product(range(3), (0.0, -0.0, 1.5), (2, 3, 2))]
    digest = read(written(tmp_path, rows)).digest
    for seed in range(5):
        random.Random(seed).shuffle(rows)
        assert read(written(tmp_path, rows)).digest == digest
    changed = [("t0", 0.25, 2), *rows[1:]]
    assert read(written(tmp_path, changed)).digest != digest
    assert read(written(tmp_path, rows[1:])).digest != digest
    assert read(written(tmp_path, [(f"u{task}", *row) for task, *row in rows])).digest != digest
    assert read(written(tmp_path, rows, ("task", "x2", "y"))).digest != digest


def test_csv_and_npz_files_have_the_same_table(tmp_path):
    rows, heads = linear_tasks(3, 4)
    columns = list(zip(*rows, strict=True))
    x, y = np.array(columns[1:3]).T, np.array(columns[3:]).T
    path = stored(tmp_path / "t.npz", task=np.array(columns[0]), x=x, y=y)
    assert read(path).digest == read(written(tmp_path, rows, heads)).digest
    numbered = stored(tmp_path / "n.npz", task=np.arange(4), x=np.arange(4.0), y=np.ones((4, 1), np.float32))
    table = read(numbered)
    assert table.tasks == ("0", "1", "2", "3") and table.columns.numbers == ("x", "y")


def test_columns_are_chosen_by_name_and_pattern_with_numbers_in_order(tmp_path):
    heads = ["x10", "task", "x2", "temperature", "y", "note", "x1"]
    path = written(tmp_path, [(10, "a", 2, 30, 5, "text", 1)], heads)
    assert read(path).columns.inputs == ("x1", "x2", "x10")
    table = read(path, "temperature, x?", "y,x10")
    assert table.columns.inputs == ("temperature", "x1", "x2") and table.columns.targets == ("y", "x10")
    assert table.values_MC.tolist() == [[30, 1, 2, 5, 10]]


def test_an_unchanged_file_is_read_once(tmp_path):
    path = written(tmp_path, ROWS)
    assert read(path) is not read(path)  # it is so new that a change might not be noticed
    os.utime(path, (1e9, 1e9))
    table = read(path)
    assert read(path) is table and read(path, "y", "x") is not table
    written(tmp_path, [("a", 7, 8)])
    assert read(path).values_MC.tolist() == [[7, 8]]


@pytest.mark.parametrize(
    ("inputs", "targets", "fact"),
    [
        ("z*", "y", "has no column 'z*'; it has task, x, y"),
        ("x", "y,t", "has no column 't'"),
        ("x,y", "y", "column 'y' is in --inputs and in --targets"),
        ("task", "y", "has no column 'task'"),
    ],
)
def test_columns_that_do_not_exist_are_refused(tmp_path, inputs, targets, fact):
    with pytest.raises(SettingsError) as caught:
        read(written(tmp_path, ROWS), inputs, targets)
    assert fact in caught.value.message


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("task,x,y\na,1,2\na,1e,3\n", "line 3, column 'x' has '1e', which is not a number"),
        ("task,x,y\na,1,inf\n", "line 2, column 'y' has 'inf', which is not a number"),
        ("task,x,y\na,1,1e101\n", "line 2, column 'y' has 1e101, which is beyond 1e+100"),
        ("task,x,y\na,1_0,2\n", "line 2, column 'x' has '1_0', which is not a number"),
        ("task,x,y\na,١,2\n", "line 2, column 'x' has '١', which is not a number"),
        ("task,x,y\na,1\n", "line 2 has 2 cells, but the header has 3"),
        ("task,x,y\na,1,2,\n", "line 2 has 4 cells, but the header has 3"),
        ("task,x,x,y\na,1,1,2\n", "line 1 has 2 columns named 'x'"),
        ("x,y\n1,2\n", "has no column task"),
        ("task,x,y\n", "has no rows"),
        ("", "has no columns: its first line is empty"),
        ("\n\ntask,x,y\na,1,2\n", "has no columns: its first line is empty"),
        ("task,x,y\n,1,2\n", "line 2 has no name in column task"),
        ("task,x,y\na,,2\n", "has no row without a missing number"),
        ("task,split,x,y\na,dev,1,2\n", "line 2, column 'split' has 'dev'"),
        ("task,split,x,y\na,val,1,2\na,test,1,2\n", "line 3: task 'a' is in test, but above in val"),
        ('task,x,y\na,"1,2\n', "line 2 has 2 cells"),
        ("task;x;y\na;1;2\n", "has no column"),
        ("task\tx\ty\na\t1\t2\n", "line 1 has no column apart from 'task?x?y'"),
    ],
)
def test_damaged_csv_files_are_refused_with_row_and_column(tmp_path, text, fact):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises((DataError, SettingsError)) as caught:
        read(tmp_path / "t.csv")
    assert fact in caught.value.message


def test_files_that_are_not_utf8_or_too_large_are_refused(tmp_path, monkeypatch):
    (tmp_path / "t.csv").write_bytes(b"task,x,y\na,1,2\n\xff,1,2\n")
    with pytest.raises(DataError, match="cannot be read after line"):
        read(tmp_path / "t.csv")
    with pytest.raises(DataError, match="there is no"):
        read(tmp_path / "absent.csv")
    monkeypatch.setattr(table_files, "MOST_BYTES", 10)
    with pytest.raises(DataError, match="more than the limit of 10"):
        read(written(tmp_path, ROWS))


def test_a_byte_order_mark_blank_lines_and_spaces_are_accepted(tmp_path):
    (tmp_path / "t.csv").write_bytes("\ufefftask , x,y\r\n\r\na , 1 ,+.5e1\r\n\r\n,,\r\n".encode())
    table = read(tmp_path / "t.csv")
    assert table.tasks == ("a",) and table.values_MC.tolist() == [[1, 5]]


def test_rows_with_missing_numbers_are_left_out_and_named(tmp_path):
    rows = [("a", 1, ""), ("b", "NaN", "n/a"), ("a", 2, 3), ("c", "", 1)]
    table = read(written(tmp_path, rows))
    assert table.tasks == ("a",) and table.values_MC.tolist() == [[2, 3]]
    assert table.left_out == ("line 2 (task a, no y)", "line 3 (task b, no x, y)", "line 5 (task c, no x)")
    y = np.array([1, np.nan, 3])
    table = read(stored(tmp_path / "t.npz", task=np.array(["a", "a", "b"]), x=np.arange(3.0), y=y))
    assert table.counts.tolist() == [1, 1] and table.left_out == ("row 1 (task a, no y)",)


@pytest.mark.parametrize(
    ("arrays", "fact"),
    [
        ({"x": np.ones(2), "y": np.ones(2)}, "has no column task"),
        (
            {"task": np.arange(2), "x": np.ones((2, 3)), "x2": np.ones(2), "y": np.ones(2)},
            "2 columns named 'x2'",
        ),
        ({"task": np.arange(3), "x": np.ones(2), "y": np.ones(2)}, "array task has shape (3,)"),
        ({"task": np.arange(2.0), "x": np.ones(2), "y": np.ones(2)}, "array task has type float64"),
        ({"task": np.arange(2), "x": np.ones((2, 1, 1)), "y": np.ones(2)}, "array x has type"),
        ({"task": np.arange(2), "x": np.array([1, np.inf]), "y": np.ones(2)}, "row 1, column 'x' has inf"),
        ({"task": np.arange(2), "x": np.ones(2), "y": np.array(["a", "b"])}, "array y has type <U1"),
        (
            {"task": np.array([1, "a"], dtype=object), "x": np.ones(2), "y": np.ones(2)},
            "type object, which is not",
        ),
        ({"task": np.array([b"a", b"\xff"]), "x": np.ones(2), "y": np.ones(2)}, "array task is not text"),
        ({"task": np.arange(0), "x": np.ones(0), "y": np.ones(0)}, "array x has type"),
    ],
)
def test_damaged_npz_files_are_refused(tmp_path, arrays, fact):
    with pytest.raises(DataError) as caught:
        read(stored(tmp_path / "t.npz", **arrays))
    assert fact in caught.value.message


def test_arrays_are_columns_with_the_names_of_the_settings(tmp_path):
    arrays = {
        "load": np.arange(3.0),
        "at": np.arange(6.0).reshape(3, 2),
        "y": np.ones(3),
        "task": np.arange(3),
    }
    others = {"note": np.array("text"), "objects": np.array([{}], dtype=object), "long": np.ones(5)}
    path = stored(tmp_path / "t.npz", **arrays, **others)
    table = read(path, "at*", "load")
    assert table.columns.inputs == ("at1", "at2") and table.columns.targets == ("load",)
    assert table.values_MC.tolist() == [[0, 1, 0], [2, 3, 1], [4, 5, 2]]
    assert read_examples(path, table.columns)[1].tolist() == [[0], [1], [2]]
    with pytest.raises(SettingsError, match=r"has no column 'x\*'; it has load, at1, at2, y, note, objects"):
        read(path)
    with pytest.raises(DataError, match=r"array objects\.npy has type object, which is not allowed"):
        read(path, "objects", "y")


def test_a_member_of_an_npz_file_expands_to_no_more_than_its_declared_size(tmp_path):
    """100 MiB of zeros have 113 bytes in bzip2."""
    path, size = tmp_path / "t.npz", 100 * 2**20
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        with archive.open("x.npy", "w") as member:
            np.lib.format.write_array_header_1_0(
                member, {"shape": (9,), "fortran_order": False, "descr": "<f8"}
            )
            for _ in range(100):
                member.write(bytes(2**20))
        archive.writestr("task.npy", b"")
    whole = path.read_bytes()
    assert whole.count((size + 128).to_bytes(4, "little")) == 2
    path.write_bytes(whole.replace((size + 128).to_bytes(4, "little"), (128 + 72).to_bytes(4, "little")))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="cannot be read"):
            read(path, "x", "x")
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


def test_npz_files_run_no_code_and_reserve_no_more_than_their_bytes(tmp_path):
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"shape": (10**15,), "fortran_order": False, "descr": "<f8"})
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as archive:
        archive.writestr("x.npy", head.getvalue() + b"\0" * 8)
    with pytest.raises(DataError, match="has 8 bytes, which is not its shape"):
        read(tmp_path / "t.npz")
    (tmp_path / "t.npz").write_bytes(b"PK\3\4 cut off")
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path / "t.npz")


@pytest.mark.parametrize("kind", ["csv", "npz", "compressed npz", "lzma npz"])
def test_any_damage_is_reported_as_an_error_of_the_file(kind, tmp_path):
    rows, heads = linear_tasks(3, 4)
    path = tmp_path / f"t.{kind[-3:]}"
    if kind == "csv":
        path.write_text(csv_text(rows, heads))
    else:
        columns = np.array([row[1:] for row in rows])
        save = np.savez if kind == "npz" else np.savez_compressed
        save(path, task=np.array([row[0] for row in rows]), x=columns[:, :2], y=columns[:, 2:])
    if kind == "lzma npz":  # numpy reads these too
        with zipfile.ZipFile(path) as archive:
            arrays = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
            for name, content in arrays.items():
                archive.writestr(name, content)
    whole, generator, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        data, at = bytearray(whole), generator.randrange(len(whole))
        if generator.random() < 0.5:
            data[at] = generator.randrange(256)
        else:
            del data[at : at + generator.randrange(1, 20)]
        path.write_bytes(data)
        try:
            assert np.isfinite(read(path).values_MC).all()
        except (DataError, SettingsError):
            refused += 1
    assert refused > 100


def test_examples_of_a_new_task_need_inputs_but_no_task_names(tmp_path):
    columns = read(written(tmp_path, ROWS)).columns
    path = written(tmp_path, [(2, 1), (4, 3)], ("y", "x"), "a.csv")
    x, y = read_examples(path, columns)
    assert x.tolist() == [[1], [3]] and y.tolist() == [[2], [4]]
    x, y = read_examples(written(tmp_path, [(1,)], ("x",), "b.csv"), columns)
    assert x.tolist() == [[1]] and y is None
    with pytest.raises(DataError, match="has no column 'x'"):
        read_examples(written(tmp_path, [(1,)], ("y",), "c.csv"), columns)
    with pytest.raises(DataError, match="line 3, column 'x' is empty"):
        read_examples(written(tmp_path, [(1, 2), ("", 3)], ("x", "y"), "d.csv"), columns)


def test_statistics_are_those_of_the_training_rows_and_reversible(tmp_path):
    rows, heads = linear_tasks()
    table = read(written(tmp_path, rows, heads))
    values = standardisation_of(table, ["t1", "t4"])
    for column, mean, deviation in zip(range(1, 5), values.mean, values.deviation, strict=True):
        numbers = [row[column] for row in rows if row[0] in ("t1", "t4")]
        assert mean == pytest.approx(statistics.fmean(numbers), rel=1e-15)
        assert deviation == pytest.approx(statistics.pstdev(numbers), rel=1e-12)
    scaled_MC = values.apply(table.values_MC)
    width = len(values.inputs)
    assert np.allclose(values.inputs_of(scaled_MC[:, :width]), table.values_MC[:, :width], rtol=1e-14)
    assert np.allclose(values.targets_of(scaled_MC[:, width:]), table.values_MC[:, width:], rtol=1e-14)
    assert np.allclose(values.apply(table.values_MC[:, :width]), scaled_MC[:, :width])
    assert values.variances == pytest.approx([deviation**2 for deviation in values.deviation[width:]])
    assert values.score_unit == 1.0


def test_a_constant_column_is_only_shifted(tmp_path):
    table = read(written(tmp_path, [("a", 0.1, 1), ("a", 0.1, 2), ("a", 0.1, 4)]))
    values = standardisation_of(table, ["a"])
    assert values.mean[0] == 0.1 and values.deviation[0] == 1
    assert values.score_unit == pytest.approx(statistics.pvariance([1, 2, 4]))


def test_tasks_are_divided_by_shares_or_by_their_column(tmp_path):
    table = read(written(tmp_path, [(f"t{task:02d}", task, task) for task in range(40)]))
    parts = divided(table, table.tasks, "64-16-20", 0)
    assert [len(parts[split]) for split in ("train", "val", "test")] == [26, 6, 8]
    assert sorted(itertools.chain(*parts.values())) == list(table.tasks)
    assert divided(table, table.tasks, "64-16-20", 0) == parts != divided(table, table.tasks, "64-16-20", 1)
    rows = [(f"t{task}", split, 1, 2) for task, split in enumerate(("val", "train", "test", "train"))]
    table = read(written(tmp_path, rows, ("task", "split", "x", "y")))
    expected = {"train": ("t1", "t3"), "val": ("t0",), "test": ("t2",)}
    assert divided(table, table.tasks, "64-16-20", 0) == expected


def stream(tmp_path, names=None, **settings):
    rows, heads = linear_tasks(7, 9)
    rows = rows[:-3]  # the last task has 6 rows
    table = read(written(tmp_path, rows, heads))
    names = table.tasks if names is None else names
    values = standardisation_of(table, names)
    settings = {"split": "train", "seed": 3, "shots": 2, "queries": 4, "dtype": torch.float64} | settings
    return TableStream(table, names, values, stream_settings(**settings))


def parts(episodes):
    return [*episodes.sets]


def test_draws_have_rows_of_one_task_without_repeats(tmp_path):
    drawn = stream(tmp_path, ["t1", "t4", "t6"])
    rows_TE, table = drawn.rows_of(0, 300), drawn.table
    task_of_row = np.repeat(np.arange(len(table.tasks)), table.counts)
    chosen = [table.tasks.index(name) for name in drawn.names]
    for row_E, task in zip(rows_TE, drawn.tasks_of(0, 300), strict=True):
        assert len(set(row_E.tolist())) == 6
        assert set(task_of_row[row_E].tolist()) == {chosen[task]}
    # Each pass has every task once, and passes have different orders.
    passes = drawn.tasks_of(0, 300).reshape(100, 3)
    assert (np.sort(passes, axis=1) == np.arange(3)).all()
    assert len({tuple(order) for order in passes.tolist()}) == 6
    episodes = drawn.episodes(0, 300)
    scaled = drawn.standardisation.apply(table.values_MC)
    values = np.concatenate([part.numpy() for part in parts(episodes)[::2]], axis=1)
    assert np.array_equal(values, scaled[rows_TE][..., :2])
    values = np.concatenate([part.numpy() for part in parts(episodes)[1::2]], axis=1)
    assert np.array_equal(values, scaled[rows_TE][..., 2:])


def test_numbers_without_repeats_are_those_of_a_list_from_which_each_is_taken():
    words = np.random.default_rng(0).integers(0, 2**64, (50, 7), dtype=np.uint64)
    counts = np.arange(7, 57)
    for row, word_E, count in zip(
        without_repeats(words, counts).tolist(), words.tolist(), counts, strict=True
    ):
        left = list(range(count))
        assert row == [left.pop(word % len(left)) for word in word_E]
    assert np.array_equal(without_repeats(words[:, :3], counts), without_repeats(words, counts)[:, :3])


def test_every_order_of_rows_is_equally_likely(tmp_path):
    drawn = stream(tmp_path, ["t6"], shots=1, queries=2)
    rows = drawn.rows_of(0, 12_000)
    orders = rows - rows.min()
    counts = np.bincount(orders @ np.array([36, 6, 1]), minlength=216)
    possible = [a * 36 + b * 6 + c for a, b, c in itertools.permutations(range(6), 3)]
    assert counts[possible].sum() == 12_000
    # Chi-square of 120 orders with 119 degrees of freedom, 99.9 % quantile.
    assert ((counts[possible] - 100) ** 2 / 100).sum() < 173.6


def test_a_draw_is_the_same_in_every_batch_and_order(tmp_path):
    whole = parts(stream(tmp_path).episodes(40, 30))
    one = stream(tmp_path)
    for first, size in ((65, 5), (40, 1), (69, 1), (42, 17)):
        for part, piece in zip(whole, parts(one.episodes(first, size)), strict=True):
            assert torch.equal(part[first - 40 : first - 40 + size], piece)


def test_fewer_queries_change_neither_support_set_nor_other_queries(tmp_path):
    many, few = stream(tmp_path).episodes(5, 8), stream(tmp_path, queries=1).episodes(5, 8)
    assert torch.equal(many.support_x_TECHW, few.support_x_TECHW)
    assert torch.equal(many.query_y_TE[:, :1], few.query_y_TE)


def test_splits_and_seeds_have_other_draws(tmp_path):
    rows = [
        stream(tmp_path, split=split, seed=seed).rows_of(0, 50).tolist()
        for split, seed in itertools.product(("train", "val", "test"), (0, 1))
    ]
    assert all(one != other for one, other in itertools.combinations(rows, 2))
