"""The terms of the tokenizer's loss, one file each."""
