"""A run of two processes becomes a Hugging Face model by a real command; a process without dsmoe loads it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from commands import ROOT, TRAIN, forked, metrics, python, run

TEXTS = ["The router of 3 is expert.\n", "  two  spaces\tand\ttabs\r\n\r\n", "</s> ▁ 中文 👩‍🚀 é \0", "x" * 40]

# What a stranger has: torch, transformers and the folder.
STRANGER = """
import json, sys
import torch
from safetensors.torch import load_file
sys.modules["dsmoe"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, batch, texts = sys.argv[1], load_file(sys.argv[2]), json.loads(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
found = {"ids": [tokenizer(text)["input_ids"] for text in texts]}
found["text"] = [tokenizer.decode(ids) for ids in found["ids"]]
with torch.no_grad():
    logits = model(batch["tokens"]).logits
    found["loss"] = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).item()
    rows = [batch["tokens"][:1, :20], batch["tokens"][1:2, :7]]
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    alone = [model.generate(row, attention_mask=torch.ones_like(row), **options)[0, row.size(1):] for row in rows]
    tokens = rows[0]
    for _ in range(10):  # without a cache; ids that no token has are never written
        tokens = torch.cat((tokens, model(tokens, use_cache=False).logits[:, -1:, :tokenizer.vocab_size].argmax(-1)), 1)
    found["cached"] = torch.equal(alone[0], tokens[0, 20:])
    padded = tokenizer.pad(
        {"input_ids": [row[0].tolist() for row in rows]}, padding_side="left", return_tensors="pt"
    )
    together = model.generate(**padded, **options)[:, 20:]
    found["padded"] = torch.equal(together, torch.stack(alone))
    single = model(rows[1]).logits[0]
    found["padded_logits"] = (model(**padded).logits[1, -7:] - single).abs().max().item()
found["modules"] = sorted(name for name in sys.modules if name.split(".")[0] == "dsmoe")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def trained(place, config) -> Path:
    run_dir = place / "runs" / "to export from"
    arguments = ["--config", str(config), f"logging.run_dir={run_dir}", "parallel.expert_parallel=2"]
    arguments += ["parallel.zero_stage=2", "model.moe_shared_expert_intermediate_size=8", "training.steps=4"]
    done = forked(TRAIN, *arguments, processes=2)
    assert done.code == 0, done.output
    return run_dir


@pytest.fixture(scope="module")
def exported(place, trained) -> Path:
    out = place / "exported" / "a model"
    done = forked("tools/convert_checkpoint.py", "export", str(trained), str(out), "--max-shard-size", "40KB")
    assert done.code == 0, done.output
    assert "64 greedy tokens equal" in done.output and "experts per token" in done.output
    assert "Traceback" not in done.output
    return out


@pytest.fixture(scope="module")
def seen(place, corpus, config, exported) -> dict:
    """What a process without dsmoe makes of the folder, on the held-out text that the trainer evaluated on."""
    from safetensors.torch import save_file

    from dsmoe.config import DataConfig
    from dsmoe.data.dataset import heldout, open_corpus

    held = heldout(open_corpus(DataConfig(path=str(corpus))), sequence_length=32, sequences=6)
    batch = held.batch(0, len(held))
    save_file({name: batch[name] for name in ("tokens", "labels")}, place / "held_out.safetensors")
    script = place / "stranger.py"
    script.write_text(STRANGER)
    environment = {"HF_MODULES_CACHE": str(place / "modules"), "HF_HUB_OFFLINE": "1"}
    arguments = [str(exported), str(place / "held_out.safetensors"), json.dumps(TEXTS)]
    done = run(python("-P", str(script), *arguments), cwd=place, environment=environment)
    assert done.code == 0, done.output
    return json.loads(done.output.splitlines()[-1])


def test_the_loss_is_the_one_the_trainer_measured(seen, trained):
    assert seen["modules"] == ["dsmoe"]  # the entry that forbids it, and nothing of it
    assert seen["loss"] == pytest.approx(metrics(trained)[-1]["val_loss"], abs=1e-5)


def test_generate_uses_its_cache_rightly(seen):
    assert seen["cached"]


def test_padding_on_the_left_changes_nothing(seen):
    assert seen["padded"] and seen["padded_logits"] < 1e-5


def test_text_is_encoded_as_the_trainer_encodes_it(seen, trained):
    from dsmoe.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(trained)
    assert seen["ids"] == [tokenizer.encode(text) for text in TEXTS]
    assert seen["text"] == TEXTS


def test_the_pages_python_loads_it(exported, place):
    """The blocks of docs/huggingface.md and of the model card."""
    for page in (ROOT / "docs" / "huggingface.md", exported / "README.md"):
        [block] = re.findall(
            r"^```python\n(from transformers import.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL
        )
        script = place / f"{page.stem}.py"
        script.write_text(block.replace("exported/first", str(exported)).replace("FOLDER", str(exported)))
        done = forked(str(script), environment={"HF_MODULES_CACHE": str(place / "modules")}, without="dsmoe")
        assert done.code == 0, done.output
        assert re.search(r"def main\(|Once upon a time", done.output)


def test_the_folder_names_no_place_of_this_machine(exported, place):
    for path in exported.iterdir():
        assert str(place).encode() not in path.read_bytes(), path.name


def test_a_second_export_does_not_touch_the_first(exported, trained):
    before = {path.name: path.stat().st_mtime_ns for path in exported.iterdir()}
    done = forked("tools/convert_checkpoint.py", "export", str(trained), str(exported))
    assert done.code == 2 and "exists already" in done.output and "Traceback" not in done.output
    assert {path.name: path.stat().st_mtime_ns for path in exported.iterdir()} == before
