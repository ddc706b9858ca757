#!/usr/bin/env bash
# RLHF on the embedded task, from a machine with nothing but Python 3.11: makes .venv if no
# environment is active, installs, writes the data, trains SFT, reward model, PPO, DPO and ILQL on
# random walks and GRPO on running sums, measures each policy, and draws the curves.
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

# glibc keeps freed memory up to this many bytes, because on a CPU the page faults of memory that is
# given back and asked for again cost about a third of an update.
export MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_MMAP_THRESHOLD_=1073741824

# stage NAME COMMAND...: run a command under a headline and note its seconds.
stage() {
    local name=$1 started=$SECONDS
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    "$@"
    echo "$name $((SECONDS - started))" >>runs/demo/seconds.txt
}

# evaluate NAME FLAGS...: measure the policy of a stage, from every start, by the truth and by the
# reward model.
evaluate() {
    local name=$1
    shift
    python tools/evaluate.py --model "runs/demo/$name/model" --ref_model runs/demo/sft/model \
        --num_samples 400 --greedy --reward_models runs/demo/reward_model/model \
        --reward_fns tasks/randomwalks.py:reward --output "runs/demo/$name.json" "$@"
}

stage data python tasks/randomwalks.py
stage sft python sft.py --output_dir runs/demo/sft
stage reward_model python reward_model.py --model runs/demo/sft/model \
    --output_dir runs/demo/reward_model --eval_dataset data/randomwalks/preferences_test.jsonl
stage ppo python ppo_rlhf.py --model runs/demo/sft/model \
    --reward_model runs/demo/reward_model/model --monitor_fn tasks/randomwalks.py:reward \
    --output_dir runs/demo/ppo
stage dpo python dpo.py --model runs/demo/sft/model --max_rows 6400 \
    --eval_dataset data/randomwalks/preferences_test.jsonl --output_dir runs/demo/dpo
stage ilql python ilql_rlhf.py --output_dir runs/demo/ilql
stage evaluate_sft evaluate sft
stage evaluate_ppo evaluate ppo
stage evaluate_dpo evaluate dpo
stage evaluate_ilql evaluate ilql --beta 100

# The second task: digits to add up, with a reward for the right answer alone.
stage sums python tasks/running_sum.py
stage sums_sft python sft.py --model data/running_sum/model \
    --dataset data/running_sum/demonstrations.jsonl --batch_size 128 --micro_batch_size 128 \
    --lr 1e-3 --num_steps 800 --output_dir runs/demo/sums_sft
stage grpo python grpo_rlhf.py --model runs/demo/sums_sft/model \
    --dataset data/running_sum/prompts.jsonl --eval_dataset data/running_sum/prompts_test.jsonl \
    --reward_fn tasks/running_sum.py:reward --monitor_fn tasks/running_sum.py:thinks \
    --missing_eos_score none --response_length 16 --total_episodes 9728 --batch_size 256 \
    --micro_batch_size 256 --num_epochs 2 --lr 4e-4 --output_dir runs/demo/grpo
stage curves python tools/curves.py runs/demo/sft runs/demo/reward_model runs/demo/ppo \
    runs/demo/dpo runs/demo/ilql runs/demo/grpo --output runs/demo/curves.png

python - <<'PYTHON'
import json
from pathlib import Path

demo = Path("runs/demo")


def last_metrics(stage):
    return json.loads((demo / stage / "metrics.jsonl").read_text().splitlines()[-1])


def evaluations(stage):
    lines = [json.loads(line) for line in (demo / stage / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "eval/score" in line]


def policy_columns(stage):
    result = json.loads((demo / f"{stage}.json").read_text())
    means = {name: metric["mean"] for name, metric in result["metrics"].items()}
    return {
        "optimality": means["score/reward"],
        "optimality_greedy": result["greedy"]["score/reward"]["mean"],
        "score": means["score/reward_model"],
        "kl": means["kl"],
    }


seconds = {}
for line in (demo / "seconds.txt").read_text().splitlines():
    stage, value = line.split()
    seconds[stage] = int(value)
rows = []
for stage in ("sft", "reward_model", "ppo", "dpo", "ilql"):
    row = {"stage": stage, "optimality": None, "optimality_greedy": None, "score": None}
    row |= {"kl": None, "accuracy": None, "seconds": seconds[stage]}
    if stage == "reward_model":
        row["accuracy"] = last_metrics(stage)["eval/rm/accuracy"]
    else:
        row |= policy_columns(stage)
    rows.append(row)
(demo / "summary.json").write_text(json.dumps(rows, indent=2) + "\n")

# {heading: (key, width, digits)}
COLUMNS = {
    "optimality": ("optimality", 12, 3),
    "greedy": ("optimality_greedy", 9, 3),
    "accuracy": ("accuracy", 10, 3),
    "score": ("score", 9, 2),
    "kl": ("kl", 8, 2),
    "seconds": ("seconds", 9, 0),
}
heading = "".join(f"{name:>{width}}" for name, (_, width, _) in COLUMNS.items())
print(f"\n{'stage':<14}{heading}")
for row in rows:
    line = f"{row['stage']:<14}"
    for key, width, digits in COLUMNS.values():
        text = "-" if row[key] is None else f"{row[key]:.{digits}f}"
        line += f"{text:>{width}}"
    print(line)
before, *_, after = evaluations("grpo")
print("\nsums before and after GRPO: right answers to held-out prompts, and tokens of a response")
for name, metrics in (("sums_sft", before), ("grpo", after)):
    print(f"{name:<14}{metrics['eval/score']:>12.3f}{metrics['eval/length']:>12.1f}")
print("\noptimality: 1 is a shortest path to the goal, 0 a walk that misses it")
print("means of 400 sampled walks; greedy: of the most likely walk from each start")
print("dpo: on 6,400 of the 20,000 comparisons that the reward model is trained on")
print("ilql: from random weights, on rated walks alone; steered with beta 100")
print("summary       runs/demo/summary.json")
print("learning      runs/demo/curves.png")
print("next          python ppo_rlhf.py --help")
PYTHON
echo "demo.sh: done in $SECONDS seconds"
