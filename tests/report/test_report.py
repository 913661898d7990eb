"""The HTML report: its contents, escaping of texts, absence of network requests, and its numbers against the library's.

Its behaviour in a browser is tested in test_report_browser.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pages
import pytest
import torch
from torch import Tensor

import farlight as fl
from farlight import report
from farlight.analysis.passages import cut_passages
from farlight.analysis.plot import densities
from farlight.cli import main
from farlight.cli.progress import TimeLeft
from farlight.errors import ArgumentError, UnsupportedError
from farlight.patterns.expression import Atom, Sizes
from farlight.patterns.spans import Spans
from farlight.report import formula as formulas
from farlight.report import page as rendering
from farlight.report.formula import formula
from farlight.report.packing import pack, unpack
from farlight.report.views import needs_picture, picture
from farlight.report.words import words_of

ASSETS = Path(report.__file__).parent / "assets"


@pytest.fixture(scope="module")
def audited() -> tuple[Any, Any, dict[str, Any]]:
    return pages.audited()


class Reader(HTMLParser):
    """The elements of a page, and the contents of its script and style elements."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[dict[str, str | None], str]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            self.raw.append((self.elements[-1][1], data))

    def held(self, name: str) -> Any:
        return json.loads("".join(text for attributes, text in self.raw if attributes.get("id") == name))


# ---- one file, no network, no markup from outside -----------------------------------------------------------------------
def test_a_hostile_text_stays_text(audited: tuple[Any, Any, dict[str, Any]]) -> None:
    clean = report.render({**audited[2], "name": "clean"})
    page = report.render(audited[2])
    assert audited[2]["name"] == pages.HOSTILE
    assert "<img" not in page
    assert page.count("</script") == page.count("<script") == 3
    # Not one element more than with a harmless name.
    assert [tag for tag, _ in Reader(page).elements] == [tag for tag, _ in Reader(clean).elements]
    assert Reader(page).held("data")["name"] == pages.HOSTILE


def test_the_check_of_hostile_text_can_fail() -> None:
    page = report.render({**pages.mapped(fl.window(1), 8), "name": "x"}).replace("<!doctype", f"{pages.HOSTILE}<!doctype")
    assert "<img" in page
    assert "img" in [tag for tag, _ in Reader(page).elements]


