"""The study behind the stop rule and the suspect list.

    python -m benchmarks.study train --data FOLDER --workers 2     # resumable; one file per run, in study_runs/
    python -m benchmarks.study add                                 # adds finished runs to the archive in the repository
    python -m benchmarks.study page                                # tables and plots from the archive

`grid.py` defines the cells, `data.py` and `nets.py` what is trained, `train.py` trains one run and records raw signals,
`series.py` reduces these to some numbers for each epoch, `archive.py` keeps them, `criteria.py` has the criteria that pick an
epoch, and `cases.py` and `tables.py` compare them. Choices are made on one half of the grid and reported on everything else.
"""
