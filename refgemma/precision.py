"""Where numbers are rounded: `BF16` and `F16` arrays, `wide` and `narrow`. Checked bit for bit against torch 2.13.

The rule that the rest of the package follows: **one PyTorch kernel is one rounding**. A kernel, one operation that
PyTorch starts, widens half-precision inputs to float32, computes, and rounds its result once. So an array here holds
float32 numbers that all lie on the grid of the half-precision format, and each NumPy operation on it rounds its result
back onto that grid. Layer code then reads the same in every precision, and says `wide` and `narrow` only where PyTorch
says ``.float()`` and ``.type_as(x)``.

Arrays of ml_dtypes' own ``bfloat16`` are never computed with: ``bf16 * 0.1`` and ``bf16 @ bf16`` silently become
float32 there, and sums accumulate in bf16.
"""

from typing import Any, ClassVar, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]  # not npt.NDArray: since NumPy 2.5 that is no class


class Rounded(np.ndarray[Any, np.dtype[Any]]):
    """float32 numbers on the grid of a 16-bit format; results of operations are rounded to nearest, ties to even.

    With an ordinary floating-point array of at least one axis the result is an ordinary, wider array, as PyTorch
    promotes; Python numbers do not widen. Use `bf16` or `f16` to make one.
    """

    grid: ClassVar[npt.DTypeLike]

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **kwargs: Any) -> Any:
        """Compute in float32, then round once; what is computed in place is rounded in place."""
        result = self._rounded(getattr(ufunc, method)(*[plain(value) for value in inputs], **kwargs), inputs)
        if out is None:
            return result
        out[0][...] = result
        return out[0]

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Without this, concatenate, where, stack and einsum would return ordinary arrays and lose the rounding."""
        result = func(*plain(args), **plain(kwargs))
        return self._rounded(result, (*args, *kwargs.values()))

    def __setitem__(self, key: Any, value: Any) -> None:
        """What is put into the array is rounded too."""
        plain(self)[plain(key)] = plain(_onto_grid(plain(value), type(self)))

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        """An ordinary array of another format: this is how to leave the grid."""
        return self.view(np.ndarray).astype(dtype, *args, **kwargs)

    # As methods these would round after each of their own steps, or not at all: as functions they round once.
    def mean(self, *args: Any, **kwargs: Any) -> Any:
        """Sum and divide in float32; only the mean is rounded."""
        return np.mean(self, *args, **kwargs)

    def std(self, *args: Any, **kwargs: Any) -> Any:
        """Compute in float32; only the result is rounded."""
        return np.std(self, *args, **kwargs)

    def var(self, *args: Any, **kwargs: Any) -> Any:
        """Compute in float32; only the result is rounded."""
        return np.var(self, *args, **kwargs)

    def round(self, *args: Any, **kwargs: Any) -> Any:
        """Round to decimals, then onto the grid."""
        return np.round(self, *args, **kwargs)

    def dot(self, *args: Any, **kwargs: Any) -> Any:
        """Multiply and sum in float32; only the result is rounded."""
        return np.dot(self, *args, **kwargs)

    def _rounded(self, result: Any, inputs: tuple[Any, ...]) -> Any:
        if isinstance(result, list | tuple):
            return type(result)(self._rounded(item, inputs) for item in result)
        if not isinstance(result, np.ndarray | np.floating) or result.dtype.kind != "f":
            return result
        return result if _widened(inputs, type(self)) else _onto_grid(result, type(self))


class BF16(Rounded):
    """bfloat16: the 8 exponent bits of float32, 8 bits of precision. One ulp at 1.0 is 2**-7."""

    grid = ml_dtypes.bfloat16


class F16(Rounded):
    """IEEE half precision: 11 bits of precision, largest number 65504."""

    grid = np.float16


def plain(value: Any) -> Any:
    """`value` with every `Rounded` array in it (also inside lists, tuples and dicts) seen as ordinary float32."""
    if isinstance(value, Rounded):
        return value.view(np.ndarray)
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def _widened(inputs: tuple[Any, ...], kind: type[Rounded]) -> bool:
    """Whether an input is a floating-point array of another format, which makes the result float32."""
    for value in inputs:
        if isinstance(value, list | tuple):
            if _widened(tuple(value), kind):
                return True
        elif isinstance(value, np.ndarray) and value.ndim and value.dtype.kind == "f" and not isinstance(value, kind):
            return True
    return False


def _onto_grid(x: Any, kind: type[Rounded]) -> Rounded:
    with np.errstate(over="ignore", invalid="ignore"):  # overflow gives inf and NaN stays NaN, as in torch
        return np.asarray(x, np.float32).astype(kind.grid).astype(np.float32).view(kind)


def bf16(x: npt.ArrayLike) -> BF16:
    """Round `x` to bfloat16, to nearest with ties to even.

    Examples
    --------
    >>> import numpy as np
    >>> float(bf16(np.sqrt(3584)))  # the 9B's embedding scale, 59.8665..., becomes
    59.75
    >>> type(bf16([1.0, 2.0]) / 3.0).__name__
    'BF16'
    """
    return _onto_grid(np.asarray(x, np.float32), BF16)  # type: ignore[return-value]


def f16(x: npt.ArrayLike) -> F16:
    """Round `x` to IEEE half precision, to nearest with ties to even.

    Examples
    --------
    >>> float(f16(0.1))
    0.0999755859375
    """
    return _onto_grid(np.asarray(x, np.float32), F16)  # type: ignore[return-value]


def wide(x: Array) -> Array:
    """PyTorch's ``x.float()``: half precision becomes float32; float32 and float64 stay what they are.

    float64 is not brought down to float32, unlike in PyTorch, so that a float64 run is one throughout.

    Examples
    --------
    >>> import numpy as np
    >>> type(wide(bf16([1.0]))).__name__, wide(np.ones(2)).dtype.name
    ('ndarray', 'float64')
    """
    return x.view(np.ndarray) if isinstance(x, Rounded) else x


def narrow(y: npt.ArrayLike, like: Array) -> Array:
    """PyTorch's ``y.type_as(like)``: round `y` to the precision of `like`.

    Examples
    --------
    >>> import numpy as np
    >>> float(narrow(np.float64(1.001), like=bf16([0.0])))
    1.0
    """
    if isinstance(like, Rounded):
        return _onto_grid(np.asarray(y), type(like))
    return np.asarray(y, like.dtype)


def as_dtype(x: npt.ArrayLike, dtype: str) -> Array:
    """`x` in one of the four precisions, by name: ``float64``, ``float32``, ``float16`` or ``bfloat16``.

    Raises
    ------
    ValueError
        For another name.

    Examples
    --------
    >>> as_dtype([0.1], "bfloat16")
    BF16([0.10009766], dtype=float32)
    """
    match dtype:
        case "bfloat16":
            return bf16(x)
        case "float16":
            return f16(x)
        case "float32" | "float64":
            return np.asarray(x, dtype)
    raise ValueError(f"unknown dtype {dtype!r}: float64, float32, float16 and bfloat16 are computed with")


PRECISIONS = ("float64", "float32", "float16", "bfloat16")


def precision_named(dtype: Any) -> str:
    """The name of a precision that is given by name, as a NumPy dtype, or as torch writes it.

    Raises
    ------
    ValueError
        For what is none of the four.

    Examples
    --------
    >>> precision_named(np.float32), precision_named("torch.bfloat16"), precision_named(np.dtype("float16"))
    ('float32', 'bfloat16', 'float16')
    """
    said = getattr(dtype, "__name__", None) or str(dtype)
    name = said.rpartition(".")[2]
    if name not in PRECISIONS:
        raise ValueError(f"unknown dtype {said!r}: {', '.join(PRECISIONS)} are computed with")
    return name


def dtype_name(x: Array) -> str:
    """The precision of `x` by name; the inverse of `as_dtype`.

    Examples
    --------
    >>> dtype_name(bf16([1.0]))
    'bfloat16'
    """
    return np.dtype(x.grid).name if isinstance(x, Rounded) else x.dtype.name
