"""The rules of the house, read off the syntax trees: budgets, honest copies, flags that are kept, quiet imports."""

import ast
import io
import itertools
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = {"sft.py": 300, "reward_model.py": 350, "ppo_rlhf.py": 600, "ilql_rlhf.py": 500, "utils.py": 300}
SOURCES = {name: (ROOT / name).read_text() for name in BUDGETS if (ROOT / name).is_file()}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
SCRIPTS = [name for name in SOURCES if name != "utils.py"]
DEFINITIONS = (ast.FunctionDef, ast.ClassDef)


def definitions(script):
    return {node.name: node for node in TREES[script].body if isinstance(node, DEFINITIONS)}


def flags(script):
    """{field: what follows it} of a script's Args."""
    body = definitions(script)["Args"].body
    return {a.target.id: b for a, b in itertools.zip_longest(body, body[1:]) if isinstance(a, ast.AnnAssign)}


@pytest.mark.parametrize("name", SOURCES)
def test_a_script_stays_within_its_budget(name):
    assert len(SOURCES[name].splitlines()) <= BUDGETS[name]


@pytest.mark.parametrize("script", SCRIPTS)
def test_main_is_one_loop_of_at_most_150_lines(script):
    main = definitions(script)["main"]
    assert main.end_lineno - main.lineno + 1 <= 150


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SCRIPTS, 2)))
def test_copies_with_one_name_are_one_function(one, other):
    shared = definitions(one).keys() & definitions(other).keys() - {"Args", "main"}
    pairs = [(name, definitions(one)[name], definitions(other)[name]) for name in sorted(shared)]
    assert [name for name, ours, theirs in pairs if ast.dump(ours) != ast.dump(theirs)] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_docstring(script):
    documented = {
        name
        for name, node in flags(script).items()
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    assert flags(script).keys() - documented == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_used(script):
    used = {
        node.attr
        for name in (script, "utils.py")
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    }
    assert flags(script).keys() - used == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_flags_that_all_scripts_share_are_there(script):
    shared = {"model", "dataset", "output_dir", "seed", "batch_size", "micro_batch_size", "lr", "precision", "compile"}
    assert shared | {"track", "resume", "save_every"} <= flags(script).keys()


CONTRACT = {
    "utils.py": {"masked_mean": "x mask", "whiten": "x mask shift_mean"},
    "sft.py": {"token_loss": "logits labels"},
    "reward_model.py": {
        "preference_loss": "chosen_scores rejected_scores margin",
        "last_token_scores": "model input_ids attention_mask",
    },
    "ppo_rlhf.py": {
        "last_token_scores": "model input_ids attention_mask",
        "response_mask": "responses stop_ids min_length",
        "token_logprobs": "logits tokens temperature",
        "compute_rewards": "scores logprobs ref_logprobs mask kl_coef",
        "compute_gae": "rewards values mask gamma lam",
        "policy_loss": "new_logprobs logprobs advantages cliprange cliprange_high",
        "value_loss": "new_values values returns cliprange_value",
        "generate": "model queries query_mask uniforms temperature stop_ids pad_id",
    },
    "ilql_rlhf.py": {
        "response_mask": "responses stop_ids min_length",
        "ilql_loss": "qs target_qs vs next_vs logits actions rewards terminal mask tau gamma beta cql_weight awac_weight",
        "steer": "logits target_qs vs beta",
    },
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_public_functions_take_their_arguments_in_the_agreed_order(name):
    for function, wanted in CONTRACT[name].items():
        arguments = [argument.arg for argument in definitions(name)[function].args.args]
        assert arguments[: len(wanted.split())] == wanted.split(), function


@pytest.mark.parametrize("name", SOURCES)
def test_importing_only_defines(name):
    """Nothing but imports, definitions and constants at the top level; a script's guard calls launch and nothing else."""
    quiet = (*DEFINITIONS, ast.Import, ast.ImportFrom, ast.Assign)
    for node in TREES[name].body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_guard = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        assert isinstance(node, quiet) or is_docstring or is_guard, ast.unparse(node)
        if is_guard:
            assert [ast.unparse(line) for line in node.body] == ["launch(main, tyro.cli(Args, use_underscores=True))"]


def test_importing_writes_nothing_and_starts_nothing(tmp_path):
    modules = ", ".join(name.removesuffix(".py") for name in SOURCES)
    code = f"import sys, threading; before = threading.active_count(); sys.path.insert(0, {str(ROOT)!r})\n"
    code += f"import {modules}; import torch.distributed as dist\n"
    code += "assert threading.active_count() == before and not dist.is_initialized()\n"
    code += "assert not {'wandb', 'tensorboard'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_docstring_is_the_manual(script):
    manual = ast.get_docstring(TREES[script])
    for part in ("    1. ", "    2. ", f"python {script}", "torchrun --nproc_per_node=", "Shapes:", "Deviations"):
        assert part in manual, part


def code_in_comments(source):
    """Comments that are statements: assignments, calls, returns, imports. Words and shapes are neither."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            try:
                body = ast.parse(token.string.lstrip("# ")).body
            except SyntaxError:
                continue
            calls = [node for node in body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
            statements = (ast.Assign, ast.AugAssign, ast.Return, ast.Import, ast.ImportFrom, ast.Delete, ast.Assert)
            typed = [node for node in body if isinstance(node, ast.AnnAssign) and node.value is not None]
            if calls or typed or any(isinstance(node, statements) for node in body):
                found.append(token.string)
    return found


def test_code_in_comments_is_found():
    comments = (
        "# top_k: int = 50\n# model.train()\nx = 1  # lr = 3\n# a word\n# (B,T)\n# masked: not sentinels\n# 1. batch\n"
    )
    assert code_in_comments(comments) == ["# top_k: int = 50", "# model.train()", "# lr = 3"]


@pytest.mark.parametrize("name", SOURCES)
def test_no_code_is_commented_out(name):
    assert code_in_comments(SOURCES[name]) == []
    assert "TODO" not in SOURCES[name] and "FIXME" not in SOURCES[name]


def test_utils_knows_ranks_and_masks_but_no_policy_reward_or_token_id():
    names = set()
    for node in ast.walk(TREES["utils.py"]):
        for attribute in ("id", "attr", "arg", "name"):
            names.add(str(getattr(node, attribute, None)).lower())
    assert [name for name in sorted(names) for word in ("policy", "reward", "token_id") if word in name] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_nothing_of_each_other(script):
    imported = {node.module for node in ast.walk(TREES[script]) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(TREES[script]) if isinstance(node, ast.Import) for alias in node.names}
    assert imported & {name.removesuffix(".py") for name in SCRIPTS} == set()


def test_the_readme_counts_the_lines():
    rows = re.findall(r"^\| `([\w/.]+\.py)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) >= 8
    assert {name: int(count) for name, count in rows} == {
        name: len((ROOT / name).read_text().splitlines()) for name, _ in rows
    }
