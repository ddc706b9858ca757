"""How good is a policy? Samples it on held-out prompts; every number comes with a 95% interval.

Each evaluation:
    1. sample       num_samples responses, spread evenly over the prompts of a seeded shuffle
    2. measure      a score for each reward model (less its score_mean) and each reward function;
                    nothing is added or replaced where the EOS is missing
                    kl = sum over a response's tokens of logprob - ref_logprob, in nats: an unbiased
                    estimate, so that a single one may be negative
                    ref_perplexity = exp(mean over all tokens of -ref_logprob), at temperature 1
    3. greedy       with --greedy: the most likely response to each prompt that was sampled from
    4. best of n    with --best_of_n: what picking the best of n by the first scorer gives, in every
                    scorer
    5. pairs        with --pairs: how often each reward model prefers the chosen response of a pair;
                    a tie counts as half

A run of any of the four scripts:
    python tools/evaluate.py --run runs/ppo_rlhf__1__1700000000 --best_of_n 4 16 --greedy
    python tools/evaluate.py --run runs/ilql_rlhf__1__1700000000 --beta 100
    python tools/evaluate.py --run runs/sft__1__1700000000 --reward_fns tasks/randomwalks.py:reward
    python tools/evaluate.py --run runs/reward_model__1__1700000000 \\
        --pairs data/randomwalks/preferences_test.jsonl
Any models:
    python tools/evaluate.py --model runs/ppo_rlhf__1__1700000000/model \\
        --ref_model runs/sft__1__1700000000/model --reward_fns tasks/randomwalks.py:reward

With --run, whatever is not given is as it was in that run. The policy is its model, and the
reference is what it started from, unless that had no weights. A run of sft.py, or one of
ilql_rlhf.py without prompts of its own, is sampled on the prompts.jsonl beside its data. A run of
reward_model.py is measured on pairs, those of its --eval_dataset or of --pairs.

Shapes: B responses in a batch, P longest prompt, R longest response, T = P + R, V vocabulary, d
width, N values of an estimate.

Rules that you might not expect:
    - With --beta everything, kl included, is about the policy that ILQL's Q and V steer. The
      temperature divides the steered logits, and those of the reference.
    - `std` is the standard deviation over responses. Differences between models are often quoted in
      those of the SFT model.
    - Best of n is the exact expectation over all n-subsets of the m responses that were sampled to
      a prompt, not one draw: of m responses sorted by score, the k-th is the best of n with
      probability C(k-1, n-1) / C(m, n). `kl_bound` = log n - (n-1) / n is the most by which best of
      n can differ from the sampled policy (Stiennon et al. 2020; a bound by Beirami et al. 2024).
    - Log-probabilities come from a plain forward over packed rows, as in ppo_rlhf.py, and not from
      the sampler, which is a copy in bf16 under --precision bf16.

Intervals. Responses to one prompt resemble each other, so a prompt, not a response, is the unit.
With residuals r_i = x_i - mean of N responses to G prompts,

    se^2 = G / (G - 1) * sum over prompts of (sum of the prompt's r_i)^2 / N^2

and the interval is mean +- 1.96 se. Where every prompt occurs once, this is the usual std /
sqrt(N). It speaks about prompts like these, not about these alone. With a single prompt it is taken
over that prompt's responses. Below some 20 prompts it is a little too narrow. Pairs that share a
response, but not their prompt, count as independent.
"""

import copy
import functools
import json
import math
import os
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import PreTrainedTokenizerBase

# The scripts are files in the root and not a package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ilql_rlhf import generate_steered, load_ilql
from ppo_rlhf import Actor, generate, last_token_scores, pack_responses, response_hidden
from ppo_rlhf import select, token_logprobs
from reward_model import collate, pair_length
from utils import Ranks, UserError, all_eos_ids, allowed_ids, autocast, call_reward_fn
from utils import check_at_least, check_decoding, check_path, check_positions, encode_pair
from utils import encode_rows, environment, fit_to_tokenizer, has_no_weights, init_ranks, launch
from utils import leave_out_long, left_pad, load_function, load_pretrained, load_prompts
from utils import load_rows, load_tokenizer, progress, seeded, stop_token_ids, to_bf16, to_device

