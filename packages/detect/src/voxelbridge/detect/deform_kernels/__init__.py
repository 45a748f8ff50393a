"""The ways deformable attention is computed: slow truth, torch, Triton."""
