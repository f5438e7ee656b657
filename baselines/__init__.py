"""What the plans are compared with."""
