"""PPO's parts against their definitions: formulas, sampling, models, the phases of an update.

What is expected is always worked out the long way round: plain Python loops, rows without padding,
no cache.
"""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import ppo_rlhf
import utils
from ppo_rlhf import (
    Actor,
    ActorCritic,
    AdaptiveKLController,
    RunningMoments,
    accumulate_gradients,
    compute_gae,
    compute_rewards,
    decode_step,
    explained_variance,
    final_scores,
    generate,
    last_token_scores,
    next_prompts,
    policy_loss,
    ppo_loss,
    ppo_targets,
    response_mask,
    rollout,
    rollout_metrics,
    sample_tokens,
    reward_model_scores,
    score_responses,
    evaluate_tokens,
    select,
    token_logprobs,
    value_loss,
)
from utils import Ranks, left_pad, pad_right, prompt_order, static_cache

pytestmark = pytest.mark.fast

NAN = math.nan
INF = math.inf
PAD = 0  # The tokenizer of conftest.py has these ids, and 31 in all.
EOS = 1
VOCABULARY = 31
BIGGEST = 1 - 2**-24  # The largest number that torch.rand gives in fp32.


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def mask_of(lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def spoiled(x, mask, values=(NAN, INF, -INF)):
    """x with something nasty at every entry outside the mask."""
    nasty = torch.tensor(values, dtype=x.dtype).repeat(x.numel())[: x.numel()].view_as(x)
    return torch.where(mask, x, nasty)


# --------------------------------------------------------------------------------------------------
# response_mask


@pytest.mark.parametrize(
    ("row", "stop_ids", "min_length", "length"),
    [
        pytest.param([9, 5, 5, 5], [9], 0, 1, id="at once"),
        pytest.param([5, 5, 5, 9], [9], 0, 4, id="at the last index"),
        pytest.param([5, 5, 5, 5], [9], 0, 4, id="nowhere"),
        pytest.param([5, 9, 5, 9], [9], 0, 2, id="the first of two"),
        pytest.param([5, 8, 9, 5], [9, 8], 0, 2, id="two stop ids"),
        pytest.param([9, 5, 9, 5], [9], 1, 3, id="one before min_length does not count"),
        pytest.param([5, 9, 5, 5], [9], 1, 2, id="one at min_length counts"),
        pytest.param([9, 9, 9, 9], [9], 3, 4, id="nothing but stops"),
        pytest.param([9, 9, 9, 9], [9], 7, 4, id="min_length beyond the width"),
    ],
)
def test_response_mask(row, stop_ids, min_length, length):
    responses = torch.tensor([row, [5] * 4])
    mask = response_mask(responses, stop_ids, min_length)
    assert mask.dtype == torch.bool
    assert mask.tolist() == mask_of([length, 4], 4).tolist()  # The other row has no stop.
    assert responses.tolist() == [row, [5] * 4]
    assert torch.equal(mask, response_mask(responses, torch.tensor(stop_ids), min_length))


# --------------------------------------------------------------------------------------------------
# token_logprobs


def logprob_and_entropy(logits, token, temperature):
    """Of one distribution, in Python floats."""
    weights = [math.exp(z / temperature) for z in logits]
    probabilities = [w / sum(weights) for w in weights]
    entropy = -sum(p * math.log(p) for p in probabilities if p > 0)
    return math.log(probabilities[token]), entropy


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_token_logprobs_are_the_definition(temperature):
    logits = 2 * normal(2, 3, 7)
    tokens = torch.tensor([[0, 6, 3], [2, 2, 5]])
    logprobs, entropy = token_logprobs(logits, tokens, temperature)
    assert logprobs.dtype == entropy.dtype == torch.float64  # Never less precise than its input.
    for i in range(2):
        for t in range(3):
            row = logits[i, t].tolist()
            expected = logprob_and_entropy(row, tokens[i, t].item(), temperature)
            got = (logprobs[i, t].item(), entropy[i, t].item())
            assert got == pytest.approx(expected, abs=1e-12)
    all_logprobs = torch.log_softmax(logits / temperature, dim=-1)
    gathered = all_logprobs.gather(-1, tokens[..., None]).squeeze(-1)
    torch.testing.assert_close(logprobs, gathered, atol=1e-12, rtol=0)
    other, _ = token_logprobs(logits, tokens, temperature + 0.3)
    assert (other - logprobs).abs().mean() > 0.02


@pytest.mark.parametrize("as_logits", [True, False], ids=["logits of -inf", "allowed"])
def test_token_logprobs_of_forbidden_ids(as_logits):
    allowed = torch.tensor([False, True, True, False, True, True, False])
    logits = normal(2, 3, 7)
    if as_logits:
        logits = logits.masked_fill(~allowed, -INF)
        allowed_or_none = None
    else:
        allowed_or_none = allowed
    logits.requires_grad_()
    tokens = torch.tensor([[1, 2, 4], [5, 5, 1]])
    logprobs, entropy = token_logprobs(logits, tokens, 0.7, allowed_or_none)
    expected = torch.distributions.Categorical(logits=logits.detach()[..., allowed] / 0.7)
    places = torch.tensor([[0, 1, 2], [3, 3, 0]])  # Of the tokens among the allowed ids.
    torch.testing.assert_close(entropy, expected.entropy(), atol=1e-12, rtol=0)
    torch.testing.assert_close(logprobs, expected.log_prob(places), atol=1e-12, rtol=0)
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[..., ~allowed] == 0).all()
    assert (logits.grad[..., allowed] != 0).all()


def test_token_logprobs_are_fp32_from_bf16():
    logits = (4 * normal(4, 5, 300)).bfloat16()
    tokens = torch.arange(20).view(4, 5)
    logprobs, entropy = token_logprobs(logits, tokens, 0.7)
    assert logprobs.dtype == entropy.dtype == torch.float32
    exact, exact_entropy = token_logprobs(logits.double(), tokens, 0.7)
    torch.testing.assert_close(logprobs.double(), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), exact_entropy, atol=1e-5, rtol=1e-5)
    coarse = torch.log_softmax(logits / 0.7, -1).gather(-1, tokens[..., None]).squeeze(-1)
    assert (coarse.double() - exact).abs().max() > 1e-3  # What bf16 throughout would give.


# --------------------------------------------------------------------------------------------------
# compute_rewards


LENGTHS = [1, 3, 5, 6]  # EOS at the first index, inside, and at the last index of R = 6 or cut.


def test_rewards_add_up_to_score_minus_kl():
    mask = mask_of(LENGTHS, 6)
    scores = normal(4, seed=1)
    logprobs = normal(4, 6, seed=2)
    ref_logprobs = normal(4, 6, seed=3)
    rewards = compute_rewards(scores, logprobs, ref_logprobs, mask, 0.3)
    for i, length in enumerate(LENGTHS):
        k1 = (logprobs - ref_logprobs)[i, :length]
        expected = scores[i] - 0.3 * k1.sum()
        assert rewards[i].sum().item() == pytest.approx(expected.item(), abs=1e-12)
        before_last = rewards[i, : length - 1]
        torch.testing.assert_close(before_last, -0.3 * k1[:-1], atol=1e-12, rtol=0)
        assert (rewards[i, length:] == 0).all()


def test_score_is_paid_at_the_last_real_token_only():
    mask = mask_of(LENGTHS, 6)
    scores = torch.tensor([1.0, -2.0, 3.0, 4.0])
    logprobs = normal(4, 6, dtype=torch.float32)
    rewards = compute_rewards(scores, logprobs, logprobs + 1, mask, 0.0)
    expected = torch.zeros(4, 6)
    expected[range(4), [length - 1 for length in LENGTHS]] = scores
    assert torch.equal(rewards, expected)


