"""Speed of the environment: `python benchmarks/environment.py [--json FILE]`. Medians over several rounds.

256 copies of deflector/Deflection-v0 on 2P2D, each with requests of its own, the beginning of new episodes included;
actions are those that the paper's rule takes, found outside the time measured. Contestants are measured in turns. The
parts of a step are measured inside the compiled loop, with the processor's counter of ticks; the floor is a step whose
compiled call only looks at every lane. Two threads share the lanes; each of two processes has as many of its own.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import VectorEnv
from numba.core import types
from numba.extending import intrinsic
from rich.console import Console
from rich.table import Table

from deflector.envs.actions import answer_action
from deflector.envs.compiled import entry, inner
from deflector.envs.deflection import DeflectionEnv
from deflector.envs.lanes import STAGE, Stage, lane_at
from deflector.envs.observation import encode
from deflector.envs.rewards import SLO_MAX_OUTPUT, open_account, settle
from deflector.envs.scenarios import Scenarios, read_settings
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.events import advance
from deflector.envs.simulator.layout import IntArray
from deflector.envs.simulator.queues import slot_base
from deflector.envs.simulator.reports import observe
from deflector.envs.simulator.routing import apply_decision
from deflector.envs.stepper import Stepper
from deflector.envs.stepping import Batch, question_at, step_lanes
from deflector.envs.vector import DeflectionVectorEnv
from deflector.policies.rollout import rollout
from deflector.policies.teachers import Teacher

SHORT_DECISIONS, WARMUP = 512, 40
_DECISION, _EMPTY = int(Stage.DECISION), int(Stage.EMPTY)
_GROW_SLOTS, _GROW_LOG = int(Stage.GROW_SLOTS), int(Stage.GROW_LOG)

# ---- a step taken apart ----


class Part(IntEnum):
    """Columns of what `play_timed` adds to; CLOCK is nothing between two looks at the clock, too much in the others."""

    ADVANCE = 0
    OBSERVE = 1
    ENCODE = 2
    SETTLE = 3
    APPLY = 4
    CLOCK = 5


_ADVANCE, _OBSERVE, _ENCODE, _SETTLE, _APPLY, _CLOCK = (int(part) for part in Part)


@intrinsic
def clock_ticks(typing_context):
    """The processor's counter of ticks, which have one length."""

    def generate(context, builder, signature, arguments):
        kind = context.get_value_type(types.int64)
        function = builder.module.declare_intrinsic("llvm.readcyclecounter", fnty=_function_type(kind))
        return builder.call(function, ())

    return types.int64(), generate


def _function_type(kind):
    from llvmlite import ir

    return ir.FunctionType(kind, ())


@inner
def _mark(ticks: IntArray, part: int, since: int) -> int:
    now = clock_ticks()
    ticks[part] += now - since
    return now


@entry
def play_timed(b: Batch, actions: IntArray, start: int, stop: int, ticks: IntArray) -> int:
    """Plays lanes on as `step_lanes` does, and adds to ticks, (len(Part),) int64.

    For possible actions, episodes without burn-in or limit, and arrays that suffice.
    """
    elsewhere = 0
    for lane in range(start, stop):
        if b.lane_i[lane, STAGE] != _DECISION:
            elsewhere += 1
            continue
        x = lane_at(b.table, lane)
        w = x.world
        now = _mark(ticks, _CLOCK, clock_ticks())
        answer_action(question_at(b, x, b.no_parameters), actions[lane])
        apply_decision(w, b.answer)
        now = _mark(ticks, _APPLY, now)
        code = advance(w)
        now = _mark(ticks, _ADVANCE, now)
        if code != at.DECIDE:
            b.lane_i[lane, STAGE] = (
                _GROW_SLOTS if code == at.GROW_SLOTS else _GROW_LOG if code == at.GROW_LOG else _EMPTY
            )
            elsewhere += 1
            continue
        observe(w, x.rows)
        now = _mark(ticks, _OBSERVE, now)
        most = int(x.ledger.slos[w.i[slot_base(w.i, w.i[at.H_CURRENT]) + at.REQUEST], SLO_MAX_OUTPUT])
        encode(question_at(b, x, b.no_parameters), most, b.estimates, b.scratch, b.seen[lane], b.next_masks[lane])
        now = _mark(ticks, _ENCODE, now)
        settle(w, x.ledger, w.f[at.G_NOW])
        open_account(w, x.ledger, w.i[at.H_CURRENT])
        _mark(ticks, _SETTLE, now)
    return elsewhere


@entry
def play_nothing(b: Batch, actions: IntArray, start: int, stop: int) -> int:
    """Looks at every lane and leaves it where it is."""
    elsewhere = 0
    for lane in range(start, stop):
        elsewhere += b.lane_i[lane, STAGE] != _DECISION or actions[lane] < 0
    return elsewhere


@entry
def read_ticks(ticks: IntArray) -> None:
    """Writes the counter."""
    ticks[0] = clock_ticks()


