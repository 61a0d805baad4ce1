"""One engine's scheduler: what runs in the next step, and how long the step (or a leap of many) lasts.

Follows vLLM V1 0.32 (`Scheduler.schedule`); docs/simulator.md says it in words. A decode-only step whose batch cannot
change before its first finish is leapt over together with its successors: gaps then grow linearly with the KV.
"""

import numpy as np

from deflector.envs.cluster import NodeField
from deflector.envs.compiled import inner
from deflector.envs.simulator import layout as at
from deflector.envs.simulator.batch import join_decodes, preempt, starve
from deflector.envs.simulator.blocks import find_prefix, let_be_found, share_prefix, take_blocks
from deflector.envs.simulator.gaps import add_segment, begin_range, extend_segment, set_iterations
from deflector.envs.simulator.hashing import step_noise
from deflector.envs.simulator.layout import World
from deflector.envs.simulator.queues import (
    append,
    append_prefill,
    block_phases,
    blocks_for,
    mark_dirty,
    next_finish,
    node_base,
    node_base_f,
    set_step_end,
    slot_base,
    slot_base_f,
    unlink,
)
from deflector.envs.simulator.timing import decode_kv_growth, step_time
from deflector.envs.simulator.transfers import start_transfer
from deflector.envs.state import CHUNK_CANDIDATES, ChunkRule

_BUDGET, _MAX_SEQS = int(NodeField.MAX_BATCHED_TOKENS), int(NodeField.MAX_SEQS)
_PROFILE, _NOISE, _DRIFT = int(NodeField.PROFILE), int(NodeField.NOISE_SIGMA), int(NodeField.DRIFT_PER_S)
_RULE_NONE, _RULE_SAFE = int(ChunkRule.NONE), int(ChunkRule.LARGEST_SAFE)


@inner
def schedule(w: World, node: int, now_s: float) -> None:
    """Composes the node's next step and sets when it ends; the node has no step in progress."""
    nb, nf = node_base(w.i, node), node_base_f(node)
    budget = int(w.nodes[node, _BUDGET])
    needed = w.i[block_phases(w, node) + (w.i[nb + at.ITER] & ((1 << w.i[nb + at.BLOCK_SHIFT]) - 1))]
    walked = (
        w.i[nb + at.NUM_PREFILLS] > 0
        or w.i[nb + at.NUM_BROKEN] > 0
        or w.i[nb + at.BATCH] > budget
        or needed > w.i[nb + at.FREE_BLOCKS]
        or w.i[nb + at.POOL] > 0
    )
    chunk_tokens, q, preempted = 0, 0.0, False
    if walked:
        decodes, kv_tokens, regular, chunk_tokens, q, preempted = _walk_running(w, node, now_s)
    else:
        w.i[nb + at.FREE_BLOCKS] -= needed
        decodes, kv_tokens, regular = w.i[nb + at.BATCH], w.f[nf + at.KV], w.i[nb + at.COUNTED]
    joined = 0
    if not preempted and w.i[nb + at.WAIT_HEAD] + w.i[nb + at.READY_HEAD] > -2:
        kv_before = w.f[nf + at.KV]
        joined, chunk_tokens, q = _admit(w, node, now_s, budget - decodes - chunk_tokens, chunk_tokens, q)
        decodes += joined
        kv_tokens += w.f[nf + at.KV] - kv_before
    if decodes + chunk_tokens == 0:
        if preempted:
            mark_dirty(w, node)
        return

    steps = w.i[nb + at.STARTED]
    w.i[nb + at.STARTED] = steps + 1
    noise, drift = w.nodes[node, _NOISE], w.nodes[node, _DRIFT]
    factor = w.f[nf + at.SLOWNESS] * (1.0 + drift * now_s)
    if noise > 0:
        factor *= step_noise(w.i[at.H_SEED], node, steps, noise)
    profile = int(w.nodes[node, _PROFILE])
    step_s = factor * step_time(w.tables, profile, chunk_tokens, q, decodes, kv_tokens)
    count, growth_s = 1, 0.0
    leaps = chunk_tokens == 0 and not walked and noise == 0 and drift == 0
    if leaps:
        count = _leap_length(w, node)
        growth_s = factor * decode_kv_growth(w.tables, profile, decodes)
    w.f[nf + at.STEP_START], w.f[nf + at.STEP_TIME], w.f[nf + at.STEP_GROWTH] = now_s, step_s, growth_s
    w.i[nb + at.BUSY], w.i[nb + at.STEPS], w.i[nb + at.STEP_DECODES] = 1, count, decodes
    if leaps and joined == 0 and w.i[nb + at.SEGMENT_OPEN]:
        extend_segment(w, node, count)
    elif decodes > 0:
        add_segment(w, node, count, step_s, growth_s, regular, w.i[nb + at.COUNTED])
        w.i[nb + at.SEGMENT_OPEN] = leaps
        if joined > 0:
            _mark_first_tokens(w, node, now_s + step_s)
        if w.i[nb + at.NUM_BROKEN] > 0:
            _mend_broken(w, node, now_s + step_s)
    set_step_end(w, node, step_end(w, node, count))


