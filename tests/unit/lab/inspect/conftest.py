"""Tiny models of every kind that can be inspected, with drawn weights and one tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from commands import forked

from dsmoe.checkpoint.write import write_weights
from dsmoe.config import validate_config
from dsmoe.data.prepare import prepare
from dsmoe.data.tokenizer import Tokenizer
from dsmoe.hf import parity
from dsmoe.model.skeleton import logical_shapes
from dsmoe.routers import get
from dsmoe.routers.registry import option_classes

VOCABULARY, CONTEXT, EXPERTS, HIDDEN = 300, 32, 4, 32
COMMON = dict(
    vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=CONTEXT, bos_token_id=None, eos_token_id=2, pad_token_id=None,
)  # fmt: skip
NATIVE = {
    "mixtral": lambda: transformers.MixtralConfig(
        **COMMON, num_local_experts=EXPERTS, num_experts_per_tok=2, intermediate_size=16
    ),
    "olmoe": lambda: transformers.OlmoeConfig(
        **COMMON, num_experts=EXPERTS, num_experts_per_tok=2, intermediate_size=16
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **COMMON, num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=16, intermediate_size=24,
        head_dim=8, mlp_only_layers=[0], norm_topk_prob=True,
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Tokenizer:
    texts = [f"The token {n} goes to expert {n % 7} of layer {n % 5}, and nowhere else.\n" for n in range(400)]
    return Tokenizer.train(texts, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", VOCABULARY)


@pytest.fixture(scope="session")
def run_of(tmp_path_factory, groups, tokenizer) -> Callable[..., Path]:
    """A run folder with one checkpoint of drawn weights, by router and its options."""
    made: dict[str, Path] = {}

    def make(router: str, **options) -> Path:
        key = f"{router}{options}"
        if key in made:
            return made[key]
        model = dict(
            num_layers=2, hidden_size=HIDDEN, num_attention_heads=2, sequence_length=CONTEXT, num_experts=EXPERTS,
            moe_ffn_hidden_size=16, vocab_size=VOCABULARY, init_std=0.3,
        )  # fmt: skip
        tree = {"model": model, "router": {"name": router, **options}, "data": {"path": "nowhere"}}
        config = validate_config(tree, option_classes())
        shapes = logical_shapes(config.model, config.router)
        generator = torch.Generator().manual_seed(1)
        tensors = (
            (name, 0.3 * torch.randn(shape, generator=generator) + (1.0 if len(shape) == 1 else 0.0))
            for name, shape in shapes.items()
        )
        router_class = get(router)
        controller = router_class.make_controller(
            router_class.Options.model_validate(config.router.options), 2, EXPERTS
        )
        folder = tmp_path_factory.mktemp("runs") / router
        folder.mkdir()
        write_weights(folder, config, shapes, tensors, None if controller is None else controller.state)
        tokenizer.copy_to(folder)
        made[key] = folder
        return folder

    return make


@pytest.fixture(scope="session")
def native_of(tmp_path_factory, groups, tokenizer) -> Callable[[str], Path]:
    """A folder of transformers, by architecture."""
    made: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in made:
            transformers.utils.logging.disable_progress_bar()
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(NATIVE[architecture]())
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(std=0.3) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
            made[architecture] = tmp_path_factory.mktemp("native") / architecture
            model.save_pretrained(made[architecture])
            tokenizer.copy_to(made[architecture])
        return made[architecture]

    return make


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, tokenizer) -> Iterator[Path]:
    """Text that exports are checked on, and observers that are forked: each would import for seconds."""
    texts, folder = tmp_path_factory.mktemp("texts"), tmp_path_factory.mktemp("prepared") / "dataset"
    for number in range(8):
        (texts / f"{number}.txt").write_text(f"The token {number} goes to expert {number % 7} of layer 2.\n" * 20)
    prepare([str(texts)], folder, tokenizer=tokenizer.path, valid_fraction=0.3, workers=1)

    def run_observer(arguments: list[str], environment: dict[str, str]) -> tuple[int, str]:
        done = forked(str(parity.OBSERVE), *arguments, environment=environment, without="dsmoe")
        return done.code, done.output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "run_observer", run_observer)
        yield folder
