"""The likelihood of a response under stage 1, beside the verdict of stage 2."""
