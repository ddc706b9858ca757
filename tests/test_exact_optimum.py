"""What the scripts maximise, on tasks whose optimum and expectations are sums over all sequences.

The task is that of benchmarks/exact_optimum.py.
"""

import math

import pytest
import torch
from conftest import read_jsonl
from transformers import AutoModelForCausalLM

import grpo_rlhf
from benchmarks import exact_optimum
from benchmarks.exact_optimum import Args, build_task, exact, sequence_logprobs, solve

BETA = 1.0


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """A short run (the benchmark's is longer) with a checkpoint at each fifth of it."""
    folder = tmp_path_factory.mktemp("exact")
    args = Args(beta=BETA, num_updates=50, batch_size=256)
    run, reference, _ = solve(args, 1, folder, save_every=10)
    return run, reference


def policy_at(run, step, folder):
    """The policy of a checkpoint as a folder."""
    policy = AutoModelForCausalLM.from_pretrained(run / "model")
    state = torch.load(run / "checkpoints" / f"step_{step:06d}.pt", weights_only=True)["model"]
    prefix = "actor.model."
    weights = {name: x for name, x in state.items() if name.startswith(prefix)}
    policy.load_state_dict({name.removeprefix(prefix): x for name, x in weights.items()})
    policy.save_pretrained(folder)
    return folder


def test_the_enumeration_is_whole(tmp_path):
    reference, _ = build_task(tmp_path, 3)
    steps, entropies = sequence_logprobs(reference)
    logprobs = steps.sum(1)
    assert logprobs.exp().sum().item() == pytest.approx(1, abs=1e-12)
    # The chain rule: the entropy of sequences is the sum of the entropies of their steps.
    entropy = (logprobs.exp() * -logprobs).sum().item()
    assert entropy == pytest.approx((logprobs.exp() * entropies.sum(1)).sum().item())
    assert logprobs.std() > 0.5  # It is far from uniform.
    known, _ = exact(reference, reference, 3, BETA)
    assert known["kl"] == pytest.approx(0, abs=1e-12)


def test_ppo_comes_close_to_the_exact_optimum(solved):
    run, reference = solved
    start, _ = exact(reference, reference, 1, BETA)
    end, _ = exact(run / "model", reference, 1, BETA)
    assert start["kl_to_optimum"] > 0.5
    assert end["kl_to_optimum"] < 0.25 * start["kl_to_optimum"]
    assert end["kl"] == pytest.approx(end["optimum_kl"], rel=0.3)


def test_what_is_lost_is_beta_times_the_distance(solved, tmp_path):
    """J* - J(pi) = beta * KL(pi || pi*) for any policy."""
    run, reference = solved
    for folder in (reference, policy_at(run, 10, tmp_path / "10"), run / "model"):
        known, _ = exact(folder, reference, 1, BETA)
        lost = known["optimum"] - known["objective"]
        assert lost == pytest.approx(BETA * known["kl_to_optimum"], abs=1e-9)


@pytest.mark.parametrize("step", [10, 20, 40])
def test_logged_means_are_the_exact_ones_within_sampling_error(solved, tmp_path, step):
    """Update u samples from the policy of checkpoint u - 1.

    Five standard errors are a false alarm in two million.
    """
    run, reference = solved
    _, logged = exact(policy_at(run, step, tmp_path / "policy"), reference, 1, BETA)
    line = read_jsonl(run / "metrics.jsonl")[step]
    # The entropy of the steps is that of the policies that the update went through.
    del logged["policy/entropy_avg"]
    for name in logged:
        mean, deviation = logged[name]
        assert line[name] == pytest.approx(mean, abs=5 * deviation / math.sqrt(256)), name


def test_logged_entropy_of_the_steps(tmp_path):
    """At learning rate 0 the current policy is the one that sampled, and the reference."""
    args = Args(beta=BETA, num_updates=1, batch_size=2048, lr=0.0)
    run, reference, _ = solve(args, 2, tmp_path, num_epochs=1)
    _, logged = exact(reference, reference, 2, BETA)
    line = read_jsonl(run / "metrics.jsonl")[0]
    for name in ("policy/entropy_avg", "objective/entropy", "objective/scores"):
        mean, deviation = logged[name]
        assert line[name] == pytest.approx(mean, abs=5 * deviation / math.sqrt(2048)), name


