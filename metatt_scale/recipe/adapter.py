"""The section `adapter`: what trains beside the frozen model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from metatt_scale.recipe.section import Section

Rank = int | tuple[int, ...]
INNER_BONDS = {"metatt_4d": 3, "metatt_5d": 4}
"""Kinds that are one tensor train, with the number of their inner bonds."""
PEFT_KINDS = ("lora", "vera", "adalora")
"""Kinds that PEFT computes."""
LORA_STARTS = ("gaussian", "pissa", "olora")
"""What `init` can be for `lora`."""


class AdaLoraRecipe(Section):
    """How AdaLoRA (Zhang et al. 2023) moves rank between modules; names and meanings are PEFT's."""

    init_r: int | None = Field(default=None, ge=2, le=8192)
    """Rank of every module at the start; it must be above `adapter.rank`, which is the average at the end (PEFT's
    `target_r`). One and a half of that when absent."""
    tinit: int = Field(default=0, ge=0)
    """Steps before the first triplet is masked."""
    tfinal: int = Field(default=0, ge=0)
    """Steps at the end in which the allocation stays as it is."""
    deltaT: int = Field(default=1, ge=1)
    """Steps between two allocations."""
    beta1: float = Field(default=0.85, gt=0, lt=1)
    """Decay rate of the smoothed sensitivity |w dL/dw|."""
    beta2: float = Field(default=0.85, gt=0, lt=1)
    """Decay rate of its uncertainty."""
    orth_reg_weight: float = Field(default=0.5, ge=0, le=1e4)
    """Weight of the regulariser that keeps singular vectors orthonormal. The logged loss is without it."""


class VeraRecipe(Section):
    """What VeRA (Kopiczko et al. 2024) starts from."""

    d_initial: float = Field(default=0.1, gt=0, le=100)
    """Value of all entries of the trained vector d at the start (b starts at zero)."""


class AdapterRecipe(Section):
    """What trains beside the frozen model."""

    kind: Literal["metatt_4d", "metatt_5d", "lora", "vera", "adalora"] = "metatt_4d"
    """`metatt_4d`: one tensor train with modes (input, layer, projection, output). `metatt_5d`: the output is split
    into (head, head width). By PEFT: `lora`; `vera` (shared random projections, trained vectors); `adalora`."""
    rank: int | tuple[int, ...] = 16
    """TT-rank of every inner bond, or one rank per inner bond from left to right. `lora`, `vera`: r of every module;
    `adalora`: the average r at the end."""
    alpha: float = Field(default=2.0, gt=0, le=1e4)
    """Scale of the adapter: y = x W^T + alpha x G1 G2[l] G3[m] G4 (paper eq. 5). `lora`, `adalora`: PEFT's
    `lora_alpha`, so the scale is alpha / r (of AdaLoRA: r at the start). VeRA has none."""
    target_modules: tuple[str, ...] | str = ("q_proj", "v_proj")
    """Names of linear modules (matched at the end of the module path), or one regular expression that matches
    whole module paths."""
    layers: tuple[int, int] | None = None
    """Half-open range [first, last) of layers to adapt; all when absent."""
    mode_order: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Order of the modes along the chain (paper §2.3); the order named by `kind` when absent."""
    init: str | None = None
    """One letter pair per core, joined by `-`: `ze` zeros, `id` identity per slice, `no` normal(0, init_std).
    Absent: zeros for the first core, `no` for the middle ones, `id` for the last (paper, Llama). `lora`: `gaussian`
    (A normal(0, 1/r), B zero), `pissa`, `olora`; PEFT's default (A uniform, B zero) when absent."""
    init_std: float = Field(default=0.2, gt=0, le=100)
    """Standard deviation of the letter pair `no`."""
    operator: Literal["fused", "reference"] = "fused"
    """How the adapter computes: `reference` is the plain arithmetic that `fused` is tested against."""
    allow_nonzero_start: bool = False
    """Accept an initialisation whose chain is not zero, so that training does not start at the frozen model."""
    adalora: AdaLoraRecipe | None = None
    """Settings of `kind: adalora`; its defaults when absent."""
    vera: VeraRecipe | None = None
    """Settings of `kind: vera`; its defaults when absent."""

    @property
    def is_chain(self) -> bool:
        """Whether one tensor train is trained."""
        return self.kind in INNER_BONDS

    @model_validator(mode="after")
    def _check(self) -> AdapterRecipe:
        check_ranks(self.rank, self.kind)
        if self.is_chain:
            _check_chain(self)
        else:
            _check_peft(self)
        for name in ("adalora", "vera"):
            if getattr(self, name) is not None and self.kind != name:
                raise ValueError(f"`{name}` is a section of `kind: {name}`, but `kind` is {self.kind}; leave it out")
        if self.layers is not None and not 0 <= self.layers[0] < self.layers[1]:
            raise ValueError("`layers` must be [first, last) with 0 <= first < last")
        if not self.target_modules:
            raise ValueError(
                "`target_modules` is empty; name at least one linear module, for example [q_proj, v_proj]"
            )
        return self


