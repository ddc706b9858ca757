"""How the cost of a PPO update grows with the batch, the response, the vocabulary and the model.

    python benchmarks/speed/growth.py --output growth.json    # Draws growth.png beside it.
    python benchmarks/speed/growth.py --input growth.json     # Draws it again.

Every point is a comparison of compare.py, ours against the floor, in which one size differs from
those of the base. A line is the median over rounds of a phase's seconds, shaded from the least to
the most; dashed is its floor. Both axes are logarithmic. A line is to be held against its own floor
rather than against a slope, because the products do not grow in proportion to every axis: prompts
keep their length, and the head has no layers.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).resolve().parents[2]))  # The scripts are files in the root.

import compare
from shapes import model_config, workload
from utils import UserError, launch

AXES = {  # What each axis shows.
    "batch": "responses of an update",
    "response": "tokens of a response",
    "vocabulary": "ids of the vocabulary",
    "size": "parameters of the policy's layers",
}
COLOURS = {"rollout": "#0072B2", "score": "#009E73", "update": "#D55E00"}


@dataclass
class Args:
    batch: tuple[int, ...] = (8, 16, 32, 64, 128)
    """responses of an update, all in one forward"""
    response: tuple[int, ...] = (16, 48, 112, 240)
    """tokens of every response"""
    vocabulary: tuple[int, ...] = (512, 2048, 8192, 32768)
    """ids"""
    size: tuple[str, ...] = ("2x128", "4x256", "6x320", "8x512")
    """layers x width of a GPT-2; policy and critic alike"""
    base_batch: int = 32
    """the batch where something else varies; likewise the next three"""
    base_response: int = 48
    """tokens"""
    base_vocabulary: int = 8192
    """ids"""
    base_size: str = "4x256"
    """layers x width"""
    compile: bool = True
    """with --compile"""
    dtype: Literal["fp32", "bf16"] = "bf16" if torch.cuda.is_available() else "fp32"
    """what ours and the floor compute in"""
    rounds: int = 3
    """measured turns of each point"""
    threads: int | None = None
    """CPU threads; none: the processors this process may use"""
    input: str | None = None
    """a file that this command wrote: draw it, measure nothing"""
    output: str | None = None
    """a .json file for the result, which must not exist yet; the picture goes beside it"""


# --------------------------------------------------------------------------------------------------
# Measuring


def base_of(args):
    """The sizes that stay as they are while one of them varies."""
    return {axis: getattr(args, f"base_{axis}") for axis in AXES}


def points_of(args):
    """The base, and the base with one of its sizes replaced, each once."""
    points = [base_of(args)]
    for axis in AXES:
        for value in getattr(args, axis):
            point = points[0] | {axis: value}
            if point not in points:
                points.append(point)
    return points


def work_of(point):
    """The workload of a point: one epoch, one forward for all rows."""
    model = f"gpt2-{point['size']}-v{point['vocabulary']}"
    model_config(model)  # Refuses a name that it does not know.
    batch = point["batch"]
    sizes = {"batch": batch, "micro_batch": batch, "response": point["response"], "epochs": 1}
    return workload("ppo", model, **sizes)


def measure_points(args):
    """Write the record of all points to --output, after each of them; returns it."""
    threads = args.threads or compare.usable_processors()
    record = compare.record_of(args, threads) | {"base": base_of(args), "points": []}
    options = compare.Args(
        peers=False, floor=True, compile=args.compile, dtype=args.dtype, rounds=args.rounds
    )
    began = time.time()

    def say(text):
        print(f"{time.time() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    works = [(point, work_of(point)) for point in points_of(args)]
    with tempfile.TemporaryDirectory(prefix="growth_") as temporary:
        for number, (point, work) in enumerate(works):
            say(", ".join(f"{axis} {value}" for axis, value in point.items()))
            folder = Path(temporary, str(number))
            folder.mkdir()
            record["points"].append(point | compare.measure(work, folder, threads, options, say))
            record["seconds"] = time.time() - began
            compare.write_json(args.output, record)
    return record


# --------------------------------------------------------------------------------------------------
# Showing


def layer_parameters(size):
    """Weights of the linear layers of a GPT-2 of `layers x width`."""
    layers, width = map(int, size.split("x"))
    return 12 * layers * width**2


def line_of(record, axis, name, phase):
    """(x, median, low, high) of one phase along an axis; name: "ours" or "floor"."""
    others = [other for other in AXES if other != axis]
    line = []
    for point in record["points"]:
        if all(point[other] == record["base"][other] for other in others):
            x = layer_parameters(point[axis]) if axis == "size" else point[axis]
            seconds = point["contenders"][name]["seconds"][phase]
            line.append((x, seconds["median"], seconds["low"], seconds["high"]))
    return tuple(zip(*sorted(line), strict=True))


def figure_of(record):
    """One panel for each axis, one line for each phase, its floor dashed in the same colour."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    for panel, (axis, label) in zip(figure.subplots(1, 4, sharey=True), AXES.items(), strict=True):
        for phase, colour in COLOURS.items():
            x, median, low, high = line_of(record, axis, "ours", phase)
            panel.plot(x, median, "o-", color=colour, markersize=4, label=phase)
            panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            x, median, _, _ = line_of(record, axis, "floor", phase)
            panel.plot(x, median, "--", color=colour, label=f"{phase}, floor")
        panel.set(xscale="log", yscale="log", xlabel=label)
        ticks = [f"{value / 1e6:.1f}M" if axis == "size" else str(value) for value in x]
        panel.set_xticks(x, ticks, minor=False)
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("seconds")
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=6, frameon=False)
    base = record["base"]
    figure.suptitle(
        f"An update of {base['batch']} rows of 16 + {base['response']} tokens, one epoch, GPT-2 "
        f"{base['size']}, {base['vocabulary']} ids, {record['args']['dtype']}; one of them varied"
    )
    return figure


def table(record):
    """A line for each point: its sizes, the seconds of its phases, and the ratios to the floor."""
    lines = []
    for point in record["points"]:
        cells = [f"{axis} {point[axis]}" for axis in AXES]
        seconds = point["contenders"]["ours"]["seconds"]
        over_floor = point["ratios"]["ours / floor"]
        for phase in COLOURS:
            median = compare.number(seconds[phase]["median"])
            times = compare.number(over_floor[phase]["median"])
            cells.append(f"{phase} {median} s, {times} floors")
        lines.append("; ".join(cells))
    return "\n".join(lines)


def main(args):
    if (args.input is None) == (args.output is None):
        raise UserError("--input or --output: give one of them")
    if args.input:
        record = json.loads(Path(args.input).read_text())
    else:
        compare.check_counts(args, "rounds")
        compare.check_new(args.output)
        record = measure_points(args)
    print(table(record))
    picture = Path(args.input or args.output).with_suffix(".png")
    figure_of(record).savefig(picture, dpi=110)
    print(f"written to {picture}")


if __name__ == "__main__":
    launch(main, tyro.cli(Args, use_underscores=True))
