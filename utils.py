"""Plumbing shared by the scripts: ranks, seeds, masked statistics, data files, run folders. The algorithms are not here."""

import atexit
import ctypes
import hashlib
import importlib.util
import json
import os
import shutil
import sys
import time
from dataclasses import asdict, fields, make_dataclass, replace
from pathlib import Path

import datasets
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

Ranks = make_dataclass("Ranks", ["rank", "world_size", "device"])  # which process, of how many, where it computes


class UserError(Exception):
    """A mistake of the user's: its text says what is wrong, where, and what to do. Ends in one line, no traceback."""


def launch(main, args):
    """Run `main(args)`; a mistake ends in one line, from rank 0 or, once they are connected, any rank; exit code 1."""
    try:
        main(args)
    except (UserError, FileExistsError, NotADirectoryError) as error:  # or a run folder that cannot be made
        if os.environ.get("RANK", "0") == "0" or dist.is_initialized():
            print(f"error: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        (os._exit if dist.is_initialized() else sys.exit)(1)  # with other ranks in a collective, do not wait for them


def init_ranks():
    """Join the process group that `torchrun` announces (nccl on CUDA, gloo on CPU); one rank without torchrun."""
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if (cuda := torch.cuda.is_available()) else "cpu")
    importlib.import_module("torch.fx.experimental._config").use_duck_shape = False  # equal by chance is not equal
    torch.get_device_module(device).set_device(device), torch.backends.cuda.enable_cudnn_sdp(False)  # NaN gradients
    config, aot = map(importlib.import_module, ("torch._inductor.config", "torch._functorch.config"))
    config.cpp.use_decompose_tanh = aot.recompute_views = not cuda  # tanh from exp; ReLU's backward from its output
    if not cuda and hasattr(ctypes.pythonapi, "mallopt"):  # glibc: keep freed memory, for mapping pages takes time
        ctypes.pythonapi.mallopt(-1, -1), ctypes.pythonapi.mallopt(-4, 0)  # M_TRIM_THRESHOLD, M_MMAP_MAX
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
        atexit.register(dist.destroy_process_group)
    return Ranks(*(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1), device)


def wrap(module, ranks, compiled=False):
    """The module that the loss goes through: compiled if asked (the causal mask once on CPU), gradients averaged over ranks."""
    if compiled:  # the gradient of an embedding by torch's own kernel: the compiler's adds up in no fixed order
        op, torch.compiler.config.cache_key_tag = torch.ops.aten.embedding_dense_backward, "no graph of other settings"
        importlib.import_module("torch._inductor.lowering").make_fallback(op, warn=False)
        torch._inductor.decomposition.select_decomp_table().pop(op.default, None)
        module = torch.compile(module, options=None if torch.cuda.is_available() else {"realize_opcount_threshold": 12})
    return torch.nn.parallel.DistributedDataParallel(module) if ranks.world_size > 1 else module


def seeded(*key):
    """A CPU generator that depends on `key` alone, e.g. (seed, "uniforms", update): nothing to save, equal on all ranks."""
    return torch.Generator().manual_seed(int(hashlib.sha256(repr(key).encode()).hexdigest()[:15], 16))


def clock(device):
    """Seconds, once the device has done what it was given."""
    torch.get_device_module(device).synchronize(device)
    return time.perf_counter()


def check_divides(divisor, number, what):
    """Refuse sizes that would leave a remainder; `what` names the flags."""
    if divisor < 1 or number < 1 or number % divisor:
        raise UserError(f"{what}: {number} cannot be divided evenly by {divisor}")


def all_gather(x):
    """Concatenate a tensor of equal shape on every rank along dim 0, in rank order."""
    if dist.is_initialized():
        dist.all_gather(parts := [torch.empty_like(x) for _ in range(dist.get_world_size())], x.contiguous())
    return torch.cat(parts) if dist.is_initialized() else x


def masked_mean(x, mask):
    """Mean over the True entries of `mask` on all ranks: 0-d, without gradient; 0 for an empty mask. x may be NaN behind it."""
    pair = all_gather(torch.stack([torch.where(mask, x.detach(), 0).double().sum(), mask.double().sum()])[None]).sum(0)
    return (pair[0] / pair[1].clamp(min=1)).to(x.dtype)