# Rows of --pairs with at least this margin are also counted apart.
CLEAR_MARGIN = 0.5


@dataclass
class Args:
    run: str | None = None
    """a run folder of one of the four scripts: what is not given here is as it was in that run"""
    model: str | None = None
    """the policy: a folder or a Hub name; may be left out with --pairs, and then only accuracies
    are reported"""
    ref_model: str | None = None
    """reference of kl and ref_perplexity: a folder or a Hub name; none: neither is reported"""
    reward_models: tuple[str, ...] = ()
    """folders or Hub names; each reports score/<name of its run>"""
    reward_fns: tuple[str, ...] = ()
    """path/to/file.py:function(prompts, responses, **columns), which returns a number for each
    response; each reports score/<function>"""
    dataset: str | None = "data/randomwalks/prompts.jsonl"
    """rows with prompt; every other column reaches the reward functions"""
    num_samples: int = 400
    """responses in all, spread evenly over the prompts"""
    temperature: float = 1.0
    """divides the logits in sampling and in kl; 0: the most likely token, and no kl"""
    beta: float | None = None
    """steer --model, a folder with ilql_heads.safetensors, by its Q and V:
    softmax(log pi_beta + beta * (Q - V)); none: the plain model, which is pi_beta"""
    greedy: bool = False
    """report also the most likely response to each prompt that was sampled from"""
    best_of_n: tuple[int, ...] = ()
    """sizes n; the first reward model (or else function) picks. So few prompts are used that each
    gets as many responses as the largest n"""
    response_length: int = 10
    """tokens of a response at most, the end token included"""
    stop_token: str | None = None
    """a text, such as ".", each of whose tokens ends a response as EOS does, as in ppo_rlhf.py;
    none: EOS alone"""
    min_length: int = 0
    """an end token among the first min_length tokens of a response does not end it, as in
    ppo_rlhf.py; not with --beta"""
    query_length: int = 64
    """tokens of a prompt; longer prompts are left out, and how many is printed"""
    pairs: str | None = None
    """rows with prompt+chosen+rejected, or chosen+rejected: report accuracy/<reward model>, and
    also that of the rows whose margin is at least 0.5 where there is such a column"""
    max_length: int = 512
    """tokens of prompt and response together; pairs with a longer side are left out, and how many
    is printed"""
    batch_size: int = 64
    """responses or pairs per forward: a memory knob, without effect on what is sampled"""
    seed: int = 1
    """seeds the order of the prompts and the sampling"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """what sampling and forwards compute in; log-probabilities and scores are fp32 always"""
    output: str | None = None
    """a JSON file for the result, which must not exist yet; none: only print"""
    samples: str | None = None
    """a JSONL file for every response with its scores, which must not exist yet; none: not
    written"""


# --------------------------------------------------------------------------------------------------
# Statistics


def estimate(values, groups, weights=None):
    """{mean, low, high, std, count}: a weighted mean of values (N,) with the manual's interval.

    groups: N labels, one for each prompt. weights (N,): how much each value counts; none: equally.
    low, high and std are None where a single value leaves nothing to estimate them from.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    N = len(values)
    if weights is None:
        weights = torch.ones(N)
    weights = torch.as_tensor(weights, dtype=torch.float64)
    mean = (weights * values).sum() / weights.sum()
    if N == 1:
        return {"mean": mean.item(), "low": None, "high": None, "std": None, "count": 1}

    number_of_group = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    group_of_value = torch.tensor([number_of_group[group] for group in groups])
    G = len(number_of_group)
    if G == 1:
        # With a single prompt, its responses are the units.
        group_of_value = torch.arange(N)
        G = N
    residuals = values - mean
    sums = torch.zeros(G, dtype=torch.float64).index_add(0, group_of_value, weights * residuals)
    standard_error = (G / (G - 1) * (sums**2).sum()).sqrt() / weights.sum()
    variance = (weights * residuals**2).sum() / weights.sum() * N / (N - 1)
    return {
        "mean": mean.item(),
        "low": (mean - 1.96 * standard_error).item(),
        "high": (mean + 1.96 * standard_error).item(),
        "std": variance.sqrt().item(),
        "count": N,
    }


