"""What vLLM did otherwise before the version that the simulator follows, undone: all else has to agree.

Two things in 0.19: a request whose KV is to be pulled was admitted without regard to the blocks that running prefills
still need, and freed blocks without contents went to the tail of the free queue instead of its front.
"""

from collections.abc import Iterable
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.sched.scheduler import Scheduler

RESERVES_BLOCKS = hasattr(Scheduler, "_inflight_prefill_reserved_blocks")
REUSES_EMPTY_BLOCKS_FIRST = "cached_block_hashes_by_block" in BlockPool.__init__.__code__.co_names


def as_newer(engine: Any) -> None:
    """Makes an engine's scheduler do as the newer vLLM does; changes nothing in a newer one."""
    if not RESERVES_BLOCKS:
        _reserve_blocks(engine)
    if not REUSES_EMPTY_BLOCKS_FIRST:
        pool = engine.scheduler.kv_cache_manager.block_pool
        pool.free_blocks = lambda blocks: _free_blocks(pool, blocks)


def _reserve_blocks(engine: Any) -> None:
    manager = engine.scheduler.kv_cache_manager
    fits_alone = manager.can_fit_full_sequence

    def fits(request: Any, **known: Any) -> bool:
        if not fits_alone(request, **known) or not (request.kv_transfer_params or {}).get("do_remote_prefill"):
            return bool(fits_alone(request, **known))
        hits = known["new_computed_blocks"].blocks[0]
        needed = _blocks_for(engine, request) - len(hits) + sum(block.ref_cnt == 0 for block in hits)
        return bool(needed <= engine.free_blocks - _promised_blocks(engine))

    manager.can_fit_full_sequence = fits


def _blocks_for(engine: Any, request: Any) -> int:
    return -(-request.num_tokens // engine.block_size)


def _promised_blocks(engine: Any) -> int:
    """What the running prefills still need."""
    manager = engine.scheduler.kv_cache_manager
    prefills = [
        request
        for request in engine.scheduler.running
        if request.request_id not in engine.decoding and not engine.is_pulled(request)
    ]
    return sum(_blocks_for(engine, each) - len(manager.get_blocks(each.request_id).blocks[0]) for each in prefills)


def _free_blocks(pool: Any, blocks: Iterable[Any]) -> None:
    queue, empty, full = pool.free_block_queue, [], []
    for block in blocks:
        block.ref_cnt -= 1
        if block.ref_cnt == 0 and not block.is_null:
            (empty if block.block_hash is None or not pool.enable_caching else full).append(block)
    head = queue.fake_free_list_head
    for block in reversed(empty):
        first = head.next_free_block
        head.next_free_block, block.prev_free_block = block, head
        block.next_free_block, first.prev_free_block = first, block
        queue.num_free_blocks += 1
    queue.append_n(full)
