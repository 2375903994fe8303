"""The routers written out from their equations: float64, one token and one expert at a time, nothing shared with dsmoe.

A layer is a function of the tokens x_1..x_T (rows of a float64 tensor) that answers with a `Layer`; numbers that carry
a gradient are 0-dimensional tensors. Slow on purpose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch


@dataclass
class Layer:
    gate: list[list]  # [T][E], 0.0 where inactive
    active: list[list[bool]]  # [T][E]
    losses: dict = field(default_factory=dict)  # already weighted
    statistic: list[float] | None = None  # [E]
    score: list[list] | None = None  # [T][E], where the losses look across layers
    fraction: list[float] | None = None  # [E], routes per token of the scope, for the same


@dataclass
class Batch:
    """What a layer may look at beside its tokens."""

    sequence: list[int]  # of each token
    layer: int
    layers: int
    training: bool
    earlier: list[int]  # [E] routes of this layer in the earlier micro-steps of the optimizer step
    earlier_tokens: int
    updates: int  # controller updates so far


def logits(x, weight):
    return [[torch.dot(x[t], weight[e]) for e in range(len(weight))] for t in range(len(x))]


def softmax(values):
    top = max(float(value) for value in values)
    exps = [torch.exp(value - top) for value in values]
    total = sum(exps)
    return [value / total for value in exps]


def sigmoid(value):
    return 1 / (1 + torch.exp(-value))


def descending(values):
    """Indices, largest value first."""
    return sorted(range(len(values)), key=lambda i: -float(values[i]))


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def counts_of(active, experts):
    return [sum(active[t][e] for t in range(len(active))) for e in range(experts)]


def balance(scores, active, batch, options, k):
    """E / k * sum_e f_e P_e over the scope's tokens."""
    tokens, experts = len(scores), len(scores[0]) if scores else 0
    routes, counted = counts_of(active, experts), tokens
    if options.balance_scope == "global_batch":
        routes = [now + before for now, before in zip(routes, batch.earlier, strict=True)]
        counted += batch.earlier_tokens
    return experts / k * sum(routes[e] / counted * mean(scores[t][e] for t in range(tokens)) for e in range(experts))


def relu(x, own, options, state, batch):
    r = logits(x, own["weight"])
    tokens, experts = len(r), len(own["weight"])
    active = [[float(r[t][e]) > 0 for e in range(experts)] for t in range(tokens)]
    scale = options.route_scale
    gate = [[scale * r[t][e] if active[t][e] else 0.0 for e in range(experts)] for t in range(tokens)]
    if options.load_balanced:
        loss = balance(gate, active, batch, options, options.k)
    else:
        loss = mean(sum(row) for row in gate)
    if options.form == "paper":
        loss = loss / batch.layers
    return Layer(gate, active, {"l1": state["lambda"] * loss})


def topk(x, own, options, state, batch):
    r = logits(x, own["weight"])
    gate, active, p = [], [], [softmax(row) for row in r]
    for t in range(len(r)):
        chosen = descending(r[t])[: options.k]
        if options.softmax == "after":
            inside = dict(zip(chosen, softmax([r[t][e] for e in chosen]), strict=True))
        elif options.renormalize:
            inside = {e: p[t][e] / sum(p[t][i] for i in chosen) for e in chosen}
        else:
            inside = {e: p[t][e] for e in chosen}
        gate.append([inside.get(e, 0.0) for e in range(len(r[t]))])
        active.append([e in chosen for e in range(len(r[t]))])
    losses = {"balance": options.balance_coefficient * balance(p, active, batch, options, options.k)}
    if options.z_coefficient:
        losses["z"] = options.z_coefficient * mean(torch.log(sum(torch.exp(v) for v in row)) ** 2 for row in r)
    return Layer(gate, active, losses)


def topk_bias(x, own, options, state, batch):
    r, bias = logits(x, own["weight"]), state["bias"][batch.layer]
    gate, active, counted, shares = [], [], [], []
    for row in r:
        experts = len(row)
        s = [sigmoid(v) for v in row] if options.score == "sigmoid" else softmax(row)
        biased = [float(s[e]) + float(bias[e]) for e in range(experts)]
        size = experts // options.num_groups
        groups = [list(range(g * size, (g + 1) * size)) for g in range(options.num_groups)]
        best = [sum(sorted((biased[e] for e in g), reverse=True)[: options.group_score_experts]) for g in groups]
        allowed = [e for g in descending(best)[: options.groups_per_token] for e in groups[g]]
        chosen = sorted(allowed, key=lambda e: -biased[e])[: options.k]
        total = sum(s[e] for e in chosen) if options.renormalize else 1.0
        gate.append([options.route_scale * s[e] / total if e in chosen else 0.0 for e in range(experts)])
        active.append([e in chosen for e in range(experts)])
        plain = descending(s)[: options.k]
        counted.append([e in plain for e in range(experts)] if options.sequence_counts == "scores" else active[-1])
        shares.append([s[e] / sum(s) for e in range(experts)])
    loss = 0.0
    for sequence in sorted(set(batch.sequence)):
        tokens = [t for t in range(len(r)) if batch.sequence[t] == sequence]
        experts = range(len(r[0]))
        f = [len(experts) / (options.k * len(tokens)) * sum(counted[t][e] for t in tokens) for e in experts]
        weight = len(tokens) / len(r)
        loss = loss + weight * sum(f[e] * mean(shares[t][e] for t in tokens) for e in experts)
    return Layer(gate, active, {"sequence_balance": options.sequence_coefficient * loss})


