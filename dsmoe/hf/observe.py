"""What an exported folder computes, seen as a stranger would: run by its path, in a process that cannot import dsmoe.

    python -P observe.py FOLDER IN.safetensors OUT.safetensors DTYPE DEVICE

IN holds `tokens` int64 [B, S], `prompt` int64 [P], and `steps` int64 [], how many tokens to write after the prompt. OUT
gets `logits` fp32 [B, S, V], `routes` bool [L, B * S, E] of the MoE layers if there are any, and `written` int64
[steps], the likeliest continuation with a key/value cache, with `written_routes` bool [L, P + steps - 1, E].
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging

SEQUENCES_AT_ONCE = 8


@torch.no_grad()
def main(folder: str, source: str, target: str, dtype: str, device: str) -> None:
    sys.modules["dsmoe"] = None  # type: ignore[assignment]  # whoever imports it fails
    logging.set_verbosity_error()
    inputs = load_file(source)
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), trust_remote_code=True, local_files_only=True, output_loading_info=True
    )
    wrong = {what: sorted(map(str, names)) for what, names in loading.items() if names}
    if wrong:
        sys.exit(f"the weights do not fit the model: {wrong}")
    model = model.to(device).eval()
    routes = record_routes(model)
    logits = torch.cat(
        [model(row.to(device), use_cache=False).logits.float().cpu() for row in inputs["tokens"].split(1)]
    )
    outputs = {"logits": logits}
    if routes:
        outputs["routes"] = take_routes(routes)
    model.generation_config.eos_token_id = None  # it is to write on after the end of a document
    steps = int(inputs["steps"])
    prompt = inputs["prompt"].unsqueeze(0).to(device)
    attention_mask = torch.ones_like(prompt)
    written = model.generate(prompt, attention_mask=attention_mask, max_new_tokens=steps, do_sample=False)
    outputs["written"] = written[0, prompt.size(1) :].cpu().contiguous()
    if routes:
        outputs["written_routes"] = take_routes(routes)
    save_file(outputs, target)


def record_routes(model: nn.Module) -> dict[str, list[Tensor]]:
    """Let every router leave its routes [S, E] of each call here, by the router's name."""
    routes: dict[str, list[Tensor]] = {}

    def of_dsmoe(name: str):
        return lambda module, inputs, output: routes[name].append(output[1].cpu())

    def of_a_native_host(name: str):
        def note(module, inputs, output):
            scores, expert_Tk = output[0], output[2]
            routes[name].append(torch.zeros_like(scores, dtype=torch.bool).scatter(1, expert_Tk, True).cpu())

        return note

    for name, module in model.named_modules():
        kind = of_dsmoe if name.endswith("mlp.routing") else of_a_native_host if name.endswith("mlp.gate") else None
        if kind is not None:
            routes[name] = []
            module.register_forward_hook(kind(name))
    return routes


def take_routes(routes: Mapping[Any, list[Tensor]]) -> Tensor:
    """bool [L, T, E] of all calls since the last time."""
    taken = torch.stack([torch.cat(calls) for calls in routes.values()])
    for calls in routes.values():
        calls.clear()
    return taken


if __name__ == "__main__":
    main(*sys.argv[1:])
