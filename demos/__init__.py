"""Where videos come from.

record.py    scripted demonstrators' episodes, in a pool of processes, into data files, which the
             planners' programs ask for first; the demonstrator as an actor for rollout.py
libero.py    LIBERO's scripted demonstrator, from grasp.py (where to hold a thing), fixtures.py
             (drawers, doors, knobs) and place.py (where to put it); Meta-World brings its own
official.py  LIBERO's published demonstrations, checked against the simulator
films.py     any film; annotated.py gives films and recorded suites the masks and tracks of networks
language.py  instructions as numbers
"""
