"""Does memory stay flat? Hundreds of PPO updates in one process, and what it holds after each.

    python tasks/randomwalks.py
    python benchmarks/speed/memory.py --num_updates 300 --output memory.json -- --compile

After `--` stand flags of ppo_rlhf.py, which replace those of this benchmark: walks of the embedded
task from random weights, its own reward, 32 walks an update. On a CPU memory is what is resident
after the garbage has been collected; on CUDA it is what the allocator has reserved. It has grown by
the mean of the last tenth of the updates less that of the second tenth, before which come warm-up,
compiling and the first lengths.
"""

import gc
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro

sys.path.append(str(Path(__file__).resolve().parents[2]))  # The scripts are files in the root.

import ppo_rlhf
import utils
from compare import check_new, write_json
from turns import resident_memory
from utils import UserError, environment, launch


@dataclass
class Args:
    num_updates: int = 300
    """PPO updates"""
    output: str | None = None
    """a JSON file for the result, which must not exist yet; none: only print"""


def memory():
    """MiB that this process holds: of the CUDA allocator where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.memory_reserved() / 2**20
    gc.collect()
    return resident_memory("VmRSS")


def growth(mib):
    """(start, end) in MiB: the means of the second tenth and of the last tenth."""
    tenth = max(len(mib) // 10, 1)
    return statistics.mean(mib[tenth : 2 * tenth]), statistics.mean(mib[-tenth:])


def watch_updates(ppo_args):
    """Run ppo_rlhf.py; returns the memory after each update."""
    mib = []
    progress = utils.progress

    def watched(*arguments):
        for update in progress(*arguments):
            yield update
            mib.append(memory())

    utils.progress = watched
    try:
        ppo_rlhf.main(ppo_args)
    finally:
        utils.progress = progress
    return mib


def main(args, flags):
    check_new(args.output)
    if args.num_updates < 10:
        raise UserError(f"--num_updates {args.num_updates}: must be at least 10")
    defaults = ppo_rlhf.Args(
        model="data/randomwalks/model", reward_fn=("tasks/randomwalks.py:reward",), batch_size=32
    )
    ppo_args = tyro.cli(ppo_rlhf.Args, args=flags, default=defaults, use_underscores=True)
    ppo_args.total_episodes = args.num_updates * ppo_args.batch_size
    with tempfile.TemporaryDirectory() as folder:
        ppo_args.output_dir = f"{folder}/run"
        mib = watch_updates(ppo_args)
    start, end = growth(mib)
    print(f"{start:.0f} MiB, at the end {end:.0f}: {end / start - 1:+.2%}")
    if args.output:
        record = {"args": asdict(args), "ppo_args": asdict(ppo_args), "start": start, "end": end}
        write_json(args.output, record | {"mib": mib, "environment": environment()})


if __name__ == "__main__":
    own = sys.argv[1:]
    if "--" in own:
        own = own[: own.index("--")]
    flags = sys.argv[len(own) + 2 :]
    launch(lambda args: main(args, flags), tyro.cli(Args, args=own, use_underscores=True))
