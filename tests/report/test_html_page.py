"""The report is one self-contained page, in which a browser finds the numbers of the JSON document."""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from helpers.browser import Browser, find_chromium
from helpers.table_cases import HOSTILE, TABLES, full, one_on, text_rows
from matplotlib.colors import to_rgb
from PIL import Image

from mamlctl.core.formatting import minus_signs
from mamlctl.report.export import document
from mamlctl.report.figures.rate_figures import luminance
from mamlctl.report.figures.table_figures import curves, mean_rates, pictures
from mamlctl.report.html_page import write_report
from mamlctl.report.report_folder import write_files
from mamlctl.report.verdict import verdict

pytestmark = pytest.mark.render

VOID = {"meta", "br", "wbr", "img", "link", "input", "hr"}
SMALL = [name for name in TABLES if name != "64 rows"]
RELATIVE = re.compile(
    r"(\.\./)*[\w%+.~-]+(/[\w%+.~-]+)*"
)  # a link to a file next to the page: no scheme, no host


class Page(HTMLParser):
    """The elements of a page, the cells of its first table, and their values."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.rows, self.values, self.ids = [], [], [], [], [], []
        self.texts = []
        self.tables = 0
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [given["id"]] if "id" in given else []
        self.tables += tag == "table"
        if self.tables == 1 and tag == "tr":
            self.rows.append([])
            self.values.append([])
        if self.tables == 1 and tag in ("td", "th"):
            self.rows[-1] += [""] * int(given.get("colspan", 1))
            self.values[-1] += [None] * int(given.get("colspan", 1))
            self.span = int(given.get("colspan", 1))
        if self.tables == 1 and tag == "data":
            self.values[-1][-1] = float(given["value"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.tables == 1 and self.open and set(self.open) & {"td", "th"}:
            self.rows[-1][-self.span] += data


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The pages of all tables except the largest."""
    folder = tmp_path_factory.mktemp("reports")
    return {name: write_report(TABLES[name](), folder / name) for name in SMALL}


def with_minus_signs(rows):
    """Rows of text as on a page, where every number, but no label, has a true minus sign."""
    return [[label, *map(minus_signs, texts)] for label, *texts in rows]


def check_first_table(page, table):
    """Assert that the first table of a page has the texts of the table and the values of its document."""
    shown = [[" ".join(cell.split()) for cell in row] for row in page.rows]
    assert shown == with_minus_signs(text_rows(table))
    heads = page.rows[0]
    for values, row in zip(page.values[1:], document(table)["rows"], strict=True):
        known = dict(zip(heads, values, strict=True))
        best = row["best"]
        first = next(head for head in heads if head.startswith("best"))
        assert known[first] == (best["mean"] if best else None)
        if "difference" in known and best and best["difference"]:
            assert known["difference"] == best["difference"]["mean"]
        published = next((value for head, value in known.items() if head.startswith("published")), None)
        assert published == (row["published"][0]["score"] if row["published"] else None)
        assert known.get("per step") == row["step_s"]


@pytest.mark.parametrize("name", SMALL)
def test_the_page_is_well_formed_and_self_contained(reports, name):
    text = reports[name].read_text()
    page = Page(text)
    check_first_table(page, TABLES[name]())
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(page.tags)
    for key, value in page.attributes:
        assert key not in ("src", "srcset", "action", "onload")
        assert key != "href" or value.startswith("#") or RELATIVE.fullmatch(value)
        assert "http" not in (value or "")
    style = re.search(r"<style>(.*?)</style>", text, flags=re.DOTALL)[1]
    assert "url(" not in style and "@import" not in style
    assert len(set(page.ids)) == len(page.ids)
    pointed = {found for _, value in page.attributes for found in re.findall(r"url\(#([^)]*)\)", value or "")}
    pointed |= {value[1:] for key, value in page.attributes if key == "href" and value.startswith("#")}
    assert pointed <= set(page.ids)
    assert page.tags.count("svg") == len(list(reports[name].parent.glob("plots/*.svg")))


def test_hostile_names_are_text(reports):
    page = Page(reports["hostile"].read_text())
    texts = "".join(page.texts)
    assert HOSTILE in texts
    assert "</style><script src=http://evil.example/x.js></script>" in texts
    assert "\x1b" not in reports["hostile"].read_text()


def test_every_command_and_setting_is_on_the_page(reports):
    table = one_on()
    texts = "".join(Page(reports["one-on"].read_text()).texts)
    wanted = [*table.commands, *table.notes, *table.settings, *table.environment]
    wanted += [cell.command for row in table.rows for cell in row.cells]
    wanted += [entry.source for row in table.rows for entry in row.published]
    for text in wanted:
        assert text in texts, text
    assert texts.count("quoted from memory, not verified") >= 6


