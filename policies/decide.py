"""The one compiled door to all analytical policies."""

from deflector.envs.compiled import inner
from deflector.envs.question import Question
from deflector.policies import registry
from deflector.policies.kairos import kairos, never
from deflector.policies.least_ttft import least_ttft
from deflector.policies.simple import always, conditional, least_loaded, prompt_threshold, round_robin
from deflector.policies.slo_price import slo_price, triage


@inner
def decide(policy: int, q: Question) -> None:
    """Writes the decision of the policy with this number into `q.answer`."""
    if policy == registry.KAIROS:
        kairos(q)
    elif policy == registry.NEVER:
        never(q)
    elif policy == registry.ALWAYS:
        always(q)
    elif policy == registry.ROUND_ROBIN:
        round_robin(q)
    elif policy == registry.LEAST_LOADED:
        least_loaded(q)
    elif policy == registry.PROMPT_THRESHOLD:
        prompt_threshold(q)
    elif policy == registry.CONDITIONAL:
        conditional(q)
    elif policy == registry.LEAST_TTFT:
        least_ttft(q)
    elif policy == registry.SLO_PRICE:
        slo_price(q)
    else:
        triage(q)
