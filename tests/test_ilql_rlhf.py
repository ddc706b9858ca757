"""ILQL's parts against their definitions: loss, steering, decoding, heads, data, and a decision process solved by hand.

What is expected is worked out the long way round: plain Python loops, rows without padding, no cache.
"""

import argparse
import copy
import itertools
import math

import datasets
import pytest
import torch
from conftest import read_jsonl, refuses, write_jsonl
from transformers import AutoConfig, AutoModelForCausalLM

import ilql_rlhf
import ppo_rlhf
import utils

NAN, INF = math.nan, math.inf
PAD, EOS = 0, 1  # of the tokenizer in conftest.py
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A{{ m.content }}{{ eos_token }}{% else %}U{{ m.content }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}A{% endif %}"
)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------------------
# The loss

SETTINGS = {"tau": 0.7, "gamma": 0.9, "beta": 0.8, "cql_weight": 0.3, "awac_weight": 0.6}
TENSORS = ("qs", "target_qs", "vs", "next_vs", "logits", "actions", "rewards", "terminal", "mask")


def loss_case(num_qs=2, B=3, A=5, V=7):
    """A batch of 2, 5 and 3 actions; each row's last one is terminal. Targets lie near Q, so that both signs occur."""
    mask = torch.arange(A) < torch.tensor([2, 5, 3])[:, None]
    case = {
        "qs": [normal(B, A, V, seed=k) for k in range(num_qs)],
        "target_qs": [normal(B, A, V, seed=10 + k) for k in range(num_qs)],
        "vs": normal(B, A, seed=20),
        "next_vs": normal(B, A, seed=21),
        "logits": 2 * normal(B, A, V, seed=22),
        "actions": torch.randint(V, (B, A), generator=torch.Generator().manual_seed(23)),
        "rewards": normal(B, A, seed=24),
        "terminal": mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1)),
        "mask": mask,
    }
    return case


def loss_by_loops(case, tau, gamma, beta, cql_weight, awac_weight):
    """The definitions, one action at a time."""
    sums, count = dict.fromkeys(("q", "v", "cql", "awac"), 0.0), 0
    for i, j in itertools.product(*map(range, case["mask"].shape)):
        if not case["mask"][i, j]:
            continue
        count += 1
        a, v = case["actions"][i, j].item(), case["vs"][i, j].item()
        target = min(q[i, j, a].item() for q in case["target_qs"])
        backup = case["rewards"][i, j].item()
        if not case["terminal"][i, j]:
            backup += gamma * case["next_vs"][i, j].item()
        for q in case["qs"]:
            sums["q"] += (backup - q[i, j, a].item()) ** 2
            sums["cql"] += math.log(sum(math.exp(x) for x in q[i, j].tolist())) - q[i, j, a].item()
        sums["v"] += abs(tau - (target < v)) * (target - v) ** 2
        logprob = case["logits"][i, j, a].item() - math.log(sum(math.exp(x) for x in case["logits"][i, j].tolist()))
        sums["awac"] -= math.exp(beta * (target - v)) * logprob
    means = {name: x / count for name, x in sums.items()}
    return means | {"total": means["q"] + means["v"] + cql_weight * means["cql"] + awac_weight * means["awac"]}


def numbers(losses):
    return {name: loss.item() for name, loss in losses.items()}


@pytest.mark.parametrize("num_qs", [1, 2])
def test_the_loss_is_the_definition(num_qs):
    case = loss_case(num_qs)
    losses = ilql_rlhf.ilql_loss(*(case[name] for name in TENSORS), *SETTINGS.values())
    assert set(losses) == {"total", "q", "v", "cql", "awac"} and all(loss.dim() == 0 for loss in losses.values())
    assert numbers(losses) == pytest.approx(loss_by_loops(case, **SETTINGS), abs=1e-12)


def test_half_an_expectile_is_half_the_squared_error():
    case = loss_case(1)
    losses = ilql_rlhf.ilql_loss(*(case[name] for name in TENSORS), **SETTINGS | {"tau": 0.5})
    target = case["target_qs"][0].gather(-1, case["actions"][..., None]).squeeze(-1)
    error = ((target - case["vs"]) ** 2)[case["mask"]].mean()
    assert losses["v"].item() == pytest.approx(error.item() / 2, abs=1e-12)


def test_a_high_expectile_pulls_v_up():
    """The weight is tau where the target is above V: the minimum over V lies above the mean of the targets."""
    case = loss_case(1)
    low, high = (
        ilql_rlhf.ilql_loss(*({**case, "vs": case["target_qs"][0][..., 0] * 0 + v}[n] for n in TENSORS), **SETTINGS)[
            "v"
        ]
        for v in (-5.0, 5.0)  # all targets are above -5 and below 5
    )
    targets = case["target_qs"][0].gather(-1, case["actions"][..., None]).squeeze(-1)[case["mask"]]
    assert low.item() == pytest.approx(0.7 * ((targets + 5) ** 2).mean().item())
    assert high.item() == pytest.approx(0.3 * ((targets - 5) ** 2).mean().item())


def test_a_terminal_action_is_worth_its_reward():
    """Whatever the value behind the end is said to be, NaN included."""
    case = loss_case()
    case["qs"] = [case["rewards"][..., None].expand_as(q) for q in case["qs"]]
    case["mask"] = case["terminal"]
    for behind in (0.0, 1e6, NAN):
        case["next_vs"] = torch.full_like(case["vs"], behind)
        losses = ilql_rlhf.ilql_loss(*(case[name] for name in TENSORS), **SETTINGS)
        assert losses["q"].item() == 0.0


def test_the_smaller_target_counts():
    case = loss_case()
    case["target_qs"] = [case["vs"][..., None] - 1 + 0 * case["qs"][0], case["vs"][..., None] + 3 + 0 * case["qs"][0]]
    losses = ilql_rlhf.ilql_loss(*(case[name] for name in TENSORS), **SETTINGS)
    assert losses["v"].item() == pytest.approx(1 - SETTINGS["tau"])


