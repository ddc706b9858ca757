"""What each loss really maximises: every script against an optimum that is known exactly.

The task: one prompt, and responses of 1 or 3 tokens out of 8 (none of them ends a response), so 8
or 512 sequences; a random reference model pi_ref and a fixed random reward r. All expectations are
sums, and the optimum of each loss is a formula, or the solution of an equation:

    KL in the reward    pi*(y) = pi_ref(y) exp(r(y) / beta) / Z, with the value beta log Z (Ziegler
                        et al. 2019, section 2; Rafailov et al. 2023, equation 4): `kl_optimum`
    k3 in the loss      pi(a | s) = beta pi_ref(a | s) / (lambda(s) - Q(s, a)): `k3_optimum`
    comparisons         the minimum of the expected loss over all pairs: `preference_optimum`

The scripts are run as they are, and the distance KL(pi || optimum) of what they learn is reported
in nats. The losses on comparisons are minimised by their exact expected gradient, so that no error
of sampling hides what they are after, and dpo.py is run once on sampled comparisons.

    python benchmarks/exact_optimum.py --output my_optima.json
    python benchmarks/exact_optimum.py --rows rloo dpo --seeds 1
"""

import contextlib
import io
import itertools
import json
import math
import random
import statistics
import string
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

# The scripts are files in the root and not a package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dpo
import grpo_rlhf
import ppo_rlhf
from utils import environment

# With the EOS, which ends nothing here, these are 8 tokens. The pad is never sampled.
LETTERS = string.ascii_lowercase[:7]
EOS = 7
PAD = 8
LENGTH = 3
PROMPT = "a"

# For each row of the table: the script, its flags, and the number of tokens in a response.
IN_REWARD = {"kl_in": "reward", "loss_norm": "constant"}
# k3 in the loss has the stated gradient on samples of the policy, so for one pass over the batch.
IN_LOSS = {"kl_in": "loss", "loss_norm": "constant", "num_epochs": 1, "num_generations": 8}
RUNS = {
    "ppo": ("ppo", {}, LENGTH),
    "rloo": ("grpo", {"advantage": "rloo", **IN_REWARD}, LENGTH),
    "grpo": ("grpo", {"advantage": "grpo", **IN_REWARD}, 1),
    "rloo_k3": ("grpo", {"advantage": "rloo", **IN_LOSS}, 1),
    "rloo_k3_long": ("grpo", {"advantage": "rloo", **IN_LOSS}, LENGTH),
    "dr_grpo_k3": ("grpo", {"advantage": "dr_grpo", **IN_LOSS}, 1),
    "grpo_k3": ("grpo", {"advantage": "grpo", **IN_LOSS}, 1),
    "grpo_k3_64": ("grpo", {"advantage": "grpo", **IN_LOSS, "num_generations": 64}, 1),
}
EXPECTED = ("dpo", "ipo", "simpo", "orpo")
SAMPLED = "dpo_sampled"


@dataclass
class Args:
    rows: tuple[str, ...] = (*RUNS, *EXPECTED, SAMPLED)
    """which rows of the table to measure"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """of the task (reference and reward) and of the run alike"""
    beta: float = 1.0
    """price of a nat of KL; the rewards have standard deviation 1"""
    num_updates: int = 200
    """updates of batch_size responses; steps on the expected loss are five times as many"""
    batch_size: int = 512
    """responses per update"""
    lr: float = 1e-3
    """learning rate of the first update; decays linearly to 0"""
    num_pairs: int = 50_000
    """sampled comparisons for dpo.py"""
    simpo_gamma: float = 1.0
    """as in dpo.py"""
    output: str | None = None
    """where to write the result as JSON; none: only print"""


# --------------------------------------------------------------------------------------------------
# The task


def reward(prompts, responses, seed, **columns):
    """Standard normal numbers that are fixed by the text and by the task's seed."""
    rewards = []
    for task_seed, response in zip(seed, responses, strict=True):
        rewards.append(random.Random(f"{task_seed} {response}").gauss(0, 1))
    return rewards


