"""A Hugging Face folder as a run: our configuration, its tokenizer and a checkpoint that any layout can train on.

Weights pass through a row of the key table at a time, in memory of one file of the checkpoint and one layer. Nothing in
the folder is executed or unpickled; an export of dsmoe is checked with this version's code. The run appears when it has
been held to transformers' own model of the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsmoe.checkpoint.write import write_weights
from dsmoe.config import DataConfig, ModelConfig, RouterConfig, RunConfig, validate_config
from dsmoe.config.load import apply_overrides, read_yaml
from dsmoe.data.dataset import heldout, open_corpus, training_stream
from dsmoe.data.tokenizer import TOKENIZER_FILES, Tokenizer
from dsmoe.errors import ConfigError, ConversionError, DataError
from dsmoe.hf.export import TRAINING_STATE, routing_file, write_code
from dsmoe.hf.foreign import ForeignModel, read_foreign
from dsmoe.hf.hosted import foreign_code
from dsmoe.hf.identity import Identity
from dsmoe.hf.parity import Sample, check_parity, compare, observe_folder, observe_run, sequences_compared
from dsmoe.hf.shards import INDEX, ShardReader, new_folder, track
from dsmoe.hf.surgery import change_router, check_routers, tokens_to_fit
from dsmoe.hf.table import CONTROLLERS, Link, check_tensors, links, routing_name
from dsmoe.hf.tokenizer import PROBES, encode_alike
from dsmoe.hf.upcycle import ROUTER, Upcycler, UpcyclingOptions
from dsmoe.model.names import logical_tensors
from dsmoe.model.skeleton import logical_shapes
from dsmoe.routers import available, get
from dsmoe.routers.controllers import Controller
from dsmoe.routers.registry import option_classes
from dsmoe.runtime.files import write_atomically

REPORT = "import_report.json"
NOT_CHECKED = "not checked"
LEARNING_RATE = 5e-5  # for a model that has been trained; training.lr replaces it
HEAD = "score.weight"  # of a classifier of sequences
# What old files hold beside the weights and any reader computes itself.
DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class ImportOptions:
    """How a folder becomes a run.

    Attributes:
        router: name of the router; None: of an upcycled model `dsmoe.hf.upcycle.ROUTER`, of others their own. Another
            one than a mixture of experts has starts from its gates (`dsmoe.hf.surgery`).
        upcycling: of a dense model; None: as it is by default.
        overrides: `section.key=value` for the run's configuration.
        check: hold the run to transformers' model, which needs the memory of one whole model.
        config: YAML file with the sections of the run that are not the model's; None: defaults.
    """

    router: str | None = None
    upcycling: UpcyclingOptions | None = None
    overrides: tuple[str, ...] = ()
    check: bool = True
    config: Path | None = None


def import_model(folder: Path, run: Path, options: ImportOptions) -> dict[str, Any]:
    """Make the run. Returns the content of `import_report.json`.

    Raises:
        DsmoeError: something in the folder is missing, damaged, unused or has no place in dsmoe; options do not fit;
            the run does not compute what the folder does. No run is left then.
    """
    source = Source.open(folder, run, options)
    with new_folder(run) as place:
        with_own_router = place / "with_own_router" if source.new_router is not None else place
        with_own_router.mkdir(exist_ok=True)
        checkpoint = write_weights(
            with_own_router, source.config, source.shapes, track(source.tensors(), len(source.shapes), "tensors"),
            None if source.controller is None else source.controller.state,
            copied_experts=source.upcycler is not None and source.upcycler.options.copies,
        )  # fmt: skip
        parity = _parity(source, checkpoint) if options.check else NOT_CHECKED
        surgery = None
        if source.new_router is not None:
            surgery = _change_router(source, checkpoint, place, options)
            shutil.rmtree(with_own_router)
        if source.tokenizer is not None:
            source.tokenizer.copy_to(place)
        identity = Identity.keep(folder, place)
        write_atomically(place / "config.yaml", source.config.to_yaml().encode())
        report = {
            "format_version": 1,
            "architecture": source.foreign.architecture,
            "router": source.config.router.name,
            "tensors": len(source.reader.shapes),
            "tensors_of_the_run": len(source.shapes),
            "base_model": identity.base_model,
            "left_out": source.left_out,
            "lost": source.lost,
            "upcycling": None if source.upcycler is None else source.upcycler.report(),
            "tokenizer": None if source.tokenizer is None else _compare_tokenizers(source.tokenizer, folder),
            "parity": parity,
            "surgery": surgery,
        }
        write_atomically(place / REPORT, json.dumps(report, indent=2).encode())
    return report


def summary(run: Path, report: dict[str, Any]) -> str:
    """What an import did, in a few lines."""
    lines = [f"{run}: {report['tensors']} tensors of {report['architecture']}, router {report['router']}"]
    lines += [f"lost: {what}" for what in report["lost"]]
    if upcycling := report["upcycling"]:
        lines.append(
            f"upcycled: {upcycling['experts']} experts a layer, each {upcycling['expert_width']} wide, "
            f"noise {upcycling['noise']}; routers newly initialised"
        )
        if "gate_projection_kept" in upcycling:
            lines.append(f"gate projections keep {upcycling['gate_projection_kept']:.1%} of their squared norm")
    parity = report["parity"]
    if parity == NOT_CHECKED:
        lines.append("not compared with transformers' model (--skip-check)")
    else:
        figures = parity["fp32"] if parity["gate"] else parity["difference_from_dense"]
        what = "as transformers' model" if parity["gate"] else "not the dense model, which training has to reach again"
        lines.append(
            f"{what}: logits within {figures['max_logit_difference']:.2g}, top-1 agreement "
            f"{figures['top1_agreement']:.2%}, KL {figures['kl_divergence']:.2g} nats ({parity['text']})"
        )
    if surgery := report["surgery"]:
        lines.append(
            f"router {surgery['router']} from the gates of {surgery['from']}: loss {surgery['loss_before']:.4f} -> "
            f"{surgery['loss_after']:.4f} nats a token, logits within {surgery['max_logit_difference']:.2g}, top-1 "
            f"agreement {surgery['top1_agreement']:.2%}, experts a token {surgery['experts_per_token_before']:.2f} -> "
            f"{surgery['experts_per_token_after']:.2f} ({surgery['text']}); training closes it"
        )
    lines.append(f"train on: dsmoe train --config {run / 'config.yaml'} data.path=DATASET")
    return "\n".join(lines)


@dataclass
class Source:
    """A folder that was read up to its weights, and the run that it will be."""

    folder: Path
    foreign: ForeignModel
    config: RunConfig
    tokenizer: Tokenizer | None
    reader: ShardReader
    links: list[Link]
    shapes: dict[str, tuple[int, ...]]  # of the run's tensors
    controller: Controller | None
    upcycler: Upcycler | None
    new_router: RouterConfig | None = None  # that takes over from the model's own
    left_out: list[str] = field(default_factory=list)  # tensors that the folder holds twice, or needlessly
    lost: list[str] = field(default_factory=list)  # what a fine-tuning or a cast left behind, or has no place here

    @classmethod
    def open(cls, folder: Path, run: Path, options: ImportOptions) -> Source:
        """Everything that can be refused is refused here, before any weight is read. Raises `DsmoeError`."""
        if not folder.is_dir():
            raise ConversionError(f"{folder} is not a folder; download the model first")
        foreign = read_foreign(folder)
        tokenizer = _tokenizer(folder, foreign)
        config, new_router = _run_config(foreign, run, options, tokenizer), None
        if not foreign.is_dense and config.router.name != foreign.router["name"]:
            new_router, config = config.router, config.model_copy(update={"router": _own_router(foreign)})
        if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
            raise ConversionError(
                f"{tokenizer.path} has {tokenizer.vocab_size} ids, more than the model's embedding "
                f"({config.model.vocab_size}): they do not match"
            )
        shapes = logical_shapes(config.model, config.router)
        upcycler, dense = None, shapes
        if foreign.is_dense:
            upcycler = Upcycler(config, options.upcycling or UpcyclingOptions())
            everywhere = ModelConfig.model_validate(
                foreign.model | {"moe_layer_freq": [0] * foreign.model["num_layers"]}
            )
            dense = logical_shapes(everywhere, config.router)
        reader = ShardReader(folder)
        plan = links(foreign.rows(reader.shapes), config.model, dense)
        source = cls(folder, foreign, config, tokenizer, reader, plan, shapes, None, upcycler, new_router)
        source.lost = _left_behind(folder)
        source._check_tensors()
        source.controller = source._controller()
        return source

    def _check_tensors(self) -> None:
        """Every tensor of the folder is used, and none is missing; but for those that a reader can do without."""
        shapes = dict(self.reader.shapes)
        expected = {name: shape for link in self.links for name, shape in link.theirs.items()}
        self.left_out = [name for name in shapes if DERIVED.fullmatch(name)]
        if self.config.model.tie_embeddings and {"lm_head.weight", "model.embed_tokens.weight"} <= shapes.keys():
            if not torch.equal(self.reader.read("lm_head.weight"), self.reader.read("model.embed_tokens.weight")):
                raise ConversionError(
                    f"{self.folder}: tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight; "
                    "which of them holds?"
                )
            self.left_out.append("lm_head.weight")
        if HEAD in shapes and HEAD not in expected and self.config.model.tie_embeddings:
            self.left_out.append(HEAD)
            self.lost.append(f"the head of a classifier ({HEAD})")
        for name in self.left_out:
            del shapes[name]
        if self.upcycler is None:
            state = self._inference_state(_fresh_controller(self.config))
            expected |= {name: tuple(value.shape) for name, value in state}
        check_tensors(expected, shapes, str(self.folder))

    def _inference_state(self, controller: Controller | None) -> Iterator[tuple[str, Tensor]]:
        router = get(self.config.router.name)
        layers = [layer for layer, is_moe in enumerate(self.config.model.moe_layers()) if is_moe]
        for place, layer in enumerate(layers):
            for name, value in router.inference_state(controller, place).items():
                theirs = routing_name(layer, name, self.foreign.architecture)
                if theirs is not None:
                    yield theirs, value.to(torch.float32)

    def _controller(self) -> Controller | None:
        """As the training left it, for an export of ours; what the weights hold of it for other models, and otherwise
        as training begins."""
        controller, architecture = _fresh_controller(self.config), self.foreign.architecture
        if controller is None or architecture not in (*CONTROLLERS, "dsmoe"):
            return controller
        if architecture in CONTROLLERS:
            controller.load(controller.state | self._state_in_weights(CONTROLLERS[architecture]))
            return controller
        path = self.folder / TRAINING_STATE
        if not path.is_file():
            self._restore(controller)
            return controller
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))["controller"]
            state = {name: torch.tensor(values, dtype=controller.state[name].dtype) for name, values in saved.items()}
        except OSError as error:
            raise ConversionError(
                f"{path} cannot be read ({error.strerror}): the router's controller resumes from it"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConversionError(f"{path} is damaged, or belongs to another router: {error}") from error
        controller.load(state)
        differing = [
            name
            for name, value in self._inference_state(controller)
            if not _equal_as_stored(value, self.reader.read(name))
        ]
        if differing:
            raise ConversionError(f"{path} and the weights do not match: {', '.join(differing[:5])} differ")
        return controller

    def _restore(self, controller: Controller) -> None:
        """From what the weights hold of it: a model that transformers or peft saved has no other file of it."""
        router = get(self.config.router.name)
        layers = [layer for layer, is_moe in enumerate(self.config.model.moe_layers()) if is_moe]
        names = list(router.inference_state(controller, 0))
        states = [{name: self.reader.read(routing_name(layer, name)).float() for name in names} for layer in layers]
        if names:
            router.restore_controller(controller, states)
        held = f"continues from the {' and '.join(names)} in the weights" if names else "begins anew"
        self.lost.append(f"the state of the router's controller ({TRAINING_STATE}), which {held}")

    def _state_in_weights(self, names: Iterable[str]) -> dict[str, Tensor]:
        layers = [layer for layer, is_moe in enumerate(self.config.model.moe_layers()) if is_moe]
        theirs = {name: [routing_name(layer, name, self.foreign.architecture) for layer in layers] for name in names}
        return {name: torch.stack([self.reader.read(x).float() for x in tensors]) for name, tensors in theirs.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The run's tensors, one after another."""
        for link in self.links:
            theirs = [self.reader.read(name) for name in link.theirs]
            odd = [f"{name} {tensor.dtype}" for name, tensor in zip(link.theirs, theirs) if not _is_plain(tensor.dtype)]
            if odd:
                raise ConversionError(
                    f"{self.folder} holds quantized tensors, which have no place here: {', '.join(odd)}"
                )
            for name, tensor in link.to_ours(theirs).items():
                if self.upcycler is None:
                    yield name, tensor
                else:
                    yield from self.upcycler.tensors(name, tensor.float())
        if self.upcycler is not None:
            yield from self.upcycler.routers()


