"""The compiled rule `kairos` against a plain transcription of the paper's Algorithm 1, and cases worked out by hand."""

import json
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path as FilePath

import numpy as np
import pytest
from random_cases import random_cluster, random_rows

from deflector.envs.cluster import ClusterFacts, ClusterSpec, NodeField, NodeRole, NodeSpec
from deflector.envs.state import ChunkRule, ClusterState, Decision, Path, Reason, Request, StateRow
from deflector.envs.step_time import StepTimeProfile
from deflector.policies.policy import make_policy

STATES_PER_CLUSTER = 5000
SETTINGS = ((1.3, 1.0), (1.0, 0.5), (2.0, 0.8), (1.0, 1.0), (0.9, 1.5))
NOBODY = Decision(Path.REJECT, -1, -1, Reason.NO_DECODE_NODE)


# ---- Algorithm 1, written down once more ----


class Times:
    """A profile's step times in plain Python, seconds."""

    def __init__(self, profile: StepTimeProfile) -> None:
        self.profile = profile
        self.together = profile.mixed or profile
        self.linear_ms = [0.0] + [self._linear_ms(tokens) for tokens in range(1, 9000)]

    def _linear_ms(self, tokens: int) -> float:
        knee = self.profile.chunk_knee_tokens
        if tokens <= knee:
            return self._between_nodes_ms(tokens)
        at_knee_ms = self._between_nodes_ms(knee)
        return at_knee_ms + self.profile.chunk_slope * (self._between_nodes_ms(tokens) - at_knee_ms)

    def _between_nodes_ms(self, tokens: int) -> float:
        nodes = self.profile.linear_nodes_ms
        if tokens <= nodes[0][0] or len(nodes) == 1:
            return nodes[0][1]
        right = next((n for n, (x, _) in enumerate(nodes) if x >= tokens), len(nodes) - 1)
        (x0, y0), (x1, y1) = nodes[right - 1], nodes[right]
        return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)

    def chunk_alone_s(self, chunk: int, context: float) -> float:
        """T_p(chi, k)."""
        a = self.profile.prefill
        q = chunk * (context + chunk / 2)
        step_ms = self.profile.step_overhead_ms + self.linear_ms[chunk]
        return (step_ms + a.constant_ms + a.per_q_ms * q + a.per_token_ms * chunk) / 1000

    def chunk_with_decodes_s(self, batch: int, kv_tokens: float, chunk: int, context: int) -> float:
        """T_m(B, K, chi, k), the prompt's own KV counted among the decodes' as it grows; no decodes, no such term."""
        if batch == 0:
            return self.chunk_alone_s(chunk, context)
        a, b = self.together.prefill, self.together.decode
        q = chunk * (context + chunk / 2)
        step_ms = self.profile.step_overhead_ms + self.linear_ms[chunk + batch]
        chunk_ms = a.constant_ms + a.per_q_ms * q + a.per_token_ms * chunk
        decode_ms = b.constant_ms + b.per_kv_token_ms * (kv_tokens + context) + b.per_sequence_ms * batch
        return (step_ms + chunk_ms + decode_ms) / 1000


@lru_cache
def times_of(profile_json: str) -> Times:
    return Times(StepTimeProfile.model_validate_json(profile_json))


