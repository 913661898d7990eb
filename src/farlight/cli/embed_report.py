"""The answers of `farlight embed` as text."""

from __future__ import annotations

from typing import Any

from farlight.cli.screen import screen_width, show

__all__ = ["show_answers"]

# Characters of a passage in the printed answer.
_MAX_CHARACTERS = 300


def show_answers(report: dict[str, Any]) -> None:
    """Print what was read, and the answers."""
    width = screen_width()
    if "index" in report:
        done = f"{report['index']}: {report['documents']:,} documents, {report['added']:,} of them read now"
    else:
        longest = max(chapter["tokens"] for chapter in report["chapters"])
        done = (
            f"{report['tokens']:,} tokens in {len(report['chapters'])} passes of at most {longest:,}, "
            f"{report['passages']:,} passages, {report['seconds']:.1f} s"
        )
    show(f"{report['model']} under {report['pattern']}: {done}", width)
    if report["skipped"]:
        print(f"skipped: {len(report['skipped'])}")
    several = "index" in report or len({chapter["book"] for chapter in report["chapters"]}) > 1

    def title(of: dict[str, Any]) -> str:
        return f"{of['book']}: {of['title']}" if several and of["title"] != of["book"] else str(of["title"])

    for answer in report["queries"]:
        show(f"\n{answer['query']}", width)
        for rank, passage in enumerate(answer["passages"], 1):
            show(f"\n{rank}. {passage['score']:.3f}  {title(passage)}", width)
            text = " ".join(passage["text"].split())
            show("   " + (text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 1] + "…"), width)
            if passage.get("words"):
                words = ", ".join(
                    f"{word['word']} {word['share']:.1%}" + ("" if word["inside"] else " (elsewhere)")
                    for word in passage["words"]
                )
                show(f"   looked at: {words}", width)
        if answer.get("chapters"):
            chapters = "; ".join(f"{title(chapter)} {chapter['score']:.3f}" for chapter in answer["chapters"])
            show(f"\nnearest chapters: {chapters}", width)
