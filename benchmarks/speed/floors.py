"""The least that each phase can take on this machine: its matrix products, and nothing else.

A phase's floor is the time of its bare products, run here in the same shapes and dtype, each with
weights of its own. The products of attention (queries with keys, probabilities with values, only at
or before the query) are counted, and charged at the speed that the linear layers reach. The work:

    rollout    the policy on all prompt tokens, then one step per response token but the last, of
               the rows that have not ended; the head wherever a token is sampled
    score      one forward of policy, reference, critic and reward model; the heads of the first two
               at the response alone
    update     epochs times forward and backward of policy and critic; a backward is two forwards
    sft, reward_model    the update phase alone: of the policy with its head at the response, and of
               the critic on two sequences a pair

Padding, the critic's head, softmax, norms, activations, sampling and the optimizer count nothing.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch.nn import Linear
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D

from shapes import prompt_lengths, response_lengths
from turns import clock


@dataclass
class Model:
    """The linear layers of a causal model: [(inner, outer)] of its body, and its head."""

    body: list
    head: tuple
    layers: int
    width: int
    """of all queries of a layer"""


@dataclass
class Pass:
    """Products (rows, inner) @ (inner, outer), done `times` times, perhaps with their backward."""

    products: list
    """[(rows, inner, outer)]"""
    times: int = 1
    backward: bool = False


@dataclass
class Phase:
    passes: list
    attention: int
    """FLOPs"""


def model_of(config):
    """The `Model` of a config, from a copy without weights."""
    with torch.device("meta"):
        body = AutoModel.from_config(config)
    linear = []
    for module in body.modules():
        if isinstance(module, Linear):
            linear.append((module.in_features, module.out_features))
        elif isinstance(module, Conv1D):
            linear.append(tuple(module.weight.shape))
    head_width = getattr(config, "head_dim", None)
    head_width = head_width or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_width
    return Model(linear, (config.hidden_size, config.vocab_size), config.num_hidden_layers, width)


def products(model, tokens, head_tokens):
    """The products of a forward over `tokens` tokens, with the head at `head_tokens` of them."""
    found = [(tokens, inner, outer) for inner, outer in model.body]
    if head_tokens > 0:
        found.append((head_tokens, *model.head))
    return found


def attention_flops(model, lengths):
    """FLOPs of a forward over rows of these lengths: each token sees itself and those before it."""
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return 4 * model.width * model.layers * pairs


def pass_flops(one):
    """A multiplication and an addition count as two."""
    flops = sum(2 * rows * inner * outer for rows, inner, outer in one.products)
    return flops * one.times * (3 if one.backward else 1)


def phase_flops(phase):
    """All FLOPs of a phase."""
    return sum(map(pass_flops, phase.passes)) + phase.attention


def rollout_phase(model, prompts, responses):
    """Sampling responses of these lengths to prompts of these lengths."""
    passes = [Pass(products(model, sum(prompts), len(prompts)))]
    # The rows that each step after the first sampled token works on, and how often so many do.
    going_on = [sum(length > t for length in responses) for t in range(1, max(responses))]
    for rows, times in Counter(going_on).items():
        passes.append(Pass(products(model, rows, rows), times))
    read = [prompt + response - 1 for prompt, response in zip(prompts, responses, strict=True)]
    return Phase(passes, attention_flops(model, read))


def phases(model, work):
    """{name: Phase} of a `Workload`; policy, critic, reference and reward model are of one size."""
    prompts = prompt_lengths(work)
    responses = response_lengths(work)
    lengths = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    tokens = sum(lengths)
    attention = attention_flops(model, lengths)
    with_head = products(model, tokens, sum(responses))
    without = products(model, tokens, 0)
    if work.part == "sft":
        return {"update": Phase([Pass(with_head, backward=True)], 3 * attention)}
    if work.part == "reward_model":
        return {"update": Phase([Pass(without, times=2, backward=True)], 6 * attention)}
    found = {"rollout": rollout_phase(model, prompts, responses)}
    if work.part != "decode":
        found["score"] = Phase([Pass(with_head, times=2), Pass(without, times=2)], 4 * attention)
        found["update"] = Phase(
            [Pass(with_head, work.epochs, True), Pass(without, work.epochs, True)],
            6 * work.epochs * attention,
        )
    return found


def pass_seconds(one, weights, options):
    """Seconds of a pass. weights: those of earlier passes by layer, to which this one adds."""
    operands = []
    for number, (rows, inner, outer) in enumerate(one.products):
        key = (number, inner, outer)
        if key not in weights:
            weights[key] = torch.randn(inner, outer, **options)
        x = torch.randn(rows, inner, **options)
        y = torch.randn(rows, outer, **options)
        operands.append((x, weights[key], y))
    gradients = [(torch.zeros_like(x), torch.zeros_like(w)) for x, w, _ in operands]
    # A pass with a backward is long enough to be measured once; short ones are repeated.
    repeats = 1 if one.backward else one.times
    began = clock()
    for _ in range(repeats):
        for (x, w, y), (dx, dw) in zip(operands, gradients, strict=True):
            torch.mm(x, w, out=y)
            if one.backward:
                torch.mm(y, w.T, out=dx)
                torch.mm(x.T, y, out=dw)
    return (clock() - began) * one.times / repeats


def phase_seconds(phase, dtype):
    """The floor of a phase in seconds, measured now."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = {}
    options = {"dtype": dtype, "device": device}
    seconds = sum(pass_seconds(one, weights, options) for one in phase.passes)
    linear = sum(map(pass_flops, phase.passes))
    return seconds * (linear + phase.attention) / linear
