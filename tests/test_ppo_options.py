"""PPO's options, each seen at work in a run or against its definition: shared value trunk, score normalisation and
clipping, reward whitening, entropy bonus, asymmetric clip, ratio guard, early stop, stop tokens; and the logged KL."""

import copy
import json
import math
import shutil
import types
from pathlib import Path

import pytest
import torch
from conftest import build_config, write_jsonl
from test_ppo_rlhf import normal
from test_ppo_runs import (  # noqa: F401
    apart,
    interrupted,
    lines,
    run,
    run_on_rank,
    same_weights,
    settings,
    timeless,
    watched,
    weights,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma3Config,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    Phi3Config,
    Qwen3NextConfig,
)

import ppo_rlhf
from ppo_rlhf import ActorCritic, last_hidden, load_models, normalise, predicting, response_logits, score_head
from utils import UserError

A = 2  # the id of "a"


def recorded(name, flags, change=None, go=run):
    """Every call of a function of the script during a run: [(its arguments, its answer)]; `change` may alter answers."""
    original, calls = getattr(ppo_rlhf, name), []

    def watching(*args):
        answer = original(*args)
        answer = answer if change is None else change(len(calls), answer)
        calls.append((args, answer))
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_rlhf, name, watching)
        go(flags)
    return calls


# ----------------------------------------------------------------------------------------------------------------------
# Value trunk


@pytest.fixture(params=["gpt2", "llama"])
def model_folder(request, gpt2_folder, llama_folder):
    return {"gpt2": gpt2_folder, "llama": llama_folder}[request.param]


def test_shared_trunk_is_one_trunk(model_folder, llama_rm_folder):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    args = ppo_rlhf.Args(model=model_folder, reward_model=llama_rm_folder, value_trunk="shared")
    policy, reference, critic, reward_model = load_models(args, tokenizer, 12, "cpu")
    assert critic.base_model is policy.base_model and critic.base_model is not reference.base_model
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    assert (critic.score.weight == 0).all() and reward_model.score.weight.any()  # V = 0 whatever scores
    torch.nn.init.normal_(critic.score.weight)
    ids, mask = torch.randint(2, 28, (3, 12)), torch.ones(3, 12, dtype=torch.bool)
    mask[0, :3] = mask[1, 10:] = False
    bias = torch.zeros(policy.config.vocab_size)
    apart_critic = copy.deepcopy(critic)  # the same function as a network of its own
    both = [ActorCritic(policy, c)(ids, mask, 5, 0.7, bias) for c in (critic, apart_critic)]
    for shared, separate in zip(*both, strict=True):
        torch.testing.assert_close(shared, separate, atol=1e-5, rtol=1e-5)
    hidden = last_hidden(critic, ids, mask)[:, predicting(5, ids.device)]
    torch.testing.assert_close(both[0][2], score_head(critic, hidden), atol=1e-5, rtol=1e-5)
    logits, states = response_logits(policy, ids, mask, 5)
    torch.testing.assert_close(policy.get_output_embeddings()(states), logits, atol=1e-5, rtol=1e-5)


def test_shared_trunk_in_a_run(settings, tmp_path, gpt2_folder):  # noqa: F811
    flags = {"value_trunk": "shared", "vf_coef": 1.0, "updates": 2, "save_every": 1, "lr": 1e-3}
    folder = run(settings(tmp_path / "run", "letters", **flags))
    first = lines(folder)[0]
    assert first["val/explained_var"] == pytest.approx(0, abs=1e-5)  # V = 0
    policy, critic = weights(folder), weights(folder, "critic")
    trunk = {name: tensor for name, tensor in critic.items() if name != "score.weight"}
    assert same_weights(trunk, {name: policy[name] for name in trunk})
    assert critic["score.weight"].any()
    start = AutoModelForCausalLM.from_pretrained(gpt2_folder).state_dict()
    assert not same_weights(policy, start)
    _, info = AutoModelForSequenceClassification.from_pretrained(
        folder / "critic", num_labels=1, output_loading_info=True
    )
    assert not any(info.values()), info
    resumed = interrupted(folder, tmp_path / "resumed", 1)
    ppo_rlhf.main(ppo_rlhf.Args(resume=resumed))
    assert timeless(resumed) == timeless(folder)
    assert same_weights(weights(resumed), policy)


