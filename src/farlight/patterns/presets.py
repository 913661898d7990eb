"""Presets: the attention patterns of published models, composed of farlight's primitives."""

from __future__ import annotations

from collections.abc import Sequence

from farlight.errors import PatternError, show
from farlight.patterns.arguments import read_list, whole
from farlight.patterns.expression import Pattern
from farlight.patterns.named import global_tokens, seen_by_all
from farlight.patterns.positional import blocked_window, causal, landmarks, offsets, strided, window
from farlight.patterns.positional import window as sliding_window  # two presets have a parameter `window`
from farlight.patterns.random import random_blocks

__all__ = ["bigbird", "etc", "logsparse", "longformer", "longnet", "sparse_transformer", "star", "streaming"]


def longformer(
    window: int = 512, global_positions: Sequence[int] = (0,), dilation: int = 1, autoregressive: bool = False
) -> Pattern:
    """Longformer: a sliding window of `window` neighbours (half on each side) and global tokens.

    `window(window // 2, dilation=…) | global_tokens(global_positions)`, intersected with `causal()` when autoregressive.
    Beltagy, Peters & Cohan 2020, arXiv:2004.05150. As in its published configurations, `window` counts both sides and is even.

    >>> import farlight as fl
    >>> fl.presets.longformer(512)
    window(256) | global_tokens([0])
    """
    total = whole("longformer: window", window, 0)
    if total % 2:
        raise PatternError(f"longformer: window = {total} is odd; it is the total of both sides, so make it even.")
    pattern: Pattern = sliding_window(total // 2, dilation=dilation)
    if len(read_list("longformer: global_positions", global_positions, "positions")):
        pattern = pattern | global_tokens(global_positions)
    return causal() & pattern if autoregressive else pattern


def bigbird(block: int = 64, random: int = 3, seed: int = 0) -> Pattern:
    """BigBird (ITC): a window of three blocks, first and last block global, and `random` random key blocks.

    Zaheer et al. 2020, arXiv:2007.14062. As in the paper, random blocks are drawn per head from the whole sequence.

    >>> import farlight as fl
    >>> fl.presets.bigbird(64, 3)
    blocked_window(1, block=64) | global_tokens(range(-64, 64)) | random_blocks(3, block=64)
    """
    block = whole("bigbird: block", block, 1)
    return blocked_window(1, block=block) | global_tokens(range(-block, block)) | random_blocks(random, block=block, seed=seed)


def etc(radius: int, global_count: int) -> Pattern:
    """ETC: a window of `radius` on each side and the first `global_count` tokens global.

    Ainslie et al. 2020, arXiv:2004.08483 (its relative positions and separate projections belong to the model).

    >>> import farlight as fl
    >>> fl.presets.etc(84, 2)
    window(84) | global_tokens([0, 1])
    """
    return window(radius) | global_tokens(range(whole("etc: global_count", global_count, 0)))


def sparse_transformer(stride: int, kind: str = "strided", summary: int = 1) -> Pattern:
    """Sparse Transformer, causal, with the paper's two heads united in one pattern. Child et al. 2019, arXiv:1904.10509.

    kind="strided": the last `stride` tokens and every stride-th earlier one. kind="fixed": the segment of `stride` tokens
    around the query and the last `summary` tokens of each earlier segment.

    >>> import farlight as fl
    >>> fl.presets.sparse_transformer(128)
    causal() & (window(127, 0) | strided(128))
    """
    stride = whole("sparse_transformer: stride", stride, 1)
    if kind == "strided":
        return causal() & (window(stride - 1, 0) | strided(stride))
    if kind == "fixed":
        return causal() & (blocked_window(0, block=stride) | landmarks(stride, summary))
    raise PatternError(f'sparse_transformer: kind = {show(kind)} is unknown; use "strided" or "fixed".')


def longnet(segments: Sequence[int], dilations: Sequence[int]) -> Pattern:
    """LongNet: for each (segment length w, dilation r), attention among the positions ≡ head (mod r) of each segment.

    Ding et al. 2023, arXiv:2307.02486. The paper weights a pair by the number of levels that contain it; here the levels are
    united as a set.

    >>> import farlight as fl
    >>> fl.presets.longnet([4, 8], [1, 2])
    blocked_window(0, block=4) | blocked_window(0, block=8) & strided(2, phase='head')
    """
    segments = read_list("longnet: segments", segments, "lengths")
    dilations = read_list("longnet: dilations", dilations, "dilations")
    if len(segments) != len(dilations) or not segments:
        raise PatternError(
            f"longnet: {len(segments)} segment lengths and {len(dilations)} dilations; give one dilation for each length."
        )
    levels: list[Pattern] = []
    for length, dilation in zip(segments, dilations, strict=True):
        level: Pattern = blocked_window(0, block=length)
        levels.append(level if dilation == 1 else level & strided(dilation, phase="head"))
    pattern = levels[0]
    for level in levels[1:]:
        pattern = pattern | level
    return pattern


def streaming(sinks: int = 4, window: int = 1024) -> Pattern:
    """StreamingLLM: the first `sinks` tokens and the last `window` tokens, the query's own included; causal.

    Xiao et al. 2023, arXiv:2309.17453.

    >>> import farlight as fl
    >>> fl.presets.streaming(4, 1024)
    causal() & (window(1023, 0) | seen_by_all([0, 1, 2, 3]))
    """
    window = whole("streaming: window", window, 1)
    recent: Pattern = sliding_window(window - 1, 0)
    sinks = whole("streaming: sinks", sinks, 0)
    return causal() & (recent | seen_by_all(range(sinks))) if sinks else causal() & recent


def star() -> Pattern:
    """Star-Transformer: a ring of direct neighbours and one hub, here the first token. Guo et al. 2019, arXiv:1902.09113.

    >>> import farlight as fl
    >>> fl.presets.star()
    window(1) | global_tokens([0])
    """
    return window(1) | global_tokens([0])


def logsparse() -> Pattern:
    """LogSparse Transformer: distances 0, 1, 2, 4, 8, … to the left. Li et al. 2019, arXiv:1907.00235.

    >>> import farlight as fl
    >>> fl.presets.logsparse().dense(9).int()[0, 0, 8].tolist()
    [1, 0, 0, 0, 1, 0, 1, 1, 1]
    """
    return offsets([0, *(-(1 << k) for k in range(40))])


def __dir__() -> list[str]:
    """The public names alone: no submodules, no imports."""
    return sorted(__all__)
