"""PPO's parts against their definitions: masks, log-probabilities, rewards, GAE, losses, sampling, models, gradients.

What is expected is always worked out the long way round: plain Python loops, rows without padding, no cache.
"""

import copy
import math

import pytest
import torch
from tokenizers import processors
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Gemma2Config, MistralConfig
from transformers import StaticCache

import ppo_rlhf
import utils
from conftest import FAMILIES, GROUPED, SMALL
from ppo_rlhf import (
    ActorCritic,
    AdaptiveKLController,
    call_reward_fn,
    compute_gae,
    compute_rewards,
    decode_step,
    encode_prompt,
    generate,
    last_token_scores,
    left_pad,
    policy_loss,
    prompt_order,
    response_logits,
    response_mask,
    sample_tokens,
    token_logprobs,
    value_loss,
)

NAN, INF = math.nan, math.inf
PAD, EOS = 0, 1  # of the tokenizer in conftest.py
BIGGEST = 1 - 2**-24  # the largest number that torch.rand gives in fp32


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def mask_of(lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def spoiled(x, mask, values=(NAN, INF, -INF)):
    """x with something nasty at every entry behind the mask."""
    nasty = torch.tensor(values, dtype=x.dtype).repeat(x.numel() // len(values) + 1)[: x.numel()].view_as(x)
    return torch.where(mask, x, nasty)


# ----------------------------------------------------------------------------------------------------------------------
# response_mask


@pytest.mark.parametrize(
    ("row", "stop_ids", "min_length", "length"),
    [
        ([9, 5, 5, 5], [9], 0, 1),  # EOS at once
        ([5, 5, 5, 9], [9], 0, 4),  # EOS last
        ([5, 5, 5, 5], [9], 0, 4),  # no EOS
        ([5, 9, 5, 9], [9], 0, 2),  # the first of two
        ([5, 8, 9, 5], [9, 8], 0, 2),  # several stops
        ([9, 5, 9, 5], [9], 1, 3),  # a stop before min_length does not count
        ([5, 9, 5, 5], [9], 1, 2),  # one exactly at min_length does
        ([9, 9, 9, 9], [9], 3, 4),
        ([9, 9, 9, 9], [9], 7, 4),  # min_length beyond the width
    ],
)
def test_response_mask(row, stop_ids, min_length, length):
    responses = torch.tensor([row, [5] * 4])
    mask = response_mask(responses, stop_ids, min_length)
    assert mask.dtype == torch.bool
    assert mask.tolist() == mask_of([length, 4], 4).tolist()  # the neighbour row is whole
    assert responses.tolist() == [row, [5] * 4]
    assert torch.equal(mask, response_mask(responses, torch.tensor(stop_ids), min_length))


# ----------------------------------------------------------------------------------------------------------------------
# token_logprobs


def logprob_and_entropy(logits, token, temperature):
    """One distribution, in Python floats."""
    weights = [math.exp(z / temperature) for z in logits]
    probabilities = [w / sum(weights) for w in weights]
    return math.log(probabilities[token]), -sum(p * math.log(p) for p in probabilities if p > 0)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_token_logprobs_are_the_definition(temperature):
    logits, tokens = 2 * normal(2, 3, 7), torch.tensor([[0, 6, 3], [2, 2, 5]])
    logprobs, entropy = token_logprobs(logits, tokens, temperature)
    assert logprobs.dtype == entropy.dtype == torch.float64  # never less precise than what came in
    for i in range(2):
        for t in range(3):
            expected = logprob_and_entropy(logits[i, t].tolist(), tokens[i, t].item(), temperature)
            assert (logprobs[i, t].item(), entropy[i, t].item()) == pytest.approx(expected, abs=1e-12)
    off, _ = token_logprobs(logits, tokens, temperature + 0.3)
    assert (off - logprobs).abs().mean() > 0.02  # the temperature is not decoration


def test_token_logprobs_of_forbidden_ids():
    logits = normal(2, 3, 7).masked_fill(torch.tensor([True, False, False, True, False, False, True]), -INF)
    logits.requires_grad_()
    logprobs, entropy = token_logprobs(logits, torch.tensor([[1, 2, 4], [5, 5, 1]]), 0.7)
    left = logits.detach()[..., [1, 2, 4, 5]]
    expected = torch.distributions.Categorical(logits=left / 0.7)
    torch.testing.assert_close(entropy, expected.entropy(), atol=1e-12, rtol=0)
    torch.testing.assert_close(logprobs[0, 1], expected.log_prob(torch.tensor(1))[0, 1], atol=1e-12, rtol=0)
    (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[..., [0, 3, 6]] == 0).all()
    assert (logits.grad[..., [1, 2, 4, 5]] != 0).all()


def test_token_logprobs_are_fp32_from_bf16():
    logits, tokens = (4 * normal(4, 5, 300)).bfloat16(), torch.arange(20).view(4, 5)
    logprobs, entropy = token_logprobs(logits, tokens, 0.7)
    assert logprobs.dtype == entropy.dtype == torch.float32
    exact, exact_entropy = token_logprobs(logits.double(), tokens, 0.7)
    torch.testing.assert_close(logprobs.double(), exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), exact_entropy, atol=1e-5, rtol=1e-5)
    coarse = torch.log_softmax(logits / 0.7, -1).gather(-1, tokens[..., None]).squeeze(-1)
    assert (coarse.double() - exact).abs().max() > 1e-3  # what it would be without the detour


# ----------------------------------------------------------------------------------------------------------------------
# compute_rewards


LENGTHS = [1, 3, 5, 6]  # EOS at index 0, in the middle, and at or behind the last index of R = 6


def test_rewards_add_up_to_score_minus_kl():
    mask, scores = mask_of(LENGTHS, 6), normal(4, seed=1)
    logprobs, ref_logprobs = normal(4, 6, seed=2), normal(4, 6, seed=3)
    rewards = compute_rewards(scores, logprobs, ref_logprobs, mask, 0.3)
    for i, length in enumerate(LENGTHS):
        k1 = (logprobs - ref_logprobs)[i, :length]
        assert rewards[i].sum().item() == pytest.approx((scores[i] - 0.3 * k1.sum()).item(), abs=1e-12)
        torch.testing.assert_close(rewards[i, : length - 1], -0.3 * k1[:-1], atol=1e-12, rtol=0)
        assert (rewards[i, length:] == 0).all()


def test_score_is_paid_at_the_last_real_token_only():
    mask, scores = mask_of(LENGTHS, 6), torch.tensor([1.0, -2.0, 3.0, 4.0])
    rewards = compute_rewards(scores, normal(4, 6, dtype=torch.float32), normal(4, 6, dtype=torch.float32), mask, 0.0)
    expected = torch.zeros(4, 6)
    expected[range(4), [length - 1 for length in LENGTHS]] = scores
    assert torch.equal(rewards, expected)


def test_rewards_ignore_what_is_behind_the_mask():
    mask, scores = mask_of(LENGTHS, 6), normal(4, seed=1)
    logprobs, ref_logprobs = normal(4, 6, seed=2), normal(4, 6, seed=3)
    clean = compute_rewards(scores, logprobs, ref_logprobs, mask, 0.3)
    dirty = compute_rewards(scores, spoiled(logprobs, mask), spoiled(ref_logprobs, mask, (-INF, NAN)), mask, 0.3)
    assert torch.equal(clean, dirty)


# ----------------------------------------------------------------------------------------------------------------------
# compute_gae


def gae_by_sums(rewards, values, length, gamma, lam):
    """A_t as the exponentially weighted mean of the k-step estimates of one episode; O(T^3), straight from the paper.

    The k-step estimate is r_t + ... + gamma^(k-1) r_(t+k-1) + gamma^k V_(t+k) - V_t; steps beyond the end repeat the
    last estimate, so the weights (1 - lam) lam^(k-1) of all of them collect there.
    """
    r, v = rewards[:length].tolist(), values[:length].tolist() + [0.0]
    advantages = []
    for t in range(length):
        steps = range(1, length - t + 1)
        estimates = [sum(gamma**i * r[t + i] for i in range(k)) + gamma**k * v[t + k] - v[t] for k in steps]
        weights = [(1 - lam) * lam ** (k - 1) for k in steps[:-1]] + [lam ** (length - t - 1)]
        advantages.append(sum(w * e for w, e in zip(weights, estimates, strict=True)))
    return advantages


def gae_case():
    return normal(5, 6, seed=4), normal(5, 6, seed=5), mask_of([1, 2, 4, 5, 6], 6)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.99, 1.0), (0.7, 0.0), (1.0, 1.0)])