class Algorithm1:
    """The decision as the paper prints it; nodes in order of their id, so that ties fall to the lower one."""

    def __init__(self, facts: ClusterFacts, alpha: float, beta: float) -> None:
        self.alpha, self.beta = alpha, beta
        profiles = [times_of(profile.to_json()) for profile in facts.profiles]
        self.times = [profiles[int(index)] for index in facts.nodes[:, NodeField.PROFILE]]
        self.budgets = [int(budget) for budget in facts.nodes[:, NodeField.MAX_BATCHED_TOKENS]]
        roles = [NodeRole(int(role)) for role in facts.nodes[:, NodeField.ROLE]]
        self.prefill_nodes = [n for n, role in enumerate(roles) if role != NodeRole.DECODE]
        self.decode_nodes = [n for n, role in enumerate(roles) if role != NodeRole.PREFILL]

    def prefill_path_s(self, node: int, ahead: float, prompt: int) -> float:
        budget, step_s = self.budgets[node], self.times[node].chunk_alone_s
        chunk = min(budget, prompt)
        queue_s = (ahead / chunk) * step_s(chunk, ahead / 2) if ahead > 0 else 0.0
        starts = range(0, prompt, budget)
        return queue_s + sum(step_s(min(budget, prompt - start), start) for start in starts)

    def decode_path(self, node: int, batch: int, kv: float, limit_s: float, prompt: int) -> tuple[float, list[int]]:
        """TTFT and the chunks; inf where at some point none fits."""
        chunks: list[int] = []
        total_s, done = 0.0, 0
        while done < prompt:
            for size in (2048, 1024, 512, 256, 128):
                chunk = min(size, prompt - done)
                if size <= self.budgets[node]:
                    step_s = self.times[node].chunk_with_decodes_s(batch, kv, chunk, done)
                    if step_s <= limit_s:
                        break
            else:
                return math.inf, []
            chunks.append(chunk)
            total_s, done = total_s + step_s, done + chunk
        return total_s, chunks

    def decide(self, rows: dict[str, list[float]], request: Request) -> tuple[Decision, list[int]]:
        """The decision without its chunk rule, and the chunks of a deflected prefill."""
        up, prompt = rows["HEALTHY"], request.prompt_tokens
        ahead, batch, deflected = rows["PREFILL_TOKENS_AHEAD"], rows["RUNNING_DECODES"], rows["DEFLECTED_IN_FLIGHT"]
        prefill_s = {n: self.prefill_path_s(n, ahead[n], prompt) for n in self.prefill_nodes if up[n]}
        source = min(prefill_s, key=prefill_s.__getitem__, default=-1)
        pf_s = prefill_s.get(source, math.inf)
        dec_s, best, chunks = math.inf, -1, []
        for n in self.decode_nodes:
            if up[n] and ahead[n] == 0 and deflected[n] == 0:
                tbt_s = rows["STRICTEST_TBT_SLO_S"][n] if batch[n] else request.tbt_slo_s
                kv = rows["DECODE_KV_TOKENS"][n]
                ttft_s, own_chunks = self.decode_path(n, int(batch[n]), kv, self.beta * tbt_s, prompt)
                if ttft_s < dec_s:
                    dec_s, best, chunks = ttft_s, n, own_chunks
        fast = dec_s <= self.alpha * pf_s
        if source >= 0 and best >= 0 and fast and dec_s <= request.ttft_slo_s:
            decision = Decision(Path.DEFLECT, -1, best, Reason.DEFLECT_FASTER)
            return replace(decision, ttft_prefill_path_s=pf_s, ttft_decode_path_s=dec_s), chunks
        # Where the request decodes otherwise is not printed: on the node with the fewest sequences.
        load = {n: batch[n] + rows["INCOMING_TRANSFERS"][n] + deflected[n] for n in self.decode_nodes if up[n]}
        others = {n: sequences for n, sequences in load.items() if n != source}
        if source >= 0 and others:
            reason = Reason.TTFT_SLO_AT_RISK if fast else Reason.PREFILL_PATH_FASTER
            reason = Reason.NO_FEASIBLE_DECODE_NODE if best < 0 else reason
            decision = Decision(Path.DISAGGREGATE, source, min(others, key=others.__getitem__), reason)
        elif load:
            decision = Decision(Path.LOCAL, -1, min(load, key=load.__getitem__), Reason.NO_PREFILL_NODE)
        else:
            decision = NOBODY
        return replace(decision, ttft_prefill_path_s=pf_s, ttft_decode_path_s=dec_s), []


# ---- compared on random states ----


@pytest.mark.parametrize("seed", range(20))
def test_compiled_rule_equals_the_transcription(seed: int) -> None:
    rng = np.random.default_rng([seed, 1])
    facts = random_cluster(seed).facts()
    doors = [
        (make_policy(f"kairos:alpha={alpha!r},beta={beta!r}"), Algorithm1(facts, alpha, beta))
        for alpha, beta in SETTINGS
    ]
    all_rows = random_rows(rng, facts, STATES_PER_CLUSTER)
    prompts = np.floor(np.exp(rng.uniform(0, np.log(40_001), STATES_PER_CLUSTER))).astype(int)
    ttft_slo_s = np.exp(rng.uniform(np.log(0.02), np.log(30), STATES_PER_CLUSTER))
    tbt_slo_s = np.exp(rng.uniform(np.log(0.01), np.log(0.6), STATES_PER_CLUSTER))
    seen: set[Reason] = set()
    for k in range(STATES_PER_CLUSTER):
        compiled, printed = doors[k % len(doors)]
        request = Request(k, 0.0, int(prompts[k]), 100, float(ttft_slo_s[k]), float(tbt_slo_s[k]))
        decision = compiled.decide(ClusterState(0.0, all_rows[k], facts), request)
        names = {row.name: values for row, values in zip(StateRow, all_rows[k].tolist(), strict=True)}
        expected, chunks = printed.decide(names, request)
        where = f"cluster {seed}, state {k}: {request}"
        ours = (decision.path, decision.prefill_node, decision.decode_node, decision.reason)
        assert ours == (expected.path, expected.prefill_node, expected.decode_node, expected.reason), where
        assert [size for size, steps in decision.chunk_runs for _ in range(steps)] == chunks, where
        assert decision.chunk_rule == (ChunkRule.SCHEDULE if chunks else ChunkRule.NONE), where
        for predicted, wanted in (
            (decision.ttft_prefill_path_s, expected.ttft_prefill_path_s),
            (decision.ttft_decode_path_s, expected.ttft_decode_path_s),
        ):
            assert predicted == wanted or math.isclose(predicted, wanted, rel_tol=1e-9), where
        seen.add(decision.reason)
    assert {Reason.PREFILL_PATH_FASTER, Reason.DEFLECT_FASTER, Reason.NO_FEASIBLE_DECODE_NODE} <= seen
    assert {Reason.TTFT_SLO_AT_RISK, Reason.NO_PREFILL_NODE, Reason.NO_DECODE_NODE} <= seen


