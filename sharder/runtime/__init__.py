"""Runtime: a plan and a model become a placed model or a pipeline run.

place.py is ``sw.place`` (placing; pipelined over the devices of one process: local), verify.py is ``sw.verify``, run.py
``sw.run`` and training.py ``sw.pipeline``. The latter two have PyTorch's engine run stages that are cut from the graph
(piping): in workers (session.py, pipeline.py), or in the processes of ``torchrun`` (nodes.py, board.py). Before
anything is timed it is held against the unsharded model (gates). record.py and accounts.py are what a run measured.
"""
