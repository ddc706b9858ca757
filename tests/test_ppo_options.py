"""PPO's options, each seen at work in a run or against its definition.

The shared value trunk; normalised, clipped and whitened scores and rewards; entropy bonus, clip,
ratio guard and early stop; what ends a response and what it may hold; what is logged, charged and
random; models that are refused; and everything at once.
"""

import copy
import functools
import json
import math
import shutil
import types

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    Phi3Config,
    Qwen3NextConfig,
)

import ppo_rlhf
import utils
from conftest import build_config, write_jsonl
from ppo_rlhf import (
    Actor,
    ActorCritic,
    RunningMoments,
    load_critic,
    load_models,
    token_logprobs,
)
from test_ppo_runs import (
    PAD,
    R,
    apart,
    assert_identical_steps,
    assert_resumes,
    assert_same_steps,
    distributions,
    lines,
    rows_of,
    run,
    same_weights,
    samples_of,
    timeless,
    watched,
    weights,
)
from test_ppo_runs import settings as ppo_settings  # noqa: F401 (the fixture "settings")
from utils import UserError, allowed_ids, stop_token_ids

EOS = 1
A = 2  # The id of "a".
VOCABULARY = 31


def recorded(name, flags, change=None, go=run):
    """Every call of a function of the script during a run: [(its arguments, its answer)].

    change(number of the call, answer) gives the answer that the run gets instead. go: how to run.
    """
    original = getattr(ppo_rlhf, name)
    calls = []

    def watching(*args, **options):
        answer = original(*args, **options)
        if change is not None:
            answer = change(len(calls), answer)
        calls.append(((*args, *options.values()), answer))
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_rlhf, name, watching)
        go(flags)
    return calls


# --------------------------------------------------------------------------------------------------
# Value trunk


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_shared_trunk_is_one_trunk(request, kind, llama_rm_folder):
    """Its values are those of the same weights as a network of its own."""
    folder = request.getfixturevalue(f"{kind}_folder")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    args = ppo_rlhf.Args(
        model=folder,
        reward_model=llama_rm_folder,
        value_trunk="shared",
        precision="fp32",
        compile=False,
    )
    policy, reference, reward_model = load_models(args, tokenizer, 12, "cpu")
    critic = load_critic(args, tokenizer, policy)
    assert critic.base_model is policy.base_model
    assert critic.base_model is not reference.base_model
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    # V = 0, whatever scores the responses.
    assert (critic.score.weight == 0).all()
    assert reward_model.score.weight.any()

    torch.nn.init.normal_(critic.score.weight)
    separate_critic = copy.deepcopy(critic)
    allowed = torch.arange(VOCABULARY) != PAD
    logprobs_fn = functools.partial(token_logprobs, temperature=0.7, allowed=allowed)
    batch = {
        "input_ids": torch.randint(2, 28, (3, 12)),
        "prompt_lengths": torch.tensor([7, 3, 5]),
        "responses": torch.randint(2, 28, (3, 5)),
        "mask": torch.ones(3, 5, dtype=torch.bool),
    }
    actor = Actor(policy, logprobs_fn)
    shared = ActorCritic(actor, critic)(batch)
    separate = ActorCritic(actor, separate_critic)(batch)
    assert shared.keys() == separate.keys() == {"logprobs", "entropy", "values"}
    for name in shared:
        torch.testing.assert_close(shared[name], separate[name], atol=1e-5, rtol=1e-5)
    assert shared["values"].abs().max() > 0.1


def test_shared_trunk_in_a_run(settings, tmp_path, gpt2_folder):
    flags = {"value_trunk": "shared", "vf_coef": 1.0, "updates": 2, "save_every": 1, "lr": 1e-3}
    folder = run(settings(tmp_path / "run", "letters", **flags))
    assert lines(folder)[0]["val/explained_var"] == pytest.approx(0, abs=1e-5)  # V = 0.
    policy = weights(folder)
    critic = weights(folder, "critic")
    assert critic.pop("score.weight").any()
    assert same_weights(critic, {name: policy[name] for name in critic})
    start = AutoModelForCausalLM.from_pretrained(gpt2_folder).state_dict()
    assert not same_weights(policy, start)
    assert_resumes(folder, tmp_path / "resumed", 1)