def best_of_n_weights(scores, prompts, n):
    """How often each response is the best of n of its prompt's m, times m: weights (N,), sum N.

    scores (N,) choose. prompts: N labels. Of equal scores the one sampled later counts as better,
    which is as good as any.
    """
    responses_of = {}
    for i, prompt in enumerate(prompts):
        responses_of.setdefault(prompt, []).append(i)
    weights = torch.zeros(len(prompts), dtype=torch.float64)
    for indices in responses_of.values():
        m = len(indices)
        ascending = sorted(indices, key=lambda i: scores[i])
        for k, i in enumerate(ascending, start=1):
            weights[i] = m * math.comb(k - 1, n - 1) / math.comb(m, n)
    return weights


def summarise(records, groups, weights=None):
    """{metric: estimate} over the records of `sample`.

    weights: those of best of n, and then scores and length alone are reported.
    """
    metrics = {}
    for name in records[0]["scores"]:
        scores = [record["scores"][name] for record in records]
        metrics[f"score/{name}"] = estimate(scores, groups, weights)
    lengths = [record["length"] for record in records]
    metrics["length"] = estimate(lengths, groups, weights)
    if weights is not None:
        return metrics
    metrics["has_eos"] = estimate([float(record["has_eos"]) for record in records], groups)
    if "kl" in records[0]:
        metrics["kl"] = estimate([record["kl"] for record in records], groups)
    if "nll" in records[0]:
        metrics["ref_perplexity"] = perplexity(records, groups)
    return metrics


def perplexity(records, groups):
    """The estimate of exp(mean over tokens of nll): each response counts with its length."""
    lengths = [record["length"] for record in records]
    nll_per_token = [record["nll"] / record["length"] for record in records]
    nll = estimate(nll_per_token, groups, lengths)
    # Beyond 700 the exponential would leave the range of a float.
    perplexities = [math.exp(min(x, 700.0)) for x in nll_per_token]
    result = {"std": estimate(perplexities, groups)["std"], "count": nll["count"]}
    for name in ("mean", "low", "high"):
        result[name] = None if nll[name] is None else math.exp(nll[name])
    return {name: result[name] for name in ("mean", "low", "high", "std", "count")}


# --------------------------------------------------------------------------------------------------
# Models


class PlainPolicy:
    """A language model, sampled by `generate` of ppo_rlhf.py."""

    def __init__(self, model, allowed, min_length=0, precision="fp32"):
        self.model = model
        self.allowed = allowed
        self.min_length = min_length
        self.sampler = model
        if precision == "bf16":
            self.sampler = to_bf16(copy.deepcopy(model))

    def sample(self, queries, query_mask, uniforms, temperature, stop_ids, pad_id):
        """responses (B,R); see `generate`."""
        return generate(
            self.sampler,
            queries,
            query_mask,
            uniforms,
            temperature,
            stop_ids,
            pad_id,
            allowed=self.allowed,
            min_length=self.min_length,
        )

    def logprobs(self, batch, temperature):
        """The log-probability (B,R) of each response token of packed rows."""
        logprobs_fn = functools.partial(
            token_logprobs, temperature=temperature, allowed=self.allowed
        )
        return Actor(self.model, logprobs_fn)(batch)["logprobs"]


class SteeredPolicy:
    """An ILQL module that steers its language model, sampled by `generate_steered`."""

    def __init__(self, ilql, beta, allowed, precision="fp32"):
        self.ilql = ilql
        self.beta = beta
        self.allowed = allowed
        self.sampler = ilql
        if precision == "bf16":
            self.sampler = copy.deepcopy(ilql)
            to_bf16(self.sampler.policy)

    def sample(self, queries, query_mask, uniforms, temperature, stop_ids, pad_id):
        """responses (B,R); see `generate_steered`."""
        return generate_steered(
            self.sampler,
            queries,
            query_mask,
            uniforms,
            self.beta,
            stop_ids,
            pad_id,
            allowed=self.allowed,
            temperature=temperature,
        )

    def logprobs(self, batch, temperature):
        """The log-probability (B,R) of each response token of packed rows."""
        hidden = response_hidden(self.ilql.policy, batch)
        # One row for each state, as while decoding.
        logits = self.ilql.steered_logits(hidden.flatten(0, 1), self.beta)
        logits = logits.unflatten(0, hidden.shape[:2])
        logprobs, _ = token_logprobs(logits, batch["responses"], temperature, self.allowed)
        return logprobs


