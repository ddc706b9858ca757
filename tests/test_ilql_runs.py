"""Whole runs of ilql_rlhf.py on tiny models: what a step must do, what a run leaves behind, what it refuses.

Most runs call `main` in this process, because a start costs seconds; one is a real subprocess.
"""

import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import RecordingSGD, assert_same_gradients, build_tokenizer, read_jsonl, refuses, write_jsonl
from safetensors.torch import load_file
from test_ilql_rlhf import TEMPLATE, turns
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
)

import ilql_rlhf
import utils

CPU = torch.device("cpu")
REWARDS = """
def share_of_a(prompts, responses, bonus=None, **columns):
    assert len(prompts) == len(responses) and (bonus is None or len(bonus) == len(prompts))
    return [response.count("a") / 6 for response in responses]

def too_few(prompts, responses, **columns):
    return [0.0] * (len(responses) - 1)

def not_a_number(prompts, responses, **columns):
    return [float("nan")] * len(responses)

def nothing(prompts, responses, **columns):
    return [None] * len(responses)

def no_return(prompts, responses, **columns):
    [1.0] * len(responses)

def one_number(prompts, responses, **columns):
    return 0.5
"""
COMPLETIONS = ["a", "bc", "aab", "dab", "ca", "aaaa", "bb", "cdcd", "ab", "b", "ac", "daa"]
KEYS = {
    *(f"loss/{key}" for key in ("total", "q", "v", "cql", "awac")),
    *(f"val/{key}" for key in ("q", "v", "advantage", "awac_weight")),
    *("step", "lr", "optim/grad_norm", "epoch"),
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory, gpt2_folder):
    """`settings(output_dir, **changes)`: flags of a run of a second. Its files: `settings.folder`."""
    folder = tmp_path_factory.mktemp("task")
    rows = [
        {"prompt": "xyz"[i % 3] * (1 + i % 2), "completion": text, "reward": text.count("a") / 4 - 0.3}
        for i, text in enumerate(COMPLETIONS)
    ]
    dataset = write_jsonl(folder / "rated.jsonl", rows)
    write_jsonl(
        folder / "prompts.jsonl",
        [{"prompt": "x", "bonus": 1}, {"prompt": "yy", "bonus": 2}, {"prompt": "zzz", "bonus": 3}],
    )
    (folder / "rewards.py").write_text(REWARDS)

    def flags(output_dir, **changes):
        flags = {"model": gpt2_folder, "dataset": dataset, "output_dir": str(output_dir), "num_epochs": 1}
        flags |= {"reward_fn": f"{folder / 'rewards.py'}:share_of_a", "batch_size": 4, "micro_batch_size": 4}
        flags |= {"eval_betas": (0.0, 2.0), "eval_samples": 6, "response_length": 5, "log_every": 1, "compile": False}
        return flags | {"beta": 0.5, "lr": 1e-3, "max_length": 40} | changes

    flags.folder = folder
    return flags


def run(flags):
    ilql_rlhf.main(ilql_rlhf.Args(**flags))
    return Path(flags["output_dir"])


def lines(folder, name="metrics.jsonl"):
    """The objects of a .jsonl file; NaN and Infinity are no JSON and no numbers anyone can claim."""

    def refuse(constant):
        raise AssertionError(f"{constant} in {name}")

    return [json.loads(line, parse_constant=refuse) for line in (Path(folder) / name).read_text().splitlines()]


def state(folder, step):
    return torch.load(Path(folder) / "checkpoints" / f"step_{step:06d}.pt", weights_only=True)


def weights(folder):
    return {name: load_file(Path(folder) / "model" / name) for name in ("model.safetensors", "ilql_heads.safetensors")}


def same(first, second):
    return first.keys() == second.keys() and all(
        same(first[key], second[key]) if isinstance(first[key], dict) else torch.equal(first[key], second[key])
        for key in first
    )


# ----------------------------------------------------------------------------------------------------------------------
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
SPELLED = ["UabAcd|UeAf|", "UgAhij|UklAm|UnAop|", "UqAr|"]
SAID = ["....aaa...aa", "...aaaa....aa...aaa", "...aa"]  # a: said by the agent


