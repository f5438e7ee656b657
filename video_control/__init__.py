"""From an imagined video to motion."""
