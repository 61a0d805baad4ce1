"""What wandb wrote into a `.wandb` file: a log in LevelDB's format, whose entries are protobuf records."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

FILE_HEADER, BLOCK, ENTRY_HEADER = 7, 32768, 7
FULL, LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    """Every record of the file, in order; an entry that does not fit a block is split over several."""
    data = path.read_bytes()
    at, parts = FILE_HEADER, b""
    assert data[:4] == b":W&B"
    while at + ENTRY_HEADER <= len(data):
        if BLOCK - at % BLOCK < ENTRY_HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += ENTRY_HEADER
        parts += data[at : at + length]
        at += length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record
