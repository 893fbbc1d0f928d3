"""gram_mini: a generative foundation reward model, small enough to read.

Data flows one way:

    data -> prompts -> batches -> backbone -> losses -> (the loop, in the scripts) -> reward_model -> evaluation

world/ is the embedded village that all of it can be tried on; training holds what surrounds a loop;
options and errors are what the scripts share.
"""
