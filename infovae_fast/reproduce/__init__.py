"""The paper's experiments, one file for each figure or table; run one with `python -m infovae_fast.reproduce.NAME`."""
