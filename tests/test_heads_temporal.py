"""The temporal transformer against torch's own layers, bag by bag, and what its attention says."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from glovita_lib.bags import Bags
from glovita_lib.head_mil import TemporalTransformer, sines
from glovita_lib.heads import build_head
from glovita_lib.spec_model import TemporalTransformerHead

WIDTH, OUTPUTS = 5, 3


def head(**fields) -> TemporalTransformer:
    torch.manual_seed(0)
    spec = TemporalTransformerHead(**{"hidden": 16, "heads": 2, **fields})
    assert not list(spec.problems())
    return build_head(spec, width=WIDTH, outputs=OUTPUTS).eval()


def bags(*lengths: int) -> Bags:
    generator = torch.Generator().manual_seed(1)
    return Bags(torch.randn(sum(lengths), WIDTH, generator=generator), torch.tensor(lengths))


def torch_layer(block: nn.Module) -> nn.TransformerEncoderLayer:
    """torch's layer with the weights of a block."""
    width, hidden = block.proj.in_features, block.fc1.out_features
    layer = nn.TransformerEncoderLayer(
        width, block.num_heads, hidden, 0.0, "gelu", batch_first=True, norm_first=True
    )
    attention = layer.self_attn
    attention.in_proj_weight, attention.in_proj_bias = block.qkv.weight, block.qkv.bias
    attention.out_proj, layer.linear1, layer.linear2 = block.proj, block.fc1, block.fc2
    layer.norm1, layer.norm2 = block.norm1, block.norm2
    return layer.train()  # its fast way in eval mode warns of nested tensors


def entering(net: TemporalTransformer, bag: Tensor) -> Tensor:
    """Tokens (1, 1 + N, H) of a bag (N, D), instance by instance."""
    x = net.prepare(bag)
    rows = []
    for i in range(len(x)):
        parts = [x[i]]
        for step in range(1, net.reach + 1):
            parts.append((x[min(i + step, len(x) - 1)] - x[i]).abs())
        angles = [i / 10_000 ** (k / 8) for k in range(8)]
        place = torch.tensor([*map(torch.sin, map(torch.tensor, angles))])
        place = torch.cat([place, torch.tensor([*map(torch.cos, map(torch.tensor, angles))])])
        rows.append(net.project(torch.cat(parts)) + place)
    return torch.stack([net.token, *rows])[None]


@pytest.mark.parametrize("fields", [{}, {"differences": 0, "depth": 1}, {"differences": 4}])
def test_the_logits_are_those_of_torchs_layers(fields) -> None:
    net, batch = head(**fields), bags(4, 1, 7)
    with torch.no_grad():
        expected = []
        for bag in batch.split(batch.features):
            x = entering(net, bag)
            for block in net.blocks:
                x = torch_layer(block)(x)
            expected.append(net.classifier(net.norm(x[:, 0])))
        torch.testing.assert_close(net(batch), torch.cat(expected))


def test_the_attention_is_that_of_the_class_token_in_the_last_block() -> None:
    net, batch = head(), bags(4, 1, 7)
    raw, shares = net.attention(batch)
    assert raw.shape == shares.shape == (12, 1)
    expected = []
    with torch.no_grad():
        for bag in batch.split(batch.features):
            x = torch_layer(net.blocks[0])(entering(net, bag))
            last = net.blocks[1]
            y = last.norm1(x)
            _, weights = torch_layer(last).self_attn(y, y, y, need_weights=True)
            own = weights[0, 0, 1:]
            expected.append(own / own.sum())
    torch.testing.assert_close(shares[:, 0], torch.cat(expected))


def test_order_and_differences_matter() -> None:
    """Another order is another bag; a bag of equal instances has no differences."""
    net, batch = head(), bags(6)
    turned = Bags(batch.features.flip(0), batch.lengths)
    assert not torch.allclose(net(batch), net(turned))
    still = Bags(batch.features[:1].expand(6, -1), batch.lengths)
    x, _ = net.tokens(still)
    h = net.prepare(still.features) @ net.project.weight[:, :WIDTH].T + net.project.bias
    torch.testing.assert_close(x[0, 1:], h + sines(6, 16))


def test_it_learns_what_no_mean_can() -> None:
    """Whether instances rise or fall: the mean over them is the same."""
    generator = torch.Generator().manual_seed(0)
    up = torch.linspace(-1, 1, 8)[:, None].expand(8, WIDTH)
    x = torch.stack([up, up.flip(0)]).repeat(16, 1, 1)
    x = x + 0.1 * torch.randn(x.shape, generator=generator)
    y = torch.tensor([0, 1]).repeat(16)
    net = head(feature_prep=False).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(40):
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (net.eval()(x).argmax(1) == y).all()


def test_features_that_cannot_be_shared_are_told() -> None:
    for fields in ({"hidden": 18, "heads": 4}, {"hidden": 9, "heads": 3}):
        (problem,) = TemporalTransformerHead(**fields).problems()
        assert problem[0] == "heads"