def test_gae_is_the_weighted_mean_of_k_step_estimates(gamma, lam):
    rewards, values, mask = gae_case()
    advantages, returns = compute_gae(rewards, values, mask, gamma, lam)
    assert advantages.dtype == torch.float64
    for i, length in enumerate(mask.sum(1).tolist()):
        expected = gae_by_sums(rewards[i], values[i], length, gamma, lam)
        assert advantages[i, :length].tolist() == pytest.approx(expected, abs=1e-12)
        assert returns[i, :length].tolist() == pytest.approx([v + a for v, a in zip(values[i].tolist(), expected)])
        assert (advantages[i, length:] == 0).all() and (returns[i, length:] == 0).all()


def test_gae_limits():
    rewards, values, mask = gae_case()
    advantages, returns = compute_gae(rewards, values, mask, 1.0, 1.0)  # Monte Carlo
    to_go = torch.where(mask, rewards, 0.0).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(advantages, torch.where(mask, to_go - values, 0.0), atol=1e-12, rtol=0)
    torch.testing.assert_close(returns, torch.where(mask, to_go, 0.0), atol=1e-12, rtol=0)
    advantages, _ = compute_gae(rewards, values, mask, 0.9, 0.0)  # one step
    for i, length in enumerate(mask.sum(1).tolist()):
        for t in range(length):
            next_value = values[i, t + 1] if t + 1 < length else 0.0  # the end is terminal, also at the full width
            assert advantages[i, t].item() == pytest.approx((rewards[i, t] + 0.9 * next_value - values[i, t]).item())


def test_gae_ignores_what_is_behind_the_mask():
    rewards, values, mask = gae_case()
    clean = compute_gae(rewards, values, mask, 0.9, 0.8)
    for values_behind in [(NAN,), (INF, -INF), (1e30, -7.0)]:
        dirty = compute_gae(spoiled(rewards, mask, values_behind), spoiled(values, mask, values_behind), mask, 0.9, 0.8)
        assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])
    unmasked, _ = compute_gae(rewards, values, torch.ones_like(mask), 0.9, 0.8)
    assert (unmasked - clean[0])[mask].abs().max() > 0.1  # so there was something to ignore
    assert rewards.equal(gae_case()[0]) and values.equal(gae_case()[1])  # inputs are left alone


def test_the_worked_example_of_the_score_at_eos():
    """Two tokens, score 1 at EOS, V = (0.2, 0.5): A at EOS is 1 - 0.5, A before it 0.5 - 0.2 + lam * 0.5."""
    rewards, values = torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[0.2, 0.5, 9.0]])
    advantages, returns = compute_gae(rewards, values, mask_of([2], 3), 1.0, 0.95)
    assert advantages[0].tolist() == pytest.approx([0.775, 0.5, 0.0])
    assert returns[0].tolist() == pytest.approx([0.975, 1.0, 0.0])


# ----------------------------------------------------------------------------------------------------------------------
# Losses


