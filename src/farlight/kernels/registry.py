"""The list of backends, and the selection of one: made once a call, read by attention, ops, explain and doctor."""

from __future__ import annotations

from dataclasses import dataclass

from farlight.errors import ArgumentError, PlanError, UnsupportedError, show
from farlight.kernels import cpu, dense, reference, torch_tiled, triton
from farlight.kernels.backend import AnyBackend, Backend, DevicePlanner, MaskBackend, Request
from farlight.kernels.calibrate import calibrated
from farlight.kernels.cost import DEFAULT_RATES, Estimate, Rates, estimate, known_rates
from farlight.kernels.cpu.content import lost_bound
from farlight.plan import Plan, PlanLike, plan_for
from farlight.plan.content import ContentPlan

__all__ = [
    "Selection",
    "backend_named",
    "check_name",
    "lost_bound",
    "names",
    "plan_backend",
    "plan_backends",
    "plan_of",
    "reasons",
    "register",
    "require",
    "select",
    "unregister",
]

# In the order in which "auto" tries them.
_PLAN_BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (cpu.BACKEND, triton.BACKEND, torch_tiled.BACKEND)}
_MASK_BACKENDS: dict[str, MaskBackend] = {backend.name: backend for backend in (dense.BACKEND, reference.BACKEND)}
_DEVICE_PLANNERS: dict[str, DevicePlanner] = {backend.name: backend for backend in (cpu.BACKEND, triton.BACKEND)}
# Estimates that differ by less than this factor are compared again with rates measured on this machine.
_CLOSE = 4.0


@dataclass(frozen=True, slots=True)
class Selection:
    """The backend that serves a request, and the plan that it executes (None: a mask backend).

    `sparse` estimates the best plan backend and `full` torch's full attention; None where a backend was named, or where the
    choice between them was clear without.
    """

    backend: AnyBackend
    plan: PlanLike | None
    sparse: Estimate | None = None
    full: Estimate | None = None

    @property
    def taken(self) -> Estimate | None:
        """The estimate of the backend that serves; None where one was named."""
        return self.full if self.plan is None else self.sparse

    @property
    def speedup(self) -> float:
        """How many times as fast as full attention the best plan backend is estimated to be; 1 where nothing was estimated."""
        return 1.0 if self.sparse is None or self.full is None else self.full.seconds / self.sparse.seconds


def register(backend: AnyBackend) -> None:
    """Add a backend, or replace the one of its name. "auto" tries added plan backends after farlight's."""
    if isinstance(backend, MaskBackend):
        _MASK_BACKENDS[backend.name] = backend
        return
    _PLAN_BACKENDS[backend.name] = backend
    if isinstance(backend, DevicePlanner):
        _DEVICE_PLANNERS[backend.name] = backend


def unregister(name: str) -> None:
    """Remove a backend that `register` added."""
    for table in (_PLAN_BACKENDS, _MASK_BACKENDS, _DEVICE_PLANNERS):
        table.pop(name, None)


def names() -> tuple[str, ...]:
    """The names of all backends: plan backends, best first, then mask backends."""
    return (*_PLAN_BACKENDS, *_MASK_BACKENDS)


def plan_backends() -> tuple[str, ...]:
    """The names of the backends that execute plans, best first."""
    return tuple(_PLAN_BACKENDS)


def check_name(name: str) -> None:
    """Raise ArgumentError where there is no backend of this name."""
    if name != "auto" and name not in _PLAN_BACKENDS and name not in _MASK_BACKENDS:
        raise ArgumentError(f"backend = {show(name)} is unknown; use 'auto' or one of {', '.join(map(repr, names()))}.")


def backend_named(name: str) -> AnyBackend:
    """The backend of this name; `check_name` says whether there is one."""
    return _PLAN_BACKENDS[name] if name in _PLAN_BACKENDS else _MASK_BACKENDS[name]


def reasons(name: str, request: Request) -> list[str]:
    """Why this backend cannot serve the request; empty when it can."""
    backend = backend_named(name)
    refusals = backend.reasons(request)
    honoured: frozenset[str] = getattr(backend, "score_terms", frozenset())
    if not request.terms <= honoured:
        refusals = [*refusals, f"it does not compute {' and '.join(sorted(request.terms - honoured))}"]
    if request.renumbered and not getattr(backend, "honours_origin", False):
        refusals = [*refusals, "it draws dropout and reads biases by distance at the tensors' own positions only"]
    return refusals


def require(name: str, request: Request) -> None:
    """Raise UnsupportedError where the named backend cannot serve the request."""
    refusals = reasons(name, request)
    if refusals:
        raise UnsupportedError(
            f"backend {name!r} cannot run this attention ({request.describe()}): {'; '.join(refusals)}. "
            "A backend that is named never falls back; use backend='auto' or another one."
        )


