"""CLAM as published, written bag by bag with loops, in plain torch: what the tests compare with.

After Lu et al. 2021 and their model_clam.py, with the further options as the head's Struct states
them. Parameters come by the head's state-dict keys; every random choice is passed in.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from glovita_lib.spec_model import ClamHead


@dataclass
class Choices:
    """Masks of one bag, already divided by the probability to stay; None keeps everything."""

    hidden: Tensor | None = None  # (N, H)
    gate: Tensor | None = None  # (N, A)
    attention: Tensor | None = None  # (N, K) bool


def smooth_svm(scores: Tensor, label: int) -> Tensor:
    """Berrada et al. 2018 for k = 1, alpha = tau = 1: log sum_j exp(s_j + [j != y] - s_y)."""
    margins = torch.ones_like(scores)
    margins[label] = 0
    return torch.logsumexp(scores + margins - scores[label], 0)


def cross_entropy(scores: Tensor, label: int) -> Tensor:
    return -scores.log_softmax(0)[label]


def classify(spec: ClamHead, p: dict[str, Tensor], z: Tensor, classes: int) -> Tensor:
    """Bag vectors (K, H) -> logits (C,)."""
    logits = []
    for c in range(classes):
        vector, w = z[c if spec.variant == "mb" else 0], p["classifier.weight"][c]
        if spec.cosine_head:
            logits.append(spec.cosine_scale * F.cosine_similarity(vector, w, dim=0))
        else:
            logits.append(vector @ w + p["classifier.bias"][c])
    return torch.stack(logits)


def hidden_of(spec: ClamHead, p: dict[str, Tensor], x: Tensor, choices: Choices) -> Tensor:
    if spec.feature_prep:
        mean, var = x.mean(1, keepdim=True), x.var(1, correction=0, keepdim=True)
        x = (x - mean) / (var + spec.layer_norm_eps).sqrt()
        x = x * p["pool.norm.weight"] + p["pool.norm.bias"]
        if spec.l2_normalize_features:
            x = x / x.norm(dim=1, keepdim=True)
    h = (x @ p["pool.project.weight"].T + p["pool.project.bias"]).clamp(min=0)
    return h if choices.hidden is None else h * choices.hidden


def scores_of(spec: ClamHead, p: dict[str, Tensor], h: Tensor, choices: Choices) -> Tensor:
    """(N, K)."""
    weight, bias = p["pool.attention.weight"], p["pool.attention.bias"]
    if spec.gate:
        v, u = weight.chunk(2)
        bv, bu = bias.chunk(2)
        gated = torch.tanh(h @ v.T + bv) * torch.sigmoid(h @ u.T + bu)
    else:
        gated = torch.tanh(h @ weight.T + bias)
    if choices.gate is not None:
        gated = gated * choices.gate
    return gated @ p["pool.score.weight"].T + p["pool.score.bias"]


def instance_loss(
    spec: ClamHead, p: dict[str, Tensor], a: Tensor, h: Tensor, present: list[int], classes: int
) -> Tensor:
    """Of one bag, `present` the classes it has."""
    loss_of = smooth_svm if spec.instance_loss == "svm" else cross_entropy
    total, n = h.new_zeros(()), len(h)
    for c in range(classes):
        attention = a[:, c if spec.variant == "mb" else 0]
        falling = sorted(range(n), key=lambda i, s=attention: -s[i].item())

        def score(i: int, c: int = c) -> Tensor:
            weight, bias = p["instance_classifiers.weight"], p["instance_classifiers.bias"]
            return weight[c] @ h[i] + bias[c]

        if c in present:
            top = falling[: min(spec.k_sample, (n + 1) // 2)]
            count = min(spec.k_sample, n // 2)
            bottom = falling[n - count :]
            assert not set(top) & set(bottom)
            losses = [loss_of(score(i), 1) for i in top] + [loss_of(score(i), 0) for i in bottom]
        elif spec.subtyping:
            losses = [loss_of(score(i), 0) for i in falling[: spec.k_sample]]
        else:
            continue
        total = total + torch.stack(losses).mean()
    return total / (classes if spec.subtyping else max(1, len(present)))


def consistency_loss(
    spec: ClamHead, p: dict[str, Tensor], a: Tensor, h: Tensor, logits: Tensor, classes: int
) -> Tensor:
    """Of one bag; the noise is 0."""
    vectors = []
    for k in range(a.shape[1]):
        dense = (a[:, k] / spec.topk_tau).softmax(0)
        values, rows = dense.topk(min(spec.topk_k, len(h)))
        vectors.append((values / values.sum()) @ h[rows])
    noisy = classify(spec, p, torch.stack(vectors), classes)
    return ((noisy - logits.detach()) ** 2).mean()


def published_clam(
    spec: ClamHead,
    p: dict[str, Tensor],
    x: Tensor,
    present: list[int] | None,
    choices: Choices,
    classes: int,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """One bag (N, D) -> logits (C,), attention scores (N, K), unweighted auxiliary losses."""
    h = hidden_of(spec, p, x, choices)
    a = scores_of(spec, p, h, choices)
    vectors = []
    for k in range(a.shape[1]):
        kept = list(range(len(x)))
        if choices.attention is not None:
            best = max(kept, key=lambda i, k=k: a[i, k].item())
            kept = [i for i in kept if choices.attention[i, k] or i == best]
        vectors.append(a[kept, k].softmax(0) @ h[kept])
    logits = classify(spec, p, torch.stack(vectors), classes)
    aux = {}
    if spec.instance_eval and present is not None:
        aux["instance_loss"] = instance_loss(spec, p, a, h, present, classes)
    if spec.stochastic_topk:
        aux["consistency_loss"] = consistency_loss(spec, p, a, h, logits, classes)
    return logits, a, aux
