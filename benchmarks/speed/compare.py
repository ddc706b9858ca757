"""Our scripts beside their peers, in one command and one run.

    ppo            an update of ppo_rlhf.py against TRL 1.12.0's PPOTrainer: 64 rows of 16 + 48
                   tokens, four epochs, a separate critic
    decode         a batch of ppo_rlhf.py's `generate` against transformers' own, the same rows
    sft            a step of sft.py against TRL 1.16.0's SFTTrainer, the same sizes
    reward_model   a step of reward_model.py against TRL 1.16.0's RewardTrainer, 64 pairs
    chat           an update of PPO with chat-like lengths: prompts have a median of 30 tokens and
                   at most 128, responses end with probability 1/30 a token and have at most 64; 64
                   rows in micro-batches of 16, four epochs. For SmolLM2 16 rows in micro-batches
                   of 4, one epoch

    bash benchmarks/speed/peers.sh    # Once: the peers' environments, under .peers/.
    python benchmarks/speed/compare.py --output benchmarks/results/speed/compare.json
    python benchmarks/speed/compare.py --only chat --models gpt2-4x256-v8192 --dtype bf16
    python benchmarks/speed/compare.py --only ppo --no-peers --floor

Every contender works on the same folders: random weights, a tokenizer of whole words, texts of
exact lengths. It has a process of its own and, once all are warm, works strictly in turn: in each
round every contender does one turn while all others wait without using a processor, and the order
is reversed from round to round. A ratio is the median over rounds of (the peer's seconds / ours) in
the same round, so that a machine that slows down slows both; low and high are the extremes. Ours
are the scripts' own `main` and the phase times that they log; the seconds of a turn are taken
outside of them.

All contenders, the peers included, run with glibc told to keep the memory that is freed. Otherwise
it is returned to the system and faulted in again all the time, which takes up to a third of an
update on a CPU, on either side.
"""

import itertools
import json
import math
import os
import shlex
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

sys.path.append(str(Path(__file__).resolve().parents[2]))  # The scripts are files in the root.

from shapes import build_world, model_config, workload
from utils import UserError, environment, launch

ROOT = Path(__file__).resolve().parents[2]
GPT2_MODELS = ("gpt2-4x256-v8192", "gpt2-6x144-v512")
PARTS = {
    "ppo": GPT2_MODELS,
    "decode": GPT2_MODELS,
    "sft": GPT2_MODELS,
    "reward_model": GPT2_MODELS,
    "chat": ("gpt2-4x256-v8192", "smollm2-135m"),
}
TRL = {"ppo": "1.12.0", "chat": "1.12.0", "sft": "1.16.0", "reward_model": "1.16.0"}
UNITS = {"decode": "a batch", "sft": "a step", "reward_model": "a step"}  # Others: an update.
PHASES = ("rollout", "score", "update")
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "1073741824", "MALLOC_MMAP_THRESHOLD_": "1073741824"}


@dataclass
class Args:
    only: tuple[Literal["ppo", "decode", "sft", "reward_model", "chat"], ...] = tuple(PARTS)
    """the parts to run"""
    models: tuple[str, ...] | None = None
    """gpt2-<layers>x<width>-v<vocabulary> or smollm2-135m; none: each part's own"""
    peers: bool = True
    """compare with TRL and transformers"""
    floor: bool = False
    """compare with the bare matrix products too, see floors.py"""
    compile: bool = True
    """ours with --compile"""
    dtype: Literal["fp32", "bf16"] = "bf16" if torch.cuda.is_available() else "fp32"
    """what ours and the peers compute in; weights of trained models are fp32 on both sides"""
    batch: int | None = None
    """rows (for the reward model pairs) of a step; none, here and below: the part's own"""
    micro_batch: int | None = None
    """rows of a forward, for peers and ours alike"""
    prompt: int | None = None
    """tokens of a prompt, for chat of the longest"""
    response: int | None = None
    """tokens of a response, for chat of the longest possible"""
    epochs: int | None = None
    """PPO epochs of an update"""
    rounds: int = 3
    """measured turns of each contender; of SmolLM2's two at most, because each takes minutes"""
    warmup: int = 1
    """turns of each contender before the first that counts"""
    steps: int = 4
    """steps in a turn of sft and reward_model, batches in one of decode; of PPO it is one update"""
    threads: int | None = None
    """CPU threads of each contender; none: the processors this process may use"""
    output: str | None = None
    """a JSON file for the result, which must not exist yet; none: only print"""


# --------------------------------------------------------------------------------------------------
# Contenders


@dataclass
class Contender:
    name: str
    command: list
    job: dict
    process: subprocess.Popen | None = None
    log: Path | None = None
    warm_recompiles: int = 0
    turns: list = field(default_factory=list)


def peer_python(part):
    """The Python of the environment that peers.sh made for a part's peer."""
    return ROOT / ".peers" / f"trl-{TRL[part]}" / "bin" / "python"


