"""What the scripts share and a reader of the papers would skip. The algorithms are not here.

Processes and seeds · statistics over processes · data files · tokenizers · models · micro-batches ·
flags · run folders.
"""

import datetime
import hashlib
import importlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer
from transformers.modeling_layers import GradientCheckpointingLayer


class UserError(Exception):
    """A mistake of the user's. Its one line says what is wrong, where, and what to do about it."""


# --------------------------------------------------------------------------------------------------
# Processes and seeds


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many, and the device that it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0


def launch(main, args):
    """Run `main(args)`. A mistake of the user's ends in one line and exit code 1."""
    try:
        main(args)
    except (UserError, FileExistsError, NotADirectoryError) as error:
        # Before the ranks are connected all of them make the same mistake, so one of them reports
        # it.
        if dist.is_initialized() or os.environ.get("RANK", "0") == "0":
            print(f"error: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        sys.exit(1)
    # Only after success: a rank that failed must not wait here for ranks that wait for it.
    if dist.is_initialized():
        dist.destroy_process_group()


def init_ranks(timeout_minutes=60):
    """Join the processes that `torchrun` started (nccl on CUDA, gloo on CPU); alone without it.

    timeout_minutes: how long a rank waits for the others, for instance while rank 0 saves.
    """
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        backend = "nccl"
        torch.cuda.set_device(device)
        # TF32 for fp32 matrix products: several times faster, and precise enough for training.
        torch.set_float32_matmul_precision("high")
        # With a mask, cuDNN's attention can return NaN gradients:
        # github.com/pytorch/pytorch#196678.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if "RANK" in os.environ and not dist.is_initialized():
        timeout = datetime.timedelta(minutes=timeout_minutes)
        device_id = device if device.type == "cuda" else None
        dist.init_process_group(backend, timeout=timeout, device_id=device_id)
    if dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size(), device)
    return Ranks(0, 1, device)


def seeded(*key):
    """A CPU generator that depends on `key` alone, such as (seed, "uniforms", update).

    It is the same on every rank, and there is no state to save.
    """
    digest = hashlib.sha256(repr(key).encode()).hexdigest()
    return torch.Generator().manual_seed(int(digest[:15], 16))


class Stopwatch:
    """Seconds between laps, each taken after the device has finished what it was given."""

    def __init__(self, device):
        self.device = device
        self.laps = {}
        self.last = self.now()

    def now(self):
        torch.get_device_module(self.device).synchronize(self.device)
        return time.perf_counter()

    def lap(self, name):
        """Keep the seconds since the last lap, or the start, under a name."""
        now = self.now()
        self.laps[name] = now - self.last
        self.last = now


def check_divides(divisor, number, what):
    """Refuse sizes that would leave a remainder; `what` names the flags."""
    if divisor < 1 or number < 1 or number % divisor != 0:
        raise UserError(f"{what}: {number} cannot be divided evenly by {divisor}")


