"""Online against offline: SFT, best of n, ILQL at several betas and PPO, as a table and a plot.

    python tools/comparison.py --sft runs/sentiment/sft.json \\
        --best_of_n runs/sentiment/best_of_n.json --ilql runs/sentiment/ilql_beta_*.json \\
        --ppo runs/sentiment/ppo.json --ppo_run runs/sentiment/ppo --judge reward_model_b \\
        --reward_model_seconds 1800 --ilql_seconds 2600 --output runs/sentiment/comparison

Reads what evaluate.py wrote for each policy, on the same prompts, at the same temperature and
against the same reference, and refuses to compare anything else. The columns:
    judge       mean score by a reward model that no policy was trained on or selected by
    gain        that, less the SFT policy's, in standard deviations of the SFT policy's scores over
                responses
    kl          nats a response to the SFT policy; of best of n its upper bound log n - (n-1) / n
    perplexity  of the responses under the SFT policy; unknown for best of n
    tokens      sampled in order to train, or for best of n to answer once: n times its mean
                response length
    seconds     of training after SFT: PPO's phases, as it logged them, and what is given for the
                others. Best of n and PPO need a reward model first. ILQL needs the ratings alone,
                or also what rated_samples.py added to them; then --ilql_tokens are the tokens of
                these samples, and --ilql_seconds include the reward model and the sampling
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.figure import Figure

# The scripts are files in the root and not a package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import UserError, launch

# Flags of evaluate.py that must be equal in evaluations that are compared.
SAME = ("reward_models", "dataset", "temperature", "response_length", "seed")
# The lines of the plot: the beginning of a row's name, and its colour.
COLOURS = {"SFT": "#444444", "best of": "#E69F00", "ILQL": "#009E73", "PPO": "#D55E00"}


@dataclass
class Args:
    sft: str
    """evaluation of the SFT policy against itself"""
    best_of_n: str
    """evaluation of the SFT policy with --best_of_n, of enough samples that there are as many
    prompts as in the others"""
    ilql: tuple[str, ...]
    """evaluations of ILQL's policy, one for each beta"""
    ppo: str
    """evaluation of PPO's policy"""
    ppo_run: str
    """PPO's run folder: its metrics hold the tokens sampled and the seconds"""
    judge: str
    """name of the score that judges"""
    reward_model_seconds: float
    """training time of the reward model that PPO and best of n use"""
    ilql_seconds: float
    """training time of ILQL, and of all that its data needs"""
    output: str
    """a folder for comparison.json and comparison.png, which must not exist yet"""
    ilql_tokens: float = 0.0
    """tokens sampled for ILQL's data"""


def num_prompts(evaluation):
    """How many prompts an evaluation sampled from, at most."""
    args = evaluation["args"]
    return args["num_samples"] // max(args["best_of_n"], default=1)


def read_evaluation(path, sft=None):
    """An evaluation; a UserError if it cannot be compared with that of the SFT policy."""
    evaluation = json.loads(Path(path).read_text())
    if sft is None:
        return evaluation
    for name in SAME:
        value = evaluation["args"][name]
        expected = sft["args"][name]
        if value != expected:
            raise UserError(f"{path}: {name} is {value!r}, in the SFT evaluation {expected!r}")
    if num_prompts(evaluation) != num_prompts(sft):
        counts = f"{num_prompts(evaluation)} prompts, the SFT evaluation of {num_prompts(sft)}"
        raise UserError(f"{path}: it is of {counts}")
    return evaluation


