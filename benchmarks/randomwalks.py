"""PPO on the embedded task over several seeds, measured along training against the exact optimum.

    python benchmarks/randomwalks.py --experiment exact --output runs/exact
    python benchmarks/randomwalks.py --experiment learned --output runs/learned

exact: the reward is the optimality itself and there is no KL penalty. This is the setting of trlX:
128 walks an update and 4 epochs, here of two minibatches, so 8 optimizer steps an update.

learned: the reward is a learned reward model. There is one run for each KL coefficient, to see the
true optimality against the KL that was spent on it.

Both start from one SFT model. Every point is what `tools/evaluate.py` says of a checkpoint. Writes
<output>/result.json and <output>/curves.png.
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

# The scripts are files in the root and not a package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ppo_rlhf
from tools import evaluate
from utils import UserError, environment, launch

REWARD = "tasks/randomwalks.py:reward"
NUM_EPOCHS = 4
WALKS_PER_UPDATE = 128
# {optimizer steps: optimality} of trlX's own example on this graph, in our runs: docs/ppo_rlhf.md.
TRLX = {0: 0.326, 20: 0.796, 40: 0.865, 60: 0.930, 80: 0.927, 100: 0.954}
TRLX |= {120: 0.932, 140: 0.957, 160: 0.940}
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"]


@dataclass
class Args:
    experiment: Literal["exact", "learned"] = "exact"
    """exact: optimality as the reward, no KL penalty; learned: a reward model, one run for each of
    kl_coefs"""
    output: str = "runs/randomwalks"
    """folder for result.json and curves.png, which must not exist yet"""
    sft: str = "runs/demo/sft/model"
    """where every run starts"""
    reward_model: str = "runs/demo/reward_model/model"
    """the score of the learned experiment"""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """of PPO; the SFT model is the same"""
    lengths: tuple[int, ...] = (20, 40, 100)
    """exact: updates of each run, with a learning rate of its own that decays to 0"""
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
    """a value counts at most this far from its old one; rewards are 0 to 1 in the exact
    experiment"""
    vf_coef: float = 0.1
    """weight of the value loss"""
    early_stop_kl: float | None = None
    """an update ends before a step whose minibatch has moved further than this; none: never"""
    entropy_coef: float = 0.0
    """weight of the entropy bonus"""
    num_minibatches: int = 2
    """optimizer steps of each of the 4 epochs"""


def measure(policy, tokenizer, args, folder):
    """{optimality, kl} of a policy, each {mean, low, high, ...}, by tools/evaluate.py."""
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    output = folder / "evaluation.json"
    options = evaluate.Args(
        model=str(folder / "policy"),
        ref_model=args.sft,
        reward_fns=(REWARD,),
        num_samples=args.num_samples,
        batch_size=400,
        output=str(output),
    )
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        evaluate.main(options)
    metrics = json.loads(output.read_text())["metrics"]
    output.unlink()
    return {"optimality": metrics["score/reward"], "kl": metrics["kl"]}


def ppo_args(args, seed, updates, kl_coef, output_dir):
    """The arguments of ppo_rlhf.py of one run."""
    flags = {
        "model": args.sft,
        "output_dir": output_dir,
        "seed": seed,
        "total_episodes": WALKS_PER_UPDATE * updates,
        "batch_size": WALKS_PER_UPDATE,
        "num_epochs": NUM_EPOCHS,
        "num_minibatches": args.num_minibatches,
        "kl_coef": kl_coef,
        "lr": args.lr,
        "lam": args.lam,
        "cliprange_high": args.cliprange_high,
        "cliprange_value": args.cliprange_value,
        "vf_coef": args.vf_coef,
        "early_stop_kl": args.early_stop_kl,
        "entropy_coef": args.entropy_coef,
        "save_every": max(updates // args.num_points, 1),
    }
    if args.experiment == "exact":
        flags |= {"reward_fn": (REWARD,), "missing_eos_score": "none"}
    else:
        flags |= {"reward_model": args.reward_model, "monitor_fn": (REWARD,)}
    return ppo_rlhf.Args(**flags)


def policy_weights(state):
    """The weights of the policy in a checkpoint of ppo_rlhf.py."""
    prefix = "actor.model."
    weights = {}
    for name, x in state["model"].items():
        if name.startswith(prefix):
            weights[name.removeprefix(prefix)] = x
    return weights


def train(args, seed, updates, kl_coef):
    """One run of ppo_rlhf.py, and the measurements before it and at its checkpoints."""
    policy = AutoModelForCausalLM.from_pretrained(args.sft)
    tokenizer = AutoTokenizer.from_pretrained(args.sft)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        points = [{"update": 0, **measure(policy, tokenizer, args, folder)}]
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            ppo_rlhf.main(ppo_args(args, seed, updates, kl_coef, str(folder / "run")))
        seconds = time.perf_counter() - started
        for path in sorted((folder / "run" / "checkpoints").iterdir()):
            state = torch.load(path, weights_only=True)
            policy.load_state_dict(policy_weights(state))
            points.append({"update": state["step"], **measure(policy, tokenizer, args, folder)})
    steps_per_update = NUM_EPOCHS * args.num_minibatches
    for point in points:
        point["rollouts"] = WALKS_PER_UPDATE * point["update"]
        point["optimizer_steps"] = steps_per_update * point["update"]
    optimality = points[-1]["optimality"]["mean"]
    kl = points[-1]["kl"]["mean"]
    end = f"optimality {optimality:.3f}, kl {kl:.2f}, {seconds:.0f} s"
    print(f"seed {seed}, {updates} updates, kl_coef {kl_coef}: {end}", flush=True)
    run = {"seed": seed, "updates": updates, "kl_coef": kl_coef, "seconds": seconds}
    return {**run, "points": points}


def over_seeds(runs, name):
    """[{point, mean, least, greatest}]: a metric over the seeds, at each measured point."""
    rows = []
    for points in zip(*(run["points"] for run in runs), strict=True):
        values = [point[name]["mean"] for point in points]
        row = {"point": points[0], "mean": sum(values) / len(values)}
        row |= {"least": min(values), "greatest": max(values)}
        rows.append(row)
    return rows


def draw_exact(runs, args, path):
    """Optimality against optimizer steps, a line for each length of run, beside trlX's."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    # The first panel shows the beginning, as far as trlX went.
    for axis, limit in zip(panels, (160, None), strict=True):
        for colour, updates in zip(COLOURS, args.lengths, strict=False):
            rows = over_seeds([run for run in runs if run["updates"] == updates], "optimality")
            steps = [row["point"]["optimizer_steps"] for row in rows]
            least = [row["least"] for row in rows]
            greatest = [row["greatest"] for row in rows]
            walks = WALKS_PER_UPDATE * updates
            label = f"run of {steps[-1]} optimizer steps, {walks:,} walks"
            style = {"color": colour, "marker": "o", "markersize": 3, "label": label}
            axis.plot(steps, [row["mean"] for row in rows], **style)
            axis.fill_between(steps, least, greatest, color=colour, alpha=0.15)
        axis.plot(list(TRLX), list(TRLX.values()), "--", color="#444444", label="trlX, 3 seeds")
        axis.set(xlabel="optimizer steps", xlim=(0, limit), ylim=(0.2, 1.01))
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("optimality of sampled walks")
    panels[1].legend(loc="lower right", frameon=False)
    band = f"mean of {len(args.seeds)} seeds, band from least to greatest"
    figure.suptitle(f"PPO with the exact reward: {band}")
    figure.savefig(path, dpi=150)


