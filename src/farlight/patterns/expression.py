"""`Pattern` and `Atom`: an immutable set of allowed (batch, head, query position, key), as an expression tree.

Leaves are primitives (`Atom`), inner nodes the set operations (`algebra`). A pattern knows positions; it knows nothing of
storage, devices, plans or kernels. Each pattern states its set twice, and the tests compare the two:

* `_allows`: the specification, one boolean per pair, evaluated elementwise on broadcast integer tensors; costs n_q · n_k.
* `_spans`, `_points` or `_labels`: the same set row by row, as key intervals, single keys or labels (see `forms`); costs
  the intervals or keys that exist. Plans are built from these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, TypeVar

import torch
from torch import Tensor

from farlight.errors import OperandError, PatternError, show
from farlight.patterns.chooser import is_chooser
from farlight.patterns.forms import ColumnChanges, Form, Labels
from farlight.patterns.sizes import Sizes
from farlight.patterns.spans import Spans
from farlight.patterns.table_codec import widened

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Atom", "ColumnChanges", "Form", "Labels", "Pattern", "Sizes", "equal_items"]

_T = TypeVar("_T")


class Pattern:
    """A set of allowed (query, key) pairs.

    Combine patterns with `|` (union), `&` (intersection), `-` (difference) and `~` (complement). A pattern is a value:
    immutable, hashable, picklable, and equal to another when both are written the same way.

    >>> import farlight as fl
    >>> p = fl.causal() & (fl.window(1) | fl.global_tokens([0]))
    >>> p.dense(4).int()[0, 0].tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    >>> p.count(4), p
    (9, causal() & (window(1) | global_tokens([0])))
    """

    # The canonical expression. `$0`, `$1`, … stand for the tables: tensors that are part of the pattern.
    text: str
    _tables: tuple[Tensor, ...] = ()
    _precedence: ClassVar[int] = 4

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a pattern is immutable: {name} cannot be set on {type(self).__name__}; build a new pattern")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a pattern is immutable: {name} cannot be deleted; build a new pattern")

    def _set(self, **values: Any) -> None:
        """Set fields in spite of immutability (constructors only). `tables=` goes to `_tables`: the property gives copies."""
        self.__dict__.update({"_tables" if name == "tables" else name: value for name, value in values.items()})

    def _cached(self, name: str, compute: Callable[[], _T]) -> _T:
        """`compute()`, evaluated once per pattern object: for values that follow from its arguments alone. Not pickled."""
        if _is_traced():  # a fake or functional tensor of a traced program must not outlive it
            return compute()
        memo: dict[str, _T] = self.__dict__.setdefault("_memo", {})
        if name not in memo:
            memo[name] = compute()
        return memo[name]

    # ---- set operations ----------------------------------------------------------------------------------------------
    def __or__(self, other: Pattern) -> Pattern:
        return self._joined(other, "|")

    def __and__(self, other: Pattern) -> Pattern:
        return self._joined(other, "&")

    def __sub__(self, other: Pattern) -> Pattern:
        return self._joined(other, "-")

    def _joined(self, other: Pattern, sign: str) -> Pattern:
        from farlight.patterns.algebra import joined

        # A router answers by its own reflected operator.
        return NotImplemented if is_chooser(other) else joined(self, other, sign)

    def __invert__(self) -> Pattern:
        from farlight.patterns.algebra import Complement

        return Complement((self,))

    def __bool__(self) -> NoReturn:
        why = f"a pattern is neither true nor false ({show(self)}): Python's `and`, `or` and `not` drop an operand."
        raise OperandError(f"{why} Write `&`, `|` and `~`; ask `pattern is None` where there may be none.")

    # ---- value semantics ---------------------------------------------------------------------------------------------
    @property
    def tables(self) -> tuple[Tensor, ...]:
        """Copies of the tensors that are part of the pattern (labels, masks, lists), bool or int64."""
        return tuple(widened(table.clone()) for table in self._tables)

    @property
    def key(self) -> tuple[str, tuple[str, ...]]:
        """Identity for `==` and `hash`: the canonical text and a digest of each table."""
        if "_key" not in self.__dict__:
            self._set(_key=(self.text, tuple(digest(t) for t in self._tables)))
        key: tuple[str, tuple[str, ...]] = self.__dict__["_key"]
        return key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_key", "_memo")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        from farlight.patterns.notation import spell_tables

        return spell_tables(self.text, self._tables)

    def __str__(self) -> str:
        """`repr`, with tables of more than 256 entries named by type and size: `pairs(bool 1 × 1 × 512 × 512)`."""
        from farlight.patterns.notation import name_tables

        return name_tables(self.text, self._tables)

    def to_json(self) -> str:
        """The pattern as JSON text, tables included; `Pattern.from_json` restores an equal pattern."""
        from farlight.patterns.json_format import to_json

        return to_json(self)

    @staticmethod
    def from_json(text: str, *, limit: int | None = 2**28) -> Pattern:
        """The pattern that `to_json` wrote. Parsed, never evaluated; raises PatternError for anything else.

        `limit`: the largest number of bytes that its tables and lists may take in memory (None: any).
        """
        from farlight.patterns.json_format import from_json

        return from_json(text, limit=limit)

    # ---- queries -----------------------------------------------------------------------------------------------------
    def allows(self, i: int, j: int, n: int, *, batch: int = 0, head: int = 0) -> bool:
        """Whether the query at position i may attend to the key at position j in a sequence of n tokens.

        >>> import farlight as fl
        >>> fl.window(2).allows(5, 7, 10), fl.window(2).allows(5, 8, 10)
        (True, False)
        """
        for name, value in (("i", i), ("j", j)):
            if not 0 <= value < n:
                raise PatternError(f"{name} = {value} is not a position in a text of n = {n} tokens; use 0 … {n - 1}.")
        min_batch, min_heads = self._batch_and_heads()
        sizes = Sizes.of(n, batch=max(batch + 1, min_batch), heads=max(head + 1, min_heads))
        self.check(sizes)
        b, h, row, col = (torch.tensor(x, device="cpu") for x in (batch, head, i, j))
        return bool(self._allows(sizes, b, h, row, col))

    def dense(
        self,
        n_q: int,
        n_k: int | None = None,
        *,
        batch: int = 1,
        heads: int = 1,
        q_offset: int | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The pattern as a bool tensor `(batch or 1, heads or 1, n_q, n_k)`: True where the pair is allowed.

        A leading dimension is 1 when the pattern does not depend on it. Materialises n_q · n_k; for tests and short sequences.
        """
        sizes = Sizes.of(n_q, n_k, batch=batch, heads=heads, q_offset=q_offset)
        return self.dense_rows(0, sizes.n_q, sizes, device=device)

    def dense_rows(self, start: int, stop: int, sizes: Sizes, *, device: torch.device | str = "cpu") -> Tensor:
        """Rows `start … stop - 1` of `dense`, without the others."""
        self.check(sizes)
        device = torch.device(device)
        if not sizes.n_k:
            return torch.zeros(1, 1, stop - start, 0, dtype=torch.bool, device=device)
        batch = sizes.batch if self.varies_over_batch else 1
        heads = sizes.heads if self.varies_over_heads else 1
        b = torch.arange(batch, device=device).view(-1, 1, 1, 1)
        h = torch.arange(heads, device=device).view(1, -1, 1, 1)
        i = (torch.arange(start, stop, device=device) + sizes.q_offset).view(1, 1, -1, 1)
        j = torch.arange(sizes.n_k, device=device).view(1, 1, 1, -1)
        return self._allows(sizes, b, h, i, j).expand(batch, heads, stop - start, sizes.n_k).contiguous()

    def count(self, n: int, *, batch: int = 1, heads: int = 1) -> int:
        """The exact number of allowed pairs in a sequence of n tokens, summed over batch and heads; n² is never formed.

        >>> import farlight as fl
        >>> fl.window(256).count(1_000_000)
        512934208
        """
        from farlight.kernels.counting import count_links

        return count_links(self, Sizes.of(n, batch=batch, heads=heads))

    def density(self, n: int, *, batch: int = 1, heads: int = 1) -> float:
        """Allowed pairs as a share of all n² pairs (0 for an empty sequence)."""
        return self.count(n, batch=batch, heads=heads) / max(1, n * n * batch * heads)

    def plot(self, n: int, *, batch: int = 0, head: int = 0, ax: Axes | None = None, pixels: int = 512) -> Axes:
        """Draw the pattern for n tokens with matplotlib: queries down, keys across, darkness = density of allowed pairs."""
        from farlight.analysis.plot import plot_pattern

        return plot_pattern(self, n, batch=batch, head=head, ax=ax, pixels=pixels)

    def _repr_html_(self) -> str:
        from farlight.analysis.notebook import pattern_html

        return pattern_html(self)

    # ---- what each pattern implements --------------------------------------------------------------------------------
    @property
    def varies_over_batch(self) -> bool:
        """Whether the allowed pairs may differ between batch items."""
        raise NotImplementedError

    @property
    def varies_over_heads(self) -> bool:
        """Whether the allowed pairs may differ between heads."""
        raise NotImplementedError

    def _batch_and_heads(self) -> tuple[int, int]:
        """The (batch, heads) that the pattern's tables fix; 1 where any number fits."""
        fixed = [atom._batch_and_heads() for atom in self.atoms()]
        return max(batch for batch, _ in fixed), max(heads for _, heads in fixed)

    def atoms(self) -> Iterator[Atom]:
        """The primitives of this expression, from left to right."""
        raise NotImplementedError

    def check(self, sizes: Sizes) -> None:
        """Raise PatternError when a table or list of the pattern does not fit these sizes."""
        raise NotImplementedError

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """The specification, elementwise on broadcast int64 tensors: batch item b, head h, query position i (no row), key j."""
        raise NotImplementedError

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        """The allowed keys of the rows (b, h, i): batch item, head, query position, each `(rows,)` int64."""
        raise NotImplementedError


