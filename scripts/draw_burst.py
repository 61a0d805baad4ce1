"""Draws one burst on 2P2D, never deflected and under the paper's rule: `python scripts/draw_burst.py` (docs/images)."""

from pathlib import Path

import numpy as np

from deflector.envs.backend import SimulatedBackend
from deflector.envs.cluster import parse_cluster
from deflector.envs.generators import generate
from deflector.envs.history import History
from deflector.envs.scenarios import with_slos
from deflector.envs.simulator import layout as at
from deflector.envs.slo import SloSpec
from deflector.envs.timeline import draw, new_figure
from deflector.policies.policy import make_policy

TARGET = Path(__file__).resolve().parent.parent / "docs" / "images" / "burst.png"
RUNS = {
    "Ordinary disaggregation": "never",
    "Deflection (the paper's rule)": "kairos",
}
CLUSTER, SHAPE, RATE_RPS, SEED = "2P2D", "high_prefill_low_decode", 8.0, 2
START_S, UNTIL_S = 6.0, 28.0


def main() -> None:
    """Plays the same requests under each policy and draws both runs."""
    spec = parse_cluster(CLUSTER)
    facts = spec.facts()
    load = generate(SHAPE, rate_rps=RATE_RPS, duration_s=UNTIL_S + 1.0, seed=SEED)
    load = with_slos(load, facts, SloSpec.parse("0.25+4x"), 0.1)
    histories = {title: History(facts, load) for title in RUNS}
    for title, name in RUNS.items():
        backend, policy = SimulatedBackend(spec, load), make_policy(name)
        while (question := backend.next_arrival()) is not None and question[0].now_s < UNTIL_S:
            backend.apply(policy.decide(*question))
            histories[title].follow(backend.world, int(backend.world.i[at.H_NEXT_ARRIVAL]))
    figure = new_figure(facts, runs=len(RUNS))
    draw(figure, histories, window_s=UNTIL_S - START_S)
    figure.savefig(TARGET, dpi=130)
    print(f"{TARGET}: {np.count_nonzero(load.arrival_s < UNTIL_S)} requests")


if __name__ == "__main__":
    main()
