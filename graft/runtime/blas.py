"""Gives MLX a fast BLAS on Linux.

MLX's Linux wheels bundle the reference BLAS, whose float32 matmul is 30 to 80 times slower than an
optimized one. MLX looks up its BLAS symbols in the process's global scope first, so an optimized
library that is loaded there before `mlx.core` replaces the bundled one. macOS has Accelerate and
Metal and needs none of this. Importing `graft` calls `load`.

The environment variable GRAFT_BLAS names the library to load, or is "off".
"""

import contextlib
import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from graft.console import note

_SYMBOL = "cblas_sgemm"
_THREAD_FUNCTIONS = (
    ("openblas_get_num_threads", "openblas_set_num_threads"),
    ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"),
)


def load() -> None:
    """Load an optimized BLAS for MLX to find, unless one is loaded already.

    A line on standard error reports if there is none, if MLX was imported before, or if GRAFT_BLAS
    names a library that cannot be used.
    """
    named = os.environ.get("GRAFT_BLAS")
    if sys.platform != "linux" or named == "off" or loaded():
        return
    wheels = _wheels_with_reference_blas()
    if not wheels:
        return
    if "mlx.core" in sys.modules:
        _warn("mlx was imported before graft, so it keeps its slow BLAS: import graft first")
    elif named:
        try:
            _load_globally(named)
        except OSError as error:
            _warn(f"GRAFT_BLAS={named} cannot be used, so MLX keeps its slow BLAS: {error}")
    elif not _load_first_usable() and "mlx_cpu.libs" in wheels:
        _warn(
            "no fast BLAS found, so MLX's matmul is 30 to 80 times slower: install OpenBLAS "
            "(Debian, Ubuntu: apt-get install libopenblas0-pthread; Fedora: dnf install "
            "openblas-threads) or, on x86-64, pip install mkl; GRAFT_BLAS=off hides this"
        )


def loaded() -> str | None:
    """Path of the global library that MLX's matmul binds to; None if there is none."""
    try:
        function = ctypes.CDLL(None)[_SYMBOL]
    except AttributeError:
        return None
    symbol = _SymbolInformation()
    ctypes.CDLL(None).dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(symbol))
    return os.fsdecode(symbol.file)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let the loaded BLAS use `count` threads until the context ends, if that can be set."""
    get, set_ = _thread_functions() or (lambda: count, lambda _: None)
    before = get()
    set_(count)
    try:
        yield
    finally:
        set_(before)


@functools.cache
def _thread_functions() -> tuple[Callable[[], int], Callable[[int], object]] | None:
    """Functions that get and set the number of threads of the loaded BLAS."""
    path = loaded() if sys.platform == "linux" else None
    library = ctypes.CDLL(path) if path else None
    for get, set_ in _THREAD_FUNCTIONS:
        if hasattr(library, get):
            return getattr(library, get), getattr(library, set_)
    return None


class _SymbolInformation(ctypes.Structure):
    """Dl_info of dladdr(3)."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _wheels_with_reference_blas() -> list[str]:
    """The library folders of MLX's Linux wheels, such as mlx_cpu.libs or mlx_cuda_12.libs.

    An MLX built from source or by a distribution has none: it links the system's BLAS.
    """
    spec = importlib.util.find_spec("mlx")
    locations = spec.submodule_search_locations if spec else None
    found = [library for at in locations or () for library in Path(at).parent.glob("mlx_c*.libs")]
    return [folder.name for folder in found if any(folder.glob("libblas*"))]


def _candidates() -> Iterator[str]:
    """Libraries to try, threaded ones first; the dynamic linker finds a bare name."""
    yield f"/usr/lib/{os.uname().machine}-linux-gnu/openblas-pthread/libopenblas.so.0"  # Debian
    yield from ("libopenblasp.so.0", "libopenblaso.so.0")  # Fedora, with threads or OpenMP
    yield "libopenblas_pthreads.so.0"  # openSUSE
    yield "libopenblas.so.0"
    for pattern in ("libopenblas.so.0", "libmkl_rt.so.*"):  # Conda's OpenBLAS, PyPI's mkl
        yield from sorted(map(str, Path(sys.prefix, "lib").glob(pattern)))


def _load_first_usable() -> bool:
    for name in _candidates():
        with contextlib.suppress(OSError):
            _load_globally(name)
            return True
    return False


def _load_globally(name: str) -> None:
    """Load a library into the global scope.

    Raises:
        OSError: it cannot be loaded, or is not a BLAS.
    """
    if not hasattr(ctypes.CDLL(name), _SYMBOL):
        raise OSError(f"it has no {_SYMBOL}")
    ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)


def _warn(text: str) -> None:
    note(text)
    # Child processes inherit this: one line for all of them is enough.
    os.environ["GRAFT_BLAS"] = "off"