def build_task(folder, seed):
    """(model folder, data set): a random GPT-2 that is far from uniform, and one prompt."""
    vocabulary = {token: i for i, token in enumerate([*LETTERS, "|", "_"])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="_"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        eos_token="|",
        pad_token="_",
        clean_up_tokenization_spaces=False,
    )
    config = GPT2Config(
        vocab_size=9, n_positions=8, n_embd=64, n_layer=2, n_head=2, initializer_range=0.1
    )
    torch.manual_seed(seed)
    GPT2LMHeadModel(config).save_pretrained(folder / "reference")
    tokenizer.save_pretrained(folder / "reference")
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPT, "seed": seed}) + "\n")
    return str(folder / "reference"), str(folder / "prompts.jsonl")


def all_responses(length=LENGTH):
    """Token ids of all responses, (S,length), the last token running fastest."""
    return torch.tensor(list(itertools.product(range(PAD), repeat=length)))


def text_of(response):
    """The text of a response, given as token ids; EOS has none."""
    return "".join(LETTERS[i] for i in response if i != EOS)


def all_rewards(seed, length=LENGTH):
    """The rewards of all responses, (S,) in fp64."""
    texts = [text_of(response) for response in all_responses(length).tolist()]
    return torch.tensor(reward(None, texts, [seed] * len(texts)), dtype=torch.float64)


def logits_of(model, responses):
    """The logits (N,length,8) in which the tokens of responses (N,length) are chosen."""
    prompts = torch.full((len(responses), 1), LETTERS.index(PROMPT))
    return model(torch.cat([prompts, responses], dim=1)).logits[:, :-1, :PAD]


