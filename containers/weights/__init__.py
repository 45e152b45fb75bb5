"""The program that fetches a base model: from a package, the Hub, or an OCI image, or made on the spot from a seed.

    python -m kaito_flows.containers.weights JOB.json

It leaves a Hugging Face folder in `<root>/workspace/weights`: configuration, safetensors, tokenizer and chat template;
with `parts: tokenizer` all but the safetensors. The folder appears in one step, whole; when it is there already,
nothing is done.

With a `store`, a folder that the pods of a node or of several nodes share, the model is made there, once:

    <store>/<name>-<hash of the source>/weights/    the model
    <store>/<name>-<hash of the source>/.weights-lock    (flock: holds among the pods of a node)

Whoever comes second waits for the lock, which ends with its holder's process. `<root>/workspace/weights` then is a link
to it or, where that is a volume's mount, holds a link to each file: who reads it needs the store at the same path.
"""
