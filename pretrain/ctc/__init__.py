"""Recognisers: connectionist temporal classification on top of an encoder, from labelled minutes to
transcripts with times."""
