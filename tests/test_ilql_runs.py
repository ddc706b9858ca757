"""Whole runs of ilql_rlhf.py on tiny models: what a step does, what a run leaves and refuses.

Most runs call `main` in this process, because a start costs seconds; one is a real subprocess. At
the end a world that is solved by hand is learned.
"""

import itertools
import json
import math
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import ilql_rlhf
import utils
from conftest import (
    GROUPED,
    SMALL,
    assert_same_gradients,
    build_tokenizer,
    gradients_of,
    read_jsonl,
    refuses,
    write_jsonl,
)
from test_ilql_rlhf import EOS, TEMPLATE, turns

CPU = torch.device("cpu")
REWARDS = """
def share_of_a(prompts, responses, bonus=None, **columns):
    assert len(prompts) == len(responses)
    assert bonus is None or bonus == [len(prompt) for prompt in prompts]
    return [response.count("a") / 6 for response in responses]

def too_few(prompts, responses, **columns):
    return [0.0] * (len(responses) - 1)

def not_a_number(prompts, responses, **columns):
    return [float("nan")] * len(responses)

def nothing(prompts, responses, **columns):
    return [None] * len(responses)
"""
COMPLETIONS = ["a", "bc", "aab", "dab", "ca", "aaaa", "bb", "cdcd", "ab", "b", "ac", "daa"]
REWARDS_OF_ROWS = [text.count("a") / 4 - 0.3 for text in COMPLETIONS]
PROMPTS = ["x", "yy", "zzz"]
KEYS = {
    "step",
    "epoch",
    "lr",
    "loss/q",
    "loss/v",
    "loss/cql",
    "loss/awac",
    "val/q",
    "val/v",
    "val/advantage",
    "val/awac_weight",
    "optim/grad_norm",
}
SCORES = {"eval/score@beta=0", "eval/score@beta=2"}


@pytest.fixture(scope="module")
def settings(tmp_path_factory, gpt2_folder):
    """`settings(output_dir, **changes)`: flags of a run of a second, three steps over 12 rows.

    `settings.folder` holds its files.
    """
    folder = tmp_path_factory.mktemp("task")
    rows = []
    for i, text in enumerate(COMPLETIONS):
        prompt = "xyz"[i % 3] * (1 + i % 2)
        rows.append({"prompt": prompt, "completion": text, "reward": REWARDS_OF_ROWS[i]})
    dataset = write_jsonl(folder / "rated.jsonl", rows)
    prompts = [{"prompt": prompt, "bonus": len(prompt)} for prompt in PROMPTS]
    write_jsonl(folder / "prompts.jsonl", prompts)
    (folder / "rewards.py").write_text(REWARDS)

    def flags(output_dir, **changes):
        options = {
            "model": gpt2_folder,
            "dataset": dataset,
            "reward_fn": f"{folder}/rewards.py:share_of_a",
            "output_dir": str(output_dir),
            "num_epochs": 1,
            "batch_size": 4,
            "micro_batch_size": 4,
            "max_length": 40,
            "beta": 0.5,
            "lr": 1e-3,
            "eval_betas": (0.0, 2.0),
            "eval_samples": 6,
            "response_length": 5,
            "log_every": 1,
            "precision": "fp32",
            "compile": False,
        }
        return options | changes

    flags.folder = folder
    return flags


def run(flags):
    """A run in this process; returns its folder."""
    ilql_rlhf.main(ilql_rlhf.Args(**flags))
    return Path(flags["output_dir"])


def lines(folder, name="metrics.jsonl"):
    """The objects of a .jsonl file; NaN and Infinity are no JSON and no numbers to report."""

    def refuse(constant):
        raise AssertionError(f"{constant} in {name}")

    text = (Path(folder) / name).read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def state(folder, step):
    return torch.load(Path(folder) / "checkpoints" / f"step_{step:06d}.pt", weights_only=True)


def weights(folder):
    """{file: {name: tensor}} of a finished run."""
    names = ("model.safetensors", "ilql_heads.safetensors")
    return {name: load_file(Path(folder) / "model" / name) for name in names}


def same(first, second):
    """Whether two nested dicts hold the same tensors, to the bit."""
    if isinstance(first, dict):
        same_keys = first.keys() == second.keys()
        return same_keys and all(same(first[key], second[key]) for key in first)
    return torch.equal(first, second)


# --------------------------------------------------------------------------------------------------
# One step against the definitions


def chat_folder(folder, gpt2_folder):
    """The tiny GPT-2 with a chat template."""
    shutil.copytree(gpt2_folder, folder)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


DIALOGUES = [
    {"messages": turns("ab", "cd", "e", "f"), "reward": [0.5, -1.5]},
    {"messages": turns("g", "hij", "kl", "m", "n", "op"), "reward": [1.0, 0.25, 2.0]},
    {"messages": turns("q", "r"), "reward": [-0.75]},
]
TEXTS = ["UabAcd|UeAf|", "UgAhij|UklAm|UnAop|", "UqAr|"]
SAID = ["....aaa...aa", "...aaaa....aa...aaa", "...aa"]  # "a" where the agent says the token.


