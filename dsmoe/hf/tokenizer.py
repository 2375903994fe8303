"""The tokenizer of an export: files that transformers reads, and the proof that they encode exactly as dsmoe does.

A SentencePiece BPE model becomes a `tokenizer.json` whose pieces spell a space as a space, not as U+2581, so that no
normalizer is needed and U+2581 in a text is three bytes, as in `dsmoe.data.tokenizer`. SentencePiece joins the
neighbours whose piece has the best score, the leftmost first; a rank for every pair that makes a piece, in the order of
the pieces' scores, does the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dsmoe.data.tokenizer import PROBES, SPACE_SIGN, Tokenizer, encode_alike
from dsmoe.errors import ConversionError

__all__ = ["PROBES", "check_tokenizer", "encode_alike", "write_tokenizer"]


def write_tokenizer(tokenizer: Tokenizer, folder: Path, model_max_length: int) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and the original's file. No token is ever added to a text, and
    what a text spells is never a control token.

    Args:
        tokenizer: of the run.
        folder: of the export; must exist.
        model_max_length: in tokens, a hint for transformers' pipelines.

    Raises:
        ConversionError: the SentencePiece model has a feature that is not written here.
    """
    files = tokenizer.files()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    if "tokenizer.json" in files:
        library = json.loads(files["tokenizer.json"])
        library |= {"post_processor": None, "truncation": None, "padding": None}  # those add tokens, or drop some
        settings = json.loads(files["tokenizer_config.json"])
        end = settings["eos_token"]
    else:
        library = json.loads(_bpe(tokenizer.path, files["tokenizer.model"]))
        settings, end = {"unk_token": library["model"]["unk_token"]}, _piece_of(library, tokenizer.eod_id)
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,  # a document follows the end of another one
        "eos_token": end,
        "pad_token": end,
        "add_bos_token": False,
        "add_eos_token": False,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model_max_length,
    }
    (folder / "tokenizer.json").write_text(json.dumps(library, ensure_ascii=False, indent=1), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")


def _piece_of(library: dict[str, Any], token: int) -> str:
    return next(piece for piece, token_id in library["model"]["vocab"].items() if token_id == token)


def _bpe(path: Path, content: bytes) -> str:
    """`tokenizer.json` of a SentencePiece BPE model."""
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, decoders, models, normalizers
    from tokenizers import Tokenizer as Library

    proto: Any = sentencepiece_model_pb2  # generated, without types
    model = proto.ModelProto.FromString(content)
    Piece = proto.ModelProto.SentencePiece
    _check_is_plain_bpe(path, model, proto)
    spelled = [piece.piece.replace(SPACE_SIGN, " ") for piece in model.pieces]
    scores = {text: piece.score for text, piece in zip(spelled, model.pieces) if piece.type == Piece.NORMAL}
    byte_fallback = any(piece.type == Piece.BYTE for piece in model.pieces)
    unknown = spelled[model.trainer_spec.unk_id]
    library = Library(
        models.BPE(
            vocab={text: token for token, text in enumerate(spelled)}, merges=_merges(scores), unk_token=unknown,
            fuse_unk=True, byte_fallback=byte_fallback,
        )
    )  # fmt: skip
    control = (text for text, piece in zip(spelled, model.pieces) if piece.type in (Piece.CONTROL, Piece.UNKNOWN))
    library.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in control])
    steps = [decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        # Then dsmoe leaves U+2581 to SentencePiece, for which it is a space.
        library.normalizer = normalizers.Sequence([normalizers.Prepend(" "), normalizers.Replace(SPACE_SIGN, " ")])
        steps.append(decoders.Strip(" ", 1, 0))
    library.decoder = decoders.Sequence(steps)
    return library.to_str()


def _check_is_plain_bpe(path: Path, model, proto) -> None:
    kinds = {piece.type for piece in model.pieces}
    Piece = proto.ModelProto.SentencePiece
    problems = []
    if model.trainer_spec.model_type != proto.TrainerSpec.BPE:
        problems.append("it is no BPE model")
    if model.normalizer_spec.precompiled_charsmap:
        problems.append(f"it normalizes text ({model.normalizer_spec.name})")
    if model.normalizer_spec.remove_extra_whitespaces:
        problems.append("it removes repeated spaces")
    if kinds & {Piece.USER_DEFINED, Piece.UNUSED}:
        problems.append("it has user-defined or unused pieces")
    if problems:
        raise ConversionError(
            f"{path} cannot be written as a tokenizer.json that encodes exactly alike: {', '.join(problems)}. "
            "Give the run a tokenizer.json of its own, or train the tokenizer with dsmoe prepare-data"
        )


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, the best piece first."""
    pairs = (
        (score, -cut, (text[:cut], text[cut:]))
        for text, score in scores.items()
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    )
    return [pair for _, _, pair in sorted(pairs, reverse=True)]


def check_tokenizer(tokenizer: Tokenizer, folder: Path, texts: Iterable[str], as_text: bool = False) -> dict[str, int]:
    """Hold the export's tokenizer, as transformers loads it, to the run's: equal ids, and equal text back.

    Args:
        texts: real text, beside the probes and beside pairs of neighbours in the vocabulary.
        as_text: ask it for no special tokens and to read none, which a tokenizer with a template does by itself.

    Returns:
        How many texts and tokens were compared.

    Raises:
        ConversionError: the first text whose ids, or whose way back, differ.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns that the model beside the tokenizer needs code of its own
    try:
        exported = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    finally:
        logging.set_verbosity(verbosity)
    pieces = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
    joined = ("".join(pieces[start : start + 64]) for start in range(0, len(pieces), 64))
    compared = {"texts": 0, "tokens": 0}
    plain = {"add_special_tokens": False, "split_special_tokens": True} if as_text else {}
    for text in (*PROBES, *joined, *texts):
        ours = tokenizer.encode(text)
        theirs = exported(text, verbose=False, **plain)["input_ids"]
        if ours != theirs:
            first = next((i for i, pair in enumerate(zip(ours, theirs)) if len(set(pair)) > 1), 0)
            there, here = theirs[first : first + 8], ours[first : first + 8]
            raise ConversionError(
                f"the exported tokenizer encodes {text[:80]!r} otherwise than dsmoe: {there} instead of {here} at "
                f"token {first}"
            )
        back = exported.decode(
            theirs, skip_special_tokens=True, **({"clean_up_tokenization_spaces": False} if as_text else {})
        )
        if back != (expected := tokenizer.decode(ours)):
            raise ConversionError(f"the exported tokenizer gives {back[:80]!r} back for {expected[:80]!r}")
        compared["texts"] += 1
        compared["tokens"] += len(ours)
    return compared