def test_value_loss_reaches_a_shared_trunk(settings, tmp_path):  # noqa: F811
    """With advantages of 0 (reward 0, V = 0) nothing moves; a head that is not 0 sends its error into the trunk."""
    [(gradients, _)] = watched(None, settings(tmp_path / "zero", "nothing", value_trunk="shared", kl_coef=0.0))
    assert not any(gradient.any() for gradient in gradients)

    def load(*args):
        policy, reference, critic, reward_model = load_models(*args)
        torch.nn.init.normal_(critic.score.weight)
        return policy, reference, critic, reward_model

    moved = {}
    for trunk in ("shared", "separate"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ppo_rlhf, "load_models", load)
            patch.setattr(ppo_rlhf, "whiten", lambda x, mask, shift_mean=True: torch.zeros_like(x))
            [(gradients, _)] = watched(None, settings(tmp_path / trunk, "letters", value_trunk=trunk))
        moved[trunk] = any(gradient.any() for gradient in gradients[:10])  # of the policy's own parameters
    assert moved == {"shared": True, "separate": False}


# ----------------------------------------------------------------------------------------------------------------------
# Scores and rewards


def test_normalise_is_the_running_definition():
    scores, masks = normal(4, 6, seed=1) * 3 + 5, normal(4, 6, seed=2) > -0.5
    moments, seen = torch.zeros(3, dtype=torch.float64), []
    for row, mask in zip(scores, masks, strict=True):
        spoiled = torch.where(mask, row, math.nan)
        normalised, moments = normalise(spoiled, mask, moments)
        seen += row[mask].tolist()
        mean = sum(seen) / len(seen)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in seen) / len(seen))
        expected = (row[mask] - mean) / deviation
        torch.testing.assert_close(normalised[mask], expected, atol=1e-6, rtol=1e-6)
    assert moments[0] == len(seen) == masks.sum() < masks.numel()
    lone, _ = normalise(torch.tensor([3.0]), torch.tensor([True]), torch.zeros(3, dtype=torch.float64))
    nothing, _ = normalise(torch.tensor([3.0]), torch.tensor([False]), torch.zeros(3, dtype=torch.float64))
    assert lone.tolist() == [0.0] and nothing.isfinite().all() and lone.dtype == torch.float32


def normalise_on_rank(rank, scores, masks):
    scores, masks = torch.tensor(scores), torch.tensor(masks)
    moments = torch.zeros(3, dtype=torch.float64)
    for row, mask in zip(scores, masks, strict=True):
        mine = slice(2 * rank, 2 * rank + 2)
        normalised, moments = normalise(row[mine], mask[mine], moments)
    return normalised.tolist(), moments.tolist()


def test_normalise_pools_the_ranks(on_two_ranks):
    scores, masks = normal(3, 4, seed=3), normal(3, 4, seed=4) > 0
    moments = torch.zeros(3, dtype=torch.float64)
    for row, mask in zip(scores, masks, strict=True):
        normalised, moments = normalise(row, mask, moments)
    (first, its_moments), (second, _) = on_two_ranks(normalise_on_rank, scores.tolist(), masks.tolist())
    assert first + second == pytest.approx(normalised.tolist())
    assert its_moments == pytest.approx(moments.tolist())


