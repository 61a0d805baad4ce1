"""Far too many requests for tiny clusters, with every array index checked: nothing is lost, nothing out of range."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import numpy as np

from deflector.envs.cluster import ClusterSpec, Fault, NodeField, NodeSpec, parse_cluster
from deflector.envs.outcome import Column, Status
from deflector.envs.simulator import layout as at
from deflector.envs.state import StateRow
from deflector.envs.workload import Workload
from deflector.envs.question import MEMORY
from deflector.policies.registry import parse_policy
from deflector.policies.rollout import _play

REQUESTS = 3000


def overload(seed):
    rng = np.random.default_rng(seed)
    arrival_s = np.zeros(REQUESTS)
    arrival_s[REQUESTS // 2:] = np.sort(rng.uniform(0, 60, REQUESTS - REQUESTS // 2))
    prompts = np.exp(rng.uniform(0, np.log(1100), REQUESTS)).astype(np.int64)
    slo_class = rng.integers(0, at.MAX_TBT_CLASSES, REQUESTS)
    return Workload(
        arrival_s=arrival_s, prompt_tokens=prompts,
        output_tokens=np.exp(rng.uniform(0, np.log(200), REQUESTS)).astype(np.int64),
        max_output_tokens=np.full(REQUESTS, 200, np.int64), ttft_slo_s=np.full(REQUESTS, 1e4),
        tbt_slo_s=0.03 + 0.01 * slo_class, slo_class=slo_class,
    )


def faults(nodes):
    kinds = ("slow", "silence", "die", "return", "speak", "die", "return")
    for turn in range(8):
        for step, kind in enumerate(kinds):
            yield Fault(at_s=2.0 + 40.0 * turn + 5.0 * step, node=(turn + step // 5) % nodes, kind=kind, slowness=2.0)


def play(spec, workload, policy, seed, parameters=None):
    facts, chosen = spec.facts(), parse_policy(policy)
    parameters = chosen.vector if parameters is None else parameters
    world = at.new_world(spec, facts, workload, seed=seed, count_from_s=0.5, slots=2, log_entries=64)
    rows, memory, answer = np.zeros((len(StateRow), facts.num_nodes)), np.zeros(MEMORY), np.zeros(at.DECISION_LENGTH)
    rows[StateRow.HEALTHY] = 1.0
    codes = []
    while not codes or codes[-1] != at.DONE:
        if codes:
            world = at.grown(world, codes[-1])
        codes.append(_play(
            world, chosen.info.number, chosen.info.looks, parameters,
            workload.ttft_slo_s, workload.tbt_slo_s, rows, memory, answer,
        ))
    return world, codes


try:
    play(parse_cluster("1P1D"), overload(0), "kairos", 0, parameters=np.zeros(0))
except IndexError:
    pass
else:
    raise SystemExit("indices are not checked: this run would prove nothing")

for cluster in (1, 2):
    for on_death in ("retry", "fail"):
        nodes = tuple(
            NodeSpec(role=role, count=cluster, kv_blocks=64, max_num_seqs=4, noise_sigma=0.2, link="tcp")
            for role in ("prefill", "decode")
        )
        broken = tuple(faults(2 * cluster))
        spec = ClusterSpec(nodes=nodes, faults=broken, on_death=on_death, report_loss=0.3)
        for policy in ("kairos:alpha=3", "slo_price"):
            workload = overload(cluster)
            world, codes = play(spec, workload, policy, cluster)
            table, wanted = world.requests, workload.output_tokens
            status, tokens = table[:, Column.STATUS], table[:, Column.TOKENS]
            counts = {x.name: int((status == x).sum()) for x in Status}
            grown = [codes.count(code) for code in (at.GROW_SLOTS, at.GROW_LOG)]
            deflected, preempted = int((table[:, Column.PATH] == 2).sum()), int(table[:, Column.PREEMPTIONS].sum())
            print(f"{2 * cluster} nodes, {on_death}, {policy}: {counts}, grown {grown}, "
                  f"{deflected} deflected, {preempted} preemptions, {world.f[at.G_NOW]:.0f} s")
            assert counts["UNFINISHED"] == 0
            assert counts["FINISHED"] > 200, "overloaded, not broken"
            assert counts["REJECTED"] > 0 and (on_death == "retry" or counts["FAILED"] > 0)
            assert (tokens[status == Status.FINISHED] == wanted[status == Status.FINISHED]).all()
            assert (tokens <= wanted).all()
            assert min(grown) >= 6
            assert 0 < deflected < REQUESTS and preempted > 0
            for node in range(2 * cluster):
                base = at.HEADER_I + node * int(world.i[at.H_NODE_STRIDE])
                assert world.i[base + at.FREE_BLOCKS] == world.nodes[node, NodeField.KV_BLOCKS], "blocks lost"
                for field in (
                    at.BATCH, at.NUM_RUNNING, at.NUM_PREFILLS, at.NUM_BROKEN, at.PREFILL_TOKENS, at.COUNTED,
                    at.DEFLECTED, at.INCOMING, at.INCOMING_PROMPTS, at.EGRESS, at.INGRESS, at.HEAP_LENGTH,
                ):
                    assert world.i[base + field] == 0, f"field {field} of node {node}"
            slots = int(world.i[at.H_SLOT0_I]) + np.arange(int(world.i[at.H_SLOTS])) * at.SLOT_I
            assert (world.i[slots + at.STAGE] == at.FREE).all(), "slots lost"
print("conserved")
"""


@pytest.mark.timeout(400)
def test_an_overload_loses_nothing_and_stays_within_its_arrays(tmp_path: Path) -> None:
    # Compiled anew, about a minute: only so does every index come with a check.
    environment = os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path / "numba")}
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.endswith("conserved\n")
