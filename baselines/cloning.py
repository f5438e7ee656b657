"""What cloning is compared with, beside plans: R3M's encoder and VPT's labels (ATM, section V-A).

    python executor.py --planner none --goal language                    # ATM's BC
    python executor.py --planner none --encoder r3m --weights r3m_18.pt  # R3M, fine-tuned
    python executor.py --planner none --labels vpt                       # VPT

R3M: the clone's image encoders start from R3M's published ResNet and are trained on with it.
VPT: a model that sees what comes after, trained on the action demonstrations, says what was done in
all videos; the clone learns from that.

Sizes: B batch, K pictures that the inverse dynamics model sees, F frames, n tokens per picture, D
width, H W pixels.
"""

import torch
import torch.nn as nn
import torchvision

from core import networks, training
from core.files import fail

PREFIX = "module.convnet."  # of the names of R3M's weights


# --- R3M ------------------------------------------------------------------------------------------

class R3M(nn.Module):
    """A ResNet as R3M publishes it, and a projection, in place of core.ImageEncoder.

    differs: at the picture's own size, where R3M enlarges to 224 pixels; ATM, before, goes on
    training it by R3M's own loss on its videos.
    """
    stride = 32

    def __init__(self, dim, depth):
        super().__init__()
        self.convnet = getattr(torchvision.models, f"resnet{depth}")(weights=None)
        self.head = nn.Conv2d(self.convnet.fc.in_features, dim, 1)
        self.convnet.fc = nn.Identity()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], False)

    cells = networks.ImageEncoder.cells

    def train(self, mode=True):
        """ours: its BatchNorm keeps the statistics it was published with."""
        super().train(mode)
        for module in self.convnet.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, images):
        """(B, H, W, 3) uint8 -> (B, D, h, w) float."""
        x, net = (images.permute(0, 3, 1, 2) / 255 - self.mean) / self.std, self.convnet
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))  # (B, 64, H/4, W/4)
        return self.head(net.layer4(net.layer3(net.layer2(net.layer1(x)))))


def read_r3m(path):
    """R3M's published checkpoint -> its ResNet's weights {name: tensor}, the ResNet's depth."""
    content = training.load(path, made_by="R3M's authors publish it, for ResNet-18, 34 and 50")
    found = content.get("r3m")
    found = found if isinstance(found, dict) else {}
    weights = {k.removeprefix(PREFIX): v for k, v in found.items() if k.startswith(PREFIX)}
    if "layer1.0.conv1.weight" not in weights:
        fail(f"{path} has no weights {PREFIX}* under 'r3m': give R3M's published checkpoint")
    depth = 50 if "layer1.0.conv3.weight" in weights else \
        34 if "layer1.2.conv1.weight" in weights else 18
    wanted = {k: v.shape for k, v in R3M(8, depth).convnet.state_dict().items()}
    for name in wanted | weights:
        if name not in weights or weights[name].shape != wanted.get(name):
            fail(f"{path} looks like a ResNet-{depth}, but its {name} does not: give R3M's "
                      "published checkpoint")
    return weights, depth
