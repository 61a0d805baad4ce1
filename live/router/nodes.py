"""One engine as the router knows it: its breaker, what is booked on it, and what it reports of itself."""

import asyncio
import math
from collections import Counter
from dataclasses import dataclass
from enum import IntEnum
from urllib.parse import urlsplit

from yarl import URL

from deflector.live.router.config import LiveNode
from deflector.live.router.http_client import Address

FAILURES_TO_OPEN = 3
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0


class Breaker:
    """Keeps requests away from a node that fails, and lets one through now and then to see whether it still does."""

    class State(IntEnum):
        """As exported."""

        CLOSED = 0
        HALF_OPEN = 1
        OPEN = 2

    def __init__(self) -> None:
        """Closed."""
        self.failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._open_until_s = -math.inf
        self._probing = False

    def state(self, now_s: float) -> State:
        """Closed, open, or half-open: the pause is over and nothing has come through yet."""
        if self.failures < FAILURES_TO_OPEN:
            return Breaker.State.CLOSED
        return Breaker.State.OPEN if now_s < self._open_until_s else Breaker.State.HALF_OPEN

    def lets_through(self, now_s: float) -> bool:
        """Whether a request may go to the node now; half-open, one at a time."""
        if self.failures < FAILURES_TO_OPEN:
            return True
        return now_s >= self._open_until_s and not self._probing

    def sent(self) -> None:
        """A request goes there."""
        self._probing = self.failures >= FAILURES_TO_OPEN

    def succeeded(self) -> None:
        """It came back sound."""
        self.failures, self._pause_s, self._probing = 0, FIRST_PAUSE_S, False

    def failed(self, now_s: float) -> None:
        """It did not, and that was the node's fault."""
        self.failures += 1
        if self.failures >= FAILURES_TO_OPEN and now_s >= self._open_until_s:
            self._open_until_s = now_s + self._pause_s
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        self._probing = False

    def abandoned(self) -> None:
        """No verdict, or none yet: another request may probe."""
        self._probing = False


@dataclass(frozen=True, slots=True)
class Report:
    """What an engine says of itself.

    Attributes:
        counted_s: When the engine counted, on the router's monotonic clock.
        prefill_tokens: Prompt tokens still to compute; None where no plugin tells.
        decodes: Sequences that decode; None where no plugin tells.
        decode_kv_tokens: KV tokens that they hold; None where no plugin tells.
        kv_tokens_used: KV tokens taken by anything; None if not told.
        requests: Running and waiting; None if not told.
        source: `plugin`, or `metrics` for vLLM's own.
        drift: How many times as long as by its profile its recent steps took; None if not told.
        profile: Which profile that is; None if not told.
    """

    counted_s: float
    prefill_tokens: float | None
    decodes: float | None
    decode_kv_tokens: float | None
    kv_tokens_used: float | None
    requests: float | None
    source: str
    drift: float | None = None
    profile: str | None = None


class Correction:
    """What reports say beyond the book, where they say so twice: a single difference is mostly news under way."""

    __slots__ = ("_last", "value")

    def __init__(self) -> None:
        """None yet."""
        self.value = self._last = 0.0

    def note(self, difference: float) -> None:
        """Takes the difference of one report: reported minus booked."""
        same_side = difference * self._last > 0
        self.value = math.copysign(min(abs(difference), abs(self._last)), difference) if same_side else 0.0
        self._last = difference


class Leg:
    """One request on its way to one node and back.

    Attributes:
        deadline_s: By when something must come from the node, or the client must have taken what it was sent.
        waits_for_client: Which of the two.
        expired: Why it was ended; empty while it was not.
    """

    __slots__ = ("_scope", "deadline_s", "expired", "waits_for_client")

    def __init__(self, scope: asyncio.Timeout, deadline_s: float) -> None:
        """Ends `scope` when it expires."""
        self._scope, self.deadline_s, self.expired, self.waits_for_client = scope, deadline_s, "", False

    def expire(self, why: str) -> None:
        """Ends the leg now, wherever it waits."""
        if not self.expired:
            self.expired = why
            self._scope.reschedule(asyncio.get_running_loop().time())