def equal_items(rows: Tensor) -> Tensor:
    """`(B, 1)` int64: equal numbers for batch items with equal rows of a `(B, …)` table; they share a plan's tables."""
    variant: Tensor = torch.unique(rows.cpu(), dim=0, return_inverse=True)[1]
    return variant.view(-1, 1)


def _is_traced() -> bool:
    """Whether torch.compile, torch.export or make_fx is tracing: a fake, functional or proxy mode is active."""
    if not torch._C._len_torch_dispatch_stack():
        return False
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (keys.FAKE, keys.FUNCTIONAL, keys.PROXY))


class Atom(Pattern):
    """A primitive: one rule, a leaf of the expression.

    A new primitive implements `_allows` and `_spans`, sets `text` and `tables` in its constructor, and is registered in
    `farlight/patterns/__init__.py`. Everything else has a correct default; overriding it makes plans or caches better.
    """

    varies_over_batch: bool = False
    varies_over_heads: bool = False

    def atoms(self) -> Iterator[Atom]:
        yield self

    def _batch_and_heads(self) -> tuple[int, int]:
        heads = (table.shape[1] for table in self._tables if table.dim() > 2)
        return max((table.shape[0] for table in self._tables), default=1), max(heads, default=1)

    def check(self, sizes: Sizes) -> None:
        pass

    # ---- for plans: the set read by rows -----------------------------------------------------------------------------
    def _rewrite(self) -> Pattern:
        """An equal pattern of simpler primitives, or self."""
        return self

    def _form(self, sizes: Sizes) -> Form:
        """The form that the planner reads: key intervals, single keys, or labels by which tokens are sorted into blocks."""
        return "spans"

    def _spans_are_cheap(self, sizes: Sizes) -> bool:
        """Whether `_spans` costs a few intervals per row rather than one per pair."""
        return self._form(sizes) != "labels"

    def _entries_per_row(self, sizes: Sizes) -> int:
        """Intervals of `_spans`, or keys of `_points`, per row before merging: an upper bound of the memory it takes."""
        return 1

    def _rows_equal(self, sizes: Sizes, first: Tensor, last: Tensor) -> Tensor:
        """Elementwise on query positions `first <= last`: True where all rows first … last certainly have equal keys."""
        return torch.zeros_like(first, dtype=torch.bool)

    def _variation(self, sizes: Sizes) -> Tensor:
        """`(B|1, H|1)` int64 variant numbers: (batch, head) of one variant have equal allowed pairs and share plan tables."""
        batch = torch.arange(sizes.batch if self.varies_over_batch else 1, device="cpu").view(-1, 1)
        heads = torch.arange(sizes.heads if self.varies_over_heads else 1, device="cpu").view(1, -1)
        return batch * sizes.heads + heads

    def _labels(self, sizes: Sizes, b: Tensor, h: Tensor) -> Labels:
        """Form "labels": `(V, n_q)` and `(V, n_k)` labels for V variants given by their batch items b and heads h `(V,)`."""
        raise NotImplementedError

    def _clusterings(self) -> list[tuple[Tensor, Tensor]] | None:
        """Disjoint clusterings whose union is this pattern: (query, key) labels `(B|1, H|1, N)` each, as in `clusters`.

        None where there are none, or where finding them would read the tables' values.
        """
        return None

    def _points(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Tensor:
        """Form "points": `(rows, m)` int64, the keys of the rows (b, h, i), distinct within a row; -1 pads."""
        raise NotImplementedError

    # ---- for key caches: the set read by columns ---------------------------------------------------------------------
    def _column_changes(self, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> ColumnChanges:
        """Where the columns (b, h, j) `(keys,)` may change. The default, anywhere, is correct for every primitive."""
        return ColumnChanges(anywhere=True)

    def _needs_length(self) -> str | None:
        """Why this primitive is defined only for a known sequence length; None where (i, j) alone decides. The default is
        correct for every primitive: it may demand a length without need.
        """
        return f"{type(self).__name__} is made for a text of one length"


def digest(table: Tensor) -> str:
    """A 128-bit hexadecimal hash of a table's dtype, shape and content, integers as int64."""
    data = widened(table.detach()).cpu().contiguous()
    head = f"{data.dtype}{tuple(data.shape)}".encode()
    return hashlib.blake2b(head + data.numpy().tobytes(), digest_size=16).hexdigest()