def losses_by_hand(ilql, args):
    """{name: loss} of all dialogues, a token at a time, from rows without padding; None for the totals' weights."""
    names, sums, count = build_tokenizer().get_vocab(), dict.fromkeys(("q", "v", "cql", "awac"), 0.0), 0
    for spelled, said, row in zip(SPELLED, SAID, DIALOGUES, strict=True):
        ids, rewards = [names[letter] for letter in spelled], iter(row["reward"])
        output = ilql.policy(torch.tensor([ids]), output_hidden_states=True)
        h, logits = output.hidden_states[-1][0], output.logits[0]
        v = [ilql.heads["v"][0](h[i])[0] for i in range(len(ids))]
        acts = [i for i in range(len(ids) - 1) if said[i + 1] == "a"]  # states whose next token is the agent's
        for j, i in enumerate(acts):
            a, last = ids[i + 1], i == acts[-1]
            qs, targets = ([head(h[i]) for head in ilql.heads[name]] for name in ("q", "target_q"))
            target = min(q[a].item() for q in targets)
            backup = next(rewards) if spelled[i + 1] == "|" else 0.0
            backup += 0.0 if last else args.gamma * v[acts[j + 1]].item()
            sums["q"] += sum((backup - q[a]) ** 2 for q in qs)
            sums["v"] += (args.tau if target >= v[i] else 1 - args.tau) * (target - v[i]) ** 2
            sums["cql"] += sum(q.logsumexp(0) - q[a] for q in qs)
            sums["awac"] -= math.exp(args.beta * (target - v[i].item())) * torch.log_softmax(logits[i], 0)[a]
            count += 1
    means = {name: x / count for name, x in sums.items()}
    return means | {
        "total": means["q"] + means["v"] + args.cql_weight * means["cql"] + args.awac_weight * means["awac"]
    }


def recorded(flags, ranks=None, steps=None):
    """Gradients of each optimizer step of a run, plain gradient steps standing in for AdamW; and the module at its start."""
    optimizers, modules = [], []

    def optimizer(*args, **kwargs):
        optimizers.append(RecordingSGD(*args, **kwargs))
        return optimizers[-1]

    class Watched(ilql_rlhf.ILQL):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            for i, parameter in enumerate(self.heads.parameters()):  # no output 0, and targets unlike the heads
                generator = torch.Generator().manual_seed(i)
                parameter.data += torch.randn(parameter.shape, generator=generator) / 3
            modules.append({key: x.clone() for key, x in self.state_dict().items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ilql_rlhf, "ILQL", Watched)
        patch.setattr(torch.optim, "AdamW", optimizer)
        if ranks:
            patch.setattr(ilql_rlhf, "init_ranks", lambda: ranks)
        ilql_rlhf.main(ilql_rlhf.Args(**flags))
    return optimizers[0].history, modules[0]


def test_a_step_is_the_gradient_of_the_definitions(settings, tmp_path, gpt2_folder):
    """Dialogues of several turns: every number and every gradient of the first step, by a loop over single tokens."""
    dataset = write_jsonl(tmp_path / "rows.jsonl", DIALOGUES)
    flags = settings(tmp_path / "run", model=chat_folder(tmp_path / "model", gpt2_folder), dataset=dataset)
    flags |= {"batch_size": 3, "micro_batch_size": 3, "max_grad_norm": 0.0, "reward_fn": None, "tau": 0.7, "gamma": 0.9}
    flags |= {"beta": 0.8, "cql_weight": 0.3, "awac_weight": 0.6}
    history, start = recorded(flags)
    ilql = ilql_rlhf.ILQL(utils.load_pretrained(AutoModelForCausalLM, gpt2_folder)[0], 2)
    ilql.load_state_dict(start)
    expected = losses_by_hand(ilql, ilql_rlhf.Args(**flags))
    logged = lines(tmp_path / "run")[0]
    for name, value in expected.items():
        assert logged[f"loss/{name}"] == pytest.approx(value.item(), rel=1e-4), name
    parameters = [p for p in ilql.parameters() if p.requires_grad]
    by_hand = [g.numpy() for g in torch.autograd.grad(expected["total"], parameters)]
    assert_same_gradients(history, [by_hand], tolerance=1e-4)
    assert logged["val/advantage"] == pytest.approx(logged["val/q"] - logged["val/v"], abs=1e-6)


def share(rank, flags, rows_per_micro_batch, folder):
    """Gradients of a run on rank 0 or 1 of two, or (None) of one."""
    ranks = utils.Ranks(rank or 0, 1 if rank is None else 2, CPU)
    flags = flags | {"micro_batch_size": rows_per_micro_batch, "output_dir": f"{folder}_{rows_per_micro_batch}"}
    return recorded(flags, ranks)[0]


def test_the_learning_rate_falls_to_its_floor_and_stays(settings, tmp_path):
    flags = settings(tmp_path / "run", num_epochs=3, decay_epochs=2, min_lr=2e-4, reward_fn=None)
    rates = [line["lr"] for line in lines(run(flags))]
    assert rates == pytest.approx([2e-4 + 8e-4 * (1 - i / 6) for i in range(6)] + [2e-4] * 3)


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.0])
def test_the_policy_learns_at_its_own_rate(settings, tmp_path, scale, gpt2_folder):
    """Adam's first step moves each weight with a gradient by the learning rate; with scale 0 no weight has one."""
    rows = len(read_jsonl(settings.folder / "rated.jsonl"))
    flags = settings(tmp_path / "run", num_epochs=1, batch_size=rows, policy_lr_scale=scale, reward_fn=None)
    folder, start = run(flags | {"lr": 1e-2, "beta": 0.0}), AutoModelForCausalLM.from_pretrained(gpt2_folder)
    ilql = ilql_rlhf.load_ilql(str(folder / "model"))
    [metrics] = lines(folder)
    moved = [(x - y).abs().max().item() for x, y in zip(ilql.policy.parameters(), start.parameters(), strict=True)]
    assert metrics["lr"] == 1e-2 and max(moved) == pytest.approx(1e-2 * scale, rel=1e-3)
    assert ilql.heads["q"][0][2].bias.abs().max().item() == pytest.approx(1e-2, rel=1e-3)
    assert ("loss/awac" in metrics) == (scale > 0) and "loss/cql" in metrics  # what is not computed is no metric


