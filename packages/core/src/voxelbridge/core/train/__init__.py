"""What every training has in common: schedule, optimizer, steps, metrics, resume, several ranks.

`voxelbridge.core.train.loop` shows how a part's `train()` is put together from these modules.
"""
