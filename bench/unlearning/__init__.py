"""Ways to unlearn, compared on facts that a real language model learned in its pretraining.

    python -m bench.unlearning run bench/unlearning/grids/NAME.yaml      every run that bench/results has not yet
    python -m bench.unlearning table bench/unlearning/grids/NAME.yaml    tables of what is there, into the docs

A grid is one YAML file: methods × budgets × learning rates × seeds, see ``bench.unlearning.grid``. A run takes the
model, a split of the facts that it knows (``splits``), selects and trains (``methods``), and asks it (``measure``).
What it found is appended to ``bench/results/unlearning/NAME.jsonl`` as one line; a run that is there is not run again.

Every method has the same number of steps and the same number of learning rates to choose from, and no step looks at a
question. The rate of a method and budget is the one that does best on the tuning part (the statements that trained,
and held-out facts of their own); what is reported (``tables``) is of other questions: rewordings that no training saw,
held-out facts of the same kind and of other kinds, and general text.
"""