def test_rewards_ignore_what_is_outside_the_mask():
    mask = mask_of(LENGTHS, 6)
    scores = normal(4, seed=1)
    logprobs = normal(4, 6, seed=2)
    ref_logprobs = normal(4, 6, seed=3)
    clean = compute_rewards(scores, logprobs, ref_logprobs, mask, 0.3)
    other = spoiled(ref_logprobs, mask, (-INF, NAN))
    assert torch.equal(clean, compute_rewards(scores, spoiled(logprobs, mask), other, mask, 0.3))


# --------------------------------------------------------------------------------------------------
# compute_gae


def gae_by_sums(rewards, values, length, gamma, lam):
    """Advantages of one episode as means of its k-step estimates, from the paper's definition.

    The k-step estimate of step t is r[t] + ... + gamma^(k-1) r[t+k-1] + gamma^k V[t+k] - V[t], and
    has the weight (1 - lam) lam^(k-1). Estimates beyond the end are all equal to the last one,
    which therefore collects all weights that are left.
    """
    r = rewards[:length].tolist()
    v = [*values[:length].tolist(), 0.0]
    advantages = []
    for t in range(length):
        advantage = 0.0
        for k in range(1, length - t + 1):
            discounted = sum(gamma**i * r[t + i] for i in range(k))
            estimate = discounted + gamma**k * v[t + k] - v[t]
            weight = (1 - lam) * lam ** (k - 1)
            if t + k == length:
                weight = lam ** (k - 1)
            advantage += weight * estimate
        advantages.append(advantage)
    return advantages


def gae_by_recursion(rewards, values, length, gamma, lam):
    """Advantages of one episode, backwards from its last token."""
    advantages = [0.0] * length
    next_value = 0.0
    next_advantage = 0.0
    for t in reversed(range(length)):
        delta = rewards[t].item() + gamma * next_value - values[t].item()
        advantages[t] = delta + gamma * lam * next_advantage
        next_value = values[t].item()
        next_advantage = advantages[t]
    return advantages


def gae_case():
    return normal(5, 6, seed=4), normal(5, 6, seed=5), mask_of([1, 2, 4, 5, 6], 6)


