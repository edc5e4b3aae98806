"""Processes that tests start and kill: children of one that has imported everything and run nothing yet."""

import multiprocessing

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(
    ["tokenfusion.train", "tokenfusion.cli", "torch.utils.tensorboard", "torch.distributed", "sklearn.datasets"]
)
