"""KV blocks of one node, for the reference simulator: what they hold, who uses them, in what order they are taken."""

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile


@dataclass(eq=False)
class Block:
    """One KV block."""

    contents: Hashable = None  # None: nothing that can be found
    users: int = 0


class BlockPool:
    """All blocks of a node; those without users are in the free queue, the next to be taken at its head."""

    def __init__(self, count: int) -> None:
        self.all = [Block() for _ in range(count)]
        self.free_queue = deque(self.all)
        self.holders: dict[Hashable, list[Block]] = {}  # of each contents, in the order in which they got them

    def find(self, contents: Iterable[Hashable]) -> list[Block]:
        """One block for each of these contents from the first on, until one is not found."""
        found = (self.holders.get(wanted) for wanted in contents)
        return [blocks[0] for blocks in takewhile(bool, found) if blocks]

    def share(self, found: Iterable[Block]) -> None:
        """Makes found blocks used, or used once more."""
        for block in found:
            if not block.users:
                self.free_queue.remove(block)
            block.users += 1

    def take(self, count: int) -> list[Block]:
        """New blocks, which lose what they held."""
        taken = [self.free_queue.popleft() for _ in range(count)]
        for block in taken:
            block.users = 1
            if block.contents is not None:
                holders = self.holders[block.contents]
                holders.remove(block)
                if not holders:
                    del self.holders[block.contents]
            block.contents = None
        return taken

    def fill(self, block: Block, contents: Hashable) -> None:
        """From now on the block can be found by its contents."""
        block.contents = contents
        self.holders.setdefault(contents, []).append(block)

    def give_back(self, blocks: Sequence[Block]) -> None:
        """Ends one user's use of its blocks, given in the order of the tokens that they hold."""
        for block in blocks:
            block.users -= 1
        unused = [block for block in reversed(blocks) if not block.users]
        self.free_queue.extend(block for block in unused if block.contents is not None)
        self.free_queue.extendleft([block for block in unused if block.contents is None][::-1])
