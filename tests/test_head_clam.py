"""CLAM: packed, padded and one bag at a time agree, with the published method too, in float64."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from clam_reference import Choices, published_clam, smooth_svm
from sklearn.metrics import roc_auc_score
from torch import Tensor

from glovita_lib import attention_pool
from glovita_lib.attention_pool import Keep
from glovita_lib.bags import Bags
from glovita_lib.head_clam import Clam
from glovita_lib.heads import build_head
from glovita_lib.spec_model import ClamHead

LENGTHS = [1, 2, 40, 5, 17, 3, 90]
WIDTH, CLASSES = 11, 3

OPTIONS = {
    "published": ClamHead(
        variant="sb",
        feature_prep=False,
        cosine_head=False,
        dropout=0.25,
        instance_eval=True,
        instance_loss="svm",
        bag_weight=0.7,
    ),
    "defaults": ClamHead(),
    "ungated": ClamHead(gate=False, dropout=0.25),
    "sb": ClamHead(variant="sb", size_arg="big"),
    "prepared": ClamHead(l2_normalize_features=False, layer_norm_eps=1e-3),
    "raw": ClamHead(feature_prep=False),
    "linear": ClamHead(cosine_head=False),
    "cosine": ClamHead(variant="sb", cosine_scale=7.0),
    "dropout": ClamHead(dropout=0.1),
    "attn_drop": ClamHead(attn_drop=0.6),
    "attn_drop sb": ClamHead(attn_drop=0.9, variant="sb"),
    "instances": ClamHead(instance_eval=True, k_sample=3),
    "instances sb": ClamHead(variant="sb", instance_eval=True, instance_loss_weight=0.3),
    "subtyping": ClamHead(instance_eval=True, subtyping=True, k_sample=4, dropout=0.5),
    "subtyping sb": ClamHead(variant="sb", instance_eval=True, subtyping=True, bag_weight=0.6),
    "svm": ClamHead(instance_eval=True, instance_loss="svm", subtyping=True),
    "consistency": ClamHead(stochastic_topk=True, topk_noise_std=0.0, topk_k=4),
    "consistency sb": ClamHead(
        variant="sb", stochastic_topk=True, topk_noise_std=0.0, topk_tau=0.1, dropout=0.25
    ),
    "everything": ClamHead(
        instance_eval=True,
        stochastic_topk=True,
        topk_noise_std=0.0,
        topk_consistency_weight=0.4,
        attn_drop=0.3,
        dropout=0.25,
        subtyping=True,
    ),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that cut bags, and bags that share chunks."""
    monkeypatch.setitem(attention_pool.CHUNK_ROWS, "cpu", 16)


def make_head(spec: ClamHead, dtype: torch.dtype = torch.float32) -> Clam:
    torch.manual_seed(0)
    head = build_head(spec, width=WIDTH, outputs=CLASSES).to(dtype)
    with torch.no_grad():
        for parameter in head.parameters():  # nothing at 0 or 1, where mistakes could hide
            parameter.add_(torch.randn_like(parameter) * 0.1)
        head.pool.score.weight.mul_(4)  # attention that is far from uniform
    return head.train()


def make_bags(dtype: torch.dtype = torch.float32, lengths: list[int] = LENGTHS) -> Bags:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(lengths), WIDTH, generator=generator, dtype=torch.float64)
    return Bags(x.to(dtype), torch.tensor(lengths))


def make_targets(kind: str) -> Tensor:
    if kind == "multiclass":
        return torch.tensor([0, 2, 2, 0, 0, 2, 0])  # class 1 is absent
    labels = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    return labels[torch.arange(len(LENGTHS)) % 4].float()


