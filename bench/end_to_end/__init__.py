"""Times a whole unlearning of a real model against what people run: all weights, and LoRA.

    python -m bench.end_to_end

SmolLM2-135M forgets 40 records of TOFU beside 160 that are to be kept, in steps of as many forget as retain records.
Every arm is a process of its own, so that its peak of memory is its own, and the processes take turns, step by step.
All have the same records in the same order, in float32. None evaluates. Some steps are run, and 200, as many as
``unlearn`` takes, are counted from their medians; those of the first epoch, in which ours asks the original model about
each record, are told apart from later ones.

all weights   transformers' Trainer in the style of open-unlearning (Dorna et al. 2025, arXiv 2506.12618): forget and
              retain batch one after another, each padded to its longest record; the reference is a deep copy
LoRA          the same with peft, r = 8 on all linear layers, and the model without adapters as the reference
ours          localize over all records, in batches of 512 tokens, UnlearnTrainer with the package's defaults, the
              proof that no other weight changed, and the checkpoint
last third    the same with as many units of the last third of the layers; from the second epoch on the layers below
              are skipped
floor         forward and the gradient of the activations on the stock model, over the passes and positions that ours
              runs, with the likelihood of the answers as the loss, and nothing trained; beside it the same with the
              loss of the objective, of which the original was asked before; with all records in one row, kept apart by
              a mask; and with all padded to the longest and all logits

Raw seconds of every part, and the highest resident set of every process, are kept in ``bench/results/end_to_end.json``.
"""
