"""Files written whole or not at all."""

import contextlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file at once, so that no reader ever sees half of it; a device or a pipe is simply written to.

    Raises:
        OSError: If it cannot be written; the old file is then as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    if not is_plain(path):
        with path.open("wb") as file:
            file.write(data)
        return
    write_together({path.resolve(): data})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Replaces ordinary files, each at once, after all of them have been written out beside the old ones.

    Raises:
        OSError: If one cannot be written; all old files are then as they were.
    """
    written: dict[str, Path] = {}
    try:
        for path, content in contents.items():
            handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            written[name] = path
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())
        for name, path in written.items():
            os.replace(name, path)
    except BaseException:
        for name in written:
            with contextlib.suppress(OSError):
                os.unlink(name)
        raise


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Writes a JSON file as `write_atomically` does; NaN and infinity, which JSON lacks, are refused.

    Raises:
        OSError: Naming the file.
    """
    try:
        write_atomically(Path(path), json.dumps(content, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        error.filename = str(path)
        raise


def is_plain(path: Path) -> bool:
    """Whether it is an ordinary file, or nothing yet."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