# ---- worked out by hand ----


def profile_file(folder: FilePath, prefill: dict[str, float], decode: dict[str, float]) -> str:
    """A profile whose every step lasts 10 ms and what the given terms add."""
    path = folder / "tiny.json"
    path.write_text(
        json.dumps(
            {
                "schema": 1, "name": "tiny", "model": "none", "gpu": "none", "engine": "none",
                "provenance": "invented", "provenance_note": "For tests.", "valid": {"step_tokens": 8192},
                "kv_bytes_per_token": 1000.0, "kv_tokens_capacity": 160_000, "linear_nodes_ms": [[1, 10.0]],
                "prefill": prefill, "decode": decode,
            }
        )
    )  # fmt: skip
    return str(path)


@dataclass
class Desk:
    """One prefill node (0), two decode nodes (1, 2) with 10 decodes each; all up, nothing queued.

    A step lasts 10 ms + 0.1 ms per chunk token + 1 ms per decode. A request of 1000 tokens is one step of
    10 + 100 = 110 ms on the idle prefill node, whose token budget is 1000.
    """

    facts: ClusterFacts
    rows: np.ndarray

    @classmethod
    def make(cls, profile: str, prefill_nodes: int = 1) -> "Desk":
        prefill = NodeSpec(role="prefill", count=prefill_nodes, profile=profile, max_num_batched_tokens=1000)
        decode = NodeSpec(role="decode", count=2, profile=profile)
        facts = ClusterSpec(nodes=(prefill, decode)).facts()
        rows = np.zeros((len(StateRow), facts.num_nodes))
        desk = cls(facts, rows)
        desk.rows[StateRow.HEALTHY] = 1
        desk.rows[StateRow.RUNNING_DECODES, prefill_nodes:] = 10
        desk.rows[StateRow.STRICTEST_TBT_SLO_S] = math.inf
        desk.rows[StateRow.STRICTEST_TBT_SLO_S, prefill_nodes:] = 0.050
        return desk

    def ask(self, policy: str, *, prompt: int = 1000, ttft_slo_s: float = 9.0, tbt_slo_s: float = 9.0) -> Decision:
        request = Request(0, 0.0, prompt, 100, ttft_slo_s, tbt_slo_s)
        return make_policy(policy).decide(ClusterState(0.0, self.rows, self.facts), request)


@pytest.fixture(name="desk")
def one_prefill_two_decode_nodes(tmp_path: FilePath) -> Desk:
    return Desk.make(profile_file(tmp_path, {"per_token_ms": 0.1}, {"per_sequence_ms": 1.0}))


def test_without_a_queue_the_prefill_node_is_faster(desk: Desk) -> None:
    # Beside 10 decodes a chunk takes 20 ms + 0.1 ms a token: 512 tokens 71.2 ms > 50 ms, 256 tokens 45.6 ms.
    # 1000 = 3 x 256 + 232: 3 x 45.6 + 43.2 = 180 ms; 1.3 x 110 = 143 ms.
    decision = desk.ask("kairos")
    assert (decision.path, decision.prefill_node, decision.decode_node) == (Path.DISAGGREGATE, 0, 1)
    assert decision.reason == Reason.PREFILL_PATH_FASTER
    assert decision.chunk_rule == ChunkRule.NONE
    assert decision.ttft_prefill_path_s == pytest.approx(0.110)
    assert decision.ttft_decode_path_s == pytest.approx(0.180)