def _left_behind(folder: Path) -> list[str]:
    """What lies in a folder, or is known of it, and does not come along."""
    lost = []
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    dtype = content.get("dtype") or content.get("torch_dtype") or "float32"
    if content.get("model_type") == "dsmoe" and dtype != "float32":
        lost.append(f"what fp32 weights held beyond {dtype}")
    if any((folder / name).is_file() for name in ("optimizer.pt", "optimizer.bin", "scheduler.pt")):
        lost.append("the optimizer's state of transformers' Trainer; moments begin at 0")
    if (folder / "adapter_model.safetensors").is_file():
        lost.append("an adapter beside the weights (adapter_model.safetensors), which is not merged into them")
    if code := foreign_code(folder):
        lost.append(f"code that is not dsmoe's own ({', '.join(code)}), which is not run")
    return lost


def _equal_as_stored(value: Tensor, stored: Tensor) -> bool:
    """Whether a folder's tensor is this value, in the dtype that it was saved in."""
    return torch.equal(value.to(stored.dtype), stored)


def _is_plain(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _fresh_controller(config: RunConfig) -> Controller | None:
    router = get(config.router.name)
    options = router.Options.model_validate(config.router.options)
    return router.make_controller(options, sum(config.model.moe_layers()), config.model.num_experts)


def _tokenizer(folder: Path, foreign: ForeignModel) -> Tokenizer | None:
    """The folder's; of an export of ours the very file that its data was made with, unless tokens were added."""
    own, other = folder / "tokenizer.model", folder / "tokenizer.json"
    if foreign.architecture == "dsmoe" and own.is_file():
        tokenizer = Tokenizer.load(own)
        grown = Tokenizer.load(other) if other.is_file() else tokenizer
        return grown if grown.vocab_size > tokenizer.vocab_size else tokenizer
    return Tokenizer.load(folder) if any((folder / name).is_file() for name in TOKENIZER_FILES) else None


def _run_config(foreign: ForeignModel, run: Path, options: ImportOptions, tokenizer: Tokenizer | None) -> RunConfig:
    """The run's configuration. Raises `ConfigError` or `ConversionError` for options that do not fit the model."""
    tree: dict[str, Any] = {} if options.config is None else read_yaml(options.config)
    if of_the_model := [name for name in ("model", "router") if name in tree]:
        raise ConfigError(
            [f"{name}: the folder says it, or --set and --router" for name in of_the_model], str(options.config)
        )
    tree |= {"model": dict(foreign.model), "router": foreign.router}
    tree.setdefault("training", {}).setdefault("lr", LEARNING_RATE)
    tree.setdefault("logging", {})["run_dir"] = str(run)
    if tokenizer is not None:
        name = next(name for name in TOKENIZER_FILES if name in tokenizer.files())
        tree.setdefault("data", {})["tokenizer"] = str(run / name)
    if foreign.is_dense:
        upcycling, width = options.upcycling or UpcyclingOptions(), foreign.model["ffn_hidden_size"]
        upcycling.check(width)
        tree["model"] |= {"num_experts": upcycling.num_experts, "moe_ffn_hidden_size": width // upcycling.granularity}
        tree["router"] = {"name": options.router} if options.router not in (None, ROUTER["name"]) else dict(ROUTER)
    elif options.upcycling is not None:
        raise ConversionError(
            f"{foreign.architecture} is a mixture of experts already: the options of upcycling are for dense models"
        )
    elif options.router not in (None, foreign.router["name"]):
        tree["router"] = _router_from_gates(options.router, foreign)
    fixed = dict(tree["model"])
    problems = apply_overrides(tree, options.overrides)
    config = validate_config(tree, option_classes(), problems, source="the run's configuration")
    changed = [
        f"model.{key}: found {getattr(config.model, key)}, expected {value}, which the folder or other options say"
        for key, value in fixed.items()
        if getattr(config.model, key) != value and key not in ("sequence_length", "init_std")
    ]
    if not foreign.is_dense and config.router.name != (options.router or foreign.router["name"]):
        changed.append(
            f"router.name: found {config.router.name}, expected {foreign.router['name']} as in the folder, or --router"
        )
    if changed:
        raise ConfigError(changed, "--set")
    return config


def _own_router(foreign: ForeignModel) -> RouterConfig:
    options = get(foreign.router["name"]).Options.model_validate(
        {k: v for k, v in foreign.router.items() if k != "name"}
    )
    return RouterConfig(name=foreign.router["name"], **options.model_dump())


def _router_from_gates(name: str, foreign: ForeignModel) -> dict[str, Any]:
    """A router that aims at as many experts per token as the model uses."""
    own, experts = _own_router(foreign), foreign.model["num_experts"]
    if name not in available():
        return {"name": name}  # said where the configuration is checked
    check_routers(own.name, name)
    used = get(own.name).Options.model_validate(own.options).fixed_experts_per_token()
    return {"name": name} | ({} if used is None else get(name).Options.aim_at(used, experts))


def _change_router(source: Source, checkpoint: Path, place: Path, options: ImportOptions) -> dict[str, Any]:
    """Write the run with its new router. Returns the report's part."""
    config, router = source.config, source.new_router
    chosen = {
        line.partition("=")[0].removeprefix("router.") for line in options.overrides if line.startswith("router.")
    }
    length = min(config.model.sequence_length, 256)
    counts = (
        tokens_to_fit(config.model.num_layers, config.model.hidden_size) // length or 1,
        sequences_compared(length, config.model.vocab_size),
    )
    to_fit, sample, text = _texts(source, options, length, *counts)
    model, router, report = change_router(checkpoint, router, chosen, to_fit, sample)
    source.config = config.model_copy(update={"router": router})
    tensors = dict(logical_tensors(model))
    write_weights(
        place, source.config, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.items(),
        None if model.controller is None else model.controller.state,
    )  # fmt: skip
    return {"from": config.router.name, "text": text} | report


def _texts(source: Source, options: ImportOptions, length: int, fit: int, compared: int) -> tuple[Tensor, Sample, str]:
    """Sequences to fit on, others to compare on, and where they are from: the data that `--set data.path` names, or as
    for the check."""
    config = source.config
    if config.data.path != DataConfig().path:
        corpus = open_corpus(config.data.model_copy(update={"tokenizer": None}))  # the run's is not in its place yet
        corpus.check_vocabulary(config.model.vocab_size)
        own = source.tokenizer
        if own is not None and corpus.tokenizer is not None and not encode_alike(own, corpus.tokenizer):
            raise DataError(f"{config.data.path} was made with another tokenizer than {source.folder} has")
        held = heldout(corpus, length, compared)
        to_fit = training_stream(corpus, length, config.training.seed).batch(0, fit)["tokens"]
        return to_fit, Sample(held.batch(0, len(held))["tokens"], config.model.vocab_size), str(config.data.path)
    whole, text = _sample(source.tokenizer, fit + compared, length, config.model.vocab_size)
    cut = max(1, len(whole.tokens) - compared)
    rest = whole.tokens[cut:] if len(whole.tokens) > 1 else whole.tokens
    return whole.tokens[:cut], Sample(rest, config.model.vocab_size), text


def _compare_tokenizers(tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Of texts with code, emoji, CJK, leading spaces and line ends: how many get the ids that transformers gives them,
    and how many come back. Foreign tokenizers may normalize, so both are told and neither is asked for."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    ids = [tokenizer.encode(text) for text in PROBES]
    report: dict[str, Any] = {"texts": len(PROBES)}
    report["round_trip"] = sum(tokenizer.decode(own) == text for own, text in zip(ids, PROBES, strict=True))
    try:
        theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        plain = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        encoded = [theirs(text, **plain)["input_ids"] for text in PROBES]
    except Exception as error:  # transformers raises whatever its parts raise
        return report | {"same_ids_as_transformers": f"not known: {str(error).splitlines()[0][:200]}"}
    return report | {"same_ids_as_transformers": sum(own == other for own, other in zip(ids, encoded, strict=True))}


def _parity(source: Source, checkpoint: Path) -> dict[str, Any]:
    """Hold the run to the folder; where upcycling changes the model, say by how much."""
    config = source.config
    length = min(config.model.sequence_length, 256)
    count = sequences_compared(length, config.model.vocab_size)
    sample, text = _sample(source.tokenizer, count, length, config.model.vocab_size)
    with _without_its_code(source) as folder:
        if source.upcycler is not None and not source.upcycler.keeps_the_function:
            agreement = compare(observe_run(checkpoint, sample), observe_folder(folder, sample, torch.float32))
            return {
                "text": text,
                "tokens": sample.tokens.numel(),
                "gate": False,
                "difference_from_dense": asdict(agreement),
            }
        report, _ = check_parity(checkpoint, folder, sample, torch.float32, lambda name: torch.float32)
    return {"text": text, "gate": True} | report


def _sample(tokenizer: Tokenizer | None, count: int, length: int, vocab_size: int) -> tuple[Sample, str]:
    """Real text, if there is a tokenizer for it."""
    if tokenizer is None:
        tokens = torch.randint(0, vocab_size, (count, length), generator=torch.Generator().manual_seed(0))
        return Sample(tokens, vocab_size), "random ids, since the folder has no tokenizer"
    module = Path(argparse.__file__)
    ids = torch.tensor(tokenizer.encode(module.read_text(encoding="utf-8")))
    count = max(1, min(count, len(ids) // length))
    # Of all rows: transformers' model, as it is read here, may write ids that the tokenizer does not have.
    return Sample(ids[: count * length].view(count, -1), vocab_size), f"source of Python's {module.name}"


@contextlib.contextmanager
def _without_its_code(source: Source) -> Iterator[Path]:
    """A folder with the same weights and configuration, in which only code of transformers and of this package runs."""
    folder = source.folder.resolve()
    with tempfile.TemporaryDirectory(prefix="dsmoe-import-") as name:
        place = Path(name)
        for path in (*folder.glob("*.safetensors"), folder / INDEX):
            if path.is_file():
                (place / path.name).symlink_to(path)
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if source.foreign.architecture == "dsmoe":
            content["auto_map"] = {
                "AutoConfig": "configuration_dsmoe.DsmoeConfig",
                "AutoModelForCausalLM": "modeling_dsmoe.DsmoeForCausalLM",
            }
            write_code(place, routing_file(get(source.config.router.name)))
        (place / "config.json").write_text(json.dumps(content), encoding="utf-8")
        yield place
