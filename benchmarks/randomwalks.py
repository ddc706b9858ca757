"""PPO on the embedded task over several seeds, measured along training against the exact optimum.

    python benchmarks/randomwalks.py --experiment exact --output runs/exact
    python benchmarks/randomwalks.py --experiment learned --output runs/learned

exact: the reward is the optimality itself and there is no KL penalty: trlX's setting (128 walks an update, 4 epochs; two
minibatches of 64 make 8 optimizer steps an update). learned: the reward is a learned reward model; one run for each KL
coefficient, to see the true optimality against the KL that was spent on it. Both start from one SFT model. Every point
is `benchmarks/evaluate.py` on a checkpoint. Writes <output>/result.json and <output>/curves.png.
"""

import contextlib
import io
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are files in the root, not a package
sys.path.insert(0, str(Path(__file__).resolve().parent))

import evaluate
import ppo_rlhf
from utils import UserError, environment, launch

REWARD = "tasks/randomwalks.py:reward"
TRLX = {0: 0.326, 20: 0.796, 40: 0.865, 60: 0.930, 80: 0.927, 100: 0.954, 120: 0.932, 140: 0.957, 160: 0.940}
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"]


@dataclass
class Args:
    experiment: Literal["exact", "learned"] = "exact"
    """exact: optimality as the reward, no KL penalty; learned: a reward model, one run for each of kl_coefs"""
    output: str = "runs/randomwalks"
    """folder for result.json and curves.png, which must not exist yet"""
    sft: str = "runs/demo/sft/model"
    """where every run starts"""
    reward_model: str = "runs/demo/reward_model/model"
    """the score of the learned experiment"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """of PPO; the SFT model is the same"""
    lengths: tuple[int, ...] = (20, 40, 100)
    """exact: updates of each run, with a learning rate of its own decaying to 0"""
    kl_coefs: tuple[float, ...] = (0.0, 0.02, 0.05, 0.1, 0.3)
    """learned: the prices of a nat"""
    learned_updates: int = 40
    """learned: updates of each run"""
    merge: tuple[str, ...] = ()
    """result.json files of earlier calls, whose runs are drawn together and not trained again"""
    num_points: int = 10
    """checkpoints of a run that are measured"""
    num_samples: int = 400
    """walks sampled at each point"""
    lr: float = 5e-4
    """learning rate of the first update"""
    lam: float = 0.95
    """GAE's lambda"""
    cliprange_high: float | None = None
    """upper side of the clip of the ratio; none: 0.2, as the lower"""
    cliprange_value: float = 0.2
    """a value counts at most this far from its old one; rewards are 0 to 1 in the exact experiment"""
    vf_coef: float = 0.1
    """weight of the value loss"""
    early_stop_kl: float | None = None
    """an update ends before a step whose minibatch has moved further than this; none: never"""
    entropy_coef: float = 0.0
    """entropy bonus"""
    num_minibatches: int = 2
    """optimizer steps of each of the 4 epochs"""


def measure(policy, tokenizer, args, folder):
    """{optimality, kl} of a policy, each {mean, low, high, ...}, by evaluate.py."""
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    flags = {"ref_model": args.sft, "reward_fns": (REWARD,), "num_samples": args.num_samples, "batch_size": 400}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        evaluate.main(evaluate.Args(model=str(folder / "policy"), output=str(folder / "evaluation.json"), **flags))
    metrics = json.loads((folder / "evaluation.json").read_text())["metrics"]
    (folder / "evaluation.json").unlink()
    return {"optimality": metrics["score/reward"], "kl": metrics["kl"]}


