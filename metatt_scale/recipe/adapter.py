"""The section `adapter`: what trains beside the frozen model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from metatt_scale.recipe.section import PathText, Section

Rank = int | tuple[int, ...]
INNER_BONDS = {"metatt_4d": 3, "metatt_5d": 4, "metatt_4p1d": 4, "metatt_5p1d": 5, "lotr": 2, "lorta": 4}
"""Kinds that are one tensor train, with the number of their inner bonds."""
DIAGONAL = ("lorta",)
"""Kinds whose middle cores have diagonal slices: all their bonds have one rank, and no sweep can cut it."""
LORA_STARTS = ("gaussian", "pissa", "olora")
"""What `init` can be for `lora`."""
_LORA_LIKE = {"rank", "alpha", "target_modules", "layers"}
_READ_BY = {
    **dict.fromkeys(
        INNER_BONDS, _LORA_LIKE | {"mode_order", "init", "init_std", "operator", "allow_nonzero_start", "start_from"}
    ),
    "mtl_lora": _LORA_LIKE | {"mtl_lora"},
    "moe_lora": _LORA_LIKE | {"moe_lora"},
    "loretta_rep": _LORA_LIKE | {"loretta"},
    "loretta_adp": {"alpha", "layers", "loretta"},
    "lora": _LORA_LIKE | {"init"},
    "vera": _LORA_LIKE - {"alpha"} | {"vera"},
    "adalora": _LORA_LIKE | {"adalora"},
    "head_only": set[str](),
    "full": set[str](),
}
"""Keys of the section that each kind reads; the others have to be left out."""


class MtlLoraRecipe(Section):
    """What only MTL-LoRA has (Yang et al. 2025)."""

    up_projections: int = Field(default=3, ge=1, le=64)
    """n: up-projections that the tasks share and weigh."""
    temperature: float = Field(default=0.5, gt=0, le=100)
    """tau: a task weighs the up-projections by softmax(w / tau)."""


class MoeLoraRecipe(Section):
    """What only MoE-LoRA has (Liu et al. 2024)."""

    experts: int = Field(default=4, ge=1, le=64)
    """N: pairs of matrices of rank `adapter.rank` / N each."""
    task_width: int = Field(default=64, ge=1, le=4096)
    """Width of a task's embedding, from which the gate of the experts is computed."""


class LorettaRecipe(Section):
    """What only LoRETTA has (Yang et al. 2024)."""

    tensor_rank: int = Field(default=5, ge=1, le=1024)
    """TT-rank of every inner bond of the folded matrices."""
    bottleneck: int = Field(default=64, ge=1, le=8192)
    """Inner width of the bottlenecks of `loretta_adp`."""


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

    def check_length(self, total_steps: int) -> None:
        """Refuse a run that is over before any rank is taken away.

        Raises:
            ValueError: no step is left between `tinit` and `tfinal`.
        """
        if self.tinit >= total_steps - self.tfinal:
            raise ValueError(
                f"adapter.adalora.tinit is {self.tinit} and tfinal {self.tfinal}, but the run has {total_steps} "
                "steps, so that none is left in which rank is taken away; lower one of them, or train longer"
            )


class VeraRecipe(Section):
    """What VeRA (Kopiczko et al. 2024) starts from."""

    d_initial: float = Field(default=0.1, gt=0, le=100)
    """Value of all entries of the trained vector d at the start (b starts at zero)."""


