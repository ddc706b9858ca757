"""Learning curves of any run folders as one picture: a panel for each metric, a line for each run.

    python tools/curves.py runs/ppo_rlhf__1__1700000000
    python tools/curves.py runs/ppo_rlhf__* --mean --keys objective/scores 'monitor/*' objective/kl
    python tools/curves.py runs/a runs/b --labels "kl 0.05" "kl 0" --x episode --output kl.png

Runs of different scripts get panels of their own. Values are drawn as they were logged, without
smoothing; what was measured before the first step stands at 0. With --mean, runs that differ in
their seed alone (or, with --labels, runs of equal label) become one line, the mean over runs,
inside a band from their smallest to their largest value, at the steps that all of them have logged.
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

# The scripts are files in the root and not a package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import UserError, launch

# What is drawn without --keys. The keys of one entry share a panel; a pattern that stands alone
# gives a panel to every key that it matches.
DEFAULT_KEYS = {
    "sft": [("train/sft/loss", "eval/sft/loss")],
    "reward_model": [
        ("train/rm/loss", "eval/rm/loss"),
        ("train/rm/accuracy", "eval/rm/accuracy"),
    ],
    "ppo_rlhf": [
        ("objective/scores",),
        ("monitor/*",),
        ("objective/kl",),
        ("val/sequence_lengths",),
    ],
    "grpo_rlhf": [
        ("objective/scores", "eval/score"),
        ("monitor/*",),
        ("val/sequence_lengths",),
        ("train/flat_groups",),
    ],
    "dpo": [
        ("train/loss", "eval/loss"),
        ("train/rewards/accuracies", "eval/rewards/accuracies"),
        ("train/logps/chosen", "train/logps/rejected"),
    ],
    "ilql_rlhf": [("eval/*",), ("loss/q", "loss/v"), ("val/q", "val/v")],
}
# {key: (title, what the vertical axis shows, with its unit)}. Any other key is its own title.
TITLES = {
    "train/sft/loss": ("loss", "nats per token"),
    "eval/sft/loss": ("held-out loss", "nats per token"),
    "train/rm/loss": ("loss", "nats per pair"),
    "eval/rm/loss": ("held-out loss", "nats per pair"),
    "train/rm/accuracy": ("accuracy", "fraction of pairs"),
    "eval/rm/accuracy": ("held-out accuracy", "fraction of pairs"),
    "train/loss": ("loss", "mean per pair"),
    "eval/loss": ("held-out loss", "mean per pair"),
    "train/rewards/accuracies": ("accuracy", "fraction of pairs"),
    "eval/rewards/accuracies": ("held-out accuracy", "fraction of pairs"),
    "train/logps/chosen": ("log-probability of responses", "nats per response"),
    "train/flat_groups": ("groups of equal scores", "fraction of groups"),
    "eval/score": ("held-out score", "mean score of a response"),
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
    "loss/q": ("losses of Q and V", "mean per action"),
    "lr": ("learning rate", "learning rate"),
}
# What a step is; of any other script it is an optimizer step.
X_LABELS = {"ppo_rlhf": "update", "grpo_rlhf": "update"}
# Colours that colour-blind people can tell apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#444444"]
# Flags in which the runs of one line may differ.
IGNORED = ("seed", "output_dir", "resume", "track", "save_every", "timeout_minutes")


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[str, ...]]
    """run folders, each with a metrics.jsonl"""
    keys: tuple[str, ...] = ()
    """metrics to draw, a panel each, or patterns such as monitor/*; none: what is usual for each
    script"""
    labels: tuple[str, ...] = ()
    """names of the runs, in their order; none: the folders' names"""
    x: Literal["step", "episode"] = "step"
    """the horizontal axis; runs of a script that logs no episode are drawn over their steps"""
    mean: bool = False
    """draw runs that differ in their seed alone as their mean, with a band from the smallest to the
    largest"""
    output: str = "curves.png"
    """a picture (.png, .pdf or .svg), which must not exist yet"""


@dataclass
class Run:
    label: str
    script: str
    lines: list
    """one dict for each line of metrics.jsonl"""
    args: dict = field(default_factory=dict)

    def metric_names(self):
        """Every name that was logged, in order of appearance."""
        return list(dict.fromkeys(name for line in self.lines for name in line))

    def curve(self, key, x):
        """{x: value} of the lines that have the key."""
        curve = {}
        for line in self.lines:
            # The line before the first step was logged before any episode.
            place = 0 if line["step"] == 0 else line.get(x)
            if place is not None and isinstance(line.get(key), int | float):
                curve[place] = line[key]
        return curve


def load_run(folder, label=None):
    """The run in a folder.

    Its script is the one that args.json names, or else the beginning of the folder's name.
    """
    folder = Path(folder)
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder}: not a run folder: there is no metrics.jsonl")
    lines = []
    for number, text in enumerate(path.read_text().splitlines(True), start=1):
        if not text.endswith("\n"):
            # A run that is being written may end in half a line.
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {number} is not JSON") from error
        if not isinstance(line, dict) or "step" not in line:
            raise UserError(f"{path}: line {number} has no step")
        lines.append(line)
    if not lines:
        raise UserError(f"{path}: no metrics yet")

    record = {}
    args_path = folder / "args.json"
    if args_path.is_file():
        record = json.loads(args_path.read_text())
    name = folder.resolve().name
    script = Path(record.get("script", name.split("__")[0])).stem
    return Run(label or name, script, lines, record.get("args", {}))


def group_runs(runs, by_label):
    """Lists of runs to be drawn as one line, all of one script.

    They have an equal label, or else equal arguments but for the seed.
    """
    groups = {}
    for run in runs:
        args = {name: value for name, value in run.args.items() if name not in IGNORED}
        identity = run.label
        if args and not by_label:
            identity = json.dumps(args, sort_keys=True)
        groups.setdefault((run.script, identity), []).append(run)
    return list(groups.values())


def logged_metrics(runs):
    """Every name that any of the runs has logged, in order of appearance."""
    return list(dict.fromkeys(name for run in runs for name in run.metric_names()))


def script_panels(runs, script, patterns):
    """[keys], one for each panel of a script's runs: the patterns, or else its usual metrics."""
    metrics = logged_metrics([run for run in runs if run.script == script])
    metrics = [name for name in metrics if name not in ("step", "episode", "epoch")]
    entries = [(pattern,) for pattern in patterns]
    if not entries:
        # A script that is not known here gets a panel for everything.
        entries = DEFAULT_KEYS.get(script, [("*",)])
    panels = []
    for entry in entries:
        matches = []
        for pattern in entry:
            matches += fnmatch.filter(metrics, pattern)
        if len(entry) == 1:
            panels += [(key,) for key in matches]
        elif matches:
            panels.append(tuple(matches))
    return panels


def choose_panels(runs, patterns):
    """[(script, keys)], one for each panel."""
    panels = []
    for script in dict.fromkeys(run.script for run in runs):
        panels += [(script, keys) for keys in script_panels(runs, script, patterns)]
    for pattern in patterns:
        if not any(fnmatch.filter(keys, pattern) for _, keys in panels):
            has = ", ".join(logged_metrics(runs))
            raise UserError(f"--keys {pattern}: none of the runs has it; they have {has}")
    if not panels:
        raise UserError("none of the runs has a usual metric: name some with --keys")
    return list(dict.fromkeys(panels))


def merge(curves):
    """{x: (mean, lowest, highest)} over curves {x: value}, at each x that all of them have."""
    merged = {}
    for x in sorted(set.intersection(*(set(curve) for curve in curves))):
        values = [curve[x] for curve in curves]
        merged[x] = (sum(values) / len(values), min(values), max(values))
    return merged


def axis_labels(key):
    """(title, what the vertical axis shows) of a panel whose first metric is `key`."""
    name = key.split("/")[-1]
    if key.startswith("monitor/"):
        return f"{name}, watched but not trained on", "mean of a response"
    if key.startswith("eval/score@beta="):
        return f"score at beta {name.partition('=')[2]}", "mean score of a sample"
    return TITLES.get(key, (key, name))


def parts_of(keys):
    """What tells the metrics of one panel apart, such as train and eval, or q and v."""
    first = [key.split("/")[0] for key in keys]
    last = [key.split("/")[-1] for key in keys]
    return first if len(set(first)) == len(keys) else last


def draw_line(axes, group, key, x, **style):
    """The curve of one metric of a group of runs, with a band if there are several."""
    curves = [run.curve(key, x) for run in group]
    curves = [curve for curve in curves if curve]
    if not curves:
        return
    merged = merge(curves)
    if not merged:
        return
    xs = list(merged)
    means, lows, highs = zip(*merged.values(), strict=True)
    if len(xs) == 1:
        style["marker"] = "o"
    axes.plot(xs, means, markersize=5, **style)
    if len(curves) > 1:
        axes.fill_between(xs, lows, highs, color=style["color"], alpha=0.18, lw=0)


def draw_panel(axes, groups, keys, x, colours, with_legend):
    """One panel: a line for each group of runs and each key; later keys are dotted."""
    script = groups[0][0].script
    runs = [run for group in groups for run in group]
    if x not in logged_metrics(runs):
        x = "step"
    for group in groups:
        label = group[0].label
        colour = colours[label]
        if len(group) > 1:
            label += f", {len(group)} runs"
        for i, (key, part) in enumerate(zip(keys, parts_of(keys), strict=True)):
            style = {"color": colour, "label": label}
            if len(keys) > 1:
                style["label"] = f"{label}, {part}"
            if i > 0:
                style |= {"linestyle": ":", "marker": "o"}
            draw_line(axes, group, key, x, **style)
    title, unit = axis_labels(keys[0])
    axes.set_title(f"{script}: {title}", fontsize=11)
    axes.set_xlabel("episodes" if x == "episode" else X_LABELS.get(script, "optimizer step"))
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if with_legend:
        axes.legend(frameon=False, fontsize=8)


def build_figure(runs, keys=(), x="step", mean=False, by_label=False):
    """The picture of some runs (from `load_run`), a matplotlib figure with an axes for each panel.

    keys, x, mean: as the flags. by_label: with mean, join the runs of equal label.
    """
    panels = choose_panels(runs, keys)
    groups = group_runs(runs, by_label) if mean else [[run] for run in runs]
    labels = list(dict.fromkeys(group[0].label for group in groups))
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    # Few places of the grid stay empty.
    num_columns = {4: 2, 7: 4, 8: 4}.get(len(panels), min(len(panels), 3))
    num_rows = math.ceil(len(panels) / num_columns)
    size = (4.6 * num_columns, 3.4 * num_rows)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    scripts_with_legend = set()
    for number, (script, panel_keys) in enumerate(panels, start=1):
        axes = figure.add_subplot(num_rows, num_columns, number)
        drawn = [group for group in groups if group[0].script == script]
        with_legend = len(panel_keys) > 1 or script not in scripts_with_legend
        draw_panel(axes, drawn, panel_keys, x, colours, with_legend)
        scripts_with_legend.add(script)
    return figure


def main(args):
    output = Path(args.output)
    if not args.runs:
        raise UserError("name at least one run folder")
    if args.labels and len(args.labels) != len(args.runs):
        counts = f"{len(args.labels)} names for {len(args.runs)} runs"
        raise UserError(f"--labels: {counts}; give one for each")
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
