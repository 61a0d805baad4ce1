"""Every step of every engine, as the kernel plays it: for comparisons with other engines, and for pictures."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from deflector.envs.backend import SimulatedBackend, observe_world
from deflector.envs.cluster import NodeField
from deflector.envs.compiled import entry
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.events import play_event
from deflector.envs.state import Path


class Step(NamedTuple):
    """One engine step that has ended.

    Attributes:
        node: The engine.
        start_s: When it was scheduled.
        end_s: When its tokens appear.
        scheduled: (request, tokens) in the order of `running`.
        preempted: Requests thrown out while it was scheduled, first one first (those of attempts that scheduled nothing
            included).
        yielded: Requests that get an output token at its end (or would, had their clients not gone away during it); the
            prefill node's own token of a disaggregated request is none.
        kv_blocks_used: Blocks in use during the step, those held for transfers included.
        waiting: Requests left in `waiting` (not `ready`, not being pulled) after it was scheduled, in order.
    """

    node: int
    start_s: float
    end_s: float
    scheduled: tuple[tuple[int, int], ...]
    preempted: tuple[int, ...]
    yielded: tuple[int, ...]
    kv_blocks_used: int
    waiting: tuple[int, ...]


class _Begun(NamedTuple):
    """A step, or a leap of many equal ones, that a node has begun."""

    iteration: int
    preempted: tuple[int, ...]
    scheduled: tuple[tuple[int, int], ...]
    yielded: tuple[int, ...]
    decodes_computed: at.IntArray
    """KV tokens of the decodes before the first iteration."""
    kv_blocks_used: int
    waiting: tuple[int, ...]


class TracedBackend(SimulatedBackend):
    """Writes down every engine step; far slower than the backend that it is."""

    @property
    def steps(self) -> list[Step]:
        """Steps that have ended, in the order of their ends; of one time, by node."""
        return sorted(self._ended, key=lambda step: (step.end_s, step.node))

    def reset(self, seed: int) -> None:
        """Begins the same workload anew with another seed of noise and report loss."""
        super().reset(seed)
        self._ended: list[Step] = []
        self._begun: dict[int, _Begun] = {}
        self._preempted: dict[int, list[int]] = {node: [] for node in range(self.facts.num_nodes)}
        self._preemptions: dict[int, int] = {}

    def _advance(self, rows: at.FloatArray) -> int:
        while (code := _play_event(self.world)) == at.GO_ON:
            self._look()
        if code == at.DECIDE:
            observe_world(self.world, rows)
        return code

    def _look(self) -> None:
        """Notes what the last event has begun and ended."""
        for node in range(self.facts.num_nodes):
            record = self._node(node)
            begun = self._begun.get(node)
            if begun and not record[at.BUSY]:
                self._end(node, begun, int(record[at.ITER]) - begun.iteration)
                del self._begun[node]
            self._note_preemptions(node)
            if record[at.BUSY] and node not in self._begun:
                self._begun[node] = self._begin(node)

    def _begin(self, node: int) -> _Begun:
        record = self._node(node)
        iteration = int(record[at.ITER])
        scheduled, yielded, computed = [], [], []
        for slot in self._listed(record, at.RUN_HEAD):
            request = int(slot[at.REQUEST])
            if slot[at.STAGE] == at.DECODING and slot[at.BROKEN] != 1:
                scheduled.append((request, 1))
                yielded.append(request)
                computed.append(int(slot[at.OFFSET]) + iteration)
            elif slot[at.STAGE] == at.PREFILLING and slot[at.CHUNK] > 0:
                scheduled.append((request, int(slot[at.CHUNK])))
                ends = slot[at.COMPUTED] + slot[at.CHUNK] == slot[at.TARGET]
                if ends and (slot[at.PATH] != Path.DISAGGREGATE or slot[at.HANDED]):
                    yielded.append(request)
        preempted, self._preempted[node] = tuple(self._preempted[node]), []
        used = int(self.facts.nodes[node, NodeField.KV_BLOCKS]) - int(record[at.FREE_BLOCKS])
        waiting = tuple(int(slot[at.REQUEST]) for slot in self._listed(record, at.WAIT_HEAD))
        held = np.array(computed, dtype=np.int64)
        return _Begun(iteration, preempted, tuple(scheduled), tuple(yielded), held, used, waiting)

    def _note_preemptions(self, node: int) -> None:
        """Requests preempted by the last event stand at the front of the waiting queue, the last one first."""
        new: list[int] = []
        for slot in self._listed(self._node(node), at.WAIT_HEAD):
            request, count = int(slot[at.REQUEST]), int(slot[at.NUM_PREEMPTIONS])
            if count == self._preemptions.get(request, 0):
                break
            self._preemptions[request] = count
            new.append(request)
        self._preempted[node] += reversed(new)

    def _end(self, node: int, begun: _Begun, iterations: int) -> None:
        base = at.HEADER_F + node * at.NODE_F
        start_s, time_s, growth_s = self.world.f[base + at.STEP_START : base + at.STEP_GROWTH + 1].tolist()
        block_size, used = int(self.facts.nodes[node, NodeField.BLOCK_SIZE]), begun.kv_blocks_used

        def end_s(steps: int) -> float:
            return start_s + steps * time_s + growth_s * (0.5 * steps * (steps - 1))

        for k in range(iterations):
            if k > 0:
                used += int(np.count_nonzero((begun.decodes_computed + k) % block_size == 0))
            preempted = begun.preempted if k == 0 else ()
            step = Step(node, end_s(k), end_s(k + 1), begun.scheduled, preempted, begun.yielded, used, begun.waiting)
            self._ended.append(step)

    def _node(self, node: int) -> at.IntArray:
        start = at.HEADER_I + node * int(self.world.i[at.H_NODE_STRIDE])
        return self.world.i[start : start + at.NODE_I]

    def _listed(self, record: at.IntArray, head: int) -> Iterator[at.IntArray]:
        """The slots of one of a node's lists."""
        number = int(record[head])
        while number >= 0:
            start = int(self.world.i[at.H_SLOT0_I]) + number * at.SLOT_I
            slot = self.world.i[start : start + at.SLOT_I]
            yield slot
            number = int(slot[at.NEXT])


@entry
def _play_event(w: at.World) -> int:
    return play_event(w)