def crossing(p, threshold, rule):
    """The fewest experts whose mass exceeds (or reaches) the threshold; all if it never does."""
    chosen, mass = [], 0.0
    for e in descending(p):
        chosen.append(e)
        mass += float(p[e])
        if threshold < 1 and (mass > threshold if rule == "above" else mass >= threshold):
            break
    return chosen


def top_p_losses(p, active, options, batch):
    entropy = mean(-sum(v * torch.log(v) for v in row) for row in p)
    return {
        "balance": options.balance_coefficient * balance(p, active, batch, options, 1) / batch.layers,
        "entropy": options.entropy_coefficient * entropy / batch.layers,
    }


def top_p(x, own, options, state, batch):
    p = [softmax(row) for row in logits(x, own["weight"])]
    active = []
    for row in p:
        chosen = crossing(row, options.p, options.rule)
        active.append([e in chosen for e in range(len(row))])
    gate = [[v if on else 0.0 for v, on in zip(*pair, strict=True)] for pair in zip(p, active, strict=True)]
    if options.renormalize:
        gate = [[v / sum(row) for v in row] for row in gate]
    return Layer(gate, active, top_p_losses(p, active, options, batch))


def dtop_p(x, own, options, state, batch):
    p, gate, active = [], [], []
    for row in logits(x, own["weight"]):
        middle = mean(row)
        spread = torch.sqrt(mean((v - middle) ** 2 for v in row) + options.epsilon)
        p.append(softmax([own["scale"][0] * (v - middle) / spread for v in row]))
        chosen = crossing(p[-1], float(state["p"]), options.rule)
        total = sum(p[-1][e] for e in chosen)
        active.append([e in chosen for e in range(len(row))])
        gate.append([p[-1][e] / total if e in chosen else 0.0 for e in range(len(row))])
    return Layer(gate, active, top_p_losses(p, active, options, batch))


def expert_threshold(x, own, options, state, batch):
    r = logits(x, own["weight"])
    tokens, experts = len(r), len(own["weight"])
    correction = 1 - options.decay**batch.updates if batch.updates else 1.0
    cutoff = [float(state["average"][batch.layer][e]) / correction for e in range(experts)]
    statistic = None
    if batch.training:
        wanted = max(1, min(tokens, round(tokens * options.k / experts)))
        columns = [sorted((float(r[t][e]) for t in range(tokens)), reverse=True) for e in range(experts)]
        statistic = [columns[e][wanted - 1] for e in range(experts)]
        if batch.updates < max(options.warmup_steps, 1):
            cutoff = statistic  # without ties, the top tokens are those above the last of them
        elif options.capacity_slack is not None:
            most = min(tokens, round(tokens * options.k / experts * (1 + options.capacity_slack)))
            least = min(tokens, round(tokens * options.k / experts * (1 - options.capacity_slack)))
            for e in range(experts):
                above = sum(value >= cutoff[e] for value in columns[e])
                if above > max(most, 1):
                    cutoff[e] = columns[e][max(most, 1) - 1]
                elif above < least:
                    cutoff[e] = columns[e][least - 1]
    active = [[float(r[t][e]) >= cutoff[e] for e in range(experts)] for t in range(tokens)]
    gate = [[sigmoid(r[t][e]) if active[t][e] else 0.0 for e in range(experts)] for t in range(tokens)]
    return Layer(gate, active, statistic=statistic)


def norms(x, own):
    """||x_t A_i||, with A_i as the rows of own["reduce_proj"][i]."""
    a = own["reduce_proj"]
    latents = [[[sum(x_t[h] * row[h] for h in range(len(row))) for row in expert] for expert in a] for x_t in x]
    return [[torch.sqrt(sum(v * v for v in latent)) for latent in row] for row in latents]


def aoe(x, own, options, state, batch):
    s = norms(x, own)
    gate, active, p = [], [], [softmax(row) for row in s]
    for t in range(len(s)):
        chosen = descending(s[t])[: options.k]
        over = chosen if options.gates == "selected" else range(len(s[t]))
        inside = dict(zip(over, softmax([s[t][e] for e in over]), strict=True))
        gate.append([inside[e] if e in chosen else 0.0 for e in range(len(s[t]))])
        active.append([e in chosen for e in range(len(s[t]))])
    if not options.balance_coefficient:
        return Layer(gate, active)
    return Layer(gate, active, {"balance": options.balance_coefficient * balance(p, active, batch, options, options.k)})