def ppo_costs(folder):
    """(tokens sampled, seconds) of a PPO run."""
    batch_size = json.loads(Path(folder, "args.json").read_text())["args"]["batch_size"]
    tokens = 0.0
    seconds = 0.0
    for text in Path(folder, "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        tokens += batch_size * line["val/sequence_lengths"]
        seconds += sum(line[f"time/{phase}"] for phase in ("rollout", "score", "update"))
    return tokens, seconds


def policy_row(name, evaluation, key, tokens, seconds):
    """A row of the table, still without its gain; key: the judge's score."""
    metrics = evaluation["metrics"]
    return {
        "name": name,
        "judge": metrics[key],
        "kl": metrics["kl"],
        "perplexity": metrics["ref_perplexity"],
        "tokens": tokens,
        "seconds": seconds,
    }


def best_of_n_rows(evaluation, key, seconds):
    """A row for each n, still without its gain."""
    rows = []
    for n, best in evaluation["best_of_n"].items():
        bound = best["kl_bound"]
        row = {
            "name": f"best of {n}",
            "judge": best[key],
            "kl": {"mean": bound, "low": bound, "high": bound},
            "perplexity": None,
            "tokens": int(n) * evaluation["metrics"]["length"]["mean"],
            "seconds": seconds,
        }
        rows.append(row)
    return rows


def build_rows(args):
    """One dict for each row of the table; its estimates are {mean, low, high} or None."""
    sft = read_evaluation(args.sft)
    key = f"score/{args.judge}"
    if key not in sft["metrics"]:
        raise UserError(f"--judge {args.judge}: {args.sft} has {', '.join(sft['metrics'])}")
    rows = [policy_row("SFT", sft, key, tokens=0, seconds=0)]

    best = read_evaluation(args.best_of_n, sft)
    rows += best_of_n_rows(best, key, args.reward_model_seconds)

    steered = [read_evaluation(path, sft) for path in args.ilql]
    for evaluation in sorted(steered, key=lambda evaluation: evaluation["args"]["beta"]):
        name = f"ILQL, beta {evaluation['args']['beta']:g}"
        rows.append(policy_row(name, evaluation, key, args.ilql_tokens, args.ilql_seconds))

    tokens, seconds = ppo_costs(args.ppo_run)
    seconds += args.reward_model_seconds
    rows.append(policy_row("PPO", read_evaluation(args.ppo, sft), key, tokens, seconds))

    start = sft["metrics"][key]
    for row in rows:
        row["gain"] = (row["judge"]["mean"] - start["mean"]) / start["std"]
    return rows


def table(rows):
    """The rows as aligned lines, with the judge's 95% interval."""
    head = f"{'':<14}{'judge':>8}{'low':>8}{'high':>8}{'gain':>7}{'kl':>7}"
    lines = [f"{head}{'perplexity':>12}{'tokens':>9}{'seconds':>9}"]
    for row in rows:
        judge = row["judge"]
        perplexity = math.nan
        if row["perplexity"] is not None:
            perplexity = row["perplexity"]["mean"]
        line = f"{row['name']:<14}{judge['mean']:>8.2f}{judge['low']:>8.2f}{judge['high']:>8.2f}"
        line += f"{row['gain']:>7.2f}{row['kl']['mean']:>7.2f}{perplexity:>12.1f}"
        line += f"{row['tokens']:>9.0f}{row['seconds']:>9.0f}"
        lines.append(line)
    return "\n".join(lines)


def draw_method(axis, rows, label, colour):
    """The judge's score against the KL, of the rows of one method."""
    kl = [row["kl"]["mean"] for row in rows]
    judge = [row["judge"]["mean"] for row in rows]
    below = [row["judge"]["mean"] - row["judge"]["low"] for row in rows]
    above = [row["judge"]["high"] - row["judge"]["mean"] for row in rows]
    style = {"color": colour, "marker": "o", "markersize": 4, "capsize": 2, "lw": 1.2}
    axis.errorbar(kl, judge, yerr=[below, above], label=label, **style)
    for i, (row, point) in enumerate(zip(rows, zip(kl, judge, strict=True), strict=True)):
        text = row["name"].removeprefix("ILQL, ")
        # Labels stand above and below their points in turn.
        offset = (5, 5) if i % 2 else (5, -11)
        style = {"textcoords": "offset points", "fontsize": 8, "color": colour}
        axis.annotate(text, point, xytext=offset, **style)


def draw(rows, path):
    """Write the plot of the rows: the judge's score against the KL, a line for each method."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axis = figure.subplots()
    for label, colour in COLOURS.items():
        chosen = [row for row in rows if row["name"].startswith(label)]
        if chosen:
            draw_method(axis, chosen, label, colour)
    axis.set_xlabel("KL to the SFT policy, nats a response")
    axis.set_ylabel("judge's mean score, with 95% intervals")
    axis.set_xscale("symlog", linthresh=1)
    largest = max(row["kl"]["mean"] for row in rows)
    axis.set_xlim(-0.1, 1.5 * largest + 1)
    ticks = [x for x in (0, 0.5, 1, 2, 5, 10, 20, 50) if x <= axis.get_xlim()[1]]
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)


def main(args):
    folder = Path(args.output)
    if folder.exists():
        raise UserError(f"--output {args.output}: exists already; name another folder or remove it")
    rows = build_rows(args)
    folder.mkdir(parents=True)
    result = {"judge": args.judge, "rows": rows}
    (folder / "comparison.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, folder / "comparison.png")
    print(table(rows))
    print(f"\ntable         {folder / 'comparison.json'}")
    print(f"plot          {folder / 'comparison.png'}")


if __name__ == "__main__":
    launch(main, tyro.cli(Args, use_underscores=True))