def test_the_same_table_gives_the_same_bytes(reports, tmp_path):
    again = write_report(one_on(), tmp_path)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert {"report.html", "plots/training.png", "plots/rates.svg"} <= set(map(str, files))
    for name in files:
        assert (tmp_path / name).read_bytes() == (reports["one-on"].parent / name).read_bytes(), name
    assert again.stat().st_size < 1_500_000


def test_a_report_can_be_sorted(tmp_path):
    page = Page(write_report(TABLES["mse"](), tmp_path, "seconds").read_text())
    assert page.rows == with_minus_signs(text_rows(TABLES["mse"](), "seconds"))


def test_64_rows_are_split_over_several_figures_and_the_page_is_small(tmp_path):
    page = write_report(full(), tmp_path)
    check_first_table(Page(page.read_text()), full())
    names = {path.stem for path in tmp_path.glob("plots/*.png")}
    assert {"training-3", "differences-2", "rates-4"} <= names
    assert page.stat().st_size < 3_000_000


@pytest.mark.parametrize("name", SMALL)
def test_the_verdict_comes_before_the_table_with_true_minus_signs(reports, name):
    texts = " ".join(" ".join(Page(reports[name].read_text()).texts).split())
    sentences = [minus_signs(sentence) for sentence in verdict(TABLES[name]())]
    places = [texts.index(sentence) for sentence in sentences]
    assert places == sorted(places)
    assert places[-1] < texts.index("seeds best")
    assert not re.search(r"[-][0-9.]+[,\]]", texts)  # in an interval


def test_settings_show_what_differs_from_the_defaults_and_fold_the_rest(reports):
    text = reports["one-on"].read_text()
    shown, folded = text.split("<h2>Settings</h2>")[1].split("<details>")[:2]
    assert "<td>0.4</td><td>0.1</td>" in shown.replace("\n", "")  # inner_lr and its default
    for name in ("inner_steps", "meta_lr"):
        assert name not in shown and name in folded
    rows = text.split("settings that differ from maml</th>")[1].split("</table>")[0]
    assert "algo maml, first_order false" in rows  # the baseline has all settings that rows vary
    assert "<td>first_order true, da true</td>" in rows


def test_properties_of_the_machine_are_words(tmp_path):
    git = {"commit": "85eb56b", "dirty": False}
    table = replace(one_on(), environment={"git": git, "cuda": None, "dataset_older_digests": [], "cores": 2})
    text = write_report(table, tmp_path).read_text().split("<h2>Machine</h2>")[1].split("</table>")[0]
    cells = re.findall(r"<td>(.*?)</td>", text)
    assert cells == ["commit 85eb56b, dirty false", "none", "none", "2"]


@pytest.mark.parametrize(("name", "higher"), [("one-on", "higher accuracy"), ("mse", "higher error")])
def test_the_caption_of_the_differences_names_what_is_higher(reports, name, higher):
    text = reports[name].read_text()
    assert f"A row to the right of zero has a {higher} than the baseline." in text


def test_no_two_columns_of_a_table_have_one_name(reports):
    for page in reports.values():
        for head in re.findall(r"<thead>(.*?)</thead>", page.read_text(), flags=re.DOTALL):
            names = re.findall(r"<th[^>]*>(.*?)</th>", head)
            assert len(set(names)) == len(names) > 1


def test_equal_runs_are_named_and_not_measured(tmp_path):
    table = one_on()
    equal = replace(table.rows[3].best.difference, mean=0.0, low=0.0, high=0.0, is_equal=True)
    rows = list(table.rows)
    rows[3] = replace(rows[3], best=replace(rows[3].best, difference=equal, p_holm=1.0))
    page = Page(write_report(replace(table, rows=tuple(rows)), tmp_path).read_text())
    assert page.rows[4][page.rows[0].index("difference")].strip() == "equal to maml"


def test_files_of_a_table_are_written_again_if_its_document_is_damaged(tmp_path):
    table = TABLES["mse"]()
    whole = write_files(table, tmp_path)[0].read_bytes()
    (tmp_path / "table.json").write_bytes(whole[:-9] + b"\xff")
    assert write_files(table, tmp_path)[0].read_bytes() == whole