def test_without_cql_and_policy_the_heads_learn_the_same(settings, tmp_path):
    """Products with the whole vocabulary are then left out; with a policy that learns at rate 1e-30 they are not."""
    flags = settings("", num_epochs=1, cql_weight=0.0, max_grad_norm=0.0, reward_fn=None)
    frozen, free = (
        run(flags | {"policy_lr_scale": scale, "output_dir": str(tmp_path / f"run_{scale}")}) for scale in (0.0, 1e-30)
    )
    heads = [ilql_rlhf.load_ilql(str(folder / "model")).heads.state_dict() for folder in (frozen, free)]
    assert heads[0]["q.0.2.weight"].any()
    for name, x in heads[0].items():
        torch.testing.assert_close(x, heads[1][name], atol=1e-5, rtol=1e-4)
    one, two = lines(frozen)[-1], lines(free)[-1]
    assert not {"loss/cql", "loss/awac"} & set(one) and "loss/awac" in two
    assert one["loss/q"] == pytest.approx(two["loss/q"], rel=1e-4)


def test_micro_batches_and_ranks_do_not_change_a_gradient(settings, tmp_path, on_two_ranks):
    """A last batch of 3 rows included, which two ranks share unevenly, and rows of unequal lengths."""
    rows = read_jsonl(settings.folder / "rated.jsonl")[:11]
    dataset = write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = settings("", max_grad_norm=0.0, dataset=dataset, reward_fn=None, eval_samples=2)
    whole = share(None, flags, 4, tmp_path / "one")
    assert len(whole) == 3
    assert_same_gradients(share(None, flags, 1, tmp_path / "one"), whole)
    for size in (2, 1):
        first, second = on_two_ranks(share, flags, size, str(tmp_path / "two"))
        assert_same_gradients(first, whole)
        assert_same_gradients(second, whole)
    one, two = lines(tmp_path / "one_4"), lines(tmp_path / "two_1")
    for line, other in zip(one, two, strict=True):
        assert other == pytest.approx(line, rel=1e-4, abs=1e-6)


