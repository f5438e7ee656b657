"""Behavioural cloning as a planner: the plan is the goal itself, as a picture or a sentence.

    python executor.py --planner none                       # cloning of picture and goal picture
    python executor.py --planner none-language              # of picture and sentence (ATM's BC)
    python -m baselines.cloning --r3m r3m_18.pt --out runs/r3m.pt     # R3M's encoder, then
    python executor.py --planner runs/r3m.pt                # ... fine-tuned as the clone's

These planners have no stage 1; those with an encoder are not `frozen`: the executor trains it.

Sizes: B batch, n tokens per picture, D width, E per sentence, H W pixels.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
from torchvision import models
from torchvision.transforms.v2.functional import normalize

from core import networks, training
from core.episodes import CAMERAS
from core.files import fail
from core.flags import flag, parse


@dataclass
class Config:
    r3m: str = flag("", "R3M's published checkpoint, of ResNet-18, 34 or 50")
    size: int = flag(96, "height and width of the pictures, pixels", minimum=32)
    out: str = flag("runs/r3m.pt", "checkpoint to write")

    resnet: int = 18                    # R3M's depth
    width: int = 128
    blocks: tuple[int, ...] = (1, 1, 1)
    channels: int = 32
    E: int = 0


class Cloning(nn.Module):
    """The goal picture as the plan, beside the present picture, through one trained encoder."""
    kind, forms, frozen, history, stride = "none", ["goal"], False, 1, 1
    Config = Config

    def __init__(self, config):
        super().__init__()
        self.config, self.size = config, config.size
        self.encoder = networks.ImageEncoder(config.width, config.blocks, config.channels)

    def sets(self, form):
        """-> {name: (places (n, 3), width)}."""
        cells = networks.grid_places(self.encoder.cells(self.size), 0), self.config.width
        return {"picture": cells, "goal": cells}

    def plan(self, obs, form):
        """obs with frames (B, 1, H, W, 3), goal (B, H, W, 3) uint8 -> {name: (B, n, D)}."""
        both = torch.cat([obs["frames"][:, -1], obs["goal"]])               # (2 B, H, W, 3)
        picture, goal = networks.to_tokens(self.encoder(both)).chunk(2)
        return {"picture": picture, "goal": goal}

    def draw(self, obs):
        """-> [(caption, (H, W, 3) uint8)]."""
        return [("goal", obs["goal"][0].cpu().numpy())]


class LanguageCloning(nn.Module):
    """ATM's BC: the sentence's embedding as the plan, beside the executor's own encoders.  differs:
    the executor of all plans, without a plan; ATM's is its policy with tracks of zeros."""
    kind, forms, frozen, history, stride = "none-language", ["sentence"], True, 1, 1
    Config = Config

    def __init__(self, config):
        super().__init__()
        self.config, self.size = config, config.size

    def sets(self, form):
        return {"sentence": (torch.tensor([[2, 0.5, 0.5]]), self.config.E)}

    def plan(self, obs, form):
        """obs with text (B, E) -> {"sentence": (B, 1, E)}."""
        return {"sentence": obs["text"][:, None]}

    def draw(self, obs):
        return []


class R3M(nn.Module):
    """A ResNet as R3M publishes it, and a projection, in place of networks.ImageEncoder.  differs:
    at the picture's own size, where R3M enlarges to 224 pixels."""
    stride = 32

    def __init__(self, dim, depth):
        super().__init__()
        self.convnet = getattr(models, f"resnet{depth}")(weights=None)
        self.head = nn.Conv2d(self.convnet.fc.in_features, dim, 1)
        self.convnet.fc = nn.Identity()

    cells = networks.ImageEncoder.cells

    def train(self, mode=True):
        """ours: its BatchNorm keeps the statistics it was published with."""
        super().train(mode)
        self.convnet.eval()
        return self

    def forward(self, images):
        """(B, H, W, 3) uint8 -> (B, D, h, w) float."""
        x, net = images.permute(0, 3, 1, 2) / 255, self.convnet             # (B, 3, H, W)
        x = normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))                    # (B, 64, H/4, W/4)
        return self.head(net.layer4(net.layer3(net.layer2(net.layer1(x)))))


class R3MCloning(Cloning):
    """Cloning whose encoders, of both cameras, start from R3M's and are trained on (ATM, V-A).
    differs: ATM, before, goes on training them by R3M's own loss on its videos, and gives the
    sentence; Mask2Act gives zeros for a plan."""
    kind = "r3m"

    def __init__(self, config):
        nn.Module.__init__(self)
        if not config.r3m:
            fail("R3M's encoder comes from its published checkpoint: python -m baselines.cloning "
                 "--r3m r3m_18.pt, then --planner runs/r3m.pt")
        self.config, self.size = config, config.size
        self.encoder, self.wrist = (R3M(config.width, config.resnet) for _ in CAMERAS)

    def sets(self, form):
        places = networks.grid_places(self.wrist.cells(self.size), 1)
        return super().sets(form) | {"wrist": (places, self.config.width)}

    def plan(self, obs, form):
        """As Cloning's, and obs with wrist (B, H, W, 3) uint8."""
        wrist = networks.to_tokens(self.wrist(obs["wrist"]))                # (B, n, D)
        return super().plan(obs, form) | {"wrist": wrist}


def read_r3m(path):
    """R3M's published checkpoint -> its ResNet's weights {name: tensor}, the ResNet's depth."""
    content = training.load(path, made_by="load_r3m of R3M's own package, which downloads it")
    prefix, found = "module.convnet.", content.get("r3m")
    found = found if isinstance(found, dict) else {}
    weights = {k.removeprefix(prefix): v for k, v in found.items() if k.startswith(prefix)}
    if "layer1.0.conv1.weight" not in weights:
        fail(f"{path} has no weights {prefix}* under 'r3m': give R3M's published checkpoint")
    depth = (50 if "layer1.0.conv3.weight" in weights else
             34 if "layer1.2.conv1.weight" in weights else 18)
    found, wanted = ({name: x.shape for name, x in state.items()}
                     for state in (weights, R3M(8, depth).convnet.state_dict()))
    for name in wanted | found:
        if found.get(name) != wanted.get(name):
            fail(f"{path} looks like a ResNet-{depth}, but its {name} does not: give R3M's "
                 "published checkpoint")
    return weights, depth


def main(argv=None):
    """Command line: R3M's checkpoint -> a planner's, which executor.py takes."""
    config = parse(Config, "R3M's encoder as a planner that the executor trains.", argv)
    if not config.r3m:
        fail("no --r3m: give R3M's published checkpoint")
    weights, config.resnet = read_r3m(config.r3m)
    torch.manual_seed(0)
    planner = R3MCloning(config)
    for encoder in (planner.encoder, planner.wrist):
        encoder.convnet.load_state_dict(weights)
    training.save(config.out, kind=planner.kind, config=asdict(config),
                  model=planner.state_dict(), ema=None, version=training.VERSION)
    print(f"next: python executor.py --planner {config.out} --suite <suite>")


if __name__ == "__main__":
    main()
