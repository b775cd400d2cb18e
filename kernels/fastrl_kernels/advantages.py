"""Group-normalised advantages: one program per group, groups ragged and of any size.

    centred_i = r_i - mean                 (baseline "group_mean")
    centred_i = n / (n - 1) (r_i - mean)   (baseline "leave_one_out": r_i minus the mean of the others)
    advantage_i = centred_i / (std + eps)  (scale "group": unbiased std of the group, "batch": given std of the
                                            batch, "none": centred_i)

A NaN reward is a missing reward: it counts in no mean, std or n, and its advantage is 0. The advantages of a group with
one reward, or of equal rewards, are exactly 0, although the mean of n times 0.1 need not be 0.1.

Legend: B rewards, G groups.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl_kernels.launch import Tile, launch_options, on_device_of

# Groups of RL post-training have 4 to 64 members: one warp takes most of them in one step. Not yet tuned on a device.
TILE = Tile(128, 1)


@triton.jit
def _load_rewards(rewards_ptr, stride_rewards, order_ptr, start, end, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Return (index in the batch, reward, whether in the group, whether also not missing) of a block of a group."""
    offs = start + tl.arange(0, BLOCK)
    mask = offs < end
    index = tl.load(order_ptr + offs, mask=mask, other=0).to(tl.int64)
    reward = tl.load(rewards_ptr + index * stride_rewards, mask=mask, other=0.0).to(ACC)
    return index, reward, mask, mask & (reward == reward)


@triton.jit(
    do_not_specialize=["stride_rewards"],
    do_not_specialize_on_alignment=[
        "rewards_ptr",
        "order_ptr",
        "offsets_ptr",
        "batch_std_ptr",
        "advantages_ptr",
        "mean_ptr",
        "std_ptr",
        "count_ptr",
    ],
)
def _group_advantages_fwd_kernel(
    rewards_ptr,  # (B,)
    stride_rewards,
    order_ptr,  # (B,)
    offsets_ptr,  # (G + 1,)
    batch_std_ptr,  # (1,) or None
    advantages_ptr,  # (B,)
    mean_ptr,  # (G,)
    std_ptr,  # (G,)
    count_ptr,  # (G,)
    eps: tl.float64,
    LEAVE_ONE_OUT: tl.constexpr,
    GROUP_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = advantages_ptr.dtype.element_ty
    group = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets_ptr + group).to(tl.int64)
    end = tl.load(offsets_ptr + (group + 1)).to(tl.int64)

    acc_sum = tl.zeros((BLOCK,), ACC)
    acc_count = tl.zeros((BLOCK,), ACC)
    largest = tl.full((BLOCK,), float("-inf"), ACC)
    smallest = tl.full((BLOCK,), float("inf"), ACC)
    for start in range(begin, end, BLOCK):
        _, reward, _, there = _load_rewards(rewards_ptr, stride_rewards, order_ptr, start, end, ACC, BLOCK)
        acc_sum += tl.where(there, reward, 0.0)
        acc_count += tl.where(there, 1.0, 0.0)
        largest = tl.maximum(largest, tl.where(there, reward, float("-inf")))
        smallest = tl.minimum(smallest, tl.where(there, reward, float("inf")))
    n = tl.sum(acc_count, 0)
    # 1 in place of 0 keeps the statistics of a group without rewards at 0.
    mean = tl.sum(acc_sum, 0) / tl.maximum(n, 1.0)
    # A difference, not max == min: rewards that are all +inf are not equal but undefined.
    equal = tl.max(largest, 0) - tl.min(smallest, 0) == 0

    acc_deviation = tl.zeros((BLOCK,), ACC)
    acc_square = tl.zeros((BLOCK,), ACC)
    for start in range(begin, end, BLOCK):
        _, reward, _, there = _load_rewards(rewards_ptr, stride_rewards, order_ptr, start, end, ACC, BLOCK)
        deviation = tl.where(there, reward - mean, 0.0)
        acc_deviation += deviation
        acc_square = tl.fma(deviation, deviation, acc_square)
    # The deviations sum to the rounding error of the mean. Mean and variance are corrected by it.
    remainder = tl.sum(acc_deviation, 0) / tl.maximum(n, 1.0)
    variance = (tl.sum(acc_square, 0) - n * remainder * remainder) / tl.maximum(n - 1.0, 1.0)
    zero = equal | (n < 2)
    std = tl.where(zero, 0.0, tl.sqrt(tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL)))

    factor = tl.full((), 1.0, ACC)
    if LEAVE_ONE_OUT:
        factor = n / tl.maximum(n - 1.0, 1.0)
    divisor = tl.full((), 1.0, ACC)
    if GROUP_SCALE:
        divisor = std + tl.full((), eps, ACC)
    elif batch_std_ptr is not None:
        divisor = tl.load(batch_std_ptr).to(ACC) + tl.full((), eps, ACC)
    for start in range(begin, end, BLOCK):
        index, reward, mask, there = _load_rewards(rewards_ptr, stride_rewards, order_ptr, start, end, ACC, BLOCK)
        advantage = (reward - mean - remainder) * factor / divisor
        tl.store(advantages_ptr + index, tl.where(there & (zero == 0), advantage, 0.0), mask=mask)

    tl.store(mean_ptr + group, mean + remainder)
    tl.store(std_ptr + group, std)
    tl.store(count_ptr + group, n.to(tl.int64))


