"""From where points are seen to how the object that they are on moves (AVDC section 3.3): the rigid
motion behind the flow from one picture to the next, the chain of motions through a video, the
subgoals that follow.

Sizes: P points, K future pictures.
"""

import numpy as np

from sims.camera import project

ROUNDS = 40         # of Gauss-Newton, at most
PRIOR = 1.0, 0.3    # how far an object is expected to turn and move, radians and metres


def fit_motion(points, targets, view, noise):
    """The minimum of the paper's L_trans: the rigid motion that brings points to where the picture
    shows them, by sum_p w_p |project(x_p) - target_p|^2 + |turn / PRIOR[0]|^2 + |way / PRIOR[1]|^2;
    the turn is about the points' mean, the way is that of this mean.

    points (P, 3) metres; targets (P, 2) in [0, 1] of the picture; view: eye, axes, focal length as
    for `camera.project`; noise: of a good target, in pictures
    -> R (3, 3), t (3,): the points go to points @ R.T + t; and which targets were good, in the end
    off by less than 4 noise, (P,) bool.  A point behind the camera: no motion, all good.

    differs: Gauss-Newton from standing still, for the authors' RANSAC and 50 starts of BFGS:
    weights w that fall with the error leave bad targets out, for half of the ROUNDS 1 / (noise
    error), error at least noise, then Cauchy's, 1 / (1 + (error / (2 noise))^2) / noise^2.  The
    prior keeps depth, which a small object's picture hardly shows, from flying off.
    """
    from scipy.spatial.transform import Rotation
    eye, axes, focal = view
    centre, R, t, turn = points.mean(0), np.eye(3), np.zeros(3), np.zeros(3)
    keep = np.repeat(1 / np.square(PRIOR), 3)           # (6,) stiffness of turn and way
    for k in range(ROUNDS):
        arm = (points - centre) @ R.T                                       # (P, 3)
        local = (centre + arm + t - eye) @ axes.T                           # right, down, ahead
        X, Y, Z = local.T
        if (Z < 1e-3).any():                            # behind the camera: no such motion
            return np.eye(3), np.zeros(3), np.ones(len(points), bool)
        off = 0.5 + focal * local[:, :2] / Z[:, None] - targets             # (P, 2)
        size = np.linalg.norm(off, axis=1)
        weight = (1 / np.maximum(size, noise) / noise if k < ROUNDS // 2 else
                  1 / (1 + (size / (2 * noise)) ** 2) / noise ** 2)         # (P,)
        J = focal * np.stack([np.stack([1 / Z, 0 * Z, -X / Z ** 2], 1),
                              np.stack([0 * Z, 1 / Z, -Y / Z ** 2], 1)], 1) @ axes  # (P, 2, 3)
        # d(point)/d(turn) is the cross product with the arm
        cross = np.cross(np.eye(3)[None], arm[:, None], axis=-1)            # (P, 3 axes, 3)
        J = np.concatenate([J @ cross.transpose(0, 2, 1), J], 2)            # (P, 2, 6)
        A = np.einsum("pij,p,pik->jk", J, weight, J) + np.diag(keep)
        b = np.einsum("pij,p,pi->j", J, weight, off) + keep * np.concatenate([turn, t])
        step = np.linalg.solve(A, -b)
        step *= min(1, 0.5 / np.linalg.norm(step[:3]), 0.2 / np.linalg.norm(step[3:]))
        R, t, turn = Rotation.from_rotvec(step[:3]).as_matrix() @ R, t + step[3:], turn + step[:3]
        if np.abs(step).max() < 1e-7 and k > ROUNDS // 2:
            break
    return R, centre + t - R @ centre, size < 4 * noise


def infer_motions(places, points, correspond, view, K, noise):
    """Points of the object (P, 3), seen at places (P, 2), through a video of K future pictures.
    correspond(k, places (P', 2), kept (P',)) -> where these of the points are in the next picture
    -> [(R, t)] * K.

    differs: from each picture to the next, as the authors' code, and not from the first to each:
    the next flow is read where the picture shows the points as the motion has moved them.  Those
    that went another way (kept are numbers of the others), such as one that a hand has covered, are
    lost for good, unless no more than a fifth of all would be left: then none is.
    """
    motions, kept, whole = [], np.arange(len(points)), len(points)
    for k in range(K):
        R, t, good = fit_motion(points, correspond(k, places, kept), view, noise)
        points = points @ R.T + t
        if good.sum() > whole / 5:
            points, kept = points[good], kept[good]
        places = project(points, *view)[0]
        motions.append((R, t))
    return motions


def grasp_point(points):
    """The medoid of points (P, 3), that with the least sum of distances to all others -> (3,).
    differs: as the authors' code; the paper samples a grasp at random."""
    return points[np.linalg.norm(points[:, None] - points, axis=-1).sum(1).argmin()]


def subgoals(grasp, motions):
    """The grasp point, and where each motion takes the one before -> (1 + K, 3)."""
    path = [grasp]
    for R, t in motions:
        path.append(R @ path[-1] + t)
    return np.array(path)
