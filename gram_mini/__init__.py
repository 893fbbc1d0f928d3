"""gram_mini: a generative foundation reward model, small enough to read.

The lesson is the three scripts at the top level and the files in this folder. Read them in order:

    pairs -> prompts -> batches -> model -> losses -> training -> judge -> evaluation

chat.py knows chat templates for prompts.py, and errors.py has the errors that a user can put right.
These files import each other and nothing else of ours. Everything else is in a folder with a
README, a wing: village, helpdesk, reading, runs, baselines, likelihood, serving, studies.
"""

import os

# OpenMP's threads wait for each other by spinning. Beside a busy process one of them may have no
# core, and the others spin in vain. So they spin briefly and then sleep. Version 0.2 measured: this
# costs 4% alone, and beside a busy process a run is 2.3 times slower in place of 3.8. libgomp reads
# it when torch is imported, so we must be imported before torch.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
