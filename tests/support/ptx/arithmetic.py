"""Arithmetic of PTX in NumPy: exact rounding, fused multiply-add, approximate instructions, conversions.

NumPy rounds to nearest, keeps subnormals and has no fused multiply-add. The functions here give the other rounding
modes, `.ftz`, and one rounding for a product and a sum.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from ptx.text import DTYPE, F32, F64, I32, I64, U16, U32, U64

_TINY32 = F32(2.0**-126)  # the smallest normal number


def flush(x: np.ndarray) -> np.ndarray:
    """Return float32 with subnormal numbers as zeros of the same sign: `.ftz`."""
    return np.where(np.abs(x) < _TINY32, np.copysign(F32(0), x), x)


def _odd(total: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Return total + error (|error| <= ulp / 2) rounded to odd: rounding it once more is then exact."""
    bits = total.view(I64)
    move = (error != 0) & (bits & 1 == 0) & np.isfinite(total)
    toward = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(move, bits + toward, bits).view(F64)


def two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (a + b rounded, its error), exact (Knuth)."""
    s = a + b
    bb = s - a
    return s, (a - (s - bb)) + (b - bb)


def to_f32(x: np.ndarray, error: np.ndarray, mode: str) -> np.ndarray:
    """Return x + error in float32, rounded to nearest ("rn"), toward zero ("rz"), down ("rm") or up ("rp")."""
    exact = _odd(x, error)
    r = exact.astype(F32)
    if mode == "rn":
        return r
    wide = r.astype(F64)
    wrong = {"rz": np.abs(wide) > np.abs(exact), "rm": wide > exact, "rp": wide < exact}[mode]
    toward = {"rz": F32(0), "rm": F32(-np.inf), "rp": F32(np.inf)}[mode]
    return np.where(wrong, np.nextafter(r, toward), r)


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return a b + c in float32, rounded once."""
    p = np.multiply(a, b, dtype=F64)  # exact
    s = np.add(p, c, dtype=F64)
    r = s.astype(F32)
    # A second rounding changes something only at a tie of the first, or among subnormals.
    doubt = (s.view(U64) & U64(0x1FFFFFFF)) == U64(0x10000000)
    doubt |= np.abs(r) < _TINY32
    if doubt.any():
        c = np.broadcast_to(np.asarray(c, F64), s.shape)
        exact, error = two_sum(p[doubt], c[doubt])
        r[doubt] = np.where(np.isfinite(exact), to_f32(exact, error, "rn"), r[doubt])
    return r


def _halves64(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return two float64 of 26 bits each with the sum a (Dekker)."""
    t = a * F64(134217729.0)
    high = t - (t - a)
    return high, a - high


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Return a b + c in float64, rounded once (Boldo and Melquiond 2008); extremes go through exact fractions."""
    a, b, c = np.broadcast_arrays(np.asarray(a, F64), np.asarray(b, F64), np.asarray(c, F64))
    uh = a * b
    (ah, al), (bh, bl) = _halves64(a), _halves64(b)
    ul = al * bl - (((uh - ah * bh) - al * bh) - ah * bl)
    th, tl = two_sum(c, ul)
    vh, vl = two_sum(uh, th)
    r = vh + _odd(*two_sum(tl, vl))
    plain = uh + c
    big = np.maximum(np.maximum(np.abs(a), np.abs(b)), np.maximum(np.abs(uh), np.abs(c)))
    small = (
        (np.abs(uh) < 1e-260) & (uh != 0) | ((uh == 0) & (a != 0) & (b != 0)) | (np.abs(plain) < 1e-290) & (plain != 0)
    )
    hard = np.isfinite(a) & np.isfinite(b) & np.isfinite(c) & ((big > 1e280) | small)
    r = np.where(np.isfinite(plain) & np.isfinite(r), r, plain)
    r = np.where((uh == 0) & ~hard, plain, r)
    for i in np.flatnonzero(hard):
        try:
            exact = float(Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i])))
        except OverflowError:
            exact = float(plain[i])
        r[i] = exact if exact != 0 else plain[i]
    return r


