"""benchmarks/speed: its arithmetic against counts by hand, and our contenders on tiny sizes.

No speed is asserted anywhere.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import ppo_rlhf
import reward_model
import sft
import utils
from conftest import write_jsonl
from utils import UserError, launch

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks" / "speed"))

import compare
import contender
import floors
import growth
import memory
import shapes

ROOT = Path(__file__).resolve().parent.parent
TINY = "gpt2-2x24-v32"
SIZES = {"batch": 4, "micro_batch": 2, "prompt": 3, "response": 5, "epochs": 2}


def small_work(part, **sizes):
    return shapes.workload(part, TINY, **SIZES | sizes)


# --------------------------------------------------------------------------------------------------
# Floors


@pytest.mark.fast
def test_linear_layers_by_hand():
    gpt2 = floors.model_of(shapes.model_config(TINY))
    assert gpt2.body == [(24, 72), (24, 24), (24, 96), (96, 24)] * 2
    assert (gpt2.head, gpt2.layers, gpt2.width) == ((24, 32), 2, 24)
    smollm2 = floors.model_of(shapes.smollm2())
    attention = [(576, 576), (576, 192), (576, 192), (576, 576)]
    mlp = [(576, 1536), (576, 1536), (1536, 576)]
    assert sorted(smollm2.body) == sorted((attention + mlp) * 30)
    assert (smollm2.head, smollm2.layers, smollm2.width) == ((576, 49152), 30, 576)


@pytest.mark.fast
def test_the_update_of_the_large_gpt2_by_hand():
    work = shapes.workload("ppo", "gpt2-4x256-v8192")
    found = floors.phases(floors.model_of(shapes.model_config(work.model)), work)
    body = 4 * 12 * 256**2
    head = 256 * 8192
    pairs = sum(position + 1 for position in range(64)) * 64
    attention = 4 * 2 * 2 * 256 * pairs  # Layers; two products; multiply and add.
    forward = 2 * (2 * 64 * 64 * body) + 2 * 64 * 48 * head + 2 * attention
    assert floors.phase_flops(found["update"]) == 3 * 4 * forward
    assert floors.phase_flops(found["update"]) == pytest.approx(784e9, rel=0.01)
    assert floors.phase_flops(found["score"]) == 2 * forward
    prompt_pairs = 64 * sum(position + 1 for position in range(63))
    rollout = 2 * 64 * (16 + 47) * body + 2 * 64 * 48 * head + 4 * 4 * 256 * prompt_pairs
    assert floors.phase_flops(found["rollout"]) == rollout


@pytest.mark.fast
def test_rows_that_have_ended_are_not_decoded():
    """Two rows, of 3 + 1 and 2 + 3 tokens: the second alone goes through two more steps."""
    model = floors.model_of(shapes.model_config(TINY))
    phase = floors.rollout_phase(model, [3, 2], [1, 3])
    body = 2 * 12 * 24**2
    head = 24 * 32
    pairs = (1 + 2 + 3) + (1 + 2 + 3 + 4)
    linear = 2 * (7 * body + 4 * head)
    assert floors.phase_flops(phase) == linear + 4 * 24 * 2 * pairs


@pytest.mark.fast
def test_the_trainers_by_hand():
    model = floors.model_of(shapes.model_config(TINY))
    body = 2 * 12 * 24**2
    pairs = sum(range(1, 9))
    update = floors.phases(model, small_work("sft"))["update"]
    linear = 3 * 2 * (4 * 8 * body + 4 * 5 * 24 * 32)
    assert floors.phase_flops(update) == linear + 3 * 4 * 24 * 2 * 4 * pairs
    update = floors.phases(model, small_work("reward_model"))["update"]
    assert floors.phase_flops(update) == 3 * 2 * 8 * 8 * body + 3 * 4 * 24 * 2 * 8 * pairs


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_floor_is_measured_for_each_phase(dtype):
    found = floors.phases(floors.model_of(shapes.model_config(TINY)), small_work("chat"))
    assert list(found) == ["rollout", "score", "update"]
    assert min(floors.phase_seconds(phase, dtype) for phase in found.values()) > 0


# --------------------------------------------------------------------------------------------------
# Models and texts


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["gpt2", "llama", "tied llama"])
@pytest.mark.parametrize("wanted", [0.0, shapes.CHAT_ENDING])
def test_a_response_ends_with_the_probability_wanted(kind, wanted):
    config = shapes.model_config(TINY)
    if kind != "gpt2":
        config = LlamaConfig(
            num_hidden_layers=2,
            hidden_size=16,
            intermediate_size=40,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=32,
            tie_word_embeddings=kind == "tied llama",
            **shapes.IDS,
        )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    shapes.set_ending(model, wanted)
    ids = torch.randint(2, 32, (16, 20), generator=torch.Generator().manual_seed(3))
    probabilities = torch.softmax(model(ids).logits, -1)
    ends = probabilities[..., shapes.EOS]
    assert ends.max() < 2 * wanted + 1e-6
    assert ends.min() >= wanted / 2
    assert probabilities[..., shapes.PAD].max() < 1e-6
    assert probabilities[..., 2:].min() > 1e-4


@pytest.mark.fast
def test_smollm2_has_its_published_size():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shapes.smollm2())
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(134.5, abs=0.1)


@pytest.mark.fast
def test_chat_like_lengths():
    work = shapes.workload("chat", "gpt2-4x256-v8192")
    prompts = shapes.prompt_lengths(work)
    assert (len(prompts), max(prompts)) == (64, 128)
    assert statistics.median(prompts) == pytest.approx(30, abs=0.5)
    logs = [torch.tensor(float(x)).log().item() for x in prompts if x < 128]
    assert statistics.pstdev(logs) == pytest.approx(0.66, abs=0.05)  # Without the upper end.
    responses = shapes.response_lengths(work)
    assert (min(responses), max(responses)) == (1, 64)
    assert statistics.median(responses) == pytest.approx(20.5, abs=1)
    # The mean of a geometric law that is cut at 64.
    expected = sum((1 - shapes.CHAT_ENDING) ** t for t in range(64))
    assert statistics.mean(responses) == pytest.approx(expected, rel=0.03)


@pytest.mark.fast
def test_workloads_and_what_replaces_their_sizes():
    full = shapes.workload("ppo", TINY)
    assert (full.batch, full.micro_batch, full.epochs) == (64, 64, 4)
    assert (full.prompt, full.response, full.chat) == (16, 48, False)
    chat = shapes.workload("chat", TINY)
    assert (chat.batch, chat.micro_batch, chat.epochs) == (64, 16, 4)
    assert (chat.prompt, chat.response, chat.chat) == (128, 64, True)
    smollm2 = shapes.workload("chat", "smollm2-135m", epochs=2)
    assert (smollm2.batch, smollm2.micro_batch, smollm2.epochs) == (16, 4, 2)
    assert shapes.workload("ppo", TINY, batch=8).micro_batch == 8


def test_every_text_has_the_length_wanted(tmp_path):
    work = small_work("sft")
    paths = shapes.build_world(work, tmp_path, num_batches=2)
    tokenizer = AutoTokenizer.from_pretrained(paths["policy"])
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (shapes.PAD, shapes.EOS)
    prompts = utils.load_prompts(paths["prompts"], tokenizer, 64, "--query_length")
    assert [len(ids) for ids, _ in prompts] == [3] * 4
    rows = sft.load_demonstrations(paths["rows"], tokenizer, sft.Args())
    assert [len(row["input_ids"]) for row in rows] == [8] * 8
    assert {len(row["input_ids"]) - row["num_unlabelled"] for row in rows} == {5}

    folder = tmp_path / "pairs"
    folder.mkdir()
    paths = shapes.build_world(small_work("reward_model"), folder, num_batches=2)
    pairs = reward_model.load_comparisons(paths["rows"], tokenizer, reward_model.Args())
    sides = [pair[name] for pair in pairs for name in ("chosen", "rejected")]
    assert {reward_model.side_length(side) for side in sides} == {8}
    assert len(pairs) == 8


# --------------------------------------------------------------------------------------------------
# Ratios and tables


def measured(name, seconds, steps=1, **phases):
    """A contender that has had its turns."""
    job = {"steps": steps, "batch": 4}
    turns = []
    for i, x in enumerate(seconds):
        turn = {"seconds": x, "memory_mib": 10.0 + i, "threads": 2}
        turns.append(turn | {phase: values[i] for phase, values in phases.items()})
    return compare.Contender(name, [], job, turns=turns)


@pytest.mark.fast
def test_ratios_are_medians_over_rounds():
    theirs = measured("trl", [8.0, 20.0, 9.0], rollout=[1.0, 2.0, 6.0])
    ours = measured("ours", [4.0, 5.0, 3.0], rollout=[1.0, 1.0, 2.0], update=[3.0, 4.0, 1.0])
    floor = measured("floor", [9.0, 9.0, 9.0], rollout=[0.5] * 3, update=[1.5, 1.5, 0.5])
    ratios = compare.compare([theirs, ours, floor])
    assert list(ratios) == ["trl / ours", "ours / floor"]
    assert ratios["trl / ours"] == {
        "whole": {"median": 3.0, "low": 2.0, "high": 4.0},
        "rollout": {"median": 2.0, "low": 1.0, "high": 3.0},
    }
    over_floor = ratios["ours / floor"]
    assert over_floor["whole"] == {"median": 2.5, "low": 2.0, "high": 3.0}
    assert over_floor["update"]["median"] == 2.0


@pytest.mark.fast
def test_seconds_are_those_of_a_step():
    ours = measured("ours", [8.0, 12.0], steps=4, response_tokens=[8, 16])
    ours.log = Path("/dev/null")
    summary = compare.summarise(ours)
    assert summary["seconds"] == {"whole": {"median": 2.5, "low": 2.0, "high": 3.0}}
    assert summary["response_length"] == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert (summary["memory_mib"], summary["recompiles"]) == (11.0, 0)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.2345, "1.23"), (12.345, "12.3"), (12345.6, "12346"), (0.0123456, "0.0123")],
)
def test_numbers_have_three_digits(value, text):
    assert compare.number(value) == text


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ("gpt3",)}, "--models gpt3: unknown"),
        ({"models": ("gpt2-4x0-v99",)}, "--models gpt2-4x0-v99: unknown"),
        ({"batch": 6, "micro_batch": 4}, "--batch by --micro_batch"),
        ({"response": 0}, "--response 0: must be at least 1"),
        ({"rounds": 0}, "--rounds 0: must be at least 1"),
        ({"output": __file__}, "exists already"),
        ({}, "is not installed; run `bash benchmarks/speed/peers.sh`"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(compare, "peer_python", lambda part: tmp_path / "nothing")
    with pytest.raises(SystemExit) as stop:
        launch(compare.main, compare.Args(**options))
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.fast
def test_the_pins_of_the_peers_are_those_that_are_measured():
    script = (ROOT / "benchmarks" / "speed" / "peers.sh").read_text()
    assert all(version in script for version in compare.TRL.values())


# --------------------------------------------------------------------------------------------------
# Contenders


def test_a_contender_works_only_when_told_to():
    code = """
