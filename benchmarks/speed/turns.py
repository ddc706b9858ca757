"""How a contender of speed.py takes turns with the others: it warms up, then works only when it is told to.

The parent holds one process per contender. A contender warms up, prints a line and waits; at each line it reads it does
one turn, a fixed number of steps, and prints a JSON line; at the end of its input it exits. A process that waits uses
no processor, so only one contender computes at any time. Needs nothing but torch: the peers' environments have that.

    turns = Turns(warmup=2, steps=1)    # stdout now belongs to the protocol; what the contender prints goes to stderr
    for step in ...:
        <one step of work>
        turns.step_done(rollout=0.5)    # seconds of phases and counts are summed over the steps of a turn
"""

import json
import os
import resource
import sys
import time

import torch


def clock():
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak_memory():
    """Forget the peak so far, so that importing and compiling do not count."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:  # not Linux: the peak of the whole process is all there is
        pass


def resident_memory(name):
    """MiB of a line of Linux's status of this process: VmRSS now, VmHWM the peak."""
    with open("/proc/self/status") as file:
        return int(next(line.split()[1] for line in file if line.startswith(name))) / 2**10


def peak_memory():
    """MiB: of the CUDA allocator where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        return resident_memory("VmHWM")
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


class CompileWatch:
    """Counts compilations, the deferred ones of backward passes included, and adds up their seconds."""

    def __init__(self):
        from torch._dynamo.callback import callback_handler

        self.count, self.seconds, self.began = 0, 0.0, 0.0
        callback_handler.register_start_callback(self.start)
        callback_handler.register_end_callback(self.end)

    def start(self, _):
        self.count, self.began = self.count + 1, time.perf_counter()

    def end(self, _):
        self.seconds += time.perf_counter() - self.began


class Turns:
    """Counts steps; when a turn is complete, reports it and waits for the next one."""

    def __init__(self, warmup, steps, compiled=False):
        self.parent = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.left, self.steps, self.warm = warmup, steps, False
        self.sums, self.profiler, self.trace = {}, None, None
        self.compiles = CompileWatch() if compiled else None
        self.began = clock()

    def step_done(self, **sums):
        """Note that a step is over, with the seconds and counts it came to. Exits when no turn is wanted any more."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.left -= 1
        if self.left:
            return
        report = {"wall": clock() - self.began, "steps": self.steps if self.warm else 0, **self.sums}
        if self.profiler:
            self.profiler.__exit__(None, None, None)
            self.profiler.export_chrome_trace(self.trace)
        report |= {"memory_mib": peak_memory(), "threads": torch.get_num_threads()}
        report["compiles"], report["compile_seconds"] = 0, 0.0
        if self.compiles:
            report |= {"compiles": self.compiles.count, "compile_seconds": self.compiles.seconds}
        print(json.dumps(report), file=self.parent, flush=True)
        self.wait()

    def wait(self):
        line = sys.stdin.readline()
        if not line:
            sys.exit(0)
        if not self.warm:
            reset_peak_memory()
        self.left, self.sums, self.warm, self.profiler = self.steps, {}, True, None
        self.trace = json.loads(line)["trace"]
        if self.trace:
            self.profiler = torch.profiler.profile(record_shapes=True)
            self.profiler.__enter__()
        self.began = clock()
