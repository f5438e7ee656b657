"""Plausible mistakes in the functions of assignment 6: (what stands there, what could)."""

MUTANTS = {
    "sims/camera.py:project": [
        ("points - eye", "points + eye"),
        ("...ij,...j->...i", "...ji,...j->...i"),           # axes as columns
        ("0.5 + focal", "0.5 - focal"),                     # upside down
        (" / depth,", ","),                                 # no perspective
        ("> 1e-3", "> -1e9"),                               # behind the eye is before it
        (", local[..., 2]", ", np.linalg.norm(local, axis=-1)"),    # distance for depth
    ],
    "video_control/flow.py:read": [
        ("align_corners=False", "align_corners=True"),
        ('"border"', '"zeros"'),
        ("2 * places", "2 * places.flip(-1)"),              # y, x
        ("2 * places", "places"),
        ("grid_sample(flow,", "grid_sample(flow.mT,"),      # transposed picture
        ("grid, padding", "grid, 'nearest', padding"),
    ],
    "video_control/motion.py:fit_motion": [
        ("points - centre) @ R.T", "points - centre) @ R"),     # turns the other way
        ("@ axes.T", "@ axes"),
        ("0.5 + focal", "0.5 - focal"),
        ("@ R, t + step[3:]", "@ R, t - step[3:]"),
        ("solve(A, -b)", "solve(A, b)"),                    # uphill
        (", size < 4 * noise", ", size > 4 * noise"),
        ("centre + t - R @ centre", "t"),                   # about the origin
        (".as_matrix() @ R", ".as_matrix() @ R.T"),
        ("1 / np.square(PRIOR)", "0 / np.square(PRIOR)"),   # no prior
        ("1 / np.square(PRIOR)", "1e6 / np.square(PRIOR)"),
        ("(2 * noise)) ** 2", "(2 * noise)) ** 0"),         # not robust in the end
        ("-X / Z ** 2", "X / Z ** 2"),
        (" / Z[:, None]", ""),                              # no perspective
    ],
    "video_control/motion.py:infer_motions": [
        ("points @ R.T", "points @ R"),
        (" + t\n", " - t\n"),
        ("(k, places, kept), view", "(0, places, kept), view"),     # always the first picture
        ("whole / 5", "len(points) / 5"),                   # of those left, not of all
        ("> whole", "< whole"),
        ("kept[good]", "kept[:good.sum()]"),                # numbers of other points
        ("append((R, t))", "append((R.T, t))"),
        ("= project(points, *view)[0]", "= project(points - t, *view)[0]"),     # places of before
    ],
    "video_control/motion.py:grasp_point": [
        ("argmin", "argmax"),
        (".sum(1)", ".max(1)"),
        (".sum(1)", ".min(1)"),
        ("axis=-1", "axis=1"),                              # over the points, not x, y, z
        ("axis=-1)", "axis=-1).__pow__(2)"),                # nearest to the mean
        ("[:, None] - points", "[:, None] + points"),
    ],
    "video_control/motion.py:subgoals": [
        ("R @ path", "R.T @ path"),
        (" + t)", " - t)"),
        ("path[-1]", "path[0]"),                            # every motion from the start
        ("path[-1] + t", "(path[-1] + t)"),                 # moves, then turns
        ("R @ path[-1]", "path[-1]"),                       # does not turn
        ("in motions", "in motions[::-1]"),
    ],
}
