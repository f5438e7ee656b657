"""Assignment 3, tracks (ATM section IV-A): patches, features, masks, augmentation, loss."""

import numpy as np
import pytest
import torch

import track_planner
from core import networks
from track_planner import MARGIN, PATCH, SIDE, STEPS


@pytest.mark.grades("track_patches")
@pytest.mark.parametrize("S, N", [(STEPS, PATCH), (2 * PATCH, 5), (PATCH, 1)])
def test_patches_are_pieces_of_one_points_track(S, N):
    """ATM IV-A, Table VI (track patch size 4): patch p of point n holds the places 4 p .. 4 p + 3
    of this point alone, x and y of the first, x and y of the second, ..."""
    tracks = torch.randn(3, S, N, 2)
    patches = track_planner.track_patches(tracks)
    assert patches.shape == (3, S // PATCH, N, 2 * PATCH)
    for b, p, n, k in np.ndindex(3, S // PATCH, N, PATCH):
        here = patches[b, p, n, 2 * k:2 * k + 2]
        assert torch.equal(here, tracks[b, PATCH * p + k, n])


@pytest.mark.grades("track_from_patches")
@pytest.mark.parametrize("P, N", [(STEPS // PATCH, PATCH), (2, 5), (1, 1)])
def test_tracks_are_put_together_from_patches(P, N):
    """ATM IV-A, Table VI (track patch size 4): place 4 p + k of point n is number k of its patch p
    (the inverse of track_patches)."""
    patches = torch.randn(3, P, N, 2 * PATCH)
    tracks = track_planner.track_from_patches(patches)
    assert tracks.shape == (3, PATCH * P, N, 2)
    for b, p, n, k in np.ndindex(3, P, N, PATCH):
        assert torch.equal(tracks[b, PATCH * p + k, n], patches[b, p, n, 2 * k:2 * k + 2])


def written_out(features, x, y):
    """A map (D, h, w) between the middles of its cells, at one place, as four terms."""
    D, h, w = features.shape
    x, y, total = x * w - 0.5, y * h - 0.5, torch.zeros(D)
    for i in (int(np.floor(y)), int(np.floor(y)) + 1):
        for j in (int(np.floor(x)), int(np.floor(x)) + 1):
            if 0 <= i < h and 0 <= j < w:
                total += (1 - abs(y - i)) * (1 - abs(x - j)) * features[:, i, j]
    return total


@pytest.mark.grades("features_at")
@pytest.mark.parametrize("h, w", [(4, 4), (3, 5)])
def test_features_are_read_where_the_points_are(h, w):
    """ATM IV-A, Fig. 2a: what the picture shows at a point, x right, y down: bilinear between the
    middles of the cells."""
    features, points = torch.randn(2, 8, h, w), 0.2 + 0.6 * torch.rand(2, 6, 2)
    found = track_planner.features_at(features, points)
    assert found.shape == (2, 6, 8)
    for b, n in np.ndindex(2, 6):
        wanted = written_out(features[b], *points[b, n].tolist())
        torch.testing.assert_close(found[b, n], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.grades("features_at")
def test_features_at_the_middle_of_a_cell_are_the_cells():
    """ATM IV-A, Fig. 2a: at ((x + 0.5) / w, (y + 0.5) / h) stand the features of column x, row y
    of the map."""
    features = torch.arange(15.0).view(1, 1, 3, 5) + 1
    for y, x in np.ndindex(3, 5):
        point = torch.tensor([[[(x + 0.5) / 5, (y + 0.5) / 3]]])
        found = track_planner.features_at(features, point).item()
        assert found == pytest.approx(5 * y + x + 1, abs=1e-3)


@pytest.mark.grades("features_at")
def test_features_do_not_fade_towards_the_edge():
    """ATM IV-A, Fig. 2a: between the last cells' middles and the edge stand the last cells'."""
    points = torch.tensor([[[0.0, 0.0], [0.02, 0.5], [0.9, 0.98], [1.0, 1.0]]])
    found = track_planner.features_at(torch.ones(1, 2, 3, 5), points)
    torch.testing.assert_close(found, torch.ones(1, 4, 2))


@pytest.mark.grades("mask_patches")
@pytest.mark.parametrize("h, w", [(2, 2), (2, 3)])
def test_masked_patches_are_grey_and_others_untouched(h, w):
    """ATM IV-A (masked image patches, as MAE): row i, column j of `masked` is the square of SIDE
    pixels at SIDE i, SIDE j; grey is 0; the given pictures stay as they are."""
    torch.manual_seed(0)
    images, masked = torch.rand(4, 3, SIDE * h, SIDE * w) + 2, torch.rand(4, h, w) < 0.5
    before = images.clone()
    grey = track_planner.mask_patches(images, masked)
    assert grey.shape == images.shape
    assert torch.equal(images, before), "the given pictures are changed"
    for b, i, j in np.ndindex(4, h, w):
        cell = np.s_[b, :, SIDE * i:SIDE * (i + 1), SIDE * j:SIDE * (j + 1)]
        assert torch.equal(grey[cell], 0 * images[cell] if masked[b, i, j] else images[cell])


@pytest.mark.grades("mask_patches")
def test_all_or_nothing_may_be_masked():
    """ATM IV-A, Table II (mask ratios 0 and 1)."""
    images = torch.rand(1, 3, 2 * SIDE, SIDE) - 0.5
    every = torch.ones(1, 2, 1, dtype=torch.bool)
    assert not track_planner.mask_patches(images, every).any()
    assert torch.equal(track_planner.mask_patches(images, ~every), images)


def dots(B, H, W):
    """Pictures with one white pixel each, in uint8, and where it is, (B, 2) pixels x, y."""
    x, y = torch.randint(6, W - 6, (B,)), torch.randint(6, H - 6, (B,))
    images = torch.zeros(B, H, W, 3, dtype=torch.uint8)
    images[torch.arange(B), y, x] = 255
    return images, torch.stack([x, y], 1)


def find(images):
    """Where the white pixel of each picture is, (B, 2) x, y."""
    assert (images[..., 0] > 127).sum((1, 2)).eq(1).all(), "one dot in each picture"
    _, y, x = torch.nonzero(images[..., 0] > 127, as_tuple=True)
    return torch.stack([x, y], 1)


@pytest.mark.grades("random_shift")
@pytest.mark.parametrize("H, W", [(32, 32), (24, 40)])
def test_shifts_are_of_what_the_picture_shows(H, W):
    """ATM Table VI (random shift; DrQ): a dot at x, y is found at x + move[0], y + move[1]; each
    picture has a shift of its own, all of -4 .. 4 occur in both directions and nothing further."""
    torch.manual_seed(0)
    images, place = dots(600, H, W)
    shifted, move = networks.random_shift(images)
    assert shifted.shape == images.shape and shifted.dtype == torch.uint8
    assert move.shape == (600, 2)
    assert torch.equal(find(shifted), place + move)
    assert [set(move[:, k].tolist()) for k in (0, 1)] == [set(range(-4, 5))] * 2
    assert not torch.equal(move[:, 0], move[:, 1])


@pytest.mark.grades("random_shift")
def test_shifted_pictures_repeat_their_edges():
    """ATM Table VI (random shift; DrQ: pad by repetition, crop): pixel by pixel, H != W."""
    images = torch.randint(256, (20, 12, 17, 3), dtype=torch.uint8)
    shifted, move = networks.random_shift(images, pad=3)
    assert move.abs().max() <= 3
    for b, y, x in np.ndindex(20, 12, 17):
        from_x, from_y = x - int(move[b, 0]), y - int(move[b, 1])
        there = images[b, min(max(from_y, 0), 11), min(max(from_x, 0), 16)]
        assert torch.equal(shifted[b, y, x], there)


@pytest.mark.grades("augment")
@pytest.mark.parametrize("H, W", [(32, 32), (24, 40)])
def test_tracks_move_with_the_pixels(H, W):
    """ATM Table VI (image shift augmentation): a dot, its track and the picture are shifted
    together, whatever the axes: the dot is found where the track says, at every step, to half a
    pixel."""
    torch.manual_seed(0)
    images, place = dots(64, H, W)
    size = torch.tensor([W, H])
    tracks = ((place + 0.5) / size)[:, None, None].repeat(1, 5, 3, 1)
    moved, after = track_planner.augment(images, tracks, 0.0)
    assert moved.shape == images.shape and after.shape == tracks.shape
    wanted = (find(moved) + 0.5)[:, None, None].expand(after.shape)
    torch.testing.assert_close(after * size, wanted, atol=0.5, rtol=0)
    assert len({*map(tuple, (find(moved) - place).tolist())}) > 20, "each picture its own shift"


@pytest.mark.grades("augment")
def test_colours_are_jittered_in_nine_of_ten_pictures():
    """ATM Table VI (colour jitter, p = 0.9): by the strength asked for, in uint8; of strength 0
    not at all; tracks do not depend on it."""
    torch.manual_seed(0)
    plain, still = torch.full((8, 8, 8, 3), 100, dtype=torch.uint8), torch.zeros(8, 1, 1, 2)
    plain[..., 0] = 150
    changed = []
    for _ in range(30):
        images, tracks = track_planner.augment(plain, still, 0.3)
        assert images.dtype == torch.uint8 and (8 * tracks).abs().max() <= 4 + 1e-4
        changed += (images != plain).flatten(1).any(1).tolist()
    assert 0.82 < np.mean(changed) < 0.98
    images, _ = track_planner.augment(plain, still, 0.0)
    assert (images.int() - plain.int()).abs().max() <= 1


def small(mask_ratio):
    """A track transformer of 2 x 2 patches, and a batch of three samples of four points."""
    torch.manual_seed(0)
    planner = track_planner.TrackPlanner(track_planner.Config(
        size=2 * SIDE, width=16, depth=1, blocks=(), mask_ratio=mask_ratio))
    torch.nn.init.normal_(planner.track_head.weight, std=0.1)
    batch = {k: torch.randint(256, (3, 2 * SIDE, 2 * SIDE, 3), dtype=torch.uint8)
             for k in ("image", "goal")}
    return planner, batch | {"tracks": torch.rand(3, 1 + STEPS, 4, 2)}


def loss_in_a_loop(planner, image, tracks, goal, reconstructed):
    """The track loss, number by number, and the mean squared error of all pixels in [-1, 1]."""
    squares = []
    with torch.no_grad():
        predicted = planner.predict(image, tracks[:, 0], goal)
        for b, s, n in np.ndindex(predicted.shape[:3]):
            true = tracks[b, 1 + s, n]
            if all(abs(c - 0.5) < MARGIN for c in true.tolist()):
                squares += [(p - c) ** 2 for p, c in zip(predicted[b, s, n].tolist(),
                                                         true.tolist())]
        loss = 10 * np.mean(squares or [0])
        if reconstructed:
            picture = planner(planner.encode(image), tracks[:, 0], goal)[1]    # (B, n, D)
            pixels = planner.image_head(picture.transpose(1, 2).unflatten(2, (2, 2)))
            true = image.permute(0, 3, 1, 2) / 127.5 - 1
            loss += ((pixels - true) ** 2).mean().item()
    return loss


@pytest.mark.grades("TrackPlanner.loss")
@pytest.mark.parametrize("ratio", [0.0, 0.5])
def test_loss_equals_a_loop(ratio):
    """ATM IV-A, eq. of the track loss: squared error of the places to come, from the present ones
    alone, weight 10, where the true place is within MARGIN of the middle in both axes; with masked
    patches also the error of the whole picture, weight 1.  Outside training nothing is random."""
    planner, batch = small(ratio)
    batch["tracks"][0, 3:, 0] += torch.tensor([1.5, 0])         # far out, on one side each
    batch["tracks"][1, 5:, 1] -= torch.tensor([0, 1.5])
    loss, parts = planner.eval().loss(batch)
    wanted = loss_in_a_loop(planner, batch["image"], batch["tracks"], batch["goal"], ratio > 0)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(wanted, rel=1e-3)
    assert 10 * parts["track"] + parts.get("image", 0) == pytest.approx(loss.item(), rel=1e-3)


@pytest.mark.grades("TrackPlanner.loss")
def test_training_is_on_augmented_pictures_and_tracks(monkeypatch):
    """ATM IV-A, Table VI: input, tracks and the picture to reconstruct are the augmented ones, in
    training alone."""
    planner, batch = small(1e-9)        # a reconstruction, but next to no masked patch
    turned = batch["image"] // 2, batch["tracks"].flip(2) * 0.9
    monkeypatch.setattr(track_planner, "augment", lambda images, tracks, strength: turned)
    loss = planner.train().loss(batch)[0].item()
    assert loss == pytest.approx(loss_in_a_loop(planner, *turned, batch["goal"], True), rel=1e-3)


@pytest.mark.grades("TrackPlanner.loss")
def test_loss_without_any_point_in_sight():
    """ATM IV-A: nothing to learn from is a loss of 0, not nan; and its gradient is finite."""
    planner, batch = small(0.0)
    batch["tracks"][:, 1:] += 3
    loss = planner.eval().loss(batch)[0]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad.isfinite().all() for p in planner.parameters() if p.grad is not None)


@pytest.mark.grades("TrackPlanner.loss")
def test_every_parameter_gets_a_gradient():
    """ATM IV-A, Fig. 2a: in training with masked patches, tracks and picture teach all weights."""
    planner, batch = small(0.5)
    planner.train().loss(batch)[0].backward()
    assert not [n for n, p in planner.named_parameters() if p.grad is None or not p.grad.any()]
