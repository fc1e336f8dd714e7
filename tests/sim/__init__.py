"""The real supervisor code on a virtual clock, against a cloud in memory where everything goes wrong, by seed.

    simulation.py   one seed: supervisors tick, crash, stand still; the rest of these are its parts
    clock.py        virtual time, and a wall clock that jumps
    faults.py       all chance: what goes wrong, where a supervisor dies or stands still
    cloud.py        three vendors that rent nodes out, and bill them by their own books
    nodes.py        what runs on a node: agent, program, lease; and the store that all nodes publish into
    database.py     the product's own database, in memory, busy or cut off by chance
    judge.py        what must hold, after every tick
    mutations.py    bugs that were planted, to see that the judge finds them

`python -m tests.sim SEED --trace` plays one seed again, exactly.
"""
