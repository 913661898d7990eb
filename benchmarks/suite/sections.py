"""What can be measured: the sections of the suite in their order, each with the time that it may take."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from suite.allocator import kept_memory
from suite.breakeven import breakeven_rows
from suite.content import content_memory_rows, content_rows, long_content_rows
from suite.decode import decode_block_rows, decode_stored_rows, decode_window_rows
from suite.dims import dims_rows
from suite.gpu.parity import parity_rows
from suite.gpu.properties import property_rows
from suite.gpu.routers import router_rows
from suite.gpu.speed import speed_rows
from suite.headline import headline_rows
from suite.length import length_rows
from suite.llama import llama_rows
from suite.machine import ceilings, load, machine
from suite.models import model_rows
from suite.patterns import pattern_rows
from suite.planning import planning_rows, waste_rows
from suite.routing import routing_rows
from suite.scaling import scaling_rows
from suite.scores import score_rows
from suite.settings import Box, Settings

__all__ = ["SECTIONS", "Section", "run_section", "sections_of"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """One table: its question, its rows, and how many seconds it may take on two cores.

    `keeps`: freed memory stays with the process, so that kernels are compared and not how soon the system finds memory.
    `device`: where the section runs, "cpu" or "cuda".
    """

    name: str
    question: str
    seconds: float
    rows: Callable[[Settings, Box], Iterator[Row]]
    keeps: bool = False
    device: str = "cpu"


def _content_sections() -> Iterator[Section]:
    """Causal routers beside full causal attention, in sections of two minutes: by pass and dtype, long texts, memory."""
    for dtype in (torch.float32, torch.bfloat16):
        name, question = str(dtype).removeprefix("torch."), "Do causal routers beat full causal attention, all included"
        rows = functools.partial(content_rows, dtype=dtype)
        forward = functools.partial(rows, grads=False, parts=(16, 8, 4, 1))
        yield Section(f"content-{name}", f"{question} ({name})?", 120, forward)
        both = f"{question} ({name}, with backward"
        yield Section(f"content-{name}-backward", f"{both})?", 120, functools.partial(rows, grads=True, parts=(1,)))
        short = functools.partial(rows, grads=True, parts=(8, 4))
        yield Section(f"content-{name}-backward-short", f"{both}, short texts)?", 60, short)
        for factor, long in ((4, "long"), (8, "longest")):
            long_rows = functools.partial(long_content_rows, dtype=dtype, factor=factor)
            yield Section(
                f"content-{long}-{name}", f"How do causal routers grow with the text ({long}, {name})?", 150, long_rows
            )
    yield Section("content-memory", "How much memory do causal routers take?", 60, content_memory_rows)


# Those of the CPU take 58 minutes together, those of a GPU less than eight.
_ALL = (
    Section(
        "headline",
        "How fast is it beside dense attention, FlexAttention and the matrix product?",
        325,
        headline_rows,
        keeps=True,
    ),
    Section("length", "From which length on does it win, and how does it grow?", 300, length_rows),
    Section("patterns", "Does a harder pattern keep the rate of the plain window?", 335, pattern_rows, keeps=True),
    Section("routing", "What does it cost to let content decide?", 220, routing_rows),
    *_content_sections(),
    Section("dims", "Does the rate depend on the head dimension?", 150, dims_rows, keeps=True),
    Section("scores", "What do ALiBi, tables, softcap, sinks and narrow values cost?", 100, score_rows, keeps=True),
    Section("models", "How fast beside Hugging Face's Longformer and BigBird?", 250, model_rows),
    Section("scaling", "How does it scale: threads, tiny calls, a million tokens?", 150, scaling_rows),
    Section("decode-windows", "What does one token cost through a cache of a window?", 60, decode_window_rows, keeps=True),
    Section("decode-blocks", "What does one token cost where a router chooses blocks?", 60, decode_block_rows, keeps=True),
    Section("decode-stored", "What does one token cost by the stored element type?", 40, decode_stored_rows, keeps=True),
    Section("llama", "How much does a whole model gain?", 110, llama_rows),
    Section("breakeven", "From which length on does each pattern beat dense attention?", 50, breakeven_rows),
    Section("planning", "How long does planning take?", 15, planning_rows),
    Section("waste", "How many pairs are visited for each pair wanted?", 5, waste_rows),
    Section("gpu-parity", "Is the Triton backend right on this device?", 190, parity_rows, device="cuda"),
    Section(
        "gpu-properties", "The same bits every time, inside a CUDA graph, while decoding?", 30, property_rows, device="cuda"
    ),
    Section("gpu-routers", "What does a router's whole step cost on the device?", 80, router_rows, device="cuda"),
    Section("gpu-speed", "How fast beside FlexAttention and full attention?", 150, speed_rows, device="cuda"),
)
SECTIONS = {section.name: section for section in _ALL}


def sections_of(device: str) -> dict[str, Section]:
    """The sections that run on "cpu" or on "cuda", in their order."""
    return {name: section for name, section in SECTIONS.items() if section.device == device}


def run_section(name: str, settings: dict[str, Any]) -> Iterator[Row]:
    """First `{"about": …}`: machine, ceilings of this very run, start; then the section's rows as they are measured."""
    chosen, section = Settings.from_dict(settings), SECTIONS[name]
    with kept_memory() if section.keeps else contextlib.nullcontext(False) as kept:
        yield from _measured(section, chosen, kept)


def _measured(section: Section, chosen: Settings, kept: bool) -> Iterator[Row]:
    about = {
        "memory": "kept" if kept else "fresh",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "load": load(),
    }
    if section.device == "cpu":
        about["ceilings"] = ceilings(chosen.matmul_size, repeats=1 if chosen.name == "tiny" else 7)
    yield {"about": about}
    start = time.perf_counter()
    yield from section.rows(chosen, Box(section.seconds))
    yield {"about": {"seconds": time.perf_counter() - start, "load_at_end": load()}}