def load_language_model(path, flag, tokenizer, num_positions, device):
    """A causal language model, with an embedding for every token."""
    model, _ = load_pretrained(AutoModelForCausalLM, path)
    if any("SequenceClassification" in name for name in model.config.architectures or ()):
        raise UserError(f"{flag} {path}: a reward model, not a language model")
    check_positions(model.config, num_positions, "--response_length", path)
    fit_to_tokenizer(model, tokenizer, all_eos_ids(model, tokenizer))
    return model.requires_grad_(False).to(device)


def load_policy(args, tokenizer, num_positions, device):
    """(policy, ids that end a response) of --model, which Q and V steer with --beta."""
    model = load_language_model(args.model, "--model", tokenizer, num_positions, device)
    check_decoding(model, num_positions, args.model)
    stop_ids = stop_token_ids(tokenizer, args.stop_token, model.config.eos_token_id)
    stop_ids = torch.tensor(stop_ids, device=device)
    allowed = allowed_ids(tokenizer, model.config.vocab_size, device)
    if args.beta is None:
        return PlainPolicy(model, allowed, args.min_length, args.precision), stop_ids
    ilql = load_ilql(args.model).requires_grad_(False).to(device)
    return SteeredPolicy(ilql, args.beta, allowed, args.precision), stop_ids


def load_reference(args, tokenizer, num_positions, device):
    """The policy of --ref_model, or None."""
    if args.ref_model is None:
        return None
    model = load_language_model(args.ref_model, "--ref_model", tokenizer, num_positions, device)
    return PlainPolicy(model, allowed_ids(tokenizer, model.config.vocab_size, device))


def load_reward_model(path, num_positions, device):
    """A sequence classifier with one label, as reward_model.py saves it."""
    kind = AutoModelForSequenceClassification
    model, missing = load_pretrained(kind, path, ["score.weight"], num_labels=1)
    if missing:
        raise UserError(f"{path}: not a reward model: it lacks the weights {missing[0]}")
    check_positions(model.config, num_positions, "--reward_models", path)
    return model.requires_grad_(False).to(device)


def check_tokenizer(path, flag, tokenizer, model_path):
    """Refuse a model whose token ids mean something else than those of the policy."""
    if load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{flag} {path}: its tokenizer differs from that of --model {model_path}")


def run_name(path):
    """A model's name in the report: its run's folder, or the last folder, or its Hub name."""
    if not Path(path).exists():
        return path
    folder = Path(path).resolve()
    return folder.parent.name if folder.name == "model" else folder.name


def scorer_names(args):
    """{a reward model or function as given: its name in the report}, reward models first.

    Where two would be called the same, both are called as they were given.
    """
    names = {path: run_name(path) for path in args.reward_models}
    names |= {spec: spec.rpartition(":")[2] for spec in args.reward_fns}
    counts = Counter(names.values())
    return {given: given if counts[name] > 1 else name for given, name in names.items()}


def score_by_model(model, rows, texts, batch):
    """The scores (B,) of a reward model."""
    return last_token_scores(model, batch["input_ids"], batch["is_real"])


def score_by_function(function, rows, texts, batch):
    """The scores (B,) of a reward function."""
    return call_reward_fn(function, rows, texts, batch["mask"].device)


def load_scorers(args, functions, names, num_positions, device):
    """{name in the report: function(rows, texts, batch) -> scores (B,)}."""
    scorers = {}
    for path in args.reward_models:
        model = load_reward_model(path, num_positions, device)
        scorers[names[path]] = functools.partial(score_by_model, model)
    for spec, function in functions.items():
        scorers[names[spec]] = functools.partial(score_by_function, function)
    return scorers


