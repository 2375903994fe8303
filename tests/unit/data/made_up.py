"""Texts that are made up, but look enough like code for a tokenizer to learn from."""

import random

WORDS = ["router", "expert", "token", "gate", "load", "balance"]
WORDS += ["gradient", "dispatch", "combine", "density", "layer", "shard"]


def made_up_documents(count, seed=0):
    """`count` different texts of about 500 characters."""
    random_words = random.Random(seed)
    documents = []
    for number in range(count):
        lines = [f"# document {number}"]
        for _ in range(random_words.randrange(4, 12)):
            first, second, third = random_words.choices(WORDS, k=3)
            lines.append(f"def {first}_{second}({third}):\n    return {third} * {random_words.randrange(100)}\n")
        documents.append("\n".join(lines))
    return documents


def write_documents(folder, documents):
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(documents):
        (folder / f"{number:04}.txt").write_text(text, encoding="utf-8")
    return folder
