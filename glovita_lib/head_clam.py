"""CLAM: clustering-constrained attention multiple-instance learning.

Lu, Williamson, Chen, Chen, Barbieri, Mahmood, "Data-efficient and weakly supervised computational
pathology on whole-slide images", Nature Biomedical Engineering 5, 2021.

With hidden instances h_i, attention scores a_ik and bag vectors z_k of `attention_pool`:

- bag logits: sb W z + b, or s cos(z, w_c); mb w_c . z_c + b_c, or s cos(z_c, w_c)
- instance loss of a bag of n instances with the label c: the min(k, ceil(n / 2)) most attended
  instances are labelled 1 and the min(k, floor(n / 2)) least attended 0, which is k each where the
  bag has 2 k instances, and the mean of l(v_c h_i + e_c, label) is taken over them. With subtyping
  the min(k, n) most attended of every other class are labelled 0, and the sum over classes is
  divided by their number. Several labels: the mean over them, or with subtyping the sum over all
  classes divided by their number.
- l is cross-entropy, or the smooth top-1 SVM of Berrada, Zisserman, Kumar, "Smooth loss functions
  for deep top-k classification", ICLR 2018: tau log sum_j exp((s_j - s_y + [j != y]) / tau) with
  tau = 1. For two scores both are softplus(s_other - s_y + margin), with margin 0 or 1.
- consistency: with the k most attended instances T of each branch, their attention
  softmax_{i in T}(a_i / tau) and h_i + N(0, std^2), the mean squared difference of the logits to
  the (detached) bag logits

B bags, M instances of all bags, S chosen instances, H hidden, K branches, C classes.
"""

from functools import reduce
from operator import add
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glovita_lib.attention_pool import AttentionPool, Instances
from glovita_lib.bags import Bags, Chosen, as_bags, segment_order, segment_softmax
from glovita_lib.heads import build_head
from glovita_lib.spec_model import ClamHead

SIZES = {"tiny": (256, 128), "small": (512, 256), "big": (512, 384)}  # hidden, attention


class BagClassifier(nn.Module):
    """Logits (B, C) of bag vectors (B, K, H): one vector for all classes or one for each."""

    def __init__(self, hidden: int, classes: int, *, per_class: bool, cosine: float | None) -> None:
        super().__init__()
        linear = nn.Linear(hidden, classes, bias=cosine is None)
        self.weight, self.bias = linear.weight, linear.bias  # (C, H), (C,) or None
        self.per_class, self.cosine = per_class, cosine

    def forward(self, z: Tensor) -> Tensor:
        weight = self.weight.to(z.dtype)  # (C, H)
        if self.cosine is not None:
            z, weight = F.normalize(z, dim=-1), self.cosine * F.normalize(weight, dim=-1)
        logits = (z * weight).sum(-1) if self.per_class else z.squeeze(1) @ weight.T  # (B, C)
        return logits if self.bias is None else logits + self.bias.to(z.dtype)


class InstanceClassifiers(nn.Module):
    """Scores of "not of the class" and "of the class" for each class."""

    def __init__(self, hidden: int, classes: int) -> None:
        super().__init__()
        linear = nn.Linear(hidden, classes * 2)
        self.weight = nn.Parameter(linear.weight.detach().view(classes, 2, hidden))  # (C, 2, H)
        self.bias = nn.Parameter(linear.bias.detach().view(classes, 2))

    def forward(self, h: Tensor) -> Tensor:
        """h (S, C, H), or (S, 1, H) shared by all classes -> (S, C, 2)."""
        weight = self.weight.to(h.dtype)
        if h.shape[1] == 1:
            scores = torch.einsum("sh,cth->sct", h[:, 0], weight)
        else:
            scores = torch.einsum("sch,cth->sct", h, weight)
        return scores + self.bias.to(h.dtype)