# --------------------------------------------------------------------------------------------------
# Evaluation of a policy


@dataclass
class World:
    """What every call of `sample` shares."""

    policy: PlainPolicy | SteeredPolicy
    reference: PlainPolicy | None
    scorers: dict
    """{name in the report: function(rows, texts, batch) -> scores (B,)}"""
    stop_ids: torch.Tensor
    tokenizer: PreTrainedTokenizerBase
    ranks: Ranks
    args: Args


def choose_prompts(prompts, args):
    """A number of a prompt for each response, (N,): as few prompts as the largest n needs."""
    order = torch.randperm(len(prompts), generator=seeded(args.seed, "prompts")).tolist()
    num_prompts = args.num_samples // max(args.best_of_n, default=1)
    order = order[:num_prompts]
    return [order[i % len(order)] for i in range(args.num_samples)]


def sample_batch(prompts, uniforms, temperature, world):
    """Sample a response to each prompt: the batch of `pack_responses`, cut to its longest rows."""
    tokenizer = world.tokenizer
    sequences = [ids for ids, _ in prompts]
    P = max(len(ids) for ids in sequences)
    queries, query_mask = left_pad(sequences, P, tokenizer.pad_token_id, uniforms.device)
    responses = world.policy.sample(
        queries, query_mask, uniforms, temperature, world.stop_ids, tokenizer.pad_token_id
    )
    batch = pack_responses(
        queries,
        query_mask,
        responses,
        world.stop_ids,
        world.args.min_length,
        tokenizer.eos_token_id,
    )
    return select(batch, range(len(sequences)))


def measure(batch, policy, reference, temperature):
    """{column: B numbers}: length, has_eos, and with a reference nll and, but for greedy, kl."""
    mask = batch["mask"]
    columns = {"length": mask.sum(1).tolist(), "has_eos": batch["has_eos"].tolist()}
    if reference is None:
        return columns
    nll = -reference.logprobs(batch, temperature=1.0)
    columns["nll"] = torch.where(mask, nll, 0.0).sum(1).tolist()
    if temperature > 0:
        log_ratio = policy.logprobs(batch, temperature) - reference.logprobs(batch, temperature)
        columns["kl"] = torch.where(mask, log_ratio, 0.0).sum(1).tolist()
    return columns


@torch.no_grad()
def sample(prompts, uniforms, temperature, name, world):
    """One record a response: query, response, scores {name: float} and the columns of `measure`.

    prompts: a (token ids, row) for each response. uniforms (N,R). name: of the progress bar.
    """
    args = world.args
    device = world.ranks.device
    records = []
    num_batches = math.ceil(len(prompts) / args.batch_size)
    for step in progress(0, num_batches, world.ranks, name):
        part = slice((step - 1) * args.batch_size, step * args.batch_size)
        rows = [row for _, row in prompts[part]]
        batch = sample_batch(prompts[part], uniforms[part].to(device), temperature, world)
        texts = world.tokenizer.batch_decode(batch["responses"], skip_special_tokens=True)
        scores = {}
        with autocast(args, device):
            columns = measure(batch, world.policy, world.reference, temperature)
            for scorer_name, scorer in world.scorers.items():
                scores[scorer_name] = scorer(rows, texts, batch).tolist()
        for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
            record = {"query": row["prompt"], "response": text}
            record["scores"] = {key: column[i] for key, column in scores.items()}
            record |= {key: column[i] for key, column in columns.items()}
            records.append(record)
    return records


def best_of_n(records, chosen, groups, name, n):
    """{metric: estimate} of the best of n by the score `name`, and kl_bound.

    chosen: N numbers of prompts, as of `choose_prompts`; groups: N labels of equal prompts.
    """
    scores = [record["scores"][name] for record in records]
    weights = best_of_n_weights(scores, chosen, n)
    metrics = summarise(records, groups, weights)
    if len(set(groups)) == 1 and n > 1:
        # One prompt gives one best response, which tells nothing about its spread.
        for value in metrics.values():
            value["low"] = None
            value["high"] = None
    return metrics | {"kl_bound": math.log(n) - (n - 1) / n}


