"""Several vLLM engines under one simulated clock, coupled by simulated links: docs/simulator.md's order of events."""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
from vllm_engine import NewRequest, VllmEngine
from workloads import Case

from deflector.envs.cluster import ClusterFacts, NodeField
from deflector.envs.outcome import Status
from deflector.envs.simulator.step_trace import Step
from deflector.envs.state import Path
from deflector.live.vllm_plugin.chunk_rules import plan_to_xargs

OWN, SHARED = 10_000_000, 1_000_000_000
NOTHING_BYTES = 1e-3
"""Equal transfers that share a link end together: what rounding leaves of the second is nothing."""


class Stage(Enum):
    """Where a request is."""

    TO_COME = 0
    PREFILLING = 1
    """On a prefill engine."""
    HANDED_OVER = 2
    """In the decode engine's queue, not pulled yet."""
    PULLING = 3
    DECODING = 4
    """On the engine that decodes it, whatever it does there."""
    OVER = 5


@dataclass
class Flight:
    """One request on its way through the cluster."""

    stage: Stage = Stage.TO_COME
    status: Status = Status.UNFINISHED
    token_s: list[float] = field(default_factory=list)
    finish_s: float = math.nan
    preemptions: int = 0


@dataclass
class Transfer:
    """KV on its way: first the set-up, then the wire."""

    request: int
    source: int
    target: int
    bytes_left: float
    due_s: float
    on_wire: bool = False
    rate: float = 0.0
    seen_s: float = 0.0


class Links:
    """Transfers in order of their start, and the bandwidth that they share."""

    def __init__(self, facts: ClusterFacts) -> None:
        self.facts, self.transfers, self.started = facts.nodes, list[Transfer](), 0

    def start(self, request: int, source: int, target: int, tokens: int, now_s: float) -> None:
        self.started += 1
        size = tokens * self.facts[source, NodeField.KV_BYTES_PER_TOKEN]
        due_s = now_s + self.facts[source, NodeField.LINK_SETUP_S]
        self.transfers.append(Transfer(request, source, target, float(size), float(due_s)))

    @property
    def next_s(self) -> float:
        return min((transfer.due_s for transfer in self.transfers), default=math.inf)

    def advance(self, now_s: float) -> Transfer | None:
        """Plays the first event that is due: a transfer that arrives is returned."""
        transfer = next(each for each in self.transfers if each.due_s == now_s)
        arrives = transfer.on_wire
        if arrives:
            self.transfers.remove(transfer)
        else:
            transfer.on_wire, transfer.seen_s = True, now_s
        self._share(transfer.source, transfer.target, now_s)
        return transfer if arrives else None

    def _share(self, source: int, target: int, now_s: float) -> None:
        """Renews the rates of those that share an end with a transfer that has just come or gone."""
        on_wire = [each for each in self.transfers if each.on_wire]
        for each in on_wire:
            if each.source != source and each.target != target:
                continue
            each.bytes_left -= each.rate * (now_s - each.seen_s)
            if each.bytes_left < NOTHING_BYTES:
                each.bytes_left = 0.0
            outgoing = sum(other.source == each.source for other in on_wire)
            incoming = sum(other.target == each.target for other in on_wire)
            egress = self.facts[each.source, NodeField.EGRESS_BYTES_PER_S] / outgoing
            ingress = self.facts[each.target, NodeField.INGRESS_BYTES_PER_S] / incoming
            each.rate, each.seen_s = float(min(egress, ingress)), now_s
            each.due_s = now_s + each.bytes_left / each.rate


