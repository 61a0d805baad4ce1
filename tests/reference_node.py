"""Requests and engines of the reference simulator: what each is at a time, and what a step of an engine would hold."""

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

from reference_blocks import Block, BlockPool

from deflector.envs.cluster import ClusterFacts, NodeField
from deflector.envs.outcome import Column, Status
from deflector.envs.state import CHUNK_CANDIDATES, ChunkRule, Decision, Path, Reason, Request, StateRow

NEVER = math.inf
NO_DECISION = Decision(Path.REJECT, -1, -1, Reason.POLICY_FIXED)
NOTHING_YET = {Column.STATUS: Status.UNFINISHED, Column.PATH: -1, Column.REASON: -1, Column.PREFILL_NODE: -1}
NOTHING_YET |= {Column.DECODE_NODE: -1, Column.TOKENS: 0, Column.PREEMPTIONS: 0}


@dataclass(eq=False)
class Track:
    """One request, from its arrival to its end."""

    request: Request
    output_tokens: int
    abort_s: float = NEVER
    prefix_ids: tuple[int, ...] = ()
    decision: Decision = NO_DECISION
    result: dict[Column, float] = field(default_factory=lambda: dict(NOTHING_YET))
    token_times: list[float] = field(default_factory=list)
    incoming: bool = False  # routed by way of a prefill node to a decode node whose batch it has not joined yet
    jobs: list["Job"] = field(default_factory=list)  # what it is on each node now; empty before routing and at the end

    @property
    def ended(self) -> bool:
        """Whether its status will not change; an aborted request may stay on its nodes for a while yet."""
        return self.result[Column.STATUS] != Status.UNFINISHED

    @property
    def aborted(self) -> bool:
        return self.result[Column.STATUS] == Status.ABORTED

    def contents(self, block: int) -> Hashable:
        """What its block of this number holds when it is full: something shared, or something of its own."""
        return ("shared", self.prefix_ids[block]) if block < len(self.prefix_ids) else (self.request.id, block)


@dataclass(eq=False)
class Job:
    """A request on one node."""

    track: Track
    node: "Node"
    target: int
    prefill_only: bool = False
    pulls_from: "Job | None" = None  # the job on the prefill node whose KV is still to be pulled
    computed: int = 0
    kv: list[Block] = field(default_factory=list)
    findable: int = 0  # blocks of `kv`, from the first on, that can be found by what they hold
    steps_with_chunk: int = 0  # since it started or was last preempted
    transfer_number: int = -1  # by order of start
    transfer_start_s: float = NEVER  # this and the rest: of the pull
    next_event_s: float = NEVER  # end of the set-up, then of the wire phase
    remaining_bytes: float = 0.0
    updated_s: float = 0.0
    rate: float = 0.0

    @property
    def prefills(self) -> bool:
        return self.computed < self.target

    @property
    def source(self) -> "Node":
        assert self.pulls_from is not None
        return self.pulls_from.node

    def take_up_to(self, blocks: int) -> None:
        """Takes new blocks until it has so many."""
        self.kv += self.node.pool.take(blocks - len(self.kv))

    def take_found(self, found: list[Block]) -> None:
        """Begins with blocks that hold its first tokens already."""
        self.node.pool.share(found)
        self.kv, self.findable = list(found), len(found)

    def fill_up_to(self, tokens: int) -> None:
        """Lets all blocks that so many tokens fill be found, where a node looks for any."""
        full = tokens // self.node.block_size if self.node.prefix_caching else 0
        for block in range(self.findable, full):
            self.node.pool.fill(self.kv[block], self.track.contents(block))
        self.findable = max(self.findable, full)

    def give_back(self) -> None:
        self.node.pool.give_back(self.kv)
        self.kv, self.findable = [], 0


class Node:
    """One engine."""

    def __init__(self, i: int, facts: ClusterFacts) -> None:
        self.id = i
        self.fact: list[float] = facts.nodes[i].tolist()
        self.profile = facts.profiles[int(self.fact[NodeField.PROFILE])]
        self.block_size = int(self.fact[NodeField.BLOCK_SIZE])
        self.kv_blocks = int(self.fact[NodeField.KV_BLOCKS])
        self.pool = BlockPool(self.kv_blocks)
        self.prefix_caching = bool(self.fact[NodeField.PREFIX_CACHING])
        self.slowness = self.fact[NodeField.SLOWNESS]
        self.waiting: list[Job] = []
        self.ready: list[Job] = []
        self.running: list[Job] = []
        self.step: dict[Job, int] = {}  # tokens of each job in the step in progress
        self.step_end_s, self.steps_started = NEVER, 0
        self.healthy, self.silent = True, False
        self.reports_due = 0
        self.take_report(0.0)

    @property
    def free(self) -> int:
        return len(self.pool.free_queue)

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def find(self, job: Job) -> list[Block]:
        """Blocks that hold the first tokens of a waiting job."""
        longest = (job.target - 1) // self.block_size if self.prefix_caching else 0
        return self.pool.find(job.track.contents(block) for block in range(longest))

    def take_report(self, now_s: float) -> None:
        decodes = [job for job in self.running if not job.prefills]
        prefills = [job for job in self.running if job.prefills] + [job for job in self.waiting if not job.pulls_from]
        self.report: dict[StateRow, float] = {
            StateRow.PREFILL_TOKENS_AHEAD: sum(job.target - job.computed for job in prefills),
            StateRow.RUNNING_DECODES: len(decodes),
            StateRow.DECODE_KV_TOKENS: sum(job.computed for job in decodes),
            StateRow.KV_TOKENS_USED: (self.kv_blocks - self.free) * self.block_size,
            StateRow.STRICTEST_TBT_SLO_S: min((job.track.request.tbt_slo_s for job in decodes), default=NEVER),
        }
        self.report_s, self.tokens_sent_since_report = now_s, 0

    def step_time_s(self, work: dict[Job, int], decodes: list[Job]) -> float:
        """Time of a step with the chunks among `work` and with `decodes`, before any slowness."""
        chunks = [(job, tokens) for job, tokens in work.items() if job.prefills]
        chunk_tokens = sum(tokens for _, tokens in chunks)
        q = sum(tokens * (job.computed + tokens / 2) for job, tokens in chunks)
        return float(self.profile.step_time_s(chunk_tokens, q, len(decodes), sum(job.computed for job in decodes)))

    def wanted(self, job: Job, work: dict[Job, int], budget: int) -> int:
        """Tokens that a job wants in a step beside what the step holds already."""
        if not job.prefills:
            return 1
        left, cap, decision = job.target - job.computed, budget, job.track.decision
        rule = decision.chunk_rule if decision.path == Path.DEFLECT else ChunkRule.NONE
        if rule == ChunkRule.CAP:
            cap = decision.chunk_runs[0][0]
        elif rule == ChunkRule.SCHEDULE:
            caps = [tokens for tokens, steps in decision.chunk_runs for _ in range(steps)]
            cap = caps[min(job.steps_with_chunk, len(caps) - 1)]
        elif rule == ChunkRule.LARGEST_SAFE:
            decodes = [other for other in self.running if not other.prefills]
            times = {size: self.step_time_s({**work, job: min(size, left)}, decodes) for size in CHUNK_CANDIDATES}
            cap = next((size for size in times if times[size] <= decision.tbt_budget_s), CHUNK_CANDIDATES[-1])
        return min(left, cap, budget)
