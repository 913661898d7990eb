"""The report in a browser: matrix, paths and reach against the library, pair by pair and hop by hop; every control by mouse and
keyboard, in both languages and themes, with no console message and no network request.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pages
import pytest
import torch

import farlight as fl
from farlight import report
from farlight.analysis.passages import cut_passages
from farlight.analysis.plot import densities
from farlight.patterns import Sizes
from farlight.report.formula import formula
from farlight.report.page import strings
from farlight.report.words import Words
from farlight.testing import CASES, Case

MISSING = browser.missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING is not None, reason=MISSING or "")]


@pytest.fixture(scope="module")
def chromium() -> Iterator[browser.Page]:
    with browser.browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def audit_page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    _, _, data = pages.audited()
    file = tmp_path_factory.mktemp("pages") / "audit.html"
    report.write(report.render(data), file)
    return file, data


@pytest.fixture(scope="module")
def map_page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, fl.Pattern, int]:
    pattern, n = fl.window(40) | fl.global_tokens([0, -1]) | fl.random_keys(2), 6000
    file = tmp_path_factory.mktemp("pages") / "map.html"
    report.write(report.render(pages.mapped(pattern, n)), file)
    return file, pattern, n


@pytest.fixture
def audit_open(chromium: browser.Page, audit_page: tuple[Path, dict[str, Any]]) -> Iterator[browser.Page]:
    chromium.requests()
    chromium.open(audit_page[0])
    yield chromium
    assert chromium.console() == []
    assert {url.partition(":")[0] for url in chromium.requests()} <= {"file", "data"}


@pytest.fixture
def map_open(chromium: browser.Page, map_page: tuple[Path, fl.Pattern, int]) -> Iterator[browser.Page]:
    chromium.open(map_page[0])
    yield chromium
    assert chromium.console() == []


# ---- the pattern: rules in JavaScript against the specification ------------------------------------------------------------
DENSE = """
const [rules, n, a, b] = args, pattern = farlight.compile(await farlight.unpackAll(rules), n), rows = [], single = [];
for (let i = 0; i < n; i++) {
  const seen = new Uint8Array(n);
  // Pieces are disjoint: a key that came twice would count twice.
  pattern.row(i).runs((lo, hi) => { for (let j = lo; j < hi; j++) seen[j]++; });
  rows.push(Array.from(seen).join(""));
  single.push(Array.from({ length: n }, (_, j) => (pattern.allows(i, j) ? 1 : 0)).join(""));
}
let wrong = 0;
for (let i = 0; i < n; i++) {
  const from = (i * 7) % n, to = Math.min(n, from + 1 + ((i * 13) % n)), seen = new Uint8Array(n);
  pattern.row(i, from, to).runs((lo, hi) => { for (let j = lo; j < hi; j++) seen[j]++; });
  for (let j = 0; j < n; j++) if (seen[j] !== (j >= from && j < to && single[i][j] === "1" ? 1 : 0)) wrong++;
}
return [rows, single, wrong];
"""
SQUARE = [c for c in CASES if c.n_q == c.n_k and c.q_offset in (None, 0) and 0 < c.n_k <= 400]


def compare_dense(page: browser.Page, pattern: fl.Pattern, n: int, batch: int = 1, heads: int = 1) -> int:
    """Compare all pairs; returns the number of (batch item, head) compared."""
    truth = pattern.dense(n, batch=batch, heads=heads)
    compared = 0
    for b in range(truth.shape[0]):
        for h in range(truth.shape[1]):
            want = ["".join(map(str, row)) for row in truth[b, h].int().tolist()]
            rows, single, wrong = page.run(DENSE, json.loads(json.dumps(formula(pattern, n, batch=b, head=h))), n)
            assert single == want, (pattern, b, h, "allows")
            assert rows == want, (pattern, b, h, "rows")
            assert wrong == 0, (pattern, b, h, "rows cut to a view")
            compared += 1
    return compared


def test_every_shared_case_is_the_same_set(map_open: browser.Page) -> None:
    assert len(SQUARE) > 120
    for case in SQUARE:
        compare_dense(map_open, case.pattern, case.n_k, case.batch, case.heads)


@pytest.mark.parametrize("seed", range(4))
def test_random_expressions_are_the_same_set(seed: int, map_open: browser.Page) -> None:
    """Trees of three operations over atoms that become combs, so that combs are combined with combs."""
    draw = torch.Generator().manual_seed(seed)
    number = lambda low, high: int(torch.randint(low, high, (), generator=draw))  # noqa: E731
    atoms = [
        lambda: fl.strided(number(1, 9)),
        lambda: fl.landmarks((every := number(2, 9)), number(1, every + 1)),
        lambda: fl.window(number(0, 9), number(0, 9), dilation=number(1, 6)),
        lambda: fl.strided(number(2, 7), phase=number(0, 7)),
        lambda: fl.causal(),
        lambda: fl.random_keys(number(1, 5), seed=number(0, 99)),
        lambda: fl.random_blocks(number(1, 4), block=number(2, 9), causal=bool(number(0, 2))),
        lambda: fl.blocked_window(number(0, 2), number(0, 2), block=number(2, 20)),
        lambda: fl.global_tokens([number(0, 40), -1]),
        lambda: fl.clusters(torch.randint(-1, 4, (61,), generator=draw)),
    ]
    for _ in range(12):
        pattern = atoms[number(0, len(atoms))]()
        for _ in range(3):
            other = atoms[number(0, len(atoms))]()
            pattern = [pattern | other, pattern & other, pattern - other, ~(pattern | other)][number(0, 4)]
        compare_dense(map_open, pattern, 61)


def test_combinations_of_many_parts_are_the_same_set(map_open: browser.Page) -> None:
    """A union or intersection of three and more is one node of the tree."""
    many = fl.window(1) | fl.global_tokens([0]) | fl.random_keys(1) | fl.strided(9) | fl.landmarks(11)
    both = fl.causal() & fl.window(20) & fl.strided(2) & fl.strided(3)
    for pattern in (many, both, many & both & fl.window(9), both | many | fl.random_keys(2, seed=5), fl.full() - many - both):
        compare_dense(map_open, pattern, 61)


def test_the_comparison_detects_a_wrong_rule(map_open: browser.Page) -> None:
    """One pair too many, one different hash, one missing key."""
    for right, wrong in ((fl.window(3), fl.window(4)), (fl.random_keys(3), fl.random_keys(3, seed=1))):
        rows, single, _ = map_open.run(DENSE, formula(wrong, 40), 40)
        want = ["".join(map(str, row)) for row in right.dense(40)[0, 0].int().tolist()]
        assert rows != want
        assert single != want


def test_long_texts_have_the_same_rows(map_open: browser.Page) -> None:
    """A million tokens: some rows, and hashes whose products need more than 32 bits."""
    n = 1 << 20
    code = """
    const [rules, n, rows] = args, pattern = farlight.compile(await farlight.unpackAll(rules), n);
    return rows.map((i) => { const out = []; pattern.row(i).runs((lo, hi) => out.push([lo, hi])); return out; });
    """
    rows = [0, 1, 777, n // 2, n - 2, n - 1]
    for pattern in (
        fl.window(256) | fl.global_tokens([0, 5, -1]) | fl.random_keys(3),
        fl.causal() & (fl.random_keys(5, causal=True) | fl.window(7, 0)),
        fl.presets.bigbird(64, 3, seed=9),
        fl.window(20, dilation=64) - fl.window(100),
        fl.presets.logsparse(),
    ):
        sizes = Sizes.of(n)
        row_runs = map_open.run(code, json.loads(json.dumps(formula(pattern, n))), n, rows)
        for i, runs in zip(rows, row_runs, strict=True):
            want = torch.zeros(n, dtype=torch.bool)
            for lo, hi in runs:
                assert not want[lo:hi].any()
                want[lo:hi] = True
            assert want.equal(pattern.dense_rows(i, i + 1, sizes)[0, 0, 0]), (pattern, i)


@pytest.mark.parametrize("n, pixels", [(700, 64), (1000, 97), (333, 333)])
def test_pixels_equal_densities(n: int, pixels: int, map_open: browser.Page) -> None:
    code = """
    const [rules, n, pixels] = args, pattern = farlight.compile(await farlight.unpackAll(rules), n), out = [];
    await farlight.density(pattern, { top: 0, left: 0, span: n }, pixels, (r, line) => out.push(Array.from(line)), () => true);
    return out;
    """
    for pattern in (
        fl.window(20) | fl.global_tokens([0, 100]) | fl.random_keys(3),
        fl.strided(7),
        fl.presets.sparse_transformer(16),
        fl.presets.sparse_transformer(16, "fixed", 3),
        fl.window(5, dilation=40) - fl.strided(80),
        fl.clusters(torch.arange(n) % 13) | fl.landmarks(50, 20),
    ):
        drawn = np.array(map_open.run(code, formula(pattern, n), n, pixels))
        assert np.allclose(drawn, densities(pattern, n, pixels=pixels), atol=1e-6), pattern


# ---- paths and reach --------------------------------------------------------------------------------------------------------
PATHS = """
const [rules, n, pairs] = args, pattern = farlight.compile(await farlight.unpackAll(rules), n), out = [];
for (const [source, target] of pairs) {
  const found = await farlight.path(pattern, source, target);
  out.push({ positions: found.positions, heard: found.heard,
    rules: found.hops.map((hop) => hop.rules.map((rule) => farlight.tellRule(rule, farlight.say))) });
}
return out;
"""


def compare_paths(page: browser.Page, pattern: fl.Pattern, n: int, pairs: list[tuple[int, int]], head: int = 0) -> None:
    results = page.run(PATHS, json.loads(json.dumps(formula(pattern, n, head=head))), n, pairs)
    for (source, target), result in zip(pairs, results, strict=True):
        want = fl.path(pattern, n, source, target, head=head)
        assert result["positions"] == list(want.positions), (pattern, source, target)
        if source != target:
            assert result["rules"] == [list(hop.rules) for hop in want.hops], (pattern, source, target)
        if not want:
            assert result["heard"] == want.heard


@pytest.mark.parametrize("case", SQUARE[:: max(1, len(SQUARE) // 60)], ids=str)
def test_paths_equal_fl_path(case: Case, map_open: browser.Page) -> None:
    n = case.n_k
    pairs = [(0, n - 1), (n - 1, 0), (n // 3, n // 2), (n // 2, n // 2), (n - 1, n // 4), (1 % n, n * 3 // 4)]
    head = case.heads - 1 if case.pattern.varies_over_heads else 0
    if case.batch == 1:
        compare_paths(map_open, case.pattern, n, pairs, head)


def test_paths_over_long_texts_equal_fl_path(map_open: browser.Page) -> None:
    n = 50_000
    for pattern in (
        fl.window(64) | fl.random_keys(2),
        fl.window(200),
        fl.presets.sparse_transformer(128),
        fl.presets.bigbird(64, 2),
        fl.causal() & (fl.window(30) | fl.landmarks(100)),
        fl.causal() & (fl.window(9) | (fl.causal() & fl.landmarks(500)) | (fl.full() & fl.causal() & fl.offsets([-7]))),
    ):
        compare_paths(map_open, pattern, n, [(10, n - 10), (n - 10, 10), (n // 2, 17)])


def test_reach_equals_fl_reach(map_open: browser.Page) -> None:
    code = """
    const [rules, n, layers] = args, pattern = farlight.compile(await farlight.unpackAll(rules), n), out = [];
    for (let t = 0; t < n; t++) {
      const level = await farlight.heardOf(pattern, t, layers), row = new Array(layers + 1).fill(0);
      level.forEach((at) => { if (at >= 0) for (let l = at; l <= layers; l++) row[l]++; });
      out.push(row);
    }
    return out;
    """
    for pattern in (fl.window(3) | fl.random_keys(1), fl.causal() & (fl.window(2) | fl.strided(9)), fl.presets.logsparse()):
        share = np.array(map_open.run(code, formula(pattern, 90), 90, 4)).T / 90
        want = fl.reach(pattern, 90, 4, targets=90)
        assert np.allclose(share, want.share[:, np.argsort(want.positions)], atol=1e-12), pattern


# ---- the page ---------------------------------------------------------------------------------------------------------------
def test_the_matrix_zooms_to_single_pairs(map_open: browser.Page, map_page: tuple[Path, fl.Pattern, int]) -> None:
    _, pattern, n = map_page
    page, grid = map_open, "return farlight.matrix"
    assert page.js(f"{grid}.view") == {"top": 0, "left": 0, "span": n}
    page.slide("zoom", 1000)
    page.settle()
    assert page.js(f"{grid}.view.span") == 16
    page.js("farlight.matrix.show({top: 1000, left: 980, span: 64})")
    page.settle()
    shown = np.array(page.run("return Array.from(farlight.matrix.shares)")).reshape(64, 64)
    want = pattern.dense_rows(1000, 1064, Sizes.of(n))[0, 0, :, 980:1044].numpy()
    assert np.array_equal(shown > 0.5, want)
    page.click("#whole")
    page.settle()
    side = page.js(f"{grid}.pixels")
    whole = np.array(page.run("return Array.from(farlight.matrix.shares)")).reshape(side, side)
    assert np.allclose(whole, densities(pattern, n, pixels=side), atol=1e-6)
    assert page.js("return document.getElementById('grid').dataset.state") == "exact"


def test_the_matrix_by_keyboard(map_open: browser.Page, map_page: tuple[Path, fl.Pattern, int]) -> None:
    from selenium.webdriver.common.keys import Keys

    page, n = map_open, map_page[2]
    page.js("farlight.matrix.cursor = {i: 30, j: 40}; farlight.matrix.show({top: 0, left: 0, span: 100})")
    page.press("#grid", Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_LEFT)
    assert page.js("return farlight.matrix.cursor") == {"i": 32, "j": 39}
    page.wait(lambda: page.text("here").startswith("32 looks at 39: allowed by window."), "the status line")
    page.press("#grid", "+")
    assert page.js("return farlight.matrix.view.span") == 50
    page.press("#grid", "-", "-")
    assert page.js("return farlight.matrix.view.span") == 200
    page.press("#grid", Keys.ENTER)
    page.wait(lambda: "32 hears of 39 after 1 layer" in page.text("told"), "the path")
    page.press("#grid", Keys.ESCAPE)
    page.wait(lambda: page.text("told") == "Choose two tokens.", "the path to be cleared")
    page.press("#grid", "0")
    assert page.js("return farlight.matrix.view.span") == n


def test_a_click_on_the_matrix_traces_the_path(map_open: browser.Page, map_page: tuple[Path, fl.Pattern, int]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    page, (_, pattern, n) = map_open, map_page
    grid = page.driver.find_element(By.ID, "grid")
    page.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", grid)
    ActionChains(page.driver).move_to_element_with_offset(grid, 100, -120).click().perform()
    source, target = page.js("return [farlight.state.source, farlight.state.target]")
    assert source > target > 0
    want = fl.path(pattern, n, source, target)
    page.wait(lambda: page.js("return farlight.path_ && farlight.path_.positions") == list(want.positions), "the path")
    assert page.js("return document.querySelectorAll('#over .hop').length") == 1
    assert page.js("return document.querySelectorAll('#hops li').length") == want.layers
    told = f"{target:,} hears of {source:,} after {want.layers} layer"
    assert page.text("told").startswith(told)


def test_clicking_two_words_highlights_their_path(audit_open: browser.Page) -> None:
    page = audit_open
    page.click('#patterns input[value="1"]')
    page.settle()
    page.click('#tokens [data-at="5"]')
    page.click('#tokens [data-at="40"]')
    want = fl.path(pages.PATTERNS[1], 48, 5, 40)
    page.wait(lambda: page.js("return farlight.path_ && farlight.path_.positions") == list(want.positions), "the path")
    marked = "return [...document.querySelectorAll('#tokens .%s')].map((s) => Number(s.dataset.at))"
    assert page.js(marked % "source") == [5]
    assert page.js(marked % "target") == [40]
    assert page.js(marked % "relay") == sorted(want.positions[1:-1])
    assert page.js("return document.querySelector('#tokens [data-at=\"40\"]').getAttribute('aria-pressed')") == "true"
    word = page.js("return document.querySelector('#tokens [data-at=\"40\"]').textContent")
    assert page.text("told").startswith(f"“{word}” (40) hears of ")


def test_line_breaks_are_faint_and_two_make_a_paragraph(
    chromium: browser.Page, audit_page: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """Tokens of white space alone, as language models have them."""
    words = Words("far\nlight\n\nsea", np.array([3, 4, 9, 10, 11, 14]), ["[CLS]"], ["[SEP]"])
    data = audit_page[1]
    data = {**data, "words": words.to_page(), "passages": {**data["passages"], "starts": [0] * len(data["passages"]["starts"])}}
    report.write(report.render(data), tmp_path / "lines.html")
    chromium.open(tmp_path / "lines.html")
    assert chromium.text("tokens").startswith("[CLS]far↵ light↵ ↵\n\nsea")
    assert chromium.js("return [...document.querySelectorAll('#tokens .blank')].map((s) => s.dataset.at)") == ["2", "4", "5"]
    assert chromium.js("return farlight.context(3, 3)") == ["far ", "  sea"]


SHOWN = """
const cells = (row, name) => [row.querySelector(`[data-${name}]`)].map((c) => [Number(c.dataset[name]), c.textContent])[0];
return [...document.querySelectorAll("#attends-keys tbody tr")].map((row) =>
  [Number(row.dataset.key), cells(row, "full"), cells(row, "under"), row.querySelector(".tag").textContent]);