@pytest.mark.parametrize("high", [None, 0.28, 0.1])
def test_policy_loss_is_the_definition(high):
    ratios = torch.tensor([0.5, 0.79, 0.81, 0.95, 1.0, 1.05, 1.15, 1.19, 1.21, 1.27, 1.29, 3.0], dtype=torch.float64)
    advantages = torch.tensor([[2.0], [-1.5], [0.0]], dtype=torch.float64)
    logprobs = normal(3, 12)
    new_logprobs = (logprobs + ratios.log()).requires_grad_()
    loss, ratio, clipped = policy_loss(new_logprobs, logprobs, advantages.expand(3, 12), 0.2, high)
    loss.sum().backward()
    upper = 1 + (0.2 if high is None else high)
    for i, a in enumerate([2.0, -1.5, 0.0]):
        for j, r in enumerate(ratios.tolist()):
            plain, bounded = -a * r, -a * min(max(r, 0.8), upper)
            assert ratio[i, j].item() == pytest.approx(r, abs=1e-12)
            assert loss[i, j].item() == pytest.approx(max(plain, bounded), abs=1e-12)
            assert clipped[i, j].item() == ((a > 0 and r > upper) or (a < 0 and r < 0.8))
            expected = 0.0 if clipped[i, j] else -a * r  # d ratio / d logprob = ratio
            assert new_logprobs.grad[i, j].item() == pytest.approx(expected, abs=1e-12)


def test_policy_loss_at_the_old_policy_is_the_policy_gradient():
    logprobs, advantages = normal(4, 6, seed=1), normal(4, 6, seed=2)
    new_logprobs = logprobs.clone().requires_grad_()
    loss, ratio, clipped = policy_loss(new_logprobs, logprobs, advantages, 0.2)
    loss.sum().backward()
    assert (ratio == 1).all() and not clipped.any()
    assert torch.equal(loss, -advantages) and torch.equal(new_logprobs.grad, -advantages)


def test_value_loss_is_the_definition():
    new_values = (2 * normal(50, 6, seed=1)).requires_grad_()
    values, returns = normal(50, 6, seed=2), normal(50, 6, seed=3)
    loss, clipped = value_loss(new_values, values, returns, 0.2)
    loss.sum().backward()
    assert 0.1 < clipped.double().mean() < 0.9
    numbers = zip(*(x.flatten().tolist() for x in (new_values, values, returns, loss, clipped, new_values.grad)))
    for new, old, target, got, was_clipped, grad in numbers:
        plain, bounded = 0.5 * (new - target) ** 2, 0.5 * (min(max(new, old - 0.2), old + 0.2) - target) ** 2
        assert got == pytest.approx(max(plain, bounded), abs=1e-12) and got >= plain
        assert was_clipped == (bounded > plain)
        assert grad == pytest.approx(0.0 if was_clipped else new - target, abs=1e-12)


def test_value_clip_is_idle_at_the_old_values_and_at_a_tie():
    values, returns = normal(4, 6, seed=2), normal(4, 6, seed=3)
    loss, clipped = value_loss(values, values, returns, 0.2)
    assert not clipped.any() and torch.equal(loss, 0.5 * (values - returns) ** 2)
    # new value 0.5 is clipped to 0.25; the return stands in the middle, so both branches are equally large
    loss, clipped = value_loss(torch.tensor([0.5]), torch.tensor([0.0]), torch.tensor([0.375]), 0.25)
    assert not clipped.any() and loss.item() == 0.5 * 0.125**2


# ----------------------------------------------------------------------------------------------------------------------
# AdaptiveKLController


def test_adaptive_kl():
    controller = AdaptiveKLController(0.15, target=6.0, horizon=10000)
    assert controller.update(6.0, 512) == 0.15  # at the target nothing moves
    assert controller.update(6.6, 512) == pytest.approx(0.15 * (1 + 0.1 * 512 / 10000))
    assert controller.kl_coef == pytest.approx(0.15 * (1 + 0.1 * 512 / 10000))
    for kl, error in [(1e6, 0.2), (7.3, 0.2), (6.3, 0.05), (5.7, -0.05), (0.0, -0.2), (-3.0, -0.2)]:
        before = controller.kl_coef
        after = controller.update(kl, 512)
        assert after == controller.kl_coef == pytest.approx(before * (1 + error * 512 / 10000))
        assert (after > before) == (kl > 6.0)  # too far from the reference: a higher price
    tiny = AdaptiveKLController(0.1, target=6.0, horizon=1000)  # a batch beyond the horizon moves it by 20% at most
    assert tiny.update(0.0, 5000) == pytest.approx(0.08) and tiny.update(60.0, 5000) == pytest.approx(0.096)


# ----------------------------------------------------------------------------------------------------------------------
# sample_tokens


def inverse_cdf(logits, u, temperature, bias=0.0):
    """The first id whose fp32 cumulative probability exceeds u times the last one: the definition, one row, a loop."""
    logits = logits.float() + bias
    if temperature == 0:
        return max(range(len(logits)), key=lambda i: logits[i].item())
    cumulative = torch.softmax(logits / temperature, -1).cumsum(-1)
    threshold = torch.tensor(u, dtype=torch.float32) * cumulative[-1]
    return next(i for i in range(len(logits)) if cumulative[i] > threshold)


@pytest.mark.parametrize("vocabulary", [13, 64, 200])  # less than a block, one block, three and a part
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0])
def test_sample_is_the_inverse_cdf(temperature, vocabulary):
    logits, u = 2 * normal(200, vocabulary, dtype=torch.float32), uniform(200)
    u[:3], u[3:6] = 0.0, BIGGEST
    forbidden = torch.arange(vocabulary) % 5 == 4
    for bias in (0.0, torch.where(forbidden, -INF, 0.0)):
        tokens = sample_tokens(logits, u, temperature, bias)
        assert tokens.shape == (200,) and tokens.dtype == torch.int64
        assert tokens.tolist() == [inverse_cdf(logits[i], u[i].item(), temperature, bias) for i in range(200)]
        assert forbidden[tokens].any() == isinstance(bias, float)


