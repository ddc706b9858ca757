"""Random walks: a task small enough for a laptop, whose best possible score is known exactly.

A random directed graph has 21 nodes, the letters a-u. Node a is the goal, and its only edge leads
back to itself. The prompt is a start letter, the response is the rest of a walk, and a good model
spells a shortest path to a:

    prompt "k", response "na"       the walk k -> n -> a, whose length is 3 nodes

    optimality = (10 - min(length, 10)) / (10 - shortest)

The length counts the nodes up to and including the first a; `shortest` is that of the shortest path
from the same start. So the optimality is 1 for a shortest path. It is 0 for a failure: an edge that
the graph does not have, a character that is no node, or a walk that never reaches a. What is
written after the first a is ignored, which is how the published numbers count. Whether a model also
stops there is a matter of its EOS, not of this reward.

The data to learn from are 1000 uniform random walks, which are poor: on graph seed 1000 their mean
optimality is 0.35.

    python tasks/randomwalks.py                                    # writes data/randomwalks/
    python tasks/randomwalks.py --graph_seed 1002 --output_dir data/easy

What is written (a second call writes the same bytes):

    model/                  tokenizer and config of a GPT-2 with 1,655,280 parameters, without
                            weights, so that it is trained from scratch
    demonstrations.jsonl    prompt, completion: the 1000 walks, for sft.py
    preferences.jsonl       prompt, chosen, rejected: the chosen walk is strictly better, for
                            reward_model.py
    preferences_test.jsonl  the same, held out: no row is in both files
    prompts.jsonl           prompt, graph_seed: the distinct start letters, sorted, for ppo_rlhf.py
    rated.jsonl             prompt, completion, reward: the 1000 walks and their optimality, for
                            ilql_rlhf.py

The exact reward is also a function, `--reward_fn tasks/randomwalks.py:reward`. The column
graph_seed of prompts.jsonl tells it which graph to use.

The tokenizer has 23 tokens of one character each: the 21 letters, `|` (both BOS and EOS) and
`<pad>`. It adds nothing to a text. There is no token for unknown characters, so each of them
becomes `|`: it keeps its place in `input_ids` and means "the walk is over", where it could
otherwise vanish or pose as a letter.
"""

import bisect
import functools
import itertools
import json
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstu"
GOAL = 0
# Nodes in a walk. A walk of this length or longer has optimality 0.
MAX_NODES = 10
NUM_WALKS = 1000
# There is an edge where a uniform draw exceeds this.
EDGE_THRESHOLD = 0.9
# The graph of the published numbers.
BENCHMARK_SEED = 1000
SEPARATOR = "|"


@dataclass
class Args:
    graph_seed: int = 1000
    """seed of the graph and of its 1000 walks; 1000 is the published benchmark, 1002 is an easy
    graph"""
    seed: int = 1
    """seed of the preference pairs (graph and walks do not depend on it)"""
    num_pairs: int = 20_000
    """rows of preferences.jsonl, spread evenly over the start letters"""
    num_test_pairs: int = 1_000
    """rows of preferences_test.jsonl, spread evenly over the start letters"""
    output_dir: str = "data/randomwalks"
    """folder to write; files of the same names in it are replaced, others are left alone"""


# --------------------------------------------------------------------------------------------------
# The graph and the reward


class Graph(NamedTuple):
    adjacency: np.ndarray
    """(N,N) bool, [i, j]: there is an edge i -> j"""
    shortest: np.ndarray
    """(N,) nodes on the shortest path to the goal"""
    successors: list
    """N lists of node numbers: where an edge leads"""
    closer: list
    """N lists: those successors from which the goal is nearest"""


def shortest_lengths(adjacency):
    """Nodes on the shortest path from every node to the goal, (N,) float, both ends counted.

    It is 1 for the goal itself, and inf where there is no path. adjacency: (N,N) bool. Found by
    breadth-first search backwards from the goal. Raises ValueError if adjacency is not square.
    """
    adjacency = np.asarray(adjacency, dtype=bool)
    if adjacency.ndim != 2 or adjacency.shape[0] != adjacency.shape[1]:
        raise ValueError(f"adjacency must be a square matrix, not of shape {adjacency.shape}")
    lengths = np.full(len(adjacency), np.inf)
    frontier = np.arange(len(adjacency)) == GOAL
    length = 1
    while frontier.any():
        lengths[frontier] = length
        frontier = adjacency[:, frontier].any(axis=1) & np.isinf(lengths)
        length += 1
    return lengths


