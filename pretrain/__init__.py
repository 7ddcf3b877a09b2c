"""Everything that learns from waveforms: manifests, audio, the encoder, its objectives, and the engine that
trains them."""
