"""The pieces of an allocation strategy, and the assignment that it hands back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from mc_cli.allocators.feasibility import check_budget
from mc_cli.allocators.problem import AllocationProblem, Floor
from mc_cli.artifacts.importance import LayerImportance
from mc_cli.errors import InputError


@dataclass(frozen=True)
class CostSettings:
    """Parameters of a strategy's costs beside the measures: its exponents by name, and the seed."""

    exponents: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class SolverSettings:
    """How far an integer programme is solved.

    gap            relative distance to the optimum at which it may stop; None = the strategy's own
    time_limit_s   seconds for one programme; what is found by then is used and recorded as `feasible`
    name           `HiGHS` or `CBC`; None = HiGHS where it is installed
    Raises InputError for a gap outside 0 to 1 or a time limit that is not positive.
    """

    gap: float | None = None
    time_limit_s: float = 300.0
    name: str | None = None

    def __post_init__(self) -> None:
        if self.gap is not None and not 0 <= self.gap < 1:
            raise InputError(f"A gap of {self.gap} cannot be used: it is a relative distance, from 0 to below 1.")
        if not self.time_limit_s > 0:
            raise InputError(f"A time limit of {self.time_limit_s} s cannot be used: it has to be positive.")


@dataclass(frozen=True)
class Assignment:
    """One choice per unit, and how sure it is.

    picks             index into the choices of each unit
    bound             no assignment costs less than this; None where no programme was solved
    lagrangian_bound  the same from the Lagrangian relaxation alone, computed here and not by the solver
    status            `optimal` (within the gap asked for), `feasible` (stopped early) or `constructed` (no programme)
    """

    picks: tuple[int, ...]
    solver: str
    status: str
    bound: float | None = None
    lagrangian_bound: float | None = None


Costs = Callable[[LayerImportance, tuple[float, ...], CostSettings], Mapping[float, Sequence[float]]]


@dataclass(frozen=True)
class Strategy:
    """One way to decide widths; a file of this package that holds a `STRATEGY` is found by itself.

    costs           the costs of one layer: width -> one number per expert
    assign          the choices for a problem built from these costs
    unit, formula   what the sum of the chosen costs is
    candidate_bits  widths it chooses from unless others are asked for; None = every width that was measured
    floors          floors it keeps unless others are asked for
    takes_floors    whether floors mean anything to it
    predicts        whether its costs are predicted losses, which `hedge` draws to their layer's mean
    uses_seed       whether its costs depend on the seed
    splits_experts  whether every projection of an expert gets a width of its own, where losses were measured so; its
                    costs are then the predicted losses of the projections
    drops_experts   whether 0 may be among its widths: the expert is dropped, and its tokens go to others
    exponents       the exponents it takes, with their defaults
    check           raises BudgetError where no choices meet the budget; `assign` begins with it
    """

    name: str
    description: str
    unit: str
    formula: str
    costs: Costs
    assign: Callable[[AllocationProblem, SolverSettings], Assignment]
    candidate_bits: tuple[float, ...] | None = None
    floors: tuple[Floor, ...] = ()
    takes_floors: bool = True
    predicts: bool = False
    uses_seed: bool = False
    splits_experts: bool = False
    drops_experts: bool = True
    exponents: Mapping[str, float] = field(default_factory=dict)
    check: Callable[[AllocationProblem], None] = check_budget