def test_sample_takes_the_right_side_of_a_boundary():
    logits = torch.zeros(1, 4)  # cumulative 1/4, 1/2, 3/4, 1: exact in binary
    for u, token in [(0.0, 0), (0.25 - 2**-24, 0), (0.25, 1), (0.5, 2), (0.75, 3), (BIGGEST, 3)]:
        assert sample_tokens(logits, torch.tensor([u]), 1.0).item() == token


def test_impossible_tokens_are_never_sampled():
    """At both ends of [0,1), with impossible ids first, last and in between; -300 underflows to probability 0 as well."""
    logits = normal(500, 40, dtype=torch.float32)
    impossible = uniform(500, 40, seed=1) < 0.5
    impossible[:, [0, 39]] = True
    logits = torch.where(impossible, torch.where(uniform(500, 40, seed=2) < 0.5, -INF, -300.0), logits)
    for u in (0.0, 2**-24, 0.5, 1 - 2**-23, BIGGEST):
        tokens = sample_tokens(logits, torch.full((500,), u), 1.0)
        assert tokens.max() < 40
        assert not impossible[torch.arange(500), tokens].any()


def test_forbidden_tokens_are_never_sampled_even_if_likely():
    logits, forbidden = torch.zeros(300, 10), torch.zeros(10, dtype=torch.bool)
    logits[:, 9], forbidden[[0, 9]] = 50.0, True
    for temperature in (0, 1.0):
        tokens = sample_tokens(logits, uniform(300), temperature, torch.where(forbidden, -INF, 0.0))
        assert not forbidden[tokens].any()
    assert set(sample_tokens(logits, uniform(300), 1.0, torch.where(forbidden, -INF, 0.0)).tolist()) == set(range(1, 9))


def chi_square(tokens, probabilities):
    expected = probabilities * len(tokens)
    return (((torch.bincount(tokens, minlength=len(expected)) - expected) ** 2) / expected).sum().item()


def test_sampled_frequencies_are_the_probabilities():
    logits, count = torch.tensor([1.0, -1.0, 0.0, 2.0, 0.5, -2.0]), 20000
    u = uniform(count, seed=7)
    tokens = sample_tokens(logits.expand(count, 6), u, 0.7)
    assert chi_square(tokens, torch.softmax(logits / 0.7, 0)) < 20.5  # 99.9 % quantile at 5 degrees of freedom
    assert chi_square(tokens, torch.softmax(logits, 0)) > 200  # a sampler that forgot the temperature would be seen
    grid = (torch.arange(count) + 0.5) / count  # every uniform once: counts are exact to rounding at the borders
    counts = torch.bincount(sample_tokens(logits.expand(count, 6), grid, 0.7), minlength=6)
    assert (counts - count * torch.softmax(logits / 0.7, 0)).abs().max() <= 1.5


# ----------------------------------------------------------------------------------------------------------------------
# generate


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folders(request, gpt2_folder, llama_folder, gpt2_rm_folder, llama_rm_folder):
    """(language model, reward model): absolute positions without, rotary positions with a centre in the config."""
    return (gpt2_folder, gpt2_rm_folder) if request.param == "gpt2" else (llama_folder, llama_rm_folder)


@pytest.fixture(scope="module")
def policy(folders):
    return utils.load_pretrained(AutoModelForCausalLM, folders[0])[0].requires_grad_(False)


QUERIES = [[5], [6, 7, 8, 9, 10, 11, 12], [9, 3, 9], [14, 15, 16, 17, 2]]
BIAS = torch.where(torch.arange(31) == PAD, -INF, 0.0)


@torch.no_grad()
def slow_response(policy, query, uniforms, temperature, stop_ids):
    """Without cache, mask, padding or position ids: the whole sequence again for every token."""
    response = []
    for u in uniforms.tolist():
        logits = policy(torch.tensor([query + response])).logits[0, -1]
        response.append(inverse_cdf(logits, u, temperature, BIAS))
        if response[-1] in stop_ids:
            break
    return response + [PAD] * (len(uniforms) - len(response))


def sample(policy, queries, uniforms, temperature=1.0, stop_ids=(EOS,), extra=0, **options):
    """`generate` on queries of uneven length, left padded with `extra` more pads than needed."""
    ids, query_mask = left_pad(queries, max(map(len, queries)) + extra, PAD, "cpu")
    return generate(policy, ids, query_mask, uniforms, temperature, list(stop_ids), PAD, BIAS, **options)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0])
def test_generate_is_the_slow_loop(policy, temperature):
    stop_ids, uniforms = (EOS, 4, 20, 21), uniform(4, 11, seed=3)
    responses = sample(policy, QUERIES, uniforms, temperature, stop_ids)
    assert responses.shape == (4, 11) and responses.dtype == torch.int64
    expected = [slow_response(policy, q, u, temperature, stop_ids) for q, u in zip(QUERIES, uniforms)]
    assert responses.tolist() == expected
    assert len({tuple(row) for row in expected}) > 2  # the rows do differ
    if temperature:
        ends = response_mask(responses, list(stop_ids)).sum(1)
        assert ends.min() < 11  # a row did stop, and below: nothing but pads behind it
        for row, end in zip(responses, ends):
            assert (row[end:] == PAD).all() and (row[:end] != PAD).all()


# windows below a query's length
WINDOWED = [kind(**GROUPED, **SMALL, sliding_window=4) for kind in (MistralConfig, Gemma2Config)]


