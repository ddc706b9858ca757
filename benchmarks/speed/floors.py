"""The least that the work of each phase can take on this machine: what speed.py holds the contenders against.

On CPU a phase's floor is the time of its bare matrix products, run here in the same shapes, order and dtype, each with
weights of its own (in scoring, the frozen model's are the trained one's). The products of attention (queries by keys,
probabilities by values, only at or before the query) are counted and charged at the speed that the linear layers reach.
On CUDA training and scoring are charged at the peak of a large product measured here, decoding with the bytes of weights
and cache over the bandwidth of a large copy.

The work, B rows of P query and R response tokens, T = P + R:
    rollout    a prefill of B * P tokens and R - 1 decoding steps of B tokens through the policy; its head at B * R
    score      one forward of policy, reference, critic and reward model; heads of the first two at the response only
    update     num_epochs forwards and backwards of policy and critic; a backward is twice a forward
    sft        forward and backward of the policy, its head at the response, and the MLP of its last layer there;
               reward_model: of the critic on 2B rows, the MLP of its last layer at the one token of each that is scored
    ilql       forward and backward of the policy on T - 1 tokens, with its head, V and two Q heads at the response; the
               two target heads forward, of whose last layer only the actions' rows are read (not counted)

No head of the critic, no softmax, norm, activation, sampling or optimizer is counted: a floor is what remains when all
of them are free.
"""

import copy
from collections import namedtuple

import torch
from torch.nn import Linear
from transformers import AutoModel, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from turns import clock

Product = namedtuple("Product", "rows inner outer times backward")  # (rows, inner) @ (inner, outer), `times` in a row
# linear layers [(inner, outer)], LM head (inner, outer), those of `body` that are the last layer's MLP
Model = namedtuple("Model", "body head layers width kv_width last_mlp", defaults=[()])


def linear_layers(module):
    """[(inner, outer)] of all linear layers in a module."""
    linear = [m for m in module.modules() if isinstance(m, (Conv1D, Linear))]
    return [tuple(m.weight.shape if isinstance(m, Conv1D) else m.weight.T.shape) for m in linear]


def model_shape(config):
    """The linear layers of a causal model, from a copy without weights. width and kv_width: of a layer's queries and keys."""
    with torch.device("meta"):
        causal = AutoModelForCausalLM.from_config(config)
        body = AutoModel.from_config(config)
    blocks = getattr(body, "layers", getattr(body, "h", [None]))
    head, text = causal.get_output_embeddings(), config.get_text_config()
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_width = (getattr(text, "num_key_value_heads", None) or heads) * head_width
    head, width = (head.in_features, head.out_features), heads * head_width
    last_mlp = linear_layers(blocks[-1].mlp) if hasattr(blocks[-1], "mlp") else []
    return Model(linear_layers(body), head, text.num_hidden_layers, width, kv_width, last_mlp)


def products(model, tokens, head_tokens, times=1, backward=False):
    """The matrix products of `times` passes over `tokens` tokens, the head at `head_tokens` of them (0: no head)."""
    passes = [Product(tokens, inner, outer, times, backward) for inner, outer in model.body]
    return passes + ([Product(head_tokens, *model.head, times, backward)] if head_tokens else [])


def product_flops(work):
    """A multiplication and an addition count as two; a backward is two more products of the same size."""
    return sum((6 if p.backward else 2) * p.times * p.rows * p.inner * p.outer for p in work)


def attention_flops(model, rows, first, last, times=1, backward=False):
    """Queries at positions first .. last - 1 of each row (counted from 0) see the keys up to their own position."""
    pairs = rows * (last * (last + 1) - first * (first + 1)) // 2
    return (3 if backward else 1) * times * 4 * model.width * model.layers * pairs


