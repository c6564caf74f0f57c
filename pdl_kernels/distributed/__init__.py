"""Several processes of torch.distributed: sums over them, equal weights in all of them, vocabulary parallelism."""
