"""Knowledge distillation from a BERT-family teacher to a TinyBERT student: tensors and models."""