@inner
def step_end(w: World, node: int, steps: int) -> float:
    """When the first `steps` iterations of the node's leap end."""
    nf = node_base_f(node)
    growth_s = w.f[nf + at.STEP_GROWTH] * (0.5 * steps * (steps - 1))
    return w.f[nf + at.STEP_START] + steps * w.f[nf + at.STEP_TIME] + growth_s


@inner
def steps_ended(w: World, node: int, now_s: float) -> int:
    """Iterations of the node's leap that have ended by now (at the latest)."""
    nf = node_base_f(node)
    passed_s = now_s - w.f[nf + at.STEP_START]
    linear_s = w.f[nf + at.STEP_TIME] - 0.5 * w.f[nf + at.STEP_GROWTH]
    steps = int(2.0 * passed_s / (linear_s + np.sqrt(linear_s * linear_s + 2.0 * w.f[nf + at.STEP_GROWTH] * passed_s)))
    while step_end(w, node, steps + 1) <= now_s:
        steps += 1
    while steps > 0 and step_end(w, node, steps) > now_s:
        steps -= 1
    return steps


@inner
def cut_leap(w: World, node: int, now_s: float) -> None:
    """Ends the node's leap with the iteration in progress, because something has changed."""
    nb = node_base(w.i, node)
    if w.i[nb + at.STEPS] <= 1:
        return
    steps = steps_ended(w, node, now_s)
    if steps == 0 or step_end(w, node, steps) < now_s:
        steps += 1
    if steps < w.i[nb + at.STEPS]:
        w.i[nb + at.STEPS] = steps
        set_iterations(w, node, steps)
        set_step_end(w, node, step_end(w, node, steps))


@inner
def blocks_taken(w: World, node: int, first: int, count: int) -> int:
    """Blocks that the node's decodes take in `count` iterations from its `first` after the present one."""
    nb = node_base(w.i, node)
    shift = w.i[nb + at.BLOCK_SHIFT]
    mask = (1 << shift) - 1
    phases = block_phases(w, node)
    taken = w.i[nb + at.BATCH] * (count >> shift)
    start = w.i[nb + at.ITER] + first
    for k in range(count & mask):
        taken += w.i[phases + ((start + k) & mask)]
    return taken


@inner
def _leap_length(w: World, node: int) -> int:
    """Iterations until the first finish, or until the blocks run out."""
    nb = node_base(w.i, node)
    count = next_finish(w, node) - w.i[nb + at.ITER]
    free = w.i[nb + at.FREE_BLOCKS]
    shift = w.i[nb + at.BLOCK_SHIFT]
    if w.i[nb + at.BATCH] * (((count - 1) >> shift) + 1) <= free:
        return count
    if blocks_taken(w, node, 1, count - 1) <= free:
        return count
    cycles = free // w.i[nb + at.BATCH]
    count = 1 + (cycles << shift)
    left = free - cycles * w.i[nb + at.BATCH]
    phases, mask = block_phases(w, node), (1 << shift) - 1
    while w.i[phases + ((w.i[nb + at.ITER] + count) & mask)] <= left:
        left -= w.i[phases + ((w.i[nb + at.ITER] + count) & mask)]
        count += 1
    return count


