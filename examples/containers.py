"""Three networks, one for each of PyTorch's containers, small enough to profile and split on two CPU cores.

They follow an article on `nn.Sequential`, `nn.ModuleList` and `nn.ModuleDict`, whose author had a model too large for
one GPU and found it tedious to place every child by hand. Class names, containers and keys are the article's. Its code
did not run as printed; this is what was set right:

- `NetList`: padding, so that the two tensors that meet in `torch.cat` have the same height and width; a return value.
- `NetDict`: `block_r2`, `deconv2` and `clr` are looked up in `net2`, where they live. `block13` and `block23`, which
  were defined and never called, are the third level of the two streams. `torch.add` joins tensors of one shape:
  the two streams meet once by `cat` before their last blocks and once by `add` after them; the transposed convolutions
  then climb back to the input's size. `deconv2` keeps the 64 channels that `clr` expects.

Each class has `sample_inputs()`, the batch that it is profiled with.
"""

import torch
from torch import Tensor, nn


class ConvLRelu(nn.Module):
    """A 3x3 convolution that keeps height and width (at stride 1), and a leaky ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation)
        self.act = nn.LeakyReLU(0.2)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, H / stride, W / stride)."""
        return self.act(self.conv(inputs))


class DeConvLRelu(nn.Module):
    """A transposed convolution that doubles height and width, and a leaky ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.deconv = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
        self.act = nn.LeakyReLU(0.2)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, 2 H, 2 W)."""
        return self.act(self.deconv(inputs))


class Block1(nn.Module):
    """One convolution beside a 1x1 shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = ConvLRelu(in_channels, out_channels)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, H, W)."""
        return self.conv(inputs) + self.shortcut(inputs)


class Block2(nn.Module):
    """Two convolutions in a row beside a 1x1 shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(ConvLRelu(in_channels, out_channels), ConvLRelu(out_channels, out_channels))
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (N, in, H, W) to (N, out, H, W)."""
        return self.body(inputs) + self.shortcut(inputs)


class Net(nn.Module):
    """The `nn.Sequential` network: a fixed order, one call."""

    def __init__(self) -> None:
        super().__init__()
        self.seq1 = nn.Sequential(
            nn.Conv2d(16, 32, 3, 1),
            Block1(32, 32),
            nn.ReLU(inplace=True),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (N, 16, H, W) to (N, 32, H - 2, W - 2)."""
        return self.seq1(inputs)

    @staticmethod
    def sample_inputs() -> tuple[Tensor, ...]:
        """A batch of 16."""
        return (torch.randn(16, 16, 96, 96),)


class NetList(nn.Module):
    """The `nn.ModuleList` network: children used by index, one tensor read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.list1 = nn.ModuleList(
            [
                nn.Conv2d(16, 32, 3, 1, padding=1),
                Block1(32, 32),
                nn.Conv2d(32, 64, 3, 1, padding=1),
                nn.Conv2d(96, 64, 3, 1, padding=1),
                Block2(64, 32),
            ]
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (N, 16, H, W) to (N, 32, H, W)."""
        x = self.list1[0](inputs)
        x1 = self.list1[1](x)
        x2 = self.list1[2](x)
        x3 = torch.cat((x1, x2), 1)
        x4 = self.list1[3](x3)
        return self.list1[4](x4)

    @staticmethod
    def sample_inputs() -> tuple[Tensor, ...]:
        """A batch of 16."""
        return (torch.randn(16, 16, 48, 48),)


class NetDict(nn.Module):
    """The `nn.ModuleDict` network: two encoder streams, joined by `cat` and by `add`."""

    def __init__(self) -> None:
        super().__init__()
        self.net1 = nn.ModuleDict(
            {
                "block11": Block1(1, 32),
                "downsample11": ConvLRelu(32, 32, 2, 1),
                "block12": Block2(32, 64),
                "downsample12": ConvLRelu(64, 64, 2, 1),
                "block13": ConvLRelu(64, 128),
                "block21": Block2(1, 32),
                "downsample21": ConvLRelu(32, 32, 2, 2),
                "block22": Block2(32, 64),
                "downsample22": ConvLRelu(64, 64, 2, 2),
                "block23": Block2(64, 128),
            }
        )
        self.net2 = nn.ModuleDict(
            {
                "block_r1": Block1(128, 128),
                "deconv1": DeConvLRelu(128, 128),
                "block_r2": Block1(128, 64),
                "deconv2": DeConvLRelu(64, 64),
                "clr": ConvLRelu(64, 32, 1, 1),
            }
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (N, 1, H, W) to (N, 32, H, W); H and W are multiples of 4."""
        x11 = self.net1["block11"](inputs)
        x21 = self.net1["block21"](inputs)
        xd11 = self.net1["downsample11"](x11)
        xd21 = self.net1["downsample21"](x21)
        x12 = self.net1["block12"](xd11)
        x22 = self.net1["block22"](xd21)
        xd12 = self.net1["downsample12"](x12)
        xd22 = self.net1["downsample22"](x22)
        x13 = self.net1["block13"](xd12)
        x23 = self.net1["block23"](xd22)

        x_cat = torch.cat((xd12, xd22), 1)
        xr1 = self.net2["block_r1"](x_cat)
        xadd = torch.add(x13, x23)
        xadd = torch.add(xadd, xr1)
        xdc1 = self.net2["deconv1"](xadd)
        xr2 = self.net2["block_r2"](xdc1)
        xdc2 = self.net2["deconv2"](xr2)
        return self.net2["clr"](xdc2)

    @staticmethod
    def sample_inputs() -> tuple[Tensor, ...]:
        """A batch of 16."""
        return (torch.randn(16, 1, 60, 60),)
