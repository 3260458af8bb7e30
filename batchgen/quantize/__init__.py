"""NVFP4 checkpoints: their numbers, what one weighs, how one is made and checked, and how one is loaded without a B200."""