def optimality(adjacency, walk, shortest=None):
    """How close a walk comes to the shortest path: 1 for a shortest path, 0 for a failure.

    adjacency: (N,N) bool. walk: node numbers, the start first; whatever follows the first goal is
    ignored, and a number outside 0..N-1 is a node that does not exist. shortest: (N,), the result
    of shortest_lengths(adjacency), if the caller has it already. An empty walk, or the start alone
    (unless it is the goal), is a failure.
    """
    for i, node in enumerate(walk):
        if not 0 <= node < len(adjacency):
            return 0.0
        if i > 0 and not adjacency[walk[i - 1], node]:
            return 0.0
        if node == GOAL:
            length = i + 1
            if length >= MAX_NODES:
                return 0.0
            if shortest is None:
                shortest = shortest_lengths(adjacency)
            return float((MAX_NODES - length) / (MAX_NODES - shortest[walk[0]]))
    return 0.0


def draw_graph(rng):
    """One random graph, (N,N) bool, redrawn until each node has an edge to another."""
    while True:
        adjacency = rng.rand(len(LETTERS), len(LETTERS)) > EDGE_THRESHOLD
        np.fill_diagonal(adjacency, False)
        if adjacency.any(axis=1).all():
            break
    # A walk that has reached the goal stays there.
    adjacency[GOAL] = False
    adjacency[GOAL, GOAL] = True
    return adjacency


def uniform_walk(rng, adjacency, start, max_nodes=MAX_NODES):
    """A walk that takes every edge with equal chance and stops at the goal or at max_nodes."""
    walk = [int(start)]
    while walk[-1] != GOAL and len(walk) < max_nodes:
        successors = np.nonzero(adjacency[walk[-1]])[0]
        walk.append(int(rng.choice(successors)))
    return walk


@functools.cache
def build_task(graph_seed):
    """(graph, walks) of a seed: its 1000 walks are lists of node numbers.

    Both are drawn from one random stream. Raises ValueError if some node cannot reach the goal, or
    only by a path so long that its optimality would be 0 / 0.
    """
    rng = np.random.RandomState(graph_seed)
    adjacency = draw_graph(rng)
    shortest = shortest_lengths(adjacency)
    lost = "".join(np.array(list(LETTERS))[shortest >= MAX_NODES])
    if lost:
        reason = f"the goal a is out of reach (fewer than {MAX_NODES} nodes)"
        where = f"from {len(lost)} nodes ({lost})"
        advice = f"choose another graph seed ({BENCHMARK_SEED} is the benchmark)"
        raise ValueError(f"graph seed {graph_seed} is of no use: {reason} {where}; {advice}")
    successors = [np.nonzero(row)[0].tolist() for row in adjacency]
    closer = []
    for nodes in successors:
        nearest = min(shortest[nodes])
        closer.append([node for node in nodes if shortest[node] == nearest])
    walks = []
    for _ in range(NUM_WALKS):
        start = rng.randint(len(LETTERS))
        while start == GOAL:
            start = rng.randint(len(LETTERS))
        walks.append(uniform_walk(rng, adjacency, start))
    return Graph(adjacency, shortest, successors, closer), walks


def to_nodes(text):
    """Node numbers of a text, -1 for a character that is no node."""
    return [LETTERS.find(character) for character in text]


def to_text(walk):
    """The letters of a walk."""
    return "".join(LETTERS[node] for node in walk)


def reward(prompts, responses, graph_seed=None, **columns):
    """Optimality (list of float, 0 to 1) of each walk prompts[i] + responses[i].

    prompts, responses: decoded texts; spaces and separators around them do not count. graph_seed:
    one number for each row, as in prompts.jsonl; without it the benchmark's graph counts. Further
    columns are ignored.
    """
    if graph_seed is None:
        graph_seed = [BENCHMARK_SEED] * len(prompts)
    rewards = []
    for prompt, response, row_seed in zip(prompts, responses, graph_seed, strict=True):
        graph, _ = build_task(int(row_seed))
        text = prompt.strip().lstrip(SEPARATOR) + response.strip().rstrip(SEPARATOR)
        rewards.append(optimality(graph.adjacency, to_nodes(text.strip()), graph.shortest))
    return rewards


# --------------------------------------------------------------------------------------------------
# Walks, good and bad
#
# Each maker takes (rng, graph, start) and gives a list of node numbers that begins with start, or
# None if the draw came to nothing; the caller then draws again.


def pick(rng, items, shares=None):
    """One of the items, with equal chances or with the given ones.

    NumPy's own choice is ten times as slow.
    """
    if shares is None:
        return items[int(rng.rand() * len(items))]
    index = bisect.bisect(list(itertools.accumulate(shares)), rng.rand())
    return items[min(index, len(items) - 1)]


