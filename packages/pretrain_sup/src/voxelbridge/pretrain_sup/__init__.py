"""voxelbridge.pretrain_sup"""
