"""Round to half precision with `BF16` and `F16` arrays, `wide` and `narrow`. Checked bit for bit against torch 2.13.

The rest of the package follows one rule: **one PyTorch kernel is one rounding**. A kernel is one operation that PyTorch
starts: it widens half-precision inputs to float32, computes, and rounds the result once. So an array here holds float32
numbers that half precision can represent exactly (its grid), and each NumPy operation rounds its result to this grid.
The code of the layers is then the same in every precision. It calls `wide` and `narrow` only where PyTorch calls
``.float()`` and ``.type_as(x)``.

Arrays with ml_dtypes' ``bfloat16`` are not used for computation, because ``bf16 * 0.1`` and ``bf16 @ bf16`` silently
become float32 there, and sums accumulate in bfloat16.
"""

from typing import Any, ClassVar, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]  # not npt.NDArray, which is not a class since NumPy 2.5


class Rounded(np.ndarray[Any, np.dtype[Any]]):
    """float32 numbers on the grid of a 16-bit format; operations round their results to nearest, ties to even.

    An operation with an ordinary floating-point array (except a 0-d array) returns an ordinary, wider array, as in
    PyTorch. Python numbers do not widen. Use `bf16` or `f16` to make a rounded array.

    Numbers that NumPy writes into such an array are rounded too: by an assignment, ``out=``, `numpy.copyto`,
    ``np.add.at``, other NumPy functions, and the array's own methods. `byteswap` and `setfield`, which would write
    bytes instead of numbers, raise an error, and so does writing through ``.flat``. Code that writes directly into the
    memory cannot be detected: an ordinary view (`numpy.asarray`, ``.data``), `numpy.nditer`, and ``out=`` of a random
    generator.
    """

    grid: ClassVar[npt.DTypeLike]

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **kwargs: Any) -> Any:
        """Compute in float32, then round once; in-place operations round in place."""
        new = (
            {} if out is None else {"out": (None,) * ufunc.nout if ufunc.nout > 1 else None}
        )  # computed separately, then rounded into `out`
        result = getattr(ufunc, method)(*plain(inputs), **plain(kwargs), **new)
        if method == "at":
            return _round_in_place(inputs)
        rounded = self._rounded(result, inputs)
        if out is None:
            return rounded
        where = kwargs.get("where", True) if method == "__call__" else True
        results = rounded if isinstance(rounded, tuple) else (rounded,)
        returned = tuple(
            _write(*pair, where, kwargs.get("casting", "same_kind")) for pair in zip(results, out, strict=True)
        )
        return returned if isinstance(rounded, tuple) else returned[0]

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Round the results of concatenate, where, stack and so on, which would otherwise be ordinary arrays."""
        given, views = (*args, *kwargs.values()), dict[int, Any]()
        result = func(*plain(args, views), **plain(kwargs, views))
        if result is None or id(result) in views:  # already written into an argument
            _round_in_place(given)
            return result if result is None else views[id(result)][1]
        return self._rounded(result, given)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Round the assigned values."""
        plain(self)[plain(key)] = plain(_onto_grid(plain(value), type(self)))

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        """Return an ordinary array of another dtype, which does not round."""
        return self.view(np.ndarray).astype(dtype, *args, **kwargs)

    def fill(self, value: Any) -> None:
        """Round `value`, and set every element to it."""
        self[...] = value

    @property
    def flat(self) -> Any:
        """All numbers as a read-only iterator; to write, use ``x[...] = values``."""
        numbers = self.view(np.ndarray)
        numbers.flags.writeable = False
        return numbers.flat

    @property  # type: ignore[misc]  # assigning to it is not allowed: that would not round
    def real(self) -> Any:
        """The array itself."""
        return self

    def byteswap(self, *args: Any, **kwargs: Any) -> Any:
        """Raise an error, because numbers with changed bytes would be off the grid; `setfield` does the same.

        Raises
        ------
        TypeError
            Always.
        """
        raise TypeError("the bytes of a rounded array cannot be changed; use x[...] = values, or x.astype()")

    setfield = byteswap

    def compress(self, condition: Any, *args: Any, **kwargs: Any) -> Any:
        """Call `numpy.compress`, which also rounds numbers that it writes into another array."""
        return np.compress(condition, self, *args, **kwargs)

    def _rounded(self, result: Any, inputs: tuple[Any, ...]) -> Any:
        if isinstance(result, list | tuple):
            return _like_sequence(result, [self._rounded(item, inputs) for item in result])
        if not isinstance(result, np.ndarray | np.floating) or result.dtype.kind != "f":
            return result
        return result if _widens(inputs, type(self)) else _onto_grid(result, type(self))