def test_two_ranks_without_a_loss_for_the_head(settings, tmp_path, on_two_ranks, llama_folder):
    """An LM head of its own gets no gradient when awac_weight is 0, which ranks that average gradients must survive."""
    flags = settings("", max_grad_norm=0.0, reward_fn=None, eval_samples=2, awac_weight=0.0, model=llama_folder)
    whole = share(None, flags, 4, tmp_path / "one")
    for one in on_two_ranks(share, flags, 2, str(tmp_path / "two")):
        assert_same_gradients(one, whole)


def evaluation(rank, flags, folder):
    """Metrics of a run's evaluation on rank 0 or 1 of two, or (None) of one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ilql_rlhf, "init_ranks", lambda: utils.Ranks(rank or 0, 1 if rank is None else 2, CPU))
        run(flags | {"output_dir": folder})
    return {key: x for key, x in lines(folder)[-1].items() if key.startswith("eval/")} if not rank else None


def test_evaluation_on_two_ranks_is_that_of_one(settings, tmp_path, on_two_ranks):
    flags = settings("", lr=0.03, eval_samples=60, eval_every=1000)
    one = evaluation(None, flags, str(tmp_path / "one"))
    assert set(one) == {"eval/score@beta=0", "eval/score@beta=2"} and 0 not in one.values()
    assert on_two_ranks(evaluation, flags, str(tmp_path / "two"))[0] == pytest.approx(one)


def test_targets_follow_every_optimizer_step(settings, tmp_path):
    folder = run(settings(tmp_path / "run", save_every=1, alpha=0.3))
    states = [state(folder, step)["model"] for step in (1, 2, 3)]  # one pass over the rows
    names = [name for name in states[0] if ".target_q." in name]
    assert len(names) == 8
    for before, after in itertools.pairwise(states):
        for name in names:
            online = after[name.replace("target_q", "q")]
            torch.testing.assert_close(after[name], 0.3 * online + 0.7 * before[name])
            assert not torch.equal(after[name], before[name])
    folder = run(settings(tmp_path / "copies", save_every=1, alpha=1.0))
    copied = state(folder, 1)["model"]
    assert all(torch.equal(copied[name], copied[name.replace("target_q", "q")]) for name in names)


# ----------------------------------------------------------------------------------------------------------------------
# What a run leaves behind


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    return run(settings(tmp_path_factory.mktemp("runs") / "finished", num_epochs=2, save_every=1, eval_every=2))


def test_metrics_are_the_documented_ones(finished):
    metrics = lines(finished)
    scores = {"eval/score@beta=0", "eval/score@beta=2"}
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert all(line.keys() == (KEYS | scores if line["step"] % 2 == 0 else KEYS) for line in metrics)
    assert [line["lr"] for line in metrics] == pytest.approx([1e-3 * (1 - i / 6) for i in range(6)])
    for line in metrics:
        parts = line["loss/q"] + line["loss/v"] + 0.03 * line["loss/cql"] + line["loss/awac"]
        assert line["loss/total"] == pytest.approx(parts) and line["loss/cql"] >= 0
    samples = lines(finished, "samples.jsonl")
    assert len(samples) == 3 * 2 * 6 and set(samples[0]) == {"step", "beta", "query", "response", "score"}
    assert {row["query"] for row in samples} == {"x", "yy", "zzz"}
    for line in metrics[1::2]:
        for beta in (0, 2):
            rows = [row for row in samples if (row["step"], row["beta"]) == (line["step"], beta)]
            assert line[f"eval/score@beta={beta}"] == pytest.approx(
                sum(row["response"].count("a") for row in rows) / 36
            )


def test_the_logged_loss_of_several_steps_is_the_mean_over_their_actions(settings, tmp_path):
    flags = settings("", lr=0.0, alpha=1.0, reward_fn=None)
    each = lines(run(flags | {"output_dir": str(tmp_path / "each")}))
    whole = lines(run(flags | {"output_dir": str(tmp_path / "whole"), "batch_size": 12, "micro_batch_size": 5}))
    joined = lines(run(flags | {"output_dir": str(tmp_path / "joined"), "log_every": 3}))
    assert len(each) == 3 and len(whole) == len(joined) == 1
    for name in KEYS - {"step", "optim/grad_norm", "lr"}:
        assert joined[0][name] == pytest.approx(whole[0][name], rel=1e-5), name


def test_the_saved_folder_opens_anywhere_and_comes_back_whole(finished):
    model, info = AutoModelForCausalLM.from_pretrained(finished / "model", output_loading_info=True)
    assert not any(info.values()), info
    ilql, trained = ilql_rlhf.load_ilql(str(finished / "model")), state(finished, 6)["model"]
    assert ilql.state_dict().keys() == trained.keys()
    assert all(torch.equal(x, trained[name]) for name, x in ilql.state_dict().items())
    ids = torch.tensor([[5, 6, 7, 8]])
    model.set_attn_implementation(ilql.policy.config._attn_implementation)  # the same weights and the same kernels
    assert torch.equal(model.eval()(ids).logits, ilql.policy(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "|")
    record = json.loads((finished / "args.json").read_text())
    assert record["args"]["tau"] == 0.8 and {"argv", "commit", "versions"} <= record.keys()


def interrupted(finished, folder, step):
    """A copy of a run as it is after a kill behind `step`: later lines and half a line are there, the model is not."""
    shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("model"))
    for path in (folder / "checkpoints").iterdir():
        if int(path.stem.removeprefix("step_")) > step:
            path.rename(f"{path}.tmp")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "loss/q"')
    return folder


@pytest.mark.parametrize("step", [1, 4])
def test_a_resumed_run_ends_in_the_same_bits(finished, tmp_path, step):
    folder = interrupted(finished, tmp_path / "run", step)
    ilql_rlhf.main(ilql_rlhf.Args(resume=str(folder)))
    assert lines(folder) == lines(finished)
    assert lines(folder, "samples.jsonl") == lines(finished, "samples.jsonl")
    assert same(weights(folder), weights(finished))
    ours, theirs = state(folder, 6), state(finished, 6)
    assert same(ours["model"], theirs["model"]) and same(ours["optimizer"]["state"], theirs["optimizer"]["state"])


def test_the_same_seed_gives_the_same_run_and_another_seed_another(settings, finished, tmp_path):
    again = run(settings(tmp_path / "again", num_epochs=2, eval_every=2))
    assert lines(again) == lines(finished) and same(weights(again), weights(finished))
    other = run(settings(tmp_path / "other", num_epochs=2, eval_every=2, seed=2))
    assert lines(other)[0] != lines(finished)[0]


def test_one_q_head_and_normalised_rewards(settings, tmp_path):
    folder = run(settings(tmp_path / "run", num_qs=1, normalize_rewards=True))
    ilql = ilql_rlhf.load_ilql(str(folder / "model"))
    rewards = torch.tensor([text.count("a") / 4 - 0.3 for text in COMPLETIONS], dtype=torch.float64)
    assert len(ilql.heads["q"]) == len(ilql.heads["target_q"]) == 1
    expected = {"reward_mean": rewards.mean().item(), "reward_std": rewards.std(correction=0).item()}
    assert ilql.config == pytest.approx({"num_qs": 1, "q_rows": "ids", **expected})


@pytest.mark.parametrize("weights_of", [{"cql_weight": 0.1}, {"cql_weight": 0.0, "policy_lr_scale": 0.0}])
def test_embedding_rows_in_a_run(settings, tmp_path, weights_of):
    """They are trained, saved, loaded again and steer, and resuming finds them as they were."""
    flags = {"q_rows": "embeddings", "eval_betas": (0.0, 2.0), "save_every": 1, **weights_of}
    folder = run(settings(tmp_path / "run", **flags))
    ilql = ilql_rlhf.load_ilql(str(folder / "model"))
    head, (mean, deviation) = ilql.heads["target_q"][0], ilql.heads.moments
    assert head[2].weight.any() and head[3].out_features == ilql.policy.config.vocab_size
    assert mean.any() and (deviation > 0).all() and (deviation != 1).any()
    assert ilql.config["q_rows"] == "embeddings" and math.isfinite(lines(folder)[-1]["eval/score@beta=2"])
    again = interrupted(folder, tmp_path / "again", 1)
    ilql_rlhf.main(ilql_rlhf.Args(resume=str(again)))
    assert same(state(again, 3)["model"], state(folder, 3)["model"])


def test_a_reward_model_scores_the_samples(settings, tmp_path, llama_rm_folder):
    from transformers import AutoModelForSequenceClassification

    folder = run(settings(tmp_path / "run", reward_fn=None, reward_model=llama_rm_folder))
    judge = AutoModelForSequenceClassification.from_pretrained(llama_rm_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(llama_rm_folder)
    for row in lines(folder, "samples.jsonl"):
        ids = tokenizer(row["query"] + row["response"]).input_ids
        ids += [tokenizer.eos_token_id] * (len(row["response"]) < 5)
        assert row["score"] == pytest.approx(judge(torch.tensor([ids])).logits.item() - 0.75, abs=1e-4)


def test_steering_learns_the_better_letter(tmp_path, gpt2_folder, settings):
    """a is worth 1, b nothing: pi_beta says both, the steered policy says a."""
    rows = [{"prompt": "x", "completion": text, "reward": float(text == "a")} for text in ("a", "b", "b", "b")]
    flags = settings(
        tmp_path / "run", dataset=write_jsonl(tmp_path / "rows.jsonl", rows), lr=5e-3, num_epochs=60, beta=0.0
    )
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "x"}])
    flags |= {"eval_dataset": prompts, "eval_samples": 60, "eval_betas": (0.0, 50.0), "eval_every": 1000}
    last = lines(run(flags))[-1]
    assert last["eval/score@beta=50"] > 0.95 / 6 > 0.5 / 6 > last["eval/score@beta=0"]


def test_bf16(settings, tmp_path):
    folder = run(settings(tmp_path / "run", precision="bf16"))
    assert AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto").dtype == torch.float32


def test_bf16_of_rotary_positions(settings, tmp_path, llama_folder):
    """Under autocast rotary keys would be fp32 and values bf16: decoding runs outside of it."""
    run(settings(tmp_path / "run", model=llama_folder, precision="bf16"))
    assert math.isfinite(lines(tmp_path / "run")[-1]["eval/score@beta=2"])


@pytest.mark.parametrize(
    ("config", "model", "sizes"),
    [
        (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 4.0, "initializer_range": 0.5}),
        (Gemma2Config, Gemma2ForCausalLM, {"num_key_value_heads": 1, "head_dim": 8}),  # logits too small to show a cap
    ],
)
def test_a_model_that_scales_or_caps_its_logits_is_refused(config, model, sizes, settings, tmp_path, llama_folder):
    """What is trained here is the LM head's own output; a Granite divides it before it is used, a Gemma 2 caps it."""
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    sizes = sizes | {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model(config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(utils.UserError, match="other: it scales or caps its logits"):
        run(settings(tmp_path / "run", model=str(tmp_path / "other")))
    assert not (tmp_path / "run").exists()


def test_linear_attention_is_refused(settings, tmp_path, gpt2_folder):
    """Such a layer reads the whole prefill mask: behind the prompt it would meet the empty slots of a static cache."""
    config = MambaConfig(vocab_size=31, hidden_size=16, state_size=4, num_hidden_layers=1)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    AutoTokenizer.from_pretrained(gpt2_folder).save_pretrained(tmp_path / "mamba")
    with pytest.raises(utils.UserError, match="mamba: .*linearly"):
        run(settings(tmp_path / "run", model=str(tmp_path / "mamba")))


def test_attention_by_an_index_is_refused(settings, tmp_path, gpt2_folder):
    """The keys that such a layer chooses by are no part of the plain cache that the prefill fills."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 2, "num_experts_per_tok": 1}
    sizes |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8}
    sizes |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "index_n_heads": 2}
    sizes |= {"index_head_dim": 8, "index_topk": 4}
    AutoConfig.for_model("deepseek_v32", vocab_size=31, **sizes).save_pretrained(tmp_path / "indexed")
    AutoTokenizer.from_pretrained(gpt2_folder).save_pretrained(tmp_path / "indexed")
    with pytest.raises(utils.UserError, match="indexed: .*by index"):
        run(settings(tmp_path / "run", model=str(tmp_path / "indexed")))


def test_positions_behind_which_longrope_turns_otherwise_are_refused(settings, tmp_path, gpt2_folder):
    """Keys in a cache were turned by the frequencies in front of that limit; a longer row turns those beside it, too."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4}
    for limit in (5, 64):
        rope["original_max_position_embeddings"] = limit
        config = LlamaConfig(vocab_size=31, max_position_embeddings=65, rope_parameters=rope, **sizes)
        config.save_pretrained(tmp_path / str(limit))
        AutoTokenizer.from_pretrained(gpt2_folder).save_pretrained(tmp_path / str(limit))
    with pytest.raises(utils.UserError, match="--max_length: .* tokens are more than the positions of"):
        run(settings(tmp_path / "run", model=str(tmp_path / "5")))
    run(settings(tmp_path / "run", model=str(tmp_path / "64")))


@pytest.mark.parametrize("seed", [2, 3])
def test_drawn_prompts_may_all_be_shorter_than_the_longest(seed, settings, tmp_path, tokenizer):
    """A Bloom adds its position bias to the key mask, which so must be as wide as the cache, made for the longest prompt."""
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    model = BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=2, n_head=2, **ids))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "bloom")
    folder = run(settings(tmp_path / "run", model=str(tmp_path / "bloom"), eval_samples=1, seed=seed))
    assert max(len(row["query"]) for row in lines(folder, "samples.jsonl")) < 3  # the longest was not drawn


