"""How the active neurons of one layer are spread: over neurons, over time, together, and over kinds of text.

`fired` is a boolean tensor [windows, tokens, neurons], true where h != 0. Its first half of windows decides every order of
neurons, its second half is where the order is judged.
"""
import torch

HOT_SHARES = (0.05, 0.1, 0.18, 0.3, 0.5)
REUSE_WINDOWS = (1, 4, 5, 16, 64)  # tokens
GROUP = 16  # neurons read together
HOTTEST = 512  # neurons whose pairs are described


def coverage(flat, order):
    """Of all activations in flat [tokens, neurons], the share that the first neurons of an order hold."""
    counts = flat.float().sum(0)[order]
    return {str(p): round((counts[: int(len(order) * p)].sum() / counts.sum()).item(), 4) for p in HOT_SHARES}


def reuse(fired):
    """Per window length: share of activations that also fired in the last k tokens, and the size of that union."""
    past, result, longest = torch.zeros_like(fired), {}, max(REUSE_WINDOWS)
    now = fired[:, longest:]
    for k in range(1, longest + 1):
        past[:, k:] |= fired[:, :-k]
        if k in REUSE_WINDOWS:
            seen = past[:, longest:]
            result[str(k)] = {"caught": round(((now & seen).sum() / now.sum()).item(), 4),
                              "union": round(seen.float().mean().item(), 4)}  # fmt: skip
    return result


def over_read(flat, order):
    """Neurons read for each active one, if groups of 16 neighbours in an order are read whole."""
    groups = flat[:, order].view(len(flat), -1, GROUP)
    return round((groups.any(-1).sum() * GROUP / flat.sum()).item(), 3)


def pairs(flat):
    """Lift P(i and j) / (P(i) P(j)) of the hottest neurons' pairs: quantiles, and the mean over pairs that fire together."""
    hot = flat.float().mean(0).argsort(descending=True)[:HOTTEST]
    chosen = flat[:, hot].float()
    rate = chosen.mean(0)
    together = chosen.T @ chosen / len(chosen)
    lift = together / (rate[:, None] * rate).clamp_min(1e-12)
    upper = torch.triu(torch.ones_like(lift, dtype=torch.bool), 1)
    values, weights = lift[upper], together[upper]
    levels = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99], device=values.device)
    return {"hottest": HOTTEST, "lift_quantiles": {f"{q:.2f}": round(v, 3) for q, v in
                                                   zip(levels.tolist(), values.quantile(levels).tolist())},
            "mean_lift_of_joint_firings": round(((values * weights).sum() / weights.sum()).item(), 3)}  # fmt: skip


def describe(fired, elsewhere):
    """Everything above for one layer; `elsewhere` is the same layer on another kind of text."""
    half = len(fired) // 2
    fit, test = fired[:half].flatten(0, 1), fired[half:].flatten(0, 1)
    rate = fit.float().mean(0)
    order = rate.argsort(descending=True)
    other = elsewhere.flatten(0, 1)
    other_fit, other_test = elsewhere[:half].flatten(0, 1), elsewhere[half:].flatten(0, 1)
    shuffled = torch.randperm(len(order), device=order.device, generator=torch.Generator(order.device).manual_seed(0))
    per_token = fired.float().sum(-1).flatten()
    levels = torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99], device=per_token.device)
    return {
        "active_wiki": other.float().mean().item(),
        "active_per_token": {f"{q:.2f}": v for q, v in zip(levels.tolist(), per_token[::4].quantile(levels).tolist())},
        "never_active": (fired.any(0).any(0).logical_not()).float().mean().item(),
        "coverage": coverage(test, order),
        "coverage_of_wiki_by_its_own_order": coverage(other_test, other_fit.float().mean(0).argsort(descending=True)),
        "coverage_of_wiki_by_the_novels_order": coverage(other_test, order),
        "reuse": reuse(fired[half:]),
        "groups_of_16_read_per_active": {"frequency": over_read(test, order), "random": over_read(test, shuffled)},
        "pairs": pairs(test),
    }
