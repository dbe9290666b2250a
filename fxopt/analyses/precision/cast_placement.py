"""The cheapest placement of casts: low and high values parted by a minimum cut.

Every value is kept either low (half precision) or high (float32). A value that is read on the other
side is cast once, whoever reads it there, and a cast moves `bytes` of it. With H the high side,

    cost(H) = Σ bytes(u) [u in H, some reader low] + Σ bytes(u) [u low, some reader in H]

is the weight of a cut between a source on the high side and a sink on the low one: u → d carries
bytes(u) and d → v infinity for each reader v (cast down), v → p infinity and p → u bytes(u) (cast
up). A value fixed to a side is merged with its terminal. An operator that would round an operand
only for its own sake stays high when that operand is: u → v of infinite weight. Of equally cheap
placements the one with fewest `exact` values high is taken, since these move fewer bytes low and
are the same numbers; of those the one with most other values high. What free values don't touch
each other falls apart, and each part is cut by itself.
Source: Ford and Fulkerson (1956); networkx's `minimum_cut`, whose sink side is the smallest.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fxopt.analyses.precision.operators import Side

if TYPE_CHECKING:
    import networkx as nx

_HIGH, _LOW = "high", "low"


@dataclass(frozen=True)
class Value:
    """A value that is kept low, high or in either: what casting it moves, in bytes.

    `exact`: its operator moves or selects values, so that it makes the same numbers on either side.
    """

    name: str
    side: Side
    bytes: int
    exact: bool = False


@dataclass(frozen=True)
class Reading:
    """`reader` uses the value `value`.

    `keeps`: the reader must be high where the value is. `widens`: the reader, when high, takes the
    value as it is where that is low, without a cast.
    """

    value: str
    reader: str
    keeps: bool = False
    widens: bool = False


@dataclass(frozen=True)
class CastGraph:
    """Values and who reads them; each reader is a value too, an output of 0 bytes perhaps."""

    values: tuple[Value, ...]
    readings: tuple[Reading, ...]


@dataclass(frozen=True)
class Placement:
    """The names of the low values, those cast down and up at a cost, and the bytes that moves."""

    low: frozenset[str]
    down: tuple[str, ...]
    up: tuple[str, ...]
    bytes: int


def cheapest_placement(graph: CastGraph) -> Placement:
    """The placement whose casts move the fewest bytes.

    Where that leaves a choice, exact values are low and the others high.

    Raises `ValueError` for a reading that `keeps` between values fixed the other way.
    """
    import networkx as nx

    network = _network(graph)
    low = {value.name for value in graph.values if value.side == "low"}
    inner = network.subgraph([node for node in network if node not in (_HIGH, _LOW)])
    try:
        for part in nx.weakly_connected_components(inner):
            low |= _cut(network, part)
    except nx.NetworkXUnbounded:
        low = set()
    placed = priced(graph, low)
    if placed is None:
        raise ValueError("a value fixed low must be high, since one that it reads is")
    return placed


def priced(graph: CastGraph, low: Collection[str]) -> Placement | None:
    """The placement with `low` values low, or None where a reading or a fixed side forbids it."""
    chosen = frozenset(low)
    sizes = {value.name: value.bytes for value in graph.values}
    for value in graph.values:
        if value.side != "either" and (value.side == "low") != (value.name in chosen):
            return None
    down, up = dict[str, None](), dict[str, None]()
    for reading in graph.readings:
        is_low, read_low = reading.value in chosen, reading.reader in chosen
        if is_low and not read_low and not reading.widens:
            up[reading.value] = None
        elif read_low and not is_low:
            if reading.keeps:
                return None
            down[reading.value] = None
    cast_down, cast_up = (tuple(name for name in names if sizes[name]) for names in (down, up))
    moved = sum(sizes[name] for name in (*cast_down, *cast_up))
    return Placement(chosen, cast_down, cast_up, moved)


def _network(graph: CastGraph) -> nx.DiGraph:
    """The flow network: terminals, a node for each free value, and two for the casts of a value."""
    import networkx as nx

    place: dict[str, object] = {
        value.name: value.side if value.side != "either" else ("value", value.name)
        for value in graph.values
    }
    # One byte outweighs the preferences of all exact values together.
    sizes = {value.name: value.bytes * (len(graph.values) + 1) for value in graph.values}
    network = nx.DiGraph()
    network.add_nodes_from((_HIGH, _LOW))
    network.add_nodes_from(place.values())
    for value in graph.values:
        if value.exact and value.side == "either":
            network.add_edge(place[value.name], _LOW, capacity=1)
    for reading in graph.readings:
        source, reader = place[reading.value], place[reading.reader]
        if source != _LOW and reader != _HIGH:
            down = ("down", reading.value)
            network.add_edge(source, down, capacity=sizes[reading.value])
            network.add_edge(down, reader)
            if reading.keeps:
                network.add_edge(source, reader)
        if source != _HIGH and reader != _LOW and not reading.widens:
            up = ("up", reading.value)
            network.add_edge(reader, up)
            network.add_edge(up, source, capacity=sizes[reading.value])
    return network


def _cut(network: nx.DiGraph, part: Collection[object]) -> set[str]:
    """The free values of one part that the minimum cut puts on the low side."""
    import networkx as nx
    from networkx.algorithms.flow import boykov_kolmogorov

    free = {node[1] for node in part if isinstance(node, tuple) and node[0] == "value"}
    if not free:
        return set()
    flow = network.subgraph([*part, _HIGH, _LOW])
    _, (_, sink_side) = nx.minimum_cut(flow, _HIGH, _LOW, flow_func=boykov_kolmogorov)
    return {name for name in free if ("value", name) in sink_side}


def sure_high(values: Sequence[Value], readings: Sequence[Reading]) -> frozenset[str]:
    """The values that every placement keeps high: those fixed so, and what must follow them."""
    sides: Mapping[str, Side] = {value.name: value.side for value in values}
    high = {value.name for value in values if value.side == "high"}
    followers: dict[str, list[str]] = {}
    for reading in readings:
        if reading.keeps and sides[reading.reader] == "either":
            followers.setdefault(reading.value, []).append(reading.reader)
    waiting = list(high)
    while waiting:
        for follower in followers.get(waiting.pop(), ()):
            if follower not in high:
                high.add(follower)
                waiting.append(follower)
    return frozenset(high)
