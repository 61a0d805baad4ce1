"""KV on its way from prefill to decode nodes: a set-up time, then links shared equally among the transfers on them."""

import numpy as np

from deflector.envs.cluster import NodeField
from deflector.envs.compiled import inner
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.layout import World
from deflector.envs.simulator.queues import node_base, slot_base, slot_base_f

_SETUP, _BYTES = int(NodeField.LINK_SETUP_S), int(NodeField.KV_BYTES_PER_TOKEN)
_OUT, _IN = int(NodeField.EGRESS_BYTES_PER_S), int(NodeField.INGRESS_BYTES_PER_S)


@inner
def start_transfer(w: World, slot: int, now_s: float) -> None:
    """Begins to pull a request's KV; its decode node has set the blocks aside."""
    sb, sf = slot_base(w.i, slot), slot_base_f(w.i, slot)
    w.i[sb + at.STAGE] = at.PULLING
    w.i[sb + at.PULL] = w.i[at.H_PULLS]
    w.i[at.H_PULLS] += 1
    w.i[sb + at.ON_WIRE] = 0
    w.f[sf + at.TRANSFER_START] = now_s
    due_s = now_s + w.nodes[w.i[sb + at.PREFILL_NODE], _SETUP]
    w.f[sf + at.TRANSFER_DUE] = due_s
    _set_entry(w, w.i[at.H_NUM_TRANSFERS], slot)
    w.i[at.H_NUM_TRANSFERS] += 1
    w.f[at.G_NEXT_TRANSFER] = min(w.f[at.G_NEXT_TRANSFER], due_s)


@inner
def due_transfer(w: World) -> int:
    """The slot whose set-up or wire phase ends next; of several, the one that started first."""
    for k in range(w.i[at.H_NUM_TRANSFERS]):
        slot = _entry(w, k)
        if w.f[slot_base_f(w.i, slot) + at.TRANSFER_DUE] == w.f[at.G_NEXT_TRANSFER]:
            return slot
    return -1


@inner
def enter_wire(w: World, slot: int, now_s: float) -> None:
    """Ends a transfer's set-up: it takes its share of the links from now on."""
    sb, sf = slot_base(w.i, slot), slot_base_f(w.i, slot)
    source, target = w.i[sb + at.PREFILL_NODE], w.i[sb + at.DECODE_NODE]
    w.i[sb + at.ON_WIRE] = 1
    w.f[sf + at.TRANSFER_LEFT] = (w.i[sb + at.PROMPT] - w.i[sb + at.LOCAL]) * w.nodes[source, _BYTES]
    w.f[sf + at.TRANSFER_RATE] = 0.0
    w.f[sf + at.TRANSFER_SEEN] = now_s
    _count_on_links(w, source, target, 1)
    _share_links(w, source, target, now_s)


@inner
def end_transfer(w: World, slot: int, now_s: float) -> None:
    """Takes a transfer off the links, arrived or dropped."""
    sb = slot_base(w.i, slot)
    source, target = w.i[sb + at.PREFILL_NODE], w.i[sb + at.DECODE_NODE]
    count = w.i[at.H_NUM_TRANSFERS] - 1
    k = 0
    while _entry(w, k) != slot:
        k += 1
    while k < count:
        _set_entry(w, k, _entry(w, k + 1))
        k += 1
    w.i[at.H_NUM_TRANSFERS] = count
    if w.i[sb + at.ON_WIRE]:
        w.i[sb + at.ON_WIRE] = 0
        _count_on_links(w, source, target, -1)
    _share_links(w, source, target, now_s)


@inner
def _count_on_links(w: World, source: int, target: int, change: int) -> None:
    w.i[node_base(w.i, source) + at.EGRESS] += change
    w.i[node_base(w.i, target) + at.INGRESS] += change


@inner
def _share_links(w: World, source: int, target: int, now_s: float) -> None:
    """Renews the rates of all transfers that share a link with one that has just come or gone."""
    next_s = np.inf
    for k in range(w.i[at.H_NUM_TRANSFERS]):
        slot = _entry(w, k)
        sb, sf = slot_base(w.i, slot), slot_base_f(w.i, slot)
        p, d = w.i[sb + at.PREFILL_NODE], w.i[sb + at.DECODE_NODE]
        if w.i[sb + at.ON_WIRE] and (p == source or d == target):
            passed_s = now_s - w.f[sf + at.TRANSFER_SEEN]
            w.f[sf + at.TRANSFER_LEFT] -= w.f[sf + at.TRANSFER_RATE] * passed_s
            outgoing = w.nodes[p, _OUT] / w.i[node_base(w.i, p) + at.EGRESS]
            incoming = w.nodes[d, _IN] / w.i[node_base(w.i, d) + at.INGRESS]
            w.f[sf + at.TRANSFER_RATE] = min(outgoing, incoming)
            w.f[sf + at.TRANSFER_SEEN] = now_s
            w.f[sf + at.TRANSFER_DUE] = now_s + max(w.f[sf + at.TRANSFER_LEFT], 0.0) / w.f[sf + at.TRANSFER_RATE]
        next_s = min(next_s, w.f[sf + at.TRANSFER_DUE])
    w.f[at.G_NEXT_TRANSFER] = next_s


@inner
def _entry(w: World, k: int) -> int:
    """The k-th transfer in order of start: the list lies across the slots, one entry in each."""
    return w.i[slot_base(w.i, k) + at.TRANSFER]


@inner
def _set_entry(w: World, k: int, slot: int) -> None:
    w.i[slot_base(w.i, k) + at.TRANSFER] = slot