def test_rewards_are_fixed_and_spread():
    texts = ["abc", "a", "", "abc"]
    values = exact_optimum.reward(None, texts, [1] * 4)
    assert values[0] == values[3] and len(set(values)) == 3
    assert values != exact_optimum.reward(None, texts, [2] * 4)


# --------------------------------------------------------------------------------------------------
# At its optimum the expected gradient of a loss is 0. The loss is the script's own.


def random_token_task():
    """(log pi_ref, rewards) of one token, (8,) each."""
    generator = torch.Generator().manual_seed(5)
    logits, rewards = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    return torch.log_softmax(logits, dim=0), rewards


def expected_grpo_gradient(logprobs, ref_logprobs, rewards, beta, advantage, num_generations):
    """The gradient (8,) of `grpo_loss` by the logits, over all groups that a policy can draw."""
    groups, log_counts = exact_optimum.all_groups(num_generations)
    group_probs = torch.exp(log_counts + logprobs[groups].sum(1))
    tokens = groups.flatten()
    advantages = grpo_rlhf.group_advantages(rewards[tokens], num_generations, advantage)
    logits = logprobs.clone().requires_grad_()
    new_logprobs = torch.log_softmax(logits, dim=0)
    args = grpo_rlhf.Args(kl_in="loss", kl_coef=beta, loss_norm="constant", response_length=1)
    total = 0
    for i in range(len(groups)):
        rows = slice(i * num_generations, (i + 1) * num_generations)
        loss, _ = grpo_rlhf.grpo_loss(
            new_logprobs[tokens[rows], None],
            logprobs[tokens[rows], None],
            ref_logprobs[tokens[rows], None],
            advantages[rows],
            torch.ones(num_generations, 1, dtype=torch.bool),
            args,
        )
        total = total + group_probs[i] * loss
    return torch.autograd.grad(total, logits)[0]


@pytest.mark.parametrize("advantage", ["rloo", "dr_grpo", "grpo"])
def test_the_gradient_of_grpo_is_0_at_the_stated_optimum(advantage):
    """With k3 in the loss, groups of 3."""
    ref_logprobs, rewards = random_token_task()
    if advantage == "grpo":
        optimum = exact_optimum.grpo_k3_optimum(ref_logprobs, rewards, 0.7, num_generations=3)
    else:
        share = 2 / 3 if advantage == "dr_grpo" else 1
        optimum = exact_optimum.k3_optimum(ref_logprobs[:, None], share * rewards, 0.7)
    at_start = expected_grpo_gradient(ref_logprobs, ref_logprobs, rewards, 0.7, advantage, 3)
    at_optimum = expected_grpo_gradient(optimum, ref_logprobs, rewards, 0.7, advantage, 3)
    assert at_start.norm() > 0.05
    assert at_optimum.norm() < 1e-8


def test_the_optimum_with_k3_in_the_loss_is_its_formula():
    ref_logprobs, rewards = random_token_task()
    probs = exact_optimum.k3_optimum(ref_logprobs[:, None], rewards, 0.7).exp()
    lambdas = rewards + 0.7 * ref_logprobs.exp() / probs
    assert probs.sum().item() == pytest.approx(1)
    assert (lambdas - lambdas[0]).abs().max() < 1e-9 and lambdas[0] > rewards.max()


