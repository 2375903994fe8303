"""A look inside: which tokens of a text take how many experts, and what the experts of a model are for.

`dsmoe inspect` reads a run, an export or a Mixtral, OLMoE or Qwen3-MoE on texts of the user. Every module has the
definitions of its figures with their sources; docs/inspect.md has them for users.

    models          what can be inspected, behind one interface
    texts, reading  texts to tokens, tokens to losses and routes
    load            balance of layers; experts per token by kind and position
    hardness        experts per token against loss
    specialization  typical tokens, vocabulary, domains, co-activation
    redundancy      which experts are alike, and pairs to merge
    training        saturation between checkpoints
    sweep           k, p and theta at inference
    comparison      two models on the same tokens
    report          all of it as one tree; tables, page and terminal show it
"""
