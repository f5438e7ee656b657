"""From an imagined video to motion: AVDC (flow and rigid motion, no action labels), UniPi (inverse
dynamics)."""
