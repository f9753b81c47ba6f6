"""Several adapters taught apart: how much they disturb each other, and one adapter that holds what all were taught."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel

from ..data.ledger import joined
from ..runtime.devices import wide
from ..solve.least_squares import jointly, minimum_norm
from ..solve.second_moment import SecondMoment
from .checks import qf_adapter
from .model import QFModel
from .state import TaughtAdapter


@torch.no_grad()
def interference(model: PeftModel, first: str, second: str) -> float:
    """How much an adapter would disturb another if both were active, before they are.

    The weight disentanglement error (Ortiz-Jimenez et al., arXiv 2305.12827) of the first adapter's modules: what the
    second's change does to the outputs at the keys that bind the first, over what the first's own change does there,

        Σ tr(ΔW₂ P₁ ΔW₂ᵀ) / Σ tr(ΔW₁ P₁ ΔW₁ᵀ)

    with P₁ the second moment of the keys that the first was taught (by significance) and preserves. As ΔW₁ minimises
    the first's least squares, the numerator is by how much adding ΔW₂ raises it: exactly where P₁ is kept whole and
    ΔW₁ is the solution itself. It is less where P₁ was cut to `memory_rank` directions (by what ΔW₂ does along those
    dropped, at most twice what the cut put on the diagonal, times ‖ΔW₂‖²), and near it where ΔW₁ was cut in rank or
    rounded to 16 bits.

    Args:
        model: a model with both adapters.
        first: the adapter that is disturbed. It must have its statistics.
        second: the adapter that disturbs, taught or not.

    Returns:
        0 where they do not touch; 1 where the second does as much there as the first. It is not symmetric.

    Raises:
        ValueError: there is no such QF adapter, both are one, or the first has no statistics.
    """
    if first == second:
        raise ValueError(f"first and second are both {first!r}; expected two adapters")
    for name in (first, second):
        qf_adapter(model, name)
    tuner: QFModel = model.base_model
    bounds = _bounds(tuner, first)
    others, disturbance, own = tuner.adapter_layers(second), 0.0, 0.0
    for name, bound in bounds.items():
        delta = tuner.delta(first, name)
        own += _energy(bound, delta)
        if name in others:
            disturbance += _energy(bound, tuner.delta(second, name))
    return disturbance / max(own, torch.finfo(torch.float32).tiny)


@torch.no_grad()
def merge_taught(model: PeftModel, adapters: Sequence[str], adapter_name: str) -> None:
    """Make one adapter of several that were taught apart, by solving for all their facts together.

    Where their changes are merely added (`add_weighted_adapter`), each disturbs what the others say. Here every module
    gets the change that minimises the sum of the adapters' least squares, from the second moments of their keys (see
    [`solve.jointly`]); of adapters that preserve nothing, from all their tokens. Where one module is edited this equals
    teaching all rows at once with the same chats preserved; where several are, nearly: the keys are those that each
    adapter's own blocks produced.

    Args:
        model: a model with the adapters. They stay as they are.
        adapters: two or more QF adapters with their statistics.
        adapter_name: the new adapter. It has statistics, too, and can be taught on.

    Raises:
        ValueError: there is no such QF adapter, fewer than two are named, one has no statistics, or the new name is
            taken.
    """
    names = [] if isinstance(adapters, str) else list(dict.fromkeys(adapters))
    if len(names) < 2:
        raise ValueError(f"adapters={adapters!r}; expected a list of at least two different ones")
    if adapter_name in model.peft_config:
        raise ValueError(f"adapter_name={adapter_name!r} is taken; choose another or delete that adapter first")
    for name in names:
        qf_adapter(model, name)
    tuner: QFModel = model.base_model
    bounds = {name: _bounds(tuner, name) for name in names}
    taught = {name: tuner.taught[name] for name in names}
    tuner.add_weighted_adapter(names, [1.0] * len(names), adapter_name, combination_type="cat")
    entries, foundation = (), {}
    for name in names:
        entries = joined(entries, taught[name].entries)
        for module, delta in taught[name].foundation.items():
            foundation[module] = foundation[module] + delta if module in foundation else delta
    merged = TaughtAdapter(
        entries=entries, rehearsed=len(entries), foundation=foundation, settings=taught[names[-1]].settings,
        holds_standing=any(taught[name].holds_standing for name in names),
    )  # fmt: skip
    deltas = {}
    for module in tuner.adapter_layers(adapter_name):
        holders, device = [n for n in names if module in bounds[n]], tuner.factors(adapter_name, module)[0].device
        if all(module in taught[name].tokens and module not in taught[name].offset for name in holders):
            tokens = taught[holders[0]].tokens[module]
            for name in holders[1:]:
                tokens = tokens + taught[name].tokens[module]
            merged.tokens[module] = tokens
            tokens = tokens.to(device)
            deltas[module] = minimum_norm(tokens.keys, tokens.residual, tokens.significance)
            continue
        total = SecondMoment(bounds[holders[0]][module].width)
        for name in holders:
            total.add(bounds[name][module])
        merged.bound[module] = total
        deltas[module] = jointly(
            [taught[name].delta.get(module, tuner.delta(name, module)).to(device) for name in holders],
            [bounds[name][module] for name in holders],
        )
        merged.delta[module] = deltas[module]
    tuner.install(adapter_name, deltas)
    merged.installed.update({module: tuner.factors(adapter_name, module) for module in deltas})
    tuner.taught[adapter_name] = merged.on_host()


def _bounds(tuner: QFModel, adapter: str) -> dict[str, SecondMoment]:
    """By module name what binds an adapter, from whichever statistics it has."""
    taught = tuner.taught.get(adapter)
    found = dict(taught.bound) if taught is not None else {}
    if taught is not None:
        for name, tokens in taught.tokens.items():
            moment = SecondMoment(tokens.keys.shape[1]).update(tokens.keys, tokens.significance)
            moment.ridge = 1e-6 * moment.trace / moment.width
            found[name] = moment
    unchanged = found and all(taught.holds(name, tuner.factors(adapter, name)) for name in found)
    if not unchanged:
        raise ValueError(
            f"adapter {adapter!r} has no statistics of what it was taught (or its weights were changed since); teach "
            "it in this session, or combine by add_weighted_adapter"
        )
    return found


def _energy(bound: SecondMoment, delta) -> float:
    """tr(ΔW P ΔWᵀ), without the ridge."""
    _, r = torch.linalg.qr(wide(delta.B))
    return float(bound.quadratic(r @ wide(delta.A)).sum())
