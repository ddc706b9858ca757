"""PPO on a task whose optimum and expectations are sums over 512 sequences.

The task is that of benchmarks/exact_optimum.py.
"""

import math

import pytest
import torch
from conftest import read_jsonl
from transformers import AutoModelForCausalLM

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
