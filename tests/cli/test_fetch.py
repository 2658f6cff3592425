"""The `fetch` command: listing, verification, waiting for other processes, and data that are present."""

import json
import os
import threading
from dataclasses import replace
from datetime import datetime, timedelta
from io import StringIO

import numpy as np
import pytest
from helpers.shared import ignore
from rich.console import Console

from mamlctl.core.errors import DataError
from mamlctl.core.events import Notice, Progress
from mamlctl.data.fetching import locks
from mamlctl.data.fetching.locks import locked
from mamlctl.data.reading import packs
from mamlctl.data.reading.packs import load_pack, packs_of, save_pack, verified_at
from mamlctl.data.sets import registry
from mamlctl.data.sets.registry import fetch_or_open, find_data_set, open_images
from mamlctl.display.datasets import show_data_sets
from mamlctl.experiments.fetch import fetch_all, list_all, verify_all


@pytest.fixture
def root(tmp_path, glyphs_root):
    """A data root with only glyphs."""
    packed = load_pack(packs_of(glyphs_root / "glyphs")[0], "glyphs")
    save_pack(tmp_path / "root" / "glyphs" / packs_of(glyphs_root / "glyphs")[0].name, packed)
    return tmp_path / "root"


@pytest.fixture
def fetch(cli, root):
    """A function that runs `fetch` and returns exit code, stdout and stderr."""
    return lambda *words: cli("fetch", *words, "--data-root", root)


def pack_of(root):
    return packs_of(root / "glyphs")[0]


def damage(root):
    """Change one pixel but keep the length and the modification time."""
    path = pack_of(root)
    facts = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_list_prints_every_fact_about_every_data_set(fetch, root):
    code, out, err = fetch("--list")
    assert (code, err) == (0, "")
    heads, *rows, last = out.splitlines()
    assert heads.split() == ["name", "prepared", "download", "licence", "from", "description"]
    assert [row.split()[0] for row in rows] == list(registry.DATA_SETS)
    assert "15.2 MiB" in rows[0]
    assert "github.com/brendenlake/omniglot" in rows[0]
    assert f"verified {datetime.now().astimezone():%Y-%m-}" in rows[1]
    assert last == f"prepared data sets are in {root}"


def test_list_as_json(fetch, root):
    code, out, _ = fetch("--list", "--json", "glyphs", "omniglot")
    glyphs_entry, omniglot_entry = json.loads(out)["data_sets"]
    assert code == 0
    assert (omniglot_entry["here"], omniglot_entry["verified"]) == (False, None)
    assert omniglot_entry["download_bytes"] == 9_464_212 + 6_462_886
    assert glyphs_entry["folder"] == str(root)
    assert datetime.fromisoformat(glyphs_entry["verified"]) <= datetime.now().astimezone()


def test_list_prints_blocks_on_a_narrow_terminal(root):
    for width, blocks in ((60, True), (300, False)):
        console = Console(file=StringIO(), width=width, force_terminal=True, color_system=None)
        show_data_sets(console, list_all(["glyphs"], data_root=str(root)))
        lines = console.file.getvalue().splitlines()
        assert ("  licence      MIT (mamlctl)" in lines) == blocks


def test_verify_finds_no_damage_and_records_the_time(fetch, root):
    path = pack_of(root)
    long_ago = (datetime.now() - timedelta(days=99)).timestamp()
    for file in (path, path.with_suffix(".json")):
        os.utime(file, (long_ago, long_ago))
    assert verified_at(path) < datetime.now().astimezone() - timedelta(days=98)
    code, out, _ = fetch("--verify")
    assert (code, out) == (0, f"glyphs: intact, 1 pack in {root}\n")
    assert verified_at(path) > datetime.now().astimezone() - timedelta(days=1)


