"""voxelbridge.pretrain_ssl"""