def test_the_gradient_of_rloo_is_0_at_the_stated_optimum_of_sequences():
    """Three tokens, k3 in the loss, one free logit for each token in each state."""
    generator = torch.Generator().manual_seed(6)
    responses = exact_optimum.all_responses()
    rewards = torch.randn(len(responses), generator=generator, dtype=torch.float64)
    shapes = ((1, 8), (8, 8), (64, 8))
    ref_logits = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    args = grpo_rlhf.Args(kl_in="loss", kl_coef=0.7)

    def token_logprobs(logits):
        """(512,3), from the logits of the states with 0, 1 and 2 tokens before them."""
        columns = []
        for x in logits:
            logprobs = torch.log_softmax(x, dim=-1).flatten()
            columns.append(logprobs.repeat_interleave(len(responses) // len(logprobs)))
        return torch.stack(columns, dim=1)

    ref_logprobs = token_logprobs(ref_logits)

    def gradient(logprobs):
        """By the logits, at a policy that is given by its log-probabilities of sequences (512,)."""
        prefix_logprobs = [logprobs.view(s[0], 8, -1).logsumexp(-1) for s in shapes]
        logits = [x.clone().requires_grad_() for x in prefix_logprobs]
        new_logprobs = token_logprobs(logits)
        probs = logprobs.exp()[:, None]
        advantages = rewards - (logprobs.exp() * rewards).sum()
        mask = torch.ones(len(responses), 3, dtype=torch.bool)
        _, parts = grpo_rlhf.grpo_loss(
            new_logprobs, new_logprobs.detach(), ref_logprobs, advantages, mask, args
        )
        loss = (probs * (parts["loss/policy_avg"] + args.kl_coef * parts["loss/kl_avg"])).sum()
        return torch.cat([x.flatten() for x in torch.autograd.grad(loss, logits)]).norm()

    optimum = exact_optimum.k3_optimum(ref_logprobs, rewards, 0.7)
    assert optimum.exp().sum().item() == pytest.approx(1)
    assert gradient(ref_logprobs.sum(1)) > 0.05
    assert gradient(optimum) < 1e-9


def test_large_groups_divide_beta_by_the_spread_of_the_scores():
    ref_logprobs, rewards = random_token_task()
    optimum = exact_optimum.grpo_k3_optimum(ref_logprobs, rewards, 0.7)
    _, sigma = exact_optimum.moments(optimum, rewards)
    other = exact_optimum.k3_optimum(ref_logprobs[:, None], rewards, 0.7 * sigma)
    assert (optimum - other).abs().max() < 1e-8


@pytest.mark.parametrize("kind", exact_optimum.EXPECTED)
def test_the_gradient_of_dpo_is_0_at_the_stated_optimum(kind, tmp_path):
    reference, _ = build_task(tmp_path, 1)
    rewards = exact_optimum.all_rewards(1)
    ref_logprobs = sequence_logprobs(reference)[0].sum(1)

    def gradient(logprobs):
        logits = logprobs.clone().requires_grad_()
        logprobs = torch.log_softmax(logits, dim=0)
        loss = exact_optimum.expected_preference_loss(logprobs, ref_logprobs, rewards, kind, Args())
        return torch.autograd.grad(loss, logits)[0].norm()

    optimum = exact_optimum.preference_optimum(ref_logprobs, rewards, kind, Args())
    assert optimum.exp().sum().item() == pytest.approx(1)
    assert gradient(optimum) < 1e-6 * gradient(ref_logprobs)


@pytest.mark.parametrize("row", ["rloo_k3_long", "dpo"])
def test_a_row_of_the_table_comes_closer_to_its_optimum(row):
    args = Args(num_updates=20, batch_size=256)
    result = exact_optimum.measure(row, 1, args)
    assert result["kl_to_optimum"] < 0.8 * result["reference_kl_to_optimum"]


def test_sampled_comparisons_are_measured_among_texts_of_letters():
    """At a learning rate of nearly 0 the policy stays where it was."""
    result = exact_optimum.measure("dpo_sampled", 1, Args(num_pairs=200, lr=1e-12))
    assert result["reference_kl_to_optimum"] > 0.1
    assert result["kl_to_optimum"] == pytest.approx(result["reference_kl_to_optimum"], abs=1e-5)
    assert result["kl"] == pytest.approx(0, abs=1e-5)
    assert result["optimum_kl_to_kl_optimum"] == 0