@inner
def _walk_running(w: World, node: int, now_s: float) -> tuple[int, float, int, int, float, bool]:
    """Schedules the running requests one by one, preempting from the end where blocks are short.

    Returns:
        Decodes scheduled, their KV tokens, how many of them are counted and regular, chunk tokens, q, any preempted.
    """
    nb = node_base(w.i, node)
    mask = (1 << w.i[nb + at.BLOCK_SHIFT]) - 1
    budget = int(w.nodes[node, _BUDGET])
    decodes, kv_tokens, regular, chunk_tokens, q, preempted = 0, 0.0, 0, 0, 0.0, False
    slot = w.i[nb + at.RUN_HEAD]
    while slot >= 0 and budget > 0:
        sb = slot_base(w.i, slot)
        decoding = w.i[sb + at.STAGE] == at.DECODING
        if decoding:
            computed = w.i[sb + at.OFFSET] + w.i[nb + at.ITER]
            tokens = 1
            needed = 1 if computed & mask == 0 else 0
        else:
            computed = w.i[sb + at.COMPUTED]
            tokens = _chunk_for(w, node, slot, min(w.i[sb + at.TARGET] - computed, budget), chunk_tokens, q)
            needed = blocks_for(w, node, computed + tokens) - w.i[sb + at.HELD]
        lost_itself = False
        while w.i[nb + at.FREE_BLOCKS] < needed and not lost_itself:
            lost_itself = w.i[nb + at.RUN_TAIL] == slot
            preempt(w, node, w.i[nb + at.RUN_TAIL], now_s)
            preempted = True
        if lost_itself:
            slot = -1
            break
        take_blocks(w, node, slot, needed)
        let_be_found(w, node, slot, computed + tokens)
        budget -= tokens
        if decoding:
            decodes += 1
            kv_tokens += computed
            if w.i[sb + at.BROKEN] == 0:
                regular += w.i[sb + at.IS_COUNTED]
            else:
                w.i[sb + at.BROKEN] = 2
        else:
            _use_chunk(w, slot, tokens, needed)
            chunk_tokens += tokens
            q += tokens * (computed + 0.5 * tokens)
        slot = w.i[sb + at.NEXT]
    while slot >= 0:
        starve(w, node, slot, now_s)
        slot = w.i[slot_base(w.i, slot) + at.NEXT]
    return decodes, kv_tokens, regular, chunk_tokens, q, preempted


@inner
def _admit(w: World, node: int, now_s: float, budget: int, chunk_tokens: int, q: float) -> tuple[int, int, float]:
    """Admits waiting requests; returns decodes that joined, chunk tokens and q of the step so far."""
    nb = node_base(w.i, node)
    joined = 0
    most = int(w.nodes[node, _MAX_SEQS])
    while budget > 0 and w.i[nb + at.NUM_RUNNING] < most:
        slot = w.i[nb + at.READY_HEAD]
        if slot >= 0:
            unlink(w, node, at.READY_HEAD, slot)
            sb = slot_base(w.i, slot)
            let_be_found(w, node, slot, w.i[sb + at.PROMPT])
            join_decodes(w, node, slot, w.i[sb + at.PROMPT] - 1, w.i[sb + at.OUTPUT])
            w.i[nb + at.INCOMING] -= 1
            w.i[nb + at.INCOMING_PROMPTS] -= w.i[sb + at.PROMPT]
            budget -= 1
            joined += 1
        else:
            slot = w.i[nb + at.WAIT_HEAD]
            if slot < 0:
                break
            sb = slot_base(w.i, slot)
            pulls = w.i[sb + at.STAGE] == at.HANDOFF
            known = w.i[sb + at.PROMPT] if pulls else w.i[sb + at.TARGET]
            found, found_free = find_prefix(w, node, slot, known)
            promised = _blocks_promised(w, node) if pulls else 0
            if blocks_for(w, node, known) - found + found_free > w.i[nb + at.FREE_BLOCKS] - promised:
                break
            unlink(w, node, at.WAIT_HEAD, slot)
            share_prefix(w, node, slot, found)
            computed = found << w.i[nb + at.BLOCK_SHIFT]
            if pulls:
                take_blocks(w, node, slot, blocks_for(w, node, known) - found)
                w.i[sb + at.LOCAL] = computed
                start_transfer(w, slot, now_s)
                continue
            w.i[sb + at.COMPUTED], w.i[sb + at.HELD] = computed, found
            w.i[nb + at.PREFILL_TOKENS] -= computed
            tokens = _chunk_for(w, node, slot, min(known - computed, budget), chunk_tokens, q)
            needed = blocks_for(w, node, computed + tokens) - found
            take_blocks(w, node, slot, needed)
            let_be_found(w, node, slot, computed + tokens)
            append_prefill(w, node, slot)
            w.i[sb + at.STAGE] = at.PREFILLING
            _use_chunk(w, slot, tokens, needed)
            sf = slot_base_f(w.i, slot)
            if np.isnan(w.f[sf + at.FIRST_CHUNK]):
                w.f[sf + at.FIRST_CHUNK] = now_s
            budget -= tokens
            chunk_tokens += tokens
            q += tokens * (computed + 0.5 * tokens)
        append(w, node, at.RUN_HEAD, slot)
        w.i[nb + at.NUM_RUNNING] += 1
        w.i[sb + at.ADMIT_ITER] = w.i[nb + at.ITER]
    return joined, chunk_tokens, q