def tick_ns() -> float:
    """Nanoseconds of a tick, against the system's clock."""
    ticks = np.zeros(1, np.int64)
    read_ticks(ticks)
    before, started_ns = int(ticks[0]), time.perf_counter_ns()
    while time.perf_counter_ns() - started_ns < 50_000_000:
        pass
    read_ticks(ticks)
    return (time.perf_counter_ns() - started_ns) / (int(ticks[0]) - before)


class Parts:
    """Lanes with long episodes, and what the parts of their steps take."""

    def __init__(self, count: int, settings: dict[str, Any], steps: int) -> None:
        """Begins episodes long enough for `steps` steps."""
        scenarios = Scenarios(read_settings(settings | {"duration_s": 7200.0, "max_decisions": steps + 100}))
        self.stepper = Stepper(count, DeflectionVectorEnv(1, **settings).schema, play=self._play)
        self.ticks, self.tick_ns = np.zeros(len(Part), np.int64), tick_ns()
        episodes = [scenarios.draw(np.random.default_rng(lane), lane) for lane in range(count)]
        assert min(len(episode.workload) for episode in episodes) > steps
        self.stepper.begin(enumerate(episodes))
        self.teacher = Teacher("kairos", count)

    def _play(self, batch: Batch, actions: IntArray, start: int, stop: int) -> int:
        if (self.stepper.stages != _DECISION).any():  # Begins, or has been given room to grow.
            return step_lanes(batch, actions, start, stop)
        return play_timed(batch, actions, start, stop, self.ticks)

    def measure(self, steps: int) -> dict[str, float]:
        """Nanoseconds per step of each part: the median over steps of all lanes, the looks at the clock taken off."""
        found = []
        for _ in range(steps):
            actions = self.teacher.actions(self.stepper.lanes)
            self.ticks.fill(0)
            self.stepper.step(actions)
            found.append(self.ticks * self.tick_ns / len(actions))
        medians = np.median(found, axis=0)
        return {part.name.lower(): float(medians[part] - medians[Part.CLOCK]) for part in Part if part != Part.CLOCK}


# ---- whole steps ----


class NoopVectorEnv(VectorEnv[Any, Any, Any]):
    """The same shapes, and nothing happens: what Gymnasium itself asks for."""

    def __init__(self, like: DeflectionVectorEnv) -> None:
        """Takes over the shapes."""
        self.num_envs, self.metadata = like.num_envs, like.metadata
        self.single_observation_space, self.single_action_space = (
            like.single_observation_space,
            like.single_action_space,
        )
        self.observation_space, self.action_space = like.observation_space, like.action_space
        self._seen = np.zeros((self.num_envs, like.schema.observation_length), np.float32)
        self._never = np.zeros(self.num_envs, np.bool_)

    def step(self, actions: IntArray) -> tuple[Any, ...]:
        """The same observation again."""
        return self._seen.copy(), np.zeros(self.num_envs), self._never.copy(), self._never.copy(), {}


class Vector:
    """The batched environment under the paper's rule."""

    def __init__(self, count: int, settings: dict[str, Any], decisions: int, threads: int = 1) -> None:
        """Begins episodes of so many decisions."""
        self.env = DeflectionVectorEnv(count, threads=threads, max_decisions=decisions, **settings)
        self._decisions = decisions
        self.teacher = Teacher("kairos", count)
        self.env.reset(seed=0)

    def steps_per_s(self, steps: int | None = None) -> float:
        """One episode in every lane, the beginning of the next one included; or so many steps."""
        steps = steps or self._decisions
        taken_s, env, clock = 0.0, self.env, time.perf_counter
        for _ in range(steps):
            actions = self.teacher.actions(env.lanes)
            start = clock()
            env.step(actions)
            taken_s += clock() - start
        return steps * env.num_envs / taken_s


def calls_ns(call: Callable[[], object], lanes: int, calls: int = 400) -> float:
    """Nanoseconds per lane of a call, the median."""
    times_ns = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        call()
        times_ns.append(time.perf_counter_ns() - start)
    return statistics.median(times_ns) / lanes


class Single:
    """One environment from Python."""

    def __init__(self, settings: dict[str, Any], decisions: int) -> None:
        """Begins an episode of so many decisions."""
        self.env = DeflectionEnv(max_decisions=decisions, **settings)
        self.teacher = Teacher("kairos", 1)
        self.env.reset(seed=0)

    def steps_per_s(self, steps: int) -> float:
        """So many steps, the beginnings of new episodes included."""
        taken_s, env, clock = 0.0, self.env, time.perf_counter
        for _ in range(steps):
            action = int(self.teacher.actions(env._stepper.lanes)[0])
            start = clock()
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()
            taken_s += clock() - start
        return steps / taken_s


def _work(count: int, settings: dict[str, Any], decisions: int, rounds: int, barrier: Any, results: Any) -> None:
    vector = Vector(count, settings, decisions)
    vector.steps_per_s(WARMUP)
    rates = []
    for _ in range(rounds):
        barrier.wait()
        rates.append(vector.steps_per_s())
    results.put(rates)


