"""benchmarks/speed.py: counts against counts by hand, ratios against arithmetic, models that end when they should, and
the whole command on tiny shapes without the peers. No speed is asserted."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import ppo_rlhf
import reward_model
import sft
import utils
from conftest import write_jsonl
from utils import UserError, launch, load_rows

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import contender as processes
import floors
import memory
import scaling
import shapes
import speed

TINY = {
    "gpt2": shapes.gpt2(2, 24, 32),
    "llama": shapes.llama(2, 16, 40, 4, 2, 32, tied=False),
    "llama-tied": shapes.llama(2, 16, 40, 4, 2, 32, tied=True),
    "opt": shapes.opt(2, 16, 4, 16, norm_before=True, vocabulary=32),
    "opt-projected": shapes.opt(2, 16, 4, 8, norm_before=False, vocabulary=32),
}


# ----------------------------------------------------------------------------------------------------------------------
# Floors


def test_linear_layers_by_hand():
    gpt2 = floors.model_shape(TINY["gpt2"])
    assert gpt2 == ([(24, 72), (24, 24), (24, 96), (96, 24)] * 2, (24, 32), 2, 24, 24, [(24, 96), (96, 24)])
    llama = floors.model_shape(TINY["llama"])
    attention, mlp = [(16, 16), (16, 8), (16, 8), (16, 16)], [(16, 40), (16, 40), (40, 16)]
    assert sorted(llama.body) == sorted((attention + mlp) * 2)
    assert llama[1:] == ((16, 32), 2, 16, 8, mlp)
    projected = floors.model_shape(TINY["opt-projected"])
    assert {(8, 16), (16, 8)} <= set(projected.body) and projected.head == (8, 32) and projected.last_mlp == []


def test_the_update_of_the_large_gpt2_by_hand():
    model = floors.model_shape(shapes.gpt2(4, 256, 8192))
    work = floors.phases(model, model, "ppo", 64, 16, 48, epochs=4)
    body, head = 4 * 12 * 256**2, 256 * 8192
    pairs = sum(position + 1 for position in range(64)) * 64
    attention = 4 * 2 * 2 * 256 * pairs  # layers; queries by keys and probabilities by values; multiply and add
    forward = 2 * (2 * 64 * 64 * body) + 2 * 64 * 48 * head + 2 * attention
    assert floors.phase_flops(work["update"]) == 3 * 4 * forward
    assert floors.phase_flops(work["update"]) == pytest.approx(784e9, rel=0.01)
    assert floors.phase_flops(work["score"]) == 2 * forward
    prompt_pairs = 64 * sum(position + 1 for position in range(63))
    rollout = 2 * 64 * (16 + 47) * body + 2 * 64 * 48 * head + 4 * 4 * 256 * prompt_pairs
    assert floors.phase_flops(work["rollout"]) == rollout


def test_the_trainers_by_hand():
    model = floors.model_shape(TINY["gpt2"])
    body, head, pairs = 2 * 12 * 24**2, 24 * 32, 21
    update = floors.phases(model, model, "sft", 3, 2, 4)["update"]
    linear = 6 * 3 * (6 * (body - 8 * 24**2) + 4 * 8 * 24**2 + 4 * head)  # the last MLP at four tokens of six
    assert floors.phase_flops(update) == linear + 3 * 2 * 4 * 24 * 3 * pairs
    update = floors.phases(model, model, "reward_model", 3, 2, 4)["update"]
    linear = 6 * 6 * (6 * (body - 8 * 24**2) + 8 * 24**2)  # the last MLP at one token of six
    assert floors.phase_flops(update) == linear + 3 * 2 * 4 * 24 * 6 * pairs
    update = floors.phases(model, model, "ilql", 3, 2, 4)["update"]  # 5 tokens of a row are read, 4 have actions
    q, v = 24 * 48 + 48 * 32, 24 * 48 + 48
    heads = 6 * 3 * 4 * (head + 2 * q + v) + 2 * 3 * 4 * 2 * 24 * 48
    assert floors.phase_flops(update) == 6 * 3 * 5 * body + heads + 3 * 2 * 4 * 24 * 3 * 15


def test_attention_sees_the_keys_before_it():
    model = floors.Model([], (1, 1), layers=3, width=8, kv_width=4)
    pairs = sum(1 for query in range(5, 9) for key in range(9) if key <= query)
    assert floors.attention_flops(model, 2, 5, 9) == 2 * 4 * 8 * 3 * pairs
    assert floors.attention_flops(model, 2, 5, 9, times=2, backward=True) == 6 * floors.attention_flops(model, 2, 5, 9)


def test_bytes_of_decoding_by_hand():
    model, B, P, R = floors.model_shape(TINY["llama"]), 3, 4, 5
    weights = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 40) + 16 * 32
    moved = 0
    for slots in (5, 6, 7, 8):  # with the token's own, at each of R - 1 steps
        moved += weights + 2 * 2 * 8 * B * slots
    assert floors.decode_bytes(model, B, P, R, size=2) == 2 * moved


def test_a_floor_is_measured_for_each_phase_and_charges_attention():
    model = floors.model_shape(TINY["gpt2"])
    work = floors.phases(model, model, "ppo", 2, 3, 4, epochs=2)
    for dtype in (torch.float32, torch.bfloat16):
        seconds = floors.cpu_floor(work, dtype)()
        assert set(seconds) == {"rollout", "score", "update"} and min(seconds.values()) > 0


def test_the_floor_of_a_gpu_from_its_two_speeds():
    model = floors.model_shape(TINY["gpt2"])
    work = floors.phases(model, model, "ppo", 2, 3, 4)
    seconds = floors.gpu_seconds(work, 600, 5000, flops_per_second=1000, bytes_per_second=100)
    assert seconds["rollout"] == 5 + 6
    assert seconds["update"] == floors.phase_flops(work["update"]) / 1000


# ----------------------------------------------------------------------------------------------------------------------
# Models and data


@pytest.mark.parametrize("kind", [kind for kind in TINY if kind != "opt-projected"])
@pytest.mark.parametrize("wanted", [0.0, 0.25])
def test_a_response_ends_with_the_probability_wanted(tmp_path, kind, wanted):
    tokenizer = shapes.build_tokenizer(32)
    folder = shapes.build_model(AutoModelForCausalLM, TINY[kind], tmp_path / kind, tokenizer, 1, wanted)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(2, 32, (16, 20), generator=torch.Generator().manual_seed(3))
    probabilities = torch.softmax(model(ids).logits, -1)
    ends = probabilities[..., shapes.EOS]
    assert ends.max() < 1e-4 if wanted == 0 else 0.15 < ends.min() and ends.max() < 0.4
    assert probabilities[..., shapes.PAD].max() < 1e-4
    assert probabilities[..., 2:].min() > 1e-4


@pytest.mark.parametrize(
    ("name", "millions"),
    [("gpt2-124m", 124.4), ("smollm2-135m", 134.5), ("llama-1b", 1100.0), ("opt-1.3b", 1315.8)],
)
def test_presets_have_the_published_sizes(name, millions):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shapes.preset(name).policy)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.001)


def test_every_text_has_the_length_asked_for(tmp_path):
    shape = shapes.sized(shapes.preset("gpt2-1x24-v40"), speed.Args(batch_size=3, prompt_length=5, response_length=8))
    world = shapes.build_world(shape, tmp_path, speed.PARTS, ("full", "geometric"), 2)
    tokenizer = AutoTokenizer.from_pretrained(world["policy"])
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (shapes.PAD, shapes.EOS)
    prompts = load_rows(world["prompts"], [("prompt",)])
    assert {len(tokenizer(row["prompt"]).input_ids) for row in prompts} == {5}
    rows = load_rows(world["completions"], [("prompt", "completion")])
    encoded = sft.encode_demonstrations(rows, tokenizer, 13, "rows")
    assert len(encoded) == 6 and {len(ids) for ids, _ in encoded} == {13}
    assert {sum(label != -100 for label in labels) for _, labels in encoded} == {8}
    pairs = load_rows(world["comparisons"], [("chosen", "rejected")])
    encoded = reward_model.encode_comparisons(pairs, tokenizer, reward_model.Args(), "pairs")
    assert len(encoded) == 6 and {len(ids) for pair in encoded for ids in pair[:2]} == {13}
    assert AutoConfig.from_pretrained(world["policy_geometric"]).vocab_size == 40
    critic = AutoModelForSequenceClassification.from_pretrained(world["critic"], num_labels=1)
    assert critic.score.weight.shape == (1, 24)


# ----------------------------------------------------------------------------------------------------------------------
# Ratios and tables


def contender(name, walls, engine="compiled", **turn):
    job = {"part": "ppo", "engine": engine, "dtype": name.split()[-1]}
    turns = [{"wall": wall, "memory_mib": 10.0, "threads": 2, "compiles": 3, **turn} for wall in walls]
    ranks = 2 if name.startswith("two ranks") else 1
    warm = [{"compiles": 3, "compile_seconds": 7.0}]
    return speed.Contender(name, job, [], ranks, setup_seconds=[9.0], warm=warm, turns=turns)


def test_ratios_are_medians_over_rounds_and_know_their_floor():
    theirs = contender("trl fp32", [8.0, 20.0, 9.0], "peer", rollout=1.0)
    ours = contender("ours compiled fp32", [4.0, 5.0, 3.0], rollout=1.0, score=1.0, update=2.0)
    floor = contender("floor fp32", [9.0, 9.0, 9.0], "floor", rollout=0.5, score=0.5, update=1.6)
    ratios, over_floor = speed.compare([theirs, ours, floor], 1)
    assert ratios == [{"name": ours.name, "over": theirs.name, "ratio": {"median": 3.0, "low": 2.0, "high": 4.0}}]
    assert over_floor[ours.name]["update"]["median"] == pytest.approx(1.25)
    assert over_floor[theirs.name] == {"rollout": {"median": 2.0, "low": 2.0, "high": 2.0}}
    summary = speed.summarise(ours, 1, "updates")
    assert summary["phases_over_wall"] == {"median": 1.0, "low": 0.8, "high": pytest.approx(4 / 3)}
    assert (summary["recompiles"], summary["compile_seconds"], summary["memory_mib"]) == (0, 7.0, 10.0)


def test_a_ratio_of_decoding_is_per_token():
    theirs, ours = (
        contender("generate fp32", [2.0], "generate", tokens=10),
        contender("ours eager fp32", [1.0], tokens=20),
    )
    assert speed.compare([theirs, ours], None)[0][0]["ratio"]["median"] == pytest.approx(4)


def test_two_ranks_are_held_against_one_process_of_their_kind():
    names = [f"{who} {engine} fp32" for engine in ("eager", "compiled") for who in ("one process", "two ranks")]
    ratios, _ = speed.compare([contender(name, [1.0 + i]) for i, name in enumerate(names)], 1)
    assert [(r["name"], r["over"], r["ratio"]["median"]) for r in ratios] == [
        (names[1], names[0], 0.5),
        (names[3], names[2], 0.75),
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (None, "-"),
        (1.2345, "1.23"),
        (12.345, "12.3"),
        (123.45, "123"),
        (12345.6, "12346"),
        (0.0123456, "0.0123"),
    ],
)
def test_numbers_have_three_digits(value, text):
    assert speed.number(value) == text


def test_the_table_points_out_phases_that_do_not_sum_to_the_wall():
    """A single turn is enough, and a peer's counts as well."""
    group = {"part": "ppo", "preset": "p", "lengths": "full", "batch": 1, "prompt": 2, "response": 3}
    for name, engine in (("ours compiled fp32", "compiled"), ("trl fp32", "peer")):
        turns = contender(name, [3.0, 4.0, 3.0], engine, rollout=1.0, score=1.0, update=1.0)
        group |= {"contenders": [speed.summarise(turns, 1, "updates")], "ratios": [], "over_floor": {}}
        assert f"{name}: its phases sum to 75.0 to 100% of the wall clock" in speed.table(group)


