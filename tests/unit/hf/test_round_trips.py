"""What users do to an export with transformers or peft comes back by `import`, and the import says what was lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from test_exporting import dataset, made_up_run  # noqa: F401
from test_importing import add_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dsmoe.checkpoint.load import CheckpointReader
from dsmoe.checkpoint.restore import TrainedModel
from dsmoe.config import load_config
from dsmoe.data.tokenizer import Tokenizer
from dsmoe.errors import CheckpointError, ConversionError
from dsmoe.hf.export import ExportOptions, export
from dsmoe.hf.importing import ImportOptions, import_model
from dsmoe.routers import get
from dsmoe.routers.registry import option_classes

pytestmark = pytest.mark.slow
ROUTERS = {  # of each kind of controller, and experts that score themselves
    "topk_bias": {"k": 2}, "relu": {"k": 2}, "dtop_p": {"k": 2}, "quantile": {"k": 2}, "expert_threshold": {"k": 2},
    "aoe": {"k": 2, "rank": 8}, "routing_free": {"rank": 8, "threshold": 0.5},
}  # fmt: skip
of_relu = pytest.mark.parametrize("exported", ["relu"], indirect=True)
TOKENS = torch.randint(0, 310, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def exports(tmp_path_factory, dataset, groups) -> Callable[[str], tuple[Path, Path]]:  # noqa: F811
    @cache
    def export_of(router: str) -> tuple[Path, Path]:
        place = tmp_path_factory.mktemp("exported")
        made_up_run(place / "run", dataset, {"name": router, **ROUTERS[router]})
        export(place / "run", place / "hf", ExportOptions(license="mit"))
        return place / "run", place / "hf"

    return export_of


@pytest.fixture
def exported(request, exports) -> tuple[Path, Path]:
    """A run and its export."""
    return exports(request.param)


def load(folder: Path, kind=AutoModelForCausalLM, **options):
    return kind.from_pretrained(folder, trust_remote_code=True, **options)


def train_a_little(model) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def fine_tuned(model, folder: Path):
    train_a_little(model)
    model.save_pretrained(folder)
    return model


def merged(model, folder: Path):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    train_a_little(adapted)
    result = adapted.merge_and_unload()
    result.save_pretrained(folder)
    return result


def resized(model, folder: Path):
    model.resize_token_embeddings(328)
    model.save_pretrained(folder)
    return model


def grown(model, folder: Path):
    """Saved over a copy of the export, where the tokenizer's first file stays."""
    shutil.copytree(model.name_or_path, folder)
    tokenizer = tokenizer_of(folder)
    tokenizer.add_tokens([f"<tool {number}>" for number in range(328 - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    return resized(model, folder)


def untied(model, folder: Path):
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(1.5 * model.lm_head.weight.detach())
    train_a_little(model)
    model.save_pretrained(folder)
    return model


def cast(model, folder: Path, dtype: torch.dtype = torch.bfloat16):
    model.to(dtype).save_pretrained(folder)
    return model.float()


WAYS = {
    "fine-tuned": fine_tuned, "merged": merged, "resized": resized, "grown": grown, "untied": untied, "cast": cast,
    "cast to float16": partial(cast, dtype=torch.float16),
}  # fmt: skip
CASES = [("fine-tuned", router) for router in ROUTERS] + [
    ("merged", "topk_bias"), ("merged", "routing_free"), ("resized", "aoe"), ("grown", "relu"), ("untied", "relu"),
    ("cast", "topk_bias"), ("cast", "dtop_p"), ("cast", "quantile"), ("cast", "expert_threshold"),
    ("cast to float16", "topk_bias"), ("cast to float16", "dtop_p"), ("cast to float16", "routing_free"),
]  # fmt: skip


@pytest.mark.parametrize(("way", "exported"), CASES, indirect=["exported"])
def test_it_comes_back(groups, exported, tmp_path, way):
    """Held to what transformers computes: here, and by the import itself."""
    _, hf = exported
    model = WAYS[way](load(hf), tmp_path / "hf").eval()
    report = import_model(tmp_path / "hf", tmp_path / "back", ImportOptions())
    with torch.no_grad():
        torch.testing.assert_close(
            TrainedModel.load(tmp_path / "back").model(TOKENS), model(TOKENS).logits, rtol=1e-4, atol=1e-4
        )
    assert report["parity"]["gate"] and report["base_model"] == "hf"
    lost = "\n".join(report["lost"])
    config = load_config(tmp_path / "back" / "config.yaml", routers=option_classes())
    router = get(config.router.name)
    controller = router.make_controller(router.Options.model_validate(config.router.options), 2, 4)
    without_state = controller is not None and way != "grown"  # which keeps the export's other files
    assert ("the router's controller (training_state.json)" in lost) == without_state
    assert ("begins anew" in lost) == (without_state and router.name in ("relu", "routing_free"))
    assert ("beyond bfloat16" in lost, "beyond float16" in lost) == (way == "cast", way == "cast to float16")
    assert config.model.vocab_size == (328 if way in ("resized", "grown") else 320)
    assert config.model.tie_embeddings == (way != "untied")
    if way == "grown":
        own, theirs = Tokenizer.load(Path(config.data.tokenizer)), tokenizer_of(tmp_path / "hf")
        assert own.vocab_size == len(theirs) == 328 and own.decode([327]) == theirs.decode([327])
        assert own.path == tmp_path / "back" / "tokenizer.json"


@pytest.mark.parametrize("exported", ["topk_bias", "relu", "dtop_p", "quantile", "expert_threshold"], indirect=True)
def test_the_controller_continues_from_what_the_weights_hold(groups, exported, tmp_path):
    run, hf = exported
    load(hf).save_pretrained(tmp_path / "hf")
    import_model(tmp_path / "hf", tmp_path / "back", ImportOptions(check=False))
    folders = run / "checkpoints" / "step_00000000", tmp_path / "back" / "checkpoints" / "step_00000000"
    before, after = (CheckpointReader(folder).controller_state() for folder in folders)
    name = load_config(tmp_path / "back" / "config.yaml", routers=option_classes()).router.name
    if name == "relu":
        assert after["lambda"] == torch.tensor(1e-8)
    elif name in ("quantile", "expert_threshold"):
        models = [TrainedModel.load(place).model for place in (run, tmp_path / "back")]
        values = [torch.stack([model.controller.value_E(layer) for layer in range(2)]) for model in models]
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-6)
    else:
        key = {"topk_bias": "bias", "dtop_p": "p"}[name]
        assert torch.equal(before[key], after[key])


@of_relu
def test_a_trainers_folder_counts_as_fine_tuning(groups, exported, tmp_path):
    run, hf = exported
    model = load(hf)
    arguments = transformers.TrainingArguments(
        tmp_path / "out", max_steps=3, per_device_train_batch_size=2, save_steps=3, report_to=[], use_cpu=True,
        disable_tqdm=True, learning_rate=1e-3,
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer_of(hf))
    trainer.train()
    report = import_model(tmp_path / "out" / "checkpoint-3", tmp_path / "back", ImportOptions())
    assert any("optimizer's state of transformers' Trainer" in what for what in report["lost"])
    config = load_config(tmp_path / "back" / "config.yaml", routers=option_classes())
    assert config.data.tokenizer == str(tmp_path / "back" / "tokenizer.json")
    export(tmp_path / "back", tmp_path / "again", ExportOptions(data=made_from(run)))
    card = (tmp_path / "again" / "README.md").read_text()
    assert "Fine-tuned from `checkpoint-3`: 0 optimizer steps and 3 with transformers before" in card


def tokenizer_of(folder: Path):
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def made_from(run: Path) -> str:
    """The dataset of a made-up run."""
    return CheckpointReader(run / "checkpoints" / "step_00000000").manifest.config["data"]["path"]


@of_relu
def test_a_classifier_leaves_its_head(groups, exported, tmp_path):
    _, hf = exported
    model = load(hf, AutoModelForSequenceClassification, num_labels=3)
    model.save_pretrained(tmp_path / "hf")
    report = import_model(tmp_path / "hf", tmp_path / "back", ImportOptions(check=False))
    assert report["left_out"] == ["score.weight"] and any("head of a classifier" in what for what in report["lost"])
    with torch.no_grad():
        actual = TrainedModel.load(tmp_path / "back").model(TOKENS)
        torch.testing.assert_close(actual, load(hf)(TOKENS).logits, rtol=1e-4, atol=1e-4)
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "untied")
    with pytest.raises(CheckpointError, match="missing: 1 tensor .lm_head.weight"):
        import_model(tmp_path / "untied", tmp_path / "no", ImportOptions(check=False))


@of_relu
def test_an_adapter_alone_says_how_to_merge_it(exported, tmp_path):
    from peft import LoraConfig, get_peft_model

    _, hf = exported
    get_peft_model(load(hf), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConversionError, match="an adapter without its model; merge it first: .*merge_and_unload"):
        import_model(tmp_path / "adapter", tmp_path / "run", ImportOptions())


# Identity.

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def chat_model(tmp_path) -> Path:
    """A Mixtral with special tokens, a chat template and a licence."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=32, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2,
        bos_token_id=258, eos_token_id=256, pad_token_id=257, initializer_range=0.2, sliding_window=None,
    )  # fmt: skip
    folder = tmp_path / "models--someone--chat-moe" / "snapshots" / "0"
    folder.mkdir(parents=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    add_tokenizer(folder, 4)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "bos_token": "<start>"})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    front = {"license": "apache-2.0", "language": ["en", "de"]}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\n\n# Chat\n")
    return folder


def test_a_fine_tuned_import_keeps_its_identity(groups, chat_model, dataset, tmp_path, monkeypatch):  # noqa: F811
    before = AutoTokenizer.from_pretrained(chat_model)
    ids = {name: getattr(before, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name in ("config.json", "generation_config.json"):
        content = json.loads((chat_model / name).read_text())
        (chat_model / name).write_text(json.dumps(content | ids))
    report = import_model(chat_model, tmp_path / "run", ImportOptions())
    assert report["base_model"] == "someone/chat-moe" and report["lost"] == []
    from dsmoe.data.prepare import prepare

    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number}.txt").write_text(f"The router sends token {number} to the experts.\n" * 30)
    prepare([str(texts)], tmp_path / "data", tokenizer=str(tmp_path / "run" / "tokenizer.json"), workers=1)
    export(tmp_path / "run", tmp_path / "out", ExportOptions(format="mixtral", data=str(tmp_path / "data")))
    after = AutoTokenizer.from_pretrained(tmp_path / "out")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template", "all_special_tokens"):
        assert getattr(after, name) == getattr(before, name), name
    chat = [{"role": "user", "content": "which expert?"}]
    assert after.apply_chat_template(chat, tokenize=False) == before.apply_chat_template(chat, tokenize=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for ids in (model.config, model.generation_config):
        assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (
            before.bos_token_id, before.eos_token_id, before.pad_token_id
        )  # fmt: skip
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---\n")[1])
    assert (front["license"], front["language"], front["base_model"]) == (
        "apache-2.0",
        ["en", "de"],
        "someone/chat-moe",
    )
    assert "Fine-tuned from `someone/chat-moe`: 0 optimizer steps" in (tmp_path / "out" / "README.md").read_text()
    export(tmp_path / "run", tmp_path / "other", ExportOptions(data=str(tmp_path / "data"), license="mit"))
    assert "license: mit" in (tmp_path / "other" / "README.md").read_text()


def test_a_damaged_identity_is_named(groups, chat_model, tmp_path):
    import_model(chat_model, tmp_path / "run", ImportOptions(check=False))
    (tmp_path / "run" / "huggingface" / "identity.json").write_text("{")
    with pytest.raises(ConversionError, match="identity.json is damaged .*; restore it, or remove"):
        export(tmp_path / "run", tmp_path / "out", ExportOptions())
