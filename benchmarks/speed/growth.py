"""How the cost of a PPO update grows: batch, response length, vocabulary and model size, one at a time, against the floor.

    python benchmarks/growth.py --output growth.json            # measures, and draws growth.png beside it
    python benchmarks/growth.py --input growth.json             # draws again
    python benchmarks/growth.py --engine eager --batches 16 64 --responses 48 --vocabularies 8192 --sizes 4x256 --output g.json

Every point is a comparison of speed.py, ours and the floor in turn; all but the varied size are those of the base. A
line is the median over rounds of a phase's seconds, shaded from the least to the most; dashed is its floor. Both axes are
logarithmic. What the products cost is not in proportion to every axis (prompts keep their length, the LM head has no
layers): a line is to be held against its own floor, not against a slope. The base is measured at the start and at the
end, and its point has the turns of both; how far they lie apart is printed.
"""

import json
import re
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # the scripts are files in the root, not a package

import speed
from evaluate import write_whole
from shapes import build_world, preset, sized
from utils import UserError, environment, launch

AXES = {  # {name: what its axis shows}
    "batches": "responses of an update",
    "responses": "tokens of a response",
    "vocabularies": "ids of the vocabulary",
    "sizes": "parameters of the policy's layers",
}
COLOURS = {"rollout": "#0072B2", "score": "#009E73", "update": "#D55E00"}  # colour-blind safe


@dataclass
class Args:
    batches: tuple[int, ...] = (8, 16, 32, 64, 128)
    """responses of an update, all in one forward"""
    responses: tuple[int, ...] = (16, 48, 112, 240)
    """tokens of every response"""
    vocabularies: tuple[int, ...] = (512, 2048, 8192, 32768)
    """ids"""
    sizes: tuple[str, ...] = ("2x128", "4x256", "6x320", "8x512")
    """GPT-2, layers x width; policy and critic alike"""
    base_batch: int = 32
    """the batch where something else varies; likewise the next three"""
    base_response: int = 48
    """tokens"""
    base_vocabulary: int = 8192
    """ids"""
    base_size: str = "4x256"
    """layers x width"""
    prompt_length: int = 16
    """tokens of every prompt"""
    num_epochs: int = 1
    """PPO epochs of an update, one step each"""
    engine: Literal["eager", "compiled"] = "compiled"
    """without or with --compile"""
    dtype: Literal["fp32", "bf16"] = "bf16" if torch.cuda.is_available() else "fp32"
    """precision of the update, of sampling and of the floor"""
    repeats: int = 3
    """rounds: measured turns of each point"""
    threads: int | None = None
    """CPU threads; none: the processors this process may use"""
    input: str | None = None
    """a file that this command wrote: draw it, measure nothing"""
    output: str | None = None
    """a JSON file for the result, which must not exist yet; the picture lies beside it"""


def points(args):
    """(the base {batches, responses, vocabularies, sizes}, [the base and the base with one of them varied, each once])."""
    base = {"batches": args.base_batch, "responses": args.base_response}
    base |= {"vocabularies": args.base_vocabulary, "sizes": args.base_size}
    found = [base]
    for axis in AXES:
        for value in getattr(args, axis):
            found += [base | {axis: value}] if base | {axis: value} not in found else []
    return base, found


def layer_parameters(size):
    """Weights of the linear layers of a GPT-2 `layers x width`."""
    layers, width = map(int, size.split("x"))
    return 12 * layers * width**2


def measure(point, args, folder, threads, say):
    """The point with {phase: {median, low, high}} of ours and of the floor, their turns, and what ours held and compiled."""
    name = f"gpt2-{point['sizes']}-v{point['vocabularies']}"
    options = speed.Args(parts=("ppo",), engines=(args.engine, "floor"), repeats=args.repeats, fresh=False)
    batch, sizes = point["batches"], {"prompt_length": args.prompt_length, "response_length": point["responses"]}
    options = replace(options, **sizes, batch_size=batch, micro_batch_size=batch, num_epochs=args.num_epochs)
    shape = sized(preset(name), options)
    folder.mkdir()
    world = build_world(shape, folder, ("ppo",), ("full",), 1)
    contenders = speed.build_contenders("ppo", shape, [args.dtype], "full", world, options)
    say(" ".join(map(str, point.values())))
    speed.run_rounds(contenders, folder, threads, options, say)
    ours, floor = (speed.summarise(contender, 1, "updates") for contender in contenders)
    _, over_floor = speed.compare(contenders, 1)
    result = {"ours": ours["phases"], "floor": floor["phases"], "over_floor": over_floor[ours["name"]]}
    result["turns"] = {"ours": ours["turns"], "floor": floor["turns"]}
    return point | result | {key: ours[key] for key in ("memory_mib", "compile_seconds", "recompiles")}