from turns import Turns

turns = Turns(warmup=2, steps=3)
n = 0
while True:
    n += 1
    print("noise", n)
    turns.step_done(n=n)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT / "benchmarks" / "speed",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert json.loads(process.stdout.readline())["n"] == 1 + 2
    for total in (3 + 4 + 5, 6 + 7 + 8):
        process.stdin.write("\n")
        process.stdin.flush()
        turn = json.loads(process.stdout.readline())
        assert turn["n"] == total
        assert turn["seconds"] > 0
        assert turn["memory_mib"] > 1
    assert process.communicate()[0] == ""
    assert process.returncode == 0


def test_a_contender_that_dies_is_quoted(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such thing')"]
    dying = compare.Contender("ours", command, {})
    with pytest.raises(UserError, match=r"ended with exit code 1; it said: .*no such thing"):
        compare.run_rounds([dying], 1, tmp_path, 1, print)


class Enough(Exception):
    """The steps wanted are done."""


class CountedSteps:
    """In the place of `Turns`: keeps what is reported, and stops after some steps."""

    def __init__(self, wanted):
        self.wanted = wanted
        self.seen = []

    def step_done(self, **sums):
        self.seen.append(sums)
        if len(self.seen) == self.wanted:
            raise Enough


def job_of(work, folder, engine):
    """The job that compare.py would hand to a contender of ours."""
    paths = shapes.build_world(work, folder, num_batches=4)
    args = compare.Args(compile=False, dtype="fp32", steps=1, rounds=2, peers=False)
    (ours,) = compare.build_contenders(work, paths, args)
    assert ours.job["engine"] == "ours"
    return ours.job | {"engine": engine, "output_dir": str(folder / "run")}


@pytest.mark.parametrize("part", ["chat", "decode", "sft", "reward_model"])
def test_our_scripts_run_step_by_step(part, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "progress", utils.progress)  # Put back at the end.
    monkeypatch.setattr(ppo_rlhf, "generate", ppo_rlhf.generate)
    turns = CountedSteps(3)
    with pytest.raises(Enough):
        contender.OURS[part](job_of(small_work(part), tmp_path, "ours"), turns)
    if part == "chat":
        assert set(turns.seen[0]) == {"rollout", "score", "update", "response_tokens"}
        assert 4 <= turns.seen[0]["response_tokens"] <= 20


@pytest.mark.parametrize("engine", ["transformers", "floor"])
def test_what_ours_are_compared_with_runs_step_by_step(engine, tmp_path):
    turns = CountedSteps(2)
    with pytest.raises(Enough):
        contender.OTHERS[engine](job_of(small_work("decode"), tmp_path, engine), turns)


def test_the_whole_command_and_the_file_that_it_writes(tmp_path, capsys):
    output = tmp_path / "compare.json"
    options = {"peers": False, "compile": False, "rounds": 2, "threads": 1}
    args = compare.Args(only=("chat",), models=(TINY,), output=str(output), **options, **SIZES)
    compare.main(args)
    record = json.loads(output.read_text())
    assert {"command", "args", "environment", "processor", "threads", "seconds"} <= set(record)
    assert {"commit", "dirty", "versions", "device"} <= set(record["environment"])
    assert set(record["allocator"]) == {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}
    (group,) = record["comparisons"]
    assert asdict(small_work("chat")).items() <= group.items()
    assert group["ratios"] == {}
    ours = group["contenders"]["ours"]
    assert set(ours["seconds"]) == {"whole", "rollout", "score", "update"}
    assert (ours["threads"], ours["recompiles"], len(ours["turns"])) == (1, 0, 2)
    for turn in ours["turns"]:
        assert turn["rollout"] + turn["score"] + turn["update"] <= turn["seconds"]
    assert "chat, gpt2-2x24-v32, 4 rows in micro-batches of 2" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("part", list(compare.TRL))
def test_trl_where_it_is_installed(part, tmp_path):
    if not compare.peer_python(part).exists():
        pytest.skip("bash benchmarks/speed/peers.sh installs it")
    options = {"only": (part,), "models": (TINY,), "compile": False, "rounds": 1, "steps": 1}
    compare.main(compare.Args(**options, **SIZES, output=str(tmp_path / "compare.json")))
    (group,) = json.loads((tmp_path / "compare.json").read_text())["comparisons"]
    assert group["ratios"][f"trl {compare.TRL[part]} / ours"]["whole"]["median"] > 0


# --------------------------------------------------------------------------------------------------
# Growth

GROWTH = growth.Args(
    batch=(2, 4),
    response=(8, 16),
    vocabulary=(32,),
    size=("1x24", "2x24", "2x24"),
    base_batch=2,
    base_response=8,
    base_vocabulary=32,
    base_size="1x24",
)


@pytest.mark.fast
def test_one_size_varies_at_a_time_and_no_point_is_measured_twice():
    base = {"batch": 2, "response": 8, "vocabulary": 32, "size": "1x24"}
    varied = [base | {"batch": 4}, base | {"response": 16}, base | {"size": "2x24"}]
    assert growth.points_of(GROWTH) == [base, *varied]
    work = growth.work_of(varied[0])
    assert (work.model, work.batch, work.micro_batch, work.epochs) == ("gpt2-1x24-v32", 4, 4, 1)
    assert growth.layer_parameters("4x256") == 12 * 4 * 256**2


def test_a_panel_shows_the_points_of_its_axis(tmp_path, monkeypatch, capsys):
    """Invented seconds: phase k of point n takes 10^k + n, its floor half of that."""
    number = 0

    def invented(work, folder, threads, args, say):
        nonlocal number
        number += 1
        medians = {phase: 10.0**k + number for k, phase in enumerate(growth.COLOURS)}
        ours = {x: {"median": m, "low": m - 0.5, "high": m + 0.5} for x, m in medians.items()}
        floor = {x: {"median": m / 2, "low": m / 3, "high": m} for x, m in medians.items()}
        contenders = {"ours": {"seconds": ours}, "floor": {"seconds": floor}}
        return {"contenders": contenders, "ratios": {"ours / floor": ours}}

    monkeypatch.setattr(compare, "measure", invented)
    output = tmp_path / "growth.json"
    growth.main(growth.Args(**vars(GROWTH) | {"output": str(output)}))
    assert output.with_suffix(".png").stat().st_size > 10000
    figure = growth.figure_of(json.loads(output.read_text()))
    panels = []
    for panel in figure.axes:
        panels.append([(list(line.get_xdata()), list(line.get_ydata())) for line in panel.lines])
    assert panels[0][0] == ([2, 4], [2.0, 3.0])  # The rollout by batch, and its floor.
    assert panels[0][1] == ([2, 4], [1.0, 1.5])
    assert panels[1][4] == ([8, 16], [101.0, 103.0])  # The update by response length.
    assert panels[2][2] == ([32], [11.0])  # Scoring by vocabulary.
    assert panels[3][4] == ([12 * 24**2, 24 * 24**2], [101.0, 104.0])
    growth.main(growth.Args(input=str(output)))
    assert (
        capsys.readouterr().out.count(
            "batch 4; response 8; vocabulary 32; size 1x24; rollout 3.00 s"
        )
        == 2
    )


@pytest.mark.fast
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of them"),
        ({"output": __file__}, "exists already"),
        ({"output": "new.json", "rounds": 0}, "at least 1"),
        ({"output": "new.json", "size": ("4y256",)}, "gpt2-4y256-v8192: unknown"),
        ({"output": "new.json", "batch": (0,)}, "must be at least 1"),
    ],
)
def test_mistakes_of_growth(options, message):
    with pytest.raises(UserError, match=message):
        growth.main(growth.Args(**options))


# --------------------------------------------------------------------------------------------------
# Memory


@pytest.mark.fast
def test_growth_of_memory_by_hand():
    mib = [100.0, 200.0, 300.0, 310.0] + [350.0] * 14 + [320.0, 330.0]
    assert memory.growth(mib) == (305.0, 325.0)


def test_memory_is_watched_along_a_run(tmp_path, gpt2_folder, capsys):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "a b"}, {"prompt": "c"}])
    (tmp_path / "score.py").write_text(
        "def score(prompts, responses):\n    return [float(len(x)) for x in responses]\n"
    )
    flags = f"--model {gpt2_folder} --dataset {prompts} --reward_fn {tmp_path}/score.py:score"
    flags += " --batch_size 4 --num_epochs 1 --micro_batch_size 4 --response_length 3"
    output = tmp_path / "memory.json"
    memory.main(memory.Args(num_updates=10, output=str(output)), flags.split())
    result = json.loads(output.read_text())
    assert result["ppo_args"]["total_episodes"] == 40
    assert len(result["mib"]) == 10
    assert min(result["mib"]) > 50
    assert (result["start"], result["end"]) == (result["mib"][1], result["mib"][-1])
    assert "at the end" in capsys.readouterr().out
    assert utils.progress is utils.progress
