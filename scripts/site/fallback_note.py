"""A hook of MkDocs: on the Chinese site, a page that exists in English only says so at its head."""

from __future__ import annotations

from typing import Any

NOTE = '!!! note "本页暂无中文版"\n    以下是英文原文；代码、表格与数字在两种语言里相同。\n\n'


def on_page_markdown(markdown: str, *, page: Any, **options: Any) -> str:
    file = page.file
    is_fallback = getattr(file, "locale_alternate_of", "en") == "zh" and getattr(file, "localization", None) != "zh"
    return NOTE + markdown if is_fallback else markdown
