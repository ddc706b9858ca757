"""Whole runs of ppo_rlhf.py on tiny models: what an update does, what a run leaves and refuses.

Most runs call `main` in this process, because a start costs seconds; a few are real subprocesses.
"""

import itertools
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import ppo_rlhf
import utils
from conftest import refuses, write_jsonl
from utils import Ranks, UserError

PAD = 0
R = 16  # The longest response of the runs that do not say otherwise.
PROMPTS = ["a", "bc", "def", "ghij", "klmno", "pq", "r", "stu", "vwxyzab", "cd", "ef", "ghi"]
REWARDS = '''
def share_of_a(prompts, responses, **columns):
    """Of the letters that a response of 6 could hold."""
    return [response.count("a") / 6 for response in responses]

def letters(prompts, responses, **columns):
    return [len(response) for response in responses]

def vowels(prompts, responses, **columns):
    return [sum(letter in "aeiou" for letter in response) for response in responses]

def bonus(prompts, responses, bonus, **columns):
    assert len(prompts) == len(responses) == len(bonus) and list(columns) == ["note"]
    return bonus

def nothing(prompts, responses, **columns):
    return [0.0] * len(responses)

def one(prompts, responses, **columns):
    return [1.0] * len(responses)

def too_few(prompts, responses, **columns):
    return [0.0] * (len(responses) - 1)

def not_a_number(prompts, responses, **columns):
    return [float("nan")] * len(responses)

constant = 3
'''
CLOCKS = {"time/episodes_per_second", "time/rollout", "time/score", "time/update"}
KEYS = CLOCKS | {
    "objective/kl",
    "objective/kl_k3",
    "objective/kl_per_token",
    "objective/kl_k3_per_token",
    "objective/entropy",
    "objective/non_score_reward",
    "objective/rlhf_reward",
    "objective/scores",
    "objective/raw_scores",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "policy/entropy_avg",
    "loss/policy_avg",
    "loss/value_avg",
    "val/clipfrac_avg",
    "val/ratio",
    "val/sequence_lengths",
    "val/has_eos",
    "val/explained_var",
    "optim/grad_norm",
    "optim/steps",
    "optim/skipped",
    "optim/early_stops",
    "kl_coef",
    "lr",
    "episode",
}


# --------------------------------------------------------------------------------------------------
# A run, and what is read of it


@pytest.fixture(scope="module", name="settings")
def settings(tmp_path_factory, gpt2_folder):
    """`settings(output_dir, reward, updates, **changes)`: the flags of a short run.

    `settings.rewards` is the file with the reward functions. The fixture has a name of its own, so
    that another file can import the function under another one.
    """
    folder = tmp_path_factory.mktemp("task")
    rows = [{"prompt": prompt, "bonus": i / 4, "note": "n"} for i, prompt in enumerate(PROMPTS)]
    dataset = write_jsonl(folder / "prompts.jsonl", rows)
    rewards = folder / "rewards.py"
    rewards.write_text(REWARDS)

    def make(output_dir, reward="share_of_a", updates=1, **changes):
        flags = {
            "model": gpt2_folder,
            "reward_fn": (f"{rewards}:{reward}",) if reward else (),
            "dataset": dataset,
            "output_dir": str(output_dir),
            "batch_size": 16,
            "micro_batch_size": 16,
            "total_episodes": updates * changes.get("batch_size", 16),
            "num_epochs": 1,
            "query_length": 8,
            "response_length": R,
            "missing_eos_score": "none",
            "precision": "fp32",
            "compile": False,
        }
        return flags | changes

    make.rewards = rewards
    return make


def run(flags, rank=None):
    """A run on the CPU, alone or as one of two connected ranks. Returns its folder."""
    ranks = Ranks(rank or 0, 1 if rank is None else 2, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "init_ranks", lambda timeout_minutes: ranks)
        ppo_rlhf.main(ppo_rlhf.Args(**flags))
    return Path(flags.get("output_dir") or flags["resume"])


def run_on_rank(rank, flags):
    """A run on one of two ranks; the text of the user's mistake, if there is one."""
    try:
        run(flags, rank)
    except UserError as error:
        return str(error)


def watched(rank, flags):
    """Of each optimizer step of a run: the gradients it saw and the parameters it left.

    Both are lists of numpy arrays. Plain gradient steps stand in for AdamW, whose first step is
    lr * sign(gradient) nearly everywhere: where a gradient is 0 but for rounding, that would turn
    nothing into a difference.
    """
    steps = []

    class Watched(torch.optim.SGD):
        def __init__(self, parameters, lr, **options):
            super().__init__(parameters, lr=lr)

        def step(self):
            parameters = self.param_groups[0]["params"]
            gradients = [parameter.grad.numpy().copy() for parameter in parameters]
            super().step()
            steps.append((gradients, [x.detach().numpy().copy() for x in parameters]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Watched)
        run(flags, rank)
    return steps


def apart(first, second):
    """The largest difference of two lists of arrays, relative to the norm of each.

    A norm counts as at least a thousandth of the largest one.
    """
    norms = [(b**2).sum() ** 0.5 for b in second]
    differences = [((a - b) ** 2).sum() ** 0.5 for a, b in zip(first, second, strict=True)]
    floor = 1e-3 * max(norms)
    return max(d / max(norm, floor) for d, norm in zip(differences, norms, strict=True))


def assert_same_steps(ours, theirs, tolerance=1e-5):
    """Gradients and parameters of what `watched` returns, step by step."""
    for step, other in zip(ours, theirs, strict=True):
        for arrays, others in zip(step, other, strict=True):
            assert apart(arrays, others) < tolerance


def assert_identical_steps(ours, theirs):
    """The same, to the bit: what has to hold between two ranks."""
    for step, other in zip(ours, theirs, strict=True):
        for a, b in zip(step[0] + step[1], other[0] + other[1], strict=True):
            assert (a == b).all()


def lines(folder, name="metrics.jsonl"):
    """The objects of a .jsonl file; NaN and Infinity are no JSON and no numbers to report."""

    def refuse(constant):
        raise AssertionError(f"{constant} in {name}")

    text = (Path(folder) / name).read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def timeless(folder):
    """The metrics without those that no two runs share."""
    return [{key: line[key] for key in line.keys() - CLOCKS} for line in lines(folder)]


def samples_of(folder, step):
    """The samples of one update, which are its whole batch of 16 rows."""
    return [row for row in lines(folder, "samples.jsonl") if row["step"] == step]


def rows_of(folder, step):
    """(ids of the prompt, ids of the response with its EOS, sample) of each row of an update."""
    tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "model")
    rows = []
    for sample in samples_of(folder, step):
        response = tokenizer(sample["response"]).input_ids
        if len(response) < R:
            response.append(tokenizer.eos_token_id)
        rows.append((tokenizer(sample["query"]).input_ids, response, sample))
    return rows


def distributions(model, prompt, response, temperature=1.0):
    """The distribution of each response token but for the pad (index i is id i + 1).

    It comes from a plain forward of this row alone, in which there is no padding.
    """
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return torch.distributions.Categorical(logits=logits[:, PAD + 1 :] / temperature)


def logprobs_of(model, prompt, response, temperature=1.0):
    """The log-probability of each response token, (r,), from a forward of this row alone."""
    found = distributions(model, prompt, response, temperature)
    return found.log_prob(torch.tensor(response) - 1)


def load(folder, part="model"):
    """A saved policy ("model") or critic, as anyone loads it: no weight is missing or left over."""
    if part == "model":
        model, info = AutoModelForCausalLM.from_pretrained(
            Path(folder) / part, output_loading_info=True
        )
    else:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            Path(folder) / part, num_labels=1, output_loading_info=True
        )
    assert not any(info.values()), info
    return model.eval()


def weights(folder, part="model"):
    return load(folder, part).state_dict()


def policy_of(checkpoint):
    """The policy's part of a checkpoint's weights."""
    state = torch.load(checkpoint, weights_only=True)["model"]
    prefix = "actor.model."
    return {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}


def same_weights(first, second):
    same_names = first.keys() == second.keys()
    return same_names and all(torch.equal(first[name], second[name]) for name in first)


# --------------------------------------------------------------------------------------------------
# What a run leaves behind


@pytest.fixture(scope="module")
def long_flags(settings):
    """Three updates with all there is: epochs, minibatches, adaptive KL, a monitor, checkpoints."""

    def flags(output_dir, **changes):
        options = {
            "num_epochs": 2,
            "num_minibatches": 2,
            "micro_batch_size": 3,
            "save_every": 1,
            "target_kl_nats": 0.5,
            "kl_horizon": 100,
            "monitor_fn": (f"{settings.rewards}:letters",),
        }
        return settings(output_dir, updates=3, **options, **changes)

    return flags


@pytest.fixture(scope="module")
def finished(tmp_path_factory, long_flags):
    return run(long_flags(tmp_path_factory.mktemp("runs") / "finished"))


def test_metrics_are_the_documented_ones(finished):
    metrics = lines(finished)
    assert [line["step"] for line in metrics] == [1, 2, 3]
    for line in metrics:
        assert line.keys() == KEYS | {"step", "monitor/letters", "score/share_of_a"}
        assert all(math.isfinite(value) for value in line.values())
        steps = [line[f"optim/{name}"] for name in ("steps", "skipped", "early_stops")]
        assert steps == [4, 0, 0]
    assert [line["episode"] for line in metrics] == [16, 32, 48]
    # The last update has the rate lr / 3, not 0, and so has the optimizer itself.
    assert [line["lr"] for line in metrics] == pytest.approx([3e-4, 2e-4, 1e-4])
    state = torch.load(finished / "checkpoints" / "step_000003.pt", weights_only=True)
    assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-4)


def test_identities_between_metrics(finished):
    metrics = lines(finished)
    for line in metrics:
        penalty = line["objective/non_score_reward"]
        assert penalty == pytest.approx(-line["kl_coef"] * line["objective/kl"], abs=1e-7)
        total = line["objective/scores"] + penalty
        assert line["objective/rlhf_reward"] == pytest.approx(total, abs=1e-7)
    assert metrics[0]["objective/kl"] == 0.0  # Policy and reference start as one, exactly.
    assert metrics[1]["objective/kl"] != 0.0
    # The coefficient that is logged is the one that was used: the controller moves the next one.
    for line, following in itertools.pairwise(metrics):
        error = min(max(line["objective/kl"] / 0.5 - 1, -0.2), 0.2)
        expected = line["kl_coef"] * (1 + error * 16 / 100)
        assert following["kl_coef"] == pytest.approx(expected)


def test_samples_add_up_to_the_metrics(finished):
    """Samples are shown at the first update, at the last, and at every tenth."""
    metrics = lines(finished)
    assert samples_of(finished, 2) == []
    for line in (metrics[0], metrics[-1]):
        samples = samples_of(finished, line["step"])
        assert len(samples) == 16  # The whole batch.
        assert all(row.keys() == {"step", "query", "response", "score", "kl"} for row in samples)
        assert {row["query"] for row in samples} <= set(PROMPTS)
        texts = [row["response"] for row in samples]
        scores = [row["score"] for row in samples]
        assert scores == pytest.approx([text.count("a") / 6 for text in texts])
        values = {
            "objective/scores": scores,
            "objective/kl": [row["kl"] for row in samples],
            "monitor/letters": [len(text) for text in texts],
            "val/sequence_lengths": [min(len(text) + 1, R) for text in texts],  # With the EOS.
            "val/has_eos": [len(text) < R for text in texts],
        }
        assert 0 < line["val/has_eos"] < 1
        for name, column in values.items():
            assert line[name] == pytest.approx(sum(column) / 16, abs=1e-6), name


def test_saved_folders_load_plainly(finished, gpt2_folder):
    """And compute what the module in the last checkpoint computes."""
    state = torch.load(finished / "checkpoints" / "step_000003.pt", weights_only=True)["model"]
    assert {x.dtype for x in state.values() if x.is_floating_point()} == {torch.float32}
    classes = {
        "model": (AutoModelForCausalLM, "actor.model."),
        "critic": (AutoModelForSequenceClassification, "critic."),
    }
    for part, (auto_class, prefix) in classes.items():
        model = load(finished, part)
        live = auto_class.from_config(model.config).eval()
        mine = {key: x for key, x in state.items() if key.startswith(prefix)}
        live.load_state_dict({key.removeprefix(prefix): x for key, x in mine.items()})
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            assert torch.equal(model(ids).logits, live(ids).logits)
    start = AutoModelForCausalLM.from_pretrained(gpt2_folder).state_dict()
    assert not same_weights(weights(finished), start)
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "|")
    record = json.loads((finished / "args.json").read_text())
    assert record["script"] == "ppo_rlhf.py" and record["world_size"] == 1
    assert record["args"]["lr"] == 3e-4
    assert {"argv", "commit", "versions"} <= record.keys()


def test_the_optimizer_is_adamw_without_decay(finished):
    state = torch.load(finished / "checkpoints" / "step_000003.pt", weights_only=True)
    [group] = state["optimizer"]["param_groups"]
    assert (group["eps"], group["weight_decay"], tuple(group["betas"])) == (1e-5, 0.0, (0.9, 0.999))


# --------------------------------------------------------------------------------------------------
# The same again, and resumed


def assert_same_runs(first, second):
    assert timeless(first) == timeless(second)
    assert lines(first, "samples.jsonl") == lines(second, "samples.jsonl")
    for part in ("model", "critic"):
        assert same_weights(weights(first, part), weights(second, part))


def test_same_seed_same_run(finished, long_flags, tmp_path):
    assert_same_runs(run(long_flags(tmp_path / "again")), finished)
    other = run(long_flags(tmp_path / "other", seed=2))
    assert timeless(other)[0] != timeless(finished)[0]


def interrupted(finished, folder, step):
    """A copy of a run as it is when it is killed after `step`, while it writes the next step."""
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("model", "critic"))
    for path in (folder / "checkpoints").iterdir():
        if int(path.stem.removeprefix("step_")) > step:
            path.rename(f"{path}.tmp")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "objective/kl"')
    return folder


def assert_resumes(finished, folder, step):
    """A run that is killed after `step` and resumed ends as the one that was not, to the bit."""
    interrupted(finished, folder, step)
    run({"resume": str(folder)})
    assert_same_runs(folder, finished)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_resumed_run_ends_as_if_never_interrupted(finished, tmp_path, step):
    """After step 3 only the model folders are missing: nothing is left to train, all to save."""
    assert_resumes(finished, tmp_path / "run", step)


def test_resuming_what_cannot_be_resumed(finished, tmp_path):
    with pytest.raises(UserError, match="--resume"):
        run({"resume": str(tmp_path)})
    unfinished = tmp_path / "unfinished"
    shutil.copytree(finished, unfinished, ignore=shutil.ignore_patterns("model"))
    with pytest.raises(UserError, match="--lr"):
        run({"resume": str(unfinished), "lr": 1.0})
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="finished"):
        run({"resume": str(finished)})
    after = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert after == before


# --------------------------------------------------------------------------------------------------
# What an update does


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("gpt2", "fp32"), ("llama", "fp32"), ("gpt2", "bf16")],
    ids=["gpt2-fp32", "llama-fp32", "gpt2-bf16"],
)
def test_learning_rate_zero_changes_nothing(
    settings, tmp_path, monkeypatch, request, kind, precision
):
    """Every later minibatch meets its own old log-probabilities, whatever rows it is cut with.

    Under bf16 the reference is rounded to bf16, and the policy is not: their KL is not quite 0.
    """
    model = request.getfixturevalue(f"{kind}_folder")
    ppo_loss = ppo_rlhf.ppo_loss
    furthest = []

    def watching(new, batch, args):
        loss, stats = ppo_loss(new, batch, args)
        furthest.append((stats["val/ratio"] - 1)[batch["mask"]].abs().max().item())
        return loss, stats

    monkeypatch.setattr(ppo_rlhf, "ppo_loss", watching)
    sizes = {"num_epochs": 3, "num_minibatches": 2, "micro_batch_size": 4, "updates": 2}
    flags = settings(tmp_path / "run", model=model, lr=0.0, precision=precision, **sizes)
    folder = run(flags)
    is_exact = precision == "fp32"
    assert len(furthest) == 24
    assert max(furthest) < (1e-5 if is_exact else 1e-3)
    for line in lines(folder):
        assert line["val/ratio"] == pytest.approx(1, abs=1e-6 if is_exact else 1e-3)
        assert line["policy/approxkl_avg"] < (1e-9 if is_exact else 1e-6)
        assert line["policy/clipfrac_avg"] == 0 and line["val/clipfrac_avg"] == 0
        assert line["objective/kl"] == pytest.approx(0, abs=0 if is_exact else 1e-2)
        assert line["optim/grad_norm"] > 0.01
    start = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert same_weights(weights(folder), start)
    saved = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
    assert saved.dtype == torch.float32


def test_first_loss_of_a_zero_critic(settings, tmp_path):
    """V = 0 and KL = 0 at first, so with lam = gamma = 1 the return of every token is its score.

    The whitened advantages of the whole batch have mean 0, and the ratio is 1: so has the loss.
    """
    folder = run(settings(tmp_path / "run", lam=1.0, gamma=1.0))
    metrics = lines(folder)[0]
    rows = rows_of(folder, 1)
    errors = sum(len(response) * 0.5 * row["score"] ** 2 for _, response, row in rows)
    tokens = sum(len(response) for _, response, _ in rows)
    assert metrics["loss/value_avg"] == pytest.approx(errors / tokens, rel=1e-5)
    assert metrics["loss/policy_avg"] == pytest.approx(0, abs=1e-6)
    assert metrics["val/explained_var"] == pytest.approx(0, abs=1e-5)
    assert len({row["score"] for _, _, row in rows}) > 1


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_first_step_is_the_policy_gradient(settings, tmp_path, request, kind):
    """The gradient of the first step is worked out row by row, with no function of the script.

    V = 0 and KL = 0, so A_t = (gamma * lam)^(n - 1 - t) * score for n tokens; then whitened. At
    ratio 1 the loss is -A * logprob, and of the critic's weights the zero head alone can move.
    """
    model = request.getfixturevalue(f"{kind}_folder")
    options = {"gamma": 0.9, "lam": 0.8, "temperature": 0.7, "vf_coef": 0.3, "max_grad_norm": 0.0}
    flags = settings(tmp_path / "run", "letters", model=model, micro_batch_size=5, **options)
    [(gradients, _)] = watched(None, flags)

    policy = AutoModelForCausalLM.from_pretrained(model).eval()
    logprobs = []
    hidden = []
    advantages = []
    for prompt, response, row in rows_of(tmp_path / "run", 1):
        n = len(response)
        logprobs.append(logprobs_of(policy, prompt, response, 0.7))
        states = policy.base_model(torch.tensor([prompt + response])).last_hidden_state[0]
        hidden.append(states[len(prompt) - 1 : -1].detach())
        advantages.append(torch.tensor([0.72 ** (n - 1 - t) * row["score"] for t in range(n)]))
    logprobs = torch.cat(logprobs)
    hidden = torch.cat(hidden)
    advantages = torch.cat(advantages)
    whitened = (advantages - advantages.mean()) / advantages.std(correction=0)
    (-whitened * logprobs).mean().backward()
    expected = [parameter.grad.numpy() for parameter in policy.parameters()]
    assert apart(gradients[: len(expected)], expected) < 1e-4

    *trunk, head = gradients[len(expected) :]
    assert not any(gradient.any() for gradient in trunk)
    expected_head = -0.3 * (advantages[:, None] * hidden).mean(0)
    assert apart([head[0]], [expected_head.numpy()]) < 1e-4
    norm = math.sqrt(sum((gradient.astype("float64") ** 2).sum() for gradient in gradients))
    assert lines(tmp_path / "run")[0]["optim/grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_gradients_are_clipped_to_max_grad_norm(settings, tmp_path):
    """What is logged is the norm before that."""
    [(gradients, _)] = watched(None, settings(tmp_path / "run", "letters", max_grad_norm=0.01))
    norm = math.sqrt(sum((gradient**2).sum() for gradient in gradients))
    assert norm == pytest.approx(0.01, rel=1e-3)
    assert lines(tmp_path / "run")[0]["optim/grad_norm"] > 0.1


@pytest.mark.parametrize(("cliprange", "cliprange_value"), [(1e-4, 1e-4), (1e-4, 1e4), (1e4, 1e-4)])
def test_clip_ranges_reach_the_losses(settings, tmp_path, cliprange, cliprange_value):
    """A second step meets a new policy and new values; the two flags say what is clipped then."""
    clips = {"cliprange": cliprange, "cliprange_value": cliprange_value}
    line = lines(run(settings(tmp_path / "run", "letters", num_epochs=2, lr=1e-3, **clips)))[0]
    assert (line["policy/clipfrac_avg"] > 0.1) == (cliprange < 1)
    assert (line["val/clipfrac_avg"] > 0.01) == (cliprange_value < 1)
    assert line["policy/approxkl_avg"] > 1e-6


def test_reward_that_is_always_zero(settings, tmp_path):
    """Nothing to learn and no variance to explain is no reason for a NaN."""
    folder = run(settings(tmp_path / "run", "nothing", kl_coef=0.0, updates=2))
    for line in lines(folder):
        assert all(math.isfinite(value) for value in line.values())
    assert all(tensor.isfinite().all() for tensor in weights(folder).values())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_micro_batches_and_ranks_do_not_change_the_update(
    settings, tmp_path, on_two_ranks, request, kind
):
    """Rows of unequal length in two epochs of two minibatches, dealt out in three ways."""
    model = request.getfixturevalue(f"{kind}_folder")
    options = {"num_epochs": 2, "num_minibatches": 2, "max_grad_norm": 0.0, "lr": 1e-2}
    options["model"] = model
    whole = watched(None, settings(tmp_path / "whole", **options))
    small = watched(None, settings(tmp_path / "small", **options, micro_batch_size=2))
    flags = settings(tmp_path / "ranks", **options, micro_batch_size=3)
    first, second = on_two_ranks(watched, flags)
    assert len(whole) == 4  # Epochs times minibatches.
    assert 0 < lines(tmp_path / "whole")[0]["val/has_eos"] < 1
    assert_same_steps(small, whole)
    assert_same_steps(first, whole)
    assert_identical_steps(first, second)
    assert apart(whole[1][0], whole[0][0]) > 0.1  # Another minibatch has another gradient.
    ours = samples_of(tmp_path / "ranks", 1)
    theirs = samples_of(tmp_path / "whole", 1)
    assert len(ours) == 8  # Rank 0's own rows, which are the first of the batch.
    for mine, other in zip(ours, theirs, strict=False):
        assert (mine["query"], mine["response"]) == (other["query"], other["response"])


def test_scoring_and_update_compute_little_padding(settings, tmp_path, monkeypatch, gpt2_rm_folder):
    """Prompts of 1 to 40 tokens: a micro-batch has rows of similar total length, cut after the
    longest of them, and every forward reads exactly these tokens.
    """
    parts = []

    def selecting(batch, rows):
        part = select(batch, rows)
        counts = {"lengths": part["is_real"].sum(1), "responses": part["mask"].sum(1)}
        parts.append(counts | {"is_scoring": not torch.is_grad_enabled(), "forwards": []})
        return part

    def states(model, batch):
        parts[-1]["forwards"].append(batch["input_ids"].shape[1])
        assert batch["mask"].shape[1] == parts[-1]["responses"].max()
        return response_hidden(model, batch)

    def judge(model, input_ids, attention_mask):
        parts[-1]["forwards"].append(input_ids.shape[1])
        assert torch.equal(attention_mask.sum(1), parts[-1]["lengths"])
        return last_token_scores(model, input_ids, attention_mask)

    select = ppo_rlhf.select
    response_hidden = ppo_rlhf.response_hidden
    last_token_scores = ppo_rlhf.last_token_scores
    monkeypatch.setattr(ppo_rlhf, "select", selecting)
    monkeypatch.setattr(ppo_rlhf, "response_hidden", states)
    monkeypatch.setattr(ppo_rlhf, "last_token_scores", judge)
    rows = [{"prompt": "a" * length} for length in (1, 2, 5, 40, 3, 30, 1, 15, 2, 8, 39, 4)]
    flags = {"reward_model": gpt2_rm_folder, "num_epochs": 3, "num_minibatches": 2}
    flags |= {"batch_size": 32, "micro_batch_size": 4, "query_length": 40, "response_length": 20}
    flags["dataset"] = write_jsonl(tmp_path / "rows.jsonl", rows)
    folder = run(settings(tmp_path / "run", None, **flags))

    # First the reward model scores the responses, then policy and critic the tokens, then the
    # reference.
    scoring = [part for part in parts if part["is_scoring"]]
    judged, scored, referred = scoring[:8], scoring[8:16], scoring[16:]
    trained = [part for part in parts if not part["is_scoring"]]
    minibatches = [trained[i : i + 4] for i in range(0, len(trained), 4)]
    assert (len(referred), len(minibatches)) == (8, 6)
    for group in (judged, scored, referred, *minibatches):
        for first, second in itertools.pairwise(group):
            assert first["lengths"].max() <= second["lengths"].min()
    for group, num_forwards in ((judged, 1), (scored, 2), (referred, 1), (trained, 2)):
        for part in group:
            assert part["forwards"] == [part["lengths"].max()] * num_forwards

    tokens = sum(part["responses"].sum().item() for part in scored)
    assert tokens == pytest.approx(32 * lines(folder)[0]["val/sequence_lengths"])
    for group, passes in ((scored, 1), (trained, 3)):
        assert sum(part["responses"].sum() for part in group) == passes * tokens  # None is lost.
        real = sum(part["lengths"].sum() for part in group)
        computed = sum(len(part["lengths"]) * part["lengths"].max() for part in group)
        assert computed < 1.3 * real
    # A single batch would be more than half padding.
    assert 32 * scored[-1]["lengths"].max() > 2 * sum(part["lengths"].sum() for part in scored)


def test_evaluation_on_held_out_prompts(settings, tmp_path, on_two_ranks):
    """Before the first update, every other, and after the last; the best model is kept.

    Five prompts with three responses each fill no batch of 16, and two ranks give the same numbers.
    """
    rows = [{"prompt": prompt, "bonus": 0.0} for prompt in ("a", "bc", "def", "ab", "c")]
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows)
    flags = {"eval_dataset": held_out, "eval_every": 2, "eval_samples": 3, "save_best": True}
    folder = run(settings(tmp_path / "one", updates=3, lr=0.05, save_every=1, **flags))
    evaluated = {line["step"]: line for line in lines(folder) if "eval/score" in line}
    assert list(evaluated) == [0, 2, 3]
    names = {"eval/score", "eval/score_ci95", "eval/length", "eval/length_ci95"}
    assert evaluated[0].keys() == names | {"step"}
    best = max(evaluated, key=lambda step: evaluated[step]["eval/score"])
    assert best > 0
    # What is kept is the policy that was evaluated.
    kept = torch.load(folder / "checkpoints" / f"step_{best:06d}.pt", weights_only=True)["model"]
    model = AutoModelForCausalLM.from_pretrained(folder / "best_model")
    for name, x in model.state_dict().items():
        assert torch.equal(x, kept[f"actor.model.{name}"])

    two = settings(tmp_path / "two", updates=3, lr=0.05, save_every=1, **flags)
    assert on_two_ranks(run_on_rank, two) == [None, None]
    for one_line, other in zip(lines(folder), lines(tmp_path / "two"), strict=True):
        for name in names & other.keys():
            assert other[name] == pytest.approx(one_line[name], abs=1e-6), name


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_metrics_on_one_and_two_ranks(settings, tmp_path, on_two_ranks, request, kind):
    """Every metric of a line is the same claim, however the work is cut."""
    flags = {
        "model": request.getfixturevalue(f"{kind}_folder"),
        "monitor_fn": (f"{settings.rewards}:letters",),
        "missing_eos_score": -1.0,
    }
    [whole] = timeless(run(settings(tmp_path / "whole", **flags)))
    [small] = timeless(run(settings(tmp_path / "small", **flags, micro_batch_size=2)))
    two = settings(tmp_path / "ranks", **flags, micro_batch_size=5)
    assert on_two_ranks(run_on_rank, two) == [None, None]
    [ranks] = timeless(tmp_path / "ranks")
    assert small == pytest.approx(whole, rel=1e-5, abs=1e-7)
    assert ranks == pytest.approx(whole, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("penalty", [-7.0, "none"])
def test_missing_eos_score(settings, tmp_path, penalty):
    folder = run(settings(tmp_path / "run", "letters", missing_eos_score=penalty))
    samples = samples_of(folder, 1)
    endless = [len(row["response"]) == R for row in samples]
    assert any(endless) and not all(endless)
    for row, has_no_eos in zip(samples, endless, strict=True):
        is_replaced = has_no_eos and penalty != "none"
        assert row["score"] == (penalty if is_replaced else len(row["response"]))
    mean = sum(row["score"] for row in samples) / 16
    assert lines(folder)[0]["objective/scores"] == pytest.approx(mean)


def test_columns_reach_the_reward_function_in_order(settings, tmp_path):
    folder = run(settings(tmp_path / "run", "bonus", updates=2))
    samples = lines(folder, "samples.jsonl")
    for row in samples:
        assert row["score"] == PROMPTS.index(row["query"]) / 4
    seen = [row["query"] for row in samples]
    assert set(seen[:12]) == set(seen[12:24]) == set(PROMPTS)  # A pass is every prompt once.


def test_learns_to_say_a_letter(settings, tmp_path):
    flags = {"response_length": 6, "lr": 1e-2, "num_epochs": 4, "kl_coef": 0.01}
    flags |= {"batch_size": 32, "micro_batch_size": 32}
    folder = run(settings(tmp_path / "run", updates=20, **flags))
    scores = [line["objective/scores"] for line in lines(folder)]
    assert scores[0] < 0.15  # One letter in thirty by chance.
    assert sum(scores[-4:]) / 4 > 0.6


# --------------------------------------------------------------------------------------------------
# What is sampled, and what is reported of it


def test_logged_statistics_are_those_of_the_real_tokens(settings, tmp_path, gpt2_folder):
    """KL and entropies of the second update, token by token.

    They are worked out under the checkpointed policy and under the model that it began as.
    """
    flags = {"lr": 3e-3, "temperature": 0.7, "micro_batch_size": 5, "save_every": 1, "updates": 2}
    folder = run(settings(tmp_path / "run", "letters", **flags))
    reference = AutoModelForCausalLM.from_pretrained(gpt2_folder).requires_grad_(False).eval()
    policy = AutoModelForCausalLM.from_pretrained(gpt2_folder).requires_grad_(False).eval()
    policy.load_state_dict(policy_of(folder / "checkpoints" / "step_000001.pt"))
    logprobs = []
    log_ratios = []
    entropies = []
    for prompt, response, sample in rows_of(folder, 2):
        logprobs.append(logprobs_of(policy, prompt, response, 0.7).double())
        ref_logprobs = logprobs_of(reference, prompt, response, 0.7).double()
        log_ratios.append(logprobs[-1] - ref_logprobs)
        entropies.append(distributions(policy, prompt, response, 0.7).entropy())
        assert sample["kl"] == pytest.approx(log_ratios[-1].sum().item(), abs=1e-4)
    # The estimate of a single response may be negative; and there is padding, which must not count.
    assert min(log_ratio.sum() for log_ratio in log_ratios) < -0.01
    assert min(len(log_ratio) for log_ratio in log_ratios) < R
    logprobs = torch.cat(logprobs)
    log_ratios = torch.cat(log_ratios)
    k3 = torch.expm1(-log_ratios) + log_ratios
    expected = {
        "objective/kl": log_ratios.sum() / 16,
        "objective/kl_per_token": log_ratios.mean(),
        "objective/kl_k3": k3.sum() / 16,
        "objective/kl_k3_per_token": k3.mean(),
        "objective/entropy": -logprobs.sum() / 16,
        "policy/entropy_avg": torch.cat(entropies).mean(),
        "val/sequence_lengths": torch.tensor(len(log_ratios) / 16),
        "val/ratio": torch.tensor(1.0),
    }
    line = lines(folder)[1]
    for name, value in expected.items():
        assert line[name] == pytest.approx(value.item(), rel=1e-4, abs=1e-5), name
    assert line["policy/approxkl_avg"] < 1e-9 and line["policy/clipfrac_avg"] == 0


@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_sampled_entropy_estimates_the_entropy(settings, tmp_path, temperature):
    """-log p of a token has the entropy of its distribution as mean, if it was sampled from it."""
    flags = {"temperature": temperature, "lr": 0.0, "batch_size": 128, "micro_batch_size": 128}
    [line] = lines(run(settings(tmp_path / "run", **flags)))
    per_token = line["objective/entropy"] / line["val/sequence_lengths"]
    assert per_token == pytest.approx(line["policy/entropy_avg"], abs=0.08)  # A thousand tokens.


def test_every_update_samples_anew(settings, tmp_path):
    """No row and no update repeats another's noise."""
    dataset = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}] * 16)
    folder = run(settings(tmp_path / "run", dataset=dataset, lr=0.0, updates=2))
    responses = [row["response"] for row in lines(folder, "samples.jsonl")]
    assert len(responses) == 32
    assert len(set(responses)) > 24


