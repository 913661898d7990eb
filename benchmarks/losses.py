"""What sparse attention costs a language model: `python benchmarks/losses.py STEP [--text BOOK.txt …]`.

Steps: `loss` (next-token loss of every rule on every passage), `measures` (links and shares of attention of every
rule), `links` (links alone, for texts too long for measures), `fit` (a candidate for each head, chosen by predicted loss),
`predictions` (that prediction for every rule), `seconds` (a pass of every rule, all in one run on a quiet machine), `page`
(docs/quality.md from the results). All but `page` stop after `--seconds`. `seconds` removes the stored times of this length and
measures all rules; the steps before it add what the results file lacks, so that the next run measures the remaining rules.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from quality.fits import CANDIDATES, fit_rules, profile, store_fit
from quality.measure import Results, add_links, add_losses, add_measures, add_predictions, add_seconds
from quality.page import page
from quality.rules import rules
from quality.texts import passages

ROOT = Path(__file__).resolve().parent.parent
STEPS = {
    "loss": add_losses,
    "measures": add_measures,
    "links": add_links,
    "predictions": add_predictions,
    "seconds": add_seconds,
}


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=(*STEPS, "fit", "page"))
    parser.add_argument("results", type=Path, nargs="?", default=ROOT / "benchmarks" / "results" / "quality" / "smollm2.json")
    parser.add_argument("--text", type=Path, action="append", help="a book; repeatable. Python's manual is always read too")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--passages", type=int, default=3)
    parser.add_argument("--family", action="append", help="only the rules of this family; repeatable")
    parser.add_argument("--fit", choices=tuple(CANDIDATES), default="blocks", help="what a fit chooses from")
    parser.add_argument("--density", type=float, action="append", help="share of all links of a fit; repeatable")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this; the next run goes on")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "quality.md", help="where `page` writes")
    options = parser.parse_args()
    if options.step == "page":
        options.out.write_text(page(Results(options.results)), "utf-8")
        print(f"wrote {options.out}")
        return
    if options.step == "fit" and not options.text:
        parser.error("fit needs --text")
    from farlight.hf.loading import load_model

    loaded = load_model(options.model)
    texts: list[Path | None] = [*(options.text or []), None]
    if options.step == "fit":
        about = {"model": loaded.name, "passages": options.passages, "passage_tokens": options.tokens}
        result = profile(
            loaded.model, loaded.tokenizer, options.text, CANDIDATES[options.fit], options.tokens, options.passages
        )
        for density in options.density or (0.12,):
            print(f"wrote {store_fit(result, options.fit, density, about)}")
        return
    cut = passages(texts, loaded.tokenizer, options.tokens, options.passages)
    known = [*fit_rules(), *rules(options.tokens)]
    chosen = [rule for rule in known if not options.family or rule.family in options.family]
    if not chosen:
        parser.error(f"no rule has the family {options.family}; there are {sorted({rule.family for rule in known})}")
    add: Any = STEPS[options.step]
    done = add(Results(options.results), loaded.model, cut, chosen, options.seconds)
    print("complete" if done else "more is missing; run again")


if __name__ == "__main__":
    main()
