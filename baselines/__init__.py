"""What the plans are compared with, behind the planners' interface.

cloning.py: no plan; what takes its place is the goal itself, a picture or a sentence, and the
executor trains all of it (BC-R3M: from R3M's weights).  plex.py: the plan of PLEX, features of
future pictures.  vpt.py: no planner but a suite; videos get the actions that a network trained on
the few labelled ones predicts, and cloning learns from them.
"""