@pytest.mark.parametrize("definition", [gae_by_sums, gae_by_recursion])
@pytest.mark.parametrize(
    ("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.99, 1.0), (0.7, 0.0), (1.0, 1.0), (0.0, 0.5)]
)
def test_gae_is_its_definition(gamma, lam, definition):
    rewards, values, mask = gae_case()
    advantages, returns = compute_gae(rewards, values, mask, gamma, lam)
    assert advantages.dtype == returns.dtype == torch.float64
    for i, length in enumerate(mask.sum(1).tolist()):
        expected = definition(rewards[i], values[i], length, gamma, lam)
        assert advantages[i, :length].tolist() == pytest.approx(expected, abs=1e-12)
        sums = [v + a for v, a in zip(values[i, :length].tolist(), expected, strict=True)]
        assert returns[i, :length].tolist() == pytest.approx(sums, abs=1e-12)
        assert (advantages[i, length:] == 0).all()
        assert (returns[i, length:] == 0).all()


def test_gae_of_lam_one_is_monte_carlo():
    rewards, values, mask = gae_case()
    advantages, returns = compute_gae(rewards, values, mask, 1.0, 1.0)
    to_go = torch.where(mask, rewards, 0.0).flip(1).cumsum(1).flip(1)
    expected = torch.where(mask, to_go - values, 0.0)
    torch.testing.assert_close(advantages, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(returns, torch.where(mask, to_go, 0.0), atol=1e-12, rtol=0)


def test_gae_of_lam_zero_looks_one_step_ahead():
    """The state after the last token is worth 0, also where the row is as long as the tensor."""
    rewards, values, mask = gae_case()
    advantages, _ = compute_gae(rewards, values, mask, 0.9, 0.0)
    for i, length in enumerate(mask.sum(1).tolist()):
        for t in range(length):
            next_value = values[i, t + 1] if t + 1 < length else 0.0
            expected = rewards[i, t] + 0.9 * next_value - values[i, t]
            assert advantages[i, t].item() == pytest.approx(expected.item())


@pytest.mark.parametrize("outside", [(NAN,), (INF, -INF), (1e30, -7.0)])
def test_gae_ignores_what_is_outside_the_mask(outside):
    rewards, values, mask = gae_case()
    advantages, returns = compute_gae(rewards, values, mask, 0.9, 0.8)
    other_rewards = spoiled(rewards, mask, outside)
    other_values = spoiled(values, mask, outside)
    other_advantages, other_returns = compute_gae(other_rewards, other_values, mask, 0.9, 0.8)
    assert torch.equal(advantages, other_advantages)
    assert torch.equal(returns, other_returns)
    unmasked, _ = compute_gae(rewards, values, torch.ones_like(mask), 0.9, 0.8)
    assert (unmasked - advantages)[mask].abs().max() > 0.1  # There was something to ignore.
    assert rewards.equal(gae_case()[0])
    assert values.equal(gae_case()[1])


def test_a_worked_example_of_gae():
    """Two tokens and a score of 1 at EOS, with V = (0.2, 0.5).

    The advantage of EOS is 1 - 0.5, that of the token before it 0.5 - 0.2 + lam * 0.5.
    """
    rewards = torch.tensor([[0.0, 1.0, 9.0]])
    values = torch.tensor([[0.2, 0.5, 9.0]])
    advantages, returns = compute_gae(rewards, values, mask_of([2], 3), 1.0, 0.95)
    assert advantages[0].tolist() == pytest.approx([0.775, 0.5, 0.0])
    assert returns[0].tolist() == pytest.approx([0.975, 1.0, 0.0])


# --------------------------------------------------------------------------------------------------
# ppo_targets


def targets_case():
    """A batch of 4 rows whose entries outside the mask are 0, as those of a rollout are."""
    mask = mask_of(LENGTHS, 6)
    batch = {"mask": mask, "scores": normal(4, seed=1)}
    for seed, name in enumerate(("logprobs", "ref_logprobs", "values"), start=2):
        batch[name] = torch.where(mask, normal(4, 6, seed=seed), 0.0)
    return batch


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_targets_are_whitened_advantages_and_returns_of_gae(whiten_rewards):
    batch = targets_case()
    mask = batch["mask"]
    args = ppo_rlhf.Args(gamma=0.9, lam=0.5, whiten_rewards=whiten_rewards)
    targets = ppo_targets(batch, 0.3, args)
    rewards = compute_rewards(batch["scores"], batch["logprobs"], batch["ref_logprobs"], mask, 0.3)
    if whiten_rewards:
        real = rewards[mask]
        scaled = (rewards - real.mean()) / real.std(correction=0) + real.mean()
        rewards = torch.where(mask, scaled, 0.0)
    advantages, returns = compute_gae(rewards, batch["values"], mask, 0.9, 0.5)
    torch.testing.assert_close(targets["returns"], returns, atol=1e-6, rtol=1e-6)
    real = advantages[mask]
    whitened = torch.where(mask, (advantages - real.mean()) / real.std(correction=0), 0.0)
    torch.testing.assert_close(targets["advantages"], whitened, atol=1e-6, rtol=1e-6)


# --------------------------------------------------------------------------------------------------
# Losses


@pytest.mark.parametrize("high", [None, 0.28, 0.1])
def test_policy_loss_is_the_definition(high):
    ratios = [0.5, 0.79, 0.81, 0.95, 1.0, 1.05, 1.09, 1.15, 1.19, 1.21, 1.27, 1.29, 3.0]
    advantages = [2.0, -1.5, 0.0]
    shape = (len(advantages), len(ratios))
    logprobs = normal(*shape)
    new_logprobs = logprobs + torch.tensor(ratios, dtype=torch.float64).log()
    new_logprobs.requires_grad_()
    column = torch.tensor(advantages, dtype=torch.float64)[:, None]
    loss, ratio, clipped = policy_loss(new_logprobs, logprobs, column.expand(shape), 0.2, high)
    loss.sum().backward()
    upper = 1 + (0.2 if high is None else high)
    for i, a in enumerate(advantages):
        for j, r in enumerate(ratios):
            unclipped_loss = -a * r
            clipped_loss = -a * min(max(r, 0.8), upper)
            is_clipped = (a > 0 and r > upper) or (a < 0 and r < 0.8)
            gradient = 0.0 if is_clipped else -a * r  # The ratio's derivative is the ratio.
            assert ratio[i, j].item() == pytest.approx(r, abs=1e-12)
            assert loss[i, j].item() == pytest.approx(max(unclipped_loss, clipped_loss), abs=1e-12)
            assert clipped[i, j].item() == is_clipped
            assert new_logprobs.grad[i, j].item() == pytest.approx(gradient, abs=1e-12)


def test_policy_loss_at_the_old_policy_is_the_policy_gradient():
    logprobs = normal(4, 6, seed=1)
    advantages = normal(4, 6, seed=2)
    new_logprobs = logprobs.clone().requires_grad_()
    loss, ratio, clipped = policy_loss(new_logprobs, logprobs, advantages, 0.2)
    loss.sum().backward()
    assert (ratio == 1).all()
    assert not clipped.any()
    assert torch.equal(loss, -advantages)
    assert torch.equal(new_logprobs.grad, -advantages)


def test_value_loss_is_the_definition():
    new_values = (2 * normal(50, 6, seed=1)).requires_grad_()
    values = normal(50, 6, seed=2)
    returns = normal(50, 6, seed=3)
    loss, clipped = value_loss(new_values, values, returns, 0.2)
    loss.sum().backward()
    assert 0.1 < clipped.double().mean() < 0.9
    tensors = (new_values, values, returns, loss, clipped, new_values.grad)
    columns = [x.flatten().tolist() for x in tensors]
    for new, old, target, got, was_clipped, gradient in zip(*columns, strict=True):
        unclipped_loss = 0.5 * (new - target) ** 2
        clipped_loss = 0.5 * (min(max(new, old - 0.2), old + 0.2) - target) ** 2
        assert got == pytest.approx(max(unclipped_loss, clipped_loss), abs=1e-12)
        assert was_clipped == (clipped_loss > unclipped_loss)
        assert gradient == pytest.approx(0.0 if was_clipped else new - target, abs=1e-12)


def test_value_clip_is_idle_at_the_old_values_and_at_a_tie():
    values = normal(4, 6, seed=2)
    returns = normal(4, 6, seed=3)
    loss, clipped = value_loss(values, values, returns, 0.2)
    assert not clipped.any()
    assert torch.equal(loss, 0.5 * (values - returns) ** 2)
    # The new value 0.5 is clipped to 0.25, and the return is halfway between the two.
    new_values = torch.tensor([0.5])
    loss, clipped = value_loss(new_values, torch.tensor([0.0]), torch.tensor([0.375]), 0.25)
    assert not clipped.any()
    assert loss.item() == 0.5 * 0.125**2


def loss_case():
    """(new, batch) of `ppo_loss`; ratios and values are so far off that both clips have work."""
    mask = mask_of(LENGTHS, 6)
    logprobs = normal(4, 6)
    new = {"logprobs": logprobs, "entropy": normal(4, 6, seed=1), "values": normal(4, 6, seed=2)}
    batch = {"mask": mask, "logprobs": logprobs + 0.4 * normal(4, 6, seed=3)}
    for seed, name in enumerate(("values", "advantages", "returns"), start=4):
        batch[name] = normal(4, 6, seed=seed)
    return new, batch


def test_the_loss_adds_up_its_three_parts_over_the_real_tokens():
    new, batch = loss_case()
    mask = batch["mask"]
    args = ppo_rlhf.Args(
        cliprange=0.1, cliprange_high=0.3, cliprange_value=0.5, vf_coef=0.7, entropy_coef=0.2
    )
    loss, stats = ppo_loss(new, batch, args)
    old = (batch["logprobs"], batch["advantages"])
    pg_loss, ratio, pg_clipped = policy_loss(new["logprobs"], *old, 0.1, 0.3)
    vf_loss, vf_clipped = value_loss(new["values"], batch["values"], batch["returns"], 0.5)
    per_token = pg_loss + 0.7 * vf_loss - 0.2 * new["entropy"]
    assert loss.item() == pytest.approx(per_token[mask].sum().item(), abs=1e-12)
    expected = {
        "loss/policy_avg": pg_loss,
        "loss/value_avg": vf_loss,
        "policy/entropy_avg": new["entropy"],
        "policy/approxkl_avg": 0.5 * ratio.log() ** 2,
        "policy/clipfrac_avg": pg_clipped,
        "val/ratio": ratio,
        "val/clipfrac_avg": vf_clipped,
    }
    assert pg_clipped[mask].any()
    assert vf_clipped[mask].any()
    assert stats.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(stats[name], x, atol=1e-12, rtol=0)


def test_the_loss_ignores_what_is_outside_the_mask():
    new, batch = loss_case()
    mask = batch["mask"]
    args = ppo_rlhf.Args(entropy_coef=0.2)
    loss, _ = ppo_loss(new, batch, args)
    other_new = {name: spoiled(x, mask) for name, x in new.items()}
    other_batch = {name: spoiled(x, mask) for name, x in batch.items() if name != "mask"}
    other_loss, _ = ppo_loss(other_new, other_batch | {"mask": mask}, args)
    assert torch.equal(loss, other_loss)


# --------------------------------------------------------------------------------------------------
# The price of the KL, and what is done to scores


def test_adaptive_kl():
    controller = AdaptiveKLController(0.15, target=6.0, horizon=10000)
    assert controller.update(6.0, 512) == 0.15  # At the target nothing moves.
    assert controller.update(6.6, 512) == pytest.approx(0.15 * (1 + 0.1 * 512 / 10000))
    assert controller.kl_coef == pytest.approx(0.15 * (1 + 0.1 * 512 / 10000))
    cases = [(1e6, 0.2), (7.3, 0.2), (6.3, 0.05), (5.7, -0.05), (0.0, -0.2), (-3.0, -0.2)]
    for kl, error in cases:
        before = controller.kl_coef
        after = controller.update(kl, 512)
        assert after == controller.kl_coef == pytest.approx(before * (1 + error * 512 / 10000))
        assert (after > before) == (kl > 6.0)  # Far from the reference, the price rises.


def test_adaptive_kl_moves_by_a_fifth_at_most():
    """Also if a batch has more episodes than the horizon."""
    controller = AdaptiveKLController(0.1, target=6.0, horizon=1000)
    assert controller.update(0.0, 5000) == pytest.approx(0.08)
    assert controller.update(60.0, 5000) == pytest.approx(0.096)


def batches_of_scores():
    """Four batches of 6 scores, and which of them count."""
    scores = 3 * normal(4, 6, seed=1) + 5
    mask = normal(4, 6, seed=2) > -0.5
    return spoiled(scores, mask, (NAN,)), mask


def normalised_on_rank(rank, num_ranks=2):
    """What a rank makes of its share of the last batch, and the state that it is left with."""
    all_scores, all_masks = batches_of_scores()
    moments = RunningMoments()
    share = 6 // num_ranks
    mine = slice(rank * share, (rank + 1) * share)
    for scores, mask in zip(all_scores, all_masks, strict=True):
        moments.update(scores[mine], mask[mine])
        normalised = moments.normalise(scores[mine])
    return normalised.tolist(), moments.state_dict()


def test_running_moments_are_those_of_all_scores_so_far():
    all_scores, all_masks = batches_of_scores()
    moments = RunningMoments()
    seen = []
    for scores, mask in zip(all_scores, all_masks, strict=True):
        moments.update(scores, mask)
        seen += scores[mask].tolist()
        mean = sum(seen) / len(seen)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in seen) / len(seen))
        expected = (scores[mask] - mean) / deviation
        normalised = moments.normalise(scores)[mask]
        torch.testing.assert_close(normalised, expected, atol=1e-6, rtol=1e-6)
    assert moments.count == len(seen) < all_masks.numel()
    resumed = RunningMoments()
    resumed.load_state_dict(moments.state_dict())
    assert torch.equal(resumed.normalise(scores)[mask], normalised)


