"""Pre-training methods, one file each; `voxelbridge.pretrain_ssl.method` lists them."""