class AdapterRecipe(Section):
    """What trains: a tensor train shared by all layers and projections, or what it is compared with."""

    kind: Literal[
        "metatt_4d",
        "metatt_5d",
        "metatt_4p1d",
        "metatt_5p1d",
        "lotr",
        "lorta",
        "mtl_lora",
        "moe_lora",
        "loretta_adp",
        "loretta_rep",
        "lora",
        "vera",
        "adalora",
        "head_only",
        "full",
    ] = "metatt_4d"
    """`metatt_4d`: modes (input, layer, projection, output). `metatt_5d`: the output is split into (head, head
    width). `metatt_4p1d`, `metatt_5p1d`: the same with a core for `tasks` after that for layers (paper eq. 6).
    `lotr`: (input, layer x projection, output). `lorta`: the CP form of 5D, diagonal slices. `mtl_lora`,
    `moe_lora`: LoRA whose parts tasks share. `loretta_adp`: bottlenecks of tensor trains behind attention and MLP.
    `loretta_rep`: LoRA of tensor trains. By PEFT: `lora`, `vera` (shared random projections, trained vectors),
    `adalora`. `head_only`: the classifier's head alone. `full`: every weight, in fp32."""
    rank: int | tuple[int, ...] = 16
    """TT-rank of every inner bond, or one rank per inner bond from left to right; of LoRA-like kinds, the rank of
    every module (of `adalora` on average at the end)."""
    alpha: float = Field(default=2.0, gt=0, le=1e4)
    """Scale of the adapter: y = x W^T + alpha x G1 G2[l] G3[m] G4 (paper eq. 5). No kind divides it by the rank:
    what others call LoRA with lora_alpha and r is alpha = lora_alpha / r here (of `adalora`, r at the start)."""
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
    the last, `id` for the middle ones, `no` for the first. `lora`: `gaussian` (A normal(0, 1/r), B zero),
    `pissa`, `olora`; A uniform and B zero when absent."""
    init_std: float = Field(default=0.2, gt=0, le=100)
    """Standard deviation of the letter pair `no`."""
    operator: Literal["fused", "reference"] = "fused"
    """How the adapter computes: `reference` is the plain arithmetic that `fused` is tested against."""
    allow_nonzero_start: bool = False
    """Accept an initialisation whose chain is not zero, so that training does not start at the frozen model."""

    start_from: PathText | None = Field(default=None, min_length=1)
    """Run directory or adapter folder whose chain this run goes on with, in its own recipe: on the same tasks or more
    (a new one starts from the mean of the slices there are), on the same targets and ranks. `init` has no say then.
    The folder is read once, at the start."""
    mtl_lora: MtlLoraRecipe = MtlLoraRecipe()
    moe_lora: MoeLoraRecipe = MoeLoraRecipe()
    loretta: LorettaRecipe = LorettaRecipe()
    vera: VeraRecipe = VeraRecipe()
    adalora: AdaLoraRecipe = AdaLoraRecipe()

    @model_validator(mode="after")
    def _check(self) -> AdapterRecipe:
        self._check_keys()
        if self.kind in DIAGONAL and not isinstance(self.rank, int):
            raise ValueError(
                f"`rank` is {list(self.rank)}, but {self.kind} has one rank for all bonds; give one number"
            )
        check_ranks(self.rank, self.kind)
        if self.kind == "moe_lora" and isinstance(self.rank, int) and self.rank % self.moe_lora.experts:
            raise ValueError(
                f"`rank` is {self.rank}, which {self.moe_lora.experts} experts cannot share equally; give a multiple "
                "of `moe_lora.experts`"
            )
        if self.kind == "adalora" and isinstance(self.rank, int) and initial_rank(self) <= self.rank:
            raise ValueError(
                f"`adalora.init_r` is {initial_rank(self)}, but rank is taken away down to `rank`, {self.rank}; give "
                "a larger init_r"
            )
        if self.init is not None and self.kind == "lora" and self.init not in LORA_STARTS:
            raise ValueError(
                f"`init` is {self.init!r}; of lora it can be {', '.join(LORA_STARTS)}, or absent (on the command "
                "line: 'adapter={kind: lora, ...}' replaces the whole section)"
            )
        if self.init is not None and self.kind in INNER_BONDS:
            n_modes = INNER_BONDS[self.kind] + 1
            pairs = self.init.split("-")
            if len(pairs) != n_modes or not set(pairs) <= {"ze", "id", "no"}:
                raise ValueError(
                    f"`init` is {self.init!r}; {self.kind} needs {n_modes} letter pairs out of ze, id, no "
                    "joined by '-', for example " + "-".join(["ze"] + ["no"] * (n_modes - 2) + ["id"])
                )
            if pairs.count("ze") > 1:
                raise ValueError(
                    f"`init` is {self.init!r}, with {pairs.count('ze')} cores at zero: every gradient has one of "
                    "them as a factor, so nothing would ever be learnt; leave one `ze`"
                )
        if self.layers is not None and not 0 <= self.layers[0] < self.layers[1]:
            raise ValueError("`layers` must be [first, last) with 0 <= first < last")
        if not self.target_modules:
            raise ValueError(
                "`target_modules` is empty; name at least one linear module, for example [q_proj, v_proj]"
            )
        return self

    def _check_keys(self) -> None:
        """Refuse what this kind does not read; a value that is the default may stand."""
        given = self.model_dump(exclude_defaults=True)
        for name in given:
            if name != "kind" and name not in _READ_BY[self.kind]:
                value = getattr(self, name)
                shown = f"`{name}` is {value!r}" if not isinstance(value, Section) else f"`{name}` is given"
                readers = ", ".join(kind for kind, keys in _READ_BY.items() if name in keys)
                raise ValueError(
                    f"{shown}, which {self.kind} does not read (it is for {readers}); leave it out, on the command "
                    f"line by replacing the whole section: 'adapter={{kind: {self.kind}, ...}}'"
                )


def initial_rank(recipe: AdapterRecipe) -> int:
    """Return the rank r that every module has at the start, of a kind with one rank."""
    assert isinstance(recipe.rank, int)
    if recipe.kind != "adalora":
        return recipe.rank
    return recipe.adalora.init_r or recipe.rank + max(1, recipe.rank // 2)  # PEFT: 12 to 8


def check_ranks(rank: Rank, kind: str | None = None, key: str = "rank") -> None:
    """Refuse ranks out of range, and where the kind of chain is known, too few or too many.

    Raises:
        ValueError: with the rule and the remedy.
    """
    each = rank if isinstance(rank, tuple) else (rank,)
    if not each or min(each) < 1 or max(each) > 8192:
        shown = list(rank) if isinstance(rank, tuple) else rank
        raise ValueError(
            f"`{key}` is {shown}; ranks must be at least 1 and at most 8192: give one number, or one per inner bond"
        )
    if kind is not None and kind not in INNER_BONDS:
        if isinstance(rank, tuple):
            raise ValueError(f"`{key}` is {list(rank)}, but {kind} has one rank; give one number")
    elif kind is not None and isinstance(rank, tuple) and len(rank) != (bonds := INNER_BONDS[kind]):
        raise ValueError(
            f"`{key}` has {len(rank)} entries but {kind} has {bonds} inner bonds; give {bonds} ranks, or one number "
            "for all bonds"
        )
