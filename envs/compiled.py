"""Numba's `njit` in our two flavours, with a disk cache that notices every change.

Numba's cache watches the file of the function that it stores, not the files of the functions inlined into it nor the
module constants frozen into it. So each state of the sources gets a cache folder of its own, named after their hash and
set before numba is imported; old folders are simply never read again. A NUMBA_CACHE_DIR set by the user is respected.
"""

import ctypes
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
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


def _interpreted_view(kind: type[ctypes.c_double] | type[ctypes.c_int64], address: int, count: int) -> npt.NDArray[Any]:
    """What the views below are where nothing is compiled (NUMBA_DISABLE_JIT=1)."""
    if not count:
        return np.empty(0, np.dtype(kind))
    return np.ctypeslib.as_array((kind * int(count)).from_address(int(address)))


if TYPE_CHECKING or numba.config.DISABLE_JIT:

    def floats_at(address: int, count: int) -> npt.NDArray[np.float64]:
        """The `count` float64 at an address, as an array; for compiled code, which cannot hold arrays in arrays."""
        return _interpreted_view(ctypes.c_double, address, count)

    def ints_at(address: int, count: int) -> npt.NDArray[np.int64]:
        """The `count` int64 at an address, as an array."""
        return _interpreted_view(ctypes.c_int64, address, count)

    def matrix_at(address: int, rows: int, columns: int) -> npt.NDArray[np.float64]:
        """The `rows` x `columns` float64 at an address, as an array in C order."""
        return floats_at(address, rows * columns).reshape(rows, columns)

    def bits_of(value: float) -> np.uint64:
        """The bits of a float64."""
        return np.float64(value).view(np.uint64)

    def float_of(bits: np.uint64) -> float:
        """The float64 with these bits."""
        return float(np.uint64(bits).view(np.float64))

else:
    from numba.core import types
    from numba.np import arrayobj

    def _view(dtype, dimensions):
        """An intrinsic that makes an array out of (address, *shape), without an owner and without a copy."""
        array_type = types.Array(dtype, dimensions, "C")

        def generate(context, builder, signature, args):
            array = arrayobj.make_array(array_type)(context, builder)
            item = context.get_constant(types.intp, 8)
            strides = [item] if dimensions == 1 else [builder.mul(args[2], item), item]
            data = builder.inttoptr(args[0], context.get_data_type(dtype).as_pointer())
            arrayobj.populate_array(
                array, data=data, shape=list(args[1:]), strides=strides, itemsize=item, meminfo=None
            )
            return array._getvalue()

        if dimensions == 1:
            return numba.extending.intrinsic(
                lambda typing, address, count: (array_type(types.int64, types.int64), generate)
            )
        return numba.extending.intrinsic(
            lambda typing, address, rows, columns: (array_type(types.int64, types.int64, types.int64), generate)
        )

    def _cast(source, target):
        """An intrinsic that takes the bits of one type for those of another."""

        def generate(context, builder, signature, args):
            return builder.bitcast(args[0], context.get_value_type(target))

        return numba.extending.intrinsic(lambda typing, value: (target(source), generate))

    bits_of, float_of = _cast(types.float64, types.uint64), _cast(types.uint64, types.float64)
    floats_at, ints_at, matrix_at = _view(types.float64, 1), _view(types.int64, 1), _view(types.float64, 2)

__all__ = ["bits_of", "entry", "float_of", "floats_at", "inner", "ints_at", "matrix_at", "source_hash"]
