"""DPO: log-probabilities and losses against their definitions, the reference, and the loop."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import dpo
import utils
from conftest import (
    assert_same_gradients,
    gradients_of,
    read_jsonl,
    refuses,
    write_jsonl,
)

EOS = 1
LETTERS = "abcdefghijklmnopqrstuvwxyz"
KINDS = ("dpo", "ipo", "simpo", "hinge", "orpo")

# Eleven pairs of uneven lengths; the longer side is chosen in some and rejected in others.
ROWS = [
    {
        "prompt": LETTERS[: 1 + i % 5],
        "chosen": LETTERS[i : i + 1 + i % 7],
        "rejected": LETTERS[3 : 4 + (3 * i) % 8],
    }
    for i in range(11)
]
ROWS[3]["rejected"] = "zz"  # It would be the same as its chosen side.


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def options(tmp_path, gpt2_folder):
    """Three steps over ROWS, without clipping or held-out rows."""
    return {
        "model": gpt2_folder,
        "dataset": write_jsonl(tmp_path / "pairs.jsonl", ROWS),
        "output_dir": str(tmp_path / "run"),
        "batch_size": 4,
        "micro_batch_size": 4,
        "num_epochs": 1,
        "lr": 0.01,
        "max_grad_norm": 0.0,
        "log_every": 1,
        "precision": "fp32",
        "compile": False,
    }


def train(options):
    """Run the script in this process; returns the lines of its metrics."""
    dpo.main(dpo.Args(**options))
    return read_jsonl(f"{options['output_dir']}/metrics.jsonl")


# --------------------------------------------------------------------------------------------------
# Log-probabilities


@pytest.mark.fast
def test_sequence_logprobs_are_the_definition():
    """Sums over the labels of a row, each predicted one position before."""
    logits = normal(3, 5, 7)
    labels = torch.tensor([[-100, 2, 6, 0, -100], [-100, -100, -100, 4, 5], [3, -100, -100, 1, 2]])
    sums, counts = dpo.sequence_logprobs(logits, labels)
    assert counts.tolist() == [3, 2, 2]  # Nothing predicts the first position.
    for i in range(3):
        expected = 0.0
        for t in range(1, 5):
            if labels[i, t] != -100:
                weights = logits[i, t - 1].exp()
                expected += math.log(weights[labels[i, t]] / weights.sum())
        assert sums[i].item() == pytest.approx(expected, abs=1e-12)
    assert dpo.sequence_logprobs(logits.bfloat16(), labels)[0].dtype == torch.float32


@pytest.mark.fast
@pytest.mark.parametrize("with_empty_prompt", [False, True])
def test_logps_are_those_of_the_response_alone(gpt2_folder, with_empty_prompt):
    """Whatever the padding and the other rows; the prompt is read and not counted."""
    model = utils.load_pretrained(AutoModelForCausalLM, gpt2_folder)[0]
    sides = [([2, 3, 4], [5, 6, EOS]), ([7, 8], [8, EOS])]
    if with_empty_prompt:
        sides.append(([], [9, 10, 11, EOS]))
    sums, means = dpo.side_logps(model, sides, dpo.sequence_logprobs, EOS, torch.device("cpu"))
    for i, (prompt_ids, response_ids) in enumerate(sides):
        ids = prompt_ids + response_ids
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        # Without a prompt the first token of the response is not predicted by anything.
        start = max(len(prompt_ids), 1)
        terms = [logprobs[t - 1, ids[t]].item() for t in range(start, len(ids))]
        assert sums[i].item() == pytest.approx(sum(terms), abs=1e-4)
        assert means[i].item() == pytest.approx(sum(terms) / len(terms), abs=1e-4)


# --------------------------------------------------------------------------------------------------
# The loss


def expected_loss(kind, w, v, ref_w, ref_v, beta, smoothing, gamma):
    """Of one pair, in Python floats: (loss, chosen reward, rejected reward)."""

    def minus_log_sigmoid(x):
        return math.log(1 + math.exp(-x))

    if kind in ("dpo", "ipo", "hinge"):
        h = (w - ref_w) - (v - ref_v)
        rewards = (beta * (w - ref_w), beta * (v - ref_v))
    else:
        h = w - v
        rewards = (beta * w, beta * v)
    if kind == "dpo":
        loss = (1 - smoothing) * minus_log_sigmoid(beta * h)
        loss += smoothing * minus_log_sigmoid(-beta * h)
    elif kind == "hinge":
        loss = (1 - smoothing) * max(0, 1 - beta * h) + smoothing * max(0, 1 + beta * h)
    elif kind == "ipo":
        loss = (h - 1 / (2 * beta)) ** 2
    elif kind == "simpo":
        loss = minus_log_sigmoid(beta * h - gamma)
    else:
        odds_w = math.exp(w) / (1 - math.exp(w))
        odds_v = math.exp(v) / (1 - math.exp(v))
        loss = -w + beta * minus_log_sigmoid(math.log(odds_w / odds_v))
    return loss, *rewards


def logps_case(kind):
    """Four logps (6,) below 0, the references None where the kind has none."""
    logps = [-normal(6, seed=seed).abs() - 0.05 for seed in range(4)]
    return logps if kind in ("dpo", "ipo", "hinge") else [*logps[:2], None, None]


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_losses_are_their_definitions(kind, beta):
    smoothing = 0.1 if kind in ("dpo", "hinge") else 0.0
    logps = logps_case(kind)
    losses, chosen, rejected = dpo.dpo_loss(*logps, beta, kind, smoothing, 0.7)
    for i in range(6):
        numbers = [None if x is None else x[i].item() for x in logps]
        expected = expected_loss(kind, *numbers, beta, smoothing, 0.7)
        got = (losses[i].item(), chosen[i].item(), rejected[i].item())
        assert got == pytest.approx(expected, abs=1e-12)


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_differences(kind):
    logps = logps_case(kind)

    def total(chosen, rejected):
        return dpo.dpo_loss(chosen, rejected, *logps[2:], 0.5, kind, 0.0, 0.7)[0]

    inputs = tuple(x.clone().requires_grad_() for x in logps[:2])
    assert torch.autograd.gradcheck(total, inputs, raise_exception=False)


@pytest.mark.fast
def test_at_the_reference_the_loss_is_ln_2_and_the_rewards_are_0():
    chosen, rejected, _, _ = logps_case("dpo")
    losses, *rewards = dpo.dpo_loss(chosen, rejected, chosen, rejected, 0.1, "dpo", 0.2)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)))
    assert all((x == 0).all() for x in rewards)


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["ipo", "simpo", "orpo"])
def test_label_smoothing_is_refused_where_it_does_not_belong(kind):
    with pytest.raises(ValueError, match=f"dpo and hinge, not to {kind}"):
        dpo.dpo_loss(*logps_case(kind), 0.1, kind, 0.1)
    with pytest.raises(ValueError, match="no such loss"):
        dpo.dpo_loss(*logps_case(kind), 0.1, "dop")


# --------------------------------------------------------------------------------------------------
# A step


def expected_gradients(model, pairs, kind, args, reference=None):
    """The gradients of the mean loss over pairs, each side alone and token by token."""
    takes_means = kind in ("ipo", "simpo", "orpo")

    def logps(network, side):
        prompt_ids, response_ids = side
        ids = prompt_ids + response_ids
        logprobs = network(torch.tensor([ids])).logits[0].log_softmax(-1)
        terms = [logprobs[t - 1, ids[t]] for t in range(len(prompt_ids), len(ids))]
        return torch.stack(terms)

    total = 0.0
    for pair in pairs:
        chosen = logps(model, pair["chosen"])
        rejected = logps(model, pair["rejected"])
        numbers = [chosen, rejected]
        if reference is not None:
            with torch.no_grad():
                numbers += [logps(reference, pair["chosen"]), logps(reference, pair["rejected"])]
        numbers = [x.mean() if takes_means else x.sum() for x in numbers]
        w, v = numbers[:2]
        h = w - v
        if reference is not None:
            h = h - (numbers[2] - numbers[3])
        if kind == "dpo":
            loss = -torch.sigmoid(args.beta * h).log()
        elif kind == "hinge":
            loss = torch.relu(1 - args.beta * h)
        elif kind == "ipo":
            loss = (h - 1 / (2 * args.beta)) ** 2
        elif kind == "simpo":
            loss = -torch.sigmoid(args.beta * h - 1).log()
        else:
            odds = [x.exp() / (1 - x.exp()) for x in (w, v)]
            loss = -w - args.beta * torch.sigmoid((odds[0] / odds[1]).log()).log()
        total = total + loss - args.sft_coef * chosen.mean()
    gradients = torch.autograd.grad(total / len(pairs), list(model.parameters()))
    return [gradient.numpy() for gradient in gradients]


@pytest.mark.parametrize(
    ("kind", "live"),
    [*((kind, False) for kind in KINDS), *((kind, True) for kind in dpo.NEEDS_REFERENCE)],
)
def test_the_gradient_is_that_of_the_mean_over_pairs_of_sides(kind, live, options, tokenizer):
    """In the second step too, where policy and reference differ, and with either reference."""
    options |= {"loss": kind, "live_reference": live, "batch_size": 11, "micro_batch_size": 3}
    # orpo has an SFT term of its own.
    sft_coef = 0.0 if kind == "orpo" else 0.3
    options |= {"beta": 0.4, "sft_coef": sft_coef, "num_steps": 2, "lr": 0.01}
    history, _ = gradients_of(None, "dpo", options)
    args = dpo.Args(**options)
    pairs = dpo.load_comparisons(options["dataset"], tokenizer, args)
    model = utils.load_pretrained(AutoModelForCausalLM, options["model"])[0]
    reference = None
    if kind in dpo.NEEDS_REFERENCE:
        reference = utils.load_pretrained(AutoModelForCausalLM, options["model"])[0]
    for step, rate in ((0, 0.01), (1, 0.005)):
        gradients = expected_gradients(model, pairs, kind, args, reference)
        assert_same_gradients([history[step]], [gradients], tolerance=1e-4)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.data -= rate * torch.from_numpy(gradient)


def test_the_first_line_of_metrics(options):
    """Before the first step the policy is the reference."""
    options |= {"eval_dataset": options["dataset"], "micro_batch_size": 3}
    before, *_, last = train(options)
    assert before["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)
    for name in ("chosen", "rejected", "margins"):
        assert before[f"eval/rewards/{name}"] == pytest.approx(0, abs=1e-5)
    assert before["eval/logps/chosen"] < 0
    margin = last["eval/rewards/chosen"] - last["eval/rewards/rejected"]
    assert last["eval/rewards/margins"] == pytest.approx(margin, abs=1e-5)
    assert last["eval/rewards/margins"] > 0
    assert {"train/loss", "train/rewards/accuracies", "train/lr", "optim/grad_norm"} <= last.keys()


def test_the_reference_of_a_resumed_run_is_the_first_model(options, tmp_path, monkeypatch):
    """The run ends in the same bits as one that was never stopped."""
    options |= {"num_steps": 4, "save_every": 2}
    train(options)
    whole = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()

    def power_cut(step):
        if step == 3:
            raise KeyboardInterrupt

    progress = utils.progress

    def cut_off(*args):
        for step in progress(*args):
            power_cut(step)
            yield step

    stopped = options | {"output_dir": str(tmp_path / "stopped")}
    with monkeypatch.context() as patch:
        patch.setattr(utils, "progress", cut_off)
        with pytest.raises(KeyboardInterrupt):
            dpo.main(dpo.Args(**stopped))
    dpo.main(dpo.Args(resume=stopped["output_dir"], compile=False, precision="fp32"))
    assert (tmp_path / "stopped" / "model" / "model.safetensors").read_bytes() == whole


def test_preferences_are_learned(options, tmp_path):
    """The chosen side has an a where the rejected side has a b."""
    rows = [{"prompt": p, "chosen": p + "a", "rejected": p + "b"} for p in LETTERS[2:18]]
    options["dataset"] = write_jsonl(tmp_path / "ab.jsonl", rows)
    options["eval_dataset"] = options["dataset"]
    options |= {"num_epochs": 10, "max_grad_norm": 1.0, "lr": 3e-3, "log_every": 10}
    lines = train(options)
    assert lines[-1]["eval/rewards/accuracies"] == 1.0
    assert lines[-1]["eval/loss"] < 0.5


# --------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.fast
def test_equal_sides_are_left_out_and_counted(tmp_path, tokenizer, capsys):
    """Equal after tokenisation: an EOS that is written out is the one that would be added."""
    rows = [ROWS[0], {"prompt": "a", "chosen": "b", "rejected": "b"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert len(dpo.load_comparisons(path, tokenizer, dpo.Args())) == 1
    assert "left out 1 of 2 rows whose chosen and rejected" in capsys.readouterr().out
    path = write_jsonl(tmp_path / "rows.jsonl", rows[1:])
    with pytest.raises(utils.UserError, match="no row is left: chosen and rejected"):
        dpo.load_comparisons(path, tokenizer, dpo.Args())


@pytest.mark.fast
def test_a_side_with_nothing_to_predict_is_refused(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"chosen": "a", "rejected": ""}])
    with pytest.raises(utils.UserError, match="row 1: a side without a prompt"):
        dpo.load_comparisons(path, tokenizer, dpo.Args())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"beta": 0.0}, "--beta"),
        ({"label_smoothing": 0.5}, "--label_smoothing 0.5"),
        ({"label_smoothing": 0.1, "loss": "ipo"}, "--label_smoothing: .* not to ipo"),
        ({"live_reference": True, "loss": "orpo"}, "--live_reference: --loss orpo"),
        ({"sft_coef": -1.0}, "--sft_coef"),
        ({"sft_coef": 0.1, "loss": "orpo"}, "--sft_coef: --loss orpo already"),
        ({"simpo_gamma": 0.5}, "--simpo_gamma: belongs to --loss simpo"),
        ({"max_length": 2}, "no row is left"),
    ],
)
def test_refused_flags(options, capsys, changes, match):
    refuses(capsys, "dpo", options | changes, match)


def test_log_odds_are_finite_where_a_response_is_certain():
    logps = torch.zeros(1, requires_grad=True)
    losses, _, _ = dpo.dpo_loss(logps, torch.tensor([-1.0]), None, None, 0.1, "orpo")
    losses.sum().backward()
    assert losses.isfinite().all() and logps.grad.isfinite().all()
