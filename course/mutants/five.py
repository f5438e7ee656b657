"""Plausible mistakes in the functions of assignment 5: (what stands there, what could)."""

MUTANTS = {
    "executor.py:waypoints": [
        ("changes + FOLLOW", "changes"),                    # on to the next at once
        ("changes + FOLLOW", "changes - FOLLOW"),
        (" + 1\n", "\n"),                                   # the last step of the old command
        ('"right"', '"left"'),                              # off by one
        ("len(gripper) - 1", "len(gripper) - 2"),
        ("gripper > 0", "gripper"),                         # any change
    ],
    "executor.py:Executor.look": [
        ("moved.repeat_interleave(T, 0)", "moved.repeat(T, 1, 1)"),     # another sample's shift
        ("pool(sets[k], far(k)", "pool(sets[k], -far(k)"),      # wrong sign of a shift
        ("pool(sets[k], far(k)", "pool(sets[k], 0 * far(k)"),
        ("moved if name in self.encoders else kept", "kept"),   # another picture's shift
        ('self.scale["state"](batch["state"])', 'batch["state"]'),      # not standardised
        ("self.cls.expand_as(state), state,", "state, self.cls.expand_as(state),"),
        ("self.space(x)[:, 0]", "self.space(x)[:, 1]"),     # the state's token for CLS
        ("pool(sets[k],", "pool(sets[k].roll(1, 0),"),      # another look's sets
        ("*late], 1)", "*late], 1).roll(1, 0)"),            # another look's plan
        ('fusion != "late" or', 'fusion == "early" or'),    # of both, late alone
        ('if fusion != "early"]', 'if fusion == "late"]'),  # of both, early alone
        ("moved if name in", "moved if name not in"),
    ],
    "executor.py:Executor.act": [
        (", self.causal[:T, :T])", ")"),                    # leak of the future
        (", self.causal[:T, :T])", ", self.causal[:T, :T].T)"),
        ("self.when[:T]", "self.when[-T:]"),
        ("* OFFSET_SCALE", "/ OFFSET_SCALE"),
        (".mean[:3]", ".std[:3]"),
        ("(aim - state", "(aim + state"),
        ("state[..., :3]", "state[..., 3:6]"),              # orientation for place
        ("else waypoint +", "else there +"),                # no teacher
        ("WAYPOINT_NOISE *", "0 *"),
        ("(self.config.chunk, -1))", "(-1, self.config.chunk)).mT"),    # swapped axes
    ],
    "executor.py:Executor.loss": [
        ("error.mean() + 0.3", "error.sum() + 0.3"),
        ("error.mean() + 0.3", "error[..., :-1].mean() + 0.3"),     # the gripper never learns
        ("error.mean() + 0.3", "error[:, :, 0].mean() + 0.3"),      # the first of a chunk alone
        ("mean() + 0.3", "mean() - 0.3"),
        ("mean() + 0.3 *", "mean() +"),
        ('batch["waypoint"] / OFFSET_SCALE', 'batch["waypoint"]'),      # metres and tenths of them
        ('error[..., -1].mean()', 'error[..., 0].mean()'),
        ('error[..., :-1].mean()', 'error.mean()'),         # logged is not what is optimised
        ('batch["action"], reduction', 'batch["action"].flip(2), reduction'),
    ],
    "executor.py:Policy.observe": [
        ("(len(self.pictures) - 1)", "(len(self.pictures) - 2)"),       # one look late
        ("t // self.execute]", "t // self.execute - 1]"),
        ("for t in times]", "for t in times[::-1]]"),       # newest first
        ("self.planner.stride", "self.execute"),            # looks for control steps
        ('append(tensor("agentview_rgb"))', 'append(tensor("eye_in_hand_rgb"))'),
        ('"wrist": tensor("eye_in_hand_rgb")', '"wrist": tensor("agentview_rgb")'),
    ],
    "executor.py:Policy.__call__": [
        ("[1][0, -1]", "[1][0, 0]"),                        # the chunk of the oldest look
        (".clamp(-1, 1)", ".clamp(0, 1)"),
        (".clamp(-1, 1)", ".clamp(-1)"),
        ("[:self.execute]", ""),                            # the whole chunk, blindly
        ("[:self.execute]", "[-self.execute:]"),
        (".pop(0)", ".pop()"),                              # last first
        ("[-self.c.history:]", "[:self.c.history]"),        # the first looks for ever
        ("self.looks or", "[] or"),                         # forgets
        ('["frames"][:, -1:]', '["frames"][:, :1]'),        # the oldest picture for now
        ("not self.queue", "len(self.queue) < 2"),          # off by one
    ],
    "results/tables.py:t_interval": [
        ("0.975", "0.95"),                                  # one-sided
        ("ddof=1", "ddof=0"),
        ("len(rates) - 1", "len(rates)"),
        ("/ np.sqrt(len(rates))", ""),                      # of one seed, not of the mean
        ("max(0,", "max(-1,"),
        ("min(1,", "min(2,"),
    ],
    "results/tables.py:difference_interval": [
        ("np.subtract(a, b)", "np.subtract(b, a)"),
        ("np.subtract(a, b)", "np.subtract(sorted(a), sorted(b))"),     # not by seed
        ("0.975", "0.95"),                                  # one-sided
        ("ddof=1", "ddof=0"),
        ("/ np.sqrt(len(d))", ""),                          # of one seed, not of the mean
        ("max(-1,", "max(0,"),
        ("min(1,", "min(2,"),
        ("len(d) - 1)", "len(d))"),
    ],
}
