"""Running a job on rented nodes: launch, prove the GPU, keep checkpoints, resume, account for it."""
