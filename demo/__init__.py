"""The embedded model `potluck-demo`: its small world, tokenizer, training and evaluation."""
