"""Models of transformers behind dsmoe's evaluation: their own loss, routes counted, unknown code refused.

That a run and its export give the same numbers is shown with the real commands, in tests/end_to_end/test_evaluate.py.
"""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from dsmoe.checkpoint.restore import TrainedModel
from dsmoe.config import DataConfig
from dsmoe.data.dataset import heldout, open_corpus
from dsmoe.data.tokenizer import Tokenizer
from dsmoe.errors import CheckpointError, ConfigError, ConversionError, DataError
from dsmoe.hf.hosted import REMOTE, HostedModel, foreign_code
from dsmoe.inference.evaluate import EvaluationOptions, evaluate

LENGTH, VOCABULARY = 16, 320
SHAPE = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=LENGTH, bos_token_id=2, eos_token_id=2,
)  # fmt: skip
ROUTED = {"val_experts_per_token", "val_experts_per_token_by_layer"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A dataset folder whose held-out split is small."""
    from dsmoe.data.prepare import prepare

    folder = tmp_path_factory.mktemp("data")
    for number in range(10):
        (folder / f"{number}.txt").write_text(
            "".join(f"expert {number * line} of token {line}\n" for line in range(40))
        )
    prepare([str(folder)], folder / "data", vocab_size=300, valid_fraction=0.2, workers=1)
    return folder / "data"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A mixture of experts and a dense model, with random weights."""
    made = {}
    for name, kind, config in (
        ("mixtral", MixtralForCausalLM, MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=3)),
        ("llama", LlamaForCausalLM, LlamaConfig(**SHAPE)),
    ):
        torch.manual_seed(0)
        made[name] = tmp_path_factory.mktemp(name)
        kind(config).save_pretrained(made[name])
    return made


@pytest.mark.parametrize("name", ["mixtral", "llama"])
@pytest.mark.parametrize("batch_size", [3, 8])
def test_the_loss_of_a_hosted_model_is_its_own(name, batch_size, folders, data, groups):
    actual = evaluate(folders[name], EvaluationOptions(data=str(data), sequences=7, batch_size=batch_size))
    kind = MixtralForCausalLM if name == "mixtral" else LlamaForCausalLM
    model = kind.from_pretrained(folders[name])
    batch = heldout(open_corpus(DataConfig(path=str(data))), LENGTH, 7).batch(0, 7)
    with torch.no_grad():
        logits = model(batch["tokens"]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).item()
    assert actual["val_loss"] == pytest.approx(expected, abs=1e-6)
    assert (actual["sequences"], actual["sequence_length"], actual["dtype"]) == (7, LENGTH, "fp32")
    assert (actual.keys() >= ROUTED) == (name == "mixtral")
    if name == "mixtral":
        assert actual["val_experts_per_token_by_layer"] == [3.0, 3.0] and actual["val_experts_per_token"] == 3.0


def test_padding_counts_nowhere(folders, groups):
    """What a rank with nothing left reads."""
    model = HostedModel(folders["mixtral"], None, groups).eval()
    tokens = torch.zeros(2, LENGTH, dtype=torch.int64)
    padding = torch.zeros(2, LENGTH, dtype=torch.bool)
    padding[1] = True
    with torch.no_grad():
        _, parts = model(tokens, tokens, ~padding, padding)
        _, alone = model(tokens[:1], tokens[:1], ~padding[:1])
    totals = model.recorder.take()
    assert parts["lm"] == pytest.approx(alone["lm"].item(), abs=1e-6)
    assert totals.tokens == 2 * LENGTH and totals.counts_LE.sum(1).tolist() == [2 * LENGTH * 3] * 2
    assert totals.without_expert_L.tolist() == [0, 0]
    assert model.recorder.take() is None