def test_a_jam_deflects_with_a_schedule(desk: Desk) -> None:
    # 500 tokens ahead are half a step of 110 ms: 55 + 110 = 165 ms, and 180 <= 1.3 x 165 = 214.5.
    desk.rows[StateRow.PREFILL_TOKENS_AHEAD, 0] = 500
    decision = desk.ask("kairos")
    assert (decision.path, decision.prefill_node, decision.decode_node) == (Path.DEFLECT, -1, 1)
    assert decision.reason == Reason.DEFLECT_FASTER
    assert (decision.chunk_rule, decision.chunk_runs) == (ChunkRule.SCHEDULE, ((256, 3), (232, 1)))
    assert decision.ttft_prefill_path_s == pytest.approx(0.165)
    assert desk.ask("kairos:alpha=1").path == Path.DISAGGREGATE  # 180 > 165


def test_a_deflection_that_would_miss_the_ttft_slo_is_not_made(desk: Desk) -> None:
    desk.rows[StateRow.PREFILL_TOKENS_AHEAD, 0] = 5000  # 550 + 110 = 660 ms against 180 ms
    assert desk.ask("kairos", ttft_slo_s=0.181).path == Path.DEFLECT
    decision = desk.ask("kairos", ttft_slo_s=0.179)
    assert (decision.path, decision.reason) == (Path.DISAGGREGATE, Reason.TTFT_SLO_AT_RISK)


def test_alpha_at_the_boundary(desk: Desk) -> None:
    # On a node without decodes the prompt is one chunk of 110 ms, as on the idle prefill node: a tie deflects.
    desk.rows[StateRow.RUNNING_DECODES, 1] = 0
    decision = desk.ask("kairos:alpha=1")
    assert (decision.path, decision.decode_node, decision.chunk_runs) == (Path.DEFLECT, 1, ((1000, 1),))
    assert decision.ttft_decode_path_s == decision.ttft_prefill_path_s == pytest.approx(0.110)
    assert desk.ask("kairos:alpha=0.999999").reason == Reason.PREFILL_PATH_FASTER


def test_without_decodes_the_requests_own_tbt_slo_counts(desk: Desk) -> None:
    desk.rows[StateRow.RUNNING_DECODES, 1] = 0
    # Alone a chunk takes 10 ms + 0.1 ms a token: 512 tokens 61.2 ms fit into 70 ms; 61.2 + 58.8 = 120 <= 143.
    decision = desk.ask("kairos", tbt_slo_s=0.070)
    assert (decision.decode_node, decision.chunk_runs) == (1, ((512, 1), (488, 1)))
    assert decision.ttft_decode_path_s == pytest.approx(0.120)


@pytest.mark.parametrize("row", [StateRow.DEFLECTED_IN_FLIGHT, StateRow.PREFILL_TOKENS_AHEAD])
def test_a_decode_node_with_a_prefill_is_passed_over(desk: Desk, row: StateRow) -> None:
    desk.rows[StateRow.PREFILL_TOKENS_AHEAD, 0] = 5000
    desk.rows[StateRow.RUNNING_DECODES, 1] = 0  # Node 1 would be faster.
    desk.rows[row, 1] = 1
    decision = desk.ask("kairos")
    assert (decision.path, decision.decode_node) == (Path.DEFLECT, 2)
    desk.rows[row, 2] = 1
    decision = desk.ask("kairos")
    assert (decision.path, decision.reason) == (Path.DISAGGREGATE, Reason.NO_FEASIBLE_DECODE_NODE)
    assert decision.ttft_decode_path_s == math.inf


def test_beta_shrinks_the_chunks(desk: Desk) -> None:
    desk.rows[StateRow.PREFILL_TOKENS_AHEAD, 0] = 50_000
    desk.rows[StateRow.STRICTEST_TBT_SLO_S, 1] = 0.085
    # 512 tokens: 71.2 <= 85, then 488: 68.8; together 140 ms on node 1, still 180 ms on node 2.
    decision = desk.ask("kairos")
    assert (decision.decode_node, decision.chunk_runs) == (1, ((512, 1), (488, 1)))
    # 0.6 x 85 = 51: 256 tokens (45.6). 0.4 x 85 = 34: 128 tokens (32.8), 1000 = 7 x 128 + 104, 229.6 + 30.4 = 260.
    assert desk.ask("kairos:beta=0.6").chunk_runs == ((256, 3), (232, 1))
    decision = desk.ask("kairos:beta=0.4")
    assert decision.chunk_runs == ((128, 7), (104, 1))
    assert decision.ttft_decode_path_s == pytest.approx(0.260)
    # 0.35 x 85 = 29.75 < 32.8: no chunk fits, but a prompt of 90 tokens (29) does.
    assert desk.ask("kairos:beta=0.35").reason == Reason.NO_FEASIBLE_DECODE_NODE
    assert desk.ask("kairos:beta=0.35", prompt=90).chunk_runs == ((90, 1),)


