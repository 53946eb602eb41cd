"""Test half precision: rounding as in ml_dtypes and by bits; nothing widens or narrows without request."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from refgemma.precision import (
    BF16,
    F16,
    as_dtype,
    as_float64,
    bf16,
    dtype_name,
    f16,
    narrow,
    plain,
    precision_named,
    wide,
)

FLOATS = hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, max_side=8), elements=st.floats(width=32))


def round_bits(x: np.ndarray) -> np.ndarray:
    """Round to bfloat16 in the textbook way: add half of the cut part, a bit less for even numbers, and cut."""
    bits = x.astype(np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isnan(x), np.float32(np.nan), rounded)


@given(FLOATS)
def test_bf16_rounds_to_nearest_even(x: np.ndarray) -> None:
    np.testing.assert_array_equal(plain(bf16(x)), round_bits(x))


@given(FLOATS)
def test_f16_rounds_as_numpy_does(x: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(plain(f16(x)), x.astype(np.float16).astype(np.float32))


def test_rounding_of_special_numbers() -> None:
    x = np.array([np.inf, -np.inf, np.nan, 3.4e38, 1e-40, 1 + 2**-8, 1 + 3 * 2**-8], np.float32)
    expected = [np.inf, -np.inf, np.nan, np.inf, float(ml_dtypes.bfloat16(1e-40)), 1.0, 1 + 2**-6]
    np.testing.assert_array_equal(plain(bf16(x)), np.array(expected, np.float32))


X = bf16(np.linspace(-3, 3, 24).reshape(2, 3, 4))
OPERATIONS = {
    "multiply by a number": lambda x: x * 0.1,
    "divide": lambda x: x / 3.0,
    "tanh": np.tanh,
    "add": lambda x: x + x,
    "matmul": lambda x: x @ x.swapaxes(-1, -2),
    "sum": lambda x: x.sum(-1),
    "max": lambda x: x.max(-1),
    "slice": lambda x: x[..., 1:],
    "take rows": lambda x: x[[1, 0]],
    "reshape": lambda x: x.reshape(6, 4),
    "repeat": lambda x: np.repeat(x, 2, axis=1),
    "concatenate": lambda x: np.concatenate([-x, x], axis=-1),
    "stack": lambda x: np.stack([x, x]),
    "where": lambda x: np.where(x > 0, x, 0.0),
    "split": lambda x: np.split(x, 2, axis=-1)[1],
    "einsum": lambda x: np.einsum("ijk,ilk->ijl", x, x),
    "zeros_like": np.zeros_like,
    "mean": lambda x: x.mean(-1),
    "std": lambda x: x.std(),
    "round": lambda x: x.round(2),
    "dot": lambda x: x.dot(x[0, 0]),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("kind", [BF16, F16])
def test_every_result_is_rounded_once(name: str, kind: type) -> None:
    x = as_dtype(X, "bfloat16" if kind is BF16 else "float16")
    result, in_float32 = OPERATIONS[name](x), OPERATIONS[name](plain(x))
    assert type(result) is kind
    np.testing.assert_array_equal(plain(result), plain(as_dtype(in_float32, dtype_name(x))))


def test_a_wider_array_widens_but_a_number_does_not() -> None:
    assert type(X + np.ones(4, np.float32)) is np.ndarray
    assert type(X + f16(np.ones(4))) is np.ndarray
    assert type(np.concatenate([X, np.ones((2, 3, 4), np.float32)])) is np.ndarray
    assert type(X + 1.0) is BF16
    assert type(X > 0) is not BF16


def test_scalars_are_not_rounded_before_use() -> None:
    """144 ** -0.5 rounded to bf16 first would give other products for a third of all numbers."""
    scale = 144**-0.5
    np.testing.assert_array_equal(plain(X * scale), round_bits(plain(X) * np.float32(scale)))
    assert not np.array_equal(plain(X * scale), plain(X * float(bf16(scale))))


def test_what_is_put_into_an_array_is_rounded() -> None:
    x = bf16([1.0, 2.0, 3.0])
    x[0] = 0.1
    x[1:] = np.array([1.001, 0.3], np.float32)
    np.testing.assert_array_equal(plain(x), round_bits(np.array([0.1, 1.001, 0.3])))
    y = x
    x += 1.001
    assert y is x
    np.testing.assert_array_equal(plain(x), round_bits(round_bits(np.array([0.1, 1.001, 0.3])) + np.float32(1.001)))


def test_astype_leaves_the_grid() -> None:
    assert type(X.astype(np.float64)) is np.ndarray


def test_wide_and_narrow() -> None:
    assert wide(X).dtype == np.float32
    assert type(wide(X)) is np.ndarray
    doubled = np.ones(3)
    assert wide(doubled) is doubled  # float64 is not brought down, unlike in PyTorch
    assert narrow(np.float64(1.001), like=X) == 1.0
    assert narrow([0.1], like=np.zeros(1, np.float32)).dtype == np.float32


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_names(dtype: str) -> None:
    assert dtype_name(as_dtype([0.5], dtype)) == dtype


def test_unknown_dtype() -> None:
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        as_dtype([1], "int8")


# --- everything that NumPy can write with -----------------------------------------------------------------------------

FIELD = np.random.default_rng(3).uniform(-2, 2, (4, 4)).astype(np.float32)  # on no 16-bit grid


def square(seed: int = 0) -> BF16:
    return bf16(np.random.default_rng(seed).uniform(-2, 2, (4, 4)))


def off_grid(value: object) -> list[object]:
    """Return arrays in `value` that are off their grid, and float32 arrays that should be rounded."""
    if isinstance(value, list | tuple):
        return [found for item in value for found in off_grid(item)]
    if isinstance(value, np.ndarray | np.floating) and value.dtype == np.float32:
        rounded = isinstance(value, BF16) and np.array_equal(plain(value), round_bits(plain(value)), equal_nan=True)
        return [] if rounded else [value]
    return []


# For each function of NumPy that has an `out`: its other arguments. All are called with such an array as `out` too.
OUT: dict[str, Callable[[BF16], tuple[Any, ...]]] = {
    **{name: lambda x: (x, 0) for name in (
        "amax", "amin", "cumprod", "cumsum", "max", "mean", "median", "min", "nanmax", "nanmean", "nanmedian", "nanmin",
        "nanprod", "nanstd", "nansum", "nanvar", "prod", "ptp", "std", "sum", "var", "nancumprod", "nancumsum",
    )},
    **{name: lambda x: (x, 0.3, 0) for name in ("nanpercentile", "nanquantile", "percentile", "quantile")},
    **{name: lambda x: ([x[:2], x[2:]],) for name in ("concat", "concatenate")},
    **{name: lambda x: (x,) for name in ("around", "round", "round_", "fix", "isneginf", "isposinf", "nan_to_num")},
    **{name: lambda x: (x, x.T) for name in ("dot", "outer")},
    "outer": lambda x: (x[0], x[1]),
    "choose": lambda x: (np.zeros((4, 4), int), [x, x]),
    "clip": lambda x: (x, -0.3, 0.3),
    "compress": lambda x: ([True] * 4, x, 0),
    "cumulative_prod": lambda x: (x[0],),
    "cumulative_sum": lambda x: (x[0],),
    "einsum": lambda x: ("ij,jk->ik", x, x),
    "stack": lambda x: (list(x),),
    "take": lambda x: (x, [0, 1, 2, 3], 0),
    "trace": lambda x: (x,),
    "linalg.multi_dot": lambda x: ([x, x, x],),
    "linalg.outer": lambda x: (x[0], x[1]),
}  # fmt: skip
# These return other than floating-point numbers, or take no array of them.
NOT_OF_NUMBERS = {"all", "any", "argmax", "argmin", "nanargmax", "nanargmin", "packbits", "isneginf", "isposinf",
                  "busday_count", "busday_offset", "is_busday"}  # fmt: skip
# These write into their first argument. Beside each what it is called with, after that argument.
WRITERS: dict[str, tuple[Any, ...]] = {
    "copyto": (FIELD,), "put": ([0, 3], [0.1, 0.3]), "place": (FIELD > 0, FIELD), "putmask": (FIELD > 0, FIELD),
    "fill_diagonal": (0.1,), "put_along_axis": (np.array([[1]]), 0.1, 0),
}  # fmt: skip


def functions_with_out() -> dict[str, Callable[..., Any]]:
    """Return every function of NumPy except ufuncs whose signature has an argument `out`.

    In older NumPy, functions written in C have no readable signature; their docstring begins with the call.
    """
    found = {}
    for prefix, module in (("", np), ("linalg.", np.linalg)):
        for name in dir(module):
            function = getattr(module, name)
            if callable(function) and not isinstance(function, np.ufunc | type) and not name.startswith("_"):
                try:
                    has = "out" in inspect.signature(function).parameters
                except (ValueError, TypeError):
                    call = (function.__doc__ or "").strip().split("\n\n")[0]
                    has = bool(re.search(r"\bout=", call))
                if has:
                    found[prefix + name] = function
    return found


def test_functions_that_write_into_out_are_known() -> None:
    assert len(functions_with_out()) > 40
    assert set(functions_with_out()) <= set(OUT) | NOT_OF_NUMBERS


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fix, from NumPy 2.5 on
@pytest.mark.parametrize("name", sorted(set(functions_with_out()) - NOT_OF_NUMBERS))
def test_a_function_with_out_rounds_what_it_returns_and_what_it_writes(name: str) -> None:
    function, given = functions_with_out()[name], OUT[name](square())
    result = function(*given)
    assert not off_grid(result)
    out = bf16(np.full(np.shape(result), 0.5))
    returned = function(*given, out=out)
    assert returned is out or np.shares_memory(returned, out)
    assert not off_grid(out)
    assert not np.array_equal(plain(out), np.full(out.shape, 0.5))
    ordinary = np.zeros(np.shape(result), np.float32)  # is filled, and stays what it is
    function(*given, out=ordinary)
    np.testing.assert_allclose(ordinary, plain(result), rtol=2**-6)


@pytest.mark.parametrize("name", WRITERS)
def test_a_function_that_writes_rounds(name: str) -> None:
    x, y = square(), FIELD.copy()
    getattr(np, name)(x, *WRITERS[name])
    assert not off_grid(x)
    assert not np.array_equal(plain(x), plain(square()))
    getattr(np, name)(y, *WRITERS[name])
    changed = plain(x) != plain(square())
    np.testing.assert_array_equal(plain(x)[changed], round_bits(y)[changed])


UFUNCS = {name: ufunc for name in dir(np) if isinstance(ufunc := getattr(np, name), np.ufunc)}


@pytest.mark.parametrize("name", UFUNCS)
def test_a_ufunc_rounds_in_every_way_it_can_be_called(name: str) -> None:
    ufunc = UFUNCS[name]
    x, y = bf16(np.abs(square())), bf16(np.abs(square(1)))
    inputs = (x, y)[: ufunc.nin]
    with np.errstate(all="ignore"):
        try:
            result = ufunc(*inputs)
        except TypeError:
            return  # of whole numbers, texts or times only
        assert not off_grid(result)
        results = result if isinstance(result, tuple) else (result,)
        outs = tuple(bf16(np.full(r.shape, 0.5)) if r.dtype == np.float32 else np.zeros_like(r) for r in results)
        ufunc(*inputs, out=outs)
        for written, expected in zip(outs, results, strict=True):
            np.testing.assert_array_equal(written, expected)
        assert not off_grid(outs)
        if ufunc.signature is None:
            ufunc(*inputs, out=outs, where=plain(x) > 1)
            assert not off_grid(outs)
        if ufunc.nin != 2 or ufunc.nout != 1 or ufunc.signature or results[0].dtype != np.float32:
            return
        for method in (ufunc.reduce, ufunc.accumulate, ufunc.outer, lambda a, **k: ufunc.reduceat(a, [0, 2], **k)):
            given = (x, y) if method == ufunc.outer else (x,)
            found = method(*given)
            assert not off_grid(found)
            out = bf16(np.zeros(found.shape))
            method(*given, out=out)
            np.testing.assert_array_equal(out, found)
        z = bf16(x)
        ufunc.at(z, ([0, 1], [2, 2]), 0.3)
        assert not off_grid(z)


def test_where_leaves_the_other_numbers_of_out_alone() -> None:
    for out in (bf16(np.full((4, 4), 0.5)), np.full((4, 4), 0.1, np.float32)):
        before = plain(out).copy()
        np.multiply(square(), 0.3, out=out, where=FIELD > 0)
        np.testing.assert_array_equal(plain(out)[FIELD <= 0], before[FIELD <= 0])
        np.testing.assert_array_equal(plain(out)[FIELD > 0], plain(square() * 0.3)[FIELD > 0])
    with pytest.raises(TypeError, match="Cannot cast"):
        np.multiply(square(), 0.3, out=np.zeros((4, 4), int))


# The methods of an array: what each is called with.
METHODS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("conj", "conjugate", "copy", "cumprod", "cumsum", "diagonal", "flatten", "max", "mean", "min",
                     "prod", "ravel", "squeeze", "std", "sum", "trace", "transpose", "var", "sort", "round"), ()),
    "clip": (-0.3, 0.3), "compress": ([True, False], 0), "dot": (square(2),), "fill": (0.1,), "partition": (2,),
    "put": ([0, 3], [0.1, 0.3]), "repeat": (2,), "reshape": ((2, 8),), "swapaxes": (0, 1), "take": ([1, 2],),
    "view": (),
    **{f"__i{name}__": (0.3,) for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")},
    "__imatmul__": (square(2),),
}  # fmt: skip
REFUSED = {"byteswap": (True,), "setfield": (0.1, np.float32), "__setstate__": ()}
# Whole numbers, true and false, texts, Python's own numbers, ordinary arrays, or no numbers at all.
OTHERS = {
    "all", "any", "argmax", "argmin", "argpartition", "argsort", "choose", "nonzero", "searchsorted", "astype", "item",
    "tolist", "tobytes", "tofile", "dump", "dumps", "getfield", "setflags", "resize", "to_device", "newbyteorder",
    "itemset", "ptp", "tostring",
}  # fmt: skip


def test_every_method_of_an_array_is_tried_or_returns_no_rounded_numbers() -> None:
    callables = {name for name in dir(np.ndarray) if callable(getattr(np.ndarray, name)) and name[0] != "_"}
    in_place = {name for name in dir(np.ndarray) if re.fullmatch("__i[a-z]+__", name) and name[3:-2] + "" in (
        "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")}  # fmt: skip
    assert len(callables) > 50
    assert callables | in_place <= set(METHODS) | set(REFUSED) | OTHERS


@pytest.mark.parametrize("name", METHODS)
def test_a_method_leaves_and_returns_rounded_numbers(name: str) -> None:
    x = bf16(np.abs(square()))
    result = getattr(x, name)(*METHODS[name])
    assert not off_grid([x, result])


@pytest.mark.parametrize("name", ["compress", "take", "dot", "trace", "cumsum", "round", "mean", "clip", "sum", "conj"])
def test_a_method_writes_rounded_numbers_into_the_array_of_another_format(name: str) -> None:
    x = as_dtype(plain(square()) * 1000, "float16")
    given = {"compress": ([True] * 4, 0), "take": (np.arange(4), 0), "dot": (x,), "clip": (-900.5, 900.5)}.get(name, ())
    out = bf16(np.zeros(np.shape(getattr(x, name)(*given))))
    getattr(x, name)(*given, out=out)
    assert not off_grid(out)
    assert np.any(plain(out) != 0)


def test_what_would_write_bytes_is_refused() -> None:
    x = square()
    for name in ("byteswap", "setfield"):
        with pytest.raises(
            TypeError,
            match=r"^the bytes of a rounded array cannot be changed; use x\[...\] = values, or x.astype\(\)$",
        ):
            getattr(x, name)(*REFUSED[name])
    with pytest.raises(ValueError, match="read-only"):
        x.flat[0] = 0.1
    with pytest.raises(AttributeError):
        x.flat = 0.1
    with pytest.raises(AttributeError):
        x.real = 0.1
    assert [float(number) for number in x.flat] == plain(x).ravel().tolist()
    x.real[...] = 0.1
    np.testing.assert_array_equal(x, bf16(np.full((4, 4), 0.1)))


def test_named_tuples_are_returned_as_such() -> None:
    found = np.linalg.svd(square())
    assert not off_grid(tuple(found))
    assert found.S.shape == (4,)


REDUCED: list[Callable[[Any], Any]] = [
    lambda x: x.mean(-1), lambda x: x.mean(axis=1, keepdims=True), lambda x: x.std(1), lambda x: x.std(ddof=1),
    lambda x: x.var(0), lambda x: x.var(axis=-1, ddof=1), lambda x: x.round(1), lambda x: x.round(decimals=1),
    lambda x: x.dot(x[0, 0]), lambda x: x[0].dot(b=x[1].T), lambda x: np.sum(x, axis=0, keepdims=True),
    lambda x: np.add(x, x, where=True), lambda x: np.modf(x)[1],
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(REDUCED)))
def test_methods_pass_their_arguments_on_and_round_once(number: int) -> None:
    found, in_float32 = REDUCED[number](X), REDUCED[number](np.array(plain(X)))
    assert type(found) is BF16
    np.testing.assert_array_equal(plain(found), plain(bf16(in_float32)))


def test_what_widens_and_what_does_not() -> None:
    # Only a floating-point array of at least one axis, as PyTorch promotes; also one within a list.
    single = np.ones(4, np.float32)
    for widening in (X * single, X * np.ones(4), np.concatenate([X[0, 0], single]), np.stack([single, X[0, 0]])):
        assert type(widening) is np.ndarray
    for kept in (X * np.array(2.0), X * np.float64(2.0), X * np.arange(4), X * True, X * 2, np.where(X > 0, X, 0)):
        assert type(kept) is BF16
    wider = np.clip(X, np.full(4, -1.0, np.float32), 1.0)
    assert type(wider) is np.ndarray
    assert type(np.clip(a=X, a_min=-1.0, a_max=np.full(4, 1.0, np.float32))) is np.ndarray
    # What is no floating-point array stays what it is.
    assert np.array_equal(X, X) is True
    assert np.argmax(X).dtype.kind == "i"
    assert type(np.divmod(X, bf16([2.0]))[0]) is BF16
    assert np.shape(X) == (2, 3, 4)


def test_astype_takes_the_arguments_of_numpy() -> None:
    x = bf16(np.ones((2, 3)))
    assert np.shares_memory(x.astype(np.float32, copy=False), x)
    assert not np.shares_memory(x.astype(np.float32), x)
    assert x.astype(np.float64, "F").flags.f_contiguous


def test_rounding_says_nothing_of_overflow_and_nan() -> None:
    # Warnings are errors here. The NaN is a signaling one, whose conversion the processor reports.
    signaling = np.array([0x7F800001], np.uint32).view(np.float32)
    for rounded in (bf16, f16):
        assert np.isnan(rounded(signaling)).all()
        assert np.isinf(rounded(np.float32(3.4e38))).all()


def test_rounding_is_by_way_of_float32() -> None:
    # As in a PyTorch kernel. Just above the middle between 1 and the next number; in float32 it is the middle, a tie.
    for rounded, step in ((bf16, 2.0**-7), (f16, 2.0**-10)):
        y = np.array([1 + step / 2 + 2.0**-30])
        assert plain(narrow(y, like=rounded([0.0]))).tolist() == plain(rounded(y)).tolist() == [1.0]
        assert plain(rounded([1 + step / 2 + 2.0**-20])).tolist() == [1 + step]


def test_names_of_precisions() -> None:
    said: dict[str, Any] = {
        "bfloat16": "jax.numpy.bfloat16", "float16": np.dtype("float16"), "float32": np.float32, "float64": "float64",
    }  # fmt: skip
    assert {name: precision_named(dtype) for name, dtype in said.items()} == {name: name for name in said}
    for call, message in (
        (
            lambda: precision_named("torch.int8"),
            "unknown dtype 'torch.int8'; it must be one of float64, float32, float16, bfloat16",
        ),
        (lambda: as_dtype([1], "int8"), "unknown dtype 'int8'; it must be float64, float32, float16 or bfloat16"),
    ):
        with pytest.raises(ValueError, match="unknown dtype") as caught:
            call()
        assert str(caught.value) == message


# --- what a method or a written array returns -------------------------------------------------------------------------


def test_what_is_written_into_is_what_is_returned() -> None:
    x, out = square(), bf16(np.zeros((4, 4)))
    assert np.cumsum(x, axis=0, out=out) is out
    by_position = bf16(np.zeros((4, 4)))
    assert np.cumsum(x, 0, None, by_position) is by_position
    np.testing.assert_array_equal(plain(by_position), round_bits(np.cumsum(plain(x), axis=0)))
    assert np.atleast_1d(x) is x
    parts = bf16(np.zeros((4, 4))), bf16(np.zeros((4, 4)))
    returned = np.modf(x, out=parts)
    assert isinstance(returned, tuple)
    assert all(given is back for given, back in zip(parts, returned, strict=True))


def test_a_mask_of_a_reduction_says_what_is_summed_and_not_what_is_written() -> None:
    x, out = square(), bf16(np.zeros(4))
    np.add.reduce(x, axis=0, where=FIELD > 0, out=out)
    np.testing.assert_array_equal(
        plain(out), round_bits(np.where(FIELD > 0, plain(x), 0).sum(axis=0, dtype=np.float32))
    )


def test_numbers_are_cast_as_they_are_asked_to_be() -> None:
    whole = np.zeros((4, 4), int)
    np.multiply(square(), 3.0, out=whole, casting="unsafe")
    np.testing.assert_array_equal(whole, np.trunc(plain(square() * 3.0)))
    with pytest.raises(TypeError, match="Cannot cast"):
        np.multiply(square(), 3.0, out=bf16(np.zeros((4, 4))), casting="no", dtype=np.float64)


def test_methods_use_their_arguments() -> None:
    x = square()
    np.testing.assert_array_equal(plain(x.compress([True, False, True], 1)), plain(x)[:, [0, 2]])
    x.fill(0.1)
    np.testing.assert_array_equal(plain(x), round_bits(np.full((4, 4), 0.1)))


def test_errors_are_measured_in_ordinary_float64() -> None:
    for x in (bf16([0.1]), f16([0.1]), np.array([0.1], np.float32), np.array([1])):
        assert type(as_float64(x)) is np.ndarray
        assert as_float64(x).dtype == np.float64
        assert as_float64(x)[0] == float(x[0])
