"""Patterns from what others have: masks, edges, sparse matrices, graphs, FlexAttention's mask functions and block masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from farlight.errors import PatternError, refuse_tracing, show
from farlight.patterns.arguments import whole
from farlight.patterns.expression import Pattern
from farlight.patterns.intervals import of_spans
from farlight.patterns.spans import Spans
from farlight.patterns.tables import pairs

__all__ = ["from_block_mask", "from_dense", "from_edges", "from_graph", "from_mask_mod", "from_sparse"]

# Pairs of a mask function evaluated at a time.
_PAIRS = 2**22


def from_dense(mask: Any, *, allowed: bool | int | None = None) -> Pattern:
    """The pattern of a dense mask `(n_q, n_k)`, `(H, n_q, n_k)` or `(B, H, n_q, n_k)`, tensor or array, by its sense.

    * bool: True = allowed, as `scaled_dot_product_attention` reads it. `allowed=False` where True means blocked, as in
      `nn.MultiheadAttention` and `key_padding_mask`.
    * additive, floating: 0 = allowed, -inf (or the dtype's lowest number) = blocked. Other numbers are refused: a bias on the
      scores is not a pattern.
    * 0 and 1, integers or floating: `allowed=1` or `allowed=0` says which of them is allowed; without it they are refused.

    A row that allows nothing gives the output 0. Raises PatternError.

    >>> import farlight as fl, torch
    >>> causal = torch.full((3, 3), float("-inf")).triu(1)
    >>> fl.from_dense(causal).dense(3).int()[0, 0].tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    >>> fl.from_dense(torch.tensor([[0, 1], [0, 0]]), allowed=0).count(2)
    3
    """
    refuse_tracing("from_dense")
    if isinstance(mask, Pattern):
        raise PatternError(f"from_dense: {show(mask)} is a pattern already; pass a tensor or an array.")
    try:
        table = mask if isinstance(mask, Tensor) else torch.as_tensor(np.asarray(mask))
    except (TypeError, ValueError, RuntimeError):
        raise PatternError(f"from_dense: {show(mask)} cannot be read as a tensor; pass a tensor or an array.") from None
    if table.layout is not torch.strided:
        raise PatternError("from_dense: the tensor is sparse; pass it to fl.from_sparse.")
    if allowed not in (None, 0, 1):
        raise PatternError(f"from_dense: allowed = {show(allowed)}; say which value is allowed, 0 or 1 (False or True).")
    if table.dtype == torch.bool:
        return pairs(table if allowed in (None, 1) else ~table)
    if allowed is not None:
        if not bool(((table == 0) | (table == 1)).all()):
            raise PatternError(
                "from_dense: allowed=… is for masks of 0 and 1, and this one has other values; see fl.from_dense."
            )
        return pairs(table == allowed)
    if not table.is_floating_point():
        raise PatternError(
            "from_dense: a mask of whole numbers does not say which is allowed; pass allowed=1 or allowed=0, or .bool()."
        )
    blocked = (table == float("-inf")) | (table == torch.finfo(table.dtype).min)
    if not bool((blocked | (table == 0)).all()):
        if bool(((table == 0) | (table == 1)).all()):
            raise PatternError("from_dense: a mask of 0.0 and 1.0 does not say which is allowed; pass allowed=1 or allowed=0.")
        raise PatternError(
            "from_dense: an additive mask has 0 (allowed) and -inf (blocked) only, but this one has other values: a bias on "
            "the scores, which no pattern can hold; see fl.score."
        )
    return pairs(~blocked)


def from_edges(rows: Any, cols: Any, n: int | tuple[int, int]) -> Pattern:
    """The pattern of a list of links: query `rows[e]` may attend to key `cols[e]`, in any order, with or without repeats.

    `rows`, `cols`: E integers each (lists, arrays, tensors). `n`: the number of tokens, of queries and keys alike, or (queries,
    keys). Linear in E in time and memory. Raises PatternError.

    >>> import farlight as fl
    >>> fl.from_edges([0, 1, 2, 2], [0, 0, 1, 2], 3).dense(3).int()[0, 0].tolist()
    [[1, 0, 0], [1, 0, 0], [0, 1, 1]]
    """
    refuse_tracing("from_edges")
    n_q, n_k = (n, n) if isinstance(n, int) else _pair(n)
    n_q, n_k = whole("from_edges: n", n_q, 0), whole("from_edges: n", n_k, 0)
    row, col = _numbers("rows", rows, n_q), _numbers("cols", cols, n_k)
    if row.numel() != col.numel():
        raise PatternError(f"from_edges: {row.numel()} rows and {col.numel()} cols; a link is one of each.")
    return of_spans([Spans.from_pairs(n_q, n_k, row, col)], (1, 1), n_k)


def _pair(n: Any) -> tuple[Any, Any]:
    try:
        n_q, n_k = n
    except (TypeError, ValueError):
        raise PatternError(f"from_edges: n = {show(n)}; give the number of tokens, or (queries, keys).") from None
    return n_q, n_k


def _numbers(name: str, values: Any, limit: int) -> Tensor:
    try:
        table = torch.as_tensor(values).detach().reshape(-1).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise PatternError(f"from_edges: {name} = {show(values)}; give a list of whole numbers.") from None
    if table.numel() and (table.is_floating_point() or table.is_complex() or table.dtype == torch.bool):
        raise PatternError(f"from_edges: {name} is {show(values)}; give whole numbers (of a matrix: fl.from_dense).")
    table = table.to(torch.int64)
    if table.numel() and not (0 <= int(table.min()) and int(table.max()) < limit):
        wrong = int(table.min()) if int(table.min()) < 0 else int(table.max())
        raise PatternError(f"from_edges: {name} has {wrong}, which is not one of the {limit} positions; use 0 … {limit - 1}.")
    return table


def from_sparse(matrix: Any) -> Pattern:
    """The pattern of the nonzero entries of a sparse matrix `(n_q, n_k)`: of torch (any layout) or scipy (any format).

    Entries that are stored but zero are not allowed; repeated entries are added up first. Raises PatternError.

    >>> import farlight as fl, torch
    >>> fl.from_sparse(torch.eye(3).to_sparse()) == fl.from_edges([0, 1, 2], [0, 1, 2], 3)
    True
    """
    if isinstance(matrix, Tensor) and matrix.layout is not torch.strided:
        coo = matrix.detach().to_sparse().coalesce().cpu()
        (row, col), value = _two_rows(coo.indices(), coo.shape), coo.values()
    elif hasattr(matrix, "tocoo"):
        coo = matrix.tocsr().tocoo()  # adds up repeated entries
        row, col, value = (torch.from_numpy(np.ascontiguousarray(x)) for x in (coo.row, coo.col, coo.data))
    else:
        raise PatternError(f"from_sparse: {show(matrix)} is no sparse matrix of torch or scipy; dense masks: fl.from_dense.")
    kept = value != 0
    return from_edges(row[kept], col[kept], (int(matrix.shape[0]), int(matrix.shape[1])))


def _two_rows(indices: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    if len(shape) != 2 or indices.shape[0] != 2:
        raise PatternError(f"from_sparse: a matrix of shape {tuple(shape)}; give (n_q, n_k) with one number at each entry.")
    return indices[0], indices[1]


def from_graph(graph: Any, nodes: Any = None) -> Pattern:
    """The pattern of a networkx graph: the token of node u may attend to that of v where there is an edge u → v.

    Token t is the t-th of `nodes`, by default of `graph.nodes`. An undirected edge allows both directions; a token attends to
    itself only by a loop: add `| fl.window(0)` for all of them. Weights are not read. Raises PatternError.

    >>> import farlight as fl, networkx as nx
    >>> (fl.from_graph(nx.path_graph(4)) | fl.window(0)).dense(4).int()[0, 0].tolist()
    [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]
    """
    if not all(hasattr(graph, name) for name in ("nodes", "edges", "is_directed")):
        raise PatternError(f"from_graph: {show(graph)} is not a networkx graph; for lists of links there is fl.from_edges.")
    place = {node: t for t, node in enumerate(graph.nodes if nodes is None else nodes)}
    if set(place) != set(graph.nodes):
        raise PatternError(f"from_graph: nodes lists {len(place)} nodes, the graph has {len(graph.nodes)}; list each once.")
    links = [(place[u], place[v]) for u, v in graph.edges()]
    if not graph.is_directed():
        links += [(v, u) for u, v in links]
    rows, cols = zip(*links, strict=True) if links else ((), ())
    return from_edges(rows, cols, len(place))


def from_mask_mod(
    fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], n_q: int, n_k: int, *, batch: int = 1, heads: int = 1
) -> Pattern:
    """The pattern of a mask function of FlexAttention: query row i may attend to key j where `fn(b, h, i, j)` is True.

    `fn` is called with integer tensors that broadcast, and evaluated for all n_q · n_k pairs (in memory linear in the intervals
    that it allows); `batch`, `heads`: for functions that read b or h. Raises PatternError.

    >>> import farlight as fl
    >>> fl.from_mask_mod(lambda b, h, q_idx, kv_idx: q_idx >= kv_idx, 3, 3).dense(3).int()[0, 0].tolist()
    [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """
    refuse_tracing("from_mask_mod")
    n_q, n_k = whole("from_mask_mod: n_q", n_q, 0), whole("from_mask_mod: n_k", n_k, 0)
    batch, heads = whole("from_mask_mod: batch", batch, 1), whole("from_mask_mod: heads", heads, 1)
    step = max(1, _PAIRS // max(1, n_k * batch * heads))
    parts = [_rows_of(fn, range(i, min(i + step, n_q)), n_k, batch, heads) for i in range(0, n_q, step)] or [
        _none(n_k, batch * heads)
    ]
    return of_spans([Spans.from_mask(part.flatten(0, 2)) for part in parts], (batch, heads), n_k)


def _none(n_k: int, variants: int) -> Tensor:
    return torch.zeros(variants, 1, 0, n_k, dtype=torch.bool)


def _rows_of(fn: Callable[..., Any], rows: range, n_k: int, batch: int, heads: int) -> Tensor:
    """`(batch, heads, rows, n_k)` bool."""
    shape = (batch, heads, len(rows), n_k)
    b, h, i, j = (
        torch.arange(x.start, x.stop).view([-1 if d == dim else 1 for d in range(4)])
        for dim, x in enumerate((range(batch), range(heads), rows, range(n_k)))
    )
    allowed = fn(b, h, i, j)
    if not isinstance(allowed, Tensor) or allowed.dtype != torch.bool:
        raise PatternError(
            f"from_mask_mod: the function returned {show(allowed)}; it must return a bool tensor, with & | ~ for and, or, not."
        )
    return allowed.expand(shape)


def from_block_mask(block_mask: Any) -> Pattern:
    """The pattern of a BlockMask of `torch.nn.attention.flex_attention`: its full blocks, and its mask function in the others.

    The function is evaluated in the blocks that are listed as partial, and nowhere else. Raises PatternError.

    >>> import farlight as fl
    >>> from torch.nn.attention.flex_attention import create_block_mask
    >>> causal = create_block_mask(lambda b, h, i, j: i >= j, None, None, 300, 300, device="cpu")
    >>> fl.from_block_mask(causal).count(300)
    45150
    """
    refuse_tracing("from_block_mask")
    needed = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "BLOCK_SIZE", "mask_mod", "seq_lengths")
    if not all(hasattr(block_mask, name) for name in needed):
        raise PatternError(f"from_block_mask: {show(block_mask)} is not a BlockMask; a mask function: fl.from_mask_mod.")
    (n_q, n_k), (q_block, k_block) = block_mask.seq_lengths, block_mask.BLOCK_SIZE
    counts = block_mask.kv_num_blocks.cpu()
    batch, heads = counts.shape[:2]
    blocks = -(-n_k // k_block)
    partial = _listed(block_mask.kv_num_blocks, block_mask.kv_indices, blocks)
    full = (
        None
        if block_mask.full_kv_num_blocks is None
        else _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, blocks)
    )
    device = block_mask.kv_num_blocks.device
    parts = []
    for number, start in enumerate(range(0, n_q, q_block)):
        rows = range(start, min(start + q_block, n_q))
        allowed = torch.zeros(batch, heads, len(rows), blocks * k_block, dtype=torch.bool)
        for b, h, block in partial[:, :, number].nonzero().tolist():
            keys = torch.arange(block * k_block, (block + 1) * k_block, device=device)
            i = torch.arange(rows.start, rows.stop, device=device)[:, None]
            at = (torch.tensor(b, device=device), torch.tensor(h, device=device))
            # Keys behind the last one are masked out below: a function that reads a table must not read behind its end.
            found = block_mask.mask_mod(*at, i, keys.clamp(max=max(0, n_k - 1))[None])
            allowed[b, h, :, block * k_block : (block + 1) * k_block] = found.cpu()
        if full is not None:
            allowed |= full[:, :, number].repeat_interleave(k_block, -1)[:, :, None]
        parts.append(Spans.from_mask(allowed[..., :n_k].flatten(0, 2)))
    return of_spans(parts or [Spans.from_mask(_none(n_k, batch * heads).flatten(0, 2))], (batch, heads), n_k)


def _listed(counts: Tensor, indices: Tensor, blocks: int) -> Tensor:
    """`(B, H, query blocks, key blocks)` bool: the first `counts` blocks of each list of indices."""
    counts, indices = counts.cpu().long(), indices.cpu().long()
    meant = torch.arange(indices.shape[-1]) < counts[..., None]
    out = torch.zeros(*counts.shape, blocks + 1, dtype=torch.bool)
    return out.scatter_(-1, torch.where(meant, indices, blocks), True)[..., :blocks]