def test_ties_fall_to_the_lower_node(desk: Desk, tmp_path: FilePath) -> None:
    desk.rows[StateRow.PREFILL_TOKENS_AHEAD, 0] = 5000
    assert desk.ask("kairos").decode_node == 1
    twins = Desk.make(str(tmp_path / "tiny.json"), prefill_nodes=2)
    decision = twins.ask("kairos")
    assert (decision.prefill_node, decision.decode_node) == (0, 2)
    twins.rows[StateRow.PREFILL_TOKENS_AHEAD, 0] = 1
    assert twins.ask("kairos").prefill_node == 1


def test_a_disaggregated_request_decodes_where_the_fewest_sequences_are(desk: Desk) -> None:
    desk.rows[StateRow.INCOMING_TRANSFERS, 1] = 1
    assert desk.ask("kairos").decode_node == 2
    desk.rows[StateRow.DEFLECTED_IN_FLIGHT, 2] = 2
    assert desk.ask("kairos").decode_node == 1


def test_without_a_prefill_node_the_request_stays_local(desk: Desk) -> None:
    desk.rows[StateRow.HEALTHY, 0] = 0
    desk.rows[StateRow.RUNNING_DECODES, 2] = 3
    decision = desk.ask("kairos")
    assert (decision.path, decision.prefill_node, decision.decode_node) == (Path.LOCAL, -1, 2)
    assert (decision.reason, decision.chunk_rule) == (Reason.NO_PREFILL_NODE, ChunkRule.NONE)


@pytest.mark.parametrize("prefill_up", [0, 1])
def test_without_a_node_that_decodes_the_request_is_rejected(desk: Desk, prefill_up: int) -> None:
    desk.rows[StateRow.HEALTHY] = 0
    desk.rows[StateRow.HEALTHY, 0] = prefill_up
    decision = desk.ask("kairos")
    assert (decision.path, decision.prefill_node, decision.decode_node) == (Path.REJECT, -1, -1)
    assert decision.reason == Reason.NO_DECODE_NODE


def test_the_queue_is_counted_at_half_its_length_as_context(tmp_path: FilePath) -> None:
    desk = Desk.make(profile_file(tmp_path, {"per_q_ms": 1e-5}, {}))
    desk.rows[StateRow.PREFILL_TOKENS_AHEAD, 0] = 500
    # Eq. 1: 500/1000 of T_p(1000, 250) = 10 + 1e-5 x 1000 x (250 + 500) = 17.5 ms, that is 8.75 ms.
    # Eq. 2: 1500 tokens are T_p(1000, 0) = 10 + 5 and T_p(500, 1000) = 10 + 1e-5 x 500 x 1250 = 16.25 ms.
    assert desk.ask("kairos", prompt=1500).ttft_prefill_path_s == pytest.approx(8.75e-3 + 15e-3 + 16.25e-3)


def test_the_prompts_own_kv_weighs_on_the_decodes_as_it_grows(tmp_path: FilePath) -> None:
    desk = Desk.make(profile_file(tmp_path, {}, {"per_kv_token_ms": 0.01}))
    desk.rows[StateRow.DECODE_KV_TOKENS, 1:] = 1000
    desk.rows[StateRow.STRICTEST_TBT_SLO_S, 1:] = 0.045
    # Whatever the chunk, a step takes 10 ms + 0.01 x (1000 + k): 20 ms at k = 0, 40.48 ms at k = 2048, then 60.96.
    assert desk.ask("kairos", prompt=4096).ttft_decode_path_s == pytest.approx(60.48e-3)
    assert desk.ask("kairos", prompt=4097).ttft_decode_path_s == math.inf


def test_no_chunk_is_above_the_engines_token_budget(tmp_path: FilePath) -> None:
    tiny = profile_file(tmp_path, {}, {})
    for budget, runs in ((600, ((512, 1), (188, 1))), (300, ((256, 2), (188, 1))), (127, ())):
        decode = NodeSpec(role="decode", profile=tiny, max_num_batched_tokens=budget)
        facts = ClusterSpec(nodes=(NodeSpec(role="prefill", profile=tiny), decode)).facts()
        rows = np.zeros((len(StateRow), 2))
        rows[StateRow.HEALTHY], rows[StateRow.STRICTEST_TBT_SLO_S] = 1, math.inf
        assert Desk(facts, rows).ask("kairos:alpha=99", prompt=700).chunk_runs == runs
