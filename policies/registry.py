"""Policies by name: `kairos`, `kairos:alpha=1.0,beta=0.5`, `prompt_threshold:tokens=1024`, `learned:PATH`."""

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from deflector.envs.errors import InputError
from deflector.envs.prices import PRICE, SPREAD, TRIAGE, TRIAGE_LATENESS
from deflector.envs.simulator.layout import FloatArray
from deflector.envs.state import CHUNK_CANDIDATES


@dataclass(frozen=True, slots=True)
class PolicyInfo:
    """One entry of the registry.

    Attributes:
        number: What compiled code knows it by (`decide.decide`); below 0 for a kind that is not analytical.
        parameters: Name -> (default, smallest, largest), in the order in which the core reads them.
        summary: One line.
        looks: Whether it reads more of the cluster's state than which nodes are up.
        kind: How it is carried out: `analytical` by the compiled cores, `learned` by a network, `planner` by
            simulation from what a router knows, `oracle` with the true future, in simulations only.
        base: The analytical policy that it builds on by default, a parameter of that name; empty if it takes none.
    """

    number: int
    parameters: dict[str, tuple[float, float, float]]
    summary: str
    looks: bool = True
    kind: str = "analytical"
    base: str = ""


SHIPPED = Path(__file__).with_name("pretrained")
"""Folder of the learned policy that comes with the package; its README.md is the model card."""

NEVER, ALWAYS, ROUND_ROBIN, LEAST_LOADED, PROMPT_THRESHOLD = range(5)
CONDITIONAL, KAIROS, LEAST_TTFT, SLO_PRICE, BY_TRIAGE = range(5, 10)

_LARGEST_CHUNK, _SMALLEST_CHUNK = CHUNK_CANDIDATES[0], CHUNK_CANDIDATES[-1]

POLICIES: dict[str, PolicyInfo] = {
    "never": PolicyInfo(NEVER, {}, "disaggregates always, by the paper's choice of prefill node"),
    "always": PolicyInfo(ALWAYS, {}, "deflects always, in the largest safe chunks"),
    "round_robin": PolicyInfo(ROUND_ROBIN, {}, "disaggregates, each pool in turn, load unseen", looks=False),
    "least_loaded": PolicyInfo(LEAST_LOADED, {}, "disaggregates to the shortest prefill queue and the smallest batch"),
    "prompt_threshold": PolicyInfo(
        PROMPT_THRESHOLD, {"tokens": (2048, 0, 1e9)}, "shorter prompts stay on the decode node (llm-d)"
    ),
    "conditional": PolicyInfo(
        CONDITIONAL,
        {"tokens": (2048, 0, 1e9), "busy_tokens": (8192, 0, 1e12), "decode_busy": (0.7, 0, 1)},
        "short prompts, or all prompts when prefill is busy, stay on a decode node with room (Dynamo)",
    ),
    "kairos": PolicyInfo(
        KAIROS,
        {"alpha": (1.3, 0, 1e6), "beta": (1.0, 0, 100), "cap": (_LARGEST_CHUNK, _SMALLEST_CHUNK, _LARGEST_CHUNK)},
        "the paper's rule, arXiv:2607.02043, Algorithm 1",
    ),
    "least_ttft": PolicyInfo(
        LEAST_TTFT, {"beta": (1.0, 0, 100)}, "least predicted TTFT over all pairs and deflections"
    ),
    "slo_price": PolicyInfo(
        SLO_PRICE,
        {
            "price": (PRICE, 0, 1e6),
            "spread": (SPREAD, 1e-3, 10),
            "beta": (0.9, 0.01, 10),
        },
        "least predicted SLO misses, the arriving request's and everybody else's",
    ),
    "triage": PolicyInfo(
        BY_TRIAGE,
        {
            "price": (PRICE, 0, 1e6),
            "spread": (SPREAD, 1e-3, 10),
            "beta": (0.9, 0.01, 10),
            "triage": (TRIAGE, 0, 1e6),
            "lateness": (TRIAGE_LATENESS, 0, 1e6),
        },
        "the same, and whoever would be late anyway joins a queue that is lost, to keep the others short",
    ),
    "learned": PolicyInfo(
        -1, {}, "a trained network: the one that comes along, or PATH, as deflector export wrote it", kind="learned"
    ),
    "lookahead": PolicyInfo(
        -1,
        {
            "budget_us": (500, 0, math.inf),
            "samples": (32, 1, 1000),
            "horizon_s": (1, 0, 60),
            "spread": (0.2, 0, 10),
            "doubt": (2, 0, 100),
        },
        "thinks ahead: plays routes on in futures like the recent past, the base deciding, while there is time",
        kind="planner",
        base="triage",
    ),
    "oracle_lookahead": PolicyInfo(
        -1,
        {"horizon_s": (2, 0, math.inf)},
        "knows the future: tries every action and plays on, the base deciding; simulations only",
        kind="oracle",
        base="slo_price",
    ),
}


