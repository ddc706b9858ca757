"""How good is a policy folder? Samples it on held-out prompts and reports every number with a 95% interval.

    1. sample     num_samples responses, spread evenly over the prompts of a seeded shuffle
    2. score      every reward model (less its score_mean) and reward function given; nothing added for a missing EOS
                  kl = sum over real tokens of logprob - ref_logprob: nats a response, an unbiased estimate, so a single
                  one may be negative
                  ref_perplexity = exp(mean over real tokens of -ref_logprob), at temperature 1
    3. greedy     with --greedy: the most likely response to each prompt that was sampled from
    4. best of n  with --best_of_n: what picking the best of n by the first scorer gives, in every scorer
    steered       with --beta and the model folder of ilql_rlhf.py: everything above is about the policy that Q and V steer,
                  kl too; temperature divides the logits of pi_beta before they are shifted, and those of the reference
    5. pairs      with --pairs: how often each reward model prefers the chosen response; a tie counts half

    python benchmarks/evaluate.py --run runs/ppo_rlhf__1__1700000000 --best_of_n 4 16 --greedy --output ppo.json
    python benchmarks/evaluate.py --model runs/ppo_rlhf__1__1700000000/model --ref_model runs/sft__1__1700000000/model \
        --reward_fns tasks/randomwalks.py:reward
    python benchmarks/evaluate.py --reward_models runs/reward_model__1__1700000000/model \
        --pairs data/randomwalks/preferences_test.jsonl

Intervals: responses to one prompt resemble each other, so a prompt, not a response, is the unit. With residuals
r_i = x_i - mean of N responses to G prompts, se^2 = G / (G-1) * sum over prompts of (sum of the prompt's r_i)^2 / N^2, and
the interval is mean +- 1.96 se. Where every prompt occurs once this is the usual std / sqrt(N). It speaks about
prompts like these, not about these alone. With a single prompt it is taken over that prompt's responses. Below some
20 prompts it is a little too narrow, and pairs that share a response through different prompts count as independent.
`std` is the standard deviation over responses: differences between models are often quoted in those of the SFT model.

Best of n is the exact expectation over all n-subsets of the m responses sampled to a prompt, not one draw: sorted by
score, response k is the best with probability C(k-1, n-1) / C(m, n). `kl_bound` = log n - (n-1) / n is the most by which
best-of-n can differ from the sampled policy (Stiennon et al. 2020; a bound by Beirami et al. 2024).
"""

import copy
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts are files in the root, not a package

from ilql_rlhf import generate_steered, load_ilql
from ppo_rlhf import (
    call_reward_fn,
    encode_prompts,
    generate,
    last_hidden,
    last_token_scores,
    left_pad,
    load_tokenizer,
    logit_bias,
    response_logits,
    response_mask,
    stop_token_ids,
    token_logprobs,
)
from reward_model import collate, encode_pair
from utils import (
    UserError,
    environment,
    init_ranks,
    check_path,
    launch,
    load_function,
    load_pretrained,
    load_rows,
    progress,
    seeded,
)

CLEAR_MARGIN = 0.5  # rows of --pairs with at least this margin are also counted apart


