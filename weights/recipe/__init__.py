"""How the embedded voice is made: sentences, recordings of them by open synthesisers, the codec, and its judge."""
