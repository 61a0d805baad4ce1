"""The live world for an environment: a workload on a running cluster in real time, each request routed by the agent.

An episode is a router of its own (the same code as `deflector serve`) and an open loop of clients, in a thread; the
agent decides from its own. Whoever calls `next_arrival` gets the next request that stands at the router; it waits there
for `apply`, but not for ever.
"""

import asyncio
import queue
import secrets
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path as FilePath

import numpy as np
import uvloop

from deflector.envs.cluster import ClusterFacts
from deflector.envs.outcome import NUM_COLUMNS, Column, Outcomes, Status
from deflector.envs.state import ClusterState, Decision, Request
from deflector.envs.workload import Workload
from deflector.live.replay.client import find_target, new_session
from deflector.live.replay.cluster_file import find_cluster
from deflector.live.replay.open_loop import OpenLoop
from deflector.live.router.clock import now_s
from deflector.live.router.config import RouterConfig, facts_of
from deflector.live.router.fleet import Fleet
from deflector.live.router.policy_slot import Answer, PolicySlot, can_be_done
from deflector.live.router.serve import Router

LOOK_EVERY_S = 0.2
CLOSE_S = 30.0
AGENT, LATE, IMPOSSIBLE = "agent", "agent_late", "agent_impossible"


class ClusterFailed(RuntimeError):  # noqa: N818  (it reads as what happened)
    """The cluster can go on no more; the episode is over."""


@dataclass(slots=True)
class _Question:
    state: ClusterState
    request: Request
    answer: asyncio.Future[Decision]


class AgentSlot(PolicySlot):
    """Asks an agent in another thread, one request after the other; a policy stands in where it does not answer.

    Attributes:
        questions: What the agent shall answer; None means that there is nothing more.
        late: Requests that the policy has routed since the agent took too long.
    """

    def __init__(self, fleet: Fleet, fallback: str, seed: int, name: str, answer_s: float) -> None:
        """Asks about requests of this name, and waits so long for each answer."""
        super().__init__(fleet, fallback, seed)
        self._nodes, self._name, self._answer_s = fleet, name, answer_s
        self._one_at_a_time = asyncio.Lock()
        self.questions: queue.Queue[_Question | None] = queue.Queue()
        self.late = 0

    def wait_no_more(self) -> None:
        """From now on, the policy routes everything."""
        self._answer_s = 0.0

    async def decide(self, request: Request, excluded: Collection[int], request_id: str) -> Answer:
        """The agent's decision; the policy's for a retry."""
        name, _, number = request_id.rpartition("-")
        if name != self._name or excluded:
            return self.decide_now(request, excluded)
        async with self._one_at_a_time:
            began_s = time.perf_counter()
            state = self._nodes.state(now_s())
            question = _Question(state, replace(request, id=int(number)), asyncio.get_running_loop().create_future())
            self.questions.put(question)
            try:
                decision = await asyncio.wait_for(question.answer, self._answer_s)
                reason = AGENT if can_be_done(decision, state) else IMPOSSIBLE
            except TimeoutError:
                self.late += 1
                reason = LATE
            if reason != AGENT:
                return replace(self.decide_now(replace(request, arrival_s=now_s()), excluded), reason=reason)
            return Answer(decision, reason, AGENT, time.perf_counter() - began_s)


