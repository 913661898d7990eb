"""The native form of a router: `TopBlocks` and constant patterns joined by `|`, `&` and `-`, as a program in postfix order."""

from __future__ import annotations

from dataclasses import dataclass, field

from farlight.decoding.summaries import BlockSummaries
from farlight.decoding.visibility import Program, compile_program
from farlight.errors import PatternError
from farlight.patterns.expression import Pattern
from farlight.patterns.liveness import liveness_sizes
from farlight.routing import Router, TopBlocks
from farlight.routing.base import CombinedRouter, ConstantRouter

__all__ = ["RouterProgram", "router_program"]

# RouterNode::Kind and VisibilityOp of csrc
_BLOCKS, _PATTERN, _OPERATOR = range(3)
_OPERATORS = {"&": 9, "|": 10, "-": 11}


@dataclass
class RouterProgram:
    """nodes: (kind, index) in postfix order; rules: the `TopBlocks`; programs: the constant patterns."""

    nodes: list[tuple[int, int]] = field(default_factory=list)
    rules: list[TopBlocks] = field(default_factory=list)
    programs: list[Program] = field(default_factory=list)

    def arguments(self, summaries: dict[TopBlocks, BlockSummaries], head_dim: int) -> tuple[object, ...]:
        """The arguments of `Decoder.set_router`: nodes, rules with the addresses of their tables, amounts, patterns."""
        rules, amounts = [], []
        for rule in self.rules:
            budget, tables, codes = rule.budget, summaries[rule].tables, summaries[rule].codes
            kind, amount = next((k, x) for k, x in enumerate((budget.count, budget.share, budget.mass)) if x is not None)
            pointers = [table.data_ptr() for table in tables]
            addresses = [0, *pointers] if len(pointers) == 2 else [*pointers, 0, 0]
            code_addresses = [table.data_ptr() for table in codes] or [0, 0]
            rules.append((rule.block, kind, *addresses, tables[0].shape[2], *code_addresses))
            amounts.append((float(amount), head_dim**-0.5 if rule.scale is None else float(rule.scale)))
        return self.nodes, rules, amounts, [(program.depth, *program.code) for program in self.programs]


def router_program(router: Router | Pattern) -> RouterProgram | None:
    """The program of a router; None where a part of it chooses otherwise, or depends on the text's length or the head."""
    program = RouterProgram()
    return program if _add(program, router) else None


def _add(program: RouterProgram, part: Router | Pattern) -> bool:
    """Append the nodes of `part`; False where it has no native form."""
    if isinstance(part, CombinedRouter):
        if not _add(program, part.left) or not _add(program, part.right):
            return False
        program.nodes.append((_OPERATOR, _OPERATORS[part.symbol]))
        return True
    if type(part) is TopBlocks:
        if not _has_native_budget(part):
            return False
        program.nodes.append((_BLOCKS, len(program.rules)))
        program.rules.append(part)
        return True
    pattern = part.pattern if isinstance(part, ConstantRouter) else part
    if not isinstance(pattern, Pattern) or pattern.varies_over_heads or pattern.varies_over_batch:
        return False
    try:
        code = compile_program(pattern, liveness_sizes(pattern, None))
    except PatternError:  # counts from the end of the text, which grows
        return False
    if code is None:
        return False
    program.nodes.append((_PATTERN, len(program.programs)))
    program.programs.append(code)
    return True


def _has_native_budget(rule: TopBlocks) -> bool:
    """Whether the kernels know the rule's budget and that its heads choose by themselves."""
    budget = {name for name, value in vars(rule.budget).items() if value is not None}
    return len(budget) == 1 and budget <= {"count", "share", "mass"} and getattr(rule, "per", "head") == "head"