def train(args, seed, updates, kl_coef):
    """One run of ppo_rlhf.py and the measurements of its checkpoints, the first of them before any training."""
    steps = 4 * args.num_minibatches
    flags = {"model": args.sft, "seed": seed, "total_episodes": 128 * updates, "kl_coef": kl_coef, "lr": args.lr}
    flags |= {
        "num_minibatches": args.num_minibatches,
        "lam": args.lam,
        "cliprange_high": args.cliprange_high,
        "cliprange_value": args.cliprange_value,
        "vf_coef": args.vf_coef,
        "early_stop_kl": args.early_stop_kl,
        "entropy_coef": args.entropy_coef,
        "save_every": max(updates // args.num_points, 1),
    }
    if args.experiment == "exact":
        flags |= {"reward_fn": REWARD, "missing_eos_score": "none"}
    else:
        flags |= {"reward_model": args.reward_model, "monitor_fn": REWARD}
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(args.sft), AutoTokenizer.from_pretrained(args.sft)
    with tempfile.TemporaryDirectory() as name:
        folder, started = Path(name), time.perf_counter()
        points = [{"update": 0, **measure(policy, tokenizer, args, folder)}]
        with contextlib.redirect_stdout(io.StringIO()):
            ppo_rlhf.main(ppo_rlhf.Args(output_dir=str(folder / "run"), **flags))
        seconds = time.perf_counter() - started
        for path in sorted((folder / "run" / "checkpoints").iterdir()):
            state = torch.load(path, weights_only=True)
            weights = {key.removeprefix("policy."): x for key, x in state["model"].items() if key.startswith("policy.")}
            policy.load_state_dict(weights)
            points.append({"update": state["step"], **measure(policy, tokenizer, args, folder)})
    for point in points:
        point |= {"rollouts": 128 * point["update"], "optimizer_steps": steps * point["update"]}
    last = points[-1]
    print(
        f"seed {seed}, {updates} updates, kl_coef {kl_coef}: optimality {last['optimality']['mean']:.3f}, "
        f"kl {last['kl']['mean']:.2f}, {seconds:.0f} s",
        flush=True,
    )
    return {"seed": seed, "updates": updates, "kl_coef": kl_coef, "seconds": seconds, "points": points}


def over_seeds(runs, name):
    """[(point without its estimates, mean, least and greatest value of the seeds)]."""
    rows = zip(*(run["points"] for run in runs), strict=True)
    means = [(row[0], [point[name]["mean"] for point in row]) for row in rows]
    return [(point, sum(values) / len(values), min(values), max(values)) for point, values in means]


def draw_exact(runs, args, path):
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, limit in zip(axes, (160, None), strict=True):
        for colour, updates in zip(COLOURS, args.lengths, strict=False):
            rows = over_seeds([run for run in runs if run["updates"] == updates], "optimality")
            steps = [point["optimizer_steps"] for point, *_ in rows]
            label = f"run of {steps[-1]} optimizer steps, {128 * updates:,} walks"
            axis.plot(steps, [mean for _, mean, *_ in rows], color=colour, marker="o", markersize=3, label=label)
            axis.fill_between(steps, [row[2] for row in rows], [row[3] for row in rows], color=colour, alpha=0.15)
        axis.plot(list(TRLX), list(TRLX.values()), "--", color="#444444", label="trlX, 3 seeds")
        axis.set(xlabel="optimizer steps", xlim=(0, limit), ylim=(0.2, 1.01))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("optimality of sampled walks")
    axes[1].legend(loc="lower right", frameon=False)
    num_seeds = len([run for run in runs if run["updates"] == args.lengths[0]])
    figure.suptitle(f"PPO with the exact reward: mean of {num_seeds} seeds, band from least to greatest")
    figure.savefig(path, dpi=150)


def draw_learned(runs, args, path):
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axis = figure.subplots()
    for colour, kl_coef in zip(COLOURS, args.kl_coefs, strict=False):
        for i, run in enumerate(run for run in runs if run["kl_coef"] == kl_coef):
            kl = [point["kl"]["mean"] for point in run["points"]]
            optimality = [point["optimality"]["mean"] for point in run["points"]]
            label = f"kl_coef {kl_coef:g}" if i == 0 else None
            axis.plot(kl, optimality, color=colour, marker="o", markersize=3, alpha=0.7, label=label)
    axis.set(xlabel="KL to the SFT model, nats a walk", ylabel="optimality of sampled walks", ylim=(0.2, 1.01))
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", frameon=False)
    axis.set_title(f"PPO against a learned reward model, {len(args.seeds)} seeds each")
    figure.savefig(path, dpi=150)


def main(args):
    folder = Path(args.output)
    if folder.exists():
        raise UserError(f"--output {args.output}: exists already; name another folder or remove it")
    for path in [args.sft, *([args.reward_model] if args.experiment == "learned" else [])]:
        if not args.merge and not Path(path).exists():
            raise UserError(f"{path}: no such folder; run `bash demo.sh` first, or name another")
    if args.experiment == "exact":
        settings = [(updates, 0.0) for updates in args.lengths]
    else:
        settings = [(args.learned_updates, kl_coef) for kl_coef in args.kl_coefs]
    if args.merge:
        parts = [json.loads(Path(path).read_text()) for path in args.merge]
        runs = [run for part in parts for run in part.pop("runs")]
        args.seeds = tuple(sorted({run["seed"] for run in runs}))
        settings = sorted({(run["updates"], run["kl_coef"]) for run in runs})
        args.lengths, args.kl_coefs = tuple(dict.fromkeys(u for u, _ in settings)), tuple(k for _, k in settings)
        result = {"parts": parts, "runs": runs}
    else:
        runs = [train(args, seed, updates, kl_coef) for updates, kl_coef in settings for seed in args.seeds]
        result = {"args": asdict(args), "argv": sys.argv, **environment(), "runs": runs}
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (draw_exact if args.experiment == "exact" else draw_learned)(runs, args, folder / "curves.png")
    print(f"\n{'updates':>8}{'kl_coef':>9}{'steps':>7}{'walks':>8}{'mean':>8}{'least':>8}{'kl':>7}")
    for updates, kl_coef in settings:
        chosen = [run for run in runs if (run["updates"], run["kl_coef"]) == (updates, kl_coef)]
        (point, mean, least, _), (_, kl, *_) = over_seeds(chosen, "optimality")[-1], over_seeds(chosen, "kl")[-1]
        cells = f"{updates:>8}{kl_coef:>9g}{point['optimizer_steps']:>7}{point['rollouts']:>8}"
        print(f"{cells}{mean:>8.3f}{least:>8.3f}{kl:>7.2f}")
    print(f"\nresult        {folder / 'result.json'}\ncurves        {folder / 'curves.png'}")


if __name__ == "__main__":
    launch(main, tyro.cli(Args, use_underscores=True))