"""


def true_weights(layer: int, head: int, query: int, pattern: fl.Pattern) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention weights of one row of the middle passage, full and under the pattern: values that are unit vectors read them
    from `fl.attention` on the model's own queries and keys."""
    from farlight.hf.interface import use_pattern

    calls: list[Any] = []
    passage = cut_passages(pages.text(), pages.tokenizer(), 48, 3).ids[1:2]
    model = pages.model()
    with torch.no_grad(), use_pattern(model, None, observer=calls.append):
        model(passage)
    wide = torch.nn.functional.pad  # to the width of the unit vectors, which changes no score
    q, k = (wide(x.double(), (0, 48 - x.shape[3])) for x in (calls[layer].q, calls[layer].k))
    unit, scale = torch.eye(48, dtype=torch.float64).expand(1, q.shape[1], 48, 48), calls[layer].q.shape[3] ** -0.5
    full, sparse = (fl.attention(q, k, unit, p, scale=scale, backend="reference") for p in (fl.full(), pattern))
    return full[0, head, query], sparse[0, head, query]


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_a_word_that_is_pointed_at_shows_what_it_attends_to(chosen: int, audit_open: browser.Page) -> None:
    """Mouse, then another head; every listed weight is Python's to four digits, kept and lost are the pattern's."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    page, pattern = audit_open, pages.PATTERNS[chosen]
    page.click(f'#patterns input[value="{chosen}"]')
    for index, query in ((0, 20), (7, 31)):
        page.js(
            "const s = document.getElementById('attends-head'); s.value = arguments[0]; s.dispatchEvent(new Event('change'))",
            index,
        )
        head = page.js("return farlight.data.weights.heads[arguments[0]].head", index)
        layer = page.js("return farlight.data.weights.heads[arguments[0]].layer", index)
        word = page.driver.find_element(By.CSS_SELECTOR, f'#tokens [data-at="{query}"]')
        page.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", word)
        ActionChains(page.driver).move_to_element(word).perform()
        start = f"“{word.text}” ({query}) in layer {layer}, head {head}: "
        page.wait(lambda start=start: page.text("attends-says").startswith(start), "the weights")
        full, sparse = true_weights(layer, head, query, pattern)
        shown = page.js(SHOWN)
        assert len(shown) == 10
        for key, (full_value, full_text), (under_value, under_text), fate in shown:
            allowed = pattern.allows(query, key, 48, head=head)
            assert fate == ("kept" if allowed else "lost")
            assert full_value == pytest.approx(full[key].item(), rel=3e-4)
            assert under_value == pytest.approx(sparse[key].item(), rel=6e-4, abs=1e-12)
            for text, value in ((full_text, full[key].item()), (under_text, sparse[key].item())):
                assert float(text.rstrip("%")) == pytest.approx(100 * value, rel=6e-4, abs=0.051 if value > 0.001 else 5e-4)
        heaviest = full.argsort(descending=True)[:5].tolist()
        assert heaviest == [key for key, *_ in shown if key in heaviest]
        heaviest_under = sparse.argsort(descending=True)[: min(5, int((sparse > 0).sum()))].tolist()
        assert set(heaviest_under) <= {key for key, *_ in shown}
        keeps = page.text("attends-says").rpartition("keeps ")[2].partition("%")[0]
        mask = torch.tensor([pattern.allows(query, key, 48, head=head) for key in range(48)])
        assert float(keeps) == pytest.approx(100 * full[mask].sum().item(), abs=0.06)
        tinted = page.js("return [...document.querySelectorAll('#tokens .attended')].map((s) => Number(s.dataset.at))")
        assert set(full.argsort(descending=True)[:16].tolist()) <= set(tinted)
        lost = page.js("return [...document.querySelectorAll('#tokens .attended.gone')].map((s) => Number(s.dataset.at))")
        assert all(not pattern.allows(query, key, 48, head=head) for key in lost)


def test_a_tap_and_the_keyboard_show_weights_too(audit_page: tuple[Path, dict[str, Any]]) -> None:
    from selenium.webdriver.common.keys import Keys

    with browser.browser(390, 844) as phone:
        phone.open(audit_page[0])
        phone.tap('#tokens [data-at="12"]')
        phone.wait(lambda: "(12) in layer" in phone.text("attends-says"), "the weights of a tapped word")
        phone.press('#tokens [tabindex="0"]', Keys.ARROW_RIGHT)
        phone.wait(lambda: "(13) in layer" in phone.text("attends-says"), "the weights of the next word")
        phone.js("farlight.set({passage: 0})")
        phone.wait(lambda: phone.text("attends-says") == "Weights are carried for passage 2.", "the other passage")
        phone.click("#attends-elsewhere")
        assert phone.js("return farlight.state.passage") == 1
        assert phone.console() == []


def test_words_by_keyboard(audit_open: browser.Page) -> None:
    from selenium.webdriver.common.keys import Keys

    page, at = audit_open, "return Number(document.activeElement.dataset.at)"
    assert page.js("return document.querySelectorAll('#tokens [tabindex=\"0\"]').length") == 1
    page.press('#tokens [tabindex="0"]', Keys.HOME)
    for _ in range(3):
        page.press('#tokens [tabindex="0"]', Keys.ARROW_RIGHT)
    assert page.js(at) == 3
    page.press('#tokens [tabindex="0"]', Keys.ENTER)
    page.press('#tokens [tabindex="0"]', Keys.END)
    assert page.js(at) == 47
    page.press('#tokens [tabindex="0"]', Keys.SPACE)
    assert page.js("return [farlight.state.source, farlight.state.target]") == [3, 47]


def test_every_control_is_reached_by_tab(audit_open: browser.Page) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    page, reached = audit_open, []
    page.js("document.activeElement.blur(); window.scrollTo(0, 0)")
    page.driver.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    for _ in range(90):
        reached.append(page.js("const a = document.activeElement; return a.id || a.className || a.tagName"))
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
    assert reached[0] == "skip"
    for name in ("language", "theme", "grid", "zoom", "source", "target", "swap", "find-word", "layer"):
        assert name in reached, (name, reached)


def test_the_slider_tells_the_reach(audit_open: browser.Page, audit_page: tuple[Path, dict[str, Any]]) -> None:
    page = audit_open
    page.click('#patterns input[value="0"]')
    page.settle()
    page.js("farlight.set({source: 2, target: 20})")
    page.click('#tint [value="relays"]')
    page.wait(lambda: page.js("return farlight.levels !== null"), "the levels")
    want = fl.reach(pages.PATTERNS[0], 48, 3)
    for layer in (0, 1, 3):
        page.slide("layer", layer)
        mean, worst = 100 * want.mean[layer], 100 * want.worst[layer]
        assert f"heard of {mean:.1f}% of the text on average, and of {worst:.1f}%" in page.text("reach-says")
        count = str(6 * layer + 1)
        page.wait(lambda count=count: page.js("return document.getElementById('strip').dataset.heard") == count, "the strip")
        tinted = page.js("return [...document.querySelectorAll('#tokens .heard')].map((s) => Number(s.dataset.at))")
        shown = page.js(
            "return [...document.querySelectorAll('#tokens .heard')].map((s) => getComputedStyle(s).backgroundColor)"
        )
        assert "rgba(0, 0, 0, 0)" not in shown
        marked = set(fl.path(pages.PATTERNS[0], 48, 2, 20).positions)
        assert tinted == [at for at in range(20 - 3 * layer, 21 + 3 * layer) if at not in marked]


def test_the_whole_text_scope(audit_open: browser.Page, audit_page: tuple[Path, dict[str, Any]]) -> None:
    page, (_, data) = audit_open, audit_page
    n = data["passages"]["of"]
    page.click('#scopes [data-scope="text"]')
    page.settle()
    assert page.js("return farlight.n()") == n
    spoken = page.js("return [...document.querySelectorAll('#tokens span')].map((s) => s.textContent)")
    assert len(spoken) == n
    assert "😀" in spoken
    assert pages.HOSTILE.split()[0][:2] in spoken[:40]
    assert page.js("return document.querySelectorAll('main img').length") == 0
    page.js("document.getElementById('find-word').value = 'peace'; document.getElementById('find').requestSubmit()")
    assert page.text("find-says") == "1 of 1"
    assert page.js("return [...document.querySelectorAll('#tokens .hit')].map((s) => Number(s.dataset.at))") == [
        spoken.index("peace")
    ]
    page.press("#target", "\b" * 6 + str(n - 1) + "\n")
    page.press("#source", "\b" * 6 + "4\n")
    want = fl.path(pages.PATTERNS[page.js("return farlight.state.pattern")], n, 4, n - 1)
    page.wait(lambda: page.js("return farlight.path_ && farlight.path_.positions") == list(want.positions), "the path")


def test_heads_and_lost_words(audit_open: browser.Page, audit_page: tuple[Path, dict[str, Any]]) -> None:
    page, (_, data) = audit_open, audit_page
    page.click('#patterns input[value="1"]')
    page.settle()
    row = data["patterns"][1]
    cells = page.js("return [...document.querySelectorAll('#heat button')].map((b) => b.textContent)")
    assert cells == [f"{100 * share:.0f}" for layer in row["audit"]["mass_by_head"] for share in layer]
    page.js("document.querySelectorAll('#heat button')[2].click()")
    assert page.js("return farlight.state.head") == 2
    assert page.js("return document.getElementById('head').value") == "2"
    page.settle()
    shown = np.array(page.run("return Array.from(farlight.matrix.shares)")).reshape(48, 48) > 0.5
    assert np.array_equal(shown, pages.PATTERNS[1].dense(48, heads=3)[0, 2].numpy())
    first = row["lost"][0]
    page.click("#losses button")
    page.wait(lambda: page.js("return farlight.path_ !== null"), "the path")
    state = page.js("return farlight.state")
    assert (state["passage"], state["head"], state["source"], state["target"]) == (
        first["passage"],
        first["head"],
        first["key"],
        first["query"],
    )
    assert page.js("return document.querySelectorAll('#losses tbody tr').length") == len(row["lost"])


def test_the_cost_is_drawn_beside_full_attention(audit_open: browser.Page) -> None:
    page = audit_open
    for name in ("links-curve", "time-curve"):
        assert page.js("return document.querySelectorAll(`#${arguments[0]} .full`).length", name) == 1
    assert page.js("return document.querySelectorAll('#links-curve .mine').length") > 2
    assert page.js("return document.querySelectorAll('#links-curve .other').length") == 2
    assert "times fewer" in page.text("cost-says")
    assert "Measured over" in page.text("cost-says")


def test_what_differs_by_layer_shows_heads_and_losses(chromium: browser.Page, tmp_path: Path) -> None:
    """A fit has no single matrix: its sections are hidden until a pattern with a matrix is chosen."""
    _, _, data = pages.audited([{0: fl.window(2), 2: fl.window(9)}, fl.window(3)])
    assert [bool(row["views"]) for row in data["patterns"]] == [False, True]
    assert {link["layer"] for link in data["patterns"][0]["lost"]} == {0, 2}
    report.write(report.render(data), tmp_path / "fit.html")
    chromium.open(tmp_path / "fit.html")
    hidden = "return ['matrix', 'words', 'reach', 'cost', 'heads', 'lost'].filter((n) => document.getElementById(n).hidden)"
    chromium.click('#patterns input[value="0"]')
    assert chromium.js(hidden) == ["matrix", "reach", "cost"]
    assert not chromium.js("return document.getElementById('no-matrix').hidden")
    chromium.click("#language")
    chromium.click("#language")
    chromium.click('#patterns input[value="1"]')
    chromium.settle()
    assert chromium.js(hidden) == []
    shown = np.array(chromium.run("return Array.from(farlight.matrix.shares)")).reshape(48, 48) > 0.5
    assert np.array_equal(shown, fl.window(3).dense(48)[0, 0].numpy())
    assert chromium.console() == []


def test_language_and_theme(audit_open: browser.Page) -> None:
    page, words = audit_open, strings()
    assert page.js("return document.documentElement.lang") == "en"
    english = page.js("return document.body.innerText")
    page.click("#language")
    page.settle()
    assert page.js("return document.documentElement.lang") == "zh-Hans"
    assert page.text("matrix-title") == words["zh"]["matrix.title"]
    chinese = page.js("return document.body.innerText")
    assert [said for said in words["en"].values() if len(said) > 12 and said in chinese] == []
    page.click("#language")
    assert page.js("return document.body.innerText") == english
    back = "return getComputedStyle(document.body).backgroundColor"
    light = page.js(back)
    page.click("#theme")
    page.settle()
    assert page.js("return document.documentElement.dataset.theme") == "dark"
    assert page.js(back) != light
    assert page.js("return document.getElementById('theme').getAttribute('aria-pressed')") == "true"


@pytest.mark.parametrize("dark", [False, True])
def test_the_head_map_is_legible(dark: bool, audit_open: browser.Page) -> None:
    """Contrast of at least 4.5 in every cell, as WCAG 2 AA asks of small text, for shares over the whole range."""
    page = audit_open
    page.js("document.documentElement.dataset.theme = arguments[0]", "dark" if dark else "light")
    page.js(
        "farlight.row().audit.mass_by_head = farlight.row().audit.mass_by_head.map((r, l) => r.map((_, h) => (4 * l + h) / 11))"
    )
    page.js("farlight.tell('theme')")
    code = """
    const light = (text) => text.match(/\\d+/g).slice(0, 3).map((x) => x / 255)
      .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
      .reduce((sum, x, c) => sum + x * [0.2126, 0.7152, 0.0722][c], 0);
    return [...document.querySelectorAll("#heat button")].map((b) => {
      const s = getComputedStyle(b), a = light(s.color), c = light(s.backgroundColor);
      return (Math.max(a, c) + 0.05) / (Math.min(a, c) + 0.05);
    });
    """
    contrasts = page.js(code)
    assert len(contrasts) == 12
    assert min(contrasts) >= 4.5


def test_a_map_opens_with_the_path_asked_for(chromium: browser.Page, tmp_path: Path) -> None:
    """`farlight map --from 5 --to -1 --html`."""
    pattern, n = fl.window(4) | fl.random_keys(1), 300
    chain = fl.path(pattern, n, 5, -1)
    data = report.map_data(pattern, n, fl.smallworld(pattern, n), fl.reach(pattern, n, 3), chain=chain)
    report.write(report.render(data), tmp_path / "ends.html")
    chromium.open(tmp_path / "ends.html")
    assert chromium.js("return [farlight.state.source, farlight.state.target]") == [5, n - 1]
    chromium.wait(lambda: chromium.js("return farlight.path_ && farlight.path_.positions") == list(chain.positions), "the path")


def test_chinese_buttons_stay_on_one_line_on_a_phone(audit_page: tuple[Path, dict[str, Any]]) -> None:
    with browser.browser(390, 844) as phone:
        phone.open(audit_page[0])
        phone.click("#language")
        phone.settle()
        tall = "return [...document.querySelectorAll('main .buttons button, .top button')].map((b) => b.clientHeight)"
        assert max(phone.js(tall)) < 40
        assert phone.js("return document.documentElement.scrollWidth") <= 390


def test_the_theme_follows_the_system_and_a_phone_shows_all(audit_page: tuple[Path, dict[str, Any]]) -> None:
    with browser.browser(390, 844, dark=True) as phone:
        phone.open(audit_page[0])
        assert phone.js("return document.documentElement.dataset.theme") == "dark"
        # Nothing sticks out sideways.
        assert phone.js("return document.documentElement.scrollWidth") <= 390
        assert phone.console() == []


# ---- kinds of rules, schematic, search --------------------------------------------------------------------------------------
KINDS = """
const [rules, n] = args, pattern = farlight.compile(await farlight.unpackAll(rules), n), out = {};
for (const { kind, pattern: part } of farlight.byKind(pattern)) {
  out[kind] = Array.from({ length: n }, (_, i) => Array.from({ length: n }, (_, j) => (part.allows(i, j) ? 1 : 0)).join(""));
}
return out;
"""


def test_links_by_kind_of_rule_are_the_parts_of_the_pattern(map_open: browser.Page) -> None:
    """Every kind is the pattern with the other kinds left out; all kinds together are the pattern."""
    near, named, drawn = fl.window(3), fl.global_tokens([0, 20]), fl.random_keys(1)
    chosen = fl.clusters(torch.arange(40) % 5)
    cases: list[tuple[fl.Pattern, dict[str, fl.Pattern]]] = [
        (near | named | drawn, {"window": near, "global": named, "random": drawn}),
        (fl.causal() & (near | drawn), {"window": fl.causal() & near, "random": fl.causal() & drawn}),
        ((near | chosen) - fl.window(0), {"window": near - fl.window(0), "content": chosen - fl.window(0)}),
        (
            fl.strided(4) | fl.blocked_window(1, 0, block=5),
            {"other": fl.strided(4), "window": fl.blocked_window(1, 0, block=5)},
        ),
        (fl.causal(), {"other": fl.causal()}),
    ]
    for pattern, parts in cases:
        kinds = map_open.run(KINDS, json.loads(json.dumps(formula(pattern, 40))), 40)
        want = {name: ["".join(map(str, row)) for row in part.dense(40)[0, 0].int().tolist()] for name, part in parts.items()}
        assert kinds == want, pattern


def test_links_are_coloured_and_ticked_by_rule(map_open: browser.Page, map_page: tuple[Path, fl.Pattern, int]) -> None:
    page, (_, pattern, n) = map_open, map_page
    assert page.js("return [...document.querySelectorAll('#kinds input')].map((i) => i.value)") == [
        "global",
        "window",
        "random",
    ]
    page.js("farlight.matrix.show({top: 0, left: 0, span: 64})")
    page.settle()
    code = """
    const c = document.getElementById("grid"), side = c.width / 64, context = c.getContext("2d"), names = {}, out = [];
    for (const kind of ["global", "window", "random"]) names[farlight.colourOf(kind).join()] = kind;
    const data = context.getImageData(0, 0, c.width, c.width).data;
    for (let i = 0; i < 64; i++) for (let j = 0; j < 64; j++) {
      const at = 4 * (Math.floor((i + .5) * side) * c.width + Math.floor((j + .5) * side));
      const [r, g, b, a] = data.slice(at, at + 4);
      out.push(a ? names[[r, g, b].join()] : "");
    }
    return out;
    """
    colours = np.array(page.js(code)).reshape(64, 64)
    rows = lambda part: part.dense_rows(0, 64, Sizes.of(n))[0, 0, :, :64].numpy()  # noqa: E731
    named, near = rows(fl.global_tokens([0, -1])), rows(fl.window(40))
    want = np.where(named, "global", np.where(near, "window", np.where(rows(pattern), "random", "")))
    assert (colours == want).all()
    page.click('#kinds [value="window"]')
    page.settle()
    shown = np.array(page.run("return Array.from(farlight.matrix.shares)")).reshape(64, 64) > 0.5
    assert np.array_equal(shown, rows(fl.global_tokens([0, -1]) | fl.random_keys(2)))
    page.click('#kinds [value="window"]')
    places = page.js("return [...document.querySelectorAll('#over .place')].map((t) => t.textContent)")
    assert {"20", "40"} <= set(places)


def test_a_hairline_is_shown_as_a_schematic_first(chromium: browser.Page, tmp_path: Path) -> None:
    pattern, n = fl.window(4, 0) | fl.global_tokens([0, -1]), 20_000
    report.write(report.render(pages.mapped(pattern, n)), tmp_path / "long.html")
    chromium.open(tmp_path / "long.html")
    chromium.wait(lambda: not chromium.js("return document.getElementById('sketch').hidden"), "the schematic")
    assert "48 × 48 cells stand for 20,000 tokens" in chromium.text("sketch-says")
    small = "const p = await farlight.pattern(); const s = farlight.compile(farlight.schematic(p.rule, farlight.n()), 48);"
    seen = np.array(
        chromium.run(
            f"{small} return Array.from({{length: 48}}, (_, i) => Array.from({{length: 48}}, (_, j) => +s.allows(i, j)))"
        )
    )
    i, j = np.indices((48, 48))
    assert np.array_equal(seen > 0, (np.isin(i, (0, 47)) | np.isin(j, (0, 47))) | ((i - j >= 0) & (i - j <= 1)))
    chromium.click('#scale-pick [value="scale"]')
    assert chromium.js("return document.getElementById('sketch').hidden")
    assert chromium.js("return getComputedStyle(document.getElementById('grid')).visibility") == "visible"
    assert chromium.console() == []


def test_search_marks_every_hit_of_the_whole_text(audit_open: browser.Page) -> None:
    page, text = audit_open, pages.text()
    count = text.count("the war")
    assert count > 3
    page.js("document.getElementById('find-word').value = 'The War'; document.getElementById('find').requestSubmit()")
    shown: set[str] = set()
    for _ in range(count):
        shown.add(page.text("find-says"))
        now = page.js("return [...document.querySelectorAll('#tokens .hit.now')].map((s) => s.textContent)")
        assert [word.strip() for word in now] == ["the", "war"]
        page.click("#find-next")
    assert shown == {f"{number} of {count}" for number in range(1, count + 1)}
    page.click('#scopes [data-scope="text"]')
    marked = page.js("return [...document.querySelectorAll('#tokens .hit')].map((s) => s.textContent.trim())")
    assert marked == ["the", "war"] * count
    assert page.js("return document.querySelectorAll('#hits rect').length") == count
    page.js("document.getElementById('find-word').value = 'nobody'; document.getElementById('find').requestSubmit()")
    assert page.text("find-says") == "not found"
    assert page.js("return document.querySelectorAll('#tokens .hit').length") == 0


def test_several_patterns_stand_side_by_side(chromium: browser.Page, tmp_path: Path) -> None:
    """`farlight map A B C --html`: a picture and the numbers of each; a click chooses one everywhere."""
    parsed, n = [fl.window(3), fl.window(3) | fl.global_tokens([0]), fl.window(2) | fl.random_keys(2)], 64
    worlds, reaches = [fl.smallworld(p, n) for p in parsed], [fl.reach(p, n, 3) for p in parsed]
    report.write(report.render(report.maps_data(parsed, n, worlds, reaches)), tmp_path / "maps.html")
    page = chromium
    page.open(tmp_path / "maps.html")
    page.wait(lambda: page.js("return document.getElementById('gallery').dataset.drawn") == "3", "the pictures")
    read = """
    return [...document.querySelectorAll("#gallery button")].map((b) => [...b.children].map((c) => c.textContent).slice(1));
    """
    told = page.js(read)
    assert [texts[0] for texts in told] == [repr(p) for p in parsed]
    for texts, world, reach in zip(told, worlds, reaches, strict=True):
        assert texts[2] == f"{world.hops:.2f} hops on average"
        assert reach.capacity is not None
        assert texts[3] == f"tokens that share one relay: {round(reach.capacity.bottleneck)}"
    ink = """
    return [...document.querySelectorAll("#gallery canvas")].map((c) => {
      const side = c.width / 64, data = c.getContext("2d").getImageData(0, 0, c.width, c.width).data;
      return Array.from({ length: 4096 }, (_, x) =>
        +(data[4 * (Math.floor((Math.floor(x / 64) + .5) * side) * c.width + Math.floor(((x % 64) + .5) * side)) + 3] > 0));
    });
    """
    for shown, pattern in zip(page.js(ink), parsed, strict=True):
        assert np.array_equal(np.array(shown).reshape(64, 64) > 0, pattern.dense(n)[0, 0].numpy())
    page.click('#gallery [data-pattern="2"]')
    page.settle()
    assert page.js("return document.querySelector('#patterns input:checked').value") == "2"
    shown = np.array(page.run("return Array.from(farlight.matrix.shares)")).reshape(64, 64) > 0.5
    assert np.array_equal(shown, parsed[2].dense(n)[0, 0].numpy())
    assert page.text("facts").startswith("Links")
    assert page.console() == []


AXE = """
const found = await window.axe.run(document, { resultTypes: ["violations"] });
return found.violations.filter((v) => ["serious", "critical"].includes(v.impact))
  .map((v) => [v.id, v.nodes.slice(0, 3).map((node) => node.target.join(" "))]);
"""


@pytest.mark.skipif(browser.axe() is None, reason="needs axe-core: npm install axe-core, AXE_CORE=…/axe.min.js")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_no_serious_fault(
    width: int, dark: bool, audit_page: tuple[Path, dict[str, Any]], map_page: tuple[Path, fl.Pattern, int]
) -> None:
    """Both pages, both languages, and nothing wider than the screen."""
    source = browser.axe()
    assert source is not None
    with browser.browser(width, 844 if width < 600 else 900, dark) as page:
        for file in (audit_page[0], map_page[0]):
            page.open(file)
            for _ in ("en", "zh"):
                page.js(source)
                assert page.run(AXE) == [], file
                assert page.js("return document.documentElement.scrollWidth") <= width
                page.click("#language")
                page.settle()
