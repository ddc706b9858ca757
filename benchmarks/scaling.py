"""From one GPU to many nodes: what ppo_rlhf.py keeps on each rank, computes, and sends in an update; counted, not measured.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --presets llama-1b --rows_per_rank 16 --wire_gb_per_second 25

Per parameter and rank, bytes: policy and critic 16 each (weights, gradients and Adam's two moments in fp32) and, with more
than one rank, 4 for the buckets in which gradients travel; reference and reward model 4 each; 2 for the bf16 copy that
samples. A rank sends 2 (N-1)/N * 4 bytes per trained parameter in each optimizer step (a ring), and once an update the
rollout's small tensors, which are not counted: ids, masks and four numbers a response token. An update has one epoch of one
step. Its products are those of `floors.phases`, decoding the bytes that its steps read at least. Speeds are assumptions,
given by flags; activations, norms and all that is not a product are not counted. If the ring hides behind the backward,
an update takes rollout + score + the larger of update and ring.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import floors
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
    rows_per_rank: int = 64
    """responses of a rank in an update"""
    prompt_length: int = 256
    """tokens of every prompt"""
    response_length: int = 256
    """tokens of every response"""
    tflops: float = 400.0
    """TFLOP/s of a GPU in bf16 training: about 40% of an H100's published 989"""
    memory_gb_per_second: float = 2000.0
    """GB/s that decoding reads from a GPU's memory: about 60% of an H100's published 3350"""
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


def phase_seconds(policy, critic, B, P, R, tflops, memory_gb_per_second):
    """{rollout, score, update} of B rows of P + R tokens on one GPU; policy and critic are `floors.Model`s."""
    work = floors.phases(policy, critic, "ppo", B, P, R)
    seconds = {name: floors.phase_flops(work[name]) / (tflops * 1e12) for name in ("score", "update")}
    prefill = floors.product_flops(work["rollout"][0][0]) / (tflops * 1e12)
    decoding = floors.decode_bytes(policy, B, P, R, 2) / (memory_gb_per_second * 1e9)
    return {"rollout": prefill + decoding, **seconds}


def ring(trained, ranks, gb_per_second):
    """(bytes that a rank sends in an optimizer step, their seconds)."""
    sent = 2 * (ranks - 1) / ranks * 4 * trained
    return sent, sent / (gb_per_second * 1e9)


def main(args):
    heads = "shape, trained, GB held, GPUs, rollout s, score s, update s, GB sent, ring s, ring / update, tokens/s"
    rows, (B, P, R) = [heads.split(", ")], (args.rows_per_rank, args.prompt_length, args.response_length)
    for name in args.presets:
        shape = preset(name)
        shape.critic.num_labels = 1
        policy = parameters(AutoModelForCausalLM, shape.policy)
        critic = parameters(AutoModelForSequenceClassification, shape.critic)
        models = map(floors.model_shape, (shape.policy, shape.critic))
        seconds = phase_seconds(*models, B, P, R, args.tflops, args.memory_gb_per_second)
        for n in args.ranks:
            speed = args.node_gb_per_second if n <= args.ranks_per_node else args.wire_gb_per_second
            sent, exchange = ring(policy + critic, n, speed)
            whole = seconds["rollout"] + seconds["score"] + max(seconds["update"], exchange)
            cells = [f"{(policy + critic) / 1e6:.0f}M", f"{state_bytes(policy, critic, n) / 1e9:.1f}", str(n)]
            cells += [f"{x:.2f}" for x in seconds.values()] + [f"{sent / 1e9:.2f}", f"{exchange:.3f}"]
            rows.append([name, *cells, f"{exchange / seconds['update']:.2f}", f"{n * B * (P + R) / whole:.0f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]))


if __name__ == "__main__":
    launch(main, tyro.cli(Args, use_underscores=True))
