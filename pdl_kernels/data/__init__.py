"""Label ids out of what people have: tensors, lists, data sets, files and tokenizers."""
