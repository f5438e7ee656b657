"""The assignments: what a student reads, writes and should see.  Functions stand in the order in
which their tests pass; each is worth its points if all tests that grade it pass."""

from dataclasses import dataclass


@dataclass
class Assignment:
    number: int
    name: str
    title: str
    read: list  # sections of papers, in words
    functions: dict  # {file: {qualified name: points}}
    command: str  # shows the result
    expect: str  # what it then prints or draws
    minutes: int  # of one CPU core
    questions: list  # two, whose answers need a measurement
    where: dict  # {qualified name: paper and equation}

    @property
    def tests(self):
        """Name of the file of its public tests."""
        return f"test_{self.number}_{self.name}.py"

    @property
    def keys(self):
        """{"file:qualified name": points}."""
        return {f"{file}:{name}": points for file, names in self.functions.items()
                for name, points in names.items()}


def find(tree, name):
    """The function of a qualified name in a syntax tree, or None."""
    for part in name.split("."):
        tree = next((n for n in getattr(tree, "body", []) if getattr(n, "name", "") == part), None)
    return tree


ASSIGNMENTS = [
    Assignment(
        1, "masks", "Masks: objects that share the pixels, and how to score them",
        ["Mask2Act 3.2 from eq. 2 to the losses", "STM (Oh et al., 2019), soft aggregation",
         "XMem (Cheng and Schwing, 2022), supplement: bootstrapped cross-entropy and dice"],
        {"mask_planner.py": {"binary_masks": 15, "soft_aggregate": 25, "hardest_fraction": 10,
                             "bootstrapped_cross_entropy": 20, "dice": 20, "iou": 10}},
        "python mask_planner.py --suite libero_spatial --tasks 0 --demos 2 --preset tiny "
        "--steps 300",
        "`dice` falls from 0.8 to 0.3, while `ce`, the bootstrapped cross-entropy, rises again as "
        "fewer pixels count; a picture of predicted beside true masks; held-out IoU at +32, that "
        "is 32 steps ahead, of 0.83 (copying the present mask: 0.59) for the robot and 0.46 (0.29) "
        "for what moves (`moving`)", 3,
        ["Let `soft_aggregate` return log p where STM has log-odds. What happens to the IoU "
         "where two objects touch? Measure it over the pixels near both.",
         "Replace the schedule of the hardest pixels by a constant 1, and then 0.15. How does the "
         "logged `ce` change, how the IoU of `moving`, and why does the loss not rank the three?"],
        {"binary_masks": "Mask2Act 3.2, binary masks m^n", "soft_aggregate": "Mask2Act eq. 3 (STM)",
         "hardest_fraction": "XMem, schedule of the bootstrapping",
         "bootstrapped_cross_entropy": "Mask2Act 3.2, bootstrapped cross-entropy (XMem)",
         "dice": "Mask2Act 3.2, dice loss (XMem)", "iou": "intersection over union, the score"}),
    Assignment(
        2, "planner", "Planner: tokens of pictures, and where masks will be",
        ["Mask2Act 3.2, eq. 1 and 2, Fig. 3", "Mask2Act 3.4, architecture",
         "PLEX (Thomas et al., 2023), planner"],
        {"core/networks.py": {"block_causal_mask": 20},
         "mask_planner.py": {"Planner.plan_from": 30, "Decoder.forward": 30, "make_batch": 20}},
        "python mask_planner.py --suite libero_spatial --tasks 0 --demos 5 --preset laptop "
        "--steps 300",
        "in the picture predicted masks that have left the present ones; held-out IoU at +32 of "
        "0.85 (copying the present mask: 0.60) for the robot and 0.55 (0.31) for what moves", 8,
        ["Score the trained planner on the held-out episodes with the usual goal picture, and with "
         "the present frame in its place. How much of the IoU at +32 depends on the goal?",
         "Train with four frames of history (the preset has one). How do the held-out IoU and the "
         "time of a step change, and how, if the mask is causal by token and not by picture?"],
        {"block_causal_mask": "Mask2Act 3.4, attention over pictures",
         "Planner.plan_from": "Mask2Act eq. 1, planner P",
         "Decoder.forward": "Mask2Act eq. 2, decoder D",
         "make_batch": "Mask2Act eq. 1 and 2, goals of 4.1"}),
    Assignment(
        number=3, name="tracks", title="Tracks: where any points of a picture will go",
        read=["ATM IV-A with Fig. 2a, Table VI, appendix B", "MAE (He et al., 2022), 3",
              "DrQ (Kostrikov et al., 2021), random shifts"],
        functions={
            "core/networks.py": {"random_shift": 15},
            "track_planner.py": {"track_patches": 10, "track_from_patches": 10, "features_at": 15,
                                 "mask_patches": 10, "augment": 15, "TrackPlanner.loss": 25}},
        command="python track_planner.py --suite libero_spatial --tasks 0 --demos 5 "
        "--preset laptop --steps 300",
        expect="held-out points that move, in the third-person picture at +32: 7.5 pixels of 128 "
        "off, 22.6 if they stayed and 53 if they kept on (measured: 7.5 minutes of one core in "
        "all); in the picture tracks that leave with the hand", minutes=8,
        questions=[
            "Shift the tracks with the axes swapped (as ATM's code does) and train again. By how "
            "much does the training loss change, by how much the held-out distance of points that "
            "move? Which of the two would have shown the mistake?",
            "Train with --mask-ratio 0, 0.25 and 0.5. How do held-out distance and the time of a "
            "step change? Does the reconstruction help at this length of training?"],
        where={"random_shift": "ATM Table VI, random shift (DrQ)",
               "track_patches": "ATM IV-A, Table VI, patches of tracks",
               "track_from_patches": "ATM IV-A, Table VI, patches of tracks",
               "features_at": "ours, in ATM Fig. 2a: the picture at a point",
               "mask_patches": "ATM IV-A, masked patches (MAE)",
               "augment": "ATM Table VI, augmentation",
               "TrackPlanner.loss": "ATM IV-A, track and reconstruction loss"}),
    Assignment(
        number=4, name="video", title="Video: the noise of a diffusion model, forth and back",
        read=["AVDC 3.1", "Ho et al. (2020) 2 and 3.2, eq. 4", "Nichol and Dhariwal (2021) 3.2",
              "Salimans and Ho (2022) 4", "Song et al. (2021) 4.1, eq. 12"],
        functions={
            "video_planner.py": {"to_bytes": 10, "to_residual": 10, "from_residual": 15,
                                 "cosine_schedule": 20, "add_noise": 10, "loss_weight": 15,
                                 "ddim_step": 20}},
        command="python video_planner.py --suite mt10 --tasks 0 --demos 1 --preset laptop "
        "--batch 2 --steps 300",
        expect="`plain` falls from 0.55 to 0.23; of two held-out videos the last picture has a "
        "PSNR of 22.6 dB and an SSIM of 0.82 (repeating the present one: 18.8 and 0.78); in the "
        "picture an arm, blurred, that goes the way of the true one (measured: 9.6 minutes of one "
        "core in all)",
        minutes=10,
        questions=[
            "Sample one trained model with --show and --sample-steps 1, 2, 5, 10 and 20. How does "
            "the PSNR depend on the number of steps, and how do the pictures? Why is it no "
            "contradiction if one step has the best PSNR?",
            "The authors' network predicts the velocity v = sqrt(alpha_bar) noise - sqrt(1 - "
            "alpha_bar) x0. Write x0 from x_t and v, and v from x_t and x0, check both on random "
            "clips of one size, and find the weight that makes the error of x0 the error of v. "
            "Then train with the weights 1, SNR and min(1 + SNR, gamma): compare the logged "
            "`plain` error and the error at the noisiest tenth of the steps alone."],
        where={"to_bytes": "AVDC 3.1, pictures; in [-1, 1] as in Ho et al. (2020)",
               "to_residual": "AVDC 3.1, x_0; ours: the change from the present picture",
               "from_residual": "AVDC 3.1, x_0; ours: the change from the present picture",
               "cosine_schedule": "Nichol and Dhariwal (2021) eq. 17",
               "add_noise": "Ho et al. (2020) eq. 4",
               "loss_weight": "Salimans and Ho (2022) 4, limited by gamma",
               "ddim_step": "Song et al. (2021) eq. 12, sigma = 0"}),
    Assignment(
        number=5, name="acting", title="Acting: one network for any plan, in a closed loop",
        read=["Mask2Act 3.3, eq. 4", "ATM IV-B, Table III", "ACT (Zhao et al., 2023) IV-A",
              "Agarwal et al. (2021) 3"],
        functions={
            "executor.py": {"waypoints": 15, "Executor.look": 20, "Executor.act": 20,
                            "Executor.loss": 10, "Policy.observe": 10, "Policy.__call__": 10},
            "results/tables.py": {"t_interval": 5, "difference_interval": 10}},
        command='F="--suite libero_spatial --tasks 0,1 --demos 5 --preset laptop --steps 600"\n'
        "for s in 0 1 2; do python mask_planner.py $F --seed $s --name mask_s$s\n"
        "for p in none runs/libero_spatial/mask_s$s.pt; do python executor.py --planner $p $F "
        "--action-demos 2 --seed $s; done; done\n"
        "python rollout.py runs/libero_spatial/*executor*.pt --episodes 5 --no-films\n"
        "python -m results.tables",
        expect="a difference over the three seeds (results/README.md has it then) whose interval "
        "says nothing: an earlier executor, without STATE_NOISE and sentence, solved as cloning 7 "
        "of 30 episodes (4, 1, 2), the mask plan 6 (2, 1, 3), -3 points, -41 to 35 (50 minutes of "
        "one core, an Intel Xeon with AMX; some 70 without)",
        minutes=50,
        questions=[
            "Two tasks, two demonstrations, three seeds: what is the interval of the difference "
            "between the plan's and cloning's success rates? How many seeds would a difference of "
            "10 points need?",
            "Execute 1, 2, 4 and 8 of the 8 actions of a chunk (set `execute` of the policy in "
            "`rollout.make_policy`; each with --results of its own). How do the success and the "
            "seconds per episode change?"],
        where={"waypoints": "ours, see Executor.act: where the gripper next changes",
               "Executor.look": "Mask2Act eq. 4",
               "Executor.act": "Mask2Act eq. 4, ATM IV-B, Table III",
               "Executor.loss": "ATM IV-B, behavioural cloning",
               "Policy.observe": "Mask2Act 3.3, what the planner sees live",
               "Policy.__call__": "Mask2Act 3.3, ATM IV-B, the closed loop",
               "t_interval": "Student (1908), mean over seeds",
               "difference_interval": "Student (1908), paired differences over seeds"}),
    Assignment(
        number=6, name="motion", title="Motion: from flow to how a hand must move",
        read=["AVDC 3.2 and 3.3 with L_trans", "Hartley and Zisserman (2004) 6.1, A6.1, A6.8"],
        functions={
            "sims/camera.py": {"project": 15},
            "video_control/flow.py": {"read": 15},
            "video_control/motion.py": {"fit_motion": 35, "infer_motions": 15, "grasp_point": 10,
                                        "subgoals": 10}},
        command="python -m video_control.avdc oracle --suite avdc --tasks button-press,door-open "
        "--episodes 10",
        expect="10 of 10 episodes of each task succeed (measured: 0.7 minutes of one core)",
        minutes=2,
        questions=[
            "Add Gaussian noise of 0, 0.5, 1 and 2 pixels to the exact correspondence (avdc.py, "
            "what `Actor.correspondence` returns, in [0, 1] of 96 pixels), NOISE as it is, once "
            "with motion.py's PRIOR, once with (1e6, 1e6), which is none. From which noise on does "
            "the success fall, which task fails first, and what does the prior change?",
            "AVDC also infers the camera's motion, for navigation: in a still scene, a moving "
            "camera sees points go as a still one sees a moving object's (3.3, duality). Turn "
            "`fit_motion`'s answer into the camera's motion. For turns of 5 to 30 degrees and ways "
            "of 5 to 30 cm, how far off is it, in degrees and cm, and what does the prior do?"],
        where={"project": "AVDC 3.3, the pinhole of L_trans", "read": "AVDC 3.2, flow at a point",
               "fit_motion": "AVDC 3.3, L_trans", "infer_motions": "ours, in AVDC 3.3: a chain",
               "grasp_point": "AVDC 3.3, the grasp", "subgoals": "AVDC 3.3, subgoals"}),
]
