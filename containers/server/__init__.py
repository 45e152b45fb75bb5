"""The inference server: a base model and its adapters behind KAITO's `/chat` and OpenAI's API.

__main__.py   the program: binds the port, loads the model in the background, serves until SIGTERM
job.py        what the job file says
config.py     what KAITO's inference_config.yaml says
inputs.py     the port, the weights folder and the adapters, checked before the model is loaded
engine.py     the model with its adapters, and generation (the only module that needs torch)
text.py       tokens into text, piece by piece, with stop strings
worker.py     the one thread that generates, the line before it, and a request's view of its answer
schemas.py    request bodies
app.py        routes that are neither KAITO's nor OpenAI's, error answers
kaito.py      POST /chat
openai.py     /v1/models, /v1/chat/completions, /v1/completions
metrics.py    what /metrics shows
gate.py       request size limit, counting and logging of every request
refusal.py    the one exception by which a request is refused
"""
