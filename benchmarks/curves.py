"""Learning curves of any run folders as one picture: one panel a metric, one coloured line a run.

    python benchmarks/curves.py runs/ppo_rlhf__1__1700000000
    python benchmarks/curves.py runs/ppo_rlhf__* --mean --keys objective/scores 'monitor/*' objective/kl
    python benchmarks/curves.py runs/a runs/b --labels "kl 0.05" "kl 0" --x episode --output kl.png

Runs of different scripts get panels of their own. Values are drawn as they were logged, without smoothing. With --mean,
runs that differ in their seed alone (or, with --labels, runs of equal label) become one line, the mean over runs, inside
a band from their smallest to their largest value, at the steps that all of them have logged.
"""

import fnmatch
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts are files in the root, not a package

from utils import UserError, launch

# What is drawn without --keys; the keys of one entry share a panel, and a pattern gives a panel to every key it matches.
DEFAULT_KEYS = {
    "sft": [("train/sft/loss", "eval/sft/loss")],
    "reward_model": [("train/rm/loss", "eval/rm/loss"), ("train/rm/accuracy", "eval/rm/accuracy")],
    "ppo_rlhf": [("objective/scores",), ("monitor/*",), ("objective/kl",), ("val/sequence_lengths",)],
    "ilql_rlhf": [("eval/*",), ("loss/total",), ("val/q", "val/v")],
}
# {key: (title, what the y axis shows, with its unit)}; any other key is its own title.
TITLES = {
    "train/sft/loss": ("loss", "nats per token"),
    "eval/sft/loss": ("held-out loss", "nats per token"),
    "train/rm/loss": ("loss", "nats per pair"),
    "eval/rm/loss": ("held-out loss", "nats per pair"),
    "train/rm/accuracy": ("accuracy", "fraction of pairs"),
    "eval/rm/accuracy": ("held-out accuracy", "fraction of pairs"),
    "objective/scores": ("score", "mean score of a response"),
    "objective/rlhf_reward": ("score minus KL penalty", "mean of a response"),
    "objective/kl": ("KL to the reference", "nats per response"),
    "objective/entropy": ("entropy", "nats per response"),
    "policy/entropy_avg": ("entropy", "nats per token"),
    "policy/clipfrac_avg": ("clipped policy terms", "fraction of tokens"),
    "val/clipfrac_avg": ("clipped value terms", "fraction of tokens"),
    "val/sequence_lengths": ("response length", "tokens"),
    "val/has_eos": ("ended with EOS", "fraction of responses"),
    "val/explained_var": ("variance explained by the critic", "fraction"),
    "val/q": ("Q and V", "value"),
    "lr": ("learning rate", "learning rate"),
}
X_LABELS = {"ppo_rlhf": "update"}  # what a step is; else an optimizer step
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#444444"]  # colour-blind safe


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """run folders, each with a metrics.jsonl"""
    keys: tuple[str, ...] = ()
    """metrics to draw, a panel each, or patterns such as monitor/*; none: what is usual for each script"""
    labels: tuple[str, ...] = ()
    """names of the runs, in their order; none: the folders' names"""
    x: Literal["step", "episode"] = "step"
    """the horizontal axis; runs of a script that logs no episode are drawn over their steps"""
    mean: bool = False
    """draw runs that differ in their seed alone as their mean, with a band from the smallest to the largest"""
    output: str = "curves.png"
    """a picture (.png, .pdf or .svg), which must not exist yet"""


@dataclass
class Run:
    label: str
    script: str
    lines: list
    """one dict a line of metrics.jsonl"""
    args: dict = field(default_factory=dict)

    def metric_names(self):
        """Every metric that was logged, in order of appearance."""
        return list(dict.fromkeys(key for line in self.lines for key in line))

    def curve(self, key, x):
        """{x: value} of the lines that have the key."""
        return {line[x]: line[key] for line in self.lines if isinstance(line.get(key), int | float)}


def load_run(folder, label=None):
    """The run in a folder. Its script is what args.json says was started, else the beginning of the folder's name."""
    folder = Path(folder)
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder}: not a run folder: there is no metrics.jsonl")
    lines = []
    for number, text in enumerate(path.read_text().splitlines(True), start=1):
        if text.endswith("\n"):  # a run that is being written may end in half a line
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: line {number} is not JSON") from error
            if not isinstance(lines[-1], dict) or "step" not in lines[-1]:
                raise UserError(f"{path}: line {number} has no step")
    if not lines:
        raise UserError(f"{path}: no metrics yet")
    record = json.loads((folder / "args.json").read_text()) if (folder / "args.json").is_file() else {}
    name = folder.resolve().name
    script = Path(record["argv"][0]).stem if record.get("argv") else name.split("__")[0]
    return Run(label or name, script, lines, record.get("args", {}))


def group_runs(runs, by_label):
    """Lists of runs to be drawn as one line: of the same script, and of equal label or of equal arguments but the seed."""
    groups = {}
    for run in runs:
        ignored = ("seed", "output_dir", "resume", "track", "save_every")
        args = {name: value for name, value in run.args.items() if name not in ignored}
        identity = run.label if by_label or not args else json.dumps(args, sort_keys=True)
        groups.setdefault((run.script, identity), []).append(run)
    return list(groups.values())