def guided_walk(rng, graph, start, skill, max_nodes=MAX_NODES):
    """Each step is, with chance `skill`, one on a shortest path, and otherwise a uniform one."""
    walk = [int(start)]
    while walk[-1] != GOAL and len(walk) < max_nodes:
        choices = graph.closer if rng.rand() < skill else graph.successors
        walk.append(pick(rng, choices[walk[-1]]))
    return walk


def good_walk(rng, graph, start):
    """A walk of positive optimality: a shortest path, one with a detour, or a skilled wander."""
    kind = pick(rng, ["shortest", "detour", "skilled"], [0.3, 0.35, 0.35])
    skill = rng.uniform(0.2, 0.9) if kind == "skilled" else 1.0
    walk = guided_walk(rng, graph, start, skill)
    if kind == "detour":
        walk = walk[: rng.randint(1, len(walk))]
        onward = pick(rng, graph.successors[walk[-1]])
        walk = walk + guided_walk(rng, graph, onward, 1.0)
    return walk if optimality(graph.adjacency, walk, graph.shortest) > 0 else None


def any_walk(rng, graph, start):
    """A valid walk that may or may not arrive, from aimless to skilled."""
    return guided_walk(rng, graph, start, pick(rng, [0.0, 0.3, 0.6, 0.9]))


def broken_copy(rng, graph, walk):
    """The walk with one letter replaced, inserted, deleted or swapped with the next.

    None if it still arrives.
    """
    edit = pick(rng, ["replace", "insert", "delete", "swap"])
    i = rng.randint(1, len(walk))
    letter = rng.randint(len(LETTERS))
    if edit == "replace":
        edited = [*walk[:i], letter, *walk[i + 1 :]]
    elif edit == "insert":
        edited = [*walk[:i], letter, *walk[i:]]
    elif edit == "delete":
        edited = walk[:i] + walk[i + 1 :]
    else:
        edited = walk[:i] + walk[i : i + 2][::-1] + walk[i + 2 :]
    return None if optimality(graph.adjacency, edited, graph.shortest) > 0 else edited


def jump_walk(rng, graph, start):
    """0 to 3 valid steps, an edge that does not exist (sometimes two), then a shortest path.

    The invented edge leads to the goal, to a node that is no farther from it (so that the walk
    looks as good as any), or anywhere.
    """
    walk = guided_walk(rng, graph, start, rng.rand(), max_nodes=rng.randint(1, 5))
    num_jumps = 2 if rng.rand() < 0.2 else 1
    for _ in range(num_jumps):
        near = np.nonzero(graph.shortest <= graph.shortest[walk[-1]])[0].tolist()
        targets = pick(rng, [[GOAL], near, range(len(LETTERS))], [0.25, 0.5, 0.25])
        target = pick(rng, targets)
        if walk[-1] == GOAL or graph.adjacency[walk[-1], target]:
            return None
        walk.append(target)
    return walk + guided_walk(rng, graph, walk[-1], 1.0)[1:]


def missing_walk(rng, graph, start):
    """A walk of real edges that misses the goal: it stops early, wanders, circles, or is late."""
    kind = pick(rng, ["early", "wander", "circle", "late"], [0.4, 0.3, 0.15, 0.15])
    if kind == "early":
        walk = guided_walk(rng, graph, start, rng.uniform(0.3, 1.0))
        return walk[: rng.randint(1, len(walk))]
    walk = [int(start)]
    for _ in range(rng.randint(1, MAX_NODES + 2)):
        onward = [node for node in graph.successors[walk[-1]] if node != GOAL]
        if not onward:
            break
        walk.append(pick(rng, onward))
        if kind == "circle" and walk[-1] in walk[:-1]:
            circle = walk[walk.index(walk[-1]) + 1 :]
            length = rng.randint(len(walk), MAX_NODES + 3)
            return (walk + circle * MAX_NODES)[:length]
    if kind != "late":
        return walk
    walk = walk + guided_walk(rng, graph, walk[-1], 1.0)[1:]
    return walk if len(walk) >= MAX_NODES else None


def noise_walk(rng, graph, start):
    """Random letters, or one letter repeated; half of them end at the goal all the same."""
    letters = rng.randint(len(LETTERS), size=rng.randint(0, MAX_NODES + 1))
    if rng.rand() < 0.2:
        letters = letters[:1].repeat(len(letters))
    walk = [int(start), *letters.tolist()]
    if rng.rand() < 0.5:
        walk.append(GOAL)
    return walk


