"""Whole runs with --compile against the same runs without: metrics equal, plain keys saved. About a minute when cold."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import ppo_rlhf
import reward_model
import sft
from conftest import write_jsonl

LETTERS = "abcdefghijklmnop"
TEXTS = [
    (LETTERS[i % 5 : i % 5 + 2], LETTERS[i % 7 : i % 7 + 1 + i % 6], LETTERS[i % 3 : i % 3 + 3]) for i in range(24)
]
CLOCKS = ("time/", "eps")


@pytest.fixture
def runs(tmp_path, gpt2_folder, llama_rm_folder):
    """{script: (module, flags)} of three short runs whose batches have unequal lengths."""
    rows = [{"prompt": a, "completion": b, "chosen": b, "rejected": c} for a, b, c in TEXTS]
    sizes = {"dataset": write_jsonl(tmp_path / "rows.jsonl", rows), "batch_size": 8, "micro_batch_size": 4}
    ppo = {
        "model": gpt2_folder,
        "reward_model": llama_rm_folder,
        "num_epochs": 2,
        "num_minibatches": 2,
        "stop_token": "abcdefghij",
    }
    return {
        "sft": (sft, {"model": gpt2_folder, "num_epochs": 1, "log_every": 1, **sizes}),
        "reward_model": (reward_model, {"model": llama_rm_folder, "num_epochs": 1, "log_every": 1, **sizes}),
        "ppo_rlhf": (ppo_rlhf, {"total_episodes": 24, "response_length": 20, **ppo, **sizes}),
    }


@pytest.mark.parametrize("script", ["sft", "reward_model", "ppo_rlhf"])
def test_compiled_is_eager(script, runs, tmp_path):
    module, flags = runs[script]
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
