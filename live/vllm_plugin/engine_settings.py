"""What `--additional-config` tells an engine's deflection; checked when the engine starts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deflector.envs.step_time import StepTimeProfile, load_profile

PREFIX = "deflector_"


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Of one engine.

    Attributes:
        profile: Its step times; without them *largest safe* takes the smallest chunk.
        max_deflected: Deflected requests that are prefilled at once, more wait; None: any number.
        tbt_budget_s: Longest step with a deflected chunk in it, whatever the request's rule; None: as the rule says.
        step_log: File of the step recorder; None: none.
        slowdown: Of an emulated engine: its steps take so many times as long as the profile says.
        slowdown_file: Of an emulated engine: a file with one more factor, read every second; none while it is missing.
        link_gb_per_s: Of an emulated engine: speed of its KV transfers.
    """

    profile: StepTimeProfile | None = None
    max_deflected: int | None = None
    tbt_budget_s: float | None = None
    step_log: str | None = None
    slowdown: float = 1.0
    slowdown_file: str | None = None
    link_gb_per_s: float = 7.8


def read_settings(config: object) -> EngineSettings:
    """Reads the keys `deflector_profile`, `deflector_max_deflected`, and so on; those of others are left alone.

    Raises:
        InputError: For a profile that is unknown or broken.
        ValueError: For another value that makes no sense, or an unknown key of ours.
    """
    given = config if isinstance(config, Mapping) else {}
    ours = {str(key).removeprefix(PREFIX): value for key, value in given.items() if str(key).startswith(PREFIX)}
    known = EngineSettings.__dataclass_fields__
    unknown = sorted(ours.keys() - known.keys())
    if unknown:
        raise ValueError(
            f"--additional-config {PREFIX}{unknown[0]}: known are {', '.join(PREFIX + key for key in known)}"
        )
    values: dict[str, Any] = {}
    for key, value in ours.items():
        if key == "profile":
            values[key] = load_profile(str(value))
        elif key in ("step_log", "slowdown_file"):
            values[key] = str(value)
        else:
            values[key] = _number(key, value)
    return EngineSettings(**values)


def _number(key: str, value: object) -> float | int:
    number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"--additional-config {PREFIX}{key} {value!r:.40}: give a positive number")
    if key == "max_deflected":
        if number != int(number):
            raise ValueError(f"--additional-config {PREFIX}{key} {value!r:.40}: give a whole number")
        return int(number)
    return number
