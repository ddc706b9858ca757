"""evaluate.py against hand computations, brute force and the plain classes; curves.py, comparison.py on small runs."""

import dataclasses
import itertools
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tyro
from test_ppo_runs import run, settings  # noqa: F401
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import ilql_rlhf
from benchmarks import comparison, curves, evaluate, rated_samples
from conftest import write_jsonl
from utils import UserError, launch, load_pretrained

ROOT = Path(__file__).resolve().parents[1]
LETTERS = "abcd"


def build_tokenizer(letters=LETTERS):
    vocab = {token: i for i, token in enumerate([*letters, "|", "<pad>"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="|"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="|", pad_token="<pad>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def save_model(folder, model_class, seed, letters=LETTERS, **options):
    """A random GPT-2 of one layer whose distributions are far from uniform, with two embedding rows nobody uses."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(letters)
    config = GPT2Config(
        vocab_size=len(tokenizer) + 2, n_embd=16, n_layer=1, n_head=2, n_positions=32, initializer_range=0.3, **options
    )
    config.pad_token_id, config.eos_token_id, config.bos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id, None
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders of a policy, a reference and a reward model; files of prompts, pairs and reward functions."""
    folder = tmp_path_factory.mktemp("world")
    prompts = [{"prompt": p, "bonus": i / 2} for i, p in enumerate(["a", "bc", "d", "cab"])]
    pairs = [("a", "bc", "d"), ("a", "d", "cc"), ("bc", "ab", "ba"), ("d", "cd", "dab"), ("d", "b", "aaa")]
    pairs = [dict(zip(("prompt", "chosen", "rejected"), p)) | {"margin": i / 4} for i, p in enumerate(pairs)]
    for name, rows in {"prompts": prompts, "pairs": pairs}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "one.jsonl").write_text('{"prompt": "ab"}\n')
    (folder / "fns.py").write_text(
        "def count_a(prompts, responses, **columns):\n    return [float(r.count('a')) for r in responses]\n"
        "def bonus(prompts, responses, bonus):\n    return [b + len(r) for r, b in zip(responses, bonus)]\n"
    )
    return {
        "folder": folder,
        "policy": save_model(folder / "policy", GPT2LMHeadModel, 1),
        "reference": save_model(folder / "reference", GPT2LMHeadModel, 2),
        "judge": save_model(
            folder / "judge" / "model", GPT2ForSequenceClassification, 3, num_labels=1, score_mean=0.25
        ),
        "other": save_model(folder / "other", GPT2LMHeadModel, 4, letters="dcba"),
        "prompts": str(folder / "prompts.jsonl"),
        "pairs": str(folder / "pairs.jsonl"),
        "one": str(folder / "one.jsonl"),
        "count_a": f"{folder / 'fns.py'}:count_a",
        "bonus": f"{folder / 'fns.py'}:bonus",
    }


def run_evaluate(tmp_path, **options):
    """(result, samples) of evaluate.main."""
    output, samples = tmp_path / "result.json", tmp_path / "samples.jsonl"
    options = {"response_length": 4, "output": str(output), **options}
    if "model" in options:
        options["samples"] = str(samples)
    evaluate.main(evaluate.Args(**options))
    result, rows = json.loads(output.read_text()), []
    output.unlink()
    if samples.is_file():
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        samples.unlink()
    return result, rows


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def test_estimate_by_hand():
    # mean 3; residual sums of the prompts: a -2 + 0, b -1 + 3; se^2 = 2/1 * (4 + 4) / 4^2 = 1
    result = evaluate.estimate([1.0, 3.0, 2.0, 6.0], ["a", "a", "b", "b"])
    assert result == pytest.approx({"mean": 3, "low": 3 - 1.96, "high": 3 + 1.96, "std": math.sqrt(14 / 3), "count": 4})


@pytest.mark.parametrize("groups", [list(range(50)), ["same"] * 50])
def test_estimate_is_the_usual_one_for_distinct_prompts_and_for_a_single_prompt(groups):
    x = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = evaluate.estimate(x, groups)
    half = 1.96 * x.std().item() / math.sqrt(50)
    assert result["std"] == pytest.approx(x.std().item())
    assert (result["low"], result["high"]) == pytest.approx((x.mean().item() - half, x.mean().item() + half))


def test_repeating_every_response_does_not_narrow_the_interval():
    once = evaluate.estimate([1.0, 4.0, 5.0], [0, 1, 2])
    thrice = evaluate.estimate([1.0, 4.0, 5.0] * 3, [0, 1, 2] * 3)
    assert (once["low"], once["high"]) == pytest.approx((thrice["low"], thrice["high"]))


def test_estimate_weights_are_counts_of_tokens():
    result = evaluate.estimate([1.0, 4.0], [0, 1], weights=[3, 1])
    assert result["mean"] == pytest.approx(1.75)
    # residual sums 3 * -0.75 and 2.25: se^2 = 2 * 2 * 2.25^2 / 4^2
    assert result["high"] - 1.75 == pytest.approx(1.96 * math.sqrt(2 * 2 * 2.25**2 / 16))


def test_a_single_value_has_no_interval():
    result = evaluate.estimate([2.0], [0])
    assert result == {"mean": 2.0, "low": None, "high": None, "std": None, "count": 1}


def test_intervals_cover_at_their_rate_when_responses_share_a_prompt():
    """Responses = prompt effect + noise: about 95% of the intervals hold the truth, where plain ones would miss often."""
    generator = torch.Generator().manual_seed(0)
    groups, hits, plain_hits = [i % 40 for i in range(200)], 0, 0
    for _ in range(200):
        x = torch.randn(40, generator=generator)[groups] + 0.5 * torch.randn(200, generator=generator)
        clustered, plain = evaluate.estimate(x, groups), evaluate.estimate(x, range(200))
        hits += clustered["low"] <= 0 <= clustered["high"]
        plain_hits += plain["low"] <= 0 <= plain["high"]
    assert 180 <= hits <= 198 and plain_hits < 160


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    scores, prompts = [3.0, 1.0, 2.0, 0.5, 9.0, 7.0, 8.0, 5.0, 6.0], [0, 0, 0, 0, 1, 1, 1, 1, 1]
    weights = evaluate.best_of_n_weights(scores, prompts, n)
    subsets = [list(itertools.combinations([s for s, p in zip(scores, prompts) if p == q], n)) for q in (0, 1)]
    best = [sum(map(max, s)) / len(s) for s in subsets]
    assert weights.sum().item() == pytest.approx(9)
    assert (weights * torch.tensor(scores)).sum().item() / 9 == pytest.approx((4 * best[0] + 5 * best[1]) / 9)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


def test_kl_to_itself_is_zero_and_keys_are_complete(world, tmp_path):
    result, rows = run_evaluate(
        tmp_path, model=world["policy"], ref_model=world["policy"], dataset=world["prompts"], num_samples=12
    )
    assert list(result) == [
        "model", "ref_model", "num_samples", "metrics", "greedy", "best_of_n", "args", "environment",
    ]  # fmt: skip
    assert set(result["metrics"]) == {"length", "has_eos", "kl", "ref_perplexity"}
    assert set(result["metrics"]["kl"]) == {"mean", "low", "high", "std", "count"}
    assert [result["metrics"]["kl"][key] for key in ("mean", "low", "high", "std")] == [0, 0, 0, 0]
    assert result["num_samples"] == len(rows) == 12
    assert result["args"]["num_samples"] == 12 and "commit" in result["environment"]


@torch.no_grad()
def test_every_number_of_a_sample_against_the_plain_classes(world, tmp_path):
    """Scores, KL and perplexity from unpadded single rows, the ids put together by hand."""
    temperature = 0.8
    result, rows = run_evaluate(
        tmp_path, model=world["policy"], ref_model=world["reference"], reward_models=(world["judge"],),
        reward_fns=(world["count_a"], world["bonus"]), dataset=world["prompts"], num_samples=30, temperature=temperature,
    )  # fmt: skip
    policy, reference = (AutoModelForCausalLM.from_pretrained(world[name]).eval() for name in ("policy", "reference"))
    judge = AutoModelForSequenceClassification.from_pretrained(world["judge"]).eval()
    tokenizer, bonuses = build_tokenizer(), {"a": 0, "bc": 0.5, "d": 1, "cab": 1.5}
    banned = torch.zeros(8, dtype=torch.bool)
    banned[5:] = True  # <pad> and the two rows that no token has
    nll, kl = 0.0, []
    for row in rows:
        query = tokenizer(row["query"]).input_ids
        response = tokenizer(row["response"]).input_ids + [tokenizer.eos_token_id] * row["has_eos"]
        assert row["length"] == len(response) and (row["has_eos"] or len(response) == 4)
        ids = torch.tensor([query + response])
        logits = [m(ids).logits[0, len(query) - 1 : -1].masked_fill(banned, -math.inf) for m in (policy, reference)]
        chosen = torch.tensor(response)[:, None]
        cold = [torch.log_softmax(x / temperature, -1).gather(1, chosen).sum() for x in logits]
        kl.append((cold[0] - cold[1]).item())
        nll -= torch.log_softmax(logits[1], -1).gather(1, chosen).sum().item()
        assert row["kl"] == pytest.approx(kl[-1], abs=1e-4)
        assert row["scores"] == pytest.approx(
            {
                "judge": judge(ids).logits.item() - 0.25,
                "count_a": row["response"].count("a"),
                "bonus": bonuses[row["query"]] + len(row["response"]),
            },
            abs=1e-4,
        )
    metrics = result["metrics"]
    assert list(metrics)[:3] == ["score/judge", "score/count_a", "score/bonus"]
    assert metrics["kl"]["mean"] == pytest.approx(sum(kl) / 30, abs=1e-4)
    assert metrics["ref_perplexity"]["mean"] == pytest.approx(math.exp(nll / sum(r["length"] for r in rows)), rel=1e-4)
    assert metrics["length"]["mean"] == pytest.approx(sum(r["length"] for r in rows) / 30)
    assert metrics["has_eos"]["mean"] == pytest.approx(sum(r["has_eos"] for r in rows) / 30)
    counts = [r["response"].count("a") for r in rows]
    by_hand = evaluate.estimate(counts, [r["query"] for r in rows])
    assert metrics["score/count_a"] == pytest.approx(by_hand)
    assert metrics["score/count_a"]["mean"] == pytest.approx(sum(counts) / 30)
    per_prompt = [sum(r["query"] == p for r in rows) for p in bonuses]
    assert sorted(per_prompt) == [7, 7, 8, 8]  # spread evenly


@torch.no_grad()
def test_intervals_hold_the_exact_expectations_of_an_enumerable_case(world, tmp_path):
    """One prompt, two tokens: every response is enumerated, and its probability is known."""
    result, _ = run_evaluate(
        tmp_path, model=world["policy"], ref_model=world["reference"], reward_fns=(world["count_a"],),
        dataset=world["one"], num_samples=1500, response_length=2, batch_size=500,
    )  # fmt: skip
    policy, reference = (AutoModelForCausalLM.from_pretrained(world[name]).eval() for name in ("policy", "reference"))

    def next_logprobs(model, ids):
        return torch.log_softmax(model(torch.tensor([ids])).logits[0, -1, :5], -1).tolist()

    exact = dict.fromkeys(["score/count_a", "kl", "length", "has_eos"], 0.0)
    for first in range(5):
        for second in [None] if first == 4 else range(5):
            tokens = [first] if second is None else [first, second]
            logprob = [
                sum(next_logprobs(model, [0, 1, *tokens[:i]])[token] for i, token in enumerate(tokens))
                for model in (policy, reference)
            ]
            p = math.exp(logprob[0])
            exact["score/count_a"] += p * tokens.count(0)
            exact["kl"] += p * (logprob[0] - logprob[1])
            exact["length"] += p * len(tokens)
            exact["has_eos"] += p * (tokens[-1] == 4)
    for name, value in exact.items():
        metric = result["metrics"][name]
        assert metric["low"] <= value <= metric["high"], (name, value, metric)
    assert exact["kl"] > 0.1


@pytest.fixture(scope="module")
def steered(world):
    """The policy's folder with heads of its own, large enough that steering moves tokens."""
    policy, _ = load_pretrained(AutoModelForCausalLM, world["policy"])
    torch.manual_seed(6)
    ilql = ilql_rlhf.ILQL(policy, 2)
    for parameter in ilql.heads.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    folder = world["folder"] / "steered"
    ilql.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


def test_beta_zero_is_the_plain_model(world, steered, tmp_path):
    common = {"model": steered, "dataset": world["prompts"], "num_samples": 40, "ref_model": world["reference"]}
    plain, rows = run_evaluate(tmp_path, **common, temperature=0.8)
    zero, same = run_evaluate(tmp_path, **common, temperature=0.8, beta=0.0)
    assert [row["response"] for row in rows] == [row["response"] for row in same]
    assert zero["metrics"]["kl"] == pytest.approx(plain["metrics"]["kl"], abs=1e-5)
    assert zero["metrics"]["ref_perplexity"] == pytest.approx(plain["metrics"]["ref_perplexity"], abs=1e-5)
    _, other = run_evaluate(tmp_path, **common, temperature=0.8, beta=2.0)
    assert [row["response"] for row in rows] != [row["response"] for row in other]


@torch.no_grad()
def test_steered_kl_is_that_of_the_steered_distribution(world, steered, tmp_path):
    """Each sample's log-probabilities from unpadded rows, the heads applied by hand."""
    result, rows = run_evaluate(
        tmp_path, model=steered, ref_model=world["reference"], dataset=world["prompts"], num_samples=20, beta=1.5,
        temperature=0.7,
    )  # fmt: skip
    ilql, tokenizer = ilql_rlhf.load_ilql(steered), build_tokenizer()
    reference = AutoModelForCausalLM.from_pretrained(world["reference"]).eval()
    banned = torch.arange(8) >= 5
    for row in rows:
        query = tokenizer(row["query"]).input_ids
        response = tokenizer(row["response"]).input_ids + [tokenizer.eos_token_id] * row["has_eos"]
        ids = torch.tensor([query + response])
        places = slice(len(query) - 1, -1)
        h = ilql.policy(ids, output_hidden_states=True).hidden_states[-1][0, places]
        advantage = torch.minimum(*(q(h) for q in ilql.heads["target_q"])) - ilql.heads["v"][0](h)
        logits = ilql.policy.lm_head(h).masked_fill(banned, -math.inf)
        logprobs = torch.log_softmax(torch.log_softmax(logits / 0.7, -1) + 1.5 * advantage, -1)
        ref_logits = reference(ids).logits[0, places].masked_fill(banned, -math.inf)
        log_ratio = logprobs - torch.log_softmax(ref_logits / 0.7, -1)
        kl = log_ratio.gather(1, torch.tensor(response)[:, None]).sum().item()
        assert row["kl"] == pytest.approx(kl, abs=1e-4)
    assert result["metrics"]["kl"]["mean"] == pytest.approx(sum(row["kl"] for row in rows) / 20, abs=1e-4)


def test_batch_size_does_not_change_the_samples_and_the_seed_does(world, tmp_path):
    common = {"model": world["policy"], "dataset": world["prompts"], "num_samples": 40}
    _, rows = run_evaluate(tmp_path, **common)
    _, small = run_evaluate(tmp_path, **common, batch_size=7)
    _, other = run_evaluate(tmp_path, **common, seed=2)
    assert rows == small
    assert rows != other


def test_a_stop_token_ends_responses_as_it_did_in_training(world, tmp_path):
    common = {"model": world["policy"], "dataset": world["prompts"], "num_samples": 60, "response_length": 6}
    _, plain = run_evaluate(tmp_path, **common)
    for least in (0, 3):
        result, rows = run_evaluate(tmp_path, **common, stop_token="b", min_length=least)
        for row, longer in zip(rows, plain, strict=True):  # the same uniforms: the same text, cut earlier
            text = row["response"]  # without EOS, which may stand before min_length and then ends nothing
            if len(text) == row["length"]:
                assert row["has_eos"] == text.endswith("b")
            assert row["has_eos"] or row["length"] == 6
            assert row["length"] > least and "b" not in text[least:-1]
            assert least or longer["response"].startswith(text)
        assert 0.2 < result["metrics"]["has_eos"]["mean"] < 1
        assert any("b" in row["response"][:least] for row in rows) == (least > 0)


def test_the_command_that_ppo_prints_evaluates_what_was_trained(settings, tmp_path, capsys):  # noqa: F811
    changes = {"temperature": 0.7, "stop_token": "a b", "min_length": 2, "precision": "bf16", "missing_eos_score": -1.0}
    flags = settings(tmp_path / "run", query_length=7, **changes)
    run(flags)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next ")]
    python, script, *words = shlex.split(line.removeprefix("next "))
    assert (python, script) == ("python", "benchmarks/evaluate.py")
    assert words == ["--run", f"{tmp_path}/run"]
    args = evaluate.from_run(words[1])
    assert args.model == f"{tmp_path}/run/model" and args.ref_model == flags["model"]
    assert args.reward_fns == (flags["reward_fn"],) and args.reward_models == ()
    names = ("dataset", "query_length", "response_length", "temperature", "stop_token", "min_length", "precision")
    for name in names:
        assert getattr(args, name) == flags[name]
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "main", seen.append)
        patch.setattr(sys, "argv", ["evaluate.py", *words, "--temperature", "1.0", "--num_samples", "8"])
        evaluate.start(tyro.cli(evaluate.Args, use_underscores=True))
    assert seen[0] == dataclasses.replace(args, temperature=1.0, num_samples=8)  # what is given wins, default or not
    evaluate.main(seen[0])
    assert "kl" in capsys.readouterr().out


def test_a_run_of_ilql_is_evaluated_as_it_evaluates_itself(tmp_path, gpt2_folder):
    saved = {"model": gpt2_folder, "dataset": "rated.jsonl", "eval_dataset": "prompts.jsonl", "reward_model": None}
    saved |= {"reward_fn": "f.py:f", "max_length": 64, "response_length": 12, "precision": "bf16"}
    (tmp_path / "model").mkdir()
    (tmp_path / "args.json").write_text(json.dumps({"args": saved}))
    args = evaluate.from_run(str(tmp_path))
    assert (args.dataset, args.query_length, args.response_length) == ("prompts.jsonl", 52, 12)
    assert (args.precision, args.ref_model, args.reward_fns) == ("fp32", gpt2_folder, ("f.py:f",))
    (tmp_path / "args.json").write_text(json.dumps({"args": saved | {"eval_dataset": None}}))
    with pytest.raises(UserError, match="no prompts of its own; name some with --dataset"):
        evaluate.main(dataclasses.replace(evaluate.from_run(str(tmp_path)), model=gpt2_folder, reward_fns=()))


def test_a_run_that_cannot_be_evaluated(tmp_path):
    with pytest.raises(UserError, match="no args.json"):
        evaluate.from_run(str(tmp_path))
    (tmp_path / "args.json").write_text("{}")
    with pytest.raises(UserError, match="not finished"):
        evaluate.from_run(str(tmp_path))


def test_greedy_is_temperature_zero_and_deterministic(world, tmp_path):
    common = {"model": world["policy"], "dataset": world["prompts"], "reward_fns": (world["count_a"],)}
    both, _ = run_evaluate(tmp_path, **common, num_samples=8, greedy=True)
    again, _ = run_evaluate(tmp_path, **common, num_samples=8, greedy=True, seed=5)
    cold, rows = run_evaluate(tmp_path, **common, num_samples=4, temperature=0.0, ref_model=world["reference"])
    assert both["greedy"] == again["greedy"] and both["greedy"]["length"]["count"] == 4
    assert both["greedy"]["score/count_a"] == cold["metrics"]["score/count_a"]
    assert "kl" not in cold["metrics"] and "ref_perplexity" in cold["metrics"]
    assert len({row["query"] for row in rows}) == 4


def test_best_of_n(world, tmp_path):
    result, rows = run_evaluate(
        tmp_path, model=world["policy"], dataset=world["prompts"], num_samples=30, best_of_n=(1, 2, 8),
        reward_models=(world["judge"],), reward_fns=(world["count_a"],),
    )  # fmt: skip
    metrics, best = result["metrics"], result["best_of_n"]
    assert len({row["query"] for row in rows}) == 3  # each has at least 8 responses
    for name in ("score/judge", "score/count_a", "length"):
        assert best["1"][name] == pytest.approx(metrics[name])
    assert metrics["score/judge"]["mean"] < best["2"]["score/judge"]["mean"] < best["8"]["score/judge"]["mean"]
    assert best["1"]["kl_bound"] == 0 and best["8"]["kl_bound"] == pytest.approx(math.log(8) - 7 / 8)


def test_best_of_n_with_a_single_prompt_has_no_interval(world, tmp_path):
    result, _ = run_evaluate(
        tmp_path, model=world["policy"], dataset=world["one"], num_samples=6, best_of_n=(2,),
        reward_fns=(world["count_a"],),
    )  # fmt: skip
    assert result["best_of_n"]["2"]["score/count_a"]["low"] is None
    assert result["metrics"]["score/count_a"]["low"] is not None


@torch.no_grad()
def test_pairs_against_the_plain_class(world, tmp_path):
    result, _ = run_evaluate(tmp_path, reward_models=(world["judge"],), pairs=world["pairs"], batch_size=2)
    judge, tokenizer = AutoModelForSequenceClassification.from_pretrained(world["judge"]).eval(), build_tokenizer()
    wins = []
    for row in map(json.loads, Path(world["pairs"]).read_text().splitlines()):
        ids = [torch.tensor([tokenizer(row["prompt"] + row[side] + "|").input_ids]) for side in ("chosen", "rejected")]
        wins.append(float(judge(ids[0]).logits > judge(ids[1]).logits))
    assert 0 < sum(wins) < 5
    assert set(result["metrics"]) == {"accuracy/judge", "accuracy_clear/judge"}
    expected = evaluate.estimate(wins, ["a", "a", "bc", "d", "d"])
    assert result["metrics"]["accuracy/judge"] == pytest.approx(expected)
    clear = result["metrics"]["accuracy_clear/judge"]
    assert clear["count"] == 3 and clear["mean"] == pytest.approx(sum(wins[2:]) / 3)
    assert result["model"] is None and result["num_samples"] == 0


def test_bf16_and_the_printed_table(world, tmp_path, capsys):
    run_evaluate(
        tmp_path, model=world["policy"], ref_model=world["policy"], dataset=world["prompts"], num_samples=8,
        precision="bf16", reward_fns=(world["count_a"],),
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["policy", "mean", "95%", "interval", "std", "n"]
    kl = next(line.split() for line in lines if line.startswith("kl"))
    assert kl == ["kl", "0.0000", "0.0000", "0.0000", "0.0000", "8"]
    assert len({len(line) for line in lines[:6]}) == 1  # aligned


def test_names_of_scorers(world, tmp_path):
    assert evaluate.run_name(world["judge"]) == "judge"
    assert evaluate.run_name("someone/on-the-hub") == "someone/on-the-hub"
    assert evaluate.distinct_names(["x/a", "y/a", "z"], ["a", "a", "z"]) == ["x/a", "y/a", "z"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "--model: name the policy"),
        ({"model": "./nowhere"}, "./nowhere: no such file or folder"),
        ({"model": "{folder}"}, "tokenizer"),
        ({"model": "{judge}"}, "a reward model, not a language model"),
        ({"model": "{policy}", "reward_models": ("{reference}",)}, "not a reward model"),
        ({"model": "{policy}", "ref_model": "{other}"}, "--ref_model {other}: its tokenizer differs"),
        ({"model": "{policy}", "reward_models": ("{other}",)}, "--reward_models {other}: its tokenizer differs"),
        ({"model": "{policy}", "reward_fns": ("nofile.py:f",)}, "nofile.py:f: no such file"),
        ({"model": "{policy}", "dataset": "nofile.jsonl"}, "nofile.jsonl: no such file"),
        ({"model": "{policy}", "response_length": 40}, "32 positions"),
        ({"model": "{policy}", "best_of_n": (4,)}, "needs --reward_models or --reward_fns"),
        ({"model": "{policy}", "best_of_n": (500,), "reward_fns": ("{count_a}",)}, "--best_of_n 500"),
        ({"model": "{policy}", "beta": 1.0}, "--beta 1.0: --model must be a model folder of ilql_rlhf.py"),
        ({"model": "{policy}", "min_length": -1}, "--min_length -1"),
        ({"model": "{policy}", "stop_token": ""}, "--stop_token ''"),
        ({"model": "{policy}", "num_samples": 0}, "--num_samples 0"),
        ({"model": "{policy}", "temperature": -1.0}, "--temperature -1.0"),
        ({"model": "{policy}", "output": "{prompts}"}, "exists already"),
        ({"model": "{policy}", "samples": "{prompts}"}, "exists already"),
        ({"pairs": "{pairs}"}, "needs --reward_models"),
        ({"pairs": "{prompts}", "reward_models": ("{judge}",)}, "needs chosen+rejected"),
        ({"pairs": "{pairs}", "reward_models": ("{judge}",), "greedy": True}, "need a policy"),
        ({"pairs": "{pairs}", "reward_models": ("{judge}",), "max_length": 1}, "no pair is left"),
    ],
)
def test_mistakes_end_in_one_line(world, capfd, options, message):
    def fill(value):
        if isinstance(value, str):
            return value.format(**world)
        return tuple(map(fill, value)) if isinstance(value, tuple) else value

    options = {name: fill(value) for name, value in options.items()}
    before = Path(world["prompts"]).read_text()
    with pytest.raises(SystemExit) as stop:
        launch(evaluate.main, evaluate.Args(**{"dataset": world["prompts"], **options}))
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 1
    assert len(errors) == 1 and fill(message) in errors[0]
    assert Path(world["prompts"]).read_text() == before


