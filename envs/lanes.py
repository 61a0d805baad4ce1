"""Many simulated clusters side by side: the arrays of all of them, as one compiled call reaches them.

A *lane* is one cluster with its workload in an episode. Lanes differ in everything: nodes, profiles, requests. Their
arrays stay where they are; a table of addresses, a row per lane, leads compiled code to them.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from deflector.envs.cluster import ClusterFacts, ClusterSpec, NodeField
from deflector.envs.compiled import floats_at, inner, ints_at, matrix_at
from deflector.envs.lane_memory import Arena, LaneMemory
from deflector.envs.outcome import NUM_COLUMNS, Outcomes
from deflector.envs.question import MEMORY
from deflector.envs.rewards import BEHIND, FIRST, LEDGER_COUNTS, SETTLED, Cost, Ledger, Settled
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.layout import FloatArray, IntArray, World, grown, new_world
from deflector.envs.state import StateRow
from deflector.envs.workload import Workload

# Columns of the table: addresses and lengths.
_F, _F_LENGTH, _I, _I_LENGTH, _LOG, _LOG_ROWS, _REQUESTS, _REQUESTS_ROWS = range(8)
_NODES, _NODES_ROWS, _TABLES, _TABLES_ROWS, _TABLES_COLUMNS, _CACHE, _CACHE_LENGTH = range(8, 15)
_PREFIXES, _PREFIXES_LENGTH, _HEAP, _SETTLED, _SLOS, _COUNTS, _COSTS, _ROWS, _MEMORY = range(15, 24)
_TABLE_WIDTH = 24
_NODE_WIDTH, _STATE_ROWS, _COST_PARTS, _SETTLED_WIDTH = len(NodeField), len(StateRow), len(Cost), len(Settled)
_FIRST_SLOTS, _FIRST_LOG_ENTRIES = 64, 4096


class Stage(IntEnum):
    """What a lane waits for."""

    EMPTY = 0
    """An episode."""
    READY = 1
    """To be played on: it has just begun, or has been given room to grow."""
    DECISION = 2
    """An action."""
    GROW_SLOTS = 3
    GROW_LOG = 4
    """Larger arrays."""
    OVER = 5
    """Nothing: its workload has been played to the end."""
    CUT = 6
    """Nothing: its time limit was reached, and what had been routed has been played to the end."""


# Columns of Lanes.i: stage, whether its arrivals have been cut off, decisions left to the agent (-1: all), whether the
# last action was masked out.
STAGE, IS_CUT, DECISIONS_LEFT, INVALID = range(4)
LANE_I = 4
# Columns of Lanes.f: time of the last decision, how long after the one before it the present one came, the TTFT
# predicted for the request at hand by the best prefill node and by the best decode node, what of the step's cost was
# settled before the arrivals were cut off, and the time now.
DECIDED_AT, ELAPSED, PREFILL_PATH_S, DECODE_PATH_S, COST_BEFORE_CUT, NOW = range(6)
LANE_F = 6


@dataclass(frozen=True, slots=True)
class Episode:
    """What is played in a lane.

    Attributes:
        spec: The cluster.
        facts: Its arrays; lanes with equal ones may share them.
        workload: The requests, SLOs attached.
        seed: Of step noise and report loss.
        burn_in_decisions: So many requests at the beginning take the default route and are not charged.
        max_decisions: Decisions of the agent before the arrivals are cut off; None for all.
    """

    spec: ClusterSpec
    facts: ClusterFacts
    workload: Workload
    seed: int = 0
    burn_in_decisions: int = 0
    max_decisions: int | None = None


class Lanes:
    """The arrays of a number of lanes."""

    def __init__(self, count: int) -> None:
        """Lanes without episodes."""
        self.table = np.zeros((count, _TABLE_WIDTH), np.int64)
        self.i = np.zeros((count, LANE_I), np.int64)
        self.f = np.zeros((count, LANE_F))
        self.costs = np.zeros((count, len(Cost)))
        self.worlds: list[World | None] = [None] * count
        self.episodes: list[Episode | None] = [None] * count
        arena = Arena(count)
        self._memory = [LaneMemory(arena) for _ in range(count)]
        self._kept: list[tuple[npt.NDArray[Any], ...]] = [()] * count
        """What the table points at besides the worlds."""

    def __len__(self) -> int:
        """Number of lanes."""
        return len(self.table)

    def begin(self, lane: int, episode: Episode) -> None:
        """Puts a new episode into a lane; its stage is then READY."""
        load, memory, old = episode.workload, self._memory[lane], self.worlds[lane]
        if old is not None:
            old.log[: int(old.i[at.H_LOG_LENGTH])] = 0.0
        world = new_world(
            episode.spec, episode.facts, load, seed=episode.seed, count_from_s=np.inf,
            slots=_FIRST_SLOTS if old is None else int(old.i[at.H_SLOTS]),
            log_entries=_FIRST_LOG_ENTRIES if old is None else len(old.log), room=memory.room,
        )  # fmt: skip
        count = len(load)
        heap, settled = memory.room("heap", 3 * count), memory.room("settled", _SETTLED_WIDTH * count)
        slos = memory.room("slos", 3 * count).reshape(count, 3)
        slos[:, 0], slos[:, 1], slos[:, 2] = load.ttft_slo_s, load.tbt_slo_s, load.max_output_tokens
        counts, memory_of_encoder = np.zeros(LEDGER_COUNTS, np.int64), np.zeros(MEMORY)
        counts[FIRST] = counts[BEHIND] = episode.burn_in_decisions
        rows = np.zeros((len(StateRow), episode.facts.num_nodes))
        self.worlds[lane], self.episodes[lane] = world, episode
        self._kept[lane] = (heap, settled, slos, counts, rows, memory_of_encoder)
        self.i[lane] = Stage.READY, 0, -1, 0
        if episode.max_decisions is not None:
            self.i[lane, DECISIONS_LEFT] = episode.max_decisions
        self.f[lane] = 0.0
        self.costs[lane] = 0.0
        self._point_at(lane, world)

    def grow(self, lane: int) -> None:
        """Gives a lane the room that it asked for; its stage is then READY."""
        self.make_room(lane, at.GROW_SLOTS if self.i[lane, STAGE] == Stage.GROW_SLOTS else at.GROW_LOG)
        self.i[lane, STAGE] = Stage.READY

    def make_room(self, lane: int, code: int) -> World:
        """Gives a lane larger arrays, at any stage; `code` is what `grown` takes. Returns them."""
        world = grown(self.world(lane), code)
        self.worlds[lane] = world
        for name in ("f", "i") if code == at.GROW_SLOTS else ("log",):
            self._memory[lane].keep(name, getattr(world, name))
        self._point_at(lane, world)
        return world

    def world(self, lane: int) -> World:
        """The arrays of a lane's run.

        Raises:
            RuntimeError: If the lane has no episode.
        """
        world = self.worlds[lane]
        if world is None:
            raise RuntimeError("no episode: call reset() first")
        return world

    def rows(self, lane: int) -> FloatArray:
        """(len(StateRow), num_nodes) float64: `ClusterState.rows` at the present decision, overwritten by the next."""
        rows: FloatArray = self._kept[lane][4]
        return rows

    def counted(self, lane: int) -> tuple[int, int]:
        """(first, behind): the numbers of the requests that the agent has routed in a lane's episode."""
        counts = self._kept[lane][3]
        return int(counts[FIRST]), int(counts[BEHIND])

    def attained(self, lane: int) -> tuple[float, int]:
        """Of the requests routed by the agent: the share that met their SLOs, and the number; once all are settled."""
        first, behind = self.counted(lane)
        missed = float(self.world(lane).requests[first:behind, at.CHARGED].sum())
        return (behind - first - missed) / (behind - first), behind - first

    def settled(self, lane: int, known: int) -> FloatArray:
        """(n, len(Settled)) float64 of the requests routed by the agent that have ended, but for the first `known`."""
        settled, counts = self._kept[lane][1], self._kept[lane][3]
        return settled.reshape(-1, _SETTLED_WIDTH)[known : int(counts[SETTLED])]

    def outcomes(self, lane: int) -> Outcomes:
        """What is known by now of the requests of a lane's episode, those not routed by the agent included; a copy."""
        episode = self.episodes[lane]
        world = self.world(lane)
        assert episode is not None
        load = episode.workload
        return Outcomes(load.arrival_s, load.ttft_slo_s, load.tbt_slo_s, world.requests[:, :NUM_COLUMNS].copy())

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Makes a copy (`copy.deepcopy`, `pickle`) independent of the original: its table leads to its own arrays."""
        self.__dict__.update(state)
        for lane, world in enumerate(self.worlds):
            if world is not None:
                self._point_at(lane, world)

    def _point_at(self, lane: int, w: World) -> None:
        """Writes the addresses of a lane's arrays into the table."""
        row = self.table[lane]
        row[[_HEAP, _SETTLED, _SLOS, _COUNTS, _ROWS, _MEMORY]] = [array.ctypes.data for array in self._kept[lane]]
        row[_COSTS] = self.costs.ctypes.data + lane * self.costs.strides[0]
        row[[_F, _F_LENGTH]] = w.f.ctypes.data, len(w.f)
        row[[_I, _I_LENGTH]] = w.i.ctypes.data, len(w.i)
        row[[_LOG, _LOG_ROWS]] = w.log.ctypes.data, len(w.log)
        row[[_REQUESTS, _REQUESTS_ROWS]] = w.requests.ctypes.data, len(w.requests)
        row[[_NODES, _NODES_ROWS]] = w.nodes.ctypes.data, len(w.nodes)
        row[[_TABLES, _TABLES_ROWS, _TABLES_COLUMNS]] = w.tables.ctypes.data, *w.tables.shape
        row[[_CACHE, _CACHE_LENGTH]] = w.cache.ctypes.data, len(w.cache)
        row[[_PREFIXES, _PREFIXES_LENGTH]] = w.prefixes.ctypes.data, len(w.prefixes)


