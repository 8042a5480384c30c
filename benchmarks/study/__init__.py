"""The study behind the stop rule and the suspect list.

    python -m benchmarks.study train --data fashion_mnist.npz --workers 2     # resumable; one file per run
    python -m benchmarks.study page                                           # tables and plots

`grid.py` defines the runs, `train.py` trains one run and records every signal at every epoch, `criteria.py` contains the
criteria that pick an epoch, and `page.py` compares them. Choices are made on one half of the grid and reported on the other.
"""