def routing_free(x, own, options, state, batch):
    s, experts = norms(x, own), range(len(own["bias"]))
    if options.form == "code":
        g = [[row[i] * own["scale"][i] - own["bias"][i] for i in experts] for row in s]
    else:
        g = [[row[i] - own["bias"][i] for i in experts] for row in s]
    g = [[v if float(v) > 0 else 0.0 * v for v in row] for row in g]
    active = [[float(v) >= options.threshold for v in row] for row in g]
    gate = [[v if on else 0.0 * v for v, on in zip(*pair, strict=True)] for pair in zip(g, active, strict=True)]
    routes, counted = counts_of(active, len(experts)), len(active)
    if options.balance_scope == "global_batch":
        routes = [now + before for now, before in zip(routes, batch.earlier, strict=True)]
        counted += batch.earlier_tokens
    fraction = [count / counted for count in routes]
    return Layer(gate, active, score=gate if options.form == "code" else g, fraction=fraction)


def across_layers(name, options, state, layers):
    """Losses whose sums run over the experts of all layers; they are put down to the first layer."""
    if name != "routing_free":
        return
    tokens, experts = range(len(layers[0].active)), range(len(layers[0].active[0]))
    everyone = [(layer, i) for layer in layers for i in experts]
    f = {(id(layer), i): layer.fraction[i] for layer, i in everyone}
    by_expert = mean(f[id(layer), i] * mean(layer.score[t][i] for t in tokens) for layer, i in everyone)
    active = [mean(layer.active[t][i] for layer, i in everyone) for t in tokens]
    score = [mean(layer.score[t][i] for layer, i in everyone) for t in tokens]
    by_token = mean(active[t] * score[t] for t in tokens)
    unified = options.mu * by_expert + (1 - options.mu) * by_token
    layers[0].losses["balance"] = state["lambda"] * unified


ROUTERS = {
    "aoe": aoe, "routing_free": routing_free, "relu": relu, "topk": topk, "topk_bias": topk_bias, "top_p": top_p,
    "dtop_p": dtop_p, "expert_threshold": expert_threshold,
}  # fmt: skip


def sign(value) -> int:
    return (value > 0) - (value < 0)


def update(name, options, state, routes, tokens, statistics, updates):
    """The controller's next state. routes [L][E] and tokens over the optimizer step; statistics: one [L][E] a pass."""
    layers, experts = len(routes), len(routes[0])
    density = sum(map(sum, routes)) / (tokens * layers * experts)
    if name == "relu":
        move = sign(density - options.k / experts)
        if move == 0 and options.form == "code":
            move = -1
        return {"lambda": state["lambda"] * options.lambda_factor**move}
    if name == "routing_free":
        moved = state["lambda"] * (1 + options.lambda_rate) ** sign(density - options.target_density)
        return {"lambda": min(moved, 1.0) if options.form == "code" else moved}
    if name == "topk_bias":
        bias = [
            [b + options.bias_update_rate * sign(mean(counts) - c) for b, c in zip(biases, counts, strict=True)]
            for biases, counts in zip(state["bias"], routes, strict=True)
        ]
        return {"bias": bias}
    if name == "dtop_p":
        error = options.k / experts - density
        first = options.initial_p(experts)
        integral = min(max(state["integral"] + options.ki * error, options.p_min - first), options.p_max - first)
        p = min(max(first + options.kp * error + integral, options.p_min), options.p_max)
        return {"p": p, "integral": integral}
    if name == "expert_threshold":
        a = options.decay
        average = [
            [a * state["average"][layer][e] + (1 - a) * mean(s[layer][e] for s in statistics) for e in range(experts)]
            for layer in range(layers)
        ]
        return {"average": average, "updates": updates + 1}
    return {}


def initial(name, options, layers, experts):
    zeros = [[0.0] * experts for _ in range(layers)]
    return {
        "relu": lambda: {"lambda": options.lambda_initial},
        "routing_free": lambda: {"lambda": options.lambda_initial},
        "topk_bias": lambda: {"bias": zeros},
        "dtop_p": lambda: {"p": options.initial_p(experts), "integral": 0.0},
        "expert_threshold": lambda: {"average": zeros, "updates": 0},
    }.get(name, dict)()


def normal_mass(k: int, experts: int, scale: float) -> float:
    """Share of exp(scale z) in its top k / E, z standard normal, by summing over a fine grid."""
    grid = [-8 + 16 * (i + 0.5) / 20000 for i in range(20000)]
    weights = [math.exp(-z * z / 2) for z in grid]
    total, tail, cut = sum(weights), 0.0, 0.0
    for z, weight in zip(reversed(grid), reversed(weights), strict=True):
        tail += weight
        if tail >= total * k / experts:
            cut = z
            break
    mass = [(z, weight * math.exp(scale * z)) for z, weight in zip(grid, weights, strict=True)]
    return sum(m for z, m in mass if z >= cut) / sum(m for _, m in mass)
