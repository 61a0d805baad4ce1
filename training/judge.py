"""Verdicts on policies, from runs of `deflector evaluate`: what a policy gains, where it loses, and how sure that is.

Runs are paired: a policy and its rivals have played the same requests. Intervals are bootstrapped over runs, cell and
seed together, since a policy's damage sits in few of them; interquartile means would hide it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deflector.envs.errors import InputError
from deflector.policies.registry import parse_policy
from deflector.training.judged_runs import CellKey, FloatArray, JudgedRuns
from deflector.training.stats import CONFIDENCE, Interval

RESAMPLES = 10_000
WORST_SHARE = 0.1
LEAST_GAP = 0.01
"""A reference that knows the future and gains less shows no gap to close."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What is compared with what.

    Attributes:
        reference: Policy that gains are counted from.
        rivals: Analytical policies, of which the best in each cell is chosen with hindsight.
        oracle: Policy that knows the future; empty if none has played.
        decode_bound: Workloads in which decode binds; in all others prefill does.
    """

    reference: str
    rivals: tuple[str, ...]
    oracle: str
    decode_bound: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CellVerdict:
    """A candidate in one cell; attainments are means over seeds, changes of TTFT geometric means.

    Attributes:
        cell: Which.
        attainment: Its own.
        gain: Over the reference.
        regret: Behind the best rival, negative if ahead of it.
        best_rival: Which one that is.
        p95_change: Of the 95th percentile of TTFT against the reference, as a fraction; nan if a run has none.
        p99_change: The same of the 99th.
        deflected_share: Of its requests.
    """

    cell: CellKey
    attainment: float
    gain: float
    regret: float
    best_rival: str
    p95_change: float
    p99_change: float
    deflected_share: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """A candidate's figures; shares and fractions, not per cent.

    Attributes:
        candidate: Its name.
        gain: Mean attainment over the reference's in the suite's prefill-bound cells.
        gains: The same over each rival.
        worst_decile: Mean attainment of the worst tenth of those runs, and of the reference's worst tenth.
        p95_change: Geometric mean over those cells.
        p95_worse: Those cells in which the 95th percentile of TTFT is higher than the reference's.
        p99_worse: Those in which the 99th is more than a tenth higher.
        worst_change: Least gain over the reference in any cell of the suite.
        regret: Greatest regret in any cell of the suite.
        closed: Share closed of the gap between the best rival and the oracle, mean over cells with a gap; and the
            number of those cells. nan without any.
        decode_bound: Mean deflected share and mean loss against the best rival in the suite's decode-bound cells.
        kept: Group -> gain there as a share of the suite's, prefill-bound cells alone.
        cells: Every cell that it has played beside the reference and all rivals.
    """

    candidate: str
    gain: Interval
    gains: dict[str, Interval]
    worst_decile: tuple[float, float]
    p95_change: float
    p95_worse: tuple[CellKey, ...]
    p99_worse: tuple[CellKey, ...]
    worst_change: float
    regret: float
    closed: tuple[float, int]
    decode_bound: tuple[float, float]
    kept: dict[str, float]
    cells: tuple[CellVerdict, ...]


def judge(runs: JudgedRuns, candidate: str, rules: Rules) -> Verdict:
    """All figures of a candidate.

    Raises:
        InputError: If it has played no prefill-bound cell of the suite beside the reference and all rivals.
    """
    rivals = tuple(name for name in rules.rivals if name != candidate)
    needed = [candidate, rules.reference, *rivals]
    suite = runs.groups[0]
    bound = [cell for cell in runs.cells(suite, needed) if cell[2] not in rules.decode_bound]
    if not bound:
        raise InputError(f"{suite}: no prefill-bound cell has been played by all of {', '.join(needed)}")
    cells = [
        judge_cell(runs, cell, candidate, rules.reference, rivals)
        for g in runs.groups
        for cell in runs.cells(g, needed)
    ]
    by_key = {verdict.cell: verdict for verdict in cells}
    own = [by_key[cell] for cell in bound]
    in_suite = [verdict for verdict in cells if verdict.cell[0] == suite]
    decode_bound = [verdict for verdict in in_suite if verdict.cell[2] in rules.decode_bound]
    gains = {name: _gain(runs, bound, candidate, name) for name in (rules.reference, *rivals)}
    return Verdict(
        candidate,
        gains[rules.reference],
        {name: gains[name] for name in rivals},
        (_worst_decile(runs, bound, candidate), _worst_decile(runs, bound, rules.reference)),
        math.expm1(float(np.mean([math.log1p(v.p95_change) for v in own]))),
        tuple(v.cell for v in own if not v.p95_change <= 0.0),
        tuple(v.cell for v in own if not v.p99_change <= 0.1),
        min(v.gain for v in in_suite),
        max(v.regret for v in in_suite),
        _closed(runs, candidate, rivals, rules.oracle),
        (_mean([v.deflected_share for v in decode_bound]), _mean([v.regret for v in decode_bound])),
        _kept(runs, cells, rules, gains[rules.reference].estimate),
        tuple(cells),
    )


def judge_cell(runs: JudgedRuns, cell: CellKey, candidate: str, reference: str, rivals: Sequence[str]) -> CellVerdict:
    """A candidate in one cell."""
    names = list(dict.fromkeys([candidate, reference, *rivals]))
    attained = {name: float(x.mean()) for name, x in runs.paired(cell, names, "slo_attainment").items()}
    best = max(rivals or [reference], key=lambda name: attained[name])
    p95, p99 = (runs.paired(cell, [candidate, reference], figure) for figure in ("ttft_p95_s", "ttft_p99_s"))
    return CellVerdict(
        cell,
        attained[candidate],
        attained[candidate] - attained[reference],
        attained[best] - attained[candidate],
        best,
        _change(p95[candidate], p95[reference]),
        _change(p99[candidate], p99[reference]),
        float(runs.paired(cell, [candidate], "deflected_share")[candidate].mean()),
    )


def bootstrap(differences: FloatArray) -> Interval:
    """Mean of paired differences, one for each run, with its percentile interval; always the same resamples."""
    chosen = np.random.default_rng(0).integers(0, len(differences), (RESAMPLES, len(differences)))
    tails = [50.0 * (1.0 - CONFIDENCE), 50.0 * (1.0 + CONFIDENCE)]
    low, high = np.percentile(differences[chosen].mean(axis=1), tails)
    return Interval(float(differences.mean()), float(low), float(high))


def is_analytical(policy: str) -> bool:
    """Whether a name is one of the registry's rules."""
    return parse_policy(policy).info.kind == "analytical"


