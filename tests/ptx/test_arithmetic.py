"""The arithmetic of the interpreter of PTX against exact fractions, and conversions against torch."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx.arithmetic import Approximate, bf16_to_f32, f32_to_bf16, flush, fma32, fma64, to_f32, to_integer, two_sum

F32, F64 = np.float32, np.float64
# Digits, smallest exponent of a normal number, infinity from here.
FORMATS = {F32: (24, -126, Fraction(2) ** 128), F64: (53, -1022, Fraction(2) ** 1024)}


def rounded(exact: Fraction, dtype: type, mode: str = "rn") -> float:
    """Return an exact number in a format, by integers alone."""
    digits, smallest, limit = FORMATS[dtype]
    if exact == 0:
        return 0.0
    size, sign = abs(exact), 1 if exact > 0 else -1
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent += (Fraction(2) ** (exponent + 1) <= size) - (Fraction(2) ** exponent > size)
    unit = Fraction(2) ** (max(exponent, smallest) - digits + 1)
    count, rest = divmod(size, unit)
    half = Fraction(2 * rest, unit)
    away = {"rz": False, "rm": sign < 0 and rest > 0, "rp": sign > 0 and rest > 0}
    count += away[mode] if mode != "rn" else half > 1 or (half == 1 and count % 2 == 1)
    value = count * unit
    return sign * (np.inf if value >= limit else float(value))


def triples(dtype: type, scale: float, seed: int, n: int = 2000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a, b, c of all sizes near a scale; a third of the sums cancel."""
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(n) * scale).astype(dtype), rng.standard_normal(n).astype(dtype)
    c = (rng.standard_normal(n) * scale * 2.0 ** rng.integers(-30, 30, n)).astype(dtype)
    c[::3] = -(a * b)[::3]
    return a, b, c


@pytest.mark.parametrize("scale", [1.0, 2.0**-60, 2.0**-70, 2.0**-90, 2.0**60, 2.0**90])
def test_a_product_and_a_sum_are_rounded_once_in_float32(scale: float) -> None:
    a, b, c = triples(F32, scale, 0)
    with np.errstate(all="ignore"):
        found = fma32(a, b, c)
    wanted = [
        rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), F32)
        for x, y, z in zip(a, b, c, strict=True)
    ]
    np.testing.assert_array_equal(found, np.array(wanted, F32))


@pytest.mark.parametrize("scale", [1.0, 1e-150, 1e150, 1e-300, 1e-310, 1e290])
def test_a_product_and_a_sum_are_rounded_once_in_float64(scale: float) -> None:
    a, b, c = triples(F64, scale, 1)
    with np.errstate(all="ignore"):
        found = fma64(a, b, c)
    exactly = (
        Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)
    )
    wanted = [rounded(number, F64) for number in exactly]
    np.testing.assert_array_equal(found, np.array(wanted))


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_sums_are_rounded_in_every_mode(mode: str) -> None:
    a, _, c = triples(F32, 1.0, 2)
    found = to_f32(*two_sum(a.astype(F64), c.astype(F64)), mode)
    wanted = [rounded(Fraction(float(x)) + Fraction(float(z)), F32, mode) for x, z in zip(a, c, strict=True)]
    np.testing.assert_array_equal(found, np.array(wanted, F32))


def test_nothing_finite_comes_of_infinities() -> None:
    inf, nan = F32(np.inf), F32(np.nan)
    a, b, c = (np.array(v, F32) for v in ([inf, inf, 1, nan, 0], [1, 0, inf, 1, inf], [-inf, 1, 1, 1, 1]))
    with np.errstate(all="ignore"):
        found = fma32(a, b, c)
    np.testing.assert_array_equal(found, np.array([nan, nan, inf, nan, nan], F32))


def test_bfloat16_over_all_bits() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide = bf16_to_f32(bits)
    wanted = torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(wide.view(np.uint32), wanted.view(np.uint32))
    known = ~np.isnan(wide)
    np.testing.assert_array_equal(f32_to_bf16(wide)[known], bits[known])
    assert (f32_to_bf16(wide[~known]) == 0x7FFF).all()


def test_float32_to_16_bits_as_torch_rounds() -> None:
    """Beside every number of 16 bits: itself, the tie above it, and both neighbours of the tie."""
    for half, to_bits in (
        (torch.bfloat16, f32_to_bf16),
        (torch.float16, lambda x: x.astype(np.float16).view(np.uint16)),
    ):
        near = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(half).float().numpy().view(np.uint32)
        shift = 16 if half == torch.bfloat16 else 13
        tie = near + np.uint32(1 << (shift - 1))
        numbers = np.concatenate([near, tie - np.uint32(1), tie, tie + np.uint32(1)]).view(np.float32)
        numbers = numbers[~np.isnan(numbers)]
        wanted = torch.from_numpy(numbers.copy()).to(half).view(torch.int16).numpy().view(np.uint16)
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(to_bits(numbers), wanted)


def test_integers_are_saturated() -> None:
    x = np.array([np.nan, np.inf, -np.inf, 3e9, -3e9, 7.0, -7.0], F64)
    assert to_integer(x, "s32").tolist() == [0, 2**31 - 1, -(2**31), 2**31 - 1, -(2**31), 7, -7]
    assert to_integer(x, "u32").tolist() == [0, 2**32 - 1, 0, 3_000_000_000, 0, 7, 0]
    assert to_integer(x[:3], "s64").tolist() == [0, 2**63 - 1, -(2**63)]


def test_subnormal_numbers_are_flushed() -> None:
    tiny = F32(2.0**-126)
    x = np.array([tiny, np.nextafter(tiny, F32(0)), -np.nextafter(tiny, F32(0)), 0.0, -0.0], F32)
    found = flush(x)
    assert found.tolist() == [tiny, 0, 0, 0, 0]
    assert np.signbit(found).tolist() == [False, False, True, False, True]


@pytest.mark.parametrize("mode", ["nominal", "low", "high", "random"])
@pytest.mark.parametrize("name", ["ex2", "rcp", "sqrt", "rsqrt", "tanh", "lg2"])
def test_approximations_stay_within_their_bounds(name: str, mode: str) -> None:
    rng = np.random.default_rng(3)
    x = np.exp2(rng.uniform(-20, 6, 20_000)).astype(F32)
    exact = {"ex2": np.exp2, "rcp": np.reciprocal, "sqrt": np.sqrt, "tanh": np.tanh, "lg2": np.log2}
    right = 1 / np.sqrt(x.astype(F64)) if name == "rsqrt" else exact[name](x.astype(F64))
    bound = {"ex2": 2.5 * 2.0**-23, "rsqrt": 2.5 * 2.0**-23, "tanh": 2.0**-11 * 1.01, "lg2": 2.0**-21.5}
    found = getattr(Approximate(mode, seed=5), name)(x)
    error = np.abs(found.astype(F64) - right) / (np.maximum(np.abs(right), 1.0) if name == "lg2" else np.abs(right))
    granted = bound.get(name, 1.5 * 2.0**-23) if mode != "nominal" else 2.0**-24 * 1.01
    assert error.max() <= granted * 1.001
    assert found.dtype == F32
    if mode != "nominal":
        assert (found != getattr(Approximate(), name)(x)).mean() > 0.3


def test_the_exponential_of_nothing_is_exact() -> None:
    assert (Approximate("high").ex2(np.zeros(3, F32)) == 1).all()
