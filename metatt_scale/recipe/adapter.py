"""The section `adapter`: what trains beside the frozen model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from metatt_scale.recipe.section import Section

Rank = int | tuple[int, ...]
INNER_BONDS = {"metatt_4d": 3, "metatt_5d": 4, "metatt_4p1d": 4, "metatt_5p1d": 5, "lotr": 2, "lorta": 4}
"""Kinds that are one tensor train, with the number of their inner bonds."""
DIAGONAL = ("lorta",)
"""Kinds whose middle cores have diagonal slices: all their bonds have one rank, and no sweep can cut it."""


class AdapterRecipe(Section):
    """The tensor train shared by all layers and projections."""

    kind: Literal["metatt_4d", "metatt_5d", "metatt_4p1d", "metatt_5p1d", "lotr", "lorta"] = "metatt_4d"
    """`metatt_4d`: modes (input, layer, projection, output). `metatt_5d`: the output is split into (head, head
    width). `metatt_4p1d`, `metatt_5p1d`: the same with a core for `tasks` after that for layers (paper eq. 6).
    `lotr`: (input, layer x projection, output). `lorta`: the CP form of 5D, diagonal slices."""
    rank: int | tuple[int, ...] = 16
    """TT-rank of every inner bond, or one rank per inner bond from left to right."""
    alpha: float = Field(default=2.0, gt=0, le=1e4)
    """Scale of the adapter: y = x W^T + alpha x G1 G2[l] G3[m] G4 (paper eq. 5)."""
    target_modules: tuple[str, ...] | str = ("q_proj", "v_proj")
    """Names of linear modules (matched at the end of the module path), or one regular expression that matches
    whole module paths."""
    layers: tuple[int, int] | None = None
    """Half-open range [first, last) of layers to adapt; all when absent."""
    mode_order: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Order of the modes along the chain (paper §2.3); the order named by `kind` when absent."""
    init: str | None = None
    """One letter pair per core, joined by `-`: `ze` zeros, `id` identity per slice, `no` normal(0, init_std).
    Absent: zeros for the first core, `no` for the middle ones, `id` for the last (paper, Llama); of `lorta` zeros for
    the last, `id` for the middle ones, `no` for the first."""
    init_std: float = Field(default=0.2, gt=0, le=100)
    """Standard deviation of the letter pair `no`."""
    operator: Literal["fused", "reference"] = "fused"
    """How the adapter computes: `reference` is the plain arithmetic that `fused` is tested against."""
    allow_nonzero_start: bool = False
    """Accept an initialisation whose chain is not zero, so that training does not start at the frozen model."""

    @model_validator(mode="after")
    def _check(self) -> AdapterRecipe:
        n_modes = INNER_BONDS[self.kind] + 1
        if self.kind in DIAGONAL and not isinstance(self.rank, int):
            raise ValueError(
                f"`rank` is {list(self.rank)}, but {self.kind} has one rank for all bonds; give one number"
            )
        check_ranks(self.rank, self.kind)
        if self.init is not None:
            pairs = self.init.split("-")
            if len(pairs) != n_modes or not set(pairs) <= {"ze", "id", "no"}:
                raise ValueError(
                    f"`init` is {self.init!r}; {self.kind} needs {n_modes} letter pairs out of ze, id, no "
                    "joined by '-', for example " + "-".join(["ze"] + ["no"] * (n_modes - 2) + ["id"])
                )
        if self.layers is not None and not 0 <= self.layers[0] < self.layers[1]:
            raise ValueError("`layers` must be [first, last) with 0 <= first < last")
        if not self.target_modules:
            raise ValueError(
                "`target_modules` is empty; name at least one linear module, for example [q_proj, v_proj]"
            )
        return self


def check_ranks(rank: Rank, kind: str | None = None, key: str = "rank") -> None:
    """Refuse ranks out of range, and where the kind of chain is known, too few or too many.

    Raises:
        ValueError: with the rule and the remedy.
    """
    each = rank if isinstance(rank, tuple) else (rank,)
    if not each or min(each) < 1 or max(each) > 8192:
        raise ValueError(f"`{key}` must be at least 1 and at most 8192; give one number, or one per inner bond")
    if kind is not None and isinstance(rank, tuple) and len(rank) != (bonds := INNER_BONDS[kind]):
        raise ValueError(
            f"`{key}` has {len(rank)} entries but {kind} has {bonds} inner bonds; give {bonds} ranks, or one number "
            "for all bonds"
        )
