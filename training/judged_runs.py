"""Runs of several evaluations, read from what `deflector evaluate --json` has written, and put side by side."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deflector.envs.errors import InputError

FloatArray = npt.NDArray[np.float64]
CellKey = tuple[str, str, str, float]
"""(group, cluster, workload, load): the group is the file's name without its ending."""

FIGURES = ("slo_attainment", "ttft_p95_s", "ttft_p99_s", "deflected_share")


@dataclass(frozen=True, slots=True)
class JudgedRuns:
    """Figures by cell, policy and seed.

    Attributes:
        groups: Names of the files, the first being the suite.
        figures: Cell -> policy -> seed -> the FIGURES.
    """

    groups: tuple[str, ...]
    figures: dict[CellKey, dict[str, dict[int, tuple[float, ...]]]]

    @property
    def policies(self) -> list[str]:
        """All that occur, in the order of the files."""
        return list(dict.fromkeys(policy for runs in self.figures.values() for policy in runs))

    def cells(self, group: str, policies: Iterable[str]) -> list[CellKey]:
        """Cells of a group that all these policies have played."""
        wanted = set(policies)
        return [cell for cell, runs in self.figures.items() if cell[0] == group and wanted <= set(runs)]

    def paired(self, cell: CellKey, policies: Iterable[str], figure: str) -> dict[str, FloatArray]:
        """Policy -> (seeds,) of one figure, on the seeds that all of them have played."""
        runs, place = self.figures[cell], FIGURES.index(figure)
        names = list(policies)
        seeds = sorted(set.intersection(*(set(runs[name]) for name in names)))
        if not seeds:
            raise InputError(f"{cell[0]}: {', '.join(names)} share no seed in {cell[1]} {cell[2]} at load {cell[3]:g}")
        return {name: np.array([runs[name][seed][place] for seed in seeds]) for name in names}


def read_runs(paths: Iterable[str]) -> JudgedRuns:
    """Reads files of `deflector evaluate --json`; two files of the same name are one group.

    Raises:
        InputError: If one is none, or there is none.
    """
    groups: list[str] = []
    figures: dict[CellKey, dict[str, dict[int, tuple[float, ...]]]] = {}
    for path in paths:
        group = Path(path).stem
        groups.append(group)
        for row in _rows(path):
            try:
                load = row["load"] if row["load"] is not None else row["rate_rps"]
                cell = (group, str(row["cluster"]), Path(str(row["workload"])).name, float(load))
                values = tuple(math.inf if row[name] is None else float(row[name]) for name in FIGURES)
                figures.setdefault(cell, {}).setdefault(str(row["policy"]), {})[int(row["seed"])] = values
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(
                    f"{path}: a cell lacks {error}: write it anew with deflector evaluate --json"
                ) from error
    if not figures:
        raise InputError("no runs to judge: name a file of deflector evaluate --json")
    return JudgedRuns(tuple(dict.fromkeys(groups)), figures)


def _rows(path: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: cannot read it ({error.strerror}): name a file of deflector evaluate --json"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: this is no JSON ({error}): name a file of deflector evaluate --json") from error
    if not isinstance(found, dict) or found.get("command") != "evaluate" or not isinstance(found.get("cells"), list):
        raise InputError(f"{path}: not written by deflector evaluate --json: name another file")
    rows: list[dict[str, Any]] = found["cells"]
    return rows