def losses_by_hand(ilql, args):
    """{metric: 0-d tensor} of all dialogues, one action at a time, from rows without padding."""
    vocabulary = build_tokenizer().get_vocab()
    names = ("loss/q", "loss/v", "loss/cql", "loss/awac")
    names += ("val/q", "val/v", "val/advantage", "val/awac_weight")
    sums = dict.fromkeys(names, 0.0)
    count = 0
    for text, said, row in zip(TEXTS, SAID, DIALOGUES, strict=True):
        ids = [vocabulary[letter] for letter in text]
        rewards = iter(row["reward"])
        output = ilql.policy(torch.tensor([ids]), output_hidden_states=True)
        h = output.hidden_states[-1][0]
        logits = output.logits[0]
        v = ilql.v(h)[:, 0]
        states = [i for i in range(len(ids) - 1) if said[i + 1] == "a"]
        for j, i in enumerate(states):
            action = ids[i + 1]
            qs = [q(h[i]) for q in ilql.qs]
            target = min(q(h[i])[action].item() for q in ilql.target_qs)
            backup = next(rewards) if text[i + 1] == "|" else 0.0
            if i != states[-1]:
                backup += args.gamma * v[states[j + 1]].item()
            sums["loss/q"] += sum((backup - q[action]) ** 2 for q in qs)
            v_weight = args.tau if target >= v[i] else 1 - args.tau
            sums["loss/v"] += v_weight * (target - v[i]) ** 2
            sums["loss/cql"] += sum(q.logsumexp(0) - q[action] for q in qs)
            awac_weight = math.exp(args.beta * (target - v[i].item()))
            sums["loss/awac"] -= awac_weight * torch.log_softmax(logits[i], 0)[action]
            sums["val/q"] += torch.tensor(target)
            sums["val/v"] += v[i]
            sums["val/advantage"] += target - v[i]
            sums["val/awac_weight"] += torch.tensor(awac_weight)
            count += 1
    return {name: x / count for name, x in sums.items()}


def recorded(flags, rank=None):
    """(gradients of each optimizer step, the module's state before the first) of a run.

    The run starts from values and Qs that are not 0, and from targets unlike the Qs. It is alone,
    or one of two connected ranks.
    """
    states = []

    class Watched(ilql_rlhf.ILQL):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            for part in (self.v, self.qs, self.target_qs):
                for parameter in part.parameters():
                    generator = torch.Generator().manual_seed(len(states))
                    parameter.data += torch.randn(parameter.shape, generator=generator) / 3
                    states.append(None)
            states.append({name: x.clone() for name, x in self.state_dict().items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ilql_rlhf, "ILQL", Watched)
        history, _ = gradients_of(rank, "ilql_rlhf", flags)
    return history, states[-1]


def gradients_on_rank(rank, flags):
    """For two connected ranks: what `recorded` says of the gradients."""
    return recorded(flags, rank)[0]


def test_a_step_is_the_gradient_of_the_definitions(settings, tmp_path, gpt2_folder):
    """Dialogues of several turns: every number and every gradient of the first step."""
    flags = settings(
        tmp_path / "run",
        model=chat_folder(tmp_path / "model", gpt2_folder),
        dataset=write_jsonl(tmp_path / "rows.jsonl", DIALOGUES),
        reward_fn=None,
        batch_size=3,
        micro_batch_size=3,
        max_grad_norm=0.0,
        tau=0.7,
        gamma=0.9,
        beta=0.8,
        cql_weight=0.3,
        awac_weight=0.6,
    )
    history, start = recorded(flags)
    policy, _ = utils.load_pretrained(AutoModelForCausalLM, gpt2_folder)
    ilql = ilql_rlhf.ILQL(policy, 2)
    ilql.load_state_dict(start)
    expected = losses_by_hand(ilql, ilql_rlhf.Args(**flags))
    [logged] = lines(tmp_path / "run")
    for name, value in expected.items():
        assert logged[name] == pytest.approx(value.item(), rel=1e-4), name
    total = expected["loss/q"] + expected["loss/v"]
    total = total + 0.3 * expected["loss/cql"] + 0.6 * expected["loss/awac"]
    parameters = [p for p in ilql.parameters() if p.requires_grad]
    by_hand = [gradient.numpy() for gradient in torch.autograd.grad(total, parameters)]
    assert_same_gradients(history, [by_hand], tolerance=1e-4)
    norm = math.sqrt(sum((gradient**2).sum() for gradient in by_hand))
    assert logged["optim/grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_micro_batches_do_not_change_a_gradient(settings, tmp_path):
    """Nor what is logged: rows and actions of unequal number are in each micro-batch."""
    histories = {}
    for size in (4, 1):
        flags = settings(tmp_path / f"run{size}", micro_batch_size=size, reward_fn=None)
        histories[size], _ = recorded(flags | {"max_grad_norm": 0.0})
    assert len(histories[4]) == 3
    assert_same_gradients(histories[1], histories[4])
    pairs = zip(lines(tmp_path / "run1"), lines(tmp_path / "run4"), strict=True)
    for line, other in pairs:
        assert line == pytest.approx(other, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="uneven shares"),
        # The untied head of a Llama gets no gradient, which ranks that average must survive.
        pytest.param({"awac_weight": 0.0, "kind": "llama"}, id="a head without a loss"),
        pytest.param({"policy_lr_scale": 0.0}, id="a policy that stays"),
        pytest.param({"q_rows": "embeddings"}, id="embeddings"),
    ],
)
def test_ranks_do_not_change_a_gradient(changes, settings, tmp_path, on_two_ranks, request):
    """In the last batch one rank has no row."""
    rows = read_jsonl(settings.folder / "rated.jsonl")[:9]
    changes = {
        "dataset": write_jsonl(tmp_path / "rows.jsonl", rows),
        "max_grad_norm": 0.0,
        "reward_fn": None,
        "eval_samples": 2,
        **changes,
    }
    kind = changes.pop("kind", "gpt2")
    changes["model"] = request.getfixturevalue(f"{kind}_folder")
    alone, _ = recorded(settings(tmp_path / "alone", **changes))
    assert len(alone) == 3
    flags = settings(tmp_path / "both", **changes, micro_batch_size=1)
    for history in on_two_ranks(gradients_on_rank, flags):
        assert_same_gradients(history, alone)
    for line, other in zip(lines(tmp_path / "both"), lines(tmp_path / "alone"), strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.0])
