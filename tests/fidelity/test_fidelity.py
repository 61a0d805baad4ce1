"""The simulator takes every step as vLLM's own scheduler does."""

import functools
from collections import Counter

import pytest

pytest.importorskip("vllm", reason="not in this environment: `make fidelity` runs these tests in one of their own")

from comparison import compare, first_difference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm_cluster import VllmCluster
from workloads import SHAPES, Case, cases, seeded_case

from deflector.envs.simulator.step_trace import Step

BATCH = 10
BATCHES = 20
TO_BE_HELD = (
    "preemptions", "steps without a free token", "steps without a free seat", "steps while others wait",
    "chunks beside decodes", "transfers", "cache hits", "aborted", "local", "deflect", "disaggregate",
    "rule cap", "rule schedule", "rule largest_safe",
)  # fmt: skip


@functools.cache
def steps_of(seed: int) -> list[Step]:
    cluster = VllmCluster(seeded_case(seed))
    cluster.play()
    return sorted(cluster.steps, key=lambda step: (step.end_s, step.node))


@pytest.mark.parametrize("batch", range(BATCHES))
def test_random_workloads_are_scheduled_alike(batch: int) -> None:
    for seed in range(batch * BATCH, (batch + 1) * BATCH):
        assert not compare(seeded_case(seed)).difference


def test_asynchronous_engines_schedule_alike() -> None:
    for seed in range(1000, 1010):
        assert not compare(seeded_case(seed), asynchronous=True).difference


@pytest.mark.parametrize("shape", SHAPES)
def test_small_workloads_are_scheduled_alike(shape: str) -> None:
    @settings(max_examples=60, suppress_health_check=list(HealthCheck))
    @given(case=cases(shape))
    def scheduled_alike(case: Case) -> None:
        difference = compare(case).difference
        assert not difference, difference

    scheduled_alike()


def test_the_random_workloads_hold_what_they_are_to_hold() -> None:
    held = Counter[str]()
    for seed in range(30):
        held += compare(seeded_case(seed)).held
    assert not [name for name in TO_BE_HELD if held[name] < 20]


@given(data=st.data())
@settings(max_examples=30, suppress_health_check=list(HealthCheck))
def test_a_planted_difference_is_seen(data: st.DataObject) -> None:
    steps = steps_of(0)
    number = data.draw(st.integers(0, len(steps) - 1))
    step = steps[number]
    changed = data.draw(
        st.sampled_from(
            [
                step._replace(end_s=step.end_s + 1e-8),
                step._replace(scheduled=((step.scheduled[0][0], step.scheduled[0][1] + 1), *step.scheduled[1:])),
                step._replace(preempted=(*step.preempted, 0)),
                step._replace(kv_blocks_used=step.kv_blocks_used + 1),
                step._replace(waiting=(*step.waiting, 0)),
                step._replace(yielded=(*step.yielded, 0)),
            ]
        )
    )
    assert first_difference([*steps[:number], changed, *steps[number + 1 :]], steps)
    assert first_difference([*steps[:number], *steps[number + 1 :]], steps)
