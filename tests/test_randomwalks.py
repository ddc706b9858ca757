"""The embedded task: the published numbers, the reward, the tokenizer and the preference pairs."""

import collections
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config
from transformers.activations import ACT2FN

pytestmark = pytest.mark.fast
SCRIPT = Path(__file__).resolve().parent.parent / "tasks" / "randomwalks.py"


def load_task():
    spec = importlib.util.spec_from_file_location("randomwalks", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


task = load_task()
SMALL = {"num_pairs": 2000, "num_test_pairs": 200}

# a -> a; b -> a, c; c -> b; d -> c; node e is cut off (only e -> e)
TINY = np.array(
    [[1, 0, 0, 0, 0], [1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]],
    dtype=bool,
)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def fate(text, graph_seed=1000):
    """What becomes of a walk, told without the task's own optimality()."""
    adjacency = task.build_task(graph_seed)[0].adjacency
    for i, (here, there) in enumerate(itertools.pairwise(text)):
        if not adjacency[ord(here) - ord("a"), ord(there) - ord("a")]:
            return "broken"
        if there == "a":
            return "good" if i + 2 < 10 else "late"
    return "misses"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("randomwalks") / "data"
    task.main(task.Args(output_dir=str(folder), **SMALL))
    return folder


# --------------------------------------------------------------------------------------------------
# The graph and the walks


@pytest.mark.parametrize(
    "graph_seed, mean, reached, shortest, distinct",
    [(1000, 0.3515, 0.56, 3.65, 722), (1002, 0.790, 0.985, 3.55, 163)],
)
def test_published_statistics(graph_seed, mean, reached, shortest, distinct):
    graph, walks = task.build_task(graph_seed)
    texts = [task.to_text(walk) for walk in walks]
    prompts = [text[0] for text in texts]
    responses = [text[1:] for text in texts]
    rewards = task.reward(prompts, responses, graph_seed=[graph_seed] * 1000)
    assert len(walks) == 1000 and len(set(texts)) == distinct
    assert np.mean(rewards) == pytest.approx(mean, abs=5e-4 if graph_seed == 1002 else 5e-5)
    assert np.mean([text[-1] == "a" for text in texts]) == pytest.approx(reached)
    assert graph.shortest[1:].mean() == pytest.approx(shortest)
    assert {text[0] for text in texts} == set("bcdefghijklmnopqrstu")


@pytest.mark.parametrize("graph_seed", [1000, 1002])
def test_graph_and_walks_are_well_formed(graph_seed):
    graph, walks = task.build_task(graph_seed)
    assert graph.adjacency.any(axis=1).all() and not np.diag(graph.adjacency)[1:].any()
    assert graph.adjacency[0].tolist() == [True] + [False] * 20
    for walk in walks:
        assert all(graph.adjacency[i, j] for i, j in itertools.pairwise(walk))
        assert 0 not in walk[:-1] and (walk[-1] == 0 or len(walk) == 10) and len(walk) <= 10


@pytest.mark.parametrize("seed", range(20))
def test_shortest_lengths_against_matrix_powers(seed):
    adjacency = task.draw_graph(np.random.RandomState(seed))
    expected, reach = np.full(21, np.inf), np.eye(21, dtype=int)
    for length in range(1, 22):  # reach[i, 0] > 0: a walk of `length` nodes from i to the goal
        expected[(reach[:, 0] > 0) & np.isinf(expected)] = length
        reach = np.minimum(reach @ adjacency.astype(int), 1)
    np.testing.assert_array_equal(task.shortest_lengths(adjacency), expected)


def test_shortest_lengths_by_hand_and_bad_shape():
    assert task.shortest_lengths(TINY).tolist() == [1, 2, 3, 4, np.inf]
    with pytest.raises(ValueError, match="square"):
        task.shortest_lengths(np.ones((2, 3)))


@pytest.mark.parametrize(
    "walk, expected",
    [
        ("ba", 1.0),
        ("cba", 1.0),
        ("dcba", 1.0),
        ("bcba", 6 / 8),  # one detour: 4 nodes instead of 2
        ("dcbcba", 4 / 6),
        ("dcbcbcbcba", 0.0),  # 10 nodes are no better than a miss
        ("dcbcbcbcbcba", 0.0),
        ("da", 0.0),  # an invented edge, straight to the goal
        ("dba", 0.0),
        ("ddcba", 0.0),  # no node has an edge to itself
        ("dcb", 0.0),  # stops short
        ("dcbc", 0.0),
        ("e", 0.0),
        ("ee", 0.0),
        ("eea", 0.0),  # a start from which the goal cannot be reached
        ("d", 0.0),  # the prompt alone
        ("", 0.0),
        ("cbaa", 1.0),  # whatever follows the first goal is ignored
        ("cbad", 1.0),
        ("cba??", 1.0),
        ("c?ba", 0.0),  # no node
        ("zba", 0.0),  # a letter of the alphabet, but not of this graph
        ("caba", 0.0),  # broken before the first goal
        ("a", 1.0),
    ],
)
def test_optimality_by_hand(walk, expected):
    nodes = task.to_nodes(walk)
    assert task.optimality(TINY, nodes) == pytest.approx(expected)
    assert task.optimality(TINY, nodes, task.shortest_lengths(TINY)) == pytest.approx(expected)


def test_reward_strips_what_decoding_leaves_and_survives_anything():
    prompts = ["k"] * 5 + ["|k", " k"]
    responses = ["na", "na|", " na \n", "na||", "na |", "na", "na"]
    assert task.reward(prompts, responses) == [1.0] * 7
    prompts = ["k"] * 6 + [""]
    responses = ["", "|", "a", "n a", "NA", "né", ""]
    assert task.reward(prompts, responses) == [0.0] * 7
    assert task.reward([], []) == []
    with pytest.raises(ValueError):
        task.reward(["k"], ["na", "na"])


def test_reward_finds_its_graph_by_column():
    graph, walks = task.build_task(1002)
    optimal = [walk for walk in walks if task.optimality(graph.adjacency, walk) == 1]
    best = next(task.to_text(walk) for walk in optimal if len(walk) > 3)
    assert fate(best, graph_seed=1000) != "good"
    prompts = [best[0]] * 2
    responses = [best[1:]] * 2
    assert task.reward(prompts, responses, graph_seed=[1000, 1002], other=["x", "y"]) == [0.0, 1.0]
    assert task.reward(prompts, responses) == [0.0, 0.0]


# --------------------------------------------------------------------------------------------------
# The command line


def test_a_graph_with_an_unreachable_goal_is_refused(tmp_path):
    command = [sys.executable, str(SCRIPT), "--graph_seed", "1001", "--output_dir", "out"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode not in (0, None) and result.stdout == ""
    message = [line for line in result.stderr.splitlines() if "randomwalks.py" in line]
    assert len(message) == 1 and "1001" in message[0] and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags, word",
    [
        ({"num_pairs": 0}, "--num_pairs"),
        ({"num_test_pairs": -1}, "--num_test_pairs"),
        ({"seed": -1}, "--seed"),
        ({"graph_seed": 2**32}, "--graph_seed"),
        ({"output_dir": "file/data"}, "file"),
    ],
)
def test_bad_flags_are_refused(tmp_path, monkeypatch, flags, word):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("keep me")
    with pytest.raises(SystemExit) as error:
        task.main(task.Args(**flags))
    assert word in error.value.code and "\n" not in error.value.code
    assert contents(tmp_path) == {"file": b"keep me"}


def test_two_writes_are_identical_and_leave_other_files_alone(data, tmp_path, capsys):
    folder = tmp_path / "again"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "rated.jsonl").write_text("old")
    task.main(task.Args(output_dir=str(folder), **SMALL))
    assert contents(folder) == contents(data) | {"notes.txt": b"mine"}
    assert list(tmp_path.iterdir()) == [folder]  # no temporary folder stays behind
    printed = capsys.readouterr().out
    for words in ("0.3515", "56%", "3.65", "python sft.py"):
        assert words in printed