def test_the_policy_learns_at_its_own_rate(scale, settings, tmp_path, gpt2_folder):
    """Adam's first step moves every weight that has a gradient by the learning rate."""
    flags = settings(tmp_path / "run", batch_size=12, policy_lr_scale=scale, reward_fn=None)
    folder = run(flags | {"lr": 1e-2, "beta": 0.0})
    start = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    ilql = ilql_rlhf.load_ilql(str(folder / "model"))
    moved = []
    for after, before in zip(ilql.policy.parameters(), start.parameters(), strict=True):
        moved.append((after - before).abs().max().item())
    assert max(moved) == pytest.approx(1e-2 * scale, rel=1e-3)
    assert ilql.qs[0][2].bias.abs().max().item() == pytest.approx(1e-2, rel=1e-3)
    [metrics] = lines(folder)
    assert metrics["lr"] == 1e-2


def test_targets_follow_every_optimizer_step(settings, tmp_path):
    folder = run(settings(tmp_path / "run", save_every=1, alpha=0.3, reward_fn=None))
    states = [state(folder, step)["model"] for step in (1, 2, 3)]
    names = [name for name in states[0] if name.startswith("target_qs.")]
    assert len(names) == 8
    for before, after in itertools.pairwise(states):
        for name in names:
            online = after[name.removeprefix("target_")]
            torch.testing.assert_close(after[name], 0.3 * online + 0.7 * before[name])
            assert not torch.equal(after[name], before[name])


def test_the_learning_rate_falls_from_lr_to_one_last_step(settings, tmp_path):
    """--num_steps counts the steps whatever the epochs; the order of the rows is another each."""
    folder = run(settings(tmp_path / "run", num_steps=5, reward_fn=None))
    metrics = lines(folder)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5]
    assert [line["epoch"] for line in metrics] == [1, 1, 1, 2, 2]
    rates = [1e-3, 8e-4, 6e-4, 4e-4, 2e-4]
    assert [line["lr"] for line in metrics] == pytest.approx(rates)


def test_max_rows_makes_an_epoch_shorter(settings, tmp_path):
    folder = run(settings(tmp_path / "run", num_epochs=2, max_rows=5, reward_fn=None))
    assert [line["epoch"] for line in lines(folder)] == [1, 1, 2, 2]


def test_gradients_are_scaled_down_to_max_grad_norm(settings, tmp_path):
    """The norm is over all parameters, and the one before scaling is logged."""
    norms = {}
    for limit in (0.0, 1e-3, 1e3):
        flags = settings(tmp_path / f"run{limit}", max_grad_norm=limit, lr=1.0, reward_fn=None)
        history, _ = recorded(flags | {"num_steps": 1})
        [line] = lines(tmp_path / f"run{limit}")
        norm = math.sqrt(sum((gradient**2).sum() for gradient in history[0]))
        norms[limit] = (norm, line["optim/grad_norm"])
    whole = norms[0.0][1]
    assert norms[0.0] == pytest.approx((whole, whole))
    assert norms[1e-3] == pytest.approx((1e-3, whole), rel=1e-3)
    assert norms[1e3] == pytest.approx((whole, whole))


# --------------------------------------------------------------------------------------------------
# Evaluation


def watch_scoring(monkeypatch):
    """[(rows, texts, scores)] of every call of a reward function."""
    calls = []
    call_reward_fn = utils.call_reward_fn

    def watched(function, rows, texts, device):
        scores = call_reward_fn(function, rows, texts, device)
        calls.append((list(rows), list(texts), scores.tolist()))
        return scores

    monkeypatch.setattr(utils, "call_reward_fn", watched)
    return calls


def test_what_is_sampled_and_scored(settings, tmp_path, monkeypatch):
    """The same prompts, evenly, and the same uniforms at each beta; others at each evaluation."""
    calls = watch_scoring(monkeypatch)
    flags = settings(tmp_path / "run", lr=0.0, eval_samples=33, num_steps=2, eval_every=1)
    folder = run(flags | {"policy_lr_scale": 0.0})
    assert len(calls) == 6  # Before the first of two steps and after each, at two betas.
    for rows, _, _ in calls:
        assert Counter(row["prompt"] for row in rows) == dict.fromkeys(PROMPTS, 11)
        assert rows == calls[0][0]
    texts = [texts for _, texts, _ in calls]
    # Nothing was learned, and values and Qs start at 0: every beta samples the same.
    assert texts[0] == texts[1]
    assert texts[2] == texts[3]
    assert texts[0] != texts[2] != texts[4] != texts[0]
    samples = lines(folder, "samples.jsonl")
    for i, (step, beta) in enumerate(itertools.product((0, 1, 2), (0, 2))):
        rows, texts, scores = calls[i]
        metrics = lines(folder)[step]
        assert metrics[f"eval/score@beta={beta}"] == pytest.approx(sum(scores) / 33)
        written = [row for row in samples if (row["step"], row["beta"]) == (step, beta)]
        assert [row["query"] for row in written] == [row["prompt"] for row in rows[:10]]
        assert [row["response"] for row in written] == texts[:10]
        assert [row["score"] for row in written] == pytest.approx(scores[:10])
    assert samples[0].keys() == {"step", "beta", "query", "response", "score"}


