"""Network blocks: attention, transformer, image encoder, pooling, augmentation.
B batch, L tokens, D width, H W pixels, h w cells of a feature map."""

import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models.resnet import BasicBlock


def drop(x, share):
    """Dropout.  ours: on a CPU each byte of a draw decides once, by which `share` is rounded to a
    256th: drawing was a sixth of a step."""
    if not share or x.is_cuda:
        return F.dropout(x, share)
    least = round(256 * share)
    draws = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-2 ** 63, None)
    kept = draws.view(torch.uint8)[:x.numel()].view(x.shape) >= least
    return x * kept.to(x.dtype).div_(1 - least / 256)


def attend(q, k, v, mask=None, dropout=0.0):
    """Attention: q (B, heads, Q, d), k, v (B, heads, L, d), mask (Q, L) bool -> as q."""
    if q.is_cuda or q.dtype != torch.bfloat16 and not dropout:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout)
    # The same, written out: in bf16 on a CPU 2.9 times faster, forward and backward; autocast would
    # take the softmax in float32, between two copies, a quarter slower
    with torch.autocast(q.device.type, enabled=False):
        score = q / math.sqrt(q.shape[-1]) @ k.transpose(-1, -2)            # (B, heads, Q, L)
        score = score if mask is None else score.masked_fill(~mask, -math.inf)
        return drop(score.softmax(-1), dropout) @ v


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim, heads, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x, mask=None):
        """x (B, L, D) float; mask (L, L) bool, True = row may attend to column -> (B, L, D)."""
        # q, k and v all come from the normalised input: with the norm on q alone, k and v would be
        # the raw residuals, which grow with depth.
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for part in self.qkv(self.norm1(x)).chunk(3, -1))    # (B, heads, L, d) each
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, mask, dropout).transpose(1, 2).flatten(2)   # (B, L, D)
        x = x + drop(self.out(y), dropout)
        return x + drop(self.down(F.gelu(self.up(self.norm2(x)))), dropout)


class Transformer(nn.Module):
    """`depth` blocks and a final LayerNorm."""

    def __init__(self, dim, depth, heads, dropout=0.0):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            # GPT-2: 2 * depth branches add up in the residual; scaled, their sum starts as one.
            for linear in (block.out, block.down):
                nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * depth))

    def forward(self, x, mask=None):
        """x (B, L, D), mask as of a Block -> (B, L, D)."""
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


def block_causal_mask(steps, tokens):
    """A token sees all of its own and of earlier steps.  -> (L, L) bool, L = steps * tokens."""
    step = torch.arange(steps * tokens) // tokens                           # (L,)
    return step[:, None] >= step[None, :]                                   # (L, L)