def test_file_names_are_links(tmp_path):
    table = one_on()
    odd = replace(table.rows[0].cells[0], run="../javascript:alert(1) é/a b")
    rows = (replace(table.rows[0], cells=(odd, *table.rows[0].cells[1:])), *table.rows[1:])
    page = write_files(replace(table, rows=rows), tmp_path)[-1]
    links = [unquote(value) for key, value in Page(page.read_text()).attributes if key == "href"]
    files = [name for name in links if (tmp_path / name).is_file()]
    assert {"table.json", "table.csv", "table.md", "table.tex", "plots/rates.svg", "plots/rates.png"} <= set(
        files
    )
    runs = [cell.run for row in rows for cell in row.cells]
    assert [name for name in links if name not in files and not name.startswith("#")] == runs
    assert 'href="../javascript%3Aalert%281%29%20%C3%A9/a%20b"' in page.read_text()


@functools.cache
def drawn_pictures(name):
    """Return a table's pictures, which are shared because no test changes them."""
    return list(pictures(TABLES[name]()))


def browser(*options):
    """What Chromium prints."""
    if find_chromium() is None:
        pytest.skip("Chromium is not installed")
    command = [find_chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


@pytest.mark.parametrize("name", SMALL)
def test_a_browser_reads_the_same_numbers(reports, name, tmp_path):
    text = browser(f"--user-data-dir={tmp_path}", "--dump-dom", reports[name].as_uri())
    check_first_table(Page(text), TABLES[name]())


@pytest.mark.parametrize(("scheme", "light"), [(1, True), (0, False)])
def test_the_page_respects_the_dark_mode_preference(reports, scheme, light, tmp_path):
    shot = tmp_path / "page.png"
    browser(
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={scheme}",
        "--window-size=1280,1600",
        f"--screenshot={shot}",
        reports["one-on"].as_uri(),
    )
    with Image.open(shot) as image:
        pixels = image.convert("L")
        histogram = pixels.histogram()
    bright, dark = sum(histogram[225:]), sum(histogram[:60])
    assert (bright if light else dark) > 0.8 * sum(histogram)  # no figure has a background of its own


@pytest.fixture(scope="module")
def chromium():
    if find_chromium() is None:
        pytest.skip("Chromium is not installed")
    with Browser() as opened:
        yield opened


# For each box that can scroll: whether it does, whether its hint is visible, and where its first column is
# after it was scrolled to the right, in pixels from its own left edge.
BOXES = """
(async () => {
  const frame = () => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
  await frame();
  const found = [];
  for (const box of document.querySelectorAll("main > .box, figure .box")) {
    box.scrollLeft = 9999;
    await frame();
    const first = box.querySelector("tbody th");
    found.push({
      scrolls: box.scrollWidth > box.clientWidth,
      hint: box.querySelector(".hint").offsetHeight > 0,
      first: first && first.getBoundingClientRect().left - box.getBoundingClientRect().left,
    });
  }
  return found;
})()
"""


@pytest.mark.parametrize("width", [390, 820, 1400])
@pytest.mark.parametrize("name", ["one-on", "mse"])
def test_wide_content_scrolls_in_its_box_with_a_hint_and_a_fixed_first_column(reports, chromium, name, width):
    chromium.open(reports[name], width)
    assert chromium.run("[innerWidth, document.documentElement.scrollWidth]") == [width, width]
    boxes = chromium.run(BOXES)
    if chromium.run("CSS.supports('container-type: scroll-state')"):  # Chromium from 133 on
        assert [box["hint"] for box in boxes] == [box["scrolls"] for box in boxes]
    assert all(abs(box["first"]) < 1 for box in boxes if box["first"] is not None)
    scrolling = [box["scrolls"] for box in boxes if box["first"] is None]  # of figures
    assert scrolling == [width == 390] * len(scrolling) and scrolling
    assert boxes[0]["scrolls"] == (width < 1400)


# The parts of names in the first columns that are on two lines; a name may be broken after these signs.
BROKEN = r"""
[...document.querySelectorAll("tbody th")].flatMap(head => {
  const walker = document.createTreeWalker(head, NodeFilter.SHOW_TEXT);
  const broken = [];
  while (walker.nextNode()) {
    for (const part of walker.currentNode.data.matchAll(/[^\s=_,-]+/g)) {
      const range = document.createRange();
      range.setStart(walker.currentNode, part.index);
      range.setEnd(walker.currentNode, part.index + part[0].length);
      if (range.getClientRects().length > 1) broken.push(part[0]);
    }
  }
  return broken;
})
"""


def test_names_are_not_broken_inside_a_word_on_a_narrow_screen(chromium, tmp_path):
    table = TABLES["one-on"]()
    label = "maml++, steps_per_epoch=1000, inner_optimizer=adam"
    rows = tuple(replace(row, label=label) if row is table.rows[-1] else row for row in table.rows)
    chromium.open(write_report(replace(table, rows=rows), tmp_path), 390)
    assert chromium.run("document.body.innerText").count("inner_optimizer") > 0
    assert chromium.run(BROKEN) == []


@pytest.mark.parametrize("dark", [False, True])
def test_numbers_are_aligned_at_the_right_and_text_has_contrast(reports, chromium, dark):
    chromium.open(reports["one-on"], 1400, dark=dark)
    numbers = """[...document.querySelectorAll(".scores data, td.number")].map(cell => cell.closest("td"))"""
    assert chromium.run(
        f"{numbers}.map(td => getComputedStyle(td).textAlign).every(side => side === 'right')"
    )
    # The digits of marked and of other differences end at the same place.
    ends = """[...document.querySelectorAll("td.difference data")].map(data => {
        const range = document.createRange(); range.selectNode(data.firstChild);
        return Math.round(range.getBoundingClientRect().right); })"""
    assert len(set(chromium.run(ends))) == 1
    paper, ink, dim = (
        chromium.run(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}').trim()")
        for name in ("paper", "ink", "dim")
    )
    for colour in (ink, dim):
        light, low = sorted((luminance(to_rgb(each)) for each in (paper, colour)), reverse=True)
        assert (light + 0.05) / (low + 0.05) > 4.5


def test_figures_draw_the_numbers_of_the_table():
    table = one_on()
    found = {picture.name: picture.figure for picture in drawn_pictures("one-on")}
    assert list(found) == ["training", "differences", "adaptation", "rates"]
    titles = {picture.name: picture.title for picture in drawn_pictures("one-on")}
    assert titles["adaptation"] == "Test score after each inner step, first 100 of 600 tasks"
    row = table.rows[1]
    steps, values = curves(row)
    line = next(line for line in found["training"].axes[0].lines if "this row" in line.get_label())
    assert list(line.get_xdata()) == [step for step, _ in row.cells[0].validation]
    expected = [sum(cell.validation[place][1] for cell in row.cells) / 3 for place in range(len(steps))]
    assert list(line.get_ydata()) == pytest.approx(expected)
    assert values.shape == (3, len(steps))
    best, ensemble = found["differences"].axes
    dots = [line for line in best.lines if line.get_marker() == "o"]
    scored = [row for row in table.rows[1:] if row.best]
    assert [line.get_xdata()[0] for line in dots] == [row.best.difference.mean for row in scored]
    filled = [line.get_markerfacecolor() != "white" for line in dots]
    assert filled == [row.best.p_holm < 0.05 for row in scored]
    assert ensemble.get_title(loc="left") == "ensemble"
    drawn = found["adaptation"].axes[0].lines[-1].get_ydata()
    assert tuple(drawn) == row.best.per_step
    rates = mean_rates(table.rows[6])
    mesh = found["rates"].axes[0].collections[0]
    changed = mesh.get_array().reshape(len(rates), 5)[3].tolist()
    assert changed == pytest.approx([rate / 0.4 - 1 for rate in rates["conv2.bias"]])


def written(figure):
    """All texts in a figure except tick labels outside the axis, which are not drawn."""
    yield from figure.texts
    for legend in figure.legends:
        yield from legend.get_texts()
    for ax in figure.axes:
        yield from [ax._left_title, *ax.texts]
        for axis in (ax.xaxis, ax.yaxis) if ax.axison else ():
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=False)
            yield from [axis.label, *(label for where, label in ticks if low <= where <= high)]


