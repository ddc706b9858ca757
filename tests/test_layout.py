"""One layout of sequences: padding on the right, no mask and no position ids, in every family.

What the scripts compute on a packed batch is compared with single rows that have no padding. The
definitions are plain calls of the library's models.
"""

import functools

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPTNeoConfig,
    GraniteConfig,
    LlamaConfig,
)

import utils
from conftest import FAMILIES, GROUPED, SMALL
from ppo_rlhf import Actor, ActorCritic, generate, last_token_scores, token_logprobs

PAD = 0
EOS = 1
VOCABULARY = 32
TEMPERATURE = 0.7

# Prompts and responses of uneven lengths; the longest row has 17 tokens, and the sliding windows of
# the families have 4.
PROMPTS = [[5], [6, 7, 8, 9, 10, 11, 12, 2, 30], [9, 3, 9], [14, 15, 16, 17, 2]]
RESPONSES = [[7, 7, 21, 3, 4, 5, 6, 8], [20, 22, 23, 25, 2, 3, 4, EOS], [EOS], [13, 12, EOS]]

WIDTH = max(len(p + r) for p, r in zip(PROMPTS, RESPONSES, strict=True))
R = max(map(len, RESPONSES))


def cases():
    """Each family with both kinds of attention that the scripts run on; two families are fast."""
    found = []
    for config in FAMILIES:
        name = config.model_type
        for attention in ("eager", "sdpa"):
            if attention == "sdpa" and name in ("gemma2", "gpt_oss"):
                continue  # The library has no fused kernel for attention with a cap or with sinks.
            mark = pytest.mark.fast if name in ("gpt2", "llama") else pytest.mark.slow
            found.append(pytest.param(config, attention, marks=mark, id=f"{name}-{attention}"))
    return found


in_every_family = pytest.mark.parametrize(("config", "attention"), cases())


def load(kind, config, attention, folder, seed=0):
    """A model with random weights, loaded as the scripts load theirs."""
    config.save_pretrained(folder)
    torch.manual_seed(seed)
    options = {"num_labels": 1} if kind is AutoModelForSequenceClassification else {}
    model, _ = utils.load_pretrained(kind, str(folder), **options)
    model.set_attn_implementation(attention)
    return model


def packed_batch():
    """input_ids (B,T), prompt_lengths (B,), responses and mask (B,R), as of a rollout."""
    rows = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    return {
        "input_ids": utils.pad_right(rows, EOS),
        "prompt_lengths": torch.tensor([len(prompt) for prompt in PROMPTS]),
        "responses": utils.pad_right(RESPONSES, EOS),
        "mask": utils.pad_right([[True] * len(response) for response in RESPONSES], False),
    }


def allowed_ids():
    allowed = torch.ones(VOCABULARY, dtype=torch.bool)
    allowed[PAD] = False
    return allowed


def definitions(policy, critic, prompt, response):
    """(logprobs, entropy, values), each (r,), of one row alone."""
    ids = torch.tensor([prompt + response])
    before = slice(len(prompt) - 1, -1)
    logits = policy(ids).logits[0, before] / TEMPERATURE
    logits = logits.masked_fill(~allowed_ids(), -torch.inf)
    all_logprobs = torch.log_softmax(logits, dim=-1)
    logprobs = all_logprobs.gather(1, torch.tensor(response)[:, None])[:, 0]
    possible = all_logprobs[:, allowed_ids()]
    entropy = -(possible.exp() * possible).sum(-1)
    hidden = critic.base_model(ids).last_hidden_state[0, before]
    return logprobs, entropy, critic.score(hidden)[:, 0]


def assert_close(ours, theirs, what):
    """Equal within 1e-5 of the largest entry, or of 1."""
    error = (ours - theirs).abs().max().item()
    scale = max(theirs.abs().max().item(), 1.0)
    assert error <= 1e-5 * scale, f"{what}: {error} of {scale}"


@in_every_family
def test_a_packed_batch_is_its_rows_alone(config, attention, tmp_path):
    """Log-probabilities, entropies, values, and the gradients of a weighted sum of them."""
    policy = load(AutoModelForCausalLM, config, attention, tmp_path / "policy")
    critic = load(
        AutoModelForSequenceClassification, config, attention, tmp_path / "critic", seed=1
    )
    logprobs_fn = functools.partial(token_logprobs, temperature=TEMPERATURE, allowed=allowed_ids())
    actor_critic = ActorCritic(Actor(policy, logprobs_fn), critic)
    parameters = [x for x in actor_critic.parameters() if x.requires_grad]
    batch = packed_batch()
    mask = batch["mask"]
    weights = torch.randn(3, *mask.shape)

    output = actor_critic(batch)
    parts = torch.stack([output["logprobs"], output["entropy"], output["values"]])
    total = torch.where(mask, weights * parts, 0.0).sum()
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)

    expected_total = 0
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        length = len(response)
        expected = torch.stack(definitions(policy, critic, prompt, response))
        assert_close(parts[:, i, :length], expected, f"row {i}")
        expected_total = expected_total + (weights[:, i, :length] * expected).sum()
    expected_gradients = torch.autograd.grad(expected_total, parameters, allow_unused=True)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert_close(ours, theirs, "a gradient")


