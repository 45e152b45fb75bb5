"""The program that trains a LoRA or QLoRA adapter, proves it, and publishes it as an image.

    job.py          what it is told: the job file and training_config.yaml
    data.py         rows of tokens, their order in an epoch, micro-batches
    portion.py      what goes through the device at once, and less of it when memory runs out
    model.py        the base model, in 4 bits for QLoRA, and the adapters on it
    attention.py    each document of a row attends to itself
    isolation.py    documents that share a row must not see each other: which way a model has for it
    recompute.py    which blocks compute their activations again
    loss.py         cross-entropy over the tokens that are learned
    evaluation.py   the loss on held-out data
    schedule.py     the learning rate of each step
    checkpoint.py   what a killed training goes on from
    shipping.py     the same in a registry, for another machine to go on from
    training.py     the loop
    outcome.py      the best evaluation, which adapter is published, and the facts to tell
    gauges.py       memory, utilisation and time, for events and timings
    divergence.py   when a training is going wrong for good
    world.py        the processes that share the rows of each step
    launch.py       starting them, here and on other machines
    sharding.py     a base model that fits no single GPU
    samples.py      answers with and without the adapter, for the report
    image.py        the adapter's image and its model card

On a CPU the same job gives the same bytes, on whichever machine of the same kind, and however often it was killed on
the way; on a GPU nearly so, for the flash kernel adds up gradients in no fixed order.
With another number of processes it gives the same losses, to six digits and more where there is no dropout.
"""
