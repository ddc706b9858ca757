"""Plumbing shared by the four scripts: ranks, seeds, masked statistics, data files, run folders, checkpoints.

Nothing in here knows what a policy, a reward, a value or a token id is: everything a reader of the papers would want
to see stands in the scripts themselves.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist

# ----------------------------------------------------------------------------------------------------------------------
# Errors and ranks


class UserError(Exception):
    """A mistake of the user's: its text says what is wrong, where, and what to do. Ends in one line, no traceback."""


def launch(main, args):
    """Run `main(args)`. A UserError becomes one line on stderr and exit code 1.

    Before the ranks are connected every rank sees the same mistake and rank 0 alone reports it; later any rank may.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        main(args)
    except UserError as error:
        if rank == 0 or dist.is_initialized():
            print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@dataclass(frozen=True)
class Ranks:
    """Which process this is, of how many, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0


def init_ranks():
    """Join the process group that `torchrun` announces in the environment (nccl on CUDA, gloo on CPU), if there is one."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    if dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size(), device)
    return Ranks(0, 1, device)


def wrap(module, ranks, compiled):
    """The module that the loss goes through: compiled if asked, and with gradients averaged over ranks."""
    module = torch.compile(module) if compiled else module
    if ranks.world_size == 1:
        return module
    return torch.nn.parallel.DistributedDataParallel(
        module, device_ids=[ranks.device.index] if ranks.device.type == "cuda" else None
    )


def sync_only_if(last, train_model):
    """Context for one micro-batch, around forward and backward: ranks exchange gradients at the last one alone."""
    return contextlib.nullcontext() if last or not hasattr(train_model, "no_sync") else train_model.no_sync()


def autocast(device, precision):
    """Compute in bf16 where that is safe, or leave fp32 alone; parameters and optimizer state are fp32 either way."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def seeded(*key):
    """A CPU generator whose stream depends on every part of `key`, e.g. (seed, "uniforms", update), and nothing else.

    Randomness without state: the same on every rank, and a resumed run needs no saved generator.
    """
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def clock(device):
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def check_divides(divisor, number, what):
    """Refuse sizes that would leave a remainder; `what` names the two flags."""
    if divisor < 1 or number < 1 or number % divisor:
        raise UserError(f"{what}: {number} does not divide evenly by {divisor}")


# ----------------------------------------------------------------------------------------------------------------------
# Statistics over all ranks


def all_sum(x):
    """The sum of a tensor over ranks (a new tensor); the tensor itself without a process group."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


def all_gather(x):
    """Concatenate a tensor of equal shape on every rank along dim 0, in rank order."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def masked_mean(x, mask):
    """Mean over the True entries of `mask` on all ranks: 0-d, without gradient, 0 where no entry is True.

    x: any shape, any value (NaN included) behind the mask. mask: bool, same shape.
    """
    total = all_sum(torch.stack([torch.where(mask, x, 0).sum(dtype=torch.float64), mask.sum(dtype=torch.float64)]))
    return (total[0] / total[1].clamp(min=1)).to(x.dtype)


@torch.no_grad()
def whiten(x, mask, shift_mean=True):
    """Zero mean and unit (biased) variance over the True entries of all ranks; entries behind the mask become 0.

    `shift_mean=False` keeps the mean and only scales. Finite for zero or one valid entry.
    Whitening per rank or per micro-batch would make the objective depend on the hardware (Ziegler et al. 2019 do so).
    """
    x64 = torch.where(mask, x, 0).double()
    mean = masked_mean(x64, mask)
    variance = masked_mean((x64 - mean) ** 2, mask)
    whitened = (x64 - mean) * torch.rsqrt(variance + 1e-8) + (0.0 if shift_mean else mean)
    return torch.where(mask, whitened, 0).to(x.dtype)


