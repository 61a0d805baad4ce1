"""The load of a whole cluster in a few numbers, the same for every size: per-node features pooled over the nodes."""

import numpy as np

from deflector.envs.observation import Observation
from deflector.envs.schema import TOP, Cluster, Decode, Prefill, Schema

CLUSTER_FEATURES = (
    Cluster.TTFT_SLO,
    Cluster.TBT_SLO,
    Cluster.WORK_RATE_SHORT,
    Cluster.WORK_RATE_LONG,
    Cluster.DECODE_RATE,
    Cluster.PREFILL_NODES,
    Cluster.DECODE_NODES,
)
"""Taken as they are; the SLOs are those of the request at hand."""
PREFILL_FEATURES = (Prefill.AHEAD, Prefill.KV_USED)
"""Mean and maximum over the nodes that may prefill."""
DECODE_FEATURES = (
    Decode.BATCH_SHARE,
    Decode.KV_USED,
    Decode.INCOMING,
    Decode.DEFLECTED,
    Decode.WAIT,
    Decode.STEP,
)
"""Mean and maximum over the nodes that may decode."""

SUMMARY_NAMES = (
    *(feature.name.lower() for feature in CLUSTER_FEATURES),
    *(f"prefill_{feature.name.lower()}_{kind}" for kind in ("mean", "max") for feature in PREFILL_FEATURES),
    *(f"decode_{feature.name.lower()}_{kind}" for kind in ("mean", "max") for feature in DECODE_FEATURES),
)
"""What the numbers are, in order; their units are those of `deflector.envs.schema`."""


def summarise_load(seen: Observation, schema: Schema) -> Observation:
    """(len(SUMMARY_NAMES),) float32 in [0, TOP] of an observation that a schema describes."""
    rows = seen[len(Cluster) :]
    prefill = rows[: schema.prefill_nodes * len(Prefill)].reshape(-1, len(Prefill))
    decode = rows[schema.prefill_nodes * len(Prefill) :].reshape(-1, len(Decode))
    pooled = [seen[list(CLUSTER_FEATURES)]]
    pooled += _pooled(prefill[prefill[:, Prefill.PRESENT] > 0][:, PREFILL_FEATURES])
    pooled += _pooled(decode[decode[:, Decode.PRESENT] > 0][:, DECODE_FEATURES])
    return np.minimum(np.concatenate(pooled), TOP).astype(np.float32)


def _pooled(rows: Observation) -> list[Observation]:
    """Means and maxima of the columns; zeros where there is no row."""
    return [rows.sum(axis=0) / max(len(rows), 1), rows.max(axis=0, initial=0.0)]
