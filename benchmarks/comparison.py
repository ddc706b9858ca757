"""Online against offline on one task: SFT, best of n, ILQL at several betas and PPO, as one table and one plot.

    python benchmarks/comparison.py --sft runs/sentiment/sft.json --best_of_n runs/sentiment/best_of_n.json \\
        --ilql runs/sentiment/ilql_beta_*.json --ppo runs/sentiment/ppo.json --ppo_run runs/sentiment/ppo \\
        --judge reward_model_b --reward_model_seconds 1800 --ilql_seconds 2600 --output runs/sentiment/comparison

Reads what evaluate.py wrote for each policy, on the same prompts, at the same temperature and against the same reference,
and refuses to compare anything else. The columns:
    judge        mean score by a reward model that no policy was trained on or selected by
    gain         that, less the SFT policy's, in standard deviations of the SFT policy's scores over responses
    kl           nats a response to the SFT policy; of best-of-n its upper bound log n - (n-1)/n
    perplexity   of the responses under the SFT policy; unknown for best-of-n
    tokens       sampled in order to train, or for best-of-n to answer once, n times its mean response length
    seconds      of training behind SFT: PPO's phases, as it logged them, and what is given for the others; best-of-n and
                 PPO need a reward model first, ILQL the ratings alone, or also what rated_samples.py added to them: then
                 --ilql_tokens are the tokens of these samples, and --ilql_seconds hold reward model and sampling too
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts are files in the root, not a package

from utils import UserError, launch

SAME = ("reward_models", "dataset", "temperature", "response_length", "seed")


@dataclass
class Args:
    sft: str
    """evaluation of the SFT policy against itself"""
    best_of_n: str
    """evaluation of the SFT policy with --best_of_n, of enough samples that the prompts are as many as in the others"""
    ilql: tuple[str, ...]
    """evaluations of ILQL's policy, one for each beta"""
    ppo: str
    """evaluation of PPO's policy"""
    ppo_run: str
    """PPO's run folder: its metrics hold the tokens sampled and the seconds"""
    judge: str
    """name of the score that judges"""
    reward_model_seconds: float
    """training time of the reward model that PPO and best-of-n use"""
    ilql_seconds: float
    """training time of ILQL, and of all that its data needs"""
    output: str
    """a folder for comparison.json and comparison.png, which must not exist yet"""
    ilql_tokens: float = 0.0
    """tokens sampled for ILQL's data"""