def all_gather(x):
    """The tensors of all ranks, all of one shape, concatenated along dim 0 in rank order."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def gather_objects(x):
    """A list of the objects of all ranks, in rank order."""
    if not dist.is_initialized():
        return [x]
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, x)
    return parts


def sum_over_ranks(x):
    """The sum of a tensor over all ranks, in rank order, so that every rank gets the same bits."""
    return all_gather(x[None]).sum(0)


@torch.no_grad()
def broadcast_weights(model):
    """Give every rank the weights of rank 0, so that all of them start from the same ones."""
    if dist.is_initialized():
        for x in [*model.parameters(), *model.buffers()]:
            dist.broadcast(x, src=0)


@torch.no_grad()
def sum_gradients(model):
    """Replace the gradient of each parameter by its sum over all ranks.

    A rank that had no rows takes part with zeros.
    """
    if not dist.is_initialized():
        return
    transfers = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            transfers.append(dist.all_reduce(parameter.grad, async_op=True))
    for transfer in transfers:
        transfer.wait()


# --------------------------------------------------------------------------------------------------
# Statistics over processes


def masked_mean(x, mask):
    """Mean of x where mask is True, over all ranks: 0-d, without gradient; 0 if mask is nowhere
    True.

    x outside the mask may be anything, NaN included.
    """
    total = torch.where(mask, x.detach(), 0).double().sum()
    count = mask.double().sum()
    total, count = sum_over_ranks(torch.stack([total, count]))
    return (total / count.clamp(min=1)).to(x.dtype)


def whiten(x, mask, shift_mean=True):
    """Scale x to unit (biased) variance and, with shift_mean, to mean 0, where mask is True.

    Mean and variance are over all ranks. Entries outside the mask become 0.
    """
    values = torch.where(mask, x.detach(), 0).double()
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0).to(x.dtype)


class Means:
    """Exact means by name, over micro-batches and ranks.

    Sums and counts are kept in fp64 on the device, so that adding never waits for it.
    """

    def __init__(self):
        self.sums = {}

    def add(self, tensors, mask=None):
        """Add the entries of {name: tensor} where mask is True, or all of them without a mask."""
        for name, x in tensors.items():
            where = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
            total = torch.where(where, x.detach(), 0).double().sum()
            self.add_sum(name, total, where.double().sum())

    def add_sum(self, name, total, count):
        """Add a sum over `count` entries, both 0-d tensors."""
        pair = torch.stack([total.detach().double(), count.double()])
        self.sums[name] = self.sums.get(name, 0) + pair

    def merge(self, other):
        """Add everything that another `Means` has collected on this rank."""
        for name, pair in other.sums.items():
            self.sums[name] = self.sums.get(name, 0) + pair

    def over_ranks(self):
        """{name: float}: the means over all ranks. A rank without rows may have added nothing."""
        pairs = torch.stack(list(self.sums.values())).tolist() if self.sums else []
        parts = gather_objects(dict(zip(self.sums, pairs, strict=True)))
        means = {}
        for name in dict.fromkeys(name for part in parts for name in part):
            total = sum(part[name][0] for part in parts if name in part)
            count = sum(part[name][1] for part in parts if name in part)
            means[name] = total / max(count, 1)
        return means


# --------------------------------------------------------------------------------------------------
# Data files


def check_path(path):
    """Refuse, without asking the Hub, a path that is not here and cannot be a name there."""
    starts_local = path.startswith((".", "/", "~", "runs/", "data/"))
    ends_local = path.endswith((".json", ".jsonl", ".parquet"))
    is_local = starts_local or ends_local or path.count("/") > 1
    if is_local and not Path(path).exists():
        raise UserError(f"{path}: no such file or folder")


def find_data(path):
    """The arguments of `datasets.load_dataset` for a file, a folder of files, or a Hub name."""
    if not Path(path).exists():
        return {"path": path}
    files = [Path(path)]
    if Path(path).is_dir():
        files = sorted(
            x for x in Path(path).iterdir() if x.suffix in (".json", ".jsonl", ".parquet")
        )
    kinds = {"parquet" if file.suffix == ".parquet" else "json" for file in files}
    is_empty = not any(file.read_bytes().strip() for file in files)
    if len(kinds) != 1 or is_empty:
        raise UserError(f"{path}: empty: no row in .json, .jsonl or .parquet files, or both kinds")
    return {"path": kinds.pop(), "data_files": [str(file) for file in files]}


def is_text_or_messages(cell):
    """Whether a cell is a string or a list of messages with role and content (or tool calls)."""
    if isinstance(cell, str):
        return True
    if not isinstance(cell, list):
        return False
    for message in cell:
        if not isinstance(message, dict) or not message.get("role"):
            return False
        has_content = isinstance(message.get("content"), str | list)
        if not has_content and not message.get("tool_calls"):
            return False
    return True


def load_rows(path, columns, max_rows=None):
    """A `datasets.Dataset` from a .json(l) or .parquet file, a folder of them, or a Hub name.

    columns: groups of text columns, one of which must be there, e.g. [("prompt", "completion"),
    ("text",)]. max_rows: keep the first so many rows. Raises UserError for unreadable files,
    missing columns, and the first cell that is neither a text nor a list of messages.
    """
    check_path(path)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    source = find_data(path)
    try:
        rows = datasets.load_dataset(**source, split="train")
    except Exception as error:  # The library raises many kinds; the first line of each says why.
        raise UserError(f"{path}: cannot be read as rows: {error.__cause__ or error}") from error
    if not any(set(group) <= set(rows.column_names) for group in columns):
        wanted = " or ".join("+".join(group) for group in columns)
        raise UserError(f"{path}: needs {wanted}; it has {', '.join(rows.column_names)}")
    if max_rows is not None:
        rows = rows.select(range(min(max_rows, len(rows))))
    text_columns = {name for group in columns for name in group}
    for name in sorted(text_columns & set(rows.column_names)):
        for number, cell in enumerate(rows[name], start=1):
            if name == "messages" and isinstance(cell, str):
                raise UserError(f"{path}: row {number}: messages is a text, not a list of messages")
            if not is_text_or_messages(cell):
                wanted = "not a text or messages of role and content"
                raise UserError(f"{path}: row {number}: {name} is {cell!r}, {wanted}")
    return rows


def hold_out(rows, seed):
    """(training rows, held-out rows): one row in twenty by the seed, and no copy of it stays."""
    order = torch.randperm(len(rows), generator=seeded(seed, "held out")).tolist()
    held_out = [rows[i] for i in order[: len(rows) // 20]]
    copies = {repr(row) for row in held_out}
    kept = [row for row in rows if repr(row) not in copies]
    if not kept:
        raise UserError("--dataset: every row is a copy of a held-out row; name --eval_dataset")
    return kept, held_out


def load_function(spec, flag):
    """The function that `path/to/file.py:name` names; `flag` is for the error's text."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"{flag} {spec}: no such file; give path/to/file.py:function")
    module_spec = importlib.util.spec_from_file_location(f"user_file_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    module_spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function) or not hasattr(function, "__name__"):
        raise UserError(f"{flag} {spec}: {path} has no function {name}")
    return function


def call_reward_fn(function, rows, responses, device):
    """The scores (B,) fp32 of a user's function for rows of the data set and the texts of
    responses.

    The function is called as function(prompts, responses, **columns), with every other column of
    the rows as a list, and must return one finite number for each response.
    """
    names = [name for name in rows[0] if name not in ("prompt", "prompts", "responses")]
    columns = {name: [row[name] for row in rows] for name in names}
    prompts = [row["prompt"] for row in rows]
    try:
        scores = [float(score) for score in function(prompts, responses, **columns)]
    except Exception as error:  # Anything can go wrong in a user's code, or in what it returns.
        name = function.__name__
        raise UserError(f"{name} gives no number for each response: {error!r}") from error
    if len(scores) != len(rows) or not all(math.isfinite(score) for score in scores):
        answer = f"{function.__name__} returned {scores} for {len(rows)} responses"
        raise UserError(f"{answer}, not a finite number for each")
    return torch.tensor(scores, device=device)


def call_reward_fns(functions, rows, responses, device):
    """{name: scores (B,)} of {name: function}."""
    return {
        name: call_reward_fn(function, rows, responses, device)
        for name, function in functions.items()
    }


# --------------------------------------------------------------------------------------------------
# Tokenizers


def load_tokenizer(path):
    """The tokenizer of a model folder or Hub name, with an EOS token and a pad token that is not
    EOS.

    A pad token is taken from the unused tokens that some families reserve, or added.
    """
    check_path(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # The library raises many kinds, with long texts.
        reason = f"no tokenizer can be loaded from there ({type(error).__name__})"
        raise UserError(f"{path}: {reason}") from error
    if tokenizer.eos_token_id is None:
        reason = "its tokenizer has no EOS token, so a response could never end; set eos_token"
        raise UserError(f"{path}: {reason}")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        added = sorted(tokenizer.get_added_vocab())
        unused = [name for name in added if "pad" in name.lower() or "reserved" in name]
        unused = [name for name in unused if name != tokenizer.eos_token]
        tokenizer.add_special_tokens({"pad_token": unused[0] if unused else "[PAD]"})
    return tokenizer


def check_same_tokenizer(path, tokenizer, model_path):
    """Refuse a reward model whose token ids mean something else than those of the policy."""
    if load_tokenizer(path).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"--reward_model {path}: its tokenizer differs from that of {model_path}")


def encode_prompt(tokenizer, prompt):
    """Token ids of a prompt, a text or a list of messages: at most one BOS at the start, no EOS."""
    if isinstance(prompt, str):
        ids = tokenizer(prompt).input_ids
        text_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        # Some tokenizers end every text with EOS, but a prompt is to be continued.
        ends_with_added_eos = ids[-len(text_ids) - 1 :] == [*text_ids, tokenizer.eos_token_id]
        is_only_bos = not text_ids and ids == [tokenizer.bos_token_id]
        if ends_with_added_eos and not is_only_bos:
            ids = ids[:-1]
    else:
        if tokenizer.chat_template is None:
            raise UserError("the data holds messages, but the tokenizer has no chat template")
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False).input_ids
    # A text or a chat template may begin with the BOS that the tokenizer adds as well.
    while len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    return ids


