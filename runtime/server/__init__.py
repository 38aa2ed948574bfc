"""A model behind HTTP: OpenAI's routes for text, the Open Inference Protocol's for tensors.

main            opens a bundle, listens, and shuts down gracefully
listening       the listening socket, and how it is closed without losing a connection
connections     timeouts and limits of a client's connection
app             assembles the application from routes and middleware
guards          middleware: the record of a request, limits of its body, HEAD
access          middleware: API keys, host names, content types
completions     OpenAI's routes for text, whole or as server-sent events
bodies          the request bodies of these routes; parts of them are in messages and formats
schemas         the response bodies of these routes
responses       turns answers into these responses
prompts         turns a request into the ids of its prompt; the routes for tokens
chat            renders messages with the model's chat template, which is in templates; rendering
                runs the template in a process of its own, template_worker, and talks to it with
                template_messages
tools           functions that the model may call
tensors         the Open Inference Protocol's routes for tensors
operations      the routes for operators: health, version and metrics
service         the model that is served, and the limits of a request
forward         forward passes apart from the batch: for logits, and to score prompts
compiler        compiles the grammars that answers must follow
one_by_one      the thread and the bounded queue of each of these two
answer_options  the options of a request for generation
answers         brings tokens from the batcher's thread to the event loop, and decodes them to text
clients         detects clients that have disconnected
watched         detects changes of the files that are mapped into memory
errors          all errors, in the format of the protocol that the client uses
metrics         metrics for Prometheus
logs            log lines in JSON
"""
