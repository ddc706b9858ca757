"""tools/: evaluate.py against hand computations, brute force and the plain classes; the others."""

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
from conftest import write_jsonl
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
import ppo_rlhf
import reward_model
import sft
from tools import comparison, curves, evaluate, rated_samples
from utils import UserError, launch, load_pretrained

ROOT = Path(__file__).resolve().parents[1]
LETTERS = "abcd"
# The ids of "a" to "d" and of "|"; the pad and two rows of the embeddings are never sampled.
NUM_ALLOWED = 5


def build_tokenizer(letters=LETTERS):
    vocab = {token: i for i, token in enumerate([*letters, "|", "<pad>"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="|"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="|", pad_token="<pad>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return tokenizer


def save_model(folder, model_class, seed, letters=LETTERS, **options):
    """A random GPT-2 of one layer, far from uniform, with two embedding rows that nobody uses."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(letters)
    config = GPT2Config(
        vocab_size=len(tokenizer) + 2,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=32,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **options,
    )
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


FUNCTIONS = """
def count_a(prompts, responses, **columns):
    return [float(response.count("a")) for response in responses]

def bonus(prompts, responses, bonus):
    return [b + len(response) for response, b in zip(responses, bonus)]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folders of a policy, a reference and a reward model; files of prompts, pairs and functions.

    "data" holds what the four scripts train on, with the prompts beside it.
    """
    folder = tmp_path_factory.mktemp("world")
    prompts = []
    for i, prompt in enumerate(["a", "bc", "d", "cab"]):
        prompts.append({"prompt": prompt, "bonus": i / 2})
    triples = [("a", "bc", "d"), ("a", "d", "cc"), ("bc", "ab", "ba")]
    triples += [("d", "cd", "dab"), ("d", "b", "aaa")]
    pairs = []
    for i, (prompt, chosen, rejected) in enumerate(triples):
        pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        pairs.append({**pair, "margin": i / 4})
    rated = []
    for prompt, chosen, _ in triples:
        rated.append({"prompt": prompt, "completion": chosen, "reward": float(len(chosen))})
    (folder / "data").mkdir()
    (folder / "functions.py").write_text(FUNCTIONS)
    return {
        "folder": folder,
        "policy": save_model(folder / "policy", GPT2LMHeadModel, 1),
        "reference": save_model(folder / "reference", GPT2LMHeadModel, 2),
        "judge": save_model(
            folder / "judge" / "model",
            GPT2ForSequenceClassification,
            3,
            num_labels=1,
            score_mean=0.25,
        ),
        "other": save_model(folder / "other", GPT2LMHeadModel, 4, letters="dcba"),
        "prompts": write_jsonl(folder / "data" / "prompts.jsonl", prompts),
        "pairs": write_jsonl(folder / "data" / "pairs.jsonl", pairs),
        "rated": write_jsonl(folder / "data" / "rated.jsonl", rated),
        "one": write_jsonl(folder / "one.jsonl", [{"prompt": "ab"}]),
        "count_a": f"{folder / 'functions.py'}:count_a",
        "bonus": f"{folder / 'functions.py'}:bonus",
    }


def run_evaluate(tmp_path, **options):
    """(result, samples) of evaluate.main."""
    output = tmp_path / "result.json"
    samples = tmp_path / "samples.jsonl"
    options = {"response_length": 4, "output": str(output), **options}
    if "model" in options:
        options["samples"] = str(samples)
    evaluate.main(evaluate.Args(**options))
    result = json.loads(output.read_text())
    output.unlink()
    rows = []
    if samples.is_file():
        rows = [json.loads(line) for line in samples.read_text().splitlines()]
        samples.unlink()
    return result, rows


def encode_sample(row):
    """Token ids of prompt and response of a sample, with the EOS that the text does not show."""
    tokenizer = build_tokenizer()
    query = tokenizer(row["query"]).input_ids
    response = tokenizer(row["response"]).input_ids
    if row["has_eos"]:
        response.append(tokenizer.eos_token_id)
    return query, response


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# --------------------------------------------------------------------------------------------------
# Statistics


@pytest.mark.fast
def test_estimate_by_hand():
    # The mean is 3. The residual sums of the prompts are -2 + 0 for a and -1 + 3 for b, so
    # se^2 = 2/1 * (4 + 4) / 4^2 = 1.
    result = evaluate.estimate([1.0, 3.0, 2.0, 6.0], ["a", "a", "b", "b"])
    expected = {"mean": 3, "low": 3 - 1.96, "high": 3 + 1.96, "std": math.sqrt(14 / 3), "count": 4}
    assert result == pytest.approx(expected)


@pytest.mark.fast
@pytest.mark.parametrize("groups", [list(range(50)), ["same"] * 50])
def test_estimate_is_the_usual_one_for_distinct_prompts_and_for_a_single_prompt(groups):
    x = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    result = evaluate.estimate(x, groups)
    half = 1.96 * x.std().item() / math.sqrt(50)
    assert result["std"] == pytest.approx(x.std().item())
    assert result["low"] == pytest.approx(x.mean().item() - half)
    assert result["high"] == pytest.approx(x.mean().item() + half)


@pytest.mark.fast
def test_repeating_every_response_does_not_narrow_the_interval():
    once = evaluate.estimate([1.0, 4.0, 5.0], [0, 1, 2])
    thrice = evaluate.estimate([1.0, 4.0, 5.0] * 3, [0, 1, 2] * 3)
    assert once["low"] == pytest.approx(thrice["low"])
    assert once["high"] == pytest.approx(thrice["high"])


@pytest.mark.fast
def test_estimate_weights_are_counts_of_tokens():
    result = evaluate.estimate([1.0, 4.0], [0, 1], weights=[3, 1])
    assert result["mean"] == pytest.approx(1.75)
    # The residual sums are 3 * -0.75 and 2.25, so se^2 = 2 * 2 * 2.25^2 / 4^2.
    assert result["high"] - 1.75 == pytest.approx(1.96 * math.sqrt(2 * 2 * 2.25**2 / 16))


@pytest.mark.fast
def test_a_single_value_has_no_interval():
    result = evaluate.estimate([2.0], [0])
    assert result == {"mean": 2.0, "low": None, "high": None, "std": None, "count": 1}


@pytest.mark.fast
def test_intervals_cover_at_their_rate_when_responses_share_a_prompt():
    """Responses are a prompt's effect plus noise: about 95% of the intervals hold the truth.

    Intervals that took responses for independent would miss it often.
    """
    generator = torch.Generator().manual_seed(0)
    groups = [i % 40 for i in range(200)]
    hits = 0
    plain_hits = 0
    for _ in range(200):
        effects = torch.randn(40, generator=generator)
        x = effects[groups] + 0.5 * torch.randn(200, generator=generator)
        clustered = evaluate.estimate(x, groups)
        plain = evaluate.estimate(x, range(200))
        hits += clustered["low"] <= 0 <= clustered["high"]
        plain_hits += plain["low"] <= 0 <= plain["high"]
    assert 180 <= hits <= 198
    assert plain_hits < 160


@pytest.mark.fast
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    scores_of = {0: [3.0, 1.0, 2.0, 0.5], 1: [9.0, 7.0, 8.0, 5.0, 6.0]}
    scores = scores_of[0] + scores_of[1]
    prompts = [0] * 4 + [1] * 5
    weights = evaluate.best_of_n_weights(scores, prompts, n)
    best = {}
    for prompt, values in scores_of.items():
        best[prompt] = mean(max(subset) for subset in itertools.combinations(values, n))
    assert weights.sum().item() == pytest.approx(9)
    expected = (4 * best[0] + 5 * best[1]) / 9
    assert (weights * torch.tensor(scores)).sum().item() / 9 == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------
# Evaluation of a policy


def test_kl_to_itself_is_zero_and_keys_are_complete(world, tmp_path):
    result, rows = run_evaluate(
        tmp_path,
        model=world["policy"],
        ref_model=world["policy"],
        dataset=world["prompts"],
        num_samples=12,
    )
    names = ["model", "ref_model", "num_samples", "metrics", "greedy", "best_of_n", "args"]
    assert list(result) == [*names, "environment"]
    assert set(result["metrics"]) == {"length", "has_eos", "kl", "ref_perplexity"}
    assert set(result["metrics"]["kl"]) == {"mean", "low", "high", "std", "count"}
    for name in ("mean", "low", "high", "std"):
        assert result["metrics"]["kl"][name] == 0
    assert result["num_samples"] == len(rows) == 12
    assert result["args"]["num_samples"] == 12
    assert "commit" in result["environment"]


def plain_logprobs(model, row, temperature):
    """The summed log-probability of a sample's response, from one unpadded row."""
    query, response = encode_sample(row)
    logits = model(torch.tensor([query + response])).logits[0, len(query) - 1 : -1]
    logits[:, NUM_ALLOWED:] = -math.inf
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    return logprobs.gather(1, torch.tensor(response)[:, None]).sum().item()


@torch.no_grad()
def test_every_number_of_a_sample_against_the_plain_classes(world, tmp_path):
    """Scores, KL and perplexity from unpadded single rows, the ids put together by hand."""
    temperature = 0.8
    result, rows = run_evaluate(
        tmp_path,
        model=world["policy"],
        ref_model=world["reference"],
        reward_models=(world["judge"],),
        reward_fns=(world["count_a"], world["bonus"]),
        dataset=world["prompts"],
        num_samples=30,
        temperature=temperature,
    )
    policy = AutoModelForCausalLM.from_pretrained(world["policy"]).eval()
    reference = AutoModelForCausalLM.from_pretrained(world["reference"]).eval()
    judge = AutoModelForSequenceClassification.from_pretrained(world["judge"]).eval()
    bonuses = {"a": 0, "bc": 0.5, "d": 1, "cab": 1.5}
    for row in rows:
        query, response = encode_sample(row)
        assert row["length"] == len(response)
        assert row["has_eos"] or len(response) == 4
        kl = plain_logprobs(policy, row, temperature) - plain_logprobs(reference, row, temperature)
        assert row["kl"] == pytest.approx(kl, abs=1e-4)
        assert row["nll"] == pytest.approx(-plain_logprobs(reference, row, 1.0), abs=1e-4)
        expected = {
            "judge": judge(torch.tensor([query + response])).logits.item() - 0.25,
            "count_a": row["response"].count("a"),
            "bonus": bonuses[row["query"]] + len(row["response"]),
        }
        assert row["scores"] == pytest.approx(expected, abs=1e-4)

    metrics = result["metrics"]
    assert list(metrics)[:3] == ["score/judge", "score/count_a", "score/bonus"]
    num_tokens = sum(row["length"] for row in rows)
    nll = sum(row["nll"] for row in rows) / num_tokens
    assert metrics["ref_perplexity"]["mean"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert metrics["kl"]["mean"] == pytest.approx(mean(row["kl"] for row in rows), abs=1e-4)
    assert metrics["length"]["mean"] == pytest.approx(num_tokens / 30)
    assert metrics["has_eos"]["mean"] == pytest.approx(mean(row["has_eos"] for row in rows))
    counts = [row["response"].count("a") for row in rows]
    by_hand = evaluate.estimate(counts, [row["query"] for row in rows])
    assert metrics["score/count_a"] == pytest.approx(by_hand)
    assert metrics["score/count_a"]["mean"] == pytest.approx(mean(counts))
    responses_of = [sum(row["query"] == prompt for row in rows) for prompt in bonuses]
    assert sorted(responses_of) == [7, 7, 8, 8]


def exact_expectations(policy, reference):
    """Of responses of at most two tokens to the prompt "ab": all of them are enumerated."""

    def next_logprobs(model, ids):
        logits = model(torch.tensor([ids])).logits[0, -1, :NUM_ALLOWED]
        return torch.log_softmax(logits, dim=-1).tolist()

    eos = 4
    responses = [[eos]]
    for first in range(eos):
        responses += [[first, second] for second in range(NUM_ALLOWED)]
    exact = dict.fromkeys(["score/count_a", "kl", "length", "has_eos"], 0.0)
    for tokens in responses:
        logprobs = []
        for model in (policy, reference):
            steps = [next_logprobs(model, [0, 1, *tokens[:i]])[x] for i, x in enumerate(tokens)]
            logprobs.append(sum(steps))
        probability = math.exp(logprobs[0])
        exact["score/count_a"] += probability * tokens.count(0)
        exact["kl"] += probability * (logprobs[0] - logprobs[1])
        exact["length"] += probability * len(tokens)
        exact["has_eos"] += probability * (tokens[-1] == eos)
    return exact


@torch.no_grad()
def test_intervals_hold_the_exact_expectations_of_an_enumerable_case(world, tmp_path):
    result, _ = run_evaluate(
        tmp_path,
        model=world["policy"],
        ref_model=world["reference"],
        reward_fns=(world["count_a"],),
        dataset=world["one"],
        num_samples=1500,
        response_length=2,
        batch_size=500,
    )
    policy = AutoModelForCausalLM.from_pretrained(world["policy"]).eval()
    reference = AutoModelForCausalLM.from_pretrained(world["reference"]).eval()
    exact = exact_expectations(policy, reference)
    for name, value in exact.items():
        metric = result["metrics"][name]
        assert metric["low"] <= value <= metric["high"], (name, value, metric)
    assert exact["kl"] > 0.1


@pytest.fixture(scope="module")
def steered(world):
    """The policy's folder with Q and V of its own, large enough that steering moves tokens."""
    policy, _ = load_pretrained(AutoModelForCausalLM, world["policy"])
    torch.manual_seed(6)
    ilql = ilql_rlhf.ILQL(policy)
    for name, parameter in ilql.named_parameters():
        if not name.startswith("policy."):
            torch.nn.init.normal_(parameter, std=0.5)
    folder = world["folder"] / "steered"
    ilql.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


def test_beta_zero_is_the_plain_model(world, steered, tmp_path):
    common = {"model": steered, "dataset": world["prompts"], "ref_model": world["reference"]}
    common |= {"num_samples": 40, "temperature": 0.8}
    plain, rows = run_evaluate(tmp_path, **common)
    zero, same = run_evaluate(tmp_path, **common, beta=0.0)
    assert [row["response"] for row in rows] == [row["response"] for row in same]
    for name in ("kl", "ref_perplexity"):
        assert zero["metrics"][name] == pytest.approx(plain["metrics"][name], abs=1e-5)
    _, other = run_evaluate(tmp_path, **common, beta=2.0)
    assert [row["response"] for row in rows] != [row["response"] for row in other]


@torch.no_grad()
def test_steered_kl_is_that_of_the_steered_distribution(world, steered, tmp_path):
    """Each sample's log-probabilities from unpadded rows, Q and V applied by hand."""
    temperature = 0.7
    result, rows = run_evaluate(
        tmp_path,
        model=steered,
        ref_model=world["reference"],
        dataset=world["prompts"],
        num_samples=20,
        beta=1.5,
        temperature=temperature,
    )
    ilql = ilql_rlhf.load_ilql(steered)
    reference = AutoModelForCausalLM.from_pretrained(world["reference"]).eval()
    for row in rows:
        query, response = encode_sample(row)
        ids = torch.tensor([query + response])
        output = ilql.policy(ids, output_hidden_states=True)
        hidden = output.hidden_states[-1][0, len(query) - 1 : -1]
        smaller_q = torch.minimum(*(q(hidden) for q in ilql.target_qs))
        advantage = smaller_q - ilql.v(hidden)
        logits = ilql.policy.lm_head(hidden)
        steered_logits = torch.log_softmax(logits, dim=-1) + 1.5 * advantage
        steered_logits[:, NUM_ALLOWED:] = -math.inf
        logprobs = torch.log_softmax(steered_logits / temperature, dim=-1)
        logprob = logprobs.gather(1, torch.tensor(response)[:, None]).sum().item()
        kl = logprob - plain_logprobs(reference, row, temperature)
        assert row["kl"] == pytest.approx(kl, abs=1e-4)
    expected = mean(row["kl"] for row in rows)
    assert result["metrics"]["kl"]["mean"] == pytest.approx(expected, abs=1e-4)


def test_batch_size_does_not_change_the_samples_and_the_seed_does(world, tmp_path):
    common = {"model": world["policy"], "dataset": world["prompts"], "num_samples": 40}
    _, rows = run_evaluate(tmp_path, **common)
    _, small = run_evaluate(tmp_path, **common, batch_size=7)
    _, other = run_evaluate(tmp_path, **common, seed=2)
    assert rows == small
    assert rows != other


def test_a_stop_token_ends_responses_as_it_did_in_training(world, tmp_path):
    common = {"model": world["policy"], "dataset": world["prompts"]}
    common |= {"num_samples": 60, "response_length": 6}
    _, plain = run_evaluate(tmp_path, **common)
    for least in (0, 3):
        result, rows = run_evaluate(tmp_path, **common, stop_token="b", min_length=least)
        # The same uniforms give the same text, cut earlier.
        for row, longer in zip(rows, plain, strict=True):
            # Without EOS, which may stand before min_length and ends nothing there.
            text = row["response"]
            if len(text) == row["length"]:
                assert row["has_eos"] == text.endswith("b")
            assert row["has_eos"] or row["length"] == 6
            assert row["length"] > least
            assert "b" not in text[least:-1]
            assert least > 0 or longer["response"].startswith(text)
        assert 0.2 < result["metrics"]["has_eos"]["mean"] < 1
        has_early_stop = any("b" in row["response"][:least] for row in rows)
        assert has_early_stop == (least > 0)


def test_greedy_is_temperature_zero_and_deterministic(world, tmp_path):
    common = {"model": world["policy"], "dataset": world["prompts"]}
    common["reward_fns"] = (world["count_a"],)
    both, _ = run_evaluate(tmp_path, **common, num_samples=8, greedy=True)
    again, _ = run_evaluate(tmp_path, **common, num_samples=8, greedy=True, seed=5)
    options = {"num_samples": 4, "temperature": 0.0, "ref_model": world["reference"]}
    cold, rows = run_evaluate(tmp_path, **common, **options)
    assert both["greedy"] == again["greedy"]
    assert both["greedy"]["length"]["count"] == 4
    assert both["greedy"]["score/count_a"] == cold["metrics"]["score/count_a"]
    assert "kl" not in cold["metrics"]
    assert "ref_perplexity" in cold["metrics"]
    assert len({row["query"] for row in rows}) == 4


def test_best_of_n(world, tmp_path):
    result, rows = run_evaluate(
        tmp_path,
        model=world["policy"],
        dataset=world["prompts"],
        num_samples=30,
        best_of_n=(1, 2, 8),
        reward_models=(world["judge"],),
        reward_fns=(world["count_a"],),
    )
    metrics = result["metrics"]
    best = result["best_of_n"]
    # Each of three prompts has at least 8 responses.
    assert len({row["query"] for row in rows}) == 3
    for name in ("score/judge", "score/count_a", "length"):
        assert best["1"][name] == pytest.approx(metrics[name])
    scores = [x["score/judge"]["mean"] for x in (metrics, best["2"], best["8"])]
    assert scores[0] < scores[1] < scores[2]
    assert best["1"]["kl_bound"] == 0
    assert best["8"]["kl_bound"] == pytest.approx(math.log(8) - 7 / 8)


def test_best_of_n_with_a_single_prompt_has_no_interval(world, tmp_path):
    result, _ = run_evaluate(
        tmp_path,
        model=world["policy"],
        dataset=world["one"],
        num_samples=6,
        best_of_n=(2,),
        reward_fns=(world["count_a"],),
    )
    assert result["best_of_n"]["2"]["score/count_a"]["low"] is None
    assert result["metrics"]["score/count_a"]["low"] is not None


def test_bf16_and_the_printed_table(world, tmp_path, capsys):
    run_evaluate(
        tmp_path,
        model=world["policy"],
        ref_model=world["policy"],
        dataset=world["prompts"],
        num_samples=8,
        precision="bf16",
        reward_fns=(world["count_a"],),
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["policy", "mean", "95%", "interval", "std", "n"]
    kl = next(line.split() for line in lines if line.startswith("kl"))
    assert kl == ["kl", "0.0000", "0.0000", "0.0000", "0.0000", "8"]
    assert len({len(line) for line in lines[:6]}) == 1


def test_a_steered_policy_samples_in_bf16(world, steered, tmp_path):
    common = {"model": steered, "dataset": world["prompts"], "num_samples": 40, "beta": 1.0}
    _, rows = run_evaluate(tmp_path, **common)
    _, rounded = run_evaluate(tmp_path, **common, precision="bf16")
    equal = [row["response"] == other["response"] for row, other in zip(rows, rounded, strict=True)]
    assert mean(equal) > 0.7


# --------------------------------------------------------------------------------------------------
# Evaluation of reward models


@torch.no_grad()
def test_pairs_against_the_plain_class(world, tmp_path):
    result, _ = run_evaluate(
        tmp_path, reward_models=(world["judge"],), pairs=world["pairs"], batch_size=2
    )
    judge = AutoModelForSequenceClassification.from_pretrained(world["judge"]).eval()
    tokenizer = build_tokenizer()
    wins = []
    for line in Path(world["pairs"]).read_text().splitlines():
        row = json.loads(line)
        scores = []
        for side in ("chosen", "rejected"):
            ids = tokenizer(row["prompt"] + row[side] + "|").input_ids
            scores.append(judge(torch.tensor([ids])).logits.item())
        wins.append(float(scores[0] > scores[1]))
    assert 0 < sum(wins) < 5
    assert set(result["metrics"]) == {"accuracy/judge", "accuracy_clear/judge"}
    expected = evaluate.estimate(wins, ["a", "a", "bc", "d", "d"])
    assert result["metrics"]["accuracy/judge"] == pytest.approx(expected)
    clear = result["metrics"]["accuracy_clear/judge"]
    assert clear["count"] == 3
    assert clear["mean"] == pytest.approx(sum(wins[2:]) / 3)
    assert result["model"] is None
    assert result["num_samples"] == 0


def test_names_of_scorers(world):
    assert evaluate.run_name(world["judge"]) == "judge"
    assert evaluate.run_name("someone/on-the-hub") == "someone/on-the-hub"
    args = evaluate.Args(
        reward_models=("x/judge", world["judge"]), reward_fns=("f.py:judge", "g:f")
    )
    names = evaluate.scorer_names(args)
    assert list(names) == ["x/judge", world["judge"], "f.py:judge", "g:f"]
    # The second and the third would have the same name.
    assert list(names.values()) == ["x/judge", world["judge"], "f.py:judge", "f"]


# --------------------------------------------------------------------------------------------------
# --run


def start(capsys, *flags):
    """What evaluate.py prints when it is started with these flags."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, flags)])
        launch(evaluate.start, tyro.cli(evaluate.Args, use_underscores=True))
    return capsys.readouterr().out


def next_command(printed):
    """The words of the command that a script prints at its end."""
    [line] = [line for line in printed.splitlines() if line.startswith("next ")]
    return shlex.split(line.removeprefix("next "))


def test_an_sft_run_is_sampled_on_the_prompts_beside_its_data(world, tmp_path, capsys):
    options = {"dataset": world["rated"], "eval_dataset": world["rated"], "num_steps": 1}
    for name, model in (("tuned", world["reference"]), ("new", tmp_path / "config")):
        if name == "new":
            GPT2Config.from_pretrained(world["policy"]).save_pretrained(model)
            build_tokenizer().save_pretrained(model)
        output_dir = str(tmp_path / name)
        sft.main(sft.Args(model=str(model), output_dir=output_dir, **options))
        args = evaluate.from_run(output_dir)
        assert args.model == f"{output_dir}/model"
        assert args.dataset == world["prompts"]
        # Random weights are no reference: they would be others.
        assert args.ref_model == (world["reference"] if name == "tuned" else None)
    flags = ["--run", tmp_path / "tuned", "--num_samples", 8, "--reward_fns", world["count_a"]]
    printed = start(capsys, *flags)
    assert "score/count_a" in printed
    assert "kl " in printed


def test_an_sft_run_without_prompts_beside_its_data_asks_for_some(world, tmp_path, capfd):
    rated = tmp_path / "elsewhere" / "rated.jsonl"
    rated.parent.mkdir()
    rated.write_text(Path(world["rated"]).read_text())
    options = {"dataset": str(rated), "eval_dataset": str(rated), "num_steps": 1}
    sft.main(sft.Args(model=world["policy"], output_dir=str(tmp_path / "run"), **options))
    with pytest.raises(SystemExit) as stop:
        start(capfd, "--run", tmp_path / "run")
    assert stop.value.code == 1
    error = capfd.readouterr().err
    assert error.startswith("error: --dataset: there are no prompts beside the data of that run")
    assert error.count("\n") == 1
    flags = ["--run", tmp_path / "run", "--dataset", world["one"], "--num_samples", 4]
    assert "kl " in start(capfd, *flags)


def test_a_run_of_the_reward_model_is_measured_on_pairs(world, tmp_path, capfd):
    options = {"model": world["judge"], "dataset": world["pairs"], "num_steps": 1}
    with_file = str(tmp_path / "with")
    without_file = str(tmp_path / "without")
    reward_model.main(
        reward_model.Args(output_dir=with_file, eval_dataset=world["pairs"], **options)
    )
    reward_model.main(reward_model.Args(output_dir=without_file, **options))
    metrics = (tmp_path / "with" / "metrics.jsonl").read_text().splitlines()
    accuracy = json.loads(metrics[-1])["eval/rm/accuracy"]
    assert f"accuracy/with           {accuracy:.4f}" in start(capfd, "--run", with_file)

    with pytest.raises(SystemExit) as stop:
        start(capfd, "--run", without_file)
    error = capfd.readouterr().err
    assert stop.value.code == 1
    assert error.startswith(f"error: --run {without_file}: its held-out rows are not in a file")
    assert error.count("\n") == 1
    assert "accuracy/without" in start(capfd, "--run", without_file, "--pairs", world["pairs"])


def test_a_run_of_ppo_is_evaluated_as_it_was_trained(world, tmp_path, capsys):
    flags = {
        "model": world["policy"],
        "reward_fn": (world["count_a"],),
        "dataset": world["prompts"],
        "query_length": 7,
        "response_length": 5,
        "temperature": 0.7,
        "stop_token": "b",
        "min_length": 2,
        "precision": "bf16",
    }
    output_dir = str(tmp_path / "run")
    sizes = {"total_episodes": 4, "batch_size": 4, "num_epochs": 1}
    ppo_rlhf.main(ppo_rlhf.Args(output_dir=output_dir, compile=False, **sizes, **flags))
    command = next_command(capsys.readouterr().out)
    assert command == ["python", "tools/evaluate.py", "--run", output_dir]
    args = evaluate.from_run(output_dir)
    assert args.model == f"{output_dir}/model"
    assert args.ref_model == world["policy"]
    assert args.reward_models == ()
    assert args.reward_fns == (world["count_a"],)
    names = ("dataset", "query_length", "response_length", "temperature")
    for name in (*names, "stop_token", "min_length", "precision"):
        assert getattr(args, name) == flags[name]
    # The same for a run of a fork.
    path = tmp_path / "run" / "args.json"
    path.write_text(path.read_text().replace('"ppo_rlhf.py"', '"my_fork.py"'))
    assert evaluate.from_run(output_dir) == args

    # A flag that is given wins, whether it is the default of evaluate.py or not.
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "main", seen.append)
        start(capsys, *command[2:], "--temperature", "1.0", "--num_samples", "8")
    assert seen == [dataclasses.replace(args, temperature=1.0, num_samples=8)]
    evaluate.main(seen[0])
    assert "kl " in capsys.readouterr().out


@pytest.mark.parametrize("has_scorer", [True, False])
def test_a_run_of_ilql_is_evaluated_as_it_evaluates_itself(world, tmp_path, capsys, has_scorer):
    flags = {"model": world["policy"], "dataset": world["rated"], "num_steps": 1}
    flags |= {"max_length": 20, "response_length": 6, "eval_samples": 4, "eval_betas": (0.0, 2.0)}
    if has_scorer:
        flags["reward_fn"] = world["count_a"]
    output_dir = str(tmp_path / "run")
    ilql_rlhf.main(ilql_rlhf.Args(output_dir=output_dir, compile=False, **flags))
    command = next_command(capsys.readouterr().out)
    assert command[:6] == ["python", "tools/evaluate.py", "--run", output_dir, "--beta", "2"]
    args = evaluate.from_run(output_dir)
    assert args.dataset == world["prompts"]
    assert (args.query_length, args.response_length) == (14, 6)
    assert args.ref_model == world["policy"]
    assert args.reward_fns == ((world["count_a"],) if has_scorer else ())
    printed = start(capsys, *command[2:6], "--num_samples", "8")
    assert "kl " in printed
    assert ("score/count_a" in printed) == has_scorer


def test_a_run_that_cannot_be_evaluated(tmp_path):
    with pytest.raises(UserError, match=r"no args\.json"):
        evaluate.from_run(str(tmp_path))
    (tmp_path / "args.json").write_text('{"script": "other.py", "args": {}}')
    with pytest.raises(UserError, match="not finished"):
        evaluate.from_run(str(tmp_path))
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"a run of other\.py, which does not sample as ppo"):
        evaluate.from_run(str(tmp_path))


# --------------------------------------------------------------------------------------------------
# Mistakes


MISTAKES = [
    ({}, "--model: name the policy"),
    ({"model": "./nowhere"}, "./nowhere: no such file or folder"),
    ({"model": "{folder}"}, "tokenizer"),
    ({"model": "{judge}"}, "a reward model, not a language model"),
    ({"model": "{policy}", "reward_models": ("{reference}",)}, "not a reward model"),
    ({"model": "{policy}", "ref_model": "{other}"}, "--ref_model {other}: its tokenizer differs"),
    (
        {"model": "{policy}", "reward_models": ("{other}",)},
        "--reward_models {other}: its tokenizer differs",
    ),
    ({"model": "{policy}", "reward_fns": ("nofile.py:f",)}, "nofile.py:f: no such file"),
    ({"model": "{policy}", "dataset": "nofile.jsonl"}, "nofile.jsonl: no such file"),
    ({"model": "{policy}", "response_length": 40}, "32 positions"),
    ({"model": "{policy}", "best_of_n": (4,)}, "needs --reward_models or --reward_fns"),
    (
        {"model": "{policy}", "best_of_n": (500,), "reward_fns": ("{count_a}",)},
        "--best_of_n 500",
    ),
    (
        {"model": "{policy}", "beta": 1.0},
        "--beta 1.0: --model must be a model folder of ilql_rlhf.py",
    ),
    ({"model": "{policy}", "min_length": -1}, "--min_length -1"),
    ({"model": "{policy}", "min_length": 2, "beta": 1.0}, "--min_length 2: does not go with"),
    ({"model": "{policy}", "stop_token": ""}, "--stop_token ''"),
    ({"model": "{policy}", "num_samples": 0}, "--num_samples 0"),
    ({"model": "{policy}", "temperature": -1.0}, "--temperature -1.0"),
    ({"model": "{policy}", "output": "{prompts}"}, "exists already"),
    ({"model": "{policy}", "samples": "{prompts}"}, "exists already"),
    ({"pairs": "{pairs}"}, "needs --reward_models"),
    ({"pairs": "{prompts}", "reward_models": ("{judge}",)}, "needs chosen+rejected"),
    ({"pairs": "{pairs}", "reward_models": ("{judge}",), "greedy": True}, "need a policy"),
    ({"pairs": "{pairs}", "reward_models": ("{judge}",), "max_length": 1}, "no row is left"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_mistakes_end_in_one_line(world, capfd, options, message):
    def fill(value):
        if isinstance(value, tuple):
            return tuple(fill(x) for x in value)
        return value.format(**world) if isinstance(value, str) else value

    options = {name: fill(value) for name, value in options.items()}
    before = Path(world["prompts"]).read_text()
    with pytest.raises(SystemExit) as stop:
        launch(evaluate.main, evaluate.Args(**{"dataset": world["prompts"], **options}))
    lines = capfd.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert stop.value.code == 1
    assert len(errors) == 1
    assert fill(message) in errors[0]
    assert Path(world["prompts"]).read_text() == before


def test_runs_as_a_script_from_the_root():
    flags = ["--model", "./nowhere", "--reward_fns", "a.py:f", "b.py:g", "--best_of_n", "4", "16"]
    command = [sys.executable, "tools/evaluate.py", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: ./nowhere: no such file or folder\n"


# --------------------------------------------------------------------------------------------------
# Curves


def write_run(folder, script="ppo_rlhf", seed=1, shift=0.0, **args):
    """A run folder of 6 steps as a script writes it, with what the tests below look at."""
    folder.mkdir(parents=True)
    args |= {"seed": seed, "output_dir": str(folder)}
    (folder / "args.json").write_text(json.dumps({"script": f"{script}.py", "args": args}))
    lines = []
    if script != "ppo_rlhf":
        lines.append({"step": 0, **evaluation_metrics(script, 0)})
    for step in range(1, 7):
        line = {"step": step, **training_metrics(script, step, shift)}
        if step % 3 == 0:
            line |= evaluation_metrics(script, step)
        lines.append(line)
    write_jsonl(folder / "metrics.jsonl", lines)
    return str(folder)


def training_metrics(script, step, shift):
    if script == "sft":
        return {"train/sft/loss": 1 / step, "train/sft/lr": 1e-3, "epoch": 1}
    if script == "reward_model":
        return {"train/rm/loss": 1 / step, "train/rm/accuracy": 0.7, "epoch": 1}
    if script == "ilql_rlhf":
        return {"loss/q": 1.0, "loss/v": 2.0, "val/q": 3.0, "val/v": 4.0, "epoch": 1}
    metrics = {"objective/scores": step + shift, "objective/kl": 0.1 * step}
    return {**metrics, "monitor/exact": 0.5, "lr": 1e-4, "episode": 8 * step}


def evaluation_metrics(script, step):
    if script == "sft":
        return {"eval/sft/loss": 2 / (step + 1)}
    if script == "reward_model":
        return {"eval/rm/loss": 2 / (step + 1), "eval/rm/accuracy": 0.5, "eval/rm/margin": 1.0}
    if script == "ilql_rlhf":
        return {"eval/score@beta=0": 0.1 * step, "eval/score@beta=2.5": 0.2 * step}
    return {}


def points(line):
    """The points of a drawn line."""
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_each_script_gets_its_usual_panels(tmp_path):
    runs = []
    for script in ("sft", "reward_model", "ppo_rlhf", "ilql_rlhf"):
        runs.append(curves.load_run(write_run(tmp_path / script[0], script)))
    figure = curves.build_figure(runs)
    assert [axes.get_title() for axes in figure.axes] == [
        "sft: loss",
        "reward_model: loss",
        "reward_model: accuracy",
        "ppo_rlhf: score",
        "ppo_rlhf: exact, watched but not trained on",
        "ppo_rlhf: KL to the reference",
        "ilql_rlhf: score at beta 0",
        "ilql_rlhf: score at beta 2.5",
        "ilql_rlhf: losses of Q and V",
        "ilql_rlhf: Q and V",
    ]
    panels = {axes.get_title(): axes for axes in figure.axes}
    loss = panels["sft: loss"]
    assert legend(loss) == ["s, train", "s, eval"]
    assert (loss.get_xlabel(), loss.get_ylabel()) == ("optimizer step", "nats per token")
    score = panels["ppo_rlhf: score"]
    assert score.get_xlabel() == "update"
    assert points(score.lines[0]) == [(step, step) for step in range(1, 7)]
    assert legend(panels["ilql_rlhf: Q and V"]) == ["i, q", "i, v"]


@pytest.mark.parametrize("x", ["step", "episode"])
def test_what_was_measured_before_the_first_step_stands_at_0(tmp_path, x):
    folders = [write_run(tmp_path / name, "sft", seed=i) for i, name in enumerate("ab")]
    runs = [curves.load_run(folder) for folder in folders]
    for mean_of_runs in (False, True):
        axes = curves.build_figure(runs, x=x, mean=mean_of_runs).axes[0]
        training, held_out = axes.lines[:2]
        assert [place for place, _ in points(training)] == [1, 2, 3, 4, 5, 6]
        assert points(held_out) == [(0, 2.0), (3, 0.5), (6, pytest.approx(2 / 7))]
        assert axes.get_xlabel() == "optimizer step"


def test_keys_patterns_labels_and_episodes(tmp_path):
    folders = [write_run(tmp_path / name, shift=i) for i, name in enumerate("ab")]
    labels = ["first", "second"]
    runs = [curves.load_run(folder, x) for folder, x in zip(folders, labels, strict=True)]
    figure = curves.build_figure(runs, ("objective/*", "lr"), x="episode")
    assert len(figure.axes) == 3
    axes = figure.axes[0]
    assert list(axes.lines[1].get_xdata()) == [8, 16, 24, 32, 40, 48]
    assert axes.get_xlabel() == "episodes"
    assert legend(axes) == labels
    assert len({line.get_color() for line in axes.lines}) == 2


def test_a_script_that_is_not_known_gets_a_panel_for_everything(tmp_path):
    run = curves.load_run(write_run(tmp_path / "fork", "my_fork"))
    titles = [axes.get_title() for axes in curves.build_figure([run]).axes]
    assert titles == [
        "my_fork: score",
        "my_fork: KL to the reference",
        "my_fork: exact, watched but not trained on",
        "my_fork: learning rate",
    ]


def test_mean_joins_runs_that_differ_in_their_seed_alone(tmp_path):
    folders = [write_run(tmp_path / f"{i}", seed=i, shift=i, kl_coef=0.1) for i in range(3)]
    folders.append(write_run(tmp_path / "other", seed=0, kl_coef=0.0))
    runs = [curves.load_run(folder) for folder in folders]
    axes = curves.build_figure(runs, ("objective/scores",), mean=True).axes[0]
    assert [line.get_label() for line in axes.lines] == ["0, 3 runs", "other"]
    assert list(axes.lines[0].get_ydata()) == [2, 3, 4, 5, 6, 7]
    band = {tuple(point) for point in axes.collections[0].get_paths()[0].vertices}
    assert band >= {(1, 1), (1, 3), (6, 6), (6, 8)}
    labelled = [curves.load_run(folder, "all") for folder in folders]
    options = {"mean": True, "by_label": True}
    axes = curves.build_figure(labelled, ("objective/scores",), **options).axes[0]
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
    ("options", "message"),
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
    assert stop.value.code == 1
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "p" / "new.png").exists()


# --------------------------------------------------------------------------------------------------
# Comparison


def evaluation(path, judge, kl, std=2.0, best_of_n=None, **changed):
    """A file as evaluate.py writes it, with the numbers that a comparison reads."""
    args = {"reward_models": ["a", "b"], "dataset": "p", "temperature": 0.7, "seed": 1}
    args |= {"response_length": 4, "num_samples": 20}
    args["best_of_n"] = [int(n) for n in best_of_n or {}]
    means = {"score/b": judge, "kl": kl, "ref_perplexity": 9.0, "length": 3.0}
    metrics = {}
    for name, value in means.items():
        metrics[name] = {"mean": value, "low": value - 1, "high": value + 1, "std": std}
    record = {"args": {**args, **changed}, "metrics": metrics, "best_of_n": best_of_n or {}}
    path.write_text(json.dumps(record))
    return str(path)


def comparison_flags(folder, **changed):
    """The flags of a comparison of small files."""
    best = {"score/b": {"mean": 2.5, "low": 2.0, "high": 3.0}}
    best["kl_bound"] = math.log(16) - 15 / 16
    run = folder / "ppo_run"
    run.mkdir()
    (run / "args.json").write_text(json.dumps({"args": {"batch_size": 32}}))
    line = {"val/sequence_lengths": 10.0}
    line |= {"time/rollout": 1.0, "time/score": 2.0, "time/update": 4.0}
    write_jsonl(run / "metrics.jsonl", [line, line])
    steered = []
    for beta in (4.0, 1.0):
        steered.append(evaluation(folder / f"i{beta}.json", 0.5 + beta, beta, beta=beta))
    flags = {
        "sft": evaluation(folder / "sft.json", 0.5, 0.0),
        "best_of_n": evaluation(
            folder / "best.json", 0.4, 0.0, best_of_n={"16": best}, num_samples=320
        ),
        "ilql": tuple(steered),
        "ppo": evaluation(folder / "ppo.json", 4.5, 12.0, std=1.0),
        "ppo_run": str(run),
        "judge": "b",
        "reward_model_seconds": 100.0,
        "ilql_seconds": 50.0,
        "ilql_tokens": 7.0,
        "output": str(folder / "comparison"),
    }
    return {**flags, **changed}


def test_a_comparison_by_hand(tmp_path, capsys):
    comparison.main(comparison.Args(**comparison_flags(tmp_path)))
    rows = json.loads((tmp_path / "comparison" / "comparison.json").read_text())["rows"]
    names = ["SFT", "best of 16", "ILQL, beta 1", "ILQL, beta 4", "PPO"]
    assert [row["name"] for row in rows] == names
    # In standard deviations of the SFT policy's scores.
    assert [row["gain"] for row in rows] == [0.0, 1.0, 0.5, 2.0, 2.0]
    kl = [0.0, math.log(16) - 15 / 16, 1.0, 4.0, 12.0]
    assert [row["kl"]["mean"] for row in rows] == pytest.approx(kl)
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
    elif name == "judge":
        flags["judge"] = "c"
    else:
        flags["output"] = str(tmp_path)
    with pytest.raises(SystemExit):
        launch(comparison.main, comparison.Args(**flags))
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# --------------------------------------------------------------------------------------------------
# Rated samples


def rated_files(tmp_path):
    """The flags of rated_samples.py for small files: three ratings, and four samples."""
    rated = [{"prompt": "a", "completion": " b", "reward": reward} for reward in (1.0, 2.0, 6.0)]
    samples = []
    for i in range(4):
        scores = {"a": 10.0 * i, "b": 0.0}
        sample = {"query": f"p{i}", "response": f" r{i}", "scores": scores, "has_eos": i != 2}
        samples.append(sample)
    return {
        "rated": write_jsonl(tmp_path / "rated.jsonl", rated),
        "samples": (write_jsonl(tmp_path / "samples.jsonl", samples),),
        "output": str(tmp_path / "both.jsonl"),
    }


def test_rated_samples_stand_beside_the_ratings_on_one_scale(tmp_path, capsys):
    files = rated_files(tmp_path)
    rated_samples.main(rated_samples.Args(**files, scorer="a"))
    rows = [json.loads(line) for line in Path(files["output"]).read_text().splitlines()]
    texts = [(row["prompt"], row["completion"]) for row in rows[3:]]
    assert texts == [("p0", " r0"), ("p1", " r1"), ("p3", " r3")]
    for part, values in ((rows[:3], (1.0, 2.0, 6.0)), (rows[3:], (0.0, 10.0, 30.0))):
        centre = mean(values)
        std = mean((x - centre) ** 2 for x in values) ** 0.5
        expected = [(x - centre) / std for x in values]
        assert [row["reward"] for row in part] == pytest.approx(expected)
    printed = capsys.readouterr().out
    assert "3 rated rows and 3 samples" in printed
    assert "left out: 1 samples" in printed


@pytest.mark.parametrize(("scorer", "words"), [("c", "has a, b"), ("b", "no scale")])
def test_rated_samples_refuse_what_has_no_score(scorer, words, tmp_path):
    files = rated_files(tmp_path)
    with pytest.raises(UserError, match=words):
        rated_samples.main(rated_samples.Args(**files, scorer=scorer))
    assert not Path(files["output"]).exists()
    Path(files["output"]).write_text("kept")
    with pytest.raises(UserError, match="exists already"):
        rated_samples.main(rated_samples.Args(**files, scorer="a"))
