"""What holds for every script in the root, so that a fork is tested without writing a test.

The flags of a script's short run stand in `script_options` of conftest.py.
"""

import pytest

from conftest import assert_same_gradients, gradients_of, scripts_in_the_root

SCRIPTS = scripts_in_the_root()


def test_all_four_scripts_are_found():
    assert {"sft", "reward_model", "ppo_rlhf", "ilql_rlhf"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_smaller_micro_batches_change_nothing(script, script_options):
    """Every gradient of a few steps, from 1 row at a time to all of them."""
    histories = {}
    for size in (8, 3, 1):
        options = script_options(script, f"run{size}") | {"micro_batch_size": size}
        histories[size], _ = gradients_of(None, script, options)
    assert len(histories[8]) >= 3
    assert_same_gradients(histories[3], histories[8])
    assert_same_gradients(histories[1], histories[8])


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_ranks_take_the_gradients_of_one(script, script_options, on_two_ranks):
    """Every step on both ranks, with rows of uneven length and shares of uneven size."""
    alone, _ = gradients_of(None, script, script_options(script, "alone"))
    answers = on_two_ranks(gradients_of, script, script_options(script, "both"))
    for history, _ in answers:
        assert_same_gradients(history, alone)