class FixedChoices:
    """Masks by instance, so that every layout makes the same random choices."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, head: Clam) -> None:
        self.head, self.rows = head, torch.arange(sum(LENGTHS))
        self.kept = torch.rand(sum(LENGTHS), head.branches) >= head.spec.attn_drop
        original = head.pool.plan

        def plan(bags: Bags) -> attention_pool.PassOptions:
            plan = original(bags)
            fixed = {}
            for name, seed in (("keep_hidden", 11), ("keep_gate", 12)):
                keep = getattr(plan, name)
                if keep is not None:
                    fixed[name] = Shifted(keep.keep, keep.columns, seed, self.rows)
            if plan.kept is not None:
                fixed["kept"] = self.kept[self.rows]
            return replace(plan, **fixed)

        monkeypatch.setattr(head.pool, "plan", plan)

    def of(self, rows: Tensor) -> Choices:
        """For the reference."""
        spec, pool = self.head.spec, self.head.pool
        choices = Choices()
        if spec.dropout:
            stay = 1 - spec.dropout
            both = stay**2 if spec.gate else stay
            choices.hidden = Keep(stay, pool.project.out_features, 11).rows(rows).double() / stay
            choices.gate = Keep(both, pool.score.in_features, 12).rows(rows).double() / both
        if spec.attn_drop:
            choices.attention = self.kept[rows]
        return choices


class Shifted(Keep):
    """The mask of the instances that a layout holds; `names` are their rows in the whole set."""

    __slots__ = ("names",)

    def __init__(self, keep: float, columns: int, seed: int, names: Tensor) -> None:
        super().__init__(keep, columns, seed)
        object.__setattr__(self, "names", names)

    def rows(self, rows: Tensor) -> Tensor:
        return Keep(self.keep, self.columns, self.seed).rows(self.names[rows])


def total_loss(out: dict, targets: Tensor) -> Tensor:
    """The whole loss as the trainer adds it up."""
    kind = targets.dtype == torch.int64
    loss = F.cross_entropy if kind else F.binary_cross_entropy_with_logits
    bag = loss(out["logits"], targets if kind else targets.to(out["logits"].dtype))
    ((weight, fitted),) = out["fitted"]
    assert fitted is out["logits"]
    return weight * bag + sum(out["aux"].values())


def gradients(head: Clam, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*head.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def results(head: Clam, out: dict, targets: Tensor) -> dict:
    loss = total_loss(out, targets)
    kept = {"logits": out["logits"].detach(), "loss": loss.detach(), **gradients(head, loss)}
    return kept | {name: value.detach() for name, value in out["aux"].items()}


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
@pytest.mark.parametrize("name", OPTIONS)
def test_layouts_agree(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head, bags, targets = make_head(OPTIONS[name]), make_bags(), make_targets(kind)
    choices = FixedChoices(monkeypatch, head)
    packed = results(head, head(bags, targets), targets)

    padded, mask = bags.to_padded()
    padded[~mask] = torch.randn_like(padded)[~mask] * 100  # what is padding must not matter
    ours = results(head, head({"features": padded, "mask": mask}, targets), targets)
    torch.testing.assert_close(ours, packed, rtol=1e-5, atol=1e-5)

    singles = []
    for bag, rows in enumerate(bags.split(torch.arange(len(bags.features)))):
        choices.rows = rows
        one = head(bags.features[rows], targets[bag : bag + 1])
        singles.append(results(head, one, targets[bag : bag + 1]))
    for key, value in packed.items():
        parts = torch.stack([single[key] for single in singles])
        mean = parts[:, 0] if key == "logits" else parts.mean(0)
        torch.testing.assert_close(mean, value, rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
@pytest.mark.parametrize("name", OPTIONS)
def test_published_method(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = OPTIONS[name]
    head, bags = make_head(spec, torch.float64), make_bags(torch.float64)
    targets, parameters = make_targets(kind), dict(head.named_parameters())
    choices = FixedChoices(monkeypatch, head)
    out = head(bags, targets)
    logits, attention, aux = [], [], []
    for bag, rows in enumerate(bags.split(choices.rows)):
        label = targets[bag]
        present = [int(label)] if label.ndim == 0 else label.nonzero().flatten().tolist()
        reference = published_clam(
            spec, parameters, bags.features[rows], present, choices.of(rows), CLASSES
        )
        for values, value in zip((logits, attention, aux), reference, strict=True):
            values.append(value)
    torch.testing.assert_close(out["logits"], torch.stack(logits))
    torch.testing.assert_close(out["scores"], torch.cat(attention))
    share = 1.0 if spec.bag_weight is None else 1 - spec.bag_weight
    factors = {
        "instance_loss": spec.instance_loss_weight * share,
        "consistency_loss": spec.topk_consistency_weight,
    }
    expected = {k: factors[k] * torch.stack([a[k] for a in aux]).mean() for k in aux[0]}
    torch.testing.assert_close(out["aux"], expected)
    weight = 1.0 if spec.bag_weight is None else spec.bag_weight
    logits = torch.stack(logits)
    reference = {"logits": logits, "aux": expected, "fitted": [(weight, logits)]}
    ours = gradients(head, total_loss(out, targets))
    theirs = gradients(head, total_loss(reference, targets))
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_options_matter() -> None:
    """No option is without effect, so that the comparisons above compare something."""
    losses, bags, targets = {}, make_bags(), make_targets("multiclass")
    for name, spec in OPTIONS.items():
        head = make_head(spec)
        losses[name] = total_loss(head(bags, targets), targets).item()
    assert len(set(losses.values())) == len(OPTIONS)


@pytest.mark.parametrize(
    "change",
    [
        {"dropout": 0.5},
        {"attn_drop": 0.9},
        {"k_sample": 3},
        {"subtyping": False},
        {"instance_eval": False},
        {"instance_loss": "svm"},
        {"instance_loss_weight": 0.5},
        {"bag_weight": 0.5},
        {"l2_normalize_features": False},
        {"layer_norm_eps": 0.1},
        {"cosine_scale": 5.0},
        {"stochastic_topk": False},
        {"topk_k": 1},
        {"topk_tau": 2.0},
        {"topk_noise_std": 3.0},
        {"topk_consistency_weight": 4.0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_option_matters_with_the_same_weights(change: dict[str, object]) -> None:
    bags, targets = make_bags(), make_targets("multiclass")
    spec, losses = OPTIONS["everything"], []
    state = make_head(spec).state_dict()
    for own in (spec, replace_spec(spec, **change)):
        head = make_head(own)
        head.load_state_dict(state, strict="instance_eval" not in change)
        torch.manual_seed(0)
        losses.append(total_loss(head(bags, targets), targets).item())
    assert losses[0] != losses[1]


@pytest.mark.parametrize("lengths", [[1], [2, 1, 1], [6], [3] * 5])
def test_small_bags(lengths: list[int]) -> None:
    spec = replace_spec(OPTIONS["everything"], k_sample=50, topk_k=50)
    head = make_head(spec)
    targets = torch.zeros(len(lengths), dtype=torch.int64)
    out = head(make_bags(lengths=lengths), targets)
    loss = total_loss(out, targets)
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients(head, loss).values())


def replace_spec(spec: ClamHead, **changes: object) -> ClamHead:
    return ClamHead(**{name: getattr(spec, name) for name in spec.__struct_fields__} | changes)


@pytest.mark.parametrize("n", [1, 2, 7, 15, 16, 17])
def test_no_instance_is_labelled_both_ways(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    head = make_head(ClamHead(instance_eval=True, variant="sb", k_sample=8, gate=False))
    seen: dict[int, list[int]] = {0: [], 1: []}
    original = head.labelled_loss

    def watch(order: Tensor, *arguments: object) -> Tensor:
        seen[arguments[2]] += order[arguments[1].places].flatten().tolist()
        return original(order, *arguments)

    monkeypatch.setattr(head, "labelled_loss", watch)
    head(make_bags(lengths=[n]), torch.tensor([1]))
    assert len(seen[1]) == min(8, (n + 1) // 2) and len(seen[0]) == min(8, n // 2)
    assert not set(seen[0]) & set(seen[1])


def test_blank_instances_do_no_harm() -> None:
    """Constant features have no direction: they stay zero, with finite gradients."""
    head = Clam(OPTIONS["everything"], width=WIDTH, outputs=CLASSES)  # beta is 0
    bags, targets = make_bags(lengths=[5, 4]), torch.tensor([0, 1])
    bags.features[:6] = 0
    found = gradients(head, total_loss(head(bags, targets), targets))
    assert all(g.isfinite().all() for g in found.values())
    assert found["pool.norm.bias"].abs().max() < 1e4


def test_features_get_gradients() -> None:
    """Raw tokens of an encoder that learns."""
    for name in ("published", "defaults", "prepared"):
        spec = replace_spec(OPTIONS[name], dropout=0.0)
        head = make_head(spec, torch.float64)
        x = make_bags(torch.float64).features[:12].view(2, 6, WIDTH).clone().requires_grad_()
        head(x)["logits"].square().sum().backward()
        ours, x = x.grad, x.detach().requires_grad_()
        parameters = dict(head.named_parameters())
        for bag in x:
            logits, *_ = published_clam(spec, parameters, bag, None, Choices(), CLASSES)
            logits.square().sum().backward()
        torch.testing.assert_close(ours, x.grad)


@pytest.mark.parametrize("name", ["published", "everything"])
def test_memory_plans_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeping all, some or no hidden activations gives the same gradients."""
    head, bags, targets = make_head(OPTIONS[name]), make_bags(), make_targets("multiclass")
    found = []
    for rows in (0, 40, 48, 158):
        monkeypatch.setattr(attention_pool, "stash_rows", lambda *_, rows=rows: rows)
        torch.manual_seed(3)
        found.append(results(head, head(bags, targets), targets))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)


