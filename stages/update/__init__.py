"""The update: pairs in, a better policy out. torch.distributed and DeepSpeed, no Ray."""