@pytest.mark.parametrize("count", [0, 1])
def test_running_moments_of_nothing_or_one_score_are_finite(count):
    moments = RunningMoments()
    scores = torch.tensor([3.0])
    moments.update(scores, torch.tensor([count == 1]))
    normalised = moments.normalise(scores)
    assert normalised.isfinite().all()
    assert normalised.dtype == torch.float32
    if count == 1:
        assert normalised.item() == 0.0


def test_running_moments_pool_the_ranks(on_two_ranks):
    expected, state = normalised_on_rank(0, num_ranks=1)
    (first, first_state), (second, second_state) = on_two_ranks(normalised_on_rank)
    assert first + second == pytest.approx(expected, nan_ok=True)
    assert first_state == second_state == pytest.approx(state)


def test_final_scores_are_normalised_then_clipped_then_replaced():
    """Those that are replaced do not count for the mean and the standard deviation."""
    args = ppo_rlhf.Args(normalize_scores=True, cliprange_score=1.0, missing_eos_score=-7.0)
    raw_scores = torch.tensor([1.0, 2.0, 50.0, 3.0, 9.0])
    has_eos = torch.tensor([True, True, False, True, True])
    scores = final_scores(raw_scores, has_eos, RunningMoments(), args)
    mean = (1 + 2 + 3 + 9) / 4
    deviation = math.sqrt(sum((x - mean) ** 2 for x in (1, 2, 3, 9)) / 4)
    expected = [(1 - mean) / deviation, (2 - mean) / deviation, -7, (3 - mean) / deviation, 1]
    assert scores.tolist() == pytest.approx(expected, abs=1e-6)
    assert raw_scores.tolist() == [1.0, 2.0, 50.0, 3.0, 9.0]


def test_final_scores_without_options_are_the_raw_ones():
    args = ppo_rlhf.Args(missing_eos_score="none")
    raw_scores = torch.tensor([1.0, -20.0, 50.0])
    has_eos = torch.tensor([True, False, False])
    assert torch.equal(final_scores(raw_scores, has_eos, RunningMoments(), args), raw_scores)
    args = ppo_rlhf.Args(missing_eos_score="none", normalize_scores=True)
    scores = final_scores(raw_scores, has_eos, RunningMoments(), args)
    expected = (raw_scores - raw_scores.mean()) / raw_scores.std(correction=0)
    torch.testing.assert_close(scores, expected)  # All of them count.


# --------------------------------------------------------------------------------------------------
# Metrics


def test_explained_variance():
    mask = mask_of(LENGTHS, 6)
    returns = normal(4, 6, seed=1)
    values = returns + 0.5 * normal(4, 6, seed=2)
    errors = (returns - values)[mask]
    expected = 1 - errors.var(correction=0) / returns[mask].var(correction=0)
    batch = {"values": spoiled(values, mask), "returns": spoiled(returns, mask), "mask": mask}
    assert explained_variance(batch) == pytest.approx(expected.item(), abs=1e-12)
    # A critic that is off by the same everywhere has explained all of the variance.
    batch = {"values": returns + 3, "returns": returns, "mask": mask}
    assert explained_variance(batch) == pytest.approx(1)
    batch["returns"] = torch.ones(4, 6)
    assert explained_variance(batch) == 0.0


def test_rollout_metrics_are_their_definitions():
    batch = targets_case()
    batch |= {"raw_scores": normal(4, seed=8), "has_eos": torch.tensor([True, False, True, True])}
    extra = normal(4, seed=9)
    metrics = rollout_metrics(batch, 0.3, {"monitor/extra": extra})
    k1 = []
    k3 = []
    entropy = []
    for i, length in enumerate(LENGTHS):
        p = batch["logprobs"][i, :length].tolist()
        q = batch["ref_logprobs"][i, :length].tolist()
        k1.append([a - b for a, b in zip(p, q, strict=True)])
        k3.append([math.exp(b - a) - 1 - (b - a) for a, b in zip(p, q, strict=True)])
        entropy.append(-sum(p))
    kl = sum(map(sum, k1)) / 4
    score_mean = batch["scores"].mean().item()
    expected = {
        "objective/kl": kl,
        "objective/kl_k3": sum(map(sum, k3)) / 4,
        "objective/kl_per_token": sum(map(sum, k1)) / sum(LENGTHS),
        "objective/kl_k3_per_token": sum(map(sum, k3)) / sum(LENGTHS),
        "objective/entropy": sum(entropy) / 4,
        "objective/scores": score_mean,
        "objective/raw_scores": batch["raw_scores"].mean().item(),
        "objective/non_score_reward": -0.3 * kl,
        "objective/rlhf_reward": score_mean - 0.3 * kl,
        "val/sequence_lengths": sum(LENGTHS) / 4,
        "val/has_eos": 0.75,
        "monitor/extra": extra.mean().item(),
    }
    assert metrics == pytest.approx(expected, abs=1e-12)
    # Which is what the tokens of a response are paid in all.
    token_rewards = compute_rewards(
        batch["scores"], batch["logprobs"], batch["ref_logprobs"], batch["mask"], 0.3
    )
    assert metrics["objective/rlhf_reward"] == pytest.approx(token_rewards.sum().item() / 4)


# --------------------------------------------------------------------------------------------------
# sample_tokens


def inverse_cdf(logits, u, temperature, allowed=None):
    """The first id whose cumulative probability in fp32 exceeds u times the last: one row."""
    logits = logits.float()
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -INF)
    if temperature == 0:
        return max(range(len(logits)), key=lambda i: logits[i].item())
    cumulative = torch.softmax(logits / temperature, -1).cumsum(-1)
    threshold = torch.tensor(u, dtype=torch.float32) * cumulative[-1]
    return next(i for i in range(len(logits)) if cumulative[i] > threshold)


@pytest.mark.parametrize("vocabulary", [13, 200])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0])
def test_sample_is_the_inverse_cdf(temperature, vocabulary):
    logits = 2 * normal(200, vocabulary, dtype=torch.float32)
    u = uniform(200)
    u[:3] = 0.0
    u[3:6] = BIGGEST
    is_allowed = torch.arange(vocabulary) % 5 != 4
    for allowed in (None, is_allowed):
        tokens = sample_tokens(logits, u, temperature, allowed)
        assert tokens.shape == (200,)
        assert tokens.dtype == torch.int64
        expected = [inverse_cdf(logits[i], u[i].item(), temperature, allowed) for i in range(200)]
        assert tokens.tolist() == expected
        assert is_allowed[tokens].all() == (allowed is not None)


def test_sample_takes_the_right_side_of_a_boundary():
    logits = torch.zeros(1, 4)  # The cumulative probabilities 1/4, 1/2, 3/4, 1 are exact.
    cases = [(0.0, 0), (0.25 - 2**-24, 0), (0.25, 1), (0.5, 2), (0.75, 3), (BIGGEST, 3)]
    for u, token in cases:
        assert sample_tokens(logits, torch.tensor([u]), 1.0).item() == token


