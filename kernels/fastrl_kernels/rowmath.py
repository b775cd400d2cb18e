"""Arithmetic of one row of logits, shared by every kernel that reads the vocabulary.

Legend:

    x    a logit as given
    u    entry(x), the logit after its sign or its softcap
    z    c * u, the logits of the softmax, with a factor c > 0
    k    c * log2(e), so that e^(z - z') = 2^((u - u') * k)

Differences are formed in u, before any scaling. A common offset of 1e6 then cancels exactly, while c * u - c * u' would
lose digits to rounding.

Fused multiply-adds are written out, and `COMPILE_OPTIONS` forbid the compiler to form others. Two kernels that share
these helpers then give the same bits for the same row, whatever code surrounds the helpers.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# 2^-2000 is 0 in float32 and float64. Exponents stop here, so that an entry of -inf contributes 0 to sums of p and of
# p log p by arithmetic alone (0 * -2000), with no select per element.
EXPONENT_FLOOR = tl.constexpr(-2000.0)


@triton.jit
def exponent(difference, k):
    """Return difference * k, not below `EXPONENT_FLOOR`. NaN stays NaN."""
    return tl.maximum(difference * k, EXPONENT_FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def log1p_unit(x):
    """Return log(1 + x) for x in [0, 1] with a relative error of a few roundings, also where 1 + x rounds to 1."""
    # log(1 + x) = 2 atanh(s) with s = x / (2 + x) <= 1/3. (1/9)^18 is below float64's rounding.
    s = x / (2.0 + x)
    s2 = s * s
    series = s2 * 0.0 + 1.0 / 37
    for i in tl.static_range(18):
        series = series * s2 + 1.0 / (35 - 2 * i)
    return 2.0 * s * series


@triton.jit
def one_minus_exp(x):
    """Return 1 - e^x for x <= 0 with a relative error of a few roundings, also where e^x rounds to 1."""
    near = tl.maximum(x, -0.5, propagate_nan=tl.PropagateNan.ALL)
    # -(x + x^2/2! + ...), nested from the inside. 0.5^17 / 17! is below float64's rounding of the first term.
    series = near * 0.0 + 1.0
    for i in tl.static_range(15):
        series = 1.0 + series * near * (1.0 / (16 - i))
    return tl.where(x > -0.5, -near * series, 1.0 - tl.exp(x))


@triton.jit
def tanh_and_slope(a):
    """Return tanh(a) and 1 - tanh(a)^2, each with a relative error of a few roundings."""
    magnitude = tl.abs(a)
    z = a * a
    # Lambert's continued fraction a / (1 + z / (3 + z / (5 + ...))), cut off after 6 levels (2e-9 at |a| = 1) or
    # 8 (4e-17 at 0.7), in the form |a| (1 - z * above / below): the subtracted term is small, and so are its roundings.
    if a.dtype == tl.float64:
        near = magnitude < 0.7
        above = tl.fma(z, tl.fma(z, z + 594.0, 45045.0), 675675.0)
        below = tl.fma(z, tl.fma(z, tl.fma(z, z + 630.0, 51975.0), 945945.0), 2027025.0)
    else:
        near = magnitude < 1.0
        above = tl.fma(z, z + 189.0, 3465.0)
        below = tl.fma(z, tl.fma(z, z + 210.0, 4725.0), 10395.0)
    # Elsewhere tanh|a| = 1 - r with r = 2q / (1 + q), q = e^(-2|a|), and 1 - tanh^2 = r (2 - r): nothing cancels.
    q = tl.exp2(magnitude * (-2.0 * LOG2E))
    ratio = tl.where(near, z * above, 2.0 * q) / tl.where(near, below, 1.0 + q)
    tanh = tl.where(near, tl.fma(-magnitude, ratio, magnitude), 1.0 - ratio)
    slope = tl.where(near, 1.0 - tanh * tanh, ratio * (2.0 - ratio))
    return tl.where(a < 0, -tanh, tanh), slope


@triton.jit
def entry(x, slope, HAS_SOFTCAP: tl.constexpr):
    """Return u of a logit: tanh(slope * x) under a softcap, else slope * x, where slope is then +1 or -1."""
    if HAS_SOFTCAP:
        u, _ = tanh_and_slope(x * slope)
        return u
    else:
        return x * slope


@triton.jit
def lowest(dtype: tl.constexpr):
    """Return the most negative finite number of float32 or float64."""
    if dtype == tl.float64:
        return tl.full((), -1.7976931348623157e308, dtype)
    else:
        return tl.full((), -3.4028234663852886e38, dtype)


@triton.jit
def online_softmax_update(u, m, s, w, k):
    """Take a block into the running max `m` (scalar) and, lane by lane, into sum 2^t and sum t 2^t, t = (u - m) k.

    The sums are rescaled only when a block raises the max, which after the first few blocks is rare: per entry this
    leaves a subtraction, a multiplication, a clamp, one exp2 and two additions.
    """
    block_max = tl.max(u, 0)
    if block_max > m:
        t = exponent(m - block_max, k)
        w = tl.exp2(t) * (w + s * t)
        s = tl.exp2(t) * s
        m = block_max
    t = exponent(u - m, k)
    e = tl.exp2(t)
    return m, s + e, tl.fma(e, t, w)


@triton.jit
def ordered_sum(x):
    """Return the sum of a vector of one sign, 2^n entries long, in the same bits for any layout over threads.

    `tl.sum` adds a thread's own entries first. Which entries these are depends on the width of the loads, and so on
    the address and the stride of the row. Here each level adds neighbours, and two numbers add up the same either way.
    """
    for _ in tl.static_range(16):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0] // 2, 2)), 1)
    return tl.sum(x, 0)


@triton.jit
def ordered_sum_of_signs(x):
    """Return `ordered_sum` of a vector of both signs.

    It adds the two halves of the vector at each level: neighbours in a rising row have one sign, and their sums would
    grow and be rounded before they cancel. The price is an exchange between warps at three levels.
    """
    for _ in tl.static_range(16):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, (2, x.shape[0] // 2)), 0)
    return tl.sum(x, 0)


@triton.jit
def row_frame(logsumexp, c):
    """Return the log-sum-exp in units of u. Forward and backward must agree on its bits, hence the IEEE division."""
    if logsumexp.dtype == tl.float64:
        return logsumexp / c
    else:
        return tl.div_rn(logsumexp, c)


@triton.jit
def finish_row(u_label, m, s_others, w_others, c, k):
    """Return logp, entropy, log-sum-exp and its part without the max, of a row.

    The sums are those over all entries but the label's: keeping the label apart makes logp = -log1p(S_others / e_y)
    exact in relative terms as p -> 1. `m` must be the max over all entries, the label's included. A row without any
    mass (all -inf) is NaN.
    """
    t_label = exponent(u_label - m, k)
    e_label = tl.exp2(t_label)
    total = s_others + e_label
    w = w_others + e_label * t_label
    # Where the label outweighs the rest it is the max, e_label = 1, and s_others <= 1.
    dominant = s_others <= e_label
    log_total = tl.where(
        dominant, log1p_unit(tl.minimum(s_others, 1.0, propagate_nan=tl.PropagateNan.ALL)), tl.log(total)
    )
    logp = tl.where(dominant, -log_total, (u_label - m) * c - log_total)
    entropy = log_total - LN2 * (w / total)
    mass = total > 0
    nan = float("nan")
    return tl.where(mass, logp, nan), tl.where(mass, entropy, nan), tl.where(mass, m * c + log_total, nan), log_total


@triton.jit
def row_factor(
    row,
    inv_temperature_ptr,  # (N,) or None
    stride_inv_temperature,
    inv_temperature,  # scalar, used where the pointer is None
    factor,
    ACC: tl.constexpr,
):
    """Return c, the factor from u to z, of a row, or NaN unless the temperature is a positive number."""
    if inv_temperature_ptr is not None:
        inverse = tl.load(inv_temperature_ptr + row * stride_inv_temperature).to(ACC)
    else:
        inverse = tl.full((), inv_temperature, ACC)
    c = inverse * tl.full((), factor, ACC)
    return tl.where((inverse > 0) & (c > 0) & (c < float("inf")), c, float("nan"))
