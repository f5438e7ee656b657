"""ATM stage 1 (section IV-A, Table VI): learn from action-free video where any points will go.

    python track_planner.py --suite libero_spatial                # makes missing data first
    python track_planner.py --suite libero_spatial --track ee     # MimicPlay: the hand's path alone
    python track_planner.py --suite libero_spatial --goal language           # ATM's own task input
    python track_planner.py --suite libero_spatial:2,libero_spatial_ur5e     # two bodies (ATM, V-B)
    python track_planner.py --suite libero_spatial --show         # predicted beside true tracks

The track transformer reads one picture, the present places of some points in it and the task, and
predicts each point's track (Fig. 2a); by the paper preset half of the picture's patches are masked
and reconstructed. Points, encoded by place and picture there, may be any number in any order.

Sizes: B batch, S points of a track, P patches of a track, N points, n cells of the picture, h w the
encoder's map (n = h w), D width, E numbers per sentence.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from core import networks, training
from core.draw import caption, draw_tracks
from core.flags import PlannerConfig, flag, parse
from core.planners import load_planner

# differs: the S places are those to come; ATM's first is the present one, which is known
STEPS, PATCH = 16, 4  # S places of a track (Table VI), in patches of 4
# control steps between the places.  differs: ATM's are those of 16 consecutive steps (0.8 s); here
# tracks, the hand's path (MimicPlay) and masks look equally far ahead, 32 steps
SPACING = 2
SIDE = 16  # pixels of a patch of the picture
# ATM's 32 fixed points of each picture, for the policy (IV-B): two lattices of 4 x 4
POINTS = [[x, y] for lattice in (np.linspace(0.05, 0.85, 4), np.linspace(0.15, 0.95, 4))
          for y in lattice.tolist() for x in lattice.tolist()]
# typical displacement of these points, in widths of the picture: third person, wrist
DISPLACEMENT_SCALE = (0.05, 0.25)
LENGTHS = {"tracks": 16, "tracks-8": 8, "tracks-4": 4}  # places that the policy is given (Fig. 9)
MARGIN = 0.75  # from the picture's middle, in widths: a place further off has no loss
SCORED = (8, 16, 32)  # control steps ahead at which validation gives the error
PIXELS = 128  # width of the picture in whose pixels errors are given, whatever its real size
MOVES = 2 / PIXELS  # a point whose track goes further than this moves


@dataclass
class Config(PlannerConfig):
    # differs, ee: one path in the picture, by squared error; MimicPlay: in space, a mixture of five
    track: str = flag("any", "whose tracks are predicted: any point's (ATM), or ee, the hand's "
                      "(MimicPlay)", choices=["any", "ee"])
    # differs: by default the goal picture, as for the other planners; ATM's input is the sentence
    goal: str = flag("image", "task conditioning: the goal picture, or language (ATM's own)",
                     choices=["image", "language"])
    mask_ratio: float | None = flag(None, "share of the picture's patches that are masked; 0: no "
                                    "reconstruction loss either (ATM, Table II)",
                                    minimum=0, maximum=1)

    num_points: int = 32    # points per training sample
    jitter: float = 0.0     # of brightness, contrast, saturation and hue
    dropout: float = 0.0

    # Table VI has weight decay, clipping and AdamW with a cosine.  differs: 100 steps of warm-up
    # (ATM: 5 of 100 epochs), no decay of biases and norms, and the last weights are kept (ATM:
    # those of the lowest validation loss; its released code: Adam without weight decay)
    weight_decay, warmup, clip = 1e-4, 100, 10.0
    # differs: no masks and no jitter at the laptop preset, whose training is too short for them; at
    # the paper preset a batch of 512 for one GPU (ATM: 1,024 on four)
    PRESETS = {
        "tiny": dict(demos=2, steps=5, size=64, width=32, depth=1, channels=16, batch=4, lr=1e-3,
                     mask_ratio=0.0),
        "laptop": dict(demos=20, steps=2000, size=96, width=128, depth=4, channels=32, batch=32,
                       lr=1e-3, mask_ratio=0.0),
        "paper": dict(demos=50, steps=50000, size=128, width=384, depth=8, blocks=(), batch=512,
                      lr=1e-4, mask_ratio=0.5, jitter=0.3, dropout=0.2)}


# --- pictures and tracks --------------------------------------------------------------------------

def track_patches(tracks):
    """(B, S, N, 2) -> (B, P, N, 2 PATCH): each point's track in pieces of PATCH places."""
    B, S, N, _ = tracks.shape
    return tracks.reshape(B, S // PATCH, PATCH, N, 2).transpose(2, 3).flatten(3)


def track_from_patches(patches):
    """The inverse: (B, P, N, 2 PATCH) -> (B, S, N, 2)."""
    return patches.unflatten(3, (PATCH, 2)).transpose(2, 3).flatten(1, 2)


def features_at(features, points):
    """Map (B, D, h, w), places (B, N, 2) in [0, 1] -> its bilinear values there, towards the edge
    those of the last cells (B, N, D)."""
    where = 2 * points.float()[:, :, None] - 1  # (B, N, 1, 2) in [-1, 1]
    x = F.grid_sample(features.float(), where, padding_mode="border", align_corners=False)
    return x[..., 0].transpose(1, 2)


def mask_patches(images, masked):
    """images (B, 3, H, W) in [-1, 1], masked (B, H/SIDE, W/SIDE) bool -> the same, masked ones grey
    (0)."""
    pixels = masked.repeat_interleave(SIDE, 1).repeat_interleave(SIDE, 2)  # (B, H, W)
    return images.masked_fill(pixels[:, None], 0)


def augment(images, tracks, strength):
    """ATM's augmentation (Table VI): colour jitter of 9 in 10 pictures, then a random shift of each
    by up to 4 pixels, its tracks with it.  images (B, H, W, 3) uint8, tracks (B, T, N, 2) in
    [0, 1], strength of the jitter -> the same.
    differs: tracks shift with the sign and the axes of the picture; ATM's code swaps them."""
    from torchvision.transforms import v2
    colours = v2.RandomApply([v2.ColorJitter(*[strength] * 4)], 0.9)
    # ours: one draw of colours for an eighth of the batch
    images = torch.cat([colours(part) for part in images.permute(0, 3, 1, 2).chunk(8)])
    images, moved = networks.random_shift(images.permute(0, 2, 3, 1))  # (B, 2) pixels x, y
    size = torch.tensor([images.shape[2], images.shape[1]], device=moved.device)
    return images, tracks + (moved / size)[:, None, None]


def displacements(tracks):
    """Tracks from POINTS in third person and wrist (B, 2, S, N, 2) -> how far each point will have
    gone, in units of DISPLACEMENT_SCALE.
    differs: ATM's policy is given places; what changes is a few percent of a coordinate, too small
    a signal next to it."""
    points = torch.tensor(POINTS, device=tracks.device)
    scale = torch.tensor(DISPLACEMENT_SCALE, device=tracks.device)[:, None, None, None]
    return (tracks - points) / scale


# --- network --------------------------------------------------------------------------------------

class TrackPlanner(nn.Module):
    """The track transformer (Fig. 2a).

    differs: plain pre-norm blocks; ATM's code norms the query only and shares one key and value
    head. One sentence encoder for all planners (demos/language.py); ATM uses BERT."""
    kind, Config, frozen = "track", Config, True
    history, stride = 1, 1  # one frame, "to avoid causal confusion" (appendix B)

    def __init__(self, config):
        super().__init__()
        self.config, self.size, D = config, config.size, config.width
        self.forms = [*LENGTHS, "latent"] if config.track == "any" else ["latent"]
        # ATM: a linear embedding of patches (the paper preset, blocks ()).  differs: at the laptop
        # preset a small ResNet of the same stride, by which what points show is learned sooner
        self.encoder = networks.ImageEncoder(D, config.blocks, config.channels)
        self.side = config.size // SIDE  # the feature map is side x side
        self.track = nn.Linear(2 * PATCH, D)
        order = torch.arange(STEPS // PATCH).float()  # of the patches
        self.time = nn.Parameter(networks.sincos(order[:, None], D)[:, None])  # (P, 1, D)
        self.register_buffer("grid", networks.grid_points(self.side), persistent=False)  # (n, 2)
        self.text = nn.Linear(config.E, D) if config.goal == "language" else None
        self.task = nn.Parameter(torch.randn(D) * 0.02)  # marks the task's tokens
        self.transformer = networks.Transformer(D, config.depth, max(4, D // 48), config.dropout)
        self.track_head = nn.Linear(D, 2 * PATCH)
        nn.init.normal_(self.track_head.weight, std=1e-3)  # at first, points stay
        if config.mask_ratio:  # a linear un-patching of each token
            self.image_head = nn.ConvTranspose2d(D, 3, SIDE, SIDE)

    def encode(self, images, mask_ratio=0.0):
        """(B, H, W, 3) uint8, a share of its patches masked -> map (B, D, h, w).
        differs: masked patches are grey pixels; ATM replaces their tokens by a learned one, which
        an encoder that looks beyond its patch would see around."""
        masked = torch.rand(len(images), self.side, self.side, device=images.device) < mask_ratio
        return self.encoder(mask_patches(networks.to_unit(images), masked))

    def locate(self, points):
        """Places (..., 2) in [0, 1] -> their encoding (..., D), one for points and cells.
        differs: ATM's points have none but the linear embedding of their coordinates, from which
        attention learns late which patch is theirs."""
        return networks.sincos(points.float() * self.side - 0.5, self.config.width)

    def forward(self, features, points, goal):
        """features (B, D, h, w) from `encode`; points (B, N, 2) in [0, 1], x right, y down; goal
        (B, H, W, 3) uint8 or, with --goal language, (B, E)
        -> tokens of the tracks (B, P, N, D), tokens of the picture (B, n, D)."""
        B, N, _ = points.shape
        # the future is masked by the present place (the official code; not a mask token)
        still = track_patches(points[:, None].expand(B, STEPS, N, 2))  # (B, P, N, 2 PATCH)
        # differs: features of the picture at the point are added; attention alone finds them late
        here = features_at(features, points) + self.locate(points)  # (B, N, D)
        tracks = self.track(still) + self.time + here[:, None]
        cells, place = networks.to_tokens(features), self.locate(self.grid)  # (B, n, D), (n, D)
        task = (networks.to_tokens(self.encode(goal)) + place if self.text is None
                else self.text(goal.float())[:, None])  # (B, n or 1, D)
        x = torch.cat([tracks.flatten(1, 2), cells + place, task + self.task], 1)
        x, L = self.transformer(x), tracks.shape[1] * N
        return x[:, :L].unflatten(1, (-1, N)), x[:, L:L + len(place)]

    def tracks_of(self, tokens, points):
        """Tokens of tracks (B, P, N, D), points (B, N, 2) -> places (B, S, N, 2).  ours: the head
        predicts the way from the present place; the loss is on places, as in ATM."""
        return points[:, None] + track_from_patches(self.track_head(tokens).float())

    def predict(self, images, points, goal):
        """images (B, H, W, 3) uint8, points (B, N, 2), goal as for forward -> (B, S, N, 2), the
        places to come, SPACING control steps apart."""
        return self.tracks_of(self(self.encode(images), points, goal)[0], points)

    def loss(self, batch):
        """batch: image (B, H, W, 3) uint8, tracks (B, 1 + S, N, 2) now and to come, goal -> scalar,
        parts.  The weights, 10 and 1, are the official code's; the paper gives none."""
        images, tracks = batch["image"], batch["tracks"].float()
        if self.training:
            images, tracks = augment(images, tracks, self.config.jitter)
        ratio = self.config.mask_ratio if self.training else 0.0
        tokens, picture = self(self.encode(images, ratio), tracks[:, 0], batch["goal"])
        predicted = self.tracks_of(tokens, tracks[:, 0])
        # differs: places far outside the picture have no loss; few, they would outweigh all others
        near = ((tracks[:, 1:] - 0.5).abs() < MARGIN).all(-1, keepdim=True)  # (B, S, N, 1)
        error = (predicted - tracks[:, 1:]).square() * near
        track = error.sum() / near.sum().clamp(min=1) / 2
        if not self.config.mask_ratio:
            return 10 * track, {"track": track.item()}
        reconstructed = self.image_head(networks.to_map(picture)).float()  # (B, 3, H, W)
        image = F.mse_loss(reconstructed, networks.to_unit(images))  # of all patches, masked or not
        return 10 * track + image, {"track": track.item(), "image": image.item()}

    def sets(self, form):
        """What `plan` brings: {name: (places (n, 3): view, x, y in [0, 1]; width)}."""
        if form != "latent":    # view-major, as the tokens of `plan` are: ATM's code mixes them up
            places = torch.tensor([[float(view), x, y] for view in (0, 1) for x, y in POINTS])
            return {"plan": (places, 2 * LENGTHS[form])}
        cells, D = networks.grid_places(self.side, view=0), self.config.width
        plan = cells if self.config.track == "any" else torch.tensor([[0, 0.5, 0.5]])
        return {"picture": (cells, D), "plan": (plan, STEPS // PATCH * D)}

    @torch.no_grad()
    def plan(self, obs, form):
        """The token sets {name: (B, n, width)} of a form.  tracks: of POINTS in both views, how far
        they will go, one token per view and point (ATM); tracks-8, tracks-4: the first places
        alone. latent: the encoded picture, and before the heads the tokens of the cells' middles
        or, for the hand's path, of the hand (Mask2Act 4.1)."""
        frame, B = obs["frames"][:, -1], len(obs["frames"])
        goal = obs["text" if self.config.goal == "language" else "goal"]
        if form == "latent":
            features = self.encode(frame)  # (B, D, h, w)
            tokens, _ = self(features, self.points_of(obs), goal)
            plan = tokens.transpose(1, 2).flatten(2)  # (B, N, P D): a point's patches are one token
            return {"picture": networks.to_tokens(features), "plan": plan}
        points = torch.tensor(POINTS, device=frame.device).expand(2 * B, -1, -1)
        tracks = self.predict(torch.cat([frame, obs["wrist"]]), points, torch.cat([goal, goal]))
        tracks = tracks[:, :LENGTHS[form]].unflatten(0, (2, B)).transpose(0, 1)  # (B, 2, S, N, 2)
        far = displacements(tracks).transpose(2, 3).flatten(3)  # (B, 2, N, 2 S)
        return {"plan": far.flatten(1, 2)}  # (B, 2 N, 2 S)

    def points_of(self, obs):
        """The latent plan's points (B, N, 2), third person: the cells' middles, or the hand."""
        if self.config.track == "ee":
            return obs["hand"].float()[:, None]
        return self.grid.expand(len(obs["frames"]), -1, -1)

    @torch.no_grad()
    def draw(self, obs):
        """[(caption, (H, W, 3) uint8)] of an observation's first: predicted tracks on its frame."""
        obs = {k: v[:1] for k, v in obs.items()}
        frame, points = obs["frames"][:, -1], self.points_of(obs)
        goal = obs["text" if self.config.goal == "language" else "goal"]
        tracks = torch.cat([points[:, None], self.predict(frame, points, goal)], 1)[0].cpu().numpy()
        everywhere = np.ones(tracks.shape[:2], bool)
        return [("plan", draw_tracks(frame[0].cpu().numpy(), tracks, everywhere))]


# --- data -----------------------------------------------------------------------------------------

def make_batch(episodes, camera, episode, t, rng, config):
    """One camera's view of frames t (B,) of some episodes, as a dict of arrays (see
    TrackPlanner.loss); and visible (B, 1 + S, N) bool, before (B, 1, N, 2): where the points were a
    control step ago."""
    e = episode[:, None]
    times = t[:, None] + np.append(-1, SPACING * np.arange(1 + STEPS))  # (B, 2 + S)
    if config.track == "ee":
        tracks = episodes.gather("hand", e, times)[..., None, :]  # (B, 2 + S, 1, 2)
        visible = (np.abs(tracks - 0.5) < 0.5).all(-1)
    else:
        tracks, visible = (episodes.gather(f"{what}/{camera}", e, times)
                           for what in ("tracks", "visible"))  # (B, 2 + S, K, ..)
        # points are drawn, with replacement, among those visible now
        chosen = np.stack([rng.choice(np.flatnonzero(now) if now.any() else len(now),
                                      config.num_points) for now in visible[:, 1]])  # (B, N)
        tracks = np.take_along_axis(tracks, chosen[:, None, :, None], 2)
        visible = np.take_along_axis(visible, chosen[:, None], 2)
    goal = (episodes.text[episodes.task[episode]] if config.goal == "language"  # (B, E)
            else episodes.last_frames(episodes.goal_of(episode, rng)))  # (B, H, W, 3)
    tracks = tracks.astype(np.float32)
    return {"image": episodes.gather(f"obs/{camera}_rgb", episode, t), "tracks": tracks[:, 1:],
            "goal": goal, "visible": visible[:, 1:], "before": tracks[:, :1]}


def views_of(config, episodes):
    """Cameras learned from: all that the data has; for the hand's path the third person's."""
    return episodes.views if config.track == "any" else episodes.views[:1]


def training_batch(episodes, step, config):
    """Random frames for one training step, the same number of each camera."""
    episode, t, rng = episodes.sample_frames(step, config.batch, config.seed)
    views = views_of(config, episodes)
    shares = (np.array_split(x, len(views)) for x in (episode, t))
    parts = [make_batch(episodes, *share, rng, config) for share in zip(views, *shares)]
    return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}


@torch.no_grad()
def predicted(planner, batch):
    """TrackPlanner.predict, from arrays -> (B, S, N, 2) array."""
    b = training.tensors(batch, planner)
    return planner.eval().predict(b["image"], b["tracks"][:, 0], b["goal"]).cpu().numpy()


def validate(planner, episodes, samples=300, seed=1):
    """Errors of predicted tracks of points that move, beside points that stay and points that keep
    the velocity of the last step, on held-out episodes -> {camera: {"planner" | "stay" | "keep on":
    {"distance": (len(SCORED),) pixels of 128, "within": TAP-Vid's delta_avg in %}}}; nan where the
    episodes are too short for any."""
    mean = lambda x: x.mean() if x.size else np.nan
    config, scores, ahead = planner.config, {}, SPACING * np.arange(1, 1 + STEPS)  # (S,)
    for camera in views_of(config, episodes):
        errors, counted = {name: [] for name in ("planner", "stay", "keep on")}, []
        for step in range(-(-samples // 50)):
            episode, t, rng = episodes.sample_frames(step, 50, seed)
            batch = make_batch(episodes, camera, episode, t, rng, config)
            past, now, true = batch["before"], batch["tracks"][:, :1], batch["tracks"][:, 1:]
            for name, guess in (("planner", predicted(planner, batch)), ("stay", now),
                                ("keep on", now + ahead[:, None, None] * (now - past))):
                errors[name].append(np.linalg.norm(guess - true, axis=-1))
            moves = np.linalg.norm(true - now, axis=-1).max(1, keepdims=True) > MOVES
            goes_on = t[:, None] + ahead < episodes.length[episode][:, None]  # (B, S)
            counted.append(moves & batch["visible"][:, 1:] & goes_on[..., None])
        counted, scores[camera] = np.concatenate(counted), {}
        for name, parts in errors.items():
            off = PIXELS * np.concatenate(parts)  # (samples, S, N)
            at = [mean(off[:, k][counted[:, k]]) for k in np.searchsorted(ahead, SCORED)]
            within = mean(2 * off[counted][:, None] < (1, 2, 4, 8, 16))  # of pixels of 256
            scores[camera][name] = {"distance": np.array(at), "within": 100 * within}
    return scores


def table(scores):
    """The scores of `validate` as lines of text."""
    lines = ["held-out points that move: mean distance in pixels of 128, and delta_avg"]
    for camera, rows in scores.items():
        lines.append(f"  {camera:14s}" + "".join(f"   +{k:<3d}" for k in SCORED) + "   delta_avg")
        for name, s in rows.items():
            lines.append(f"    {name:12s}" + "".join(f" {x:6.2f}" for x in s["distance"])
                         + f"   {s['within']:5.1f} %")
    return "\n".join(lines).replace("nan", "  -")


def show(planner, episodes, rows, seed=3):
    """Rows of (predicted | true tracks), one pair per camera -> (., ., 3) uint8."""
    config, drawn = planner.config, []
    for step in range(rows):
        cells = []
        for camera in views_of(config, episodes):
            batch = make_batch(episodes, camera, *episodes.sample_frames(step, 1, seed), config)
            now = batch["tracks"][0, :1]
            for tracks, name in ((np.concatenate([now, predicted(planner, batch)[0]]), "plan"),
                                 (batch["tracks"][0], "true")):
                picture = draw_tracks(batch["image"][0], tracks, batch["visible"][0], 2)
                cells.append(caption(picture, f"{name}, {camera}"))
        drawn.append(np.concatenate(cells, 1))
    return np.concatenate(drawn)


def main(argv=None):
    """Command line: makes the data that is missing, trains, validates; or only --show."""
    from demos.record import load_videos
    config = parse(Config, "Stage 1 of ATM: learn from video where points will go.", argv)
    path = training.run_path(config, "track")
    planner = load_planner(path, config.device) if config.show else None
    videos, held_out, note = load_videos(config)
    picture = lambda trained, rows=4: show(trained, held_out, rows)
    if not planner:
        config.E, note = videos.text.shape[1], f"{note}, goal: {config.goal}"
        torch.manual_seed(config.seed)
        batches = lambda step: training_batch(videos, step, config)
        planner = training.fit(TrackPlanner(config), batches, config, path, picture, note)
    training.report(config, path, table(validate(planner, held_out)), lambda: picture(planner, 8))


if __name__ == "__main__":
    main()