@dataclass
class Args:
    run: str | None = None
    """a run folder of ppo_rlhf.py or ilql_rlhf.py: whatever is not given here is as it was in that run, the policy its
    model, the reference what it started from; none: all as given"""
    model: str | None = None
    """the policy: a folder or a Hub name; may be left out with --pairs, then only accuracies are reported"""
    ref_model: str | None = None
    """reference of kl and ref_perplexity: a folder or a Hub name; none: neither is reported"""
    reward_models: tuple[str, ...] = ()
    """folders or Hub names; each reports score/<name of its run>"""
    reward_fns: tuple[str, ...] = ()
    """path/to/file.py:function(prompts, responses, **columns) -> list of floats; each reports score/<function>"""
    dataset: str = "data/randomwalks/prompts.jsonl"
    """rows with prompt; every other column reaches the reward functions"""
    num_samples: int = 400
    """responses in all, spread evenly over the prompts"""
    temperature: float = 1.0
    """divides the logits in sampling and in kl; 0: the most likely token (and no kl)"""
    beta: float | None = None
    """steer --model, a folder with ilql_heads.safetensors, by its Q and V: softmax(log pi_beta + beta * (Q - V)); none:
    the plain model, which is pi_beta"""
    greedy: bool = False
    """report also the most likely response to each prompt that was sampled from"""
    best_of_n: tuple[int, ...] = ()
    """sizes n; the first reward model (or else function) picks. So few prompts are used that each gets the largest n"""
    response_length: int = 10
    """tokens sampled at most, the stop token included"""
    stop_token: str | None = None
    """a text, such as ".", whose every token ends a response as EOS does, as in ppo_rlhf.py; none: EOS alone"""
    min_length: int = 0
    """tokens of a response before a stop token may end it, as in ppo_rlhf.py; not with --beta"""
    query_length: int = 64
    """tokens; longer prompts are left out and counted"""
    pairs: str | None = None
    """rows with prompt+chosen+rejected, or chosen+rejected: report accuracy/<reward model>, and also of the rows
    whose margin is at least 0.5 where there is such a column"""
    max_length: int = 512
    """tokens; pairs with a longer side are left out and counted"""
    batch_size: int = 64
    """responses or pairs per forward: a memory knob, without effect on what is sampled"""
    seed: int = 1
    """seeds the order of the prompts and the sampling"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """what sampling and forwards compute in; log-probabilities and scores are fp32 always"""
    output: str | None = None
    """a JSON file for the result, which must not exist yet; none: only print"""
    samples: str | None = None
    """a JSONL file for every response with its scores, which must not exist yet; none: not written"""


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def estimate(values, groups, weights=None):
    """{mean, low, high, std, count}: a weighted mean of values (N,) with the docstring's interval.

    groups: N labels, one for each prompt. weights (N,): how much each value counts; none: equally. low and high are
    None where a single value leaves nothing to estimate them from.
    """
    x = torch.as_tensor(values, dtype=torch.float64)
    w = torch.ones_like(x) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    labels = {group: i for i, group in enumerate(dict.fromkeys(groups))}
    index = torch.tensor([labels[group] for group in groups])
    if len(labels) == 1:
        index = torch.arange(len(x))
    G, N = int(index.max()) + 1, len(x)
    mean = (w * x).sum() / w.sum()
    result = {"mean": mean.item(), "low": None, "high": None, "std": None, "count": N}
    if N > 1:
        sums = torch.zeros(G, dtype=torch.float64).index_add(0, index, w * (x - mean))
        half = 1.96 * (G / (G - 1) * (sums**2).sum()).sqrt() / w.sum()
        std = ((w * (x - mean) ** 2).sum() / w.sum() * N / (N - 1)).sqrt()
        result |= {"low": (mean - half).item(), "high": (mean + half).item(), "std": std.item()}
    return result


def best_of_n_weights(scores, prompts, n):
    """How often each response is the best of n of its prompt's m, times m: weights (N,) that sum to N.

    scores (N,) choose. prompts: N labels. Among equals the later sampled counts as the better, which is as good as any.
    """
    members = {}
    for i, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(i)
    weights = torch.zeros(len(prompts), dtype=torch.float64)
    for indices in members.values():
        m = len(indices)
        for k, i in enumerate(sorted(indices, key=lambda i: scores[i]), start=1):
            weights[i] = m * math.comb(k - 1, n - 1) / math.comb(m, n)
    return weights


# ----------------------------------------------------------------------------------------------------------------------
# Models


def run_name(path):
    """What a model is called in the report: the run's folder if it is a run's `model`, else the name as given."""
    path = Path(path)
    if not path.exists():
        return str(path)
    return path.resolve().parent.name if path.name == "model" else path.resolve().name


def distinct_names(paths, names):
    """The names, or the paths themselves where two names are equal."""
    return [path if names.count(name) > 1 else name for path, name in zip(paths, names, strict=True)]


def check_tokenizer(path, flag, tokenizer, model):
    """Refuse a model that reads token ids differently."""
    if load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"{flag} {path}: its tokenizer differs from that of --model {model}")


def load_policy(path, flag, tokenizer, device):
    """(policy, bias): a causal model, and the `logit_bias` (V,) of ppo_rlhf.py."""
    policy, _ = load_pretrained(AutoModelForCausalLM, path)
    if any("SequenceClassification" in name for name in policy.config.architectures or ()):
        raise UserError(f"{flag} {path}: a reward model, not a language model")
    if len(tokenizer) > policy.get_input_embeddings().num_embeddings:
        policy.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return policy.requires_grad_(False).to(device), logit_bias(policy, tokenizer).to(device)


class SteeredPolicy:
    """An ILQL module in the place of a plain policy: sampled with `generate_steered`, and its log-probabilities."""

    def __init__(self, path, beta, device):
        self.ilql, self.beta = load_ilql(path).requires_grad_(False).to(device), beta
        self.config = self.ilql.policy.config

    def generate(self, queries, query_mask, uniforms, temperature, stop_ids, pad_id, bias):
        options = {"temperature": temperature, "bias": bias}
        return generate_steered(self.ilql, queries, query_mask, uniforms, self.beta, stop_ids, pad_id, **options)

    def response_logits(self, input_ids, attention_mask, response_length, bias, temperature):
        """(B,R,V) that predict the response's tokens: log-probabilities but for a constant, at temperature 1."""
        hidden = last_hidden(self.ilql.policy, input_ids, attention_mask)[:, -response_length - 1 : -1]
        logits = self.ilql.steered_logits(hidden.flatten(0, 1), self.beta, bias, temperature)
        return logits.view(*hidden.shape[:2], -1)