@inner
def _blocks_promised(w: World, node: int) -> int:
    """Blocks that the running prefills still need for their whole prompts."""
    promised = 0
    slot = w.i[node_base(w.i, node) + at.PREFILL_HEAD]
    while slot >= 0:
        sb = slot_base(w.i, slot)
        promised += blocks_for(w, node, w.i[sb + at.TARGET]) - w.i[sb + at.HELD]
        slot = w.i[sb + at.PREFILL_NEXT]
    return promised


@inner
def _chunk_for(w: World, node: int, slot: int, tokens: int, chunk_tokens: int, q: float) -> int:
    """Shortens the next chunk of a prefill to what its chunk rule allows in this step."""
    sb = slot_base(w.i, slot)
    rule = w.i[sb + at.RULE]
    if rule == _RULE_NONE:
        return tokens
    if rule != _RULE_SAFE:
        return min(tokens, w.i[sb + at.RUNS + 2 * w.i[sb + at.RUN_INDEX]])
    limit_s = w.f[slot_base_f(w.i, slot) + at.TBT_BUDGET]
    profile = int(w.nodes[node, _PROFILE])
    batch, kv_tokens = w.i[node_base(w.i, node) + at.BATCH], w.f[node_base_f(node) + at.KV]
    chunk = tokens
    for candidate in CHUNK_CANDIDATES:
        chunk = min(tokens, candidate)
        added_q = chunk * (w.i[sb + at.COMPUTED] + 0.5 * chunk)
        if step_time(w.tables, profile, chunk_tokens + chunk, q + added_q, batch, kv_tokens) <= limit_s:
            break
    return chunk


@inner
def _use_chunk(w: World, slot: int, tokens: int, blocks: int) -> None:
    """Books a chunk for this step and moves the request's chunk schedule on."""
    sb = slot_base(w.i, slot)
    w.i[sb + at.CHUNK] = tokens
    w.i[sb + at.HELD] += blocks
    w.i[sb + at.RUN_STEPS] += 1
    run = w.i[sb + at.RUN_INDEX]
    if run < 7 and w.i[sb + at.RUN_STEPS] >= w.i[sb + at.RUNS + 2 * run + 1] and w.i[sb + at.RUNS + 2 * run + 2] > 0:
        w.i[sb + at.RUN_INDEX] = run + 1
        w.i[sb + at.RUN_STEPS] = 0


@inner
def _mark_first_tokens(w: World, node: int, token_s: float) -> None:
    """Notes the first token of the pulled requests that joined in this step; its iteration is no gap of theirs."""
    nb = node_base(w.i, node)
    slot = w.i[nb + at.RUN_TAIL]
    while slot >= 0:
        sb = slot_base(w.i, slot)
        if w.i[sb + at.ADMIT_ITER] != w.i[nb + at.ITER]:
            return
        if w.i[sb + at.STAGE] == at.DECODING:
            w.f[slot_base_f(w.i, slot) + at.FIRST_TOKEN] = token_s
            w.i[sb + at.RANGE_STOP] = w.i[nb + at.SEGMENT]
            w.i[sb + at.RANGE_SKIP] = 1
        slot = w.i[sb + at.PREV]


@inner
def _mend_broken(w: World, node: int, token_s: float) -> None:
    """Closes the irregular gap of starved decodes that are scheduled again."""
    nb = node_base(w.i, node)
    slot = w.i[nb + at.RUN_HEAD]
    while slot >= 0:
        sb = slot_base(w.i, slot)
        if w.i[sb + at.BROKEN] == 2:
            begin_range(w, node, slot, token_s)
            w.i[sb + at.BROKEN] = 0
            w.i[nb + at.NUM_BROKEN] -= 1
        slot = w.i[sb + at.NEXT]