def choose_panels(runs, patterns):
    """[(script, keys)], one for each panel. Without patterns, each script's own default, or all that it logs."""
    panels = []
    for script in dict.fromkeys(run.script for run in runs):
        logged = list(dict.fromkeys(key for run in runs if run.script == script for key in run.metric_names()))
        logged = [key for key in logged if key not in ("step", "episode", "epoch")]
        wanted = [(pattern,) for pattern in patterns] or DEFAULT_KEYS.get(script, [(key,) for key in logged])
        for entry in wanted:
            matches = [[key for key in logged if fnmatch.fnmatchcase(key, pattern)] for pattern in entry]
            if len(entry) == 1:
                panels += [(script, (key,)) for key in matches[0]]
            elif any(matches):
                panels.append((script, tuple(key for keys in matches for key in keys)))
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(key, pattern) for _, keys in panels for key in keys):
            logged = dict.fromkeys(key for run in runs for key in run.metric_names())
            raise UserError(f"--keys {pattern}: none of the runs has it; they have {', '.join(logged)}")
    if not panels:
        raise UserError("none of the runs has a usual metric: name some with --keys")
    return list(dict.fromkeys(panels))


def merge(curves):
    """x, mean, low, high over curves {x: value}, at the xs that all of them have."""
    xs = sorted(set.intersection(*(set(curve) for curve in curves)))
    columns = [[curve[x] for curve in curves] for x in xs]
    return xs, [sum(c) / len(c) for c in columns], [min(c) for c in columns], [max(c) for c in columns]


def draw_panel(axes, groups, keys, x, colours, with_legend):
    """One panel: a line for each group of runs and each key; the second key of a panel is dotted with markers."""
    script = groups[0][0].script
    x = x if all(x in line for group in groups for run in group for line in run.lines) else "step"
    first, last = [key.split("/")[0] for key in keys], [key.split("/")[-1] for key in keys]
    parts = first if len(set(first)) == len(keys) else last  # train and eval, or q and v
    for group in groups:
        label = group[0].label + (f", {len(group)} runs" if len(group) > 1 else "")
        for i, key in enumerate(keys):
            curves = [curve for curve in (run.curve(key, x) for run in group) if curve]
            xs, means, lows, highs = merge(curves) if curves else ([], [], [], [])
            if not xs:
                continue
            style = {"ls": "-" if i == 0 else ":", "marker": "o" if i > 0 or len(xs) == 1 else None, "ms": 5}
            name = f"{label}, {parts[i]}" if len(keys) > 1 else label
            axes.plot(xs, means, color=colours[group[0].label], label=name, **style)
            if len(curves) > 1:
                axes.fill_between(xs, lows, highs, color=colours[group[0].label], alpha=0.18, lw=0)
    title, unit = TITLES.get(keys[0], (keys[0], keys[0].split("/")[-1]))
    if keys[0].startswith("monitor/"):
        title, unit = f"{unit}, watched but not trained on", "mean of a response"
    axes.set_title(f"{script}: {title}", fontsize=11)
    axes.set_xlabel("episodes" if x == "episode" else X_LABELS.get(script, "optimizer step"))
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if with_legend:
        axes.legend(frameon=False, fontsize=8)


def build_figure(runs, keys=(), x="step", mean=False, by_label=False):
    """The picture of some runs (from `load_run`), as a matplotlib figure with one axes object for each panel."""
    panels = choose_panels(runs, keys)
    groups = group_runs(runs, by_label) if mean else [[run] for run in runs]
    names = dict.fromkeys(group[0].label for group in groups)
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    num_columns = {4: 2, 7: 4, 8: 4}.get(len(panels), min(len(panels), 3))  # few empty places
    num_rows = math.ceil(len(panels) / num_columns)
    figure = Figure(figsize=(4.6 * num_columns, 3.4 * num_rows), dpi=150, layout="constrained")
    seen = set()
    for i, (script, panel_keys) in enumerate(panels, start=1):
        axes = figure.add_subplot(num_rows, num_columns, i)
        drawn = [group for group in groups if group[0].script == script]
        draw_panel(axes, drawn, panel_keys, x, colours, with_legend=len(panel_keys) > 1 or script not in seen)
        seen.add(script)
    return figure


def main(args):
    output = Path(args.output)
    if not args.runs:
        raise UserError("name at least one run folder")
    if args.labels and len(args.labels) != len(args.runs):
        raise UserError(f"--labels: {len(args.labels)} names for {len(args.runs)} runs; give one for each")
    if output.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"--output {output}: must end in .png, .pdf or .svg")
    if output.exists():
        raise UserError(f"--output {output}: exists already; name another file or remove it")
    labels = args.labels or [None] * len(args.runs)
    runs = [load_run(folder, label) for folder, label in zip(args.runs, labels, strict=True)]
    figure = build_figure(runs, args.keys, args.x, args.mean, by_label=bool(args.labels))
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    print(f"{len(figure.axes)} panels of {len(runs)} runs written to {output}")


if __name__ == "__main__":
    launch(main, tyro.cli(Args, use_underscores=True))