# --------------------------------------------------------------------------------------------------
# The files


def test_walk_files(data):
    demonstrations = read(data / "demonstrations.jsonl")
    rated = read(data / "rated.jsonl")
    assert len(demonstrations) == 1000
    assert set(demonstrations[0]) == {"prompt", "completion"}
    rewards = task.reward([row["prompt"] for row in rated], [row["completion"] for row in rated])
    assert np.mean(rewards) == pytest.approx(0.3515, abs=5e-5)
    for row, demonstration, reward in zip(rated, demonstrations, rewards, strict=True):
        assert row == {**demonstration, "reward": reward}
    starts = "bcdefghijklmnopqrstu"
    expected = [{"prompt": letter, "graph_seed": 1000} for letter in starts]
    assert read(data / "prompts.jsonl") == expected


def test_tokenizer_reloads(data):
    tokenizer = AutoTokenizer.from_pretrained(data / "model")
    assert len(tokenizer) == 23 and tokenizer.padding_side == "left"
    assert tokenizer.bos_token == tokenizer.eos_token == "|" and tokenizer.pad_token == "<pad>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer("abc").input_ids == [0, 1, 2] and tokenizer("").input_ids == []
    assert tokenizer("k|").input_ids == [10, tokenizer.eos_token_id]
    for text in ("abc", "k", task.LETTERS):
        assert tokenizer.decode(tokenizer(text + "|").input_ids, skip_special_tokens=True) == text
    batch = tokenizer(["k", "abc"], padding=True)
    assert batch.input_ids == [[22, 22, 10], [0, 1, 2]]
    assert batch.attention_mask == [[0, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("character", ["z", "A", " ", "\n", "é", "字", "1"])
def test_an_unknown_character_becomes_the_separator(data, character):
    tokenizer = AutoTokenizer.from_pretrained(data / "model")
    assert tokenizer(f"ab{character}c").input_ids == [0, 1, tokenizer.eos_token_id, 2]
    assert tokenizer(character).input_ids == [tokenizer.eos_token_id]


def test_config_makes_the_published_model(data):
    names = {path.name for path in (data / "model").iterdir()}
    assert names == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    config = AutoConfig.from_pretrained(data / "model")
    model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_655_280
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (21, 21, 22)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            assert value == 0, name


def test_the_activation_is_that_of_a_gpt2(data):
    """It has another name than the library's default, and computes the same function."""
    config = AutoConfig.from_pretrained(data / "model")
    x = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    ours = ACT2FN[config.activation_function](x)
    usual = ACT2FN[GPT2Config().activation_function](x)
    torch.testing.assert_close(ours, usual, atol=1e-12, rtol=0)


def test_preferences_are_strict_and_splits_disjoint(data):
    splits = [read(data / f"{name}.jsonl") for name in ("preferences", "preferences_test")]
    assert [len(rows) for rows in splits] == [2000, 200]
    for rows in splits:
        assert all(list(row) == ["prompt", "chosen", "rejected"] for row in rows)
        prompts = [row["prompt"] for row in rows]
        chosen = task.reward(prompts, [row["chosen"] for row in rows])
        rejected = task.reward(prompts, [row["rejected"] for row in rows])
        assert all(better > worse for better, worse in zip(chosen, rejected, strict=True))
        counts = collections.Counter(prompts)
        assert len(counts) == 20 and max(counts.values()) - min(counts.values()) <= 1
    train, test = ({tuple(row.values()) for row in rows} for rows in splits)
    assert not train & test and len(test) == 200


# Of the 100 pairs from each start, at least so many have a rejected walk of this kind.
LEAST = {"broken": 25, "misses": 5, "good": 10, "shortcut": 1}


def test_preferences_hold_every_kind_from_every_start(data):
    adjacency = task.build_task(1000)[0].adjacency
    by_start = collections.defaultdict(collections.Counter)
    broken = set()
    total = collections.Counter()
    for row in read(data / "preferences.jsonl"):
        chosen, rejected = row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]
        assert fate(chosen) == "good"
        assert chosen.index("a") == len(chosen) - 1  # A chosen walk stops where it arrives.
        kinds = {fate(rejected)}
        if rejected[-1] == "a" and fate(rejected[:-1]) == "misses" and fate(rejected) == "broken":
            kinds.add("shortcut")  # real edges, then an invented one to the goal
        if fate(rejected) == "good" and abs(len(chosen) - len(rejected)) == 1:
            kinds.add("near tie")
        if row["rejected"] == "":
            kinds.add("empty")
        if "a" in row["rejected"][:-1] and fate(rejected) == "good":
            kinds.add("tail")
        by_start[row["prompt"]].update(kinds)
        total.update(kinds)
        for pair in itertools.pairwise(rejected):
            if not adjacency[tuple(task.to_nodes(pair))]:
                broken.add(pair)
    assert set(total) == {*LEAST, "late", "near tie", "empty", "tail"}
    for counts in by_start.values():
        for kind, least in LEAST.items():
            assert counts[kind] >= least
    assert sum(task.PAIR_KINDS.values()) == pytest.approx(1)
    assert len([pair for pair in broken if pair[0] != "a"]) > 0.95 * (20 * 21 - adjacency[1:].sum())
