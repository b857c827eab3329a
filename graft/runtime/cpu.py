"""What MLX's CPU backend on Linux needs that Metal and CUDA do not.

On that backend, half precision runs 40 times slower than float32, `quantized_matmul` 70 times
slower than dequantizing and multiplying through the BLAS, and `mx.compile` calls a C++ compiler at
run time. On other devices nothing here has any effect.
"""

import contextlib
import ctypes
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from graft.console import note
from graft.models import LoRALinear, dense_weight, weight_shape
from graft.runtime.attention import LOG2_E, use_fast_functions

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

FLOAT_BYTES = 4
# With fewer rows, dequantizing a whole weight does not pay.
MANY_ROWS = 8
# Of <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def runs_on_cpu() -> bool:
    """Whether the default device is the CPU."""
    return bool(mx.default_device().type == mx.DeviceType.cpu)


def takes_shortcuts() -> bool:
    """Whether to use the fast paths for a CPU: on one, unless GRAFT_SHORTCUTS is `off`."""
    return runs_on_cpu() and os.environ.get("GRAFT_SHORTCUTS") != "off"


def lora_linear_type() -> type[LoRALinear]:
    """The class of LoRA layer for linear layers on the default device."""
    return CpuLoRALinear if runs_on_cpu() else LoRALinear


def check_compiler() -> None:
    """Turn `mx.compile` off, with a note, if the CPU backend has no compiler or no place for it."""
    if sys.platform != "linux" or not runs_on_cpu():
        return
    if shutil.which("g++") is None:
        mx.disable_compile()
        note("no g++ found: running uncompiled, which is slower; install g++")
        return
    # Where MLX writes the code, as C++ finds it. Python would look further.
    names = (os.environ.get(name) for name in ("TMPDIR", "TMP", "TEMP", "TEMPDIR"))
    folder = next(filter(None, names), "/tmp")
    try:
        tempfile.TemporaryFile(dir=folder).close()  # permission bits do not apply to root
    except OSError as error:
        mx.disable_compile()
        note(
            f"the temporary folder {folder} cannot be written ({error.strerror}): running "
            "uncompiled, which is slower; set TMPDIR"
        )


class CompiledStep:
    """A function compiled with `mx.compile` on a GPU, whose traces are counted.

    On a Linux CPU the generated C++ is no faster than the plain graph and takes ten seconds to
    build, so there the function is called directly, as it is if MLX_DISABLE_COMPILE is set.

    Args:
        function: takes and returns arrays in tuples, lists and dicts.
        state: other arrays that it reads and changes.

    Attributes:
        traces: how often it was traced; 0 if it is not compiled.
        shapes: the shapes that it was called with; each needs one trace.
    """

    def __init__(self, function: Callable[..., Any], state: list[Any]) -> None:
        self.traces = 0
        self.shapes: set[tuple[Any, ...]] = set()
        self._function = function
        self._compiled: Callable[..., Any] | None = None
        if not runs_on_cpu() and "MLX_DISABLE_COMPILE" not in os.environ:
            self._compiled = mx.compile(self._trace, inputs=state, outputs=state)

    def __call__(self, *arguments: Any) -> Any:
        """Call the function."""
        if self._compiled is None:
            return self._function(*arguments)
        arrays: Any = tree_flatten(arguments)
        self.shapes.add(tuple((path, array.shape) for path, array in arrays))
        return self._compiled(*arguments)

    def _trace(self, *arguments: Any) -> Any:
        # MLX runs this once per trace, and afterwards what it recorded.
        self.traces += 1
        return self._function(*arguments)


def suit_backend(model: nn.Module) -> None:
    """Give a loaded model the precision and the layers that are fast on the default device.

    On a CPU, floating-point parameters become float32, quantized linear layers dequantize before
    they multiply many rows, and on Linux the model uses the functions of `graft.runtime.attention`.
    On a GPU the model stays as it is; Metal is told to keep its memory resident, as mlx-lm does.
    """
    if mx.metal.is_available():
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
    if not runs_on_cpu():
        return
    if sys.platform == "linux" and takes_shortcuts():
        use_fast_functions(model)
        keep_freed_memory()
    model.update(tree_map(_to_float32, model.parameters()))
    swapped = [
        (path, DequantizingLinear.of(module))
        for path, module in model.named_modules()
        if type(module) is nn.QuantizedLinear
    ]
    model.update_modules(tree_unflatten(swapped))


def keep_freed_memory() -> None:
    """Let glibc keep the memory that MLX frees, since MLX has no cache on the CPU.

    Otherwise large arrays go back to the system, which zeroes every page of the next ones.
    """
    with contextlib.suppress(AttributeError):  # Other C libraries have no mallopt.
        mallopt = ctypes.CDLL(None).mallopt
        for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            mallopt(parameter, 2**31 - 1)