def test_scores_are_normalised_then_clipped_then_replaced(settings, tmp_path):  # noqa: F811
    """Rows without EOS get their fixed score, unscaled and unclipped, and stay out of the moments."""
    shaping = {"normalize_scores": True, "cliprange_score": 0.8, "missing_eos_score": -7.0}
    folder = run(settings(tmp_path / "run", "letters", updates=2, **shaping))
    seen = []
    for line in lines(folder):
        rows = [row for row in lines(folder, "samples.jsonl") if row["step"] == line["step"]]
        raw = [len(row["response"]) for row in rows]
        ended = [length < 16 for length in raw]
        seen += [length for length, has_eos in zip(raw, ended, strict=True) if has_eos]
        mean = sum(seen) / len(seen)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in seen) / len(seen))
        for row, length, has_eos in zip(rows, raw, ended, strict=True):
            expected = max(-0.8, min((length - mean) / deviation, 0.8)) if has_eos else -7.0
            assert row["score"] == pytest.approx(expected, abs=1e-5)
        assert line["objective/raw_scores"] == pytest.approx(sum(raw) / 16)
        assert line["objective/scores"] == pytest.approx(sum(row["score"] for row in rows) / 16, abs=1e-6)
        assert {-7.0} < {round(row["score"], 3) for row in rows} and not all(ended)
    assert any(abs(row["score"]) == pytest.approx(0.8) for row in lines(folder, "samples.jsonl"))


def test_resuming_keeps_the_moments(settings, tmp_path):  # noqa: F811
    folder = run(settings(tmp_path / "run", "letters", updates=2, normalize_scores=True, save_every=1))
    resumed = interrupted(folder, tmp_path / "resumed", 1)
    ppo_rlhf.main(ppo_rlhf.Args(resume=resumed))
    assert timeless(resumed) == timeless(folder)


def test_whitened_rewards_keep_their_mean(settings, tmp_path):  # noqa: F811
    rewards = {}
    for whitens in (False, True):
        flags = settings(tmp_path / str(whitens), "letters", whiten_rewards=whitens)
        [((given, _, mask, *_), _)] = recorded("compute_gae", flags)
        rewards[whitens] = given[mask]
    plain, whitened = rewards[False], rewards[True]
    assert whitened.std(correction=0) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(whitened, (plain - plain.mean()) / plain.std(correction=0) + plain.mean())


# ----------------------------------------------------------------------------------------------------------------------
# Loss


def test_entropy_bonus_is_the_gradient_of_the_mean_entropy(settings, tmp_path, gpt2_folder):  # noqa: F811
    """Nothing to gain (reward 0, V = 0): what is left of the loss is -coefficient * mean entropy over real tokens."""
    flags = {"entropy_coef": 0.3, "kl_coef": 0.0, "max_grad_norm": 0.0, "micro_batch_size": 5, "temperature": 0.7}
    [(gradients, _)] = watched(None, settings(tmp_path / "run", "nothing", **flags))
    policy = AutoModelForCausalLM.from_pretrained(gpt2_folder).eval()
    tokenizer, forbidden, entropies = AutoTokenizer.from_pretrained(gpt2_folder), torch.arange(31) == 0, []
    for row in lines(tmp_path / "run", "samples.jsonl"):
        query, response = tokenizer(row["query"]).input_ids, tokenizer(row["response"]).input_ids
        response += [tokenizer.eos_token_id] * (len(response) < 16)
        logits = policy(torch.tensor([query + response])).logits[0, -len(response) - 1 : -1] / 0.7
        entropies.append(torch.distributions.Categorical(logits=logits[:, ~forbidden]).entropy())
    mean_entropy = torch.cat(entropies).mean()
    (-0.3 * mean_entropy).backward()
    expected = [parameter.grad.numpy() for parameter in policy.parameters()]
    assert apart(gradients[: len(expected)], expected) < 1e-4
    assert lines(tmp_path / "run")[0]["policy/entropy_avg"] == pytest.approx(mean_entropy.item(), rel=1e-5)


def test_upper_side_of_the_clip(settings, tmp_path):  # noqa: F811
    """A second epoch leaves 1: with one side open, only tokens on the other side are clipped."""
    for name, low, high in [("lower", 1e-4, 1e4), ("upper", 1.0, 1e-4)]:
        flags = settings(tmp_path / name, "letters", num_epochs=2, lr=1e-3, cliprange=low, cliprange_high=high)
        [_, ((*_, advantages, _, _), (_, ratio, clipped))] = recorded("policy_loss", flags)
        assert clipped.any()
        assert torch.equal(clipped, (advantages < 0) & (ratio < 1 - low) | (advantages > 0) & (ratio > 1 + high))