def _gain(runs: JudgedRuns, cells: Sequence[CellKey], candidate: str, other: str) -> Interval:
    pairs = [runs.paired(cell, [candidate, other], "slo_attainment") for cell in cells]
    return bootstrap(np.concatenate([pair[candidate] - pair[other] for pair in pairs]))


def _worst_decile(runs: JudgedRuns, cells: Sequence[CellKey], policy: str) -> float:
    values = np.sort(np.concatenate([runs.paired(cell, [policy], "slo_attainment")[policy] for cell in cells]))
    return float(values[: max(1, round(WORST_SHARE * len(values)))].mean())


def _change(values: FloatArray, reference: FloatArray) -> float:
    if not (
        np.isfinite(values).all() and np.isfinite(reference).all() and (values > 0).all() and (reference > 0).all()
    ):
        return math.nan
    return float(np.expm1(np.log(values / reference).mean()))


def _closed(runs: JudgedRuns, candidate: str, rivals: Sequence[str], oracle: str) -> tuple[float, int]:
    shares = []
    for cell, played in runs.figures.items():
        if not oracle or not rivals or not {candidate, oracle, *rivals} <= set(played):
            continue
        names = list(dict.fromkeys([candidate, oracle, *rivals]))
        attained = {name: float(x.mean()) for name, x in runs.paired(cell, names, "slo_attainment").items()}
        best = max(attained[name] for name in rivals)
        if attained[oracle] - best > LEAST_GAP:
            shares.append((attained[candidate] - best) / (attained[oracle] - best))
    return _mean(shares), len(shares)


def _kept(runs: JudgedRuns, cells: Sequence[CellVerdict], rules: Rules, suite_gain: float) -> dict[str, float]:
    kept = {}
    for group in runs.groups[1:]:
        gains = [v.gain for v in cells if v.cell[0] == group and v.cell[2] not in rules.decode_bound]
        if gains:
            kept[group] = _mean(gains) / suite_gain
    return kept


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan
