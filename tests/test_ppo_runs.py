"""Whole runs of ppo_rlhf.py on tiny models: what an update must keep, what a run leaves behind, what it refuses.

Most runs call `main` in this process, because a start costs seconds; a few are real subprocesses.
"""

import itertools
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import build_folder, refuses, write_jsonl
from test_ppo_rlhf import gae_by_sums
from torch._dynamo.testing import CompileCounter
from torch._inductor.utils import run_and_get_code
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

import ppo_rlhf
import utils
from utils import Ranks, UserError

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

def too_few(prompts, responses, **columns):
    return [0.0] * (len(responses) - 1)

def not_a_number(prompts, responses, **columns):
    return [float("nan")] * len(responses)

constant = 3
'''
KEYS = {
    *(f"objective/{key}" for key in ("kl", "entropy", "non_score_reward", "rlhf_reward", "scores")),
    *(f"objective/{key}" for key in ("kl_k3", "kl_per_token", "kl_k3_per_token", "raw_scores")),
    *(f"policy/{key}" for key in ("approxkl_avg", "clipfrac_avg", "entropy_avg")),
    *(f"loss/{key}" for key in ("policy_avg", "value_avg")),
    *(f"val/{key}" for key in ("clipfrac_avg", "ratio", "sequence_lengths", "has_eos", "explained_var")),
    *(
        "optim/grad_norm",
        "optim/steps",
        "optim/skipped",
        "kl_coef",
        "lr",
        "episode",
        "eps",
        "time/rollout",
        "time/score",
        "time/update",
    ),
}
COMPILED = []  # the models whose graphs this process holds
CLOCKS = {"eps", "time/rollout", "time/score", "time/update"}


def lines(folder, name="metrics.jsonl"):
    """The objects of a .jsonl file; NaN and Infinity are no JSON and no numbers anyone can claim."""

    def refuse(constant):
        raise AssertionError(f"{constant} in {name}")

    text = (Path(folder) / name).read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def timeless(folder):
    return [{key: value for key, value in line.items() if key not in CLOCKS} for line in lines(folder)]


def weights(folder, part="model"):
    auto_class = {"model": AutoModelForCausalLM, "critic": AutoModelForSequenceClassification}[part]
    options = {"num_labels": 1} if part == "critic" else {}
    return auto_class.from_pretrained(Path(folder) / part, **options).state_dict()


def same_weights(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def architecture(folder):
    """What a compiled graph knows of a model, as text: its config but for the ids of special tokens."""
    path = Path(folder or "nowhere") / "config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    return str(sorted(item for item in config.items() if not item[0].endswith("_token_id")))


@pytest.fixture(scope="module")
def settings(request, tmp_path_factory, gpt2_folder):
    """`settings(output_dir, **changes)`: flags of a run that takes half a second. Its files: `settings.folder`. Every run
    that does not say otherwise is compiled with `pytest --compiled`."""
    folder = tmp_path_factory.mktemp("task")
    rows = [{"prompt": prompt, "bonus": i / 4, "note": "n"} for i, prompt in enumerate(PROMPTS)]
    dataset = write_jsonl(folder / "prompts.jsonl", rows)
    (folder / "rewards.py").write_text(REWARDS)

    def make(output_dir, reward="share_of_a", updates=1, **changes):
        flags = {"model": gpt2_folder, "dataset": dataset, "output_dir": str(output_dir)}
        flags |= {"reward_fn": f"{folder / 'rewards.py'}:{reward}"} if reward else {}
        flags |= {"batch_size": 16, "micro_batch_size": 16, "num_epochs": 1, "num_minibatches": 1}
        flags |= {"query_length": 8, "response_length": 16, "total_episodes": updates * changes.get("batch_size", 16)}
        flags |= {"compile": make.compile, "missing_eos_score": "none"} | changes
        key = (architecture(flags["model"]), flags.get("precision"))
        if flags["compile"] and key not in COMPILED:  # a compiled decoding step does not look whose modules it has
            torch.compiler.reset()
            COMPILED[:] = [key]
        return flags

    make.folder = folder
    make.compile = any(map(request.config.getoption, ("--compiled", "--compile_once")))
    return make


@pytest.fixture
def compiled(request, settings):
    """Whether this test's runs are compiled (parameters: indirect)."""
    torch.compiler.reset()
    before, settings.compile = settings.compile, request.param
    yield request.param
    settings.compile = before


def run(flags):
    ppo_rlhf.main(ppo_rlhf.Args(**flags))
    return Path(flags["output_dir"])


def run_on_rank(rank, flags):
    """A run on two connected ranks or (rank None) alone; the text of the user's mistake, if there is one."""
    if flags["compile"] and rank is not None:  # alone, `settings` does
        torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch:
        ranks = Ranks(rank or 0, 1 if rank is None else 2, torch.device("cpu"))
        patch.setattr(ppo_rlhf, "init_ranks", lambda: ranks)
        try:
            run(flags)
        except UserError as error:
            return str(error)


def watched(rank, flags):
    """Of each optimizer step of a run: the gradients it saw and the parameters it left, as numpy arrays.

    Plain gradient steps stand in for AdamW, whose first step is lr * sign(gradient) nearly everywhere: where a gradient
    is 0 but for rounding, that would turn nothing into a difference.
    """
    steps = []

    class Watched(torch.optim.SGD):
        def __init__(self, parameters, lr, **options):
            super().__init__(parameters, lr=lr)

        def step(self, closure=None):
            parameters = self.param_groups[0]["params"]
            gradients = [p.grad.numpy().copy() for p in parameters]
            super().step(closure)
            steps.append((gradients, [p.detach().numpy().copy() for p in parameters]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", Watched)
        assert run_on_rank(rank, flags) is None
    return steps


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves behind


@pytest.fixture(scope="module")
def long_flags(settings):
    """Three updates with all there is: epochs, minibatches, micro-batches, adaptive KL, a monitor, checkpoints."""

    def flags(output_dir, **changes):
        sizes = {"num_epochs": 2, "num_minibatches": 2, "micro_batch_size": 3, "save_every": 1}
        controller = {
            "target_kl_nats": 0.5,
            "kl_horizon": 100,
            "monitor_fn": f"{settings.folder / 'rewards.py'}:letters",
        }
        return settings(output_dir, updates=3, **sizes, **controller, **changes)

    return flags


@pytest.fixture(scope="module")
def finished(tmp_path_factory, long_flags):
    return run(long_flags(tmp_path_factory.mktemp("runs") / "finished"))


def test_metrics_are_the_documented_ones(finished):
    metrics = lines(finished)
    assert [line["step"] for line in metrics] == [1, 2, 3]
    for line in metrics:
        assert line.keys() == KEYS | {"step", "monitor/letters"}
        assert all(math.isfinite(value) for value in line.values())
    assert [line["episode"] for line in metrics] == [16, 32, 48]
    assert [line["lr"] for line in metrics] == pytest.approx([3e-4, 2e-4, 1e-4])  # the last is lr / N, not 0
    state = torch.load(finished / "checkpoints" / "step_000003.pt", weights_only=True)
    assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-4)  # and the optimizer's own


def test_identities_between_metrics(finished):
    metrics = lines(finished)
    for line in metrics:
        assert line["objective/non_score_reward"] == pytest.approx(-line["kl_coef"] * line["objective/kl"], abs=1e-7)
        assert line["objective/rlhf_reward"] == pytest.approx(
            line["objective/scores"] + line["objective/non_score_reward"], abs=1e-7
        )
    assert metrics[0]["objective/kl"] == 0.0  # policy and reference start as one, exactly
    assert metrics[1]["objective/kl"] != 0.0
    for line, following in itertools.pairwise(metrics):  # the coefficient that is logged is the one that was used
        error = min(max(line["objective/kl"] / 0.5 - 1, -0.2), 0.2)
        assert following["kl_coef"] == pytest.approx(line["kl_coef"] * (1 + error * 16 / 100))


def test_samples_add_up_to_the_metrics(finished):
    metrics = lines(finished)
    for line in (metrics[0], metrics[-1]):  # samples are shown at the first update, the last, and every tenth
        samples = [row for row in lines(finished, "samples.jsonl") if row["step"] == line["step"]]
        assert len(samples) == 16  # the whole batch
        assert all(row.keys() == {"step", "query", "response", "score", "kl"} for row in samples)
        assert {row["query"] for row in samples} <= set(PROMPTS)
        assert [row["score"] for row in samples] == pytest.approx([r["response"].count("a") / 6 for r in samples])
        lengths = [min(len(row["response"]) + 1, 16) for row in samples]  # a token a letter, and the EOS
        means = {
            "objective/scores": [row["score"] for row in samples],
            "objective/kl": [row["kl"] for row in samples],
            "monitor/letters": [len(row["response"]) for row in samples],
            "val/sequence_lengths": lengths,
            "val/has_eos": [len(row["response"]) < 16 for row in samples],
        }
        assert 0 < line["val/has_eos"] < 1
        for name, values in means.items():
            assert line[name] == pytest.approx(sum(values) / 16, abs=1e-6), name


def test_saved_folders_load_plainly(finished, gpt2_folder):
    state = torch.load(finished / "checkpoints" / "step_000003.pt", weights_only=True)["model"]
    assert {tensor.dtype for tensor in state.values()} <= {torch.float32, torch.bool, torch.uint8}
    for part, auto_class in [("model", AutoModelForCausalLM), ("critic", AutoModelForSequenceClassification)]:
        options = {"num_labels": 1} if part == "critic" else {}
        model, info = auto_class.from_pretrained(finished / part, output_loading_info=True, **options)
        assert not any(info.values()), info
        name = "policy." if part == "model" else "critic."
        live = auto_class.from_config(model.config).eval()
        live.load_state_dict({key.removeprefix(name): x for key, x in state.items() if key.startswith(name)})
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            assert torch.equal(model.eval()(ids).logits, live(ids).logits)
    start = AutoModelForCausalLM.from_pretrained(gpt2_folder).state_dict()
    assert not same_weights(weights(finished), start)
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "|")
    record = json.loads((finished / "args.json").read_text())
    assert (
        record["args"]["lr"] == 3e-4 and record["world_size"] == 1 and {"argv", "commit", "versions"} <= record.keys()
    )


# ----------------------------------------------------------------------------------------------------------------------
# The same again, and resumed


def test_same_seed_same_run(finished, long_flags, tmp_path):
    again = run(long_flags(tmp_path / "again"))
    assert timeless(again) == timeless(finished)
    assert lines(again, "samples.jsonl") == lines(finished, "samples.jsonl")
    for part in ("model", "critic"):
        assert same_weights(weights(again, part), weights(finished, part))
    other = run(long_flags(tmp_path / "other", seed=2))
    assert timeless(other)[0] != timeless(finished)[0]


def interrupted(finished, folder, step, half_a_line=True):
    """A copy of a run as it is after a kill behind `step`: later lines may be there, the models are not."""
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("model", "critic"))
    for path in (folder / "checkpoints").iterdir():
        if int(path.stem.removeprefix("step_")) > step:
            path.rename(f"{path}.tmp")  # a checkpoint that was being written
    if half_a_line:
        with open(folder / "metrics.jsonl", "a") as file:
            file.write('{"step": 4, "objective/kl"')
    return str(folder)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_resumed_run_ends_as_if_never_interrupted(finished, tmp_path, step):
    """Behind step 3 only the model folders are missing: there is nothing to train, and all to save."""
    folder = interrupted(finished, tmp_path / "run", step)
    ppo_rlhf.main(ppo_rlhf.Args(resume=folder))
    assert timeless(folder) == timeless(finished)
    assert lines(folder, "samples.jsonl") == lines(finished, "samples.jsonl")
    for part in ("model", "critic"):
        assert same_weights(weights(folder, part), weights(finished, part))


def test_resuming_what_cannot_be_resumed(finished, tmp_path):
    with pytest.raises(UserError, match="--resume"):
        ppo_rlhf.main(ppo_rlhf.Args(resume=str(tmp_path)))
    shutil.copytree(finished, tmp_path / "unfinished", ignore=shutil.ignore_patterns("model"))
    with pytest.raises(UserError, match="--lr"):
        ppo_rlhf.main(ppo_rlhf.Args(resume=str(tmp_path / "unfinished"), lr=1.0))
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="finished"):  # model/ is there already
        ppo_rlhf.main(ppo_rlhf.Args(resume=str(finished)))
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


# ----------------------------------------------------------------------------------------------------------------------
# What an update must keep


@pytest.mark.parametrize(
    ("kind", "precision", "compiled"),
    [
        pytest.param("gpt2", "fp32", False, id="gpt2-fp32"),
        pytest.param("llama", "fp32", False, id="llama-fp32"),
        pytest.param("gpt2", "bf16", False, id="gpt2-bf16"),
        pytest.param("gpt2", "fp32", True, id="compiled"),
    ],
    indirect=["compiled"],
)
def test_learning_rate_zero_changes_nothing(settings, tmp_path, monkeypatch, request, kind, precision, compiled):
    """Every later epoch and minibatch meets its own old log-probabilities, whatever rows it is batched with."""
    model, furthest, original = request.getfixturevalue(f"{kind}_folder"), [], ppo_rlhf.policy_loss

    def watching(*args):
        answer = original(*args)
        furthest.append((answer[1] - 1).abs().max().item())
        return answer

    monkeypatch.setattr(ppo_rlhf, "policy_loss", watching)
    sizes = {"num_epochs": 3, "num_minibatches": 2, "micro_batch_size": 4, "updates": 2}
    folder = run(settings(tmp_path / "run", model=model, lr=0.0, precision=precision, save_every=2, **sizes))
    assert len(furthest) == 24
    assert max(furthest) < (1e-5 if precision == "fp32" else 0.2 if torch.cuda.is_available() else 1e-3)
    tolerance = 1e-6 if precision == "fp32" else 1e-2
    for line in lines(folder):
        assert line["val/ratio"] == pytest.approx(1, abs=tolerance)
        assert line["policy/approxkl_avg"] < (1e-9 if precision == "fp32" else 1e-3)
        assert line["policy/clipfrac_avg"] == 0 and line["val/clipfrac_avg"] == 0
        for name in ("objective/kl", "objective/non_score_reward"):  # compiled, the reference is a graph of its own
            assert line[name] == pytest.approx(0, abs=tolerance if compiled else 0)
        assert line["optim/grad_norm"] > 0.01
    assert same_weights(weights(folder), AutoModelForCausalLM.from_pretrained(model).state_dict())
    saved = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")
    assert saved.dtype == torch.float32


def test_first_loss_of_a_zero_critic(settings, tmp_path):
    """With a reward function V = 0 and KL = 0 at first: lam = gamma = 1 makes every token's return its score.

    The whitened advantages of one minibatch over the whole batch have mean 0, and the ratio is 1: so has the loss.
    """
    folder = run(settings(tmp_path / "run", lam=1.0, gamma=1.0))
    metrics, samples = lines(folder)[0], lines(folder, "samples.jsonl")
    lengths = [min(len(row["response"]) + 1, 16) for row in samples]
    errors = sum(n * 0.5 * row["score"] ** 2 for n, row in zip(lengths, samples, strict=True))
    assert metrics["loss/value_avg"] == pytest.approx(errors / sum(lengths), rel=1e-5)
    assert metrics["loss/policy_avg"] == pytest.approx(0, abs=1e-6)
    assert metrics["val/explained_var"] == pytest.approx(0, abs=1e-5)
    assert len({row["score"] for row in samples}) > 1


@pytest.mark.parametrize(
    ("kind", "compiled"), [("gpt2", False), ("llama", False), ("llama", True)], indirect=["compiled"]
)
def test_first_step_is_the_policy_gradient(settings, tmp_path, request, kind, compiled):
    """The gradient of the first step worked out row by row, without padding, batches or any function of the script.

    V = 0 and KL = 0, so A_t = (gamma * lam)^(n - 1 - t) * score for n tokens; then whitened; at ratio 1 the loss is
    -A * logprob, and of the critic's weights the zero head alone can move.
    """
    sizes = {"gamma": 0.9, "lam": 0.8, "temperature": 0.7, "vf_coef": 0.3, "max_grad_norm": 0.0, "micro_batch_size": 5}
    model = request.getfixturevalue(f"{kind}_folder")
    [(gradients, _)] = watched(None, settings(tmp_path / "run", "letters", model=model, **sizes))
    policy = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer, forbidden = AutoTokenizer.from_pretrained(model), torch.arange(31) == 0
    logprobs, advantages, hidden = [], [], []
    for row in lines(tmp_path / "run", "samples.jsonl"):
        query, response = tokenizer(row["query"]).input_ids, tokenizer(row["response"]).input_ids
        response += [tokenizer.eos_token_id] * (len(response) < 16)
        ids, n = torch.tensor([query + response]), len(response)
        logits = policy(ids).logits[0, -n - 1 : -1].masked_fill(forbidden, -math.inf)
        logprobs.append(torch.log_softmax(logits / 0.7, -1)[range(n), response])
        hidden.append(policy.base_model(ids).last_hidden_state[0, -n - 1 : -1].detach())
        advantages.append(torch.tensor([0.72 ** (n - 1 - t) * row["score"] for t in range(n)]))
    logprobs, advantages, hidden = map(torch.cat, (logprobs, advantages, hidden))
    whitened = (advantages - advantages.mean()) / advantages.std(correction=0)
    (-whitened * logprobs).mean().backward()
    expected = [p.grad.numpy() for p in policy.parameters()]
    assert apart(gradients[: len(expected)], expected) < 1e-4
    *trunk, head = gradients[len(expected) :]
    assert not any(gradient.any() for gradient in trunk)
    assert apart([head[0]], [-0.3 * (advantages[:, None] * hidden).mean(0).numpy()]) < 1e-4
    everything = sum((gradient.astype("float64") ** 2).sum() for gradient in gradients) ** 0.5
    assert lines(tmp_path / "run")[0]["optim/grad_norm"] == pytest.approx(everything, rel=1e-5)


def test_gradients_are_clipped_to_max_grad_norm(settings, tmp_path):
    [(gradients, _)] = watched(None, settings(tmp_path / "run", "letters", max_grad_norm=0.01))
    assert sum((gradient**2).sum() for gradient in gradients) ** 0.5 == pytest.approx(0.01, rel=1e-3)
    assert lines(tmp_path / "run")[0]["optim/grad_norm"] > 0.1  # what is logged is the norm before


def test_clip_ranges_reach_the_losses(settings, tmp_path):
    """A second step meets a new policy and new values; what is clipped then depends on the two flags."""
    for name, cliprange, cliprange_value in [("narrow", 1e-4, 1e-4), ("policy", 1e-4, 1e4), ("value", 1e4, 1e-4)]:
        clips = {"cliprange": cliprange, "cliprange_value": cliprange_value}
        line = lines(run(settings(tmp_path / name, "letters", num_epochs=2, lr=1e-3, **clips)))[0]
        assert (line["policy/clipfrac_avg"] > 0.1) == (cliprange < 1)
        assert (line["val/clipfrac_avg"] > 0.01) == (cliprange_value < 1)
        assert line["policy/approxkl_avg"] > 1e-6


def test_reward_that_is_always_zero(settings, tmp_path):
    """Nothing to learn and no variance to explain is no reason for a NaN, in the metrics or in the weights."""
    folder = run(settings(tmp_path / "run", "nothing", kl_coef=0.0, updates=2))
    for line in lines(folder):
        assert all(math.isfinite(value) for value in line.values())
    assert all(tensor.isfinite().all() for tensor in weights(folder).values())


def apart(first, second):
    """The largest difference of two lists of arrays: relative to each one's norm, or to a thousandth of the largest."""
    norms = [(b**2).sum() ** 0.5 for b in second]
    differences = [((a - b) ** 2).sum() ** 0.5 for a, b in zip(first, second, strict=True)]
    return max(d / max(norm, 1e-3 * max(norms)) for d, norm in zip(differences, norms, strict=True))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_micro_batches_and_ranks_do_not_change_the_update(settings, tmp_path, on_two_ranks, request, kind):
    """Rows of unequal length in two epochs of two minibatches, dealt out in three ways."""
    model = request.getfixturevalue(f"{kind}_folder")
    flags = {"num_epochs": 2, "num_minibatches": 2, "max_grad_norm": 0.0, "lr": 1e-2, "model": model}
    whole = watched(None, settings(tmp_path / "whole", **flags))
    small = watched(None, settings(tmp_path / "small", **flags, micro_batch_size=2))
    first, second = on_two_ranks(watched, settings(tmp_path / "ranks", **flags, micro_batch_size=3))
    assert len(whole) == len(small) == len(first) == len(second) == 4  # epochs * minibatches, and no step more
    assert 0 < lines(tmp_path / "whole")[0]["val/has_eos"] < 1
    for other in (small, first):
        for (gradients, parameters), (their_gradients, their_parameters) in zip(other, whole, strict=True):
            assert apart(gradients, their_gradients) < 1e-5
            assert apart(parameters, their_parameters) < 1e-5
    assert apart(whole[1][0], whole[0][0]) > 0.1  # another minibatch has another gradient
    for mine, theirs in zip(first, second, strict=True):  # after every step all ranks hold the same numbers
        assert all((a == b).all() for a, b in zip(mine[0] + mine[1], theirs[0] + theirs[1], strict=True))
    samples = [lines(tmp_path / name, "samples.jsonl") for name in ("ranks", "whole")]
    assert len(samples[0]) == 8  # rank 0's own rows, which are the first of the batch
    for mine, theirs in zip(*samples, strict=False):
        assert (mine["query"], mine["response"]) == (theirs["query"], theirs["response"])


def test_scoring_and_update_compute_little_padding(settings, tmp_path, monkeypatch, gpt2_rm_folder):
    """Micro-batches hold rows of similar length and are cut behind the longest, at a multiple of 8 tokens or the limit."""
    forward, seen, scored = ppo_rlhf.ActorCritic.forward, [], []

    def spy(self, input_ids, attention_mask, response_length, *inputs):
        assert input_ids.shape == attention_mask.shape and input_ids.shape[1] - response_length == 7
        (seen if torch.is_grad_enabled() else scored).append((response_length, attention_mask[:, 7:].sum(1)))
        return forward(self, input_ids, attention_mask, response_length, *inputs)

    def score(model, input_ids, attention_mask):
        judged.append((input_ids.shape[1] - 7, attention_mask[:, 7:].sum(1)))
        return last_token_scores(model, input_ids, attention_mask)

    last_token_scores, judged = ppo_rlhf.last_token_scores, []
    monkeypatch.setattr(ppo_rlhf.ActorCritic, "forward", spy)
    monkeypatch.setattr(ppo_rlhf, "last_token_scores", score)
    flags = {"reward_model": gpt2_rm_folder, "num_epochs": 3, "micro_batch_size": 4, "num_minibatches": 2}
    folder = run(settings(tmp_path / "run", None, response_length=20, **flags))
    tokens = 16 * lines(folder)[0]["val/sequence_lengths"]
    assert sum(lengths.sum().item() for _, lengths in seen) == pytest.approx(3 * tokens)  # and none of them is lost
    assert sum(lengths.sum().item() for _, lengths in scored) == pytest.approx(2 * tokens)  # by policy and by reference
    assert [width for width, _ in judged] == [width for width, _ in scored[::2]]  # the reward model reads the same rows
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(judged, scored[::2], strict=True))
    assert len(seen) == 12 and {width for width, _ in seen} == {8, 16, 20}
    assert len(scored) == 8 and len({width for width, _ in scored}) > 1
    for width, lengths in seen + scored:
        assert width == min(-(-lengths.max() // 8) * 8, 20)
    for (_, first), (_, second) in zip(seen[::2], seen[1::2], strict=True):
        assert first.max() <= second.min()
    for (_, first), (_, second) in zip(scored[:-2], scored[2:], strict=True):
        assert first.max() <= second.min()


@pytest.mark.parametrize(
    ("kind", "attention", "flags"),
    [("gpt2", "sdpa", {"response_length": 9}), ("llama", "eager", {"value_trunk": "shared", "seed": 2})],
    ids=["gpt2", "llama"],
)
def test_layers_share_a_graph_for_all_lengths(settings, tmp_path, monkeypatch, tokenizer, kind, attention, flags):
    """As many graphs with three layers as with one: of a layer without a gradient, trained or frozen, and with one; of the
    log-probabilities without and with; of the prefill and of a decoding step. No layer of any model is left out, and no
    number is an input: with one (the temperature) the compiler does most of its work twice."""
    compile_, load_models, models, numbers = torch.compile, ppo_rlhf.load_models, [], []
    depth, is_full = "n_layer" if kind == "gpt2" else "num_hidden_layers", set()

    def kept(*inputs):
        models[:] = filter(None, load_models(*inputs))
        for model in models:
            model.set_attn_implementation(attention)
            model.base_model.register_forward_pre_hook(masks, with_kwargs=True)
        return (*models, None)  # no reward model

    def masks(model, inputs, options):
        if len(options["attention_mask"]) > 1 and not options["use_cache"]:
            is_full.add(bool(options["attention_mask"].all()))

    class Counter(CompileCounter):
        def __call__(self, graph, inputs):
            numbers.extend(x for x in inputs if isinstance(x, torch.Tensor) and x.dtype == torch.float64)
            return super().__call__(graph, inputs)

    monkeypatch.setattr(ppo_rlhf, "load_models", kept)
    path = write_jsonl(tmp_path / "same.jsonl", [{"prompt": text} for text in ("ab", "cd", "ef", "gh")])
    for layers in (1, 3):
        torch.compiler.reset()
        utils.init_ranks()  # tells the compiler that sizes which are equal by chance are not one
        counter = Counter()

        def counting(function, dynamic=None, fullgraph=False, options=None, counter=counter):
            return compile_(function, dynamic=dynamic, fullgraph=fullgraph, backend=counter)

        monkeypatch.setattr(torch, "compile", counting)
        model = build_folder(tmp_path / f"model_{layers}", kind, "lm", tokenizer, seed=1, **{depth: layers})
        sizes = {"updates": 3, "batch_size": 32, "micro_batch_size": 4, "stop_token": "ab", "dataset": path}
        try:
            folder = run(settings(tmp_path / f"run_{layers}", model=model, compile=True, **sizes, **flags))
        except torch._dynamo.exc.Unsupported as error:
            raise AssertionError("the decoding step is not one graph") from error
        assert len({line["val/sequence_lengths"] for line in lines(folder)}) == 3
        assert counter.frame_count == 7 and not numbers
        found = [x for model in models for x in model.modules() if isinstance(x, GradientCheckpointingLayer)]
        assert len(found) == 3 * layers and all(x._compiled_call_impl for x in found)
    assert is_full == {True, False}


def test_compiled_on_cpu_a_step_computes_the_causal_mask_once(settings, tmp_path, monkeypatch, tokenizer):
    """With a run's own options. Left to itself the compiler computes it anew in the softmax of every layer."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # the settings of a machine without
    compile_, options = torch.compile, {}

    class Seen(Exception):
        pass

    def seen(function, **given):
        assert function is ppo_rlhf.decode_step
        options.update(given)
        raise Seen

    folder = build_folder(tmp_path / "model", "llama", "lm", tokenizer, seed=1, num_hidden_layers=2)
    with pytest.raises(Seen), monkeypatch.context() as patch:
        patch.setattr(torch, "compile", seen)
        run(settings(tmp_path / "run", model=folder, compile=True))
    model = utils.load_pretrained(AutoModelForCausalLM, folder)[0]
    queries, query_mask = ppo_rlhf.left_pad([[7, 8, 9], [10, 11, 12, 13, 14]], 5, 0, "cpu")

    def sample(step):
        uniforms = torch.rand(2, 6, generator=torch.Generator().manual_seed(1))
        return ppo_rlhf.generate(model, queries, query_mask, uniforms, 1.0, [], 0, step=step)

    responses, codes = run_and_get_code(sample, compile_(ppo_rlhf.decode_step, **options))
    assert torch.equal(responses, sample(ppo_rlhf.decode_step))
    for code in codes:  # of the prefill, and of a step: its kernels, each behind the line that names it
        kernels = re.split(r'^extern "C"', code, flags=re.MULTILINE)
        assert sum(str(torch.finfo(torch.float32).min) in kernel for kernel in kernels) == 1
    assert len(codes) == 2


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_metrics_on_one_and_two_ranks(settings, tmp_path, on_two_ranks, request, kind):
    """Every metric of a line is the same claim, however the work is cut."""
    flags = {"model": request.getfixturevalue(f"{kind}_folder")}
    flags |= {"monitor_fn": f"{settings.folder / 'rewards.py'}:letters", "missing_eos_score": -1.0}
    run(settings(tmp_path / "whole", **flags))
    run(settings(tmp_path / "small", **flags, micro_batch_size=2))
    assert on_two_ranks(run_on_rank, settings(tmp_path / "ranks", **flags, micro_batch_size=5)) == [None, None]
    for name in ("small", "ranks"):
        assert timeless(tmp_path / name)[0] == pytest.approx(timeless(tmp_path / "whole")[0], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("penalty", [-7.0, "none"])
def test_missing_eos_score(settings, tmp_path, penalty):
    folder = run(settings(tmp_path / "run", "letters", missing_eos_score=penalty))
    samples = lines(folder, "samples.jsonl")
    endless = [len(row["response"]) == 16 for row in samples]
    assert any(endless) and not all(endless)
    for row, has_no_eos in zip(samples, endless, strict=True):
        assert row["score"] == (penalty if has_no_eos and penalty != "none" else len(row["response"]))
    assert lines(folder)[0]["objective/scores"] == pytest.approx(sum(row["score"] for row in samples) / 16)


def test_columns_reach_the_reward_function_in_order(settings, tmp_path):
    folder = run(settings(tmp_path / "run", "bonus", updates=2))
    for row in lines(folder, "samples.jsonl"):
        assert row["score"] == PROMPTS.index(row["query"]) / 4
    seen = [row["query"] for row in lines(folder, "samples.jsonl")]
    assert set(seen[:12]) == set(seen[12:24]) == set(PROMPTS)  # a pass is every prompt once


def test_learns_to_say_a_letter(settings, tmp_path):
    flags = {
        "response_length": 6,
        "lr": 1e-2,
        "num_epochs": 4,
        "batch_size": 32,
        "micro_batch_size": 32,
        "kl_coef": 0.01,
    }
    scores = [line["objective/scores"] for line in lines(run(settings(tmp_path / "run", updates=20, **flags)))]
    assert scores[0] < 0.15  # one letter in thirty by chance
    assert sum(scores[-4:]) / 4 > 0.6


# ----------------------------------------------------------------------------------------------------------------------
# Reward model, and other models


def test_reward_model_scores_and_starts_the_critic(settings, tmp_path, llama_folder, llama_rm_folder):
    """The reward model's config is centred at 0.75; scores are recomputed row by row with the plain class."""
    flags = {"model": llama_folder, "reward_model": llama_rm_folder, "lr": 0.0}
    folder = run(settings(tmp_path / "run", None, **flags))
    start = AutoModelForSequenceClassification.from_pretrained(llama_rm_folder, num_labels=1)
    critic, info = AutoModelForSequenceClassification.from_pretrained(
        folder / "critic", num_labels=1, output_loading_info=True
    )
    assert not any(info.values()), info
    assert critic.config.score_mean == 0.75
    assert same_weights(critic.state_dict(), start.state_dict())
    tokenizer, samples = AutoTokenizer.from_pretrained(llama_folder), lines(folder, "samples.jsonl")
    for row in samples:
        ids = tokenizer(row["query"]).input_ids + tokenizer(row["response"]).input_ids
        ids += [tokenizer.eos_token_id] * (len(row["response"]) < 16)
        with torch.no_grad():
            score = start(torch.tensor([ids])).logits.item() - 0.75
        assert row["score"] == pytest.approx(score, abs=1e-4)
    scores = [row["score"] for row in samples]
    assert max(scores) - min(scores) > 0.1
    trained = run(settings(tmp_path / "trained", None, **flags | {"lr": 1e-2, "updates": 2}))
    second = [row for row in lines(trained, "samples.jsonl") if row["step"] == 2]
    for row in second:  # the critic has learned by now, the reward model has not
        ids = tokenizer(row["query"]).input_ids + tokenizer(row["response"]).input_ids
        ids += [tokenizer.eos_token_id] * (len(row["response"]) < 16)
        with torch.no_grad():
            assert row["score"] == pytest.approx(start(torch.tensor([ids])).logits.item() - 0.75, abs=1e-4)
    assert second
    assert not same_weights(weights(trained, "critic"), start.state_dict())
    assert not same_weights(weights(trained), AutoModelForCausalLM.from_pretrained(llama_folder).state_dict())


def test_model_without_a_pad_token(settings, tmp_path, llama_folder):
    """A pad token is added, the policy grows by a row that is never sampled, and both folders load plainly."""
    folder = tmp_path / "no_pad"
    shutil.copytree(llama_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<pad>"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    done = run(settings(tmp_path / "run", model=str(folder)))
    for part, auto_class in [("model", AutoModelForCausalLM), ("critic", AutoModelForSequenceClassification)]:
        options = {"num_labels": 1} if part == "critic" else {}
        model, info = auto_class.from_pretrained(done / part, output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(done / part)
        assert not any(info.values()), info
        assert tokenizer.pad_token == "[PAD]" and tokenizer.pad_token_id == 31
        ids = tokenizer(["ab", "abcd"], padding=True, return_tensors="pt")
        assert model(**ids).logits.isfinite().all()  # a batch with padding, as anyone would feed it


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.fixture
def refused(capsys):
    """Exit code 1, one line with every fragment, and nothing written."""

    def check(flags, *fragments):
        refuses(capsys, "ppo_rlhf", flags, "".join(f"(?=.*{re.escape(str(fragment))})" for fragment in fragments))

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
        ({"num_minibatches": 0}, ["--num_minibatches"]),
        ({"query_length": 0}, ["--query_length"]),
        ({"reward_fn": "nowhere.py:f"}, ["--reward_fn", "nowhere.py"]),
        ({"monitor_fn": "nowhere.py:f"}, ["--monitor_fn", "nowhere.py"]),
        ({"reward_fn": "share_of_a"}, ["--reward_fn", "file.py:function"]),
        ({"reward_model": "somewhere"}, ["--reward_model", "--reward_fn"]),  # both
        ({"min_length": 16, "missing_eos_score": -1.0}, ["--min_length", "--response_length"]),  # every score a -1
        ({"target_kl_nats": 2.0, "kl_coef": 0.0}, ["--target_kl_nats", "--kl_coef"]),  # 0 stays 0, whatever it is times
        ({"stop_token": ""}, ["--stop_token"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refused_flags(refused, settings, tmp_path, changes, fragments):
    refused(settings(tmp_path / "run") | changes, *fragments)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("micro_batch_size", 0), ("num_epochs", 0), ("response_length", 0), ("temperature", 0.0)),
        *(("max_grad_norm", -1.0), ("lr", -1e-3), ("lr", math.nan), ("kl_coef", -0.1), ("vf_coef", math.inf)),
        *(("cliprange", 0.0), ("cliprange_high", 0.0), ("cliprange_high", -0.1), ("cliprange_value", 0.0)),
        *(("gamma", 1.01), ("gamma", -0.5), ("lam", 1.5), ("entropy_coef", -0.1), ("early_stop_kl", 0.0)),
        ("response_length", 60),  # with its prompt beyond the 64 positions of the model
    ],
)
def test_refused_sizes(refused, settings, tmp_path, flag, value):
    """Each would end in a traceback, in NaN, or in a run that trains nothing or something else than it says."""
    refused(settings(tmp_path / "run") | {flag: value}, f"--{flag}")


def test_refused_data(refused, settings, tmp_path):
    path = tmp_path / "rows.jsonl"
    for rows, fragments in [
        ([{"question": "a", "answer": "b"}], [path, "prompt", "question", "answer"]),
        ([], [path, "empty"]),
        ([{"prompt": "abcdefghi"}] * 3, [path, "--query_length", "8"]),
        ([{"prompt": "abc"}, {"prompt": ""}], [path, "row 2"]),
        ([{"prompt": [{"role": "user", "contents": "abc"}]}], [path, "row 1", "role and content"]),
        (
            [{"prompt": [{"role": "user", word: "a"}]} for word in ("content", "contents")],
            [path, "row 2", "role and content"],
        ),
        ([{"prompt": ["a", "b"]}], [path, "row 1", "role and content"]),
    ]:
        refused(settings(tmp_path / "run", dataset=write_jsonl(path, rows)), *fragments)


def test_long_prompts_are_counted_and_left_out(settings, tmp_path, capsys):
    rows = [{"prompt": prompt} for prompt in ("ab", "abcdefghi", "cd", "a" * 30, "abcdefgh")]
    folder = run(settings(tmp_path / "run", dataset=write_jsonl(tmp_path / "rows.jsonl", rows)))
    assert "2 of 5" in capsys.readouterr().out
    assert {row["query"] for row in lines(folder, "samples.jsonl")} == {"ab", "cd", "abcdefgh"}


def test_refused_reward_functions(refused, settings, tmp_path):
    path = settings.folder / "rewards.py"
    refused(settings(tmp_path / "run", "no_such_name"), "--reward_fn", path, "no_such_name")
    refused(settings(tmp_path / "run", "constant"), "--reward_fn", path, "constant")
    for name, fragments in [("too_few", ["too_few", "for 2 responses"]), ("not_a_number", ["nan"])]:
        refused(settings(tmp_path / "run", name), name, *fragments)


def test_refused_models(refused, settings, tmp_path, gpt2_folder, gpt2_rm_folder):
    no_eos = tmp_path / "no_eos"
    shutil.copytree(gpt2_folder, no_eos)
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(no_eos)
    refused(settings(tmp_path / "run", model=str(no_eos)), no_eos, "EOS")
    refused(settings(tmp_path / "run", None, reward_model=gpt2_folder), gpt2_folder, "not a model", "score.weight")
    other = tmp_path / "other"
    shutil.copytree(gpt2_rm_folder, other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    refused(settings(tmp_path / "run", None, reward_model=str(other)), "--reward_model", other, "tokenizer")


def test_no_earlier_stage(refused, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
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


# ----------------------------------------------------------------------------------------------------------------------
# As a user runs it


def command_line(flags):
    """Flags as words; a bool is --compile or --no-compile, None is the word none."""
    words = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", "none" if value is None else str(value)]
    return words


def test_script_runs_from_the_command_line(run_script, settings, tmp_path):
    done = run_script("ppo_rlhf.py", command_line(settings(tmp_path / "run")))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("args.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "model", "critic")
    }
    assert timeless(tmp_path / "run") == timeless(run(settings(tmp_path / "here")))  # and exactly as in this process


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [({"dataset": "nowhere/prompts.jsonl"}, "nowhere/prompts.jsonl"), ({"model": "tests"}, "tests: ")],
    ids=["dataset", "model"],
)
def test_script_refuses_in_one_line(run_script, settings, tmp_path, changes, fragment):
    done = run_script("ppo_rlhf.py", command_line(settings(tmp_path / "run", missing_eos_score=-1.0) | changes))
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert len(errors) == 1 and errors[0].startswith("error:") and fragment in errors[0]
    assert not errors[0].rstrip().endswith(":")  # the sentence is finished
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------------------
# What is sampled, and what is claimed about it


def rows_of(folder, step):
    """(query ids, response ids with the EOS, sample) of the batch of one update, which samples.jsonl shows whole."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    for row in lines(folder, "samples.jsonl"):
        if row["step"] == step:
            ending = [tokenizer.eos_token_id] * (len(row["response"]) < 16)
            yield tokenizer(row["query"]).input_ids, tokenizer(row["response"]).input_ids + ending, row


def test_logged_statistics_are_those_of_the_real_tokens(settings, tmp_path, gpt2_folder):
    """KL and entropies of the second update, token by token under the checkpointed policy and the model it began as."""
    flags = {"lr": 3e-3, "temperature": 0.7, "micro_batch_size": 5, "save_every": 1, "updates": 2}
    folder = run(settings(tmp_path / "run", "letters", **flags))
    reference, policy = (
        AutoModelForCausalLM.from_pretrained(gpt2_folder).requires_grad_(False).eval() for _ in range(2)
    )
    state = torch.load(folder / "checkpoints" / "step_000001.pt", weights_only=True)["model"]
    policy.load_state_dict({k.removeprefix("policy."): x for k, x in state.items() if k.startswith("policy.")})
    forbidden, rows = torch.arange(31) == 0, []
    for query, response, sample in rows_of(folder, 2):
        n, ids = len(response), torch.tensor([query + response])
        both = [
            model(ids).logits[0, -n - 1 : -1].masked_fill(forbidden, -math.inf) / 0.7 for model in (policy, reference)
        ]
        logprobs, ref_logprobs = (torch.log_softmax(x.double(), -1)[range(n), response] for x in both)
        entropy = torch.distributions.Categorical(logits=both[0][:, 1:]).entropy()
        rows.append((logprobs, logprobs - ref_logprobs, entropy))
        assert sample["kl"] == pytest.approx((logprobs - ref_logprobs).sum().item(), abs=1e-4)
    assert min(log_ratio.sum() for _, log_ratio, _ in rows) < -0.01  # a single response's estimate may be negative
    assert min(len(log_ratio) for _, log_ratio, _ in rows) < 16  # and there is padding, which must not count
    logprobs, log_ratios, entropies = map(torch.cat, zip(*rows))
    k3 = torch.expm1(-log_ratios) + log_ratios
    expected = {
        "objective/kl": log_ratios.sum() / 16,
        "objective/kl_per_token": log_ratios.mean(),
        "objective/kl_k3": k3.sum() / 16,
        "objective/kl_k3_per_token": k3.mean(),
        "objective/entropy": -logprobs.sum() / 16,
        "policy/entropy_avg": entropies.mean(),
        "val/sequence_lengths": torch.tensor(len(log_ratios) / 16),
        "val/ratio": torch.tensor(1.0),
    }
    line = lines(folder)[1]
    assert {name: line[name] for name in expected} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-4, abs=1e-5
    )
    assert line["policy/approxkl_avg"] < 1e-9 and line["policy/clipfrac_avg"] == 0


def test_first_value_loss_of_a_reward_model(settings, tmp_path, gpt2_folder, gpt2_rm_folder):
    """Values that are not 0, and gamma and lam apart: the value loss is half the mean square of GAE's estimates."""
    folder = run(settings(tmp_path / "run", None, reward_model=gpt2_rm_folder, gamma=0.9, lam=0.5))
    critic = AutoModelForSequenceClassification.from_pretrained(gpt2_rm_folder, num_labels=1)
    critic.requires_grad_(False).eval()
    advantages, returns = [], []
    for query, response, sample in rows_of(folder, 1):
        hidden = critic.transformer(torch.tensor([query + response])).last_hidden_state[0]
        values, n = (hidden @ critic.score.weight[0])[-len(response) - 1 : -1].double(), len(response)
        rewards = torch.tensor([0.0] * (n - 1) + [sample["score"]], dtype=torch.float64)
        advantages.append(torch.tensor(gae_by_sums(rewards, values, n, 0.9, 0.5)))
        returns.append(advantages[-1] + values)
    advantages, returns = torch.cat(advantages), torch.cat(returns)
    line = lines(folder)[0]
    assert line["loss/value_avg"] == pytest.approx(0.5 * (advantages**2).mean().item(), rel=1e-4)
    explained = 1 - advantages.var(correction=0) / returns.var(correction=0)
    assert line["val/explained_var"] == pytest.approx(explained.item(), abs=1e-4)


@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_sampled_entropy_estimates_the_entropy(settings, tmp_path, temperature):
    """-log p of a token has its distribution's entropy as mean, if the token was sampled from that distribution."""
    line = lines(run(settings(tmp_path / "run", temperature=temperature, lr=0.0, batch_size=128)))[0]
    per_token = line["objective/entropy"] / line["val/sequence_lengths"]
    assert per_token == pytest.approx(line["policy/entropy_avg"], abs=0.08)  # a thousand tokens


def test_every_update_samples_anew(settings, tmp_path):
    dataset = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}] * 16)
    folder = run(settings(tmp_path / "run", dataset=dataset, lr=0.0, updates=2))
    first, second = ([sample["response"] for _, _, sample in rows_of(folder, step)] for step in (1, 2))
    assert len(first) == len(second) == 16
    assert len({*first, *second}) > 24  # no row and no update repeats another's noise


def test_every_epoch_is_the_whole_batch_in_another_order(settings, tmp_path):
    """At learning rate 0 the gradients of an epoch's minibatches add up to the same in each, and are not the same."""
    flags = {"lr": 0.0, "min_length": 16, "num_epochs": 2, "num_minibatches": 2, "max_grad_norm": 0.0}
    steps = [gradients for gradients, _ in watched(None, settings(tmp_path / "run", "vowels", **flags))]
    assert len(steps) == 4 and lines(tmp_path / "run")[0]["val/sequence_lengths"] == 16
    first, second = ([a + b for a, b in zip(*steps[k : k + 2], strict=True)] for k in (0, 2))
    assert apart(first, second) < 1e-4
    assert min(apart(steps[0], steps[2]), apart(steps[0], steps[3])) > 0.05


def test_kl_coefficient_on_two_ranks_follows_the_kl_of_both(settings, tmp_path, on_two_ranks):
    """The target is the KL of the second update, so the third keeps the coefficient unless a rank looks at its own."""
    flags = {"lr": 1e-2, "updates": 3, "kl_horizon": 100}
    target = lines(run(settings(tmp_path / "fixed", **flags)))[1]["objective/kl"]
    assert target > 0.1
    flags |= {"target_kl_nats": target, "save_every": 1}
    assert on_two_ranks(run_on_rank, settings(tmp_path / "ranks", **flags)) == [None, None]
    metrics = lines(tmp_path / "ranks")
    assert metrics[0]["objective/kl"] == 0 and metrics[1]["objective/kl"] == pytest.approx(target, rel=1e-3)
    coefficients = [0.05, 0.05 * (1 - 0.2 * 16 / 100)]  # no KL at first, which is as far below the target as counts
    assert [line["kl_coef"] for line in metrics] == pytest.approx([*coefficients, coefficients[1]], rel=1e-3)
    for line in metrics:  # which would not hold if the other rank had another coefficient
        assert line["objective/non_score_reward"] == pytest.approx(-line["kl_coef"] * line["objective/kl"], rel=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_sampler_is_the_policy_of_the_moment(settings, tmp_path, monkeypatch, precision):
    """Whose weights it shares, or whose rounded copy it is."""
    seen, dtype = [], torch.bfloat16 if precision == "bf16" else torch.float32

    def spy(model, *inputs, **options):
        seen.append({name: parameter.clone() for name, parameter in model.named_parameters()})
        return generate(model, *inputs, **options)

    generate = ppo_rlhf.generate
    monkeypatch.setattr(ppo_rlhf, "generate", spy)
    folder = run(settings(tmp_path / "run", precision=precision, lr=1e-2, updates=2, save_every=1))
    state = torch.load(folder / "checkpoints" / "step_000001.pt", weights_only=True)["model"]
    first, second = seen
    assert same_weights(second, {name: state[f"policy.{name}"].to(dtype) for name in second})
    assert not same_weights(first, second)


def test_the_optimizer_is_adamw_without_decay(finished):
    [group] = torch.load(finished / "checkpoints" / "step_000003.pt", weights_only=True)["optimizer"]["param_groups"]
    assert (group["eps"], group["weight_decay"], tuple(group["betas"])) == (1e-5, 0.0, (0.9, 0.999))


def exploded_on_rank_one(rank, flags):
    """The ratio explodes in the second of three steps, on rank 1 alone. Returns the parameters behind each step."""
    calls, original = [], ppo_rlhf.policy_loss

    def exploding(*args):
        calls.append(0)
        loss, ratio, clipped = original(*args)
        return loss, ratio * (1000 if rank == 1 and len(calls) == 2 else 1), clipped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_rlhf, "policy_loss", exploding)
        return [parameters for _, parameters in watched(rank, flags)]


def test_a_ratio_that_explodes_on_one_rank_stops_both(settings, tmp_path, on_two_ranks):
    first, second = on_two_ranks(exploded_on_rank_one, settings(tmp_path / "run", num_epochs=3))
    assert len(first) == len(second) == 2
    for mine, theirs in zip(first, second, strict=True):
        assert all((a == b).all() for a, b in zip(mine, theirs, strict=True))


def test_prompts_of_messages_run_to_the_end(settings, tmp_path, gpt2_folder):
    """The README allows them: rollout, reward function, the table of samples and samples.jsonl."""
    tokenizer = AutoTokenizer.from_pretrained(gpt2_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(gpt2_folder).save_pretrained(tmp_path / "model")
    prompts = [[{"role": "user", "content": text}] for text in ("ab", "c", "de", "fgh")]
    dataset = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    ppo_rlhf.main(ppo_rlhf.Args(**settings(tmp_path / "run", model=str(tmp_path / "model"), dataset=dataset)))
    queries = [json.loads(line)["query"] for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert queries and all(query in prompts for query in queries)
