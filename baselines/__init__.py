"""What the plans are compared with, behind the planners' interface: no plan but the goal itself, a
picture or a sentence, and R3M's encoder (cloning.py); PLEX's plan, features of future pictures
(plex.py); no planner but a suite, whose videos get predicted actions (vpt.py)."""
