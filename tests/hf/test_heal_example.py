"""examples/heal_smollm2.py: what is trained, what is judged, and a run in parts that equals a whole one to the bit."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_audit import tokenizer, words
from test_language import ids, llama

import farlight as fl
from farlight.hf import use_pattern, write_layers
from farlight.hf.loading import load_model

pytest.importorskip("matplotlib")
EXAMPLE = Path(__file__).parents[2] / "examples" / "heal_smollm2.py"
NEAR, CONTENT = "window(3, 0)", "topblocks(2, block=4, causal=True) | window(1, 0)"
WEIGHTS = [
    pytest.param(["--all-weights", "--truth", "0.1"], id="all weights"),
    pytest.param(["--rank", "2"], id="LoRA", marks=pytest.mark.slow),  # importing peft takes seconds
]


@pytest.fixture(scope="module")
def heal() -> Any:
    spec = importlib.util.spec_from_file_location("heal_smollm2", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["heal_smollm2"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and a text."""
    root = tmp_path_factory.mktemp("heal")
    llama().save_pretrained(root / "model")
    tokenizer(framed=False).save_pretrained(root / "model")
    (root / "book.txt").write_text(words(800))
    return root


def options(place: Path, out: str, *more: str, patterns: tuple[str, ...] = (NEAR,)) -> list[str]:
    chosen = [part for pattern in patterns for part in ("--pattern", pattern)]
    sizes = ["--tokens", "40", "--steps", "4", "--batch", "2", "--judge-every", "3", "--judged", "2"]
    return [
        "--model",
        str(place / "model"),
        "--text",
        str(place / "book.txt"),
        "--out",
        str(place / out),
        *sizes,
        *chosen,
        *more,
    ]


def read(place: Path, out: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(state, result without times) of each run."""
    pairs = []
    for folder in sorted((place / out).iterdir()):
        if folder.is_dir():
            result = json.loads((folder / "result.json").read_text())
            pairs.append((torch.load(folder / "state.pt"), {key: value for key, value in result.items() if key != "minutes"}))
    return pairs


@pytest.mark.parametrize("more", WEIGHTS)
def test_a_run_in_parts_is_the_whole_run(heal: Any, place: Path, more: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if "--rank" in more:
        pytest.importorskip("peft")
    whole, parts = f"whole{len(more)}", f"parts{len(more)}"
    heal.main(options(place, whole, *more, patterns=(NEAR, CONTENT)))
    # The first pattern is stopped twice by its time; the second dies in its third step, a step after the state was stored.
    for _ in range(2):
        heal.main(options(place, parts, *more, "--seconds", "0"))
    backward, calls = heal.backward, []

    def dies(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2 * 2 + 2 * 2 + 1:
            raise KeyboardInterrupt
        return backward(*arguments)

    monkeypatch.setattr(heal, "backward", dies)
    with pytest.raises(KeyboardInterrupt):
        heal.main(options(place, parts, *more, "--store-every", "1", patterns=(NEAR, CONTENT)))
    monkeypatch.undo()
    heal.main(options(place, parts, *more, patterns=(NEAR, CONTENT)))
    runs = read(place, whole)
    assert [result["curve"][-1]["step"] for _, result in runs] == [4, 4]
    for (state, result), (other_state, other_result) in zip(runs, read(place, parts), strict=True):
        assert result == other_result
        assert state["weights"].keys() == other_state["weights"].keys()
        assert all(torch.equal(weight, other_state["weights"][name]) for name, weight in state["weights"].items())
    assert (place / whole / "heal.png").stat().st_size > 10_000
    assert (place / whole / "heal.md").read_text().count("`window(3, 0)`") == 1


def test_the_gradients_are_those_of_the_written_loss(heal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Formed a few rows at a time, against the formula on all logits at once."""
    teacher, text = llama().requires_grad_(False), ids(1, 24)
    recipe = heal.Recipe(NEAR, tokens=24, steps=4, batch=2, rank=0, rate=0.1, hidden=0.5, truth=0.25, seed=0)
    monkeypatch.setattr(heal, "LOGIT_ROWS", 5)
    student = heal.Student(teacher, recipe)
    parts = heal.backward(student.model, teacher, text, recipe)
    gradients = {name: weight.grad.clone() for name, weight in student.weights.items()}
    student.model.zero_grad()
    goal, got = (model(text, output_hidden_states=True, use_cache=False) for model in (teacher, student.model))
    p, q = goal.logits[0].log_softmax(-1), got.logits[0].log_softmax(-1)
    kl = (p.exp() * (p - q)).sum() / 24
    truth = torch.nn.functional.cross_entropy(got.logits[0, :-1], text[0, 1:])
    distances = [
        ((x - y).norm(dim=-1) / y.norm(dim=-1)).square().mean()
        for x, y in zip(got.hidden_states[1:], goal.hidden_states[1:], strict=True)
    ]
    distance = sum(distances[1:], distances[0]) / len(distances)
    ((kl + 0.5 * distance + 0.25 * truth) / 2).backward()
    assert parts == pytest.approx({"kl": kl.item(), "hidden": distance.item(), "truth": truth.item()}, rel=1e-4)
    assert kl.item() > 0.01
    for name, weight in student.weights.items():
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-3, atol=1e-5)


