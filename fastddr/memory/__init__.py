"""Peak GPU memory of a training: traced without a GPU, predicted by kind, planned for a card.

tape.py        which blocks a step takes and frees, for any batch
tracing.py     makes a tape from `step.training_step`
allocator.py   what PyTorch's allocator reserves for it
allowances.py  what no trace sees, declared or measured
predicting.py  a configuration's peak by kind
planning.py    what fits, and what to change
asked.py       the flags of `fastddr plan`
questions.py   its answers
fitting.py     the micro batch of a run, checked by a real step
cards.py       images a second at most
"""