def encode_response(tokenizer, prompt, response):
    """Token ids of a response, with one EOS at the end; a text that holds EOS ends at the first
    one.

    It is encoded apart from its prompt, so that no token straddles the two. Where the response is a
    list of messages, its text is what the chat template adds to that of the prompt.
    """
    if not isinstance(response, str):
        start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(prompt + response, tokenize=False)
        if not whole.startswith(start):
            reason = "does not render a prompt as the beginning of its conversation"
            raise UserError(f"the chat template {reason}")
        response = whole[len(start) :]
    ids = tokenizer(response, add_special_tokens=False).input_ids
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    return [*ids, tokenizer.eos_token_id]


def encode_pair(tokenizer, prompt, response):
    """(token ids of the prompt, token ids of the response, which end with EOS).

    Without a prompt, or with a text beside a list of messages, the response is taken to be the
    whole conversation, whose last message answers the others.
    """
    if not isinstance(response, str) and (not prompt or isinstance(prompt, str)):
        prompt = response[:-1]
        response = response[-1:]
    return encode_prompt(tokenizer, prompt), encode_response(tokenizer, prompt, response)


def encode_rows(path, rows, encode):
    """The lists encode(row) of all rows, joined; an error names the row that it comes from.

    path: where the rows are from, for the error's text.
    """
    encoded = []
    for number, row in enumerate(rows, start=1):
        try:
            encoded += encode(row)
        except Exception as error:  # Chat templates refuse conversations in many ways.
            raise UserError(f"{path}: row {number}: {error}") from error
    return encoded


