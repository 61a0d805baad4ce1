"""The plugin's scheduler on vLLM's own: deflections held back, aborted, counted, and cut beside each other."""

from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="not in this environment: `make fidelity` runs these tests in one of their own")

from vllm_engine import NewRequest, VllmEngine

from deflector.envs.cluster import parse_cluster

CAP = {"deflect_cap": 256}
FIRST, SECOND, THIRD, PLAIN = "1", "2", "3", "9"
"""Names of requests; the harness wants numbers."""


def new_engine(**settings: Any) -> VllmEngine:
    facts = parse_cluster("1P1M").facts()
    engine = VllmEngine(1, facts.nodes[1], facts.profiles[0])
    engine.scheduler._settings = replace(engine.scheduler._settings, **settings)
    return engine


def request(name: str, tokens: int, rule: dict[str, Any] | None = None, outputs: int = 3) -> NewRequest:
    return NewRequest(name, [1 + int(name)] * tokens, outputs, rule)


def play(engine: VllmEngine, steps: int = 400) -> list[dict[str, int]]:
    """Tokens scheduled for each request, step by step, until nothing is left to do."""
    seen = []
    now_s = 0.0
    for _ in range(steps):
        took_s = engine.begin_step(now_s)
        if took_s is None:
            break
        assert engine.step is not None
        seen.append(dict(engine.step[0].num_scheduled_tokens))
        now_s += took_s
        engine.end_step()
    assert engine.scheduler.get_num_unfinished_requests() == 0
    return seen


def prefills(step: dict[str, int]) -> set[str]:
    return {name for name, tokens in step.items() if tokens > 1}


def test_no_more_deflections_are_computed_at_once_than_configured_and_nobody_else_waits() -> None:
    engine = new_engine(max_deflected=1)
    for name in (FIRST, SECOND, THIRD):
        engine.add(request(name, 1000, CAP))
    engine.add(request(PLAIN, 500))
    assert engine.scheduler.get_num_unfinished_requests() == 4
    assert engine.scheduler.counts()["held_back"] == 2
    steps = play(engine)
    assert all(len(prefills(step) & {FIRST, SECOND, THIRD}) <= 1 for step in steps)
    assert steps[0][PLAIN] == 500
    order = [name for step in steps for name in prefills(step) if name != PLAIN]
    assert list(dict.fromkeys(order)) == [FIRST, SECOND, THIRD]
    assert [step[SECOND] for step in steps if step.get(SECOND, 0) > 1] == [256, 256, 256, 232]


def test_deflection_that_is_held_back_alone_keeps_the_engine_awake() -> None:
    engine = new_engine(max_deflected=1)
    engine.add(request(FIRST, 300, CAP, outputs=1))
    engine.add(request(SECOND, 300, CAP, outputs=1))
    assert {name for step in play(engine) for name in step} == {FIRST, SECOND}


def test_deflection_that_is_held_back_can_be_aborted() -> None:
    engine = new_engine(max_deflected=1)
    for name in (FIRST, SECOND, THIRD):
        engine.add(request(name, 600, CAP))
    engine.abort(SECOND)
    assert engine.scheduler.get_num_unfinished_requests() == 2
    assert {name for step in play(engine) for name in step} == {FIRST, THIRD}
    assert engine.scheduler.counts()["held_back"] == 0


def test_engines_budget_bounds_every_step_with_one_deflection_at_a_time() -> None:
    engine = new_engine(tbt_budget_s=0.05, max_deflected=1)
    for k in range(6):
        engine.add(request(f"10{k}", 40, outputs=400))
    for _ in range(3):
        engine.begin_step(0.0)
        engine.end_step()
    for name in (FIRST, SECOND, THIRD):
        engine.add(request(name, 3000, {"deflect_cap": 2048}))
    chunks = []
    while engine.scheduler.counts()["deflected"]:
        took_s = engine.begin_step(0.0)
        assert engine.step is not None
        assert took_s is not None
        assert took_s <= 0.05 * 1.001
        chunks += [n for name, n in engine.step[0].num_scheduled_tokens.items() if name in (FIRST, SECOND, THIRD)]
        engine.end_step()
    assert sum(chunks) >= 9000
    assert 128 < max(chunks) < 2048


def test_counts_are_those_of_the_requests() -> None:
    engine = new_engine()
    engine.add(request(FIRST, 3000, CAP))
    engine.add(request(PLAIN, 100))
    engine.begin_step(0.0)
    engine.end_step()
    counts = engine.scheduler.counts()
    assert counts["prefill_tokens"] == 3000 - 256
    assert (counts["decodes"], counts["decode_kv_tokens"]) == (1, 100)
    assert (counts["deflected"], counts["running"], counts["waiting"]) == (1, 2, 0)
    play(engine)
    after = engine.scheduler.counts()
    assert not any(after[name] for name in ("prefill_tokens", "decodes", "running", "waiting", "deflected", "held"))
