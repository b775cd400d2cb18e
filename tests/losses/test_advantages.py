"""Advantages: every golden case, brute force over options, missing rewards, degenerate groups, metrics, shaping."""

import math
from typing import Any

import pytest
import torch
from golden import Case, cases
from oracle import assert_as_accurate
from torch import Tensor

from fastrl import reference
from fastrl.losses import masks
from fastrl.losses.advantages import estimators
from fastrl.losses.advantages.group import BASELINES, SCALES, group_advantages, group_baselines, reward_metrics

NAN = math.nan
TOKEN_LEVEL = ("gae", "reinforce_pp", "remax")
AS_VERL = {"singleton": "reward"}


def groups_of(case: Case) -> dict[str, Any]:
    size = case.hyper["group_size"]
    return {"group_ids": case.inputs["group_ids"]} if size is None else {"group_size": size}


def plain(case: Case, x: dict[str, Tensor]) -> Tensor:
    single = "reward" if case.hyper["single_group"] else "zero"
    eps = case.hyper["eps"] or 0.0
    return group_advantages(x["rewards"], scale=case.hyper["scale"], eps=eps, singleton=single, **groups_of(case))


def compute(case: Case, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the outputs of the case, computed by the public functions."""
    name, given, eps = case.algorithm, groups_of(case), case.hyper["eps"]
    if name.startswith("baseline_and_std"):
        baseline, std = group_baselines(x["rewards"], leave_one_out=case.hyper["leave_one_out"], **given)
        return {"baseline": baseline, "std": std}
    if name == "optimal_token_baseline":
        columns = (x["token_rewards"], x["old_logprobs"], x["sum_squared_probs"], x["mask"])
        result, returns = estimators.otb_advantages(*columns, eps=eps, **given, **AS_VERL)
        return {"advantages": result, "returns": returns}
    if name == "reinforce_pp_baseline":
        result = estimators.reinforce_plus_plus_baseline_advantages(x["rewards"], x["mask"], **given, **AS_VERL)
    elif name == "gdpo_single_reward":
        columns = x["rewards"].unsqueeze(1)
        result = estimators.gdpo_advantages(columns, eps=eps, whiten="tokens", mask=x["mask"], **given, **AS_VERL)
    elif name == "gdpo":
        result = estimators.gdpo_advantages(x["rewards"], case.hyper["reward_weights"], eps=eps, **given)
    elif name == "grpo_multi_reward":
        combined = estimators.combine_rewards(x["rewards"], case.hyper["reward_weights"])
        result = group_advantages(combined, eps=eps, **given)
    elif name == "opo":
        result = estimators.opo_advantages(x["rewards"], x["mask"].sum(1), **given, **AS_VERL)
    elif name == "maxrl":
        result = estimators.maxrl_advantages(x["rewards"], eps=eps, **given)
    elif name == "gpg_advantage":
        result = estimators.gpg_advantages(x["rewards"], f_norm=case.hyper["f_norm"], **given)
    elif name == "pass_at_k":
        result = estimators.pass_at_k_advantages(x["rewards"], eps=eps, **given)
    else:
        result = plain(case, x)
    if result.dim() == 1 and "mask" in x:
        result = result.unsqueeze(1) * x["mask"]
    return {"advantages": result}


GOLDEN = [case for case in cases("advantage") if not case.algorithm.startswith(TOKEN_LEVEL)]
GOLDEN += [case for case in cases("advantage") if case.algorithm == "reinforce_pp_baseline"]


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.id)
def test_advantages_match_trainer_in_float64(case: Case) -> None:
    for name, value in compute(case, case.leaves(torch.float64)).items():
        case.check(name, value)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.id)
def test_advantages_in_float32_are_as_close_as_rounding_allows(case: Case) -> None:
    exact, result = compute(case, case.leaves(torch.float64)), compute(case, case.leaves(torch.float32))
    for name, value in result.items():
        assert value.dtype == torch.float32
        # Sums are taken in float64: what is left are the roundings of the result, with no help from an eager error.
        assert_as_accurate(name, value, exact[name], exact[name].float(), torch.float32)


def brute(
    r: list[float], ids: list[int], i: int, scale: str, baseline: str, eps: float, extra: dict[str, Any]
) -> float:
    """Return the advantage of row i, in Python floats."""
    if math.isnan(r[i]) or (baseline == "given" and math.isnan(extra["baseline_rewards"][i])):
        return 0.0
    mates = [j for j in range(len(r)) if ids[j] == ids[i] and not math.isnan(r[j])]
    values = [r[j] for j in mates]
    dull = max(values) == min(values)
    if dull and (baseline not in ("given", "none") or scale in ("group", "group_mean", "leave_one_out")):
        return 0.0
    mean = math.fsum(values) / len(values)
    others = [r[j] for j in mates if j != i]

    def std(x: list[float]) -> float:
        centre = math.fsum(x) / len(x) if x else 0.0
        return math.sqrt(math.fsum((v - centre) ** 2 for v in x) / (len(x) - 1)) if len(x) > 1 else 0.0

    if baseline == "length_weighted":
        lengths = [extra["lengths"][j] for j in mates]
        base = math.fsum(n * v for n, v in zip(lengths, values, strict=True)) / math.fsum(lengths)
    elif baseline == "leave_one_out":
        base = math.fsum(others) / len(others)
    else:
        base = {"group_mean": mean, "none": 0.0}.get(baseline, 0.0)
    if baseline == "given":
        base = extra["baseline_rewards"][i]
    if scale == "batch":
        return (r[i] - base) / (std([v for v in r if not math.isnan(v)]) + eps)
    if scale == "leave_one_out":
        return (r[i] - base) / ((std(others) + eps) if std(others) > 0 else 1.0)
    return (r[i] - base) / {"group": std(values) + eps, "group_mean": mean + eps, "none": 1.0}[scale]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_ragged_unsorted_groups_with_missing_rewards_match_brute_force(scale: str, baseline: str, seed: int) -> None:
    ids = [7, -3, 7, 10**12, -3, 7, 7, -3, 10**12, 5, 7, 8, 8, 8]
    rewards = torch.rand(len(ids), dtype=torch.float64) + 0.5
    rewards[[4, 8]] = NAN
    rewards[11:] = 0.1  # equal, and the mean of three times 0.1 is not 0.1
    extra: dict[str, Any] = {}
    if baseline == "length_weighted":
        extra["lengths"] = torch.arange(1, 15)
    if baseline == "given":
        extra["baseline_rewards"] = torch.rand(len(ids), dtype=torch.float64)
        extra["baseline_rewards"][2] = NAN
    result = group_advantages(rewards, group_ids=torch.tensor(ids), scale=scale, baseline=baseline, **extra)
    listed = {name: value.tolist() for name, value in extra.items()}
    want = [brute(rewards.tolist(), ids, i, scale, baseline, 1e-4, listed) for i in range(len(ids))]
    assert result.tolist() == pytest.approx(want, rel=1e-11, abs=1e-13)
    assert [x == 0.0 for x in result.tolist()] == [x == 0.0 for x in want]
    in_float32 = group_advantages(rewards.float(), group_ids=torch.tensor(ids), scale=scale, baseline=baseline, **extra)
    exact = group_advantages(
        rewards.float().double(), group_ids=torch.tensor(ids), scale=scale, baseline=baseline, **extra
    )
    assert_as_accurate("advantages", in_float32, exact, exact.float())


def test_group_size_is_consecutive_ids_and_a_permutation_permutes_the_result(seed: int) -> None:
    rewards = torch.randn(24)
    by_size = group_advantages(rewards, group_size=4)
    ids = torch.arange(24) // 4
    assert torch.equal(by_size, group_advantages(rewards, group_ids=ids))
    assert torch.equal(by_size, group_advantages(rewards, group_ids=ids.to(torch.int32) * -5))
    order = torch.randperm(24)
    shuffled = group_advantages(rewards[order], group_ids=ids[order])
    assert torch.allclose(shuffled, by_size[order], rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [0.1, -1e30, 1e-38, 3.0, 0.0])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out", "length_weighted"])
def test_equal_rewards_and_groups_of_one_give_exactly_zero(value: float, scale: str, baseline: str) -> None:
    lengths = {"lengths": torch.arange(9)} if baseline == "length_weighted" else {}
    for dtype in (torch.float32, torch.float64):
        equal = torch.full((9,), value, dtype=dtype)
        for groups in ({"group_size": 3}, {"group_size": 1}, {"group_size": 9}):
            result = group_advantages(equal, scale=scale, baseline=baseline, eps=0.0, **groups, **lengths)
            assert torch.equal(result, torch.zeros(9, dtype=dtype))


def test_missing_rewards_are_left_out_and_do_not_bias_the_group() -> None:
    with_missing = group_advantages([1.0, None, 0.0, NAN, None, None], group_ids=[0, 0, 0, 0, 1, 1], return_stats=True)
    without = group_advantages([1.0, 0.0], group_size=2)
    assert with_missing.advantages.tolist() == [without[0].item(), 0, without[1].item(), 0, 0, 0]
    assert with_missing.count.tolist() == [2, 0]
    assert with_missing.mean.tolist() == [0.5, 0]
    with pytest.raises(ValueError, match=r"rows 1, 3, 4, 5 \(4 in all\)"):
        group_advantages([1.0, None, 0.0, NAN, None, None], group_size=2, missing="raise")


def test_stats_are_those_of_the_groups_in_rising_order_of_id() -> None:
    stats = group_advantages([1.0, 5.0, 3.0, 7.0], group_ids=[9, -1, 9, 4], return_stats=True)
    assert stats.mean.tolist() == [5.0, 7.0, 2.0]
    assert stats.std.tolist() == pytest.approx([0.0, 0.0, math.sqrt(2.0)])
    assert stats.count.tolist() == [1, 1, 2]


def test_remax_needs_one_completion_per_prompt_only() -> None:
    result = group_advantages(
        [1.0, 0.0], group_size=1, scale="none", baseline="given", baseline_rewards=torch.tensor([0.25, 0.5])
    )
    assert result.tolist() == [0.75, -0.5]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.uint8, torch.bfloat16, torch.float16])
def test_any_real_dtype_of_rewards_is_taken(dtype: torch.dtype) -> None:
    result = group_advantages(torch.tensor([1, 0, 1, 1]).to(dtype), group_size=4)
    assert result.dtype == torch.float32
    assert torch.equal(result, group_advantages([1, 0, True, 1.0], group_size=4))


def test_rewards_with_a_graph_give_advantages_without_one() -> None:
    rewards = torch.randn(4, requires_grad=True)
    assert not group_advantages(rewards * 2, group_size=2).requires_grad


def test_large_offsets_cost_no_accuracy(seed: int) -> None:
    rewards = (torch.randn(64) + 1e6).float()
    exact = group_advantages(rewards.double(), group_size=8)
    assert_as_accurate("advantages", group_advantages(rewards, group_size=8), exact, exact.float())


@pytest.mark.parametrize("groups", [{"group_size": 4}, {"group_ids": []}])
def test_an_empty_batch_is_empty(groups: dict[str, Any]) -> None:
    for scale in SCALES:
        assert group_advantages(torch.zeros(0), scale=scale, **groups).shape == (0,)
    assert group_advantages([], return_stats=True, **groups).mean.shape == (0,)
    assert reward_metrics([], **groups)["reward"][1].item() == 0


@pytest.mark.parametrize("baseline", ["given", "none"])
@pytest.mark.parametrize("value", [0.5, 0.1])
def test_a_batch_of_equal_rewards_has_no_spread_where_its_mean_is_rounded(baseline: str, value: float) -> None:
    rewards = torch.full((3,), value, dtype=torch.float64)  # the mean of three 0.1 is another number
    given = {"baseline_rewards": torch.zeros(3)} if baseline == "given" else {}
    result = group_advantages(rewards, group_size=3, scale="batch", baseline=baseline, **given)
    assert result.tolist() == [0.0, 0.0, 0.0]


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rewards": torch.zeros(4, 1)}, ValueError, r"\(B,\), got \(4, 1\)"),
    ({"rewards": 3.0}, TypeError, "float"),
    ({"rewards": [1.0, "a", 0.0, 0.0]}, TypeError, r"rewards\[1\]"),
    ({"rewards": torch.zeros(4, dtype=torch.complex64)}, TypeError, "complex"),
    ({"rewards": [1.0, math.inf, 0.0, 0.0]}, ValueError, "rows 1 "),
    ({"group_size": None}, ValueError, "neither"),
    ({"group_ids": torch.zeros(4, dtype=torch.int64)}, ValueError, "both"),
    ({"group_size": 3}, ValueError, "divide B=4, got 3"),
    ({"group_size": 0}, ValueError, ">= 1"),
    ({"group_size": 2.0}, TypeError, "float"),
    ({"group_size": True}, TypeError, "bool"),
    ({"group_size": None, "group_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, r"\(4,\), got \(3,\)"),
    ({"group_size": None, "group_ids": torch.zeros(4)}, TypeError, "integers"),
    ({"scale": "std"}, ValueError, "leave_one_out"),
    ({"baseline": "mean"}, ValueError, "length_weighted"),
    ({"missing": "zero"}, ValueError, "raise"),
    ({"singleton": "one"}, ValueError, "reward"),
    ({"singleton": "reward", "baseline": "given", "baseline_rewards": [0.0] * 4}, ValueError, "no effect"),
    ({"eps": -1.0}, ValueError, "eps"),
    ({"eps": NAN}, ValueError, "eps"),
    ({"baseline": "given"}, ValueError, "needs baseline_rewards"),
    ({"baseline": "length_weighted"}, ValueError, "needs lengths"),
    ({"lengths": torch.ones(4)}, ValueError, "no effect"),
    ({"baseline_rewards": torch.ones(4)}, ValueError, "no effect"),
    ({"baseline": "length_weighted", "lengths": torch.tensor([1, -1, 2, 2])}, ValueError, ">= 0"),
    ({"baseline": "length_weighted", "lengths": torch.ones(3)}, ValueError, "shape"),
    ({"backend": "cpu"}, ValueError, "triton"),
    ({"backend": "triton", "scale": "group_mean"}, ValueError, "group_mean"),
]


@pytest.mark.parametrize(("change", "error", "message"), REFUSED, ids=lambda x: str(x)[:40])
def test_bad_input_is_refused_by_name(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"rewards": torch.tensor([1.0, 0.0, 2.0, 2.0]), "group_size": 2} | change
    with pytest.raises(error, match=message):
        group_advantages(arguments.pop("rewards"), **arguments)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
def test_the_triton_kernel_agrees_and_is_reached(scale: str, baseline: str, seed: int) -> None:
    pytest.importorskip("triton")
    rewards = torch.randn(13)
    rewards[3] = NAN
    rewards[[0, 6]] = 0.1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.tensor([4, 0, 0, 0, 9, 9, 4, 9, 9, 9, 0, 5, 9], device=device)
    options: dict[str, Any] = {"group_ids": ids, "scale": scale, "baseline": baseline, "return_stats": True}
    kernel = group_advantages(rewards.to(device), backend="triton", **options)
    eager = group_advantages(rewards.to(device), backend="torch", **options)
    exact = group_advantages(rewards.double().to(device), backend="torch", **options)
    for name in eager._fields:
        assert_as_accurate(name, getattr(kernel, name), getattr(exact, name), getattr(eager, name))
    assert kernel.advantages[[0, 3, 6, 11]].tolist() == [0.0] * 4


def test_leave_one_out_baselines_match_brute_force_with_missing_rewards(seed: int) -> None:
    rewards = torch.randn(9, dtype=torch.float64)
    rewards[1] = NAN
    ids = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3, 3])
    rewards[4:6] = 0.3
    baseline, std = group_baselines(rewards, group_ids=ids, leave_one_out=True)
    for i in range(9):
        others = rewards[(ids == ids[i]) & (torch.arange(9) != i) & ~rewards.isnan()]
        assert baseline[i].item() == pytest.approx(others.mean().item() if others.numel() else 0.0, abs=1e-12)
        assert std[i].item() == pytest.approx(others.std().item() if others.numel() > 1 else 0.0, abs=1e-12)
    assert std[4].item() == 0.0


def test_metrics_are_sums_and_counts_that_add_over_parts() -> None:
    rewards = [1.0, 0.0, None, None, 0.5, 0.5, 2.0, NAN, 1.0, 4.0]
    whole = reward_metrics(rewards, group_size=2)
    assert [x.item() for x in whole["reward"]] == [9.0, 7.0]
    assert whole["reward_std"][0].item() == pytest.approx(math.sqrt(0.5) + 3 * math.sqrt(0.5))
    assert [x.item() for x in whole["frac_reward_zero_std"]] == [2.0, 4.0]
    assert [x.item() for x in whole["n_missing"]] == [3.0, 10.0]
    parts = [reward_metrics(rewards[:4], group_size=2), reward_metrics(rewards[4:], group_ids=[8, 8, 1, 1, 3, 3])]
    for name, (total, count) in whole.items():
        assert sum(part[name][0] for part in parts).item() == pytest.approx(total.item())
        assert sum(part[name][1] for part in parts).item() == count.item()


# --- estimators -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_step_advantages_sum_the_normalised_rewards_of_the_steps_to_come(scale: str, seed: int) -> None:
    b, j, t = 5, 4, 12
    rewards = torch.randn(b, j, dtype=torch.float64)
    ends = torch.stack([torch.randperm(t)[:j] for _ in range(b)])
    ends[0, 2], ends[3, 0] = -1, -1
    rewards[0, 2], rewards[1, 1] = 1e9, NAN  # a padded step may hold anything
    mask, ids = torch.rand(b, t) < 0.8, torch.tensor([3, 1, 3, 1, 2])
    result = estimators.step_advantages(rewards, ends, mask, group_ids=ids, scale=scale, eps=1e-3)
    known = (ends >= 0) & ~rewards.isnan()
    for i in range(b):
        pool = rewards[(ids == ids[i]).unsqueeze(1) & known]
        spread = {"group": pool.std() + 1e-3, "batch": rewards[known].std() + 1e-3, "none": torch.tensor(1.0)}[scale]
        for place in range(t):
            steps = [k for k in range(j) if known[i, k] and ends[i, k] >= place]
            want = sum(((rewards[i, k] - pool.mean()) / spread).item() for k in steps) if mask[i, place] else 0.0
            assert result[i, place].item() == pytest.approx(want, rel=1e-10, abs=1e-12)


def test_step_advantages_refuse_ends_outside_the_completion() -> None:
    with pytest.raises(ValueError, match=r"\[0, T=3\), got \[3\]"):
        estimators.step_advantages(torch.ones(1, 2), torch.tensor([[0, 3]]), torch.ones(1, 3), group_size=1)
    with pytest.raises(ValueError, match=r"\(B=1, T\)"):
        estimators.step_advantages(torch.ones(1, 2), torch.tensor([[0, 1]]), torch.ones(3), group_size=1)


def test_pass_at_k_rewards_only_a_lead(seed: int) -> None:
    rewards = [1.0, 1.0, 0.0, None, 2.0, 0.5, 3.0, None]
    ids = [0, 0, 0, 0, 1, 1, 2, 2]
    result = estimators.pass_at_k_advantages(rewards, group_ids=ids, scale="none")
    assert result.tolist() == [0, 0, 0, 0, 1.5, 0, 0, 0]


def test_gpg_scales_by_the_share_of_rewards_that_are_not_zero() -> None:
    result = estimators.gpg_advantages([1.0, 0.0, 0.0, 0.0], group_size=2, f_norm=2.0)
    assert result.tolist() == [1.0, -1.0, 0.0, 0.0]
    assert estimators.gpg_advantages([0.0, 0.0], group_size=2).tolist() == [0.0, 0.0]


def test_gpg_keeps_the_precision_of_float64_rewards() -> None:
    # Five thirds is not a float32 number.
    rewards = torch.tensor([1.0, 2.0, 0.0, 0.0, 4.0], dtype=torch.float64)
    result = estimators.gpg_advantages(rewards, group_size=5)
    exact = (rewards - rewards.mean()) * (5 / 3)
    assert_as_accurate("advantages", result, exact, exact)


def test_gdpo_takes_listed_weights_in_the_precision_of_the_rewards(seed: int) -> None:
    rewards = torch.randn(4, 2, dtype=torch.float64)
    weights = torch.tensor([0.7, 0.1], dtype=torch.float64)
    given = estimators.gdpo_advantages(rewards, weights, group_size=4)
    assert torch.equal(estimators.gdpo_advantages(rewards, weights.tolist(), group_size=4), given)


def test_gdpo_leaves_out_missing_rewards_and_completions_without_any() -> None:
    rewards = [[1.0, 0.0], [0.0, None], [None, None], [1.0, 1.0]]
    summed = estimators.gdpo_advantages(rewards, [1.0, 2.0], group_size=4, whiten="none")
    parts = [group_advantages([row[k] for row in rewards], group_size=4) for k in range(2)]
    assert torch.allclose(summed, parts[0] + 2 * parts[1])
    whitened = estimators.gdpo_advantages(rewards, [1.0, 2.0], group_size=4)
    live = summed[[0, 1, 3]]
    want = (live - live.mean()) / (live.std() + 1e-4)
    assert whitened[2].item() == 0.0
    assert torch.allclose(whitened[[0, 1, 3]], want, rtol=1e-5, atol=1e-6)
    assert estimators.combine_rewards(rewards, [1.0, 2.0]).isnan().tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match="weights"):
        estimators.gdpo_advantages(rewards, [1.0], group_size=4)


# --- shaping ----------------------------------------------------------------------------------------------------------


def test_soft_overlong_punishment_is_equation_13() -> None:
    lengths = torch.tensor([0, 80, 81, 90, 100, 101, 10**6])
    result = masks.soft_overlong_punishment(lengths, max_length=100, buffer=20)
    assert result.tolist() == pytest.approx([0, 0, -0.05, -0.5, -1, -1, -1])
    with pytest.raises(ValueError, match="buffer"):
        masks.soft_overlong_punishment(lengths, max_length=100, buffer=101)
    with pytest.raises(ValueError, match=r"lengths must be >= 0, got \[-3"):
        masks.soft_overlong_punishment(torch.tensor([5, -3]), max_length=100, buffer=20)


def test_overlong_filter_drops_the_truncated_sequences_padded_and_packed() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    assert masks.overlong_filter_mask(mask, torch.tensor([True, False])).tolist() == [
        [False] * 3,
        [True, False, True],
    ]
    packed = masks.overlong_filter_mask(mask.view(-1), torch.tensor([1, 0, 0]), cu_seqlens=torch.tensor([0, 1, 1, 6]))
    assert packed.tolist() == [False, True, False, True, False, True]


def test_sampling_masks_keep_whole_groups() -> None:
    rewards, ids = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, None, 1.0, None, 0.3, 0.2], [2, 2, 1, 1, 7, 7, 3, 3, 4, 5, 5]
    keep = masks.dynamic_sampling_mask(rewards, group_ids=ids)
    assert keep.tolist() == [True, True] + [False] * 9
    varied = masks.zero_variance_mask(rewards, group_ids=ids)
    assert varied.tolist() == [True, True] + [False] * 7 + [True, True]
    some = masks.difficulty_mask(rewards, group_ids=ids, low=0.2, high=0.5)
    assert some.tolist() == [False] * 9 + [True, True]
    with pytest.raises(ValueError, match="low"):
        masks.difficulty_mask(rewards, group_ids=ids, low=1.0, high=0.5)


def test_zero_variance_groups_are_dropped_or_replaced(seed: int) -> None:
    rewards, ids = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.3, 0.2, 0.1], [2, 2, 1, 1, 7, 7, 5, 5, 5]
    assert masks.zero_variance_rows(rewards, group_ids=ids).tolist() == [0, 1, 6, 7, 8]
    generator = torch.Generator().manual_seed(3)
    seen = set()
    for _ in range(20):
        rows = masks.zero_variance_rows(rewards, group_ids=ids, policy="replace", generator=generator).tolist()
        groups = [ids[row] for row in rows]
        assert set(groups) == {2, 5}
        assert groups.count(2) // 2 + groups.count(5) // 3 == 4
        seen.add(tuple(rows))
    assert len(seen) > 1
    assert masks.zero_variance_rows([1.0, 1.0], group_size=2, policy="replace").tolist() == []


def test_the_statistics_function_agrees_with_the_public_one(seed: int) -> None:
    rewards = torch.randn(6)
    direct = reference.group_advantages(rewards, torch.tensor([0, 0, 1, 1, 1, 0]), 2)
    public = group_advantages(rewards, group_ids=[5, 5, 6, 6, 6, 5], return_stats=True, backend="torch")
    for name in direct._fields:
        assert torch.equal(getattr(direct, name), getattr(public, name))