def leave_out_long(path, rows, length_of, max_length, flag="--max_length"):
    """The rows with length_of(row) <= max_length tokens; prints how many are left out.

    Rows are never cut, because a cut row would teach the model not to end. Raises UserError if no
    row is left. path and flag, which sets max_length, are for the messages.
    """
    kept = [row for row in rows if length_of(row) <= max_length]
    if len(kept) < len(rows):
        left_out = f"left out {len(rows) - len(kept)} of {len(rows)} rows"
        print(f"{path}: {left_out} longer than {max_length} tokens ({flag})")
    if not kept:
        reason = f"all {len(rows)} have over {max_length} tokens ({flag})"
        raise UserError(f"{path}: no row is left: {reason}")
    return kept


def leave_out_equal(path, pairs):
    """The pairs whose chosen and rejected sides have different tokens; prints how many have not.

    There is nothing to learn from a pair of equal sides. Raises UserError if no pair is left.
    """

    def tokens(side):
        prompt_ids, response_ids = side
        return prompt_ids + response_ids

    kept = [pair for pair in pairs if tokens(pair["chosen"]) != tokens(pair["rejected"])]
    if len(kept) < len(pairs):
        left_out = f"left out {len(pairs) - len(kept)} of {len(pairs)} rows"
        print(f"{path}: {left_out} whose chosen and rejected have the same tokens")
    if not kept:
        raise UserError(f"{path}: no row is left: chosen and rejected have the same tokens in all")
    return kept


def load_prompts(path, tokenizer, max_length, flag):
    """[(token ids, row)] of the rows whose prompt has at most max_length tokens.

    flag: what sets max_length, for messages. Raises UserError for an empty prompt, or if none is
    left.
    """

    def encode(row):
        ids = encode_prompt(tokenizer, row["prompt"])
        if not ids:
            raise UserError("its prompt is empty")
        return [(ids, row)]

    prompts = encode_rows(path, load_rows(path, [("prompt",)]), encode)
    return leave_out_long(path, prompts, lambda prompt: len(prompt[0]), max_length, flag)


def stop_token_ids(tokenizer, stop_token, eos):
    """Sorted ids that end a response: EOS (an id or a list) and those of the text `stop_token`.

    The text is taken as it stands after a letter, which may differ from how it stands at a start.
    """
    ids = {tokenizer.eos_token_id}
    if isinstance(eos, list):
        ids.update(eos)
    if stop_token is not None:
        letter = tokenizer("x", add_special_tokens=False).input_ids
        both = tokenizer("x" + stop_token, add_special_tokens=False).input_ids
        added = both[len(letter) :]
        is_apart = both[: len(letter)] == letter and added
        if not is_apart or {tokenizer.unk_token_id, tokenizer.pad_token_id} & set(added):
            reason = "the tokenizer has no tokens for it alone after a letter"
            raise UserError(f"--stop_token {stop_token!r}: {reason}")
        ids.update(added)
    return sorted(ids)


def allowed_ids(tokenizer, vocab_size, device):
    """(V,) bool: the ids that a response may hold; not the pad, and no id without a token."""
    ids = set(tokenizer.get_vocab().values()) - {tokenizer.pad_token_id}
    allowed = torch.zeros(vocab_size, dtype=torch.bool)
    allowed[[i for i in ids if i < vocab_size]] = True
    return allowed.to(device)


# --------------------------------------------------------------------------------------------------
# Models


def load_pretrained(auto_class, path, new_weights=(), **options):
    """Load a model in fp32, in eval mode, without dropout.

    auto_class: e.g. AutoModelForCausalLM. new_weights: the ends of the names of weights that the
    folder may lack (they are random then). A folder that holds only a config gives random weights.
    Returns (model, sorted names of the weights that the folder lacks). Raises UserError for a
    folder that is no model of this kind, or whose model lets padding change a row's result.
    """
    check_path(path)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    options_of_load = {"dtype": torch.float32}
    if not torch.cuda.is_available():
        # On CPU, plain attention is faster than the fused one for short rows.
        options_of_load["attn_implementation"] = "eager"
    try:
        config = AutoConfig.from_pretrained(path, **options)
        for name, value in vars(config).items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
        if has_no_weights(path):
            print(f"{path} holds a config and no weights: starting from random weights", flush=True)
            model = auto_class.from_config(config, **options_of_load)
            missing = list(new_weights)
        else:
            model, info = auto_class.from_pretrained(
                path, config=config, output_loading_info=True, **options_of_load
            )
            missing = sorted(info["missing_keys"])
    except Exception as error:  # Of many kinds: a broken file, other shapes, a Hub that is down.
        reason = f"cannot be loaded as a model: {type(error).__name__}: {error}"
        raise UserError(f"{path}: {reason}") from error
    unexpected = [name for name in missing if not name.endswith(tuple(new_weights))]
    if unexpected:
        reason = f"not a model of this kind: it lacks the weights {', '.join(unexpected[:3])}"
        raise UserError(f"{path}: {reason}")
    model.eval()
    check_right_padding(model, path)
    return model, missing


