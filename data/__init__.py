"""Datasets: dataset.py reads them, corpus.py makes them from text, NAME/prepare.py makes one."""