def test_the_samples_are_those_of_the_model_of_the_moment(settings, tmp_path, tokenizer):
    """Drawn again, from the saved model, with the prompts and uniforms of the last evaluation."""
    flags = settings(tmp_path / "run", lr=0.03, num_steps=2, eval_samples=9)
    folder = run(flags)
    ilql = ilql_rlhf.load_ilql(str(folder / "model"))
    samples = [row for row in lines(folder, "samples.jsonl") if row["step"] == 2]
    uniforms = torch.rand(9, 5, generator=utils.seeded(1, "samples", 2))
    written = {}
    for beta in (0.0, 2.0):
        rows = [row for row in samples if row["beta"] == beta]
        queries = [tokenizer(row["query"]).input_ids for row in rows]
        responses = ilql_rlhf.generate_steered(
            ilql,
            *utils.left_pad(queries, 3, 0, CPU),
            uniforms,
            beta,
            stop_ids=[EOS],
            pad_id=0,
            allowed=torch.arange(31) > 0,
        )
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        written[beta] = [row["response"] for row in rows]
        assert written[beta] == texts
    assert written[0.0] != written[2.0]


def scores_on_rank(rank, flags):
    """The scores of a run's last evaluation, alone or on one of two connected ranks."""
    ranks = utils.Ranks(rank or 0, 1 if rank is None else 2, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "init_ranks", lambda timeout_minutes: ranks)
        folder = run(flags)
    return {key: x for key, x in lines(folder)[-1].items() if key.startswith("eval/")}


def test_evaluation_on_two_ranks_is_that_of_one(settings, tmp_path, on_two_ranks):
    flags = settings(tmp_path / "one", lr=0.03, eval_samples=60, eval_every=1000)
    alone = scores_on_rank(None, flags)
    assert alone.keys() == SCORES
    assert 0 not in alone.values()
    both = on_two_ranks(scores_on_rank, flags | {"output_dir": str(tmp_path / "two")})
    assert both[0] == pytest.approx(alone)


def test_a_reward_model_scores_the_samples(settings, tmp_path, llama_rm_folder):
    """By what the library says of the text alone, minus the model's score_mean."""
    folder = run(settings(tmp_path / "run", reward_fn=None, reward_model=llama_rm_folder))
    model = AutoModelForSequenceClassification.from_pretrained(llama_rm_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(llama_rm_folder)
    samples = lines(folder, "samples.jsonl")
    assert len(samples) == 24
    for row in samples:
        ids = tokenizer(row["query"] + row["response"]).input_ids
        if len(row["response"]) < 5:
            ids.append(tokenizer.eos_token_id)
        score = model(torch.tensor([ids])).logits.item() - 0.75
        assert row["score"] == pytest.approx(score, abs=1e-4)
    last = [row["score"] for row in samples if (row["step"], row["beta"]) == (3, 2.0)]
    assert lines(folder)[-1]["eval/score@beta=2"] == pytest.approx(sum(last) / 6)


def test_steering_learns_the_better_letter(settings, tmp_path):
    """a is worth 1 and b nothing: pi_beta says both, the steered policy says a."""
    rows = [
        {"prompt": "x", "completion": text, "reward": float(text == "a")}
        for text in ("a", "b", "b", "b")
    ]
    flags = settings(
        tmp_path / "run",
        dataset=write_jsonl(tmp_path / "rows.jsonl", rows),
        eval_dataset=write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "x"}]),
        lr=5e-3,
        num_epochs=60,
        beta=0.0,
        eval_samples=60,
        eval_betas=(0.0, 50.0),
        eval_every=1000,
    )
    last = lines(run(flags))[-1]
    assert last["eval/score@beta=50"] > 0.95 / 6
    assert last["eval/score@beta=0"] < 0.5 / 6


@pytest.mark.parametrize("seed", [2, 3])
def test_drawn_prompts_may_all_be_shorter_than_the_longest(seed, settings, tmp_path, tokenizer):
    """A Bloom adds its position bias to the key mask, which must be as wide as the cache."""
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    model = BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=2, n_head=2, **ids))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "bloom")
    flags = settings(tmp_path / "run", model=str(tmp_path / "bloom"), eval_samples=1, seed=seed)
    samples = lines(run(flags), "samples.jsonl")
    assert max(len(row["query"]) for row in samples) < 3  # The longest was not drawn.


# --------------------------------------------------------------------------------------------------
# What a run leaves behind


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return run(settings(folder, num_epochs=2, save_every=1, eval_every=2))