class Means:
    """Exact means by name over micro-batches and ranks: sums and counts stay on the device until one reduction."""

    def __init__(self):
        self.sums = {}

    @torch.no_grad()
    def add(self, name, x, mask=None):
        """Add the True entries of `x` (all of them without a mask) to the mean called `name`."""
        mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        self.add_sum(name, torch.where(mask, x, 0).sum(dtype=torch.float64), mask.sum())

    @torch.no_grad()
    def add_sum(self, name, total, count):
        """Add a sum that was taken already, and of how many entries (both 0-d tensors)."""
        pair = torch.stack([total.double(), count.double()])
        self.sums[name] = self.sums[name] + pair if name in self.sums else pair

    def reduce(self):
        """{name: float} over all ranks, and start again. Every rank must have added the same names."""
        names = sorted(self.sums)
        if not names:
            return {}
        total, count = all_sum(torch.stack([self.sums[name] for name in names])).unbind(1)
        self.sums = {}
        return dict(zip(names, (total / count.clamp(min=1)).tolist(), strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Files in


def load_rows(path, columns):
    """The rows of a data set that has at least one of the wanted groups of columns.

    path: a .json, .jsonl or .parquet file, a folder of them, or a Hub name (its train split).
    columns: tuples of column names, each tuple a form that the script understands.
    Returns a datasets.Dataset. Errors name the path, and the columns that are there.
    """
    import datasets  # seconds to import: only where data is read

    datasets.disable_progress_bars()
    local, suffixes = Path(path), {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    if local.exists():
        files = [local] if local.is_file() else sorted(f for f in local.iterdir() if f.suffix in suffixes)
        kinds = {suffixes.get(f.suffix) for f in files}
        if len(kinds) != 1 or None in kinds:
            raise UserError(f"{path}: needs a .json, .jsonl or .parquet file, or a folder with files of one such kind")
        if all(not f.read_bytes()[:4096].strip() for f in files):
            raise UserError(f"{path}: the data set is empty")
        kind, options = kinds.pop(), {"data_files": [str(f) for f in files]}
    elif local.suffix in suffixes or path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(f"{path}: no such file or folder")
    else:
        kind, options = path, {}
    try:
        rows = datasets.load_dataset(kind, split="train", **options)
    except Exception as error:  # the library raises many kinds; the first line of each says what happened
        raise UserError(f"{path}: cannot be read as a data set: {str(error).splitlines()[0]}") from error
    if not any(set(group) <= set(rows.column_names) for group in columns):
        wanted = " or ".join("+".join(group) for group in columns)
        raise UserError(f"{path}: needs the columns {wanted}; it has {', '.join(rows.column_names)}")
    if len(rows) == 0:
        raise UserError(f"{path}: the data set is empty")
    return rows


def load_function(spec, flag):
    """The function named by `path/to/file.py:name`."""
    path, _, name = spec.rpartition(":")
    if not path or not Path(path).is_file():
        raise UserError(f"{flag} {spec}: no such file; give path/to/file.py:function")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickles inside the file look themselves up here
    module_spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise UserError(f"{flag} {spec}: {path} has no function {name}")
    return getattr(module, name)


def load_pretrained(auto_class, path, may_miss=(), **options):
    """`auto_class.from_pretrained(path)` in fp32 and eval mode with every dropout at 0, or a one-line error.

    A folder with a config and no weights starts from random weights, and says so. Weights that are missing from the
    checkpoint are an error unless their name ends with an entry of `may_miss`.
    Returns (model, names of the freshly initialised weights).
    """
    import transformers

    transformers.logging.set_verbosity_error()  # its load report would bury ours; missing weights are checked below
    transformers.logging.disable_progress_bar()
    folder = Path(path)
    if folder.exists() and not (folder / "config.json").is_file():
        raise UserError(f"{path}: not a model folder: it holds no config.json")
    if not folder.exists() and (path.startswith((".", "/", "~")) or path.count("/") != 1 and "/" in path):
        raise UserError(f"{path}: no such model folder")
    try:
        config = transformers.AutoConfig.from_pretrained(path, **options)
        for name, value in vars(config).items():  # nn.Dropout modules and the floats handed to attention kernels alike
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
        config.use_cache = True
        if folder.exists() and not list(folder.glob("*.safetensors*")) + list(folder.glob("pytorch_model*")):
            if int(os.environ.get("RANK", "0")) == 0:
                print(f"{path} holds a config and no weights: starting from random weights", flush=True)
            return auto_class.from_config(config, dtype=torch.float32).eval(), ["all"]
        model, info = auto_class.from_pretrained(path, config=config, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: cannot be loaded as a model: {str(error).splitlines()[0]}") from error
    missing = sorted(info["missing_keys"])
    if [name for name in missing if not name.endswith(tuple(may_miss))]:
        raise UserError(f"{path}: not a model of this kind: it lacks the weights {', '.join(missing[:3])}")
    return model.eval(), missing


# ----------------------------------------------------------------------------------------------------------------------
# The run folder


def newest_run(script):
    """`model/` of the newest finished default run of `script`; a UserError that names the command if there is none."""
    finished = [f for f in Path("runs").glob(f"{script}__*") if (f / "model" / "config.json").is_file()]
    if not finished:
        raise UserError(f"no finished run of {script}.py under runs/: run `python {script}.py` first, or name a folder")
    return str(max(finished, key=lambda f: (f / "model").stat().st_mtime) / "model")


def resumed(args):
    """With `--resume FOLDER`: that run's own arguments. A flag that is given beside it and differs is an error."""
    if args.resume is None:
        return args
    path = Path(args.resume) / "args.json"
    if not path.is_file():
        raise UserError(f"--resume {args.resume}: not a run folder: it holds no args.json")
    saved = replace(args, **json.loads(path.read_text())["args"])
    for field in fields(args):
        given = getattr(args, field.name)
        if field.name != "resume" and given not in (field.default, getattr(saved, field.name)):
            raise UserError(f"--resume {args.resume}: --{field.name} {given} differs from the run's own; leave it out")
    return replace(saved, resume=args.resume, output_dir=args.resume)


def progress(done, total, ranks, name):
    """Steps done + 1 .. total under a progress bar with the time left, on rank 0; sparse where the output is a file."""
    from tqdm import tqdm

    options = {"initial": done, "total": total, "desc": name, "dynamic_ncols": True, "smoothing": 0.1}
    interval = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(range(done + 1, total + 1), disable=not ranks.is_main, mininterval=interval, maxinterval=60, **options)


def say(text):
    """Print above a progress bar that may be on the screen."""
    from tqdm import tqdm

    tqdm.write(text)
    sys.stdout.flush()


def save_pretrained(folder, *parts):
    """Write models and tokenizers into one folder that appears complete or not at all."""
    temporary = Path(f"{folder}.tmp")
    for part in parts:
        part.save_pretrained(temporary)
    os.rename(temporary, folder)


class Run:
    """One run's folder: args.json, metrics.jsonl, samples.jsonl, checkpoints/, model/. Only rank 0 writes."""

    def __init__(self, args, ranks, script):
        self.ranks, self.script, self.tracker = ranks, script, None
        name = [args.output_dir or f"runs/{script}__{args.seed}__{int(time.time())}"]
        if dist.is_initialized():
            dist.broadcast_object_list(name)
        self.folder = Path(name[0])
        if ranks.is_main and args.resume is None:
            (self.folder / "checkpoints").mkdir(parents=True)
            record = {"args": asdict(args), "argv": sys.argv, "world_size": ranks.world_size, **environment()}
            (self.folder / "args.json").write_text(json.dumps(record, indent=2) + "\n")
        if ranks.is_main:
            self.start_tracker(args)
            print(f"{script}: writing to {self.folder}", flush=True)

    def start_tracker(self, args):
        if args.track == "wandb":
            import wandb

            config = {"script": self.script, **asdict(args)}
            run = wandb.init(project="rlhf", name=self.folder.name, dir=str(self.folder), config=config)
            self.tracker = lambda step, metrics: run.log(metrics, step=step)
        elif args.track == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(self.folder)
            self.tracker = lambda step, metrics: [writer.add_scalar(k, v, step) for k, v in metrics.items()]
            self.close_tracker = writer.close

    def log(self, step, metrics, show=()):
        """Append {"step": step, **metrics} to metrics.jsonl and the tracker; print the keys of `show`, aligned."""
        if not self.ranks.is_main:
            return
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self.tracker:
            self.tracker(step, metrics)
        label = {key: ("eval " if key.startswith("eval/") else "") + key.split("/")[-1] for key in show}
        cells = [f"{label[key]} {metrics[key]:9.4g}" if key in metrics else " " * (len(label[key]) + 10) for key in show]
        say(f"{self.script} {step:>5} | " + " | ".join(cells).rstrip())

    def save_samples(self, step, rows):
        """Append sampled texts, one JSON object a line."""
        with open(self.folder / "samples.jsonl", "a") as file:
            file.writelines(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n" for row in rows)

    def save_checkpoint(self, step, **state):
        """Everything that resuming needs, under a temporary name until it is complete."""
        if self.ranks.is_main:
            path = self.folder / "checkpoints" / f"step_{step:06d}.pt"
            torch.save({"step": step, **state}, f"{path}.tmp")
            os.rename(f"{path}.tmp", path)

    def load_checkpoint(self):
        """The newest complete checkpoint, on CPU; metric and sample lines written after it are cut off."""
        paths = sorted((self.folder / "checkpoints").glob("step_*.pt"))
        if not paths:
            raise UserError(f"--resume {self.folder}: no checkpoint in checkpoints/; was the run started with --save_every?")
        state = torch.load(paths[-1], map_location="cpu", weights_only=True)
        for name in ("metrics.jsonl", "samples.jsonl") if self.ranks.is_main else ():
            path = self.folder / name
            if path.is_file():
                lines = [line for line in path.read_text().splitlines(True) if line.endswith("\n")]
                path.write_text("".join(line for line in lines if json.loads(line)["step"] <= state["step"]))
        return state


def check_run_folder(args):
    """Refuse an existing folder, and a tracker that is not installed, before anything is loaded or written."""
    if args.output_dir and args.resume is None and Path(args.output_dir).exists():
        raise UserError(f"--output_dir {args.output_dir}: exists already; name another folder or remove it")
    if args.track == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--track tensorboard: not installed; run `pip install tensorboard`")


def environment():
    """What a reader needs to run the same thing again: commit, whether the tree was clean, versions, hardware."""
    import transformers

    def git(*command):
        root = Path(__file__).parent
        done = subprocess.run(["git", *command], capture_output=True, text=True, cwd=root, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain", "--untracked-files=no")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu x {torch.get_num_threads()} threads"
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "device": device,
    }
