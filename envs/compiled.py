"""Numba's `njit` in our two flavours, with a disk cache that notices every change.

Numba's cache watches the file of the function that it stores, not the files of the functions inlined into it nor the
module constants frozen into it. So each state of the sources gets a cache folder of its own, named after their hash and
set before numba is imported; old folders are simply never read again. A NUMBA_CACHE_DIR set by the user is respected.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import platformdirs

import deflector

COMPILED_FOLDERS = ("envs", "envs/simulator", "policies")


def source_hash() -> str:
    """Sixteen hex digits that change with everything that compiled code is made from."""
    digest = hashlib.sha256(f"{deflector.__version__} {sys.version_info[:2]}".encode())
    root = Path(__file__).resolve().parent.parent
    for folder in COMPILED_FOLDERS:
        for path in sorted((root / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


if not os.environ.get("NUMBA_CACHE_DIR"):
    os.environ["NUMBA_CACHE_DIR"] = str(Path(platformdirs.user_cache_dir("deflector")) / f"kernel-{source_hash()}")

import numba  # noqa: E402  (the cache folder must be known first)

numba.config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"]

if TYPE_CHECKING:
    _Function = TypeVar("_Function", bound=Callable[..., object])

    def inner(function: _Function) -> _Function:
        """For functions that only compiled code calls."""
        return function

    def entry(function: _Function) -> _Function:
        """For the few functions that Python calls."""
        return function

else:
    # All inlined: a call that hands on a dozen arrays costs more than most bodies. Without Numba's reference counts:
    # such functions may read and write the elements of arrays, but make no array and no view.
    inner = numba.njit(
        _nrt=False, forceinline=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True
    )
    # Cached on disk, and other threads run meanwhile.
    entry = numba.njit(_nrt=False, error_model="numpy", cache=True, nogil=True)

__all__ = ["entry", "inner", "source_hash"]
