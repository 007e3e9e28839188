"""Datasets: dataset.py reads them, corpus.py makes them from text, each NAME/prepare.py
makes one."""