def _by_function(name: str) -> Any:
    """Return a method that calls the NumPy function of the same name, which computes in float32 and rounds once."""

    def method(self: Rounded, *args: Any, **kwargs: Any) -> Any:
        return getattr(np, name)(self, *args, **kwargs)

    method.__name__, method.__doc__ = name, f"Call `numpy.{name}`: compute in float32, round the result once."
    return method


# NumPy's own methods would round after each of their steps, or not at all.
for _name in ("mean", "std", "var", "round", "dot", "trace", "put", "take", "conjugate", "conj"):
    setattr(Rounded, _name, _by_function(_name))


class BF16(Rounded):
    """bfloat16: 8 exponent bits, as in float32, and 8 bits of precision. One ulp at 1.0 is 2**-7."""

    grid = ml_dtypes.bfloat16


class F16(Rounded):
    """IEEE half precision: 11 bits of precision, largest number 65504."""

    grid = np.float16


def plain(value: Any, views: dict[int, Any] | None = None) -> Any:
    """Return `value` with every `Rounded` array inside (also in lists, tuples and dicts) viewed as ordinary float32.

    `views`, if given, receives each view's array under the `id` of the view.
    """
    if isinstance(value, Rounded):
        view = value.view(np.ndarray)
        if views is not None:
            views[id(view)] = view, value
        return view
    if isinstance(value, list | tuple):
        return _like_sequence(value, [plain(item, views) for item in value])
    if isinstance(value, dict):
        return {key: plain(item, views) for key, item in value.items()}
    return value


def _like_sequence(sequence: Any, items: list[Any]) -> Any:
    """Return `items` as the type of `sequence`: a list, tuple or named tuple."""
    return sequence._make(items) if hasattr(sequence, "_make") else type(sequence)(items)


def _round_in_place(value: Any) -> None:
    """Round every writable `Rounded` array in `value` to its grid."""
    if isinstance(value, list | tuple):
        for item in value:
            _round_in_place(item)
    elif isinstance(value, Rounded) and value.flags.writeable:
        value[...] = value


def _write(result: Any, out: Any, where: Any, casting: Any) -> Any:
    """Copy `result` into `out`, rounded to its format, and return `out`; without `out` return `result`."""
    if out is None:
        return result
    number = plain(_onto_grid(result, type(out)) if isinstance(out, Rounded) else result)
    np.copyto(plain(out), number, where=plain(where), casting=casting)
    return out


def _widens(inputs: tuple[Any, ...], kind: type[Rounded]) -> bool:
    """Return True if an input is a floating-point array of another dtype, which makes the result float32."""
    for value in inputs:
        if isinstance(value, list | tuple):
            if _widens(tuple(value), kind):
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
    """Widen half precision to float32, like PyTorch's ``x.float()``; float32 and float64 do not change.

    Unlike in PyTorch, float64 is not reduced to float32, so a float64 run uses float64 in every step.

    Examples
    --------
    >>> import numpy as np
    >>> type(wide(bf16([1.0]))).__name__, wide(np.ones(2)).dtype.name
    ('ndarray', 'float64')
    """
    return x.view(np.ndarray) if isinstance(x, Rounded) else x


def narrow(y: npt.ArrayLike, like: Array) -> Array:
    """Round `y` to the precision of `like`, like PyTorch's ``y.type_as(like)``.

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
    """Return `x` in the precision with this name: ``float64``, ``float32``, ``float16`` or ``bfloat16``.

    Raises
    ------
    ValueError
        If the name is unknown.

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
    raise ValueError(f"unknown dtype {dtype!r}; it must be float64, float32, float16 or bfloat16")


def as_float64(x: npt.ArrayLike) -> Array:
    """Return `x` as an ordinary float64 array, for measuring errors.

    Examples
    --------
    >>> as_float64(bf16([0.1]))
    array([0.10009766])
    """
    return np.asarray(x, np.float64)


PRECISIONS = ("float64", "float32", "float16", "bfloat16")


def precision_named(dtype: Any) -> str:
    """Return the name of a precision, given the name, a NumPy dtype, or torch's way of writing it.

    Raises
    ------
    ValueError
        If the precision is unknown.

    Examples
    --------
    >>> precision_named(np.float32), precision_named("torch.bfloat16"), precision_named(np.dtype("float16"))
    ('float32', 'bfloat16', 'float16')
    """
    said = getattr(dtype, "__name__", None) or str(dtype)
    name = said.rpartition(".")[2]
    if name not in PRECISIONS:
        raise ValueError(f"unknown dtype {said!r}; it must be one of {', '.join(PRECISIONS)}")
    return name


def dtype_name(x: Array) -> str:
    """Return the name of the precision of `x`, as `as_dtype` takes it.

    Examples
    --------
    >>> dtype_name(bf16([1.0]))
    'bfloat16'
    """
    return np.dtype(x.grid).name if isinstance(x, Rounded) else x.dtype.name