def evaluate_policy(args, functions, names, ranks):
    """(metrics, greedy, best_of_n, records) of --model."""
    device = ranks.device
    tokenizer = load_tokenizer(args.model)
    if args.ref_model:
        check_tokenizer(args.ref_model, "--ref_model", tokenizer, args.model)
    for path in args.reward_models:
        check_tokenizer(path, "--reward_models", tokenizer, args.model)
    prompts = load_prompts(args.dataset, tokenizer, args.query_length, "--query_length")
    chosen = choose_prompts(prompts, args)
    chosen_prompts = [prompts[i] for i in chosen]
    P = max(len(ids) for ids, _ in chosen_prompts)

    num_positions = P + args.response_length
    policy, stop_ids = load_policy(args, tokenizer, num_positions, device)
    reference = load_reference(args, tokenizer, num_positions, device)
    scorers = load_scorers(args, functions, names, num_positions, device)
    world = World(policy, reference, scorers, stop_ids, tokenizer, ranks, args)
    generator = seeded(args.seed, "uniforms")
    uniforms = torch.rand(args.num_samples, args.response_length, generator=generator)

    records = sample(chosen_prompts, uniforms, args.temperature, "sampling", world)
    # Two rows of the data with the same prompt are one prompt.
    groups = [tuple(ids) for ids, _ in chosen_prompts]
    metrics = summarise(records, groups)
    greedy = {}
    if args.greedy:
        distinct = dict(zip(groups, chosen_prompts, strict=True))
        greedy_records = sample(list(distinct.values()), uniforms, 0.0, "greedy", world)
        greedy = summarise(greedy_records, list(distinct))
    best = {}
    for n in args.best_of_n:
        first_scorer = next(iter(names.values()))
        best[str(n)] = best_of_n(records, chosen, groups, first_scorer, n)
    return metrics, greedy, best, records


# --------------------------------------------------------------------------------------------------
# Evaluation of reward models on pairs


def load_pairs(args, tokenizer):
    """[{"chosen", "rejected", "group", "margin"}] of the rows of --pairs that fit, short first.

    chosen and rejected are sides: token ids of a prompt and of a response. group: the prompt, or
    the whole row where it has none.
    """

    def encode(row):
        prompt = row.get("prompt", "")
        pair = {"group": json.dumps(prompt or row, default=str), "margin": row.get("margin")}
        for side in ("chosen", "rejected"):
            pair[side] = encode_pair(tokenizer, prompt, row[side])
        return [pair]

    pairs = encode_rows(args.pairs, load_rows(args.pairs, [("chosen", "rejected")]), encode)
    kept = leave_out_long(args.pairs, pairs, pair_length, args.max_length)
    # Rows of similar length share a forward.
    return sorted(kept, key=pair_length)


@torch.no_grad()
def pair_accuracy(path, name, args, ranks):
    """{accuracy/name: estimate} of one reward model, and of the clear pairs among them."""
    tokenizer = load_tokenizer(path)
    pairs = load_pairs(args, tokenizer)
    model = load_reward_model(path, pair_length(pairs[-1]), ranks.device)
    wins = []
    num_batches = math.ceil(len(pairs) / args.batch_size)
    for step in progress(0, num_batches, ranks, f"pairs {name}"):
        part = pairs[(step - 1) * args.batch_size : step * args.batch_size]
        sides = [pair["chosen"] for pair in part] + [pair["rejected"] for pair in part]
        batch = to_device(collate(sides, tokenizer.eos_token_id), ranks.device)
        with autocast(args, ranks.device):
            chosen_scores, rejected_scores = last_token_scores(model, **batch).chunk(2)
        wins += (0.5 + 0.5 * torch.sign(chosen_scores - rejected_scores)).tolist()
    groups = [pair["group"] for pair in pairs]
    metrics = {f"accuracy/{name}": estimate(wins, groups)}
    clear = []
    for i, pair in enumerate(pairs):
        if pair["margin"] is not None and pair["margin"] >= CLEAR_MARGIN:
            clear.append(i)
    if clear:
        clear_wins = [wins[i] for i in clear]
        clear_groups = [groups[i] for i in clear]
        metrics[f"accuracy_clear/{name}"] = estimate(clear_wins, clear_groups)
    return metrics