class Approximate:
    """Results of approximate instructions: rounded correctly, then moved by up to the error that a device may have.

    | instruction | error |
    |---|---|
    | ex2.approx.f32 | 2 ulp; 2^0 is exactly 1 |
    | div.full.f32, div.approx.f32 | 2 ulp |
    | rcp.approx.f32, sqrt.approx.f32 | 1 ulp |
    | rsqrt.approx.f32 | 2^-22.9 relative: 2 ulp |
    | lg2.approx.f32 | 2^-22, absolute below 1, else relative |
    | tanh.approx.f32 | 2^-11 relative |

    The bounds are the PTX manual's as they are commonly quoted; no copy of it was at hand to check them. `mode` is
    "nominal" (no error), "high" or "low" (all of it, up or down), or "random": a hash of the input, as a device's error
    is a function of the input.
    """

    def __init__(self, mode: str = "nominal", seed: int = 0) -> None:
        self.mode, self.seed = mode, seed

    def move(self, r: np.ndarray, ulps: int, source: np.ndarray) -> np.ndarray:
        """Return float32 results moved by up to some ulps, as a function of their `source`."""
        if self.mode == "nominal":
            return r
        bits = r.view(I32)
        if self.mode == "random":
            mixed = (source.view(U32) ^ U32(self.seed)) * U32(2654435761)
            step = (mixed >> U32(16)).astype(I32) % (2 * ulps + 1) - ulps
        else:
            step = I32(ulps if self.mode == "high" else -ulps)
        movable = np.isfinite(r) & (np.abs(r) >= _TINY32) & (np.abs(r) < F32(3e38))
        return np.where(movable, bits + step, bits).view(F32)

    def ex2(self, x: np.ndarray) -> np.ndarray:
        """Return 2^x."""
        return np.where(x == 0, F32(1), self.move(np.exp2(x.astype(F64)).astype(F32), 2, x))

    def lg2(self, x: np.ndarray) -> np.ndarray:
        """Return log2(x)."""
        r = np.log2(x.astype(F64))
        if self.mode != "nominal":
            sign = -1.0 if self.mode == "low" else 1.0
            r = r + sign * 2.0**-22 * np.maximum(np.abs(r), 1.0) * np.isfinite(r)
        return r.astype(F32)

    def tanh(self, x: np.ndarray) -> np.ndarray:
        """Return tanh(x)."""
        return self.move(np.tanh(x.astype(F64)).astype(F32), 1 << 12, x)

    def divide(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return a / b."""
        r = np.divide(a, b)
        return self.move(r, 2, r)

    def rcp(self, x: np.ndarray) -> np.ndarray:
        """Return 1 / x."""
        return self.move(np.divide(F32(1), x), 1, x)

    def sqrt(self, x: np.ndarray) -> np.ndarray:
        """Return the square root."""
        return self.move(np.sqrt(x), 1, x)

    def rsqrt(self, x: np.ndarray) -> np.ndarray:
        """Return 1 over the square root."""
        return self.move((1 / np.sqrt(x.astype(F64))).astype(F32), 2, x)


def bf16_to_f32(x: np.ndarray) -> np.ndarray:
    """Return float32 from the bits of bfloat16."""
    return (np.asarray(x).astype(U32) << U32(16)).view(F32)


def f32_to_bf16(x: np.ndarray) -> np.ndarray:
    """Return the bits of bfloat16, rounded to nearest even; NaN is 0x7FFF."""
    bits = np.ascontiguousarray(x, F32).view(U32)
    rounded = (bits + (((bits >> U32(16)) & U32(1)) + U32(0x7FFF))) >> U32(16)
    return np.where(np.isnan(x), U32(0x7FFF), rounded).astype(U16)


def to_integer(x: np.ndarray, kind: str) -> np.ndarray:
    """Return whole numbers as integers of a type, saturated; NaN is 0."""
    info = np.iinfo(DTYPE[kind])
    top = float(info.max)
    wide = np.nan_to_num(x.astype(F64), nan=0.0)
    inside = np.clip(wide, float(info.min), np.nextafter(top, 0) if top > 2**53 else top)
    return np.where(wide >= top, info.max, inside.astype(DTYPE[kind])).astype(DTYPE[kind])


ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