# ----------------------------------------------------------------------------------------------------------------------
# Turns and the whole command


def test_a_contender_works_only_when_told_to(tmp_path):
    code = "from turns import Turns\nturns, n = Turns(warmup=2, steps=3), 0\n"
    code += "while True:\n    n += 1\n    print('noise', n)\n    turns.step_done(n=n)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT / "benchmarks",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    warm = json.loads(process.stdout.readline())
    assert (warm["steps"], warm["n"]) == (0, 1 + 2)
    trace = str(tmp_path / "trace.json")
    for asked, total in ((None, 3 + 4 + 5), (trace, 6 + 7 + 8)):
        process.stdin.write(json.dumps({"trace": asked}) + "\n")
        process.stdin.flush()
        turn = json.loads(process.stdout.readline())
        assert (turn["steps"], turn["n"], turn["compiles"]) == (3, total, 0)
        assert turn["wall"] > 0 and turn["memory_mib"] > 1
    assert "traceEvents" in json.loads(Path(trace).read_text())
    assert process.communicate()[0] == "" and process.returncode == 0


SMALL = {"presets": ("gpt2-1x24-v32",), "batch_size": 2, "prompt_length": 3, "response_length": 8, "num_epochs": 1}
SMALL |= {"repeats": 2, "warmup": 1, "threads": 1, "dtypes": ("fp32",), "trainer_steps": 1, "decode_steps": 1}