def phases(policy, critic, kind, B, P, R, epochs=1):
    """{phase: (list of lists of products, FLOPs of attention)}; `kind` is a part of speed.py, models are `Model`s."""
    T = P + R
    prefill = products(policy, B * P, B)
    decode = products(policy, B, B, times=R - 1)
    rollout = ([prefill, decode], attention_flops(policy, B, 0, T - 1))
    if kind == "decode":
        return {"rollout": rollout}
    if kind in ("sft", "reward_model"):
        model, rows, read, head = (policy, B, B * R, B * R) if kind == "sft" else (critic, 2 * B, 2 * B, 0)
        body = list(model.body)
        for layer in model.last_mlp:
            body.remove(layer)
        work = products(model._replace(body=body), rows * T, head, backward=True)
        work += products(model._replace(body=model.last_mlp), read, 0, backward=True)
        return {"update": ([work], attention_flops(model, rows, 0, T, backward=True))}
    if kind == "ilql":
        width, vocabulary = policy.head
        heads = [(width, 2 * width), (2 * width, vocabulary)] * 2
        v_and_qs = Model([(width, 2 * width), (2 * width, 1), *heads], None, 0, 0, 0)
        work = products(policy, B * (T - 1), B * R, backward=True) + products(v_and_qs, B * R, 0, backward=True)
        targets = products(Model([(width, 2 * width)] * 2, None, 0, 0, 0), B * R, 0)
        return {"update": ([work, targets], attention_flops(policy, B, 0, T - 1, backward=True))}
    score = [products(policy, B * T, B * R, 2), products(critic, B * T, 0, 2)]  # and reference and reward model
    forward = attention_flops(policy, B, 0, T) + attention_flops(critic, B, 0, T)
    update = [products(policy, B * T, B * R, epochs, True), products(critic, B * T, 0, epochs, True)]
    return {"rollout": rollout, "score": (score, 2 * forward), "update": (update, 3 * epochs * forward)}


def phase_flops(phase):
    """FLOPs of one entry of `phases`."""
    work, attention = phase
    return sum(map(product_flops, work)) + attention


def decode_bytes(policy, B, P, R, size):
    """Bytes that R - 1 decoding steps read and write at least: the weights at each step, the keys and values of all rows
    before it, and its own. size: bytes of an element."""
    weights = sum(inner * outer for inner, outer in [*policy.body, policy.head])
    cache = sum(policy.layers * 2 * policy.kv_width * B * (P + t + 1) for t in range(R - 1))
    return size * ((R - 1) * weights + cache)


class BareProducts:
    """The products of a phase as tensors. Of passes that repeat, those with a backward run once and are counted `times`; the
    others run all."""

    def __init__(self, work, dtype):
        self.passes = []
        for group in work:
            tensors = []
            for p in group:
                x, w = torch.randn(p.rows, p.inner).to(dtype), torch.randn(p.inner, p.outer).to(dtype)
                out = torch.randn(p.rows, p.outer).to(dtype)
                gradients = (torch.zeros_like(x), torch.zeros_like(w)) if p.backward else (None, None)
                tensors.append((x, w, out, *gradients))
            self.passes.append((tensors, group[0].times, group[0].backward))

    def seconds(self):
        """Of all passes, measured."""
        total = 0.0
        for tensors, times, backward in self.passes:
            runs = 1 if backward else times
            began = clock()
            for _ in range(runs):
                for x, w, out, dx, dw in tensors:
                    torch.mm(x, w, out=out)
                    if backward:
                        torch.mm(out, w.t(), out=dx)
                        torch.mm(x.t(), out, out=dw)
            total += (clock() - began) * times / runs
        return total


def cpu_floor(work, dtype):
    """A function () -> {phase: seconds} that measures anew at each call, and holds the operands of one phase at a time."""

    def measure():
        seconds = {}
        for name, (groups, attention) in work.items():
            linear = sum(map(product_flops, groups))
            seconds[name] = BareProducts(groups, dtype).seconds() * (linear + attention) / linear
        return seconds

    return measure


def peak_flops(dtype, size=8192, runs=10):
    """FLOP/s of a large square product on the GPU."""
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    (a @ b, a @ b)
    began = clock()
    for _ in range(runs):
        torch.mm(a, b)
    return 2 * size**3 * runs / (clock() - began)


def bandwidth(bytes_=2**31, runs=10):
    """Bytes a second that a large copy reads and writes on the GPU."""
    a = torch.empty(bytes_, dtype=torch.uint8, device="cuda")
    b = copy.deepcopy(a)
    b.copy_(a)
    began = clock()
    for _ in range(runs):
        b.copy_(a)
    return 2 * bytes_ * runs / (clock() - began)


def gpu_seconds(work, step_bytes, prefill_flops, flops_per_second, bytes_per_second):
    """{phase: seconds} from a device's two speeds; rollout: the prefill's FLOPs and the steps' bytes."""
    seconds = {name: phase_flops(phase) / flops_per_second for name, phase in work.items()}
    if "rollout" in work:
        seconds["rollout"] = prefill_flops / flops_per_second + step_bytes / bytes_per_second
    return seconds