def explode(call, answer):
    loss, ratio, clipped = answer
    return (loss, ratio * 1000, clipped) if call == 1 else answer


def break_loss(call, answer):
    loss, ratio, clipped = answer
    return (loss * math.nan, ratio, clipped) if call == 1 else answer


@pytest.mark.parametrize("accident", [explode, break_loss])
def test_a_step_of_exploded_ratio_or_gradient_is_skipped(settings, tmp_path, accident):  # noqa: F811
    """The second of three steps fails: it leaves no trace, and the third is taken from where the first one ended."""
    flags = settings(tmp_path / "run", "letters", num_epochs=3, lr=1e-3)
    recorded("policy_loss", flags, accident)
    line = lines(tmp_path / "run")[0]  # which takes no NaN: what was not done is not in the means
    assert (line["optim/steps"], line["optim/skipped"]) == (2, 1)
    assert 0.9 < line["val/ratio"] < 1.1 and line["optim/grad_norm"] > 0
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())
    with_accident, without = [], []
    for name, change, steps in [("with", accident, with_accident), ("without", None, without)]:
        flags = settings(tmp_path / name, "letters", num_epochs=3)
        recorded("policy_loss", flags, change, go=lambda flags, steps=steps: steps.extend(watched(None, flags)))
    assert (len(with_accident), len(without)) == (2, 3)
    assert apart(with_accident[1][1], without[1][1]) < 1e-5  # the same second step: a skipped one changes nothing


@pytest.mark.parametrize(("mean", "skipped"), [(0.09, 1), (0.11, 0), (9.9, 0), (10.1, 1)])
def test_the_guard_is_at_a_mean_ratio_of_ten_and_a_tenth(settings, tmp_path, mean, skipped):  # noqa: F811
    def set_ratio(call, answer):
        loss, ratio, clipped = answer
        return (loss, torch.full_like(ratio, mean), clipped) if call == 1 else answer

    recorded("policy_loss", settings(tmp_path / "run", "letters", num_epochs=3), set_ratio)
    assert lines(tmp_path / "run")[0]["optim/skipped"] == skipped


def broken_on_rank_one(rank, flags):
    """The loss is NaN in the second step, on rank 1 alone. Returns what the run logged and the parameters' sum."""
    calls, original = [], ppo_rlhf.policy_loss

    def loss(*args):
        calls.append(0)
        answer, ratio, clipped = original(*args)
        return (answer * math.nan if rank == 1 and len(calls) == 2 else answer), ratio, clipped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_rlhf, "policy_loss", loss)
        return [parameters for _, parameters in watched(rank, flags)]


def test_all_ranks_skip_together(settings, tmp_path, on_two_ranks):  # noqa: F811
    first, second = on_two_ranks(broken_on_rank_one, settings(tmp_path / "run", "letters", num_epochs=3))
    assert len(first) == len(second) == 2
    for mine, theirs in zip(first, second, strict=True):
        assert all((a == b).all() and math.isfinite(a.sum()) for a, b in zip(mine, theirs, strict=True))


def test_nothing_finite_ends_the_run_in_one_line(settings, tmp_path):  # noqa: F811
    flags = settings(tmp_path / "run", "letters", num_epochs=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_rlhf, "value_loss", lambda new, *_: (new * math.nan, new > 0))
        with pytest.raises(ppo_rlhf.UserError, match="update 1: no finite gradient"):
            run(flags)


@pytest.mark.parametrize(("limit", "steps"), [(1e-12, 1), (1e6, 4)])
def test_early_stop(settings, tmp_path, limit, steps):  # noqa: F811
    """The first step of an update meets its own policy; the second already sees a new one, and ends the update."""
    folder = run(settings(tmp_path / "run", "letters", num_epochs=2, num_minibatches=2, lr=1e-3, early_stop_kl=limit))
    assert lines(folder)[0]["optim/steps"] == steps
    assert lines(folder)[0]["optim/skipped"] == (steps == 1)