# --------------------------------------------------------------------------------------------------
# The report


def cell(x):
    """A number of the table."""
    return "-" if x is None else f"{x:.4f}"


def table(sections):
    """Aligned lines of [(heading, {metric: estimate or number})]."""
    names = [name for heading, metrics in sections for name in (heading, *metrics)]
    width = max(len(name) for name in names)
    lines = []
    for heading, metrics in sections:
        lines.append("")
        lines.append(f"{heading:<{width}} {'mean':>10}   {'95% interval':^21} {'std':>9} {'n':>7}")
        for name, value in metrics.items():
            if not isinstance(value, dict):
                lines.append(f"{name:<{width}} {cell(value):>10}")
                continue
            line = f"{name:<{width}} {cell(value['mean']):>10}   {cell(value['low']):>10}"
            line += f" {cell(value['high']):>10} {cell(value['std']):>9} {value['count']:>7}"
            lines.append(line)
    return "\n".join(lines[1:])


def sample_lines(records, count=4):
    """A few responses, for the eye, with the first score where there is one."""
    lines = []
    for record in records[:count]:
        query = " ".join(str(record["query"]).split())
        response = " ".join(record["response"].split())
        score = ""
        if record["scores"]:
            first = next(iter(record["scores"].values()))
            score = f"{first:9.3f}"
        lines.append(f"{score}  {query[-60:]} | {response[:90]}")
    return "\n".join(lines)


