"""Patterns over the dialect: what a rule looks for, as values.

    op(aten.gelu.default, op(aten.linear.default, hole("x"), constant("w"), hole("b")))

matches a gelu whose input is a linear with a constant weight and binds x, w and b. A pattern names
the arguments it cares about; every argument that it doesn't name must have its default value, so
`op(aten.add.Tensor, a, b)` never matches `add(a, b, alpha=2)`. With `rest=True` the others may have
any value, and are bound under the names that the operator's schema gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import fx

from fxopt.errors import RewriteError
from fxopt.nodes import arguments, fake

Target: TypeAlias = torch._ops.OpOverload
Predicate: TypeAlias = Callable[[Any], bool]


@dataclass(frozen=True)
class Hole:
    """Matches any argument that passes `where` and binds it; the same name must bind one value."""

    name: str
    where: Predicate | None = None


@dataclass(frozen=True)
class Op:
    """Matches a call of one of `targets` whose arguments match; `name` binds the node itself.

    With `rest` each argument that has no pattern is bound under its own name.
    """

    targets: tuple[Target, ...]
    args: tuple[Pattern, ...]
    kwargs: Mapping[str, Pattern]
    commutes: bool = False
    name: str | None = None
    where: Predicate | None = None
    rest: bool = False


@dataclass(frozen=True)
class Either:
    """Matches the first of `choices` that matches."""

    choices: tuple[Pattern, ...]


Pattern: TypeAlias = Hole | Op | Either | bool | int | float | str | torch.dtype | None


@dataclass(frozen=True)
class Match:
    """A found pattern: `root` (and `roots` for several outputs), the bindings, the inner nodes."""

    roots: tuple[fx.Node, ...]
    bound: Mapping[str, Any]
    inner: tuple[fx.Node, ...] = field(default=())

    @property
    def root(self) -> fx.Node:
        """The node that the match was found at; its value is what gets replaced."""
        return self.roots[0]

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]


def op(
    targets: Target | tuple[Target, ...],
    *args: Pattern,
    commutes: bool = False,
    name: str | None = None,
    where: Predicate | None = None,
    rest: bool = False,
    **kwargs: Pattern,
) -> Op:
    """A pattern for a call of one of `targets`; `commutes` also tries the first two swapped.

    Arguments without a pattern must have their defaults; with `rest` they may have any value, and
    are bound under their own names. Raises `RewriteError` for arguments that an operator hasn't,
    and where `rest` would bind a name that another part of the pattern binds.
    """
    several = targets if isinstance(targets, tuple) else (targets,)
    for target in several:
        if not isinstance(target, torch._ops.OpOverload):
            raise RewriteError(
                "a pattern needs operator overloads such as torch.ops.aten.add.Tensor, not "
                f"{target!r}"
            )
        _check_arguments(target, len(args), kwargs)
    made = Op(several, args, kwargs, commutes, name, where, rest)
    _check_names(made)
    return made


def hole(name: str, where: Predicate | None = None) -> Hole:
    """A named hole for any argument: a node, a number, a list, None."""
    return Hole(name, where)


def constant(name: str, where: Predicate | None = None) -> Hole:
    """A named hole for a tensor of the program's state; `where` sees its node."""
    return Hole(
        name,
        lambda value: (
            isinstance(value, fx.Node)
            and value.op == "get_attr"
            and (where is None or where(value))
        ),
    )


def either(*choices: Pattern) -> Either:
    """The first of several patterns that matches."""
    return Either(choices)


def has_dtype(*dtypes: torch.dtype) -> Predicate:
    """A predicate for nodes whose value is a tensor of one of `dtypes`."""
    return lambda value: getattr(fake(value), "dtype", None) in dtypes


def has_rank(rank: int) -> Predicate:
    """A predicate for nodes whose value is a tensor of that rank."""
    return lambda value: getattr(fake(value), "ndim", None) == rank


def find(patterns: tuple[Pattern, ...], node: fx.Node) -> Match | None:
    """The match of `patterns` whose first output is `node`.

    Further outputs are looked for among the users of what is already bound.
    """
    for bound, inner in _match(patterns[0], node, {}, ()):
        for roots, all_bound, all_inner in _others(patterns[1:], (node,), bound, inner):
            nodes = tuple(dict.fromkeys(n for n in all_inner if n not in roots))
            return Match(roots, all_bound, nodes)
    return None


_State: TypeAlias = tuple[dict[str, Any], tuple[fx.Node, ...]]


def _others(
    patterns: tuple[Pattern, ...],
    roots: tuple[fx.Node, ...],
    bound: dict[str, Any],
    inner: tuple[fx.Node, ...],
) -> Iterator[tuple[tuple[fx.Node, ...], dict[str, Any], tuple[fx.Node, ...]]]:
    if not patterns:
        yield roots, bound, inner
        return
    shared = [value for value in bound.values() if isinstance(value, fx.Node)]
    candidates = dict.fromkeys(user for value in (*shared, *inner) for user in value.users)
    for candidate in candidates:
        if candidate in roots:
            continue
        for more, further in _match(patterns[0], candidate, bound, inner):
            yield from _others(patterns[1:], (*roots, candidate), more, further)