def test_ppo_against_its_floor_and_the_file_it_writes(tmp_path, capsys):
    output, traces = tmp_path / "speed.json", tmp_path / "traces"
    options = SMALL | {"parts": ("ppo",), "engines": ("eager", "floor"), "output": str(output), "profile": str(traces)}
    speed.main(speed.Args(**options))
    record = json.loads(output.read_text())
    assert set(record) == {
        "args", "argv", "environment", "processor", "threads", "peers", "seconds", "comparisons",
    }  # fmt: skip
    assert {"commit", "dirty", "versions", "device"} <= set(record["environment"])
    (group,) = record["comparisons"]
    sizes = {"batch": 2, "micro_batch": 2, "prompt": 3, "response": 8, "epochs": 1}
    assert {"part": "ppo", "preset": "gpt2-1x24-v32", "lengths": "full", **sizes}.items() <= group.items()
    ours, floor = group["contenders"]
    assert (ours["name"], floor["name"]) == ("ours eager fp32", "floor fp32")
    for summary in (ours, floor):
        assert set(summary["phases"]) == {"rollout", "score", "update"} and len(summary["turns"]) == 2
        assert {"median", "low", "high"} == set(summary["wall"])
    assert ours["memory_mib"] > 1 and ours["recompiles"] == 0 and ours["threads"] == 1
    for turn in ours["turns"]:
        assert sum(turn[name] for name in ours["phases"]) <= turn["wall"]
    assert set(group["over_floor"]["ours eager fp32"]) == {"rollout", "score", "update"}
    assert len(list(traces.iterdir())) == 2
    assert "ours eager fp32 over its floor: rollout " in capsys.readouterr().out


