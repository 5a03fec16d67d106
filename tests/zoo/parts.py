"""Written by hand with torch: several parts, shared weights, graphs."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from zoo import sizes
from zoo.registry import entry
from zoo.sizes import VOCAB, image, token_ids


class Gan(nn.Module):
    """A generator and a discriminator, which judges both the generated and the real images."""

    def __init__(self, width=16):
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(8, width * 16), nn.Unflatten(1, (width, 4, 4)), nn.BatchNorm2d(width), nn.ReLU(),
            nn.ConvTranspose2d(width, width, 4, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh(),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(width, width, 4, 2, 1), nn.LeakyReLU(0.2),
            nn.Flatten(), nn.Linear(width * 16, 1),
        )  # fmt: skip

    def forward(self, noise, real):
        fake = self.generator(noise)
        return fake, self.discriminator(fake), self.discriminator(real)


@entry("torch")
def gan():
    return Gan(), (torch.randn(sizes.BATCH, 8), image(16)), {}


class MessagePassing(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.message = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, width))
        self.update = nn.GRUCell(width, width)

    def forward(self, x, edges):
        source, target = edges
        messages = self.message(torch.cat([x[:, source], x[:, target]], dim=-1))
        received = torch.zeros_like(x).index_add(1, target, messages)
        return self.update(received.flatten(0, 1), x.flatten(0, 1)).view_as(x)


class GraphNet(nn.Module):
    """Rounds of message passing over the edges of one graph, for a batch of node features."""

    def __init__(self, edges, width=24, rounds=4):
        super().__init__()
        self.register_buffer("edges", edges)
        self.embed = nn.Linear(6, width)
        self.rounds = nn.ModuleList(MessagePassing(width) for _ in range(rounds))
        self.node_head = nn.Linear(width, 3)
        self.graph_head = nn.Linear(width, 1)

    def forward(self, nodes):
        x = self.embed(nodes)
        for layer in self.rounds:
            x = layer(x, self.edges)
        return {"nodes": self.node_head(x), "graph": self.graph_head(x.mean(1))}


@entry("torch")
def graph_net():
    return GraphNet(torch.randint(0, 10, (2, 30))), (torch.randn(sizes.BATCH, 10, 6),), {}


class Siamese(nn.Module):
    """One encoder for two inputs."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 32)
        )
        self.head = nn.Linear(64, 1)

    def forward(self, left, right):
        a, b = self.encoder(left), self.encoder(right)
        return self.head(torch.cat([(a - b).abs(), a * b], dim=-1)), F.cosine_similarity(a, b)


@entry("torch")
def siamese():
    return Siamese(), (image(16), image(16)), {}


class SoftExperts(nn.Module):
    """Every expert runs; a softmax weighs them."""

    def __init__(self, width=32, experts=4):
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width)) for _ in range(experts)
        )

    def forward(self, x):
        weights = self.router(x).softmax(-1)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return x + (outputs * weights.unsqueeze(-2)).sum(-1), weights


class SoftMixture(nn.Module):
    def __init__(self, width=32, layers=3):
        super().__init__()
        self.layers = nn.ModuleList(SoftExperts(width) for _ in range(layers))
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        usage = []
        for layer in self.layers:
            x, weights = layer(x)
            usage.append(weights)
        return self.head(x), usage


@entry("torch")
def soft_experts():
    return SoftMixture(), (torch.randn(sizes.BATCH, 10, 32),), {}


class TopExperts(SoftExperts):
    """Each token goes to one expert; an expert may get none."""

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            mine = chosen == i
            if mine.any():
                out[mine] = expert(x[mine])
        return x + out * weights.unsqueeze(-1)


@entry("torch")
def top_experts():
    layers = [module for _ in range(3) for module in (TopExperts(), nn.LayerNorm(32))]
    return nn.Sequential(*layers, nn.Linear(32, 4)), (torch.randn(sizes.BATCH, 10, 32),), {}


class TiedAutoencoder(nn.Module):
    """The decoder uses the encoder's weights, transposed."""

    def __init__(self, widths=(48, 32, 16)):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.biases = nn.ParameterList(torch.zeros(width) for width in widths[-2::-1])

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        code = x
        for layer, bias in zip(reversed(self.layers), self.biases, strict=True):
            x = torch.tanh(F.linear(x, layer.weight.t(), bias))
        return x, code


@entry("torch")
def tied_autoencoder():
    return TiedAutoencoder(), (torch.randn(sizes.BATCH, 48),), {}


class LoopedBlock(nn.Module):
    """One block applied many times, fed with the input each time, as a universal transformer does."""

    def __init__(self, width=32, steps=5):
        super().__init__()
        self.steps = steps
        self.block = nn.TransformerEncoderLayer(width, 4, 64, batch_first=True)
        self.step = nn.Parameter(torch.randn(steps, width) * 0.02)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        y = torch.zeros_like(x)
        for i in range(self.steps):
            y = self.block(x + y + self.step[i])
        return self.head(y)


@entry("torch")
def looped_block():
    return LoopedBlock(), (torch.randn(sizes.BATCH, 10, 32),), {}


class Recommender(nn.Module):
    """Tables and a dense part meet in their pairwise products (DLRM)."""

    def __init__(self, tables=4, width=16):
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(50, width) for _ in range(tables))
        self.bottom = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, width))
        self.register_buffer("pairs", torch.triu_indices(tables + 1, tables + 1, 1))
        self.top = nn.Sequential(nn.Linear(width + self.pairs.shape[1], 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, dense, bags):
        x = self.bottom(dense)
        rows = torch.stack([x, *(table(bag) for table, bag in zip(self.tables, bags, strict=True))], dim=1)
        products = torch.bmm(rows, rows.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return torch.sigmoid(self.top(torch.cat([x, products], dim=1)))


@entry("torch")
def recommender():
    bags = [torch.randint(0, 50, (sizes.BATCH, 3)) for _ in range(4)]
    return Recommender(), (torch.randn(sizes.BATCH, 8),), {"bags": bags}


class MultiTask(nn.Module):
    """A dictionary of inputs, a shared trunk conditioned by the text, a dictionary of nested outputs."""

    def __init__(self, width=32):
        super().__init__()
        self.vision = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(2))
        self.text = nn.Embedding(VOCAB, width)
        self.film = nn.Linear(width, 2 * width)
        self.trunk = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.enter = nn.Linear(16, width)
        self.heads = nn.ModuleDict({"kind": nn.Linear(width, 5), "box": nn.Linear(width, 4)})

    def forward(self, batch):
        scale, shift = self.film(self.text(batch["text"]).mean(1)).chunk(2, dim=-1)
        x = self.enter(self.vision(batch["image"]).transpose(1, 2))
        for layer in self.trunk:
            x = F.gelu(layer(x)) * (1 + scale[:, None]) + shift[:, None]
        pooled = x.mean(1)
        return {"heads": {name: head(pooled) for name, head in self.heads.items()}, "features": (x, pooled)}


@entry("torch")
def multi_task():
    return MultiTask(), ({"image": image(16), "text": token_ids(5)},), {}


class Ranker(nn.Module):
    """For inference alone: the best of a fixed set of items for each query, without gradients."""

    def __init__(self, width=32, items=40):
        super().__init__()
        self.query = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.LayerNorm(width))
        self.register_buffer("items", torch.randn(items, width))

    @torch.no_grad()
    def forward(self, x):
        best = (self.query(x) @ self.items.t()).topk(5)
        return best.values.softmax(-1), best.indices


@entry("torch", trains=False)
def ranker():
    return Ranker(), (torch.randn(sizes.BATCH, 8),), {}