class Node:
    """One engine.

    Booked numbers count this router's requests alone; corrections are what reports add to them. All are in tokens.
    """

    def __init__(self, spec: LiveNode, now_s: float) -> None:
        """Begins with nothing in flight, and taken for healthy until a check says otherwise."""
        parts = urlsplit(spec.url)
        self.spec = spec
        self.name = parts.netloc
        self.address = Address(spec.url)
        self._urls: dict[str, URL] = {}
        self.breaker = Breaker()
        self.alive, self.draining, self.removed = True, False, False
        self.model = ""
        self.report: Report | None = None
        self.last_report_s = self.last_sign_s = now_s
        self.legs: set[Leg] = set()
        self.requests = 0
        self.prompt_tokens_unfinished = 0.0
        self.sent: dict[object, tuple[float, float]] = {}
        self.prefill_correction = 0.0
        self.decodes = 0
        self.decode_kv_tokens = 0.0
        self.kv_tokens = 0.0
        self.incoming, self.incoming_tokens = 0, 0.0
        self.deflected = 0
        self.tbt_slos: Counter[float] = Counter()
        self.strictest_tbt_slo_s = math.inf
        self.scale = 1.0
        self.more_decodes, self.more_decode_kv, self.more_kv = Correction(), Correction(), Correction()

    def url(self, path: str) -> URL:
        """The address of one of its endpoints, parsed once."""
        found = self._urls.get(path)
        if found is None:
            found = self._urls[path] = URL(self.spec.url + path)
        return found

    def takes_requests(self, now_s: float) -> bool:
        """Whether a policy may send it something new."""
        return self.alive and not self.draining and not self.removed and self.breaker.lets_through(now_s)

    @property
    def prefill_tokens_ahead(self) -> float:
        """Prompt tokens still to prefill, as well as the book and the last report together can tell."""
        return max(0.0, self.prompt_tokens_unfinished + self.prefill_correction)

    def row(self, now_s: float) -> tuple[float, ...]:
        """Its column of `ClusterState.rows`, in the order of `StateRow`."""
        decodes = max(0.0, self.decodes + self.more_decodes.value)
        return (
            1.0 if self.takes_requests(now_s) else 0.0,
            self.prefill_tokens_ahead,
            decodes,
            max(0.0, self.decode_kv_tokens + self.more_decode_kv.value) if decodes else 0.0,
            max(0.0, self.kv_tokens + self.more_kv.value),
            self.incoming,
            self.incoming_tokens,
            self.deflected,
            self.strictest_tbt_slo_s if self.decodes else math.inf,
            max(0.0, now_s - self.last_report_s),
        )

    @property
    def drift(self) -> float:
        """How many times as long as the router reckons its recent steps took; nan where nobody tells."""
        report = self.report
        if report is None or report.drift is None or report.profile not in (None, self.spec.profile):
            return math.nan
        return report.drift / self.scale

    def take(self, report: Report) -> None:
        """Corrects the book by what the engine says."""
        self.report, self.last_report_s = report, report.counted_s
        if report.prefill_tokens is not None:
            unseen = sum(tokens for sent_s, tokens in self.sent.values() if sent_s > report.counted_s)
            self.prefill_correction = report.prefill_tokens - (self.prompt_tokens_unfinished - unseen)
        if report.decodes is not None:
            self.more_decodes.note(report.decodes - self.decodes)
        elif report.requests is not None:
            self.more_decodes.note(max(0.0, report.requests - self.requests))
        if report.decode_kv_tokens is not None:
            self.more_decode_kv.note(report.decode_kv_tokens - self.decode_kv_tokens)
        if report.kv_tokens_used is not None:
            self.more_kv.note(report.kv_tokens_used - self.kv_tokens)

    def fail_legs(self, why: str) -> None:
        """Ends every request that waits for it: it will not answer any more."""
        for leg in list(self.legs):
            leg.expire(why)
