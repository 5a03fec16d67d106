"""Written by hand with torch: convolutions."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from zoo import sizes
from zoo.registry import entry
from zoo.sizes import image


class ResidualBlock(nn.Module):
    def __init__(self, inside, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.down = None
        if stride != 1 or inside != out:
            self.down = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.down is None else self.down(x)
        return self.relu(y)


class HandResNet(nn.Module):
    def __init__(self, widths):
        super().__init__()
        stem = widths[0]
        self.stem = nn.Sequential(nn.Conv2d(3, stem, 3, 1, 1), nn.BatchNorm2d(stem), nn.ReLU(inplace=True))
        self.layers = nn.Sequential()
        for inside, out in pairwise((stem, *widths)):
            self.layers.append(nn.Sequential(ResidualBlock(inside, out, 2), ResidualBlock(out, out, 1)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x):
        return self.head(self.pool(self.layers(self.stem(x))).flatten(1))


@entry("torch")
def hand_resnet():
    return HandResNet([width * sizes.CHANNELS for width in (16, 32, 48)]), (image(),), {}


class InvertedResidual(nn.Module):
    """Expand, convolve each channel, squeeze and excite, project; the input is added where shapes agree."""

    def __init__(self, inside, out, stride, expand=4):
        super().__init__()
        hidden = inside * expand
        self.expand = nn.Sequential(nn.Conv2d(inside, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6())
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()
        )
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(hidden, inside, 1), nn.ReLU(), nn.Conv2d(inside, hidden, 1), nn.Sigmoid()
        )
        self.project = nn.Sequential(nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out))
        self.adds = stride == 1 and inside == out

    def forward(self, x):
        y = self.depthwise(self.expand(x))
        y = self.project(y * self.gate(y))
        return x + y if self.adds else y


@entry("torch")
def hand_mobilenet():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU6(), InvertedResidual(8, 8, 1), InvertedResidual(8, 16, 2),
        InvertedResidual(16, 16, 1), InvertedResidual(16, 24, 2), InvertedResidual(24, 24, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(24, 10),
    )  # fmt: skip
    return model, (image(),), {}


def _double_conv(inside, out):
    return nn.Sequential(
        nn.Conv2d(inside, out, 3, padding=1), nn.GroupNorm(4, out), nn.SiLU(), nn.Conv2d(out, out, 3, padding=1)
    )


class PoppedUNet(nn.Module):
    """Skips are kept in a list on the way down and popped on the way up."""

    def __init__(self, widths):
        super().__init__()
        self.down = nn.ModuleList(_double_conv(i, o) for i, o in pairwise((3, *widths)))
        self.pool = nn.MaxPool2d(2)
        self.middle = _double_conv(widths[-1], widths[-1])
        self.up = nn.ModuleList(
            _double_conv(2 * w, o) for w, o in zip(widths[::-1], (*widths[-2::-1], widths[0]), strict=True)
        )
        self.head = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x):
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = self.pool(x)
        x = self.middle(x)
        for block in self.up:
            x = F.interpolate(x, scale_factor=2)
            x = block(torch.cat([x, skips.pop()], dim=1))
        return self.head(x)


@entry("torch")
def hand_unet():
    return PoppedUNet([width * sizes.CHANNELS for width in (8, 16, 32)]), (image(),), {}


class WaveLayer(nn.Module):
    def __init__(self, width, dilation):
        super().__init__()
        self.pad = dilation
        self.filter = nn.Conv1d(width, width, 2, dilation=dilation)
        self.gate = nn.Conv1d(width, width, 2, dilation=dilation)
        self.residual = nn.Conv1d(width, width, 1)
        self.skip = nn.Conv1d(width, 2 * width, 1)

    def forward(self, x):
        padded = F.pad(x, (self.pad, 0))
        y = torch.tanh(self.filter(padded)) * torch.sigmoid(self.gate(padded))
        return x + self.residual(y), self.skip(y)


class WaveNet(nn.Module):
    """Each layer passes a residual on and adds its skip to one sum."""

    def __init__(self, width=16, layers=6):
        super().__init__()
        self.start = nn.Conv1d(1, width, 1)
        self.layers = nn.ModuleList(WaveLayer(width, 2**i) for i in range(layers))
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(2 * width, 32, 1), nn.ReLU(), nn.Conv1d(32, 32, 1))

    def forward(self, x):
        x = self.start(x)
        total = 0
        for layer in self.layers:
            x, skip = layer(x)
            total = total + skip
        return self.end(total)


@entry("torch")
def hand_wavenet():
    return WaveNet(), (torch.randn(sizes.BATCH, 1, 96),), {}


class Inception(nn.Module):
    """Branches of different kernels over one input, joined along the channels."""

    def __init__(self, inside, out):
        super().__init__()
        self.branches = nn.ModuleDict({f"k{k}": nn.Conv2d(inside, out, k, padding=k // 2) for k in (1, 3, 5)})
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(inside, out, 1))

    def forward(self, x):
        return F.relu(torch.cat([*(branch(x) for branch in self.branches.values()), self.pooled(x)], dim=1))


@entry("torch")
def hand_inception():
    blocks = [Inception(3, 8), nn.MaxPool2d(2), Inception(32, 8), Inception(32, 8), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(32, 10)), (image(),), {}


class MixerBlock(nn.Module):
    def __init__(self, tokens, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.Sequential(nn.Linear(tokens, 32), nn.GELU(), nn.Linear(32, tokens))
        self.within = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))

    def forward(self, x):
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.within(self.norm2(x))


@entry("torch")
def hand_mixer():
    blocks = nn.Sequential(*[MixerBlock(24, 16) for _ in range(4)])
    return (
        nn.Sequential(nn.Linear(6, 16), blocks, nn.LayerNorm(16), nn.Linear(16, 4)),
        (torch.randn(sizes.BATCH, 24, 6),),
        {},
    )