def test_impossible_tokens_are_never_sampled():
    """At both ends of [0,1), where the first and the last id are among the impossible ones.

    A logit of -300 gives a probability of 0 as well, by underflow.
    """
    logits = normal(500, 40, dtype=torch.float32)
    impossible = uniform(500, 40, seed=1) < 0.5
    impossible[:, [0, 39]] = True
    low = torch.where(uniform(500, 40, seed=2) < 0.5, -INF, -300.0)
    logits = torch.where(impossible, low, logits)
    for u in (0.0, 2**-24, 0.5, 1 - 2**-23, BIGGEST):
        tokens = sample_tokens(logits, torch.full((500,), u), 1.0)
        assert tokens.max() < 40
        assert not impossible[torch.arange(500), tokens].any()


def test_forbidden_tokens_are_never_sampled_even_if_likely():
    logits = torch.zeros(300, 10)
    logits[:, 9] = 50.0
    allowed = torch.ones(10, dtype=torch.bool)
    allowed[[0, 9]] = False
    assert allowed[sample_tokens(logits, uniform(300), 0, allowed)].all()
    assert set(sample_tokens(logits, uniform(300), 1.0, allowed).tolist()) == set(range(1, 9))


def chi_square(tokens, probabilities):
    expected = probabilities * len(tokens)
    counts = torch.bincount(tokens, minlength=len(expected))
    return ((counts - expected) ** 2 / expected).sum().item()


def test_sampled_frequencies_are_the_probabilities():
    logits = torch.tensor([1.0, -1.0, 0.0, 2.0, 0.5, -2.0])
    count = 20000
    tokens = sample_tokens(logits.expand(count, 6), uniform(count, seed=7), 0.7)
    # 20.5 is the quantile 99.9% at 5 degrees of freedom.
    assert chi_square(tokens, torch.softmax(logits / 0.7, 0)) < 20.5
    assert chi_square(tokens, torch.softmax(logits, 0)) > 200  # Without the temperature.
    # With every uniform once, the counts are exact up to rounding at the boundaries.
    grid = (torch.arange(count) + 0.5) / count
    counts = torch.bincount(sample_tokens(logits.expand(count, 6), grid, 0.7), minlength=6)
    assert (counts - count * torch.softmax(logits / 0.7, 0)).abs().max() <= 1.5


# --------------------------------------------------------------------------------------------------
# generate


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folders(request, gpt2_folder, llama_folder, gpt2_rm_folder, llama_rm_folder):
    """(language model, reward model): absolute positions, or rotary ones and a `score_mean`."""
    if request.param == "gpt2":
        return gpt2_folder, gpt2_rm_folder
    return llama_folder, llama_rm_folder


def load_policy(folder):
    return utils.load_pretrained(AutoModelForCausalLM, folder)[0]


def load_reward_model(folder):
    return utils.load_pretrained(AutoModelForSequenceClassification, folder, num_labels=1)[0]


@pytest.fixture(scope="module")
def policy(folders):
    return load_policy(folders[0]).requires_grad_(False)


QUERIES = [[5], [6, 7, 8, 9, 10, 11, 12], [9, 3, 9], [14, 15, 16, 17, 2]]
ALLOWED = torch.arange(VOCABULARY) != PAD


@torch.no_grad()
def slow_response(policy, query, uniforms, temperature=1.0, stop_ids=(EOS,), min_length=0):
    """Without cache, mask, padding or position ids: the whole sequence again for every token."""
    response = []
    for t, u in enumerate(uniforms.tolist()):
        logits = policy(torch.tensor([query + response])).logits[0, -1]
        response.append(inverse_cdf(logits, u, temperature, ALLOWED))
        if t >= min_length and response[-1] in stop_ids:
            break
    return response


def sample(policy, queries, uniforms, temperature=1.0, stop_ids=(EOS,), extra=0, **options):
    """`generate` on queries of uneven lengths, with `extra` more padding than needed."""
    queries, query_mask = left_pad(queries, max(map(len, queries)) + extra, PAD, "cpu")
    inputs = (queries, query_mask, uniforms, temperature, list(stop_ids), PAD)
    return generate(policy, *inputs, allowed=ALLOWED, **options)


@pytest.mark.parametrize("min_length", [0, 4])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0])
def test_generate_is_the_slow_loop(policy, temperature, min_length):
    stop_ids = (EOS, 4, 20, 21)
    uniforms = uniform(4, 11, seed=3)
    responses = sample(policy, QUERIES, uniforms, temperature, stop_ids, min_length=min_length)
    assert responses.dtype == torch.int64
    expected = []
    for query, u in zip(QUERIES, uniforms, strict=True):
        expected.append(slow_response(policy, query, u, temperature, stop_ids, min_length))
    assert responses.tolist() == [row + [PAD] * (11 - len(row)) for row in expected]
    assert len({tuple(row) for row in expected}) > 2
    if temperature > 0:
        assert min_length < min(map(len, expected)) < 11


def test_generate_does_not_see_padding_or_neighbours(policy):
    uniforms = uniform(4, 10, seed=4)
    responses = sample(policy, QUERIES, uniforms)
    assert torch.equal(sample(policy, QUERIES, uniforms, extra=5), responses)
    for i, query in enumerate(QUERIES):
        alone = sample(policy, [query], uniforms[i : i + 1])
        assert torch.equal(alone, responses[i : i + 1])
    queries, query_mask = left_pad(QUERIES, 7, 30, "cpu")  # Padding of another id.
    inputs = (queries, query_mask, uniforms, 1.0, [EOS], PAD, ALLOWED)
    assert torch.equal(generate(policy, *inputs), responses)
    assert not torch.equal(sample(policy, QUERIES, uniforms.flip(0)), responses)


@pytest.mark.parametrize("min_length", [0, 6])
def test_stopping_early_changes_nothing(policy, min_length):
    """Sampling ends when all rows have ended; the same tokens as sampling on and masking.

    The prompts themselves are not read by `decode_fn`, which may be compiled for one token a row.
    """
    uniforms = uniform(4, 30, seed=5)
    stop_ids = [EOS, *range(2, 16)]
    shapes = []

    def counted(model, tokens, *inputs, **options):
        shapes.append(tokens.shape)
        return decode_step(model, tokens, *inputs, **options)

    options = {"stop_ids": stop_ids, "decode_fn": counted, "min_length": min_length}
    short = sample(policy, QUERIES, uniforms, **options)
    assert set(shapes) == {(4, 1)}
    full = sample(policy, QUERIES, uniforms, stop_ids=[99])
    mask = response_mask(full, stop_ids, min_length)
    assert torch.equal(short, full.masked_fill(~mask, PAD))
    longest = mask.sum(1).max().item()
    assert min_length < longest < 30
    assert len(shapes) == longest - 1


def test_a_response_of_one_token(policy):
    uniforms = uniform(4, 1, seed=6)
    rows = zip(QUERIES, uniforms, strict=True)
    expected = [slow_response(policy, query, u) for query, u in rows]
    assert sample(policy, QUERIES, uniforms).tolist() == expected


def test_a_used_cache_is_as_good_as_a_new_one(policy):
    cache = static_cache(policy.config, 7 + 10)
    first = uniform(4, 10, seed=7)
    second = uniform(4, 10, seed=8)
    for queries, uniforms in [(QUERIES, first), (QUERIES[::-1], second), (QUERIES, first)]:
        responses = sample(policy, queries, uniforms, cache=cache)
        assert torch.equal(responses, sample(policy, queries, uniforms))