def test_verify_detects_one_changed_pixel_of_a_large_pack(fetch, root, monkeypatch):
    monkeypatch.setattr(packs, "DIGEST_CHECKED_BELOW", 0)  # every pack counts as large
    monkeypatch.setattr(packs, "SAMPLED", 0)
    damage(root)
    load_pack(pack_of(root), "glyphs")  # checks only the shape
    code, out, err = fetch("--verify")
    assert (code, out) == (3, f"glyphs: DAMAGED, 1 pack in {root}\n")
    error, hint = err.splitlines()
    assert error.startswith(f"error: {pack_of(root)} is damaged")
    assert hint == "hint:  run mamlctl fetch glyphs --force"
    code, out, _ = fetch("--verify", "--json")
    assert code == 3
    assert str(pack_of(root)) in json.loads(out)["data_sets"][0]["damage"]
    assert fetch("glyphs", "--force")[0] == 0
    assert fetch("--verify")[0] == 0


def test_sample_of_a_large_pack_is_checked_at_each_start(root, monkeypatch):
    monkeypatch.setattr(packs, "DIGEST_CHECKED_BELOW", 0)
    path = pack_of(root)
    count = len(json.loads(path.with_suffix(".json").read_text())["crc32"])
    assert count > 4
    load_pack(path, "glyphs")
    damage(root)
    with pytest.raises(DataError, match="is damaged: its pixels or names differ"):
        load_pack(path, "glyphs")  # has fewer blocks than the sample
    monkeypatch.setattr(packs, "SAMPLED", 1)
    starts = 0
    with pytest.raises(DataError, match="is damaged"):
        while True:
            load_pack(path, "glyphs")
            starts += 1
            assert starts < 100 * count, "always the same sample"


def test_force_replaces_a_damaged_pack_of_another_shape(fetch, root):
    def small():
        shape = {"resize": "none", "side": 14, "channels": 1}
        return open_images(find_data_set("glyphs"), root, **shape, on_event=ignore)

    whole = small()
    (path,) = (root / "glyphs").glob("14x14*.npy")
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match="is damaged") as raised:
        small()
    assert raised.value.hint == "run mamlctl fetch glyphs --force"
    assert fetch("glyphs", "--force")[0] == 0
    assert small().digest == whole.digest


@pytest.mark.parametrize(("place", "byte"), [(10, b"9"), (22, b"0"), (60, b"9")])
def test_damage_to_the_header_of_a_pack_is_reported(root, place, byte):
    path = pack_of(root)
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + byte + whole[place + 1 :])
    with pytest.raises(DataError, match="is damaged"):
        load_pack(path, "glyphs")


def test_verify_adds_the_checksums_of_blocks_to_an_older_pack(fetch, root, monkeypatch):
    sidecar = pack_of(root).with_suffix(".json")
    document = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({name: document[name] for name in document if name != "crc32"}))
    monkeypatch.setattr(packs, "DIGEST_CHECKED_BELOW", 0)
    assert load_pack(pack_of(root), "glyphs").digest == document["digest"]
    assert fetch("--verify")[0] == 0
    assert json.loads(sidecar.read_text()) == document
    document["crc32"].pop()
    sidecar.write_text(json.dumps(document))
    with pytest.raises(DataError, match="checksums do not match"):
        load_pack(pack_of(root), "glyphs")


def test_list_does_not_call_changed_or_damaged_packs_verified(root):
    path = pack_of(root)
    later = path.stat().st_mtime + 9
    os.utime(path, (later, later))
    entry = list_all(["glyphs"], data_root=str(root))[0]
    assert (entry.verified, entry.damage) == (None, None)
    damage(root)
    assert "is damaged" in list_all(["glyphs"], data_root=str(root))[0].damage


def test_verify_reports_bytes_and_an_empty_root(root, tmp_path):
    events = []
    verify_all([], data_root=str(root), on_event=events.append)
    size = pack_of(root).stat().st_size
    assert events == [Progress("verify glyphs", size, size, "B")]
    events.clear()
    assert verify_all([], data_root=str(tmp_path / "empty"), on_event=events.append) == []
    assert events == [Notice(f"nothing is in {tmp_path / 'empty'}")]