@pytest.mark.parametrize(("factor", "steps"), [(0.99, 1), (1.01, 2)])
def test_early_stop_is_at_its_limit(settings, tmp_path, factor, steps):  # noqa: F811
    flags = {"num_epochs": 2, "lr": 1e-3}
    both = lines(run(settings(tmp_path / "both", "letters", **flags)))[0][
        "policy/approxkl_avg"
    ]  # of steps 0 and x: x / 2
    folder = run(settings(tmp_path / "run", "letters", **flags, early_stop_kl=2 * both * factor))
    assert lines(folder)[0]["optim/steps"] == steps


def stopped_by_one_rank(rank, flags):
    """approxkl is 0 on rank 0 and 3 on rank 1, so above 1 on average. Returns how many optimizer steps were taken."""
    original = ppo_rlhf.ppo_loss

    def loss(*args):
        total, stats = original(*args)
        return total, stats | {"policy/approxkl_avg": torch.full_like(stats["loss/policy_avg"], 3.0 * rank)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_rlhf, "ppo_loss", loss)
        return len(watched(rank, flags))


def test_early_stop_asks_all_ranks(settings, tmp_path, on_two_ranks):  # noqa: F811
    flags = settings(tmp_path / "run", "letters", num_epochs=3, early_stop_kl=1.0)
    assert on_two_ranks(stopped_by_one_rank, flags) == [1, 1]


# ----------------------------------------------------------------------------------------------------------------------
# Stop tokens, logged KL, and everything at once


@pytest.mark.parametrize("min_length", [0, 3])
def test_stop_token(settings, tmp_path, min_length):  # noqa: F811
    flags = {"stop_token": "a", "min_length": min_length, "missing_eos_score": -9.0, "updates": 2}
    calls = recorded("compute_rewards", settings(tmp_path / "run", "letters", **flags))
    responses = [row["response"] for row in lines(tmp_path / "run", "samples.jsonl")]
    lengths = torch.cat([mask.sum(1) for (_, _, _, mask, _), _ in calls])
    if min_length == 0:
        assert all("a" not in response[:-1] for response in responses)
    else:
        assert any("a" in response[:3] for response in responses)
        assert all("a" not in response[3:-1] for response in responses)
    assert any(response.endswith("a") for response in responses)
    assert ((lengths > min_length) & (lengths <= 16)).all()
    for row in lines(tmp_path / "run", "samples.jsonl"):
        if row["response"].endswith("a") and len(row["response"]) > min_length:
            assert row["score"] == len(row["response"])  # it ended by itself, though not with EOS
        if row["score"] == -9.0:
            assert len(row["response"]) <= 16 and not row["response"].endswith("a")


def test_stop_token_is_the_one_inside_a_text(settings, tmp_path, gpt2_folder):  # noqa: F811
    """A tokenizer that marks the beginning of a text has another id for a full stop there than inside a response."""
    calls = []

    class Marking:
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

        def __getattr__(self, name):
            return getattr(self.tokenizer, name)

        def __len__(self):
            return len(self.tokenizer)

        def __call__(self, text, **options):
            calls.append(text)
            encoded = self.tokenizer(text, **options)
            if text[:1] == "a":
                encoded["input_ids"][0] = 29  # a mark of its own
            return encoded

    original = ppo_rlhf.load_tokenizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_rlhf, "load_tokenizer", lambda path: Marking(original(path)))
        recording = recorded("response_mask", settings(tmp_path / "run", "letters", stop_token="a"))
    [((_, sampling_ends, _), _), ((_, stop_ids, _), _)] = recording  # in `generate` and behind it
    assert calls and sampling_ends.tolist() == stop_ids.tolist() and set(stop_ids.tolist()) == {A, 1}


