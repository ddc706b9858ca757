"""PPO against an optimum that is known exactly.

The task: one prompt, responses of 3 tokens out of 8 (no stop token), so 512 sequences; a random reference model and a
fixed random reward r. The policy that maximises E[r] - beta * KL(policy || reference) is then known in closed form,

    pi*(y) = pi_ref(y) * exp(r(y) / beta) / Z,    with the value    J* = beta * log Z

(Ziegler et al. 2019, section 2; Rafailov et al. 2023, eq. 4), and so are the expectations that ppo_rlhf.py estimates
from samples. This runs ppo_rlhf.py as it is and reports, for each seed, the distance KL(pi || pi*) in nats.

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

import torch
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ppo_rlhf
from utils import environment

LETTERS = string.ascii_lowercase[:7]  # with the EOS, which ends nothing here, 8 tokens; the pad is never sampled
PAD, EOS, LENGTH = 8, 7, 3
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
    """responses an update"""
    lr: float = 1e-3
    """learning rate of the first update; decays linearly to 0"""
    value_trunk: str = "separate"
    """as in ppo_rlhf.py"""
    output: str | None = None
    """where to write the result as JSON"""


def reward(prompts, responses, seed, **columns):
    """Standard normal numbers that are fixed by the text and by the task's seed."""
    return [random.Random(f"{task} {response}").gauss(0, 1) for task, response in zip(seed, responses, strict=True)]


def build_task(folder, seed):
    """A random GPT-2 that is far from uniform, its tokenizer and one prompt; returns (model folder, data set)."""
    vocabulary = {token: i for i, token in enumerate([*LETTERS, "|", "_"])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="_"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, eos_token="|", pad_token="_", clean_up_tokenization_spaces=False
    )
    config = GPT2Config(vocab_size=9, n_positions=8, n_embd=64, n_layer=2, n_head=2, initializer_range=0.1)
    torch.manual_seed(seed)
    GPT2LMHeadModel(config).save_pretrained(folder / "reference")
    tokenizer.save_pretrained(folder / "reference")
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": PROMPT, "seed": seed}) + "\n")
    return str(folder / "reference"), str(folder / "prompts.jsonl")


def sequence_logprobs(model_folder):
    """Log-probabilities (512,3) of the steps of all responses and the entropies (512,3) there, in fp64."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64).eval()
    sequences = torch.tensor(list(itertools.product(range(PAD), repeat=LENGTH)))
    ids = torch.cat([torch.full((len(sequences), 1), LETTERS.index(PROMPT)), sequences], 1)
    with torch.no_grad():
        steps = torch.log_softmax(model(ids).logits[:, :-1, :PAD], -1)
    logprobs = steps.gather(-1, sequences[..., None]).squeeze(-1)
    return logprobs, -(steps.exp() * steps).sum(-1)


def exact(policy_folder, reference_folder, seed, beta):
    """Everything about a policy that sampling would only estimate: {name: float}, and {name: (mean, standard deviation
    of one response)} of what ppo_rlhf.py logs under that name."""
    texts = ["".join(LETTERS[i] for i in y if i != EOS) for y in itertools.product(range(PAD), repeat=LENGTH)]
    r = torch.tensor(reward(None, texts, [seed] * len(texts)), dtype=torch.float64)
    (steps, entropies), (ref_steps, _) = sequence_logprobs(policy_folder), sequence_logprobs(reference_folder)
    logp, log_ref, log_ratios = steps.sum(1), ref_steps.sum(1), steps - ref_steps
    k3 = (torch.expm1(-log_ratios) + log_ratios).sum(1)
    log_z = torch.logsumexp(log_ref + r / beta, 0)
    log_star = log_ref + r / beta - log_z

    def moments(x):
        mean = (logp.exp() * x).sum()
        return mean.item(), (logp.exp() * (x - mean) ** 2).sum().sqrt().item()

    logged = {
        "objective/scores": moments(r),
        "objective/kl": moments(logp - log_ref),
        "objective/kl_k3": moments(k3),
        "objective/kl_per_token": moments(log_ratios.mean(1)),
        "objective/kl_k3_per_token": moments(k3 / LENGTH),
        "objective/non_score_reward": moments(-beta * (logp - log_ref)),
        "objective/rlhf_reward": moments(r - beta * (logp - log_ref)),
        "objective/entropy": moments(-logp),
        "policy/entropy_avg": moments(entropies.mean(1)),
    }
    known = {
        "kl_to_optimum": moments(logp - log_star)[0],
        "objective": moments(r - beta * (logp - log_ref))[0],
        "optimum": (beta * log_z).item(),
        "score": moments(r)[0],
        "kl": moments(logp - log_ref)[0],
        "optimum_kl": (log_star.exp() * (log_star - log_ref)).sum().item(),
        "reference_kl_to_optimum": (log_ref.exp() * (log_ref - log_star)).sum().item(),
    }
    return known, logged


def solve(args, seed, folder, **changes):
    """One run of ppo_rlhf.py; returns (run folder, reference folder, seconds)."""
    reference, dataset = build_task(folder, seed)
    flags = {
        "model": reference,
        "dataset": dataset,
        "reward_fn": f"{__file__}:reward",
        "output_dir": str(folder / "run"),
    }
    flags |= {"seed": seed, "kl_coef": args.beta, "lr": args.lr, "value_trunk": args.value_trunk}
    flags |= {"batch_size": args.batch_size, "micro_batch_size": args.batch_size}
    flags |= {"total_episodes": args.num_updates * args.batch_size, "response_length": LENGTH, "min_length": LENGTH}
    flags |= {"missing_eos_score": "none", "compile": False, **changes}
    started = time.perf_counter()
    quiet = io.StringIO()  # a line an update, and the name of a folder that is gone when it is done
    with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        ppo_rlhf.main(ppo_rlhf.Args(**flags))
    return folder / "run", reference, time.perf_counter() - started


def main(args):
    rows = []
    for seed in args.seeds:
        print(f"seed {seed}: {args.num_updates} updates of {args.batch_size} responses ...", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            run, reference, seconds = solve(args, seed, Path(folder))
            row = {"seed": seed, "seconds": seconds, **exact(run / "model", reference, seed, args.beta)[0]}
        rows.append(row)
        print(f"    KL to the optimum {row['kl_to_optimum']:.5f} nats; objective {row['objective']:.4f} of")
        print(
            f"    {row['optimum']:.4f}; the reference is {row['reference_kl_to_optimum']:.3f} nats away; {seconds:.0f} s"
        )
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