def saved_bytes(forward: Callable[[], object], without: list[Tensor]) -> int:
    """What autograd keeps for the backward pass, except given tensors."""
    sizes = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept_alive = forward()
    assert kept_alive is not None
    for tensor in without:
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


@pytest.mark.parametrize("name", ["published", "ungated", "raw"])
def test_memory_is_that_of_the_largest_bag(name: str) -> None:
    """A batch keeps no more than plain autograd keeps for its largest bag."""
    spec = replace_spec(OPTIONS[name], feature_prep=False, instance_eval=False, variant="sb")
    head, bags = make_head(spec), make_bags(lengths=[700, 300] + [500] * 30)
    largest, pool = bags.features[:700], head.pool
    drop = torch.nn.Dropout(spec.dropout)

    def plain() -> Tensor:
        h = drop(pool.project(largest).relu())
        parts = pool.attention(h).split(pool.score.in_features, 1)
        gated = drop(parts[0].tanh())
        gated = gated * drop(parts[1].sigmoid()) if spec.gate else gated
        return head.classifier((pool.score(gated).softmax(0).T @ h)[None])

    weights = [bags.features, *head.parameters()]
    ours = saved_bytes(lambda: head(bags)["logits"], weights)
    # besides: a score per instance, two vectors per bag, and weights that dropout scales
    small = 4 * (len(bags.features) + 2 * len(bags) * 512) + pool.project.weight.nbytes
    assert 0 < ours - small <= saved_bytes(plain, weights)