def test_value_loss_reaches_a_shared_trunk(settings, tmp_path):
    """A reward of 0 and V = 0 move nothing; a head that is not 0 sends its error into the trunk."""
    flags = settings(tmp_path / "zero", "nothing", value_trunk="shared", kl_coef=0.0)
    [(gradients, _)] = watched(None, flags)
    assert not any(gradient.any() for gradient in gradients)

    def load(*args):
        critic = load_critic(*args)
        torch.nn.init.normal_(critic.score.weight)
        return critic

    moves = {}
    for trunk in ("shared", "separate"):
        flags = settings(tmp_path / trunk, "letters", value_trunk=trunk)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ppo_rlhf, "load_critic", load)
            # Without advantages, the value loss is all there is.
            patch.setattr(utils, "whiten", lambda x, mask, shift_mean=True: torch.zeros_like(x))
            [(gradients, _)] = watched(None, flags)
        moves[trunk] = any(gradient.any() for gradient in gradients[:10])  # The policy's own.
    assert moves == {"shared": True, "separate": False}


# --------------------------------------------------------------------------------------------------
# Scores and rewards


def mean_and_deviation(numbers):
    mean = sum(numbers) / len(numbers)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in numbers) / len(numbers))


def some_scores():
    """Scores of four updates of six responses, and which of them count."""
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(4, 6, generator=generator) * 3 + 5
    return scores, torch.rand(4, 6, generator=generator) < 0.7


@pytest.mark.fast
def test_normalise_is_the_running_definition():
    scores, masks = some_scores()
    moments = RunningMoments()
    seen = []
    for row, mask in zip(scores, masks, strict=True):
        moments.update(torch.where(mask, row, math.nan), mask)
        seen += row[mask].tolist()
        mean, deviation = mean_and_deviation(seen)
        expected = (row - mean) / deviation
        torch.testing.assert_close(moments.normalise(row), expected, atol=1e-6, rtol=1e-6)
    assert moments.count == len(seen) == masks.sum() < masks.numel()


@pytest.mark.fast
@pytest.mark.parametrize("counts", [True, False])
def test_normalise_of_one_score_or_of_none_is_finite(counts):
    score = torch.tensor([3.0])
    moments = RunningMoments()
    moments.update(score, torch.tensor([counts]))
    normalised = moments.normalise(score)
    assert normalised.dtype == torch.float32 and normalised.isfinite().all()
    assert normalised.item() == 0 or not counts


def normalise_on_rank(rank, scores, masks):
    """(normalised scores of this rank's half in the last update, the moments)."""
    moments = RunningMoments()
    mine = slice(3 * rank, 3 * rank + 3)
    for row, mask in zip(torch.tensor(scores), torch.tensor(masks), strict=True):
        moments.update(row[mine], mask[mine])
    return moments.normalise(row[mine]).tolist(), moments.state_dict()


def test_normalise_pools_the_ranks(on_two_ranks):
    scores, masks = some_scores()
    moments = RunningMoments()
    for row, mask in zip(scores, masks, strict=True):
        moments.update(row, mask)
    answers = on_two_ranks(normalise_on_rank, scores.tolist(), masks.tolist())
    (first, first_moments), (second, second_moments) = answers
    assert first_moments == second_moments == pytest.approx(moments.state_dict())
    assert first + second == pytest.approx(moments.normalise(scores[-1]).tolist())


def test_scores_are_normalised_then_clipped_then_replaced(settings, tmp_path):
    """Rows without EOS get their fixed score as it is, and stay out of the moments."""
    flags = {"normalize_scores": True, "cliprange_score": 0.8, "missing_eos_score": -7.0}
    folder = run(settings(tmp_path / "run", "letters", updates=2, **flags))
    seen = []
    for line in lines(folder):
        samples = samples_of(folder, line["step"])
        raw = [len(row["response"]) for row in samples]
        seen += [length for length in raw if length < R]
        mean, deviation = mean_and_deviation(seen)
        for row, length in zip(samples, raw, strict=True):
            clipped = max(-0.8, min((length - mean) / deviation, 0.8))
            expected = clipped if length < R else -7.0
            assert row["score"] == pytest.approx(expected, abs=1e-5)
        scores = [row["score"] for row in samples]
        assert line["objective/raw_scores"] == pytest.approx(sum(raw) / 16)
        assert line["objective/scores"] == pytest.approx(sum(scores) / 16, abs=1e-6)
        assert -7.0 in scores and not all(score == -7.0 for score in scores)
    scores = [row["score"] for row in lines(folder, "samples.jsonl")]
    assert any(abs(score) == pytest.approx(0.8) for score in scores)