class Clam(nn.Module):
    """The head; takes what `as_bags` takes."""

    consumes = "features"
    mixed_before = "classifier"

    def __init__(self, spec: ClamHead, *, width: int, outputs: int) -> None:
        super().__init__()
        hidden, attention = SIZES[spec.size_arg]
        self.spec, self.outputs = spec, outputs
        self.branches = outputs if spec.variant == "mb" else 1
        self.pool = AttentionPool(
            width,
            hidden=hidden,
            attention=attention,
            branches=self.branches,
            gated=spec.gate,
            dropout=spec.dropout,
            norm_eps=spec.layer_norm_eps if spec.feature_prep else None,
            unit_length=spec.feature_prep and spec.l2_normalize_features,
            attn_drop=spec.attn_drop,
        )
        self.classifier = BagClassifier(
            hidden,
            outputs,
            per_class=spec.variant == "mb",
            cosine=spec.cosine_scale if spec.cosine_head else None,
        )
        # only where it learns: several ranks wait for the gradient of every parameter
        self.instance_classifiers = (
            InstanceClassifiers(hidden, outputs) if spec.instance_eval else None
        )

    def forward(self, inputs: Any, targets: Tensor | None = None) -> dict[str, Any]:
        """Logits and, in training, auxiliary losses.

        Args:
            inputs: bags, see `as_bags`.
            targets: (B,) int64 classes, or (B, C) float labels 0 and 1; instance_eval needs them
                and has no meaning for a regression, which the spec's rules refuse.

        Returns:
            "logits" (B, C); "scores" (M, K) attention before the softmax, in the packed order of
            the instances; "fitted", see `heads`; "aux", losses () to add, weights applied:
            instance_loss and consistency_loss as far as the spec asks for them, nothing in
            evaluation.
        """
        bags = as_bags(inputs)
        scores, pooled, instances = self.pool(bags)
        with torch.autocast(bags.features.device.type, enabled=False):
            logits = self.classifier(pooled)  # (B, C)
            aux = {}
            if self.training and (self.spec.instance_eval or self.spec.stochastic_topk):
                order = segment_order(scores.detach(), bags)  # (M, K)
                aux = self.auxiliary(bags, scores, order, instances, logits, targets)
        weight = 1.0 if self.spec.bag_weight is None else self.spec.bag_weight
        return {"logits": logits, "scores": scores, "fitted": [(weight, logits)], "aux": aux}

    def attention(self, inputs: Any) -> tuple[Tensor, Tensor]:
        """Attention of each instance, before and after the softmax over its bag: 2 x (M, K); K is
        1 (sb) or the classes (mb)."""
        bags = as_bags(inputs)
        scores, _, _ = self.pool(bags)
        return scores, segment_softmax(scores, bags)

    def auxiliary(
        self,
        bags: Bags,
        scores: Tensor,
        order: Tensor,
        instances: Instances,
        logits: Tensor,
        targets: Tensor | None,
    ) -> dict[str, Tensor]:
        """Weighted auxiliary losses."""
        spec, aux = self.spec, {}
        if spec.instance_eval and targets is not None:
            share = 1.0 if spec.bag_weight is None else 1 - spec.bag_weight
            loss = self.instance_loss(bags, order, instances, targets)
            aux["instance_loss"] = spec.instance_loss_weight * share * loss
        if spec.stochastic_topk:
            loss = self.consistency_loss(bags, scores, order, instances, logits)
            aux["consistency_loss"] = spec.topk_consistency_weight * loss
        return aux

    def instance_loss(
        self, bags: Bags, order: Tensor, instances: Instances, targets: Tensor
    ) -> Tensor:
        """Mean over the bags of their instance losses; order (M, K) of `segment_order`."""
        k, n = self.spec.k_sample, bags.lengths
        present = self.present(targets)  # (B, C)
        top, bottom = ((n + 1) // 2).clamp(max=k), (n // 2).clamp(max=k)
        labelled = (top + bottom).to(present.device, present.dtype, non_blocking=True)
        weight = present / labelled[:, None]  # (B, C)
        label = targets if targets.dtype == torch.int64 else None
        positive = Chosen.first(bags, top), 1, weight, label
        negative = Chosen.last(bags, bottom), 0, weight, label
        terms = [positive, negative]
        if self.spec.subtyping:
            counts = n.clamp(max=k).to(present.device, present.dtype, non_blocking=True)
            absent = (1 - present) / counts[:, None]  # (B, C)
            terms.append((Chosen.first(bags, n.clamp(max=k)), 0, absent, None))
        losses = (self.labelled_loss(order, instances, *term) for term in terms)  # (B,)
        classes = self.outputs if self.spec.subtyping else present.sum(1).clamp(min=1)
        return (reduce(add, losses) / classes).mean()

    def present(self, targets: Tensor) -> Tensor:
        """(B, C) float: 1 where a bag has the class."""
        if targets.dtype == torch.int64:
            return F.one_hot(targets, self.outputs).float()
        return (targets > 0.5).float()

    def labelled_loss(
        self,
        order: Tensor,
        instances: Instances,
        chosen: Chosen,
        label: int,
        weight: Tensor,
        branch: Tensor | None,
    ) -> Tensor:
        """sum_ic weight_bc l(instance i for class c, label) over the chosen instances, (B,).

        Args:
            weight: (B, C).
            branch: (B,) the one class of each bag that has weight, if it is only one.
        """
        rows = order[chosen.places]  # (S, K)
        if branch is not None and self.branches > 1:
            rows = rows.gather(1, branch[chosen.bag, None])  # (S, 1)
        assert self.instance_classifiers is not None, "built where the spec has instance_eval"
        scores = self.instance_classifiers(instances(rows))  # (S, C, 2)
        margin = 1.0 if self.spec.instance_loss == "svm" else 0.0
        losses = F.softplus(scores[..., 1 - label] - scores[..., label] + margin)  # (S, C)
        losses = (losses * weight[chosen.bag]).sum(1)  # (S,)
        return losses.new_zeros(len(weight)).index_add(0, chosen.bag, losses)

    def consistency_loss(
        self, bags: Bags, scores: Tensor, order: Tensor, instances: Instances, logits: Tensor
    ) -> Tensor:
        """Mean squared difference between the logits of the noisy top instances and `logits`."""
        spec, n = self.spec, bags.lengths[:, None]
        place = torch.arange(spec.topk_k).expand(len(bags), -1)  # (B, T)
        absent = (place >= n).to(scores.device, non_blocking=True)  # (B, T)
        places = torch.tensor(bags.bounds[:-1])[:, None] + place.minimum(n - 1)
        rows = order[places.to(scores.device, non_blocking=True)]  # (B, T, K)
        attention = scores.gather(0, rows.flatten(0, 1)).view(rows.shape) / spec.topk_tau
        weights = attention.masked_fill(absent[..., None], -torch.inf).softmax(1)  # (B, T, K)
        h = instances(rows)  # (B, T, K, H)
        if spec.topk_noise_std:
            h = h + torch.randn_like(h) * spec.topk_noise_std
        noisy = self.classifier((weights[..., None] * h).sum(1))
        return F.mse_loss(noisy, logits.detach())


@build_head.register
def _(spec: ClamHead, *, width: int, outputs: int) -> nn.Module:
    return Clam(spec, width=width, outputs=outputs)
