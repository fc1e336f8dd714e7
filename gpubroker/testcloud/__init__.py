"""The test cloud: the vendors' APIs on loopback, with real processes behind real SSH as the rented nodes.

    vendor APIs (vast.py, runpod.py, lambda_cloud.py, aws.py, modal.py)
        -> world.py   hosts, prices over time, rentals and what happened to them
        -> nodes.py   a home folder, an SSH server and processes for each rental
        -> bill.py    what each vendor would charge for it, by that vendor's own rules

One process, one event loop, one port a vendor, 127.0.0.1 only. Time is a clock that can run faster than the
real one. Nothing here is imported by the product, and bill.py imports nothing of the planner.
"""