def test_resuming_keeps_the_moments(settings, tmp_path):
    flags = {"updates": 2, "normalize_scores": True, "save_every": 1}
    folder = run(settings(tmp_path / "run", "letters", **flags))
    assert_resumes(folder, tmp_path / "resumed", 1)


def test_whitened_rewards_keep_their_mean(settings, tmp_path):
    rewards = {}
    for is_whitened in (False, True):
        flags = settings(tmp_path / str(is_whitened), "letters", whiten_rewards=is_whitened)
        [((given, _, mask, *_), _)] = recorded("compute_gae", flags)
        rewards[is_whitened] = given[mask]
    plain = rewards[False]
    expected = (plain - plain.mean()) / plain.std(correction=0) + plain.mean()
    assert rewards[True].std(correction=0) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(rewards[True], expected)


# --------------------------------------------------------------------------------------------------
# Loss


def test_entropy_bonus_is_the_gradient_of_the_mean_entropy(settings, tmp_path, gpt2_folder):
    """Reward 0 and V = 0 leave -coefficient * mean entropy over real tokens of the loss."""
    flags = {"entropy_coef": 0.3, "kl_coef": 0.0, "max_grad_norm": 0.0, "temperature": 0.7}
    flags = settings(tmp_path / "run", "nothing", micro_batch_size=5, **flags)
    [(gradients, _)] = watched(None, flags)
    policy = AutoModelForCausalLM.from_pretrained(gpt2_folder).eval()
    entropies = []
    for prompt, response, _ in rows_of(tmp_path / "run", 1):
        entropies.append(distributions(policy, prompt, response, 0.7).entropy())
    mean_entropy = torch.cat(entropies).mean()
    (-0.3 * mean_entropy).backward()
    expected = [parameter.grad.numpy() for parameter in policy.parameters()]
    assert apart(gradients[: len(expected)], expected) < 1e-4
    logged = lines(tmp_path / "run")[0]["policy/entropy_avg"]
    assert logged == pytest.approx(mean_entropy.item(), rel=1e-5)


@pytest.mark.parametrize(("low", "high"), [(1e-4, 1e4), (1.0, 1e-4)], ids=["lower", "upper"])
def test_upper_side_of_the_clip(settings, tmp_path, low, high):
    """With one side open, the second epoch has clipped tokens on the other side alone."""
    flags = {"num_epochs": 2, "lr": 1e-3, "cliprange": low, "cliprange_high": high}
    calls = recorded("policy_loss", settings(tmp_path / "run", "letters", **flags))
    [_, ((*_, advantages, _, _), (_, ratio, clipped))] = calls
    falls = (advantages < 0) & (ratio < 1 - low)
    rises = (advantages > 0) & (ratio > 1 + high)
    assert clipped.any()
    assert torch.equal(clipped, falls | rises)


def explode(call, answer):
    """The ratios of the second step are a thousand times what they are."""
    loss, ratio, clipped = answer
    return (loss, ratio * 1000, clipped) if call == 1 else answer


def break_loss(call, answer):
    """The loss of the second step is NaN."""
    loss, ratio, clipped = answer
    return (loss * math.nan, ratio, clipped) if call == 1 else answer


@pytest.mark.parametrize("accident", [explode, break_loss])
def test_a_step_of_exploded_ratio_or_gradient_is_skipped(settings, tmp_path, accident):
    """The second of three steps fails: the third starts from where the first one ended."""
    steps = {}

    def go(flags):
        steps[flags["output_dir"]] = watched(None, flags)

    flags = settings(tmp_path / "with", "letters", num_epochs=3)
    recorded("policy_loss", flags, accident, go)
    without = settings(tmp_path / "without", "letters", num_epochs=3)
    go(without)
    first, last = steps[flags["output_dir"]]
    plain = steps[without["output_dir"]]
    assert_same_steps([first], plain[:1])
    assert apart(last[1], plain[1][1]) < 1e-5  # The second step that counts is the same one.
    line = lines(tmp_path / "with")[0]
    counts = [line[f"optim/{name}"] for name in ("steps", "skipped", "early_stops")]
    assert counts == [2, 1, 0]
    # What was skipped is not in the means. (`lines` takes no NaN.)
    assert 0.9 < line["val/ratio"] < 1.1
    assert line["optim/grad_norm"] > 0
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "with").values())


