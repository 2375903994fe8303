"""transformers' own tests of a model, on the code that travels with an export.

    python tests/unit/hf/transformers_suite.py TESTS ROUTER [pytest arguments]

TESTS is the folder `tests` of transformers' source distribution; ROUTER is a key of `ROUTERS`. The source distribution
leaves out the mixins for generation and export, which test_remote_model.py and test_remote_citizen.py cover.
"""

from __future__ import annotations

import os
import sys
import types
import unittest.mock
from pathlib import Path

import pytest

ROUTERS = {
    "topk": {"name": "topk", "k": 2, "softmax": "before", "renormalize": True},
    "relu": {"name": "relu", "k": 2.0},
    "routing_free": {"name": "routing_free", "form": "paper", "threshold": 0.0},
}
# Of the tester and not of the model: one wants the mixin that is not there, one counts calls of an interface that takes
# a fixed number of experts per token.
NOT_OURS = ["test_generation_tester_mixin_inheritance"]
NOT_OF_VARIABLE_K = ["test_eager_matches_batched_and_grouped_inference"]


def main(tests: Path, router: str, arguments: list[str]) -> int:
    package = types.ModuleType("tests")
    package.__path__ = [str(tests)]
    sys.modules["tests"] = package
    for name, mixin in (
        ("tests.generation.test_utils", "GenerationTesterMixin"),
        ("tests.exporters.test_export", "ExportTesterMixin"),
    ):
        sys.modules[name.rpartition(".")[0]] = types.ModuleType(name.rpartition(".")[0])
        sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[name], mixin, type(mixin, (), {}))
    os.environ["DSMOE_SUITE_ROUTER"] = router
    excluded = NOT_OURS + ([] if router == "topk" else NOT_OF_VARIABLE_K)
    return pytest.main(
        ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--noconftest", "-W", "ignore", "-o", "addopts=",
         "-k", " and ".join(f"not {name}" for name in excluded), *arguments, f"{__file__}::TestDsmoe"]
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))


import torch  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, ids_tensor  # noqa: E402

from dsmoe.hf.remote.configuration_dsmoe import DsmoeConfig  # noqa: E402
from dsmoe.hf.remote.modeling_dsmoe import DsmoeForCausalLM, DsmoeModel  # noqa: E402


class Tester:
    """What the mixin asks about the model: names and numbers are transformers'."""

    batch_size, seq_length, vocab_size = 3, 7, 99
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    is_training = True

    def __init__(self, router: str):
        self.router = router

    def config(self) -> DsmoeConfig:
        return DsmoeConfig(
            vocab_size=self.vocab_size, hidden_size=self.hidden_size, intermediate_size=64,
            num_hidden_layers=self.num_hidden_layers, num_attention_heads=self.num_attention_heads,
            num_key_value_heads=2, head_dim=8, num_experts=4, moe_intermediate_size=16,
            shared_expert_intermediate_size=16, expert_rank=8 if self.router == "routing_free" else 0,
            router=ROUTERS[self.router], num_experts_per_tok=2 if self.router == "topk" else None,
            max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self):
        tokens = ids_tensor([self.batch_size, self.seq_length], self.vocab_size).clamp(min=2)
        return self.config(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


class TestDsmoe(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (DsmoeModel, DsmoeForCausalLM)
    pipeline_model_mapping = {}
    has_attentions = True

    def setUp(self):
        self.model_tester = Tester(os.environ["DSMOE_SUITE_ROUTER"])

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """transformers knows which of its own classes take labels."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is DsmoeForCausalLM:
            inputs["labels"] = inputs["input_ids"].clone()
        return inputs

    def test_training(self):
        with self.only_the_language_model():
            super().test_training()

    def check_training_gradient_checkpointing(self, *args, **kwargs):
        with self.only_the_language_model():
            super().check_training_gradient_checkpointing(*args, **kwargs)

    def only_the_language_model(self):
        return unittest.mock.patch.object(self, "all_model_classes", (DsmoeForCausalLM,))