def test_every_epoch_is_the_whole_batch_in_another_order(settings, tmp_path):
    """At learning rate 0 the minibatches of every epoch have gradients that add up to the same."""
    flags = {"lr": 0.0, "min_length": R, "num_epochs": 2, "num_minibatches": 2}
    flags["max_grad_norm"] = 0.0
    steps = [gradients for gradients, _ in watched(None, settings(tmp_path / "run", **flags))]
    assert len(steps) == 4
    assert lines(tmp_path / "run")[0]["val/sequence_lengths"] == R
    first = [a + b for a, b in zip(*steps[:2], strict=True)]
    second = [a + b for a, b in zip(*steps[2:], strict=True)]
    assert apart(first, second) < 1e-4
    assert min(apart(steps[0], steps[2]), apart(steps[0], steps[3])) > 0.05


def test_kl_coefficient_on_two_ranks_follows_the_kl_of_both(settings, tmp_path, on_two_ranks):
    """The target is the KL of the second update, whose coefficient the third one keeps.

    It would not if a rank looked at its own KL alone.
    """
    flags = {"lr": 1e-2, "updates": 3, "kl_horizon": 100}
    target = lines(run(settings(tmp_path / "fixed", **flags)))[1]["objective/kl"]
    assert target > 0.1
    two = settings(tmp_path / "ranks", **flags, target_kl_nats=target)
    assert on_two_ranks(run_on_rank, two) == [None, None]
    metrics = lines(tmp_path / "ranks")
    assert metrics[0]["objective/kl"] == 0
    assert metrics[1]["objective/kl"] == pytest.approx(target, rel=1e-3)
    # The first KL is 0, which counts as 0.2 below the target.
    second = 0.05 * (1 - 0.2 * 16 / 100)
    coefficients = [line["kl_coef"] for line in metrics]
    assert coefficients == pytest.approx([0.05, second, second], rel=1e-3)
    # This would not hold if the other rank had another coefficient.
    for line in metrics:
        penalty = -line["kl_coef"] * line["objective/kl"]
        assert line["objective/non_score_reward"] == pytest.approx(penalty, rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_sampler_is_the_policy_of_the_moment(settings, tmp_path, monkeypatch, precision):
    """Rounded to bf16 where that is asked for."""
    generate = ppo_rlhf.generate
    seen = []

    def spy(model, *inputs, **options):
        seen.append({name: x.clone() for name, x in model.named_parameters()})
        return generate(model, *inputs, **options)

    monkeypatch.setattr(ppo_rlhf, "generate", spy)
    flags = {"precision": precision, "lr": 1e-2, "updates": 2, "save_every": 1}
    folder = run(settings(tmp_path / "run", **flags))
    first, second = seen
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    policy = policy_of(folder / "checkpoints" / "step_000001.pt")
    assert same_weights(second, {name: policy[name].to(dtype) for name in second})
    assert not same_weights(first, second)


# --------------------------------------------------------------------------------------------------
# Reward model, and other models and prompts


def plain_score(model, prompt, response):
    """The score of a row alone by the library's class, and without the mean that it is less by."""
    with torch.no_grad():
        return model(torch.tensor([prompt + response])).logits.item()


def test_reward_model_scores_and_starts_the_critic(
    settings, tmp_path, llama_folder, llama_rm_folder
):
    """Its config has score_mean 0.75, and it stays as it is while the critic learns."""
    flags = {"model": llama_folder, "reward_model": llama_rm_folder}
    start = AutoModelForSequenceClassification.from_pretrained(llama_rm_folder, num_labels=1).eval()
    still = run(settings(tmp_path / "still", None, **flags, lr=0.0))
    critic = load(still, "critic")
    assert critic.config.score_mean == 0.75
    assert same_weights(critic.state_dict(), start.state_dict())
    trained = run(settings(tmp_path / "trained", None, **flags, lr=1e-2, updates=2))
    assert not same_weights(weights(trained, "critic"), start.state_dict())
    for folder, step in ((still, 1), (trained, 2)):
        scores = []
        for prompt, response, row in rows_of(folder, step):
            scores.append(row["score"])
            expected = plain_score(start, prompt, response) - 0.75
            assert row["score"] == pytest.approx(expected, abs=1e-4)
        assert max(scores) - min(scores) > 0.1


def estimates(rewards, values, gamma, lam):
    """GAE of one episode by its definition: sum over k of (gamma * lam)^k * delta_(t + k)."""
    n = len(rewards)
    following = [*values[1:], 0.0]
    deltas = [rewards[t] + gamma * following[t] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]


def test_first_value_loss_of_a_reward_model(settings, tmp_path, gpt2_folder, gpt2_rm_folder):
    """Values that are not 0, and gamma and lam apart: half the mean square of GAE's estimates."""
    options = {"gamma": 0.9, "lam": 0.5}
    folder = run(settings(tmp_path / "run", None, reward_model=gpt2_rm_folder, **options))
    critic = AutoModelForSequenceClassification.from_pretrained(gpt2_rm_folder, num_labels=1)
    critic.requires_grad_(False).eval()
    advantages = []
    returns = []
    for prompt, response, sample in rows_of(folder, 1):
        hidden = critic.transformer(torch.tensor([prompt + response])).last_hidden_state[0]
        values = (hidden[len(prompt) - 1 : -1] @ critic.score.weight[0]).tolist()
        rewards = [0.0] * (len(response) - 1) + [sample["score"]]
        row = estimates(rewards, values, **options)
        advantages += row
        returns += [advantage + value for advantage, value in zip(row, values, strict=True)]
    advantages = torch.tensor(advantages)
    returns = torch.tensor(returns)
    line = lines(folder)[0]
    assert line["loss/value_avg"] == pytest.approx(0.5 * (advantages**2).mean().item(), rel=1e-4)
    explained = 1 - advantages.var(correction=0) / returns.var(correction=0)
    assert line["val/explained_var"] == pytest.approx(explained.item(), abs=1e-4)


def test_model_without_a_pad_token(settings, tmp_path, llama_folder):
    """A pad token is added, the policy grows by a row, and both folders load plainly."""
    folder = tmp_path / "no_pad"
    shutil.copytree(llama_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    added = content["added_tokens"]
    content["added_tokens"] = [token for token in added if token["content"] != "<pad>"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    done = run(settings(tmp_path / "run", model=str(folder)))
    for part in ("model", "critic"):
        tokenizer = AutoTokenizer.from_pretrained(done / part)
        assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("[PAD]", 31)
        # A batch with padding, as anyone would feed it.
        ids = tokenizer(["ab", "abcd"], padding=True, return_tensors="pt")
        assert load(done, part)(**ids).logits.isfinite().all()


def test_prompts_of_messages_run_to_the_end(settings, tmp_path, gpt2_folder):
    """Rollout, reward function, the table of samples and samples.jsonl take them."""
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(gpt2_folder).save_pretrained(tmp_path / "model")
    prompts = [[{"role": "user", "content": text}] for text in ("ab", "c", "de", "fgh")]
    rows = [{"prompt": prompt} for prompt in prompts]
    dataset = write_jsonl(tmp_path / "prompts.jsonl", rows)
    folder = run(settings(tmp_path / "run", model=str(tmp_path / "model"), dataset=dataset))
    queries = [row["query"] for row in lines(folder, "samples.jsonl")]
    assert queries and all(query in prompts for query in queries)


def finished_stage(script, source, name, dataset, seconds):
    """What a finished run of an earlier stage leaves in runs/, as far as it is looked at."""
    folder = Path("runs") / f"{script}__{name}"
    shutil.copytree(source, folder / "model")
    record = {"script": f"{script}.py", "args": {"dataset": str(dataset)}}
    (folder / "args.json").write_text(json.dumps(record))
    os.utime(folder / "model" / "config.json", (seconds, seconds))
    return f"{folder}/model"


def test_newest_runs_of_the_earlier_stages_are_the_defaults(
    settings, tmp_path, monkeypatch, gpt2_folder, gpt2_rm_folder
):
    """Of those on data from the folder of --dataset: newer ones on other data do not count."""
    monkeypatch.chdir(tmp_path)
    flags = settings(tmp_path / "run", None, model=None)
    ours = Path(flags["dataset"]).parent
    other = tmp_path / "other.jsonl"
    finished_stage("sft", gpt2_folder, "old", ours / "sft.jsonl", 100)
    model = finished_stage("sft", gpt2_folder, "new", ours / "sft.jsonl", 200)
    finished_stage("sft", gpt2_folder, "other", other, 300)
    reward_model = finished_stage("reward_model", gpt2_rm_folder, "new", ours / "pairs.jsonl", 200)
    finished_stage("reward_model", gpt2_rm_folder, "other", other, 300)
    record = json.loads((run(flags) / "args.json").read_text())
    assert record["args"]["model"] == model
    assert record["args"]["reward_model"] == reward_model


# --------------------------------------------------------------------------------------------------
# Bad input


@pytest.fixture
def refused(capsys):
    """`refused(flags, *fragments)`: one line that holds every fragment, and nothing is written."""

    def check(flags, *fragments):
        pattern = "".join(f"(?=.*{re.escape(str(fragment))})" for fragment in fragments)
        refuses(capsys, "ppo_rlhf", flags, pattern)

    return check


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"dataset": "nowhere/prompts.jsonl"}, ["nowhere/prompts.jsonl"]),
        ({"model": "./nowhere"}, ["./nowhere"]),
        ({"total_episodes": 24}, ["--total_episodes", "--batch_size", "24", "16"]),
        ({"num_minibatches": 3}, ["--batch_size", "--num_minibatches", "16", "3"]),
        ({"batch_size": 0, "total_episodes": 16}, ["--batch_size"]),
        ({"total_episodes": 0}, ["--total_episodes"]),
        ({"reward_fn": ("nowhere.py:f",)}, ["--reward_fn", "nowhere.py"]),
        ({"monitor_fn": ("nowhere.py:f",)}, ["--monitor_fn", "nowhere.py"]),
        ({"reward_fn": ("share_of_a",)}, ["--reward_fn", "file.py:function"]),
        ({"reward_model": "somewhere"}, ["somewhere"]),
        ({"reward_weights": (1.0, 2.0)}, ["--reward_weights", "2 for 1"]),
        ({"reward_weights": (math.inf,)}, ["--reward_weights", "finite"]),
        ({"save_best": True}, ["--save_best", "--eval_dataset"]),
        ({"eval_dataset": "nowhere/e.jsonl"}, ["nowhere/e.jsonl"]),
        ({"eval_samples": 0}, ["--eval_samples"]),
        # No response could end, so that every score would be -1.
        ({"min_length": 16, "missing_eos_score": -1.0}, ["--min_length", "--response_length"]),
        # A coefficient of 0 stays 0, whatever multiplies it.
        ({"target_kl_nats": 2.0, "kl_coef": 0.0}, ["--target_kl_nats", "--kl_coef"]),
        ({"stop_token": ""}, ["--stop_token"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refused_flags(refused, settings, tmp_path, changes, fragments):
    refused(settings(tmp_path / "run") | changes, *fragments)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("micro_batch_size", 0),
        ("num_epochs", 0),
        ("num_minibatches", 0),
        ("query_length", 0),
        ("response_length", 0),
        ("response_length", 60),  # With its prompt beyond the 64 positions of the model.
        ("min_length", -1),
        ("temperature", 0.0),
        ("max_grad_norm", -1.0),
        ("lr", -1e-3),
        ("lr", math.nan),
        ("kl_coef", -0.1),
        ("target_kl_nats", 0.0),
        ("kl_horizon", 0),
        ("vf_coef", math.inf),
        ("cliprange", 0.0),
        ("cliprange_high", 0.0),
        ("cliprange_high", -0.1),
        ("cliprange_value", 0.0),
        ("cliprange_score", 0.0),
        ("gamma", 1.01),
        ("gamma", -0.5),
        ("lam", 1.5),
        ("entropy_coef", math.nan),
        ("missing_eos_score", math.nan),
        ("ratio_guard", 1.0),
        ("ratio_guard", math.inf),
        ("early_stop_kl", 0.0),
        ("timeout_minutes", 0.0),
    ],
)
def test_refused_sizes(refused, settings, tmp_path, flag, value):
    """Each would end in a traceback, in NaN, or in a run that does not do what it says."""
    refused(settings(tmp_path / "run") | {flag: value}, f"--{flag}")


def messages(word):
    """A prompt of one message, whose text stands under `word`."""
    return {"prompt": [{"role": "user", word: "abc"}]}


@pytest.mark.parametrize(
    ("rows", "fragments"),
    [
        ([{"question": "a", "answer": "b"}], ["prompt", "question", "answer"]),
        ([], ["empty"]),
        ([{"prompt": "abcdefghi"}] * 3, ["--query_length", "8"]),
        ([{"prompt": "abc"}, {"prompt": ""}], ["row 2"]),
        ([messages("contents")], ["row 1", "role and content"]),
        ([messages("content"), messages("contents")], ["row 2", "role and content"]),
        ([{"prompt": ["a", "b"]}], ["row 1", "role and content"]),
    ],
    ids=["columns", "empty", "long", "empty prompt", "no content", "row 2", "no messages"],
)
def test_refused_data(refused, settings, tmp_path, rows, fragments):
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    refused(settings(tmp_path / "run", dataset=path), path, *fragments)


def test_long_prompts_are_counted_and_left_out(settings, tmp_path, capsys):
    rows = [{"prompt": prompt} for prompt in ("ab", "abcdefghi", "cd", "a" * 30, "abcdefgh")]
    dataset = write_jsonl(tmp_path / "rows.jsonl", rows)
    folder = run(settings(tmp_path / "run", dataset=dataset))
    assert "2 of 5" in capsys.readouterr().out
    queries = {row["query"] for row in lines(folder, "samples.jsonl")}
    assert queries == {"ab", "cd", "abcdefgh"}


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("no_such_name", ["--reward_fn", "rewards.py", "no_such_name"]),
        ("constant", ["--reward_fn", "rewards.py", "constant"]),
        ("too_few", ["too_few", "for 2 responses"]),
        ("not_a_number", ["not_a_number", "nan"]),
    ],
)
def test_refused_reward_functions(refused, settings, tmp_path, name, fragments):
    refused(settings(tmp_path / "run", name), *fragments)


