"""Every script with --compile against the same run without: equal gradients, and few compilations.

A backend that generates no code stands in for the usual one, which takes minutes: `aot_eager`
traces the graph and differentiates it as the usual one does, `eager` only traces it. One run of PPO
goes through the usual one.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM

import ppo_rlhf
import utils
from conftest import (
    FAMILIES,
    assert_same_gradients,
    build_folder,
    gradients_of,
    read_jsonl,
    scripts_in_the_root,
)

SCRIPTS = scripts_in_the_root()


def compiled_gradients_of(rank, script, options, backend):
    """(gradients of each step, number of compilations before each step and at the end)."""
    torch_compile = torch.compile
    progress = utils.progress
    counter = CompileCounterWithBackend(backend)
    counts = []

    def counted_compile(function, mode=None, **options):
        return torch_compile(function, backend=counter, **options)

    def watched_progress(*arguments):
        for step in progress(*arguments):
            counts.append(counter.frame_count)
            yield step
        counts.append(counter.frame_count)

    torch.compiler.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", counted_compile)
        patch.setattr(utils, "progress", watched_progress)
        history, _ = gradients_of(rank, script, options | {"compile": True})
    return history, counts


def assert_compiled_early(counts):
    """Something was compiled in the first two steps or updates, and nothing after them."""
    assert len(counts) > 4
    assert counts[2] > 0
    assert set(counts[2:]) == {counts[2]}


@pytest.fixture
def long_run(script_options):
    """Like `script_options`, with six steps or four updates: lengths and numbers of rows change."""

    def options(script, name):
        longer = {"num_steps": 6, "num_minibatches": 1, "total_episodes": 32}
        chosen = script_options(script, name)
        return chosen | {flag: value for flag, value in longer.items() if flag in chosen}

    return options


@pytest.mark.parametrize("script", SCRIPTS)
def test_compiled_is_eager(script, long_run):
    eager, _ = gradients_of(None, script, long_run(script, "eager"))
    compiled, counts = compiled_gradients_of(
        None, script, long_run(script, "compiled"), "aot_eager"
    )
    assert_same_gradients(compiled, eager)
    assert_compiled_early(counts)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_two_compiled_ranks_are_one_that_is_not(backend, script, long_run, on_two_ranks):
    """Under DDP, and with shares of uneven size."""
    eager, _ = gradients_of(None, script, long_run(script, "eager"))
    answers = on_two_ranks(compiled_gradients_of, script, long_run(script, "compiled"), backend)
    for history, counts in answers:
        assert_same_gradients(history, eager)
        assert_compiled_early(counts)


WINDOWED = [x for x in FAMILIES if x.model_type in ("gpt2", "mistral", "gemma3_text")]


@pytest.mark.parametrize("config", WINDOWED, ids=lambda config: config.model_type)
def test_the_decoding_step_is_compiled_once(config):
    """At every position, also where a layer's window is shorter than the row."""
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    queries, query_mask = utils.left_pad([[5], [6, 7, 8, 9, 10, 11]], 6, 0, "cpu")
    uniforms = torch.rand(2, 8)
    counter = CompileCounterWithBackend("eager")
    torch.compiler.reset()
    responses = []
    for step in (
        ppo_rlhf.decode_step,
        torch.compile(ppo_rlhf.decode_step, backend=counter, fullgraph=True),
    ):
        responses.append(
            ppo_rlhf.generate(policy, queries, query_mask, uniforms, 1.0, [99], 0, decode_fn=step)
        )
    assert torch.equal(responses[0], responses[1])
    assert counter.frame_count == 1


def test_ppo_through_the_usual_backend(long_run, tmp_path, tokenizer):
    """The metrics of both runs are equal, but for the clock's; one layer compiles the fastest."""
    policy = build_folder(tmp_path / "policy", "gpt2", "lm", tokenizer, seed=1, n_layer=1)
    options = long_run("ppo_rlhf", "eager") | {"model": policy, "reward_model": None}
    options |= {"reward_fn": (f"{tmp_path}/reward.py:distinct_letters",), "value_trunk": "shared"}
    options |= {"total_episodes": 16, "eval_dataset": None}
    compiled = {"compile": True, "output_dir": str(tmp_path / "compiled")}
    torch.compiler.reset()
    ppo_rlhf.main(ppo_rlhf.Args(**options))
    ppo_rlhf.main(ppo_rlhf.Args(**options | compiled))

    lines = read_jsonl(tmp_path / "eager" / "metrics.jsonl")
    compiled_lines = read_jsonl(tmp_path / "compiled" / "metrics.jsonl")
    assert len(lines) == len(compiled_lines) == 2
    for line, compiled_line in zip(lines, compiled_lines, strict=True):
        for name, value in line.items():
            if not name.startswith("time/"):
                assert compiled_line[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
