"""What the calls of a saved graph give, found on fake tensors and within bounds.

Nothing in a graph that comes from a file may cost more than the file's bytes allow: no operator
runs on real memory, the operators that one composite operator runs are counted, so that none takes
a tensor into 2^40 slices, and sizes are computed from numbers of 64 bits alone, in expressions of a
bounded length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from fxopt.errors import SaveError
from fxopt.graph_text import describe
from fxopt.nodes import module_path, size_at_capture
from fxopt.rewriting.fake_types import KnownCalls, run_on_fakes
from fxopt.saving.expressions import check_shapes, terms
from fxopt.saving.symbols import NamedSizes
from fxopt.wellformed import SIZE_FUNCTIONS

_NUMBERS = (bool, int, float, torch.SymBool, torch.SymInt, torch.SymFloat)
_WORD = 2**63
_LARGEST_EXPONENT = 16
_HIGHEST_RANK = 64
_MOST_PARTS = 4_096
_MOST_STEPS = 32
_NUMBERED = ("ScalarType", "Layout", "MemoryFormat", "QScheme")
_CALLS_OF_A_FILE = 8_192
_CALLS_OF_A_NODE = 200
_RESULTS_OF_A_FILE = 16_384
_RESULTS_OF_A_NODE = 4
_STEPS: Mapping[str, str] = {"aten::combinations": "r", "aten::diff": "n"}
"""The argument that says how many steps an operator takes, each of which is typed."""

_GETITEM = SIZE_FUNCTIONS["operator.getitem"]
_POWER = SIZE_FUNCTIONS["operator.pow"]


class BoundedFakeMode(FakeTensorMode):
    """A fake mode that counts the calls made in it, and runs no operator on real memory.

    After `release` it is like any other.
    """

    def __init__(self, calls: int) -> None:
        super().__init__(shape_env=NamedSizes(), allow_fallback_kernels=False)
        self._calls: float = calls
        self._was_cached = self.cache_enabled
        self.cache_enabled = False  # that of the process would keep whatever a file holds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._calls -= 1
        if self._calls < 0:
            raise SaveError("the operators of the saved graph fall into too many parts")
        if self._calls < math.inf:
            _check_parts(func, args, kwargs or {})  # torch unbinds a tensor given for a list
        return super().__torch_dispatch__(func, types, args, kwargs)

    def release(self) -> None:
        """Count no longer, and let operators without a shape rule run: passes may need them."""
        self._calls = math.inf
        self.allow_fallback_kernels = True
        self.cache_enabled = self._was_cached


class CallTypes:
    """The fake values of the calls of a saved graph of `nodes` nodes; equal calls are run once.

    It is one of `programs` in its file, which share what any file may take.
    """

    def __init__(self, nodes: int, programs: int = 1) -> None:
        self.mode = BoundedFakeMode(_CALLS_OF_A_FILE // programs + nodes * _CALLS_OF_A_NODE)
        self._known = KnownCalls(self._run)
        self._results = _RESULTS_OF_A_FILE // programs + nodes * _RESULTS_OF_A_NODE

    def of(self, node: fx.Node) -> Any:
        """The fake value of a call; `SaveError` where it can't be made, or not within bounds."""
        try:
            value = self._known.result(node.target, node.args, node.kwargs)
            self._check_results(value)
            return value
        except Exception as error:  # whatever an operator raises on arguments it wasn't made for
            reason = (str(error).splitlines() or [""])[0]
            if not isinstance(error, SaveError):
                reason = f"the saved graph can't be typed: {type(error).__name__}: {reason}"
            raise SaveError(
                f"{reason:.400}\n"
                f"  node: {describe(node):.400}\n"
                f"  module: {module_path(node) or '(the model itself)':.400}"
            ) from error

    def _run(self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if isinstance(target, torch._ops.OpOverload):
            check_shapes((args, kwargs))
            _check_numbered(target, args, kwargs)
            _check_parts(target, args, kwargs)
            _check_steps(target, args, kwargs)
            return run_on_fakes(self.mode, target, args, kwargs)
        if kwargs:
            raise SaveError(f"the saved graph names arguments of {target.__name__}, which has none")
        return _computed_size(target, args)

    def _check_results(self, value: Any) -> None:
        leaves = value if isinstance(value, (tuple, list)) else (value,)
        self._results -= len(leaves)
        if self._results < 0:
            raise SaveError("the operators of the saved graph have too many results")
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.ndim > _HIGHEST_RANK:
                raise SaveError(
                    f"the saved graph makes a tensor of {leaf.ndim} axes; {_HIGHEST_RANK} can be"
                )
        check_shapes(value)


def _check_numbered(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse a number for a dtype, layout or memory format, by which torch indexes its tables."""
    for index, argument in enumerate(target._schema.arguments):
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        if isinstance(value, int) and any(kind in str(argument.real_type) for kind in _NUMBERED):
            raise SaveError(f"the saved graph gives the number {value} for {argument.name}")


def _check_steps(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse an operator that is told to repeat itself more often than any model has it do."""
    name = _STEPS.get(target._schema.name)
    if name is None:
        return
    given = dict(zip((argument.name for argument in target._schema.arguments), args, strict=False))
    steps = given.get(name, kwargs.get(name))
    if isinstance(steps, (int, torch.SymInt)) and size_at_capture(steps) > _MOST_STEPS:
        raise SaveError(
            f"the saved graph gives {steps} for {name}, and at most {_MOST_STEPS} are taken"
        )


def _check_parts(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse what takes a tensor into more parts than are counted: torch makes the list first."""
    given = dict(zip((argument.name for argument in target._schema.arguments), args, strict=False))
    given.update(kwargs)
    whole = given.get("self")
    if not isinstance(whole, Tensor) or not whole.ndim:
        return
    counts = [given.get(name) for name in ("chunks", "sections", "indices_or_sections", "r", "N")]
    axis = given.get("dim", 0)
    known = isinstance(axis, int) and -whole.ndim <= axis < whole.ndim
    size = size_at_capture(whole.shape[axis]) if known else 0
    if "split_size" in given and isinstance(given["split_size"], int):
        counts.append(size // max(given["split_size"], 1))
    elif "unbind" in str(target):
        counts.append(size)
    if any(isinstance(count, int) and count > _MOST_PARTS for count in counts):
        raise SaveError("the saved graph takes a tensor into too many parts")


def _computed_size(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """`function(*args)`, which is arithmetic on numbers of 64 bits, or takes a tuple apart."""
    if function is _GETITEM:
        values, index = args
        if type(index) is not int or not isinstance(values, (tuple, list)):
            raise SaveError("the saved graph takes an item of something other than results")
        return values[index]
    numbers = list(_flat(args))
    for number in numbers:
        _check_number(number)
    if function is _POWER and not _is_small_power(*numbers):
        raise SaveError(f"the saved graph computes a size that is too large, from {numbers}")
    result = function(*args)
    _check_number(result)
    return result


def _is_small_power(base: Any, exponent: Any) -> bool:
    return isinstance(exponent, (int, float)) and abs(exponent) <= _LARGEST_EXPONENT


def _check_number(value: Any) -> None:
    if not isinstance(value, _NUMBERS):
        raise SaveError(f"the saved graph computes a size from a {type(value).__name__}")
    if isinstance(value, int) and not -_WORD <= value < _WORD:
        raise SaveError(
            f"the saved graph computes a size that is too large: {value.bit_length()} bits"
        )
    if not isinstance(value, (bool, int, float)):
        terms(value.node.expr)


def _flat(args: Sequence[Any]) -> Iterator[Any]:
    """The numbers among `args`, where one list of them stands in, too."""
    for arg in args:
        if isinstance(arg, (tuple, list)):
            yield from arg
        else:
            yield arg
