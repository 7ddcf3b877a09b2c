"""wav2vec 2.0 and HuBERT weights from and to other libraries: the verbs `import` and `export`."""
