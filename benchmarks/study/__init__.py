"""The study behind the stop rule and the suspect list.

    python -m benchmarks.study train --data fashion_mnist.npz --workers 2     # goes on; one file per run
    python -m benchmarks.study page                                           # tables and plots

`grid.py` says what is trained, `train.py` trains one run and records every signal of every epoch, `criteria.py` holds the
criteria that pick an epoch, `page.py` compares them. Choices are made on one half of the grid and reported on the other.
"""