class ImageEncoder(nn.Module):
    """ResNet with GroupNorm.  `blocks` = residual blocks per stage, `channels` = width of the first
    stage, a multiple of 16, doubled at each next one: (2, 2, 2, 2) and 64 is ResNet-18 with stride
    32; (1, 1, 1) has stride 16; () is a linear embedding of patches of 16 x 16 pixels (ViT)."""

    def __init__(self, dim, blocks=(2, 2, 2, 2), channels=64):
        super().__init__()
        # differs: GroupNorm, where ResNet has BatchNorm: its statistics go on moving in a "frozen"
        # encoder, and rollout batches of one differ from training batches.
        norm = lambda width: nn.GroupNorm(width // 16, width)
        width = channels
        body = [nn.Conv2d(3, width, 7, 2, 3, bias=False), norm(width), nn.ReLU(inplace=True),
                nn.MaxPool2d(3, 2, 1)]
        for stage, count in enumerate(blocks):
            for block in range(count):
                new, stride = channels * 2 ** stage, 2 if stage and not block else 1
                shortcut = nn.Sequential(nn.Conv2d(width, new, 1, stride, bias=False), norm(new))
                body.append(BasicBlock(width, new, stride, None if new == width else shortcut,
                                       norm_layer=norm))
                width = new
        self.body, self.head = nn.Sequential(*body), nn.Conv2d(width, dim, 1)
        self.stride = 2 ** (1 + len(blocks))
        if not blocks:
            self.body, self.head, self.stride = nn.Identity(), nn.Conv2d(3, dim, 16, 16), 16
        for module in self.body.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.to(memory_format=torch.channels_last)      # the faster layout, on CPUs as on GPUs

    def cells(self, size):
        """Height or width of the feature map of a picture of `size` pixels."""
        return -(-size // self.stride)

    def forward(self, images):
        """(B, H, W, 3) uint8 in 0..255, or (B, 3, H, W) float in [-1, 1] -> (B, D, h, w) float."""
        images = to_unit(images) if images.dtype == torch.uint8 else images
        return self.head(self.body(images.contiguous(memory_format=torch.channels_last)))


def to_unit(images):
    """(..., H, W, 3) uint8 -> (..., 3, H, W) in [-1, 1]."""
    return images.movedim(-1, -3).float() / 127.5 - 1


def to_tokens(features):
    """Map (B, D, h, w) -> tokens (B, h w, D), row by row."""
    return features.flatten(2).transpose(1, 2)


def to_map(tokens):
    """The inverse, of a square map."""
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def random_shift(images, pad=4):
    """Shifts each picture by up to `pad` pixels, edges repeated (DrQ).  images (B, H, W, 3) -> the
    same shape, and by how many pixels what they show has moved, (B, 2) x right, y down."""
    B, H, W, _ = images.shape
    move = torch.randint(-pad, pad + 1, (2, B, 1))
    rows = (torch.arange(H) - move[0]).clamp(0, H - 1).to(images.device)    # (B, H)
    columns = (torch.arange(W) - move[1]).clamp(0, W - 1).to(images.device)  # (B, W)
    b = torch.arange(B, device=images.device)[:, None, None]
    return images[b, rows[:, :, None], columns[:, None, :]], move[[1, 0], :, 0].T.to(images.device)


def shift_together(images):
    """One shift for all pictures of a sample: images (B, M, H, W, 3) -> as random_shift."""
    beside = images.permute(0, 2, 3, 1, 4)                              # (B, H, W, M, 3)
    shifted, pixels = random_shift(beside.flatten(3))
    return shifted.view(beside.shape).permute(0, 3, 1, 2, 4), pixels


def sincos(places, D):
    """places (..., k) -> (..., D): sines and cosines of each of the k numbers, as in ViT, MAE."""
    half = D // (2 * places.shape[-1])
    period = 10000 ** (torch.arange(half, device=places.device) / half)
    angle = places[..., None] / period                                  # (..., k, half)
    code = torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)        # (..., 2 k half)
    return F.pad(code, (0, D - code.shape[-1]))                         # (..., D)


def grid_points(side):
    """Points in the middles of side x side cells, row by row, (side side, 2)."""
    middle = (torch.arange(side) + 0.5) / side
    return torch.stack(torch.meshgrid(middle, middle, indexing="xy"), -1).reshape(-1, 2)


def grid_places(side, view):
    """Cells of a feature map, row by row -> (side side, 3): view, x, y in [0, 1]."""
    points = grid_points(side)                                 # (n, 2)
    return torch.cat([torch.full((len(points), 1), float(view)), points], 1)


class Standardise(nn.Module):
    """Brings each of `width` numbers (..., width) to mean 0 and variance 1 over the data given to
    `fit`; those whose standard deviation is below 1e-3 pass unchanged."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def fit(self, x):
        """x (rows, width), array; of more than 100,000 rows a random 100,000."""
        if len(x) > 100_000:    # every k-th would be those of the same cells
            x = x[np.random.default_rng(0).choice(len(x), 100_000, replace=False)]
        mean, std = (torch.as_tensor(f(0, dtype="float64")) for f in (x.mean, x.std))
        self.mean.copy_(torch.where(std > 1e-3, mean, 0))
        self.std.copy_(torch.where(std > 1e-3, std, 1))

    def forward(self, x):
        return (x - self.mean) / self.std


class SpatialSoftmaxPool(nn.Module):
    """A token set -> one token: key points (view, x, y; soft-argmax) beside a thin copy of all.
    places (n, 3): view, x, y in [0, 1] of the set's tokens."""

    def __init__(self, places, width, D, points=32):
        super().__init__()
        n = len(places)
        self.points = nn.Linear(width, points) if n > 1 else None   # one token is where it is
        self.thin = nn.Linear(width, max(8, D // n))
        self.out = nn.Linear(3 * points * (n > 1) + n * self.thin.out_features, D)
        self.register_buffer("places", places, persistent=False)

    def shares(self, x):
        """x (B, n, width) -> each token's share in each key point (B, n, points), in sum 1."""
        return self.points(x).float().softmax(1)

    def forward(self, x, moved):
        """x (B, n, width); moved (B, 3, 2): how far each view's picture was shifted, in widths, by
        which key points have their places in the pictures as they were -> (B, D)."""
        parts = [self.thin(x).flatten(1)]                               # (B, n channels)
        if self.points:
            share = self.shares(x)[..., None]                           # (B, n, points, 1)
            xy = self.places[:, 1:] - moved[:, self.places[:, 0].long()]            # (B, n, 2)
            view = self.places[:, :1].expand_as(xy[..., :1])            # (B, n, 1)
            where = 2 * torch.cat([view, xy], 2) - 1                    # (B, n, 3)
            # a sum: autocast would round a matrix product to a fraction of a pixel
            parts.append((share * where[:, :, None]).sum(1).flatten(1)) # (B, 3 points)
        return self.out(torch.cat(parts, -1))


def mlp(i, o):
    """A head: one hidden layer of 256."""
    return nn.Sequential(nn.Linear(i, 256), nn.GELU(), nn.Linear(256, o))
