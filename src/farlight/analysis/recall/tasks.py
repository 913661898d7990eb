"""Questions about a long generated text whose answer stands in it: nothing is downloaded, and a seed gives the same text.

Tasks follow their published definitions: the pass key of Mohtashami and Jaggi 2023 ("Landmark Attention", arXiv:2305.16300),
and of RULER (Hsieh et al. 2024, arXiv:2404.06654) several keys, key-value lookup, variable tracking and common words. A text
has exactly the asked number of tokens, answer included: pieces are tokenized one by one, and the filler is cut to fit.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from farlight.errors import ArgumentError, show

__all__ = ["FEWEST_TOKENS", "TASKS", "Question", "question"]

FEWEST_TOKENS = 128

_FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
_NOUNS = (
    "apple", "bridge", "candle", "desert", "engine", "forest", "garden", "hammer", "island", "jacket", "kettle", "ladder",
    "mirror", "needle", "orange", "pencil", "quarry", "river", "saddle", "temple", "umbrella", "valley", "window", "yellow",
    "anchor", "basket", "castle", "dragon", "eagle", "feather", "guitar", "harbor", "insect", "jungle", "kitten", "lemon",
    "marble", "napkin", "oyster", "parrot", "rabbit", "silver", "ticket", "velvet", "wagon", "zebra", "butter", "copper",
)  # fmt: skip
# Keys beside the one in the question; links of a chain of variables; words to be named, and how often.
_OTHER_KEYS, _HOPS, _COMMON, _OFTEN = 3, 3, 3, 10


@dataclass(frozen=True)
class Question:
    """A question as token ids: a model that answers continues `prompt` with `answer`.

    depth: where in the text the first token of what must be found stands, as a share of the prompt.
    """

    task: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    depth: float


@dataclass(frozen=True)
class _Draft:
    """A question as text: `needles` are placed in order into repeated `filler`, the first at the asked depth."""

    intro: str
    filler: Callable[[], str]
    needles: Sequence[str]
    ask: str
    answer: str
    spread: bool = False  # needles after the first at random places behind it, instead of all at random places


def _number(rng: random.Random) -> str:
    return str(rng.randint(10_000, 99_999))


def _pass_key(rng: random.Random) -> _Draft:
    key = _number(rng)
    return _Draft(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it.\n",
        lambda: _FILLER,
        [f"The pass key is {key}. Remember it. {key} is the pass key. "],
        "\nWhat is the pass key? The pass key is",
        f" {key}",
    )


def _several_keys(rng: random.Random) -> _Draft:
    names, numbers = rng.sample(_NOUNS, 1 + _OTHER_KEYS), [_number(rng) for _ in range(1 + _OTHER_KEYS)]
    pairs = zip(names, numbers, strict=True)
    needles = [f"One of the special magic numbers for {name} is: {number}. " for name, number in pairs]
    return _Draft(
        "Some special magic numbers are hidden within the following text. Make sure to memorize them.\n",
        lambda: _FILLER,
        needles,
        f"\nWhat is the special magic number for {names[0]} mentioned in the provided text? The special magic number for "
        f"{names[0]} mentioned in the provided text is:",
        f" {numbers[0]}",
    )


def _lookup(rng: random.Random) -> _Draft:
    def key() -> str:
        return f"{rng.choice(_NOUNS)}-{rng.choice(_NOUNS)}-{rng.randint(10, 99)}"

    asked, number = key() + "0", _number(rng)  # three digits: no other key is equal to it
    return _Draft(
        "Below is a list of keys and their values.\n",
        lambda: f"{key()}: {_number(rng)}\n",
        [f"{asked}: {number}\n"],
        f"\nThe value of a key is the number after it in the list.\n{asked}:",
        f" {number}",
    )


def _variables(rng: random.Random) -> _Draft:
    names = ["".join(rng.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", 4)) for _ in range(2 * (1 + _HOPS))]
    number, other = _number(rng), _number(rng)

    def chain(first: str, names: list[str]) -> list[str]:
        values = [first, *(f"VAR {name}" for name in names)]
        return [f"VAR {name} = {value}. " for name, value in zip(names, values, strict=False)]

    asked, distractor = chain(number, names[: 1 + _HOPS]), chain(other, names[1 + _HOPS :])
    return _Draft(
        "Memorize and track the chain of variable assignment hidden in the following text.\n",
        lambda: _FILLER,
        [line for pair in zip(asked, distractor, strict=True) for line in pair],
        f"\nQuestion: Find all variables that are assigned the value {number}, in the order of their assignment. Answer: the "
        "variables are:",
        "".join(f" {name}" for name in names[: 1 + _HOPS]),
        spread=True,
    )


def _common_words(rng: random.Random) -> _Draft:
    # Pairs of nouns: enough distinct words that no other comes up nearly as often in any text.
    words = [f"{first}-{second}" for first in _NOUNS for second in _NOUNS]
    rng.shuffle(words)
    common, others = sorted(words[:_COMMON]), words[_COMMON:]
    left: list[str] = []

    def filler() -> str:
        if not left:
            left.extend(rng.sample(others, len(others)))
        return f"{left.pop()} "

    return _Draft(
        "Below is a list of words, in which some words appear more often than others. Memorize the ones that appear most.\n",
        filler,
        rng.sample([f"{word} " for word in common for _ in range(_OFTEN)], _COMMON * _OFTEN),
        f"\nQuestion: What are the {_COMMON} most common words in the list, in alphabetical order? Answer: the most common "
        "words are:",
        "".join(f" {word}" for word in common),
        spread=True,
    )


TASKS: dict[str, Callable[[random.Random], _Draft]] = {
    "passkey": _pass_key,
    "keys": _several_keys,
    "lookup": _lookup,
    "variables": _variables,
    "words": _common_words,
}


def question(task: str, tokenizer: Any, length: int, *, depth: float = 0.5, seed: int = 0) -> Question:
    """One question of a task over a text of `length` tokens, prompt and answer together.

    Args:
        task: one of `TASKS`: "passkey", "keys" (one of 4 numbers), "lookup" (a text that is all key-value pairs), "variables"
            (a chain of 4 assignments beside another), "words" (the 3 most common words).
        tokenizer: a Hugging Face tokenizer.
        depth: where what must be found begins, 0 = at the beginning, 1 = at the end of the text.
        seed: draws keys, numbers, words and places.

    Raises ArgumentError for an unknown task, fewer than `FEWEST_TOKENS` tokens, or a depth outside 0 … 1.
    """
    if task not in TASKS:
        raise ArgumentError(f"task = {show(task)}: there is no such task; known are {', '.join(TASKS)}.")
    if length < FEWEST_TOKENS:
        raise ArgumentError(f"length = {length}: a question and a text around it need at least {FEWEST_TOKENS} tokens.")
    if not 0.0 <= depth <= 1.0:
        raise ArgumentError(f"depth = {depth}: a place in the text lies between 0 (its beginning) and 1 (its end).")
    rng = random.Random(f"{task} {length} {depth} {seed}")
    draft = TASKS[task](rng)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    before, ask, answer = encode(draft.intro), encode(draft.ask), encode(draft.answer)
    before = [*tokenizer("", verbose=False)["input_ids"], *before]
    needles = [encode(needle) for needle in draft.needles]
    remaining = length - len(before) - len(ask) - len(answer) - sum(map(len, needles))
    if remaining < 0:
        raise ArgumentError(f"length = {length}: the task {task!r} needs at least {length - remaining} tokens; give more.")
    pieces = _filler(draft.filler, encode, remaining)
    body, first = _placed(pieces, needles, round(depth * len(pieces)), draft.spread, rng)
    prompt = [*before, *body, *ask]
    return Question(task, tuple(prompt), tuple(answer), (len(before) + first) / len(prompt))


def _filler(make: Callable[[], str], encode: Callable[[str], list[int]], remaining: int) -> list[list[int]]:
    """Pieces of filler with `remaining` tokens in all; the last is cut."""
    pieces: list[list[int]] = []
    known: dict[str, list[int]] = {}
    while remaining > 0:
        text = make()
        ids = known.setdefault(text, encode(text) or encode(" "))
        pieces.append(ids[:remaining])
        remaining -= len(pieces[-1])
    return pieces


def _placed(
    pieces: list[list[int]], needles: list[list[int]], place: int, spread: bool, rng: random.Random
) -> tuple[list[int], int]:
    """(tokens, place of the first needle in them): the first needle before piece `place`, the others at random; with `spread`
    behind it, in their order."""
    low = place if spread else 0
    others = [rng.randint(low, len(pieces)) for _ in needles[1:]]
    at = [place, *(sorted(others) if spread else others)]
    order = sorted(range(len(needles)), key=lambda index: (at[index], index))
    body: list[int] = []
    first = used = 0
    for index in order:
        body += [token for piece in pieces[used : at[index]] for token in piece]
        used = max(used, at[index])
        if index == 0:
            first = len(body)
        body += needles[index]
    return body + [token for piece in pieces[used:] for token in piece], first
