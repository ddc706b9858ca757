"""GRPO: advantages, estimates and losses against their definitions, groups, and the loop."""

import math

import pytest
import torch

import grpo_rlhf
import ppo_rlhf
import utils
from conftest import assert_same_gradients, gradients_of, read_jsonl, refuses, write_jsonl
from grpo_rlhf import flat_groups, group_advantages, grpo_loss, k3, loss_normaliser, next_prompts
from utils import Ranks, prompt_order

CPU = torch.device("cpu")
LENGTHS = [4, 1, 6, 2, 3, 6]
KINDS = ("grpo", "dr_grpo", "rloo")
NORMS = ("sequence", "token", "constant")

REWARDS = """
def early_letters(prompts, responses, **columns):
    return [sum(letter < "n" for letter in response) / 6 for response in responses]

def starts_with_a(prompts, responses, **columns):
    return [float(response.startswith("a")) for response in responses]

def ones(prompts, responses, **columns):
    return [1.0] * len(responses)
"""


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mask_of(lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


# --------------------------------------------------------------------------------------------------
# Advantages


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS)
def test_advantages_are_their_definition(kind):
    """Rows of a group are consecutive; the standard deviation is the biased one."""
    scores = normal(12)
    advantages = group_advantages(scores, 4, kind)
    for start in (0, 4, 8):
        group = scores[start : start + 4].tolist()
        mean = sum(group) / 4
        std = math.sqrt(sum((score - mean) ** 2 for score in group) / 4)
        for i, score in enumerate(group):
            others = [x for j, x in enumerate(group) if j != i]
            expected = {
                "grpo": (score - mean) / (std + 1e-4),
                "dr_grpo": score - mean,
                "rloo": score - sum(others) / 3,
            }
            assert advantages[start + i].item() == pytest.approx(expected[kind], abs=1e-12)
        assert advantages[start : start + 4].sum().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.fast
