"""What a pattern is: an immutable set of (batch, head, query position, key) that answers questions about itself.

A pattern knows positions, nothing of storage, devices, plans or kernels. The tests hold its two faces against each other:

* `_allows`, the scalar truth, evaluated elementwise on integer tensors: the specification;
* `_spans` (or `_points`, `_labels`), the same set row by row without visiting n² pairs: what plans are built from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, TypeVar

import torch
from torch import Tensor

from farlight.errors import OperandError, PatternError, show
from farlight.patterns.spans import Spans

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Atom", "Changes", "Form", "Labels", "Pattern", "Sizes", "equal_items"]

Form = Literal["spans", "points", "labels"]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Sizes:
    """The rectangle a pattern is asked about: query row r stands at position `q_offset + r`, keys at 0 … n_k - 1."""

    n_q: int
    n_k: int
    q_offset: int
    batch: int = 1
    heads: int = 1

    @staticmethod
    def of(n_q: int, n_k: int | None = None, *, batch: int = 1, heads: int = 1, q_offset: int | None = None) -> Sizes:
        n_k = n_q if n_k is None else n_k
        for name, value in (("n_q", n_q), ("n_k", n_k)):
            if value < 0:
                raise PatternError(f"{name} = {value}: a number of tokens cannot be negative; pass {name} >= 0.")
        for name, value in (("batch", batch), ("heads", heads)):
            if value < 1:
                raise PatternError(f"{name} = {value}: there must be at least one; pass {name} >= 1.")
        return Sizes(n_q, n_k, n_k - n_q if q_offset is None else q_offset, batch, heads)


@dataclass(frozen=True)
class Labels:
    """`query[v, r] == key[v, j]` and not negative: the pair is allowed. Integers, -1 = belongs to nothing."""

    query: Tensor
    key: Tensor


@dataclass(frozen=True)
class Changes:
    """Where the column of a key changes: among query positions of one residue (mod `period`), whether the key is seen can
    differ between i - 1 and i only at the positions i in its row of `at` `(keys, m)`, in any order, repeated or not.

    `every` = it may change anywhere.
    """

    at: Tensor | None = None
    period: int = 1
    every: bool = False


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

    # `text` is the canonical expression; a table (a tensor that is part of the pattern) appears in it as `$0`, `$1`, …
    text: str
    _tables: tuple[Tensor, ...] = ()
    _precedence: ClassVar[int] = 4

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a pattern is immutable: {name} cannot be set on {type(self).__name__}; build a new pattern")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a pattern is immutable: {name} cannot be deleted; build a new pattern")

    def _set(self, **values: Any) -> None:
        # `tables` is a property that gives copies; the tensors themselves are kept under another name.
        self.__dict__.update({"_tables" if name == "tables" else name: value for name, value in values.items()})

    def _kept(self, name: str, make: Callable[[], _T]) -> _T:
        """What `make` gives, made once for this pattern: for what follows from its arguments alone."""
        if torch._C._len_torch_dispatch_stack():  # a fake tensor of a traced program must not outlive it
            return make()
        kept: dict[str, _T] = self.__dict__.setdefault("_memo", {})
        if name not in kept:
            kept[name] = make()
        return kept[name]

    # ---- the algebra -------------------------------------------------------------------------------------------------
    def __or__(self, other: Pattern) -> Pattern:
        from farlight.patterns.algebra import Union, operand

        return Union((self, operand(other, "|")))

    def __and__(self, other: Pattern) -> Pattern:
        from farlight.patterns.algebra import Intersection, operand

        return Intersection((self, operand(other, "&")))

    def __sub__(self, other: Pattern) -> Pattern:
        from farlight.patterns.algebra import Difference, operand

        return Difference((self, operand(other, "-")))

    def __invert__(self) -> Pattern:
        from farlight.patterns.algebra import Complement

        return Complement((self,))

    def __bool__(self) -> NoReturn:
        why = f"a pattern is neither true nor false ({show(self)}): Python's `and`, `or` and `not` drop an operand."
        raise OperandError(f"{why} Write `&`, `|` and `~`; ask `pattern is None` where there may be none.")

    # ---- a value -----------------------------------------------------------------------------------------------------
    @property
    def tables(self) -> tuple[Tensor, ...]:
        """Copies of the tensors that are part of the pattern: labels, masks, lists."""
        return tuple(table.clone() for table in self._tables)

    @property
    def key(self) -> tuple[str, tuple[str, ...]]:
        """What two equal patterns share: the canonical text and a digest of each table."""
        if "_key" not in self.__dict__:
            self._set(_key=(self.text, tuple(digest(t) for t in self._tables)))
        key: tuple[str, tuple[str, ...]] = self.__dict__["_key"]
        return key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_key", "_routed", "_memo")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        from farlight.patterns.notation import spell_tables

        return spell_tables(self.text, self._tables)

    def to_json(self) -> str:
        """The pattern as JSON text, tables included; `Pattern.from_json` gives an equal pattern back."""
        from farlight.patterns.notation import to_json

        return to_json(self)

    @staticmethod
    def from_json(text: str, *, limit: int | None = 2**28) -> Pattern:
        """The pattern that `to_json` wrote. Raises PatternError for anything else; nothing is ever evaluated.

        `limit` is the largest number of bytes that its tables and lists may take in memory (None: any).
        """
        from farlight.patterns.notation import from_json

        return from_json(text, limit=limit)

    # ---- questions ---------------------------------------------------------------------------------------------------
    def allows(self, i: int, j: int, n: int, *, batch: int = 0, head: int = 0) -> bool:
        """Whether the query at position i may look at the key at position j in a text of n tokens.

        >>> import farlight as fl
        >>> fl.window(2).allows(5, 7, 10), fl.window(2).allows(5, 8, 10)
        (True, False)
        """
        for name, value in (("i", i), ("j", j)):
            if not 0 <= value < n:
                raise PatternError(f"{name} = {value} is not a position in a text of n = {n} tokens; use 0 … {n - 1}.")
        own_batch, own_heads = self._made_for()
        sizes = Sizes.of(n, batch=max(batch + 1, own_batch), heads=max(head + 1, own_heads))
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

        A leading dimension is 1 when the pattern does not depend on it. Costs n_q · n_k; for people, tests and short texts.
        """
        sizes = Sizes.of(n_q, n_k, batch=batch, heads=heads, q_offset=q_offset)
        return self.dense_rows(0, sizes.n_q, sizes, device=device)

    def dense_rows(self, start: int, stop: int, sizes: Sizes, *, device: torch.device | str = "cpu") -> Tensor:
        """Rows `start … stop - 1` of `dense`, computed alone."""
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
        """The exact number of allowed pairs in a text of n tokens, summed over batch and heads, without forming n².

        >>> import farlight as fl
        >>> fl.window(256).count(1_000_000)
        512934208
        """
        from farlight.plan.build import count_pairs

        return count_pairs(self, Sizes.of(n, batch=batch, heads=heads))

    def density(self, n: int, *, batch: int = 1, heads: int = 1) -> float:
        """Allowed pairs as a share of all n² pairs (0 for an empty text)."""
        return self.count(n, batch=batch, heads=heads) / max(1, n * n * batch * heads)

    def plot(self, n: int, *, batch: int = 0, head: int = 0, ax: Axes | None = None, pixels: int = 512) -> Axes:
        """Draw the pattern for n tokens with matplotlib: query down, key across, dark where many pairs are allowed."""
        from farlight.analysis.plot import plot_pattern

        return plot_pattern(self, n, batch=batch, head=head, ax=ax, pixels=pixels)

    # ---- for the rest of farlight ------------------------------------------------------------------------------------
    @property
    def varies_over_batch(self) -> bool:
        """Whether two batch items may see different links."""
        raise NotImplementedError

    @property
    def varies_over_heads(self) -> bool:
        """Whether two heads may see different links."""
        raise NotImplementedError

    def _made_for(self) -> tuple[int, int]:
        """The batch and the number of heads that the pattern's data are made for; 1 where any number will do."""
        own = [atom._made_for() for atom in self.atoms()]
        return max(batch for batch, _ in own), max(heads for _, heads in own)

    def atoms(self) -> Iterator[Atom]:
        """The primitive patterns in this expression, in order."""
        raise NotImplementedError

    def check(self, sizes: Sizes) -> None:
        """Raise PatternError when the pattern does not fit these sizes."""
        raise NotImplementedError

    def _allows(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """Elementwise truth on broadcast integer tensors; i is a position (not a row), j a key."""
        raise NotImplementedError

    def _spans(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Spans:
        """The keys seen by each of these rows, all 1-D tensors of one length."""
        raise NotImplementedError


def equal_items(rows: Tensor) -> Tensor:
    """`(B, 1)`: equal numbers for batch items with equal rows of a `(B, …)` table, so that they share a plan's tables."""
    number: Tensor = torch.unique(rows.cpu(), dim=0, return_inverse=True)[1]
    return number.view(-1, 1)


class Atom(Pattern):
    """A primitive: one rule. A new one needs `_allows`, `_spans` and, where they help, a form and labels or points."""

    varies_over_batch: bool = False
    varies_over_heads: bool = False

    def atoms(self) -> Iterator[Atom]:
        yield self

    def _made_for(self) -> tuple[int, int]:
        heads = (table.shape[1] for table in self._tables if table.dim() > 2)
        return max((table.shape[0] for table in self._tables), default=1), max(heads, default=1)

    def check(self, sizes: Sizes) -> None:
        pass

    def _rewrite(self) -> Pattern:
        """An equal pattern of simpler atoms, or itself."""
        return self

    def _form(self, sizes: Sizes) -> Form:
        """How the planner should read this atom: by intervals, by single keys, or by labels that sort tokens to blocks."""
        return "spans"

    def _spans_are_cheap(self, sizes: Sizes) -> bool:
        """Whether `_spans` costs a few intervals per row rather than one per pair."""
        return self._form(sizes) != "labels"

    def _width(self, sizes: Sizes) -> int:
        """How many intervals `_spans`, or keys `_points`, forms for each row before equal and touching ones are joined."""
        return 1

    def _rows_agree(self, sizes: Sizes, first: Tensor, last: Tensor) -> Tensor:
        """Elementwise on positions `first <= last`: True where all rows from the one to the other surely see the same keys."""
        return torch.zeros_like(first, dtype=torch.bool)

    def _variation(self, sizes: Sizes) -> Tensor:
        """Integers `(B|1, H|1)`: (batch, head) with equal numbers see the same links."""
        batch = torch.arange(sizes.batch if self.varies_over_batch else 1, device="cpu").view(-1, 1)
        heads = torch.arange(sizes.heads if self.varies_over_heads else 1, device="cpu").view(1, -1)
        return batch * sizes.heads + heads

    def _labels(self, sizes: Sizes, b: Tensor, h: Tensor) -> Labels:
        """For form "labels": a `(V, n_q)` and a `(V, n_k)` table for the V given (batch, head)."""
        raise NotImplementedError

    def _clusterings(self) -> list[tuple[Tensor, Tensor]] | None:
        """Labels `(B|1, H|1, N)` of queries and of keys, as in `clusters`: clusterings of which no two hold one pair, and whose
        union is this atom. None where it is no such thing, or where the numbers in the tables would have to be looked at.
        """
        return None

    def _points(self, sizes: Sizes, b: Tensor, h: Tensor, i: Tensor) -> Tensor:
        """For form "points": the keys of each row as `(rows, m)`, -1 = none, none repeated."""
        raise NotImplementedError

    # ---- for caches: the set read by columns -----------------------------------------------------------------------------
    def _changes(self, sizes: Sizes, b: Tensor, h: Tensor, j: Tensor) -> Changes:
        """Where the columns of these keys change, all 1-D tensors of one length. The default is right for any atom."""
        return Changes(every=True)

    def _needs_length(self) -> str | None:
        """Why this atom means something only in a text of known length; None when the pair (i, j) alone decides.

        The default is right for any atom: it asks for a length that may not be needed.
        """
        return f"{type(self).__name__} is made for a text of one length"


def digest(table: Tensor) -> str:
    """A digest of a table's type, shape and content."""
    data = table.detach().cpu().contiguous()
    head = f"{data.dtype}{tuple(data.shape)}".encode()
    return hashlib.blake2b(head + data.numpy().tobytes(), digest_size=16).hexdigest()