class VllmCluster:
    """Plays a case to its end; `steps` and `flights` say what happened."""

    def __init__(self, case: Case, *, asynchronous: bool = False) -> None:
        facts = case.spec.facts()
        profiles = [facts.profiles[int(row[NodeField.PROFILE])] for row in facts.nodes]
        self.case, self.load, self.links = case, case.workload, Links(facts)
        self.engines = [
            VllmEngine(node, row, profile, asynchronous=asynchronous)
            for node, (row, profile) in enumerate(zip(facts.nodes, profiles, strict=True))
        ]
        self.flights = [Flight() for _ in range(len(self.load))]
        leaving = ((float(at_s), k) for k, at_s in enumerate(self.load.abort_s) if math.isfinite(at_s))
        self.aborts = sorted(leaving)
        self.arrived = 0
        self.ends = [math.inf] * len(self.engines)
        self.steps: list[Step] = []

    def play(self) -> None:
        while (now_s := self._next_s()) < math.inf:
            while self._next_s() == now_s:
                self._play_event(now_s)
            for engine in self.engines:
                if engine.step is None:
                    self._begin_step(engine, now_s)

    def _next_s(self) -> float:
        abort_s = self.aborts[0][0] if self.aborts else math.inf
        arrival_s = float(self.load.arrival_s[self.arrived]) if self.arrived < len(self.load) else math.inf
        return min(abort_s, min(self.ends), self.links.next_s, arrival_s)

    def _play_event(self, now_s: float) -> None:
        if self.aborts and self.aborts[0][0] == now_s:
            self._abort(self.aborts.pop(0)[1], now_s)
        elif min(self.ends) == now_s:
            self._end_step(self.engines[self.ends.index(now_s)], now_s)
        elif self.links.next_s == now_s:
            transfer = self.links.advance(now_s)
            if transfer is not None:
                self._arrive(transfer)
        else:
            self.arrived += 1
            self._route(self.arrived - 1)

    def _route(self, number: int) -> None:
        decision, flight = self.case.decisions[number], self.flights[number]
        output = int(self.load.output_tokens[number])
        if not self._fits(number):
            flight.stage, flight.status = Stage.OVER, Status.REJECTED
            return
        xargs: dict[str, Any] = plan_to_xargs(decision)
        node = decision.decode_node
        flight.stage = Stage.DECODING
        if decision.path == Path.DISAGGREGATE:
            xargs["kv_transfer_params"] = {"do_remote_decode": True, "do_remote_prefill": False}
            node, output, flight.stage = decision.prefill_node, 1, Stage.PREFILLING
        self.engines[node].add(NewRequest(str(number), self._prompt(number), output, xargs))

    def _fits(self, number: int) -> bool:
        decision = self.case.decisions[number]
        prompt, output = int(self.load.prompt_tokens[number]), int(self.load.output_tokens[number])
        target = self.engines[decision.decode_node]
        if -(-(prompt + output) // target.block_size) > target.blocks:
            return False
        source = self.engines[decision.prefill_node] if decision.path == Path.DISAGGREGATE else target
        return -(-prompt // source.block_size) <= source.blocks

    def _prompt(self, number: int) -> list[int]:
        """Token ids: equal up to the end of each block that the workload names by equal ids, else the request's own."""
        length = int(self.load.prompt_tokens[number])
        tokens = np.full(length, OWN + number)
        if len(self.load.prefix_start):
            first, last = self.load.prefix_start[number : number + 2]
            shared = np.repeat(SHARED + self.load.prefix_ids[first:last], self.case.block_size)
            tokens[: len(shared)] = shared
        return tokens.tolist()

    def _begin_step(self, engine: VllmEngine, now_s: float) -> None:
        end_s = engine.begin_step(now_s)
        for name, tokens in engine.take_pulls():
            number = int(name)
            self.flights[number].stage = Stage.PULLING
            self.links.start(number, self.case.decisions[number].prefill_node, engine.node, tokens, now_s)
        if end_s is not None:
            self.ends[engine.node] = end_s

    def _end_step(self, engine: VllmEngine, now_s: float) -> None:
        self.ends[engine.node] = math.inf
        step, ended = engine.end_step()
        self.steps.append(step)
        for number in step.preempted:
            self.flights[number].preemptions += 1
        for name in ended.tokens:
            flight = self.flights[int(name)]
            if flight.stage == Stage.DECODING:
                flight.token_s.append(now_s)
        for name in ended.finished:
            self._finish(int(name), now_s)

    def _finish(self, number: int, now_s: float) -> None:
        flight = self.flights[number]
        if flight.stage == Stage.PREFILLING:
            flight.stage = Stage.HANDED_OVER
            xargs = {"kv_transfer_params": {"do_remote_decode": False, "do_remote_prefill": True}}
            output = int(self.load.output_tokens[number])
            target = self.engines[self.case.decisions[number].decode_node]
            target.add(NewRequest(str(number), self._prompt(number), output, xargs))
        else:
            flight.stage, flight.status, flight.finish_s = Stage.OVER, Status.FINISHED, now_s

    def _arrive(self, transfer: Transfer) -> None:
        name = str(transfer.request)
        self.engines[transfer.source].kv_sent(name)
        self.engines[transfer.target].kv_received(name)
        flight = self.flights[transfer.request]
        if flight.stage == Stage.PULLING:
            flight.stage = Stage.DECODING

    def _abort(self, number: int, now_s: float) -> None:
        flight, decision, name = self.flights[number], self.case.decisions[number], str(number)
        if flight.stage in (Stage.TO_COME, Stage.OVER):
            return
        if flight.stage == Stage.PREFILLING:
            self.engines[decision.prefill_node].abort(name)
        else:
            self.engines[decision.decode_node].abort(name)
        if flight.stage == Stage.HANDED_OVER:
            self.engines[decision.prefill_node].kv_sent(name)
        flight.stage, flight.status, flight.finish_s = Stage.OVER, Status.ABORTED, now_s
