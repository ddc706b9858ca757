"""Tiny models built offline, the scripts as subprocesses, and a function on two connected ranks.

Every folder here is what a stage of the pipeline would hand to the next: config, weights and
tokenizer. The models are random but not small in their numbers (initial std 0.2), so that a wrong
position or mask moves an output visibly.
"""

import os

# These are read when the libraries are imported.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

import ast
import contextlib
import dataclasses
import datetime
import importlib
import json
import queue
import re
import socket
import string
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

import utils

ROOT = Path(__file__).resolve().parent.parent
LETTERS = string.ascii_lowercase
torch.set_num_threads(1)


# --------------------------------------------------------------------------------------------------
# Tokenizer and models


def build_tokenizer(pad_token="<pad>"):
    """One token a character: the pad, '|' (both BOS and EOS), a-z, space, U, A.

    It adds no BOS and no EOS of its own.
    """
    tokens = ["<pad>", "|", *LETTERS, " ", "U", "A"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        bos_token="|",
        eos_token="|",
        pad_token=pad_token,
        clean_up_tokenization_spaces=False,
    )


def build_config(kind, tokenizer, **options):
    """A tiny GPT-2 (absolute positions) or Llama (rotary positions, two queries a key).

    Both ask for dropout, as many models do.
    """
    ids = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, **options}
        return GPT2Config(initializer_range=0.2, **sizes, **ids)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "attention_dropout": 0.1,
        **options,
    }
    return LlamaConfig(initializer_range=0.2, **sizes, **ids)


IDS = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
SMALL = {"num_labels": 1, "initializer_range": 0.2, **IDS}
ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {
    **WIDE,
    "intermediate_size": 32,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
EXPERTS = {"num_experts_per_tok": 2, **GROUPED}
# The families that the layout of sequences and the decoding are tested on, as configs of models of
# two layers. A sliding window is 4 tokens, shorter than every row that a test would call long.
FAMILIES = [
    GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **SMALL),
    LlamaConfig(**GROUPED, **SMALL),
    OPTConfig(**WIDE, ffn_dim=32, word_embed_proj_dim=16, **SMALL),
    Qwen3Config(**GROUPED, **SMALL),
    MistralConfig(**GROUPED, sliding_window=4, **SMALL),
    Gemma2Config(**GROUPED, sliding_window=4, final_logit_softcapping=2.0, **SMALL),
    Gemma3TextConfig(
        **GROUPED,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        **SMALL,
    ),
    GPTNeoXConfig(**WIDE, intermediate_size=32, max_position_embeddings=64, **SMALL),
    BloomConfig(hidden_size=16, n_layer=2, n_head=2, **SMALL),
    PhiConfig(**WIDE, intermediate_size=32, max_position_embeddings=64, **SMALL),
    FalconConfig(**WIDE, **SMALL),
    Qwen3MoeConfig(**EXPERTS, moe_intermediate_size=8, num_experts=4, **SMALL),
    GptOssConfig(**EXPERTS, num_local_experts=4, sliding_window=4, **ROTARY, **SMALL),
]

CLASSES = {
    ("gpt2", "lm"): GPT2LMHeadModel,
    ("gpt2", "rm"): GPT2ForSequenceClassification,
    ("llama", "lm"): LlamaForCausalLM,
    ("llama", "rm"): LlamaForSequenceClassification,
}


def build_folder(folder, kind, stage, tokenizer, seed, **options):
    """Save a random model and its tokenizer; returns the folder's name as a string."""
    torch.manual_seed(seed)
    CLASSES[kind, stage](build_config(kind, tokenizer, **options)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """The data set library keeps its tables in a temporary folder, also in every child process.

    A child reads the variable when it imports the library.
    """
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="session")
def tokenizer():
    """The character tokenizer that every model folder holds. Do not change it: it is shared."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory, tokenizer):
    """A tiny GPT-2 language model with weights; its config asks for dropout in all three places."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    return build_folder(folder, "gpt2", "lm", tokenizer, seed=1)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory, tokenizer):
    """A tiny Llama with weights: rotary positions, grouped queries, an untied head, dropout."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    return build_folder(folder, "llama", "lm", tokenizer, seed=2)


@pytest.fixture(scope="session")
def gpt2_rm_folder(tmp_path_factory, tokenizer):
    """A tiny GPT-2 reward model (num_labels=1) whose config says nothing about `score_mean`."""
    folder = tmp_path_factory.mktemp("models") / "gpt2_rm"
    return build_folder(folder, "gpt2", "rm", tokenizer, seed=3, num_labels=1)


@pytest.fixture(scope="session")
def llama_rm_folder(tmp_path_factory, tokenizer):
    """A tiny Llama reward model (num_labels=1) that is centred: its config's score_mean is 0.75."""
    folder = tmp_path_factory.mktemp("models") / "llama_rm"
    return build_folder(folder, "llama", "rm", tokenizer, seed=4, num_labels=1, score_mean=0.75)


# --------------------------------------------------------------------------------------------------
# Scripts as a user runs them