def with_tail(rng, walk):
    """The walk and 1 to 4 letters after it: the goal again and again, or any letters."""
    tail = rng.randint(len(LETTERS), size=rng.randint(1, 5))
    if rng.rand() >= 0.7:
        tail = np.full_like(tail, GOAL)
    return walk + tail.tolist()


def failing_walk(rng, graph, start):
    """A walk that fails, of any of the kinds above."""
    maker = pick(rng, [jump_walk, missing_walk, noise_walk], [0.5, 0.25, 0.25])
    walk = maker(rng, graph, start)
    if walk is None or optimality(graph.adjacency, walk, graph.shortest) > 0:
        return None
    return walk


# --------------------------------------------------------------------------------------------------
# Preference pairs

# A policy that maximises a learned reward finds whatever the reward model never saw, so the pairs
# must cover every way to be wrong, not only the mistakes that random walks make. The cheapest
# exploit is a short walk with one invented edge, so those are the largest part. A good walk arrives
# in fewer than 10 nodes. Letters after the arrival occur on the rejected side only: they cost
# nothing in the reward, but a reward model that had to look past them would see less of the walk.
PAIR_KINDS = {
    # Two valid walks of any skill: the plain comparison.
    "walks": 0.08,
    # Two good walks of different length, in half the draws at most 2 nodes apart.
    "length": 0.22,
    # A good walk and its own copy with one broken edge or end.
    "copy": 0.15,
    # A good walk and one with an invented edge, straight to the goal or nearer to it.
    "jump": 0.38,
    # A good walk and one of real edges that misses the goal.
    "miss": 0.10,
    # A good walk and random letters.
    "noise": 0.04,
    # A good walk and a worse one with letters after its end.
    "tail": 0.03,
}
# Draws of one kind before another kind is drawn, because from some starts a kind gives few
# different pairs, or none.
MAX_TRIES = 50


def draw_second_walk(rng, graph, start, kind, first):
    """The walk that a kind of pair sets against its first walk, or None."""
    if kind == "walks":
        return any_walk(rng, graph, start)
    if kind == "length":
        second = good_walk(rng, graph, start)
        if second is None:
            return None
        wants_near_tie = rng.rand() < 0.5
        return None if wants_near_tie and abs(len(first) - len(second)) > 2 else second
    if kind == "copy":
        return broken_copy(rng, graph, first)
    if kind == "tail":
        maker = good_walk if rng.rand() < 0.5 else failing_walk
        second = maker(rng, graph, start)
        if second is None:
            return None
        scores = [optimality(graph.adjacency, walk, graph.shortest) for walk in (first, second)]
        return with_tail(rng, second) if scores[0] > scores[1] else None
    makers = {"jump": jump_walk, "miss": missing_walk, "noise": noise_walk}
    return makers[kind](rng, graph, start)


def draw_pair(rng, graph, start, kind):
    """Two walks from one start, in no order, or None."""
    maker = any_walk if kind == "walks" else good_walk
    first = maker(rng, graph, start)
    if first is None:
        return None
    second = draw_second_walk(rng, graph, start, kind, first)
    return None if second is None else (first, second)


def draw_preferences(rng, graph, starts, num_pairs, held_out=None):
    """num_pairs rows {prompt, chosen, rejected}: starts in turn, kinds at random, no tie.

    No row of held_out is among them. Without held_out the rows are held out themselves, and all
    different. Training rows may repeat: from some starts there are few good walks, and their
    comparisons must not run out.
    """
    taken = {tuple(row.values()) for row in held_out or ()}
    kinds = list(PAIR_KINDS)
    shares = list(PAIR_KINDS.values())
    rows = []
    tries = 0
    kind = None
    while len(rows) < num_pairs:
        if tries % MAX_TRIES == 0:
            kind = pick(rng, kinds, shares)
        tries += 1
        walks = draw_pair(rng, graph, starts[len(rows) % len(starts)], kind)
        if walks is None:
            continue
        scores = [optimality(graph.adjacency, walk, graph.shortest) for walk in walks]
        better_first = walks if scores[0] > scores[1] else walks[::-1]
        chosen, rejected = (to_text(walk) for walk in better_first)
        row = {"prompt": chosen[0], "chosen": chosen[1:], "rejected": rejected[1:]}
        if scores[0] == scores[1] or tuple(row.values()) in taken:
            continue
        if held_out is None:
            taken.add(tuple(row.values()))
        rows.append(row)
        tries = 0
    # The starts came in turn, which would make every batch alike. After a shuffle any first part of
    # the rows is a fair sample.
    return [rows[i] for i in rng.permutation(len(rows))]


# --------------------------------------------------------------------------------------------------
# The model and the files


