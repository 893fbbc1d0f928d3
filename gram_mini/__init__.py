"""gram_mini: a generative foundation reward model, small enough to read.

The lesson is the three scripts at the top level and the files in this folder. Read them in order:

    pairs -> prompts -> batches -> model -> losses -> training -> judge -> evaluation

chat is what prompts knows of chat templates, errors is how a user is told what is wrong. These
files import each other and nothing else of ours.

What is not the lesson has a folder, a wing, with a README in it: village/ (the tiny world whose
truth is known), everyday/ (pairs in plain English), reading/ (files and formats), runs/ (what
surrounds a run), baselines/, serving/, studies/.
"""

import os

# OpenMP's threads wait for each other by spinning. Beside a busy process one of them has no core,
# and the others burn theirs. So they spin briefly and then sleep: see studies/speed/README.md.
# libgomp reads this when torch is imported, and therefore we are imported before torch.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
