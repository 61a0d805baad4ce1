"""A second, slow reading of docs/simulator.md, every engine step one by one; tests compare the kernel with it."""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from reference_blocks import BlockPool
from reference_node import NEVER, Job, Node, Track

from deflector.envs.cluster import ClusterSpec, Fault, NodeField
from deflector.envs.outcome import Column, Outcomes, Status
from deflector.envs.state import ClusterState, Decision, Path, Request, StateRow
from deflector.envs.workload import Workload

WORD = 1 << 64


def hash_uniform(seed: int, a: int, b: int, stream: int) -> float:
    """A number in (0, 1) that depends on nothing but its arguments (splitmix64)."""
    x = seed * 0x9E3779B97F4A7C15 + a * 0xBF58476D1CE4E5B9 + b * 0x94D049BB133111EB + stream * 0xD6E8FEB86659FD93
    x = (x % WORD ^ (x % WORD >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    x ^= x >> 31
    return ((x >> 11) + 0.5) / 2.0**53


class ReferenceSimulator:
    """Plays a cluster; stops at each decision."""

    def __init__(self, spec: ClusterSpec, workload: Workload, *, seed: int = 0) -> None:
        self._spec, self._workload, self._seed, self._now = spec, workload, seed, 0.0
        self._facts = spec.facts()
        self._nodes = [Node(i, self._facts) for i in range(self._facts.num_nodes)]
        self._pulls: list[Job] = []  # transfers, in order of start
        self._transfers_started = 0
        self._wire: list[Job] = []  # those of them in their wire phase
        self._faults = sorted(spec.faults, key=lambda fault: fault.at_s)
        names = ("arrival_s", "prompt_tokens", "max_output_tokens", "ttft_slo_s", "tbt_slo_s", "slo_class")
        requests = [Request(i, *(getattr(workload, name)[i].item() for name in names)) for i in range(len(workload))]
        self._tracks = [Track(request, int(workload.output_tokens[request.id])) for request in requests]
        for track, abort_s in zip(self._tracks, workload.abort_s.tolist(), strict=False):
            track.abort_s = abort_s
        for track, start, end in zip(self._tracks, workload.prefix_start, workload.prefix_start[1:], strict=False):
            track.prefix_ids = tuple(workload.prefix_ids[start:end].tolist())
        self._arrivals, self._play = list(self._tracks), self._decisions()
        self._deciding: Track | None = None

    def next_decision(self) -> tuple[ClusterState, Request] | None:
        """Plays on to the next request to route; None when everything is over."""
        assert self._deciding is None, "apply() a decision first"
        return next(self._play, None)

    def apply(self, decision: Decision) -> None:
        """Routes the request that `next_decision` returned."""
        track, self._deciding = self._deciding, None
        assert track is not None, "no request waits for a decision"
        prompt, disaggregated = track.request.prompt_tokens, decision.path == Path.DISAGGREGATE
        track.decision = decision
        track.result |= {Column.PATH: decision.path, Column.REASON: decision.reason, Column.TRANSFER_S: math.nan}
        track.result |= {Column.PREFILL_NODE: decision.prefill_node, Column.DECODE_NODE: decision.decode_node}
        possible = decision.path != Path.REJECT
        possible &= self._can(decision.decode_node, self._facts.can_decode, prompt + track.output_tokens)
        if disaggregated:
            possible &= self._can(decision.prefill_node, self._facts.can_prefill, prompt)
            possible &= decision.prefill_node != decision.decode_node
        if not possible:
            return self._end(track, Status.REJECTED)
        if not disaggregated:
            track.result[Column.TRANSFER_S] = 0.0
        node = self._nodes[decision.prefill_node if disaggregated else decision.decode_node]
        track.jobs, track.incoming = [Job(track, node, target=prompt, prefill_only=disaggregated)], disaggregated
        node.waiting += track.jobs
        node.tokens_sent_since_report += prompt

    @property
    def outcomes(self) -> Outcomes:
        """What happened; complete once `next_decision` returned None."""
        table = [[track.result.get(column, math.nan) for column in Column] for track in self._tracks]
        work, shape = self._workload, (len(self._tracks), len(Column))
        return Outcomes(work.arrival_s, work.ttft_slo_s, work.tbt_slo_s, np.array(table, dtype=float).reshape(shape))

    def _can(self, i: int, allowed: npt.NDArray[np.bool_], tokens: int) -> bool:
        """Whether a node is there, up, of the right role and large enough."""
        if not 0 <= i < len(self._nodes):
            return False
        node = self._nodes[i]
        return node.healthy and bool(allowed[i]) and node.blocks(tokens) <= node.kv_blocks

    def _decisions(self) -> Iterator[tuple[ClusterState, Request]]:
        """Plays the whole run: all events of one time in their order, then the nodes schedule."""
        while (now := self._next_event_s()) < NEVER:
            self._take_reports(now)
            self._now = now
            to_reroute: list[Track] = []
            while self._faults and self._faults[0].at_s <= now:
                to_reroute += self._strike(self._faults.pop(0))
            for track in self._tracks:
                if track.abort_s <= now and not track.ended:
                    self._abort(track)
            for node in self._nodes:
                if node.step_end_s <= now:
                    self._end_step(node)
            while due := [pull for pull in self._pulls if pull.next_event_s <= now]:
                self._advance(due[0])
            for track in sorted(to_reroute, key=lambda track: track.request.id):
                if not track.ended:
                    yield self._ask(track)
            while self._arrivals and self._arrivals[0].request.arrival_s <= now:
                yield self._ask(self._arrivals.pop(0))
            for node in self._nodes:
                if node.healthy and node.step_end_s == NEVER:
                    self._schedule(node)

    def _next_event_s(self) -> float:
        scheduled = [fault.at_s for fault in self._faults] + [track.request.arrival_s for track in self._arrivals]
        scheduled += [track.abort_s for track in self._tracks if not track.ended]
        return min(scheduled + [node.step_end_s for node in self._nodes] + [pull.next_event_s for pull in self._pulls])

    def _take_reports(self, until_s: float) -> None:
        """Takes the reports due up to a time, before anything happens at that time."""
        interval_s = self._spec.report_interval_s
        for node in self._nodes if interval_s > 0 else []:
            while (time_s := (node.reports_due + node.id / len(self._nodes)) * interval_s) <= until_s:
                lost = hash_uniform(self._seed, node.id, node.reports_due, 1) < self._spec.report_loss
                node.reports_due += 1
                if not node.silent and not lost:
                    node.take_report(time_s)

    def _ask(self, track: Track) -> tuple[ClusterState, Request]:
        self._deciding = track
        rows = np.zeros((len(StateRow), len(self._nodes)))
        for node, column in zip(self._nodes, rows.T, strict=True):
            if self._spec.report_interval_s == 0:
                node.take_report(self._now)
            here = [other for other in self._tracks if other.jobs and other.decision.decode_node == node.id]
            incoming = [other.request.prompt_tokens for other in here if other.incoming]
            deflected = [other for other in here if other.decision.path == Path.DEFLECT and not other.token_times]
            seen = node.report | {StateRow.HEALTHY: node.healthy, StateRow.DEFLECTED_IN_FLIGHT: len(deflected)}
            seen[StateRow.AGE_S] = self._now - node.report_s
            seen |= {StateRow.INCOMING_TRANSFERS: len(incoming), StateRow.INCOMING_TOKENS: sum(incoming)}
            seen[StateRow.PREFILL_TOKENS_AHEAD] += node.tokens_sent_since_report
            column[:] = [seen[row] for row in StateRow]
        return ClusterState(self._now, rows, self._facts), track.request

    def _schedule(self, node: Node) -> None:
        work, preempted = self._continue_running(node)
        if not (preempted and work):  # With all of running preempted and no step, the node schedules again at once.
            self._admit(node, work)
        if not work:
            return
        u1, u2 = (hash_uniform(self._seed, node.id, node.steps_started, stream) for stream in (2, 3))
        z = math.sqrt(-2 * math.log(u1)) * math.cos(2 * math.pi * u2)
        sigma, drift = node.fact[NodeField.NOISE_SIGMA], node.fact[NodeField.DRIFT_PER_S]
        factor = node.slowness * (1 + drift * self._now) * math.exp(sigma * z - sigma**2 / 2)
        time_s = factor * node.step_time_s(work, [job for job in work if not job.prefills])
        node.step, node.step_end_s = work, self._now + time_s
        node.steps_started += 1
        for job in work:
            if job.prefills:
                job.steps_with_chunk += 1
                job.track.result.setdefault(Column.QUEUE_S, self._now - job.track.request.arrival_s)

    def _continue_running(self, node: Node) -> tuple[dict[Job, int], bool]:
        """Gives each running request its tokens and blocks; returns them and whether any request was preempted."""
        work: dict[Job, int] = {}
        budget, preempted = int(node.fact[NodeField.MAX_BATCHED_TOKENS]), False
        for job in list(node.running):
            if budget == 0 or job not in node.running:
                break
            tokens = node.wanted(job, work, budget)
            blocks = node.blocks(job.computed + tokens)
            while node.free < blocks - len(job.kv) and job in node.running:
                last, preempted = node.running.pop(), True
                last.give_back()
                last.computed = last.steps_with_chunk = 0
                last.target = last.track.request.prompt_tokens + len(last.track.token_times)
                last.track.result[Column.PREEMPTIONS] += 1
                node.waiting.insert(0, last)
            if job not in node.running:
                break
            job.take_up_to(blocks)
            job.fill_up_to(job.computed + tokens)
            work[job] = tokens
            budget -= tokens
        return work, preempted

    def _admit(self, node: Node, work: dict[Job, int]) -> None:
        budget = int(node.fact[NodeField.MAX_BATCHED_TOKENS]) - sum(work.values())
        while budget > 0 and len(node.running) < node.fact[NodeField.MAX_SEQS] and (node.ready or node.waiting):
            queue = node.ready or node.waiting
            job = queue[0]
            if queue is node.ready:
                job.computed = job.target = job.track.request.prompt_tokens - 1  # It decodes: see the specification.
                job.track.incoming = False
            else:
                found, blocks = node.find(job), node.blocks(job.target)
                prefills = [other for other in node.running if other.prefills] if job.pulls_from else []
                promised = sum(node.blocks(other.target) - len(other.kv) for other in prefills)
                if node.free - promised < blocks - sum(block.users > 0 for block in found):
                    return
                job.take_found(found)
                if job.pulls_from:
                    job.take_up_to(blocks)
                    queue.remove(job)
                    self._start_pull(job, job.target - len(found) * node.block_size)
                    continue
                job.computed = len(found) * node.block_size
            tokens = node.wanted(job, work, budget)
            job.take_up_to(node.blocks(job.computed + tokens))
            job.fill_up_to(job.computed + tokens)
            queue.remove(job)
            node.running.append(job)
            work[job] = tokens
            budget -= tokens

    def _end_step(self, node: Node) -> None:
        work, node.step, node.step_end_s = node.step, {}, NEVER
        for job in [job for job in node.running if job.track.aborted]:
            if job in work and not job.prefills:
                job.track.token_times.append(self._now)  # for the gaps; its outcome is known already
            self._drop(job.track)
        for job, tokens in work.items():
            track, prefilled = job.track, job.prefills
            if track.aborted:
                continue
            job.computed += tokens
            if job.prefills:
                continue
            if prefilled and not track.token_times:
                track.result[Column.PREFILL_S] = self._now - track.request.arrival_s - track.result[Column.QUEUE_S]
            if job.prefill_only:
                node.running.remove(job)
                pulled = Job(track, self._nodes[track.decision.decode_node], job.target, pulls_from=job)
                pulled.node.waiting.append(pulled)
                track.jobs.append(pulled)
                continue
            track.token_times.append(self._now)
            track.result |= {Column.FIRST_TOKEN_S: track.token_times[0], Column.TOKENS: len(track.token_times)}
            if len(track.token_times) == track.output_tokens:
                self._end(track, Status.FINISHED)

    def _start_pull(self, pull: Job, tokens: int) -> None:
        pull.transfer_number, self._transfers_started = self._transfers_started, self._transfers_started + 1
        pull.transfer_start_s = self._now
        pull.next_event_s = self._now + pull.source.fact[NodeField.LINK_SETUP_S]
        pull.remaining_bytes = tokens * pull.source.fact[NodeField.KV_BYTES_PER_TOKEN]
        self._pulls.append(pull)

    def _advance(self, pull: Job) -> None:
        """Ends a transfer's set-up, or the transfer."""
        if pull not in self._wire:
            return self._change_wire([*self._wire, pull], pull)
        if pull.track.aborted:
            return self._drop(pull.track)
        self._remove_pull(pull)
        pull.track.jobs.pop(0).give_back()  # the job on the prefill node
        pull.pulls_from = None
        pull.node.ready.append(pull)
        pull.node.ready.sort(key=lambda job: job.transfer_number)
        pull.track.result[Column.TRANSFER_S] = self._now - pull.transfer_start_s

    def _remove_pull(self, pull: Job) -> None:
        self._pulls.remove(pull)
        if pull in self._wire:
            self._change_wire([other for other in self._wire if other is not pull], pull)

    def _change_wire(self, wire: list[Job], changed: Job) -> None:
        """Books what moved so far; those that share an end with the changed one get new rates and ends."""
        for pull in self._wire:
            pull.remaining_bytes -= pull.rate * (self._now - pull.updated_s)
            pull.updated_s = self._now
        self._wire, changed.updated_s = wire, self._now
        for pull in wire:
            if pull.source is changed.source or pull.node is changed.node:
                egress = pull.source.fact[NodeField.EGRESS_BYTES_PER_S] / sum(p.source is pull.source for p in wire)
                ingress = pull.node.fact[NodeField.INGRESS_BYTES_PER_S] / sum(p.node is pull.node for p in wire)
                pull.rate = min(egress, ingress)
                pull.next_event_s = self._now + pull.remaining_bytes / pull.rate

    def _end(self, track: Track, status: Status) -> None:
        self._drop(track)
        track.result |= {Column.STATUS: status, Column.FINISH_S: self._now}
        if status == Status.FINISHED and track.output_tokens > 1:
            gaps = np.diff(track.token_times)
            p99 = float(np.percentile(gaps, 99))
            track.result |= {Column.TBT_MEAN_S: gaps.mean(), Column.TBT_P99_S: p99, Column.TBT_MAX_S: gaps.max()}

    def _abort(self, track: Track) -> None:
        """Ends a request; it leaves now, or with the step or the transfer that it is in."""
        track.result |= {Column.STATUS: Status.ABORTED, Column.FINISH_S: self._now}
        in_step = any(job in job.node.running and job.node.step_end_s < NEVER for job in track.jobs)
        if not in_step and not any(job in self._pulls for job in track.jobs):
            self._drop(track)

    def _drop(self, track: Track) -> None:
        """Takes a request off every node and link."""
        for job in track.jobs:
            if job in self._pulls:
                self._remove_pull(job)
            for queue in (job.node.waiting, job.node.ready, job.node.running):
                if job in queue:
                    queue.remove(job)
            job.node.step.pop(job, None)
            job.give_back()
        track.jobs, track.incoming = [], False

    def _strike(self, fault: Fault) -> list[Track]:
        """Makes a fault happen; returns the requests to be routed again."""
        node, to_reroute = self._nodes[fault.node], []
        if fault.kind == "slow":
            node.slowness = fault.slowness
        elif fault.kind in ("silence", "speak"):
            node.silent = fault.kind == "silence"
        else:
            node.healthy = fault.kind == "return"
        if fault.kind == "die":
            node.step_end_s = NEVER
            for track in [track for track in self._tracks if track.jobs]:
                if track.decision.decode_node == node.id or any(job.node is node for job in track.jobs):
                    self._drop(track)
                    if track.aborted:
                        continue
                    if self._spec.on_death == "retry" and not track.token_times:
                        track.result |= {Column.PREFILL_NODE: -1, Column.DECODE_NODE: -1}
                        if track.decision.path == Path.DISAGGREGATE:
                            track.result[Column.TRANSFER_S] = math.nan
                        to_reroute.append(track)
                    else:
                        self._end(track, Status.FAILED)
            node.pool = BlockPool(node.kv_blocks)
        return to_reroute