def test_decoding_against_transformers_with_geometric_lengths(capsys):
    speed.main(speed.Args(**SMALL | {"parts": ("decode",), "lengths": ("geometric",), "engines": ("peer", "eager")}))
    assert "ours eager fp32 is " in capsys.readouterr().out


@pytest.mark.parametrize(("name", "engine"), [("gpt2-124m", "eager"), ("llama-1b", "eager"), ("opt-1.3b", "compiled")])
def test_the_shapes_for_a_gpu_run_in_small(name, engine, monkeypatch, capsys):
    """Their commands in docs/speed.md but for TRL, with the families, the pairs of policy and critic and the bf16 of the
    real ones, of one layer; compiled only OPT's decoding, for the rest takes minutes and is tested elsewhere."""
    small = {
        "gpt2-124m": [shapes.gpt2(1, 24, 32)] * 2,
        "llama-1b": [shapes.llama(1, 16, 40, 4, 2, 32, tied=False)] * 2,
        "opt-1.3b": [shapes.opt(1, 16, 4, 16, True, vocabulary=32), shapes.opt(1, 16, 4, 8, False, vocabulary=32)],
    }
    real, (policy, critic) = shapes.preset(name), small[name]
    assert (type(policy), type(critic)) == (type(real.policy), type(real.critic))
    monkeypatch.setattr(speed, "preset", lambda name: replace(real, policy=policy, critic=critic))
    options = SMALL | {"presets": (name,), "dtypes": ("bf16",), "repeats": 1, "micro_batch_size": 2}
    decode = {"parts": ("decode",), "lengths": ("full",), "engines": ("peer", engine, "floor")}
    speed.main(speed.Args(**options | decode))
    speed.main(speed.Args(**options | {"parts": ("ppo",), "engines": ("eager", "floor")}))
    out = capsys.readouterr().out
    assert f"ours {engine} bf16 is " in out and "x as fast as generate bf16 [" in out
    assert "ours eager bf16 over its floor: rollout " in out and ", update " in out
    assert out.count("tokens/s") == 2