def test_a_pack_that_cannot_be_written_keeps_the_old_one(root, monkeypatch):
    before = pack_of(root).read_bytes()
    written = np.save

    def full(file, *words, **options):
        written(file, *words, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(DataError, match="No space left on device"):
        fetch_or_open(find_data_set("glyphs"), root, force=True, on_event=ignore)
    assert pack_of(root).read_bytes() == before
    assert [path.suffix for path in sorted((root / "glyphs").iterdir())] == [".json", ".npy"]


def test_the_second_of_two_fetches_waits_for_the_first(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.DATA_SETS, "slow", Slow().data_set)
    notices = []

    def on_event(event):
        notices.append(event.text)
        Slow.proceed.set()

    first = threading.Thread(target=lambda: get(tmp_path, ignore))
    first.start()
    assert Slow.begun.wait(10)
    get(tmp_path, on_event)
    first.join()
    assert notices[0] == f"waiting for process {os.getpid()}, which is preparing slow"
    assert Slow.times_prepared == 1
    assert not (tmp_path / "downloads").exists()


def get(root, on_event):
    return fetch_all(
        ["slow"], source=None, data_root=str(root), force=False, offline=False, on_event=on_event
    )


class Slow:
    """A data set whose preparation waits for `proceed`."""

    times_prepared = 0
    begun, proceed = threading.Event(), threading.Event()

    @property
    def data_set(self):
        glyphs = registry.DATA_SETS["glyphs"]
        methods = {"prepare": self.prepare, "open_pack": self.open_pack, "is_here": self.is_here}
        return replace(glyphs, name="slow", **methods)

    def is_here(self, root):
        return (root / "slow").exists()

    def prepare(self, root, sources, on_event):
        Slow.times_prepared += 1
        self.begun.set()
        assert self.proceed.wait(10)
        (root / "slow").mkdir()

    def open_pack(self, root, resize, *, on_event):
        return packs.pack(np.zeros((1, 1, 2, 2), np.uint8), np.array([1]), ("a",))


def test_present_data_need_no_writable_root(root, monkeypatch):
    def no_lock(*words):
        raise AssertionError("locked")

    monkeypatch.setattr(locks, "locked", no_lock)
    assert fetch_all(
        ["glyphs"], source=None, data_root=str(root), force=False, offline=False, on_event=ignore
    )


def test_a_lock_is_removed_and_a_stale_one_is_ignored(tmp_path):
    path = tmp_path / "downloads" / "a.lock"
    path.parent.mkdir()
    path.write_text("process 1")
    events = []
    with locked(path, "a", events.append):
        assert path.read_text() == f"process {os.getpid()}"
    assert not path.parent.exists()
    assert events == []


def test_an_interrupted_wait_keeps_the_lock_of_the_other_process(tmp_path):
    path = tmp_path / "downloads" / "a.lock"

    def interrupt(event):
        raise KeyboardInterrupt

    with locked(path, "a", ignore):
        with pytest.raises(KeyboardInterrupt), locked(path, "a", interrupt):
            raise AssertionError("both")
        assert path.exists()


def test_an_unwritable_lock_raises_an_error_with_a_hint(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write") as raised, locked(tmp_path / "file/x", "a", ignore):
        raise AssertionError("locked")
    assert "--data-root" in raised.value.hint


def test_samples_are_written_beside_data_sets(fetch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = fetch("samples", "glyphs", "--json")
    entries = json.loads(out)["data_sets"]
    assert (code, [entry["name"] for entry in entries]) == (0, ["samples", "glyphs"])
    entry = {"name": "samples", "classes": 5, "images": 20, "digest": "", "folder": "samples"}
    assert entries[0] | {"digest": ""} == entry
    assert len([*tmp_path.glob("samples/*/*/*.png")]) == 20
    assert err.splitlines()[-1].startswith("try mamlctl eval omniglot-5w1s")


@pytest.mark.parametrize("option", ["--from", "--mirror", "--data-root"])
def test_samples_alone_take_no_option_of_data_sets(option, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("fetch", "samples", option, tmp_path)
    assert (code, out, [*tmp_path.iterdir()]) == (2, "", [])
    assert f"{option} has no effect with samples" in err
