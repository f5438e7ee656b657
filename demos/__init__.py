"""Where videos come from.

record.py    episodes of scripted demonstrators, in a pool of processes, into data files; also the
             demonstrator as an actor for rollout.py, and what the planners' programs call first
libero.py    LIBERO's scripted demonstrator: its plan, from grasp.py (where to hold a thing),
             fixtures.py (drawers, doors, knobs) and place.py (where to put it); Meta-World brings
             scripts of its own
official.py  LIBERO's published demonstrations, checked against the simulator
films.py     any film; annotated.py gives films and recorded suites the masks and tracks of networks
language.py  instructions as numbers
"""
