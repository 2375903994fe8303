"""Text token by token: what the cache gives is what the model says of the whole window, for every router."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dsmoe.config import validate_config
from dsmoe.inference.generate import Generator, Reader, Sampling, window_start
from dsmoe.model.gpt import LanguageModel
from dsmoe.routers import available, get
from dsmoe.routers.registry import option_classes

ROUTERS = [name for name, router in available().items() if router.__module__.startswith("dsmoe.")]
SIZE, VOCABULARY = 12, 40
SHAPE = dict(
    num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, sequence_length=SIZE, num_experts=4,
    vocab_size=VOCABULARY, moe_ffn_hidden_size=16, init_std=0.15, tie_embeddings=False,
)  # fmt: skip


def build(groups, router: str, **more) -> LanguageModel:
    """A model whose weights are large enough that every token of the window moves the logits."""
    config = validate_config({"model": SHAPE | more, "router": {"name": router}}, option_classes())
    options = get(router).Options.model_validate(config.router.options)
    return LanguageModel(config.model, (get(router), options), groups, seed=3).eval()


@torch.no_grad()
def without_cache(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([ids[window_start(len(ids), SIZE) :]]))[0, -1]
    model.recorder.take()
    return logits


def text(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def check_logits(model: LanguageModel, prompt: int, until: int, step: int = 1) -> None:
    ids, reader = text(until), Reader(model)
    for count in range(prompt, until + 1, step):
        torch.testing.assert_close(reader.logits(ids[:count]), without_cache(model, ids[:count]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("router", ROUTERS)
def test_logits_and_greedy_tokens_are_those_without_a_cache(groups, router):
    """Beyond the sequence length too: 12 tokens fit, and the text has 35."""
    model = build(groups, router)
    check_logits(model, prompt=4, until=30)
    eod = VOCABULARY  # none of the ids: the text goes on
    generator = Generator(model, SimpleNamespace(vocab_size=VOCABULARY, eod_id=eod))
    expected = text(5)
    for _ in range(30):
        expected.append(int(without_cache(model, expected).argmax()))
    assert list(generator.ids(text(5), Sampling(tokens=30, temperature=0))) == expected[5:]


@pytest.mark.parametrize("more", [{"qk_layernorm": True}, {"num_query_groups": None}], ids=str)
def test_other_attention_too(groups, more):
    check_logits(build(groups, "relu", **more), prompt=1, until=2 * SIZE)


def test_several_tokens_at_once_do_not_see_each_others_future(groups):
    check_logits(build(groups, "topk"), prompt=3, until=SIZE, step=3)


def test_the_whole_window_moves_the_logits(groups):
    """What the comparisons above rest on: a model that ignored its past would pass them."""
    model, ids = build(groups, "relu"), text(SIZE)
    for position in range(SIZE):
        other = [*ids[:position], (ids[position] + 1) % VOCABULARY, *ids[position + 1 :]]
        assert (without_cache(model, other) - without_cache(model, ids)).abs().max() > 1e-3, position


def test_every_token_is_computed_once_until_the_window_is_full(groups):
    model, ids, lengths = build(groups, "relu"), text(25), []
    with torch.no_grad():
        model.gpt.embedding.register_forward_pre_hook(lambda *call: lengths.append(call[2]["input_ids"].size(1)),
                                                      with_kwargs=True)  # fmt: skip
        reader = Reader(model)
        for count in range(5, 26):
            reader.logits(ids[:count])
    # 5 tokens, then one after another; a full window of 12 continues with its newer 6 and the new token.
    assert lengths == [5, *[1] * 7, 7, *[1] * 5, 7, *[1] * 5, 7]


def test_a_pass_outside_the_block_stands_alone(groups):
    model, ids = build(groups, "relu"), text(8)
    expected = without_cache(model, ids)
    Reader(model).logits(text(5, seed=1))
    assert torch.equal(without_cache(model, ids), expected)


@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_the_window_slides_by_halves(size):
    starts = [window_start(length, size) for length in range(1, 60)]
    for length, start in enumerate(starts, 1):
        assert 0 < length - start <= size and start % max(1, size // 2) == 0
        assert start == 0 if length <= size else length - start > size - max(1, size // 2)
    assert starts == sorted(starts)


def test_temperature_zero_ignores_the_seed_and_others_do_not(groups):
    generator = Generator(build(groups, "topk"), SimpleNamespace(vocab_size=VOCABULARY, eod_id=VOCABULARY))

    def written(temperature: float, seed: int) -> list[int]:
        return list(generator.ids(text(5), Sampling(tokens=12, temperature=temperature, seed=seed)))

    assert written(0, 1) == written(0, 2)
    assert written(1.0, 1) == written(1.0, 1) != written(1.0, 2)
