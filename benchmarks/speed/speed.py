"""Our scripts side by side with their peers and with the floor of the machine, in one command and one run.

    ppo            an update of ppo_rlhf.py against TRL 1.12.0's PPO trainer: rollout, score, update; separate critic
    decode         the `generate` of ppo_rlhf.py against that of transformers, pure sampling; every response full length,
                   and geometric lengths of mean a quarter of that
    sft            sft.py against TRL 1.16.0's SFTTrainer
    reward_model   reward_model.py against TRL 1.16.0's RewardTrainer
    ilql           ilql_rlhf.py against its floor alone
    ranks          ppo_rlhf.py in one process with all threads against two ranks with half of them each

    bash benchmarks/peers.sh                       # once: the peers' environments, under .peers/
    python benchmarks/speed.py --output speed.json
    python benchmarks/speed.py --parts decode --presets gpt2-4x256-v8192 --dtypes fp32 bf16 --repeats 5
    python benchmarks/speed.py --parts ilql --presets gpt2-6x144-v23 --batch_size 100 --prompt_length 1 \
        --response_length 10 --trainer_steps 20    # a step of the random walks
    python benchmarks/speed.py --parts ppo --engines compiled floor --profile traces     # without the peers

Every contender works on the same folders: random weights, a tokenizer of whole words, prompts of exactly the prompt
length. It runs in a process of its own, strictly in turn: in each round every contender does one turn while all others
wait without using the processor, and the order is reversed from round to round. A ratio is the median over rounds of
(peer's seconds for a unit of work) / (ours) in the same round, so that a machine that slows down slows both; low and
high are the extremes. `floor` is what the bare matrix products of a phase take, measured in the same rounds (floors.py
says what is counted); a phase over its floor is 1 at best. Ours are the scripts' own `main` and their own phase times;
the wall clock is taken outside of them, and phases that do not sum to it within 3% are pointed out.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # the scripts are files in the root, not a package

from shapes import EOS, build_world, preset, sized
from utils import UserError, environment, launch

PARTS = ("ppo", "decode", "sft", "reward_model", "ilql", "ranks")
PEERS = {"ppo": "1.12.0", "sft": "1.16.0", "reward_model": "1.16.0"}
PHASES = ("rollout", "score", "update")


@dataclass
class Args:
    presets: tuple[str, ...] = ("gpt2-4x256-v8192", "gpt2-6x144-v512")
    """shapes: gpt2-<layers>x<width>-v<vocabulary>, smollm2-135m, gpt2-124m, llama-1b, opt-1.3b"""
    parts: tuple[Literal["ppo", "decode", "sft", "reward_model", "ilql", "ranks"], ...] = (
        "ppo",
        "decode",
        "sft",
        "reward_model",
    )
    """what to compare"""
    engines: tuple[Literal["peer", "eager", "compiled", "floor"], ...] = ("peer", "eager", "compiled", "floor")
    """who takes part: TRL or transformers, our script without and with --compile, the floor"""
    dtypes: tuple[Literal["fp32", "bf16"], ...] | None = None
    """none: fp32 and bf16 for ppo and fp32 for the rest; on CUDA bf16 for all"""
    lengths: tuple[Literal["full", "geometric"], ...] = ("full", "geometric")
    """decode: how long responses are"""
    batch_size: int | None = None
    """rows (for reward_model pairs) of a step; none: the preset's"""
    micro_batch_size: int | None = None
    """rows of a forward, for peers and ours alike; none: the preset's"""
    prompt_length: int | None = None
    """tokens of every prompt; none: the preset's"""
    response_length: int | None = None
    """tokens of every response; none: the preset's"""
    num_epochs: int | None = None
    """PPO epochs of an update; none: the preset's"""
    repeats: int = 3
    """rounds: measured turns of each contender"""
    warmup: int = 2
    """turns of each contender before the first that counts"""
    trainer_steps: int = 6
    """optimizer steps in a turn of sft, reward_model and ilql"""
    decode_steps: int = 4
    """batches in a turn of decode: with geometric lengths the number of tokens differs from batch to batch"""
    threads: int | None = None
    """CPU threads of each contender; none: the processors this process may use"""
    fresh: bool = torch.cuda.is_available()
    """start contenders anew in every round, so that none keeps memory while another works; else they wait in between"""
    profile: str | None = None
    """a folder: after its last turn each contender does one more and writes a trace of it there"""
    output: str | None = None
    """a JSON file for the result, which must not exist yet; none: only print"""


