"""Plausible mistakes in the functions of assignment 3: (what stands there, what could)."""

MUTANTS = {
    "track_planner.py:track_patches": [
        (".flatten(3)", ".mT.flatten(3)"),                  # all x, then all y
        ("PATCH, N, 2).transpose(2, 3)", "N, PATCH, 2)"),   # reshaped where axes must be swapped
        ("tracks.reshape", "tracks.roll(1, 1).reshape"),    # one step late
        ("tracks.reshape", "tracks.flip(1).reshape"),       # backwards
        ("tracks.reshape", "tracks.flip(3).reshape"),       # y, x
    ],
    "track_planner.py:track_from_patches": [
        ("(PATCH, 2))", "(2, PATCH)).mT"),                  # all x, then all y
        (".flatten(1, 2)", ".transpose(1, 2).flatten(1, 2)"),   # all first places, then all second
        ("patches.unflatten", "patches.flip(1).unflatten"),
        ("patches.unflatten", "patches.flip(3).unflatten"),
        ("patches.unflatten", "patches.flip(2).unflatten"),     # another point's
    ],
    "track_planner.py:features_at": [
        ("align_corners=False", "align_corners=True"),
        ("points.float()", "points.float().flip(-1)"),      # y, x
        ("2 * points", "points"),                           # the lower right quarter
        (" - 1  #", " - 0.5  #"),
        ("where, padding", "where, 'nearest', padding"),
        ('"border"', '"zeros"'),                            # features fade at the edge
        ("(features.float(),", "(features.float().mT,"),    # transposed picture
    ],
    "track_planner.py:mask_patches": [
        ("pixels[:, None]", "~pixels[:, None]"),
        (", 0)", ", -1)"),                                  # black
        (".masked_fill(", ".masked_fill_("),                # the caller's picture too
        (".repeat_interleave(SIDE, 1)", ".repeat(1, SIDE, 1)"),     # stripes
        ("masked.repeat", "masked.mT.repeat"),              # transposed
        ("masked.repeat", "masked.flip(1).repeat"),         # upside down
        (", None], 0)", ", None], 1)"),
    ],
    "core/networks.py:random_shift": [
        ("(torch.arange(H) - move", "(torch.arange(H) + move"),     # wrong sign of a shift
        ("(torch.arange(W) - move", "(torch.arange(W) + move"),
        ("move[[1, 0]", "move[[0, 1]"),                     # y, x
        ("- move[1]", "- move[0]"),                         # along the diagonal alone
        ("pad + 1,", "pad,"),                               # never by `pad` to the right
        ("(-pad,", "(0,"),
        (".clamp(0, W - 1)", ".clamp(0, H - 1)"),
        (".clamp(0, H - 1)", ".remainder(H)"),              # in again on the other side
    ],
    "track_planner.py:augment": [
        ("tracks + (moved", "tracks - (moved"),             # wrong sign of a shift
        ("(moved / size)", "(moved.flip(1) / size)"),       # y, x
        ("[images.shape[2], images.shape[1]]", "[images.shape[1], images.shape[2]]"),
        ("(moved / size)", "(moved / 128)"),
        (", 0.9)", ", 0.1)"),
        ("[strength]", "[0]"),                              # no jitter
        (".permute(0, 2, 3, 1))", ".permute(0, 3, 2, 1))"),     # transposed picture
    ],
    "track_planner.py:TrackPlanner.loss": [
        ("(predicted - tracks[:, 1:])", "(predicted - tracks[:, :-1])"),    # horizon off by one
        ("ratio), tracks[:, 0]", "ratio), tracks[:, 1]"),   # leak of the future
        ("tracks_of(tokens, tracks[:, 0])", "tracks_of(tokens, tracks[:, 1])"),
        (".all(-1", ".any(-1"),                             # near along one axis is not near
        (".abs() < MARGIN", " < MARGIN"),                   # far to the left is far, too
        (".clamp(min=1) / 2", " / 2"),                      # nan without a point
        ("/ 2\n", "\n"),
        (".square()", ".abs()"),
        ("10 * track + image,", "10 * track - image,"),
        ("else 0.0", "else 0.5"),                           # masked in validation
        ("to_unit(images)", 'to_unit(batch["image"])'),     # before the shift
    ],
}
