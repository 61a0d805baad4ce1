"""When each request was where, as far as a run has come: what its pictures are drawn from."""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from deflector.envs.cluster import ClusterFacts, Fault
from deflector.envs.outcome import Column, Status
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.layout import FloatArray, IntArray, World
from deflector.envs.state import Path
from deflector.envs.workload import Workload

BoolArray = npt.NDArray[np.bool_]


class Moment(IntEnum):
    """Columns of `History.at_s`."""

    FIRST_CHUNK = 0
    """Start of the first step that holds a chunk of it."""
    PREFILL_END = 1
    TRANSFER_START = 2
    TRANSFER_END = 3
    FIRST_TOKEN = 4
    """May lie in the future: the end of the step in progress."""
    END = 5
    """Finished, rejected, failed or aborted."""


_LIVE_MOMENTS = [at.FIRST_CHUNK, at.PREFILL_END, at.TRANSFER_START, at.TRANSFER_END, at.FIRST_TOKEN]


class History:
    """What is known by now of every request of a run.

    A request's transfer is known to have begun at the end of its prefill, or later if `follow` was called meanwhile:
    the decode node's wait for blocks is not among the outcomes.

    Attributes:
        facts: The cluster.
        load: The requests.
        faults: What happens to the nodes.
        now_s: Time of the last look.
        arrived: So many requests have arrived; the last of them may still wait to be routed.
        at_s: (num_requests, len(Moment)) float64, nan where it has not happened.
        path: (num_requests,) int64, see `Path`; -1 before it is routed.
        prefill_node: (num_requests,) int64: where its prompt is computed, the decode node if deflected; -1: nowhere.
        decode_node: (num_requests,) int64, -1: nowhere.
        tokens_left: (num_requests,) float64: prompt tokens still to compute, where the prefill has not ended.
        status: (num_requests,) int64, see `Status`.
        tbt_p99_s: (num_requests,) float64 of those that ended.
    """

    def __init__(self, facts: ClusterFacts, load: Workload, faults: Sequence[Fault] = ()) -> None:
        """Before the first arrival."""
        count = len(load)
        self.facts, self.load, self.faults = facts, load, faults
        self.now_s, self.arrived, self._closed = 0.0, 0, 0
        self.at_s = np.full((count, len(Moment)), np.nan)
        self.path, self.prefill_node, self.decode_node = (np.full(count, -1, np.int64) for _ in range(3))
        self.tokens_left = load.prompt_tokens.astype(np.float64)
        self.status = np.full(count, Status.UNFINISHED, np.int64)
        self.tbt_p99_s = np.full(count, np.nan)

    def follow(self, w: World, arrived: int) -> None:
        """Looks at the run once more.

        Args:
            w: Its arrays, at a decision or at its end.
            arrived: So many requests have arrived by now.
        """
        self.now_s, self.arrived = float(w.f[at.G_NOW]), arrived
        self._follow_live(w)
        self._follow_ended(w)

    def _follow_live(self, w: World) -> None:
        slots = int(w.i[at.H_SLOTS])
        first_i, first_f = int(w.i[at.H_SLOT0_I]), int(w.i[at.H_SLOT0_F])
        i = w.i[first_i : first_i + slots * at.SLOT_I].reshape(slots, at.SLOT_I)
        f = w.f[first_f : first_f + slots * at.SLOT_F].reshape(slots, at.SLOT_F)
        live = np.flatnonzero((i[:, at.STAGE] != at.FREE) & (i[:, at.STAGE] != at.UNDECIDED))
        number = i[live, at.REQUEST]
        self.at_s[number, : Moment.END] = f[live][:, _LIVE_MOMENTS]
        self._place(number, i[live, at.PATH], i[live, at.PREFILL_NODE], i[live, at.DECODE_NODE])
        self.tokens_left[number] = i[live, at.TARGET] - i[live, at.COMPUTED]

    def _follow_ended(self, w: World) -> None:
        count = int(w.i[at.H_NUM_CLOSED])
        number = w.requests[self._closed : count, at.CLOSED].astype(np.int64)
        self._closed = count
        row = w.requests[number]
        first_chunk_s = self.load.arrival_s[number] + row[:, Column.QUEUE_S]
        prefill_end_s = first_chunk_s + row[:, Column.PREFILL_S]
        known_s = self.at_s[number, Moment.TRANSFER_START]
        start_s = np.where(np.isnan(known_s), prefill_end_s, known_s)
        moments = [first_chunk_s, prefill_end_s, start_s, start_s + row[:, Column.TRANSFER_S]]
        moments += [row[:, Column.FIRST_TOKEN_S], row[:, Column.FINISH_S]]
        self.at_s[number] = np.stack(moments, axis=1)
        path, source, target = row[:, [Column.PATH, Column.PREFILL_NODE, Column.DECODE_NODE]].astype(np.int64).T
        self._place(number, path, source, target)
        self.status[number], self.tbt_p99_s[number] = row[:, Column.STATUS], row[:, Column.TBT_P99_S]

    def _place(self, number: IntArray, path: IntArray, source: IntArray, target: IntArray) -> None:
        self.path[number], self.decode_node[number] = path, target
        self.prefill_node[number] = np.where(path == Path.DISAGGREGATE, source, target)

    @property
    def seen(self) -> BoolArray:
        """(num_requests,) bool: arrived by now."""
        return np.arange(len(self.load)) < self.arrived

    @property
    def ended(self) -> BoolArray:
        """(num_requests,) bool: finished, rejected, failed or aborted.

        Requests after a limit on decisions, which nobody routed, are not among them.
        """
        return self.seen & (self.status != Status.UNFINISHED)

    @property
    def deadline_s(self) -> FloatArray:
        """(num_requests,) float64: when the first token is due."""
        return self.load.arrival_s + self.load.ttft_slo_s

    @property
    def missed_ttft(self) -> BoolArray:
        """(num_requests,) bool: the first token was due by now and has not come in time."""
        in_time = self.at_s[:, Moment.FIRST_TOKEN] - self.load.arrival_s <= self.load.ttft_slo_s
        return self.seen & (self.deadline_s <= self.now_s) & ~in_time

    @property
    def missed_tbt(self) -> BoolArray:
        """(num_requests,) bool: finished, and P99 of the gaps is too long."""
        return self.tbt_p99_s > self.load.tbt_slo_s

    @property
    def lost(self) -> BoolArray:
        """(num_requests,) bool: rejected, failed or aborted."""
        return self.ended & (self.status != Status.FINISHED)

    def decode_batch(self, node: int, start_s: float) -> tuple[FloatArray, FloatArray]:
        """Sequences decoding on a node from a time up to now: (n + 1,) float64 edges in s, (n,) float64 counts."""
        begin_s, end_s = self.at_s[:, Moment.FIRST_TOKEN], self.at_s[:, Moment.END]
        mine = (self.decode_node == node) & (begin_s <= self.now_s) & ~(end_s < start_s)
        begin_s, end_s = np.maximum(begin_s[mine], start_s), end_s[mine]
        end_s = end_s[end_s <= self.now_s]
        change_s = np.concatenate([begin_s, end_s])
        change = np.repeat([1.0, -1.0], [len(begin_s), len(end_s)])
        order = np.argsort(change_s, kind="stable")
        edges_s = np.concatenate([[start_s], change_s[order], [self.now_s]])
        return edges_s, np.concatenate([[0.0], np.cumsum(change[order])])

    def tokens_ahead(self, node: int, times_s: FloatArray) -> FloatArray:
        """Prompt tokens routed to a node and not prefilled yet, (n,) float64, at (n,) times up to now.

        Those of a prompt in work are taken to shrink evenly from its first chunk to its last.
        """
        end_s = self.at_s[:, Moment.PREFILL_END]
        end_s = np.where(np.isnan(end_s), self.at_s[:, Moment.END], end_s)
        mine = np.flatnonzero((self.prefill_node == node) & ~(end_s < times_s[0]))
        arrival_s, tokens = self.load.arrival_s[mine], self.load.prompt_tokens[mine].astype(np.float64)
        begin_s, end_s = self.at_s[mine, Moment.FIRST_CHUNK], end_s[mine]
        last_s = np.where(np.isnan(end_s), self.now_s, end_s)
        left = np.where(np.isnan(end_s), self.tokens_left[mine] / tokens, 0.0)
        begin_s = np.where(np.isnan(begin_s), last_s, begin_s)
        passed = (times_s[:, None] - begin_s) / np.maximum(last_s - begin_s, 1e-9)
        share = 1.0 - np.clip(passed, 0.0, 1.0) * (1.0 - left)
        there = (times_s[:, None] >= arrival_s) & (np.isnan(end_s) | (times_s[:, None] < last_s))
        ahead: FloatArray = (np.where(there, share, 0.0) * tokens).sum(axis=1)
        return ahead

    def down(self) -> list[tuple[int, float, float]]:
        """(node, from, to) of each stretch in which a node was dead, in s; the last one may last until now."""
        stretches, since_s = [], dict[int, float]()
        for fault in sorted(self.faults, key=lambda each: each.at_s):
            if fault.at_s > self.now_s:
                break
            if fault.kind == "die":
                since_s.setdefault(fault.node, fault.at_s)
            elif fault.kind == "return" and fault.node in since_s:
                stretches.append((fault.node, since_s.pop(fault.node), fault.at_s))
        return stretches + [(node, start_s, self.now_s) for node, start_s in since_s.items()]
