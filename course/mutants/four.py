"""Plausible mistakes in the functions of assignment 4: (what stands there, what could)."""

MUTANTS = {
    "video_planner.py:to_bytes": [
        (".clamp(-1, 1)", ".clamp(-1)"),                    # speckle where it is too white
        (".clamp(-1, 1)", ".clamp(0, 1)"),
        (".round()", ""),                                   # darker by half a step
        ("127.5", "127"),
        (".movedim(-3, -1)", ".transpose(-3, -1)"),         # transposed picture
        ("+ 1) *", "- 1) *"),
    ],
    "video_planner.py:to_residual": [
        ("pictures - now", "pictures + now"),
        ("(pictures - now[:, None])", "(now[:, None] - pictures)"),     # wrong sign
        ("/ RESIDUAL_STD", "* RESIDUAL_STD"),
        ("now[:, None]", "pictures[:, :1]"),                # the first picture to come
        ("now[:, None]", "now[None]"),                      # another sample's present
        ("pictures - now", "pictures * now"),
        ("/ RESIDUAL_STD", "- RESIDUAL_STD"),
    ],
    "video_planner.py:from_residual": [
        ("RESIDUAL_STD + now", "RESIDUAL_STD - now"),
        ("x * RESIDUAL_STD", "x / RESIDUAL_STD"),
        (".clamp(-1, 1)", ".clamp(0, 1)"),
        (".clamp(-1, 1)", ".clamp(-1)"),
        ("(x * RESIDUAL_STD", "(x.clamp(-1, 1) * RESIDUAL_STD"),    # too early, too
        ("now[:, None]", "now[None]"),                      # another sample's present
    ],
    "video_planner.py:cosine_schedule": [
        ("** 2", "** 1"),
        ("/ 1.008", "/ 1"),
        ("math.pi / 2", "math.pi / 4"),                     # never all noise
        (".clamp(max=0.999)", ""),
        (" / T", " / (T + 1)"),                             # off by one
        ("cumprod(1 - beta, 0)", "cumprod(beta, 0)"),
        ("torch.cumprod(1 - beta, 0)", "(1 - beta)"),       # alpha, not alpha_bar
        ("0.008) /", "0.08) /"),
    ],
    "video_planner.py:add_noise": [
        ("alpha_bar.sqrt() * x0", "alpha_bar * x0"),
        ("(1 - alpha_bar).sqrt()", "(1 - alpha_bar)"),
        ("x0 + (1", "x0 - (1"),
        ("(1 - alpha_bar)", "(1 + alpha_bar)"),
        ("alpha_bar.sqrt() * x0", "alpha_bar.sqrt() * noise"),
        ("* noise", "* torch.randn_like(noise)"),           # noise of its own
        ("* noise", "+ noise"),
        ("* x0", "+ x0"),
    ],
    "video_planner.py:loss_weight": [
        ("(1 / (1", "(alpha_bar / (1"),                     # the SNR: near 0 at the noisiest steps
        ("(1 - alpha_bar)", "alpha_bar"),                   # the wrong way round
        (".clamp(max=GAMMA)", ".clamp(min=GAMMA)"),
        (".clamp(max=GAMMA)", ""),
        ("(1 - alpha_bar)", "(1 - alpha_bar).sqrt()"),
        ("(1 - alpha_bar)", "(1 + alpha_bar)"),
        ("(1 - alpha", "(2 - alpha"),
        ("max=GAMMA", "max=1"),
    ],
    "video_planner.py:ddim_step": [
        ("alpha_bar.sqrt() * x0", "alpha_bar * x0"),
        ("(1 - alpha_bar).sqrt()", "(1 - alpha_bar)"),
        ("(1 - alpha_bar)", "(1 - alpha_bar_prev)"),
        ("noise, alpha_bar_prev", "noise, alpha_bar"),      # stays where it is
        ("(x - alpha_bar", "(x + alpha_bar"),
        ("add_noise(x0, noise", "add_noise(x, noise"),
        ("add_noise(x0, noise", "add_noise(x0, -noise"),
    ],
}
