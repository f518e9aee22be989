"""A store of teacher signals: one directory, written once, read by any number of runs, students and machines. What a
run keeps of its teacher (`signal/`) is one too.

    store.json                         teacher, tokenizer, template, codec, temperatures (sealed)
    hidden.safetensors   hidden.json   the head for hidden states, where any are kept
    000000.safetensors   000000.json   a shard: signals of some responses, and its seal with size and sha256
    .lock                              held by the one process that writes

A signal is found by a hash of the exact token ids it belongs to (`addresses`), so it is never that of another text. A
shard counts once its seal is there, which is written last; a file without one is half written and made again. Every
response has a checksum of its own in its shard, compared at each reading, so that a flipped bit is an error and never
a signal.
"""