# ----------------------------------------------------------------------------------------------------------------------
# Contenders


@dataclass
class Contender:
    name: str
    job: dict
    command: list
    ranks: int = 1
    processes: list = field(default_factory=list)
    setup_seconds: list = field(default_factory=list)
    warm: list = field(default_factory=list)
    turns: list = field(default_factory=list)


def peer_python(part):
    return ROOT / ".peers" / f"trl-{PEERS[part]}" / "bin" / "python"


def check_peers(args):
    """Refuse, before anything is built, to compare with a peer that is not installed."""
    for part in set(args.parts) & set(PEERS) if "peer" in args.engines else ():
        if not peer_python(part).exists():
            raise UserError(
                f"--parts {part}: TRL {PEERS[part]} is not installed; run `bash benchmarks/peers.sh`, or leave out "
                "`peer` from --engines"
            )


def steps_of(part, args):
    """Optimizer steps, updates or batches in a turn."""
    steps = {"sft": args.trainer_steps, "reward_model": args.trainer_steps, "ilql": args.trainer_steps}
    return (steps | {"decode": args.decode_steps}).get(part, 1)


def build_contenders(part, shape, dtypes, lengths, world, args):
    """The contenders of one comparison: for each dtype the peer, ours eager and compiled, the floor."""
    steps = steps_of(part, args)
    turns = args.warmup + (1 if args.fresh else args.repeats) + 2
    job = {"part": part, "batch": shape.batch, "micro_batch": shape.micro_batch, "prompt": shape.prompt}
    job |= {"response": shape.response, "epochs": shape.epochs, "eos_id": EOS, "steps": steps, **world}
    job |= {"warmup": args.warmup * steps, "max_steps": turns * steps}
    if lengths == "geometric":
        job["policy"] = world["policy_geometric"]
    contenders = []

    def add(name, dtype, engine, command, **options):
        contenders.append(Contender(name, job | {"dtype": dtype, "engine": engine}, command, **options))

    here = [sys.executable, str(ROOT / "benchmarks" / "contender.py")]
    for dtype in dtypes:
        if part == "ranks":
            for engine in ("eager", "compiled"):
                if engine in args.engines:
                    add(f"one process {engine} {dtype}", dtype, engine, here)
                    add(f"two ranks {engine} {dtype}", dtype, engine, here, ranks=2)
            continue
        if "peer" in args.engines and part == "decode":
            add(f"generate {dtype}", dtype, "generate", here)
        elif "peer" in args.engines and part != "ilql":
            script = "peer_ppo.py" if part == "ppo" else "peer_trainers.py"
            add(f"trl {dtype}", dtype, "peer", [str(peer_python(part)), str(ROOT / "benchmarks" / script)])
        for engine in ("eager", "compiled"):
            if engine in args.engines:
                add(f"ours {engine} {dtype}", dtype, engine, here)
        if "floor" in args.engines and lengths == "full":
            add(f"floor {dtype}", dtype, "floor", here)
    return contenders