def test_runs_as_a_script_from_the_root():
    flags = ["--model", "./nowhere", "--reward_fns", "a.py:f", "b.py:g", "--best_of_n", "4", "16"]
    command = [sys.executable, "benchmarks/evaluate.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: ./nowhere: no such file or folder\n"


# ----------------------------------------------------------------------------------------------------------------------
# Curves


def write_run(folder, script="ppo_rlhf", seed=1, shift=0.0, **args):
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(
        json.dumps({"args": {"seed": seed, "output_dir": str(folder), **args}, "argv": [f"{script}.py"]})
    )
    lines = []
    for step in range(1, 7):
        if script == "sft":
            line = {"train/sft/loss": 1 / step, "epoch": 1} | ({"eval/sft/loss": 2 / step} if step % 3 == 0 else {})
        else:
            line = {"objective/scores": step + shift, "objective/kl": 0.1 * step, "monitor/exact": 0.5, "lr": 1e-4}
            line["episode"] = 8 * step
        lines.append(json.dumps({"step": step, **line}) + "\n")
    (folder / "metrics.jsonl").write_text("".join(lines))
    return str(folder)


def test_scripts_get_their_usual_panels(tmp_path):
    runs = [curves.load_run(write_run(tmp_path / "s", "sft")), curves.load_run(write_run(tmp_path / "p"))]
    figure = curves.build_figure(runs)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        "sft: loss", "ppo_rlhf: score", "ppo_rlhf: exact, watched but not trained on", "ppo_rlhf: KL to the reference",
    ]  # fmt: skip
    loss, score = figure.axes[:2]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["s, train", "s, eval"]
    assert list(loss.lines[1].get_xdata()) == [3, 6] and list(loss.lines[1].get_ydata()) == pytest.approx(
        [2 / 3, 1 / 3]
    )
    assert (loss.get_xlabel(), loss.get_ylabel()) == ("optimizer step", "nats per token")
    assert score.get_xlabel() == "update" and list(score.lines[0].get_ydata()) == [1, 2, 3, 4, 5, 6]