def test_the_policy_allows_this_script_and_style_only_and_no_request() -> None:
    page = report.render(pages.mapped(fl.window(2), 20))
    read = Reader(page)
    policy = next(a["content"] for tag, a in read.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "http" not in policy
    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        inside = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert len(inside) == 1
        digest = base64.b64encode(hashlib.sha256(inside[0].encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy


def test_nothing_is_fetched() -> None:
    page = report.render(pages.mapped(fl.window(2), 20))
    outside = [
        (tag, name, value)
        for tag, attributes in Reader(page).elements
        for name, value in attributes.items()
        if name in ("src", "href", "action", "srcset") and not (value or "").startswith(("#", "data:image/svg+xml,"))
    ]
    assert outside == []
    for name in sorted(ASSETS.rglob("*")):
        if name.is_file() and name.suffix in (".js", ".css"):
            result = re.findall(r"fetch\(|XMLHttpRequest|WebSocket|sendBeacon|@import|url\(|innerHTML|eval\(", name.read_text())
            assert not result, f"{name.name}: {result}"


def test_placeholders_inside_data_are_not_replaced() -> None:
    held = Reader(report.render({**pages.mapped(fl.window(1), 8), "name": "<!--script--> <!--data-->"})).held("data")
    assert held["name"] == "<!--script--> <!--data-->"


def test_a_page_that_would_be_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "MOST_BYTES", 10_000)
    with pytest.raises(ArgumentError, match=r"the page would have [\d,]+ bytes, more than the 10,000.*fewer patterns"):
        report.render(pages.mapped(fl.window(1), 8))


def test_a_page_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="cannot be written: Is a directory"):
        report.write("page", tmp_path)


def test_elements_name_what_exists() -> None:
    """Labels, descriptions and links in the page lead somewhere; every control has a name."""
    read = Reader(report.render(pages.mapped(fl.window(1), 8)))
    ids = [a["id"] for _, a in read.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, a in read.elements:
        for name in ("for", "aria-describedby", "aria-labelledby"):
            assert set((a.get(name) or "").split()) <= set(ids), (tag, a)
        if (a.get("href") or "").startswith("#"):
            assert a["href"][1:] in ids
        if tag == "button":
            assert "data-t" in a or "data-t-label" in a, a
    labelled = {a["for"] for tag, a in read.elements if tag == "label" and "for" in a}
    for tag, a in read.elements:
        if tag == "input" and a.get("type") == "range":
            assert "data-t-label" in a or a["id"] in labelled, a


# ---- words ---------------------------------------------------------------------------------------------------------------
def test_every_string_exists_in_both_languages_and_is_used() -> None:
    words = rendering.strings()
    assert set(words) == set(rendering.LANGUAGES) == {"en", "zh"}
    assert list(words["en"]) == list(words["zh"])
    holes = re.compile(r"\{(\w+)\}")
    for name, english in words["en"].items():
        chinese = words["zh"][name]
        assert english.strip(), name
        assert chinese.strip(), name
        assert set(holes.findall(english)) == set(holes.findall(chinese)), name
    source = "".join(path.read_text() for path in (ASSETS / "report.html", *sorted((ASSETS / "js").glob("*.js"))))
    asked = set(re.findall(r'data-t(?:-label|-hint)?="([\w.-]+)"', source)) | set(re.findall(r'FL\.say\("([\w.-]+)"', source))
    assert asked <= set(words["en"]), asked - set(words["en"])
    stems = set(re.findall(r"`(\w+)\.\$\{", source)) | {
        "path",
        "matrix",
        "text",
        "title",
        "summary",
        "rule",
        "cost",
        "attends",
        "gallery",
    }
    unused = {name for name in words["en"] if name not in asked and name.split(".")[0] not in stems}
    assert not unused, unused


# ---- rules -----------------------------------------------------------------------------------------------------------------
def test_packed_numbers_come_back() -> None:
    for values, kind in (([5], "i4"), (range(-500, 500), "i4"), ([255] * 100, "u1"), (np.linspace(0, 1, 99), "f4")):
        assert np.allclose(unpack(pack(values, kind)), np.asarray(values), atol=1e-7)
    assert pack([]) == []


def test_rules_are_small_and_plain() -> None:
    million = 1 << 20
    for pattern in (
        fl.window(256) | fl.global_tokens(range(64)) | fl.random_keys(3),
        fl.presets.bigbird(),
        fl.presets.sparse_transformer(128),
        fl.presets.longnet([64, 4096], [1, 4]),
        fl.documents(lengths=[5, 7]) - fl.landmarks(9),
    ):
        n = 12 if "documents" in pattern.text else million
        assert len(json.dumps(formula(pattern, n))) < 900, pattern


def test_a_rule_is_of_one_head() -> None:
    both = fl.per_head([fl.window(1), fl.random_keys(2, seed=2**40 + 3)])
    assert formula(both, 9, head=0) == {"is": "window", "left": 1, "right": 1, "step": 1}
    assert formula(both, 9, head=1)["seed"] == [3, 256]
    assert formula(both, 9, head=1)["head"] == 1


class evens(Atom):
    """An atom without a rule in `report/formula.py`."""

    def __init__(self) -> None:
        self._set(text="evens()", tables=())

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j % 2 == 0) & (j <= i)

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        every = torch.arange(sizes.n_k)
        return Spans.from_mask(self._allows(sizes, b[:, None], h[:, None], i[:, None], every[None, :]))


def test_an_unknown_atom_is_an_interval_table(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = formula(evens() | fl.window(0), 10)["parts"][0]
    assert rule["is"] == "stretches"
    seen = [
        [key for lo, hi in zip(rule["lo"][a:b], rule["hi"][a:b], strict=True) for key in range(lo, hi)]
        for a, b in zip(rule["first"], rule["first"][1:], strict=False)
    ]
    assert seen == [list(range(0, i + 1, 2)) for i in range(10)]
    monkeypatch.setattr(formulas, "_MAX_INTERVALS", 5)
    with pytest.raises(UnsupportedError, match=r"evens\(\) has no rule for a page.* 30 intervals.*fewer tokens"):
        formula(evens(), 10)


def test_a_picture_goes_along_where_counting_may_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farlight.report.views._PICTURE_PIXELS", 128)
    assert not needs_picture(fl.window(256) | fl.random_keys(3), 1 << 20)
    assert not needs_picture(fl.strided(64), 1 << 20)
    assert not needs_picture(fl.clusters([0, 1] * 50), 100)
    labels = torch.arange(10_000) % 7
    assert needs_picture(fl.clusters(labels), 10_000)
    assert needs_picture(fl.strided(6) | fl.strided(4), 10_000)
    drawn = picture(fl.clusters(labels), 10_000, 0)
    share = densities(fl.clusters(labels), 10_000, pixels=drawn["pixels"])
    assert np.abs((unpack(drawn["ink"]).reshape(share.shape) / 255.0) ** 4 - share).max() < 0.005


# ---- the numbers are the library's ----------------------------------------------------------------------------------------
def test_a_map_shows_what_the_library_says() -> None:
    pattern = fl.causal() & (fl.window(4) | fl.random_keys(1))
    data = pages.mapped(pattern, 300, 4)
    held = Reader(report.render(data)).held("data")
    row = held["patterns"][0]
    result, world = fl.reach(pattern, 300, 4), fl.smallworld(pattern, 300)
    assert row["text"] == repr(pattern)
    assert row["views"]["text"]["world"] == json.loads(json.dumps(world.to_dict()))
    assert row["views"]["text"]["reach"]["mean"] == list(result.mean)
    share = np.stack([unpack(layer) for layer in row["views"]["text"]["reach"]["share"]])
    assert np.allclose(share, result.share[:, np.argsort(result.positions)], atol=1e-6)
    assert row["cost"]["tokens"] == [64, 256, 300]
    assert row["cost"]["links"] == [pattern.count(n) for n in (64, 256, 300)]
    assert row["cost"]["full"] == [n * n for n in (64, 256, 300)]


def test_an_audit_shows_what_the_audit_says(audited: tuple[Any, Any, dict[str, Any]]) -> None:
    result, cut, data = audited
    held = Reader(report.render(data)).held("data")
    assert [row["text"] for row in held["patterns"]] == [repr(pattern) for pattern in pages.PATTERNS]
    for row, judged, pattern in zip(held["patterns"], result.patterns, pages.PATTERNS, strict=True):
        for name in ("density", "mass", "best", "of_best", "worst_head", "token_cosine", "pooled_cosine"):
            assert row["audit"][name] == getattr(judged, name)
        mass = np.array(row["audit"]["mass_by_head"])
        assert mass.shape == (3, 4)
        assert mass.mean() == pytest.approx(judged.mass)
        assert mass.min() == pytest.approx(judged.worst_head)
        assert mass[judged.worst_head_at] == mass.min()
        assert (np.array(row["audit"]["best_by_head"]) >= mass - 1e-4).all()
        assert set(row["views"]) == {"passage", "text"}
        assert row["views"]["text"]["n"] == cut.tokens
        assert row["views"]["passage"]["reach"]["mean"] == list(fl.reach(pattern, 48, 3).mean)
        at = row["cost"]["tokens"].index(64)
        heads = 4 if pattern.varies_over_heads else 1
        assert row["cost"]["links"][at] == pattern.count(64, heads=heads) / heads


def test_lost_links_are_the_heaviest_that_are_missing(audited: tuple[Any, Any, dict[str, Any]]) -> None:
    _, cut, data = audited
    reader = pages.model()
    with torch.no_grad():
        reader.set_attn_implementation("eager")
        full = torch.stack(reader(cut.ids, output_attentions=True).attentions)  # (layers, passages, heads, n, n)
    for row, pattern in zip(data["patterns"], pages.PATTERNS, strict=True):
        mask = pattern.dense(48, heads=4)[0].expand(4, 48, 48)
        lost = full.masked_fill(mask[None, None], 0.0)
        assert row["lost"], pattern
        for link in row["lost"]:
            place = link["layer"], link["passage"], link["head"], link["query"], link["key"]
            assert not pattern.allows(link["query"], link["key"], 48, head=link["head"])
            assert lost[place].item() == pytest.approx(link["share"], rel=1e-3)
            assert link["heads"] >= 1
        assert row["lost"][0]["share"] == pytest.approx(lost.max().item(), rel=1e-3)
        pairs = [(link["passage"], link["query"], link["key"]) for link in row["lost"]]
        assert len(set(pairs)) == len(pairs)
        shares = [link["share"] for link in row["lost"]]
        assert shares == sorted(shares, reverse=True)
        places = [(link["layer"], link["head"]) for link in row["lost"]]
        assert max(places.count(place) for place in places) <= 2


# ---- words of the text ----------------------------------------------------------------------------------------------------
def test_words_are_the_text() -> None:
    result = words_of(pages.text(), pages.tokenizer())
    assert "".join(result[t] for t in range(result.count)) == pages.text()
    assert result.count == len(pages.tokenizer()(pages.text(), add_special_tokens=False)["input_ids"])
    assert (result.before, result.after) == (["[CLS]"], ["[SEP]"])
    lengths = unpack(result.to_page()["lengths"])
    # JavaScript's lengths: the smiley counts twice.
    assert lengths.sum() == len(pages.text().encode("utf-16-le")) // 2


def test_a_long_text_ends_where_the_page_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farlight.report.words._MAX_CHARACTERS", 100)
    result = words_of(pages.text(), pages.tokenizer()).to_page()
    assert result["shown"] < result["tokens"]
    assert result["content"]["size"] <= 100


def test_passages_can_be_spread_over_the_whole_text() -> None:
    spoken, content = pages.tokenizer(), " ".join(f"word{k}" for k in range(46 * 10))
    first = cut_passages(content, spoken, 48, 3)
    spread = cut_passages(content, spoken, 48, 3, spread=True)
    every = cut_passages(content, spoken, 48, None)
    assert (first.starts, spread.starts) == ((0, 46, 92), (0, 138, 276))
    assert every.starts == tuple(range(0, 460, 46))
    assert spread.ids.equal(every.ids[[0, 3, 6]])
    assert cut_passages(content, spoken, 48, 99, spread=True).starts == every.starts


# ---- the commands ---------------------------------------------------------------------------------------------------------
def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def test_map_writes_a_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "map.html"
    code, out, err = run(capsys, "map", "window(3) | global_tokens([0])", "--tokens", "200", "--html", str(page))
    assert (code, err) == (0, "")
    assert out.endswith(f"report: {page}\n")
    assert Reader(page.read_text()).held("data")["patterns"][0]["cost"]["tokens"] == [64, 200]


def test_map_compares_several_patterns(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    page, texts = tmp_path / "map.html", ["window(3)", "window(3) | global_tokens([0])"]
    code, out, err = run(capsys, "map", *texts, "--tokens", "100", "--html", str(page))
    assert (code, err) == (0, "")
    worlds = [fl.smallworld(fl.window(3), 100), fl.smallworld(fl.window(3) | fl.global_tokens([0]), 100)]
    for text, world in zip(texts, worlds, strict=True):
        assert re.search(rf"\d {re.escape(text)} +{world.density:.3%} .* {world.hops:.2f} +{world.diameter} ", out)
        assert str(world) in out
    held = Reader(page.read_text()).held("data")
    assert [row["text"] for row in held["patterns"]] == texts
    code, out, _ = run(capsys, "map", *texts, "--tokens", "100", "--json")
    assert [each["smallworld"]["hops"] for each in json.loads(out)["patterns"]] == [world.hops for world in worlds]
    code, _, err = run(capsys, "map", *texts, "--tokens", "100", "--png", str(tmp_path / "x.png"))
    assert (code, "--png draws one pattern, and 2 were given; --html shows several" in " ".join(err.split())) == (2, True)


def test_audit_writes_a_report_on_the_whole_text(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages.model().save_pretrained(tmp_path / "model")
    pages.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(pages.text())
    capsys.readouterr()  # saving draws a bar of its own
    page = tmp_path / "audit.html"
    arguments = ["audit", str(tmp_path / "text.txt"), "--model", str(tmp_path / "model"), "--pattern", "window(3)"]
    code, out, err = run(capsys, *arguments, "--html", str(page), "--passages", "all")
    assert (code, err) == (0, "")
    assert out.endswith(f"report: {page}\n")
    held = Reader(page.read_text()).held("data")
    whole = cut_passages(pages.text(), pages.tokenizer(), 48, None)
    assert held["passages"]["starts"] == list(whole.starts)
    assert len(page.read_bytes()) < rendering.MOST_BYTES
    code, out, _ = run(capsys, *arguments, "--html", str(page), "--passages", "1", "--head", "1:0", "--head", "0:1")
    assert code == 0
    carried = Reader(page.read_text()).held("data")["weights"]["heads"]
    assert [(each["layer"], each["head"]) for each in carried] == [(1, 0), (0, 1)]
    for head, text in (("99:0", "--head 99:0: .* has layers 0 to"), ("0:99", "--head 0:99"), ("x", "a layer and a head are")):
        code, out, err = run(capsys, *arguments, "--html", str(page), "--head", head)
        assert (code, out, bool(re.search(text, " ".join(err.split())))) == (2, "", True)
    code, _, err = run(capsys, *arguments, "--head", "0:0")
    assert (code, "add --html report.html" in " ".join(err.split())) == (2, True)
    # Of 48 tokens a head has 24 keys for each under one pattern.
    monkeypatch.setattr(sys.modules["farlight.report.weights"], "_NAMED_KEYS", 2 * 48 * 24)
    named = [option for head in ("1:0", "0:1", "1:0") for option in ("--head", head)]
    assert run(capsys, *arguments, "--html", str(page), "--passages", "1", *named)[0] == 0
    monkeypatch.setattr("farlight.analysis.audit.audit", None)  # refused before the model reads
    code, out, err = run(capsys, *arguments, "--html", str(page), "--passages", "1", *named, "--head", "0:2")
    says = "weights of 3 heads: of passages of 48 tokens under 1 pattern it carries 2; name fewer heads"
    assert (code, out, says in " ".join(err.split())) == (2, "", True)
    monkeypatch.undo()
    monkeypatch.setattr(rendering, "MOST_BYTES", 1000)
    code, out, err = run(capsys, *arguments, "--html", str(page), "--passages", "1")
    assert (code, "window(3)" in out, "more than the 1,000" in " ".join(err.split())) == (2, True, True)
    assert "report:" not in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["audit", "--html", "nowhere/page.html"], r"--html 'nowhere/page.html': there is no folder 'nowhere'"),
        (["map", "window(1)", "-n", "9", "--html", "nowhere/page.html"], r"--html 'nowhere/page.html': there is no folder"),
        (
            ["audit", "--passages", "most"],
            r'--passages most: at least one .* such as 8, or "all"',
        ),
    ],
)
def test_a_mistake_gets_one_clear_message(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert re.search(message, err)


# ---- time left ------------------------------------------------------------------------------------------------------------
def test_time_left_is_the_sum_over_remaining_steps() -> None:
    now = [0.0]
    left = TimeLeft(["full", "sparse"] * 4 + ["timed: a", "timed: b"], lambda: now[0])
    assert left.text() == "time left not known yet"
    for name, takes in (("full", 10.0), ("sparse", 1.0), ("full", 12.0), ("sparse", 1.0)):
        left.begin(name)
        now[0] += takes
    left.begin("full")
    # Two more of each, the running one included; a kind that never ran takes the mean of all.
    assert left.seconds() == 11.0 * 2 + 1.0 * 2 + 6.0 * 2
    assert left.text() == "at least 36 s left"
    now[0] += 11.0
    for name, takes in (("sparse", 1.0), ("full", 11.0), ("sparse", 1.0), ("timed: a", 5.0)):
        left.begin(name)
        now[0] += takes
    left.begin("timed: b")
    # The last name has no duration, but its kind has.
    assert left.seconds() == 5.0
    assert left.text().startswith("about")
    assert left.done == 9
    assert TimeLeft(["a"], lambda: 0.0).text() == "time left not known yet"
