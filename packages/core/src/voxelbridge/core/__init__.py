"""voxelbridge.core"""
