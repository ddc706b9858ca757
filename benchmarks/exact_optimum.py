"""PPO against an optimum that is known exactly.

The task: one prompt, responses of 3 tokens out of 8 (none of them ends a response), so 512
sequences; a random reference model and a fixed random reward r. The policy that maximises
E[r] - beta * KL(policy || reference) is then known in closed form,

    pi*(y) = pi_ref(y) * exp(r(y) / beta) / Z,    with the value    J* = beta * log Z

(Ziegler et al. 2019, section 2; Rafailov et al. 2023, equation 4), and so are the expectations that
ppo_rlhf.py estimates from samples. This runs ppo_rlhf.py as it is and reports, for each seed, the
distance KL(pi || pi*) in nats.

    python benchmarks/exact_optimum.py --output benchmarks/results/exact_optimum.json
"""

import contextlib
import io
import itertools
import json
import random
import statistics
import string
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

# The scripts are files in the root and not a package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ppo_rlhf
from utils import environment

# With the EOS, which ends nothing here, these are 8 tokens. The pad is never sampled.
LETTERS = string.ascii_lowercase[:7]
EOS = 7
PAD = 8
LENGTH = 3
PROMPT = "a"


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """of the task (reference and reward) and of PPO alike"""
    beta: float = 1.0
    """price of a nat of KL; the rewards have standard deviation 1"""
    num_updates: int = 200
    """PPO updates of batch_size responses"""
    batch_size: int = 512
    """responses per update"""
    lr: float = 1e-3
    """learning rate of the first update; decays linearly to 0"""
    value_trunk: Literal["separate", "shared"] = "separate"
    """as in ppo_rlhf.py"""
    output: str | None = None
    """where to write the result as JSON; none: only print"""


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


def all_responses():
    """Token ids of all responses, (512,3)."""
    return torch.tensor(list(itertools.product(range(PAD), repeat=LENGTH)))


def all_rewards(seed):
    """The rewards of all responses, (512,) in fp64."""
    texts = []
    for response in all_responses().tolist():
        texts.append("".join(LETTERS[i] for i in response if i != EOS))
    return torch.tensor(reward(None, texts, [seed] * len(texts)), dtype=torch.float64)


@torch.no_grad()
def sequence_logprobs(model_folder):
    """Log-probabilities of each token of all responses, and entropies there: (512,3), in fp64."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64).eval()
    responses = all_responses()
    prompts = torch.full((len(responses), 1), LETTERS.index(PROMPT))
    logits = model(torch.cat([prompts, responses], dim=1)).logits
    logprobs = torch.log_softmax(logits[:, :-1, :PAD], dim=-1)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, responses[..., None]).squeeze(-1), entropies


def moments(logprobs, x):
    """(mean, standard deviation) of x (512,) over the responses of a policy."""
    probabilities = logprobs.exp()
    mean = (probabilities * x).sum()
    variance = (probabilities * (x - mean) ** 2).sum()
    return mean.item(), variance.sqrt().item()


def exact(policy_folder, reference_folder, seed, beta):
    """Everything about a policy that sampling would only estimate.

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
    log_z = torch.logsumexp(ref_logprobs + rewards / beta, dim=0)
    optimum = ref_logprobs + rewards / beta - log_z

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
        "kl_to_optimum": moments(logprobs, logprobs - optimum)[0],
        "objective": moments(logprobs, objective)[0],
        "optimum": (beta * log_z).item(),
        "score": moments(logprobs, rewards)[0],
        "kl": moments(logprobs, kl)[0],
        "optimum_kl": moments(optimum, optimum - ref_logprobs)[0],
        "reference_kl_to_optimum": moments(ref_logprobs, ref_logprobs - optimum)[0],
    }
    return known, logged


def solve(args, seed, folder, **changes):
    """One run of ppo_rlhf.py; returns (run folder, reference folder, seconds)."""
    reference, dataset = build_task(folder, seed)
    flags = {
        "model": reference,
        "dataset": dataset,
        "reward_fn": (f"{__file__}:reward",),
        "output_dir": str(folder / "run"),
        "seed": seed,
        "kl_coef": args.beta,
        "lr": args.lr,
        "value_trunk": args.value_trunk,
        "batch_size": args.batch_size,
        "micro_batch_size": args.batch_size,
        "total_episodes": args.num_updates * args.batch_size,
        "response_length": LENGTH,
        "min_length": LENGTH,
        "missing_eos_score": "none",
        "precision": "fp32",
        "compile": False,
    }
    started = time.perf_counter()
    # It would print a line for each update, and the name of a folder that is gone afterwards.
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        ppo_rlhf.main(ppo_rlhf.Args(**{**flags, **changes}))
    return folder / "run", reference, time.perf_counter() - started


def main(args):
    rows = []
    for seed in args.seeds:
        print(f"seed {seed}: {args.num_updates} updates of {args.batch_size} responses", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            run, reference, seconds = solve(args, seed, Path(folder))
            known, _ = exact(run / "model", reference, seed, args.beta)
        rows.append({"seed": seed, "seconds": seconds, **known})
        print(f"    KL to the optimum   {known['kl_to_optimum']:.5f} nats")
        print(f"    of the reference    {known['reference_kl_to_optimum']:.5f} nats")
        print(f"    objective           {known['objective']:.4f} of {known['optimum']:.4f}")
        print(f"    seconds             {seconds:.0f}")
    median = statistics.median(row["kl_to_optimum"] for row in rows)
    print(f"median KL to the optimum of {len(rows)} seeds: {median:.5f} nats")
    if args.output:
        result = {
            "args": {**vars(args), "output": None},
            "median_kl_to_optimum": median,
            "seeds": rows,
            **environment(),
        }
        Path(args.output).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