def test_evaluation_is_deterministic_and_without_auxiliary_losses() -> None:
    head, bags = make_head(OPTIONS["everything"]).eval(), make_bags()
    with torch.no_grad():
        first, second = head(bags, make_targets("multiclass")), head(bags)
    assert first["aux"] == second["aux"] == {}
    assert torch.equal(first["logits"], second["logits"])
    raw, weights = head.attention(bags)
    assert raw.shape == weights.shape == (sum(LENGTHS), CLASSES)
    for part, scores in zip(bags.split(weights), bags.split(raw), strict=True):
        torch.testing.assert_close(part, scores.softmax(0))
    assert torch.equal(raw, first["scores"])


def test_training_follows_the_global_seed() -> None:
    head = make_head(replace_spec(OPTIONS["everything"], topk_noise_std=0.1))
    bags, targets = make_bags(), make_targets("multiclass")

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return total_loss(head(bags, targets), targets).item()

    assert loss(1) == loss(1) != loss(2)


@pytest.mark.parametrize("features", [torch.float16, torch.bfloat16, torch.float64])
def test_types_of_features(features: torch.dtype) -> None:
    head, bags = make_head(ClamHead(variant="sb")), make_bags()
    stored = Bags(bags.features.to(features), bags.lengths)
    plain = Bags(stored.features.float(), bags.lengths)
    torch.testing.assert_close(
        head(stored)["logits"].float(), head(plain)["logits"], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", ["published", "defaults", "everything"])
def test_autocast(name: str) -> None:
    head = make_head(replace_spec(OPTIONS[name], dropout=0.0, attn_drop=0.0))
    bags, targets = make_bags(), make_targets("multiclass")
    exact = results(head, head(bags, targets), targets)
    with torch.autocast("cpu", torch.bfloat16):
        out = head(bags, targets)
    assert out["logits"].dtype == torch.float32
    half = results(head, out, targets)
    for key in ("logits", "pool.project.weight", "pool.attention.weight"):
        assert F.cosine_similarity(half[key].flatten(), exact[key].flatten(), dim=0) > 0.99, key


def plain_logits(weights: dict[str, Tensor], bags: Bags, dtype: torch.dtype) -> Tensor:
    """The defaults of CLAM, bag by bag, in operations that autograd knows."""
    logits = []
    for x in bags.split(bags.features.to(dtype)):
        x = F.layer_norm(
            x, x.shape[1:], weights["pool.norm.weight"], weights["pool.norm.bias"], 1e-6
        )
        x = F.normalize(x)
        h = F.linear(x, weights["pool.project.weight"], weights["pool.project.bias"]).relu()
        both = F.linear(h, weights["pool.attention.weight"], weights["pool.attention.bias"])
        gated = both.chunk(2, 1)[0].tanh() * both.chunk(2, 1)[1].sigmoid()
        scores = F.linear(gated, weights["pool.score.weight"], weights["pool.score.bias"])
        pooled = (scores.softmax(0).T @ h).to(dtype)
        vectors = F.normalize(weights["classifier.weight"], dim=-1)
        logits.append((F.normalize(pooled, dim=-1) * 20 * vectors).sum(-1))
    return torch.stack(logits)


def test_gradients_under_autocast_are_as_good_as_those_of_autograd() -> None:
    head = make_head(ClamHead())
    torch.manual_seed(1)
    bags = Bags(torch.randn(2200, WIDTH), torch.tensor([1000, 500, 700]))
    targets = torch.tensor([0, 1, 2])
    names = [name for name, _ in head.named_parameters()]

    def plain(dtype: torch.dtype, half: bool) -> tuple[Tensor, ...]:
        copies = {n: p.detach().to(dtype).requires_grad_() for n, p in head.named_parameters()}
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = F.cross_entropy(plain_logits(copies, bags, dtype).to(dtype), targets)
        return torch.autograd.grad(loss, list(copies.values()))

    exact, theirs = plain(torch.float64, False), plain(torch.float32, True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(head(bags, targets)["logits"], targets)
    ours = torch.autograd.grad(loss, list(head.parameters()))
    for name, true, one, other in zip(names, exact, ours, theirs, strict=True):
        if name != "pool.score.bias":  # its gradient is 0, as the softmax knows no shift
            assert (one - true).norm() <= 1.5 * (other - true).norm() + 0.01 * true.norm(), name


def test_regression() -> None:
    head = build_head(ClamHead(cosine_head=False), width=WIDTH, outputs=2)
    out = head(make_bags(), torch.randn(len(LENGTHS), 2))
    assert out["logits"].shape == (len(LENGTHS), 2) and out["aux"] == {}


def test_smooth_svm_is_softplus() -> None:
    scores = torch.tensor([0.3, -1.2], dtype=torch.float64)
    expected = F.softplus(scores[0] - scores[1] + 1)
    torch.testing.assert_close(smooth_svm(scores, 1), expected)


def test_state_dict_keys() -> None:
    assert list(Clam(OPTIONS["everything"], width=WIDTH, outputs=2).state_dict()) == [
        "pool.norm.weight",
        "pool.norm.bias",
        "pool.project.weight",
        "pool.project.bias",
        "pool.attention.weight",
        "pool.attention.bias",
        "pool.score.weight",
        "pool.score.bias",
        "classifier.weight",
        "instance_classifiers.weight",
        "instance_classifiers.bias",
    ]


def planted(bags: int, seed: int) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Bags of 20 to 120 noise instances; a positive one holds 3 to 6 of a planted kind."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randn(32, generator=torch.Generator().manual_seed(9))
    features, labels, where = [], [], []
    for bag in range(bags):
        n = int(torch.randint(20, 121, (), generator=generator))
        x = torch.randn(n, 32, generator=generator)
        count = int(torch.randint(3, 7, (), generator=generator)) if bag % 2 else 0
        rows = torch.randperm(n, generator=generator)[:count]
        x[rows] += 0.8 * kind
        features.append(x)
        labels.append(bag % 2)
        where.append(rows)
    return features, torch.tensor(labels), where


@pytest.mark.parametrize("name", ["published", "mb"])
def test_planted_instances(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention_pool.CHUNK_ROWS, "cpu", 1024)
    spec = ClamHead(size_arg="tiny", instance_eval=True, k_sample=3, subtyping=True)
    if name == "published":
        spec = replace_spec(OPTIONS["published"], size_arg="tiny", k_sample=3)
    torch.manual_seed(0)
    head = Clam(spec, width=32, outputs=2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    train, labels, _ = planted(160, seed=1)
    for _ in range(12):
        for rows in torch.randperm(len(train)).split(16):
            bags = Bags.from_list([train[i] for i in rows])
            loss = total_loss(head(bags, labels[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    test, labels, where = planted(100, seed=2)
    head.eval()
    with torch.no_grad():
        bags = Bags.from_list(test)
        scores = head(bags)["logits"].softmax(1)[:, 1]
        attention = head.attention(bags)[0][:, -1:]
    assert roc_auc_score(labels, scores) > 0.95
    found = total = 0
    for part, rows in zip(bags.split(attention), where, strict=True):
        top = part[:, 0].topk(len(rows))[1]
        found += len(set(top.tolist()) & set(rows.tolist()))
        total += len(rows)
    assert found / total > 0.9
