"""The numbers that an engine tells routers of itself, and how they get from its scheduler to its API server.

The scheduler runs in a process of its own. What it counts travels as integers in a dictionary of vLLM's own statistics
(`SchedulerStats.running_lora_adapters`, the only free-form field that survives the way), under keys of ours.
"""

from collections.abc import Mapping
from typing import Any

PREFIX = "deflector:"
VERSION = 1

COUNTED = (
    "time_us", "steps", "prefill_tokens", "decodes", "decode_kv_tokens", "kv_tokens_used", "kv_tokens_capacity",
    "running", "waiting", "pulling", "held", "deflected", "held_back", "step_us",
    "drift_ppm",
)  # fmt: skip
"""What the scheduler counts, all integers; docs/vllm-plugin.md says what each means."""

ADDED_UP = frozenset(COUNTED) - {"time_us", "step_us", "steps", "drift_ppm"}


def packed(counts: Mapping[str, int]) -> dict[str, int]:
    """The numbers as they travel."""
    return {PREFIX + name: int(value) for name, value in counts.items()}


def unpacked(travelled: Mapping[str, int]) -> dict[str, int]:
    """The numbers as they arrive; empty if none came along."""
    return {name.removeprefix(PREFIX): value for name, value in travelled.items() if name.startswith(PREFIX)}


def without_ours(travelled: Mapping[str, int]) -> dict[str, int]:
    """VLLM's own entries of the dictionary."""
    return {name: value for name, value in travelled.items() if not name.startswith(PREFIX)}


class LastState:
    """The last numbers of every engine core behind one API server."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._facts: dict[str, Any] = {}
        self._counts: dict[int, dict[str, int]] = {}
        self._own: dict[int, dict[str, float]] = {}

    def learn_facts(self, facts: Mapping[str, Any]) -> None:
        """What never changes: limits and the role."""
        self._facts.update(facts)

    def note(self, engine: int, counts: Mapping[str, int], own: Mapping[str, float]) -> None:
        """Takes what came with one step: our scheduler's counts, if it runs, and vLLM's own figures."""
        if counts:
            self._counts[engine] = dict(counts)
        self._own[engine] = dict(own)

    @property
    def counts(self) -> dict[str, int]:
        """Sums over the engine cores; the oldest time and the longest step."""
        cores = list(self._counts.values())
        if not cores:
            return {}
        summed = {name: sum(core.get(name, 0) for core in cores) for name in COUNTED if name in ADDED_UP}
        return summed | {
            "time_us": min(core["time_us"] for core in cores),
            "steps": sum(core["steps"] for core in cores),
            "step_us": max(core["step_us"] for core in cores),
            "drift_ppm": max(core.get("drift_ppm", 0) for core in cores),
        }

    def answer(self) -> dict[str, Any]:
        """What GET /deflector/state says: null for what this engine cannot tell."""
        counts = self.counts
        if not counts and not self._own and self._facts.get("scheduler") == "deflector":
            counts = dict.fromkeys(set(COUNTED) - {"kv_tokens_capacity"}, 0)  # It has not made a step yet.
        state: dict[str, Any] = {name: counts.get(name) for name in COUNTED if not name.endswith(("_us", "_ppm"))}
        own = list(self._own.values())
        if not counts and own:
            state["running"] = int(sum(core["running"] for core in own))
            state["waiting"] = int(sum(core["waiting"] for core in own))
            capacity = self._facts.get("kv_tokens_capacity")
            usage = sum(core["kv_usage"] for core in own) / len(own)
            state["kv_tokens_used"] = None if capacity is None else round(usage * capacity)
        time_us, step_us, drift_ppm = counts.get("time_us"), counts.get("step_us"), counts.get("drift_ppm")
        return {
            "version": VERSION,
            **state,
            **{name: value for name, value in self._facts.items() if state.get(name) is None},
            "time_s": time_us / 1e6 if time_us else None,
            "step_s": None if step_us is None else step_us / 1e6,
            "drift": drift_ppm / 1e6 if drift_ppm else None,
        }


LAST = LastState()
"""Of this process."""
