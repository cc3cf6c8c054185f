"""From clean records to rows of tokens: templates, framing, tokenisation, mixture, packing, the token ledger."""
