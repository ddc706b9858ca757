#!/usr/bin/env bash
# RLHF on the embedded task, from a machine with nothing but Python 3.11: makes .venv if no environment is active,
# installs, writes the data, trains SFT, reward model, PPO and ILQL, measures each policy, draws the curves.
set -euo pipefail
cd "$(dirname "$0")"
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"
fi
installed="$VIRTUAL_ENV/.installed-$(sha256sum <requirements.txt | cut -c1-16)"
if [ ! -e "$installed" ]; then
    echo "demo.sh: installing requirements.txt into $VIRTUAL_ENV"
    python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    touch "$installed"
fi
if [ -e runs/demo ]; then
    echo "demo.sh: clearing runs/demo from an earlier call"
    rm -r runs/demo
fi
mkdir -p runs/demo

stage() { # stage NAME COMMAND...: run it under a headline and note its seconds
    local name=$1 started=$SECONDS
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@"
    echo "$name $((SECONDS - started))" >>runs/demo/seconds.txt
}
evaluate() { # evaluate NAME FLAGS...: the policy of that stage, on every start, against the truth and the reward model
    local name=$1
    shift
    python benchmarks/evaluate.py --model "runs/demo/$name/model" --ref_model runs/demo/sft/model --num_samples 400 --greedy \
        --reward_models runs/demo/reward_model/model --reward_fns tasks/randomwalks.py:reward --output "runs/demo/$name.json" "$@"
}

stage data python tasks/randomwalks.py
stage sft python sft.py --output_dir runs/demo/sft
stage reward_model python reward_model.py --model runs/demo/sft/model --output_dir runs/demo/reward_model \
    --eval_dataset data/randomwalks/preferences_test.jsonl
stage ppo python ppo_rlhf.py --model runs/demo/sft/model --reward_model runs/demo/reward_model/model \
    --monitor_fn tasks/randomwalks.py:reward --output_dir runs/demo/ppo
stage ilql python ilql_rlhf.py --output_dir runs/demo/ilql
stage evaluate_sft evaluate sft
stage evaluate_ppo evaluate ppo
stage evaluate_ilql evaluate ilql --beta 100
stage curves python benchmarks/curves.py runs/demo/sft runs/demo/reward_model runs/demo/ppo runs/demo/ilql \
    --output runs/demo/curves.png

python - <<'PYTHON'
import json
from pathlib import Path

demo = Path("runs/demo")
seconds = {name: int(value) for name, value in map(str.split, (demo / "seconds.txt").read_text().splitlines())}
accuracy = json.loads((demo / "reward_model" / "metrics.jsonl").read_text().splitlines()[-1])["eval/rm/accuracy"]
empty = dict.fromkeys(("optimality", "optimality_greedy", "score", "kl", "accuracy"))
rows = []
for stage in ("sft", "reward_model", "ppo", "ilql"):
    row = {"stage": stage, **empty, "seconds": seconds[stage]}
    if stage == "reward_model":
        row["accuracy"] = accuracy
    else:
        result = json.loads((demo / f"{stage}.json").read_text())
        means = {name: metric["mean"] for name, metric in result["metrics"].items()}
        row["optimality"], row["kl"] = means["score/reward"], means["kl"]
        row["score"] = next(mean for name, mean in means.items() if name.startswith("score/") and name != "score/reward")
        row["optimality_greedy"] = result["greedy"]["score/reward"]["mean"]
    rows.append(row)
(demo / "summary.json").write_text(json.dumps(rows, indent=2) + "\n")


def cell(value, width, digits):
    return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"


print(f"\n{'stage':<14}{'optimality':>12}{'greedy':>9}{'accuracy':>10}{'score':>9}{'kl':>8}{'seconds':>9}")
for row in rows:
    cells = [cell(row["optimality"], 12, 3), cell(row["optimality_greedy"], 9, 3), cell(row["accuracy"], 10, 3)]
    cells += [cell(row["score"], 9, 2), cell(row["kl"], 8, 2), cell(row["seconds"], 9, 0)]
    print(f"{row['stage']:<14}{''.join(cells)}")
print("\noptimality: 1 is a shortest path to the goal, 0 a walk that misses it; means of 400 sampled walks")
print("ilql: from random weights, on rated walks alone; steered with beta 100")
print("summary       runs/demo/summary.json")
print("learning      runs/demo/curves.png")
print("next          python ppo_rlhf.py --help")
PYTHON
echo "demo.sh: done in $SECONDS seconds"
