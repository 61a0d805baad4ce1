"""The simulator and vLLM side by side: the first step in which they differ, and what a case held."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from vllm_cluster import VllmCluster
from workloads import Case

from deflector.envs.outcome import Column, Outcomes, Status
from deflector.envs.simulator.step_trace import Step, TracedBackend

TOLERANCE_S = 1e-9
TIMES = ("start_s", "end_s")


@dataclass
class Comparison:
    """What two runs of a case have in common and where they first part.

    Attributes:
        case: What was played.
        held: How many steps were compared, and how often each thing occurred that the suite is to hold.
        difference: Readable, "" if there is none.
    """

    case: Case
    held: Counter[str]
    difference: str


def compare(case: Case, *, asynchronous: bool = False) -> Comparison:
    """Plays a case on both and compares every step, then every request's outcome."""
    ours = TracedBackend(case.spec, case.workload)
    for decision in case.decisions:
        ours.next_arrival()
        ours.apply(decision)
    outcomes = ours.drain()
    theirs = VllmCluster(case, asynchronous=asynchronous)
    theirs.play()
    difference = first_difference(ours.steps, theirs.steps) or _other_outcome(outcomes, theirs)
    return Comparison(case, _held(case, theirs), difference and f"{_title(case)}\n{difference}")


def first_difference(ours: Sequence[Step], theirs: Sequence[Step]) -> str:
    """The earliest step that differs, both sides of it; "" if all are equal."""
    found = []
    for node in sorted({step.node for step in (*ours, *theirs)}):
        our_steps = [step for step in ours if step.node == node]
        their_steps = sorted((step for step in theirs if step.node == node), key=lambda step: step.end_s)
        for number in range(max(len(our_steps), len(their_steps))):
            pair = [steps[number] if number < len(steps) else None for steps in (our_steps, their_steps)]
            what = _fields_that_differ(*pair)
            if what:
                time_s = min(step.start_s for step in pair if step is not None)
                found.append((time_s, _shown(node, number, what, our_steps, their_steps)))
                break
    return min(found)[1] if found else ""


def _fields_that_differ(ours: Step | None, theirs: Step | None) -> list[str]:
    if ours is None or theirs is None:
        return ["one step more"]
    return [
        name
        for name, a, b in zip(Step._fields, ours, theirs, strict=True)
        if (abs(a - b) > TOLERANCE_S if name in TIMES else a != b)
    ]


def _shown(node: int, number: int, what: list[str], ours: list[Step], theirs: list[Step]) -> str:
    lines = [f"node {node}, step {number}: {', '.join(what)}"]
    for k in range(max(number - 2, 0), number + 2):
        lines.append(f"  step {k}{' <<<' if k == number else ''}")
        for side, steps in (("simulator", ours), ("vLLM", theirs)):
            lines.append(f"    {side:9} {_line(steps[k]) if k < len(steps) else '(no such step)'}")
    return "\n".join(lines)


def _line(step: Step) -> str:
    scheduled = " ".join(f"{request}:{tokens}" for request, tokens in step.scheduled)
    return (
        f"{step.start_s:.9f}..{step.end_s:.9f} [{scheduled}] preempted {step.preempted} yields {step.yielded} "
        f"blocks {step.kv_blocks_used} waiting {step.waiting}"
    )


def _title(case: Case) -> str:
    nodes = "\n".join(f"  {node!r}" for node in case.spec.expanded_nodes)
    return f"{case.name}: {case.spec.name}, {len(case.workload)} requests\n{nodes}"


def _other_outcome(outcomes: Outcomes, theirs: VllmCluster) -> str:
    for number, flight in enumerate(theirs.flights):
        end_s = flight.finish_s if flight.status == Status.ABORTED else np.inf
        times = np.array([time_s for time_s in flight.token_s if time_s < end_s])
        gaps = np.diff(times) if flight.status == Status.FINISHED else np.empty(0)
        expected = {
            Column.STATUS: float(flight.status),
            Column.FIRST_TOKEN_S: times[0] if len(times) else np.nan,
            Column.TOKENS: float(len(times)),
            Column.PREEMPTIONS: float(flight.preemptions),
        }
        if flight.status in (Status.FINISHED, Status.ABORTED):
            expected[Column.FINISH_S] = flight.finish_s
        if len(gaps):
            expected |= {Column.TBT_MEAN_S: gaps.mean(), Column.TBT_MAX_S: gaps.max()}
            expected[Column.TBT_P99_S] = np.percentile(gaps, 99)
        for column, value in expected.items():
            if not np.isclose(outcomes.table[number, column], value, rtol=0, atol=TOLERANCE_S, equal_nan=True):
                return f"request {number}: {column.name} {outcomes.table[number, column]}, vLLM's {value}"
    return ""


def _held(case: Case, theirs: VllmCluster) -> Counter[str]:
    """Counts of what the suite is to hold, as vLLM played it."""
    held = Counter({"steps": len(theirs.steps)})
    for step in theirs.steps:
        engine = theirs.engines[step.node]
        held["preemptions"] += len(step.preempted)
        held["steps without a free token"] += sum(tokens for _, tokens in step.scheduled) == engine.budget
        held["steps without a free seat"] += len(step.scheduled) == engine.seats and bool(step.waiting)
        held["steps while others wait"] += bool(step.waiting)
        sizes = [tokens for _, tokens in step.scheduled]
        held["chunks beside decodes"] += max(sizes) > 1 and min(sizes) == 1
    held["admissions"] = sum(engine.num_admitted for engine in theirs.engines)
    for flight, decision in zip(theirs.flights, case.decisions, strict=True):
        held[flight.status.name.lower()] += 1
        held[decision.path.name.lower()] += 1
        held[f"rule {decision.chunk_rule.name.lower()}"] += 1
    held["transfers"] = theirs.links.started
    held["cache hits"] = sum(engine.num_hits for engine in theirs.engines)
    held[f"cases of {case.spec.name}"] = 1
    return held