def test_metrics_are_the_documented_ones(finished):
    metrics = lines(finished)
    assert [line["step"] for line in metrics] == list(range(7))
    assert metrics[0].keys() == {"step"} | SCORES  # Before the first step there is no loss.
    for line in metrics[1:]:
        assert line.keys() == (KEYS | SCORES if line["step"] % 2 == 0 else KEYS)
        assert line["lr"] == pytest.approx(1e-3 * (1 - (line["step"] - 1) / 6))
        assert line["loss/cql"] >= 0
        advantage = line["val/q"] - line["val/v"]
        assert line["val/advantage"] == pytest.approx(advantage, abs=1e-6)
    # Before the first step values and Qs are 0, and Q is uniform over the 31 ids.
    assert metrics[1]["val/q"] == metrics[1]["val/v"] == metrics[1]["loss/v"] == 0
    assert metrics[1]["loss/cql"] == pytest.approx(2 * math.log(31))
    assert metrics[1]["val/awac_weight"] == 1


def test_metrics_of_several_steps_are_means_over_their_actions(settings, tmp_path):
    changes = {"lr": 0.0, "alpha": 1.0, "reward_fn": None}
    whole = {"batch_size": 12, "micro_batch_size": 5}
    each = lines(run(settings(tmp_path / "each", **changes)))
    [whole] = lines(run(settings(tmp_path / "whole", **changes, **whole)))
    [joined] = lines(run(settings(tmp_path / "joined", **changes, log_every=3)))
    assert len(each) == 3
    for name in KEYS - {"step", "optim/grad_norm", "lr"}:
        assert joined[name] == pytest.approx(whole[name], rel=1e-5), name


