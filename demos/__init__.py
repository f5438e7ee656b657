"""Where videos come from."""