def plan_backend(request: Request, name: str = "auto") -> Backend:
    """The named plan backend, or the first that can serve. On a CPU without native kernels the first call says so."""
    if name != "auto":
        require(name, request)
        return _PLAN_BACKENDS[name]
    on_cpu = request.device.type == "cpu"
    if on_cpu:
        cpu.warn_if_missing()
    for name, backend in _PLAN_BACKENDS.items():
        # On the CPU Triton is interpreted, which is for tests: it runs there when it is named.
        if not (name == "triton" and on_cpu) and not reasons(name, request):
            return backend
    lines = [f"no backend can run this attention ({request.describe()}):"]
    lines += [f"  {name}: {'; '.join(reasons(name, request))}" for name in names()]
    raise UnsupportedError("\n".join(lines))


def plan_of(backend: Backend, request: Request) -> PlanLike:
    """The plan that a backend executes, from the plan cache: built on the device where the backend can, else on the host."""
    planner = _DEVICE_PLANNERS.get(backend.name)
    plan = None if planner is None else planner.device_plan(request)
    return plan_for(request.pattern, request.sizes, backend.tile_shape) if plan is None else plan


def select(request: Request, backend: str = "auto", plan: Plan | None = None, *, with_estimates: bool = False) -> Selection:
    """The backend for a request, with its plan; with_estimates: and with the estimates, even if they change nothing.

    "auto" takes torch's full attention where that is allowed and estimated to be faster, else the best plan backend. A backend
    that is named, here or when `plan` was made, is taken or refused (UnsupportedError, PlanError).
    """
    if plan is not None and (plan.backend or backend not in _MASK_BACKENDS):
        return _selection_of(plan, request, backend)
    if backend in _MASK_BACKENDS:
        require(backend, request)
        return Selection(_MASK_BACKENDS[backend], None)
    executor = plan_backend(request, backend)
    built = plan_of(executor, request)
    if backend != "auto":
        return Selection(executor, built)
    rates = known_rates(request.device)
    if not with_estimates and isinstance(built, ContentPlan) and _is_sparse_for_any_choice(executor, request, rates):
        return Selection(executor, built)
    sparse, full = _estimates(executor, request, built, rates)
    if rates is DEFAULT_RATES and 1 / _CLOSE < full.seconds / sparse.seconds < _CLOSE:
        sparse, full = _estimates(executor, request, built, calibrated())
    # The links are the same for both. By now they are chosen and planned; the mask of a choice would still be formed.
    # Under terms the dense mask is n_q · n_k numbers of each head, which the rates of full attention do not know.
    is_full_faster = full.remaining + full.planning < sparse.remaining
    if is_full_faster and not request.terms and not reasons("dense", request):
        return Selection(_MASK_BACKENDS["dense"], None, sparse, full)
    return Selection(executor, built, sparse, full)


def _is_sparse_for_any_choice(executor: Backend, request: Request, rates: Rates) -> bool:
    """Whether a router's plan is taken even if it visits every pair: to form the mask of a choice costs about as much as that.

    Then what the choice visits need not be counted, which at 1024 tokens takes a twentieth of the call.
    """
    if request.choice is None:
        return False
    most = estimate(executor.name, request, None, rates, is_plan_of_one_call=True)
    full = estimate("dense", request, None, rates, is_plan_of_one_call=True)
    return most.remaining <= full.remaining + full.planning


def _estimates(executor: Backend, request: Request, plan: PlanLike, rates: Rates) -> tuple[Estimate, Estimate]:
    """The costs of the plan and of full attention under the mask of the same links."""
    is_of_one_call = request.choice is not None
    # Counting what a choice visits would take as long as planning it.
    code = cpu.TYPE_CODES.get(request.dtype, 0)
    visited = plan.expected(code)[1] if isinstance(plan, ContentPlan) else plan.visited
    sparse = estimate(executor.name, request, visited, rates, is_plan_of_one_call=is_of_one_call)
    return sparse, estimate("dense", request, None, rates, is_plan_of_one_call=is_of_one_call)


def _selection_of(plan: Plan, request: Request, backend: str) -> Selection:
    """The caller's plan with its backend. A plan for "auto" is executed by any backend of its tile; others plan the pattern."""
    if plan.backend and backend not in ("auto", plan.backend):
        raise PlanError(
            f"the plan was made for backend {plan.backend!r}, but backend={backend!r} was named; make one with "
            f"fl.plan(…, backend={backend!r}), or pass the pattern itself."
        )
    executor = plan_backend(request, plan.backend or backend)
    readable = executor.name == "cpu" or not isinstance(plan, ContentPlan)
    fits = plan.backend or (plan.tile == executor.tile_shape.tile and readable)
    return Selection(executor, plan if fits else plan_of(executor, request))
