"""The section `sweep`: when the chain's ranks change, to what, and how."""

from __future__ import annotations

import itertools
from typing import Literal

from pydantic import Field, model_validator

from metatt_scale.recipe.adapter import Rank, check_ranks
from metatt_scale.recipe.section import Section


class SweepPoint(Section):
    """One sweep of an explicit schedule."""

    after: int = Field(ge=1)
    """Epochs (or steps, see `unit`) done before it."""
    rank: Rank
    """TT-rank of every inner bond after it, or one rank per inner bond. Bonds that are narrower grow."""

    @model_validator(mode="after")
    def _check(self) -> SweepPoint:
        check_ranks(self.rank)
        return self


class RankFormula(Section):
    """Ranks by the paper's appendix I: r(i) = rf + (r0 - rf) (1 - (i / N)^gamma), rounded, with r0 = adapter.rank."""

    final_rank: int = Field(ge=1, le=8192)
    """rf: the rank after the last sweep."""
    sweeps: int = Field(default=5, ge=1)
    """N: number of sweeps."""
    gamma: float = Field(default=2.0, gt=0, le=100)
    """Larger: later cuts are the larger ones."""

    def ranks(self, first: int) -> tuple[int, ...]:
        """Return the ranks after each sweep of a chain that starts at rank `first`."""
        parts = (1 - (i / self.sweeps) ** self.gamma for i in range(1, self.sweeps + 1))
        return tuple(round(self.final_rank + (first - self.final_rank) * part) for part in parts)


class SweepRecipe(Section):
    """DMRG-inspired sweeps (paper algorithm 1): ranks that change while the chain is trained."""

    schedule: tuple[SweepPoint, ...] = ()
    """Sweeps one by one, for example [{after: 3, rank: 8}, {after: 5, rank: 6}]."""
    formula: RankFormula | None = None
    """Sweeps at equal distances (`every`), their ranks by a formula."""
    max_discarded_weight: float | None = Field(default=None, ge=0, lt=1)
    """Sweeps at equal distances (`every`) that cut each bond as far as this part of its weight allows: the sum of the
    squares of its singular values (with `importance: sensitivity` of its sensitivities)."""
    unit: Literal["epoch", "step"] = "epoch"
    """What `after`, `every` and `last` count."""
    every: int = Field(default=1, ge=1)
    """Distance of the sweeps of `formula` and `max_discarded_weight`."""
    last: int | None = Field(default=None, ge=1)
    """No sweep of `max_discarded_weight` after so many epochs or steps."""
    min_rank: int = Field(default=1, ge=1)
    """`max_discarded_weight` cuts no bond below this rank."""
    max_rank: int | None = Field(default=None, ge=1)
    """`max_discarded_weight` leaves no bond wider than this. With `local_steps` bonds may grow so far, and not beyond
    their present rank when it is absent; otherwise they never grow."""
    form: Literal["canonical", "as_printed"] = "canonical"
    """`canonical` brings the chain to canonical form before it cuts, so that the discarded singular values are the
    error; `as_printed` is the paper's algorithm as it stands."""
    importance: Literal["magnitude", "sensitivity"] = "magnitude"
    """What decides which singular values stay: their size, or how much the loss feels them: the mean over
    `probe_batches` of |s dL/ds| (paper appendix C)."""
    probe_batches: int = Field(default=8, ge=1)
    """Global batches over which sensitivities are measured, with all cores frozen."""
    gauge: Literal["right_canonical", "balanced"] = "right_canonical"
    """Where a sweep leaves the norm of the chain: in the first core (paper), or shared out over all."""
    moments: Literal["reset", "transport"] = "reset"
    """AdamW's moments after a sweep: forgotten (paper), or carried over to the new cores."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises again after a sweep, no more than there are before the next one."""
    local_steps: int = Field(default=0, ge=0)
    """DMRG proper (paper appendix C): at each bond merge both cores and train them as one for so many steps before
    they are split; 0 only splits."""
    local_learning_rate: float | None = Field(default=None, gt=0, le=100)
    """Learning rate of those steps; `training.learning_rate` when absent."""

    @property
    def reaches(self) -> int:
        """Epochs or steps (see `unit`) that a run needs to be swept: for `max_discarded_weight` once, else always."""
        if self.formula is not None:
            return self.every * self.formula.sweeps
        return self.schedule[-1].after if self.schedule else self.every

    def check_reach(self, length: int, what: str) -> None:
        """Refuse a run that ends before its sweeps do: its ranks would be others than asked for.

        Raises:
            ValueError: `length`, in epochs or steps, is too short; `what` says where it comes from.
        """
        if self.reaches > length:
            which = "first" if self.max_discarded_weight is not None else "last"
            raise ValueError(
                f"the {which} sweep is due after {self.unit} {self.reaches}, but the run ends after {length} "
                f"({what}); sweep earlier (`sweep.schedule`, `sweep.every`), or train longer"
            )

    @model_validator(mode="after")
    def _check(self) -> SweepRecipe:
        rules = ("schedule", "formula", "max_discarded_weight")
        given = [f"`{name}`" for name in rules if getattr(self, name) not in ((), None)]
        if len(given) != 1:
            raise ValueError(
                f"`sweep` has {' and '.join(given) or 'no rule for the ranks'}; give exactly one of `schedule`, "
                "`formula`, `max_discarded_weight`"
            )
        if not all(a.after < b.after for a, b in itertools.pairwise(self.schedule)):
            raise ValueError(f"`schedule` is out of order: {[p.after for p in self.schedule]}; `after` must ascend")
        own = self.model_dump(include={"last", "min_rank", "max_rank"}, exclude_defaults=True)
        if own and self.max_discarded_weight is None:
            raise ValueError(f"`{next(iter(own))}` is for `max_discarded_weight`, which is not given; leave it out")
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise ValueError(f"`max_rank` is {self.max_rank}, below `min_rank` {self.min_rank}")
        if self.schedule and self.every != 1:
            raise ValueError("`every` is for `formula` and `max_discarded_weight`; `schedule` says when by `after`")
        if self.last is not None and self.last < self.every:
            raise ValueError(f"`last` is {self.last}, before the first sweep (`every` is {self.every})")
        self._check_ways()
        return self

    def _check_ways(self) -> None:
        """Refuse ways of cutting that exclude each other, and keys that say nothing beside the others."""
        if self.importance == "sensitivity" and (self.form == "as_printed" or self.local_steps):
            raise ValueError("`importance: sensitivity` needs `form: canonical` and `local_steps: 0`")
        if self.local_steps and self.form == "as_printed":
            raise ValueError("`local_steps` works on a canonical chain; set `form: canonical`")
        if self.local_learning_rate is not None and not self.local_steps:
            raise ValueError("`local_learning_rate` is given, but `local_steps` is 0")
        if self.importance != "sensitivity" and self.model_dump(include={"probe_batches"}, exclude_defaults=True):
            raise ValueError("`probe_batches` is for `importance: sensitivity`, which is not set; leave it out")