def read_evaluation(path, like=None):
    """An evaluation; a UserError if it does not belong beside `like`."""
    result = json.loads(Path(path).read_text())
    for name in SAME if like else ():
        if result["args"][name] != like["args"][name]:
            raise UserError(f"{path}: {name} is {result['args'][name]!r}, in the SFT evaluation {like['args'][name]!r}")
    prompts = [r["args"]["num_samples"] // max(r["args"]["best_of_n"], default=1) for r in (result, like or result)]
    if prompts[0] != prompts[1]:
        raise UserError(f"{path}: it is of {prompts[0]} prompts, the SFT evaluation of {prompts[1]}")
    return result


def ppo_costs(folder):
    """(tokens sampled, seconds) of a PPO run."""
    batch_size = json.loads(Path(folder, "args.json").read_text())["args"]["batch_size"]
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    seconds = sum(line[f"time/{phase}"] for line in lines for phase in ("rollout", "score", "update"))
    return sum(batch_size * line["val/sequence_lengths"] for line in lines), seconds


def rows_of(args):
    """One dict for each row of the table; estimates are {mean, low, high} or None."""
    sft = read_evaluation(args.sft)
    key = f"score/{args.judge}"
    if key not in sft["metrics"]:
        raise UserError(f"--judge {args.judge}: {args.sft} has {', '.join(sft['metrics'])}")
    start, spread = sft["metrics"][key]["mean"], sft["metrics"][key]["std"]

    def row(name, judge, kl, perplexity, tokens, seconds):
        gain = (judge["mean"] - start) / spread
        costs = {"tokens": tokens, "seconds": seconds}
        return {"name": name, "judge": judge, "gain": gain, "kl": kl, "perplexity": perplexity, **costs}

    def policy(name, result, *costs):
        metrics = result["metrics"]
        return row(name, metrics[key], metrics["kl"], metrics["ref_perplexity"], *costs)

    rows = [policy("SFT", sft, 0, 0)]
    many = read_evaluation(args.best_of_n, sft)
    for n, best in many["best_of_n"].items():
        bound = {"mean": best["kl_bound"], "low": best["kl_bound"], "high": best["kl_bound"]}
        tokens = int(n) * many["metrics"]["length"]["mean"]
        rows.append(row(f"best of {n}", best[key], bound, None, tokens, args.reward_model_seconds))
    steered = sorted((read_evaluation(path, sft) for path in args.ilql), key=lambda result: result["args"]["beta"])
    rows += [
        policy(f"ILQL, beta {result['args']['beta']:g}", result, args.ilql_tokens, args.ilql_seconds)
        for result in steered
    ]
    tokens, seconds = ppo_costs(args.ppo_run)
    return [*rows, policy("PPO", read_evaluation(args.ppo, sft), tokens, args.reward_model_seconds + seconds)]


def table(rows):
    lines = [
        f"{'':<14}{'judge':>8}{'low':>8}{'high':>8}{'gain':>7}{'kl':>7}{'perplexity':>12}{'tokens':>9}{'seconds':>9}"
    ]
    for row in rows:
        judge, perplexity = row["judge"], row["perplexity"]["mean"] if row["perplexity"] else float("nan")
        cells = f"{row['name']:<14}{judge['mean']:>8.2f}{judge['low']:>8.2f}{judge['high']:>8.2f}{row['gain']:>7.2f}"
        lines.append(f"{cells}{row['kl']['mean']:>7.2f}{perplexity:>12.1f}{row['tokens']:>9.0f}{row['seconds']:>9.0f}")
    return "\n".join(lines)


def draw(rows, path):
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axis = figure.subplots()
    groups = {"SFT": "#444444", "best of": "#E69F00", "ILQL": "#009E73", "PPO": "#D55E00"}
    for group, colour in groups.items():
        chosen = [row for row in rows if row["name"].startswith(group)]
        if not chosen:
            continue
        kl, judge = [row["kl"]["mean"] for row in chosen], [row["judge"]["mean"] for row in chosen]
        bars = [[abs(row["judge"][end] - row["judge"]["mean"]) for row in chosen] for end in ("low", "high")]
        axis.errorbar(kl, judge, yerr=bars, color=colour, marker="o", markersize=4, capsize=2, lw=1.2, label=group)
        for i, (row, x, y) in enumerate(zip(chosen, kl, judge, strict=True)):  # labels above and below in turn
            style = {"textcoords": "offset points", "fontsize": 8, "color": colour}
            axis.annotate(row["name"].removeprefix("ILQL, "), (x, y), xytext=(5, 5 if i % 2 else -11), **style)
    axis.set(xlabel="KL to the SFT policy, nats a response", ylabel="judge's mean score, with 95% intervals")
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xlim(-0.1, 1.5 * max(row["kl"]["mean"] for row in rows) + 1)
    ticks = [x for x in (0, 0.5, 1, 2, 5, 10, 20, 50) if x <= axis.get_xlim()[1]]
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)


def main(args):
    folder = Path(args.output)
    if folder.exists():
        raise UserError(f"--output {args.output}: exists already; name another folder or remove it")
    rows = rows_of(args)
    folder.mkdir(parents=True)
    (folder / "comparison.json").write_text(json.dumps({"judge": args.judge, "rows": rows}, indent=1) + "\n")
    draw(rows, folder / "comparison.png")
    print(table(rows))
    print(f"\ntable         {folder / 'comparison.json'}\nplot          {folder / 'comparison.png'}")


if __name__ == "__main__":
    launch(main, tyro.cli(Args, use_underscores=True))