def test_mixed_precision_gives_nearly_the_same_gradients(heal: Any) -> None:
    """Operands rounded to bfloat16 err by a few per cent of a gradient; the losses of equal models stay 0."""
    teacher, text = llama().requires_grad_(False), ids(1, 24)
    recipe = heal.Recipe(NEAR, tokens=24, steps=4, batch=1, rank=0, rate=0.1, hidden=0.5, truth=0.25, seed=0)
    students = []
    for bfloat16 in (False, True):
        students.append(heal.Student(teacher, recipe))
        heal.backward(students[-1].model, teacher, text, replace(recipe, bfloat16=bfloat16))
    exact, mixed = (torch.cat([weight.grad.flatten() for weight in student.weights.values()]) for student in students)
    assert 1e-4 < (mixed - exact).norm() / exact.norm() < 0.05
    same = replace(recipe, pattern=heal.FULL, bfloat16=True)
    parts = heal.backward(heal.Student(teacher, same).model, teacher, text, same)
    assert parts["kl"] == pytest.approx(0, abs=1e-4)
    assert parts["hidden"] == pytest.approx(0, abs=1e-4)


def test_a_healed_model_is_saved_and_another_recipe_is_refused(heal: Any, place: Path) -> None:
    heal.main(options(place, "saved", "--all-weights", "--save", "--judged-tokens", "56"))
    (folder,) = (path for path in (place / "saved").iterdir() if path.is_dir())
    ((state, result),) = read(place, "saved")
    healed = load_model(str(folder / "model")).model
    learned, judged = heal.read_passages([place / "book.txt"], tokenizer(framed=False), 40, 2, 56)
    assert (learned.shape[1], judged.shape) == (40, (2, 56))
    with use_pattern(healed, fl.parse(NEAR)):
        losses = heal.judge(healed, judged)
    assert losses == pytest.approx(result["after"], abs=1e-5)
    assert losses != pytest.approx(result["before"], abs=1e-3)
    assert all(torch.equal(weight, state["weights"][name]) for name, weight in healed.named_parameters())
    with pytest.raises(SystemExit, match="holds a run of another recipe \\(rate 0.0001\\)"):
        heal.main(options(place, "saved", "--all-weights", "--judged-tokens", "56", "--rate", "0.5"))


def test_the_file_of_a_fit_is_healed(heal: Any, place: Path) -> None:
    """Layer 0 is sparse, the others keep the model's own attention: the links say so, and another file is another run."""
    fits = []
    for width in (1, 3):
        path = place / f"fit{width}" / "fit.json"
        path.parent.mkdir(exist_ok=True)
        write_layers({0: fl.window(width, 0)}, path)
        heal.main(options(place, "fits", "--all-weights", patterns=(str(path),)))
        fits.append(fl.window(width, 0).count(40) / fl.causal().count(40))
    layers = llama().config.num_hidden_layers
    results = [result for _, result in read(place, "fits")]
    assert sorted(result["links"] for result in results) == pytest.approx([(fit + layers - 1) / layers for fit in fits])
    assert all(result["before"] != result["full"] for result in results)
