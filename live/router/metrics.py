"""What Prometheus sees of the router: `deflector_*`."""

import math
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from deflector.envs.state import Decision, Path
from deflector.live.router.clock import now_s
from deflector.live.router.fleet import Fleet
from deflector.live.router.nodes import Node
from deflector.live.router.policy_slot import Answer

PATHS = {Path.REJECT: "reject", Path.DISAGGREGATE: "disaggregate", Path.DEFLECT: "deflect", Path.LOCAL: "local"}
"""As headers, logs and labels call them."""

_TTFT_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)
_RATIO_BUCKETS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0)
_DECISION_BUCKETS = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 1e-1)


def predicted_ttft_s(decision: Decision, path: str) -> float:
    """The policy's estimate for the path that was taken; inf or nan where it made none."""
    return decision.ttft_prefill_path_s if path == "disaggregate" else decision.ttft_decode_path_s


class RouterMetrics:
    """Counters that the router bumps, and gauges that are read off its book when somebody asks."""

    def __init__(self, fleet: Fleet) -> None:
        """Begins at zero, in a registry of its own."""
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter(
            "deflector_requests", "Requests by path and what became of them", ["path", "outcome"], registry=registry
        )
        self._decisions = Counter(
            "deflector_decisions",
            "Decisions by policy, path and reason",
            ["policy", "path", "reason"],
            registry=registry,
        )
        self._decision_s = Histogram(
            "deflector_decision_seconds", "Time to decide, the state's making included", registry=registry,
            buckets=_DECISION_BUCKETS,
        )  # fmt: skip
        self._ttft = Histogram(
            "deflector_ttft_seconds", "From arrival to the first token, streamed answers", ["path"], registry=registry,
            buckets=_TTFT_BUCKETS,
        )  # fmt: skip
        self._ratio = Histogram(
            "deflector_ttft_actual_over_predicted", "Actual TTFT over the policy's prediction", ["path"],
            registry=registry, buckets=_RATIO_BUCKETS,
        )  # fmt: skip
        self._predicted_s = Counter(
            "deflector_ttft_predicted_seconds", "Sum of predicted TTFT where it was measured", ["path"],
            registry=registry,
        )  # fmt: skip
        self.retries = Counter(
            "deflector_retries", "Legs tried again elsewhere, by stage and failure", ["stage", "failure"],
            registry=registry,
        )  # fmt: skip
        self.orphaned_kv = Counter(
            "deflector_orphaned_kv", "Prefilled prompts whose KV nobody may have pulled", registry=registry
        )
        self.orphaned_kv_tokens = Counter("deflector_orphaned_kv_tokens", "Prompt tokens of those", registry=registry)
        self.disconnects = Counter("deflector_client_disconnects", "Clients gone before the end", registry=registry)
        self.reports = Counter("deflector_reports", "Load reports by source or failure", ["result"], registry=registry)
        self.log_dropped = Counter("deflector_decision_log_dropped", "Decisions not logged", registry=registry)
        self.in_flight = Gauge("deflector_requests_in_flight", "Requests being served", registry=registry)
        self.ready = Gauge(
            "deflector_ready", "1 once requests are welcome, 0 while starting or draining", registry=registry
        )
        registry.register(_Nodes(fleet))

    def decided(self, answer: Answer) -> None:
        """Counts a decision."""
        self._decisions.labels(answer.policy, PATHS[answer.decision.path], answer.reason).inc()
        self._decision_s.observe(answer.took_s)

    def first_token(self, decision: Decision, path: str, ttft_s: float) -> None:
        """Compares a first token with what was predicted."""
        self._ttft.labels(path).observe(ttft_s)
        predicted_s = predicted_ttft_s(decision, path)
        if 0 < predicted_s < float("inf"):
            self._ratio.labels(path).observe(ttft_s / predicted_s)
            self._predicted_s.labels(path).inc(predicted_s)

    def orphaned(self, prompt_tokens: int) -> None:
        """A prefill node may hold KV in vain, until its lease ends."""
        self.orphaned_kv.inc()
        self.orphaned_kv_tokens.inc(prompt_tokens)

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)


class _Nodes:
    """Gauges per node."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterable[Metric]:
        """Reads the book."""
        time_s = now_s()
        for name, text, value in _GAUGES:
            family = GaugeMetricFamily(f"deflector_node_{name}", text, labels=["node", "role"])
            for node in self._fleet.nodes:
                family.add_metric([node.name, node.spec.role], value(node, time_s))
            yield family


_GAUGES = (
    ("healthy", "Whether requests may go there", lambda node, now: float(node.takes_requests(now))),
    ("requests", "Requests there", lambda node, now: node.requests),
    ("prefill_tokens_ahead", "Prompt tokens still to prefill", lambda node, now: node.prefill_tokens_ahead),
    ("decodes", "Sequences decoding", lambda node, now: node.row(now)[2]),
    ("decode_kv_tokens", "KV tokens that they hold", lambda node, now: node.row(now)[3]),
    ("kv_tokens_used", "KV tokens taken", lambda node, now: node.row(now)[4]),
    ("deflected_in_flight", "Deflected requests without a first token", lambda node, now: node.deflected),
    ("incoming", "Requests to decode there that have not begun", lambda node, now: node.incoming),
    ("report_age_seconds", "Age of the last load report", lambda node, now: max(0.0, now - node.last_report_s)),
    ("breaker_state", "0 closed, 1 half-open, 2 open", lambda node, now: int(node.breaker.state(now))),
    (
        "step_time_drift",
        "Recent step times over what is reckoned with; NaN if nobody tells",
        lambda node, now: node.drift,
    ),
    ("step_time_scale", "Step times reckoned with over the profile's", lambda node, now: node.scale),
    ("prefill_tokens_difference", "Reported beyond the book", lambda node, now: node.prefill_correction),
    ("decodes_difference", "Reported beyond the book", lambda node, now: node.more_decodes.value),
    ("kv_tokens_difference", "Reported beyond the book", lambda node, now: node.more_kv.value),
)


def node_facts(node: Node, time_s: float) -> dict[str, object]:
    """One node, as GET /nodes shows it."""
    gauges = {name: value(node, time_s) for name, _, value in _GAUGES}
    state = "draining" if node.draining else "healthy" if gauges["healthy"] else "down" if not node.alive else "broken"
    source = node.report.source if node.report else "none"
    return {"url": node.spec.url, "role": node.spec.role, "state": state, "reports": source} | {
        name: round(value, 6) if math.isfinite(value) else None for name, value in gauges.items() if name != "healthy"
    }