@pytest.fixture(scope="session")
def run_script():
    """`run_script("sft.py", ["--seed", 3], nproc=2)`: the process, its output as text.

    nproc=1 is `python script`, more is torchrun on this machine. The working directory is the
    repository unless `cwd` says otherwise; further keyword arguments are environment variables. A
    start costs seconds: use it sparingly.
    """

    def run(script, args=(), nproc=1, cwd=ROOT, timeout=240, **environment):
        launcher = []
        if nproc > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
        command = [sys.executable, *launcher, str(ROOT / script), *map(str, args)]
        set_by_torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        inherited = {name: x for name, x in os.environ.items() if name not in set_by_torchrun}
        return subprocess.run(
            command,
            cwd=cwd,
            env=inherited | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


# --------------------------------------------------------------------------------------------------
# Scripts inside this process


def write_jsonl(path, rows):
    """One row a line; returns the path as a string."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_jsonl(path):
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


class RecordingSGD(torch.optim.SGD):
    """Plain gradient steps instead of AdamW, and a history of all gradients.

    The first step of AdamW would hide how large a gradient is.
    """

    def __init__(self, parameters, lr, **options):
        super().__init__(parameters, lr=lr)
        self.history = []

    def step(self):
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.requires_grad]
        self.history.append([gradient.clone().numpy() for gradient in gradients])
        super().step()


def gradients_of(rank, script, options):
    """`main` of a script as it is, on two connected ranks or (rank None) alone.

    Returns (gradients of each step and parameter before clipping, batches). batches has one entry
    for each time that the rank's share of some rows was asked for (a step, or an evaluation): the
    rows that then went to `micro_batch_loss`, where the script has such a function. The options
    should set max_grad_norm to 0, because clipping happens before the optimizer looks.
    """
    module = importlib.import_module(script)
    optimizers = []
    batches = []
    ranks = utils.Ranks(rank or 0, 1 if rank is None else 2, torch.device("cpu"))
    micro_batch_rows = utils.micro_batch_rows
    micro_batch_loss = getattr(module, "micro_batch_loss", None)

    def recorded_optimizer(*args, **kwargs):
        optimizers.append(RecordingSGD(*args, **kwargs))
        return optimizers[-1]

    def recorded_split(*args):
        batches.append([])
        return micro_batch_rows(*args)

    def recorded_loss(model, rows, *args, **kwargs):
        batches[-1].extend(rows)
        return micro_batch_loss(model, rows, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "init_ranks", lambda timeout_minutes: ranks)
        patch.setattr(utils, "micro_batch_rows", recorded_split)
        if micro_batch_loss is not None:
            patch.setattr(module, "micro_batch_loss", recorded_loss)
        patch.setattr(torch.optim, "AdamW", recorded_optimizer)
        module.main(module.Args(**options))
    return optimizers[0].history, batches


def assert_same_gradients(ours, theirs, tolerance=1e-5):
    """Step by step and tensor by tensor, relative to the tensor's norm.

    Some tensors have the gradient 0 (a bias that adds the same to both sides of a pair), which
    rounding makes a little more: hence the allowance of 1e-7 of the norm of all tensors together.
    """
    assert len(ours) == len(theirs)
    for step, other_step in zip(ours, theirs, strict=True):
        everything = np.sqrt(sum(np.sum(gradient**2) for gradient in other_step))
        for gradient, other in zip(step, other_step, strict=True):
            allowance = tolerance * np.linalg.norm(other) + 1e-7 * everything
            assert np.linalg.norm(gradient - other) <= allowance


def refuses(capsys, script, options, match):
    """The script exits with 1, one line on stderr that matches, and no new run folder."""
    module = importlib.import_module(script)
    args = module.Args(**options)
    existed = args.output_dir and Path(args.output_dir).exists()
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        utils.launch(module.main, args)
    lines = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 1
    assert len(lines) == 1 and lines[0].startswith("error: ") and re.search(match, lines[0]), lines
    assert existed or not args.output_dir or not Path(args.output_dir).exists()


# --------------------------------------------------------------------------------------------------
# Every script in the root


def scripts_in_the_root():
    """The modules' names of all files with `Args` and `main`, a fork of tonight included."""
    found = []
    for path in sorted(ROOT.glob("*.py")):
        defined = {getattr(node, "name", None) for node in ast.parse(path.read_text()).body}
        if {"Args", "main"} <= defined:
            found.append(path.stem)
    return found


# Rows of every kind of data at once, from 5 to 17 tokens long.
EVERY_COLUMN = [
    {
        "prompt": LETTERS[i % 5 : i % 5 + 2 + i % 4],
        "completion": LETTERS[i % 7 : i % 7 + 2 + (5 * i) % 10],
        "chosen": LETTERS[i % 7 : i % 7 + 2 + (3 * i) % 10],
        "rejected": LETTERS[i % 3 : i % 3 + 2 + (7 * i) % 10],
        "reward": i % 5 - 1.5,
    }
    for i in range(21)
]

REWARD = """
def distinct_letters(prompts, responses, **columns):
    return [len(set(response)) / 4 - 1 for response in responses]
"""


@pytest.fixture
def script_options(tmp_path, gpt2_folder, gpt2_rm_folder, llama_rm_folder):
    """`script_options(script, name)`: flags of a short run of any script, in the folder `name`.

    Three steps, or one update, on rows of uneven length, without clipping; the third step has 5
    rows, an uneven share for two ranks. A script that is not in
    the table below gets the flags that it has; a new kind of data or a flag that a run cannot do
    without is added here.
    """
    dataset = write_jsonl(tmp_path / "rows.jsonl", EVERY_COLUMN)
    (tmp_path / "reward.py").write_text(REWARD)
    common = {
        "model": gpt2_folder,
        "dataset": dataset,
        "eval_dataset": dataset,
        "reward_fn": f"{tmp_path}/reward.py:distinct_letters",
        "batch_size": 8,
        "micro_batch_size": 3,
        "num_steps": 3,
        "num_epochs": 2,
        "num_minibatches": 2,
        "num_generations": 4,
        "total_episodes": 8,
        "response_length": 9,
        "eval_samples": 8,
        "log_every": 1,
        "max_grad_norm": 0.0,
        "lr": 0.01,
        "precision": "fp32",
        "compile": False,
    }
    # These letters are a third of the vocabulary, so that responses end after 2 to 9 tokens.
    stop = {"stop_token": "abcdefghij", "min_length": 1}
    table = {
        "reward_model": {"model": llama_rm_folder},
        "ppo_rlhf": {"reward_fn": None, "reward_model": gpt2_rm_folder, **stop},
    }

    def options(script, name):
        kind = importlib.import_module(script).Args
        fields = {field.name for field in dataclasses.fields(kind)}
        chosen = {**common, **table.get(script, stop), "output_dir": str(tmp_path / name)}
        if getattr(kind, "reward_fn", None) == ():
            chosen["reward_fn"] = (chosen["reward_fn"],) if chosen["reward_fn"] else ()
        return {flag: value for flag, value in chosen.items() if flag in fields}

    return options


# --------------------------------------------------------------------------------------------------
# A function on two ranks


# What the process that forks the others imports, once: libraries alone, because Python 3.11 does
# not hand it sys.path.
PRELOAD = ["pytest", "tyro", "datasets"]
PRELOAD += [f"transformers.models.{kind}.modeling_{kind}" for kind in ("gpt2", "llama", "auto")]


def serve(rank, port, jobs, results):
    """What each of the two processes does: join the group, then run the jobs that arrive."""
    torch.set_num_threads(1)
    options = {"init_method": f"tcp://127.0.0.1:{port}", "timeout": datetime.timedelta(seconds=60)}
    dist.init_process_group("gloo", rank=rank, world_size=2, **options)
    while (job := jobs.get()) is not None:
        function, args = job
        try:
            with (
                open(os.devnull, "w") as nowhere,
                contextlib.redirect_stdout(nowhere),
                contextlib.redirect_stderr(nowhere),
            ):
                result = function(rank, *args)
            results.put((rank, result, None))
        except BaseException:  # Also SystemExit.
            results.put((rank, None, traceback.format_exc()))
            raise
    dist.destroy_process_group()


class TwoRanks:
    """Two processes in one gloo group, started at the first job and again after a failed one."""

    def __init__(self, timeout):
        self.workers = None
        self.timeout = timeout

    def start(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = torch.multiprocessing.get_context("forkserver")  # imports once, forks twice
        context.set_forkserver_preload(PRELOAD)
        self.jobs = [context.SimpleQueue() for _ in range(2)]
        self.results = context.Queue()
        self.workers = [
            context.Process(
                target=serve, args=(rank, port, self.jobs[rank], self.results), daemon=True
            )
            for rank in (0, 1)
        ]
        for worker in self.workers:
            worker.start()

    def stop(self):
        if self.workers:
            for worker in self.workers:
                worker.terminate()
                worker.join()
        self.workers = None

    def __call__(self, function, *args):
        if self.workers is None:
            self.start()
        for jobs in self.jobs:
            jobs.put((function, args))
        answers = {}
        while len(answers) < 2:
            try:
                rank, result, error = self.results.get(timeout=self.timeout)
            except queue.Empty:
                self.stop()
                answered = f"ranks that answered: {sorted(answers)}"
                pytest.fail(f"no answer after {self.timeout} s; {answered}")
            if error:
                self.stop()
                pytest.fail(f"on rank {rank}:\n{error}")
            answers[rank] = result
        return [answers[0], answers[1]]


@pytest.fixture(scope="session")
def on_two_ranks():
    """`on_two_ranks(function, *args)`: [function(0, *args), function(1, *args)].

    The two run in processes that are connected. The function must be a module's own (it is found by
    name), its arguments and results plain data or numpy arrays (a tensor would travel through
    shared memory that its sender may close). A whole `main(args)` runs there too: the scripts join
    the process group that they find.
    """
    ranks = TwoRanks(timeout=180)
    yield ranks
    ranks.stop()
