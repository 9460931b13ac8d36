"""What a model does with text: windows of tokens, and the model one decoder layer at a time."""