def test_keys_patterns_labels_and_episodes(tmp_path):
    folders = [write_run(tmp_path / name, shift=i) for i, name in enumerate("ab")]
    runs = [curves.load_run(folder, label) for folder, label in zip(folders, ["first", "second"])]
    figure = curves.build_figure(runs, ("objective/*", "lr"), x="episode")
    assert len(figure.axes) == 3
    assert list(figure.axes[0].lines[1].get_xdata()) == [8, 16, 24, 32, 40, 48]
    assert figure.axes[0].get_xlabel() == "episodes"
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["first", "second"]
    assert len({line.get_color() for line in figure.axes[0].lines}) == 2


def test_mean_joins_runs_that_differ_in_their_seed_alone(tmp_path):
    folders = [write_run(tmp_path / f"{i}", seed=i, shift=i, kl_coef=0.1) for i in range(3)]
    folders.append(write_run(tmp_path / "other", seed=0, kl_coef=0.0))
    runs = [curves.load_run(folder) for folder in folders]
    axes = curves.build_figure(runs, ("objective/scores",), mean=True).axes[0]
    assert [line.get_label() for line in axes.lines] == ["0, 3 runs", "other"]
    assert list(axes.lines[0].get_ydata()) == [2, 3, 4, 5, 6, 7]
    band = axes.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band} >= {(1, 1), (1, 3), (6, 6), (6, 8)}
    labelled = [curves.load_run(folder, "all") for folder in folders]
    axes = curves.build_figure(labelled, ("objective/scores",), mean=True, by_label=True).axes[0]
    assert [line.get_label() for line in axes.lines] == ["all, 4 runs"]