def test_the_decoding_step_is_one_graph(gpt2_folder):
    """It is captured whole, samples the same tokens, and is the same graph at every position.

    The graph runs eagerly here; test_compiled.py has runs in which it is compiled.
    """
    policy = load_policy(gpt2_folder)
    torch.compiler.reset()
    step = torch.compile(decode_step, fullgraph=True, backend="eager")
    cache = static_cache(policy.config, 7 + 6)
    for seed in (9, 10):
        uniforms = uniform(4, 6, seed=seed)
        stance = "default" if seed == 9 else "fail_on_recompile"
        with torch.compiler.set_stance(stance):
            responses = sample(policy, QUERIES, uniforms, decode_fn=step, cache=cache)
        assert torch.equal(responses, sample(policy, QUERIES, uniforms))


# --------------------------------------------------------------------------------------------------
# Packed rows


# The longest prompt does not have the longest response: positions of the response then run beyond
# the end of its row, and of the tensor.
RESPONSES = [[9, 10, 11, 12, 13], [7, 8, EOS], [EOS], [20, 21, 22, EOS]]
ROWS = [query + response for query, response in zip(QUERIES, RESPONSES, strict=True)]
T = max(map(len, ROWS))
R = max(map(len, RESPONSES))


def batch_of(extra=0, fill=EOS):
    """What a rollout knows of QUERIES and RESPONSES, with `extra` more padding than needed.

    fill: the id of the padding.
    """
    lengths = [len(row) for row in ROWS]
    input_ids = F.pad(pad_right(ROWS, fill), (0, extra), value=fill)
    response_lengths = [len(response) for response in RESPONSES]
    return {
        "input_ids": input_ids,
        "is_real": mask_of(lengths, T + extra),
        "prompt_lengths": torch.tensor([len(query) for query in QUERIES]),
        "responses": F.pad(pad_right(RESPONSES, fill), (0, extra), value=fill),
        "mask": mask_of(response_lengths, R + extra),
        "has_eos": torch.tensor([EOS in response for response in RESPONSES]),
    }


def logprobs_at(temperature, allowed):
    """`token_logprobs` with a temperature and allowed ids."""
    return functools.partial(token_logprobs, temperature=temperature, allowed=allowed)


LOGPROBS_FN = logprobs_at(0.7, ALLOWED)


def logprobs_of(model, batch, logprobs_fn=LOGPROBS_FN):
    """The log-probabilities (B,R) that a language model gives the responses."""
    return Actor(model, logprobs_fn)(batch)["logprobs"]


# --------------------------------------------------------------------------------------------------
# Models


@pytest.fixture
def actor_critic(folders):
    actor = Actor(load_policy(folders[0]), LOGPROBS_FN)
    return ActorCritic(actor, load_reward_model(folders[1]))


@torch.no_grad()
def test_actor_critic_against_rows_without_padding(actor_critic):
    """A fresh forward of each row alone; row i's token t is predicted at its place less 1."""
    output = actor_critic(batch_of())
    assert output.keys() == {"logprobs", "entropy", "values"}
    for x in output.values():
        assert x.shape == (4, R)
        assert x.dtype == torch.float32
    critic = actor_critic.critic
    centre = getattr(critic.config, "score_mean", 0.0)
    for i, (query, response) in enumerate(zip(QUERIES, RESPONSES, strict=True)):
        ids = torch.tensor([query + response])
        logits = actor_critic.actor.model(ids).logits[0].masked_fill(~ALLOWED, -INF)
        hidden = critic.base_model(ids).last_hidden_state[0]
        for t, token in enumerate(response):
            before = len(query) + t - 1
            logprob, entropy = logprob_and_entropy(logits[before].tolist(), token, 0.7)
            value = (hidden[before] @ critic.score.weight[0]).item() - centre
            assert output["logprobs"][i, t].item() == pytest.approx(logprob, abs=1e-5)
            assert output["entropy"][i, t].item() == pytest.approx(entropy, abs=1e-5)
            assert output["values"][i, t].item() == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("extra", [0, 4])
