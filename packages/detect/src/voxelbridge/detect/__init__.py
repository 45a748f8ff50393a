"""voxelbridge.detect"""