def group_advantages_fwd(
    rewards: Tensor,  # (B,), any stride
    order: Tensor,  # (B,) int32 or int64
    offsets: Tensor,  # (G + 1,) int32 or int64
    *,
    baseline: str = "group_mean",
    scale: str = "group",
    eps: float = 1e-4,
    batch_std: Tensor | None = None,  # (1,)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (advantages (B,), mean (G,), std (G,), count (G,)), float32 (float64 for float64 rewards), count int64.

    Mean and unbiased std are over the rewards that are not NaN, and 0 for a group without any. `count` is their number.

    Args:
        rewards: one reward per sequence, NaN where it is missing.
        order: a permutation of the batch that puts the members of each group next to each other.
        offsets: where each group starts in `order`, and at the end B.
        baseline: "group_mean" or "leave_one_out".
        scale: "group", "batch" (divides by `batch_std` + eps) or "none".
        eps: added to the std.
        batch_std: the std of the batch, with scale "batch" only.
    """
    if baseline not in ("group_mean", "leave_one_out"):
        raise ValueError(f'baseline must be "group_mean" or "leave_one_out", got {baseline!r}')
    if scale not in ("group", "batch", "none"):
        raise ValueError(f'scale must be "group", "batch" or "none", got {scale!r}')
    if (scale == "batch") != (batch_std is not None):
        got = "none" if batch_std is None else "one"
        raise ValueError(f'batch_std must be given with scale="batch" and only then, got {got} with scale={scale!r}')
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    groups = offsets.numel() - 1
    advantages = torch.empty(rewards.shape, dtype=dtype, device=rewards.device)
    mean, std = (torch.empty(groups, dtype=dtype, device=rewards.device) for _ in range(2))
    count = torch.empty(groups, dtype=torch.int64, device=rewards.device)
    if groups == 0:
        return advantages, mean, std, count
    with on_device_of(rewards):
        _group_advantages_fwd_kernel[(groups,)](
            rewards,
            rewards.stride(0),
            order.contiguous(),
            offsets.contiguous(),
            batch_std,
            advantages,
            mean,
            std,
            count,
            eps,
            LEAVE_ONE_OUT=baseline == "leave_one_out",
            GROUP_SCALE=scale == "group",
            BLOCK=TILE.block,
            **launch_options(TILE),
        )
    return advantages, mean, std, count
