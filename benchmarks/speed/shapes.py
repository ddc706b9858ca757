"""What the contenders work on: models of published sizes with random weights, and texts of words.

Where a response ends is decided by the weights: the logit of the EOS token stands apart from all
others by a constant, so that every token ends a response with the same probability. Both sides of a
comparison sample responses of such lengths without a line of code in either of them.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from utils import UserError, check_divides

PAD = 0
EOS = 1
IDS = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": EOS}
FINAL_NORMS = ("ln_f", "model.norm")
CHAT_MEDIAN, CHAT_SIGMA = 30, 0.7  # Of the log-normal lengths of chat-like prompts.
CHAT_ENDING = 1 / 30  # The probability that a token of a chat-like response is its last one.


@dataclass
class Workload:
    """What one comparison measures, and the sizes of its work."""

    part: str
    model: str
    chat: bool = False
    """prompts and responses of different lengths; else all have the full length"""
    batch: int = 64
    """rows (pairs for the reward model) of a step"""
    micro_batch: int = 64
    """rows of a forward"""
    prompt: int = 16
    """tokens of a prompt, or of the longest"""
    response: int = 48
    """tokens of a response, or of the longest possible"""
    epochs: int = 4
    """PPO epochs of an update"""


def workload(part, model, **sizes):
    """The workload of a part of compare.py for a model, with the sizes that are not None replaced.

    SmolLM2 gets smaller ones: a CPU takes a minute for one of its updates, and TRL's trainer and
    ours have to fit into 24 GiB side by side.
    """
    work = Workload(part, model)
    if part == "chat":
        work = replace(work, chat=True, micro_batch=16, prompt=128, response=64)
    if model == "smollm2-135m":
        work = replace(work, batch=16, micro_batch=4, epochs=1)
    given = {name: size for name, size in sizes.items() if size is not None}
    for name, size in given.items():
        if size < 1:
            raise UserError(f"--{name} {size}: must be at least 1")
    work = replace(work, **given)
    work.micro_batch = min(work.micro_batch, work.batch)
    check_divides(work.micro_batch, work.batch, "--batch by --micro_batch")
    return work


# --------------------------------------------------------------------------------------------------
# Lengths


def quantiles(count):
    """The middles of `count` equal parts of the interval from 0 to 1."""
    return [(i + 0.5) / count for i in range(count)]


def prompt_lengths(work):
    """Tokens of each prompt of a batch; chat-like ones are the quantiles of a log-normal law."""
    if not work.chat:
        return [work.prompt] * work.batch
    law = NormalDist(math.log(CHAT_MEDIAN), CHAT_SIGMA)
    lengths = [round(math.exp(law.inv_cdf(q))) for q in quantiles(work.batch)]
    return [min(length, work.prompt) for length in lengths]


def response_lengths(work):
    """Tokens of each response as they come out on average: quantiles of a geometric law."""
    if not work.chat:
        return [work.response] * work.batch
    goes_on = math.log(1 - CHAT_ENDING)
    lengths = [math.ceil(math.log(1 - q) / goes_on) for q in quantiles(work.batch)]
    return [min(length, work.response) for length in lengths]


# --------------------------------------------------------------------------------------------------
# Models


def gpt2(layers, width, vocabulary, positions):
    """The config of a GPT-2 with heads of 64, or twelve of them where the width allows it."""
    return GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=12 if width % 12 == 0 else max(width // 64, 1),
        vocab_size=vocabulary,
        n_positions=positions,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **IDS,
    )


def smollm2():
    """The config of SmolLM2-135M."""
    return LlamaConfig(
        num_hidden_layers=30,
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        **IDS,
    )


def model_config(name, positions=128):
    """The config of a model by its name: gpt2-<layers>x<width>-v<vocabulary> or smollm2-135m.

    positions: how many a GPT-2 gets.
    """
    if name == "smollm2-135m":
        return smollm2()
    match = re.fullmatch(r"gpt2-([1-9]\d*)x([1-9]\d*)-v([1-9]\d+)", name)
    if match is None:
        known = "gpt2-<layers>x<width>-v<vocabulary> or smollm2-135m"
        raise UserError(f"--models {name}: unknown; give {known}")
    layers, width, vocabulary = map(int, match.groups())
    return gpt2(layers, width, vocabulary, positions)


@torch.no_grad()
def set_ending(model, probability):
    """Give the EOS token this probability at every step, and the pad token practically none.

    Coordinate 0 of the last hidden state is made a large constant: by the final norm's bias or,
    where it has none, by the embeddings. It means nothing to ordinary tokens, and sets the logits
    of these two apart.
    """
    inputs = model.get_input_embeddings().weight
    outputs = model.get_output_embeddings().weight
    (final_norm,) = (x for name, x in model.named_modules() if name.endswith(FINAL_NORMS))
    if getattr(final_norm, "bias", None) is not None:
        final_norm.bias[0] = 30.0
        outputs[:, 0] = 0.0
    else:
        is_tied = inputs.data_ptr() == outputs.data_ptr()
        inputs[:, 0] = 4.0
        outputs[:, 0] = 4.0 if is_tied else 0.0
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, len(outputs), (8, 32), generator=generator)
    constant = model.base_model(ids).last_hidden_state[..., 0].mean()
    logits = model(ids).logits
    others = torch.logsumexp(logits[..., 2:], -1).mean()
    wanted = others - 40
    if probability > 0:
        wanted = others + math.log(probability / (1 - probability))
    outputs[EOS, 0] += (wanted - logits[..., EOS].mean()) / constant
    outputs[PAD, 0] -= 40 / constant


def build_tokenizer(vocabulary):
    """One token a word: <pad>, <eos>, w2, w3, ..."""
    words = {"<pad>": PAD, "<eos>": EOS}
    words |= {f"w{i}": i for i in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


# --------------------------------------------------------------------------------------------------
# Folders


def build_models(work, folder):
    """Write the policy and the critic (also the reward model) with their tokenizer."""
    transformers.logging.disable_progress_bar()
    config = model_config(work.model, max(128, work.prompt + work.response))
    tokenizer = build_tokenizer(config.vocab_size)
    torch.manual_seed(1)
    policy = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    set_ending(policy, CHAT_ENDING if work.chat else 0.0)
    config.num_labels = 1
    critic = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    paths = {}
    for name, model in (("policy", policy), ("critic", critic)):
        paths[name] = str(folder / name)
        model.save_pretrained(paths[name])
        tokenizer.save_pretrained(paths[name])
    return paths


def build_world(work, folder, num_batches):
    """Write the models and the rows that the contenders open, as {name: path}.

    The prompts are exactly one batch, so that every update works on the same ones. Of the trainers'
    rows there are num_batches batches, so that they never begin a second epoch.
    """
    paths = build_models(work, folder)
    vocabulary = model_config(work.model).vocab_size
    generator = torch.Generator().manual_seed(1)

    def text(length):
        ids = torch.randint(2, vocabulary, (length,), generator=generator)
        return " ".join(f"w{i}" for i in ids.tolist())

    def trainer_row():
        row = {"prompt": text(work.prompt)}
        for column in ("completion",) if work.part == "sft" else ("chosen", "rejected"):
            row[column] = " " + text(work.response - 1)  # EOS is the last token.
        return row

    rows = {"prompts": [{"prompt": text(length)} for length in prompt_lengths(work)]}
    if work.part in ("sft", "reward_model"):
        rows["rows"] = [trainer_row() for _ in range(num_batches * work.batch)]
        rows["held_out"] = [trainer_row() for _ in range(2)]
    for name, lines in rows.items():
        paths[name] = str(folder / f"{name}.jsonl")
        Path(paths[name]).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return paths