def test_refused_models(refused, settings, tmp_path, gpt2_folder, gpt2_rm_folder):
    no_eos = tmp_path / "no_eos"
    shutil.copytree(gpt2_folder, no_eos)
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(no_eos)
    refused(settings(tmp_path / "run", model=str(no_eos)), no_eos, "EOS")
    no_head = settings(tmp_path / "run", None, reward_model=gpt2_folder)
    refused(no_head, gpt2_folder, "not a model", "score.weight")

    other = tmp_path / "other"
    shutil.copytree(gpt2_rm_folder, other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = vocabulary | {"a": vocabulary["b"], "b": vocabulary["a"]}
    (other / "tokenizer.json").write_text(json.dumps(content))
    swapped = settings(tmp_path / "run", None, reward_model=str(other))
    refused(swapped, "--reward_model", other, "tokenizer")


def test_no_earlier_stage(refused, settings, tmp_path, monkeypatch, gpt2_folder):
    """Of which a run on other data is none."""
    monkeypatch.chdir(tmp_path)
    finished_stage("sft", gpt2_folder, "other", tmp_path / "other.jsonl", 100)
    refused(settings(tmp_path / "run", model=None), "python sft.py")
    refused(settings(tmp_path / "run", None), "python reward_model.py")


def test_existing_run_folder_is_left_alone(settings, tmp_path):
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(UserError, match="--output_dir"):
        run(settings(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]


def test_batch_that_does_not_divide_over_two_ranks(settings, tmp_path, on_two_ranks):
    flags = settings(tmp_path / "run", batch_size=6, num_minibatches=2)
    for message in on_two_ranks(run_on_rank, flags):
        assert "--batch_size" in message and "6" in message and "4" in message
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------
# As a user runs it


def command_line(flags):
    """Flags as words; a bool is --compile or --no-compile."""
    words = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, tuple):
            words += [f"--{name}", *map(str, value)]
        else:
            words += [f"--{name}", str(value)]
    return words


def test_script_runs_from_the_command_line(run_script, settings, tmp_path):
    """And does exactly what it does in this process."""
    words = command_line(settings(tmp_path / "run"))
    done = run_script("ppo_rlhf.py", words, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    files = {"args.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "model", "critic"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == files
    assert timeless(tmp_path / "run") == timeless(run(settings(tmp_path / "here")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"dataset": "nowhere/prompts.jsonl"}, "nowhere/prompts.jsonl"),
        ({"model": "tests"}, "tests"),
    ],
    ids=["dataset", "model"],
)
def test_script_refuses_in_one_line(run_script, settings, tmp_path, changes, fragment):
    words = command_line(settings(tmp_path / "run") | changes)
    done = run_script("ppo_rlhf.py", words)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and errors[0].startswith("error:") and fragment in errors[0]
    assert not errors[0].rstrip().endswith(":")  # The sentence is finished.
    assert not (tmp_path / "run").exists()
