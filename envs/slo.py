"""What is promised to a request: its first token within a time, and no token later than another time after the last."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from deflector.envs.errors import InputError
from deflector.envs.workload import FloatArray, IntArray, Workload

_NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
_SPEC = re.compile(rf"(?P<seconds>{_NUMBER})(?:\s*\+\s*(?P<added>{_NUMBER})x)?|(?P<multiple>{_NUMBER})x")
_REMEDY = "write seconds such as 2.0, a multiple of the isolated prefill time such as 4x, or both such as 0.25+4x"


@dataclass(frozen=True, slots=True)
class SloSpec:
    """A TTFT promise: `seconds + multiple * (the prompt's prefill time on an idle node)`.

    Attributes:
        seconds: Part that every prompt gets, >= 0, in seconds.
        multiple: Factor on the isolated prefill time, >= 0. At least one of the two is > 0.
    """

    seconds: float = 0.0
    multiple: float = 0.0

    def __post_init__(self) -> None:
        """Refuses a promise that nothing could keep, or that is no number."""
        parts = (self.seconds, self.multiple)
        if not all(0 <= part < math.inf for part in parts) or not any(parts):
            raise InputError(f"TTFT SLO {self.seconds:g}+{self.multiple:g}x is not positive and finite: {_REMEDY}")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `2.0` (seconds), `4x` (multiple of the isolated prefill time), or `0.25+4x` (both).

        Raises:
            InputError: If the text is none of these, or the promise is 0 or infinite.
        """
        match = _SPEC.fullmatch(text.strip())
        if match is None:
            raise InputError(f"TTFT SLO {text!r} is not understood: {_REMEDY}")
        multiple = match["added"] or match["multiple"] or 0.0
        return cls(seconds=float(match["seconds"] or 0.0), multiple=float(multiple))

    def __str__(self) -> str:
        """The text that `parse` reads back."""
        parts = [f"{self.seconds!r}"] if self.seconds or not self.multiple else []
        return "+".join(parts + ([f"{self.multiple!r}x"] if self.multiple else []))


def attach_slo(
    workload: Workload,
    ttft: SloSpec,
    tbt_slo_s: float,
    isolated_prefill_s: Callable[[IntArray], FloatArray],
) -> Workload:
    """The same requests with both SLOs attached; every request keeps its class.

    Args:
        workload: Requests with or without SLOs; earlier ones are replaced.
        ttft: Promise on the time to the first token.
        tbt_slo_s: Promise on the time between tokens, in seconds.
        isolated_prefill_s: (num_requests,) prompt tokens -> (num_requests,) seconds that each prefill takes alone on an
            idle node, such as `lambda tokens: profile.isolated_prefill_s(tokens, budget_tokens)`.

    Raises:
        InputError: If an SLO is not positive and finite.
    """
    if not 0 < tbt_slo_s < math.inf:
        raise InputError(f"TBT SLO {tbt_slo_s}: give a positive number of seconds, such as 0.1")
    ttft_slo_s = np.full(len(workload), ttft.seconds)
    if ttft.multiple and len(workload):
        ttft_slo_s += ttft.multiple * np.asarray(isolated_prefill_s(workload.prompt_tokens), dtype=np.float64)
    if len(workload) and not 0 < ttft_slo_s.min() <= ttft_slo_s.max() < math.inf:
        raise InputError(f"TTFT SLO {ttft}: it comes out not positive and finite for some prompt: check the profile")
    return replace(workload, ttft_slo_s=ttft_slo_s, tbt_slo_s=np.full(len(workload), float(tbt_slo_s)))
