"""The stages after one another without naming a model, in an empty folder.

This is what a person types, only shorter.
"""

import json

from conftest import ROOT

REWARD = f"{ROOT / 'tasks/randomwalks.py'}:reward"
SHORT = {
    "tasks/randomwalks.py": ["--num_pairs", "400"],
    "sft.py": ["--num_steps", "20"],
    "reward_model.py": [],
    "ppo_rlhf.py": ["--total_episodes", "128", "--monitor_fn", REWARD],
    "ilql_rlhf.py": ["--num_steps", "20", "--eval_samples", "40", "--reward_fn", REWARD],
}


def test_scripts_find_the_stage_before(tmp_path, run_script):
    for script, flags in SHORT.items():
        done = run_script(script, flags, cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "next" in done.stdout
    (model,) = tmp_path.glob("runs/ppo_rlhf__*/model")
    (reference,) = tmp_path.glob("runs/sft__*/model")
    (judge,) = tmp_path.glob("runs/reward_model__*/model")
    args = json.loads((model.parent / "args.json").read_text())["args"]
    assert args["model"] == str(reference.relative_to(tmp_path))
    assert args["reward_model"] == str(judge.relative_to(tmp_path))

    output = tmp_path / "result.json"
    flags = ["--run", model.parent, "--reward_models", judge, "--reward_fns", REWARD]
    flags += ["--num_samples", "40", "--output", output]
    done = run_script("tools/evaluate.py", flags, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads(output.read_text())["metrics"]
    assert {"score/reward", "kl", "length", "has_eos"} <= metrics.keys()
    assert 0 <= metrics["score/reward"]["mean"] <= 1