def test_a_stop_token_that_melts_into_the_letter_before_it_is_refused():
    """Behind the letter that stands for a response, some tokenizers have one token for both: no id to wait for."""

    class Melting:
        eos_token_id, pad_token_id, unk_token_id = 1, 0, None

        def __call__(self, text, add_special_tokens):
            pieces = {"x": [5], "x.": [6], "x!?": [5, 7, 8], "x;": [9, 7], "x,": [5, 0]}
            return types.SimpleNamespace(input_ids=pieces[text])

    assert ppo_rlhf.stop_token_ids(Melting(), "!?", 1) == [1, 7, 8]
    assert ppo_rlhf.stop_token_ids(Melting(), None, None) == [1]
    assert ppo_rlhf.stop_token_ids(Melting(), None, [3, 1]) == [1, 3]
    for text in (".", ";", "", ","):  # the last: an id that stands for what the vocabulary lacks
        with pytest.raises(UserError, match="--stop_token"):
            ppo_rlhf.stop_token_ids(Melting(), text, 1)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_each_eos_of_a_model_ends_a_response_and_stays_in_its_config(name, settings, tmp_path, gpt2_folder):  # noqa: F811
    shutil.copytree(gpt2_folder, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink(missing_ok=True)
    path = tmp_path / "model" / name
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(config | {"eos_token_id": [1, A]}))
    calls = recorded("response_mask", settings(tmp_path / "run", "letters", model=str(tmp_path / "model")))
    [((_, sampling_ends, _), _), ((responses, stop_ids, _), mask)] = calls  # in `generate` and behind it
    assert sampling_ends.tolist() == stop_ids.tolist() == [1, A]
    last = responses.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1)
    assert (last == A).any() and ((responses == A) & mask).sum() == (last == A).sum()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert saved.config.eos_token_id == saved.generation_config.eos_token_id == [1, A]


def test_ids_that_no_token_has_are_never_sampled_nor_scored(settings, tmp_path, tokenizer):  # noqa: F811
    policy = GPT2LMHeadModel(build_config("gpt2", tokenizer))
    policy.resize_token_embeddings(40)
    for part in (policy, tokenizer):
        part.save_pretrained(tmp_path / "model")
    calls = recorded("token_logprobs", settings(tmp_path / "run", model=str(tmp_path / "model")))
    (logits, tokens, temperature, bias, _), (logprobs, _) = calls[0]
    assert tokens.max() < len(tokenizer) == 31
    logits = logits + bias
    expected = torch.log_softmax(logits / temperature, -1).gather(-1, tokens[..., None]).squeeze(-1)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    forbidden = torch.tensor([i == 0 or i >= 31 for i in range(40)])
    assert (logits[..., forbidden] == -math.inf).all() and logits[..., ~forbidden].isfinite().all()


def test_a_window_that_a_static_cache_confuses_is_refused(settings, tmp_path, tokenizer):  # noqa: F811
    """GPT-Neo's local layers would sample from another distribution than the one that is trained."""
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
    for window, length in ((23, 16), (24, 16)):
        config = GPTNeoConfig(vocab_size=31, window_size=window, max_position_embeddings=64, **sizes)
        GPTNeoForCausalLM(config).save_pretrained(tmp_path / str(window))
        tokenizer.save_pretrained(tmp_path / str(window))
    longest = 8  # of the prompts' tokens, --query_length
    flags = settings(tmp_path / "run", model=str(tmp_path / "23"), dataset=long_prompt(tmp_path, longest))
    with pytest.raises(UserError, match="--response_length: 24 positions"):
        run(flags)
    line = lines(run(flags | {"model": str(tmp_path / "24")}))[0]
    assert line["objective/kl"] == pytest.approx(0, abs=1e-5)


def long_prompt(tmp_path, length):
    return write_jsonl(tmp_path / "long.jsonl", [{"prompt": "a" * length}])


