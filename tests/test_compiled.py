"""Whole runs with --compile against the same runs without: metrics equal, plain keys saved. Minutes when cold."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "benchmarks")]

import ppo_rlhf
import reward_model
import sft
import shapes
from conftest import build_folder, write_jsonl
from turns import CompileWatch
from utils import init_ranks, load_pretrained

LETTERS = "abcdefghijklmnop"
TEXTS = [
    (LETTERS[i % 5 : i % 5 + 2], LETTERS[i % 7 : i % 7 + 1 + i % 6], LETTERS[i % 3 : i % 3 + 3]) for i in range(24)
]
CLOCKS = ("time/", "eps")


@pytest.fixture(autouse=True)
def fresh():
    """No graph of another test: the compiled decoding step does not look whether the modules are still the same."""
    torch.compiler.reset()


@pytest.fixture
def runs(tmp_path, tokenizer):
    """{script: (module, flags)} of three short runs whose batches have unequal lengths. One layer: more take longer to
    compile, and say little more."""
    policy = build_folder(tmp_path / "gpt2", "gpt2", "lm", tokenizer, seed=1, n_layer=1)
    scorer = build_folder(tmp_path / "llama_rm", "llama", "rm", tokenizer, seed=4, num_labels=1, num_hidden_layers=1)
    rows = [{"prompt": a, "completion": b, "chosen": b, "rejected": c} for a, b, c in TEXTS]
    sizes = {"dataset": write_jsonl(tmp_path / "rows.jsonl", rows), "batch_size": 8, "micro_batch_size": 4}
    ppo = {"model": policy, "reward_model": scorer, "num_epochs": 2, "num_minibatches": 2, "stop_token": "abcdefghij"}
    return {
        "sft": (sft, {"model": policy, "num_epochs": 1, "log_every": 1, **sizes}),
        "reward_model": (reward_model, {"model": scorer, "num_epochs": 1, "log_every": 1, **sizes}),
        "ppo_rlhf": (ppo_rlhf, {"total_episodes": 24, "response_length": 20, **ppo, **sizes}),
    }


def length_reward(folder):
    """--reward_fn of a function that scores the letters of a response."""
    code = "def length(prompts, responses, **columns):\n    return [len(x) for x in responses]\n"
    Path(folder, "length.py").write_text(code)
    return f"{folder}/length.py:length"


@pytest.mark.parametrize("script", ["sft", "reward_model", "ppo_rlhf"])
def test_compiled_is_eager(script, runs, gpt2_folder, llama_rm_folder, tmp_path):
    module, flags = runs[script]
    if script == "ppo_rlhf":  # two layers share a graph, and must not share weights
        flags |= {"model": gpt2_folder, "reward_model": llama_rm_folder}
    metrics, weights = [], []
    for compiled in (False, True):
        folder = tmp_path / f"compiled_{compiled}"
        module.main(module.Args(**flags, compile=compiled, output_dir=str(folder)))
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        metrics.append([{key: line[key] for key in line if not key.startswith(CLOCKS)} for line in lines])
        weights.append(load_file(folder / "model" / "model.safetensors"))
    eager, compiled = metrics
    assert len(eager) == len(compiled) == 3
    for line, other in zip(eager, compiled, strict=True):
        assert other == pytest.approx(line, rel=1e-3, abs=1e-4)
    assert weights[0].keys() == weights[1].keys()


def test_compiled_in_bf16_and_resumed(runs, tmp_path):
    """Graphs with and without gradient, of batches cut to other lengths, round differently, but a ratio is still about 1 and
    the first KL about 0; a run that is resumed, and compiled anew, ends as one that was never stopped."""
    flags = {key: value for key, value in runs["ppo_rlhf"][1].items() if key != "reward_model"}
    flags |= {"value_trunk": "shared", "reward_fn": length_reward(tmp_path), "precision": "bf16", "save_every": 2}
    flags |= {"num_epochs": 1, "lr": 1e-5}
    ppo_rlhf.main(ppo_rlhf.Args(**flags, compile=True, output_dir=str(tmp_path / "run")))
    shutil.copytree(tmp_path / "run", tmp_path / "resumed", ignore=shutil.ignore_patterns("model", "critic"))
    torch.compiler.reset()
    ppo_rlhf.main(ppo_rlhf.Args(resume=str(tmp_path / "resumed"), compile=True))
    whole, resumed = (Path(tmp_path, x, "metrics.jsonl").read_text().splitlines() for x in ("run", "resumed"))
    assert len(whole) == len(resumed) == 3
    lines, others = ([json.loads(line) for line in text] for text in (whole, resumed))
    assert {key: x for key, x in lines[2].items() if not key.startswith(CLOCKS)} == {
        key: x for key, x in others[2].items() if not key.startswith(CLOCKS)
    }
    for part in ("model", "critic"):
        a, b = (load_file(tmp_path / x / part / "model.safetensors") for x in ("run", "resumed"))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert abs(lines[0]["objective/kl"]) < 0.02
    for line in lines:
        assert line["val/ratio"] == pytest.approx(1, abs=1e-2) and line["policy/approxkl_avg"] < 1e-3


def test_two_compiled_ranks_are_one_that_is_not(runs, tmp_path, run_script):
    """One graph for all lengths under DDP; policy and critic of one trunk, the entropy in the loss."""
    flags = {key: value for key, value in runs["ppo_rlhf"][1].items() if key != "reward_model"}
    flags |= {"total_episodes": 16, "value_trunk": "shared", "entropy_coef": 0.1, "reward_fn": length_reward(tmp_path)}
    ppo_rlhf.main(ppo_rlhf.Args(**flags, compile=False, output_dir=str(tmp_path / "one")))
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    words += ["--compile", "--output_dir", tmp_path / "two"]
    done = run_script("ppo_rlhf.py", words, nproc=2, timeout=600, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    metrics = [Path(tmp_path, name, "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert len(metrics[0]) == len(metrics[1]) == 2
    for line, other in zip(*(map(json.loads, lines) for lines in metrics), strict=True):
        expected = {key: line[key] for key in line if not key.startswith(CLOCKS)}
        assert {key: other[key] for key in expected} == pytest.approx(expected, rel=1e-3, abs=1e-4)


CONFIGS = {"llama": shapes.llama(1, 16, 40, 4, 2, 64, tied=True), "opt": shapes.opt(1, 16, 4, 16, True, vocabulary=64)}


def wide_weights(auto_class, config, folder):
    """A model as the scripts load it, with weights that are not small."""
    type(config).from_dict(config.to_dict() | {"num_labels": 1}).save_pretrained(folder)
    model, _ = load_pretrained(auto_class, str(folder))
    torch.manual_seed(len(str(auto_class)))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_compiled_logprobs_values_and_loss_are_eager(kind, runs, tokenizer, tmp_path, monkeypatch):
    """Two lengths of rows that are padded on both sides, by the very module that main has compiled."""
    for auto_class, name in ((AutoModelForCausalLM, "policy"), (AutoModelForSequenceClassification, "critic")):
        wide_weights(auto_class, CONFIGS[kind], tmp_path / name).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    kept, wrap = [], ppo_rlhf.wrap
    monkeypatch.setattr(ppo_rlhf, "wrap", lambda module, ranks: kept.append(module) or wrap(module, ranks))
    flags = runs["ppo_rlhf"][1] | {"model": str(tmp_path / "policy"), "reward_model": str(tmp_path / "critic")}
    flags |= {"total_episodes": 8, "num_epochs": 1, "entropy_coef": 0.1, "temperature": 0.7}
    args = ppo_rlhf.Args(**flags, compile=True, output_dir=str(tmp_path / "run"))
    ppo_rlhf.main(args)
    [model], watch = kept, CompileWatch()
    bias = ppo_rlhf.logit_bias(model.policy, tokenizer)
    parameters = [x for x in model.parameters() if x.requires_grad]
    for B, P, R in ((5, 6, 16), (4, 6, 8)):
        generator = torch.Generator().manual_seed(R)
        ids = torch.randint(2, 31, (B, P + R), generator=generator)
        mask = (torch.arange(P + R) >= torch.arange(B)[:, None]) & (
            torch.arange(P + R) < P + R - torch.arange(B)[:, None]
        )
        answers, losses, grads = [], [], []
        for stance in ("force_eager", "fail_on_recompile"):
            with torch.compiler.set_stance(stance):
                outputs = model(ids, mask, R, 0.7, bias)
            old = [x.detach() + 0.1 for x in (outputs[0], outputs[2])]
            advantages, returns = torch.randn(2, B, R, generator=generator.manual_seed(1))
            loss, _ = ppo_rlhf.ppo_loss(*outputs, *old, advantages, returns, mask[:, P:], args)
            answers.append([torch.where(mask[:, P:], x, 0) for x in outputs])
            losses.append(loss / mask[:, P:].sum())
            grads.append(torch.autograd.grad(losses[-1], parameters, allow_unused=True))
        for ours, theirs in zip(*answers, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        assert not torch.equal(answers[0][0], answers[1][0])  # two computations, not one twice
        assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-4)
        for ours, theirs in zip(*grads, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert watch.count == 0


def test_compiled_tokens_are_eager_but_for_near_ties(tmp_path, capsys):
    """12,288 tokens of 8192 ids by the same uniforms: where a row first parts, its uniform lies on the border of two ids
    but for rounding."""
    ranks, (B, P, R) = init_ranks(), (256, 4, 48)
    policy = wide_weights(AutoModelForCausalLM, shapes.gpt2(1, 24, 8192), tmp_path).to(ranks.device)
    generator, parted = torch.Generator().manual_seed(0), 0
    queries = torch.randint(2, 8192, (B, P), generator=generator).to(ranks.device)
    uniforms, mask = torch.rand(B, R, generator=generator).to(ranks.device), torch.ones_like(queries, dtype=torch.bool)
    step = torch.compile(ppo_rlhf.decode_step, fullgraph=True, dynamic=True)
    first, second = (
        ppo_rlhf.generate(policy, queries, mask, uniforms, 0.7, [8192], 0, step=step)
        for step in (ppo_rlhf.decode_step, step)
    )
    with torch.no_grad():
        for row in (first != second).any(1).nonzero().squeeze(1).tolist():
            t = (first[row] != second[row]).nonzero()[0].item()
            logits = policy(torch.cat([queries[row], first[row, :t]])[None]).logits[0, -1]
            borders = torch.softmax(logits.double() / 0.7, -1).cumsum(-1)
            assert (borders - uniforms[row, t]).abs().min() < 1e-6
            parted += 1
    with capsys.disabled():
        print(f" {parted} of {B} rows of {R} tokens part at a near-tie", end="")
    assert parted < 26


def test_lengths_that_change_late_compile_nothing(runs, tmp_path, monkeypatch):
    """Two updates of full responses, then rows that end early: they leave the batch, and micro-batches are cut. There are
    as many rows as positions, which means nothing."""
    watch, generate, progress = CompileWatch(), ppo_rlhf.generate, ppo_rlhf.progress
    counts, lengths, decoded = [], [], []

    def ending(model, queries, query_mask, uniforms, temperature, stop_ids, pad_id, **sampling):
        """Every second id from the seventh on ends a late response; an EOS stands where one is to end, and nowhere else."""
        late, R = len(counts) > 2, uniforms.shape[1]
        step = sampling["step"]

        def counting(*inputs):
            decoded.append(len(inputs[2]))
            return step(*inputs)

        sampling["step"] = counting
        sampling["min_length"], ends = 0 if late else R, torch.arange(6, len(sampling["bias"]), 2) if late else stop_ids
        responses = generate(model, queries, query_mask, uniforms, temperature, ends, pad_id, **sampling)
        responses[responses == stop_ids[0]] = 7
        last = (responses != pad_id).sum(1).clamp(max=R) - 1
        responses[torch.arange(len(responses)), last] = stop_ids[0]
        lengths.append(last + 1)
        return responses

    def watched(*arguments):
        for update in progress(*arguments):
            counts.append(watch.count)
            yield update
        counts.append(watch.count)

    monkeypatch.setattr(ppo_rlhf, "generate", ending)
    monkeypatch.setattr(ppo_rlhf, "progress", watched)
    sizes = {"total_episodes": 96, "batch_size": 24, "micro_batch_size": 24, "response_length": 22}
    flags = {key: runs["ppo_rlhf"][1][key] for key in ("model", "reward_model", "dataset")} | sizes
    flags |= {"compile": True, "output_dir": str(tmp_path / "run")}
    ppo_rlhf.main(ppo_rlhf.Args(**flags))
    assert min(lengths[0].min(), lengths[1].min()) == 22 and max(x.max() for x in lengths[2:]) <= 16
    assert decoded[:44] == [24] * 44 and min(decoded) < 24
    assert counts[1] > 0 and counts[2:] == [counts[2]] * 3
