"""The rules of the house, read off the syntax trees, on every script in the root.

A script is a file with `Args` and `main`, so that a new one is tested without writing a test. Tests
of utils.py are here too, where a rule holds for it.
"""

import ast
import io
import itertools
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {path.name: path.read_text() for path in sorted(ROOT.glob("*.py"))}
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)


def definitions(name):
    """{name: node} of what a file defines at its top level."""
    return {node.name: node for node in TREES[name].body if isinstance(node, DEFINITIONS)}


SCRIPTS = [name for name in SOURCES if definitions(name).keys() >= {"Args", "main"}]


def nodes(tree, *kinds):
    """All nodes of these kinds in a tree, the tree itself included."""
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def num_lines(node):
    return node.end_lineno - node.lineno + 1


def is_text(node):
    """Whether a statement is a text alone, as a docstring is."""
    is_constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_constant and isinstance(node.value.value, str)


def places(found):
    """What stands where, for a failed assertion to show."""
    return [f"line {node.lineno}: {ast.unparse(node)[:80]}" for node in found]


def test_all_four_scripts_are_found():
    assert {"sft.py", "reward_model.py", "ppo_rlhf.py", "ilql_rlhf.py"} <= set(SCRIPTS)


# --------------------------------------------------------------------------------------------------
# Density


def code_lines(name):
    """The lines of a file that are neither blank nor a comment nor part of a docstring."""
    documentation = set()
    for node in nodes(TREES[name], ast.Expr):
        if is_text(node):
            documentation.update(range(node.lineno, node.end_lineno + 1))
    lines = []
    for number, line in enumerate(SOURCES[name].splitlines(), start=1):
        is_comment = line.strip().startswith("#")
        if line.strip() and not is_comment and number not in documentation:
            lines.append(line)
    return lines


@pytest.mark.parametrize("name", SOURCES)
def test_a_line_says_one_thing(name):
    """At most 7.5 expressions and statements a line of code, and 100 characters any line."""
    lines = code_lines(name)
    assert len(nodes(TREES[name], ast.expr, ast.stmt)) / len(lines) <= 7.5
    numbered = enumerate(SOURCES[name].splitlines(), start=1)
    assert [number for number, line in numbered if len(line) > 100] == []


@pytest.mark.parametrize("name", SOURCES)
def test_hardly_any_line_assigns_several_values(name):
    packed = [
        node
        for node in nodes(TREES[name], ast.Assign)
        if isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Tuple | ast.GeneratorExp | ast.ListComp)
    ]
    assert len(packed) <= 0.01 * len(code_lines(name)), places(packed)


@pytest.mark.parametrize("name", SOURCES)
def test_a_statement_is_no_disguised_expression(name):
    """A walrus stands in the condition of an if or while; an expression alone is a call."""
    tests = [node.test for node in nodes(TREES[name], ast.If, ast.While)]
    allowed = {id(node) for test in tests for node in nodes(test, ast.NamedExpr)}
    walrus = [node for node in nodes(TREES[name], ast.NamedExpr) if id(node) not in allowed]
    assert places(walrus) == []
    alone = [node for node in nodes(TREES[name], ast.Expr) if not is_text(node)]
    calls = (ast.Call, ast.Yield, ast.YieldFrom)
    assert places(node for node in alone if not isinstance(node.value, calls)) == []


@pytest.mark.parametrize("name", SOURCES)
def test_a_quotient_is_rounded_up_by_name(name):
    """math.ceil(a / b), and not -(-a // b)."""
    negated = [node.operand for node in nodes(TREES[name], ast.UnaryOp)]
    quotients = [node for node in negated if isinstance(node, ast.BinOp)]
    assert places(node for node in quotients if isinstance(node.op, ast.FloorDiv)) == []


@pytest.mark.parametrize("name", SOURCES)
def test_functions_are_short(name):
    """60 lines, and 60 names that it binds; `main` 110 lines, of which its loop has 60."""
    for function in nodes(TREES[name], *FUNCTIONS):
        limit = 110 if function.name == "main" else 60
        assert num_lines(function) <= limit, function.name
        names = {x.id for x in nodes(function, ast.Name) if isinstance(x.ctx, ast.Store)}
        assert len(names) <= 60, function.name
    if name in SCRIPTS:
        for loop in nodes(definitions(name)["main"], ast.For, ast.While):
            assert num_lines(loop) <= 60


@pytest.mark.parametrize("name", SOURCES)
def test_no_private_name_of_a_library_is_used(name):
    found = set()
    for node in nodes(TREES[name], ast.Attribute):
        whole = ast.unparse(node)
        if any(is_private(part) for part in whole.split(".")[1:]) and "self." not in whole:
            found.add(whole)
    for node in nodes(TREES[name], ast.Import, ast.ImportFrom):
        module = getattr(node, "module", None) or ""
        for alias in node.names:
            whole = f"{module}.{alias.name}"
            if any(is_private(part) for part in whole.split(".")) or "ctypes" in whole:
                found.add(whole)
    assert found == set()


def is_private(part):
    return part.startswith("_") and not part.startswith("__")


# --------------------------------------------------------------------------------------------------
# Honest copies, and scripts that stand alone