def draw_learned(runs, args, path):
    """Optimality against the KL, a line for each run."""
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axis = figure.subplots()
    for colour, kl_coef in zip(COLOURS, args.kl_coefs, strict=False):
        label = f"kl_coef {kl_coef:g}"
        for run in runs:
            if run["kl_coef"] != kl_coef:
                continue
            kl = [point["kl"]["mean"] for point in run["points"]]
            optimality = [point["optimality"]["mean"] for point in run["points"]]
            style = {"color": colour, "marker": "o", "markersize": 3, "alpha": 0.7}
            axis.plot(kl, optimality, label=label, **style)
            label = None  # The legend names each coefficient once.
    axis.set_xlabel("KL to the SFT model, nats a walk")
    axis.set_ylabel("optimality of sampled walks")
    axis.set_ylim(0.2, 1.01)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", frameon=False)
    axis.set_title(f"PPO against a learned reward model, {len(args.seeds)} seeds each")
    figure.savefig(path, dpi=150)


def train_all(args):
    """The result of one call: a run for each seed and setting."""
    settings = [(updates, 0.0) for updates in args.lengths]
    if args.experiment == "learned":
        settings = [(args.learned_updates, kl_coef) for kl_coef in args.kl_coefs]
    runs = []
    for updates, kl_coef in settings:
        for seed in args.seeds:
            runs.append(train(args, seed, updates, kl_coef))
    return {"args": asdict(args), "argv": sys.argv, **environment(), "runs": runs}


def merge_results(args):
    """The results of earlier calls as one; seeds, lengths and kl_coefs become those of its runs."""
    parts = [json.loads(Path(path).read_text()) for path in args.merge]
    runs = []
    for part in parts:
        runs += part.pop("runs")
    args.seeds = tuple(sorted({run["seed"] for run in runs}))
    args.lengths = tuple(sorted({run["updates"] for run in runs}))
    args.kl_coefs = tuple(sorted({run["kl_coef"] for run in runs}))
    return {"parts": parts, "runs": runs}


def print_table(runs):
    """The last point of each setting, over its seeds."""
    head = f"{'updates':>8}{'kl_coef':>9}{'steps':>7}{'walks':>8}"
    print(f"\n{head}{'mean':>8}{'least':>8}{'kl':>7}")
    settings = {(run["updates"], run["kl_coef"]): [] for run in runs}
    for run in runs:
        settings[run["updates"], run["kl_coef"]].append(run)
    for (updates, kl_coef), chosen in settings.items():
        optimality = over_seeds(chosen, "optimality")[-1]
        kl = over_seeds(chosen, "kl")[-1]
        point = optimality["point"]
        line = f"{updates:>8}{kl_coef:>9g}{point['optimizer_steps']:>7}{point['rollouts']:>8}"
        print(f"{line}{optimality['mean']:>8.3f}{optimality['least']:>8.3f}{kl['mean']:>7.2f}")


def main(args):
    folder = Path(args.output)
    if folder.exists():
        raise UserError(f"--output {args.output}: exists already; name another folder or remove it")
    needed = [args.sft]
    if args.experiment == "learned":
        needed.append(args.reward_model)
    for path in needed:
        if not args.merge and not Path(path).exists():
            raise UserError(f"{path}: no such folder; run `bash demo.sh` first, or name another")
    result = merge_results(args) if args.merge else train_all(args)
    runs = result["runs"]
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    draw = draw_exact if args.experiment == "exact" else draw_learned
    draw(runs, args, folder / "curves.png")
    print_table(runs)
    print(f"\nresult        {folder / 'result.json'}")
    print(f"curves        {folder / 'curves.png'}")


if __name__ == "__main__":
    launch(main, tyro.cli(Args, use_underscores=True))