@pytest.mark.parametrize("fill", [PAD, EOS, 30])
@torch.no_grad()
def test_actor_critic_does_not_see_padding_or_neighbours(actor_critic, extra, fill):
    expected = actor_critic(batch_of())
    mask = batch_of()["mask"]
    batch = batch_of(extra, fill)
    output = actor_critic(batch)
    for name, x in expected.items():
        got = output[name][:, :R][mask]
        torch.testing.assert_close(got, x[mask], atol=1e-5, rtol=1e-5)
    for i, response in enumerate(RESPONSES):
        alone = actor_critic(select(batch, [i]))
        for name, x in expected.items():
            own = x[i, : len(response)]
            torch.testing.assert_close(alone[name][0], own, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_temperature_and_the_allowed_ids_are_those_of_the_actor(actor_critic):
    batch = batch_of()
    expected = actor_critic(batch)["logprobs"][batch["mask"]]
    policy = actor_critic.actor.model
    for temperature, allowed in [(1.0, ALLOWED), (0.7, None)]:
        other = logprobs_of(policy, batch, logprobs_at(temperature, allowed))[batch["mask"]]
        assert (other - expected).abs().mean() > 1e-3


@torch.no_grad()
def test_the_reference_starts_at_no_distance(actor_critic):
    """Exactly: one function gives both sides, so there is nothing to round differently."""
    batch = batch_of()
    reference = copy.deepcopy(actor_critic.actor.model)
    logprobs = actor_critic(batch)["logprobs"]
    assert torch.equal(logprobs_of(reference, batch), logprobs)


@torch.no_grad()
def test_no_dropout_in_train_mode(actor_critic, folders):
    batch = batch_of()
    actor_critic.train()
    first = actor_critic(batch)
    second = actor_critic(batch)
    for name, x in first.items():
        assert torch.equal(second[name], x)
    untouched = AutoModelForCausalLM.from_pretrained(folders[0]).train()
    logits = [untouched(batch["input_ids"]).logits for _ in range(2)]
    assert not torch.equal(*logits)  # The folder does ask for dropout.


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("extra", [0, 3])
@torch.no_grad()
def test_last_token_scores_wherever_the_padding_is(folders, side, extra):
    """Whatever ids it holds, and where its ids, or the EOS, are tokens of a sequence as well."""
    model = load_reward_model(folders[1])
    rows = [[5, 6, EOS], [7], [8, 9, PAD, 10, 11, 12], [13, EOS, 14, EOS]]
    centre = getattr(model.config, "score_mean", 0.0)
    expected = []
    for row in rows:
        hidden = model.base_model(torch.tensor([row])).last_hidden_state[0, -1]
        expected.append((model.score.weight[0] @ hidden).item() - centre)
    plain = model(torch.tensor([rows[0]])).logits.item() - centre
    assert expected[0] == pytest.approx(plain, abs=1e-5)
    assert max(expected) - min(expected) > 0.1
    for padding in (PAD, EOS, -100, 10**6):
        input_ids, attention_mask = left_pad(rows, 6 + extra, padding, "cpu")
        if side == "right":
            input_ids = F.pad(pad_right(rows, padding), (0, extra), value=padding)
            attention_mask = mask_of([len(row) for row in rows], 6 + extra)
        for kind in (torch.long, torch.bool):
            scores = last_token_scores(model, input_ids, attention_mask.to(kind))
            assert scores.dtype == torch.float32
            assert scores.tolist() == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_scores_and_values_are_fp32_under_bf16_autocast(actor_critic):
    batch = batch_of()
    exact = actor_critic(batch)
    exact["scores"] = last_token_scores(actor_critic.critic, batch["input_ids"], batch["is_real"])
    with torch.autocast("cpu", torch.bfloat16):
        output = actor_critic(batch)
        model = actor_critic.critic
        output["scores"] = last_token_scores(model, batch["input_ids"], batch["is_real"])
    for name, x in output.items():
        where = batch["mask"] if x.ndim == 2 else torch.ones_like(x, dtype=torch.bool)
        assert x.dtype == torch.float32
        assert (x.bfloat16() != x)[where].any()  # Not a bf16 number that was converted.
        assert 0 < (x - exact[name])[where].abs().max() < 0.3  # bf16 was at work before.


# --------------------------------------------------------------------------------------------------
# Rollout and score


def test_select_takes_rows_of_every_tensor_and_cuts_what_none_of_them_needs():
    prompt_lengths = torch.tensor([1, 4, 2])
    response_lengths = torch.tensor([3, 1, 2])
    is_real = torch.arange(8) < (prompt_lengths + response_lengths)[:, None]
    batch = {
        "input_ids": torch.arange(24).view(3, 8),
        "is_real": is_real,
        "mask": torch.arange(5) < response_lengths[:, None],
        "logprobs": torch.arange(15.0).view(3, 5),
        "prompt_lengths": prompt_lengths,
    }
    part = select(batch, [2, 0])
    assert part["input_ids"].tolist() == [[16, 17, 18, 19], [0, 1, 2, 3]]
    assert part["is_real"].tolist() == [[True] * 4] * 2
    assert part["mask"].tolist() == [[True, True, False], [True] * 3]
    assert part["logprobs"].tolist() == [[10.0, 11.0, 12.0], [0.0, 1.0, 2.0]]
    assert part["prompt_lengths"].tolist() == [2, 1]
    part = select(batch, [1])
    assert part["input_ids"].tolist() == [[8, 9, 10, 11, 12]]
    assert part["logprobs"].tolist() == [[5.0]]
    assert batch["input_ids"].shape == (3, 8)


@pytest.mark.parametrize("min_length", [0, 3])
def test_rollout_packs_what_was_sampled(policy, tokenizer, min_length):
    stop_ids = [EOS, 20, 21]
    uniforms = uniform(4, 9, seed=10)
    sampling = {
        "temperature": 0.9,
        "stop_ids": torch.tensor(stop_ids),
        "pad_id": PAD,
        "allowed": ALLOWED,
        "min_length": min_length,
    }
    batch, texts = rollout(policy, QUERIES, uniforms, 8, tokenizer, **sampling)
    assert texts == tokenizer.batch_decode(batch["responses"], skip_special_tokens=True)
    is_cut = []
    for i, (query, u) in enumerate(zip(QUERIES, uniforms, strict=True)):
        response = slow_response(policy, query, u, 0.9, stop_ids, min_length)
        whole = query + response
        assert batch["responses"][i].tolist() == response + [EOS] * (9 - len(response))
        assert batch["mask"][i].tolist() == [t < len(response) for t in range(9)]
        assert batch["input_ids"][i].tolist() == whole + [EOS] * (17 - len(whole))
        assert batch["is_real"][i].tolist() == [t < len(whole) for t in range(17)]
        is_cut.append(response[-1] not in stop_ids)
    assert batch["prompt_lengths"].tolist() == [len(query) for query in QUERIES]
    assert batch["has_eos"].tolist() == [not x for x in is_cut]
    assert any(is_cut)
    assert not all(is_cut)


@pytest.mark.parametrize("last", [EOS, 5])
def test_a_stop_before_min_length_is_no_end(policy, tokenizer, monkeypatch, last):
    """A response that held EOS too early and then ran to the limit has not ended by itself."""
    responses = torch.tensor([[EOS, 7, last]])
    monkeypatch.setattr(ppo_rlhf, "generate", lambda *args, **options: responses)
    sampling = {"stop_ids": torch.tensor([EOS]), "pad_id": PAD, "min_length": 2}
    batch, _ = rollout(policy, QUERIES[:1], uniform(1, 3), 4, tokenizer, **sampling)
    assert batch["mask"].all()
    assert batch["has_eos"].item() == (last == EOS)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 4])
@torch.no_grad()
def test_scoring_gives_each_row_its_own_numbers(actor_critic, folders, micro_batch_size):
    """Whatever the micro-batches, into which the rows go by length, and 0 outside the mask."""
    batch = batch_of(extra=2)
    policy = actor_critic.actor.model
    torch.manual_seed(0)
    reference = copy.deepcopy(policy)
    for parameter in reference.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    reward_model = load_reward_model(folders[1])
    reward_model.score.weight *= 2
    args = ppo_rlhf.Args(micro_batch_size=micro_batch_size, precision="fp32")
    scored = evaluate_tokens(batch, actor_critic, args)
    assert scored.keys() == {"logprobs", "entropy", "values"}
    evaluated = evaluate_tokens(batch, Actor(reference, LOGPROBS_FN), args)
    scored["ref_logprobs"] = evaluated["logprobs"]
    raw_scores = reward_model_scores(batch, reward_model, args)
    for i, (row, response) in enumerate(zip(ROWS, RESPONSES, strict=True)):
        length = len(response)
        alone = select(batch, [i])
        new = actor_critic(alone)
        expected = {"logprobs": new["logprobs"], "values": new["values"]}
        expected["ref_logprobs"] = logprobs_of(reference, alone)
        for name, x in expected.items():
            assert scored[name].shape == batch["mask"].shape
            torch.testing.assert_close(scored[name][i, :length], x[0], atol=1e-5, rtol=1e-5)
            assert (scored[name][i, length:] == 0).all()
        centre = getattr(reward_model.config, "score_mean", 0.0)
        raw_score = reward_model(torch.tensor([row])).logits.item() - centre
        assert raw_scores[i].item() == pytest.approx(raw_score, abs=1e-5)
    assert (scored["logprobs"] - scored["ref_logprobs"]).abs().max() > 0.1


def test_prompts_and_uniforms_depend_on_seed_and_update_alone():
    """And are dealt out to the ranks in order."""
    prompts = [([i], {"prompt": i}) for i in range(10)]
    args = ppo_rlhf.Args(batch_size=4, response_length=3)
    alone = Ranks(0, 1, torch.device("cpu"))
    updates = [next_prompts(prompts, update, args, alone) for update in range(1, 6)]
    numbers = [ids[0] for prompt_ids, _, _ in updates for ids in prompt_ids]
    assert numbers == prompt_order(10, 0, 20, args.seed)
    assert numbers == [row["prompt"] for _, rows, _ in updates for row in rows]
    all_uniforms = torch.cat([uniforms for _, _, uniforms in updates])
    assert all_uniforms.shape == (20, 3)
    assert len(set(all_uniforms.flatten().tolist())) == 60
    for update, (prompt_ids, rows, uniforms) in enumerate(updates, start=1):
        shares = [
            next_prompts(prompts, update, args, Ranks(rank, 2, torch.device("cpu")))
            for rank in (0, 1)
        ]
        assert [ids for share, _, _ in shares for ids in share] == prompt_ids
        assert [row for _, share, _ in shares for row in share] == rows
        assert torch.equal(torch.cat([share for _, _, share in shares]), uniforms)
    other = ppo_rlhf.Args(batch_size=4, response_length=3, seed=2)
    assert not torch.equal(next_prompts(prompts, 1, other, alone)[2], updates[0][2])


# --------------------------------------------------------------------------------------------------
# Scores of several scorers, and evaluation


def ones(prompts, responses, **columns):
    return [1.0] * len(responses)


def num_letters(prompts, responses, **columns):
    return [float(len(response)) for response in responses]