@in_every_family
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_scores_are_those_of_the_rows_alone(side, config, attention, tmp_path):
    """Whatever the padding's side and ids; the score itself is the library's."""
    model = load(AutoModelForSequenceClassification, config, attention, tmp_path)
    rows = [prompt + response[:-1] for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    for padding in (PAD, EOS, 9):
        if side == "left":
            input_ids, mask = utils.left_pad(rows, WIDTH, padding, "cpu")
        else:
            input_ids = utils.pad_right(rows, padding)
            mask = utils.pad_right([[True] * len(row) for row in rows], False)
        scores = last_token_scores(model, input_ids, mask)
        expected = torch.cat([model(torch.tensor([row])).logits[0] for row in rows])
        assert_close(scores, expected, "scores")


@torch.no_grad()
def slow_response(policy, prompt, uniforms):
    """Without cache, mask and padding: the whole sequence is read again for every token."""
    ids = list(prompt)
    for u in uniforms:
        logits = policy(torch.tensor([ids])).logits[0, -1].double()
        logits = logits.masked_fill(~allowed_ids(), -torch.inf)
        cumulative = torch.softmax(logits / TEMPERATURE, dim=-1).cumsum(0)
        ids.append(int((cumulative <= u * cumulative[-1]).sum()))
    return ids[len(prompt) :]


@in_every_family
def test_generate_samples_what_the_whole_sequences_give(config, attention, tmp_path):
    """With a new cache, and twice with one that is used again."""
    policy = load(AutoModelForCausalLM, config, attention, tmp_path)
    longest = max(map(len, PROMPTS)) + 2
    queries, query_mask = utils.left_pad(PROMPTS, longest, PAD, "cpu")
    uniforms = torch.rand(len(PROMPTS), R, generator=torch.Generator().manual_seed(3))
    no_stop = [VOCABULARY]
    cache = utils.static_cache(policy.config, longest + R)
    expected = []
    for prompt, row in zip(PROMPTS, uniforms.double(), strict=True):
        expected.append(slow_response(policy, prompt, row))
    assert len({tuple(response) for response in expected}) == len(PROMPTS)
    for reused in (None, cache, cache):
        responses = generate(
            policy,
            queries,
            query_mask,
            uniforms,
            TEMPERATURE,
            no_stop,
            PAD,
            allowed=allowed_ids(),
            cache=reused,
        )
        assert responses.tolist() == expected


# --------------------------------------------------------------------------------------------------
# What is refused when a model is loaded


@in_every_family
def test_every_family_is_accepted(config, attention, tmp_path):
    policy = load(AutoModelForCausalLM, config, attention, tmp_path)
    utils.check_right_padding(policy, "folder")
    utils.check_decoding(policy, WIDTH, "folder")


@pytest.mark.fast
@pytest.mark.parametrize("seed", range(3))
def test_a_bidirectional_model_is_refused(seed, tmp_path):
    """A row's padding would reach its score."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = BertConfig(**sizes, intermediate_size=32, **SMALL)
    llama = LlamaConfig(**GROUPED, is_causal=False, **SMALL)
    for config in (bert, llama):
        with pytest.raises(utils.UserError, match=f"{tmp_path}: not a causal model") as caught:
            load(AutoModelForSequenceClassification, config, "eager", tmp_path, seed)
        assert "\n" not in str(caught.value)


def gpt_neo(window):
    return GPTNeoConfig(
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=window,
        max_position_embeddings=64,
        **SMALL,
    )


@pytest.mark.fast
@pytest.mark.parametrize("seed", range(3))
def test_gpt_neo_is_refused_where_its_window_is_shorter_than_a_row(seed, tmp_path):
    """Its local layers look back from the end of the cache, and not from the token."""
    short = load(AutoModelForCausalLM, gpt_neo(4), "eager", tmp_path / "short", seed)
    with pytest.raises(utils.UserError, match="--model folder: its attention or its logits"):
        utils.check_decoding(short, WIDTH, "folder")
    long = load(AutoModelForCausalLM, gpt_neo(32), "eager", tmp_path / "long", seed)
    utils.check_decoding(long, WIDTH, "folder")


@pytest.mark.fast
def test_a_model_that_scales_its_logits_is_refused(tmp_path):
    """The scripts compute logits from hidden states with the head alone."""
    scaled = GraniteConfig(**GROUPED, logits_scaling=4.0, **SMALL)
    policy = load(AutoModelForCausalLM, scaled, "eager", tmp_path)
    with pytest.raises(utils.UserError, match="its attention or its logits"):
        utils.check_decoding(policy, WIDTH, "folder")