def build_tokenizer():
    """One token for each character."""
    vocab = {token: i for i, token in enumerate([*LETTERS, SEPARATOR, "<pad>"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=SEPARATOR))
    # The pattern `.` would let newlines through.
    any_character = Regex(r"[\s\S]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(any_character, "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        unk_token=SEPARATOR,
        pad_token="<pad>",
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_config(tokenizer):
    """A GPT-2 of 6 layers and width 144.

    Its 1024 positions are far more than a walk needs, but they are part of the published size. Its
    activation is the usual one of a GPT-2, by the name under which PyTorch computes it in one
    kernel.
    """
    return GPT2Config(
        architectures=["GPT2LMHeadModel"],
        vocab_size=len(tokenizer),
        n_positions=1024,
        n_embd=144,
        n_layer=6,
        n_head=6,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        summary_first_dropout=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def write_files(output_dir, tables):
    """Write model/ and a .jsonl file for each table, and return their names.

    All is written into a temporary folder beside output_dir first, then moved in file by file.
    """
    output_dir = output_dir.resolve()
    output_dir.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.", dir=output_dir.parent))
    try:
        tokenizer = build_tokenizer()
        tokenizer.save_pretrained(temporary / "model")
        build_config(tokenizer).save_pretrained(temporary / "model")
        for name, rows in tables.items():
            with open(temporary / f"{name}.jsonl", "w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        paths = [path for path in temporary.rglob("*") if path.is_file()]
        names = sorted(path.relative_to(temporary) for path in paths)
        (output_dir / "model").mkdir(exist_ok=True)
        for name in names:
            os.replace(temporary / name, output_dir / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return names


def check_args(args):
    """Raise ValueError for a flag that is out of bounds."""
    for flag in ("graph_seed", "seed"):
        value = getattr(args, flag)
        if not 0 <= value < 2**32:
            raise ValueError(f"--{flag} must lie in 0 .. 2**32 - 1, not {value}")
    for flag in ("num_pairs", "num_test_pairs"):
        value = getattr(args, flag)
        if value < 1:
            raise ValueError(f"--{flag} must be at least 1, not {value}")
    for path in [Path(args.output_dir), *Path(args.output_dir).parents]:
        if path.exists() and not path.is_dir():
            raise ValueError(f"--output_dir {args.output_dir}: {path} is a file, not a folder")


def main(args):
    try:
        check_args(args)
        graph, walks = build_task(args.graph_seed)
    except ValueError as error:
        sys.exit(f"randomwalks.py: {error}")

    # 1. The walks and what they are worth.
    texts = [to_text(walk) for walk in walks]
    rewards = [optimality(graph.adjacency, walk, graph.shortest) for walk in walks]
    starts = sorted({walk[0] for walk in walks})
    demonstrations = [{"prompt": text[0], "completion": text[1:]} for text in texts]
    rated = []
    for row, value in zip(demonstrations, rewards, strict=True):
        rated.append({**row, "reward": value})

    # 2. The preference pairs, the held-out ones first.
    test_rng = np.random.RandomState([args.seed, 0])
    train_rng = np.random.RandomState([args.seed, 1])
    held_out = draw_preferences(test_rng, graph, starts, args.num_test_pairs)
    preferences = draw_preferences(train_rng, graph, starts, args.num_pairs, held_out)

    # 3. The files.
    prompts = [{"prompt": LETTERS[start], "graph_seed": args.graph_seed} for start in starts]
    tables = {
        "demonstrations": demonstrations,
        "rated": rated,
        "prompts": prompts,
        "preferences": preferences,
        "preferences_test": held_out,
    }
    output_dir = Path(args.output_dir)
    files = write_files(output_dir, tables)

    reached = np.mean([walk[-1] == GOAL for walk in walks])
    path_length = graph.shortest[starts].mean()
    num_distinct = len(set(texts))
    print(f"graph seed          {args.graph_seed}")
    print(
        f"walks               {len(walks)}, {num_distinct} distinct, {reached:.0%} reach the goal"
    )
    print(f"mean optimality     {np.mean(rewards):.4f}   (1 is a shortest path from every start)")
    print(f"mean shortest path  {path_length:.2f} nodes, over {len(starts)} starts")
    print(f"preference pairs    {args.num_pairs} and {args.num_test_pairs} held out")
    print(f"written             {output_dir}: {', '.join(map(str, files))}")
    next_flags = ""
    if args.output_dir != Args.output_dir:
        next_flags = f" --model {output_dir / 'model'}"
        next_flags += f" --dataset {output_dir / 'demonstrations.jsonl'}"
    print(f"next                python sft.py{next_flags}")


if __name__ == "__main__":
    main(tyro.cli(Args, use_underscores=True))
