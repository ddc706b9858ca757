"""Does memory stay flat? Hundreds of PPO updates in one process, with what it holds and what it compiled after each.

    python tasks/randomwalks.py
    python benchmarks/memory.py --num_updates 300 --output memory.json -- --compile

Behind `--` stand flags of ppo_rlhf.py that replace those of this benchmark: walks of the embedded task from random weights, its
own reward, 32 walks an update. On CPU memory is resident memory after the garbage has been collected; on CUDA it is
what the allocator has reserved. `growth` is the mean of the last tenth of the updates less that of the tenth behind the
first, in MiB and as a share: warm-up, compiling and the first buckets of lengths are over by then.
"""

import contextlib
import gc
import io
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the scripts are files in the root, not a package
sys.path.insert(0, str(Path(__file__).resolve().parent))

import ppo_rlhf
from evaluate import write_whole
from turns import CompileWatch, resident_memory
from utils import UserError, environment, launch


@dataclass
class Args:
    num_updates: int = 300
    """PPO updates"""
    output: str | None = None
    """a JSON file for the result, which must not exist yet; none: only print"""


def memory():
    """MiB that this process holds: of the CUDA allocator where there is one, else resident (Linux)."""
    if torch.cuda.is_available():
        return torch.cuda.memory_reserved() / 2**20
    gc.collect()
    return resident_memory("VmRSS")


def summarise(mib, compiles):
    """{start, end, growth, share, compiles_behind_start}: the tenth behind the first against the last, see above."""
    n = max(len(mib) // 10, 1)
    start, end = sum(mib[n : 2 * n]) / n, sum(mib[-n:]) / n
    late = compiles[-1] - compiles[2 * n - 1]
    return {
        "start": start,
        "end": end,
        "growth": end - start,
        "share": (end - start) / start,
        "compiles_behind_start": late,
    }


def main(args, flags):
    if args.output and Path(args.output).exists():
        raise UserError(f"--output {args.output}: exists already; name another file or remove it")
    if args.num_updates < 10:
        raise UserError(f"--num_updates {args.num_updates}: must be at least 10")
    mib, compiles, watch, progress = [], [], CompileWatch(), ppo_rlhf.progress

    def watched(*arguments):
        for update in progress(*arguments):
            yield update
            mib.append(memory())
            compiles.append(watch.count)

    defaults = {"model": "data/randomwalks/model", "reward_fn": "tasks/randomwalks.py:reward", "batch_size": 32}
    ppo_args = tyro.cli(ppo_rlhf.Args, args=flags, default=ppo_rlhf.Args(**defaults), use_underscores=True)
    ppo_args.total_episodes = args.num_updates * ppo_args.batch_size
    ppo_rlhf.progress = watched
    with tempfile.TemporaryDirectory() as folder:
        ppo_args.output_dir = f"{folder}/run"
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                ppo_rlhf.main(ppo_args)
        finally:
            ppo_rlhf.progress = progress
    ppo_args.output_dir = None
    result = {"args": asdict(args), "ppo_args": asdict(ppo_args), **summarise(mib, compiles), "mib": mib}
    result |= {"compiles": compiles, "environment": environment()}
    print(f"after {args.num_updates // 5} updates {result['start']:.0f} MiB, at the end {result['end']:.0f}: ", end="")
    print(f"{result['share']:+.2%}, {result['compiles_behind_start']} compilations in between")
    if args.output:
        write_whole(args.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    own = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    launch(lambda args: main(args, sys.argv[len(own) + 2 :]), tyro.cli(Args, args=own, use_underscores=True))
