"""The stages after one another without naming a model, as a person types them in an empty folder, only shorter."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHORT = {
    "tasks/randomwalks.py": ["--num_pairs", "400"],
    "sft.py": ["--num_epochs", "1"],
    "reward_model.py": [],
    "ppo_rlhf.py": ["--total_episodes", "128", "--monitor_fn", str(ROOT / "tasks/randomwalks.py:reward")],
    "ilql_rlhf.py": ["--num_epochs", "1", "--reward_fn", str(ROOT / "tasks/randomwalks.py:reward")],
}


def test_scripts_find_the_stage_before(tmp_path):
    for script, flags in SHORT.items():
        command = [sys.executable, ROOT / script, *flags]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "next" in done.stdout
    (model,) = tmp_path.glob("runs/ppo_rlhf__*/model")
    (reference,) = tmp_path.glob("runs/sft__*/model")
    (judge,) = tmp_path.glob("runs/reward_model__*/model")
    command = [sys.executable, ROOT / "benchmarks/evaluate.py", "--model", model, "--ref_model", reference]
    command += ["--reward_models", judge, "--reward_fns", ROOT / "tasks/randomwalks.py:reward"]
    command += ["--num_samples", "40", "--output", tmp_path / "result.json"]
    done = subprocess.run(map(str, command), cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((tmp_path / "result.json").read_text())["metrics"]
    assert {"score/reward", "kl", "length", "has_eos"} <= metrics.keys()
    assert 0 <= metrics["score/reward"]["mean"] <= 1