def test_a_gradient_that_is_not_finite_ends_the_run_in_one_line(settings, tmp_path):
    rows = [{"prompt": "x", "completion": "ab", "reward": 1e30}] * 4
    flags = settings(tmp_path / "run", dataset=write_jsonl(tmp_path / "huge.jsonl", rows))
    with pytest.raises(utils.UserError, match="step 1: the gradient is not finite"):
        run(flags | {"eval_dataset": str(settings.folder / "prompts.jsonl"), "max_grad_norm": 0.0})


def test_a_weight_of_cloning_that_overflows_does_not_reach_the_loss_of_a_frozen_policy(settings, tmp_path):
    run(settings(tmp_path / "run", policy_lr_scale=0.0, beta=1e30, log_every=1))
    totals = [line["loss/total"] for line in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert len(totals) > 1 and all(map(math.isfinite, totals))


def test_flags_that_contradict_one_another(settings, tmp_path, llama_rm_folder):
    for changes in ({"eval_betas": ()}, {"reward_model": llama_rm_folder}):
        with pytest.raises(utils.UserError, match="--eval_betas"):
            run(settings(tmp_path / "run", **changes))


def test_resuming_with_the_run_s_own_betas(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    betas = tuple(json.loads((finished / "args.json").read_text())["args"]["eval_betas"])
    args = utils.prepare(ilql_rlhf.Args(resume=str(tmp_path / "run"), eval_betas=betas))
    assert args.eval_betas == betas
    with pytest.raises(utils.UserError, match="--eval_betas differs"):
        utils.prepare(ilql_rlhf.Args(resume=str(tmp_path / "run"), eval_betas=(9.0,)))


def test_compiled_is_eager(settings, tmp_path):
    """The forward, the loss and the decoding step (about half a minute when cold)."""
    eager = lines(run(settings(tmp_path / "eager")))
    compiled = lines(run(settings(tmp_path / "compiled", compile=True)))
    for line, other in zip(eager, compiled, strict=True):
        assert other == pytest.approx(line, rel=1e-3, abs=1e-4)
    saved = [load_file(tmp_path / name / "model" / "ilql_heads.safetensors") for name in ("eager", "compiled")]
    assert saved[0].keys() == saved[1].keys()


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


def data(*rows):
    return lambda tmp_path: {"dataset": write_jsonl(tmp_path / "bad.jsonl", rows)}


GOOD = {"prompt": "a", "completion": "b", "reward": 1.0}
MISTAKES = {
    "no data set": (lambda tmp_path: {"dataset": str(tmp_path / "nowhere.jsonl")}, "nowhere.jsonl"),
    "no model": (lambda tmp_path: {"model": str(tmp_path / "nowhere")}, "nowhere"),
    "no column": (data({"prompt": "a", "answer": "b"}), r"bad.jsonl.*prompt\+completion.*prompt, answer"),
    "no reward": (data({"prompt": "a", "completion": "b"}), "bad.jsonl: needs the column reward; it has prompt, comp"),
    "a reward is missing": (data(GOOD, GOOD | {"reward": None}), "bad.jsonl: row 2: reward is None"),
    "no template": (data({"messages": turns("a", "b"), "reward": 1.0}), "bad.jsonl: row 1: .*template"),
    "all too long": (lambda tmp_path: {"max_length": 2, "response_length": 1}, "no row is left; see --max_length"),
    "tau": (lambda tmp_path: {"tau": 0.0}, "--tau 0.0: must be above 0"),
    "gamma": (lambda tmp_path: {"gamma": 1.5}, "--gamma 1.5"),
    "alpha": (lambda tmp_path: {"alpha": -0.1}, "--alpha -0.1"),
    "ascent": (lambda tmp_path: {"min_lr": -1e-3}, "--min_lr -0.001: must be at least 0"),
    "weights of no loss": (lambda tmp_path: {"cql_weight": -1.0}, "--cql_weight -1.0: must be at least 0"),
    "batch size zero": (lambda tmp_path: {"batch_size": 0}, "--batch_size"),
    "no such function": (lambda tmp_path: {"reward_fn": "nowhere.py:f"}, "--reward_fn nowhere.py:f: no such file"),
    "no prompts": (lambda tmp_path: {"eval_dataset": str(tmp_path / "none.jsonl")}, "none.jsonl: no such file"),
    "samples that nobody scores": (lambda tmp_path: {"reward_fn": None, "eval_dataset": "p.jsonl"}, "--eval_dataset: "),
    "an empty prompt": (
        lambda tmp_path: {"eval_dataset": write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": ""}])},
        "p.jsonl: row 2: the prompt is empty",
    ),
    "a prompt that needs a template": (
        lambda tmp_path: {"eval_dataset": write_jsonl(tmp_path / "p.jsonl", [{"prompt": turns("a")}])},
        "p.jsonl: row 1: .*chat template",
    ),
    "a run folder": (lambda tmp_path: {"output_dir": str(tmp_path)}, "--output_dir .*exists already"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_and_writes_nothing(mistake, settings, tmp_path, capsys, monkeypatch):
    change, match = MISTAKES[mistake]
    monkeypatch.setattr(ilql_rlhf, "load_pretrained", None)  # found out before a model is loaded
    refuses(capsys, "ilql_rlhf", settings(tmp_path / "run") | change(tmp_path), match)


def test_mistakes_that_need_the_model(settings, tmp_path, capsys, monkeypatch):
    flags = settings(tmp_path / "run", response_length=64)
    refuses(capsys, "ilql_rlhf", flags, r"--max_length: \d+ or 1 \+ 64 tokens are more than the positions")
    monkeypatch.setattr(ilql_rlhf, "init_ranks", lambda: utils.Ranks(0, 2, CPU))
    refuses(capsys, "ilql_rlhf", settings(tmp_path / "run", batch_size=3), "--batch_size")
    refuses(capsys, "ilql_rlhf", settings(tmp_path / "run", eval_samples=3), "--eval_samples")


@pytest.mark.parametrize("name", ["too_few", "not_a_number", "nothing", "no_return", "one_number"])
def test_a_reward_function_that_answers_nonsense(name, settings, tmp_path):
    flags = settings(tmp_path / "run", reward_fn=f"{settings.folder / 'rewards.py'}:{name}")
    with pytest.raises(utils.UserError, match=f"{name}: not a finite number for each response"):
        run(flags)


def test_the_script_runs_from_the_command_line(run_script, settings, tmp_path):
    words = []
    for name, value in settings(tmp_path / "run").items():
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    done = run_script("ilql_rlhf.py", words)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("args.json", "metrics.jsonl", "samples.jsonl", "checkpoints", "model")
    }
    assert lines(tmp_path / "run") == lines(run(settings(tmp_path / "here")))  # and exactly as in this process