def processes_steps_per_s(
    count: int, settings: dict[str, Any], decisions: int, rounds: int, processes: int
) -> list[float]:
    """Steps/s of several processes together, each with `count` lanes, round by round."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    workers = [
        context.Process(target=_work, args=(count, settings, decisions, rounds, barrier, results))
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    rates = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    return [sum(together) for together in zip(*rates, strict=True)]


def rollout_ns(settings: dict[str, Any]) -> float:
    """Nanoseconds per decision of the same requests in one compiled loop: simulator and rule without an environment."""
    episode = Scenarios(read_settings(settings | {"duration_s": 2000.0})).draw(np.random.default_rng(0), 0)
    start = time.perf_counter_ns()
    rollout(episode.spec, episode.workload, "kairos", seed=0)
    return (time.perf_counter_ns() - start) / len(episode.workload)


def begin_ns(lanes: int, settings: dict[str, Any], decisions: int) -> float:
    """Nanoseconds per decision that drawing an episode and writing its arrays take."""
    scenarios, rng = Scenarios(read_settings(settings | {"max_decisions": decisions})), np.random.default_rng(0)
    stepper = Stepper(lanes, DeflectionVectorEnv(1, **settings).schema, play=play_nothing)
    for _ in range(2):  # The second time, in memory that is there.
        start = time.perf_counter_ns()
        for lane in range(lanes):
            stepper.lanes.begin(lane, scenarios.draw(rng))
    return (time.perf_counter_ns() - start) / (lanes * decisions)


def measure(lanes: int, decisions: int, rounds: int, settings: dict[str, Any]) -> dict[str, list[float]]:
    """Every figure, round by round; the first round, which may compile, is left out."""
    vector, short = Vector(lanes, settings, decisions), Vector(lanes, settings, SHORT_DECISIONS)
    threads, empty = Vector(lanes, settings, decisions, threads=2), Vector(lanes, settings, decisions)
    single, parts = Single(settings, decisions), Parts(lanes, settings, (rounds + 1) * 100)
    noop, idle = NoopVectorEnv(empty.env), np.zeros(lanes, np.int64)
    floor = Stepper(lanes, empty.env.schema, play=play_nothing)
    empty.env._stepper._play = play_nothing
    found: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        figures = {
            "vector_steps_per_s": vector.steps_per_s(),
            "vector_2_threads_steps_per_s": threads.steps_per_s(),
            f"vector_{SHORT_DECISIONS}_decisions_steps_per_s": short.steps_per_s(),
            "single_steps_per_s": single.steps_per_s(2 * decisions),
            "floor_ns": calls_ns(lambda: empty.env.step(idle), lanes),
            "empty_call_ns": calls_ns(lambda: floor._play_shares(idle), lanes),
            "noop_vector_ns": calls_ns(lambda: noop.step(idle), lanes),
            "kairos_rollout_ns": rollout_ns(settings),
        }
        figures |= {f"{part}_ns": value for part, value in parts.measure(100).items()}
        figures["begin_ns"] = begin_ns(lanes, settings, decisions)
        figures["python_ns"] = figures["floor_ns"] - figures["empty_call_ns"]
        figures["vector_ns"] = 1e9 / figures["vector_steps_per_s"]
        for name, value in figures.items() if turn else ():
            found.setdefault(name, []).append(value)
    threads.env.close()
    for count in (1, 2):
        rates = processes_steps_per_s(lanes, settings, decisions, rounds, count)
        found[f"vector_{count}_process{'es' if count > 1 else ''}_steps_per_s"] = rates
    return found


def main() -> None:
    """Prints medians and spread."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lanes", type=int, default=256, help="copies (default 256)")
    parser.add_argument("--decisions", type=int, default=2048, help="of an episode (default 2048)")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (default 7)")
    parser.add_argument("--cluster", default="2P2D", help="cluster (default 2P2D)")
    parser.add_argument("--workload", default="high_prefill_low_decode", help="generated workload")
    parser.add_argument("--load", type=float, default=0.7, help="share of saturation (default 0.7)")
    parser.add_argument("--json", type=Path, help="write a flat object of figures here")
    options = parser.parse_args()
    settings = {"cluster": options.cluster, "workload": options.workload, "load": options.load}
    found = measure(options.lanes, options.decisions, options.rounds, settings)
    table = Table(
        "figure", "median", "min", "max", title=f"{options.lanes} lanes, {options.cluster}, {options.workload}"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, values in found.items():
        table.add_row(name, *(f"{value:,.0f}" for value in (statistics.median(values), min(values), max(values))))
    Console().print(table)
    if options.json:
        figures = {name: statistics.median(values) for name, values in found.items()}
        about = settings | {"lanes": options.lanes, "decisions": options.decisions, "rounds": options.rounds}
        about["gymnasium"] = gymnasium.__version__
        about["machine"] = f"{platform.machine()}, Python {platform.python_version()}"
        options.json.write_text(json.dumps({"settings": about, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
