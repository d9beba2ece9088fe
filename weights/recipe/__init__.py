"""The recipe of the embedded voice: sentences, synthesised recordings, codec, model. docs/voice.md describes it."""