def test_rloo_is_the_difference_to_the_mean_times_g_over_g_minus_1():
    scores = normal(10)
    expected = group_advantages(scores, 5, "dr_grpo") * 5 / 4
    torch.testing.assert_close(group_advantages(scores, 5, "rloo"), expected)


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS)
def test_equal_scores_have_advantages_of_exactly_0(kind):
    """Also where their mean is not exactly their value; other groups are not touched."""
    scores = torch.tensor([0.3] * 6 + [1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert scores[:6].mean() != scores[0]
    assert flat_groups(scores, 6).tolist() == [True, False]
    advantages = group_advantages(scores, 6, kind)
    assert (advantages[:6] == 0).all()
    assert (advantages[6:] != 0).all()


# --------------------------------------------------------------------------------------------------
# k3


@pytest.mark.fast
def test_k3_is_never_negative_and_its_mean_is_the_kl():
    p = normal(7).softmax(-1)
    q = normal(7, seed=1).softmax(-1)
    estimates = k3(p.log(), q.log())
    assert (estimates >= 0).all() and (k3(p.log(), p.log()) == 0).all()
    kl = (p * (p / q).log()).sum()
    assert (p * estimates).sum().item() == pytest.approx(kl.item(), abs=1e-12)


@pytest.mark.fast
def test_the_gradient_of_k3_on_policy_is_that_of_the_other_kl():
    """Of KL(ref, p), by enumeration: samples come from p and carry no gradient of their own."""
    logits = normal(7).requires_grad_()
    q = normal(7, seed=1).softmax(-1)
    logprobs = logits.log_softmax(-1)
    drawn = logprobs.exp().detach()
    (gradient,) = torch.autograd.grad((drawn * k3(logprobs, q.log())).sum(), logits)
    logprobs = logits.log_softmax(-1)
    (forward,) = torch.autograd.grad((q * (q.log() - logprobs)).sum(), logits)
    logprobs = logits.log_softmax(-1)
    (reverse,) = torch.autograd.grad((logprobs.exp() * (logprobs - q.log())).sum(), logits)
    torch.testing.assert_close(gradient, forward)
    assert (gradient - reverse).abs().max() > 0.01


# --------------------------------------------------------------------------------------------------
# The loss


def loss_case():
    """(new_logprobs, logprobs, ref_logprobs, advantages, mask); some ratios are beyond the clip."""
    logprobs = [-normal(6, 6, seed=seed).abs() for seed in range(3)]
    return [*logprobs, normal(6, seed=3), mask_of(LENGTHS, 6)]


def expected_loss(case, args):
    """Token by token, in Python floats."""
    new, old, ref, advantages, mask = case
    total = 0.0
    tokens = mask.sum().item()
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            ratio = math.exp(new[i, t].item() - old[i, t].item())
            clipped = min(max(ratio, 1 - args.cliprange), 1 + args.cliprange_high)
            advantage = advantages[i].item()
            loss = -min(ratio * advantage, clipped * advantage)
            if args.kl_in == "loss":
                x = ref[i, t].item() - new[i, t].item()
                loss += args.kl_coef * (math.exp(x) - 1 - x)
            weight = {
                "sequence": 1 / (len(LENGTHS) * length),
                "token": 1 / tokens,
                "constant": 1 / (len(LENGTHS) * args.response_length),
            }
            total += weight[args.loss_norm] * loss
    return total


def loss_args(norm, **changes):
    flags = {"cliprange": 0.2, "cliprange_high": 0.28, "response_length": 9, "loss_norm": norm}
    return grpo_rlhf.Args(**flags | {"kl_coef": 0.3} | changes)


@pytest.mark.fast
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kl_in", ["loss", "reward"])
def test_the_loss_is_its_definition(norm, kl_in):
    """A KL in the reward is no part of it; nothing outside the mask reaches a number."""
    case = loss_case()
    args = loss_args(norm, kl_in=kl_in)
    loss, stats = grpo_loss(*case, args)
    assert loss.item() == pytest.approx(expected_loss(case, args), abs=1e-12)
    assert stats["policy/clipfrac_avg"].any()
    mask = case[-1]
    spoiled = [torch.where(mask, x, math.nan) for x in case[:3]]
    spoiled[0].requires_grad_()
    spoiled_loss, _ = grpo_loss(*spoiled, *case[3:], args)
    assert spoiled_loss.item() == loss.item()
    (gradient,) = torch.autograd.grad(spoiled_loss, spoiled[0])
    assert gradient.isfinite().all() and (gradient[~mask] == 0).all()


@pytest.mark.fast
@pytest.mark.parametrize("norm", NORMS)
def test_the_gradient_is_that_of_finite_differences(norm):
    case = loss_case()
    args = loss_args(norm)

    def loss(new_logprobs):
        return grpo_loss(new_logprobs, *case[1:], args)[0]

    start = case[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, start, raise_exception=False)


@pytest.mark.fast
@pytest.mark.parametrize("norm", NORMS)
def test_parts_of_a_minibatch_add_up(norm):
    """With the normaliser of the whole; a part may be cut after its longest response."""
    case = loss_case()
    args = loss_args(norm)
    whole, _ = grpo_loss(*case, args)
    normaliser = loss_normaliser(case[-1], norm)
    total = 0.0
    for rows in ([1, 3], [0, 2, 4, 5]):
        width = max(LENGTHS[i] for i in rows)
        part = [x[rows][:, :width] if x.ndim == 2 else x[rows] for x in case]
        total += grpo_loss(*part, args, normaliser)[0]
    torch.testing.assert_close(total, whole)


@pytest.mark.fast
@pytest.mark.parametrize("norm", NORMS)
def test_equal_scores_give_no_gradient(norm):
    case = loss_case()
    case[0].requires_grad_()
    case[3] = group_advantages(torch.full((6,), 0.1, dtype=torch.float64), 3, "grpo")
    loss, _ = grpo_loss(*case, loss_args(norm, kl_coef=0.0))
    (gradient,) = torch.autograd.grad(loss, case[0])
    assert (gradient == 0).all()


@pytest.mark.fast
def test_before_the_first_step_the_loss_of_sequences_is_0():
    """Advantages sum to 0 and ratios are 1; the gradient is not 0."""
    case = loss_case()
    case[0] = case[1].clone().requires_grad_()
    case[3] = group_advantages(normal(6, seed=4), 3, "grpo")
    loss, stats = grpo_loss(*case, loss_args("sequence", kl_coef=0.0))
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert (stats["val/ratio"] == 1).all()
    (gradient,) = torch.autograd.grad(loss, case[0])
    assert gradient.abs().max() > 0.01


@pytest.mark.fast
def test_a_mask_without_tokens_gives_0():
    case = loss_case()
    case[-1] = torch.zeros_like(case[-1])
    for norm in NORMS:
        assert grpo_loss(*case, loss_args(norm))[0].item() == 0


# --------------------------------------------------------------------------------------------------
# Targets and groups


@pytest.mark.fast
def test_targets_subtract_the_kl_of_a_response_before_groups_are_compared():
    mask = mask_of(LENGTHS, 6)
    batch = {"mask": mask, "scores": normal(6), "has_eos": torch.tensor([1, 0, 1, 1, 0, 1]) > 0}
    for seed, name in enumerate(("logprobs", "ref_logprobs"), start=1):
        batch[name] = torch.where(mask, normal(6, 6, seed=seed), 0.0)
    args = grpo_rlhf.Args(kl_in="reward", kl_coef=0.3, num_generations=3, mask_overlong=True)
    targets = grpo_rlhf.grpo_targets(batch, args)
    kl = (batch["logprobs"] - batch["ref_logprobs"]).sum(1)
    expected = group_advantages(batch["scores"] - 0.3 * kl, 3, "grpo")
    torch.testing.assert_close(targets["advantages"], expected)
    # Overlong responses are compared like all others, and left out of the loss.
    assert torch.equal(targets["loss_mask"], mask & batch["has_eos"][:, None])
    args = grpo_rlhf.Args(kl_in="loss", kl_coef=0.3, num_generations=3)
    targets = grpo_rlhf.grpo_targets(batch, args)
    expected = group_advantages(batch["scores"], 3, "grpo")
    torch.testing.assert_close(targets["advantages"], expected)
    assert torch.equal(targets["loss_mask"], mask)


@pytest.mark.fast
def test_the_rows_of_a_group_are_consecutive_and_on_one_rank():
    """Every prompt has its turn in each pass; no two responses share their random numbers."""
    prompts = [([i], {"prompt": i}) for i in range(5)]
    args = grpo_rlhf.Args(batch_size=8, num_generations=2, response_length=3)
    alone = Ranks(0, 1, CPU)
    updates = [next_prompts(prompts, update, args, alone) for update in range(1, 6)]
    numbers = [ids[0] for prompt_ids, _, _ in updates for ids in prompt_ids]
    assert numbers[::2] == numbers[1::2] == prompt_order(5, 0, 20, args.seed)
    uniforms = torch.cat([uniforms for _, _, uniforms in updates])
    assert len(set(uniforms.flatten().tolist())) == 40 * 3
    for update, (prompt_ids, rows, uniforms) in enumerate(updates, start=1):
        shares = [next_prompts(prompts, update, args, Ranks(rank, 2, CPU)) for rank in (0, 1)]
        assert [ids for share, _, _ in shares for ids in share] == prompt_ids
        assert [row for _, share, _ in shares for row in share] == rows
        assert torch.equal(torch.cat([share for _, _, share in shares]), uniforms)


@pytest.mark.fast
def test_flat_groups_are_replaced_by_those_of_other_batches():
    """In their own place, whole, and only by groups that are not flat."""

    def batch_of(scores, name):
        scores = torch.tensor(scores)
        batch = {"scores": scores, "has_eos": scores > -1}
        batch["responses"] = torch.arange(6)[:, None] + 100 * name
        return batch, [f"row {name} {i}" for i in range(6)], [f"text {name} {i}" for i in range(6)]

    others = {
        11: batch_of([1.0, 0, 1, 1, 0, 0], 1),  # The first group has a spread, the second has not.
        21: batch_of([1.0, 0, 1, 0, 0, 1], 2),
    }
    asked = []

    def sample(update):
        asked.append(update)
        return others.get(update, others[21])

    start = ([0.0, 0, 1, 1, 0, 1], 0)
    args = grpo_rlhf.Args(num_generations=2, refill_flat_groups=5)
    batch, rows, texts = grpo_rlhf.refill(*batch_of(*start), sample, 1, 10, args)
    assert asked == [11, 21]  # After that there is no flat group left.
    assert batch["responses"].flatten().tolist() == [100, 101, 202, 203, 4, 5]
    assert batch["scores"].tolist() == [1, 0, 1, 0, 0, 1]
    assert rows == ["row 1 0", "row 1 1", "row 2 2", "row 2 3", "row 0 4", "row 0 5"]
    assert texts == [row.replace("row", "text") for row in rows]
    assert batch["refilled"].tolist() == [True] * 4 + [False] * 2
    # One try is not enough for the second group, and none leaves all as it is.
    args = grpo_rlhf.Args(num_generations=2, refill_flat_groups=1)
    batch, rows, texts = grpo_rlhf.refill(*batch_of(*start), sample, 1, 10, args)
    assert batch["responses"].flatten().tolist() == [100, 101, 2, 3, 4, 5]
    args = grpo_rlhf.Args(num_generations=2)
    batch, rows, texts = grpo_rlhf.refill(*batch_of(*start), sample, 1, 10, args)
    assert batch["responses"].flatten().tolist() == list(range(6)) and asked == [11, 21, 11]


# --------------------------------------------------------------------------------------------------
# The loop


@pytest.fixture(name="settings")
def settings(tmp_path, gpt2_folder):
    """`settings(name, **changes)`: the flags of a short run."""
    (tmp_path / "rewards.py").write_text(REWARDS)
    prompts = [{"prompt": prompt} for prompt in ("a", "bc", "def", "ghij", "k", "lm")]
    dataset = write_jsonl(tmp_path / "prompts.jsonl", prompts)

    def flags(name, reward="early_letters", updates=1, **changes):
        options = {
            "model": gpt2_folder,
            "reward_fn": (f"{tmp_path}/rewards.py:{reward}",),
            "dataset": dataset,
            "output_dir": str(tmp_path / name),
            "batch_size": 16,
            "num_generations": 4,
            "micro_batch_size": 16,
            "total_episodes": 16 * updates,
            "num_epochs": 1,
            "response_length": 6,
            "missing_eos_score": "none",
            "precision": "fp32",
            "compile": False,
        }
        return {**options, **changes}

    return flags


def run(flags):
    """Run the script in this process; returns the lines of its metrics."""
    grpo_rlhf.main(grpo_rlhf.Args(**flags))
    return read_jsonl(f"{flags['output_dir']}/metrics.jsonl")


def test_without_a_price_of_the_kl_there_is_no_reference(settings, monkeypatch):
    """Nor a metric of it. With a price the first KL is 0 and the ratio 1."""
    [line] = run(settings("plain"))
    assert not any("kl" in name.split("/")[-1].split("_") for name in line)
    for kl_in in ("reward", "loss"):
        lines = run(settings(kl_in, updates=2, kl_coef=0.1, kl_in=kl_in, lr=0.01))
        assert lines[0]["objective/kl"] == 0.0 == lines[0]["objective/kl_k3"]
        assert lines[1]["objective/kl_k3"] > 0
        assert lines[0]["val/ratio"] == pytest.approx(1, abs=1e-5)
        assert ("loss/kl_avg" in lines[0]) == (kl_in == "loss")


def test_nothing_is_learned_from_flat_groups(settings):
    """And all of them are counted."""
    history, _ = gradients_of(None, "grpo_rlhf", settings("flat", "ones", max_grad_norm=0.0))
    assert all((gradient == 0).all() for gradient in history[0])
    lines = read_jsonl(f"{settings('flat')['output_dir']}/metrics.jsonl")
    assert lines[0]["train/flat_groups"] == 1.0


def test_refilling_leaves_fewer_flat_groups(settings, on_two_ranks):
    flags = {"reward": "starts_with_a", "updates": 2}
    plain = run(settings("plain", **flags))
    filled = run(settings("filled", **flags, refill_flat_groups=6))
    assert plain[0]["train/flat_groups"] >= 0.5
    assert filled[0]["train/flat_groups"] < plain[0]["train/flat_groups"]
    refilled = plain[0]["train/flat_groups"] - filled[0]["train/flat_groups"]
    assert filled[0]["train/refilled_groups"] == pytest.approx(refilled)
    two = settings("two", **flags, refill_flat_groups=6)
    assert on_two_ranks(run_on_rank, two) == [None, None]
    lines = read_jsonl(f"{two['output_dir']}/metrics.jsonl")
    for name in ("train/flat_groups", "objective/scores", "train/refilled_groups"):
        assert lines[0][name] == pytest.approx(filled[0][name], abs=1e-6)


def run_on_rank(rank, flags):
    ranks = Ranks(rank, 2, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "init_ranks", lambda timeout_minutes: ranks)
        grpo_rlhf.main(grpo_rlhf.Args(**flags))


@pytest.mark.parametrize("norm", NORMS)
def test_micro_batches_change_no_gradient(settings, norm):
    """Whatever the loss is divided by, with overlong responses out of it."""
    histories = []
    for size in (16, 3):
        flags = {"micro_batch_size": size, "loss_norm": norm, "mask_overlong": True}
        flags |= {"kl_coef": 0.1, "num_epochs": 2, "num_minibatches": 2, "max_grad_norm": 0.0}
        options = settings(f"{size}", stop_token="bcdefgh", **flags)
        histories.append(gradients_of(None, "grpo_rlhf", options)[0])
    assert len(histories[0]) == 4
    assert_same_gradients(histories[1], histories[0])


@pytest.mark.parametrize(("advantage", "norm"), [("grpo", "sequence"), ("rloo", "constant")])
def test_a_reward_is_learned(settings, advantage, norm):
    flags = {"advantage": advantage, "loss_norm": norm, "lr": 3e-3, "num_epochs": 2}
    lines = run(settings("learns", updates=20, batch_size=32, total_episodes=640, **flags))
    assert lines[-1]["objective/scores"] > lines[0]["objective/scores"] + 0.3


def test_several_rewards_are_logged_apart(settings, tmp_path):
    names = ("early_letters", "ones")
    functions = tuple(f"{tmp_path}/rewards.py:{name}" for name in names)
    [line] = run(settings("both", reward_fn=functions, reward_weights=(1.0, 0.5)))
    assert line["score/ones"] == 1.0
    assert line["objective/scores"] == pytest.approx(line["score/early_letters"] + 0.5)


def test_a_resumed_run_ends_in_the_same_bits(settings, tmp_path, monkeypatch):
    flags = {"updates": 4, "save_every": 2, "kl_coef": 0.1, "lr": 0.01}
    run(settings("whole", **flags))
    progress = utils.progress

    def cut_off(*args):
        for update in progress(*args):
            if update == 4:
                raise KeyboardInterrupt
            yield update

    with monkeypatch.context() as patch:
        patch.setattr(utils, "progress", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run(settings("stopped", **flags))
    resumed = grpo_rlhf.Args(resume=str(tmp_path / "stopped"), compile=False, precision="fp32")
    grpo_rlhf.main(resumed)
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_generations": 1}, "--num_generations 1"),
        ({"num_generations": 5}, "--batch_size by ranks .* --num_generations: 16"),
        ({"refill_flat_groups": -1}, "--refill_flat_groups"),
        ({"kl_coef": -0.1}, "--kl_coef"),
        ({"reward_weights": (1.0, 2.0)}, "--reward_weights: 2 for 1"),
        ({"save_best": True}, "--save_best"),
    ],
)
def test_refused_flags(settings, capsys, changes, match):
    refuses(capsys, "grpo_rlhf", settings("refused", **changes), match)


@pytest.mark.parametrize("script", [grpo_rlhf, ppo_rlhf])
def test_functions_whose_scores_would_have_one_name_are_refused(script, tmp_path):
    """Else one score would silently take the place of the other."""
    path = tmp_path / "rewards.py"
    path.write_text(
        "def reward_model(prompts, responses, **columns):\n    return [0.0] * len(prompts)\n"
    )
    prompts = [([1], {"prompt": "a"})]
    with pytest.raises(utils.UserError, match="the name of --reward_model"):
        script.load_reward_functions([f"{path}:reward_model"], "--reward_fn", prompts)
    path.write_text("def score(prompts, responses, **columns):\n    return [0.0] * len(prompts)\n")
    with pytest.raises(utils.UserError, match="another function is called score"):
        script.load_reward_functions([f"{path}:score"] * 2, "--reward_fn", prompts)
