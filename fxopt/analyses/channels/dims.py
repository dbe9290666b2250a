"""Dims: which axes are the same channels, as an algebra of products, sums and leaves.

Every axis of every tensor is a dim. A view that splits an axis makes its dim a product, row-major
(768 = 12 heads x 64); a concatenation makes a sum (768 = 512 + 256). Two axes that must agree index
by index are unified, which carries the structure of one over to the other:

    unify(leaf, d)                    the leaf becomes d
    unify(a x b, c x d)               factor by factor, split further where the sizes differ
    unify(a + b, c + d)               term by term, likewise
    a + b  as a product of (n, m)     (a' + b') x m, where a = a' x m and b = b' x m
    a x b  as a sum of (s, t)         a' x b + a'' x b, where a = a' + a''

What no rule covers is pinned: none of its channels can be cut. A leaf in the end is one group of
channels, and a channel of it stands wherever the leaf occurs. The closure is networkx's disjoint
sets; the cost is proportional to the number of axes, whatever their sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import sympy
import torch
from torch import Tensor

from fxopt.program import Refusal

Size: TypeAlias = Any
"""An int, or a sympy expression for a size that is only known at run time."""


@dataclass(eq=False)
class Dim:
    """An axis, or a part of one; what it is made of is known to `Dims` only."""

    size: Size


@dataclass
class _Facts:
    """What is known of a set of unified dims: its parts, why it is pinned, what it is used as."""

    kind: Literal["leaf", "product", "sum"] = "leaf"
    parts: tuple[Dim, ...] = ()
    pins: dict[Refusal, None] = field(default_factory=dict)
    marks: set[str] = field(default_factory=set)


class Dims:
    """The dims of one program and what has been unified."""

    def __init__(self) -> None:
        from networkx.utils import UnionFind

        self._sets = UnionFind()
        self._facts: dict[Dim, _Facts] = {}

    def new(self, size: Size) -> Dim:
        """A dim that nothing is known of."""
        dim = Dim(size)
        self._facts[self._sets[dim]] = _Facts()
        return dim

    def find(self, dim: Dim) -> Dim:
        """The representative of all dims that `dim` is unified with."""
        found: Dim = self._sets[dim]
        return found

    def product(self, factors: Sequence[Dim]) -> Dim:
        """The dim of an axis that merges `factors`, the first one outermost."""
        return self._compound("product", [d for d in factors if d.size != 1], 1)

    def sum(self, terms: Sequence[Dim]) -> Dim:
        """The dim of an axis that concatenates `terms`."""
        return self._compound("sum", [d for d in terms if d.size != 0], 0)

    def _compound(self, kind: Literal["product", "sum"], parts: Sequence[Dim], empty: int) -> Dim:
        if len(parts) == 1:
            return parts[0]
        combine = math.prod if kind == "product" else sum
        dim = self.new(combine(part.size for part in parts) if parts else empty)
        if parts:
            self._become(dim, kind, parts)
        return dim

    def leaves(self, dim: Dim) -> Iterator[Dim]:
        """The leaves that `dim` is made of, in order, each as often as it occurs."""
        dim = self.find(dim)
        facts = self._facts[dim]
        if facts.kind == "leaf":
            yield dim
        for part in facts.parts:
            yield from self.leaves(part)

    def pin(self, dim: Dim, refusal: Refusal) -> None:
        """Forbid cutting any channel of `dim`."""
        for leaf in self.leaves(dim):
            self._facts[leaf].pins.setdefault(refusal)

    def mark(self, dim: Dim, mark: str) -> None:
        """Remember what the leaves of `dim` are used as."""
        for leaf in self.leaves(dim):
            self._facts[leaf].marks.add(mark)

    def pins(self, leaf: Dim) -> tuple[Refusal, ...]:
        """Why the channels of a leaf can't be cut."""
        return tuple(self._facts[self.find(leaf)].pins)

    def marks(self, leaf: Dim) -> frozenset[str]:
        """What a leaf is used as."""
        return frozenset(self._facts[self.find(leaf)].marks)

    def unify(self, one: Dim, other: Dim, clash: Refusal) -> None:
        """State that two dims of equal size are the same channels, index by index.

        Where their structures can't be reconciled both are pinned, with `clash`.
        """
        one, other = self.find(one), self.find(other)
        if one is other:
            return
        kinds = self._facts[one].kind, self._facts[other].kind
        if "leaf" in kinds:
            leaf, whole = (one, other) if kinds[0] == "leaf" else (other, one)
            if leaf in self.leaves(whole):
                self.pin(whole, clash)
            else:
                self._link(leaf, whole)
            return
        aligned = self._aligned(one, other)
        if aligned is None:
            self.pin(one, clash)
            self.pin(other, clash)
            return
        for mine, theirs in zip(*aligned, strict=True):
            self.unify(mine, theirs, clash)

    def split(self, dim: Dim, sizes: Sequence[Size]) -> list[Dim] | None:
        """The factors of `dim` with these sizes, outermost first; None where it has none such."""
        factors = self.parts(dim, "product")
        found: list[list[Dim]] = []
        for size in sizes:
            taken: list[Dim] = []
            while size != 1:
                if not factors:
                    return None
                first = factors.pop(0)
                rest = quotient(size, first.size)
                if rest is None:
                    inner = quotient(first.size, size)
                    halves = None if inner is None else self._halve(first, size, inner)
                    if halves is None:
                        return None
                    first, rest = halves[0], 1
                    factors.insert(0, halves[1])
                taken.append(first)
                size = rest
            found.append(taken)
        if any(factor.size != 1 for factor in factors):
            return None
        return [self.product(taken) for taken in found]

    def terms(self, dim: Dim, sizes: Sequence[Size]) -> list[Dim] | None:
        """The terms of `dim` with these sizes, first to last; None where it can't be cut there."""
        rest = self.parts(dim, "sum")
        found: list[list[Dim]] = []
        for size in sizes:
            taken: list[Dim] = []
            while size != 0:
                if not rest:
                    return None
                first = rest.pop(0)
                if first.size != size and not _fixed(first.size, size):
                    return None
                if first.size != size and first.size > size:
                    halves = self._slice(first, size, first.size - size)
                    if halves is None:
                        return None
                    first = halves[0]
                    rest.insert(0, halves[1])
                taken.append(first)
                size -= first.size
            found.append(taken)
        return None if rest else [self.sum(taken) for taken in found]

    def kept(self, dim: Dim, keep: Mapping[Dim, Tensor]) -> Tensor | None:
        """Which indices of `dim` stay, a bool tensor [size], where of each leaf in `keep` those do.

        None where all of them stay, and where the size is known at run time only.
        """
        if not _fixed(dim.size) or not any(leaf in keep for leaf in self.leaves(dim)):
            return None
        dim = self.find(dim)
        facts = self._facts[dim]
        if facts.kind == "leaf":
            return keep[dim]
        masks = [self._mask(part, keep) for part in facts.parts]
        if facts.kind == "sum":
            return torch.cat(masks)
        mask = masks[0]
        for inner in masks[1:]:
            mask = (mask[:, None] & inner).flatten()
        return mask

    def positions(self, dim: Dim, leaf: Dim) -> Tensor:
        """int64 [leaf.size, width]: the indices along `dim` that each channel of `leaf` takes."""
        dim = self.find(dim)
        facts = self._facts[dim]
        if dim is leaf:
            return torch.arange(dim.size)[:, None]
        found = torch.empty(leaf.size, 0, dtype=torch.int64)
        for index, part in enumerate(facts.parts):
            if leaf not in self.leaves(part):
                continue
            inside = self.positions(part, leaf)
            if facts.kind == "sum":
                shifted = inside + sum(earlier.size for earlier in facts.parts[:index])
            else:
                shifted = self._spread(inside, facts.parts, index)
            found = torch.cat([found, shifted], 1)
        return found

    def has_square(self, dim: Dim) -> bool:
        """Whether one leaf occurs in two factors of a product of `dim`."""
        facts = self._facts[self.find(dim)]
        if facts.kind == "product":
            seen = [set(self.leaves(part)) for part in facts.parts]
            if sum(map(len, seen)) != len(set().union(*seen)):
                return True
        return any(map(self.has_square, facts.parts))

    def _spread(self, inside: Tensor, factors: Sequence[Dim], index: int) -> Tensor:
        inner = math.prod(factor.size for factor in factors[index + 1 :])
        outer = math.prod(factor.size for factor in factors[:index])
        block = factors[index].size * inner
        starts = (torch.arange(outer) * block)[:, None, None, None]
        spread: Tensor = starts + inside[None, :, :, None] * inner + torch.arange(inner)
        return spread.transpose(0, 1).flatten(1)

    def _mask(self, dim: Dim, keep: Mapping[Dim, Tensor]) -> Tensor:
        mask = self.kept(dim, keep)
        return torch.ones(dim.size, dtype=torch.bool) if mask is None else mask

    def _link(self, leaf: Dim, whole: Dim) -> None:
        mine, theirs = self._facts.pop(leaf), self._facts.pop(whole)
        self._sets.union(leaf, whole)
        self._facts[self._sets[whole]] = theirs
        for refusal in mine.pins:
            self.pin(whole, refusal)
        for mark in mine.marks:
            self.mark(whole, mark)

    def _become(self, dim: Dim, kind: Literal["product", "sum"], parts: Sequence[Dim]) -> None:
        """Give a leaf its parts, or restate the parts of a compound."""
        facts = self._facts[self.find(dim)]
        was_leaf = facts.kind == "leaf"
        facts.kind, facts.parts = kind, tuple(parts)
        if was_leaf:
            pins, marks = tuple(facts.pins), tuple(facts.marks)
            facts.pins, facts.marks = {}, set()
            for part in parts:
                for refusal in pins:
                    self.pin(part, refusal)
                for mark in marks:
                    self.mark(part, mark)

    def parts(self, dim: Dim, kind: Literal["product", "sum"]) -> list[Dim]:
        """`dim` as factors (or terms) that are no products (sums) themselves; maybe just one."""
        dim = self.find(dim)
        facts = self._facts[dim]
        if facts.kind != kind:
            return [dim]
        return [inner for part in facts.parts for inner in self.parts(part, kind)]

    def _aligned(self, one: Dim, other: Dim) -> tuple[list[Dim], list[Dim]] | None:
        """Two compounds of equal size, each as the same sequence of sizes."""
        kinds = self._facts[one].kind, self._facts[other].kind
        for kind in ("product", "sum"):
            if kind not in kinds:
                continue
            cut = self.split if kind == "product" else self.terms
            for guide, follower in ((one, other), (other, one)):
                sizes = [part.size for part in self.parts(guide, kind)]
                found = cut(follower, sizes)
                if found is None:
                    continue
                again = cut(guide, sizes)
                assert again is not None
                return again, found
            refined = self._common(one, other, kind)
            if refined is not None:
                return refined
        return None

    def _common(
        self, one: Dim, other: Dim, kind: Literal["product", "sum"]
    ) -> tuple[list[Dim], list[Dim]] | None:
        """Both cut at the boundaries of either; None where a boundary can't be cut."""
        cut = self.split if kind == "product" else self.terms
        ends = sorted({*self._ends(one, kind), *self._ends(other, kind)})
        sizes: list[Size] = []
        last: int = 1 if kind == "product" else 0
        for end in ends:
            if kind == "product" and end % last:
                return None
            sizes.append(end // last if kind == "product" else end - last)
            last = end
        if kind == "product":
            sizes.reverse()
        mine, theirs = cut(one, sizes), cut(other, sizes)
        return None if mine is None or theirs is None else (mine, theirs)

    def _ends(self, dim: Dim, kind: Literal["product", "sum"]) -> list[int]:
        """The strides (or offsets) at which each part of a compound of fixed size ends."""
        parts = self.parts(dim, kind)
        if not _fixed(*(part.size for part in parts)):
            return [1] if kind == "product" else [0]
        ends: list[int] = []
        if kind == "product":
            parts.reverse()
        for part in parts:
            last = ends[-1] if ends else (1 if kind == "product" else 0)
            ends.append(last * part.size if kind == "product" else last + part.size)
        return ends

    def _halve(self, dim: Dim, outer: Size, inner: Size) -> tuple[Dim, Dim] | None:
        """A leaf or a sum as a product of two sizes."""
        facts = self._facts[self.find(dim)]
        if facts.kind == "leaf":
            halves = self.new(outer), self.new(inner)
        else:
            terms = self.parts(dim, "sum")
            if not isinstance(inner, int) or any(term.size % inner for term in terms):
                return None
            pairs = [self.split(term, (term.size // inner, inner)) for term in terms]
            if any(pair is None for pair in pairs):
                return None
            known = [pair for pair in pairs if pair is not None]
            clash = Refusal("parts of one axis are split in different ways", "")
            for pair in known[1:]:
                self.unify(known[0][1], pair[1], clash)
            halves = self.sum([pair[0] for pair in known]), known[0][1]
        self._become(dim, "product", halves)
        return halves

    def _slice(self, dim: Dim, before: Size, after: Size) -> tuple[Dim, Dim] | None:
        """A leaf or a product as a sum of two sizes."""
        facts = self._facts[self.find(dim)]
        if facts.kind == "leaf":
            halves = self.new(before), self.new(after)
        else:
            outer, *rest = self.parts(dim, "product")
            inner = self.product(rest)
            if not isinstance(inner.size, int) or before % inner.size:
                return None
            cut = self.terms(outer, (before // inner.size, after // inner.size))
            if cut is None:
                return None
            halves = self.product((cut[0], inner)), self.product((cut[1], inner))
        self._become(dim, "sum", halves)
        return halves


def _fixed(*sizes: Size) -> bool:
    return all(isinstance(size, int) for size in sizes)


def quotient(size: Size, divisor: Size) -> Size | None:
    """`size / divisor` where that is a whole number or a whole expression, else None."""
    if _fixed(size, divisor):
        return size // divisor if divisor and size % divisor == 0 else None
    quotient = sympy.cancel(sympy.sympify(size) / divisor)
    if sympy.fraction(quotient)[1] != 1:
        return None
    return int(quotient) if quotient.is_Integer else quotient