def gradients(case, name, settings=SETTINGS):
    """The gradient of one loss with respect to every float tensor of the case; None where there is none."""
    leaves = {key: x for key in TENSORS if torch.is_tensor(x := case[key]) and x.is_floating_point()}
    leaves |= {f"{key}{k}": x for key in ("qs", "target_qs") for k, x in enumerate(case[key])}
    leaves = {key: x.clone().requires_grad_() for key, x in leaves.items()}
    lists = {key: [leaves[f"{key}{k}"] for k in range(len(case[key]))] for key in ("qs", "target_qs")}
    losses = ilql_rlhf.ilql_loss(*((case | leaves | lists)[key] for key in TENSORS), **settings)
    return dict(zip(leaves, torch.autograd.grad(losses[name], list(leaves.values()), allow_unused=True), strict=True))


def reached(case, name):
    return {key for key, gradient in gradients(case, name).items() if gradient is not None and (gradient != 0).any()}


def test_where_each_loss_sends_its_gradient():
    """No target, no bootstrapped value and no AWAC weight learns."""
    case = loss_case()
    assert reached(case, "q") == {"qs0", "qs1", "rewards"}
    assert reached(case, "v") == {"vs"}
    assert reached(case, "cql") == {"qs0", "qs1"}
    assert reached(case, "awac") == {"logits"}


def test_nothing_behind_the_mask_reaches_a_number_or_a_gradient():
    case, dirty = loss_case(), loss_case()
    for name in ("vs", "next_vs", "rewards"):
        dirty[name] = torch.where(case["mask"], case[name], NAN)
    for name in ("qs", "target_qs"):
        dirty[name] = [torch.where(case["mask"][..., None], x, INF) for x in case[name]]
    dirty["logits"] = torch.where(case["mask"][..., None], case["logits"], NAN)
    dirty["actions"] = torch.where(case["mask"], case["actions"], -100)
    dirty["terminal"] = case["terminal"] | ~case["mask"]
    clean = ilql_rlhf.ilql_loss(*(case[name] for name in TENSORS), **SETTINGS)
    assert numbers(ilql_rlhf.ilql_loss(*(dirty[name] for name in TENSORS), **SETTINGS)) == numbers(clean)
    for key, gradient in gradients(dirty, "total").items():
        if gradient is not None:
            assert gradient.isfinite().all() and (gradient[~case["mask"]] == 0).all(), key
            assert torch.equal(gradient, gradients(case, "total")[key])
    nobody = {**dirty, "mask": torch.zeros_like(case["mask"])}
    assert set(numbers(ilql_rlhf.ilql_loss(*(nobody[name] for name in TENSORS), **SETTINGS)).values()) == {0.0}


def test_cql_is_a_cross_entropy_and_never_negative():
    case = loss_case(1)
    q, mask = case["qs"][0], case["mask"]
    cql = ilql_rlhf.ilql_loss(*(case[name] for name in TENSORS), **SETTINGS)["cql"]
    expected = torch.nn.functional.cross_entropy(q[mask], case["actions"][mask])
    assert cql.item() == pytest.approx(expected.item()) and cql.item() > 0
    case["qs"] = [torch.nn.functional.one_hot(case["actions"], 7) * 1000.0]  # all certainty is on the action
    assert ilql_rlhf.ilql_loss(*(case[name] for name in TENSORS), **SETTINGS)["cql"].item() == 0