class Lane(NamedTuple):
    """One lane, as compiled code takes it.

    Attributes:
        world: Its run.
        ledger: Its open accounts.
        rows: `ClusterState.rows`.
        memory: What its encoder remembers.
    """

    world: World
    ledger: Ledger
    rows: FloatArray
    memory: FloatArray


@inner
def lane_at(table: IntArray, lane: int) -> Lane:
    """The arrays that the table points at."""
    t = table[lane]
    world = World(
        floats_at(t[_F], t[_F_LENGTH]),
        ints_at(t[_I], t[_I_LENGTH]),
        matrix_at(t[_LOG], t[_LOG_ROWS], at.LOG_WIDTH),
        matrix_at(t[_REQUESTS], t[_REQUESTS_ROWS], at.REQUEST_WIDTH),
        matrix_at(t[_NODES], t[_NODES_ROWS], _NODE_WIDTH),
        matrix_at(t[_TABLES], t[_TABLES_ROWS], t[_TABLES_COLUMNS]),
        ints_at(t[_CACHE], t[_CACHE_LENGTH]),
        ints_at(t[_PREFIXES], t[_PREFIXES_LENGTH]),
    )
    ledger = Ledger(
        ints_at(t[_COUNTS], LEDGER_COUNTS),
        matrix_at(t[_HEAP], t[_REQUESTS_ROWS], 3),
        matrix_at(t[_SETTLED], t[_REQUESTS_ROWS], _SETTLED_WIDTH),
        matrix_at(t[_SLOS], t[_REQUESTS_ROWS], 3),
        floats_at(t[_COSTS], _COST_PARTS),
    )
    return Lane(world, ledger, matrix_at(t[_ROWS], _STATE_ROWS, t[_NODES_ROWS]), floats_at(t[_MEMORY], MEMORY))
