"""From one GPU to many nodes: what ppo_rlhf.py keeps on each rank and what crosses the wire, counted, not measured.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --presets llama-1b --tokens_per_rank 8192 --wire_gb_per_second 25

Per parameter and rank, bytes: policy and critic 16 each (weights, gradients and Adam's two moments in fp32) and, with more
than one rank, 4 for the buckets in which gradients travel; reference and reward model 4 each; 2 for the bf16 copy that
samples. A rank sends 2 (N-1)/N * 4 bytes per trained parameter in each optimizer step (a ring), and once an update the
rollout's small tensors, which are not counted: ids, masks and four numbers a response token. A step's products are 6 FLOPs
per trained parameter and token, attention and the two heads left out, so that the time computed for them is a little too
short. Speeds are assumptions, given by flags; activations are not counted.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from shapes import preset
from utils import launch


@dataclass
class Args:
    presets: tuple[str, ...] = ("gpt2-124m", "llama-1b", "opt-1.3b")
    """shapes of speed.py; critic and reward model as there"""
    ranks: tuple[int, ...] = (1, 8, 64)
    """numbers of GPUs; up to `ranks_per_node` of them talk at the faster speed"""
    ranks_per_node: int = 8
    """GPUs that are connected among themselves"""
    tokens_per_rank: int = 16384
    """prompt and response tokens of a rank in one optimizer step"""
    tflops: float = 400.0
    """TFLOP/s of a GPU in bf16 training: about 40% of an H100's published 989"""
    node_gb_per_second: float = 450.0
    """GB/s that a GPU sends inside a node: an H100's published NVLink, one direction"""
    wire_gb_per_second: float = 50.0
    """GB/s that a GPU sends between nodes: one 400 Gb/s adapter for each GPU"""


def parameters(auto_class, config):
    """Number of parameters, from a model without storage."""
    with torch.device("meta"):
        return sum(p.numel() for p in auto_class.from_config(config).parameters())


def state_bytes(policy, critic, ranks):
    """What a rank holds between two updates; the reward model is as large as the critic, the reference as the policy."""
    return (16 + 4 * (ranks > 1)) * (policy + critic) + 4 * (policy + critic) + 2 * policy


def step_seconds(trained, ranks, tokens, tflops, gb_per_second):
    """(seconds of the products, seconds of the ring, bytes a rank sends) of one optimizer step."""
    sent = 2 * (ranks - 1) / ranks * 4 * trained
    return 6 * trained * tokens / (tflops * 1e12), sent / (gb_per_second * 1e9), sent


def even_tokens(ranks, tflops, gb_per_second):
    """Tokens of a rank and step below which the ring takes longer than the products, whatever the model."""
    return 2 * (ranks - 1) / ranks * 4 / (gb_per_second * 1e9) * tflops * 1e12 / 6


def main(args):
    rows = [
        ["shape", "parameters trained", "GB held", "GPUs", "GB sent a step", "products s", "ring s", "even at tokens"]
    ]
    for name in args.presets:
        shape = preset(name)
        shape.critic.num_labels = 1
        policy = parameters(AutoModelForCausalLM, shape.policy)
        critic = parameters(AutoModelForSequenceClassification, shape.critic)
        for n in args.ranks:
            speed = args.node_gb_per_second if n <= args.ranks_per_node else args.wire_gb_per_second
            products, ring, sent = step_seconds(policy + critic, n, args.tokens_per_rank, args.tflops, speed)
            even = even_tokens(n, args.tflops, speed)
            cells = [f"{(policy + critic) / 1e6:.0f}M", f"{state_bytes(policy, critic, n) / 1e9:.1f}", str(n)]
            rows.append([name, *cells, f"{sent / 1e9:.2f}", f"{products:.3f}", f"{ring:.3f}", f"{even:.0f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]))


if __name__ == "__main__":
    launch(main, tyro.cli(Args, use_underscores=True))