@pytest.mark.parametrize(
    ("flags", "taken", "skipped"),
    [
        ({}, [0.11, 9.9], [0.09, 0.05, 10.1]),
        ({"ratio_guard": 2.0}, [0.51, 1.9], [0.49, 0.11, 2.1]),
    ],
    ids=["default", "2"],
)
def test_the_ratio_guard(settings, tmp_path, flags, taken, skipped):
    """A step is skipped whose mean ratio is above the guard or below 1 / guard; it is 10."""
    ratios = [1.0, *skipped, *taken]

    def set_ratio(call, answer):
        loss, ratio, clipped = answer
        return loss, torch.full_like(ratio, ratios[call]), clipped

    flags = settings(tmp_path / "run", "letters", num_epochs=len(ratios), **flags)
    recorded("policy_loss", flags, set_ratio)
    line = lines(tmp_path / "run")[0]
    assert (line["optim/steps"], line["optim/skipped"]) == (3, 3)
    # The means are over the steps that were taken, so these are the right ones.
    assert line["val/ratio"] == pytest.approx((1 + sum(taken)) / 3)


def accident_on_rank_one(rank, flags, accident):
    """What `watched` returns of a run in which the accident happens on rank 1 alone."""
    steps = []

    def go(flags):
        steps.extend(watched(rank, flags))

    recorded("policy_loss", flags, accident if rank == 1 else None, go)
    return steps


@pytest.mark.parametrize("accident", [explode, break_loss])
def test_all_ranks_skip_together(settings, tmp_path, on_two_ranks, accident):
    flags = settings(tmp_path / "run", "letters", num_epochs=3)
    first, second = on_two_ranks(accident_on_rank_one, flags, accident)
    assert len(first) == len(second) == 2
    assert_identical_steps(first, second)
    for gradients, parameters in first:
        assert all(math.isfinite(x.sum()) for x in gradients + parameters)


def test_nothing_finite_ends_the_run_in_one_line(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(ppo_rlhf, "value_loss", lambda new, *_: (new * math.nan, new > 0))
    with pytest.raises(UserError, match="update 1: no step had a finite gradient"):
        run(settings(tmp_path / "run", "letters", num_epochs=2))


@pytest.mark.parametrize(("limit", "steps"), [(1e-12, 1), (1e6, 4)])
def test_early_stop(settings, tmp_path, limit, steps):
    """The first step meets its own policy; the second sees a new one, which ends the update."""
    flags = {"num_epochs": 2, "num_minibatches": 2, "lr": 1e-3, "early_stop_kl": limit}
    line = lines(run(settings(tmp_path / "run", "letters", **flags)))[0]
    assert line["optim/steps"] == steps
    assert line["optim/early_stops"] == (steps == 1)
    assert line["optim/skipped"] == 0


def test_early_stop_is_at_its_limit(settings, tmp_path):
    flags = {"num_epochs": 2, "lr": 1e-3}
    mean = lines(run(settings(tmp_path / "both", "letters", **flags)))[0]["policy/approxkl_avg"]
    second = 2 * mean  # The mean is over two steps, of which the first has 0.
    for factor, steps in ((0.99, 1), (1.01, 2)):
        flags["early_stop_kl"] = factor * second
        folder = run(settings(tmp_path / f"limit_{factor}", "letters", **flags))
        assert lines(folder)[0]["optim/steps"] == steps


def stopped_by_one_rank(rank, flags):
    """How many steps are taken where approxkl is 0 on rank 0 and 3 on rank 1: 1.5 on average."""
    ppo_loss = ppo_rlhf.ppo_loss

    def loss(*args):
        total, stats = ppo_loss(*args)
        fake = torch.full_like(stats["loss/policy_avg"], 3.0 * rank)
        return total, stats | {"policy/approxkl_avg": fake}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_rlhf, "ppo_loss", loss)
        return len(watched(rank, flags))


