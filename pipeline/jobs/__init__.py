"""Units of work for the workers: open the input shard, call the stage, publish the output shard.

Each is a picklable record whose call does the work, in a worker of `cluster`, and returns entries of manifests or
figures, never rows. All are safe to run twice: what is published is left alone. `inputs` reads what people bring along,
`tables` takes tables made elsewhere, `answers` samples, scores and pairs, `training` is for the training group.
"""
