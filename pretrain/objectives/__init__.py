"""What an encoder learns from: one file for each objective, and the verb `pretrain`.

An objective is a module with its config, its batch, an `nn.Module` (`.encoder`, `forward` to a `Loss`) and a
subclass of `PretrainTask` (pretrain/objectives/task.py); and one line here. Its config is the table of its
name in TOML.
"""

OBJECTIVES = {
    "hubert": "pretrain.objectives.hubert:HubertTask",
    "wav2vec2": "pretrain.objectives.wav2vec2:Wav2Vec2Task",
}
