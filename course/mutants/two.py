"""Mistakes in the planner's tokens, its decoder and its batches."""

MUTANTS = {
    "core/networks.py:block_causal_mask": [
        (">=", ">"),
        (">=", "<="),  # the future and not the past
        (">=", "=="),
        ("// tokens", "% tokens"),
        ("// tokens", "// steps"),
        ("// tokens", "// 1"),  # causal by token
    ],
    "mask_planner.py:Planner.plan_from": [
        (" + self.position", ""),
        (" + self.time[:steps]", ""),
        ("self.time[:steps]", "self.time[-steps:]"),
        ("self.time[:steps]", "self.time[:1]"),
        ("self.time[:steps]", "self.time.roll(1, 0)[:steps]"),
        ("self.mask[:L, :L]", "None"),  # a leak of the future
        ("self.mask[:L, :L]", "self.mask[:L, :L].T"),
        ("[:, 1:]", "[:, :-1]"),
        ("x.flatten(1, 2)", "x.transpose(1, 2).flatten(1, 2)"),
        ("x + self.position", "x * self.position"),
        ("+ self.time", "* self.time"),
        ("+ self.time", "- self.time"),
    ],
    "mask_planner.py:Decoder.forward": [
        ("repeat_interleave(N, 0)", "repeat(N, 1, 1, 1)"),
        (".sigmoid()", ".softmax(1)"),
        ("masks.amax(", "masks.mean("),
        ("masks.amax(", "masks.amin("),
        ("prob * masks.amax", "prob + 0 * masks.amax"),
        ("self.plan(plan)", "self.plan(plan).mT"),
        ("self.plan(plan)", "self.plan(plan.flip(2))"),
        ("self.plan(plan)", "self.plan(plan.detach())"),
        ("[d3, p]", "[d3, 0 * p]"),
        ("self.out(x)", "self.out(x).flip(1)"),
    ],
    "mask_planner.py:make_batch": [
        ("[0, *HORIZONS]", "[1, *HORIZONS]"),
        ("t[:, None] + np", "t[:, None] - np"),
        ("past)", "past + 1)"),
        ("past)", "past[:, ::-1])"),
        ("config.stride", "1"),
        ("episodes.goal_of(episode, rng)", "episode"),
        (", ahead)", ", ahead - 1)"),
        ("look_times(t,", "look_times(t - 1,"),
    ],
}