def test_curves_writes_a_picture_and_reads_a_run_that_is_being_written(tmp_path):
    folder = write_run(tmp_path / "p")
    with open(tmp_path / "p" / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "objec')
    output = tmp_path / "figures" / "p.png"
    curves.main(curves.Args(runs=(folder,), output=str(output)))
    assert output.read_bytes().startswith(b"\x89PNG")
    assert len(curves.load_run(folder).lines) == 6


@pytest.mark.parametrize(
    "options, message",
    [
        ({"runs": ()}, "at least one run folder"),
        ({"runs": ("nowhere",)}, "nowhere: not a run folder: there is no metrics.jsonl"),
        ({"keys": ("objective/score",)}, "--keys objective/score: none of the runs has it"),
        ({"labels": ("a", "b")}, "--labels: 2 names for 1 runs"),
        ({"output": "{run}/metrics.jsonl"}, "must end in .png"),
        ({"output": "{run}/taken.png"}, "exists already"),
    ],
)
def test_mistakes_of_curves_end_in_one_line(tmp_path, capsys, options, message):
    run = write_run(tmp_path / "p")
    (tmp_path / "p" / "taken.png").write_text("")
    options = {"runs": (run,), "output": f"{run}/new.png"} | options
    options["output"] = options["output"].format(run=run)
    with pytest.raises(SystemExit) as stop:
        launch(curves.main, curves.Args(**options))
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1 and message in error
    assert not (tmp_path / "p" / "new.png").exists()


# ----------------------------------------------------------------------------------------------------------------------
# comparison.py


def evaluation(path, judge, kl, std=2.0, best_of_n=None, **changed):
    """A file as evaluate.py writes it, with the numbers that a comparison reads."""
    whole = {"reward_models": ["a", "b"], "dataset": "p", "temperature": 0.7, "response_length": 4, "num_samples": 20}
    whole["best_of_n"] = list(map(int, best_of_n or {}))
    names = {"score/b": judge, "kl": kl, "ref_perplexity": 9.0, "length": 3.0}
    metrics = {name: {"mean": x, "low": x - 1, "high": x + 1, "std": std} for name, x in names.items()}
    record = {"args": {**whole, "seed": 1, **changed}, "metrics": metrics, "best_of_n": best_of_n or {}}
    path.write_text(json.dumps(record))
    return str(path)


def comparison_flags(folder, **changed):
    best = {"16": {"score/b": {"mean": 2.5, "low": 2.0, "high": 3.0}, "kl_bound": math.log(16) - 15 / 16}}
    run = folder / "ppo_run"
    run.mkdir()
    (run / "args.json").write_text(json.dumps({"args": {"batch_size": 32}}))
    line = {"val/sequence_lengths": 10.0, "time/rollout": 1.0, "time/score": 2.0, "time/update": 4.0}
    write_jsonl(run / "metrics.jsonl", [line, line])
    files = {"sft": evaluation(folder / "sft.json", 0.5, 0.0)}
    files["best_of_n"] = evaluation(folder / "best.json", 0.4, 0.0, best_of_n=best, num_samples=320)
    files["ppo"] = evaluation(folder / "ppo.json", 4.5, 12.0, std=1.0)
    files["ilql"] = tuple(evaluation(folder / f"i{beta}.json", 0.5 + beta, beta, beta=beta) for beta in (4.0, 1.0))
    costs = {"reward_model_seconds": 100.0, "ilql_seconds": 50.0, "ilql_tokens": 7.0}
    return {**files, **costs, "ppo_run": str(run), "judge": "b", "output": str(folder / "comparison"), **changed}


def test_a_comparison_by_hand(tmp_path, capsys):
    comparison.main(comparison.Args(**comparison_flags(tmp_path)))
    rows = json.loads((tmp_path / "comparison" / "comparison.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["SFT", "best of 16", "ILQL, beta 1", "ILQL, beta 4", "PPO"]
    assert [row["gain"] for row in rows] == [0.0, 1.0, 0.5, 2.0, 2.0]  # in standard deviations of the SFT scores
    assert [row["kl"]["mean"] for row in rows] == pytest.approx([0.0, math.log(16) - 15 / 16, 1.0, 4.0, 12.0])
    assert [row["tokens"] for row in rows] == [0, 48.0, 7.0, 7.0, 640.0]
    assert [row["seconds"] for row in rows] == [0, 100.0, 50.0, 50.0, 114.0]
    assert (tmp_path / "comparison" / "comparison.png").stat().st_size > 1000
    assert "best of 16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("prompts", "dataset is 'others', in the SFT evaluation 'p'"),
        ("fewer prompts", "it is of 10 prompts, the SFT evaluation of 20"),
        ("judge", "--judge c: "),
        ("output", "exists already"),
    ],
)
def test_a_comparison_of_what_differs_is_refused(tmp_path, capsys, name, message):
    flags = comparison_flags(tmp_path)
    if name == "prompts":
        evaluation(tmp_path / "ppo.json", 1.0, 1.0, dataset="others")
    elif name == "fewer prompts":
        evaluation(tmp_path / "ppo.json", 1.0, 1.0, num_samples=10)
    else:
        flags |= {"judge": {"judge": "c"}, "output": {"output": str(tmp_path)}}[name]
    with pytest.raises(SystemExit):
        launch(comparison.main, comparison.Args(**flags))
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------------
# Rated samples


def rated_files(tmp_path):
    rated = [{"prompt": "a", "completion": " b", "reward": r} for r in (1.0, 2.0, 6.0)]
    samples = [
        {"query": f"p{i}", "response": f" r{i}", "scores": {"a": 10.0 * i, "b": 0.0}, "has_eos": i != 2}
        for i in range(4)
    ]
    paths = write_jsonl(tmp_path / "rated.jsonl", rated), write_jsonl(tmp_path / "samples.jsonl", samples)
    return {"rated": str(paths[0]), "samples": (str(paths[1]),), "output": str(tmp_path / "both.jsonl")}


def test_rated_samples_stand_beside_the_ratings_on_one_scale(tmp_path, capsys):
    files = rated_files(tmp_path)
    rated_samples.main(rated_samples.Args(**files, scorer="a"))
    rows = [json.loads(line) for line in Path(files["output"]).read_text().splitlines()]
    assert [(row["prompt"], row["completion"]) for row in rows[3:]] == [("p0", " r0"), ("p1", " r1"), ("p3", " r3")]
    for part, values in ((rows[:3], (1.0, 2.0, 6.0)), (rows[3:], (0.0, 10.0, 30.0))):
        mean = sum(values) / 3
        std = (sum((x - mean) ** 2 for x in values) / 3) ** 0.5
        assert [row["reward"] for row in part] == pytest.approx([(x - mean) / std for x in values])
    assert "3 rated rows and 3 samples" in capsys.readouterr().out


@pytest.mark.parametrize("flags, words", [({"scorer": "c"}, "has a, b"), ({"scorer": "b"}, "no scale")])
def test_rated_samples_refuse_what_has_no_score(flags, words, tmp_path):
    files = rated_files(tmp_path)
    with pytest.raises(UserError, match=words):
        rated_samples.main(rated_samples.Args(**files, **flags))
    assert not Path(files["output"]).exists()
    Path(files["output"]).write_text("kept")
    with pytest.raises(UserError, match="exists already"):
        rated_samples.main(rated_samples.Args(**files, scorer="a"))