def test_the_saved_folder_opens_anywhere_and_comes_back_whole(finished):
    model, info = AutoModelForCausalLM.from_pretrained(
        finished / "model", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    ilql = ilql_rlhf.load_ilql(str(finished / "model"))
    assert same(dict(ilql.state_dict()), dict(state(finished, 6)["model"]))
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(model.eval()(ids).logits, ilql.policy(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "|")
    record = json.loads((finished / "args.json").read_text())
    assert record["script"] == "ilql_rlhf.py"
    assert record["args"]["tau"] == 0.8


def interrupted(finished, folder, step):
    """A copy of a run as it is if it was killed after `step`, while it wrote a line.

    Lines of later steps are there, the model is not.
    """
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("model"))
    for path in (folder / "checkpoints").iterdir():
        if int(path.stem.removeprefix("step_")) > step:
            path.rename(f"{path}.tmp")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss/q"')
    return folder


@pytest.mark.parametrize("step", [1, 4])
def test_a_resumed_run_ends_in_the_same_bits(step, finished, tmp_path):
    folder = interrupted(finished, tmp_path / "run", step)
    ilql_rlhf.main(ilql_rlhf.Args(resume=str(folder), eval_betas=(0.0, 2.0)))
    assert lines(folder) == lines(finished)
    assert lines(folder, "samples.jsonl") == lines(finished, "samples.jsonl")
    assert same(weights(folder), weights(finished))
    ours = state(folder, 6)
    theirs = state(finished, 6)
    assert same(dict(ours["model"]), dict(theirs["model"]))
    assert same(ours["optimizer"]["state"], theirs["optimizer"]["state"])


def test_a_run_goes_on_with_its_own_betas(finished, tmp_path):
    folder = interrupted(finished, tmp_path / "run", 1)
    with pytest.raises(utils.UserError, match="--eval_betas differs"):
        ilql_rlhf.main(ilql_rlhf.Args(resume=str(folder), eval_betas=(9.0,)))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(settings, finished, tmp_path):
    flags = settings(tmp_path / "again", num_epochs=2, eval_every=2)
    again = run(flags)
    assert lines(again) == lines(finished)
    assert same(weights(again), weights(finished))
    other = run(flags | {"output_dir": str(tmp_path / "other"), "seed": 2})
    assert lines(other)[1] != lines(finished)[1]


def test_one_q_and_normalised_rewards(settings, tmp_path):
    flags = settings(tmp_path / "run", num_qs=1, normalize_rewards=True, reward_fn=None)
    ilql = ilql_rlhf.load_ilql(str(run(flags) / "model"))
    rewards = torch.tensor(REWARDS_OF_ROWS, dtype=torch.float64)
    assert len(ilql.qs) == len(ilql.target_qs) == 1
    mean = rewards.mean().item()
    std = rewards.std(correction=0).item()
    expected = {"num_qs": 1, "q_rows": "ids", "reward_mean": mean, "reward_std": std}
    assert ilql.config == pytest.approx(expected)


@pytest.mark.parametrize("changes", [{}, {"cql_weight": 0.0, "policy_lr_scale": 0.0}])
def test_embeddings_as_rows_of_q_in_a_run(changes, settings, tmp_path):
    """They are trained, saved and loaded again, and steer; resuming finds them as they were."""
    flags = {"q_rows": "embeddings", "save_every": 1, **changes}
    folder = run(settings(tmp_path / "run", **flags))
    assert lines(folder)[-1].keys() == KEYS | SCORES
    ilql = ilql_rlhf.load_ilql(str(folder / "model"))
    assert ilql.config["q_rows"] == "embeddings"
    assert ilql.qs[0].network[2].weight.any()
    assert ilql.hidden_mean.any()
    assert (ilql.hidden_std > 0).all()
    again = interrupted(folder, tmp_path / "again", 1)
    ilql_rlhf.main(ilql_rlhf.Args(resume=str(again)))
    assert same(dict(state(again, 3)["model"]), dict(state(folder, 3)["model"]))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_bf16_is_for_the_language_model_alone(kind, settings, tmp_path, monkeypatch, request):
    """In training under autocast, in sampling in the weights of the copy."""
    seen = {"training": set(), "sampling": set()}

    class Watched(ilql_rlhf.ILQL):
        def values(self, hidden):
            values = super().values(hidden)
            found = {x.dtype for x in (*values["qs"], *values["target_qs"], values["vs"])}
            heads = {x.dtype for x in (*self.v.parameters(), *self.target_qs.parameters())}
            policy = {x.dtype for x in self.policy.parameters()}
            phase = "training" if self.v[0].weight.requires_grad else "sampling"
            seen[phase].add((frozenset(found | heads), frozenset(policy)))
            return values

        def forward(self, input_ids, states):
            output = super().forward(input_ids, states)
            assert output["logits"].dtype == torch.bfloat16
            return output

    monkeypatch.setattr(ilql_rlhf, "ILQL", Watched)
    model = request.getfixturevalue(f"{kind}_folder")
    folder = run(settings(tmp_path / "run", model=model, precision="bf16", save_every=3))
    fp32 = frozenset({torch.float32})
    assert seen["training"] == {(fp32, fp32)}
    assert seen["sampling"] == {(fp32, frozenset({torch.bfloat16}))}
    assert lines(folder)[-1].keys() == KEYS | SCORES
    assert {x.dtype for x in state(folder, 3)["model"].values()} == {torch.float32}
    saved = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
    assert saved.dtype == torch.float32


def test_bf16_is_close_to_fp32(settings, tmp_path):
    losses = []
    for precision in ("fp32", "bf16"):
        flags = settings(tmp_path / precision, precision=precision, reward_fn=None)
        losses.append(lines(run(flags))[-1])
    exact, coarse = losses
    assert coarse != exact
    for name in ("loss/q", "loss/cql", "loss/awac"):
        assert coarse[name] == pytest.approx(exact[name], rel=0.03)


def test_a_compiled_decoding_step_samples_the_same_tokens(gpt2_folder):
    """One graph for all betas: no recompilation once it is there."""
    policy, _ = utils.load_pretrained(AutoModelForCausalLM, gpt2_folder)
    ilql = ilql_rlhf.ILQL(policy, 2).requires_grad_(False).eval()
    for part in (ilql.v, ilql.target_qs):
        for parameter in part.parameters():
            parameter.data.normal_()
    step = torch.compile(ilql_rlhf.steered_decode_step, backend="aot_eager", fullgraph=True)
    queries, query_mask = utils.left_pad([[5], [6, 7, 8]], 3, 0, CPU)
    cache = utils.static_cache(policy.config, 3 + 6)
    sampling = {"stop_ids": [EOS], "pad_id": 0, "allowed": torch.arange(31) > 0, "cache": cache}
    responses = []
    for seed, beta in [(9, 0.0), (10, 2.0), (11, 7.0)]:
        uniforms = torch.rand(2, 6, generator=torch.Generator().manual_seed(seed))
        inputs = (ilql, queries, query_mask, uniforms, beta)
        with torch.compiler.set_stance("default" if seed == 9 else "fail_on_recompile"):
            compiled = ilql_rlhf.generate_steered(*inputs, **sampling, decode_fn=step)
        assert torch.equal(compiled, ilql_rlhf.generate_steered(*inputs, **sampling))
        responses.append(compiled)
    assert not torch.equal(responses[0], responses[1])


# --------------------------------------------------------------------------------------------------
# Mistakes


def data(*rows):
    return lambda tmp_path: {"dataset": write_jsonl(tmp_path / "bad.jsonl", rows)}


def prompts(*rows):
    return lambda tmp_path: {"eval_dataset": write_jsonl(tmp_path / "p.jsonl", rows)}


def flags(**changes):
    return lambda tmp_path: changes


GOOD = {"prompt": "a", "completion": "b", "reward": 1.0}
MISTAKES = {
    "no data set": (flags(dataset="./nowhere.jsonl"), "nowhere.jsonl: no such file"),
    "no model": (flags(model="./nowhere"), "nowhere: no such file or folder"),
    "no column": (
        data({"prompt": "a", "answer": "b"}),
        r"bad.jsonl: needs prompt\+completion or messages; it has prompt, answer",
    ),
    "no reward": (
        data({"prompt": "a", "completion": "b"}),
        "bad.jsonl: needs the column reward; it has prompt, completion",
    ),
    "a reward is missing": (
        data(GOOD, GOOD | {"reward": None}),
        "bad.jsonl: row 2: reward is None",
    ),
    "no template": (
        data({"messages": turns("a", "b"), "reward": 1.0}),
        "bad.jsonl: row 1: .*templ",
    ),
    "all too long": (
        flags(max_length=2, response_length=1),
        r"rated.jsonl: no row is left: all 12 have over 2 tokens \(--max_length\)",
    ),
    "all prompts too long": (
        lambda tmp_path: prompts({"prompt": "abcdef"})(tmp_path) | {"max_length": 10},
        r"p.jsonl: no row is left: all 1 have over 5 tokens \(--max_length\)",
    ),
    "tau": (flags(tau=0.0), "--tau 0.0: must be above 0"),
    "gamma": (flags(gamma=1.5), "--gamma 1.5: must be at most 1"),
    "alpha": (flags(alpha=-0.1), "--alpha -0.1: must be above 0"),
    "beta": (flags(beta=-1.0), "--beta -1.0: must be at least 0"),
    "weights of no loss": (flags(cql_weight=-1.0), "--cql_weight -1.0: must be at least 0"),
    "ascent": (flags(policy_lr_scale=-1.0), "--policy_lr_scale -1.0: must be at least 0"),
    "batch size zero": (flags(batch_size=0), "--batch_size 0: must be at least 1"),
    "no rows": (flags(max_rows=0), "--max_rows 0: must be at least 1"),
    "no steps": (flags(num_steps=0), "--num_steps 0: must be at least 1"),
    "no betas": (flags(eval_betas=()), "--eval_betas: needs numbers below 1e9"),
    "a beta that is no number": (flags(eval_betas=(math.nan,)), "--eval_betas: needs numbers"),
    "no such function": (flags(reward_fn="nowhere.py:f"), "--reward_fn nowhere.py:f: no such file"),
    "two scores": (flags(reward_model="x"), "--reward_fn and --reward_model: give one of them"),
    "no prompts": (flags(eval_dataset="./none.jsonl"), "none.jsonl: no such file"),
    "samples that nobody scores": (
        flags(reward_fn=None, eval_dataset="p.jsonl"),
        "--eval_dataset: its samples are scored by --reward_fn or --reward_model; none is given",
    ),
    "an empty prompt": (
        prompts({"prompt": "a"}, {"prompt": ""}),
        "p.jsonl: row 2: its prompt is empty",
    ),
    "a prompt that needs a template": (
        prompts({"prompt": turns("a")}),
        "p.jsonl: row 1: .*chat template",
    ),
    "a run folder": (
        lambda tmp_path: {"output_dir": str(tmp_path)},
        "--output_dir .*exists already",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_and_writes_nothing(
    mistake, settings, tmp_path, capsys, monkeypatch
):
    """It is found out before a model is loaded."""
    change, match = MISTAKES[mistake]
    monkeypatch.setattr(utils, "load_pretrained", None)
    refuses(capsys, "ilql_rlhf", settings(tmp_path / "run") | change(tmp_path), match)


def test_mistakes_that_need_the_model(settings, tmp_path, capsys, monkeypatch):
    """A sample of the shortest prompt has 1 + 64 tokens."""
    flags = settings(tmp_path / "run", response_length=64)
    refuses(capsys, "ilql_rlhf", flags, r"--max_length: 65 tokens are more than the 64 positions")
    two_ranks = utils.Ranks(0, 2, CPU)
    monkeypatch.setattr(utils, "init_ranks", lambda timeout_minutes: two_ranks)
    flags = settings(tmp_path / "run", batch_size=3)
    refuses(capsys, "ilql_rlhf", flags, "--batch_size by the number of ranks: 3 cannot")
    flags = settings(tmp_path / "run", eval_samples=3)
    refuses(capsys, "ilql_rlhf", flags, "--eval_samples by the number of ranks: 3 cannot")


@pytest.mark.parametrize(
    ("kind", "config", "match"),
    [
        pytest.param(
            GraniteForCausalLM,
            GraniteConfig(**GROUPED, logits_scaling=4.0, **SMALL),
            "--model .*other: its attention or its logits are of a kind",
            id="it divides its logits",
        ),
        pytest.param(
            MambaForCausalLM,
            MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1, vocab_size=32),
            "--model: it cannot be sampled from with a static cache",
            id="linear attention",
        ),
    ],
)
def test_models_that_would_be_got_wrong(kind, config, match, settings, tmp_path, capsys, tokenizer):
    kind(config).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    flags = settings(tmp_path / "run", model=str(tmp_path / "other"))
    refuses(capsys, "ilql_rlhf", flags, match)


def test_a_reward_model_with_other_tokens_is_refused(settings, tmp_path, capsys, llama_rm_folder):
    shutil.copytree(llama_rm_folder, tmp_path / "rm")
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([":"])
    tokenizer.save_pretrained(tmp_path / "rm")
    flags = settings(tmp_path / "run", reward_fn=None, reward_model=str(tmp_path / "rm"))
    refuses(capsys, "ilql_rlhf", flags, "--reward_model .*rm: its tokenizer differs")


@pytest.mark.parametrize("name", ["too_few", "not_a_number", "nothing"])
def test_a_reward_function_that_answers_nonsense(name, settings, tmp_path):
    """The evaluation before the first step finds it out."""
    flags = settings(tmp_path / "run", reward_fn=f"{settings.folder}/rewards.py:{name}")
    with pytest.raises(utils.UserError, match=f"^{name} .*for each"):
        run(flags)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_gradient_that_is_not_finite_ends_the_run(settings, tmp_path):
    rows = [{"prompt": "x", "completion": "ab", "reward": 1e30}] * 4
    dataset = write_jsonl(tmp_path / "huge.jsonl", rows)
    flags = settings(tmp_path / "run", dataset=dataset, reward_fn=None, max_grad_norm=0.0)
    with pytest.raises(utils.UserError, match="step 1: the gradient is not finite"):
        run(flags)


def test_the_script_runs_from_the_command_line(run_script, settings, tmp_path):
    words = []
    for name, value in settings(tmp_path / "run").items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            values = value if isinstance(value, tuple) else [value]
            words += [f"--{name}", *map(str, values)]
    done = run_script("ilql_rlhf.py", words)
    assert done.returncode == 0, done.stderr
    files = {"args.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "model"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == files
    # And exactly as in this process.
    assert lines(tmp_path / "run") == lines(run(settings(tmp_path / "here")))


# --------------------------------------------------------------------------------------------------
# A world that can be solved by hand: its states are prefixes, and the data's tree is all of it

GAMMA = 0.9


def tree(seed=0):
    """[(tokens, reward)]: 48 walks of 1 to 3 letters and an EOS, many of them more than once."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(48):
        length = int(torch.randint(1, 4, (), generator=generator))
        tokens = torch.randint(2, 5, (length,), generator=generator).tolist()
        reward = round(torch.rand((), generator=generator).item() * 2 - 1, 3)
        rows.append(([9, *tokens, EOS], reward))
    return rows


def expectile(values, tau):
    """The root of sum |tau - 1(x < v)| (x - v), by bisection."""
    low = min(values)
    high = max(values)
    for _ in range(100):
        middle = (low + high) / 2
        if sum(abs(tau - (x < middle)) * (x - middle) for x in values) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def solve(rows, tau):
    """({(prefix, action): Q}, {prefix: V}) of the expectile backup, from the leaves up.

    It is over the data's own actions, each as often as the data holds it.
    """
    steps = []
    for ids, reward in rows:
        for i in range(len(ids) - 1):
            steps.append((tuple(ids[: i + 1]), ids[i + 1], i == len(ids) - 2, reward))
    Q = {}
    V = {}
    for prefix in sorted({step[0] for step in steps}, key=len, reverse=True):
        actions = [action for before, action, _, _ in steps if before == prefix]
        for action in set(actions):
            backups = []
            for before, other_action, is_last, reward in steps:
                if (before, other_action) == (prefix, action):
                    backups.append(reward if is_last else GAMMA * V[(*prefix, action)])
            Q[prefix, action] = sum(backups) / len(backups)
        V[prefix] = expectile([Q[prefix, action] for action in actions], tau)
    return Q, V


def learn(ilql, rows, tau, steps, lr):
    """Train on all rows at once with the script's own pieces, without CQL and AWAC.

    Returns what the module then says of every state.
    """
    encoded = []
    for ids, reward in rows:
        rewards = [0.0] * (len(ids) - 2) + [reward]
        states = list(range(len(ids) - 1))
        encoded.append({"input_ids": ids, "states": states, "actions": ids[1:], "rewards": rewards})
    batch = ilql_rlhf.collate(encoded, EOS)
    data = [batch[name] for name in ("actions", "rewards", "terminal", "mask")]
    args = SimpleNamespace(tau=tau, gamma=GAMMA, beta=0.0, cql_weight=0.0, awac_weight=0.0)
    parameters = [p for p in ilql.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, 2 * (1 - step / steps))
        output = ilql(batch["input_ids"], batch["states"])
        next_vs = F.pad(output["vs"][:, 1:], (0, 1))
        said = [output["qs"], output["target_qs"], output["vs"], next_vs, output["logits"]]
        optimizer.zero_grad()
        ilql_rlhf.ilql_loss(*said, *data, args)["total"].backward()
        optimizer.step()
        ilql.update_targets(0.2)
    return ilql(batch["input_ids"], batch["states"])


@pytest.mark.parametrize(
    "tau",
    [pytest.param(0.5, marks=pytest.mark.slow), pytest.param(0.7, marks=pytest.mark.slow), 0.9],
)
def test_q_and_v_reach_the_fixed_point_of_the_expectile_backup(tau, gpt2_folder):
    torch.manual_seed(0)
    policy, _ = utils.load_pretrained(AutoModelForCausalLM, gpt2_folder)
    rows = tree()
    Q, V = solve(rows, tau)
    output = learn(ilql_rlhf.ILQL(policy, 2), rows, tau, steps=800, lr=6e-3)
    rewards = [reward for _, reward in rows]
    allowed_error = 0.02 * (max(rewards) - min(rewards))
    for i, (ids, _) in enumerate(rows):
        for j in range(len(ids) - 1):
            prefix = tuple(ids[: j + 1])
            action = ids[j + 1]
            assert output["vs"][i, j].item() == pytest.approx(V[prefix], abs=allowed_error)
            for q in (*output["qs"], *output["target_qs"]):
                expected = pytest.approx(Q[prefix, action], abs=allowed_error)
                assert q[i, j, action].item() == expected


def test_the_solution_by_hand_is_what_it_says():
    rows = [([9, 2, EOS], 1.0), ([9, 3, EOS], 0.0), ([9, 3, EOS], 0.5)]
    Q, V = solve(rows, 0.5)
    assert Q[(9, 2), EOS] == 1.0
    assert Q[(9, 3), EOS] == 0.25
    assert Q[(9,), 2] == pytest.approx(0.9)
    assert Q[(9,), 3] == pytest.approx(0.225)
    assert V[(9,)] == pytest.approx((0.9 + 2 * 0.225) / 3)
    assert solve(rows, 0.9)[1][(9,)] > 0.6 > V[(9,)]  # Towards the better action.