def test_a_config_alone_gives_policy_and_critic_one_start(settings, tmp_path, gpt2_folder):  # noqa: F811
    shutil.copytree(gpt2_folder, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    folder = run(settings(tmp_path / "run", model=str(tmp_path / "config"), lr=0.0))
    policy, critic = (weights(folder, part) for part in ("model", "critic"))
    shared = [name for name in policy if name in critic]
    assert len(shared) > 10 and all(torch.equal(policy[name], critic[name]) for name in shared)


@pytest.mark.parametrize("zero", [True, False])
def test_explained_variance_of_nothing_is_nothing(settings, tmp_path, zero):  # noqa: F811
    """Every return is 1: there is no variance to explain, and no critic explains any, whatever it says."""

    def load(*args):
        models = load_models(*args)
        torch.nn.init.normal_(models[2].score.weight, std=0.0 if zero else 0.5)
        return models

    (tmp_path / "one.py").write_text("def one(prompts, responses, **columns):\n    return [1.0] * len(responses)\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_rlhf, "load_models", load)
        line = lines(run(settings(tmp_path / "run", reward_fn=f"{tmp_path}/one.py:one", lam=1.0)))[0]
    assert (line["loss/value_avg"] == pytest.approx(0.5)) == zero and line["val/explained_var"] == 0.0


def test_the_coefficient_that_adapts_is_the_one_that_is_charged(settings, tmp_path):  # noqa: F811
    """And what the update trains on is what the metrics say: the paid score plus the penalty."""
    flags = {"updates": 3, "lr": 1e-2, "target_kl_nats": 0.01, "kl_horizon": 100, "missing_eos_score": -1.0}
    calls = recorded("compute_rewards", settings(tmp_path / "run", "letters", **flags))
    metrics = lines(tmp_path / "run")
    assert [args[4] for args, _ in calls] == [line["kl_coef"] for line in metrics]
    assert len({line["kl_coef"] for line in metrics}) == 3
    for (_, rewards), line in zip(calls, metrics, strict=True):
        assert 0 < line["val/has_eos"] < 1 and line["objective/scores"] != line["objective/raw_scores"]
        assert line["objective/rlhf_reward"] == pytest.approx(rewards.sum(1).mean().item(), abs=1e-5)


def test_everything_random_depends_on_the_seed(settings, tmp_path):  # noqa: F811
    calls = recorded("seeded", settings(tmp_path / "run", seed=7, num_epochs=2, updates=2))
    assert {args[0] for args, _ in calls} == {7}
    assert {args[1] for args, _ in calls} == {"prompts", "uniforms", "minibatches"}
    assert len({args for args, _ in calls}) == len(calls) - 1  # two updates within one pass over the prompts


def test_linear_attention_is_refused(settings, tmp_path, gpt2_folder):  # noqa: F811
    """Such a layer reads the whole prefill mask: behind the prompt it would meet the empty slots of a static cache."""
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    sizes |= {
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    sizes |= {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    }
    config = Qwen3NextConfig(
        vocab_size=31, intermediate_size=16, layer_types=["linear_attention", "full_attention"], **sizes
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(gpt2_folder).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="linear attention"):
        run(settings(tmp_path / "run", model=str(tmp_path / "model")))


def refused_config(config, settings, tmp_path, gpt2_folder, match):  # noqa: F811
    config.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(gpt2_folder).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=match):
        run(settings(tmp_path / "run", model=str(tmp_path / "model")))
    assert not (tmp_path / "run").exists()


def test_a_model_of_images_and_text_is_refused(settings, tmp_path, gpt2_folder):  # noqa: F811
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 31, "num_key_value_heads": 1, "head_dim": 8}
    config = Gemma3Config(text_config=text, vision_config=sizes | {"image_size": 28, "patch_size": 14})
    refused_config(config, settings, tmp_path, gpt2_folder, "--model .*not text alone")


@pytest.mark.parametrize("family", [Phi3Config, LlamaConfig])
def test_positions_behind_which_longrope_turns_otherwise_are_refused(family, settings, tmp_path, gpt2_folder):  # noqa: F811
    """Behind `original_max_position_embeddings` it takes other frequencies, for all rows as soon as one is that long: a
    log-probability would depend on the rows beside it. Only Phi has the limit in its config as well."""
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    factors["original_max_position_embeddings"] = 20
    limits = {"max_position_embeddings": 64}
    limits |= {"original_max_position_embeddings": 20} if family is Phi3Config else {}
    config = family(
        vocab_size=31, pad_token_id=0, bos_token_id=1, eos_token_id=1, rope_parameters=factors, **sizes, **limits
    )
    refused_config(config, settings, tmp_path, gpt2_folder, "--response_length: 23 positions")


def test_ids_between_those_of_the_tokens_are_not_said():
    """A tokenizer of two tokens and a pad, whose ids are 0, 2 and 5: as many as its length says, but not the first ones."""
    policy = GPT2LMHeadModel(GPT2Config(n_embd=4, n_layer=1, n_head=1, vocab_size=7, n_positions=4))
    tokenizer = types.SimpleNamespace(pad_token_id=0, get_vocab=lambda: {"<pad>": 0, "a": 2, "|": 5})
    assert ppo_rlhf.logit_bias(policy, tokenizer).tolist() == [0.0 if i in (2, 5) else -math.inf for i in range(7)]


def test_a_long_minimum_means_fixed_length(settings, tmp_path):  # noqa: F811
    folder = run(settings(tmp_path / "run", "letters", min_length=16))
    assert lines(folder)[0]["val/sequence_lengths"] == 16 and lines(folder)[0]["val/has_eos"] == 0


def test_logged_kl_and_entropy_are_their_definitions(settings, tmp_path):  # noqa: F811
    calls = recorded("compute_rewards", settings(tmp_path / "run", updates=3, lr=1e-2, num_epochs=2))
    for line, ((scores, logprobs, ref_logprobs, mask, kl_coef), _) in zip(lines(tmp_path / "run"), calls, strict=True):
        k1, k3, surprise = [], [], []
        for i, length in enumerate(mask.sum(1).tolist()):
            pairs = [(logprobs[i, t].item(), ref_logprobs[i, t].item()) for t in range(length)]
            k1.append([p - q for p, q in pairs])
            k3.append([math.exp(q - p) - 1 - (q - p) for p, q in pairs])
            surprise.append(-sum(p for p, _ in pairs))
        tokens = sum(map(len, k1))
        expected = {
            "objective/kl": sum(map(sum, k1)) / 16,
            "objective/kl_k3": sum(map(sum, k3)) / 16,
            "objective/kl_per_token": sum(map(sum, k1)) / tokens,
            "objective/kl_k3_per_token": sum(map(sum, k3)) / tokens,
            "objective/entropy": sum(surprise) / 16,
            "objective/scores": scores.mean().item(),
            "kl_coef": kl_coef,
        }
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, abs=1e-5), name
    assert line["objective/kl_k3"] > 0


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