def test_parts_of_a_batch_add_up_to_the_whole():
    case, total = loss_case(), dict.fromkeys(("total", "q", "v", "cql", "awac"), 0.0)
    whole = numbers(ilql_rlhf.ilql_loss(*(case[name] for name in TENSORS), **SETTINGS))
    for i in range(3):
        part = {name: [q[i : i + 1] for q in x] if isinstance(x, list) else x[i : i + 1] for name, x in case.items()}
        losses = numbers(
            ilql_rlhf.ilql_loss(*(part[name] for name in TENSORS), **SETTINGS, num_tokens=torch.tensor(10))
        )
        total = {name: total[name] + losses[name] for name in total}
    assert total == pytest.approx(whole, abs=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# A decision process that can be solved by hand: states are prefixes, so the tree of the data is the whole world

GAMMA = 0.9


def tree(seed=0):
    """[(tokens, reward)]: 48 walks of 1 to 3 letters out of three and an EOS, many of them more than once."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for _ in range(48):
        length = int(torch.randint(1, 4, (), generator=generator))
        tokens = torch.randint(2, 5, (length,), generator=generator).tolist()
        rows.append(([9, *tokens, EOS], round(torch.rand((), generator=generator).item() * 2 - 1, 3)))
    return rows


def expectile(values, tau):
    """The root of sum |tau - 1(x < v)| (x - v), by bisection."""
    low, high = min(values), max(values)
    for _ in range(100):
        middle = (low + high) / 2
        balance = sum(abs(tau - (x < middle)) * (x - middle) for x in values)
        low, high = (middle, high) if balance > 0 else (low, middle)
    return (low + high) / 2


def solve(rows, tau):
    """({(prefix, action): Q}, {prefix: V}) of the expectile backup over the data's own actions, from the leaves up."""
    steps = [(tuple(ids[: i + 1]), ids[i + 1], i == len(ids) - 2, r) for ids, r in rows for i in range(len(ids) - 1)]
    Q, V = {}, {}
    for prefix in sorted({step[0] for step in steps}, key=len, reverse=True):
        here = [step for step in steps if step[0] == prefix]
        for action in {step[1] for step in here}:
            backups = [r if last else GAMMA * V[(*prefix, action)] for _, a, last, r in here if a == action]
            Q[prefix, action] = sum(backups) / len(backups)
        V[prefix] = expectile([Q[prefix, step[1]] for step in here], tau)
    return Q, V


def learn(ilql, rows, tau, steps, lr):
    """Full-batch training with the script's own pieces, CQL and AWAC off; returns (qs, vs, rows' states) at the end."""
    encoded = [(ids[:-1], list(range(len(ids) - 1)), ids[1:], [0.0] * (len(ids) - 2) + [r]) for ids, r in rows]
    batch = ilql_rlhf.collate_actions(encoded, (4, 4), len(rows), "cpu")
    input_ids, attention_mask, states, actions, rewards, terminal, mask = batch
    parameters = [p for p in ilql.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, 2 * (1 - step / steps))
        logits, qs, target_qs, vs = ilql(input_ids, attention_mask, states)
        next_vs = torch.nn.functional.pad(vs[:, 1:], (0, 1))
        case = (qs, target_qs, vs, next_vs, logits, actions, rewards, terminal, mask)
        optimizer.zero_grad()
        ilql_rlhf.ilql_loss(*case, tau, GAMMA, 0.0, 0.0, 0.0)["total"].backward()
        optimizer.step()
        ilql.update_targets(0.2)
    return ilql(input_ids, attention_mask, states)[1:]


@pytest.mark.parametrize("tau", [0.5, 0.7, 0.9])
def test_q_and_v_reach_the_fixed_point_of_the_expectile_backup(tau, gpt2_folder):
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_pretrained(gpt2_folder, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0).eval()
    rows = tree()
    Q, V = solve(rows, tau)
    qs, target_qs, vs = learn(ilql_rlhf.ILQL(policy, 2), rows, tau, steps=800, lr=6e-3)
    spread = max(r for _, r in rows) - min(r for _, r in rows)
    for i, (ids, _) in enumerate(rows):
        for j in range(len(ids) - 1):
            prefix, action = tuple(ids[: j + 1]), ids[j + 1]
            assert vs[i, j].item() == pytest.approx(V[prefix], abs=0.02 * spread)
            for q in (*qs, *target_qs):
                assert q[i, j, action].item() == pytest.approx(Q[prefix, action], abs=0.02 * spread)


def test_the_solution_by_hand_is_what_it_says():
    rows = [([9, 2, EOS], 1.0), ([9, 3, EOS], 0.0), ([9, 3, EOS], 0.5)]
    Q, V = solve(rows, 0.5)
    assert Q == {((9, 2), EOS): 1.0, ((9, 3), EOS): 0.25, ((9,), 2): 0.9, ((9,), 3): pytest.approx(0.225)}
    assert V[(9,)] == pytest.approx((0.9 + 2 * 0.225) / 3)
    assert solve(rows, 0.9)[1][(9,)] > 0.6 > V[(9,)]  # towards the better action


# ----------------------------------------------------------------------------------------------------------------------
# Model


@pytest.fixture(params=["gpt2", "llama"])
def folder(request):
    return request.getfixturevalue(f"{request.param}_folder")


def build(folder, num_qs=2, scale=3.0, q_rows="ids"):
    """A module whose heads are random and large enough that steering moves tokens; targets differ from the online heads."""
    torch.manual_seed(5)
    ilql = ilql_rlhf.ILQL(utils.load_pretrained(AutoModelForCausalLM, folder)[0], num_qs, q_rows)
    for name, parameter in ilql.heads.named_parameters():
        if not name.endswith(".3.weight"):  # the LM head's rows stay
            parameter.data.normal_(0, scale * parameter.shape[-1] ** -0.5)
    return ilql.eval()


ROWS = [[5, 6, 7, 8, EOS], [9, 10, EOS], [11, 12, 13, 14, 15, 16, EOS]]
STATES = [[1, 2, 3], [0, 1], [0, 3, 4, 5]]


def batch_of(rows, states, extra=0, pad_id=PAD):
    T, A = max(map(len, rows)) - 1 + extra, max(map(len, states)) + extra
    ids = torch.tensor([row[:-1] + [pad_id] * (T + 1 - len(row)) for row in rows])
    attention = torch.arange(T) < torch.tensor([[len(row) - 1] for row in rows])
    return ids, attention, torch.tensor([s + [0] * (A - len(s)) for s in states])


@torch.no_grad()
def test_heads_stand_at_the_states_of_rows_without_padding(folder):
    ilql = build(folder)
    for extra, pad_id in [(0, PAD), (3, EOS)]:
        logits, qs, target_qs, vs = ilql(*batch_of(ROWS, STATES, extra, pad_id))
        for i, (row, states) in enumerate(zip(ROWS, STATES, strict=True)):
            plain = ilql.policy(torch.tensor([row]), output_hidden_states=True)
            for j, state in enumerate(states):
                h = plain.hidden_states[-1][0, state]
                torch.testing.assert_close(logits[i, j], plain.logits[0, state], atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(vs[i, j], ilql.heads["v"][0](h)[0], atol=1e-4, rtol=1e-4)
                for k in range(2):
                    torch.testing.assert_close(qs[k][i, j], ilql.heads["q"][k](h), atol=1e-4, rtol=1e-4)
                    torch.testing.assert_close(target_qs[k][i, j], ilql.heads["target_q"][k](h), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_embedding_rows_are_the_product_with_the_lm_heads_rows_plus_the_states_own_worth(folder):
    """With hidden states standardised by the moments, for V as for Q."""
    ilql, batch = build(folder, q_rows="embeddings"), batch_of(ROWS, STATES)
    hidden = ilql_rlhf.last_hidden(ilql.policy, *batch[:2]).take_along_dim(batch[2][..., None], 1)
    ilql.heads.moments = torch.stack([normal(hidden.shape[-1], seed=1), 0.5 + uniform(hidden.shape[-1])]).float()
    rows = ilql.policy.get_output_embeddings().weight
    rows = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    _, qs, target_qs, vs = ilql(*batch)
    hidden = (hidden - ilql.heads.moments[0]) / ilql.heads.moments[1]
    for name, values in (("q", qs), ("target_q", target_qs)):
        for head, q in zip(ilql.heads[name], values, strict=True):
            x = head[:3](hidden)  # (B,A,d + 1)
            expected = torch.einsum("bad,vd->bav", x[..., :-1], rows) / rows.shape[1] ** 0.5 + x[..., -1:]
            torch.testing.assert_close(q, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vs, ilql.heads["v"][0](hidden).squeeze(-1), atol=1e-4, rtol=1e-4)


def test_with_embedding_rows_an_id_that_the_data_never_takes_is_worth_what_its_likes_are(gpt2_folder):
    """After some steps towards a reward of 1, an id whose embedding is that of 6; a row of its own stays 0. No row moves."""
    batch, untaken = batch_of(ROWS, STATES), 20
    mask = torch.arange(batch[2].shape[1]) < torch.tensor([[len(states)] for states in STATES])
    for q_rows in ("ids", "embeddings"):
        policy, _ = utils.load_pretrained(AutoModelForCausalLM, gpt2_folder)
        policy.get_output_embeddings().weight.data[untaken] = policy.get_output_embeddings().weight.data[6]
        ilql = ilql_rlhf.ILQL(policy, 1, q_rows)
        before = [x.clone() for name, x in ilql.heads.named_parameters() if name.endswith(".3.weight")]
        optimizer = torch.optim.AdamW(ilql.heads.parameters(), lr=1e-2, weight_decay=0.0)
        for _ in range(40):
            logits, qs, target_qs, vs = ilql(*batch, actions := torch.where(mask, batch[2] + 5, 0))
            case = (qs, target_qs, vs, vs, logits, actions, torch.ones_like(vs), mask, mask)
            ilql_rlhf.ilql_loss(*case, 0.5, 1.0, 0.0, 0.0, 0.0)["total"].backward()
            optimizer.step()
            optimizer.zero_grad()
        worth = ilql(*batch)[1][0][mask]
        assert worth[..., 6].mean() > 0.2
        assert torch.equal(worth[..., untaken], worth[..., 6] * (q_rows == "embeddings"))
        after = [x for name, x in ilql.heads.named_parameters() if name.endswith(".3.weight")]
        assert len(after) == 2 * (q_rows == "embeddings") and all(map(torch.equal, before, after))


@torch.no_grad()
@pytest.mark.parametrize("q_rows", ["ids", "embeddings"])
def test_heads_at_the_actions_alone_are_the_whole_ones_there(folder, q_rows):
    ilql, batch = build(folder, q_rows=q_rows), batch_of(ROWS, STATES, extra=1)
    num_ids = ilql.policy.config.vocab_size
    actions = torch.randint(num_ids, batch[2].shape, generator=utils.seeded(3, "actions"))
    logits, qs, target_qs, vs = ilql(*batch)
    for all_qs in (True, False):
        logits_too, some_qs, some_targets, vs_too = ilql(*batch, actions, all_qs)
        torch.testing.assert_close((logits_too, vs_too), (logits, vs))
        for whole, some in zip(target_qs + qs, some_targets + some_qs, strict=True):
            if some.shape[-1] > 1:
                assert all_qs and torch.equal(some, whole)
            else:
                torch.testing.assert_close(some, whole.gather(-1, actions[..., None]))
        assert {x.shape[-1] for x in some_targets} == {1} and (some_qs[0].shape[-1] > 1) == all_qs


@pytest.mark.parametrize("q_rows", ["ids", "embeddings"])
def test_the_loss_from_q_at_the_actions_alone_is_that_from_all(folder, q_rows):
    """With cql_weight 0, the same numbers and gradients of every parameter."""
    results, batch = [], batch_of(ROWS, STATES)
    mask = torch.arange(batch[2].shape[1]) < torch.tensor([[len(states)] for states in STATES])
    actions = torch.randint(12, mask.shape, generator=utils.seeded(3, "actions"))
    rewards, terminal = normal(*mask.shape), ~torch.nn.functional.pad(mask[:, 1:], (0, 1)) & mask
    for arguments in ((), (actions, False), (actions, True)):
        ilql = build(folder, scale=0.5, q_rows=q_rows)
        logits, qs, target_qs, vs = ilql(*batch, *arguments)
        next_vs = torch.nn.functional.pad(vs[:, 1:], (0, 1))
        case = (qs, target_qs, vs, next_vs, logits, actions, rewards, terminal, mask)
        losses = ilql_rlhf.ilql_loss(*case, 0.7, 0.9, 0.5, 0.0, 1.0)
        losses["total"].backward()
        gradients = [p.grad for p in ilql.parameters() if p.requires_grad]
        results.append([*(losses[name].detach() for name in ("total", "q", "v", "awac")), *gradients])
    for x, y, z in zip(*results, strict=True):
        torch.testing.assert_close(y, x, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(z, x, atol=1e-6, rtol=1e-4)


def test_no_gradient_goes_through_a_target(folder):
    ilql = build(folder)
    _, qs, target_qs, vs = ilql(*batch_of(ROWS, STATES))
    assert not any(q.requires_grad for q in target_qs) and vs.requires_grad and all(q.requires_grad for q in qs)
    assert not any(p.requires_grad for p in ilql.heads["target_q"].parameters())


def test_targets_start_as_copies_and_follow(gpt2_folder):
    ilql = ilql_rlhf.ILQL(utils.load_pretrained(AutoModelForCausalLM, gpt2_folder)[0], 2)
    pairs = list(zip(ilql.heads["target_q"].parameters(), ilql.heads["q"].parameters(), strict=True))
    assert all(torch.equal(target, online) and target is not online for target, online in pairs)
    _, qs, target_qs, vs = ilql(*batch_of(ROWS, STATES))
    assert not any(x.any() for x in (*qs, *target_qs, vs))
    for k, (_, online) in enumerate(pairs):
        online.data += normal(*online.shape, seed=k, dtype=torch.float32)
    before = [target.clone() for target, _ in pairs]
    ilql.update_targets(0.25)
    for old, (target, online) in zip(before, pairs, strict=True):
        torch.testing.assert_close(target, 0.25 * online + 0.75 * old)
        assert not torch.equal(target, old)
    ilql.update_targets(1.0)
    assert all(torch.equal(target, online) for target, online in pairs)


def test_q_and_v_are_fp32_under_bf16_autocast(gpt2_folder):
    ilql = build(gpt2_folder)
    exact = ilql(*batch_of(ROWS, STATES))
    with torch.autocast("cpu", torch.bfloat16):
        _, qs, target_qs, vs = ilql(*batch_of(ROWS, STATES))
    assert {x.dtype for x in (*qs, *target_qs, vs)} == {torch.float32}
    assert 0 < (vs - exact[3]).abs().max() < 1


@pytest.mark.parametrize("q_rows", ["ids", "embeddings"])
def test_saved_and_loaded_again(folder, tmp_path, q_rows):
    ilql = build(folder, q_rows=q_rows)
    ilql.heads.moments += 0.5
    ilql.config |= {"reward_mean": 0.5, "reward_std": 2.0}
    ilql.save_pretrained(tmp_path)
    assert {"ilql_heads.safetensors", "ilql_config.json"} <= {path.name for path in tmp_path.iterdir()}
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    loaded = ilql_rlhf.load_ilql(str(tmp_path))
    assert loaded.config == {"num_qs": 2, "q_rows": q_rows, "reward_mean": 0.5, "reward_std": 2.0}
    for name, tensor in ilql.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


# ----------------------------------------------------------------------------------------------------------------------
# Steering and decoding


def test_steer_is_the_definition():
    logits, target_qs, vs = 2 * normal(4, 7), [normal(4, 7, seed=1), normal(4, 7, seed=2)], normal(4, seed=3)
    steered = ilql_rlhf.steer(logits, target_qs, vs, 1.7)
    for i, a in itertools.product(range(4), range(7)):
        logprob = logits[i, a] - logits[i].logsumexp(0)
        expected = logprob + 1.7 * (min(target_qs[0][i, a], target_qs[1][i, a]) - vs[i])
        assert steered[i, a].item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(ilql_rlhf.steer(logits, target_qs, vs, 0.0), torch.log_softmax(logits, -1))
    assert ilql_rlhf.steer(logits.bfloat16(), target_qs, vs, 0.0).dtype in (torch.float32, torch.float64)
    banned = logits.masked_fill(torch.arange(7) == 2, -INF)
    assert (ilql_rlhf.steer(banned, target_qs, vs, 50.0)[:, 2] == -INF).all()


QUERIES = [[5], [6, 7, 8, 9, 10, 11, 12], [9, 3, 9], [14, 15, 16, 17, 2]]
BIAS = torch.where(torch.arange(31) == PAD, -INF, 0.0)


def sample(ilql, uniforms, beta, extra=0, **options):
    queries, query_mask = ppo_rlhf.left_pad(QUERIES, 7 + extra, PAD, "cpu")
    options = {"stop_ids": [EOS], "pad_id": PAD, "bias": BIAS, **options}
    return ilql_rlhf.generate_steered(ilql, queries, query_mask, uniforms, beta, **options)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0])
def test_beta_zero_decodes_as_the_behaviour_policy(folder, temperature):
    """Token by token and under the same uniforms what PPO's sampler makes of the plain causal language model."""
    ilql = build(folder)
    for seed in range(3):
        uniforms = uniform(4, 12, seed=seed)
        queries, query_mask = ppo_rlhf.left_pad(QUERIES, 7, PAD, "cpu")
        expected = ppo_rlhf.generate(ilql.policy, queries, query_mask, uniforms, temperature, [EOS], PAD, BIAS)
        assert torch.equal(sample(ilql, uniforms, 0.0, temperature=temperature), expected)
        assert not torch.equal(sample(ilql, uniforms, 2.0, temperature=temperature), expected)


@torch.no_grad()
@pytest.mark.parametrize(("beta", "temperature"), [(1.5, 1.0), (1.5, 0.5), (4.0, 0)])
def test_generate_steered_is_the_slow_loop(folder, beta, temperature):
    """Without cache, mask or padding: the whole sequence again for every token."""
    ilql, uniforms = build(folder), uniform(4, 10, seed=3)
    for responses in (sample(ilql, uniforms, beta, temperature=temperature, extra=extra) for extra in (0, 4)):
        for query, u, response in zip(QUERIES, uniforms, responses, strict=True):
            expected = []
            while len(expected) < 10 and EOS not in expected:
                output = ilql.policy(torch.tensor([query + expected]), output_hidden_states=True)
                h, logits = output.hidden_states[-1][0, -1], output.logits[0, -1] + BIAS
                advantage = torch.minimum(*(q(h) for q in ilql.heads["target_q"])) - ilql.heads["v"][0](h)
                steered = torch.log_softmax(logits / (temperature or 1.0), -1) + beta * advantage
                cumulative = steered.softmax(-1).cumsum(-1)
                sampled = int((cumulative > u[len(expected)] * cumulative[-1]).nonzero()[0])
                expected.append(int(steered.argmax()) if temperature == 0 else sampled)
            assert response.tolist() == expected + [PAD] * (10 - len(expected))


@torch.no_grad()
def test_decoding_ends_soon_after_all_rows_have_ended(gpt2_folder):
    """Looked up every eighth token, so after 8 of 20 where all end at once; the cache of the next call is none the worse."""
    ilql, steps = build(gpt2_folder), []

    def counting(*inputs, **options):
        steps.append(inputs[2].shape)
        return ilql_rlhf.steered_decode_step(*inputs, **options)

    uniforms, every = uniform(4, 20, seed=3), torch.arange(31)
    cache = ilql_rlhf.StaticCache(config=ilql.policy.config, max_cache_len=7 + 20)
    for stop_ids, expected in ((every, 7), ([99], 19), (every, 7)):
        steps.clear()
        responses = sample(ilql, uniforms, 1.5, step=counting, cache=cache, stop_ids=stop_ids)
        assert steps == [(4, 1)] * expected
        assert (responses == PAD).any(1).tolist() == [len(stop_ids) == 31] * 4


@torch.no_grad()
def test_cuts_are_made_under_the_behaviour_policy_before_the_shift(gpt2_folder):
    ilql = build(gpt2_folder)
    hidden = normal(6, 16, dtype=torch.float32)
    logits = ilql.policy.lm_head(hidden) + BIAS
    for options in ({"top_k": 3}, {"top_p": 0.6}, {"top_k": 5, "top_p": 0.8, "temperature": 0.7}):
        steered = ilql.steered_logits(hidden, 5.0, BIAS, **options)
        for i in range(6):
            p = torch.softmax(logits[i] / options.get("temperature", 1.0), 0)
            ordered = p.argsort(descending=True)[: options.get("top_k", 31)].tolist()
            kept, mass, whole = [], 0.0, p[ordered].sum().item()
            for token in ordered:
                if mass / whole < options.get("top_p", 1.0):
                    kept.append(token)
                mass += p[token].item()
            assert set(steered[i].isfinite().nonzero().flatten().tolist()) == set(kept)
            value = ilql.heads["v"][0](hidden[i])
            target = torch.minimum(*(q(hidden[i]) for q in ilql.heads["target_q"]))
            expected = torch.log(p[kept] / p[kept].sum()) + 5.0 * (target - value)[kept]
            torch.testing.assert_close(steered[i, kept], expected, atol=1e-4, rtol=1e-4)
    late = ilql.steered_logits(hidden, 5.0, BIAS).topk(3).indices  # what cutting the sum would keep
    assert any(
        not early[tokens].isfinite().all()
        for early, tokens in zip(ilql.steered_logits(hidden, 5.0, BIAS, top_k=3), late)
    )


@torch.no_grad()
def test_layers_that_share_their_keys_are_steered():
    """Such a layer has no slots of its own in the cache: at beta 0 the tokens are those of PPO's sampler."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "global_head_dim": 8}
    sizes |= {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 31, "hidden_size_per_layer_input": 4}
    config = AutoConfig.for_model("gemma4_text", vocab_size=31, final_logit_softcapping=None, **sizes)
    torch.manual_seed(0)
    ilql = ilql_rlhf.ILQL(AutoModelForCausalLM.from_config(config).eval(), 2)
    uniforms = uniform(4, 12, seed=1)
    queries, query_mask = ppo_rlhf.left_pad(QUERIES, 7, PAD, "cpu")
    expected = ppo_rlhf.generate(ilql.policy, queries, query_mask, uniforms, 1.0, [EOS], PAD, BIAS)
    assert torch.equal(sample(ilql, uniforms, 0.0), expected)


@torch.no_grad()
def test_forbidden_ids_are_never_sampled_however_good(gpt2_folder):
    ilql = build(gpt2_folder)
    for head in ilql.heads["target_q"]:
        head[2].bias.data[PAD] = 1e4
    responses = sample(ilql, uniform(4, 12), 100.0, stop_ids=[99], pad_id=30)
    assert not (responses == PAD).any()


@torch.no_grad()
def test_a_used_cache_is_as_good_as_a_new_one(folder):
    ilql = build(folder)
    cache = ilql_rlhf.StaticCache(config=ilql.policy.config, max_cache_len=7 + 12 + 3)
    for seed, beta in [(1, 0.0), (2, 3.0), (1, 0.0)]:
        uniforms = uniform(4, 12, seed=seed)
        assert torch.equal(sample(ilql, uniforms, beta, cache=cache), sample(ilql, uniforms, beta))


def test_compiled_step_samples_the_same_tokens(gpt2_folder):
    """One graph for all betas: the same tokens as eager, and no recompile once it is warm (about 20 s)."""
    ilql = build(gpt2_folder).requires_grad_(False)
    step = torch.compile(ilql_rlhf.steered_decode_step, fullgraph=True)
    cache = ilql_rlhf.StaticCache(config=ilql.policy.config, max_cache_len=7 + 6)
    for seed, beta in [(9, 0.0), (10, 2.0), (11, 7.0)]:
        uniforms = uniform(4, 6, seed=seed)
        with torch.compiler.set_stance("default" if seed == 9 else "fail_on_recompile"):
            responses = sample(ilql, uniforms, beta, step=step, cache=cache)
        assert torch.equal(responses, sample(ilql, uniforms, beta))


@pytest.mark.parametrize(
    ("row", "length"),
    [([9, 5, 5], 1), ([5, 5, 9], 3), ([5, 5, 5], 3), ([5, 9, 9], 2)],
    ids=["first", "last", "none", "two"],
)
def test_response_mask(row, length):
    assert ilql_rlhf.response_mask(torch.tensor([row]), [9]).tolist() == [[i < length for i in range(3)]]


# ----------------------------------------------------------------------------------------------------------------------
# Data


@pytest.fixture
def chat_tokenizer(tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = TEMPLATE
    return chat


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def encode(rows, tokenizer, max_length=64, normalize_rewards=False):
    """(rows, statistics) of `encode_rated`."""
    args = argparse.Namespace(dataset="rows.jsonl", max_length=max_length, normalize_rewards=normalize_rewards)
    return ilql_rlhf.encode_rated(datasets.Dataset.from_list(rows), tokenizer, args)


def spell(tokenizer, ids):
    return tokenizer.decode(ids).replace(" ", "")


def test_the_actions_of_a_completion_are_its_tokens_and_one_eos(tokenizer):
    rows, statistics = encode([{"prompt": "ab", "completion": "cd", "reward": 0.25}], tokenizer)
    assert rows == [([2, 3, 4, 5], [1, 2, 3], [4, 5, EOS], [0.0, 0.0, 0.25])]
    assert statistics == {"reward_mean": 0.0, "reward_std": 1.0}
    rows, _ = encode([{"prompt": "ab", "completion": "c|d", "reward": 1}], tokenizer)
    assert rows == [([2, 3, 4], [1, 2], [4, EOS], [0.0, 1.0])]  # an EOS that the user wrote ends the completion
    rows, _ = encode([{"prompt": "ab", "completion": "", "reward": 1}], tokenizer)
    assert rows == [([2, 3], [1], [EOS], [1.0])]


@pytest.mark.parametrize("rewards", [[0.5, -1.5], 2.0])
def test_tokens_of_the_environment_are_no_actions(chat_tokenizer, rewards):
    """UabAcd|UeAf|: actions are c d | and f |; each turn's reward is paid at its EOS, a single one at the last."""
    rows, _ = encode([{"messages": turns("ab", "cd", "e", "f", "gh"), "reward": rewards}], chat_tokenizer)
    ids, states, actions, paid = rows[0]
    assert spell(chat_tokenizer, ids) == "UabAcd|UeAf" and states == [3, 4, 5, 9, 10]
    assert spell(chat_tokenizer, actions) == "cd|f|"
    first, second = rewards if isinstance(rewards, list) else (0.0, rewards)
    assert paid == [0.0, 0.0, first, 0.0, second]
    assert all(([*ids, EOS])[i + 1] == action for i, action in zip(states, actions, strict=True))


def test_a_state_is_the_prompt_that_will_be_decoded_from(chat_tokenizer):
    """What stands before a turn's first action is what the prompt of that turn is tokenised to."""
    messages = turns("ab", "cd", "e", "f")
    ids, states, _ = ilql_rlhf.encode_row(chat_tokenizer, {"messages": messages, "reward": 1.0})
    for start, i in ((0, 1), (3, 3)):
        assert ids[: states[start] + 1] == ilql_rlhf.encode_prompt(chat_tokenizer, messages[:i])


def test_prompt_and_completion_may_be_messages(chat_tokenizer):
    row = {"prompt": turns("ab", "cd", "e"), "completion": [{"role": "assistant", "content": "f"}], "reward": 1.0}
    rows, _ = encode([row], chat_tokenizer)
    assert spell(chat_tokenizer, rows[0][0]) == "UabAcd|UeAf" and spell(chat_tokenizer, rows[0][2]) == "f|"


def test_a_template_without_an_eos_gets_one_behind_each_turn(chat_tokenizer):
    chat_tokenizer.chat_template = TEMPLATE.replace("{{ eos_token }}", "")
    rows, _ = encode([{"messages": turns("ab", "cd", "e", "f"), "reward": 1.0}], chat_tokenizer)
    assert spell(chat_tokenizer, rows[0][0]) == "UabAcd|UeAf" and spell(chat_tokenizer, rows[0][2]) == "cd|f|"


def test_long_prompts_lose_their_start_and_no_row_its_end(tokenizer, chat_tokenizer, capsys):
    data = [{"prompt": prompt, "completion": "xyz", "reward": 0.5} for prompt in ("abc", "abcdefgh", "a")]
    rows, _ = encode(data + [{"prompt": "a", "completion": "abcdefgh", "reward": 1.0}], tokenizer, max_length=6)
    assert [spell(tokenizer, row[0]) for row in rows] == ["bcxyz", "ghxyz", "axyz"]
    for _, states, actions, rewards in rows:
        assert spell(tokenizer, actions) == "xyz|" and rewards == [0.0, 0.0, 0.0, 0.5]
        assert states == list(range(states[0], states[0] + 4))
    assert "left out 1 of 4 rows, longer than --max_length" in capsys.readouterr().out
    rows, _ = encode(data[:1], tokenizer, max_length=5)
    assert spell(tokenizer, rows[0][0]) == "cxyz"  # one token of the prompt stays: the first action's state
    with pytest.raises(utils.UserError, match="no row is left"):
        encode(data[:1], tokenizer, max_length=4)
    with pytest.raises(utils.UserError, match="no row is left"):  # a dialogue is never cut
        encode([{"messages": turns("abc", "d"), "reward": 1.0}], chat_tokenizer, max_length=6)


def test_rewards_are_floats_and_may_be_normalised(chat_tokenizer):
    data = [{"messages": turns("a", "b", "c", "d"), "reward": rewards} for rewards in ([0.5, 1.5], [-2.25, 4.0])]
    plain, _ = encode(data, chat_tokenizer)
    assert [[x for x in row[3] if x] for row in plain] == [[0.5, 1.5], [-2.25, 4.0]]
    scaled, statistics = encode(data, chat_tokenizer, normalize_rewards=True)
    given = torch.tensor([0.5, 1.5, -2.25, 4.0], dtype=torch.float64)
    mean, std = given.mean().item(), given.std(correction=0).item()
    assert statistics == pytest.approx({"reward_mean": mean, "reward_std": std})
    assert [x for row in scaled for x in row[3] if x] == pytest.approx([(x - mean) / std for x in given.tolist()])
    assert all(x == 0.0 for row in scaled for x in row[3][::2])  # where nothing is paid, nothing is subtracted
    with pytest.raises(utils.UserError, match="all rewards are equal"):
        encode([{"prompt": "a", "completion": "b", "reward": 0.1}] * 1000, chat_tokenizer, normalize_rewards=True)


def test_a_prompt_column_beside_messages_is_no_prompt_of_theirs(chat_tokenizer):
    data = {"messages": turns("a", "b", "c", "d"), "reward": [0.5, 1.5]}
    plain, _ = encode([data], chat_tokenizer)
    for prompt in ("abcdef", None, turns("a", "b")):
        assert encode([data | {"prompt": prompt}], chat_tokenizer)[0] == plain


def test_a_loss_of_weight_zero_cannot_spoil_the_others():
    """exp(beta * advantage) overflows; with awac_weight 0 nobody asked for it."""
    shape = (1, 2, 3)
    qs, target_qs, vs = [torch.zeros(shape, requires_grad=True)], [torch.full(shape, 400.0)], torch.zeros(1, 2)
    logits, actions = torch.zeros(shape, requires_grad=True), torch.zeros(1, 2, dtype=torch.long)
    mask = torch.ones(1, 2, dtype=torch.bool)
    inputs = (qs, target_qs, vs, vs, logits, actions, vs, ~mask, mask)
    losses = ilql_rlhf.ilql_loss(*inputs, tau=0.8, gamma=0.9, beta=1.0, cql_weight=0.1, awac_weight=0.0)
    assert losses["awac"] == INF and losses["total"].isfinite()
    losses["total"].backward()
    assert logits.grad is None and qs[0].grad.isfinite().all()


GOOD = {"prompt": "a", "completion": "b", "reward": 1.0}
DIALOGUE = {"messages": turns("a", "b", "c", "d"), "reward": [1.0, 2.0]}
BAD_ROWS = {
    "missing": ([GOOD, GOOD | {"reward": None}], "row 2: reward is None, which is not a finite number"),
    "not finite": ([GOOD, GOOD | {"reward": INF}], "row 2: reward is inf"),
    "not a number": ([GOOD, GOOD, GOOD | {"reward": NAN}], "row 3: reward is nan"),
    "a word": ([GOOD | {"reward": "good"}], "row 1: reward is 'good'"),
    "too few": ([DIALOGUE, DIALOGUE | {"reward": [1.0]}], "row 2: assistant turns: 2, but rewards: 1"),
    "too many": ([DIALOGUE | {"reward": [1.0] * 3}], "row 1: assistant turns: 2, but rewards: 3"),
    "one is missing": ([DIALOGUE | {"reward": [1.0, None]}], r"row 1: reward is \[1.0, None\]"),
    "no assistant": ([DIALOGUE, {"messages": turns("a"), "reward": [1.0]}], "row 2: no action token"),
    "no state": ([GOOD, {"prompt": "", "completion": "", "reward": 1.0}], "row 2: no action token or no prompt"),
    "no state of the first token": (
        [{"prompt": "", "completion": "b", "reward": 1.0}],
        "row 1: no action token or no prompt",
    ),
    "the agent speaks first": ([{"messages": turns("a", "b")[1:], "reward": 1.0}], "row 1: .*empty conversation"),
    "infinite in fp32": ([GOOD, GOOD | {"reward": 1e39}], r"row 2: reward is 1e\+39, which is not a finite number"),
    "a role": (
        [DIALOGUE, {"messages": [{"role": "judge", "content": "a"}, *turns("b", "c")], "reward": [1.0]}],
        "row 2: unknown role 'judge'; known are system, user, assistant and tool",
    ),
    "a role in a prompt": (
        [{"prompt": [{"role": "judge", "content": "a"}], "completion": "b", "reward": 1.0}],
        "row 1: unknown role 'judge'",
    ),
    "messages behind a text": (
        [{"prompt": "a", "completion": turns("b", "c"), "reward": 1.0}],
        "row 1: no action token",
    ),
    "a text for messages": ([{"messages": "a", "reward": 1.0}], "row 1: no action token"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named(name, chat_tokenizer):
    rows, message = BAD_ROWS[name]
    with pytest.raises(utils.UserError, match=f"rows.jsonl: {message}"):
        encode(rows, chat_tokenizer)


def test_a_template_that_rewrites_its_past_is_refused(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(utils.UserError, match="row 1: the chat template does not render"):
        encode([DIALOGUE], chat_tokenizer)


def test_collate():
    rows = [([5, 6, 7], [1, 2], [7, EOS], [0.0, 0.5]), ([5], [0], [EOS], [2.0])]
    batch = ilql_rlhf.collate_actions(rows, (3, 2), 3, "cpu")
    input_ids, attention_mask, states, actions, rewards, terminal, mask = (x.tolist() for x in batch)
    assert [ids[: sum(real)] for ids, real in zip(input_ids, attention_mask)][:2] == [[5, 6, 7], [5]]
    assert states == [[1, 2], [0, 0], [0, 0]] and actions[0] == [7, EOS] and actions[1][0] == EOS
    assert rewards[0] == [0.0, 0.5] and rewards[1][0] == 2.0
    assert terminal == [[False, True], [True, False], [False, False]]
    assert mask == [[True, True], [True, False], [False, False]]
    assert all(any(real) for real in attention_mask)  # an empty row still holds a token: attention needs one
    wide = ilql_rlhf.collate_actions(rows, (100, 100), 2, "cpu")
    assert wide[0].shape == (2, 8) and wide[2].shape == (2, 8)
    empty = ilql_rlhf.collate_actions([], (3, 2), 2, "cpu")
    assert empty[0].shape[0] == 2 and not empty[-1].any()


def test_mistakes_in_the_file_end_in_one_line(capsys, gpt2_folder, tmp_path):
    base = {"model": gpt2_folder, "output_dir": str(tmp_path / "run")}
    lines = [dict(GOOD), dict(GOOD) | {"reward": None}]
    refuses(
        capsys, "ilql_rlhf", base | {"dataset": write_jsonl(tmp_path / "a.jsonl", lines)}, r"a.jsonl: row 2: reward"
    )
    assert len(read_jsonl(tmp_path / "a.jsonl")) == 2