@pytest.mark.parametrize("config", [x for x, _ in FAMILIES] + WINDOWED, ids=lambda x: x.model_type)
def test_other_families_sample_what_the_whole_sequence_gives(config, tmp_path):
    """The prefill and the cache behind it, with a cache of its own and with one that stays, against no cache at all."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = utils.load_pretrained(AutoModelForCausalLM, str(tmp_path))[0]
    (ids, mask), uniforms = left_pad(QUERIES, 7, PAD, "cpu"), uniform(4, 6, seed=3)
    responses = generate(model, ids, mask, uniforms, 1.0, [99], PAD)
    for query, u, response in zip(QUERIES, uniforms.tolist(), responses.tolist(), strict=True):
        for t in range(6):
            logits = model(torch.tensor([query + response[:t]])).logits[0, -1]
            assert response[t] == inverse_cdf(logits, u[t], 1.0, 0.0)
    cache = StaticCache(config=model.config, max_cache_len=7 + 6)
    for _ in range(2):
        assert torch.equal(generate(model, ids, mask, uniforms, 1.0, [99], PAD, cache=cache), responses)


def test_generate_does_not_see_padding_or_neighbours(policy):
    uniforms = uniform(4, 10, seed=4)
    responses = sample(policy, QUERIES, uniforms)
    assert torch.equal(sample(policy, QUERIES, uniforms, extra=5), responses)
    for i, query in enumerate(QUERIES):
        assert torch.equal(sample(policy, [query], uniforms[i : i + 1]), responses[i : i + 1])
    ids, query_mask = left_pad(QUERIES, 7, 30, "cpu")  # another id as padding
    assert torch.equal(generate(policy, ids, query_mask, uniforms, 1.0, [EOS], PAD, BIAS), responses)
    assert not torch.equal(sample(policy, QUERIES, uniforms.flip(0)), responses)


@pytest.mark.parametrize("min_length", [0, 6])
def test_stopping_early_changes_nothing(policy, min_length):
    """Two runs on the same uniforms: one stops when all rows have ended, one samples on and is cut afterwards."""
    uniforms, stop_ids, steps = uniform(4, 30, seed=5), [EOS, *range(2, 16)], []

    def counted(*inputs):
        steps.append(1)
        return decode_step(*inputs)

    short = sample(policy, QUERIES, uniforms, stop_ids=stop_ids, step=counted, min_length=min_length)
    assert min_length < len(steps) < 29 and short.shape == (4, 30)
    full = sample(policy, QUERIES, uniforms, stop_ids=[99])
    assert torch.equal(short, full.masked_fill(~response_mask(full, stop_ids, min_length), PAD))


def test_dropping_ended_rows_changes_nothing(policy):
    """A cache of its own loses rows as they end, twice and more, a given one keeps all: the same tokens."""
    stop_ids, times = [EOS, *range(2, 5)], []
    for seed in range(3):
        uniforms, counts = uniform(16, 30, seed=20 + seed), []

        def counted(model, cache, tokens, *inputs, counts=counts):
            if cache.layers:  # behind the prefill
                counts.append((len(tokens), len(cache.layers[0].keys)))
            return decode_step(model, cache, tokens, *inputs)

        dropping = sample(policy, QUERIES * 4, uniforms, stop_ids=stop_ids, step=counted)
        whole = StaticCache(config=policy.config, max_cache_len=7 + 30)
        assert torch.equal(dropping, sample(policy, QUERIES * 4, uniforms, stop_ids=stop_ids, cache=whole))
        assert all(tokens == cached for tokens, cached in counts)
        times.append(len(set(counts)) - 1)
        assert min(counts)[0] > 1 and len(whole.layers[0].keys) == 16
    assert max(times) >= 2


def test_the_prefill_reads_the_query_alone(policy):
    """Its attention has P keys, behind it P + R slots; with a cache that stays it is not `step`, which may be a CUDA graph."""
    reads = []

    def noted(model, cache, tokens, key_mask, *inputs):
        sampled = decode_step(model, cache, tokens, key_mask, *inputs)
        reads.append((tokens.shape[1], key_mask.shape[1], cache.layers[0].keys.shape[2]))
        return sampled

    expected = sample(policy, QUERIES, uniform(4, 3, seed=6), stop_ids=[99], step=noted)
    assert reads == [(7, 7, 7), (1, 10, 10), (1, 10, 10)]
    cache = StaticCache(config=policy.config, max_cache_len=7 + 3)
    sampled = sample(policy, QUERIES, uniform(4, 3, seed=6), stop_ids=[99], step=noted, cache=cache)
    assert reads[3:] == [(1, 10, 10), (1, 10, 10)] and torch.equal(sampled, expected)


def test_response_of_one_token(policy):
    uniforms = uniform(4, 1, seed=6)
    assert sample(policy, QUERIES, uniforms).tolist() == [
        slow_response(policy, q, u, 1.0, (EOS,)) for q, u in zip(QUERIES, uniforms)
    ]


@pytest.mark.parametrize("spare", [0, 5])
def test_a_used_cache_is_as_good_as_a_new_one(policy, spare):
    cache = StaticCache(config=policy.config, max_cache_len=7 + 10 + spare)
    longer, shorter = uniform(4, 10, seed=7), uniform(4, 10, seed=8)
    for queries, uniforms in [(QUERIES, longer), (QUERIES[::-1], shorter), (QUERIES, longer)]:
        assert torch.equal(sample(policy, queries, uniforms, cache=cache), sample(policy, queries, uniforms))


@pytest.mark.parametrize("keeps", [True, False])
def test_compiled_step_samples_the_same_tokens(gpt2_folder, keeps):
    """A cache that stays, or a new one each time: the same tokens as eager, no recompile once it is warm."""
    policy = utils.load_pretrained(AutoModelForCausalLM, gpt2_folder)[0]
    step = torch.compile(decode_step, fullgraph=True)
    cache = StaticCache(config=policy.config, max_cache_len=7 + 6) if keeps else None
    stop_ids = [EOS] if keeps else [99]  # rows that leave the batch would be another shape
    for seed in (9, 10):
        uniforms = uniform(4, 6, seed=seed)
        with torch.compiler.set_stance("default" if seed == 9 else "fail_on_recompile"):
            responses = sample(policy, QUERIES, uniforms, stop_ids=stop_ids, step=step, cache=cache)
        assert torch.equal(responses, sample(policy, QUERIES, uniforms, stop_ids=stop_ids))


def test_dropping_rows_compiles_twice(gpt2_folder):
    """The prefill, and a step of any number of rows: however many stay, nothing is compiled anew."""
    utils.init_ranks()  # tells the compiler that sizes which are equal by chance are not one
    policy, counter, left = utils.load_pretrained(AutoModelForCausalLM, gpt2_folder)[0], CompileCounter(), set()
    compiled = torch.compile(decode_step, backend=counter, fullgraph=True, dynamic=True)

    def step(model, cache, tokens, *inputs):
        left.add(len(tokens))
        return compiled(model, cache, tokens, *inputs)

    for seed in range(12):
        uniforms, stop_ids = uniform(40, 30, seed=seed), [EOS, *range(2, 5)]
        responses = sample(policy, QUERIES * 10, uniforms, stop_ids=stop_ids, step=step)
        assert torch.equal(responses, sample(policy, QUERIES * 10, uniforms, stop_ids=stop_ids))
    assert len(left) >= 10 and counter.frame_count == 2


# ----------------------------------------------------------------------------------------------------------------------
# Models


RESPONSES = [[7, 8, EOS], [9, 10, 11, 12, 13], [EOS], [20, 21, 22, EOS]]


@pytest.fixture
def actor_critic(folders):
    policy, _ = utils.load_pretrained(AutoModelForCausalLM, folders[0])
    critic, _ = utils.load_pretrained(AutoModelForSequenceClassification, folders[1], num_labels=1)
    return ActorCritic(policy, critic)


def batch_of(left=0, right=0, pad_id=PAD):
    """input_ids, attention_mask (B,T), response mask (B,R) with P = 7 + left and R = 5 + right."""
    queries, query_mask = left_pad(QUERIES, 7 + left, pad_id, "cpu")
    responses = torch.tensor([r + [pad_id] * (5 + right - len(r)) for r in RESPONSES])
    mask = mask_of([len(r) for r in RESPONSES], 5 + right)
    return torch.cat([queries, responses], 1), torch.cat([query_mask, mask], 1), mask


@torch.no_grad()
def test_actor_critic_against_rows_without_padding(actor_critic):
    """log-probabilities and values at P - 1 .. T - 2 of a fresh forward of each row alone."""
    input_ids, attention_mask, mask = batch_of()
    logprobs, entropy, values = actor_critic(input_ids, attention_mask, 5, 0.7, BIAS)
    assert logprobs.shape == entropy.shape == values.shape == (4, 5)
    assert logprobs.dtype == entropy.dtype == values.dtype == torch.float32
    critic = actor_critic.critic
    centre = getattr(critic.config, "score_mean", 0.0)
    for i, (query, response) in enumerate(zip(QUERIES, RESPONSES)):
        ids, last = torch.tensor([query + response]), len(query) - 1
        logits = actor_critic.policy(ids).logits[0] + BIAS
        hidden = critic.base_model(ids).last_hidden_state[0]
        for t, token in enumerate(response):
            expected, expected_entropy = logprob_and_entropy(logits[last + t].tolist(), token, 0.7)
            assert logprobs[i, t].item() == pytest.approx(expected, abs=1e-5)
            assert entropy[i, t].item() == pytest.approx(expected_entropy, abs=1e-5)
            value = (hidden[last + t] @ critic.score.weight[0]).item() - centre
            assert values[i, t].item() == pytest.approx(value, abs=1e-5)
    other, _, _ = actor_critic(input_ids, attention_mask, 5, 1.0, BIAS)
    assert (other - logprobs)[mask].abs().mean() > 0.05


@torch.no_grad()
def test_actor_critic_does_not_see_padding(actor_critic):
    input_ids, attention_mask, mask = batch_of()
    expected = actor_critic(input_ids, attention_mask, 5, 1.0, BIAS)
    for left, right in [(3, 0), (0, 4), (2, 3)]:
        ids, attention, _ = batch_of(left, right)
        outputs = actor_critic(ids, attention, 5 + right, 1.0, BIAS)
        for got, want in zip(outputs, expected, strict=True):
            torch.testing.assert_close(got[:, :5][mask], want[mask], atol=1e-5, rtol=1e-5)
    alone = actor_critic(input_ids[:1], attention_mask[:1], 5, 1.0, BIAS)
    for got, want in zip(alone, expected, strict=True):
        torch.testing.assert_close(got[mask[:1]], want[:1][mask[:1]], atol=1e-5, rtol=1e-5)
    shifted = actor_critic.policy(input_ids, attention_mask=attention_mask.long()).logits  # no position ids
    moved = token_logprobs(shifted[:, 6:-1] + BIAS, input_ids[:, -5:], 1.0)[0]
    if actor_critic.policy.config.model_type == "gpt2":
        assert (moved - expected[0])[mask].abs().max() > 0.1  # absolute positions: the padding would be seen


def ppo_loss(train_model, rows, num_tokens):
    """The loss of the script's `main` on some rows: both losses over real tokens, by their number over all ranks."""
    ids, attention, real, logprobs, values, advantages, returns = rows
    new = train_model(ids, attention, real.shape[1], 0.9, BIAS)
    return ppo_rlhf.ppo_loss(*new, logprobs, values, advantages, returns, real, ppo_rlhf.Args())[0] / num_tokens


