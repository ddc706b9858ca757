"""ILQL's parts against their definitions: the loss, the networks, decoding, and the data.

What is expected is worked out the long way round: plain Python loops, rows without padding, no
cache. `sample_tokens` and `last_token_scores` are copies of PPO's, whose tests hold for both.
"""

import itertools
import math
from types import SimpleNamespace

import datasets
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import ilql_rlhf
import ppo_rlhf
import utils
from conftest import FAMILIES, ROOT, build_tokenizer, refuses, write_jsonl
from tasks import randomwalks

pytestmark = pytest.mark.fast

NAN = math.nan
INF = math.inf
PAD = 0  # The tokenizer of conftest.py has these ids, and 31 in all.
EOS = 1
VOCABULARY = 31
CPU = torch.device("cpu")
# U for the user, A for the assistant, and an EOS after each of the assistant's turns.
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}A{{ m.content }}|{% else %}U{{ m.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}A{% endif %}"
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------
# The loss

# tau and 1 - tau are exact in fp32, in which the weights of the expectile are.
SETTINGS = {"tau": 0.75, "gamma": 0.9, "beta": 0.8, "cql_weight": 0.3, "awac_weight": 0.6}
TENSORS = ("qs", "target_qs", "vs", "next_vs", "logits", "actions", "rewards", "terminal", "mask")
LOSSES = ("total", "q", "v", "cql", "awac")


def loss_case(num_qs=2, B=3, A=5, V=7):
    """A batch of 2, 5 and 3 actions, the last of each row terminal.

    Targets and values are of the same size, so that advantages have both signs.
    """
    num_actions = torch.tensor([2, 5, 3])[:, None]
    return {
        "qs": [normal(B, A, V, seed=k) for k in range(num_qs)],
        "target_qs": [normal(B, A, V, seed=10 + k) for k in range(num_qs)],
        "vs": normal(B, A, seed=20),
        "next_vs": normal(B, A, seed=21),
        "logits": 2 * normal(B, A, V, seed=22),
        "actions": torch.randint(V, (B, A), generator=torch.Generator().manual_seed(23)),
        "rewards": normal(B, A, seed=24),
        "terminal": torch.arange(A) == num_actions - 1,
        "mask": torch.arange(A) < num_actions,
    }


def losses_of(case, num_tokens=None, **changes):
    """`ilql_loss` of a case, under SETTINGS with some changes; args holds these five alone."""
    args = SimpleNamespace(**SETTINGS | changes)
    return ilql_rlhf.ilql_loss(*[case[name] for name in TENSORS], args, num_tokens)


def numbers(losses):
    return {name: loss.item() for name, loss in losses.items()}


def losses_by_loops(case, tau, gamma, beta, cql_weight, awac_weight):
    """The definitions, one action at a time."""
    sums = dict.fromkeys(("q", "v", "cql", "awac"), 0.0)
    count = 0
    for i, j in case["mask"].nonzero().tolist():
        a = case["actions"][i, j].item()
        v = case["vs"][i, j].item()
        target = min(q[i, j, a].item() for q in case["target_qs"])
        backup = case["rewards"][i, j].item()
        if not case["terminal"][i, j]:
            backup += gamma * case["next_vs"][i, j].item()
        for q in case["qs"]:
            row = q[i, j].tolist()
            sums["q"] += (backup - row[a]) ** 2
            sums["cql"] += math.log(sum(math.exp(x) for x in row)) - row[a]
        v_weight = 1 - tau if target < v else tau
        sums["v"] += v_weight * (target - v) ** 2
        row = case["logits"][i, j].tolist()
        logprob = row[a] - math.log(sum(math.exp(x) for x in row))
        sums["awac"] -= math.exp(beta * (target - v)) * logprob
        count += 1
    means = {name: x / count for name, x in sums.items()}
    weighted = cql_weight * means["cql"] + awac_weight * means["awac"]
    return means | {"total": means["q"] + means["v"] + weighted}


@pytest.mark.parametrize("num_qs", [1, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tau": 0.5, "gamma": 1.0, "beta": 0.0},
        {"tau": 1.0, "gamma": 0.2, "beta": 2.0, "cql_weight": 0.0, "awac_weight": 0.0},
    ],
    ids=["all weights", "cloning", "no cql and no awac"],
)
def test_the_loss_is_the_definition(num_qs, changes):
    case = loss_case(num_qs)
    losses = losses_of(case, **changes)
    assert losses.keys() == set(LOSSES)
    assert all(loss.ndim == 0 for loss in losses.values())
    expected = losses_by_loops(case, **SETTINGS | changes)
    assert numbers(losses) == pytest.approx(expected, abs=1e-12)


def test_the_flags_of_the_script_will_do_as_settings():
    case = loss_case()
    args = ilql_rlhf.Args(**SETTINGS)
    losses = ilql_rlhf.ilql_loss(*[case[name] for name in TENSORS], args)
    assert numbers(losses) == numbers(losses_of(case))


def taken(case, name):
    """The Q, (N,), of the first network for each real action."""
    qs = case[name][0].gather(-1, case["actions"][..., None]).squeeze(-1)
    return qs[case["mask"]]


def test_half_an_expectile_is_half_the_squared_error():
    case = loss_case(1)
    losses = losses_of(case, tau=0.5)
    error = ((taken(case, "target_qs") - case["vs"][case["mask"]]) ** 2).mean()
    assert losses["v"].item() == pytest.approx(error.item() / 2, abs=1e-12)


@pytest.mark.parametrize(("value", "weight"), [(-5.0, 0.75), (5.0, 0.25)])
def test_a_high_expectile_pulls_the_value_up(value, weight):
    """A value below all targets is pulled up with tau, one above them down with 1 - tau."""
    case = loss_case(1)
    targets = taken(case, "target_qs")
    assert targets.abs().max() < 5
    case["vs"] = torch.full_like(case["vs"], value)
    expected = weight * ((targets - value) ** 2).mean()
    assert losses_of(case)["v"].item() == pytest.approx(expected.item())


@pytest.mark.parametrize("behind_the_end", [0.0, 1e6, NAN])
def test_a_terminal_action_is_worth_its_reward(behind_the_end):
    """Whatever the value of a state after the end is said to be, NaN included."""
    case = loss_case()
    case["qs"] = [case["rewards"][..., None].expand_as(q) for q in case["qs"]]
    case["mask"] = case["terminal"]
    case["next_vs"] = torch.full_like(case["vs"], behind_the_end)
    assert losses_of(case)["q"].item() == 0.0


def test_the_smaller_target_counts():
    """It is lower than the value by 1, the other target higher by 3."""
    case = loss_case()
    nothing = torch.zeros_like(case["qs"][0])
    values = case["vs"][..., None]
    case["target_qs"] = [values + nothing - 1, values + nothing + 3]
    assert losses_of(case)["v"].item() == pytest.approx(1 - SETTINGS["tau"])


def gradients(case, name):
    """{tensor: the gradient of one loss}; None where there is none."""
    leaves = {}
    for key in ("qs", "target_qs"):
        for k, x in enumerate(case[key]):
            leaves[f"{key}{k}"] = x.clone().requires_grad_()
    for key in ("vs", "next_vs", "logits", "rewards"):
        leaves[key] = case[key].clone().requires_grad_()
    lists = {}
    for key in ("qs", "target_qs"):
        lists[key] = [leaves[f"{key}{k}"] for k in range(len(case[key]))]
    loss = losses_of(case | leaves | lists)[name]
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize(
    ("name", "learning"),
    [
        ("q", {"qs0", "qs1", "rewards"}),  # Rewards are data: nobody asks for their gradient.
        ("v", {"vs"}),
        ("cql", {"qs0", "qs1"}),
        ("awac", {"logits"}),
        ("total", {"qs0", "qs1", "rewards", "vs", "logits"}),
    ],
)
def test_where_each_loss_sends_its_gradient(name, learning):
    """No target, no value of a next state and no weight of AWAC learns."""
    found = gradients(loss_case(), name)
    reached = {key for key, x in found.items() if x is not None and (x != 0).any()}
    assert reached == learning


def test_nothing_outside_the_mask_reaches_a_number_or_a_gradient():
    case = loss_case()
    mask = case["mask"]
    dirty = dict(case)
    for name in ("vs", "next_vs", "rewards"):
        dirty[name] = torch.where(mask, case[name], NAN)
    for name in ("qs", "target_qs"):
        dirty[name] = [torch.where(mask[..., None], x, INF) for x in case[name]]
    dirty["logits"] = torch.where(mask[..., None], case["logits"], NAN)
    dirty["actions"] = torch.where(mask, case["actions"], -100)
    dirty["terminal"] = case["terminal"] | ~mask
    assert numbers(losses_of(dirty)) == numbers(losses_of(case))
    clean_gradients = gradients(case, "total")
    for key, gradient in gradients(dirty, "total").items():
        if gradient is not None:
            assert gradient.isfinite().all(), key
            assert (gradient[~mask] == 0).all(), key
            assert torch.equal(gradient, clean_gradients[key]), key
    dirty["mask"] = torch.zeros_like(mask)
    assert numbers(losses_of(dirty)) == dict.fromkeys(LOSSES, 0.0)


def test_cql_is_a_cross_entropy_and_never_negative():
    case = loss_case(1)
    mask = case["mask"]
    cql = losses_of(case)["cql"].item()
    expected = F.cross_entropy(case["qs"][0][mask], case["actions"][mask])
    assert cql == pytest.approx(expected.item())
    assert cql > 0
    case["qs"] = [F.one_hot(case["actions"], 7) * 1000.0]  # All certainty is on the action.
    assert losses_of(case)["cql"].item() == 0


def test_parts_of_a_batch_add_up_to_the_whole():
    """If each is divided by the number of actions of the whole batch."""
    case = loss_case()
    total = dict.fromkeys(LOSSES, 0.0)
    for i in range(3):
        part = {}
        for name, x in case.items():
            part[name] = [q[i : i + 1] for q in x] if isinstance(x, list) else x[i : i + 1]
        losses = numbers(losses_of(part, num_tokens=torch.tensor(10)))
        total = {name: total[name] + losses[name] for name in LOSSES}
    assert total == pytest.approx(numbers(losses_of(case)), abs=1e-12)


def test_logits_of_bf16_give_a_loss_of_fp32():
    case = loss_case()
    case["logits"] = case["logits"].bfloat16()
    coarse = losses_of(case)["awac"]
    case["logits"] = case["logits"].float()
    assert torch.equal(coarse, losses_of(case)["awac"])


# --------------------------------------------------------------------------------------------------
# The networks


@pytest.fixture(params=["gpt2", "llama"])
def folder(request):
    return request.getfixturevalue(f"{request.param}_folder")


def build(folder, scale=3.0, **options):
    """A module with large random values and Qs, so that steering moves tokens.

    The targets differ from the Qs.
    """
    torch.manual_seed(5)
    policy, _ = utils.load_pretrained(AutoModelForCausalLM, folder)
    ilql = ilql_rlhf.ILQL(policy, **options)
    for part in (ilql.v, ilql.qs, ilql.target_qs):
        for parameter in part.parameters():
            parameter.data.normal_(0, scale * parameter.shape[-1] ** -0.5)
    return ilql.eval()


ROWS = [[5, 6, 7, 8, EOS], [9, 10, EOS], [11, 12, 13, 14, 15, 16, EOS]]
STATES = [[1, 2, 3], [0, 1], [0, 3, 4, 5]]


def batch_of(extra=0, pad_id=PAD):
    """input_ids (B,T) and states (B,A) of the rows above, with some more padding."""
    input_ids = utils.pad_right([row[:-1] for row in ROWS], pad_id)
    states = utils.pad_right(STATES, 0)
    return F.pad(input_ids, (0, extra), value=pad_id), F.pad(states, (0, extra))


def row_of(input_ids, states, actions, rewards):
    return {"input_ids": input_ids, "states": states, "actions": actions, "rewards": rewards}


def mask_of_the_batch():
    return utils.pad_right([[True] * len(states) for states in STATES], False)


def network(layers, x):
    """A hidden layer of ReLUs and an output layer, written out."""
    hidden = (x @ layers[0].weight.T + layers[0].bias).clamp(min=0)
    return hidden @ layers[2].weight.T + layers[2].bias


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_network_has_one_hidden_layer_of_twice_the_width_and_starts_at_zero():
    torch.manual_seed(0)
    layers = ilql_rlhf.small_network(6, 3)
    x = normal(4, 6, dtype=torch.float32)
    assert layers[0].weight.shape == (12, 6)
    assert torch.equal(layers(x), torch.zeros(4, 3))
    for parameter in layers.parameters():
        parameter.data += normal(*parameter.shape, dtype=torch.float32)
    close(layers(x), network(layers, x))


@torch.no_grad()
def test_a_batch_is_its_rows_without_padding(folder):
    """Whatever ids the padding holds, at the states that are asked for."""
    ilql = build(folder)
    for extra, pad_id in [(0, PAD), (3, EOS)]:
        output = ilql(*batch_of(extra, pad_id))
        for i, (row, states) in enumerate(zip(ROWS, STATES, strict=True)):
            plain = ilql.policy(torch.tensor([row]), output_hidden_states=True)
            for j, state in enumerate(states):
                h = plain.hidden_states[-1][0, state]
                close(output["logits"][i, j], plain.logits[0, state])
                close(output["vs"][i, j], network(ilql.v, h)[0])
                for k in range(2):
                    close(output["qs"][k][i, j], network(ilql.qs[k], h))
                    close(output["target_qs"][k][i, j], network(ilql.target_qs[k], h))


@torch.no_grad()
def test_embedding_q_is_a_product_with_the_rows_of_the_lm_head_and_the_states_own_worth(folder):
    """Hidden states are standardised first, for values as for Qs."""
    ilql = build(folder, q_rows="embeddings")
    input_ids, states = batch_of()
    ilql.hidden_mean.copy_(normal(16, seed=1))
    ilql.hidden_std.copy_(0.5 + uniform(16))
    output = ilql(input_ids, states)
    rows = ilql.policy.get_output_embeddings().weight
    centred = rows - rows.mean(1, keepdim=True)
    rows = centred / (centred.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()
    hidden = ilql.policy.base_model(input_ids).last_hidden_state
    hidden = hidden[torch.arange(3)[:, None], states]
    hidden = (hidden - ilql.hidden_mean) / ilql.hidden_std
    for name, modules in (("qs", ilql.qs), ("target_qs", ilql.target_qs)):
        for module, q in zip(modules, output[name], strict=True):
            x = network(module.network, hidden)
            products = torch.einsum("bad,vd->bav", x[..., :16], rows) / 16**0.5
            close(q, products + x[..., 16:])
    close(output["vs"], network(ilql.v, hidden).squeeze(-1))


@pytest.mark.parametrize("q_rows", ["ids", "embeddings"])
def test_an_id_that_the_data_never_takes(q_rows, gpt2_folder):
    """With embeddings it is worth what an id with the same row is worth; else it stays at 0."""
    untaken = 20
    policy, _ = utils.load_pretrained(AutoModelForCausalLM, gpt2_folder)
    embeddings = policy.get_output_embeddings().weight.data
    embeddings[untaken] = embeddings[6]
    ilql = ilql_rlhf.ILQL(policy, 1, q_rows)
    before = ilql.state_dict()
    before = {name: x.clone() for name, x in before.items() if name.endswith("rows")}
    batch = batch_of()
    mask = mask_of_the_batch()
    actions = torch.where(mask, batch[1] + 5, 0)
    args = SimpleNamespace(tau=0.5, gamma=1.0, beta=0.0, cql_weight=0.0, awac_weight=0.0)
    heads = [*ilql.v.parameters(), *ilql.qs.parameters()]
    optimizer = torch.optim.AdamW(heads, lr=1e-2, weight_decay=0.0)
    for _ in range(40):  # Towards a reward of 1.
        output = ilql(*batch)
        vs = output["vs"]
        said = [output["qs"], output["target_qs"], vs, vs, output["logits"]]
        losses = ilql_rlhf.ilql_loss(*said, actions, torch.ones_like(vs), mask, mask, args)
        losses["total"].backward()
        optimizer.step()
        optimizer.zero_grad()
    qs = ilql(*batch)["qs"][0][mask]
    assert qs[:, 6].mean() > 0.2
    expected = qs[:, 6] if q_rows == "embeddings" else torch.zeros(len(qs))
    assert torch.equal(qs[:, untaken], expected)
    # The rows are no parameters, and nothing has moved them.
    assert len(before) == (2 if q_rows == "embeddings" else 0)
    assert all(torch.equal(ilql.state_dict()[name], x) for name, x in before.items())


@torch.no_grad()
def test_inputs_are_standardised_over_the_states_of_rows_spread_over_the_data(folder):
    """Of 130 rows every second is taken, so that they are at most 128."""
    ilql = build(folder, q_rows="embeddings")
    rows = []
    for i in range(130):
        ids = [2 + (i * k) % 29 for k in range(1, 3 + i % 5)]
        states = list(range(i % 2, len(ids)))
        rows.append(row_of([*ids, EOS], states, [EOS] * len(states), [0.0] * len(states)))
    ilql_rlhf.standardise_inputs(ilql, rows, EOS)
    found = []
    for row in rows[::2]:
        hidden = ilql.policy.base_model(torch.tensor([row["input_ids"][:-1]])).last_hidden_state
        found.append(hidden[0, row["states"]])
    found = torch.cat(found)
    close(ilql.hidden_mean, found.mean(0))
    close(ilql.hidden_std, found.std(0, correction=0) + 1e-6)


def test_which_losses_reach_the_language_model(folder):
    """Those of q, v and cql do as well as AWAC's, which reaches no value and no Q."""
    ilql = build(folder, scale=0.5)
    mask = mask_of_the_batch()
    input_ids, states = batch_of()
    parts = {"policy": ilql.policy, "v": ilql.v, "qs": ilql.qs, "target_qs": ilql.target_qs}
    reached = {}
    for name in LOSSES[1:]:
        output = ilql(input_ids, states)
        next_vs = F.pad(output["vs"][:, 1:], (0, 1))
        said = [output["qs"], output["target_qs"], output["vs"], next_vs, output["logits"]]
        rewards = normal(*mask.shape, dtype=torch.float32)
        terminal = mask & ~F.pad(mask[:, 1:], (0, 1))
        args = SimpleNamespace(**SETTINGS)
        losses = ilql_rlhf.ilql_loss(*said, states + 5, rewards, terminal, mask, args)
        ilql.zero_grad()
        losses[name].backward()
        reached[name] = set()
        for part, module in parts.items():
            grads = [x.grad for x in module.parameters() if x.grad is not None]
            if any(x.any() for x in grads):
                reached[name].add(part)
    expected = {"q": {"policy", "qs"}, "v": {"policy", "v"}, "cql": {"policy", "qs"}}
    assert reached == expected | {"awac": {"policy"}}


def test_no_gradient_goes_through_a_target(folder):
    ilql = build(folder)
    output = ilql(*batch_of())
    assert not any(q.requires_grad for q in output["target_qs"])
    assert all(q.requires_grad for q in (*output["qs"], output["vs"]))
    assert not any(p.requires_grad for p in ilql.target_qs.parameters())


@pytest.mark.parametrize("q_rows", ["ids", "embeddings"])
def test_targets_start_as_copies_and_follow(q_rows, gpt2_folder):
    """All of it starts at 0, so that nothing random is learned from or steers."""
    policy, _ = utils.load_pretrained(AutoModelForCausalLM, gpt2_folder)
    ilql = ilql_rlhf.ILQL(policy, 2, q_rows)
    pairs = list(zip(ilql.target_qs.parameters(), ilql.qs.parameters(), strict=True))
    assert all(torch.equal(target, online) for target, online in pairs)
    assert all(target.data_ptr() != online.data_ptr() for target, online in pairs)
    output = ilql(*batch_of())
    assert not any(x.any() for x in (*output["qs"], *output["target_qs"], output["vs"]))
    for k, (_, online) in enumerate(pairs):
        online.data += normal(*online.shape, seed=k, dtype=torch.float32)
    before = [target.clone() for target, _ in pairs]
    ilql.update_targets(0.25)
    for old, (target, online) in zip(before, pairs, strict=True):
        torch.testing.assert_close(target, 0.25 * online + 0.75 * old)
        assert not torch.equal(target, old)
    ilql.update_targets(1.0)
    assert all(torch.equal(target, online) for target, online in pairs)


@torch.no_grad()
def test_qs_and_values_are_fp32_under_bf16_autocast(gpt2_folder):
    ilql = build(gpt2_folder)
    exact = ilql(*batch_of())
    hidden = normal(3, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = ilql(*batch_of())
        values = ilql.values(hidden)
    assert output["logits"].dtype == torch.bfloat16
    in_fp32 = [*output["qs"], *output["target_qs"], output["vs"]]
    assert {x.dtype for x in in_fp32} == {torch.float32}
    assert 0 < (output["vs"] - exact["vs"]).abs().max() < 1  # The language model was in bf16.
    outside = ilql.values(hidden)
    assert torch.equal(values["vs"], outside["vs"])
    for name in ("qs", "target_qs"):
        assert all(map(torch.equal, values[name], outside[name]))


@pytest.mark.parametrize("q_rows", ["ids", "embeddings"])
def test_saved_and_loaded_again(folder, tmp_path, q_rows):
    ilql = build(folder, q_rows=q_rows, reward_mean=0.5, reward_std=2.0)
    ilql.hidden_mean += 0.5
    # The policy was trained since Q took its rows, which are those of the start.
    ilql.policy.get_output_embeddings().weight.data += normal(31, 16, dtype=torch.float32)
    ilql.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"ilql_heads.safetensors", "ilql_config.json"} <= names
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert plain.state_dict().keys() == ilql.policy.state_dict().keys()
    loaded = ilql_rlhf.load_ilql(str(tmp_path))
    expected = {"num_qs": 2, "q_rows": q_rows, "reward_mean": 0.5, "reward_std": 2.0}
    assert loaded.config == expected
    assert loaded.state_dict().keys() == ilql.state_dict().keys()
    for name, tensor in ilql.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


# --------------------------------------------------------------------------------------------------
# Steering and decoding


def test_steer_is_the_definition():
    logits = 2 * normal(4, 7)
    target_qs = [normal(4, 7, seed=1), normal(4, 7, seed=2)]
    vs = normal(4, seed=3)
    steered = ilql_rlhf.steer(logits, target_qs, vs, 1.7)
    for i, a in itertools.product(range(4), range(7)):
        logprob = logits[i, a] - logits[i].logsumexp(0)
        target = min(target_qs[0][i, a], target_qs[1][i, a])
        expected = logprob + 1.7 * (target - vs[i])
        assert steered[i, a].item() == pytest.approx(expected.item(), abs=1e-12)
    unsteered = ilql_rlhf.steer(logits, target_qs, vs, 0.0)
    torch.testing.assert_close(unsteered, torch.log_softmax(logits, dim=-1))


def test_steering_is_in_fp32_and_brings_no_forbidden_id_back():
    target_qs = [normal(4, 7, dtype=torch.float32)]
    vs = torch.zeros(4)
    logits = normal(4, 7).bfloat16()
    steered = ilql_rlhf.steer(logits, target_qs, vs, 1.0)
    assert steered.dtype == torch.float32
    assert torch.equal(steered, ilql_rlhf.steer(logits.float(), target_qs, vs, 1.0))
    logits[:, 2] = -INF
    assert (ilql_rlhf.steer(logits, target_qs, vs, 50.0)[:, 2] == -INF).all()


@pytest.mark.parametrize(
    ("row", "min_length", "length"),
    [
        pytest.param([9, 5, 5], 0, 1, id="at once"),
        pytest.param([5, 5, 9], 0, 3, id="at the last index"),
        pytest.param([5, 5, 5], 0, 3, id="nowhere"),
        pytest.param([5, 9, 9], 0, 2, id="the first of two"),
        pytest.param([9, 5, 9], 1, 3, id="one before min_length does not count"),
    ],
)
def test_response_mask(row, min_length, length):
    mask = ilql_rlhf.response_mask(torch.tensor([row]), [9], min_length)
    assert mask.tolist() == [[i < length for i in range(3)]]


QUERIES = [[5], [6, 7, 8, 9, 10, 11, 12], [9, 3, 9], [14, 15, 16, 17, 2]]
ALLOWED = torch.arange(VOCABULARY) != PAD
STOPS = list(range(EOS, 8))  # So many that some of ten tokens is one of them in most rows.


def sample(ilql, uniforms, beta, extra=0, **options):
    """`generate_steered` on QUERIES, with some more padding."""
    queries, query_mask = utils.left_pad(QUERIES, 7 + extra, PAD, CPU)
    options = {"stop_ids": [EOS], "pad_id": PAD, "allowed": ALLOWED, **options}
    return ilql_rlhf.generate_steered(ilql, queries, query_mask, uniforms, beta, **options)


@torch.no_grad()
def slow_response(ilql, prompt, uniforms, beta, temperature, allowed):
    """Without cache, mask or padding: the whole sequence again for every token."""
    response = []
    for u in uniforms.double():
        output = ilql.policy(torch.tensor([prompt + response]), output_hidden_states=True)
        h = output.hidden_states[-1][0, -1]
        logits = output.logits[0, -1].double()
        target = torch.stack([network(q, h) for q in ilql.target_qs]).amin(0)
        steered = torch.log_softmax(logits, dim=-1) + beta * (target - network(ilql.v, h))
        steered = steered.masked_fill(~allowed, -INF) / (temperature or 1.0)
        cumulative = steered.softmax(-1).cumsum(-1)
        token = int((cumulative <= u * cumulative[-1]).sum())
        if temperature == 0:
            token = int(steered.argmax())
        response.append(token)
        if token in STOPS:
            break
    return response


def assert_slow_responses(responses, ilql, uniforms, beta, temperature, allowed):
    """That they are what the slow loop gives, with pads after a stop, and of several lengths."""
    lengths = set()
    for prompt, row, response in zip(QUERIES, uniforms, responses.tolist(), strict=True):
        expected = slow_response(ilql, prompt, row, beta, temperature, allowed)
        assert response == expected + [PAD] * (len(row) - len(expected))
        lengths.add(len(expected))
    assert len(lengths) > 1


@pytest.mark.parametrize(("beta", "temperature"), [(1.5, 1.0), (1.5, 0.5), (4.0, 0)])
def test_generate_steered_is_the_slow_loop(folder, beta, temperature):
    ilql = build(folder)
    uniforms = uniform(4, 10, seed=3)
    options = {"temperature": temperature, "stop_ids": STOPS}
    responses = sample(ilql, uniforms, beta, **options)
    assert_slow_responses(responses, ilql, uniforms, beta, temperature, ALLOWED)
    assert torch.equal(sample(ilql, uniforms, beta, extra=4, **options), responses)


@pytest.mark.slow
@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_every_family_is_trained_and_steered_as_its_rows_alone(config, tmp_path, tokenizer):
    """Logits with a cap and windows shorter than a row among them."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    test_a_batch_is_its_rows_without_padding(str(tmp_path))
    ilql = build(str(tmp_path))
    allowed = torch.arange(config.vocab_size) != PAD
    uniforms = uniform(4, 10, seed=3)
    responses = sample(ilql, uniforms, 1.5, allowed=allowed, stop_ids=STOPS)
    assert_slow_responses(responses, ilql, uniforms, 1.5, 1.0, allowed)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0])
def test_beta_zero_decodes_as_the_behaviour_policy(folder, temperature):
    """The tokens that PPO's sampler draws from the plain language model with the same uniforms."""
    ilql = build(folder)
    queries, query_mask = utils.left_pad(QUERIES, 7, PAD, CPU)
    for seed in range(2):
        uniforms = uniform(4, 12, seed=seed)
        expected = ppo_rlhf.generate(
            ilql.policy, queries, query_mask, uniforms, temperature, [EOS], PAD, allowed=ALLOWED
        )
        assert torch.equal(sample(ilql, uniforms, 0.0, temperature=temperature), expected)
        assert not torch.equal(sample(ilql, uniforms, 2.0, temperature=temperature), expected)


@torch.no_grad()
def test_decoding_ends_when_all_rows_have_ended(gpt2_folder):
    """The first token comes with the prompt, and each further one is a step."""
    ilql = build(gpt2_folder)
    steps = []

    def counting(ilql, tokens, *inputs, **options):
        steps.append(tokens.shape)
        return ilql_rlhf.steered_decode_step(ilql, tokens, *inputs, **options)

    uniforms = uniform(4, 12, seed=3)
    responses = sample(ilql, uniforms, 1.5, decode_fn=counting, stop_ids=range(EOS, 12))
    lengths = (responses != PAD).sum(1).tolist()
    assert min(lengths) < max(lengths) < 12
    assert steps == [(4, 1)] * (max(lengths) - 1)
    for stop_ids, expected in ((range(VOCABULARY), 0), ([99], 11)):
        steps.clear()
        sample(ilql, uniforms, 1.5, decode_fn=counting, stop_ids=stop_ids)
        assert len(steps) == expected


@torch.no_grad()
def test_forbidden_ids_are_never_sampled_however_good(gpt2_folder):
    ilql = build(gpt2_folder)
    for q in ilql.target_qs:
        q[2].bias.data[PAD] = 1e4
    responses = sample(ilql, uniform(4, 12), 100.0, stop_ids=[99], pad_id=30)
    assert not (responses == PAD).any()
    with_all_ids = sample(ilql, uniform(4, 12), 100.0, stop_ids=[99], pad_id=30, allowed=None)
    assert (with_all_ids == PAD).all()


@torch.no_grad()
def test_a_used_cache_is_as_good_as_a_new_one(folder):
    ilql = build(folder)
    cache = utils.static_cache(ilql.policy.config, 7 + 12)
    for seed, beta in [(1, 0.0), (2, 3.0), (1, 0.0)]:
        uniforms = uniform(4, 12, seed=seed)
        with_a_new_cache = sample(ilql, uniforms, beta)
        assert torch.equal(sample(ilql, uniforms, beta, cache=cache), with_a_new_cache)


# --------------------------------------------------------------------------------------------------
# From rows to states and actions


def turns(*contents):
    """Messages that begin with the user's."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.fixture
def chat_tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("reward", [[0.5, -1.5], 2.0])
def test_the_worked_example_of_the_manual(reward):
    """Eight tokens of a dialogue in the manual's letters, from the messages to what the loss gets.

    r1 is 0 if there is only one reward for the dialogue.
    """
    tokens = "u:x|v:y|"
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([":"])
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{{ m.content }}{% if m.role == 'user' %}:{% else %}|{% endif %}"
        "{% endfor %}"
    )
    row = ilql_rlhf.encode_row(tokenizer, {"messages": turns("u", "x", "v", "y"), "reward": reward})
    assert tokenizer.decode(row["input_ids"]) == tokens
    assert row["states"] == [1, 2, 5, 6]
    assert tokenizer.decode(row["actions"]) == "x|y|"
    assert tokens[: row["states"][0] + 1] == "u:"
    assert tokens[: row["states"][2] + 1] == "u:x|v:"
    r1, r2 = reward if isinstance(reward, list) else (None, reward)
    assert row["rewards"] == [None, r1, None, r2]

    def model(input_ids, states):
        """The value of a state is its number."""
        nothing = torch.zeros(*states.shape, 40)
        vs = states.double()
        return {"qs": [nothing], "target_qs": [nothing], "vs": vs, "logits": nothing}

    def loss_fn(**inputs):
        assert inputs.keys() == {*TENSORS, "args", "num_tokens"}
        seen.update(inputs)
        return dict.fromkeys(LOSSES, torch.zeros(()))

    seen = {}
    row["rewards"] = [x or 0.0 for x in row["rewards"]]
    args = ilql_rlhf.Args(precision="fp32")
    count = torch.tensor(4)
    ilql_rlhf.micro_batch_loss(model, [row], count, utils.Means(), loss_fn, EOS, args, CPU)
    assert tokenizer.decode(seen["actions"][0]) == "x|y|"
    assert seen["vs"].tolist() == [[1, 2, 5, 6]]
    assert seen["next_vs"][:, :3].tolist() == [[2, 5, 6]]
    assert seen["terminal"].tolist() == [[False, False, False, True]]
    assert seen["rewards"].tolist() == [[0.0, r1 or 0.0, 0.0, r2]]
    assert seen["mask"].all()
    assert seen["args"] is args
    assert seen["num_tokens"] is count


@pytest.fixture
def encode(tmp_path):
    """`encode(rows, tokenizer, **flags)`: (rows, statistics) of `load_rated`."""

    def load(rows, tokenizer, **flags):
        path = tmp_path / "rows.parquet"  # JSON has no NaN and no infinity.
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).to_parquet(path)
        return ilql_rlhf.load_rated(ilql_rlhf.Args(dataset=str(path), **flags), tokenizer)

    return load


def test_the_actions_of_a_completion_are_its_tokens_and_one_eos(tokenizer, encode):
    data = [
        {"prompt": "ab", "completion": "cd", "reward": 0.25},
        {"prompt": "ab", "completion": "c|d", "reward": 1.0},
        {"prompt": "ab", "completion": "", "reward": 2.0},
    ]
    rows, statistics = encode(data, tokenizer)
    assert rows[0] == row_of([2, 3, 4, 5, EOS], [1, 2, 3], [4, 5, EOS], [0.0, 0.0, 0.25])
    # An EOS that the user wrote ends the completion.
    assert rows[1] == row_of([2, 3, 4, EOS], [1, 2], [4, EOS], [0.0, 1.0])
    assert rows[2] == row_of([2, 3, EOS], [1], [EOS], [2.0])
    assert statistics == {"reward_mean": 0.0, "reward_std": 1.0}


@pytest.mark.parametrize("reward", [[0.5, -1.5], 2.0])
def test_tokens_of_the_environment_are_no_actions(chat_tokenizer, encode, reward):
    """The actions of UabAcd|UeAf| are cd| and f|; what is said after the last turn is left out."""
    [row], _ = encode(
        [{"messages": turns("ab", "cd", "e", "f", "gh"), "reward": reward}], chat_tokenizer
    )
    assert chat_tokenizer.decode(row["input_ids"]) == "UabAcd|UeAf|"
    assert row["states"] == [3, 4, 5, 9, 10]
    assert chat_tokenizer.decode(row["actions"]) == "cd|f|"
    r1, r2 = reward if isinstance(reward, list) else (0.0, reward)
    assert row["rewards"] == [0.0, 0.0, r1, 0.0, r2]
    whole = row["input_ids"]
    assert [whole[i + 1] for i in row["states"]] == row["actions"]


def test_what_the_template_writes_after_a_turn_is_the_environments(chat_tokenizer, encode):
    """Many templates write a line break after the EOS."""
    chat_tokenizer.chat_template = TEMPLATE.replace("|{% else %}", "| {% else %}")
    [row], _ = encode(
        [{"messages": turns("ab", "cd", "e", "f"), "reward": [1.0, 2.0]}], chat_tokenizer
    )
    assert chat_tokenizer.decode(row["input_ids"]) == "UabAcd| UeAf|"
    assert chat_tokenizer.decode(row["actions"]) == "cd|f|"
    assert row["rewards"] == [0.0, 0.0, 1.0, 0.0, 2.0]


def test_a_template_without_an_eos_gets_one_after_each_turn(chat_tokenizer, encode):
    chat_tokenizer.chat_template = TEMPLATE.replace("|{% else %}", "{% else %}")
    [row], _ = encode([{"messages": turns("ab", "cd", "e", "f"), "reward": 1.0}], chat_tokenizer)
    assert chat_tokenizer.decode(row["input_ids"]) == "UabAcd|UeAf|"
    assert chat_tokenizer.decode(row["actions"]) == "cd|f|"


def test_a_state_is_the_prompt_that_will_be_decoded_from(chat_tokenizer):
    """What stands before a turn's first action is what the prompt of that turn is encoded to."""
    messages = turns("ab", "cd", "e", "f")
    row = ilql_rlhf.encode_row(chat_tokenizer, {"messages": messages, "reward": 1.0})
    for action, num_messages in ((0, 1), (3, 3)):
        state = row["states"][action]
        prompt_ids = utils.encode_prompt(chat_tokenizer, messages[:num_messages])
        assert row["input_ids"][: state + 1] == prompt_ids


def test_assistant_turns_inside_a_prompt_are_no_actions(chat_tokenizer, encode):
    """The completion may be messages or a text."""
    prompt = turns("ab", "cd", "e")
    answer = [{"role": "assistant", "content": "f"}]
    for completion in (answer, "f"):
        row = {"prompt": prompt, "completion": completion, "reward": 1.0}
        [row], _ = encode([row], chat_tokenizer)
        assert chat_tokenizer.decode(row["input_ids"]) == "UabAcd|UeAf|"
        assert chat_tokenizer.decode(row["actions"]) == "f|"
        assert row["rewards"] == [0.0, 1.0]


def test_a_prompt_column_beside_messages_is_no_prompt_of_theirs(chat_tokenizer, encode):
    data = {"messages": turns("a", "b", "c", "d"), "reward": [0.5, 1.5]}
    plain = encode([data], chat_tokenizer)
    for prompt in ("abcdef", turns("a", "b")):
        assert encode([data | {"prompt": prompt}], chat_tokenizer) == plain


def test_rows_over_max_length_are_left_out_and_counted(tokenizer, encode, capsys):
    """The last action counts as a token of the row."""
    data = [
        {"prompt": "abc", "completion": "xyz", "reward": 0.5},
        {"prompt": "ab", "completion": "xyz", "reward": 0.5},
        {"prompt": "a", "completion": "uvwxyz", "reward": 0.5},
        {"prompt": "a", "completion": "x", "reward": 0.5},
    ]
    rows, _ = encode(data, tokenizer, max_length=6)
    assert [tokenizer.decode(row["input_ids"]) for row in rows] == ["abxyz|", "ax|"]
    left_out = "rows.parquet: left out 2 of 4 rows longer than 6 tokens (--max_length)\n"
    assert capsys.readouterr().out.endswith(left_out)
    rows, _ = encode(data, tokenizer, max_length=8)
    assert len(rows) == 4
    assert capsys.readouterr().out == ""
    message = r"no row is left: all 4 have over 2 tokens \(--max_length\)"
    with pytest.raises(utils.UserError, match=message):
        encode(data, tokenizer, max_length=2)


def test_max_rows_keeps_the_first_rows(tokenizer, encode):
    data = [{"prompt": "a", "completion": "x" * i, "reward": 0.5} for i in range(4)]
    all_rows, _ = encode(data, tokenizer)
    rows, _ = encode(data, tokenizer, max_rows=2)
    assert rows == all_rows[:2]
    assert encode(data, tokenizer, max_rows=9)[0] == all_rows


def test_rewards_are_floats_and_may_be_normalised(chat_tokenizer, encode):
    """By the mean and deviation of the rewards that are given in the rows that are kept."""
    rewards = [[0.5, 1.5], [-2.25, 4.0]]
    data = [{"messages": turns("a", "b", "c", "d"), "reward": pair} for pair in rewards]
    too_long = {"messages": turns("a" * 20, "b", "c", "d"), "reward": [100.0, 100.0]}
    plain, _ = encode(data, chat_tokenizer)
    assert [row["rewards"][1::2] for row in plain] == rewards
    scaled, statistics = encode(
        [*data, too_long], chat_tokenizer, max_length=20, normalize_rewards=True
    )
    given = torch.tensor([0.5, 1.5, -2.25, 4.0], dtype=torch.float64)
    mean = given.mean().item()
    std = given.std(correction=0).item()
    assert statistics == pytest.approx({"reward_mean": mean, "reward_std": std})
    expected = [[(x - mean) / std for x in pair] for pair in rewards]
    for row, pair in zip(scaled, expected, strict=True):
        assert row["rewards"][1::2] == pytest.approx(pair)
        assert row["rewards"][::2] == [0.0, 0.0]  # Where nothing is paid, nothing is subtracted.


def test_rewards_that_are_all_equal_cannot_be_normalised(tokenizer, encode):
    """Rounding gives the deviation of a thousand times 0.1 as a little more than 0."""
    data = [{"prompt": "a", "completion": "b", "reward": 0.1}] * 1000
    with pytest.raises(utils.UserError, match=r"rows.parquet: all rewards are equal"):
        encode(data, tokenizer, normalize_rewards=True)


GOOD = {"prompt": "a", "completion": "b", "reward": 1.0}
DIALOGUE = {"messages": turns("a", "b", "c", "d"), "reward": [1.0, 2.0]}
JUDGE = {"role": "judge", "content": "a"}
NO_ACTION = "no action token or no prompt"
BAD_ROWS = {
    "missing": (
        [GOOD, GOOD | {"reward": None}],
        "row 2: reward is None, which is not a finite number",
    ),
    "not finite": ([GOOD, GOOD | {"reward": INF}], "row 2: reward is inf"),
    "not a number": ([GOOD, GOOD, GOOD | {"reward": NAN}], "row 3: reward is nan"),
    "infinite in fp32": ([GOOD, GOOD | {"reward": 1e39}], r"row 2: reward is 1e\+39"),
    "a word": ([GOOD | {"reward": "good"}], "row 1: reward is 'good'"),
    "too few": (
        [DIALOGUE, DIALOGUE | {"reward": [1.0]}],
        "row 2: assistant turns: 2, but rewards: 1",
    ),
    "too many": (
        [DIALOGUE | {"reward": [1.0] * 3}],
        "row 1: assistant turns: 2, but rewards: 3",
    ),
    "one is missing": ([DIALOGUE | {"reward": [1.0, None]}], r"row 1: reward is \[1.0, None\]"),
    "no assistant": (
        [DIALOGUE, {"messages": turns("a"), "reward": [1.0]}],
        f"row 2: {NO_ACTION}",
    ),
    "no prompt": (
        [GOOD, {"prompt": "", "completion": "b", "reward": 1.0}],
        f"row 2: {NO_ACTION}",
    ),
    "the agent speaks first": (
        [{"messages": turns("a", "b")[1:], "reward": 1.0}],
        "row 1: .*empty conversation",
    ),
    "a role": (
        [DIALOGUE, {"messages": [JUDGE, *turns("b", "c")], "reward": [1.0]}],
        "row 2: unknown role 'judge'; known are system, user, assistant and tool",
    ),
    "a role in a prompt": (
        [{"prompt": [JUDGE], "completion": turns("a", "b")[1:], "reward": 1.0}],
        "row 1: unknown role 'judge'",
    ),
    "messages after a text": (
        [{"prompt": "a", "completion": turns("b", "c"), "reward": 1.0}],
        "row 1: a prompt of text needs a completion of text",
    ),
    "a text for messages": (
        [{"messages": "a", "reward": 1.0}],
        "row 1: messages is a text, not a list of messages",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named(name, chat_tokenizer, encode):
    rows, message = BAD_ROWS[name]
    with pytest.raises(utils.UserError, match=f"rows.parquet: {message}"):
        encode(rows, chat_tokenizer)


def test_a_template_that_rewrites_its_past_is_refused(chat_tokenizer, encode):
    chat_tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(utils.UserError, match="row 1: the chat template does not render a turn"):
        encode([DIALOGUE], chat_tokenizer)


def test_a_column_without_rewards_is_named(tokenizer, encode):
    with pytest.raises(utils.UserError, match="needs the column reward; it has prompt, completion"):
        encode([{"prompt": "a", "completion": "b"}], tokenizer)


def test_mistakes_in_the_file_end_in_one_line(capsys, gpt2_folder, tmp_path):
    dataset = write_jsonl(tmp_path / "a.jsonl", [GOOD, GOOD | {"reward": None}])
    options = {"model": gpt2_folder, "dataset": dataset, "output_dir": str(tmp_path / "run")}
    refuses(capsys, "ilql_rlhf", options, r"a.jsonl: row 2: reward is None")


def test_collate():
    rows = [
        row_of([5, 6, 7, EOS], [1, 2], [7, EOS], [0.0, 0.5]),
        row_of([5, EOS], [0], [EOS], [2.0]),
    ]
    batch = ilql_rlhf.collate(rows, 9)
    assert {name: x.tolist() for name, x in batch.items()} == {
        "input_ids": [[5, 6, 7], [5, 9, 9]],
        "states": [[1, 2], [0, 0]],
        "actions": [[7, EOS], [EOS, 9]],
        "rewards": [[0.0, 0.5], [2.0, 0.0]],
        "terminal": [[False, True], [True, False]],
        "mask": [[True, True], [True, False]],
    }
    assert batch["rewards"].dtype == torch.float32


# --------------------------------------------------------------------------------------------------
# What samples are drawn from and scored by


def test_the_embedded_task_has_its_own_prompts_and_score(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    randomwalks.main(randomwalks.Args(num_pairs=40))
    (tmp_path / "tasks").symlink_to(ROOT / "tasks")
    args = ilql_rlhf.Args()
    tokenizer = utils.load_tokenizer(args.model)
    prompts, scorer = ilql_rlhf.load_evaluation(args, tokenizer)
    assert (args.reward_fn, scorer.__name__) == ("tasks/randomwalks.py:reward", "reward")
    assert args.eval_dataset == "data/randomwalks/prompts.jsonl"
    assert {len(ids) for ids, _ in prompts} == {1}


def test_no_samples_are_drawn_where_nothing_scores_them(tmp_path, tokenizer):
    args = ilql_rlhf.Args(dataset=str(tmp_path / "rated.jsonl"))
    assert ilql_rlhf.load_evaluation(args, tokenizer) == ([], None)


def test_prompts_leave_room_for_a_response(tmp_path, tokenizer, capsys):
    (tmp_path / "rewards.py").write_text("def reward(prompts, responses): pass")
    rows = [{"prompt": "abc"}, {"prompt": "abcd"}]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    args = ilql_rlhf.Args(
        dataset=str(tmp_path / "rated.jsonl"),
        reward_fn=f"{tmp_path}/rewards.py:reward",
        max_length=10,
        response_length=7,
    )
    prompts, _ = ilql_rlhf.load_evaluation(args, tokenizer)
    assert prompts == [([2, 3, 4], {"prompt": "abc"})]
    assert "prompts.jsonl: left out 1 of 2 rows longer than 3 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_reward_model_without_a_finite_score_is_refused(value, monkeypatch):
    monkeypatch.setattr(ilql_rlhf, "last_token_scores", lambda *inputs: torch.tensor([1.0, value]))
    args = ilql_rlhf.Args(reward_model="my_rm")
    with pytest.raises(utils.UserError, match="my_rm: not a finite score for each response"):
        ilql_rlhf.score_samples(None, [{}, {}], ["", ""], None, None, args)