def test_scores_are_weighted_sums_of_all_scorers(folders):
    """Functions in their order, the reward model last; without weights all count as 1."""
    batch = batch_of()
    reward_model = load_reward_model(folders[1])
    rows = [{"prompt": "a"}] * len(ROWS)
    texts = ["a" * i for i in range(len(ROWS))]
    lengths = torch.arange(float(len(ROWS)))
    functions = {"ones": ones, "num_letters": num_letters}
    args = ppo_rlhf.Args(reward_weights=(10.0, 0.5, -2.0))
    scores, parts = score_responses(batch, rows, texts, functions, reward_model, args)
    by_model = reward_model_scores(batch, reward_model, args)
    assert list(parts) == ["ones", "num_letters", "reward_model"]
    assert torch.equal(parts["num_letters"], lengths)
    torch.testing.assert_close(scores, 10 + 0.5 * lengths - 2 * by_model)
    scores, _ = score_responses(batch, rows, texts, functions, None, ppo_rlhf.Args())
    torch.testing.assert_close(scores, 1 + lengths)


def test_evaluation_metrics_are_their_definitions():
    """Means over all responses, and intervals from the means of prompts."""
    scores = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.float64)
    lengths = torch.tensor([[2, 4, 2, 4], [3, 3, 3, 3], [5, 5, 5, 5]], dtype=torch.float64)
    metrics = ppo_rlhf.evaluation_metrics(scores, lengths)
    assert metrics["eval/score"] == metrics["eval/pass@1"] == pytest.approx(5 / 12)
    assert metrics["eval/pass@4"] == pytest.approx(2 / 3)
    assert metrics["eval/length"] == pytest.approx(11 / 3)
    standard_error = torch.tensor([0.25, 1, 0]).std().item() / math.sqrt(3)
    assert metrics["eval/score_ci95"] == pytest.approx(1.96 * standard_error)
    # Scores other than 0 and 1 are not passed or failed; one prompt has no spread.
    metrics = ppo_rlhf.evaluation_metrics(scores[:1] / 2, lengths[:1])
    assert metrics.keys() == {f"eval/{n}{c}" for n in ("score", "length") for c in ("", "_ci95")}
    assert metrics["eval/score_ci95"] == 0


# --------------------------------------------------------------------------------------------------
# Gradients


def training_batch(actor_critic, fill=EOS):
    """A batch with all that the loss needs, in fp64 where the models are.

    The ratios and values are so far from their old ones that both clips have work.
    """
    batch = batch_of(fill=fill)
    with torch.no_grad():
        new = actor_critic(batch)
    dtype = new["logprobs"].dtype
    batch["logprobs"] = new["logprobs"] + 0.3 * normal(4, R, seed=1).to(dtype)
    batch["values"] = new["values"] + 0.3 * normal(4, R, seed=2).to(dtype)
    batch["advantages"] = normal(4, R, seed=3).to(dtype)
    batch["returns"] = normal(4, R, seed=4).to(dtype)
    for name in ("logprobs", "values", "advantages", "returns"):
        batch[name] = torch.where(batch["mask"], batch[name], 0.0)
    return batch


def gradients_and_means(rank, folders, micro_batch_size, loss_fn=ppo_loss):
    """{name: gradient} and metrics of one minibatch in fp64, on two ranks or (rank None) alone.

    Scores and values alone are in fp32, as ever.
    """
    ranks = Ranks(rank or 0, 1 if rank is None else 2, torch.device("cpu"))
    policy = load_policy(folders[0])
    critic = load_reward_model(folders[1])
    for model in (policy, critic):
        model.set_attn_implementation("sdpa")  # Llama's plain attention has its softmax in fp32.
    actor_critic = ActorCritic(Actor(policy, LOGPROBS_FN), critic).double()
    args = ppo_rlhf.Args(
        micro_batch_size=micro_batch_size, entropy_coef=0.1, vf_coef=1.0, precision="fp32"
    )
    batch = training_batch(actor_critic)
    minibatch = torch.tensor([2, 0, 3, 1])
    means = accumulate_gradients(actor_critic, batch, minibatch, loss_fn, args, ranks)
    gradients = {
        name: parameter.grad.numpy()
        for name, parameter in actor_critic.named_parameters()
        if parameter.grad is not None
    }
    return gradients, means.over_ranks()


def mean_of_means(new, part, args):
    """The loss that averages over each micro-batch by itself, as many implementations do."""
    loss, stats = ppo_loss(new, part, args)
    num_tokens = sum(map(len, RESPONSES))
    return loss / part["mask"].sum() * num_tokens / len(RESPONSES), stats


def distances(first, second):
    """{name: the difference of two gradients relative to the norm of the second}."""
    assert first.keys() == second.keys()
    relative = {}
    for name, gradient in second.items():
        norm = (gradient**2).sum() ** 0.5
        if norm > 1e-9:
            relative[name] = ((first[name] - gradient) ** 2).sum() ** 0.5 / norm
    return relative


def assert_same_gradients(ours, theirs):
    """To 1e-12 for the policy, and to the precision of the values for the critic."""
    for name, distance in distances(ours, theirs).items():
        assert distance < (1e-5 if name.startswith("critic.") else 1e-12), name


def test_gradients_on_two_ranks_and_in_micro_batches(on_two_ranks, folders):
    """Responses of 5, 3, 1 and 4 tokens: the same however the rows are dealt out."""
    whole, metrics = gradients_and_means(None, folders, 4)
    assert {name.partition(".")[0] for name in whole} == {"actor", "critic"}
    ours, ours_metrics = gradients_and_means(None, folders, 1)
    assert_same_gradients(ours, whole)
    assert ours_metrics == pytest.approx(metrics, rel=1e-6, abs=1e-9)
    for micro_batch_size in (2, 1):
        first, second = on_two_ranks(gradients_and_means, folders, micro_batch_size)
        assert_same_gradients(first[0], whole)
        for name, gradient in first[0].items():
            assert (gradient == second[0][name]).all()
        assert first[1] == second[1] == pytest.approx(metrics, rel=1e-6, abs=1e-9)
    other, _ = gradients_and_means(None, folders, 1, mean_of_means)
    assert max(distances(other, whole).values()) > 0.05


def test_the_gradient_is_that_of_the_mean_over_real_tokens(actor_critic):
    """Of each row by itself, without padding."""
    batch = training_batch(actor_critic)
    args = ppo_rlhf.Args(micro_batch_size=4, precision="fp32")
    ranks = Ranks(0, 1, torch.device("cpu"))
    accumulate_gradients(actor_critic, batch, torch.arange(4), ppo_loss, args, ranks)
    parameters = dict(actor_critic.named_parameters())
    ours = {name: x.grad.clone() for name, x in parameters.items() if x.grad is not None}
    actor_critic.zero_grad()
    for i in range(4):
        row = select(batch, [i])
        loss, _ = ppo_loss(actor_critic(row), row, args)
        (loss / sum(map(len, RESPONSES))).backward()
    theirs = {name: x.grad for name, x in parameters.items() if x.grad is not None}
    assert max(distances(ours, theirs).values()) < 1e-4


def test_ids_after_a_row_reach_neither_loss_nor_gradient(actor_critic):
    losses = []
    gradients = []
    for fill in (EOS, PAD, 30):
        actor_critic.zero_grad()
        batch = training_batch(actor_critic)
        batch["input_ids"] = batch_of(fill=fill)["input_ids"]
        loss, _ = ppo_loss(actor_critic(batch), batch, ppo_rlhf.Args())
        loss.backward()
        losses.append(loss.item())
        gradients.append([x.grad.clone() for x in actor_critic.parameters() if x.grad is not None])
    assert losses[0] == losses[1] == losses[2]
    assert math.isfinite(losses[0])
    for first, second, third in zip(*gradients, strict=True):
        assert first.isfinite().all()
        assert torch.equal(first, second)
        assert torch.equal(first, third)
    assert sum(x.abs().sum() for x in gradients[0]) > 1