def ppo_rows(actor_critic, pad_id=PAD):
    """A batch with everything the loss needs; ratios and values are off their old ones, so both clips have work."""
    ids, attention, mask = batch_of(pad_id=pad_id)
    with torch.no_grad():
        logprobs, _, values = actor_critic(*batch_of()[:2], 5, 0.9, BIAS)
    dtype = values.dtype
    old_logprobs = torch.where(mask, logprobs + 0.3 * normal(4, 5, seed=1).to(dtype), -INF)
    old_values = values + 0.3 * normal(4, 5, seed=2).to(dtype)
    advantages, returns = normal(4, 5, seed=3).to(dtype), normal(4, 5, seed=4).to(dtype)
    return [ids, attention, mask, old_logprobs, old_values, advantages, returns]


def test_ids_behind_the_mask_reach_neither_loss_nor_gradient(actor_critic):
    gradients, losses = [], []
    for pad_id in (PAD, EOS, 30):
        actor_critic.zero_grad()
        rows = ppo_rows(actor_critic, pad_id)
        loss = ppo_loss(actor_critic, rows, rows[2].sum())
        loss.backward()
        losses.append(loss.item())
        gradients.append([p.grad.clone() for p in actor_critic.parameters() if p.grad is not None])
    assert losses[0] == losses[1] == losses[2] and math.isfinite(losses[0])
    for first, second, third in zip(*gradients, strict=True):
        assert first.isfinite().all()
        assert torch.equal(first, second) and torch.equal(first, third)
    assert sum(g.abs().sum() for g in gradients[0]) > 1