def start(contender, folder, threads):
    """Start a contender's processes, one per rank, and wait until it is warm."""
    began, number = time.perf_counter(), len(contender.setup_seconds)
    name = f"{contender.job['part']} {contender.name} {number}".replace(" ", "_")
    job = json.dumps(contender.job | {"output_dir": str(folder / "runs" / f"{name}_{time.monotonic_ns()}")})
    settings = {"OMP_NUM_THREADS": str(max(threads // contender.ranks, 1)), "TOKENIZERS_PARALLELISM": "false"}
    settings |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")}
    settings |= {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    if contender.ranks > 1:
        port = str(20000 + os.getpid() % 20000)
        settings |= {"WORLD_SIZE": str(contender.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    contender.processes = []
    for rank in range(contender.ranks):
        ranked = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if contender.ranks > 1 else {}
        with open(folder / f"{name}.{rank}.log", "w") as log:
            process = subprocess.Popen(
                [*contender.command, job],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env={**os.environ, **settings, **ranked},
            )
        process.log = log.name
        contender.processes.append(process)
    contender.warm.append(read_report(contender))
    contender.setup_seconds.append(time.perf_counter() - began)


def read_report(contender):
    """What the first rank says when its turn is over; every rank's must be."""
    reports = []
    for process in contender.processes:
        line = process.stdout.readline()
        if not line:
            process.wait()
            last = [text for text in Path(process.log).read_text().splitlines() if text.strip()][-8:]
            raise UserError(f"{contender.name}: ended with exit code {process.returncode}; it said\n" + "\n".join(last))
        reports.append(json.loads(line))
    return reports[0]


def take_turn(contender, trace=None):
    """One turn, or one more under the profiler of the first rank."""
    for rank, process in enumerate(contender.processes):
        process.stdin.write(json.dumps({"trace": trace if rank == 0 else None}) + "\n")
        process.stdin.flush()
    return read_report(contender)


def stop(contender):
    """End a contender's processes; those that do not end at the end of their input are killed."""
    for process in contender.processes:
        process.stdin.close()
    for process in contender.processes:
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
    contender.processes = []


def run_rounds(contenders, folder, threads, args, say):
    """Fill in the turns of all contenders, round by round."""
    try:
        for contender in contenders if not args.fresh else ():
            start(contender, folder, threads)
            say(f"{contender.name}: warm after {contender.setup_seconds[-1]:.0f} s")
        for i in range(args.repeats):
            for contender in contenders[:: -1 if i % 2 else 1]:
                if args.fresh:
                    start(contender, folder, threads)
                contender.turns.append(take_turn(contender))
                if args.profile and i == args.repeats - 1:
                    part = contender.job["part"]
                    trace = Path(args.profile, f"{folder.name}_{part}_{contender.name}.json".replace(" ", "_"))
                    trace.parent.mkdir(parents=True, exist_ok=True)
                    take_turn(contender, str(trace.resolve()))
                if args.fresh:
                    stop(contender)
            say(f"round {i + 1} of {args.repeats}")
    finally:
        for contender in contenders:
            stop(contender)


# ----------------------------------------------------------------------------------------------------------------------
# Results


def spread(values):
    """{median, low, high} of a list of numbers."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(theirs, ours):
    """{median, low, high} of theirs / ours, round by round: above 1 where ours took less."""
    return spread([a / b for a, b in zip(theirs, ours, strict=True)])


def unit_costs(contender, units):
    """Seconds a unit of work, for each turn. units: in a turn; None: the tokens that the turn reports."""
    return [turn["wall"] / (units or turn["tokens"]) for turn in contender.turns]


def summarise(contender, units, unit):
    """One contender's line of the result."""
    turns, job = contender.turns, contender.job
    summary = {"name": contender.name, "engine": job["engine"], "dtype": job["dtype"], "ranks": contender.ranks}
    summary |= {"wall": spread([turn["wall"] for turn in turns]), "turns": turns, "unit": unit}
    if job["engine"] != "floor":
        summary["per_second"] = spread([1 / cost for cost in unit_costs(contender, units)])
    summary["phases"] = {name: spread([turn[name] for turn in turns]) for name in PHASES if name in turns[0]}
    if job["engine"] != "floor" and summary["phases"]:
        sums = [sum(turn[name] for name in summary["phases"]) / turn["wall"] for turn in turns]
        summary["phases_over_wall"] = spread(sums)
    summary["memory_mib"] = max(turn["memory_mib"] for turn in turns)
    summary |= {"threads": turns[0]["threads"], "setup_seconds": contender.setup_seconds}
    summary["compile_seconds"] = contender.warm[0]["compile_seconds"]  # the first start's: later ones find a cache
    pairs = zip(contender.warm, turns) if len(contender.warm) > 1 else [(contender.warm[0], turns[-1])]
    summary["recompiles"] = max(after["compiles"] - before["compiles"] for before, after in pairs)
    return summary


def compare(contenders, units):
    """Every ratio that the contenders allow: [{name, over, ratio}] against peers, {name: {phase: ratio}} over the floor."""
    peers = [c for c in contenders if c.job["engine"] in ("peer", "generate") or c.name.startswith("one process")]
    ours = [c for c in contenders if c.job["engine"] in ("eager", "compiled") and c not in peers]
    ratios = []
    for us in ours:
        for peer in peers:
            comparable = us.name.split(" ", 2)[2] == peer.name.split(" ", 2)[2] if us.ranks > 1 else True
            if comparable:
                speedup = ratio(unit_costs(peer, units), unit_costs(us, units))
                ratios.append({"name": us.name, "over": peer.name, "ratio": speedup})
    over_floor = {}
    for c in contenders:
        floor = [f for f in contenders if f.job["engine"] == "floor" and f.job["dtype"] == c.job["dtype"]]
        if floor and c not in floor:
            phases = [name for name in PHASES if name in floor[0].turns[0]]
            over_floor[c.name] = {
                name: ratio([turn.get(name, turn["wall"]) for turn in c.turns], [t[name] for t in floor[0].turns])
                for name in phases
                if name in c.turns[0] or len(phases) == 1
            }
    return ratios, over_floor


def number(value, digits=3):
    """Three significant digits without an exponent; a dash for nothing."""
    if value is None:
        return "-"
    return f"{value:.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}" if value else "0"


def table(group):
    """One comparison as text: a line per contender, then a line per ratio."""
    phases = [name for name in PHASES if any(name in c["phases"] for c in group["contenders"])]
    unit = group["contenders"][0]["unit"]
    rows = [["", "seconds", "low", "high", f"{unit}/s", *phases, "MiB", "compile s", "recompiles"]]
    for c in group["contenders"]:
        cells = [c["name"], *(number(c["wall"][key]) for key in ("median", "low", "high"))]
        cells.append("-" if c["engine"] == "floor" else number(c["per_second"]["median"]))
        if c["engine"] == "floor":  # its wall clock is the time it took to measure
            cells[1:4] = [number(sum(phase["median"] for phase in c["phases"].values())), "-", "-"]
        cells += [number(c["phases"].get(name, {}).get("median")) for name in phases]
        memory = "-" if c["engine"] == "floor" else f"{c['memory_mib']:.0f}"
        cells += [memory, number(c["compile_seconds"]), str(c["recompiles"])]
        rows.append(cells)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    for r in group["ratios"]:
        low, high = number(r["ratio"]["low"]), number(r["ratio"]["high"])
        lines.append(f"  {r['name']} is {number(r['ratio']['median'])}x as fast as {r['over']} [{low}, {high}]")
    for name, over in group["over_floor"].items():
        cells = ", ".join(f"{phase} {number(over[phase]['median'])}" for phase in over)
        lines.append(f"  {name} over its floor: {cells}")
    for c in group["contenders"]:
        sums = c.get("phases_over_wall")
        if sums and not 0.97 <= sums["low"] <= sums["high"] <= 1.03:
            low, high = (number(100 * sums[key]) for key in ("low", "high"))
            lines.append(f"  {c['name']}: its phases sum to {low} to {high}% of the wall clock")
    title = (
        f"{group['part']}, {group['preset']}, batch {group['batch']}, {group['prompt']} + {group['response']} tokens"
    )
    return "\n".join([title + (", geometric lengths" if group["lengths"] == "geometric" else ""), *lines])


def work_of(part, shape, args):
    """(units of work in a turn, their name); None where each turn counts its own."""
    if part in ("ppo", "ranks"):  # prompts and responses, as DeepSpeed-Chat counts
        return shape.batch * (shape.prompt + shape.response), "tokens"
    if part == "decode":
        return None, "tokens"
    if part == "sft":
        return args.trainer_steps * shape.batch * (shape.prompt + shape.response), "tokens"
    return args.trainer_steps * shape.batch, "pairs" if part == "reward_model" else "rows"


def processor():
    """The CPU's own name for itself, and how many of its processors this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {"name": names[0] if names else "unknown", "usable": usable_processors(), "capability": capability()}


def capability():
    """The widest vector instructions that torch uses here."""
    return torch.backends.cpu.get_cpu_capability()


def usable_processors():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def write(args, threads, seconds, groups):
    """The result so far, whole or not at all."""
    record = {"args": asdict(args), "argv": sys.argv, "environment": environment(), "processor": processor()}
    record |= {"threads": threads, "peers": {part: f"trl {PEERS[part]}" for part in PEERS if part in args.parts}}
    record |= {"seconds": seconds, "comparisons": groups}
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{args.output}.tmp").write_text(json.dumps(record, indent=1) + "\n")
    os.rename(f"{args.output}.tmp", args.output)


def main(args):
    for name in (
        "repeats",
        "warmup",
        "trainer_steps",
        "decode_steps",
        "batch_size",
        "micro_batch_size",
        "response_length",
        "prompt_length",
    ):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.output and Path(args.output).exists():
        raise UserError(f"--output {args.output}: exists already; name another file or remove it")
    shapes = {name: sized(preset(name), args) for name in args.presets}
    if "geometric" in args.lengths and "decode" in args.parts and min(s.response for s in shapes.values()) < 8:
        raise UserError("--lengths geometric: needs a response length of at least 8")
    check_peers(args)
    threads = args.threads or usable_processors()
    began, groups = time.time(), []

    def say(text):
        print(f"{time.time() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="speed_") as temporary:
        for name, shape in shapes.items():
            folder = Path(temporary, name)
            folder.mkdir()
            world = build_world(shape, folder, args.parts, args.lengths, args.trainer_steps)
            for part in args.parts:
                default = ("bf16",) if torch.cuda.is_available() else ("fp32", "bf16") if part == "ppo" else ("fp32",)
                for lengths in args.lengths if part == "decode" else ("full",):
                    say(f"{part}, {name}" + (", geometric lengths" if lengths == "geometric" else ""))
                    contenders = build_contenders(part, shape, args.dtypes or default, lengths, world, args)
                    run_rounds(contenders, folder, threads, args, say)
                    units, unit = work_of(part, shape, args)
                    ratios, over_floor = compare(contenders, units)
                    sizes = {
                        key: getattr(shape, key) for key in ("batch", "micro_batch", "prompt", "response", "epochs")
                    }
                    group = {"part": part, "preset": name, "lengths": lengths, **sizes}
                    group["contenders"] = [summarise(contender, units, unit) for contender in contenders]
                    groups.append(group | {"ratios": ratios, "over_floor": over_floor})
                    print("\n" + table(groups[-1]) + "\n", flush=True)
                    if args.output:  # after each comparison: a run that is stopped keeps those before
                        write(args, threads, time.time() - began, groups)
    if args.output:
        print(f"written to {args.output}")


if __name__ == "__main__":
    launch(main, tyro.cli(Args, use_underscores=True))
