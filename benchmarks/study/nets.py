"""Small networks, each with one linear head."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def make_net(name: str, side: int, classes: int) -> nn.Module:
    """A network for grey images [batch, 1, side, side]."""
    return {"mlp": mlp, "cnn": cnn, "resnet": ResNet, "vit": ViT}[name](side, classes)


def mlp(side: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(side * side, 512),
        nn.ReLU(),
        nn.Linear(512, 256),
        nn.ReLU(),
        nn.Linear(256, classes),
    )


def cnn(side: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (side // 4) ** 2, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


class ResNet(nn.Module):
    """Three residual blocks with batch normalisation and global average pooling."""

    def __init__(self, side: int, classes: int) -> None:
        super().__init__()
        widths = (32, 64, 128)
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.blocks = nn.ModuleList()
        self.shortcuts = nn.ModuleList()
        before = 32
        for width in widths:
            stride = 1 if width == before else 2
            self.blocks.append(
                nn.Sequential(
                    nn.Conv2d(before, width, 3, stride, 1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                    nn.Conv2d(width, width, 3, 1, 1, bias=False),
                    nn.BatchNorm2d(width),
                )
            )
            self.shortcuts.append(nn.Identity() if stride == 1 else nn.Conv2d(before, width, 1, stride, bias=False))
            before = width
        self.head = nn.Linear(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, shortcut in zip(self.blocks, self.shortcuts, strict=True):
            x = F.relu(block(x) + shortcut(x))
        return self.head(x.mean((2, 3)))


class ViT(nn.Module):
    """Three transformer layers of width 64; a patch is a quarter of the image wide."""

    def __init__(self, side: int, classes: int) -> None:
        super().__init__()
        patch = side // 4
        self.embed = nn.Conv2d(1, 64, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn((side // patch) ** 2, 64))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True, activation="gelu")
            for _ in range(3)
        )
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))