def _check_chain(recipe: AdapterRecipe) -> None:
    n_modes = INNER_BONDS[recipe.kind] + 1
    if recipe.init is not None:
        pairs = recipe.init.split("-")
        if len(pairs) != n_modes or not set(pairs) <= {"ze", "id", "no"}:
            raise ValueError(
                f"`init` is {recipe.init!r}; {recipe.kind} needs {n_modes} letter pairs out of ze, id, no "
                "joined by '-', for example " + "-".join(["ze"] + ["no"] * (n_modes - 2) + ["id"])
            )


def _check_peft(recipe: AdapterRecipe) -> None:
    """Refuse keys of a chain, and those of other methods of PEFT."""
    kind = recipe.kind
    meaningless = {"mode_order", "operator", "init_std", "allow_nonzero_start"}
    meaningless |= {"vera": {"init", "alpha"}, "adalora": {"init"}}.get(kind, set())
    given = recipe.model_dump(include=meaningless, exclude_defaults=True)
    if given:
        shown = " and ".join(f"`{name}` is {value}" for name, value in given.items())
        raise ValueError(f"{shown}, which means nothing to `kind: {kind}`; leave it out")
    if recipe.init is not None and recipe.init not in LORA_STARTS:
        raise ValueError(f"`init` is {recipe.init!r}; of lora it can be {', '.join(LORA_STARTS)}, or absent")
    if kind == "adalora" and initial_rank(recipe) <= recipe.rank:  # type: ignore[operator]
        raise ValueError(
            f"`adalora.init_r` is {initial_rank(recipe)}, but rank is taken away down to `rank`, {recipe.rank}; give "
            "a larger init_r"
        )


def initial_rank(recipe: AdapterRecipe) -> int:
    """Return the rank r that every module of a PEFT method has at the start."""
    assert isinstance(recipe.rank, int)
    if recipe.kind != "adalora":
        return recipe.rank
    given = recipe.adalora.init_r if recipe.adalora else None
    return given or recipe.rank + max(1, recipe.rank // 2)  # PEFT: 12 to 8


def check_ranks(rank: Rank, kind: str | None = None, key: str = "rank") -> None:
    """Refuse ranks out of range, and where the kind of chain is known, too few or too many.

    Raises:
        ValueError: with the rule and the remedy.
    """
    each = rank if isinstance(rank, tuple) else (rank,)
    if not each or min(each) < 1 or max(each) > 8192:
        raise ValueError(f"`{key}` must be at least 1 and at most 8192; give one number, or one per inner bond")
    if kind in PEFT_KINDS and isinstance(rank, tuple):
        raise ValueError(f"`{key}` is {list(rank)}, but {kind} has one rank for all modules; give one number")
    if kind in INNER_BONDS and isinstance(rank, tuple) and len(rank) != (bonds := INNER_BONDS[kind]):
        raise ValueError(
            f"`{key}` has {len(rank)} entries but {kind} has {bonds} inner bonds; give {bonds} ranks, or one number "
            "for all bonds"
        )