def check_peers(args):
    """Refuse, before anything is built, to compare with a peer that is not installed."""
    for part in args.only:
        if args.peers and part in TRL and not peer_python(part).exists():
            todo = "run `bash benchmarks/speed/peers.sh`, or give --no-peers"
            raise UserError(f"--only {part}: TRL {TRL[part]} is not installed; {todo}")


def num_rounds(work, args):
    """How many turns of each contender count."""
    return min(args.rounds, 2) if work.model == "smollm2-135m" else args.rounds


def build_contenders(work, paths, args):
    """The contenders of one comparison in this order: the peer, ours, the floor."""
    steps = args.steps if work.part in UNITS else 1
    job = asdict(work) | paths
    job |= {"dtype": args.dtype, "compile": args.compile, "steps": steps}
    # One turn more than is wanted: a script that came to its last step would save its model.
    num_turns = args.warmup + num_rounds(work, args) + 1
    job |= {"warmup": args.warmup * steps, "max_steps": num_turns * steps}
    folder = Path(__file__).resolve().parent
    here = [sys.executable, str(folder / "contender.py")]
    contenders = []
    if args.peers and work.part == "decode":
        contenders.append(Contender("transformers", here, job | {"engine": "transformers"}))
    elif args.peers:
        script = "peer_trainers.py" if work.part in UNITS else "peer_ppo.py"
        command = [str(peer_python(work.part)), str(folder / script)]
        contenders.append(Contender(f"trl {TRL[work.part]}", command, job | {"engine": "trl"}))
    contenders.append(Contender("ours", here, job | {"engine": "ours"}))
    if args.floor:
        contenders.append(Contender("floor", here, job | {"engine": "floor"}))
    return contenders


def start(contender, folder, threads):
    """Start a contender's process."""
    name = contender.name.replace(" ", "_")
    contender.log = folder / f"{name}.log"
    settings = {
        **os.environ,
        **ALLOCATOR,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "TORCH_LOGS": "recompiles",  # See `count_recompiles`.
    }
    job = json.dumps(contender.job | {"output_dir": str(folder / f"run_{name}")})
    with open(contender.log, "w") as log:
        contender.process = subprocess.Popen(
            [*contender.command, job],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            cwd=ROOT,
            env=settings,
        )


def read_report(contender):
    """What a contender says at the end of a turn."""
    line = contender.process.stdout.readline()
    if not line:
        code = contender.process.wait()
        said = [text for text in contender.log.read_text().splitlines() if text.strip()][-8:]
        raise UserError(f"{contender.name}: ended with exit code {code}; it said: {said}")
    return json.loads(line)


def count_recompiles(contender):
    """How often a contender has compiled a function once more because an input had changed."""
    return contender.log.read_text().count("Recompiling function")


def stop(contender):
    """End a contender's process, by killing it if it does not end with its input."""
    process = contender.process
    if process is None:
        return
    process.stdin.close()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def run_rounds(contenders, rounds, folder, threads, say):
    """Fill in the turns of all contenders, round by round."""
    try:
        for contender in contenders:
            start(contender, folder, threads)
        for contender in contenders:  # Warming up is not measured, so they may do it together.
            read_report(contender)
            contender.warm_recompiles = count_recompiles(contender)
        say("all contenders are warm")
        for i in range(rounds):
            order = contenders if i % 2 == 0 else contenders[::-1]
            for contender in order:
                contender.process.stdin.write("\n")
                contender.process.stdin.flush()
                contender.turns.append(read_report(contender))
            say(f"round {i + 1} of {rounds}")
    finally:
        for contender in contenders:
            stop(contender)


# --------------------------------------------------------------------------------------------------
# Results


def spread(values):
    """{median, low, high} of a list of numbers."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratio(theirs, ours):
    """{median, low, high} of theirs / ours, round by round: above 1 where ours took less."""
    return spread([a / b for a, b in zip(theirs, ours, strict=True)])


def step_seconds(contender):
    """{whole: [seconds of a step in each turn], and the same for each phase that is known}."""
    steps = contender.job["steps"]
    turns = contender.turns
    seconds = {}
    for phase in PHASES:
        if phase in turns[0]:
            seconds[phase] = [turn[phase] / steps for turn in turns]
    if contender.name == "floor":  # The seconds of its turns are what measuring took.
        whole = [sum(values) for values in zip(*seconds.values(), strict=True)]
    else:
        whole = [turn["seconds"] / steps for turn in turns]
    return {"whole": whole, **seconds}


def summarise(contender):
    """One contender's part of the result."""
    seconds = step_seconds(contender)
    summary = {"seconds": {name: spread(values) for name, values in seconds.items()}}
    if "response_tokens" in contender.turns[0]:
        batch = contender.job["batch"]
        summary["response_length"] = spread(
            [turn["response_tokens"] / batch for turn in contender.turns]
        )
    summary["memory_mib"] = max(turn["memory_mib"] for turn in contender.turns)
    summary["threads"] = contender.turns[0]["threads"]
    summary["recompiles"] = count_recompiles(contender) - contender.warm_recompiles
    summary["turns"] = contender.turns
    return summary


