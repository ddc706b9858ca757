"""The models and data that speed.py's contenders work on: published sizes with random weights, texts of exact lengths.

Whether a response ends is decided by the weights, so that it costs each contender the same: the EOS token's logit
stands apart from all others by a constant, and so does the pad token's.
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, LlamaConfig, OPTConfig
from transformers import PreTrainedTokenizerFast

from utils import UserError, check_divides

PAD, EOS = 0, 1
IDS = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": EOS}
FINAL_NORMS = ("ln_f", "model.norm", "decoder.final_layer_norm")


@dataclass
class Shape:
    policy: object
    critic: object
    batch: int = 64
    micro_batch: int = 64
    prompt: int = 16
    response: int = 48
    epochs: int = 4


def gpt2(layers, width, vocabulary, positions=128):
    heads = 12 if width % 12 == 0 else max(width // 64, 1)
    return GPT2Config(n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocabulary, n_positions=positions, **IDS)


def llama(layers, width, inner, heads, kv_heads, vocabulary, tied):
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": inner, "vocab_size": vocabulary}
    heads = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return LlamaConfig(**sizes, **heads, **IDS, tie_word_embeddings=tied, max_position_embeddings=2048)


def opt(layers, width, heads, projection, norm_before, vocabulary=50272):
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "ffn_dim": 4 * width, "num_attention_heads": heads}
    return OPTConfig(
        **sizes, **IDS, word_embed_proj_dim=projection, do_layer_norm_before=norm_before, vocab_size=vocabulary
    )


def preset(name):
    """The published sizes of a model by its name, and a workload that fits it."""
    if name == "smollm2-135m":
        config = llama(30, 576, 1536, 9, 3, 49152, tied=True)
        return Shape(config, config, batch=16, micro_batch=16, epochs=1)
    if name == "gpt2-124m":
        config = gpt2(12, 768, 50257, positions=1024)
        return Shape(config, config, prompt=128, response=128)
    if name == "llama-1b":  # TinyLlama's
        config = llama(22, 2048, 5632, 32, 4, 32000, tied=False)
        return Shape(config, config, micro_batch=32, prompt=128, response=128)
    if name == "opt-1.3b":  # DeepSpeed-Chat's pair: a critic and reward model of 350M
        critic = opt(24, 1024, 16, 512, norm_before=False)
        return Shape(opt(24, 2048, 32, 2048, True), critic, micro_batch=16, prompt=256, response=256, epochs=1)
    try:
        family, size, vocabulary = name.split("-")
        layers, width = map(int, size.split("x"))
        if family != "gpt2" or vocabulary[0] != "v" or min(layers, width, int(vocabulary[1:]) - 4) < 1:
            raise ValueError(name)
        config = gpt2(layers, width, int(vocabulary[1:]))
    except ValueError:
        known = "gpt2-<layers>x<width>-v<vocabulary>, smollm2-135m, gpt2-124m, llama-1b or opt-1.3b"
        raise UserError(f"--presets {name}: unknown; give {known}") from None
    return Shape(config, config)


def sized(shape, args):
    """The shape with the sizes given on the command line."""
    given = {"batch": args.batch_size, "prompt": args.prompt_length, "response": args.response_length}
    given |= {"epochs": args.num_epochs, "micro_batch": args.micro_batch_size}
    shape = replace(shape, **{name: value for name, value in given.items() if value is not None})
    shape.micro_batch = min(shape.micro_batch, shape.batch)
    check_divides(shape.micro_batch, shape.batch, "--batch_size by --micro_batch_size")
    limit = getattr(shape.policy, "max_position_embeddings", math.inf)
    if isinstance(shape.policy, GPT2Config):
        shape.policy.n_positions = max(limit, shape.prompt + shape.response)
    return shape


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def build_tokenizer(vocabulary):
    """One token a word: <pad>, <eos>, w2, w3, ..."""
    words = {"<pad>": PAD, "<eos>": EOS, **{f"w{i}": i for i in range(2, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


@torch.no_grad()
def set_ending(model, probability):
    """Give the EOS token this probability at every step, whatever came before, and the pad token practically none.

    Coordinate 0 of the last hidden state is made a large constant, by the final norm's bias or, where there is none, by
    the embeddings; it means nothing to ordinary tokens, and sets the logits of these two apart.
    """
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied = inputs.data_ptr() == outputs.data_ptr()
    (final_norm,) = (module for name, module in model.named_modules() if name.endswith(FINAL_NORMS))
    if getattr(final_norm, "bias", None) is not None:
        final_norm.bias[0] = 30.0
        outputs[:, 0] = 0.0
    else:
        inputs[:, 0] = 4.0
        outputs[:, 0] = 4.0 if tied else 0.0
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, len(outputs), (8, 32), generator=generator)
    constant = model.base_model(ids).last_hidden_state[..., 0].mean()
    logits = model(ids).logits
    others = torch.logsumexp(logits[..., 2:], -1).mean()
    wanted = others + math.log(probability / (1 - probability)) if probability else others - 40
    outputs[EOS, 0] += (wanted - logits[..., EOS].mean()) / constant
    outputs[PAD, 0] -= 40 / constant


def build_model(auto_class, config, folder, tokenizer, seed, ending=None):
    """Random weights and the tokenizer as a folder that every contender opens; returns its name."""
    transformers.logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = type(config).from_dict(config.to_dict())
    dropouts = {name: 0.0 for name, value in vars(config).items() if "drop" in name and type(value) is float}
    config.update({"num_labels": 1, **dropouts})
    model = auto_class.from_config(config, dtype=torch.float32)
    if ending is not None:
        set_ending(model, ending)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def build_world(shape, folder, parts, lengths, steps):
    """The folders and files of a shape, as {name: path}. sft and reward_model: `steps` batches, so a turn is an epoch."""
    vocabulary = shape.policy.vocab_size
    tokenizer, generator = build_tokenizer(vocabulary), torch.Generator().manual_seed(1)

    def text(length):
        return " ".join(f"w{i}" for i in torch.randint(2, vocabulary, (length,), generator=generator).tolist())

    def write(name, rows):
        Path(folder, name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(Path(folder, name))

    lm, score = AutoModelForCausalLM, AutoModelForSequenceClassification
    world = {"policy": build_model(lm, shape.policy, folder / "policy", tokenizer, 1, ending=0.0)}
    world["critic"] = build_model(score, shape.critic, folder / "critic", tokenizer, 2)
    if "decode" in parts and "geometric" in lengths:
        ending = 4 / shape.response
        world["policy_geometric"] = build_model(lm, shape.policy, folder / "geometric", tokenizer, 1, ending)
    world["prompts"] = write("prompts.jsonl", [{"prompt": text(shape.prompt)} for _ in range(2 * shape.batch)])
    for name, count in {"": steps * shape.batch, "held_out_": 2}.items():
        rows = [(text(shape.prompt), *(f" {text(shape.response - 1)}" for _ in range(2))) for _ in range(count)]
        world[f"{name}completions"] = write(
            f"{name}completions.jsonl", [{"prompt": p, "completion": a} for p, a, _ in rows]
        )
        rated = [{"prompt": p, "completion": a, "reward": float(i % 2)} for i, (p, a, _) in enumerate(rows)]
        world[f"{name}rated"] = write(f"{name}rated.jsonl", rated)
        pairs = [{"prompt": p, "chosen": a, "rejected": b} for p, a, b in rows]
        world[f"{name}comparisons"] = write(f"{name}comparisons.jsonl", pairs)
    return world
