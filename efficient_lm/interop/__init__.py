"""Models of others: what lies in a folder or a file in Hugging Face's words becomes a model of ours.

`checkpoint.py` says what a reader of files gives, `families.py` what a config.json means, `load.py` fills the model.
"""