def test_the_floor_on_a_gpu_is_taken_from_speeds_measured_in_each_turn(tmp_path, monkeypatch):
    folder = str(tmp_path / "model")
    TINY["gpt2"].save_pretrained(folder)
    monkeypatch.setattr(processes, "init_ranks", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    speeds = iter([1000.0, 100.0, 500.0, 100.0])
    monkeypatch.setattr(floors, "peak_flops", lambda dtype: next(speeds))
    monkeypatch.setattr(floors, "bandwidth", lambda: next(speeds))
    seen = []

    class Turns:
        def step_done(self, **seconds):
            seen.append(seconds)
            if len(seen) == 2:
                raise InterruptedError

    job = {"policy": folder, "critic": folder, "batch": 2, "prompt": 3, "response": 4, "epochs": 1}
    with pytest.raises(InterruptedError):
        processes.run_floor(job | {"part": "ppo", "dtype": "bf16"}, Turns())
    model = floors.model_shape(TINY["gpt2"])
    work = floors.phases(model, model, "ppo", 2, 3, 4)
    prefill = floors.product_flops(work["rollout"][0][0]) / 1000
    assert seen[0]["rollout"] == pytest.approx(prefill + floors.decode_bytes(model, 2, 3, 4, 2) / 100)
    assert seen[0]["update"] == pytest.approx(floors.phase_flops(work["update"]) / 1000)
    assert seen[1]["update"] == pytest.approx(2 * seen[0]["update"])


def test_the_trainers_run_anew_in_each_round_and_on_two_ranks(capsys):
    parts = {"parts": ("sft", "reward_model", "ilql", "ranks"), "engines": ("eager",), "repeats": 1, "fresh": True}
    speed.main(speed.Args(**SMALL | parts))
    out = capsys.readouterr().out
    assert "tokens/s" in out and "pairs/s" in out and "rows/s" in out and "two ranks eager fp32 is " in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"presets": ("gpt3",)}, "--presets gpt3: unknown"),
        ({"presets": ("gpt2-4x0-v99",)}, "--presets gpt2-4x0-v99: unknown"),
        ({"batch_size": 6, "micro_batch_size": 4}, "--batch_size by --micro_batch_size"),
        ({"repeats": 0}, "--repeats 0: must be at least 1"),
        ({"output": __file__}, "exists already"),
        ({"parts": ("decode",), "response_length": 4}, "--lengths geometric"),
        ({}, "is not installed; run `bash benchmarks/peers.sh`"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(speed, "peer_python", lambda part: tmp_path / "nothing")
    with pytest.raises(SystemExit) as stop:
        launch(speed.main, speed.Args(**options))
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1 and message in error


def test_a_contender_that_dies_is_quoted(tmp_path):
    dying = speed.Contender("ours", {"part": "ppo"}, [sys.executable, "-c", "raise SystemExit('no such thing')"])
    with pytest.raises(UserError, match="ended with exit code 1; it said\nno such thing"):
        speed.run_rounds([dying], tmp_path, 1, speed.Args(fresh=False), print)


def test_the_pins_of_the_peers_are_those_that_are_measured():
    script = (ROOT / "benchmarks" / "peers.sh").read_text()
    assert all(version in script for version in speed.PEERS.values())


# ----------------------------------------------------------------------------------------------------------------------
# scaling.py


def test_what_crosses_the_wire_by_hand():
    """10 trained parameters on 4 ranks: each sends 2 * 3/4 of 40 bytes."""
    assert scaling.ring(10, 4, gb_per_second=1e-9) == pytest.approx((60.0, 60.0))
    assert scaling.ring(10, 1, 1.0) == (0, 0)


def test_the_phases_of_an_update_by_hand():
    """2 rows of 3 + 2 tokens, one layer 4 wide with one product of 4 x 4, 7 ids; a critic of the same layers."""
    model = floors.Model([(4, 4)], (4, 7), 1, 4, 4)
    seconds = scaling.phase_seconds(model, model, 2, 3, 2, tflops=1e-12, memory_gb_per_second=1e-9)
    body, head, attention = 2 * 10 * 16, 2 * 4 * 28, 2 * 15 * 16  # of one forward; pairs of a row: 1 + 2 + .. + 5
    assert seconds["score"] == 4 * (body + attention) + 2 * head
    assert seconds["update"] == 3 * (2 * (body + attention) + head)
    prefill = 2 * (2 * 3) * 16 + 2 * 2 * 28
    assert seconds["rollout"] == prefill + 2 * ((16 + 28) + 2 * 4 * 2 * 4)  # one step: weights, 3 + 1 keys and values


def test_what_a_rank_holds_is_what_the_script_holds():
    """Weights and gradients in fp32, two moments, a reference, a reward model, a bf16 copy; buckets between ranks."""
    assert scaling.state_bytes(3, 5, ranks=1) == 8 * (4 + 4 + 4 + 4) + 3 * 4 + 5 * 4 + 3 * 2
    assert scaling.state_bytes(3, 5, ranks=2) - scaling.state_bytes(3, 5, ranks=1) == 8 * 4


def test_the_scaling_table(capsys):
    scaling.main(scaling.Args(presets=("gpt2-2x24-v32",), ranks=(1, 16)))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].split()[3] == "1" and lines[2].split()[3] == "16"


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def test_growth_by_hand():
    mib = [100.0, 200.0] + [300.0, 310.0] + [350.0] * 14 + [320.0, 320.0]
    summary = memory.summarise(mib, [3, 5, 6] + [7] * 16 + [9])
    assert summary == {"start": 305.0, "end": 320.0, "growth": 15.0, "share": 15 / 305, "compiles_behind_start": 2}


def test_memory_is_watched_along_a_run(tmp_path, gpt2_folder, capsys):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "a b"}, {"prompt": "c"}])
    (tmp_path / "score.py").write_text(
        "def score(prompts, responses):\n    return [float(len(x)) for x in responses]\n"
    )
    flags = f"--model {gpt2_folder} --dataset {prompts} --reward_fn {tmp_path}/score.py:score --batch_size 4 "
    flags += "--num_epochs 1 --num_minibatches 1 --micro_batch_size 4 --response_length 3"
    output = tmp_path / "memory.json"
    memory.main(memory.Args(num_updates=10, output=str(output)), flags.split())
    result = json.loads(output.read_text())
    assert len(result["mib"]) == len(result["compiles"]) == 10 and result["ppo_args"]["total_episodes"] == 40
    assert 50 < min(result["mib"]) and result["start"] == result["mib"][1] and result["end"] == result["mib"][-1]
    assert "at the end" in capsys.readouterr().out and ppo_rlhf.progress is utils.progress
    with pytest.raises(UserError, match="exists already"):
        memory.main(memory.Args(output=str(output)), [])