def points_of(record):
    """The points of a record; the base with the turns of both its readings."""
    again, result = record.get("base_again"), []
    for p in record["points"]:
        if again and all(p[name] == record["base"][name] for name in AXES):
            turns = {key: p["turns"][key] + again["turns"][key] for key in ("ours", "floor")}
            seconds = {key: {x: [turn[x] for turn in turns[key]] for x in COLOURS} for key in turns}
            p = p | {key: {x: speed.spread(seconds[key][x]) for x in COLOURS} for key in turns} | {"turns": turns}
            p |= {"over_floor": {x: speed.ratio(seconds["ours"][x], seconds["floor"][x]) for x in COLOURS}}
        result.append(p)
    return result


def figure_of(record):
    """One panel for each axis, one line for each phase, its floor dashed in the same colour."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    for panel, (axis, xlabel) in zip(figure.subplots(1, 4, sharey=True), AXES.items(), strict=True):
        others = [name for name in AXES if name != axis]
        line = [p for p in points_of(record) if all(p[name] == record["base"][name] for name in others)]
        x = [layer_parameters(p[axis]) if axis == "sizes" else p[axis] for p in line]
        for name, colour in COLOURS.items():
            for key, style in ("ours", "o-"), ("floor", "--"):
                ordered = [p[key][name] for _, p in sorted(zip(x, line, strict=True), key=lambda pair: pair[0])]
                median, low, high = ([spread[k] for spread in ordered] for k in ("median", "low", "high"))
                label = name if key == "ours" else f"{name}, floor"
                panel.plot(sorted(x), median, style, color=colour, markersize=4, label=label)
                panel.fill_between(sorted(x), low, high, color=colour, alpha=0.15, linewidth=0)
        panel.set(xscale="log", yscale="log", xlabel=xlabel)
        panel.set_xticks(sorted(x), [f"{v / 1e6:.1f}M" if axis == "sizes" else str(v) for v in sorted(x)], minor=False)
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
    figure.axes[0].set_ylabel("seconds")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    base, args = record["base"], record["args"]
    figure.suptitle(
        f"An update of {base['batches']} x ({args['prompt_length']} + {base['responses']}) tokens, GPT-2 {base['sizes']}, "
        f"{base['vocabularies']} ids, {args['num_epochs']} epoch, {args['engine']}, {args['dtype']}; one of them varied"
    )
    return figure


def draw(record, path):
    """Write the figure as a PNG file."""
    figure_of(record).savefig(path, dpi=110)
    print(f"written to {path}")


def table(record):
    """Seconds of each point's phases, and how many times the floor the update takes."""
    rows = [[*AXES, *speed.PHASES, "update / floor"]]
    for p in points_of(record):
        cells = [speed.number(p["ours"][name]["median"]) for name in speed.PHASES]
        rows.append([*(str(p[name]) for name in AXES), *cells, speed.number(p["over_floor"]["update"]["median"])])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    compiled = sum(p["recompiles"] for p in [*record["points"], record.get("base_again", {"recompiles": 0})])
    lines += [f"{compiled} compilations behind the warm-up of all points"] * bool(compiled)
    if again := record.get("base_again"):
        first = next(p for p in record["points"] if all(p[name] == record["base"][name] for name in AXES))
        moved = [f"{x} {speed.number(again['ours'][x]['median'] / first['ours'][x]['median'])}" for x in speed.PHASES]
        lines.append(f"the base at the end, times the base at the start: {', '.join(moved)}")
    return "\n".join(lines)


def main(args):
    if (args.input is None) == (args.output is None):
        raise UserError("--input or --output: give one of them")
    if args.input:
        record = json.loads(Path(args.input).read_text())
        print(table(record))
        return draw(record, Path(args.input).with_suffix(".png"))
    output = Path(args.output)
    if output.suffix != ".json" or args.repeats < 1:
        raise UserError("--output must end in .json, --repeats must be at least 1")
    if output.exists() or output.with_suffix(".png").exists():
        raise UserError(f"--output {args.output}: exists already; name another file or remove it")
    base, found = points(args)
    for point in found:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", point["sizes"]):
            raise UserError(f"--sizes {point['sizes']}: give <layers>x<width>, such as 4x256")
        if min(point["batches"], point["responses"], point["vocabularies"] - 7) < 1:
            raise UserError("--batches and --responses must be at least 1, --vocabularies at least 8")
    began, record = time.time(), {"args": asdict(args), "argv": sys.argv, "base": base, "points": []}
    threads = args.threads or speed.usable_processors()
    record |= {"environment": environment(), "processor": speed.processor(), "threads": threads}

    def say(text):
        print(f"{time.time() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="growth_") as temporary:
        for number, point in enumerate(found):
            record["points"].append(measure(point, args, Path(temporary, str(number)), threads, say))
            write_whole(args.output, json.dumps(record | {"seconds": time.time() - began}, indent=1) + "\n")
        record["base_again"] = measure(base, args, Path(temporary, "again"), threads, say)
    record["seconds"] = time.time() - began
    write_whole(args.output, json.dumps(record, indent=1) + "\n")
    print(table(record))
    draw(record, output.with_suffix(".png"))


if __name__ == "__main__":
    launch(main, tyro.cli(Args, use_underscores=True))