def test_early_stop_asks_all_ranks(settings, tmp_path, on_two_ranks):
    flags = settings(tmp_path / "run", "letters", num_epochs=3, early_stop_kl=1.0)
    assert on_two_ranks(stopped_by_one_rank, flags) == [1, 1]


# --------------------------------------------------------------------------------------------------
# What ends a response, and what it may hold


@pytest.mark.parametrize("min_length", [0, 3])
def test_stop_token(settings, tmp_path, min_length):
    """A response ends at the first "a" or EOS from min_length on, and has then ended by itself."""
    flags = {"stop_token": "a", "min_length": min_length, "missing_eos_score": -9.0}
    calls = recorded("response_mask", settings(tmp_path / "run", "letters", updates=2, **flags))
    samples = lines(tmp_path / "run", "samples.jsonl")
    responses = torch.cat([args[0] for args, _ in calls]).tolist()
    lengths = torch.cat([mask.sum(1) for _, mask in calls]).tolist()
    endings = set()
    for ids, length, sample in zip(responses, lengths, samples, strict=True):
        ends = [i for i, token in enumerate(ids) if token in (A, EOS) and i >= min_length]
        assert length == (ends[0] + 1 if ends else R)
        assert ids[length:] == [PAD] * (R - length)
        endings.add(ids[length - 1] if ends else None)
        assert sample["score"] == (len(sample["response"]) if ends else -9.0)
    assert endings == {A, EOS, None}
    assert any(A in ids[:min_length] for ids in responses) == (min_length > 0)


@pytest.mark.fast
def test_stop_token_is_the_one_inside_a_text(tokenizer):
    """Some tokenizers mark the start of a text, where a full stop then has another id."""

    def marking(text, add_special_tokens):
        ids = tokenizer(text, add_special_tokens=add_special_tokens).input_ids
        return types.SimpleNamespace(input_ids=[29, *ids[1:]] if text.startswith("a") else ids)

    marking.eos_token_id = EOS
    marking.pad_token_id = PAD
    marking.unk_token_id = None
    assert stop_token_ids(marking, "a", EOS) == [EOS, A]


@pytest.mark.fast
def test_a_stop_token_that_melts_into_the_letter_before_it_is_refused():
    """After the letter that stands for a response, some tokenizers have one token for both."""
    pieces = {"x": [5], "x.": [6], "x!?": [5, 7, 8], "x;": [9, 7], "x,": [5, PAD]}

    def melting(text, add_special_tokens):
        return types.SimpleNamespace(input_ids=pieces[text])

    melting.eos_token_id = EOS
    melting.pad_token_id = PAD
    melting.unk_token_id = None
    assert stop_token_ids(melting, "!?", EOS) == [EOS, 7, 8]
    assert stop_token_ids(melting, None, None) == [EOS]
    assert stop_token_ids(melting, None, [3, EOS]) == [EOS, 3]
    # The last one is what the vocabulary lacks.
    for text in (".", ";", "", ","):
        with pytest.raises(UserError, match="--stop_token"):
            stop_token_ids(melting, text, EOS)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_each_eos_of_a_model_ends_a_response_and_stays_in_its_config(
    name, settings, tmp_path, gpt2_folder
):
    folder = tmp_path / "model"
    shutil.copytree(gpt2_folder, folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps(config | {"eos_token_id": [EOS, A]}))
    flags = settings(tmp_path / "run", "letters", model=str(folder))
    [((responses, stop_ids, _), mask)] = recorded("response_mask", flags)
    assert stop_ids.tolist() == [EOS, A]
    last = responses.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)
    assert (last == A).any()
    assert (responses[~mask] == PAD).all()  # Sampling ended there too.
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert saved.config.eos_token_id == saved.generation_config.eos_token_id == [EOS, A]


