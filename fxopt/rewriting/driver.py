"""The driver: rules to their fixed point on a copy of the graph.

A worklist holds each node once; a firing puts the new nodes, the users of the replaced value and
its operands back. So the work is proportional to the nodes plus the firings for rules that look at
a bounded neighbourhood. The driver counts; a rule can't say.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import has_free_symbols

from fxopt.errors import RewriteError
from fxopt.nodes import constants_below, is_pure, label
from fxopt.program import Changes, Program, Refusal
from fxopt.rewriting.edit import Edit
from fxopt.rewriting.own_memory import keep_sharing
from fxopt.rewriting.pattern import Match, Target
from fxopt.rewriting.rule import Rule

_DEEPEST = 32
"""A value rewritten more often than this, one rewrite on top of the other, is a loop."""


def rewrite(program: Program, rules: Sequence[Rule], skip: Collection[str] = ()) -> Program:
    """A new program: `rules` applied until none fires; nodes named in `skip` stay as they are.

    The result's `changes` hold the firings and refusals, after those that `program` came with.
    Raises `RewriteError` for rules that loop or build what can't take the root's place.
    """
    return _Driver(program, rules, frozenset(skip)).run()


class _Driver:
    def __init__(self, program: Program, rules: Sequence[Rule], skip: frozenset[str]) -> None:
        self.program = program
        self.skip = skip
        self.edit = Edit(program)
        self.rules: dict[Target, list[Rule]] = defaultdict(list)
        for rule in rules:
            rule.see(program)
            for target in rule.targets():
                self.rules[target].append(rule)
        self.anywhere = [rule for rule in rules if not rule.targets()]
        self.queue: deque[fx.Node] = deque()
        self.queued: set[fx.Node] = set()
        self.gone: set[fx.Node] = set()
        self.fired: Counter[str] = Counter()
        self.refused: dict[tuple[str, fx.Node], Refusal] = {}
        self.origin = {node: node.name for node in self.edit.graph.nodes}
        self.depth: Counter[fx.Node] = Counter()
        self.taken: set[str] = set()

    def run(self) -> Program:
        # A firing wakes its neighbours only; what a deep pattern sees from further off, or what
        # was refused for a user that is gone by now, is found by one more look at everything.
        settled = -1
        while settled != (settled := sum(self.fired.values())):
            self._enqueue(self.edit.graph.nodes)
            self._drain()
        self._sweep()
        return self._result()

    def _drain(self) -> None:
        while self.queue:
            node = self.queue.popleft()
            self.queued.discard(node)
            if node not in self.gone and self.origin.get(node) not in self.skip:
                self._visit(node)

    def _visit(self, node: fx.Node) -> None:
        for rule in (*self.rules.get(node.target, ()), *self.anywhere):  # type: ignore[call-overload]
            self.refused.pop((rule.name, node), None)
            match = rule.match(node)
            if match is None:
                continue
            reason = rule.reason_to_refuse(match)
            if reason is None:
                self._fire(rule, match)
                return
            self.refused[rule.name, node] = Refusal(reason, label(node))

    def _fire(self, rule: Rule, match: Match) -> None:
        self.edit.start(min(match.roots) if len(match.roots) > 1 else match.root)
        known = len(self.edit.added)
        result = rule.rewrite(match, self.edit)
        if len(self.edit.added) > known:
            bound = [value for value in match.bound.values() if isinstance(value, fx.Node)]
            read = constants_below((*match.roots, *match.inner, *bound))
            live = {str(one.target) for new in self.edit.new_nodes for one in new.all_input_nodes}
            self.taken |= read - (live - self.edit.fetched)
        results = (result,) if isinstance(result, fx.Node) else tuple(result)
        if len(results) != len(match.roots):
            raise RewriteError(
                f"rule {rule.name} returned {len(results)} values for the {len(match.roots)} of "
                f"its pattern, at {label(match.root)}"
            )
        depth = 1 + max(self.depth[root] for root in match.roots)
        if depth > _DEEPEST:
            raise RewriteError(
                f"rule {rule.name} loops: the value of {label(match.root)} was rewritten "
                f"{_DEEPEST} times in a row. Make the pattern not match its own result."
            )
        self._check_operands(rule, match)
        for root, new in zip(match.roots, results, strict=True):
            self._check_type(rule, root, new)
        for node in (*self.edit.new_nodes, *results):
            self.depth[node] = max(self.depth[node], depth)
        self.fired[rule.name] += 1
        self._replace(match, results)

    def _replace(self, match: Match, results: Sequence[fx.Node]) -> None:
        touched: dict[fx.Node, None] = dict.fromkeys(self.edit.new_nodes)
        for root, new in zip(match.roots, results, strict=True):
            touched.update(dict.fromkeys((new, *root.users)))
            name = self.origin.get(root)
            if name is not None:
                self.origin.setdefault(new, name)
            root.replace_all_uses_with(new, propagate_meta=False)
        for new, old in self.edit.stand_ins:
            if old in self.origin:
                self.origin.setdefault(new, self.origin[old])
        for root in match.roots:
            touched.update(dict.fromkeys(self._erase(root, {*match.roots, *match.inner})))
        self._enqueue(touched)

    def _erase(self, node: fx.Node, matched: Collection[fx.Node]) -> list[fx.Node]:
        """Erase `node` and what only it used; return the operands that live on."""
        alive = []
        stack = [node]
        while stack:
            dead = stack.pop()
            # What was matched is drawn anew by its replacement, if at all, and not a second time.
            pure = is_pure(dead, "eval" if dead in matched else "train")
            if dead in self.gone or dead.users or not pure:
                continue
            operands = dead.all_input_nodes
            self.edit.before_erasing(dead)
            self.edit.graph.erase_node(dead)
            self.gone.add(dead)
            for operand in operands:
                if operand.users:
                    alive.append(operand)
                else:
                    stack.append(operand)
        return [operand for operand in alive if operand not in self.gone]

    def _sweep(self) -> None:
        for node in reversed(self.edit.graph.nodes):
            if not node.users and is_pure(node, "train"):
                self.edit.graph.erase_node(node)
                self.gone.add(node)
                self.fired["dead nodes"] += node.op == "call_function"

    def _enqueue(self, nodes: Collection[fx.Node] | fx.graph._node_list) -> None:
        for node in nodes:
            wanted = node.target in self.rules or (self.anywhere and node.op == "call_function")
            if wanted and node not in self.queued:
                self.queued.add(node)
                self.queue.append(node)

    def _check_operands(self, rule: Rule, match: Match) -> None:
        for node in self.edit.new_nodes:
            for operand in node.all_input_nodes:
                if operand in match.roots:
                    raise RewriteError(
                        f"rule {rule.name} built {node.name} on {label(operand)}, the node that it "
                        "replaces. Build that call anew with edit.call(root.target, "
                        "*root.args), and make the pattern not match it again."
                    )

    def _check_type(self, rule: Rule, root: fx.Node, new: fx.Node) -> None:
        old_value, new_value = root.meta["val"], new.meta["val"]
        if not (isinstance(old_value, Tensor) and isinstance(new_value, Tensor)):
            return
        same = old_value.dtype == new_value.dtype and old_value.device == new_value.device
        if not same or not _same_shape(old_value.shape, new_value.shape):
            raise RewriteError(
                f"rule {rule.name} replaced {label(root)}, a {_kind(old_value)}, by a "
                f"{_kind(new_value)}; the two sides of a rule must have one type"
            )

    def _result(self) -> Program:
        if not self.fired and not self.gone:
            refused = tuple(dict.fromkeys(self.refused.values()))
            changes = self.program.changes.then(Changes(refused=refused))
            return replace(self.program, changes=changes)
        keep_sharing(self.program.graph, self.edit.graph, " and ".join(self.fired))
        alive = set(self.edit.graph.nodes)
        replaced = {
            name: node.name
            for node, name in self.origin.items()
            if node in alive and node.name != name
        }
        refused = tuple(
            dict.fromkeys(refusal for (_, node), refusal in self.refused.items() if node in alive)
        )
        fired = {rule: count for rule, count in self.fired.items() if count}
        changes = self.program.changes.then(Changes(fired, replaced, refused))
        changed = self.program.with_graph(self.edit.graph, self.edit.added)
        return replace(changed, changes=changes, taken=changed.taken | self.taken)


def _same_shape(old: torch.Size, new: torch.Size) -> bool:
    if len(old) != len(new):
        return False
    return all(
        has_free_symbols(a) or has_free_symbols(b) or int(a) == int(b)
        for a, b in zip(old, new, strict=True)
    )


def _kind(value: Tensor) -> str:
    return f"{value.dtype}{tuple(value.shape)} on {value.device}"
