"""Ways to unlearn, compared on facts that a real language model learned in its pretraining, and on toys.

    python -m bench.unlearning run bench/unlearning/grids/NAME.yaml      every run that bench/results has not yet
    python -m bench.unlearning table bench/unlearning/grids/NAME.yaml    tables of what is there, into the docs

A grid is one YAML file: methods × budgets × learning rates × seeds, see ``bench.unlearning.grid``. A run takes its
subject (``subjects``), a model with a split of what it knows: facts of a pretrained model (``splits``, ``measure``), or
records that a toy learned by heart, beside a model that never saw those to forget (``toys``). It selects and trains
(``methods``), and asks the subject again.
What it found is appended to ``bench/results/unlearning/NAME.jsonl`` as one line; a run that is there is not run again.

Every method has the same number of steps and the same number of learning rates to choose from, and no step looks at a
question. The rate of a method and budget is the one that does best on the tuning part (the statements that trained,
and held-out facts of their own); what is reported (``tables``) is of other questions: rewordings that no training saw,
held-out facts of the same kind and of other kinds, and general text. What both come to is in ``scores``.
"""