def compare(contenders):
    """{"peer / ours", "ours / floor": {whole or phase: ratio}} of those that took part."""
    ratios = {}
    for over, under in itertools.pairwise(contenders):
        theirs = step_seconds(over)
        ours = step_seconds(under)
        found = {name: ratio(theirs[name], ours[name]) for name in theirs if name in ours}
        ratios[f"{over.name} / {under.name}"] = found
    return ratios


def measure(work, folder, threads, args, say):
    """Run one comparison; folder: an empty one for its files."""
    rounds = num_rounds(work, args)
    paths = build_world(work, folder, (args.warmup + rounds + 1) * args.steps)
    contenders = build_contenders(work, paths, args)
    run_rounds(contenders, rounds, folder, threads, say)
    group = asdict(work) | {"dtype": args.dtype}
    group["contenders"] = {contender.name: summarise(contender) for contender in contenders}
    return group | {"ratios": compare(contenders)}


def number(value):
    """Three significant digits without an exponent."""
    if value == 0:
        return "0"
    return f"{value:.{max(2 - math.floor(math.log10(abs(value))), 0)}f}"


def between(values):
    """A spread as text: the median, then the least and the most."""
    return f"{number(values['median'])} [{number(values['low'])}, {number(values['high'])}]"


def table(group):
    """One comparison as text: the seconds of each contender, then the ratios."""
    unit = UNITS.get(group["part"], "an update")
    sizes = f"{group['batch']} rows in micro-batches of {group['micro_batch']}"
    limit = "at most " if group["chat"] else ""
    sizes += f", {limit}{group['prompt']} + {group['response']} tokens"
    lines = [f"{group['part']}, {group['model']}, {sizes}, {group['dtype']}: seconds of {unit}"]
    for name, summary in group["contenders"].items():
        cells = [between(summary["seconds"]["whole"])]
        for phase in PHASES:
            if phase in summary["seconds"]:
                cells.append(f"{phase} {number(summary['seconds'][phase]['median'])}")
        if "response_length" in summary:
            cells.append(f"{number(summary['response_length']['median'])} tokens a response")
        if name != "floor":
            cells.append(f"{summary['memory_mib']:.0f} MiB")
            cells.append(f"{summary['recompiles']} recompilations")
        lines.append(f"  {name:<12} " + ", ".join(cells))
    for name, found in group["ratios"].items():
        cells = [between(found["whole"])]
        cells += [f"{phase} {between(found[phase])}" for phase in PHASES if phase in found]
        lines.append(f"  {name}: " + ", ".join(cells))
    return "\n".join(lines)


def usable_processors():
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def processor():
    """The CPU's own name for itself, and the widest vector instructions that torch uses on it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "name": names[0] if names else "unknown",
        "usable": usable_processors(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def record_of(args, threads):
    """What is needed to run the same again."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "args": asdict(args),
        "environment": environment(),
        "processor": processor(),
        "threads": threads,
        "allocator": ALLOCATOR,
    }


def write_json(path, record):
    """Write a record to a file, which appears complete or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{path}.tmp").write_text(json.dumps(record, indent=1) + "\n")
    os.rename(f"{path}.tmp", path)


def check_new(path):
    """Refuse to overwrite a file of results."""
    if path and Path(path).exists():
        raise UserError(f"--output {path}: exists already; name another file or remove it")


def check_counts(args, *names):
    """Refuse flags below 1."""
    for name in names:
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1")


def main(args):
    check_counts(args, "rounds", "warmup", "steps")
    check_new(args.output)
    sizes = ("batch", "micro_batch", "prompt", "response", "epochs")
    given = {name: getattr(args, name) for name in sizes}
    works = []
    for part in args.only:
        for model in args.models or PARTS[part]:
            model_config(model)  # Refuses a name that it does not know.
            works.append(workload(part, model, **given))
    check_peers(args)

    threads = args.threads or usable_processors()
    record = record_of(args, threads)
    comparisons = []
    began = time.time()

    def say(text):
        print(f"{time.time() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="speed_") as temporary:
        for work in works:
            say(f"{work.part}, {work.model}")
            folder = Path(temporary, f"{work.part}_{work.model}")
            folder.mkdir()
            comparisons.append(measure(work, folder, threads, args, say))
            print("\n" + table(comparisons[-1]) + "\n", flush=True)
            if args.output:  # After each comparison: a run that is stopped keeps those before.
                seconds = {"seconds": time.time() - began}
                write_json(args.output, record | seconds | {"comparisons": comparisons})


if __name__ == "__main__":
    launch(main, tyro.cli(Args, use_underscores=True))
