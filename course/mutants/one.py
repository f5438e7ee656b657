"""Mistakes in masks and their losses."""

MUTANTS = {
    "mask_planner.py:binary_masks": [
        ("arange(1, N + 1", "arange(0, N"),  # the background as the first object
        ("number[:,", "number.flip(0)[:,"),
        ("==", ">="),
        ("==", "<="),
        ("==", "!="),
        (".float()", ".bool()"),
        ("arange(1, N + 1", "arange(2, N + 2"),
    ],
    "mask_planner.py:soft_aggregate": [
        ("(1 - prob)", "(0 + prob)"),
        (".prod(1,", ".mean(1,"),
        (".prod(1,", ".amin(1,"),
        ("[background, prob]", "[prob, background]"),
        ("clamp(1e-7,", "clamp(0,"),
        (", 1 - 1e-7)", ", 1)"),
        ("p / (1 - p)", "p"),  # log-probabilities, not log-odds
        ("torch.log(", "-torch.log("),
        ("torch.log(", "("),
    ],
    "mask_planner.py:hardest_fraction": [
        ("0.85", "0.15"),
        ("min(1.0", "min(2.0"),
        ("max(0.0", "max(-1.0"),
        ("- 0.2", "+ 0.2"),
        ("0.5", "0.7"),
        ("1 - 0.85", "0.85"),
    ],
    "mask_planner.py:bootstrapped_cross_entropy": [
        (".flatten(1)", ".view(1, -1)"),  # the hardest of the batch
        ("topk(count, 1)", "topk(count, 1, False)"),  # the easiest
        (".mean()", ".sum()"),
        (".mean()", ".median()"),
        ("shape[1]", "shape[0]"),
        ("int(hardest", "int((1 - hardest)"),
        ("max(1,", "max(0,"),
    ],
    "mask_planner.py:dice": [
        ("2 * (", "1 * ("),
        ("+ g.sum(2)", "+ m.sum(2)"),
        ("+ 1) / (m", "+ 0) / (m"),
        ("g.sum(2) + 1)", "g.sum(2) + 2)"),
        ("(m * g).sum(2)", "(m * g).mean(2)"),
        ("m.sum(2)", "m.square().sum(2)"),
        ("return 1 -", "return 0 -"),
        ("(m * g)", "(m + g)"),
    ],
    "mask_planner.py:iou": [
        ("(m & g)", "(m ^ g)"),
        ("(m | g)", "(m ^ g)"),
        ("(m | g)", "g"),
        ("union > 0", "both > 0"),
        (", 1.0)", ", 0.0)"),
        ("clamp(min=1)", "clamp(min=2)"),
        ("both / union", "2 * both / union"),
    ],
}
