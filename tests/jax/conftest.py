import os

os.environ.setdefault("KERAS_BACKEND", "jax")  # read when keras is imported