def test_everything_at_once_on_one_and_two_ranks(settings, tmp_path, on_two_ranks):  # noqa: F811
    flags = EVERYTHING | {"max_grad_norm": 0.0, "lr": 1e-2}
    whole = watched(None, settings(tmp_path / "whole", "letters", **flags))
    small = watched(None, settings(tmp_path / "small", "letters", **flags, micro_batch_size=1))
    ranks, _ = on_two_ranks(watched, settings(tmp_path / "ranks", "letters", **flags, micro_batch_size=3))
    assert len(whole) == len(small) == len(ranks) == 4
    for other in (small, ranks):
        for (gradients, parameters), (their_gradients, their_parameters) in zip(other, whole, strict=True):
            assert apart(gradients, their_gradients) < 1e-5
            assert apart(parameters, their_parameters) < 1e-5
    for name in ("small", "ranks"):
        assert timeless(tmp_path / name)[0] == pytest.approx(timeless(tmp_path / "whole")[0], rel=1e-5, abs=1e-6)


def test_everything_resumes(settings, tmp_path):  # noqa: F811
    folder = run(settings(tmp_path / "run", "letters", updates=3, save_every=1, **EVERYTHING))
    assert [line["kl_coef"] for line in lines(folder)] != [0.05] * 3
    resumed = interrupted(folder, tmp_path / "resumed", 2)
    ppo_rlhf.main(ppo_rlhf.Args(resume=resumed))
    assert timeless(resumed) == timeless(folder)
    for part in ("model", "critic"):
        assert same_weights(weights(resumed, part), weights(folder, part))


@pytest.mark.parametrize("flag", ["temperature", "target_kl_nats", "early_stop_kl", "cliprange_score"])
def test_limits_must_be_positive(settings, tmp_path, flag):  # noqa: F811
    with pytest.raises(ppo_rlhf.UserError, match=f"--{flag}"):
        run(settings(tmp_path / "run", **{flag: 0.0}))
    assert not Path(tmp_path / "run").exists()