@torch.no_grad()
def test_the_reference_starts_at_no_distance(actor_critic):
    """Exactly: one function gives both sides, so there is nothing to round differently."""
    input_ids, attention_mask, mask = batch_of()
    reference = copy.deepcopy(actor_critic.policy)
    logprobs, _, _ = actor_critic(input_ids, attention_mask, 5, 0.7, BIAS)
    ref_logits = response_logits(reference, input_ids, attention_mask, 5)[0] + BIAS
    assert (ref_logits[..., PAD] == -INF).all() and ref_logits[..., 1:].isfinite().all()  # one support for all
    ref_logprobs, _ = token_logprobs(ref_logits, input_ids[:, -5:], 0.7)
    assert torch.equal(logprobs[mask], ref_logprobs[mask])


@torch.no_grad()
def test_no_dropout_in_train_mode(actor_critic, folders):
    input_ids, attention_mask, _ = batch_of()
    actor_critic.train()
    first, second = (actor_critic(input_ids, attention_mask, 5, 1.0, BIAS) for _ in range(2))
    assert all(map(torch.equal, first, second))
    untouched = AutoModelForCausalLM.from_pretrained(folders[0]).train()  # the config does ask for dropout
    assert not torch.equal(untouched(input_ids).logits, untouched(input_ids).logits)


@torch.no_grad()
def test_last_token_scores_wherever_the_padding_is(folders):
    model, _ = utils.load_pretrained(AutoModelForSequenceClassification, folders[1], num_labels=1)
    rows = [[5, 6, EOS], [7], [8, 9, PAD, 10, 11, 12], [13, EOS, 14, EOS]]  # PAD and EOS as ordinary tokens too
    expected = []
    for row in rows:  # the plain class takes the last token of a row that has no padding at its end
        hidden = model.base_model(torch.tensor([row])).last_hidden_state[0, -1]
        expected.append((model.score.weight[0] @ hidden).item() - getattr(model.config, "score_mean", 0.0))
    plain = model(torch.tensor([rows[0]])).logits.item() - getattr(model.config, "score_mean", 0.0)
    assert expected[0] == pytest.approx(plain, abs=1e-5)
    assert max(expected) - min(expected) > 0.1
    for left, right in [(0, 0), (3, 0), (0, 3), (2, 2)]:
        for pad_id in (PAD, EOS, -100, 10**6):
            width = 6 + left + right
            ids = torch.full((4, width), pad_id)
            attention_mask = torch.zeros(4, width, dtype=torch.long)
            for i, row in enumerate(rows):
                start = width - right - len(row) if left else 0
                ids[i, start : start + len(row)] = torch.tensor(row)
                attention_mask[i, start : start + len(row)] = 1
            for kind in (torch.long, torch.bool):
                scores = last_token_scores(model, ids, attention_mask.to(kind))
                assert scores.dtype == torch.float32 and scores.tolist() == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_scores_and_values_are_fp32_under_bf16_autocast(actor_critic):
    input_ids, attention_mask, mask = batch_of()
    exact = actor_critic(input_ids, attention_mask, 5, 1.0, BIAS)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = actor_critic(input_ids, attention_mask, 5, 1.0, BIAS)
        scores = last_token_scores(actor_critic.critic, input_ids, attention_mask)
    assert {x.dtype for x in (*outputs, scores)} == {torch.float32}
    for got, want in zip(outputs, exact, strict=True):
        assert 0 < (got - want)[mask].abs().max() < 0.3  # bf16 was at work inside


# ----------------------------------------------------------------------------------------------------------------------
# Ranks