def load_reward_model(path, device):
    """A sequence classifier with one label, as reward_model.py saves it."""
    model, missing = load_pretrained(AutoModelForSequenceClassification, path, ["score.weight"], num_labels=1)
    if missing:
        raise UserError(f"--reward_models {path}: not a reward model: it lacks the weights {missing[0]}")
    return model.requires_grad_(False).to(device)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


def sample(policies, scorers, prompts, uniforms, temperature, tokenizer, args, ranks, name):
    """One dict a response: query, response, scores {name: float}, length, has_eos, and with a reference kl and nll.

    policies: (sampler, policy, bias, reference, ref_bias), the last two None without a reference.
    scorers: {name: function(rows, texts, input_ids, attention_mask) -> (B,)}. prompts: [(token ids, row)], one for each
    response. uniforms (N,R).
    """
    sampler, policy, bias, reference, ref_bias = policies
    device, R, size = ranks.device, uniforms.shape[1], args.batch_size
    stop_ids, pad_id = stop_token_ids(tokenizer, args.stop_token, policy.config.eos_token_id), tokenizer.pad_token_id
    P, results, is_steered = max(len(ids) for ids, _ in prompts), [], isinstance(policy, SteeredPolicy)
    for step in progress(0, -(-len(prompts) // size), ranks, name):
        part = slice((step - 1) * size, step * size)
        rows = [row for _, row in prompts[part]]
        queries, query_mask = left_pad([ids for ids, _ in prompts[part]], P, pad_id, device)
        block = uniforms[part].to(device)
        inputs = (queries, query_mask, block, temperature, stop_ids, pad_id, bias)
        responses = policy.generate(*inputs) if is_steered else generate(sampler, *inputs, args.min_length)
        mask = response_mask(responses, stop_ids, args.min_length)
        has_eos = torch.isin(responses, torch.tensor(stop_ids, device=device)) & mask
        input_ids, attention_mask = torch.cat([queries, responses], 1), torch.cat([query_mask, mask], 1)
        texts = [
            tokenizer.decode(ids[real], skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids, real in zip(responses.cpu(), mask.cpu())
        ]
        columns = {
            "length": mask.sum(1).tolist(),
            "has_eos": has_eos[:, args.min_length :].any(1).tolist(),
        }
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, args.precision == "bf16"):
            scores = {key: scorer(rows, texts, input_ids, attention_mask).tolist() for key, scorer in scorers.items()}
            if reference is not None:
                ref_logits = response_logits(reference, input_ids, attention_mask, R)[0] + ref_bias
                nll = -token_logprobs(ref_logits, responses, 1.0)[0]
                columns["nll"] = torch.where(mask, nll, 0.0).sum(1).tolist()
            if reference is not None and temperature > 0:
                if is_steered:  # the temperature is inside already
                    logits = policy.response_logits(input_ids, attention_mask, R, bias, temperature)
                else:
                    logits = response_logits(policy, input_ids, attention_mask, R)[0] + bias
                logprobs, _ = token_logprobs(logits, responses, 1.0 if is_steered else temperature)
                ref_logprobs, _ = token_logprobs(ref_logits, responses, temperature)
                columns["kl"] = torch.where(mask, logprobs - ref_logprobs, 0.0).sum(1).tolist()
        for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
            record = {"query": row["prompt"], "response": text, "scores": {key: scores[key][i] for key in scores}}
            results.append(record | {key: column[i] for key, column in columns.items()})
    return results


def summarise(results, groups, weights=None):
    """{metric: estimate} over the responses of `sample`; with the weights of best-of-n the scores and length alone."""
    metrics = {
        f"score/{name}": estimate([r["scores"][name] for r in results], groups, weights)
        for name in results[0]["scores"]
    }
    metrics["length"] = estimate([r["length"] for r in results], groups, weights)
    if weights is not None:
        return metrics
    metrics["has_eos"] = estimate([float(r["has_eos"]) for r in results], groups)
    if "kl" in results[0]:
        metrics["kl"] = estimate([r["kl"] for r in results], groups)
    if "nll" in results[0]:  # a mean over tokens: each response counts with its length
        per_token, lengths = [r["nll"] / r["length"] for r in results], [r["length"] for r in results]
        nll = estimate(per_token, groups, lengths)
        spread = estimate([math.exp(min(x, 700.0)) for x in per_token], groups)["std"]
        ends = {end: None if nll[end] is None else math.exp(nll[end]) for end in ("mean", "low", "high")}
        metrics["ref_perplexity"] = {**ends, "std": spread, "count": nll["count"]}
    return metrics


def pair_accuracy(path, name, rows, args, ranks):
    """{accuracy/name: estimate} of one reward model, also over the rows of clear margin where there is that column."""
    tokenizer, model = load_tokenizer(path), load_reward_model(path, ranks.device)
    pairs = []
    for number, row in enumerate(rows):
        prompt = row.get("prompt", "")
        sides = [encode_pair(tokenizer, prompt, row[side]) for side in ("chosen", "rejected")]
        pairs.append((sides, json.dumps(prompt) if prompt else number, row.get("margin")))
    kept = [pair for pair in pairs if max(map(len, pair[0])) <= args.max_length]
    if len(kept) < len(pairs):
        print(
            f"{args.pairs}: left out {len(pairs) - len(kept)} of {len(pairs)} pairs longer than {args.max_length} tokens"
        )
    if not kept:
        raise UserError(f"{args.pairs}: no pair is left; every one is longer than --max_length {args.max_length}")
    kept.sort(key=lambda pair: max(map(len, pair[0])))  # rows of similar length share a forward
    wins = []
    for step in progress(0, -(-len(kept) // args.batch_size), ranks, f"pairs {name}"):
        part = kept[(step - 1) * args.batch_size : step * args.batch_size]
        sequences = [sides[i] for i in (0, 1) for sides, _, _ in part]
        with torch.no_grad(), torch.autocast(ranks.device.type, torch.bfloat16, args.precision == "bf16"):
            batch = collate(sequences, tokenizer.pad_token_id, len(sequences), ranks.device)
            chosen_scores, rejected_scores = last_token_scores(model, *batch).chunk(2)
        wins += (0.5 + 0.5 * torch.sign(chosen_scores - rejected_scores)).tolist()
    groups = [group for _, group, _ in kept]
    metrics = {f"accuracy/{name}": estimate(wins, groups)}
    clear = [i for i, (_, _, margin) in enumerate(kept) if margin is not None and margin >= CLEAR_MARGIN]
    if clear:
        metrics[f"accuracy_clear/{name}"] = estimate([wins[i] for i in clear], [groups[i] for i in clear])
    return metrics


# ----------------------------------------------------------------------------------------------------------------------
# Report


def table(sections):
    """Aligned lines of [(heading, {metric: estimate or number})]."""

    def number(x):
        return "-" if x is None else f"{x:.4f}"

    width = max([len(name) for _, metrics in sections for name in metrics] + [len(head) for head, _ in sections])
    lines = []
    for heading, metrics in sections:
        lines += ["", f"{heading:<{width}} {'mean':>10}   {'95% interval':^21} {'std':>9} {'n':>7}"]
        for name, value in metrics.items():
            if not isinstance(value, dict):
                lines.append(f"{name:<{width}} {number(value):>10}")
                continue
            interval = f"{number(value['low']):>10} {number(value['high']):>10}"
            lines.append(
                f"{name:<{width}} {number(value['mean']):>10}   {interval} {number(value['std']):>9} {value['count']:>7}"
            )
    return "\n".join(lines[1:])


def sample_lines(results, count=4):
    """A few responses, for the eye, with the first score where there is one."""
    lines = []
    for record in results[:count]:
        query, response = (" ".join(str(record[key]).split()) for key in ("query", "response"))
        score = next(iter(record["scores"].values()), None)
        lines.append(f"{'' if score is None else f'{score:9.3f}'}  {query[-60:]} | {response[:90]}")
    return "\n".join(lines)


def write_whole(path, text):
    """Write a file that appears complete or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.tmp").write_text(text)
    os.rename(f"{path}.tmp", path)


def from_run(folder):
    """Arguments as they were in a run, read from its args.json."""
    path = Path(folder, "args.json")
    if not path.is_file() or not Path(folder, "model").is_dir():
        raise UserError(f"--run {folder}: {'not finished: no model in it' if path.is_file() else 'no args.json in it'}")
    saved = json.loads(path.read_text())["args"]
    start = Path(saved["model"])  # a config alone is no reference: its random weights would be others
    has_weights = not start.is_dir() or any(start.glob("*.safetensors*")) or any(start.glob("*.bin*"))
    taken = {"run": folder, "model": f"{folder}/model", "ref_model": str(start) if has_weights else None}
    taken |= {f"{name}s": (saved[name],) for name in ("reward_model", "reward_fn") if saved.get(name)}
    names = ("response_length", "query_length", "min_length", "stop_token", "temperature", "dataset", "precision")
    if "eval_dataset" in saved:  # ILQL: samples in fp32, and --dataset is what it learned from
        names = ("response_length",)
        taken["query_length"] = saved["max_length"] - saved["response_length"]
        taken["dataset"] = saved["eval_dataset"] or ""
    return Args(**taken, **{name: saved[name] for name in names})


def check_args(args):
    """Refuse what can be refused before anything is loaded."""
    for flag in ("num_samples", "response_length", "query_length", "batch_size"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag} {getattr(args, flag)}: must be at least 1")
    if args.temperature < 0:
        raise UserError(f"--temperature {args.temperature}: must not be negative")
    if args.min_length < 0 or (args.min_length and args.beta is not None):
        raise UserError(f"--min_length {args.min_length}: must not be negative, and does not go with --beta")
    for flag in ("output", "samples"):
        if getattr(args, flag) and Path(getattr(args, flag)).exists():
            raise UserError(f"--{flag} {getattr(args, flag)}: exists already; name another file or remove it")
    if not args.model and not args.pairs:
        raise UserError("--model: name the policy to evaluate, or give --pairs and --reward_models")
    if args.pairs and not args.reward_models:
        raise UserError(f"--pairs {args.pairs}: needs --reward_models to judge them")
    if not args.model and (args.reward_fns or args.ref_model or args.greedy or args.best_of_n or args.samples):
        raise UserError("--model: reward_fns, ref_model, greedy, best_of_n and samples need a policy; name one")
    for n in args.best_of_n:
        if not 1 <= n <= args.num_samples:
            raise UserError(f"--best_of_n {n}: must lie between 1 and --num_samples {args.num_samples}")
    if args.best_of_n and not args.reward_models and not args.reward_fns:
        raise UserError("--best_of_n: needs --reward_models or --reward_fns to pick with")
    if args.beta is not None and not (args.model and Path(args.model, "ilql_heads.safetensors").is_file()):
        raise UserError(
            f"--beta {args.beta}: --model must be a model folder of ilql_rlhf.py, with ilql_heads.safetensors"
        )
    for path in [args.model, args.ref_model, *args.reward_models]:
        if path:
            check_path(path)


def main(args):
    check_args(args)
    functions = [load_function(spec, "--reward_fns") for spec in args.reward_fns]
    names = [run_name(path) for path in args.reward_models] + [function.__name__ for function in functions]
    names = distinct_names([*args.reward_models, *args.reward_fns], names)
    model_names, function_names = names[: len(args.reward_models)], names[len(args.reward_models) :]
    ranks = init_ranks()
    if ranks.world_size > 1:
        raise UserError("evaluate.py runs in one process: start it with python, not torchrun")
    device, metrics, greedy, best_of_n, results = ranks.device, {}, {}, {}, []

    if args.model:
        tokenizer = load_tokenizer(args.model)
        if args.ref_model:
            check_tokenizer(args.ref_model, "--ref_model", tokenizer, args.model)
        for path in args.reward_models:
            check_tokenizer(path, "--reward_models", tokenizer, args.model)
        if not args.dataset:
            raise UserError(f"--run {args.run}: it has no prompts of its own; name some with --dataset")
        prompts = encode_prompts(load_rows(args.dataset, [("prompt",)]), tokenizer, args.query_length, args.dataset)
        order = torch.randperm(len(prompts), generator=seeded(args.seed, "prompts")).tolist()
        order = order[: args.num_samples // max(args.best_of_n, default=1)]
        rows = [order[i % len(order)] for i in range(args.num_samples)]  # the prompt of each response

        policy, bias = load_policy(args.model, "--model", tokenizer, device)
        limit = getattr(policy.config, "window_size", None) or getattr(policy.config, "max_position_embeddings", None)
        longest = max(len(prompts[i][0]) for i in order)
        if limit and longest + args.response_length > limit:
            raise UserError(
                f"--response_length {args.response_length}: with prompts of {longest} tokens that is more than the "
                f"{limit} positions of --model {args.model}; lower it or --query_length"
            )
        reference, ref_bias = None, None
        if args.ref_model:
            reference, ref_bias = load_policy(args.ref_model, "--ref_model", tokenizer, device)
        if args.beta is not None:
            policy = SteeredPolicy(args.model, args.beta, device)
        sampler = policy
        if args.precision == "bf16" and args.beta is None:  # weights in bf16, buffers (rotary frequencies) in fp32
            sampler = copy.deepcopy(policy)
            for parameter in sampler.parameters():
                parameter.data = parameter.data.bfloat16()
        policies = (sampler, policy, bias, reference, ref_bias)
        scorers = {}
        for path, name in zip(args.reward_models, model_names, strict=True):
            model = load_reward_model(path, device)
            scorers[name] = lambda rows, texts, ids, mask, model=model: last_token_scores(model, ids, mask)
        for function, name in zip(functions, function_names, strict=True):
            scorers[name] = lambda rows, texts, ids, mask, f=function: call_reward_fn(f, rows, texts, device)

        uniforms = torch.rand(args.num_samples, args.response_length, generator=seeded(args.seed, "uniforms"))
        chosen, common = [prompts[i] for i in rows], (tokenizer, args, ranks)
        results = sample(policies, scorers, chosen, uniforms, args.temperature, *common, "sampling")
        groups = [tuple(ids) for ids, _ in chosen]  # two rows with the same prompt are one prompt
        metrics = summarise(results, groups)
        if args.greedy:
            distinct = list({tuple(prompts[i][0]): prompts[i] for i in order}.values())
            texts = sample(policies, scorers, distinct, uniforms[: len(distinct)], 0.0, *common, "greedy")
            greedy = summarise(texts, [tuple(ids) for ids, _ in distinct])
        for n in args.best_of_n:
            weights = best_of_n_weights([record["scores"][names[0]] for record in results], rows, n)
            best_of_n[str(n)] = summarise(results, groups, weights) | {"kl_bound": math.log(n) - (n - 1) / n}
            if len(set(groups)) == 1 and n > 1:  # one prompt gives one best response: nothing to tell its spread from
                for value in best_of_n[str(n)].values():
                    if isinstance(value, dict):
                        value.update(low=None, high=None)
    if args.pairs:
        pairs = load_rows(args.pairs, [("chosen", "rejected")])
        for path, name in zip(args.reward_models, model_names, strict=True):
            metrics |= pair_accuracy(path, name, pairs, args, ranks)

    sections = [(run_name(args.model) if args.model else "reward models", metrics)]
    sections += [("greedy", greedy)] if greedy else []
    sections += [(f"best of {n} by {names[0]}", metrics) for n, metrics in best_of_n.items()]
    print(table(sections))
    if results:
        print(f"\n{sample_lines(results)}")
    if args.samples:
        write_whole(args.samples, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in results))
    if args.output:
        record = {
            "model": args.model,
            "ref_model": args.ref_model,
            "num_samples": len(results),
            "metrics": metrics,
            "greedy": greedy,
            "best_of_n": best_of_n,
            "args": asdict(args),
            "environment": environment(),
        }
        write_whole(args.output, json.dumps(record, indent=2) + "\n")
        print(f"\nwritten to {args.output}")


def start(args):
    """`main`, where --run is given with that run's arguments in place of the defaults."""
    main(tyro.cli(Args, default=from_run(args.run), use_underscores=True) if args.run else args)


if __name__ == "__main__":
    launch(start, tyro.cli(Args, use_underscores=True))