def has_no_weights(path):
    """Whether a path is a folder without a weight file."""
    folder = Path(path)
    return folder.is_dir() and not [*folder.glob("*.safetensors*"), *folder.glob("*.bin*")]


def spread_ids(length, vocab_size):
    """A row (1,length) of ids spread over the vocabulary, whose first ids are often untrained."""
    return torch.arange(1, length + 1)[None] * max(vocab_size // (length + 1), 1) % vocab_size


@torch.no_grad()
def check_right_padding(model, path):
    """Refuse a model in which the padding after a row changes the row, since it gets no mask.

    Causal attention cannot see what comes later. A bidirectional model can, and so can a router
    that shares out its experts over all tokens, padding included.
    """
    T = min(10, max_positions(model.config))
    num_real = T - T // 3
    row = spread_ids(num_real, model.config.get_text_config().vocab_size)
    padded = F.pad(row, (0, T - num_real), value=1)
    alone = model.base_model(row, use_cache=False).last_hidden_state
    hidden = model.base_model(padded, use_cache=False).last_hidden_state[:, :num_real]
    # Rounding alone was seen to change a trained model's hidden states by 0.014% of their norm.
    is_equal = (hidden - alone).norm(dim=-1) <= 0.001 * alone.norm(dim=-1)
    if not is_equal.all():
        raise UserError(f"{path}: not a causal model: padding after a row changes what it computes")


def fit_to_tokenizer(model, tokenizer, eos_token_id=None):
    """Give a model an embedding for every token, and the tokenizer's ids in its configs.

    eos_token_id: an id or a list of ids; None is the tokenizer's.
    """
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id if eos_token_id is None else eos_token_id
    if model.can_generate():
        # A fresh one: many models ship sampling settings that their own generation config refuses.
        model.generation_config = type(model.generation_config).from_model_config(model.config)


def all_eos_ids(policy, tokenizer):
    """The EOS id of the tokenizer, or a list with all those that the model's configs name."""
    ids = {tokenizer.eos_token_id}
    for config in (policy.config, policy.generation_config):
        eos = getattr(config, "eos_token_id", None)  # The config of a model with images has none.
        if isinstance(eos, list):
            ids.update(eos)
    return sorted(ids) if len(ids) > 1 else tokenizer.eos_token_id


def max_positions(config):
    """How many tokens a row may have under this config, or infinity."""
    limits = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Beyond this length all positions turn at another angle, also those of rows already scored.
        limits.append(rope["original_max_position_embeddings"])
    return min((limit for limit in limits if limit is not None), default=math.inf)


def check_positions(config, length, flag, path):
    """Refuse rows that are longer than a model has positions."""
    if length > max_positions(config):
        reason = f"{length} tokens are more than the {max_positions(config)} positions of {path}"
        raise UserError(f"{flag}: {reason}")


def head_logits(model, hidden):
    """Logits (...,V) of hidden states (...,d): the language-model head, with its cap (Gemma 2)."""
    logits = model.get_output_embeddings()(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    return logits


def static_cache(config, length):
    """A key-value cache of fixed size, which one compiled decoding step can fill at any position.

    Layers with a sliding window get the full length too, and the attention mask keeps the window:
    the library's shorter cache would be compiled anew at every position.
    """
    cache = StaticCache(config=config, max_cache_len=length)
    if any(type(layer) not in (StaticLayer, StaticSlidingWindowLayer) for layer in cache.layers):
        kinds = sorted({type(layer).__name__ for layer in cache.layers})
        raise UserError(f"--model: it cannot be sampled from with a static cache ({kinds[0]})")
    cache.layers = [StaticLayer(length) for _ in cache.layers]
    return cache


@torch.no_grad()
def check_decoding(model, length, path):
    """Refuse a language model whose step through the cache differs from a plain forward.

    One row of `length` tokens is read at once, and again as a left-padded prompt with a last step.
    Families with attention or logits of their own kind fail here, instead of in silence later.
    """
    if hasattr(model.config, "text_config"):
        raise UserError(f"--model {path}: it is not a model of text alone")
    row = spread_ids(length, model.config.vocab_size).to(model.device)
    hidden = model.base_model(row, use_cache=False).last_hidden_state
    expected = model(row, use_cache=False).logits[:, -1]
    # Three tokens of padding, then all of the row but its last token, then that token alone. Three
    # slots stay empty, as most do while decoding: some layers look back from the end of the cache.
    end = length + 3
    cache = static_cache(model.config, end + 3)
    mask = torch.zeros(1, end + 3, dtype=torch.long, device=model.device)
    mask[:, 3:end] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, :end]
    padded = F.pad(row, (3, 0))
    options = {"past_key_values": cache, "use_cache": True}
    prompt_mask = mask.clone()
    prompt_mask[:, end - 1] = 0
    model(padded[:, :-1], attention_mask=prompt_mask, position_ids=positions[:, :-1], **options)
    output = model(padded[:, -1:], attention_mask=mask, position_ids=positions[:, -1:], **options)
    tolerance = 1e-3 * expected.abs().max().clamp(min=1)
    for logits in (output.logits[:, -1], head_logits(model, hidden[:, -1])):
        if not torch.allclose(logits, expected, atol=tolerance.item(), rtol=0):
            reason = "its attention or its logits are of a kind that this script would get wrong"
            raise UserError(f"--model {path}: {reason}")


def to_bf16(module):
    """Round a module's parameters to bf16, in place. Buffers, such as rotary angles, stay fp32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16()
    return module


@torch.no_grad()
def copy_weights(source, target):
    """Copy every parameter into the same place of another module, in that module's precision."""
    for ours, theirs in zip(target.parameters(), source.parameters(), strict=True):
        ours.copy_(theirs)


def compile_layers(*models):
    """Compile each transformer layer of the models, for rows of any length; None is left alone.

    Embeddings and heads stay as they are.
    """
    # Every layer counts as a compilation, and so do the first changes of length; the limit is 8.
    torch.compiler.config.recompile_limit = 256
    for model in models:
        if model is None:
            continue
        layers = [x for x in model.modules() if isinstance(x, GradientCheckpointingLayer)]
        if not layers:
            name = type(model).__name__
            raise UserError(f"--compile: finds no layers in {name}; use --no-compile")
        for layer in layers:
            layer.compile(dynamic=True)


def autocast(args, device):
    """The context of every forward: bf16 where --precision asks for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")


# --------------------------------------------------------------------------------------------------
# Micro-batches


def global_batches(num_rows, batch_size, num_steps, seed, done=0):
    """Yield (epoch, row numbers) of the steps after `done`, in a new order each epoch.

    The rows are those of all ranks; they depend on the seed alone. The last batch of an epoch may
    be smaller. Epochs count from 1.
    """
    steps_per_epoch = math.ceil(num_rows / batch_size)
    epoch_of_order = None
    for step in range(done, num_steps):
        epoch, index = divmod(step, steps_per_epoch)
        if epoch != epoch_of_order:
            order = torch.randperm(num_rows, generator=seeded(seed, "order", epoch)).tolist()
            epoch_of_order = epoch
        yield epoch + 1, order[index * batch_size : (index + 1) * batch_size]


def micro_batch_rows(rows, lengths, size, ranks=None):
    """Row numbers in groups of at most `size` rows of similar length: a list of lists.

    lengths[row]: the tokens of a row. With ranks: only this rank's share of the rows, every
    world_size-th of them in order of length, which may be none.
    """
    ordered = sorted((int(row) for row in rows), key=lambda row: lengths[row])
    if ranks is not None:
        ordered = ordered[ranks.rank :: ranks.world_size]
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def prompt_order(num_prompts, first, count, seed):
    """Which prompts come first-th, (first + 1)-th and so on in a run: `count` row numbers.

    Pass after pass over the prompts, each in an order of its own; the seed alone decides.
    """
    order = []
    first_pass = first // num_prompts
    last_pass = (first + count - 1) // num_prompts
    for number in range(first_pass, last_pass + 1):
        order += torch.randperm(num_prompts, generator=seeded(seed, "prompts", number)).tolist()
    start = first % num_prompts
    return order[start : start + count]


def left_pad(sequences, length, pad_id, device):
    """queries and query_mask, each (B,P), of lists of token ids."""
    queries = [[pad_id] * (length - len(ids)) + ids for ids in sequences]
    query_mask = [[False] * (length - len(ids)) + [True] * len(ids) for ids in sequences]
    return torch.tensor(queries, device=device), torch.tensor(query_mask, device=device)


def pad_right(sequences, value):
    """Lists of numbers as one tensor (B,T), filled up with `value` to the longest."""
    T = max(len(x) for x in sequences)
    return torch.tensor([[*x, *[value] * (T - len(x))] for x in sequences])


def to_device(batch, device):
    """The tensors of a batch on the device; the copies do not wait for it."""
    return {name: x.to(device, non_blocking=True) for name, x in batch.items()}


def pack_rows(input_ids, mask):
    """Move the real tokens of every row to the left, in their order; id 0 stands after them.

    input_ids (B,T); mask (B,T): True for real tokens. Returns (packed input_ids (B,T), lengths
    (B,)).
    """
    # What stands outside the mask may be no id at all, such as -100.
    input_ids = torch.where(mask.bool(), input_ids, 0)
    order = mask.long().argsort(dim=1, descending=True, stable=True)
    return input_ids.gather(1, order), mask.long().sum(1)


# --------------------------------------------------------------------------------------------------
# Flags


def check_at_least(args, least, *names):
    """Refuse flags below `least`, or not finite; None is left alone."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not least <= value < math.inf:
            raise UserError(f"--{name} {value}: must be at least {least} and finite")


def check_finite(args, *names):
    """Refuse flags that are infinite or NaN."""
    for name in names:
        if not math.isfinite(getattr(args, name)):
            raise UserError(f"--{name} {getattr(args, name)}: must be finite")


def check_above_zero(args, *names):
    """Refuse flags that are 0, below, or not finite; None is left alone."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value}: must be above 0 and finite")


def check_shared_flags(args):
    """Check the flags that all scripts have, before anything is loaded or written."""
    check_at_least(args, 1, "batch_size", "micro_batch_size")
    check_at_least(args, 0, "lr", "max_grad_norm", "save_every")
    check_above_zero(args, "timeout_minutes")
    if args.track == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--track tensorboard: not installed; run `pip install tensorboard`")
    if args.resume is None and args.output_dir and Path(args.output_dir).exists():
        reason = "exists already; name another folder or remove it"
        raise UserError(f"--output_dir {args.output_dir}: {reason}")


def resolve_args(args):
    """The arguments to run with: as given, or with --resume those of the run that goes on."""
    if args.resume is None:
        return args
    path = Path(args.resume) / "args.json"
    if not path.is_file():
        raise UserError(f"--resume {args.resume}: no args.json in it")
    if (path.parent / "model").exists():
        raise UserError(f"--resume {args.resume}: the run is finished")
    saved = asdict(args) | json.loads(path.read_text())["args"]
    saved |= {"resume": args.resume, "output_dir": args.resume}
    for name, value in saved.items():
        if not hasattr(args, name):
            raise UserError(f"--resume {args.resume}: --{name} is no flag of this script")
        if isinstance(value, list):  # JSON has no tuples.
            saved[name] = tuple(value)
        default = getattr(type(args), name)
        if getattr(args, name) not in (default, saved[name]):
            raise UserError(f"--resume {args.resume}: --{name} differs from that of the run")
    return replace(args, **saved)


def newest_run(script, dataset):
    """The model folder of the newest finished run of `script` on data from the folder of `dataset`.

    Only runs without an --output_dir are looked at. Raises UserError if there is none.
    """
    folder = Path(dataset).parent
    finished = []
    for config in Path("runs").glob(f"{script}__*/model/config.json"):
        run = config.parent.parent
        args = json.loads((run / "args.json").read_text())["args"]
        if Path(args["dataset"]).parent == folder:
            finished.append(config)
    if not finished:
        reason = f"no finished run of {script}.py on data from {folder} in runs/{script}__*"
        raise UserError(f"{reason}: run `python {script}.py` first, or name a model folder")
    return str(max(finished, key=lambda config: config.stat().st_mtime).parent)


# --------------------------------------------------------------------------------------------------
# Run folders


def progress(done, total, ranks, name):
    """The steps done + 1 .. total, with a progress bar on rank 0, sparse where it is a file."""
    interval = 0.2 if sys.stderr.isatty() else 15.0
    steps = range(done + 1, total + 1)
    return tqdm(
        steps,
        name,
        total,
        initial=done,
        disable=not ranks.is_main,
        mininterval=interval,
        maxinterval=60,
    )


def save_pretrained(folder, *parts):
    """Write models and tokenizers into one folder, which appears complete or not at all."""
    for part in parts:
        part.save_pretrained(f"{folder}.tmp")
    shutil.rmtree(folder, ignore_errors=True)  # Left by a run that was stopped.
    os.rename(f"{folder}.tmp", folder)


def first_word(key):
    """What a metric's column is headed: the last part of its key, and whether it is held out."""
    name = key.split("/")[-1]
    return f"eval {name}" if key.startswith("eval/") else name


class Run:
    """A run's folder: args.json, metrics.jsonl, samples.jsonl, checkpoints/, model/.

    Only rank 0 writes. Names are the same on all ranks.
    """

    def __init__(self, args, ranks, script):
        self.is_main = ranks.is_main
        self.script = script
        self.tracker = None
        self.track = args.track
        now = torch.tensor([int(time.time())], device=ranks.device)
        started = all_gather(now)[0].item()  # The clock of rank 0 names the folder.
        self.folder = Path(args.output_dir or f"runs/{script}__{args.seed}__{started}")
        if not self.is_main:
            return
        record = {"script": f"{script}.py", "args": asdict(args), "argv": sys.argv}
        record |= {"world_size": ranks.world_size, **environment()}
        if args.resume is None:
            (self.folder / "checkpoints").mkdir(parents=True)
            (self.folder / "args.json").write_text(json.dumps(record, indent=2) + "\n")
        if args.track == "wandb":
            wandb = importlib.import_module("wandb")
            self.tracker = wandb.init(
                project="rlhf", name=self.folder.name, dir=str(self.folder), config=record
            )
        elif args.track == "tensorboard":
            tensorboard = importlib.import_module("torch.utils.tensorboard")
            self.tracker = tensorboard.SummaryWriter(self.folder)
        print(f"{script}: writing to {self.folder}", flush=True)

    def log(self, step, metrics, show=()):
        """Append the metrics to metrics.jsonl and the tracker; print those that `show` names."""
        if not self.is_main:
            return
        self.append("metrics.jsonl", [{"step": step, **metrics}])
        if self.track == "wandb":
            self.tracker.log(metrics, step=step)
        elif self.track == "tensorboard":
            for key, value in metrics.items():
                self.tracker.add_scalar(key, value, step)
            self.tracker.flush()
        cells = []
        for key in show:
            cell = f"{first_word(key)} {metrics[key]:<8.4g}" if key in metrics else ""
            cells.append(cell.ljust(len(first_word(key)) + 9))
        tqdm.write(f"{self.script} {step:>5} | " + " ".join(cells).rstrip())

    def show_samples(self, step, columns, num_shown=4):
        """Write rows of {name: numbers or texts} to samples.jsonl, and print the first of them."""
        if not self.is_main:
            return
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        self.append("samples.jsonl", [{"step": step, **row} for row in rows])
        tqdm.write(" | ".join(columns))
        for row in rows[:num_shown]:
            cells = [f"{x:6.2f}" if isinstance(x, float) else one_line(x) for x in row.values()]
            tqdm.write(" | ".join(cells))

    def append(self, name, rows):
        """Append rows to a JSON-lines file of the folder."""
        with open(self.folder / name, "a") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def save_model(self, name, model, tokenizer):
        """Write a model and its tokenizer into a folder of the run, replacing an earlier one."""
        if self.is_main:
            save_pretrained(self.folder / name, model, tokenizer)

    def save_checkpoint(self, step, objects):
        """Write {name: something with state_dict()}; the file appears complete or not at all."""
        if not self.is_main:
            return
        state = {name: x.state_dict() for name, x in objects.items()}
        path = self.folder / "checkpoints" / f"step_{step:06d}.pt"
        torch.save({"step": step, **state}, f"{path}.tmp")
        os.rename(f"{path}.tmp", path)

    def load_checkpoint(self, objects):
        """Restore the objects from the newest checkpoint and return its step.

        Lines of metrics and samples that were written after it are cut off.
        """
        paths = sorted((self.folder / "checkpoints").glob("step_*.pt"))
        if not paths:
            reason = "no checkpoint; was it started with --save_every?"
            raise UserError(f"--resume {self.folder}: {reason}")
        state = torch.load(paths[-1], map_location="cpu", weights_only=True, mmap=True)
        for name, x in objects.items():
            x.load_state_dict(state[name])
        if self.is_main:
            for name in ("metrics.jsonl", "samples.jsonl"):
                self.cut_lines(self.folder / name, state["step"])
        return state["step"]

    def cut_lines(self, path, step):
        """Keep the complete lines of a JSON-lines file up to a step."""
        if not path.exists():
            return
        lines = [line for line in path.read_text().splitlines(True) if line.endswith("\n")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        path.write_text("".join(kept))


class BestModel:
    """Keeps the model with the highest score in best_model/ of a run, if `enabled`."""

    def __init__(self, run, enabled):
        self.run = run
        self.enabled = enabled
        self.score = -math.inf

    def offer(self, score, model, tokenizer):
        """Save the model if its score is above all that were offered before."""
        if self.enabled and score > self.score:
            self.score = score
            self.run.save_model("best_model", model, tokenizer)

    def state_dict(self):
        return {"score": self.score}

    def load_state_dict(self, state):
        self.score = state["score"]


def one_line(x):
    """The end of a text, or of a list of messages, on one line of at most 70 characters."""
    return " ".join(str(x).split())[-70:]


def environment():
    """What is needed to run the same again: commit, whether it was clean, versions, hardware."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40"]
    command += ["--exclude=*", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        commit, _, dirty = done.stdout.strip().partition("-")
    except OSError:  # A machine without git.
        commit, dirty = "", ""
    versions = {
        package.__name__: package.__version__ for package in (torch, transformers, datasets)
    }
    device = f"CPU, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {"commit": commit, "dirty": bool(dirty), "versions": versions, "device": device}