@torch.no_grad()
def sequence_logprobs(model_folder, length=LENGTH):
    """Log-probabilities of each token of all responses, and entropies there: (S,length), fp64."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64).eval()
    responses = all_responses(length)
    logprobs = torch.log_softmax(logits_of(model, responses), dim=-1)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, responses[..., None]).squeeze(-1), entropies


def kl_divergence(logprobs, other_logprobs):
    """KL(p || q) in nats, from the log-probabilities (S,) of all responses under p and q."""
    return (logprobs.exp() * (logprobs - other_logprobs)).sum().item()


# --------------------------------------------------------------------------------------------------
# The optima


def kl_optimum(ref_logprobs, rewards, beta):
    """(log pi* (S,), its value): the maximum of E[r] - beta KL(pi || pi_ref).

    ref_logprobs (S,): of whole responses.
    """
    log_z = torch.logsumexp(ref_logprobs + rewards / beta, dim=0)
    return ref_logprobs + rewards / beta - log_z, (beta * log_z).item()


def k3_optimum(ref_token_logprobs, rewards, beta):
    """log pi (S,) where the policy gradient of E[r] and that of beta times k3 in the loss cancel.

    ref_token_logprobs (S,length); rewards (S,). In a state s the two gradients are those of
    E[Q(s, a)] and of -beta KL(pi_ref || pi), because k3 in the loss does not count as a cost of the
    tokens before it. With a multiplier lambda for the sum of probabilities, the stationary point is
    pi(a | s) = beta pi_ref(a | s) / (lambda(s) - Q(s, a)). For the last token Q is the reward, and
    for those before it the expected reward, so the solution is found from the last to the first.
    """
    length = ref_token_logprobs.shape[1]
    q_values = rewards.view(-1, PAD)
    total = torch.zeros(len(rewards), dtype=rewards.dtype)
    for t in reversed(range(length)):
        # Responses with the same first t + 1 tokens are consecutive: one of each is enough.
        count = PAD ** (length - 1 - t)
        ref_probs = ref_token_logprobs[::count, t].exp().view(-1, PAD)
        probs = k3_optimum_of_a_token(ref_probs, q_values, beta)
        total += probs.log().flatten().repeat_interleave(count)
        values = (probs * q_values).sum(1)
        if t > 0:
            q_values = values.view(-1, PAD)
    return total


def k3_optimum_of_a_token(ref_probs, q_values, beta):
    """probs (N,8) = beta ref_probs / (lambda - q_values), with lambda (N,1) found by bisection."""
    # At the lower bound one token alone would have all the probability.
    low = (q_values + beta * ref_probs).amax(1, keepdim=True)
    high = q_values.amax(1, keepdim=True) + beta
    for _ in range(200):
        middle = (low + high) / 2
        is_too_low = (beta * ref_probs / (middle - q_values)).sum(1, keepdim=True) > 1
        low = torch.where(is_too_low, middle, low)
        high = torch.where(is_too_low, high, middle)
    probs = beta * ref_probs / (high - q_values)
    return probs / probs.sum(1, keepdim=True)


def all_groups(num_generations):
    """(groups (M,G), log_counts (M,)): all groups of one-token responses, without their order.

    log_counts: the logarithm of the number of orders that a group can be drawn in.
    """
    tokens = range(PAD)
    groups = torch.tensor(list(itertools.combinations_with_replacement(tokens, num_generations)))
    counts = torch.stack([(groups == token).sum(1) for token in tokens], dim=1).double()
    total = torch.tensor(num_generations + 1.0, dtype=torch.float64)
    return groups, torch.lgamma(total) - torch.lgamma(counts + 1).sum(1)


def expected_advantages(logprobs, rewards, kind, num_generations):
    """What `group_advantages` gives each token on average over all groups, (8,).

    logprobs, rewards (8,): of one-token responses.
    """
    groups, log_counts = all_groups(num_generations)
    group_probs = torch.exp(log_counts + logprobs[groups].sum(1))
    scores = rewards[groups].flatten()
    advantages = grpo_rlhf.group_advantages(scores, num_generations, kind)
    advantages = advantages.view(groups.shape) * group_probs[:, None]
    sums = torch.zeros_like(rewards).index_add(0, groups.flatten(), advantages.flatten())
    return sums / (num_generations * logprobs.exp())


def grpo_k3_optimum(ref_logprobs, rewards, beta, num_generations=None):
    """log pi (8,) of one token for advantages that are divided by the standard deviation.

    The equation of `k3_optimum`, in which the place of Q is taken by the expected advantage, which
    depends on pi itself. num_generations None: groups so large that mean and standard deviation are
    those of the policy, so that pi = beta sigma pi_ref / (lambda - r).
    """
    logprobs = ref_logprobs
    for _ in range(200):
        if num_generations is None:
            mean, sigma = moments(logprobs, rewards)
            advantages = (rewards - mean) / sigma
        else:
            advantages = expected_advantages(logprobs, rewards, "grpo", num_generations)
        new = k3_optimum(ref_logprobs[:, None], advantages, beta)
        logprobs = torch.log_softmax((logprobs + new) / 2, dim=0)
    return logprobs


def preference_probs(rewards):
    """P(i is preferred to j), (S,S), of Bradley and Terry."""
    return torch.sigmoid(rewards[:, None] - rewards[None, :])


def expected_preference_loss(logprobs, ref_logprobs, rewards, kind, args):
    """The loss of dpo.py over all ordered pairs of different responses, 0-d.

    logprobs, ref_logprobs (S,): of whole responses, all of LENGTH tokens.
    """
    scale = 1 if kind in dpo.TAKES_SUMS else LENGTH
    logps = logprobs / scale
    ref_logps = ref_logprobs / scale
    # The chosen response is that of the row, and the rejected one that of the column.
    ref_chosen_logps = ref_rejected_logps = None
    if kind in dpo.NEEDS_REFERENCE:
        ref_chosen_logps = ref_logps[:, None]
        ref_rejected_logps = ref_logps[None, :]
    losses, _, _ = dpo.dpo_loss(
        logps[:, None],
        logps[None, :],
        ref_chosen_logps,
        ref_rejected_logps,
        args.beta,
        kind,
        simpo_gamma=args.simpo_gamma,
    )
    # A response is not compared with itself.
    weights = preference_probs(rewards).fill_diagonal_(0)
    return (weights * losses).sum() / weights.sum()


def preference_optimum(ref_logprobs, rewards, kind, args):
    """log pi (S,) at the minimum of the expected loss.

    dpo     pi_ref exp(r / beta) / Z again, whatever the pairs are
    ipo     pi_ref exp(length / beta * P(y)) / Z, where P(y) is the probability that y is preferred
            to a response that is drawn uniformly (Azar et al. 2023, equation 7; the length is there
            because the loss takes means over tokens)
    simpo, orpo    found numerically, with one free number for each response
    """
    if kind == "dpo":
        return kl_optimum(ref_logprobs, rewards, args.beta)[0]
    if kind == "ipo":
        # A pair wants log-ratios that are length / beta * (P(i over j) - 1/2) apart. All pairs
        # cannot have it, and the least squares solution is the mean over j, with i itself in it.
        wanted = preference_probs(rewards).mean(1)
        return torch.log_softmax(ref_logprobs + LENGTH / args.beta * wanted, dim=0)
    logits = ref_logprobs.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        logprobs = torch.log_softmax(logits, dim=0)
        loss = expected_preference_loss(logprobs, ref_logprobs, rewards, kind, args)
        # The gradient of one response of many is small, and LBFGS stops by its size.
        (len(logits) * loss).backward()
        return loss

    optimizer.step(closure)
    return torch.log_softmax(logits.detach(), dim=0)


# --------------------------------------------------------------------------------------------------
# What a policy does exactly


def moments(logprobs, x):
    """(mean, standard deviation) of x (S,) over the responses of a policy."""
    probabilities = logprobs.exp()
    mean = (probabilities * x).sum()
    variance = (probabilities * (x - mean) ** 2).sum()
    return mean.item(), variance.sqrt().item()


def exact(policy_folder, reference_folder, seed, beta):
    """Everything about a policy of 3 tokens that sampling would only estimate.

    Returns {name: float}, and {name: (mean, standard deviation over responses)} of what
    ppo_rlhf.py logs under that name.
    """
    rewards = all_rewards(seed)
    token_logprobs, entropies = sequence_logprobs(policy_folder)
    ref_token_logprobs, _ = sequence_logprobs(reference_folder)
    log_ratio = token_logprobs - ref_token_logprobs
    k3 = torch.exp(-log_ratio) - 1 + log_ratio
    kl = log_ratio.sum(1)
    objective = rewards - beta * kl
    logprobs = token_logprobs.sum(1)
    ref_logprobs = ref_token_logprobs.sum(1)
    optimum, value = kl_optimum(ref_logprobs, rewards, beta)

    logged = {
        "objective/scores": rewards,
        "objective/kl": kl,
        "objective/kl_k3": k3.sum(1),
        "objective/kl_per_token": log_ratio.mean(1),
        "objective/kl_k3_per_token": k3.mean(1),
        "objective/non_score_reward": -beta * kl,
        "objective/rlhf_reward": objective,
        "objective/entropy": -logprobs,
        "policy/entropy_avg": entropies.mean(1),
    }
    logged = {name: moments(logprobs, x) for name, x in logged.items()}
    known = {
        "kl_to_optimum": kl_divergence(logprobs, optimum),
        "objective": moments(logprobs, objective)[0],
        "optimum": value,
        "score": moments(logprobs, rewards)[0],
        "kl": moments(logprobs, kl)[0],
        "optimum_kl": kl_divergence(optimum, ref_logprobs),
        "reference_kl_to_optimum": kl_divergence(ref_logprobs, optimum),
    }
    return known, logged


# --------------------------------------------------------------------------------------------------
# The rows of the table


def solve(args, seed, folder, script="ppo", length=LENGTH, **changes):
    """One run of ppo_rlhf.py or grpo_rlhf.py; returns (run folder, reference folder, seconds)."""
    reference, dataset = build_task(folder, seed)
    flags = {
        "model": reference,
        "dataset": dataset,
        "reward_fn": (f"{__file__}:reward",),
        "output_dir": str(folder / "run"),
        "seed": seed,
        "kl_coef": args.beta,
        "lr": args.lr,
        "batch_size": args.batch_size,
        "micro_batch_size": args.batch_size,
        "total_episodes": args.num_updates * args.batch_size,
        "response_length": length,
        "min_length": length,
        "missing_eos_score": "none",
        "precision": "fp32",
        "compile": False,
        **changes,
    }
    module = {"ppo": ppo_rlhf, "grpo": grpo_rlhf}[script]
    started = time.perf_counter()
    run_quietly(module, flags)
    return folder / "run", reference, time.perf_counter() - started


def run_quietly(module, flags):
    """Run a script without what it prints: a line for each update, and a folder that will go."""
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        module.main(module.Args(**flags))


def run_row(name, seed, folder, args):
    """(log pi, log optimum, log pi_ref, rewards), each (S,), of a row of RUNS."""
    script, flags, length = RUNS[name]
    run, reference, _ = solve(args, seed, folder, script, length, **flags)
    rewards = all_rewards(seed, length)
    logprobs = sequence_logprobs(run / "model", length)[0].sum(1)
    ref_token_logprobs, _ = sequence_logprobs(reference, length)
    ref_logprobs = ref_token_logprobs.sum(1)
    if flags.get("kl_in", "reward") == "reward":
        optimum, _ = kl_optimum(ref_logprobs, rewards, args.beta)
    elif flags["advantage"] == "grpo":
        # There are 6,435 groups of 8, and too many of 64.
        G = flags["num_generations"] if flags["num_generations"] <= 8 else None
        optimum = grpo_k3_optimum(ref_logprobs, rewards, args.beta, G)
    else:
        # With the mean of a group subtracted, its own score included, a group of G gives the share
        # (G - 1) / G of the gradient.
        G = flags["num_generations"]
        share = (G - 1) / G if flags["advantage"] == "dr_grpo" else 1
        optimum = k3_optimum(ref_token_logprobs, share * rewards, args.beta)
    return logprobs, optimum, ref_logprobs, rewards


def expected_row(kind, seed, folder, args):
    """The same of a loss on comparisons, which the model minimises by its expected gradient."""
    reference, _ = build_task(folder, seed)
    rewards = all_rewards(seed)
    ref_logprobs = sequence_logprobs(reference)[0].sum(1)
    optimum = preference_optimum(ref_logprobs, rewards, kind, args)
    model = AutoModelForCausalLM.from_pretrained(reference).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, eps=1e-5, weight_decay=0.0)
    responses = all_responses()
    num_steps = 5 * args.num_updates
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = args.lr * (1 - step / num_steps)
        logits = logits_of(model, responses).double()
        logprobs = torch.log_softmax(logits, -1).gather(-1, responses[..., None]).sum((1, 2))
        loss = expected_preference_loss(logprobs, ref_logprobs, rewards, kind, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder / "model")
    logprobs = sequence_logprobs(folder / "model")[0].sum(1)
    return logprobs, optimum, ref_logprobs, rewards


def sampled_row(seed, folder, args):
    """The same of dpo.py, on comparisons that are drawn from the preferences.

    A response of dpo.py ends with EOS, so it is one of 343 texts of 3 letters. All
    log-probabilities are those of such responses among each other.
    """
    reference, _ = build_task(folder, seed)
    responses = [response for response in all_responses().tolist() if EOS not in response]
    texts = [text_of(response) for response in responses]
    rewards = torch.tensor(reward(None, texts, [seed] * len(texts)), dtype=torch.float64)
    rng = random.Random(seed)
    lines = []
    for _ in range(args.num_pairs):
        i, j = rng.sample(range(len(texts)), 2)
        if rng.random() > 1 / (1 + math.exp(rewards[j] - rewards[i])):
            i, j = j, i
        row = {"prompt": PROMPT, "chosen": texts[i], "rejected": texts[j]}
        lines.append(json.dumps(row) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))
    flags = {
        "model": reference,
        "dataset": str(folder / "pairs.jsonl"),
        "output_dir": str(folder / "run"),
        "seed": seed,
        "beta": args.beta,
        "lr": args.lr,
        "precision": "fp32",
        "compile": False,
    }
    run_quietly(dpo, flags)

    ended = torch.tensor([[*response, EOS] for response in responses])

    @torch.no_grad()
    def logprobs_of(model_folder):
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64).eval()
        logprobs = torch.log_softmax(logits_of(model, ended), dim=-1)
        return torch.log_softmax(logprobs.gather(-1, ended[..., None]).sum((1, 2)), dim=0)

    ref_logprobs = logprobs_of(reference)
    optimum, _ = kl_optimum(ref_logprobs, rewards, args.beta)
    return logprobs_of(folder / "run" / "model"), optimum, ref_logprobs, rewards


def measure(name, seed, args):
    """One row of the table for one seed."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        if name in RUNS:
            found = run_row(name, seed, folder, args)
        elif name in EXPECTED:
            found = expected_row(name, seed, folder, args)
        else:
            found = sampled_row(seed, folder, args)
    logprobs, optimum, ref_logprobs, rewards = found
    kl_optimum_logprobs, value = kl_optimum(ref_logprobs, rewards, args.beta)
    score, _ = moments(logprobs, rewards)
    kl = kl_divergence(logprobs, ref_logprobs)
    return {
        "row": name,
        "seed": seed,
        "kl_to_optimum": kl_divergence(logprobs, optimum),
        "reference_kl_to_optimum": kl_divergence(ref_logprobs, optimum),
        # How far this optimum is from that of E[r] - beta KL.
        "optimum_kl_to_kl_optimum": kl_divergence(optimum, kl_optimum_logprobs),
        "kl_to_kl_optimum": kl_divergence(logprobs, kl_optimum_logprobs),
        "score": score,
        "kl": kl,
        "objective": score - args.beta * kl,
        "objective_of_kl_optimum": value,
        "kl_optimum_kl": kl_divergence(kl_optimum_logprobs, ref_logprobs),
        "seconds": time.perf_counter() - started,
    }


# {heading: key}
SHOWN = {
    "KL to its optimum": "kl_to_optimum",
    "of the reference": "reference_kl_to_optimum",
    "its optimum to pi*": "optimum_kl_to_kl_optimum",
    "seconds": "seconds",
}


def main(args):
    measured = []
    print(f"{'row':<14}{'seed':>5}" + "".join(f"{heading:>20}" for heading in SHOWN), flush=True)
    for name in args.rows:
        for seed in args.seeds:
            result = measure(name, seed, args)
            measured.append(result)
            numbers = "".join(f"{result[key]:>20.5f}" for key in SHOWN.values())
            print(f"{name:<14}{seed:>5}{numbers}", flush=True)
    medians = {}
    for name in args.rows:
        values = [result["kl_to_optimum"] for result in measured if result["row"] == name]
        medians[name] = statistics.median(values)
        print(f"{name:<14} median of {len(values)} seeds: {medians[name]:.5f} nats")
    if args.output:
        settings = {**vars(args), "output": None}
        result = {"args": settings, "medians": medians, "rows": measured, **environment()}
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