def keep_whole_weights(model: nn.Module, limit_bytes: float) -> int:
    """Let the quantized linear layers of a model dequantize once, if all of them fit.

    Otherwise they do it in each direction, in each worker of each step: in a small model, half of a
    step's operations. Only the layers that `suit_backend` makes on a CPU can.

    Returns:
        The bytes held for it.
    """
    layers = [m for _, m in model.named_modules() if isinstance(m, DequantizingLinear)]
    size = sum(FLOAT_BYTES * math.prod(weight_shape(layer)) for layer in layers)
    if size > limit_bytes:
        return 0
    for layer in layers:
        layer.keep()
    return size


def exponential(x: mx.array) -> mx.array:
    """e to the power of x; on a CPU as a power of two, which takes a third of the time.

    The relative error is that of rounding x log2(e): 1e-7 |x|.
    """
    return mx.power(2.0, x * LOG2_E) if takes_shortcuts() else mx.exp(x)


class DequantizingLinear(nn.QuantizedLinear):
    """An `nn.QuantizedLinear` that dequantizes its weight to multiply many rows.

    The gradient of the input dequantizes again instead of keeping the dense weight until the
    backward pass.
    """

    SETTINGS = ("group_size", "bits", "mode", "biases")

    @classmethod
    def of(cls, linear: nn.QuantizedLinear) -> "DequantizingLinear":
        """The same layer, sharing its arrays."""
        twin = cls.__new__(cls)
        nn.Module.__init__(twin)
        for name, value in (*linear.items(), *((n, getattr(linear, n)) for n in cls.SETTINGS)):
            setattr(twin, name, value)
        object.__setattr__(twin, "kept", None)
        twin.freeze()
        return twin

    def __call__(self, x: mx.array) -> mx.array:
        """Map (..., input_dims) to (..., output_dims)."""
        # For few rows quantized_matmul is about as fast, and reads an eighth of the memory.
        if x.size < MANY_ROWS * x.shape[-1] or not is_frozen(self):
            return super().__call__(x)
        y = _frozen_product(self)(x)
        return y + self["bias"] if "bias" in self else y

    def whole_weight(self) -> mx.array:
        """The weight dequantized: (output_dims, input_dims), float32."""
        # A copy of this layer with another weight still holds the one kept here.
        kept = self.kept is not None and self.kept_of is self.weight
        return self.kept if kept else dense_weight(self)

    def keep(self) -> None:
        """Dequantize once; the packed weight remains the parameter that is saved."""
        weight = dense_weight(self)
        mx.eval(weight)
        # Not through nn.Module's setter, which would make it a parameter.
        object.__setattr__(self, "kept", weight)
        object.__setattr__(self, "kept_of", self.weight)


def _frozen_product(linear: "DequantizingLinear") -> Any:
    """x -> x W^T with a gradient for x only; W is dequantized again in each direction."""

    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        return x @ linear.whole_weight().T

    @product.vjp
    def product_vjp(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        return cotangent @ linear.whole_weight()

    return product


def is_frozen(layer: nn.Module) -> bool:
    """Whether no parameter of a layer is trained: the products here return no gradient for one."""
    return not layer.trainable_parameters()


class CpuLoRALinear(LoRALinear):
    """A LoRA layer that adds base and update in one pass, with half the passes over memory.

    It does so for many rows without dropout; otherwise it computes as its parent.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """Map (..., input_dims) to (..., output_dims)."""
        if self.merged is not None or not self.multiplies_at_once(x):
            return super().__call__(x)
        rows = x.reshape(-1, x.shape[-1])
        outputs: Any = _adapted_product(self)(rows, self.lora_a, self.lora_b)
        y: mx.array = outputs[0].reshape(*x.shape[:-1], -1)
        return y + self.linear.bias if "bias" in self.linear else y

    def multiplies_at_once(self, x: mx.array) -> bool:
        """Whether base and update of this input are added in one pass."""
        drops = self.training and self.dropout._p_1 != 1
        return (
            not drops
            and takes_shortcuts()
            and x.dtype == mx.float32
            and x.size >= MANY_ROWS * x.shape[-1]
            and is_frozen(self.linear)
            and (type(self.linear) is nn.Linear or hasattr(self.linear, "whole_weight"))
        )


def _adapted_product(layer: LoRALinear) -> Any:
    """(x, A, B) -> x W^T + scale (x A) B, and x A, with gradients for all three.

    With T = scale B dY^T, the gradients are dX = W^T dY + A T, dA = X T and dB = A^T X dY.
    """
    linear, scale = layer.linear, layer.scale

    def weight() -> mx.array:
        whole: mx.array = linear.weight if type(linear) is nn.Linear else linear.whole_weight()
        return whole

    @mx.custom_function
    def product(x: mx.array, a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
        z = x @ a
        return mx.addmm(x @ weight().T, z, b, alpha=scale), z

    @product.vjp
    def product_vjp(primals: Any, cotangents: Any, outputs: Any) -> Any:
        (x, a, b), (dy, _), (_, z) = primals, cotangents, outputs
        t = scale * (dy @ b.T)
        return mx.addmm(dy @ weight(), t, a.T), x.T @ t, scale * (z.T @ dy)

    return product


def _to_float32(array: mx.array) -> mx.array:
    halves = (mx.float16, mx.bfloat16)
    return array.astype(mx.float32) if array.dtype in halves else array