def gradients(rank, folders, rows_per_micro_batch, mean_of_means=False):
    """Gradients in fp64 of one minibatch, on two ranks or (rank None) alone, through the wrapper that main uses."""
    ranks = utils.Ranks(rank or 0, 1 if rank is None else 2, torch.device("cpu"))
    policy, _ = utils.load_pretrained(AutoModelForCausalLM, folders[0])
    critic, _ = utils.load_pretrained(AutoModelForSequenceClassification, folders[1], num_labels=1)
    for model in (policy, critic):
        model.set_attn_implementation("sdpa")  # Llama's plain attention takes its softmax in fp32
    actor_critic = ActorCritic(policy, critic).double()
    rows = ppo_rows(actor_critic)
    train_model = utils.wrap(actor_critic, ranks, compiled=False)
    micro_batches = torch.tensor([2, 0, 3, 1])[ranks.rank :: ranks.world_size].split(rows_per_micro_batch)
    for k, index in enumerate(micro_batches, start=1):
        mine = [x[index] for x in rows]
        count = mine[2].sum() * len(micro_batches) * ranks.world_size if mean_of_means else rows[2].sum()
        train_model.require_backward_grad_sync = k == len(micro_batches)
        (ppo_loss(train_model, mine, count) * ranks.world_size).backward()
    return {name: p.grad.numpy() for name, p in actor_critic.named_parameters() if p.grad is not None}


def distance(first, second):
    """The largest difference of two gradients relative to each tensor's norm."""
    assert first.keys() == second.keys()
    norms = {name: (g**2).sum() ** 0.5 for name, g in second.items()}
    return max(((first[name] - g) ** 2).sum() ** 0.5 / norms[name] for name, g in second.items() if norms[name] > 1e-9)


def test_gradient_on_two_ranks_and_in_micro_batches(on_two_ranks, folders):
    """Rows of 3, 5, 1 and 4 tokens: the same gradient however they are dealt out, to 1e-12."""
    whole = gradients(None, folders, 4)
    assert distance(gradients(None, folders, 1), whole) < 1e-12
    for rows_per_micro_batch in (2, 1):
        first, second = on_two_ranks(gradients, folders, rows_per_micro_batch)
        assert distance(first, whole) < 1e-12
        assert all((first[name] == second[name]).all() for name in first)
    assert distance(gradients(None, folders, 1, mean_of_means=True), whole) > 0.05  # what the references do


# ----------------------------------------------------------------------------------------------------------------------
# Data


def test_prompt_order_is_pass_after_pass():
    order = prompt_order(5, 0, 20, seed=3)
    for start in range(0, 20, 5):
        assert sorted(order[start : start + 5]) == list(range(5))
    assert len({tuple(order[start : start + 5]) for start in range(0, 20, 5)}) > 1
    assert prompt_order(5, 3, 9, seed=3) == order[3:12]  # however it is cut into updates
    assert prompt_order(5, 0, 20, seed=4) != order


def test_left_pad():
    queries, query_mask = left_pad([[5], [6, 7]], 3, 9, "cpu")
    assert queries.tolist() == [[9, 9, 5], [9, 6, 7]]
    assert query_mask.dtype == torch.bool and query_mask.tolist() == [[False, False, True], [False, True, True]]


def test_encode_prompt(tokenizer):
    assert encode_prompt(tokenizer, "ab") == [2, 3]
    assert encode_prompt(tokenizer, "|ab") == [1, 2, 3]  # a BOS that the user wrote
    assert encode_prompt(tokenizer, "||ab") == [1, 2, 3]
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{{ bos_token }}{% for m in messages %}U{{ m.content }}{% endfor %}A"
    assert encode_prompt(chatty, [{"role": "user", "content": "ab"}]) == [1, 29, 2, 3, 30]
    chatty.chat_template = "{{ bos_token }}{% for m in messages %}U{{ m.content }}{% endfor %}"
    chatty.chat_template += "{% if add_generation_prompt %}A{% endif %}"
    adding = processors.TemplateProcessing(single="| $A |", special_tokens=[("|", 1)])
    chatty.backend_tokenizer.post_processor = adding  # BOS and EOS, as many tokenizers do by default
    assert encode_prompt(chatty, "ab") == [1, 2, 3]
    assert encode_prompt(chatty, "ab|") == [1, 2, 3, 1]  # an EOS that the user wrote
    assert encode_prompt(chatty, "") == [1]
    assert encode_prompt(chatty, [{"role": "user", "content": "ab"}]) == [1, 29, 2, 3, 30]


def test_reward_function_gets_rows_in_order():
    seen = {}

    def reward(prompts, responses, **columns):
        seen.update(columns, prompts=prompts, responses=responses)
        return [len(r) for r in responses]

    rows = [{"prompt": "x", "label": 3, "note": "u"}, {"prompt": "y", "label": 4, "note": "v"}]
    scores = call_reward_fn(reward, rows, ["", "ab"], "cpu")
    assert scores.dtype == torch.float32 and scores.tolist() == [0.0, 2.0]
    assert seen == {"prompts": ["x", "y"], "responses": ["", "ab"], "label": [3, 4], "note": ["u", "v"]}


@pytest.mark.parametrize("answer", [[1.0], [1.0, 2.0, 3.0], [1.0, NAN], [INF, 1.0], [1.0, None], None, [1.0, "good"]])
def test_reward_function_that_answers_nonsense(answer):
    def quality(prompts, responses):
        return answer

    with pytest.raises(utils.UserError, match="quality"):
        call_reward_fn(quality, [{"prompt": "x"}, {"prompt": "y"}], ["a", "b"], "cpu")


@pytest.mark.parametrize(
    "quality",
    [
        lambda prompts, responses: [len(response.split()[0]) for response in responses],  # of "" there is none
        lambda prompts: [0.0, 0.0],
        lambda prompts, responses: torch.zeros(2, 2),
        lambda prompts, responses: torch.tensor(1.0),
    ],
    ids=["it fails", "its signature", "a matrix", "no sequence"],
)
def test_reward_function_that_fails_ends_in_one_line(quality):
    with pytest.raises(utils.UserError, match="gives no number for each response: .*Error"):
        call_reward_fn(quality, [{"prompt": "x"}, {"prompt": "y"}], ["a", ""], "cpu")