def _match(
    pattern: Pattern, value: Any, bound: dict[str, Any], inner: tuple[fx.Node, ...]
) -> Iterator[_State]:
    if isinstance(pattern, Hole):
        yield from _match_hole(pattern, value, bound, inner)
    elif isinstance(pattern, Either):
        for choice in pattern.choices:
            yield from _match(choice, value, bound, inner)
    elif isinstance(pattern, Op):
        yield from _match_op(pattern, value, bound, inner)
    elif not isinstance(value, fx.Node) and type(value) is type(pattern) and value == pattern:
        yield bound, inner


def _match_hole(
    pattern: Hole, value: Any, bound: dict[str, Any], inner: tuple[fx.Node, ...]
) -> Iterator[_State]:
    if pattern.name in bound:
        known = bound[pattern.name]
        same = known is value if isinstance(value, fx.Node) else known == value
        if same:
            yield bound, inner
    elif pattern.where is None or pattern.where(value):
        yield {**bound, pattern.name: value}, inner


def _match_op(
    pattern: Op, value: Any, bound: dict[str, Any], inner: tuple[fx.Node, ...]
) -> Iterator[_State]:
    if not isinstance(value, fx.Node) or value.target not in pattern.targets:
        return
    if pattern.where is not None and not pattern.where(value):
        return
    if pattern.name is not None:
        bound = {**bound, pattern.name: value}
    given = arguments(value)
    names = list(given)
    orders = [pattern.args]
    if pattern.commutes and len(pattern.args) >= 2:
        orders.append((pattern.args[1], pattern.args[0], *pattern.args[2:]))
    for order in orders:
        wanted: dict[str, Pattern] = {**dict(zip(names, order, strict=False)), **pattern.kwargs}
        if pattern.rest:
            wanted = {**{name: Hole(name) for name in names}, **wanted}
        if all(name in wanted or _is_default(value, name, given[name]) for name in names):
            pairs = [(sub, given[name]) for name, sub in wanted.items()]
            yield from _match_all(pairs, bound, (*inner, value))


def _match_all(
    pairs: list[tuple[Pattern, Any]], bound: dict[str, Any], inner: tuple[fx.Node, ...]
) -> Iterator[_State]:
    if not pairs:
        yield bound, inner
        return
    (pattern, value), *rest = pairs
    for more, further in _match(pattern, value, bound, inner):
        yield from _match_all(rest, more, further)


def _check_arguments(target: Target, positional: int, keywords: Mapping[str, Pattern]) -> None:
    names = [argument.name for argument in target._schema.arguments]
    if positional > len(names):
        plural = "argument" if len(names) == 1 else "arguments"
        raise RewriteError(
            f"{target} takes {len(names)} {plural} ({', '.join(names)}); the pattern names "
            f"{positional}"
        )
    for name in keywords:
        if name not in names:
            raise RewriteError(f"{target} has no argument {name!r}; it takes {', '.join(names)}")


def _check_names(pattern: Op) -> None:
    """A name that `rest` binds means one argument, and stands nowhere else by chance."""
    nothing: set[str] = set()
    parts = [(_names_of_rest(pattern), nothing), (nothing, {pattern.name or ""})]
    parts += [(_rest_below(part), _names(part)) for part in _parts(pattern)]
    for index, (taken, _) in enumerate(parts):
        for other, (_, names) in enumerate(parts):
            if index != other and taken & names:
                raise RewriteError(
                    f"rest=True of a pattern of {pattern.targets[0]} binds "
                    f"{', '.join(sorted(taken & names))}, which another part of the "
                    "pattern binds too; give that argument a hole of another name"
                )


def _parts(pattern: Pattern) -> tuple[Pattern, ...]:
    if isinstance(pattern, Op):
        return (*pattern.args, *pattern.kwargs.values())
    return pattern.choices if isinstance(pattern, Either) else ()


def _names_of_rest(pattern: Pattern) -> set[str]:
    """The names that `rest` of this pattern itself binds."""
    if not isinstance(pattern, Op) or not pattern.rest:
        return set()
    schemas = [target._schema.arguments for target in pattern.targets]
    names = {one.name for schema in schemas for one in schema[len(pattern.args) :]}
    return names - set(pattern.kwargs)


def _rest_below(pattern: Pattern) -> set[str]:
    return _names_of_rest(pattern).union(*map(_rest_below, _parts(pattern)))


def _names(pattern: Pattern) -> set[str]:
    """All names that a pattern binds."""
    own = {pattern.name} if isinstance(pattern, Hole | Op) and pattern.name else set()
    return own | _names_of_rest(pattern).union(*map(_names, _parts(pattern)))


def _is_default(node: fx.Node, name: str, value: Any) -> bool:
    assert isinstance(node.target, torch._ops.OpOverload)
    if isinstance(value, fx.Node):
        return False
    argument = next(a for a in node.target._schema.arguments if a.name == name)
    return bool(argument.has_default_value() and value == argument.default_value)