def test_ids_that_no_token_has_are_never_sampled_nor_scored(settings, tmp_path, tokenizer):
    policy = GPT2LMHeadModel(build_config("gpt2", tokenizer))
    policy.resize_token_embeddings(40)
    policy.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    calls = recorded("token_logprobs", settings(tmp_path / "run", model=str(tmp_path / "model")))
    is_token = [PAD < i < VOCABULARY for i in range(40)]
    # The calls of the policy and of the reference when the rollout is scored, and one to train.
    assert len(calls) == 3
    for (logits, tokens, temperature, allowed), (logprobs, _) in calls:
        assert allowed.tolist() == is_token
        assert tokens.min() > PAD
        assert tokens.max() < VOCABULARY
        logits = logits.masked_fill(~allowed, -math.inf) / temperature
        expected = torch.log_softmax(logits, -1).gather(-1, tokens[..., None]).squeeze(-1)
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.fast
def test_ids_between_those_of_the_tokens_are_not_sampled():
    """A tokenizer whose tokens are the ids 0 (the pad), 2 and 5, and 9, which the model lacks."""
    vocabulary = {"<pad>": 0, "a": 2, "|": 5, "new": 9}
    tokenizer = types.SimpleNamespace(pad_token_id=0, get_vocab=lambda: vocabulary)
    assert allowed_ids(tokenizer, 7, "cpu").tolist() == [i in (2, 5) for i in range(7)]


def test_a_long_minimum_means_fixed_length(settings, tmp_path):
    line = lines(run(settings(tmp_path / "run", "letters", min_length=R)))[0]
    assert line["val/sequence_lengths"] == R
    assert line["val/has_eos"] == 0


# --------------------------------------------------------------------------------------------------
# What is logged and charged, and what is random


def test_a_config_alone_gives_policy_and_critic_one_start(settings, tmp_path, gpt2_folder):
    folder = tmp_path / "config"
    shutil.copytree(gpt2_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    done = run(settings(tmp_path / "run", model=str(folder), lr=0.0))
    policy = weights(done)
    critic = weights(done, "critic")
    del critic["score.weight"]
    assert len(critic) > 10
    assert same_weights(critic, {name: policy[name] for name in critic})


@pytest.mark.parametrize("std", [0.0, 0.5])
def test_explained_variance_of_nothing_is_nothing(settings, tmp_path, monkeypatch, std):
    """Every return is 1: there is no variance to explain, whatever the critic says."""

    def load(*args):
        critic = load_critic(*args)
        torch.nn.init.normal_(critic.score.weight, std=std)
        return critic

    monkeypatch.setattr(ppo_rlhf, "load_critic", load)
    line = lines(run(settings(tmp_path / "run", "one", lam=1.0)))[0]
    assert (line["loss/value_avg"] == pytest.approx(0.5)) == (std == 0)
    assert line["val/explained_var"] == 0.0


def test_the_coefficient_that_adapts_is_the_one_that_is_charged(settings, tmp_path):
    """And what the update trains on is what is logged: the paid score plus the penalty."""
    flags = {"lr": 1e-2, "target_kl_nats": 0.01, "kl_horizon": 100, "missing_eos_score": -1.0}
    calls = recorded("compute_rewards", settings(tmp_path / "run", "letters", updates=3, **flags))
    metrics = lines(tmp_path / "run")
    assert [args[4] for args, _ in calls] == [line["kl_coef"] for line in metrics]
    assert len({line["kl_coef"] for line in metrics}) == 3
    for (_, rewards), line in zip(calls, metrics, strict=True):
        assert 0 < line["val/has_eos"] < 1
        assert line["objective/scores"] != line["objective/raw_scores"]
        total = rewards.sum(1).mean().item()
        assert line["objective/rlhf_reward"] == pytest.approx(total, abs=1e-5)


def test_everything_random_depends_on_the_seed(settings, tmp_path, monkeypatch):
    keys = []

    def watching(*key):
        keys.append(key)
        return seeded(*key)

    seeded = utils.seeded
    monkeypatch.setattr(utils, "seeded", watching)
    run(settings(tmp_path / "run", seed=7, num_epochs=2, updates=2))
    assert {key[0] for key in keys} == {7}
    assert {key[1] for key in keys} == {"prompts", "uniforms", "minibatches"}
    # The order of the prompts' second pass is drawn twice, because two updates share that pass.
    assert len(set(keys)) == len(keys) - 1


# --------------------------------------------------------------------------------------------------
# Models that are refused


def long_prompt(folder):
    """A data set of one prompt of 8 tokens, so that a row has 24 positions."""
    return write_jsonl(folder / "long.jsonl", [{"prompt": "a" * 8}])


def refused_model(config, match, settings, tmp_path, tokenizer):
    """A folder with this config alone ends the run in an error that matches."""
    folder = tmp_path / "model"
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    flags = settings(tmp_path / "run", model=str(folder), dataset=long_prompt(tmp_path))
    with pytest.raises(UserError, match=match):
        run(flags)
    assert not (tmp_path / "run").exists()


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
TEXT_SIZES = SIZES | {"vocab_size": VOCABULARY, "num_key_value_heads": 1, "head_dim": 8}


def gpt_neo(window):
    return GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=window,
        max_position_embeddings=64,
        initializer_range=0.2,
    )


