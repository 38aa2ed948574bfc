"""A model behind HTTP: OpenAI's routes for text, the Open Inference Protocol's for tensors.

main         opens a bundle, listens, and ends without losing anything
app          puts the application together
guards       what a request passes before the routes see it: its record, keys, size
completions  the routes for text, whole or as server-sent events
bodies       what comes in there, field for field; its parts are in messages and formats
schemas      what goes out there, field for field
forms        from answers to what goes out
prompts      from what comes in to a prompt; the routes for tokens
chat         from messages to text, by the model's template, which is in templates; rendering runs
             it in a process of its own, template_worker, by template_messages
tools        functions that the model may call
tensors      the routes for raw tensors
operations   the routes for whoever runs the server: health and metrics
service      what is served, and what a request has to keep to; asked says what is asked for
answers      from the batcher's thread to the event loop, from tokens to text
errors       every error, in the terms of the protocol that was spoken
metrics      what is counted
logs         lines of JSON
"""