def whiten(x, mask, shift_mean=True):
    """Zero mean (shift_mean False: the old mean) and unit biased variance over the True entries of all ranks; 0 elsewhere."""
    x64 = torch.where(mask, x.detach(), 0).double()
    mean = masked_mean(x64, mask)
    variance = masked_mean((x64 - mean) ** 2, mask)
    return torch.where(mask, (x64 - mean) * torch.rsqrt(variance + 1e-8) + (0 if shift_mean else mean), 0).to(x.dtype)


class Means(dict):
    """Exact means by name over micro-batches and ranks: fp64 sums and counts stay on the device until one reduction."""

    def add(self, tensors, mask=None):
        """Add the entries of {name: tensor} where `mask` is True (without a mask: all); a number there is a weight."""
        for name, x in tensors.items():
            where = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
            total = (torch.where(where.bool(), x.detach(), 0).double() * where).sum()
            self[name] = self.get(name, 0) + torch.stack([total, where.double().sum()])

    def reduce(self):
        """{name: float} over all ranks, and start again. Every rank must have added the same names."""
        names, pairs = sorted(self), all_gather(torch.stack([self.pop(name) for name in sorted(self)])[None]).sum(0)
        return dict(zip(names, (pairs[:, 0] / pairs[:, 1].clamp(min=1)).tolist(), strict=True))


def load_rows(path, columns):
    """A datasets.Dataset that has one of the groups of text columns: a .json(l) or .parquet file, a folder, a Hub name."""
    check_path(path), datasets.disable_progress_bars(), datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    p, source = Path(path), {"path": path}
    if p.exists():
        files = [p] if p.is_file() else sorted(x for x in p.iterdir() if x.suffix in (".json", ".jsonl", ".parquet"))
        kinds = {"parquet" if file.suffix == ".parquet" else "json" for file in files}
        if len(kinds) != 1 or not any(file.read_bytes().strip() for file in files):
            raise UserError(f"{path}: empty: no row in .json, .jsonl or .parquet files (or both kinds in one)")
        source = {"path": kinds.pop(), "data_files": [str(file) for file in files]}
    try:
        rows = datasets.load_dataset(**source, split="train")
    except Exception as error:  # the library raises many kinds; the first line of each says what happened
        raise UserError(f"{path}: cannot be read as a data set: {error.__cause__ or error}") from error
    if not any(set(group) <= set(rows.column_names) for group in columns):
        raise UserError(f"{path}: needs {' or '.join(map('+'.join, columns))}; it has {', '.join(rows.column_names)}")
    for name in sorted(set().union(*columns) & set(rows.column_names)):
        for number, cell in enumerate(rows[name], start=1):
            turns = [x if isinstance(x, dict) else {} for x in cell] if isinstance(cell, list) else []
            whole = [x.get("role") and (x.get("tool_calls") or type(x.get("content")) in (str, list)) for x in turns]
            if not all(whole) or not isinstance(cell, (str, list)):
                raise UserError(f"{path}: row {number}: {name} is {cell!r}, not a text or messages of role and content")
    return rows


def check_path(path):
    """Refuse, without asking the Hub, a path that is not here and cannot be `name` or `owner/name` there."""
    is_local = path.startswith((".", "/", "~", "runs/", "data/")) or path.endswith((".json", ".jsonl", ".parquet"))
    if not Path(path).exists() and (is_local or path.count("/") > 1):
        raise UserError(f"{path}: no such file or folder")


def load_function(spec, flag):
    """The function named by `path/to/file.py:name`."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"{flag} {spec}: no such file, or no name behind it; give path/to/file.py:function")
    module_spec = importlib.util.spec_from_file_location(f"user_file_{Path(path).stem}", path)
    module = sys.modules[module_spec.name] = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(function := getattr(module, name, None), "__name__") or not callable(function):
        raise UserError(f"{flag} {spec}: {path} has no function {name}")
    return function


def causal_attention(module, query, key, value, attention_mask, **options):
    """A model's own plain attention in two calls, as queries of the first half see no key of the second, or for one query a row."""
    plain, h, mask = sys.modules[type(module).__module__].eager_attention_forward, query.shape[2] // 2, attention_mask
    causal = getattr(module, "is_causal", False) and getattr(module.config, "is_causal", True)
    if not causal or query.shape[2] != key.shape[2] or any(torch.is_tensor(x) and x.ndim > 2 for x in options.values()):
        return plain(module, query, key, value, mask, **options)
    parts = [(query[:, :, a:b], key[:, :, :b], value[:, :, :b], mask[..., a:b, :b]) for a, b in ((0, h), (h, None))]
    if (reads := getattr(module, "reads", None)) is not None:  # indices into (B,T): what is read
        one, mask = (x.transpose(1, 2)[reads][:, :, None] for x in (query, mask))
        parts = [(one, key, value, mask)]
    return torch.cat([plain(module, *x, **options)[0] for x in parts], 1).expand(-1, query.shape[2], -1, -1), None