def test_a_window_that_decoding_ignores_is_refused(settings, tmp_path, tokenizer):
    """GPT-Neo's local layers would sample from another distribution than the trained one."""
    refused_model(gpt_neo(23), "--model .*: its attention", settings, tmp_path, tokenizer)


def test_a_window_that_is_longer_than_every_row_is_not_refused(settings, tmp_path, tokenizer):
    GPTNeoForCausalLM(gpt_neo(32)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    flags = settings(tmp_path / "run", model=str(tmp_path / "model"))
    flags["dataset"] = long_prompt(tmp_path)
    line = lines(run(flags))[0]
    assert line["val/sequence_lengths"] > 1
    assert line["objective/kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("family", [Phi3Config, LlamaConfig])
def test_positions_after_which_longrope_turns_otherwise_are_refused(
    family, settings, tmp_path, tokenizer
):
    """After `original_max_position_embeddings` all positions turn at other angles.

    They do for all rows as soon as one is that long, so a log-probability would depend on the rows
    beside it. Only Phi has the limit in its config as well.
    """
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 20,
    }
    limits = {"max_position_embeddings": 64}
    if family is Phi3Config:
        limits["original_max_position_embeddings"] = 20
    ids = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    config = family(rope_parameters=rope, **SIZES, **limits, **ids)
    match = "--response_length: 24 tokens are more than the 20 positions"
    refused_model(config, match, settings, tmp_path, tokenizer)


def test_linear_attention_is_refused(settings, tmp_path, tokenizer):
    """Its layers keep a state in the place of keys and values, which a static cache has no room
    for.
    """
    config = Qwen3NextConfig(
        **TEXT_SIZES | {"num_hidden_layers": 2},
        layer_types=["linear_attention", "full_attention"],
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    )
    match = "--model: it cannot be sampled from with a static cache"
    refused_model(config, match, settings, tmp_path, tokenizer)


def test_a_model_of_images_and_text_is_refused(settings, tmp_path, tokenizer):
    vision = SIZES | {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=TEXT_SIZES, vision_config=vision)
    refused_model(config, "--model .*not a model of text alone", settings, tmp_path, tokenizer)


# --------------------------------------------------------------------------------------------------
# Everything at once


EVERYTHING = {
    "value_trunk": "shared",
    "normalize_scores": True,
    "cliprange_score": 1.5,
    "whiten_rewards": True,
    "entropy_coef": 0.01,
    "cliprange_high": 0.3,
    "early_stop_kl": 1.0,
    "stop_token": "b",
    "min_length": 2,
    "missing_eos_score": -1.0,
    "target_kl_nats": 1.0,
    "num_epochs": 2,
    "num_minibatches": 2,
}


def test_everything_at_once_on_one_and_two_ranks(settings, tmp_path, on_two_ranks):
    flags = EVERYTHING | {"max_grad_norm": 0.0, "lr": 1e-2}
    whole = watched(None, settings(tmp_path / "whole", "letters", **flags))
    small = watched(None, settings(tmp_path / "small", "letters", **flags, micro_batch_size=1))
    two = settings(tmp_path / "ranks", "letters", **flags, micro_batch_size=3)
    ranks, _ = on_two_ranks(watched, two)
    assert len(whole) == 4
    assert_same_steps(small, whole)
    assert_same_steps(ranks, whole)
    [expected] = timeless(tmp_path / "whole")
    for name in ("small", "ranks"):
        [metrics] = timeless(tmp_path / name)
        assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_everything_resumes(settings, tmp_path):
    flags = settings(tmp_path / "run", "letters", updates=3, save_every=1, **EVERYTHING)
    folder = run(flags)
    assert [line["kl_coef"] for line in lines(folder)] != [0.05] * 3
    assert_resumes(folder, tmp_path / "resumed", 2)
