"""The stages of a distillation, and the commands that run them."""
