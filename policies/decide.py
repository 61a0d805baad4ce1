"""The one compiled door to all analytical policies."""

from deflector.envs.compiled import inner
from deflector.policies import registry
from deflector.policies.kairos import kairos, never
from deflector.policies.least_ttft import least_ttft
from deflector.policies.question import Question
from deflector.policies.simple import always, conditional, least_loaded, prompt_threshold, round_robin
from deflector.policies.slo_price import slo_price

_NEVER, _ALWAYS, _ROUND_ROBIN, _LEAST_LOADED = (
    registry.NEVER, registry.ALWAYS, registry.ROUND_ROBIN, registry.LEAST_LOADED,
)  # fmt: skip
_PROMPT_THRESHOLD, _CONDITIONAL, _KAIROS, _LEAST_TTFT = (
    registry.PROMPT_THRESHOLD, registry.CONDITIONAL, registry.KAIROS, registry.LEAST_TTFT,
)  # fmt: skip


@inner
def decide(policy: int, q: Question) -> None:
    """Writes the decision of the policy with this number into `q.answer`."""
    if policy == _KAIROS:
        kairos(q)
    elif policy == _NEVER:
        never(q)
    elif policy == _ALWAYS:
        always(q)
    elif policy == _ROUND_ROBIN:
        round_robin(q)
    elif policy == _LEAST_LOADED:
        least_loaded(q)
    elif policy == _PROMPT_THRESHOLD:
        prompt_threshold(q)
    elif policy == _CONDITIONAL:
        conditional(q)
    elif policy == _LEAST_TTFT:
        least_ttft(q)
    else:
        slo_price(q)