def write_whole(path, text):
    """Write a file that appears complete or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.tmp").write_text(text)
    os.rename(f"{path}.tmp", path)


# --------------------------------------------------------------------------------------------------
# Setting up


def from_run(folder):
    """The arguments as they were in a run of a script, read from its args.json.

    A run of a fork counts as one of ppo_rlhf.py if it has the flags that sampling needs.
    """
    path = Path(folder, "args.json")
    if not path.is_file():
        raise UserError(f"--run {folder}: no args.json in it")
    if not Path(folder, "model").is_dir():
        raise UserError(f"--run {folder}: not finished: no model in it")
    record = json.loads(path.read_text())
    script = record.get("script")
    saved = record["args"]
    sampling = ("query_length", "response_length", "min_length", "stop_token", "temperature")
    samples_as_ppo = set(sampling) <= saved.keys()
    others = ("sft.py", "reward_model.py", "dpo.py", "ilql_rlhf.py")
    if script not in others and not samples_as_ppo:
        reason = f"a run of {script}, which does not sample as ppo_rlhf.py does"
        raise UserError(f"--run {folder}: {reason}; give --model and --ref_model instead")
    if script == "reward_model.py":
        return from_reward_model(folder, saved)

    taken = {"run": folder, "model": f"{folder}/model", "precision": saved["precision"]}
    # A config alone is no reference: its random weights would be others.
    taken["ref_model"] = None if has_no_weights(saved["model"]) else saved["model"]
    if saved.get("reward_model"):
        taken["reward_models"] = (saved["reward_model"],)
    if saved.get("reward_fn"):
        # A tuple of functions in PPO, and one function in ILQL.
        functions = saved["reward_fn"]
        taken["reward_fns"] = (functions,) if isinstance(functions, str) else tuple(functions)
    if script in ("sft.py", "dpo.py"):
        taken["dataset"] = prompts_beside(saved["dataset"])
    elif script == "ilql_rlhf.py":
        taken["dataset"] = saved["eval_dataset"] or prompts_beside(saved["dataset"])
        taken["query_length"] = max(saved["max_length"] - saved["response_length"], 1)
        taken["response_length"] = saved["response_length"]
    else:
        taken |= {name: saved[name] for name in ("dataset", *sampling)}
    return Args(**taken)


def from_reward_model(folder, saved):
    """The arguments that measure a reward model on its --eval_dataset, if it has one."""
    return Args(
        run=folder,
        reward_models=(f"{folder}/model",),
        pairs=saved["eval_dataset"],
        max_length=saved["max_length"],
        precision=saved["precision"],
    )


def prompts_beside(dataset):
    """The prompts.jsonl in the folder of a data set, or None."""
    beside = Path(dataset).with_name("prompts.jsonl")
    return str(beside) if beside.is_file() else None


def check_args(args):
    """Refuse what can be refused before anything is loaded."""
    check_at_least(args, 1, "num_samples", "response_length", "query_length", "batch_size")
    check_at_least(args, 1, "max_length")
    check_at_least(args, 0, "temperature", "min_length")
    if args.min_length > 0 and args.beta is not None:
        raise UserError(f"--min_length {args.min_length}: does not go with --beta")
    for flag in ("output", "samples"):
        path = getattr(args, flag)
        if path is not None and Path(path).exists():
            raise UserError(f"--{flag} {path}: exists already; name another file or remove it")
    if args.model is None:
        check_without_policy(args)
    elif args.dataset is None:
        reason = "there are no prompts beside the data of that run"
        raise UserError(f"--dataset: {reason}; name the prompts to sample from")
    if args.pairs and not args.reward_models:
        raise UserError(f"--pairs {args.pairs}: needs --reward_models to judge them")
    for n in args.best_of_n:
        if not 1 <= n <= args.num_samples:
            limits = f"between 1 and --num_samples {args.num_samples}"
            raise UserError(f"--best_of_n {n}: must lie {limits}")
    if args.best_of_n and not args.reward_models and not args.reward_fns:
        raise UserError("--best_of_n: needs --reward_models or --reward_fns to pick with")
    if args.beta is not None:
        heads = Path(args.model or "", "ilql_heads.safetensors")
        if not heads.is_file():
            reason = "--model must be a model folder of ilql_rlhf.py, with ilql_heads.safetensors"
            raise UserError(f"--beta {args.beta}: {reason}")
    for path in (args.model, args.ref_model, *args.reward_models):
        if path is not None:
            check_path(path)


def check_without_policy(args):
    """Refuse what needs a policy, and a call that asks for nothing."""
    if args.reward_fns or args.ref_model or args.greedy or args.best_of_n or args.samples:
        needy = "reward_fns, ref_model, greedy, best_of_n and samples"
        raise UserError(f"--model: {needy} need a policy; name one")
    if not args.pairs and args.run:
        reason = "its held-out rows are not in a file of their own"
        raise UserError(f"--run {args.run}: {reason}; give --pairs that it was not trained on")
    if not args.pairs:
        raise UserError("--model: name the policy to evaluate, or give --pairs and --reward_models")


def main(args):
    check_args(args)
    functions = {spec: load_function(spec, "--reward_fns") for spec in args.reward_fns}
    names = scorer_names(args)
    ranks = init_ranks()
    if ranks.world_size > 1:
        raise UserError("evaluate.py runs in one process: start it with python, not torchrun")

    metrics = {}
    greedy = {}
    best = {}
    records = []
    if args.model is not None:
        metrics, greedy, best, records = evaluate_policy(args, functions, names, ranks)
    if args.pairs:
        for path in args.reward_models:
            metrics |= pair_accuracy(path, names[path], args, ranks)

    sections = [(run_name(args.model) if args.model else "reward models", metrics)]
    if greedy:
        sections.append(("greedy", greedy))
    for n, estimates in best.items():
        sections.append((f"best of {n} by {next(iter(names.values()))}", estimates))
    print(table(sections))
    if records:
        print(f"\n{sample_lines(records)}")
    if args.samples:
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        write_whole(args.samples, "\n".join(lines) + "\n")
    if args.output:
        result = {
            "model": args.model,
            "ref_model": args.ref_model,
            "num_samples": len(records),
            "metrics": metrics,
            "greedy": greedy,
            "best_of_n": best,
            "args": asdict(args),
            "environment": environment(),
        }
        write_whole(args.output, json.dumps(result, indent=2) + "\n")
        print(f"\nwritten to {args.output}")


def start(args):
    """`main`, where --run is given with that run's arguments in the place of the defaults."""
    if args.run:
        args = tyro.cli(Args, default=from_run(args.run), use_underscores=True)
    main(args)


if __name__ == "__main__":
    launch(start, tyro.cli(Args, use_underscores=True))
