"""What an encoder is trained on: HuBERT, wav2vec 2.0, and the verb `pretrain`."""
