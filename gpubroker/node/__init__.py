"""What is copied onto a rented node: standard library only, Python 3.8 or newer, nothing else of gpubroker.

bundle.py packs this folder and gpubroker/checkpoint.py into one file, gpubroker-node.pyz:

    agent.py -> job.py          the user's command in a session of its own, its log and its exit
             -> watch.py        finished checkpoints, the vendor's notice
             -> lease.py        how long this node may still bill
             -> generations.py  publish, verify, choose, retain
                  -> store.py   a folder or a mounted volume
                  -> s3.py      a bucket, signed by hand
"""
