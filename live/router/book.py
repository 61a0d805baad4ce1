"""The router's own book: every request in flight, where it is, and what it takes there."""

import math
from dataclasses import dataclass, field
from enum import IntEnum

from deflector.live.router.nodes import Node


class Stage(IntEnum):
    """Where a request is on its way."""

    PREFILL = 0
    """At its prefill node."""
    PULL = 1
    """Prefilled; the decode node pulls its KV, or has yet to hear of it."""
    DEFLECTED = 2
    """Being prefilled where it will decode."""
    DECODE = 3
    """Its first token has been seen."""
    ENDED = 4


@dataclass(slots=True, eq=False)
class Flight:
    """One attempt of one request, from the decision to its end.

    Attributes:
        prompt_tokens: As well as the router knows.
        tbt_slo_s: Its TBT SLO.
        target: Where it decodes.
        source: Where it prefills, if that is elsewhere.
        stage: Where it is now.
        tokens: Output tokens seen.
    """

    prompt_tokens: float
    tbt_slo_s: float
    target: Node
    source: Node | None = None
    stage: Stage = field(default=Stage.DEFLECTED)
    tokens: int = 0

    def begin(self, now_s: float) -> None:
        """Enters it into the book; to be called as the decision falls, so that the next one knows of it."""
        self.target.requests += 1
        self.target.breaker.sent()
        if self.source is None:
            self.stage = Stage.DEFLECTED
            self.target.deflected += 1
            self._queue(self.target, now_s)
            return
        self.stage = Stage.PREFILL
        self.source.requests += 1
        self.source.breaker.sent()
        self._queue(self.source, now_s)
        self.target.incoming += 1
        self.target.incoming_tokens += self.prompt_tokens

    def prefilled(self) -> None:
        """The prefill node has answered: it holds the KV until the decode node has pulled it."""
        if self.source is not None and self.stage == Stage.PREFILL:
            self._dequeue(self.source)
            self.source.requests -= 1
            self.target.kv_tokens += self.prompt_tokens
            self.stage = Stage.PULL

    def first_token(self) -> None:
        """The decode node has answered."""
        target = self.target
        if self.stage == Stage.DEFLECTED:
            self._dequeue(target)
            target.deflected -= 1
        elif self.stage == Stage.PULL and self.source is not None:
            self.source.kv_tokens -= self.prompt_tokens
            self._arrive()
        else:
            return
        self.stage = Stage.DECODE
        target.decodes += 1
        target.decode_kv_tokens += self.prompt_tokens
        target.tbt_slos[self.tbt_slo_s] += 1
        target.strictest_tbt_slo_s = min(target.strictest_tbt_slo_s, self.tbt_slo_s)

    def more(self, tokens: int) -> None:
        """Output tokens have come."""
        self.tokens += tokens
        self.target.kv_tokens += tokens
        if self.stage == Stage.DECODE:
            self.target.decode_kv_tokens += tokens

    def end(self) -> None:
        """Takes it out of the book, wherever it is; a second call does nothing."""
        target, stage = self.target, self.stage
        if stage == Stage.ENDED:
            return
        self.stage = Stage.ENDED
        target.requests -= 1
        # Whoever probed a half-open breaker and left without a verdict makes room for the next one.
        target.breaker.abandoned()
        if self.source is not None:
            self.source.breaker.abandoned()
        if stage == Stage.PREFILL and self.source is not None:
            self._dequeue(self.source)
            self.source.requests -= 1
            self.source.kv_tokens -= self.prompt_tokens
            self._arrive()
            return
        if stage == Stage.PULL and self.source is not None:
            self.source.kv_tokens -= self.prompt_tokens
            self._arrive()
        elif stage == Stage.DEFLECTED:
            self._dequeue(target)
            target.deflected -= 1
        elif stage == Stage.DECODE:
            self._stop_decoding()
        target.kv_tokens -= self.prompt_tokens + self.tokens

    def _queue(self, node: Node, now_s: float) -> None:
        node.prompt_tokens_unfinished += self.prompt_tokens
        node.kv_tokens += self.prompt_tokens
        node.sent[self] = (now_s, self.prompt_tokens)

    def _dequeue(self, node: Node) -> None:
        node.prompt_tokens_unfinished -= self.prompt_tokens
        del node.sent[self]
        # What a report had taken off for computed tokens was mostly this one's: engines serve in order.
        if node.prefill_correction < 0:
            node.prefill_correction = min(0.0, node.prefill_correction + self.prompt_tokens)
        if not node.sent:
            node.prompt_tokens_unfinished = 0.0
            node.prefill_correction = max(0.0, node.prefill_correction)

    def _arrive(self) -> None:
        self.target.incoming -= 1
        self.target.incoming_tokens -= self.prompt_tokens

    def _stop_decoding(self) -> None:
        target = self.target
        target.decodes -= 1
        target.decode_kv_tokens -= self.prompt_tokens + self.tokens
        target.tbt_slos[self.tbt_slo_s] -= 1
        if not target.tbt_slos[self.tbt_slo_s]:
            del target.tbt_slos[self.tbt_slo_s]
            target.strictest_tbt_slo_s = min(target.tbt_slos, default=math.inf)