@pytest.mark.parametrize("name", SMALL)
def test_no_text_overlaps_another_or_leaves_the_figure(name):
    drawn = 0
    for picture in drawn_pictures(name):
        figure = picture.figure
        figure.draw_without_rendering()  # a legend finds its place when it is drawn
        texts = [text for text in written(figure) if text.get_text() and text.get_visible()]
        boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
        for text, box in boxes:
            assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1, (picture.name, text)
            assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1, (picture.name, text)
        for (text, box), (other, its) in itertools.combinations(boxes, 2):
            across, down = (
                min(box.x1, its.x1) - max(box.x0, its.x0),
                min(box.y1, its.y1) - max(box.y0, its.y0),
            )
            assert across < 1 or down < 1, (picture.name, text, other)
        drawn += 1
    assert drawn == {"one-on": 4, "mse": 3, "hostile": 3, "empty": 0}[name]


def test_a_single_validation_is_drawn_as_a_point():
    given = TABLES["mse"]()
    rows = [
        replace(row, cells=tuple(replace(cell, validation=cell.validation[:1]) for cell in row.cells))
        for row in given.rows
    ]
    training = next(pictures(replace(given, rows=tuple(rows))))
    assert training.name == "training"
    assert [line.get_marker() for line in training.figure.axes[0].lines] == [".", "."]


def test_an_empty_table_has_no_figures():
    assert list(pictures(TABLES["empty"]())) == []