# The skeleton that the scripts have in common: what has one of these names plays the same part in
# every script, each with its own rows and its own flags.
PARTS = {
    "Args",
    "main",
    "check_flags",
    "load_comparisons",
    "load_data",
    "load_model",
    "load_models",
    "collate",
    "micro_batch_loss",
    "evaluate",
    "next_prompts",
    "accumulate_gradients",
    "rollout_metrics",
    "sample_columns",
}


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SCRIPTS, 2)))
def test_copies_with_one_name_are_one_function(one, other):
    differing = []
    for name in sorted(definitions(one).keys() & definitions(other).keys() - PARTS):
        if ast.dump(definitions(one)[name]) != ast.dump(definitions(other)[name]):
            differing.append(name)
    assert differing == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_import_nothing_of_each_other(script):
    imported = {node.module for node in nodes(TREES[script], ast.ImportFrom)}
    for node in nodes(TREES[script], ast.Import):
        imported |= {alias.name for alias in node.names}
    assert imported & {name.removesuffix(".py") for name in SCRIPTS} == set()


# --------------------------------------------------------------------------------------------------
# Flags


def flags(script):
    """{field: the statement after it} of a script's Args."""
    body = definitions(script)["Args"].body
    pairs = itertools.zip_longest(body, body[1:])
    return {a.target.id: b for a, b in pairs if isinstance(a, ast.AnnAssign)}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_docstring(script):
    undocumented = [name for name, after in flags(script).items() if not is_text(after)]
    assert undocumented == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_used(script):
    used = set()
    for name in (script, "utils.py"):
        for node in nodes(TREES[name], ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "args":
                used.add(node.attr)
    assert flags(script).keys() - used == set()


SHARED = {"model", "dataset", "output_dir", "seed", "batch_size", "micro_batch_size", "lr"}
SHARED |= {"precision", "compile", "save_every", "resume", "timeout_minutes", "track"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_flags_that_all_scripts_share_are_there(script):
    assert SHARED - flags(script).keys() == set()


# --------------------------------------------------------------------------------------------------
# The contract

CONTRACT = {
    "utils.py": {
        "masked_mean": "x mask",
        "whiten": "x mask shift_mean",
    },
    "sft.py": {
        "token_loss": "logits labels",
    },
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
        "AdaptiveKLController.__init__": "self kl_coef target horizon",
        "AdaptiveKLController.update": "self kl num_episodes",
        "generate": "model queries query_mask uniforms temperature stop_ids pad_id",
    },
    "ilql_rlhf.py": {
        "response_mask": "responses stop_ids min_length",
        "ilql_loss": "qs target_qs vs next_vs logits actions rewards terminal mask args num_tokens",
        "steer": "logits target_qs vs beta",
    },
}


@pytest.mark.parametrize("name", CONTRACT)
def test_the_public_functions_take_their_arguments_in_the_agreed_order(name):
    functions = definitions(name)
    for kind in nodes(TREES[name], ast.ClassDef):
        functions |= {f"{kind.name}.{node.name}": node for node in nodes(kind, *FUNCTIONS)}
    for function, wanted in CONTRACT[name].items():
        arguments = [argument.arg for argument in functions[function].args.args]
        assert arguments[: len(wanted.split())] == wanted.split(), function


# --------------------------------------------------------------------------------------------------
# Imports, manuals and comments


@pytest.mark.parametrize("name", SOURCES)
def test_importing_only_defines(name):
    """The top level imports, defines and names constants; a script's guard calls launch alone."""
    quiet = (*DEFINITIONS, ast.Import, ast.ImportFrom, ast.Assign)
    for node in TREES[name].body:
        is_guard = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        assert isinstance(node, quiet) or is_text(node) or is_guard, places([node])
        if is_guard:
            lines = [ast.unparse(line) for line in node.body]
            assert lines == ["utils.launch(main, tyro.cli(Args, use_underscores=True))"]


def test_importing_writes_nothing_and_starts_nothing(tmp_path):
    modules = ", ".join(name.removesuffix(".py") for name in SOURCES)
    code = f"""
import sys, threading
before = threading.active_count()
sys.path.insert(0, {str(ROOT)!r})
import {modules}
import torch.distributed as dist
assert threading.active_count() == before and not dist.is_initialized()
assert not {{"wandb", "tensorboard"}} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_docstring_is_the_manual(script):
    manual = ast.get_docstring(TREES[script])
    commands = (f"python {script}", "torchrun --nproc_per_node=")
    sections = ("    1. ", "    2. ", "Shapes. ")
    assert [part for part in (*commands, *sections) if part not in manual] == []


def code_in_comments(source):
    """Comments that are statements: assignments, calls, returns, imports. Words and shapes are
    neither."""
    found = []
    statements = (ast.Assign, ast.AugAssign, ast.Return, ast.Import, ast.ImportFrom, ast.Delete)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        try:
            body = ast.parse(token.string.lstrip("# ")).body
        except SyntaxError:
            continue
        for node in body:
            is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
            is_typed = isinstance(node, ast.AnnAssign) and node.value is not None
            if is_call or is_typed or isinstance(node, statements):
                found.append(token.string)
    return found


def test_code_in_comments_is_found():
    code = "# top_k: int = 50\n# model.train()\nx = 1  # lr = 3\n"
    words = "# a word\n# (B,T)\n# masked: not sentinels\n# 1. batch\n"
    found = code_in_comments(code + words)
    assert found == ["# top_k: int = 50", "# model.train()", "# lr = 3"]


@pytest.mark.parametrize("name", SOURCES)
def test_no_code_is_commented_out(name):
    assert code_in_comments(SOURCES[name]) == []
    assert "TODO" not in SOURCES[name] and "FIXME" not in SOURCES[name]