def load_pretrained(auto_class, path, may_miss=(), **options):
    """(model, names of weights that its folder lacks: only such as end with an entry of `may_miss`): fp32, eval, no dropout."""
    transformers.logging.set_verbosity_error(), transformers.logging.disable_progress_bar()  # what lacks: below
    check_path(path), transformers.AttentionInterface.register("eager", causal_attention)
    transformers.integrations.sdpa_attention.is_torchdynamo_compiling = lambda: False  # no grouped key is repeated
    try:  # with GELU as one kernel, and on CPU plain attention: both are faster
        config = transformers.AutoConfig.from_pretrained(path, **options)
        zero = {name: 0.0 for name, value in vars(config).items() if "drop" in name and type(value) is float}
        gelu = {name: "gelu_pytorch_tanh" for name, value in vars(config).items() if value == "gelu_new"}
        config.update({**zero, **gelu, "_attn_implementation": None if torch.cuda.is_available() else "eager"})
        if Path(path).exists() and not [*Path(path).glob("*.safetensors*"), *Path(path).glob("*.bin*")]:
            print(f"{path} holds a config and no weights: starting from random weights", flush=True)
            return auto_class.from_config(config, dtype=torch.float32).eval(), list(may_miss)
        model, info = auto_class.from_pretrained(path, config=config, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # of many kinds: a broken file, another shape, a Hub that does not answer
        raise UserError(f"{path}: cannot be loaded as a model: {type(error).__name__}: {error}") from error
    if lacking := sorted(name for name in info["missing_keys"] if not name.endswith(tuple(may_miss))):
        raise UserError(f"{path}: not a model of this kind: it lacks the weights {', '.join(lacking[:3])}")
    return model.eval(), sorted(info["missing_keys"])


def newest_run(script):
    """`model/` of the newest finished run of `script` that chose no --output_dir; a UserError if there is none."""
    if not (finished := [f.parent for f in Path("runs").glob(f"{script}__*/model/config.json")]):
        raise UserError(f"no finished run in runs/{script}__*: run `python {script}.py` first, or name a model folder")
    return str(max(finished, key=lambda f: f.stat().st_mtime))


def prepare(args):
    """The arguments to run with, before anything is loaded or written: as given, or with --resume those of that run."""
    for field in fields(args):
        value, least = getattr(args, field.name), min(field.default, 1) if field.type is int else 0
        bounded = field.type in (int, float, float | None) and field.name != "seed"
        if isinstance(value, (int, float)) and not (least if bounded else -sys.float_info.max) <= value < float("inf"):
            raise UserError(f"--{field.name} {value}: must be {f'at least {least} and ' * bounded}finite")
    if args.track == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--track tensorboard: not installed; run `pip install tensorboard`")
    if args.resume is None and args.output_dir and Path(args.output_dir).exists():
        raise UserError(f"--output_dir {args.output_dir}: exists already; name another folder or remove it")
    if args.resume is None:
        return args
    if not (path := Path(args.resume) / "args.json").is_file() or (path.parent / "model").exists():
        raise UserError(f"--resume {args.resume}: {'the run is finished' if path.is_file() else 'no args.json in it'}")
    saved = asdict(args) | json.loads(path.read_text())["args"] | {"resume": args.resume, "output_dir": args.resume}
    saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    if other := [x for x in saved if getattr(args, x, "?") not in (getattr(type(args), x, None), saved[x])]:
        raise UserError(f"--resume {args.resume}: --{other[0]} differs from that run's own, or is no flag here")
    return replace(args, **saved)


def progress(done, total, ranks, name):
    """Steps done + 1 .. total under a progress bar with the time left, on rank 0; sparse where the output is a file."""
    interval = {"mininterval": 0.2 if sys.stderr.isatty() else 15.0, "maxinterval": 60}
    return tqdm(range(done + 1, total + 1), name, total, initial=done, disable=ranks.rank > 0, **interval)


def save_pretrained(folder, *parts):
    """Write models and tokenizers into one folder that appears complete or not at all."""
    [part.save_pretrained(f"{folder}.tmp") for part in parts]
    shutil.rmtree(folder, ignore_errors=True), os.rename(f"{folder}.tmp", folder)  # left by a run that was stopped


class Run:
    """One run's folder: args.json, metrics.jsonl, samples.jsonl, checkpoints/, model/. Only rank 0 writes."""

    def __init__(self, args, ranks, script):
        self.is_main, self.script, self.track = ranks.rank == 0, script, lambda metrics, step: None
        started = int(all_gather(torch.tensor([int(time.time())], device=ranks.device))[0])  # by the clock of rank 0
        self.folder = Path(args.output_dir or f"runs/{script}__{args.seed}__{started}")
        if not self.is_main:
            return
        record = {"args": asdict(args), "argv": sys.argv, "world_size": ranks.world_size, **environment()}
        if args.resume is None:
            (self.folder / "checkpoints").mkdir(parents=True)
            (self.folder / "args.json").write_text(json.dumps(record, indent=2) + "\n")
        if args.track == "wandb":
            options = {"project": "rlhf", "name": self.folder.name, "dir": str(self.folder), "config": record}
            self.track = importlib.import_module("wandb").init(**options).log
        elif args.track == "tensorboard":
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(self.folder)
            self.track = lambda new, step: [*(writer.add_scalar(key, new[key], step) for key in new), writer.flush()]
        print(f"{script}: writing to {self.folder}", flush=True)

    def log(self, step, metrics, show=()):
        """Append {"step": step, **metrics} to metrics.jsonl and the tracker; print the keys of `show`, aligned."""
        if self.is_main:
            self.append("metrics.jsonl", [{"step": step, **metrics}])
            self.track(metrics, step)
            label = {key: ("eval " if key.startswith("eval/") else "") + key.split("/")[-1] for key in show}
            cells = [f"{label[key]} {metrics[key]:<8.4g}" if key in metrics else " " * len(label[key]) for key in show]
            tqdm.write(f"{self.script} {step:>5} | " + " ".join(cells).rstrip())

    def show_samples(self, step, columns):
        """The first rows of {name: numbers or texts} into samples.jsonl, and four of them as a small table."""
        self.append("samples.jsonl", [{"step": step, **dict(zip(columns, row))} for row in zip(*columns.values())][:16])
        for row in (columns, *zip(*(column[:4] for column in columns.values()))):
            tqdm.write(" | ".join(f"{x:6.2f}" if isinstance(x, float) else " ".join(str(x).split())[-70:] for x in row))

    def append(self, name, rows):
        with open(self.folder / name, "a") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def save_checkpoint(self, step, **state):
        """Everything that resuming needs, under a temporary name until it is complete."""
        if self.is_main:
            path = self.folder / "checkpoints" / f"step_{step:06d}.pt"
            torch.save({"step": step, **state}, f"{path}.tmp"), os.rename(f"{path}.tmp", path)

    def load_checkpoint(self):
        """The newest complete checkpoint, on CPU; metric and sample lines written after it are cut off."""
        if not (paths := sorted((self.folder / "checkpoints").glob("step_*.pt"))):
            raise UserError(f"--resume {self.folder}: no checkpoint; was it started with --save_every?")
        state = torch.load(paths[-1], map_location="cpu", weights_only=True)
        for path in filter(Path.exists, map(self.folder.joinpath, ["metrics.jsonl", "samples.jsonl"] * self.is_main)):
            lines = [line for line in path.read_text().splitlines(True) if line.endswith("\n")]
            path.write_text("".join(line for line in lines if json.loads(line)["step"] <= state["step"]))
        return state


def environment():
    """What a reader needs to run the same thing again: commit, whether the tree was clean, versions, hardware."""
    describe = f"git -C '{Path(__file__).parent}' describe --always --abbrev=40 --exclude='*' --dirty 2>/dev/null"
    commit, _, dirty = os.popen(describe).read().strip().partition("-")
    versions = {package.__name__: package.__version__ for package in (torch, transformers, datasets)}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {"commit": commit, "dirty": bool(dirty), "versions": versions, "device": device}