@dataclass(frozen=True, slots=True)
class PolicySpec:
    """A name with its parameters.

    Attributes:
        name: Key of `POLICIES`.
        parameters: All of them, defaults filled in.
        path: Folder of a learned policy, `SHIPPED` if none is named; empty for all others.
        base: The analytical policy that it builds on; empty if it takes none.
    """

    name: str
    parameters: dict[str, float]
    path: str = ""
    base: str = ""

    @property
    def info(self) -> PolicyInfo:
        """The registry's entry."""
        return POLICIES[self.name]

    @property
    def vector(self) -> FloatArray:
        """The parameters in the core's order."""
        return np.array([self.parameters[key] for key in self.info.parameters], dtype=np.float64)


def parse_policy(text: str) -> PolicySpec:
    """Reads `name`, `name:key=value,key=value` or `learned:PATH`; a path may hold anything but a comma.

    `learned` alone is the policy that comes with the package.

    Raises:
        InputError: Saying what is allowed.
    """
    name, _, tail = text.strip().partition(":")
    if name not in POLICIES:
        near = difflib.get_close_matches(name, POLICIES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"unknown policy '{name}': {hint}known are {', '.join(POLICIES)}")
    if POLICIES[name].kind == "learned":
        path = str(SHIPPED) if text.strip() == name else _checked_path(text, tail.strip())
        return PolicySpec(name, {}, path=path)
    allowed, base = POLICIES[name].parameters, POLICIES[name].base
    values = {key: default for key, (default, _, _) in allowed.items()}
    for item in filter(None, (part.strip() for part in tail.split(","))):
        key, _, value = item.partition("=")
        if key == "base" and base:
            base = parse_analytical(value).name
            continue
        if key not in allowed:
            takes = ", ".join([*allowed, *(["base"] if base else [])]) or "none"
            raise InputError(f"policy '{text}': no parameter '{key}'; {name} takes {takes}")
        low, high = allowed[key][1:]
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not low <= number <= high:
            raise InputError(f"policy '{text}': {key} is a number from {low:g} to {high:g}, not '{value}'")
        values[key] = number
    return PolicySpec(name, values, base=base)


def parse_analytical(text: str) -> PolicySpec:
    """Reads `name` or `name:key=value,key=value` of one of the analytical rules.

    Raises:
        InputError: If it is none, or malformed.
    """
    spec = parse_policy(text)
    if spec.info.kind != "analytical":
        known = ", ".join(policy_names("analytical"))
        raise InputError(f"policy '{text}' is no analytical rule; those are {known}")
    return spec


def _checked_path(text: str, path: str) -> str:
    if not path:
        raise InputError(f"policy '{text}': name its folder, as in learned:my-policy: see deflector export --help")
    if "," in path:
        raise InputError(f"policy '{text}': a comma ends a policy's name: rename the folder, or name a link to it")
    return path


def split_policies(text: str) -> list[str]:
    """Splits `never,kairos:alpha=1.0,beta=0.5,least_ttft` into its three policies, each checked.

    A part that looks like `key=value` belongs to the policy before it; any other begins a new one. The files of a
    learned policy are not read.

    Raises:
        InputError: If one is unknown or malformed, or there is none.
    """
    specs: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        if specs and re.match(r"\w+=", part) and ":" in specs[-1]:
            specs[-1] += f",{part}"
        else:
            specs.append(part)
    if not specs:
        raise InputError(f"no policy given; known are {', '.join(POLICIES)}")
    for before, spec in pairwise(["", *specs]):
        if before.startswith("learned:") and spec.partition(":")[0] not in POLICIES:
            raise InputError(
                f"unknown policy '{spec}' after {before}, whose path ends at the comma: see deflector policies"
            )
        parse_policy(spec)
    return specs


def policy_names(kind: str | None = None) -> tuple[str, ...]:
    """All names, or those of one kind, in the registry's order."""
    return tuple(name for name, info in POLICIES.items() if kind in (None, info.kind))


def policy_labels(policies: Iterable[str]) -> dict[str, str]:
    """What tables call policies: of a learned one's path, as much of its end as tells it from the others."""
    specs = {text: parse_policy(text) for text in policies}
    ends = {text: Path(spec.path).parts or (spec.path,) for text, spec in specs.items() if text.startswith("learned:")}
    labels = {text: text for text in specs}
    for text, parts in ends.items():
        others = [other for other in ends.values() if other != parts]
        length = 1
        while length < len(parts) and any(other[-length:] == parts[-length:] for other in others):
            length += 1
        labels[text] = f"{specs[text].name}:{Path(*parts[-length:])}"
    return labels


def describe_policies() -> list[tuple[str, str, str]]:
    """(name, parameters with their defaults, one-line summary) of each policy."""
    described = []
    for name, info in POLICIES.items():
        parameters = [f"{key}={default:g}" for key, (default, _, _) in info.parameters.items()]
        parameters += [f"base={info.base}"] if info.base else []
        described.append((name, "[PATH]" if info.kind == "learned" else ", ".join(parameters), info.summary))
    return described