def test_code_that_nobody_knows_is_refused(folders, tmp_path, groups):
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "model"))
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {"AutoModelForCausalLM": "modeling_dsmoe.DsmoeForCausalLM"}
    (folder / "config.json").write_text(json.dumps(settings))
    for path in REMOTE.glob("*.py"):
        shutil.copyfile(path, folder / path.name)
    assert foreign_code(folder) == []
    (folder / "modeling_dsmoe.py").write_text("raise SystemExit('this code ran')\n")
    with pytest.raises(ConversionError, match="not dsmoe's own .modeling_dsmoe.py.*--trust-remote-code"):
        HostedModel(folder, None, groups)
    with pytest.raises(SystemExit, match="this code ran"):  # it was allowed
        HostedModel(folder, None, groups, trust_remote_code=True)


def test_a_model_without_its_weights_is_refused(folders, tmp_path, groups):
    shutil.copyfile(folders["llama"] / "config.json", tmp_path / "config.json")
    with pytest.raises(ConversionError, match="cannot be loaded as a causal language model"):
        HostedModel(tmp_path, None, groups)
    shutil.copyfile(folders["mixtral"] / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match="do not fit its model: .*missing_keys"):
        HostedModel(tmp_path, None, groups)


def test_data_in_the_ids_of_another_tokenizer_is_refused(folders, data, tmp_path, groups):
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "model"))
    Tokenizer.load(data).copy_to(folder)
    assert evaluate(folder, EvaluationOptions(data=str(data), sequences=1))["sequences"] == 1
    Tokenizer.train(["other words entirely"] * 30, tmp_path / "other.model", 280).copy_to(folder)
    with pytest.raises(DataError, match="made with another tokenizer .*--tokenizer"):
        evaluate(folder, EvaluationOptions(data=str(data), sequences=1))


def test_all_mistakes_are_named_before_anything_is_loaded(folders, tmp_path):
    options = EvaluationOptions(sequences=0, batch_size=0, task_dir=str(tmp_path / "none"))
    with pytest.raises(ConfigError) as caught:
        evaluate(folders["llama"], options)
    for said in ("--sequences: found 0", "--batch-size: found 0", "--task-dir: there is no folder", "--data:"):
        assert said in str(caught.value)
    with pytest.raises(ConfigError, match="tasks are run on a Hugging Face model.*dsmoe export"):
        evaluate(tmp_path, EvaluationOptions(tasks=("any",)))
    with pytest.raises(CheckpointError, match="neither a run that has a checkpoint nor a checkpoint"):
        TrainedModel.load(tmp_path)


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm-eval is installed here")
def test_without_the_harness_the_command_that_installs_it_is_named(folders):
    with pytest.raises(ConfigError, match=r"No module named 'lm_eval'; install .*\.\[evaluate\]"):
        evaluate(folders["llama"], EvaluationOptions(tasks=("any",)))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install -e '.[evaluate]'")
def test_a_task_of_ones_own_runs_without_a_network(folders, data, tmp_path, groups, monkeypatch):
    """Its score is what the model's own loss says."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    # What HF_HUB_OFFLINE=1 sets in a process that starts with it.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "model"))
    library = ByteLevelBPETokenizer()
    library.train_from_iterator(["plain words"] * 9, vocab_size=300, special_tokens=["<e>"], show_progress=False)
    library.save(str(tmp_path / "t.json"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "t.json"), bos_token="<e>", eos_token="<e>")
    tokenizer.save_pretrained(folder)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "lines.jsonl").write_text(json.dumps({"text": "ten words"}) + "\n")
    (tasks / "lines.yaml").write_text(
        "task: lines\ndataset_path: json\ndataset_kwargs: {data_files: {test: lines.jsonl}}\ntest_split: test\n"
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    actual = evaluate(folder, EvaluationOptions(tasks=("lines",), task_dir=str(tasks)))
    ids = tokenizer("ten words", add_special_tokens=False).input_ids
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(folder)(torch.tensor([[0, *ids[:-1]]])).logits[0]
    bits = F.cross_entropy(logits, torch.tensor(ids), reduction="sum") / torch.log(torch.tensor(2.0))
    assert actual["tasks"]["lines"]["bits_per_byte,none"] == pytest.approx(bits.item() / len("ten words"), rel=1e-5)
    with pytest.raises(ConfigError, match="there is no task 'absent'"):
        evaluate(folder, EvaluationOptions(tasks=("absent",), task_dir=str(tasks)))
