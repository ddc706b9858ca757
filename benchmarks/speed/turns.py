"""How a contender takes turns with the others: it warms up, then works only when it is told to.

compare.py holds one process per contender. A contender warms up, prints a line and waits; at each
line that it reads it does one turn, a fixed number of steps, and prints a line of JSON; at the end
of its input it exits. A process that waits uses no processor, so only one contender computes at any
time. This file needs nothing but torch, because the peers' environments have no more.

    turns = Turns(warmup=2, steps=1)  # What the contender prints goes to stderr from here on.
    for step in ...:
        <one step of work>
        turns.step_done(rollout=0.5)  # What is given here is summed over the steps of a turn.
"""

import json
import os
import resource
import sys
import time

import torch


def clock():
    """Seconds, after the device has finished what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def resident_memory(name):
    """MiB from a line of Linux's status of this process: VmRSS now, VmHWM at its peak."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(name))
    return int(line.split()[1]) / 2**10


def reset_peak_memory():
    """Forget the peak so far, so that importing and compiling do not count."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def peak_memory():
    """MiB at the peak: of the CUDA allocator where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "linux":
        return resident_memory("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Turns:
    """Counts steps; when a turn is complete, reports it and waits for the next one."""

    def __init__(self, warmup, steps):
        # Standard output belongs to the protocol; what is printed goes to standard error.
        self.parent = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.steps = steps
        self.left = warmup
        self.is_warm = False
        self.sums = {}
        self.began = clock()

    def step_done(self, **sums):
        """Note that a step is over. Exits when no further turn is wanted."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.left -= 1
        if self.left > 0:
            return
        report = {"seconds": clock() - self.began, **self.sums, "memory_mib": peak_memory()}
        report["threads"] = torch.get_num_threads()
        print(json.dumps(report), file=self.parent, flush=True)
        if not sys.stdin.readline():
            sys.exit(0)
        if not self.is_warm:
            reset_peak_memory()
        self.is_warm = True
        self.left = self.steps
        self.sums = {}
        self.began = clock()