class LiveBackend:
    """The `Backend` protocol over a cluster that runs.

    Attributes:
        facts: The cluster as arrays.
        workload: What is played, from its start at each reset.
    """

    def __init__(
        self,
        cluster: str | FilePath | RouterConfig,
        workload: Workload,
        *,
        fallback: str = "kairos",
        answer_s: float = 1.0,
        request_s: float = 600.0,
        dead_s: float = 20.0,
    ) -> None:
        """Starts nothing yet.

        Args:
            cluster: A cluster that `deflector cluster up` has started, by its name; a file as `deflector serve` takes
                for --config; or what such a file says.
            workload: Requests with SLOs, sorted by arrival.
            fallback: Policy that routes what the agent does not answer in time, and what a dead node has failed.
            answer_s: How long a request waits for the agent.
            request_s: A request that has not ended after so long has failed.
            dead_s: An episode ends with an error when no decode node has taken requests for so long.

        Raises:
            InputError: If there is no such cluster, or its file is broken.
        """
        config = cluster if isinstance(cluster, RouterConfig) else find_cluster(str(cluster))[1]
        self._config = config.model_copy(update={"host": "127.0.0.1", "port": 0, "admin_port": None, "api_keys": ()})
        self.facts: ClusterFacts = facts_of(config, config.nodes)
        self.workload = workload
        self._fallback, self._answer_s, self._request_s, self._dead_s = fallback, answer_s, request_s, dead_s
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[None] | None = None
        self._slot: AgentSlot | None = None
        self._clients: OpenLoop | None = None
        self._failure: BaseException | None = None
        self._question: _Question | None = None

    def reset(self, seed: int) -> None:
        """Ends the episode that runs, if one does, and begins the workload anew.

        Args:
            seed: Of the fallback policy; prompts are new each time, since engines remember them.

        Raises:
            InputError: If the router cannot begin.
            ClusterFailed: If the cluster does not answer.
        """
        self.close()
        self._failure, self._question, self._clients, self._slot = None, None, None, None
        self._thread = threading.Thread(target=self._run, args=(seed,), name="live-episode", daemon=True)
        has_begun = threading.Event()
        self._has_begun = has_begun
        self._thread.start()
        has_begun.wait()
        self._raise_failure()

    def next_arrival(self) -> tuple[ClusterState, Request] | None:
        """Waits for the next request at the router; None once there are no more.

        Raises:
            ClusterFailed: If the cluster can go on no more.
        """
        slot, clients = self._slot, self._clients
        if slot is None or clients is None:
            raise RuntimeError("no episode: call reset() first")
        while True:
            question = slot.questions.get()
            if question is None:
                slot.questions.put(None)
                self._raise_failure()
                return None
            if not question.answer.done():
                break
        self._question = question
        arrival_s = float(self.workload.arrival_s[question.request.id])
        state = replace(question.state, now_s=question.state.now_s - clients.began_s)
        return state, replace(question.request, arrival_s=arrival_s)

    def apply(self, decision: Decision) -> None:
        """Routes the request that `next_arrival` has just returned; too late, and the fallback has done so.

        Raises:
            RuntimeError: If no request waits to be routed.
        """
        question, self._question = self._question, None
        if question is None or self._loop is None:
            raise RuntimeError("no request waits to be routed: call next_arrival() first")

        def answer() -> None:
            if not question.answer.done():
                question.answer.set_result(decision)

        try:
            self._loop.call_soon_threadsafe(answer)
        except RuntimeError:
            self._raise_failure()  # The loop is closed: the next request will not come either.

    def drain(self) -> Outcomes:
        """Waits for the end; requests that still arrive are routed by the fallback.

        Raises:
            ClusterFailed: If the cluster can go on no more.
        """
        if self._slot is not None:
            self._slot.wait_no_more()
        if self._thread is not None:
            self._thread.join()
        self._raise_failure()
        return self.outcomes

    @property
    def outcomes(self) -> Outcomes:
        """What is known of every request by now, as its client saw it."""
        if self._clients is not None:
            return self._clients.outcomes()
        load = self.workload
        table = np.full((len(load), NUM_COLUMNS), np.nan)
        table[:, Column.STATUS] = Status.UNFINISHED
        return Outcomes(load.arrival_s, load.ttft_slo_s, load.tbt_slo_s, table)

    @property
    def late(self) -> int:
        """Requests of this episode that the fallback has routed since the agent took too long."""
        return 0 if self._slot is None else self._slot.late

    def close(self) -> None:
        """Ends the episode that runs; nothing of it is left."""
        thread, self._thread = self._thread, None
        if thread is None or not thread.is_alive():
            return
        loop, main = self._loop, self._main
        if loop is not None and main is not None:
            loop.call_soon_threadsafe(main.cancel)
        thread.join(CLOSE_S)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self, seed: int) -> None:
        """The episode's thread."""
        try:
            uvloop.run(self._episode(seed))
        except BaseException as error:
            self._failure = _cause(error)
        finally:
            self._has_begun.set()
            if self._slot is not None:
                self._slot.questions.put(None)

    async def _episode(self, seed: int) -> None:
        self._loop, self._main = asyncio.get_running_loop(), asyncio.current_task()
        name = f"episode-{secrets.token_hex(4)}"
        fleet = Fleet(self._config, now_s())
        slot = self._slot = AgentSlot(fleet, self._fallback, seed, name, self._answer_s)
        said: list[str] = []
        router = Router(self._config, fleet, slot, said.append)
        try:
            await router.open()
            await router.begin()
            if not any(node.model for node in fleet.decode_nodes):
                raise ClusterFailed(f"no decode node answers: {' '.join(said[1:])}")
            async with new_session(self._request_s) as session:
                target = await find_target(session, f"http://127.0.0.1:{router.port}", None)
                self._clients = OpenLoop(target, self.workload, seed=time.time_ns(), name=name)
                self._has_begun.set()
                async with asyncio.TaskGroup() as group:
                    watching = group.create_task(self._watch(fleet))
                    await self._clients.run()
                    watching.cancel()
        finally:
            await router.close()

    async def _watch(self, fleet: Fleet) -> None:
        """Fails once no decode node has taken requests for too long."""
        last_s = now_s()
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if any(node.takes_requests(now_s()) for node in fleet.decode_nodes):
                last_s = now_s()
            elif now_s() - last_s > self._dead_s:
                raise ClusterFailed(f"no decode node has taken requests for {self._dead_s:g} s; see its log")


def _cause(error: BaseException) -> BaseException | None:
    """What ended an episode; None if it was asked to end."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return None if isinstance(error, asyncio.CancelledError) else error
