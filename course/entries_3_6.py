"""Assignments 3 to 6, as the fields of assignments.Assignment.  Functions stand in the order in
which their tests pass."""

ENTRIES = [
    dict(
        number=3, name="tracks", title="Tracks: where any points of a picture will go",
        read=["ATM IV-A with Fig. 2a, Table VI, appendix C", "MAE (He et al., 2022), 3",
              "DrQ (Kostrikov et al., 2021), random shifts"],
        functions={
            "core/networks.py": {"random_shift": 15},
            "track_planner.py": {"track_patches": 10, "track_from_patches": 10, "features_at": 15,
                                 "mask_patches": 10, "augment": 15, "TrackPlanner.loss": 25}},
        command="python track_planner.py --suite libero_spatial --tasks 0 --demos 5 "
        "--preset laptop --steps 300",
        expect="not measured", minutes=8,
        questions=[
            "Shift the tracks with the axes swapped (as ATM's code does) and train again. By how "
            "much does the training loss change, by how much the held-out distance of points that "
            "move? Which of the two would have shown the mistake?",
            "Train with --mask-ratio 0, 0.25 and 0.5. How do held-out distance and the time of a "
            "step change? Does the reconstruction help at this length of training?"],
        where={"random_shift": "ATM Table VI, random shift (DrQ)",
               "track_patches": "ATM IV-A, Table VI, patches of tracks",
               "track_from_patches": "ATM IV-A, Table VI, patches of tracks",
               "features_at": "ATM Fig. 2a, the picture at a point",
               "mask_patches": "ATM IV-A, masked patches (MAE)",
               "augment": "ATM Table VI, augmentation",
               "TrackPlanner.loss": "ATM IV-A, track and reconstruction loss"}),
    dict(
        number=4, name="video", title="Video: the noise of a diffusion model, forth and back",
        read=["AVDC 3.1", "Ho et al. (2020) 2 and 3.2, eq. 4", "Nichol and Dhariwal (2021) 3.2",
              "Salimans and Ho (2022) 4", "Song et al. (2021) 4.1, eq. 12"],
        functions={
            "video_planner.py": {"to_bytes": 10, "to_residual": 10, "from_residual": 15,
                                 "cosine_schedule": 20, "add_noise": 10, "loss_weight": 15,
                                 "ddim_step": 20}},
        command="python video_planner.py --suite mt10 --tasks 0 --demos 1 --preset laptop "
        "--steps 200",
        expect="not measured", minutes=8,
        questions=[
            "Sample one trained model with --show and --sample-steps 1, 2, 5, 10 and 20. How does "
            "the PSNR depend on the number of steps, and how do the pictures? Why is it no "
            "contradiction if one step has the best PSNR?",
            "Train with the weights 1, SNR and min(1 + SNR, gamma). Compare the logged `plain` "
            "error and the error at the noisiest tenth of the steps alone."],
        where={"to_bytes": "AVDC 3.1, pictures in [-1, 1]",
               "to_residual": "AVDC 3.1, x_0 as the change from the present picture",
               "from_residual": "AVDC 3.1, x_0 as the change from the present picture",
               "cosine_schedule": "Nichol and Dhariwal (2021) eq. 17",
               "add_noise": "Ho et al. (2020) eq. 4",
               "loss_weight": "Salimans and Ho (2022) 4, limited by gamma",
               "ddim_step": "Song et al. (2021) eq. 12, sigma = 0"}),
    dict(
        number=5, name="acting", title="Acting: one network for any plan, in a closed loop",
        read=["Mask2Act 3.3, eq. 4", "ATM IV-B, Table III", "ACT (Zhao et al., 2023) IV-A",
              "Agarwal et al. (2021) 3"],
        functions={
            "executor.py": {"waypoints": 15, "Executor.look": 20, "Executor.act": 20,
                            "Executor.loss": 10, "Policy.observe": 10, "Policy.__call__": 15},
            "results/tables.py": {"t_interval": 10}},
        command="for s in 0 1 2; do for p in none runs/libero_spatial/mask.pt; do python "
        "executor.py --planner $p --suite libero_spatial --tasks 0,1 --demos 5 --action-demos 2 "
        "--preset laptop --steps 600 --seed $s; done; done",
        expect="not measured", minutes=60,
        questions=[
            "Two tasks, two demonstrations, three seeds: what is the interval of the difference "
            "between the plan's and cloning's success rates? How many seeds would a difference of "
            "10 points need?",
            "Execute 1, 2, 4 and 8 of the 8 actions of a chunk (`execute`). How do the success and "
            "the seconds per episode change?"],
        where={"waypoints": "ATM IV-B, differs: waypoints", "Executor.look": "Mask2Act eq. 4",
               "Executor.act": "Mask2Act eq. 4, ATM IV-B, Table III",
               "Executor.loss": "ATM IV-B, behavioural cloning",
               "Policy.observe": "Mask2Act 3.3, what the planner sees live",
               "Policy.__call__": "Mask2Act 3.3, ATM IV-B, the closed loop",
               "t_interval": "Student (1908), mean over seeds"}),
    dict(
        number=6, name="motion", title="Motion: from flow to how a hand must move",
        read=["AVDC 3.2 and 3.3 with L_trans", "Hartley and Zisserman (2004) 6.1, A6.1, A6.8"],
        functions={
            "sims/camera.py": {"project": 15},
            "video_control/flow.py": {"read": 15},
            "video_control/motion.py": {"fit_motion": 35, "infer_motions": 15, "grasp_point": 10,
                                        "subgoals": 10}},
        command="python -m video_control.avdc oracle --suite avdc --tasks button-press,door-open "
        "--episodes 10",
        expect="not measured", minutes=8,
        questions=[
            "Add Gaussian noise of 0, 0.5, 1 and 2 pixels to the exact correspondence. From which "
            "noise on does the success fall, and which of the tasks fails first?",
            "Set PRIOR to 1e6 (no prior), then fit each picture from the first in place of the "
            "one before. How far off are the subgoals, in cm, and how does the success change?"],
        where={"project": "AVDC 3.3, the pinhole of L_trans", "read": "AVDC 3.2, flow at a point",
               "fit_motion": "AVDC 3.3, L_trans", "infer_motions": "AVDC 3.3, the chain of motions",
               "grasp_point": "AVDC 3.3, the grasp", "subgoals": "AVDC 3.3, subgoals"}),
]
